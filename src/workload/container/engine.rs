//! What is asked of every engine, and how its answers look: find a container that runs, make the same one, end it.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    super::spec::{ContainerSpec, ContainerTree, Daemon, Engine, Lent, MountMode, MountRule, Runtime},
    docker::Docker,
    oci::Oci,
    whole::runtime as whole,
};
use crate::model::Name;

/// A container as the operator names it.
#[derive(Clone, Debug)]
pub enum Named {
    /// Of an OCI runtime.
    Oci {
        /// Whose; `None`: the first that knows it.
        runtime: Option<Runtime>,
        /// The runtime's directory of containers.
        state: Option<PathBuf>,
        /// The container's id.
        id: String,
    },
    /// Of a daemon with Docker's API.
    Docker {
        /// Which.
        daemon: Daemon,
        /// The container's name or id.
        container: String,
    },
}

impl Named {
    /// What the operator calls it.
    pub fn container(&self) -> &str {
        match self {
            Self::Oci { id, .. } => id,
            Self::Docker { container, .. } => container,
        }
    }
}

/// Where one of a container's trees is on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TreeAt {
    /// A directory.
    Plain(PathBuf),
    /// The writable layer of an overlay.
    Overlay {
        /// Its directory.
        upper: PathBuf,
        /// Where the host sees the overlay.
        merged: PathBuf,
    },
    /// In the container's memory.
    Memory,
}

/// A container's files, and where they are on this host, or why they cannot be replicated.
pub(super) type Trees = Vec<(ContainerTree, Result<TreeAt, String>)>;

/// Where a container's sockets are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Network {
    /// In the host's namespace.
    Host,
    /// In one of its own.
    Own,
}

/// A container that runs and can be protected.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) engine: Engine,
    pub(super) pid: u32,
    /// How it can be protected.
    pub(super) pid_one: PidOne,
    pub(super) trees: Trees,
    /// What it mounts read-only.
    pub(super) lendable: Vec<Lendable>,
    pub(super) network: Network,
}

/// A file or directory of the host that a container mounts read-only: both hosts must have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lendable {
    /// Where it is inside.
    pub inside: PathBuf,
    /// Where this host has it.
    pub source: PathBuf,
    /// Where the standby would look for it.
    pub wanted: PathBuf,
}

/// What a container mounts and is not replicated.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unreplicated<'a> {
    /// As the operator says.
    left: &'a [MountRule],
    /// Mounted read-only, of which this host may have copies.
    lent: &'a [Lent],
}

impl<'a> Unreplicated<'a> {
    pub(super) fn of(spec: &'a ContainerSpec) -> Self {
        Self { left: &spec.left, lent: &spec.lent }
    }
}

/// What a container's pid 1 is.
#[derive(Debug)]
pub(super) enum PidOne {
    /// Our init, of this directory of the host.
    Init(PathBuf),
    /// The application; of a container whose runtime can restore it whole.
    Application(Bundle),
}

/// What this host has of a container that is dumped or restored whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bundle {
    /// Its directory: that of its bundle, or the one that a daemon keeps for it. No other container has it.
    pub(super) dir: PathBuf,
    /// The root directory, as the host sees it.
    pub(super) root: PathBuf,
    /// The last part of its cgroup's path.
    pub(super) leaf: String,
}

/// What this host lends a container that will be restored whole here.
#[derive(Debug)]
pub(super) struct Prepared<'a> {
    pub(super) data_dir: &'a Path,
    pub(super) bundle: &'a Path,
    /// Where its file systems in memory are made, by the numbers of their trees.
    pub(super) memory: &'a Path,
    /// What there is of file systems and files that show nothing.
    pub(super) nothing: &'a Path,
    /// Its network namespace, if that is ours.
    pub(super) netns: Option<&'a Path>,
    /// Below which its cgroup will be, from the root of the cgroup file system on.
    pub(super) cgroup: &'a Path,
    /// Where an overlay is mounted until it is restored.
    pub(super) merged: &'a Path,
    /// Its files are to be those of its image.
    pub(super) fresh: bool,
    pub(super) left: Unreplicated<'a>,
}

/// What a runtime restores, and with what.
#[derive(Debug)]
pub(super) struct Restore<'a> {
    pub(super) bundle: &'a Bundle,
    pub(super) images: &'a Path,
    /// The program of CRIU.
    pub(super) criu: &'a Path,
    /// For the standard output and error.
    pub(super) output: &'a OwnedFd,
}

/// What this host lends a container that is made here.
#[derive(Debug)]
pub(super) struct Local<'a> {
    pub(super) wrap: &'a Path,
    pub(super) data_dir: &'a Path,
    pub(super) bundle: &'a Path,
    /// Its files are to be those of its image.
    pub(super) fresh: bool,
    pub(super) left: Unreplicated<'a>,
}

/// A container that was made here, and waits.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) pid: u32,
    pub(super) trees: Vec<TreeAt>,
    /// The read end of its output, if that is ours to keep.
    pub(super) output: Option<OwnedFd>,
}

/// Why an engine did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// It is not installed.
    #[error("there is no {program} in {places}; install it: apt install {program}")]
    Missing {
        /// Its program.
        program: &'static str,
        /// Where it was looked for.
        places: String,
    },
    /// It could not be executed.
    #[error("cannot run {program}: {source}")]
    Run {
        /// Its program.
        program: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Its daemon does not answer.
    #[error("cannot ask {daemon} on {socket}: {source}; is its daemon running?")]
    Daemon {
        /// Which.
        daemon: &'static str,
        /// Its socket.
        socket: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// It said no.
    #[error("`{verb}` failed: {said}")]
    Failed {
        /// What was asked.
        verb: String,
        /// Its words.
        said: String,
    },
    /// It does not end.
    #[error("`{verb}` did not end within {limit_s} s")]
    Slow {
        /// What was asked.
        verb: String,
        /// How long it was waited for.
        limit_s: u64,
    },
    /// No such container.
    #[error("{engine} knows no container {id}{hint}; see `{engine} {list}`")]
    Unknown {
        /// Which engine.
        engine: &'static str,
        /// The container.
        id: String,
        /// Where was looked.
        hint: String,
        /// The verb that lists them.
        list: &'static str,
    },
    /// The bundle.
    #[error("cannot read {path}: {source}")]
    Config {
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// What it asks for is not supported.
    #[error("{0}")]
    Unfit(String),
}

/// An engine as this host has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Its name.
    pub engine: &'static str,
    /// Its version, or why there is none.
    pub found: String,
    /// Why its containers cannot be protected although it is there, and what to do.
    pub trouble: Option<String>,
    /// Whether it restores containers of which nothing was prepared, or why not; `None` if it is not there.
    pub whole: Option<Result<(), String>>,
}

/// Which engines there are on this host.
pub fn survey() -> Vec<Survey> {
    let runtimes = [Runtime::Runc, Runtime::Crun].map(Oci::survey);
    let daemons = [Daemon::Docker, Daemon::Podman].map(|daemon| Docker::of(daemon).survey());
    runtimes.into_iter().chain(daemons).collect()
}

/// Finds one that runs.
pub(super) fn find(named: &Named) -> Result<Found, EngineError> {
    match named {
        Named::Oci { runtime, state, id } => Oci::find_container(*runtime, state.as_deref(), id),
        Named::Docker { daemon, container } => Docker::of(*daemon).find_container(container),
    }
}

/// Why a file that is mounted writable cannot be replicated.
pub(super) fn a_file(source: &Path, inside: &Path) -> String {
    format!(
        "the file {} is mounted writable as {}; mount the directory that it is in, or mount it read-only",
        source.display(),
        inside.display()
    )
}

/// Where this host has what a container mounts from `source`, if not there: of what it was lent, its copy; of what each host
/// has its own of, a directory of ours that is empty at first.
pub(super) fn own_place(
    Unreplicated { left, lent }: Unreplicated<'_>,
    inside: &Path,
    source: &Path,
    data_dir: &Path,
) -> Result<Option<PathBuf>, EngineError> {
    if let Some(lent) = lent.iter().find(|lent| lent.inside == inside)
        && lent.source(data_dir).exists()
    {
        discard_older(lent, data_dir);
        return Ok(Some(lent.source(data_dir)));
    }
    let number = left.iter().position(|rule| rule.inside == inside && rule.mode == MountMode::Ignore);
    let Some(number) = number.filter(|_| !source.exists()) else { return Ok(None) };
    let path = data_dir.join(format!("own-{number}"));
    let made = std::fs::DirBuilder::new().recursive(true).create(&path);
    made.map_err(|source| EngineError::Config { path: path.clone(), source })?;
    Ok(Some(path))
}

/// What to mount in the place of a source that is a symbolic link: CRIU would show the link itself (seen with 4.2.1).
pub(super) fn behind_link(source: &Path) -> Option<PathBuf> {
    source.is_symlink().then(|| source.canonicalize().ok()).flatten()
}

/// Removes the copies that the container had before. None that uses them runs: this one is being made.
fn discard_older(lent: &Lent, data_dir: &Path) {
    let copies = std::fs::read_dir(lent.copies(data_dir)).into_iter().flatten().flatten();
    for older in copies.filter(|copy| copy.file_name() != lent.digest.as_str()) {
        if let Err(error) = std::fs::remove_dir_all(older.path()) {
            tracing::warn!(%error, path = %older.path().display(), "an older copy stays");
        }
    }
}

/// Why a container that mounts `source` cannot be made here.
pub(super) fn not_here(source: &Path, inside: &Path) -> EngineError {
    EngineError::Unfit(format!(
        "{} is not there, which the container shows as {}; put it on both hosts, or have it sent: standin protect … \
         --ship-image",
        source.display(),
        inside.display()
    ))
}

/// Makes one that waits. What an earlier agent left of it is ended; one that is not the workload's is in the way.
pub(super) fn make(spec: &ContainerSpec, local: &Local<'_>) -> Result<Made, EngineError> {
    match &spec.engine {
        Engine::Oci { runtime, state, id, config } => {
            Oci::find(*runtime, state.as_deref())?.make(&spec.name, &spec.trees, id, config, local)
        }
        Engine::Docker { daemon, name, config } => {
            Docker::of(*daemon).make(&spec.name, &spec.trees, name, config, local)
        }
    }
}

/// Ends a workload's container. That there is none is fine, and so is one of that name that is not the workload's: it stays.
/// `forgotten`: it was made for a workload that this host no longer stands by for.
pub(super) fn end(workload: &Name, engine: &Engine, forgotten: bool) -> Result<(), EngineError> {
    match engine {
        Engine::Oci { runtime, state, id, .. } => {
            let oci = Oci::find(*runtime, state.as_deref())?;
            if oci.is_ours(workload, id)? { oci.delete(id) } else { Ok(()) }
        }
        Engine::Docker { daemon, name, .. } => {
            let docker = Docker::of(*daemon);
            match docker.is_ours(workload, name)? {
                true if forgotten => docker.remove(name),
                true => docker.kill(name),
                false => Ok(()),
            }
        }
    }
}

/// Makes ready what a container will be restored from; says where its trees are.
pub(super) fn prepare(
    spec: &ContainerSpec,
    local: &Prepared<'_>,
) -> Result<(Bundle, Vec<TreeAt>), EngineError> {
    match &spec.engine {
        Engine::Oci { runtime, state, id, config } => {
            let oci = Oci::find(*runtime, state.as_deref())?;
            whole::prepare(&oci, &spec.trees, (&spec.name, id), config, local)
        }
        Engine::Docker { daemon, name, config } => {
            let docker = Docker::of(*daemon);
            docker.prepare_whole((&spec.name, name), &spec.trees, config, local)
        }
    }
}

/// Restores one whole; returns its pid 1.
pub(super) fn restore(engine: &Engine, restore: &Restore<'_>) -> Result<u32, EngineError> {
    match engine {
        Engine::Oci { runtime, state, id, .. } => Oci::find(*runtime, state.as_deref())?.restore(id, restore),
        Engine::Docker { daemon, name, config } => Docker::of(*daemon).restore_whole(name, config, restore),
    }
}

/// The pid 1, as this host sees it, of a container that was restored into this directory and runs.
pub(super) fn restored(engine: &Engine, bundle: &Path) -> Result<Option<u32>, EngineError> {
    match engine {
        Engine::Oci { runtime, state, id, .. } => {
            let state = Oci::find(*runtime, state.as_deref())?.state(id)?;
            Ok(state
                .filter(|state| state.bundle == bundle && state.status == "running")
                .map(|state| state.pid))
        }
        Engine::Docker { daemon, name, .. } => Docker::of(*daemon).restored_whole(name, bundle),
    }
}

/// Ends one of which this is the directory; that there is none is fine, and so is one of another: it stays. `forgotten`: it was
/// made for a workload that this host no longer stands by for.
pub(super) fn end_whole(engine: &Engine, bundle: &Path, forgotten: bool) -> Result<(), EngineError> {
    match engine {
        Engine::Oci { runtime, state, id, .. } => {
            let oci = Oci::find(*runtime, state.as_deref())?;
            let is_ours = oci.state(id)?.is_some_and(|state| state.bundle == bundle);
            if is_ours { oci.delete(id) } else { Ok(()) }
        }
        Engine::Docker { daemon, name, .. } => Docker::of(*daemon).end_whole(name, bundle, forgotten),
    }
}

/// Whether a container is the workload's, by the host's directory of its init.
pub(super) fn is_ours(workload: &Name, wrap: Option<&Path>) -> bool {
    wrap.and_then(Path::file_name) == Some(workload.as_str().as_ref())
}

/// Refuses to touch what is somebody else's.
pub(super) fn check_is_ours(workload: &Name, id: &str, wrap: Option<&Path>) -> Result<(), EngineError> {
    if is_ours(workload, wrap) {
        return Ok(());
    }
    Err(EngineError::Unfit(format!(
        "another container named {id} is on the standby, which is not this workload's; remove or rename it there"
    )))
}
