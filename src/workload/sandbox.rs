//! Sandboxes: the place in which a workload runs on the primary, and the same one that waits on the standby.
//!
//! ```text
//!            create                  start / restore             destroy
//!  (nothing) ──────► warm, gate closed ───────► occupied ─────────────────► (nothing)
//!                        ▲                          │ root ends
//!                        └──────────────────────────┘
//! ```
//!
//! The place of a drill is a sandbox too, whatever is drilled: *isolated*, without a gate, since nothing leads out of it, and of
//! a container with mounts like that container's.
//!
//! It lives in the kernel and in its init, not in the agent: [`Sandbox`] is a handle, and [`Sandbox::open`]
//! makes another one after the agent's restart, from the record in the run directory.

use std::{
    fs, io,
    net::IpAddr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{fcntl::OFlag, sched::CloneFlags, unistd::pipe2};
use serde::{Deserialize, Serialize};

use super::{
    cgroup::{self, Cgroup},
    control::{Command, ControlError, Reply, Request, Root},
    init::{self, Likeness, Log, Mounts, Place, Setup},
    keeper::{
        CONTROL, Keeper, KeeperError, ProcessId, SANDBOX_RECORD, TREE_RECORD, boot_id, private_dir,
        read_record, remove_run_dir, write_record,
    },
    network::{self, Device, Gate, NetworkError},
    spec::{Cidr, Net, SandboxSpec},
};
use crate::model::Name;

const KILL_LIMIT: Duration = Duration::from_secs(10);
const EXEC_LIMIT: Duration = Duration::from_secs(10);
const PATHS_MAX: usize = 63;
const IPS_MAX: usize = 16;

/// Where a sandbox's things are on this host.
#[derive(Clone, Debug)]
pub struct Options {
    /// The executable whose verb `init` becomes the sandbox's pid 1.
    pub program: PathBuf,
    /// Holds a directory a workload: [`RUN_DIR`](super::keeper::RUN_DIR).
    pub run_dir: PathBuf,
    /// The workload's declared paths show the directories `0`, `1`, … of this one, made if missing.
    pub data_dir: PathBuf,
    /// The workload's /dev/shm shows this one, made if missing: in RAM, if it is to be as fast as shared memory is.
    pub shm_dir: PathBuf,
    /// The file for the workload's output; made with mode 0600. Its directory must exist.
    pub log: PathBuf,
    /// Bytes at which the log begins anew; the one before is kept.
    pub log_bytes_max: u64,
    /// It is the place of a drill.
    pub isolated: Option<Isolated>,
}

/// A place of which nobody hears.
#[derive(Clone, Debug)]
pub struct Isolated {
    /// What its network has, which leads nowhere.
    pub devices: Vec<Device>,
    /// The container whose mounts it shall have; otherwise it shows the host's files. Of a container it keeps no log.
    pub container: Option<Likeness>,
}

/// Why something could not be done to a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The specification.
    #[error("the sandbox {name} cannot be made: {reason}")]
    Spec {
        /// Workload.
        name: Name,
        /// What is wrong.
        reason: String,
    },
    /// It is there.
    #[error("a sandbox {0} exists already; open it, or destroy it first")]
    Exists(Name),
    /// It is not.
    #[error("there is no sandbox {0}; create it first")]
    Unknown(Name),
    /// Its init.
    #[error("sandbox {name}: {source}")]
    Keeper {
        /// Workload.
        name: Name,
        /// Cause.
        source: KeeperError,
    },
    /// Its network.
    #[error("sandbox {name}: {source}")]
    Network {
        /// Workload.
        name: Name,
        /// Cause.
        source: NetworkError,
    },
    /// The command.
    #[error("sandbox {name}: cannot run {command:?}: {source}")]
    Exec {
        /// Workload.
        name: Name,
        /// Program.
        command: String,
        /// Cause.
        source: io::Error,
    },
    /// A file.
    #[error("sandbox {name}: cannot {what} {path}: {source}")]
    File {
        /// Workload.
        name: Name,
        /// Verb.
        what: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// What the run directory keeps of a sandbox.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    spec: SandboxSpec,
    boot_id: String,
    /// None while it is being made.
    init: Option<ProcessId>,
    complete: bool,
    /// Mount points that were not there before, outermost first.
    made_dirs: Vec<PathBuf>,
    /// Its network has no end on the host.
    #[serde(default)]
    isolated: bool,
}

/// A handle on a sandbox.
#[derive(Debug)]
pub struct Sandbox {
    spec: SandboxSpec,
    keeper: Keeper,
    gate: Option<Gate>,
}

impl Sandbox {
    /// Makes one: empty, gate closed. What is left of an earlier, dead one of that name is removed first.
    pub fn create(spec: &SandboxSpec, options: &Options) -> Result<Self, SandboxError> {
        check_spec(spec, options)?;
        let name = &spec.name;
        let dir = options.run_dir.join(name.as_str());
        match Self::open(&options.run_dir, name) {
            Ok(_) => return Err(SandboxError::Exists(name.clone())),
            Err(SandboxError::Unknown(_)) if !dir.exists() => {}
            Err(_) => Self::destroy(&options.run_dir, name)?,
        }
        let cgroup = Cgroup::of(name).map_err(|error| keeper_error(name)(error.into()))?;
        if let Some(pid) = cgroup.pids().ok().and_then(|pids| pids.first().copied()) {
            let reason = format!(
                "process {pid} is in its cgroup {}, and not ours; end it first",
                cgroup.work().display()
            );
            return Err(SandboxError::Spec { name: name.clone(), reason });
        }
        Self::build(spec, options, &dir).inspect_err(|_| {
            // The first error is the one to report; what this leaves, the next destroy removes.
            let _ = Self::destroy(&options.run_dir, name);
        })
    }

    fn build(spec: &SandboxSpec, options: &Options, dir: &Path) -> Result<Self, SandboxError> {
        let keeper_error = keeper_error(&spec.name);
        private_dir(dir).map_err(&keeper_error)?;
        let mut record = Record {
            spec: spec.clone(),
            boot_id: boot_id().map_err(&keeper_error)?,
            init: None,
            complete: false,
            made_dirs: Vec::new(),
            isolated: options.isolated.is_some(),
        };
        let record_path = dir.join(SANDBOX_RECORD);
        record.made_dirs = spec.paths.iter().flat_map(|path| missing_dirs(path)).collect();
        write_record(&record_path, &record).map_err(&keeper_error)?;
        let cgroup = Cgroup::create(&spec.name).map_err(|error| keeper_error(error.into()))?;
        let like = options.isolated.as_ref().and_then(|isolated| isolated.container.as_ref());
        let (mounts, log) = if let Some(like) = like {
            let limited = cgroup::allow_devices_as(like.init, &cgroup);
            limited.map_err(|error| keeper_error(error.into()))?;
            // Pid 1 has no child then, which might have one of the pids of the container's tree.
            (Mounts::Container(like.clone()), None)
        } else {
            let log = Log { path: options.log.clone(), bytes_max: options.log_bytes_max };
            (host_mounts(spec, options, dir)?, Some(log))
        };
        let place =
            Place { own_net: matches!(spec.net, Net::Own { .. }), hostname: spec.hostname.clone(), mounts };
        let setup = Setup { control: dir.join(CONTROL), work_cgroup: cgroup.work(), place: Some(place), log };
        let keeper = Keeper::spawn(&options.program, "init", &setup, cgroup, |id| {
            record.init = Some(id);
            write_record(&record_path, &record)
        })
        .map_err(&keeper_error)?;
        if let Net::Own { ips } = &spec.net {
            let netns = netns(&spec.name, &keeper)?;
            match &options.isolated {
                Some(isolated) => network::create_isolated(netns.as_fd(), &isolated.devices),
                None => network::create(&spec.name, &keeper.pid().to_string(), netns.as_fd(), ips),
            }
            .map_err(network_error(&spec.name))?;
        }
        record.complete = true;
        write_record(&record_path, &record).map_err(&keeper_error)?;
        let sandbox = Self::with(record.spec, keeper, record.isolated)?;
        if let Some(gate) = &sandbox.gate {
            // From the start, so that no guard is ever armed that would not close it.
            let set = sandbox.keeper.on_fence(&gate.close_steps());
            set.map_err(|error| sandbox.keeper_error(error.into()))?;
        }
        Ok(sandbox)
    }

    /// Finds one that was made before, by this or an earlier agent.
    pub fn open(run_dir: &Path, name: &Name) -> Result<Self, SandboxError> {
        let keeper_error = keeper_error(name);
        let dir = run_dir.join(name.as_str());
        let record: Option<Record> = read_record(&dir.join(SANDBOX_RECORD)).map_err(&keeper_error)?;
        let record = record
            .filter(|record| record.complete && boot_id().is_ok_and(|id| id == record.boot_id))
            .ok_or_else(|| SandboxError::Unknown(name.clone()))?;
        let id = record.init.ok_or_else(|| SandboxError::Unknown(name.clone()))?;
        let cgroup = Cgroup::of(name).map_err(|error| keeper_error(error.into()))?;
        let keeper = Keeper::attach(&dir.join(CONTROL), id, cgroup).map_err(keeper_error)?;
        Self::with(record.spec, keeper, record.isolated)
    }

    fn with(spec: SandboxSpec, keeper: Keeper, isolated: bool) -> Result<Self, SandboxError> {
        let gate = match &spec.net {
            Net::Own { ips } if !isolated => {
                let netns = netns(&spec.name, &keeper)?;
                Some(Gate::of(&spec.name, ips, netns.as_fd()).map_err(network_error(&spec.name))?)
            }
            _ => None,
        };
        Ok(Self { spec, keeper, gate })
    }

    /// Removes a sandbox and kills whatever is in it. Idempotent; also for one that was half made.
    ///
    /// The declared paths' files and the log stay.
    pub fn destroy(run_dir: &Path, name: &Name) -> Result<(), SandboxError> {
        let keeper_error = keeper_error(name);
        let dir = run_dir.join(name.as_str());
        if dir.join(TREE_RECORD).exists() {
            let reason = "a bare tree of that name is adopted; release it first".to_owned();
            return Err(SandboxError::Spec { name: name.clone(), reason });
        }
        // A record that cannot be read must not keep the rest alive.
        let record: Option<Record> = read_record(&dir.join(SANDBOX_RECORD)).unwrap_or(None);
        // The network first: dying processes send FIN and RST.
        network::remove(name).map_err(network_error(name))?;
        let cgroup = Cgroup::of(name).map_err(|error| keeper_error(error.into()))?;
        cgroup.destroy(KILL_LIMIT).map_err(|error| keeper_error(error.into()))?;
        for made in record.iter().flat_map(|record| record.made_dirs.iter().rev()) {
            // Not empty: somebody uses it, so it stays.
            let _ = fs::remove_dir(made);
        }
        remove_run_dir(&dir).map_err(keeper_error)
    }

    /// What it was made from.
    pub fn spec(&self) -> &SandboxSpec {
        &self.spec
    }

    /// Its init: guard, cgroup, pid.
    pub fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// Its gate, if it has a network of its own that is not isolated.
    pub fn gate(&self) -> Option<&Gate> {
        self.gate.as_ref()
    }

    /// The namespaces to enter with `setns` on [`Keeper::pidfd`] in order to be inside.
    pub fn namespaces(&self) -> CloneFlags {
        let mut namespaces = init::namespaces();
        namespaces.set(CloneFlags::CLONE_NEWNET, matches!(self.spec.net, Net::Own { .. }));
        namespaces
    }

    /// Starts the workload's first process; returns its root, once the program has been executed.
    pub fn start(&self, command: &Command) -> Result<Root, SandboxError> {
        let exec_error = |source| SandboxError::Exec {
            name: self.spec.name.clone(),
            command: command.argv.first().cloned().unwrap_or_default(),
            source,
        };
        let (failed, failure) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| exec_error(errno.into()))?;
        let (reply, _) = self.ask(&Request::Start(command.clone()), &[failure.as_fd()])?;
        let Reply::Started { pid } = reply else { return Err(self.nonsense(&reply)) };
        drop(failure);
        match read_errno(&failed) {
            Ok(None) => Ok(Root { pid, exit: None }),
            Ok(Some(source)) => {
                self.await_end()?;
                Err(exec_error(source))
            }
            Err(source) => Err(exec_error(source)),
        }
    }

    /// The process that could not exec is about to end; until it has, nothing else can be started.
    fn await_end(&self) -> Result<(), SandboxError> {
        let until = Instant::now() + EXEC_LIMIT;
        while self.is_occupied()? && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The tree's root and how it ended; `None` before the first start, and after a restore until
    /// [`Self::track`].
    pub fn root(&self) -> Result<Option<Root>, SandboxError> {
        self.status().map(|(root, _)| root)
    }

    /// The root's pid here and inside, while it runs.
    pub fn workload_pid(&self) -> Result<Option<(u32, u32)>, SandboxError> {
        let Some(root) = self.root()?.filter(|root| root.exit.is_none()) else { return Ok(None) };
        let pids = self.keeper.cgroup().pids().map_err(|error| self.keeper_error(error.into()))?;
        Ok(pids.into_iter().find(|pid| super::inner_pid(*pid) == Some(root.pid)).map(|pid| (pid, root.pid)))
    }

    /// Whether the init and the tree's root live.
    pub fn is_occupied(&self) -> Result<bool, SandboxError> {
        Ok(self.root()?.is_some_and(|root| root.exit.is_none()))
    }

    /// After a restore: this is the tree's root (its pid inside).
    pub fn track(&self, pid: u32) -> Result<(), SandboxError> {
        self.ask(&Request::Track { pid }, &[]).map(drop)
    }

    /// Before a restore: processes that are made from now on (CRIU's own) get higher pids than this, so
    /// that they do not take the tree's.
    pub fn raise_last_pid(&self, pid: u32) -> Result<(), SandboxError> {
        self.ask(&Request::RaiseLastPid { pid }, &[]).map(drop)
    }

    /// The write end of a new pipe to the log: for CRIU's `inherit_fd`, in the place of the dumped tree's
    /// pipe. Close it after the restore, else the log never sees the tree's end.
    pub fn fresh_stdio(&self) -> Result<OwnedFd, SandboxError> {
        let (reply, fds) = self.ask(&Request::FreshStdio, &[])?;
        fds.into_iter().next().ok_or_else(|| self.nonsense(&reply))
    }

    /// The inodes of the pipes to the log that have writers: `pipe:[INODE]` is what CRIU calls them, in the
    /// dump's `external` and in the restore's `inherit_fd`.
    pub fn log_pipes(&self) -> Result<Vec<u64>, SandboxError> {
        self.status().map(|(_, pipes)| pipes)
    }

    fn status(&self) -> Result<(Option<Root>, Vec<u64>), SandboxError> {
        match self.ask(&Request::Status, &[])? {
            (Reply::Status { root, log_pipes }, _) => Ok((root, log_pipes)),
            (other, _) => Err(self.nonsense(&other)),
        }
    }

    fn ask(
        &self,
        request: &Request,
        fds: &[std::os::fd::BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), SandboxError> {
        self.keeper.client().ask(request, fds).map_err(|error| self.keeper_error(error.into()))
    }

    fn nonsense(&self, reply: &Reply) -> SandboxError {
        let error: ControlError = self.keeper.client().nonsense(reply);
        self.keeper_error(error.into())
    }

    fn keeper_error(&self, source: KeeperError) -> SandboxError {
        SandboxError::Keeper { name: self.spec.name.clone(), source }
    }
}

/// The host's mounts, with the declared paths and /dev/shm, whose directories are made.
fn host_mounts(spec: &SandboxSpec, options: &Options, dir: &Path) -> Result<Mounts, SandboxError> {
    let file = |what, path: &Path| file_error(&spec.name, what, path);
    let root = dir.join("root");
    fs::create_dir_all(&root).map_err(file("make", &root))?;
    let mut binds = Vec::new();
    for (i, path) in spec.paths.iter().enumerate() {
        fs::create_dir_all(path).map_err(file("make the mount point", path))?;
        let tree = options.data_dir.join(i.to_string());
        make_tree(&tree, path).map_err(file("make", &tree))?;
        binds.push((tree, path.clone()));
    }
    let shm = options.shm_dir.clone();
    make_shm(&shm).map_err(file("make", &shm))?;
    Ok(Mounts::Host { root, shm, binds })
}

fn keeper_error(name: &Name) -> impl Fn(KeeperError) -> SandboxError + use<'_> {
    move |source| SandboxError::Keeper { name: name.clone(), source }
}

fn network_error(name: &Name) -> impl Fn(NetworkError) -> SandboxError + use<'_> {
    move |source| SandboxError::Network { name: name.clone(), source }
}

fn file_error(
    name: &Name,
    what: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> SandboxError + use<> {
    let (name, path) = (name.clone(), path.to_owned());
    move |source| SandboxError::File { name, what, path, source }
}

/// The network namespace of a sandbox.
fn netns(name: &Name, keeper: &Keeper) -> Result<OwnedFd, SandboxError> {
    let path = PathBuf::from(format!("/proc/{}/ns/net", keeper.pid()));
    Ok(fs::File::open(&path).map_err(file_error(name, "open", &path))?.into())
}

/// The errno that the new process wrote because it could not exec; the pipe's end means that it could.
fn read_errno(pipe: &OwnedFd) -> io::Result<Option<io::Error>> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let limit = PollTimeout::try_from(EXEC_LIMIT).unwrap_or(PollTimeout::MAX);
    if poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], limit)? == 0 {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "exec did not return; is the file system there?",
        ));
    }
    let mut bytes = [0; 4];
    match nix::unistd::read(pipe.as_fd(), &mut bytes)? {
        4 => Ok(Some(io::Error::from_raw_os_error(i32::from_ne_bytes(bytes)))),
        _ => Ok(None),
    }
}

/// The directory with those above it that do not exist, outermost first.
fn missing_dirs(path: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<_> = path.ancestors().take_while(|dir| !dir.exists()).map(Path::to_owned).collect();
    missing.reverse();
    missing
}

/// Makes a tree's directory, as the one that it will hide: the workload's user must be able to write to it.
fn make_tree(tree: &Path, like: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    if tree.exists() {
        return Ok(());
    }
    fs::create_dir_all(tree)?;
    let meta = fs::metadata(like)?;
    std::os::unix::fs::chown(tree, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(tree, meta.permissions())
}

fn check_spec(spec: &SandboxSpec, options: &Options) -> Result<(), SandboxError> {
    let refuse = |reason: String| Err(SandboxError::Spec { name: spec.name.clone(), reason });
    if spec.hostname.is_empty() || spec.hostname.len() > 63 {
        return refuse(format!("the host name {:?} must have 1 to 63 characters", spec.hostname));
    }
    if let Net::Own { ips } = &spec.net {
        if ips.len() > IPS_MAX {
            return refuse(format!("{} addresses; at most {IPS_MAX} are allowed", ips.len()));
        }
        for (i, Cidr { addr, .. }) in ips.iter().enumerate() {
            let is_link_local = matches!(addr, IpAddr::V4(v4) if v4.is_link_local())
                || matches!(addr, IpAddr::V6(v6) if v6.is_unicast_link_local());
            if addr.is_unspecified() || addr.is_multicast() || addr.is_loopback() || is_link_local {
                return refuse(format!("{addr} is not an address that others can reach; name a unicast one"));
            }
            if ips[..i].iter().any(|other| other.addr == *addr) {
                return refuse(format!("the address {addr} is named twice"));
            }
        }
    }
    if spec.paths.len() > PATHS_MAX {
        return refuse(format!("{} paths; at most {PATHS_MAX} are allowed", spec.paths.len()));
    }
    for (i, path) in spec.paths.iter().enumerate() {
        if let Err(reason) = check_path(path, options) {
            return refuse(reason);
        }
        if let Some(other) =
            spec.paths[..i].iter().find(|other| other.starts_with(path) || path.starts_with(other))
        {
            return refuse(format!(
                "the path {} lies in {}; name only the outer one",
                path.display(),
                other.display()
            ));
        }
    }
    Ok(())
}

/// As open to all as /dev/shm is, which only what is inside can reach.
fn make_shm(dir: &Path) -> io::Result<()> {
    if let Some(parent) = dir.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o1777))
}

fn check_path(path: &Path, options: &Options) -> Result<(), String> {
    let shown = path.display();
    let mut components = path.components();
    let plain = components.next() == Some(Component::RootDir)
        && components.all(|part| matches!(part, Component::Normal(_)));
    if !plain || path.parent().is_none() {
        return Err(format!("the path {shown} must be absolute, below /, and without `..`"));
    }
    if let Some(system) = ["/proc", "/sys", "/dev"].iter().find(|system| path.starts_with(system)) {
        return Err(format!("the path {shown} lies in {system}, which is the kernel's"));
    }
    // A link could lead into another declared path, or differ between the hosts.
    if let Some(link) = path.ancestors().find(|part| part.is_symlink()) {
        return Err(format!(
            "the path {shown} leads through the symbolic link {}; name its target",
            link.display()
        ));
    }
    for ours in [&options.run_dir, &options.data_dir, &options.shm_dir, &options.log] {
        if ours.starts_with(path) {
            return Err(format!(
                "the path {shown} would hide {}, which standin needs inside",
                ours.display()
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(paths: &[&str]) -> bool {
        let options = Options {
            program: "/usr/bin/standin".into(),
            run_dir: "/run/standin/sandboxes".into(),
            data_dir: "/var/lib/standin/web/files".into(),
            shm_dir: "/dev/shm/standin/web".into(),
            log: "/var/lib/standin/web/log".into(),
            log_bytes_max: 1,
            isolated: None,
        };
        let spec = SandboxSpec {
            name: "web".parse().unwrap(),
            net: Net::Host,
            paths: paths.iter().map(PathBuf::from).collect(),
            hostname: "web".to_owned(),
        };
        check_spec(&spec, &options).is_err()
    }

    #[test]
    fn paths_that_cannot_be_a_tree_are_refused() {
        assert!(!refused(&["/srv/no-such/a", "/srv/no-such/b"]));
        for path in
            ["/", "srv", "/srv/../etc", "/proc/x", "/dev/shm", "/run", "/var/lib", "/var/lib/standin/web/log"]
        {
            assert!(refused(&[path]), "{path}");
        }
        assert!(refused(&["/srv/no-such", "/srv/no-such/b"]));
        assert!(refused(&["/srv/no-such/b", "/srv/no-such/b"]));
    }
}
