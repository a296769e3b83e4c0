//! Containers of an OCI runtime that is used directly: runc, crun.
//!
//! The runtime is asked through its command line, whose verbs the specification names. What a container is made of stands in
//! its bundle's `config.json`; the one on the standby is made from the same, with the paths of that host.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{fcntl::OFlag, unistd::pipe2};
use serde::Deserialize;

use super::{
    super::spec::{ContainerTree, ContainerTreeKind, Engine, Runtime},
    config::Config,
    engine::{
        EngineError, Found, Local, Made, Network, PidOne, Restore, Survey, TreeAt, check_is_ours, is_ours,
    },
    whole::runtime as whole,
};
use crate::{criu::swrk::error_lines, model::Name};

/// Where a runtime is looked for: what runs as root must not depend on somebody's environment.
const PLACES: [&str; 4] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];
const CLEAN_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// How long a verb may take.
const VERB_LIMIT: Duration = Duration::from_secs(30);
const VERB_POLL: Duration = Duration::from_millis(2);
/// Most of what a verb may say.
const SAID_BYTES_MAX: u64 = 64 << 10;

/// What `state` says.
#[derive(Debug, Deserialize)]
pub(super) struct State {
    pub(super) status: String,
    #[serde(default)]
    pub(super) pid: u32,
    pub(super) bundle: PathBuf,
}

/// A runtime and its directory of containers.
#[derive(Debug)]
pub(super) struct Oci {
    runtime: Runtime,
    program: PathBuf,
    state: Option<PathBuf>,
}

impl Oci {
    pub(super) fn find(runtime: Runtime, state: Option<&Path>) -> Result<Self, EngineError> {
        let program = PLACES.iter().map(|place| Path::new(place).join(runtime.program()));
        let program = program.into_iter().find(|program| program.is_file());
        let missing = || EngineError::Missing { program: runtime.program(), places: PLACES.join(", ") };
        let program = program.ok_or_else(missing)?;
        Ok(Self { runtime, program, state: state.map(Path::to_owned) })
    }

    /// See [`super::engine::survey`].
    pub(super) fn survey(runtime: Runtime) -> Survey {
        let engine = runtime.program();
        let asked = Self::find(runtime, None).and_then(|oci| oci.ask(&["--version"]).map(|said| (oci, said)));
        match asked {
            Ok((oci, said)) => {
                let found = said.lines().next().unwrap_or(engine).to_owned();
                let whole = whole::can_restore(&oci, std::process::id()).map_err(|error| error.to_string());
                Survey { engine, found, trouble: None, whole: Some(whole) }
            }
            Err(EngineError::Missing { .. }) => {
                Survey { engine, found: "not installed".into(), trouble: None, whole: None }
            }
            Err(error) => {
                let trouble = Some(format!("reinstall {engine}"));
                Survey { engine, found: error.to_string(), trouble, whole: None }
            }
        }
    }

    /// A container that runs and can be protected, of the runtime that knows it.
    pub(super) fn find_container(
        runtime: Option<Runtime>,
        state: Option<&Path>,
        id: &str,
    ) -> Result<Found, EngineError> {
        let candidates = runtime.map_or_else(|| vec![Runtime::Runc, Runtime::Crun], |runtime| vec![runtime]);
        let mut first = None;
        for runtime in candidates {
            let asked = Self::find(runtime, state)
                .and_then(|oci| oci.state(id)?.ok_or_else(|| oci.unknown(id)).map(|found| (oci, found)));
            match asked {
                Ok((oci, found)) => return oci.inspect(id, &found),
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or_else(|| EngineError::Unfit("no runtime was named".to_owned())))
    }

    fn inspect(&self, id: &str, state: &State) -> Result<Found, EngineError> {
        match state.status.as_str() {
            "running" => {}
            "paused" => {
                return Err(EngineError::Unfit(format!(
                    "it is paused; `{} resume {id}` first",
                    self.runtime
                )));
            }
            other => {
                return Err(EngineError::Unfit(format!("it is {other}, not running; start it first")));
            }
        }
        let (config, text) = Config::read(&state.bundle)?;
        config.check()?;
        let (runtime, state_dir) = (self.runtime, self.state.clone());
        let (pid_one, trees) = if let Some(wrap) = config.wrap() {
            (PidOne::Init(wrap), config.trees(&state.bundle))
        } else {
            let bundle = whole::check(self, &config, state)?;
            (PidOne::Application(bundle), config.trees_of_whole(&state.bundle))
        };
        let lendable = config.lendable(&state.bundle);
        Ok(Found {
            engine: Engine::Oci { runtime, state: state_dir, id: id.to_owned(), config: text },
            pid: state.pid,
            pid_one,
            trees,
            lendable,
            network: if config.has_own_net() { Network::Own } else { Network::Host },
        })
    }

    /// See [`super::engine::make`].
    pub(super) fn make(
        &self,
        name: &Name,
        trees: &[ContainerTree],
        id: &str,
        config: &str,
        local: &Local<'_>,
    ) -> Result<Made, EngineError> {
        if let Some(state) = self.state(id)? {
            check_is_ours(name, id, wrap_of(&state).as_deref())?;
            self.delete(id)?;
        }
        let mut config =
            Config::parse(config).map_err(|error| EngineError::Unfit(format!("its config.json: {error}")))?;
        config.check()?;
        let places = places_of(trees, local.data_dir)?;
        config.localise((trees, &places), local.left, local.data_dir)?;
        config.wrap_with(local.wrap)?;
        write_bundle(local.bundle, &config)?;
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| self.run_error(errno.into()))?;
        let pid = self.run(id, local.bundle, &write)?;
        Ok(Made { pid, trees: places, output: Some(read) })
    }

    /// Restores a container from CRIU's images and returns its pid 1; it runs then. What it writes goes to `restore.output`.
    pub(super) fn restore(&self, id: &str, restore: &Restore<'_>) -> Result<u32, EngineError> {
        if self.state(id)?.is_some() {
            let reason = format!("another container named {id} is here by now; remove or rename it");
            return Err(EngineError::Unfit(reason));
        }
        let bundle = restore.bundle.dir.as_path();
        let (log, work) = (bundle.join("runtime.log"), bundle.join("criu"));
        let _ = fs::remove_file(&log);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&work);
        made.map_err(|source| EngineError::Config { path: work.clone(), source })?;
        let copy = || restore.output.try_clone().map_err(|source| self.run_error(source));
        let mut command = self.command();
        // The runtime looks for CRIU by its name.
        command.env("PATH", format!("{}:{CLEAN_PATH}", whole::criu_dir(bundle, restore.criu)?.display()));
        command.arg("--log").arg(&log).args(["restore", "--detach", "--bundle"]).arg(bundle);
        command.arg("--image-path").arg(restore.images).arg("--work-path").arg(&work);
        command.args(["--tcp-established", "--file-locks", "--ext-unix-sk", "--shell-job", id]);
        command.stdin(Stdio::null()).stdout(copy()?).stderr(copy()?);
        if !self.wait(&mut command, &format!("{} restore {id}", self.runtime))? {
            let of_criu = fs::read_to_string(work.join("restore.log")).unwrap_or_default();
            let why = match error_lines(&of_criu) {
                why if why.is_empty() => last_words(&fs::read_to_string(&log).unwrap_or_default()),
                why => why,
            };
            // crun leaves one of which it says neither that it is there nor that it is not.
            if let Err(error) = self.delete(id) {
                tracing::debug!(%error, "what is left of a restore that failed");
            }
            return Err(self.failed("restore", id, &why));
        }
        let state = self.state(id)?.ok_or_else(|| self.unknown(id))?;
        Ok(state.pid)
    }

    /// Its name, and what it prints for a verb.
    pub(super) fn say(&self, arguments: &[&str]) -> Result<(Runtime, String), EngineError> {
        Ok((self.runtime, self.ask(arguments)?))
    }

    /// Whether there is one, and it is the workload's.
    pub(super) fn is_ours(&self, workload: &Name, id: &str) -> Result<bool, EngineError> {
        Ok(self.state(id)?.is_some_and(|state| is_ours(workload, wrap_of(&state).as_deref())))
    }

    /// How the container is; `None` if the runtime knows none of that id.
    pub(super) fn state(&self, id: &str) -> Result<Option<State>, EngineError> {
        match self.ask(&["state", id]) {
            Ok(said) => serde_json::from_str(&said)
                .map(Some)
                .map_err(|error| self.failed("state", id, &format!("its answer makes no sense: {error}"))),
            Err(EngineError::Failed { said, .. }) if is_unknown(&said) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn unknown(&self, id: &str) -> EngineError {
        let hint = self.state.as_ref().map(|dir| format!(" in {}", dir.display())).unwrap_or_default();
        EngineError::Unknown { engine: self.runtime.program(), id: id.to_owned(), hint, list: "list" }
    }

    /// Creates and starts a container from a bundle; returns its pid 1. What it writes goes to `output`.
    pub(super) fn run(&self, id: &str, bundle: &Path, output: &OwnedFd) -> Result<u32, EngineError> {
        let copy = || output.try_clone().map_err(|source| self.run_error(source));
        // The container's standard error is its own, so the runtime's words have to go to a file.
        let log = bundle.join("runtime.log");
        let _ = fs::remove_file(&log);
        let mut command = self.command();
        command.arg("--log").arg(&log).args(["run", "--detach", "--bundle"]).arg(bundle).arg(id);
        command.stdin(Stdio::null()).stdout(copy()?).stderr(copy()?);
        if !self.wait(&mut command, &format!("{} run {id}", self.runtime))? {
            let said = fs::read_to_string(&log).unwrap_or_default();
            return Err(self.failed("run", id, &last_words(&said)));
        }
        let state = self.state(id)?.ok_or_else(|| self.unknown(id))?;
        Ok(state.pid)
    }

    /// Kills a container and has the runtime forget it; one that is not there is fine.
    pub(super) fn delete(&self, id: &str) -> Result<(), EngineError> {
        const TRIES: u32 = 3;
        let mut tries = 1;
        loop {
            match self.ask(&["delete", "--force", id]) {
                Err(EngineError::Failed { said, .. }) if is_unknown(&said) => return Ok(()),
                // On a busy host it may take the kernel longer to end it than the runtime waits.
                Err(EngineError::Failed { said, .. }) if said.contains("still running") && tries < TRIES => {
                    tries += 1;
                }
                other => return other.map(drop),
            }
        }
    }

    /// Its program with what comes before every verb.
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env_clear().env("PATH", CLEAN_PATH);
        if let Some(state) = &self.state {
            command.arg("--root").arg(state);
        }
        command
    }

    /// Runs a verb and returns what it prints.
    fn ask(&self, arguments: &[&str]) -> Result<String, EngineError> {
        let verb = format!("{} {}", self.runtime, arguments.join(" "));
        let mut command = self.command();
        let mut out = tempfile()?;
        let copy = |file: &File| file.try_clone().map_err(|source| self.run_error(source));
        let mut err = tempfile()?;
        command.args(arguments).stdin(Stdio::null()).stdout(copy(&out)?).stderr(copy(&err)?);
        if self.wait(&mut command, &verb)? {
            return read_back(&mut out).map_err(|source| self.run_error(source));
        }
        let said = read_back(&mut err).map_err(|source| self.run_error(source))?;
        Err(EngineError::Failed { verb, said: last_words(&said) })
    }

    /// Whether it ended well.
    fn wait(&self, command: &mut Command, verb: &str) -> Result<bool, EngineError> {
        let mut child = command.spawn().map_err(|source| self.run_error(source))?;
        let until = Instant::now() + VERB_LIMIT;
        loop {
            if let Some(status) = child.try_wait().map_err(|source| self.run_error(source))? {
                return Ok(status.success());
            }
            if Instant::now() > until {
                let _ = child.kill();
                let _ = child.wait();
                return Err(EngineError::Slow { verb: verb.to_owned(), limit_s: VERB_LIMIT.as_secs() });
            }
            std::thread::sleep(VERB_POLL);
        }
    }

    fn run_error(&self, source: io::Error) -> EngineError {
        EngineError::Run { program: self.program.clone(), source }
    }

    fn failed(&self, verb: &str, id: &str, said: &str) -> EngineError {
        EngineError::Failed { verb: format!("{} {verb} {id}", self.runtime), said: said.to_owned() }
    }
}

/// An unnamed file: a pipe could fill up.
fn tempfile() -> Result<File, EngineError> {
    nix::sys::memfd::memfd_create(c"standin-oci", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map(File::from)
        .map_err(|errno| EngineError::Run { program: "memfd_create".into(), source: errno.into() })
}

fn read_back(file: &mut File) -> io::Result<String> {
    io::Seek::rewind(file)?;
    let mut text = String::new();
    file.take(SAID_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

fn is_unknown(said: &str) -> bool {
    said.contains("does not exist") || said.contains("No such file or directory")
}

/// The last line that a runtime wrote: of several, the first are its libraries'.
fn last_words(said: &str) -> String {
    let line = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it did not say why");
    line.trim().to_owned()
}

/// The host's directory of its init, if it is wrapped.
fn wrap_of(state: &State) -> Option<PathBuf> {
    Config::read(&state.bundle).ok().and_then(|(config, _)| config.wrap())
}

/// Where the trees are of a container that is made here; makes their directories.
pub(super) fn places_of(trees: &[ContainerTree], data_dir: &Path) -> Result<Vec<TreeAt>, EngineError> {
    let place = |(number, tree): (usize, &ContainerTree)| match tree.kind {
        ContainerTreeKind::Memory => Ok(TreeAt::Memory),
        ContainerTreeKind::Root | ContainerTreeKind::Mount => {
            let path = data_dir.join(number.to_string());
            let made = DirBuilder::new().recursive(true).mode(0o755).create(&path);
            made.map_err(|source| EngineError::Config { path: path.clone(), source })?;
            Ok(TreeAt::Plain(path))
        }
    };
    trees.iter().enumerate().map(place).collect()
}

/// Only root may look into it: the file may name secrets.
pub(super) fn write_bundle(bundle: &Path, config: &Config) -> Result<(), EngineError> {
    let path = bundle.join("config.json");
    let written = DirBuilder::new().recursive(true).mode(0o700).create(bundle).and_then(|()| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        file.write_all(config.value().to_string().as_bytes())
    });
    written.map_err(|source| EngineError::Config { path, source })
}

/// Wraps a bundle: its container, when it is next started, has our init as pid 1.
pub fn wrap_bundle(bundle: &Path, dir: &Path) -> Result<(), EngineError> {
    let (mut config, _) = Config::read(bundle)?;
    config.check()?;
    config.wrap_with(dir)?;
    let path = bundle.join("config.json");
    let next = bundle.join("config.json.next");
    let text = serde_json::to_string_pretty(config.value()).map_err(io::Error::from);
    let written = text.and_then(|text| fs::write(&next, text)).and_then(|()| fs::rename(&next, &path));
    written.map_err(|source| EngineError::Config { path, source })
}
