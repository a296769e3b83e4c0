//! A sandbox for the length of a benchmark.

use std::{
    error::Error,
    ops::Deref,
    path::{Path, PathBuf},
};

use standin::{
    model::Name,
    workload::{
        sandbox::{Options, Sandbox},
        spec::{Net, SandboxSpec},
    },
};

/// The `standin` that cargo built for this run.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_standin");

/// A sandbox that goes with its value, and whatever is in it.
pub(crate) struct Home {
    sandbox: Sandbox,
    pub(crate) name: Name,
    run_dir: PathBuf,
}

impl Home {
    /// In a directory, whose `log` then is the program's. The name begins with that of the benchmark.
    pub(crate) fn create(bench: &str, part: &str, dir: &Path) -> Result<Self, Box<dyn Error>> {
        let name: Name = format!("{bench}-{}-{part}", std::process::id()).parse()?;
        let spec =
            SandboxSpec { name: name.clone(), net: Net::Host, paths: Vec::new(), hostname: bench.to_owned() };
        let run_dir = dir.join("run");
        let options = Options {
            program: PROGRAM.into(),
            run_dir: run_dir.clone(),
            data_dir: dir.join("data"),
            shm_dir: dir.join("shm"),
            log: dir.join("log"),
            log_bytes_max: 1 << 20,
            isolated: None,
        };
        Ok(Self { sandbox: Sandbox::create(&spec, &options)?, name, run_dir })
    }
}

impl Deref for Home {
    type Target = Sandbox;

    fn deref(&self) -> &Sandbox {
        &self.sandbox
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(error) = Sandbox::destroy(&self.run_dir, &self.name) {
            eprintln!("the sandbox {} could not be removed: {error}", self.name);
        }
    }
}
