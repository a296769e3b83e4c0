//! What an agent remembers of each workload through restarts and power cuts: `workloads/NAME/workload.json`.
//!
//! Written whole to a new file, synced, renamed, the directory synced: a reader sees the old or the new one.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{drill::Last, ha::Record, model::Name, workload::spec::WorkloadSpec};

/// A workload as it is on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Durable {
    /// What it is.
    pub(super) spec: WorkloadSpec,
    /// The other host; none while it is not protected.
    pub(super) peer: Option<String>,
    /// The protocol's record; none while it is not protected.
    pub(super) record: Option<Record>,
    /// The tree on this host was started in the host's namespaces.
    pub(super) bare: bool,
    /// An operator has paused the protection.
    #[serde(default)]
    pub(super) paused: bool,
}

/// Where a workload's durable files are.
#[derive(Clone, Debug)]
pub(super) struct Place {
    dir: PathBuf,
}

impl Durable {
    /// A workload that is not protected.
    pub(super) fn of(spec: WorkloadSpec) -> Self {
        Self { spec, peer: None, record: None, bare: false, paused: false }
    }
}

impl Place {
    pub(super) fn of(state_dir: &Path, name: &Name) -> Self {
        Self { dir: state_dir.join("workloads").join(name.as_str()) }
    }

    /// The names of all workloads that have a record.
    pub(super) fn all(state_dir: &Path) -> io::Result<Vec<Name>> {
        let entries = match fs::read_dir(state_dir.join("workloads")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if let Ok(name) = entry.file_name().to_string_lossy().parse()
                && entry.path().join("workload.json").exists()
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    pub(super) fn history(&self) -> PathBuf {
        self.dir.join("history.jsonl")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.dir.join("output.log")
    }

    pub(super) fn data(&self) -> PathBuf {
        self.dir.join("paths")
    }

    /// Of a container that is made here.
    pub(super) fn bundle(&self) -> PathBuf {
        self.dir.join("bundle")
    }

    /// Says that a lazy restore was under way: see [`super::standby`].
    pub(super) fn lazy_mark(&self) -> PathBuf {
        self.dir.join("lazy-restore.json")
    }

    /// Says which epoch was let run here: see [`super::standby`].
    pub(super) fn run_mark(&self) -> PathBuf {
        self.dir.join("running.json")
    }

    /// Which hook was run last: see [`super::hooks`].
    pub(super) fn hook_mark(&self) -> PathBuf {
        self.dir.join("hook.json")
    }

    /// What the last drill found, if there was one.
    pub(super) fn last_drill(&self) -> Option<Last> {
        serde_json::from_slice(&fs::read(self.dir.join("last-drill.json")).ok()?).ok()
    }

    pub(super) fn write_drill(&self, last: &Last) -> io::Result<()> {
        self.make()?;
        write_synced(&self.dir.join("last-drill.json"), &serde_json::to_vec_pretty(last)?)
    }

    /// Makes the directory, 0700.
    pub(super) fn make(&self) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)
    }

    pub(super) fn read(&self) -> io::Result<Durable> {
        serde_json::from_slice(&fs::read(self.file())?).map_err(io::Error::other)
    }

    pub(super) fn write(&self, durable: &Durable) -> io::Result<()> {
        self.make()?;
        write_synced(&self.file(), &serde_json::to_vec_pretty(durable)?)
    }

    /// Forgets the workload; its history, log and files stay for people.
    pub(super) fn forget(&self) -> io::Result<()> {
        match fs::remove_file(self.file()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        File::open(&self.dir)?.sync_all()
    }

    fn file(&self) -> PathBuf {
        self.dir.join("workload.json")
    }
}

/// Puts a file on stable storage, whole: whoever reads it sees the old or the new one.
pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync(path)
}

/// Puts a file that is there on stable storage, with its name.
pub(super) fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}
