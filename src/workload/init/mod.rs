//! The hidden verbs `standin init` and `standin guard`: the process that holds a sandbox's namespaces as
//! their pid 1, and the one that only guards a bare tree or a container.
//!
//! ```text
//! agent ── spawns ──► launcher ── unshare, fork ──► pid 1 of the sandbox (or the guard process)
//!          Setup on stdin │  says the pid, exits         │  makes the mounts, says "ready"
//!                         ▼                              ▼  serves until it is killed
//!                     (gone: pid 1 is nobody's child but the host's init's; it outlives the agent)
//! ```
//!
//! Invariants:
//! - One thread. The loop (`serve`) never waits for a disk, another process or a peer: what it waits for
//!   is what the guard waits for. Therefore output is written to the log by a child (`logger`), a failed
//!   exec is reported by the new process itself, and sockets do not block.
//! - It belongs to no checkpoint: it is outside of the tree that CRIU dumps, the same on both hosts.
//! - From inside it cannot be signalled (pid 1 without handlers); all signals that matter are blocked.

mod alike;
mod logger;
mod place;
mod serve;
mod tree;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        eventfd::{EfdFlags, EventFd},
        signal::{SigSet, SigmaskHow, sigprocmask},
    },
    unistd::setsid,
};
use serde::{Deserialize, Serialize};

pub use self::alike::{FilesCopy, Likeness};
use super::{control, guard::Page, netlink::RouteSocket, sys};

/// The longest [`Setup`] and [`Report`].
pub(super) const SETUP_BYTES_MAX: u64 = 64 * 1024;

/// What the agent tells the launcher on its standard input.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Setup {
    /// The control socket to make.
    pub control: PathBuf,
    /// The tree's cgroup directory.
    pub work_cgroup: PathBuf,
    /// Namespaces to make; none for a guard.
    pub place: Option<Place>,
    /// Where the workload's output goes; none for a bare tree's guard, whose output is its own matter.
    pub log: Option<Log>,
}

/// A log file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Log {
    /// The file; the one before it has `.1` behind its name.
    pub path: PathBuf,
    /// Bytes at which it begins anew.
    pub bytes_max: u64,
}

/// What a sandbox is made of.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Place {
    /// A network namespace of its own.
    pub own_net: bool,
    /// Host name inside.
    pub hostname: String,
    /// Its mounts.
    pub mounts: Mounts,
}

/// What a place shows of files.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Mounts {
    /// The host's, but for some.
    Host {
        /// An empty directory on which the new root is put together.
        root: PathBuf,
        /// The directory to show as /dev/shm.
        shm: PathBuf,
        /// Directories to show inside: from, to.
        binds: Vec<(PathBuf, PathBuf)>,
    },
    /// As in a container, but its own.
    Container(Likeness),
}

impl Place {
    fn flags(&self) -> CloneFlags {
        let net = if self.own_net { CloneFlags::CLONE_NEWNET } else { CloneFlags::empty() };
        namespaces() | net
    }
}

/// The namespaces that every sandbox has.
///
/// No cgroup namespace: `/standin/NAME/work` is the same on both hosts anyway, and a namespace would make
/// /proc/self/cgroup disagree with the cgroup file systems of the host, which are seen inside.
pub(super) fn namespaces() -> CloneFlags {
    CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS
}

/// What comes back on standard output, one JSON value a line.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    /// The process is there, under this pid of the agent's pid namespace.
    Pid(u32),
    /// It serves.
    Ready,
    /// It does not.
    Failed(String),
}

/// Runs the verb `init` or `guard`: reads what to make from standard input, reports on standard output, and
/// goes on in a process of its own. Must be called before the process has a second thread.
pub fn main() -> ExitCode {
    match launch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&Report::Failed(error));
            ExitCode::FAILURE
        }
    }
}

const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// Says on what it failed.
fn at<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> String {
    move |error| format!("cannot {what}: {error}")
}

fn report(report: &Report) {
    // If the agent has gone, nobody is left to be told; it finds the half-made sandbox when it is back.
    if let Ok(mut line) = serde_json::to_vec(report) {
        line.push(b'\n');
        let _ = io::stdout().write_all(&line).and_then(|()| io::stdout().flush());
    }
}

fn launch() -> Result<(), String> {
    let mut text = Vec::new();
    io::stdin().take(SETUP_BYTES_MAX + 1).read_to_end(&mut text).map_err(at("read the set-up"))?;
    if text.len() as u64 > SETUP_BYTES_MAX {
        return Err(format!("the set-up is longer than {SETUP_BYTES_MAX} bytes"));
    }
    let setup: Setup = serde_json::from_slice(&text).map_err(at("read the set-up"))?;
    let hands = Hands::open(&setup)?;
    // A session of its own: no terminal or process group of the agent reaches it.
    setsid().map_err(at("start a session"))?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None).map_err(at("block signals"))?;
    if let Some(place) = &setup.place {
        unshare(place.flags()).map_err(at("make namespaces (is this root, with CAP_SYS_ADMIN?)"))?;
    }
    if let Some(child) = sys::fork().map_err(at("fork"))? {
        report(&Report::Pid(child.as_raw().unsigned_abs()));
        return Ok(());
    }
    // Nobody waits for what this process answers; only its report counts.
    run(&setup, hands)
}

/// What the init does to the world outside of its namespaces: descriptors opened before it leaves.
struct Hands {
    listener: OwnedFd,
    /// In the host's network namespace.
    route: RouteSocket,
    freeze: File,
    procs: File,
    page: Page,
    page_fd: OwnedFd,
    wake: EventFd,
}

impl Hands {
    fn open(setup: &Setup) -> Result<Self, String> {
        let write = |name| OpenOptions::new().write(true).open(setup.work_cgroup.join(name));
        let (page, page_fd) = Page::create().map_err(at("make the guard's page"))?;
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        Ok(Self {
            listener: control::listen(&setup.control).map_err(at("listen on the control socket"))?,
            route: RouteSocket::open().map_err(at("open rtnetlink"))?,
            freeze: write("cgroup.freeze").map_err(at("open cgroup.freeze"))?,
            procs: write("cgroup.procs").map_err(at("open cgroup.procs"))?,
            page,
            page_fd,
            wake: wake.map_err(at("make an eventfd"))?,
        })
    }
}

/// Returns only with an error.
fn run(setup: &Setup, hands: Hands) -> Result<(), String> {
    if let Some(place) = &setup.place {
        match &place.mounts {
            Mounts::Host { root, shm, binds } => place::enter(&place.hostname, root, shm, binds)?,
            Mounts::Container(like) => alike::enter(&place.hostname, like)?,
        }
    }
    std::env::set_current_dir("/").map_err(at("enter /"))?;
    // Best effort: where they are refused (no CAP_IPC_LOCK, no CAP_SYS_NICE), the guard is merely later
    // under memory pressure or load.
    let _ = sys::lock_memory();
    let _ = sys::prefer_realtime();
    // As small as it is, the kernel might choose it for its killer; a sandbox ends with its init.
    let oom_score = fs::read_to_string(OOM_SCORE).unwrap_or_default();
    let _ = fs::write(OOM_SCORE, "-1000");
    let guards = setup.place.is_none();
    let mut server = serve::Server::new(hands, guards, setup.log.clone(), oom_score)?;
    report(&Report::Ready);
    leave_stdio().map_err(at("open /dev/null"))?;
    server.run()
}

/// The agent waits for the end of the report pipe, and its terminal is none of ours.
fn leave_stdio() -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    plug(null.as_fd(), null.as_fd())
}

/// Makes `input` standard input and `output` both standard outputs.
fn plug(input: BorrowedFd<'_>, output: BorrowedFd<'_>) -> io::Result<()> {
    nix::unistd::dup2_stdin(input)?;
    nix::unistd::dup2_stdout(output)?;
    nix::unistd::dup2_stderr(output)?;
    Ok(())
}

/// The name of the file that held the log before.
pub(super) fn older_log(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".1");
    name.into()
}
