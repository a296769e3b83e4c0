//! Containers: places that an engine makes, on the standby the same one with an init that waits.
//!
//! ```text
//!   primary                                        standby
//!   engine ─► pid 1: our init ─► the workload      engine (asked by us) ─► pid 1: our init, waiting
//!             (adopted: moved to a cgroup of                 ▲
//!              ours, guarded, its order: track)              └── restored beside it, tracked, guarded
//! ```
//!
//! CRIU dumps and restores a container's tree from inside its namespaces, as that of a sandbox; the engine knows nothing of
//! it, needs no support for checkpoints, and lists, limits, logs and stops the container as any other. What it takes is
//! that pid 1 is not the application: see [`wrap`]. Where it is, see [`whole`].
//!
//! It lives in the kernel, in its engine and in its guard process, not in the agent: [`Container`] is a handle, and
//! [`Container::open`] makes another one after the agent's restart.
//!
//! Invariants: a container that was adopted is never ended by releasing it; one that was not made for the workload of that
//! name is never ended at all; until it is released, starting it anew starts no second copy.
//!
//! Part of the workload is what the container's command has started. What an engine starts in it beside (`exec`) is not: it
//! stays behind.

mod candidate;
mod config;
mod docker;
mod engine;
mod error;
mod oci;
mod sharing;
pub mod supply;
pub mod whole;
pub mod wrap;

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::{
        stat::Mode,
        statfs::{TMPFS_MAGIC, fstatfs},
    },
};
use serde::{Deserialize, Serialize};

pub use self::{
    candidate::Candidate,
    engine::{EngineError, Lendable, Named, Survey, TreeAt, survey},
    error::ContainerError,
    oci::wrap_bundle,
};
use self::{
    candidate::streams_of,
    engine::{Local, PidOne, Unreplicated},
    error::{engine_error, file_error, keeper_error, network_error, unfit},
    wrap::Order,
};
use super::{
    bare,
    cgroup::{self, Cgroup, CgroupError},
    control::Request,
    init::{Log, Setup},
    keeper::{
        CONTAINER_RECORD, CONTROL, Keeper, KeeperError, ProcessId, boot_id, private_dir, read_record,
        remove_run_dir, write_record,
    },
    network::{self, Gate},
    spec::ContainerSpec,
    sys,
};
use crate::model::Name;

const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long a guard that leaves may take to be gone, unless its logger stays.
const LEAVE_LIMIT: Duration = Duration::from_millis(200);

/// Where a container's things are on this host.
#[derive(Clone, Debug)]
pub struct Options {
    /// The executable whose verb `guard` becomes the guard process.
    pub program: PathBuf,
    /// Holds a directory a workload: [`RUN_DIR`](super::keeper::RUN_DIR).
    pub run_dir: PathBuf,
    /// Holds the directories of wrapped containers' inits.
    pub wraps: PathBuf,
    /// On a standby, the container's files: the directories `0`, `1`, … of its trees.
    pub data_dir: PathBuf,
    /// On a standby, its bundle.
    pub bundle: PathBuf,
    /// On a standby, the file for its output, made with mode 0600. Its directory must exist.
    pub log: PathBuf,
    /// Bytes at which the log begins anew; the one before is kept.
    pub log_bytes_max: u64,
}

/// What the run directory keeps of a container.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    spec: ContainerSpec,
    boot_id: String,
    /// Pid 1.
    init: Option<ProcessId>,
    guard: Option<ProcessId>,
    /// The workload's root and its pid inside, once there is one.
    root: Option<(ProcessId, u32)>,
    /// The container's cgroup, if the tree's is in it.
    cgroup: Option<PathBuf>,
    /// The host's directory of the init.
    wrap: PathBuf,
    /// Its sockets are in a network namespace of its own, whose devices are the engine's.
    engine_net: bool,
    /// Where its trees are on this host, in their order.
    trees: Vec<TreeAt>,
    /// It was made by us, for a workload to be restored into.
    made: bool,
    complete: bool,
}

/// A handle on a container.
#[derive(Debug)]
pub struct Container {
    dir: PathBuf,
    record: Record,
    init: ProcessId,
    keeper: Keeper,
    gate: Option<Gate>,
    /// Looked up once: it is read all the time.
    pause_file: Option<PathBuf>,
    /// The same, with what it said when this handle was made.
    oom_kills: Option<(PathBuf, u64)>,
}

impl Container {
    /// Takes a container that runs under protection.
    pub fn adopt(name: &Name, found: Candidate, options: &Options) -> Result<Self, ContainerError> {
        let dir = options.run_dir.join(name.as_str());
        match Self::open(&options.run_dir, name) {
            Err(ContainerError::Unknown(_)) if !dir.exists() => {}
            Ok(_) => return Err(ContainerError::Taken(name.clone())),
            Err(_) => Self::release(&options.run_dir, name)?,
        }
        Self::take(name, found, options, &dir).inspect_err(|_| {
            // The first error counts; what this leaves, the next release removes.
            let _ = Self::release(&options.run_dir, name);
        })
    }

    fn take(name: &Name, found: Candidate, options: &Options, dir: &Path) -> Result<Self, ContainerError> {
        let Candidate { spec, init, root, pid_one, trees, engine_net, .. } = found;
        let PidOne::Init(wrap) = pid_one else {
            return Err(unfit(spec.engine.container(), "its pid 1 is not our init"));
        };
        let record = Record {
            cgroup: container_cgroup(name, init)?,
            spec,
            engine_net,
            boot_id: boot_id().map_err(keeper_error(name))?,
            init: Some(init),
            guard: None,
            root: Some(root),
            wrap,
            trees,
            made: false,
            complete: false,
        };
        private_dir(dir).map_err(keeper_error(name))?;
        // Before anything else: should this host end now, it is not started again beside its standby.
        tell(name, &record.wrap, Order::Track(root.1))?;
        let container = Self::guard(name, record, options, dir, None)?;
        bare::move_tree(root.0.pid, container.keeper.cgroup())
            .map_err(|source| ContainerError::Tree { name: name.clone(), source })?;
        Ok(container)
    }

    /// Makes the container that a specification tells of, waiting, silent. `fresh`: nothing is known of its files, which are
    /// to be those of its image; otherwise they are what they were when it was here last.
    pub fn create(spec: &ContainerSpec, options: &Options, fresh: bool) -> Result<Self, ContainerError> {
        let name = &spec.name;
        let dir = options.run_dir.join(name.as_str());
        match Self::open(&options.run_dir, name) {
            Err(ContainerError::Unknown(_)) if !dir.exists() => {}
            Ok(_) => return Err(ContainerError::Taken(name.clone())),
            Err(_) => Self::destroy(&options.run_dir, name)?,
        }
        Self::build(spec, options, &dir, fresh).inspect_err(|_| {
            // The first error counts; what this leaves, the next destroy removes.
            let _ = Self::destroy(&options.run_dir, name);
        })
    }

    fn build(
        spec: &ContainerSpec,
        options: &Options,
        dir: &Path,
        fresh: bool,
    ) -> Result<Self, ContainerError> {
        let name = &spec.name;
        let keeper_error = keeper_error(name);
        let id = spec.engine.container();
        private_dir(dir).map_err(&keeper_error)?;
        let wrap = wrap::provide(&options.wraps, name).map_err(file_error(
            name,
            "make the init's directory in",
            &options.wraps,
        ))?;
        let mut record = Record {
            spec: spec.clone(),
            boot_id: boot_id().map_err(&keeper_error)?,
            init: None,
            guard: None,
            root: None,
            cgroup: None,
            wrap,
            engine_net: false,
            trees: Vec::new(),
            made: true,
            complete: false,
        };
        write_record(&dir.join(CONTAINER_RECORD), &record).map_err(&keeper_error)?;
        tell(name, &record.wrap, Order::Wait)?;
        let (data_dir, bundle) = (&options.data_dir, &options.bundle);
        let local = Local { wrap: &record.wrap, data_dir, bundle, fresh, left: Unreplicated::of(spec) };
        let made = engine::make(spec, &local).map_err(engine_error(id))?;
        let init = ProcessId::of(made.pid).map_err(|_| unfit(id, "it ended at once; see its output"))?;
        record.init = Some(init);
        record.trees = made.trees;
        record.engine_net = spec.ips.is_empty() && has_own("net", init.pid);
        record.cgroup = container_cgroup(name, init)?;
        let container = Self::guard(name, record, options, dir, made.output)?;
        if let Some(gate) = &container.gate {
            gate.close().map_err(network_error(name))?;
        }
        Ok(container)
    }

    /// Starts the guard process and, where it is ours, the network. `output`: the read end of the container's output.
    fn guard(
        name: &Name,
        mut record: Record,
        options: &Options,
        dir: &Path,
        output: Option<OwnedFd>,
    ) -> Result<Self, ContainerError> {
        let keeper_error = keeper_error(name);
        let path = dir.join(CONTAINER_RECORD);
        let init = record.init.ok_or_else(|| ContainerError::Unknown(name.clone()))?;
        write_record(&path, &record).map_err(&keeper_error)?;
        let cgroup = Cgroup::within(name, record.cgroup.as_deref()).and_then(Cgroup::make);
        let cgroup = cgroup.map_err(|error| keeper_error(error.into()))?;
        let log = Log { path: options.log.clone(), bytes_max: options.log_bytes_max };
        let setup =
            Setup { control: dir.join(CONTROL), work_cgroup: cgroup.work(), place: None, log: Some(log) };
        let keeper = Keeper::spawn(&options.program, "guard", &setup, cgroup, |id| {
            record.guard = Some(id);
            write_record(&path, &record)
        })
        .map_err(&keeper_error)?;
        if let Some(output) = output {
            let kept = keeper.client().ask(&Request::KeepLog, &[output.as_fd()]);
            kept.map_err(|error| keeper_error(error.into()))?;
        }
        if !record.spec.ips.is_empty() && !has_device(name) {
            let netns = netns(name, init)?;
            network::create(name, &init.pid.to_string(), netns.as_fd(), &record.spec.ips)
                .map_err(network_error(name))?;
        }
        record.complete = true;
        write_record(&path, &record).map_err(&keeper_error)?;
        let container = Self::with(dir.to_owned(), record, init, keeper)?;
        if let Some(gate) = &container.gate {
            let set = container.keeper.on_fence(&gate.close_steps());
            set.map_err(|error| keeper_error(error.into()))?;
        }
        Ok(container)
    }

    /// Finds one that was adopted or created before, by this or an earlier agent.
    pub fn open(run_dir: &Path, name: &Name) -> Result<Self, ContainerError> {
        let keeper_error = keeper_error(name);
        let dir = run_dir.join(name.as_str());
        let record: Option<Record> = read_record(&dir.join(CONTAINER_RECORD)).map_err(&keeper_error)?;
        let record = record
            .filter(|record| record.complete && boot_id().is_ok_and(|id| id == record.boot_id))
            .ok_or_else(|| ContainerError::Unknown(name.clone()))?;
        let (Some(init), Some(guard)) = (record.init, record.guard) else {
            return Err(ContainerError::Unknown(name.clone()));
        };
        if !init.is_alive() {
            return Err(keeper_error(KeeperError::Dead(init.pid)));
        }
        let cgroup = Cgroup::within(name, record.cgroup.as_deref());
        let cgroup = cgroup.map_err(|error| keeper_error(error.into()))?;
        let keeper = Keeper::attach(&dir.join(CONTROL), guard, cgroup).map_err(keeper_error)?;
        Self::with(dir, record, init, keeper)
    }

    fn with(dir: PathBuf, record: Record, init: ProcessId, keeper: Keeper) -> Result<Self, ContainerError> {
        let name = &record.spec.name;
        let gate = if record.engine_net {
            Gate::of_engine(netns(name, init)?.as_fd()).map_err(network_error(name))?
        } else if record.spec.ips.is_empty() {
            None
        } else {
            let netns = netns(name, init)?;
            Some(Gate::of(name, &record.spec.ips, netns.as_fd()).map_err(network_error(name))?)
        };
        let pause_file = cgroup::pause_file(record.cgroup.as_deref(), init.pid);
        let pause_file = pause_file.map_err(|error| keeper_error(name)(error.into()))?;
        let oom_file = cgroup::oom_file(record.cgroup.as_deref(), init.pid);
        let oom_file = oom_file.map_err(|error| keeper_error(name)(error.into()))?;
        let oom_kills = oom_file.and_then(|file| cgroup::oom_kills(&file).map(|kills| (file, kills)));
        Ok(Self { dir, record, init, keeper, gate, pause_file, oom_kills })
    }

    /// Whether there is, or was, one of that name in the run directory.
    pub fn is_known(run_dir: &Path, name: &Name) -> bool {
        run_dir.join(name.as_str()).join(CONTAINER_RECORD).exists()
    }

    /// Ends a container; also one that is half made or dead. Its files and its log stay, and so does the order that it starts
    /// nothing.
    pub fn destroy(run_dir: &Path, name: &Name) -> Result<(), ContainerError> {
        Self::end(run_dir, name, false)
    }

    /// The same for good: what was made for a workload that this host no longer stands by for, its engine forgets.
    pub fn remove(run_dir: &Path, name: &Name) -> Result<(), ContainerError> {
        Self::end(run_dir, name, true)
    }

    fn end(run_dir: &Path, name: &Name, for_good: bool) -> Result<(), ContainerError> {
        let keeper_error = keeper_error(name);
        let dir = run_dir.join(name.as_str());
        // The network first: dying processes send FIN and RST.
        network::remove(name).map_err(network_error(name))?;
        // A record that cannot be read must not keep the rest alive.
        let record: Option<Record> = read_record(&dir.join(CONTAINER_RECORD)).unwrap_or(None);
        let Some(record) = record else { return Ok(()) };
        close_engine_net(&record);
        tell(name, &record.wrap, Order::Wait)?;
        let cgroup = Cgroup::within(name, record.cgroup.as_deref());
        let cgroup = cgroup.map_err(|error| keeper_error(error.into()))?;
        if cgroup.work().exists() {
            cgroup.kill(KILL_LIMIT).map_err(|error| keeper_error(error.into()))?;
        }
        let engine = &record.spec.engine;
        engine::end(name, engine, for_good && record.made).map_err(engine_error(engine.container()))?;
        cgroup.destroy(KILL_LIMIT).map_err(|error| keeper_error(error.into()))?;
        remove_run_dir(&dir).map_err(keeper_error)
    }

    /// Ends the protection of a container that runs on. Idempotent.
    pub fn release(run_dir: &Path, name: &Name) -> Result<(), ContainerError> {
        let keeper_error = keeper_error(name);
        let cgroup_error = |error: CgroupError| keeper_error(error.into());
        let dir = run_dir.join(name.as_str());
        let record: Option<Record> = read_record(&dir.join(CONTAINER_RECORD)).unwrap_or(None);
        let Some(record) = record else { return Ok(()) };
        let cgroup = Cgroup::within(name, record.cgroup.as_deref()).map_err(cgroup_error)?;
        // Also when the container has ended, or is another by now.
        let keeper = record.guard.map(|guard| Keeper::attach(&dir.join(CONTROL), guard, cgroup.clone()));
        if let Some(Ok(keeper)) = keeper {
            keeper.command(&Request::Leave).map_err(|error| keeper_error(error.into()))?;
        }
        if cgroup.work().exists() {
            cgroup.thaw(KILL_LIMIT).map_err(cgroup_error)?;
            let home = record.init.and_then(|init| cgroup::dir_of_process(init.pid).ok());
            let home = record.cgroup.or(home).map_or_else(cgroup::v2_root, Ok).map_err(cgroup_error)?;
            bare::give_back(&cgroup, &home).map_err(cgroup_error)?;
        }
        cgroup.remove_if_empty(LEAVE_LIMIT);
        tell(name, &record.wrap, Order::Run)?;
        remove_run_dir(&dir).map_err(keeper_error)
    }

    /// What it is made from.
    pub fn spec(&self) -> &ContainerSpec {
        &self.record.spec
    }

    /// Its guard process: guard, cgroup.
    pub fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// Its gate, if its network is ours.
    pub fn gate(&self) -> Option<&Gate> {
        self.gate.as_ref()
    }

    /// Whether pid 1 and the guard process live.
    pub fn is_alive(&self) -> bool {
        self.init.is_alive() && self.keeper.is_alive()
    }

    /// Its pid 1.
    pub fn pid(&self) -> u32 {
        self.init.pid
    }

    /// A descriptor of pid 1, by which its namespaces are entered.
    pub fn init(&self) -> Result<OwnedFd, ContainerError> {
        let dead = |_| self.keeper_error(KeeperError::Dead(self.init.pid));
        self.init.pidfd().map_err(dead)
    }

    /// Whether it has a cgroup namespace of its own.
    pub fn has_cgroup_namespace(&self) -> bool {
        has_own("cgroup", self.init.pid)
    }

    /// The directories of all cgroups that its processes are in, those of cgroup v1 included.
    pub fn cgroups(&self) -> Result<Vec<PathBuf>, ContainerError> {
        let v1 = cgroup::v1_of_process(self.init.pid).map_err(|error| self.keeper_error(error.into()))?;
        Ok(v1.into_iter().chain([self.keeper.cgroup().work()]).collect())
    }

    /// Whether its engine has stopped it (`docker pause`, `runc pause`).
    pub fn is_paused(&self) -> bool {
        let text = self.pause_file.as_ref().and_then(|file| fs::read_to_string(file).ok());
        text.is_some_and(|text| text.trim() == "1")
    }

    /// How many of its processes the kernel has killed for want of memory since this handle was made; `None` if that cannot be
    /// told (any more).
    pub fn oom_kills(&self) -> Option<u64> {
        let (file, before) = self.oom_kills.as_ref()?;
        cgroup::oom_kills(file)?.checked_sub(*before)
    }

    /// The root's pid here and inside, while it runs.
    pub fn workload_pid(&self) -> Option<(u32, u32)> {
        self.record.root.filter(|(root, _)| root.is_alive()).map(|(root, inside)| (root.pid, inside))
    }

    /// After a restore: this is the tree's root (its pid inside).
    pub fn track(&mut self, inside: u32) -> Result<(), ContainerError> {
        let pids = self.keeper.cgroup().pids().map_err(|error| self.keeper_error(error.into()))?;
        let root = pids.into_iter().find(|pid| super::inner_pid(*pid) == Some(inside));
        let root = root.and_then(|pid| ProcessId::of(pid).ok());
        let root =
            root.ok_or_else(|| unfit(self.spec().engine.container(), "what was restored has ended"))?;
        self.record.root = Some((root, inside));
        let written = write_record(&self.dir.join(CONTAINER_RECORD), &self.record);
        written.map_err(|error| self.keeper_error(error))?;
        tell(&self.record.spec.name, &self.record.wrap, Order::Track(inside))
    }

    /// Whether pid 1 stays, and waits, when the tree's root ends.
    pub fn outlives_its_tree(&self, outlives: bool) -> Result<(), ContainerError> {
        let order = match self.record.root {
            Some((_, inside)) if !outlives => Order::Track(inside),
            _ => Order::Wait,
        };
        tell(&self.record.spec.name, &self.record.wrap, order)
    }

    /// Which of its pid 1's standard streams (0, 1, 2) are pipes, and what CRIU calls them; each pipe once.
    pub fn streams(&self) -> Vec<(u8, String)> {
        let mut streams: Vec<(u8, String)> = Vec::new();
        for (stream, key) in streams_of(self.init.pid) {
            if !streams.iter().any(|(_, other)| *other == key) {
                streams.push((stream, key));
            }
        }
        streams
    }

    /// A copy of one of its pid 1's standard streams.
    pub fn stream(&self, stream: u8) -> Result<OwnedFd, ContainerError> {
        let path = PathBuf::from(format!("/proc/{}/fd/{stream}", self.init.pid));
        let taken = sys::pidfd_getfd(self.init()?.as_fd(), stream.into());
        taken.map_err(file_error(&self.record.spec.name, "take", &path))
    }

    /// Where its trees are on this host, in their order.
    pub fn trees(&self) -> &[TreeAt] {
        &self.record.trees
    }

    /// The same of a container of which there is no handle.
    pub fn trees_of(run_dir: &Path, name: &Name) -> Result<Vec<TreeAt>, ContainerError> {
        let record: Option<Record> =
            read_record(&run_dir.join(name.as_str()).join(CONTAINER_RECORD)).map_err(keeper_error(name))?;
        let record = record.filter(|record| record.complete);
        record.map(|record| record.trees).ok_or_else(|| ContainerError::Unknown(name.clone()))
    }

    /// A file system that the container has in its memory. What its processes made of the way there leads nowhere else, and
    /// not to another file system.
    pub fn memory_at(&self, inside: &Path) -> Result<OwnedFd, ContainerError> {
        memory_of(&self.record.spec.name, self.init, inside)
    }

    fn keeper_error(&self, source: KeeperError) -> ContainerError {
        ContainerError::Keeper { name: self.record.spec.name.clone(), source }
    }
}

/// See [`Container::memory_at`].
fn memory_of(name: &Name, init: ProcessId, inside: &Path) -> Result<OwnedFd, ContainerError> {
    let path = PathBuf::from(format!("/proc/{}/root", init.pid));
    let error = |source| file_error(name, "open", &path.join(inside))(source);
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open(&path, flags, Mode::empty()).map_err(|errno| error(errno.into()))?;
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let found = openat2(&root, inside, OpenHow::new().flags(flags).resolve(resolve));
    let found = found.map_err(|errno| error(errno.into()))?;
    let kind = fstatfs(&found).map_err(|errno| error(errno.into()))?.filesystem_type();
    if kind == TMPFS_MAGIC { Ok(found) } else { Err(error(io::Error::other("it is no tmpfs any more"))) }
}

/// The container's own cgroup, if its engine uses cgroup v2. Where it uses v1 its limits are there, and the tree's v2 cgroup
/// may be one of ours.
fn container_cgroup(name: &Name, init: ProcessId) -> Result<Option<PathBuf>, ContainerError> {
    let keeper_error = keeper_error(name);
    let root = cgroup::v2_root().map_err(|error| keeper_error(error.into()))?;
    let v1 = cgroup::v1_of_process(init.pid).map_err(|error| keeper_error(error.into()))?;
    let dir = cgroup::dir_of_process(init.pid).map_err(|error| keeper_error(error.into()))?;
    Ok((v1.is_empty() && dir != root && dir.exists()).then_some(dir))
}

fn has_device(name: &Name) -> bool {
    nix::net::if_::if_nametoindex(network::host_device(name).as_str()).is_ok()
}

/// Before a container of an engine's network is ended: what is left of it to say goes nowhere. It may be half made.
fn close_engine_net(record: &Record) {
    let (Some(init), true) = (record.init.filter(|init| init.is_alive()), record.engine_net) else { return };
    let closed = netns(&record.spec.name, init).and_then(|netns| {
        let closed =
            Gate::of_engine(netns.as_fd()).and_then(|gate| gate.as_ref().map_or(Ok(()), Gate::close));
        closed.map_err(network_error(&record.spec.name))
    });
    if let Err(error) = closed {
        tracing::warn!(%error, "the container's network could not be closed");
    }
}

/// Whether its namespace of that kind is another than ours.
fn has_own(kind: &str, pid: u32) -> bool {
    let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{kind}")).ok();
    of(&pid.to_string()) != of("self")
}

fn netns(name: &Name, init: ProcessId) -> Result<OwnedFd, ContainerError> {
    let path = PathBuf::from(format!("/proc/{}/ns/net", init.pid));
    let file = fs::File::open(&path).map_err(file_error(name, "open", &path))?;
    if !has_own("net", init.pid) {
        let own = io::Error::other("it is the host's own network namespace, where standin makes no device");
        return Err(file_error(name, "use", &path)(own));
    }
    Ok(file.into())
}

fn tell(name: &Name, wrap: &Path, order: Order) -> Result<(), ContainerError> {
    wrap::tell(wrap, order).map_err(file_error(name, "write the init's order in", wrap))
}
