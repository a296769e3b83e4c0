//! Starting `criu swrk`, in our namespaces or inside a workload's.
//!
//! The agent is multi-threaded and may hold gigabytes, so it neither forks itself nor joins
//! namespaces: it starts its own program with the hidden verb `enter` (see [`super::enter`]), which
//! costs a posix_spawn. What CRIU needs travels over that program's standard input, a socket: the
//! plan as JSON and the descriptors beside it. So no descriptor of the agent is ever inheritable,
//! and none can leak into another program that is started in the same moment; such a leak would
//! keep a socket open whose closing is what ends a failed dump.

use std::{
    fs::File,
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Command, Stdio},
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{
            AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, setsockopt,
            socketpair, sockopt,
        },
    },
};
use serde::{Deserialize, Serialize};

use super::{Install, bridge::Bridge, enter::START_TIMEOUT, gate::Gate, process::Process};

/// Most of what CRIU may say on its standard error (it logs to a file once it has one).
const STDERR_BYTES_MAX: i64 = 64 << 10;
/// Most descriptors that may be inherited by key; one message carries at most 253 (SCM_MAX_FD).
pub const INHERIT_MAX: usize = 128;
/// Buffer of the page server's socket: a few thousand records without a wake-up.
const PAGES_BUFFER_BYTES: usize = 4 << 20;

/// Descriptor numbers in the criu process, chosen so that they cannot meet those that `enter`
/// receives (from 3 up) before it moves them.
pub(super) mod slot {
    pub(in super::super) const STDERR: i32 = 2;
    pub(in super::super) const RPC: i32 = 600;
    pub(in super::super) const IMAGES: i32 = 601;
    pub(in super::super) const PAGES: i32 = 602;
    pub(in super::super) const LIBRARY: i32 = 603;
    pub(in super::super) const KERNDAT: i32 = 604;
    pub(in super::super) const GATE: i32 = 605;
    pub(in super::super) const INIT: i32 = 606;
    pub(in super::super) const INHERIT: i32 = 610;
}

/// Where CRIU runs.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// In the namespaces of the agent.
    Here,
    /// In the mount, pid, network and uts namespaces of the process behind this pidfd.
    Inside {
        /// The sandbox's or container's pid 1.
        init: BorrowedFd<'a>,
        /// Its cgroup namespace too, if it has one of its own.
        cgroup: bool,
        /// The process whose IPC namespace it joins. `None`: it stays in the agent's, so that the tree's is part of the
        /// image.
        ipc: Option<BorrowedFd<'a>>,
    },
}

/// How to start a CRIU.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// Where.
    pub place: Place<'a>,
    /// Directory of the images to write or read; the log goes there too.
    pub images: BorrowedFd<'a>,
    /// The bridge to preload. Without it CRIU tracks memory as it does by itself, with soft-dirty.
    pub bridge: Option<&'a Bridge>,
    /// Whether to make the socket of a page server.
    pub page_server: bool,
    /// Directories of cgroups to enter first, host paths: restored processes are born there.
    pub cgroups: Vec<PathBuf>,
    /// Highest pid of the workload, for a restore: CRIU's own pids then start above it.
    pub pids_above: Option<u32>,
    /// Descriptors that CRIU shall use for files it knows under these keys.
    pub inherit: Vec<(String, BorrowedFd<'a>)>,
}

impl<'a> Spawn<'a> {
    /// The plainest start: here, without a bridge.
    pub fn new(images: BorrowedFd<'a>) -> Self {
        Self {
            place: Place::Here,
            images,
            bridge: None,
            page_server: false,
            cgroups: Vec::new(),
            pids_above: None,
            inherit: Vec::new(),
        }
    }
}

/// Why no CRIU could be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A system call.
    #[error("{what} for CRIU failed: {source}")]
    Prepare {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// More than [`INHERIT_MAX`].
    #[error("{0} descriptors to inherit are more than {INHERIT_MAX}")]
    TooMany(usize),
    /// `enter` reported a failure.
    #[error("starting CRIU failed: {0}")]
    Enter(String),
}

/// What `enter` is to do; the descriptors come beside it in this order: rpc, images, then those
/// that the flags name, then the inherited ones.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) command: Vec<PathBuf>,
    pub(super) cgroups: Vec<PathBuf>,
    pub(super) pids_above: Option<u32>,
    pub(super) pages: bool,
    pub(super) bridge: bool,
    pub(super) gate: bool,
    pub(super) forks: bool,
    pub(super) init: bool,
    pub(super) ipc: bool,
    pub(super) cgroup_namespace: bool,
    pub(super) inherit: usize,
}

/// The parent's side of a started process.
pub(super) struct Started {
    pub(super) process: Process,
    pub(super) ends: Ends,
}

/// The agent's ends of what it shares with a CRIU.
pub(super) struct Ends {
    pub(super) rpc: OwnedFd,
    pub(super) pages: Option<UnixStream>,
    pub(super) gate: Option<Gate>,
    pub(super) stderr: File,
}

/// CRIU's ends, and the numbers that they have there.
type Theirs = Vec<(OwnedFd, i32)>;

fn ends(pages: bool, gate: bool) -> Result<(Ends, Theirs), SpawnError> {
    let (rpc, their_rpc) = sockets("making the RPC socket", SockType::SeqPacket)?;
    let (pages, their_pages) = pages.then(page_sockets).transpose()?.unzip();
    let gate = gate.then(|| sockets("making the bridge's socket", SockType::SeqPacket));
    let (gate, their_gate) = gate.transpose()?.unzip();
    let stderr = bounded_file().map_err(prepare("making a bounded file for the standard error"))?;
    let their_stderr = stderr.try_clone().map_err(prepare("sharing the standard error"))?;
    let mut theirs = vec![(their_rpc, slot::RPC), (their_stderr.into(), slot::STDERR)];
    theirs.extend(their_pages.map(|fd| (fd, slot::PAGES)));
    theirs.extend(their_gate.map(|fd| (fd, slot::GATE)));
    Ok((Ends { rpc, pages, gate: gate.map(Gate::new), stderr }, theirs))
}

/// For a dump.
pub(super) fn dump_ends() -> Result<(Ends, Theirs), SpawnError> {
    ends(true, true)
}

fn prepare(what: &'static str) -> impl FnOnce(io::Error) -> SpawnError {
    move |source| SpawnError::Prepare { what, source }
}

pub(super) fn start(install: &Install, spawn: &Spawn<'_>) -> Result<Started, SpawnError> {
    // The gate is for dumps.
    let (ours, theirs) = ends(spawn.page_server, spawn.page_server && spawn.bridge.is_some())?;
    launch(install, spawn, ours, &theirs, false)
}

/// What comes over its RPC's socket are orders to fork.
pub(super) fn start_to_fork(install: &Install, spawn: &Spawn<'_>) -> Result<Started, SpawnError> {
    let (ours, theirs) = ends(false, false)?;
    launch(install, spawn, ours, &theirs, true)
}

fn launch(
    install: &Install,
    spawn: &Spawn<'_>,
    ours: Ends,
    theirs: &Theirs,
    forks: bool,
) -> Result<Started, SpawnError> {
    if spawn.inherit.len() > INHERIT_MAX {
        return Err(SpawnError::TooMany(spawn.inherit.len()));
    }
    let their = |slot| theirs.iter().find(|(_, number)| *number == slot).map(|(fd, _)| fd.as_raw_fd());
    let (control, their_control) = sockets("making the control socket", SockType::SeqPacket)?;
    let mut child = Command::new(install.launcher())
        .args(["enter", "swrk"])
        .stdin(Stdio::from(their_control))
        .stdout(Stdio::null())
        .stderr(ours.stderr.try_clone().map_err(prepare("sharing the standard error"))?)
        .spawn()
        .map_err(prepare("starting our own program again"))?;

    let mut fds: Vec<i32> = their(slot::RPC).into_iter().chain([spawn.images.as_raw_fd()]).collect();
    fds.extend(their(slot::PAGES));
    if let Some(bridge) = spawn.bridge {
        fds.extend([bridge.library().as_raw_fd(), bridge.kerndat().as_raw_fd()]);
    }
    fds.extend(their(slot::GATE));
    let (init, joined, cgroup_namespace) = match spawn.place {
        Place::Here => (None, None, false),
        Place::Inside { init, cgroup, ipc } => (Some(init), ipc, cgroup),
    };
    fds.extend(init.into_iter().chain(joined).map(|fd| fd.as_raw_fd()));
    fds.extend(spawn.inherit.iter().map(|(_, fd)| fd.as_raw_fd()));
    let plan = Plan {
        command: install.command().to_vec(),
        cgroups: spawn.cgroups.clone(),
        pids_above: spawn.pids_above,
        pages: their(slot::PAGES).is_some(),
        bridge: spawn.bridge.is_some(),
        gate: their(slot::GATE).is_some(),
        forks,
        init: init.is_some(),
        ipc: joined.is_some(),
        cgroup_namespace,
        inherit: spawn.inherit.len(),
    };
    if let Err(error) = hand_over(&control, &plan, &fds) {
        // Without a plan it ends by itself, as soon as the control socket does.
        drop(control);
        std::thread::spawn(move || child.wait());
        return Err(error);
    }
    Ok(Started { process: child.into(), ends: ours })
}

/// Sends the plan and hears that CRIU is about to be executed.
fn hand_over(control: &OwnedFd, plan: &Plan, fds: &[i32]) -> Result<(), SpawnError> {
    let text = serde_json::to_vec(plan).map_err(io::Error::other).map_err(prepare("writing the plan"))?;
    sendmsg::<UnixAddr>(
        control.as_raw_fd(),
        &[IoSlice::new(&text)],
        &[ControlMessage::ScmRights(fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map_err(io::Error::from)
    .map_err(prepare("handing descriptors over"))?;
    match super::enter::hear(control.as_fd(), START_TIMEOUT) {
        Ok(said) if said.is_empty() => Ok(()),
        Ok(said) => Err(SpawnError::Enter(said)),
        Err(error) => Err(SpawnError::Prepare { what: "waiting for our own program", source: error }),
    }
}

fn sockets(what: &'static str, kind: SockType) -> Result<(OwnedFd, OwnedFd), SpawnError> {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|error| SpawnError::Prepare { what, source: error.into() })
}

fn page_sockets() -> Result<(UnixStream, OwnedFd), SpawnError> {
    let (ours, theirs) = sockets("making the page server's socket", SockType::Stream)?;
    for socket in [&ours, &theirs] {
        let wide = setsockopt(socket, sockopt::SndBuf, &PAGES_BUFFER_BYTES)
            .and_then(|()| setsockopt(socket, sockopt::RcvBuf, &PAGES_BUFFER_BYTES));
        wide.map_err(|error| SpawnError::Prepare {
            what: "sizing the page server's socket",
            source: error.into(),
        })?;
    }
    Ok((ours.into(), theirs))
}

/// A memory file that cannot grow: what is written beyond its end fails and is lost.
fn bounded_file() -> io::Result<File> {
    let file = File::from(memfd_create(
        c"standin-criu-stderr",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?);
    file.set_len(STDERR_BYTES_MAX as u64)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK))?;
    Ok(file)
}
