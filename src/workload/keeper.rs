//! The agent's handle on an init or guard process: spawns it, finds it again, talks to it.

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Weak},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::{
    cgroup::{Cgroup, CgroupError},
    control::{Client, ControlError, Reply, Request},
    guard::{Guard, GuardError},
    init::{Report, SETUP_BYTES_MAX, Setup},
    netlink::NetStep,
    sys,
};

/// Where workloads' run directories are, unless said otherwise. Lost with a reboot, as the processes are.
pub const RUN_DIR: &str = "/run/standin/sandboxes";

/// The record of a sandbox in a workload's run directory.
pub(super) const SANDBOX_RECORD: &str = "sandbox.json";
/// The record of a bare tree there.
pub(super) const TREE_RECORD: &str = "tree.json";
/// The record of a container there.
pub(super) const CONTAINER_RECORD: &str = "container.json";
/// The record of a container that is dumped whole. A name has one of the four: what ends one kind would harm the others.
pub(super) const WHOLE_RECORD: &str = "whole.json";
/// The control socket there.
pub(super) const CONTROL: &str = "control";

const START_LIMIT: Duration = Duration::from_secs(20);

/// A process, told from a later one with the same pid by the time it was started at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ProcessId {
    pub(super) pid: u32,
    /// Clock ticks after boot.
    pub(super) started: u64,
}

impl ProcessId {
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { pid, started: Stat::read(pid)?.started })
    }

    pub(super) fn is_alive(self) -> bool {
        Stat::read(self.pid)
            .is_ok_and(|stat| stat.started == self.started && !matches!(stat.state, 'Z' | 'X'))
    }

    /// A descriptor for exactly this process.
    pub(super) fn pidfd(self) -> io::Result<OwnedFd> {
        let fd = sys::pidfd_open(self.pid)?;
        // After opening: the descriptor is of whoever has the pid now.
        if self.is_alive() { Ok(fd) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}

/// The fields of /proc/PID/stat that are of use here.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) state: char,
    pub(super) parent: u32,
    pub(super) session: u32,
    pub(super) flags: u32,
    pub(super) started: u64,
}

impl Stat {
    pub(super) fn read(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no stat line"))
    }

    /// The command's name may hold blanks and parentheses: fields are counted from its last `)`.
    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        let flags = fields.nth(2)?.parse().ok()?;
        let started = fields.nth(12)?.parse().ok()?;
        Some(Self { state, parent, session, flags, started })
    }
}

/// Why an init or guard process could not be spawned or found.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// A file of the run directory.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// Verb.
        what: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The program.
    #[error("cannot run {program}: {source}; reinstall standin if the file is gone")]
    Spawn {
        /// Executable.
        program: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// It said why.
    #[error("the workload's init failed: {0}")]
    Failed(String),
    /// It said nothing.
    #[error("the workload's init did not report within {} s; is the host overloaded?", START_LIMIT.as_secs())]
    Silent,
    /// It is dead.
    #[error("process {0}, the workload's init, has ended; destroy the workload's place and make it anew")]
    Dead(u32),
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Talking to it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Its guard.
    #[error(transparent)]
    Guard(#[from] GuardError),
}

/// The init of a sandbox, or the guard process of a bare tree, as the agent sees it.
#[derive(Debug)]
pub struct Keeper {
    id: ProcessId,
    client: Arc<Client>,
    guard: Arc<Guard>,
    cgroup: Cgroup,
}

/// By which a tree is slowed down beside the owner of its [`Keeper`], and no longer than that is there.
#[derive(Clone, Debug)]
pub struct Throttler(Weak<Client>);

impl Throttler {
    /// Lets the tree run for so many percent of its time, in turns of a few milliseconds; with 0 it stands; 100 ends it, as does the
    /// end of this process or the guard. A task that waits in the kernel is not slowed down. None: its keeper is gone.
    pub fn set(&self, run_percent: u8) -> Option<Result<(), ControlError>> {
        Some(command(&*self.0.upgrade()?, &Request::Throttle { run_percent }))
    }

    /// Whether it is of the same keeper.
    pub fn is_of(&self, keeper: &Keeper) -> bool {
        self.0.ptr_eq(&Arc::downgrade(&keeper.client))
    }
}

/// Asks for something whose answer is only "done".
fn command(client: &Client, request: &Request) -> Result<(), ControlError> {
    match client.ask(request, &[])? {
        (Reply::Done, _) => Ok(()),
        (other, _) => Err(client.nonsense(&other)),
    }
}

impl Keeper {
    /// Spawns `program verb`, hands it the set-up and waits until it serves. `born` is told the pid as soon
    /// as the process exists, so that it can be recorded before anything can go wrong.
    pub(super) fn spawn(
        program: &Path,
        verb: &str,
        setup: &Setup,
        cgroup: Cgroup,
        born: impl FnOnce(ProcessId) -> Result<(), KeeperError>,
    ) -> Result<Self, KeeperError> {
        let spawn_error = |source| KeeperError::Spawn { program: program.to_owned(), source };
        let mut launcher = Command::new(program)
            .arg(verb)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(spawn_error)?;
        let result = (|| {
            // Before it reads the set-up and forks: the init is born in its cgroup.
            cgroup.enter_init(launcher.id())?;
            let text = serde_json::to_vec(setup).map_err(|error| spawn_error(error.into()))?;
            // Taken: closed at the end, which is the end of the text.
            launcher.stdin.take().expect("piped").write_all(&text).map_err(spawn_error)?;
            Reports::new(launcher.stdout.take().expect("piped").into()).await_ready(born)
        })();
        if result.is_err() {
            let _ = launcher.kill();
        }
        let _ = launcher.wait();
        Self::attach(&setup.control, result?, cgroup)
    }

    /// Finds it again.
    pub(super) fn attach(control: &Path, id: ProcessId, cgroup: Cgroup) -> Result<Self, KeeperError> {
        if !id.is_alive() {
            return Err(KeeperError::Dead(id.pid));
        }
        let client = Client::connect(control)?;
        let (reply, fds) = client.ask(&Request::Hello, &[])?;
        let [page, wake] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| client.nonsense(&reply))?;
        Ok(Self { id, guard: Arc::new(Guard::from_fds(page, wake)?), client: Arc::new(client), cgroup })
    }

    /// The guard.
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    /// The guard, for who acts on what it says beside the owner of this.
    pub fn shared_guard(&self) -> Arc<Guard> {
        Arc::clone(&self.guard)
    }

    /// The cgroup: freeze, thaw, kill, pids.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Pid of the init or guard process.
    pub fn pid(&self) -> u32 {
        self.id.pid
    }

    /// Whether that process lives. Without it nothing guards the workload.
    pub fn is_alive(&self) -> bool {
        self.id.is_alive()
    }

    /// A descriptor for that process: readable when it has ended; `setns` with it enters its namespaces.
    pub fn pidfd(&self) -> Result<OwnedFd, KeeperError> {
        self.id.pidfd().map_err(|_| KeeperError::Dead(self.id.pid))
    }

    /// What the guard changes in the host's network when it fires; replaces what was set before.
    pub fn on_fence(&self, steps: &[NetStep]) -> Result<(), ControlError> {
        self.command(&Request::OnFence { steps: steps.to_owned() })
    }

    /// Changes the host's network, refused once the guard has fired. What lets the workload speak goes this
    /// way: a stalled agent cannot open what the guard has closed meanwhile.
    pub fn apply(&self, steps: &[NetStep]) -> Result<(), ControlError> {
        self.command(&Request::Apply { steps: steps.to_owned() })
    }

    /// After the guard has fired: arms it again with this deadline, lets the tree run and changes the network.
    pub fn unfence(&self, deadline_ns: u64, steps: &[NetStep]) -> Result<(), ControlError> {
        self.command(&Request::Unfence { deadline_ns, steps: steps.to_owned() })
    }

    /// By which the tree is slowed down.
    pub fn throttler(&self) -> Throttler {
        Throttler(Arc::downgrade(&self.client))
    }

    /// Asks for something whose answer is only "done".
    pub(super) fn command(&self, request: &Request) -> Result<(), ControlError> {
        command(&self.client, request)
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }
}

/// The lines on the launcher's standard output.
struct Reports {
    pipe: fs::File,
    text: Vec<u8>,
}

impl Reports {
    fn new(pipe: OwnedFd) -> Self {
        Self { pipe: pipe.into(), text: Vec::new() }
    }

    fn await_ready(
        mut self,
        born: impl FnOnce(ProcessId) -> Result<(), KeeperError>,
    ) -> Result<ProcessId, KeeperError> {
        let mut born = Some(born);
        let (mut id, mut ready) = (None, false);
        // The launcher and its child write to the same pipe, in either order.
        while id.is_none() || !ready {
            match self.next()? {
                Report::Pid(pid) => {
                    let this = ProcessId::of(pid).map_err(|_| KeeperError::Dead(pid))?;
                    born.take().map_or(Ok(()), |born| born(this))?;
                    id = Some(this);
                }
                Report::Ready => ready = true,
                Report::Failed(reason) => return Err(KeeperError::Failed(reason)),
            }
        }
        id.ok_or(KeeperError::Silent)
    }

    fn next(&mut self) -> Result<Report, KeeperError> {
        loop {
            if let Some(end) = self.text.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|error| KeeperError::Failed(error.to_string()));
            }
            let limit = PollTimeout::try_from(START_LIMIT).unwrap_or(PollTimeout::MAX);
            let ready = poll(&mut [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)], limit);
            if ready == Ok(0) || self.text.len() as u64 > SETUP_BYTES_MAX {
                return Err(KeeperError::Silent);
            }
            let mut buffer = [0; 4096];
            match self.pipe.read(&mut buffer) {
                Ok(0) => return Err(KeeperError::Failed("it ended without a word".to_owned())),
                Ok(length) => self.text.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(KeeperError::Failed(error.to_string())),
            }
        }
    }
}

/// A directory that only root may look into, with those above it.
pub(super) fn private_dir(path: &Path) -> Result<(), KeeperError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| KeeperError::File { what: "make", path: path.to_owned(), source })
}

/// Removes a workload's run directory; none is fine.
pub(super) fn remove_run_dir(path: &Path) -> Result<(), KeeperError> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(KeeperError::File { what: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Writes a small JSON file so that a reader sees the old one or the new one.
pub(super) fn write_record<T: Serialize>(path: &Path, record: &T) -> Result<(), KeeperError> {
    let next = path.with_extension("next");
    let bytes = serde_json::to_vec(record).map_err(io::Error::from);
    bytes
        .and_then(|bytes| fs::write(&next, bytes))
        .and_then(|()| fs::rename(&next, path))
        .map_err(|source| KeeperError::File { what: "write", path: path.to_owned(), source })
}

/// Reads it; `None` if there is none.
pub(super) fn read_record<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>, KeeperError> {
    let error = |source| KeeperError::File { what: "read", path: path.to_owned(), source };
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|source| error(source.into())),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(error(source)),
    }
}

/// Tells the boots of this host apart; /run may survive one on hosts where it is no tmpfs.
pub(super) fn boot_id() -> Result<String, KeeperError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    fs::read_to_string(path).map(|text| text.trim().to_owned()).map_err(|source| KeeperError::File {
        what: "read",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_behind_a_name_with_parentheses() {
        let text = "7 (a) (b c) S 1 7 5 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 1 2";
        let want = Stat { state: 'S', parent: 1, session: 5, flags: 4_194_560, started: 4242 };
        assert_eq!(Stat::parse(text), Some(want));
        assert_eq!(Stat::parse("7 (a"), None);
    }

    #[test]
    fn this_process_is_alive_and_another_start_time_is_not() {
        let id = ProcessId::of(std::process::id()).unwrap();
        assert!(id.is_alive());
        assert!(!ProcessId { started: id.started + 1, ..id }.is_alive());
    }
}
