//! Containers whose pid 1 is the application: dumped with their namespaces, restored by their runtime.
//!
//! ```text
//!   primary                                       standby
//!   engine ─► pid 1: the application              bundle, files, network, guard: no container yet
//!             (adopted: moved to a cgroup of              ▲
//!              ours, guarded)                             └── the runtime restores it, below a cgroup of ours
//! ```
//!
//! Nothing is prepared in such a container, and the runtime has to be able to restore. CRIU runs on the host and has more to
//! dump, so epochs freeze it for longer; and memory comes at once in a takeover. What an epoch's image does not have of it the
//! standby makes ahead: mounts of the host (`mounts`), file systems in memory, the network namespace.
//!
//! Invariants: as those of a container whose pid 1 is our init; but where its engine is told to start such a container anew,
//! nobody is in the way.

mod docker;
mod mounts;
pub(super) mod runtime;

use std::{
    fs,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{fcntl::OFlag, unistd::pipe2};
use serde::{Deserialize, Serialize};

pub(super) use self::{docker::has_own_init, mounts::HIDDEN};
use super::{
    super::{
        bare,
        cgroup::{self, Cgroup, CgroupError},
        control::Request,
        init::{Log, Setup},
        keeper::{
            CONTROL, Keeper, KeeperError, ProcessId, WHOLE_RECORD, boot_id, private_dir, read_record,
            remove_run_dir, write_record,
        },
        network::{self, Gate},
        spec::{ContainerSpec, ContainerTree, ContainerTreeKind, Engine},
    },
    Candidate, ContainerError, KILL_LIMIT, LEAVE_LIMIT, Options, TreeAt,
    candidate::streams_of,
    config::Config,
    container_cgroup,
    engine::{self, Bundle, PidOne, Prepared, Restore, Unreplicated},
    error::{engine_error, file_error, keeper_error, network_error, unfit},
    has_device, has_own, memory_of,
};
use crate::{criu::images, model::Name};

/// How runtimes tell CRIU of a network namespace that is there.
const NETNS_KEY: &str = "extRootNetNS";
/// In the run directory, where a daemon's overlay is mounted until its container is restored.
const MERGED: &str = "merged";
/// How long a runtime that was left alone with a restore may take to say that the container runs.
const RESTORE_LIMIT: Duration = Duration::from_secs(5);
/// How often it is asked.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// CRIU's image of cgroups.
const CGROUP_IMAGE: &str = "cgroup.img";
/// What the standard streams of pid 1 were, for the runtime.
const DESCRIPTORS: &str = "descriptors.json";

/// What the run directory keeps of it.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    spec: ContainerSpec,
    boot_id: String,
    guard: Option<ProcessId>,
    /// Pid 1, once there is one.
    root: Option<ProcessId>,
    bundle: Bundle,
    /// The container's own cgroup, if it was there before ours.
    cgroup: Option<PathBuf>,
    /// Where its network namespace is until it runs, if it has one of its own.
    netns: Option<PathBuf>,
    trees: Vec<TreeAt>,
    /// It is to be restored here, or was.
    made: bool,
    complete: bool,
}

/// A handle on such a container.
#[derive(Debug)]
pub struct Whole {
    dir: PathBuf,
    record: Record,
    keeper: Keeper,
    gate: Option<Gate>,
    /// What counts those killed for want of memory, and how many that were before.
    oom_kills: Option<(PathBuf, u64)>,
}

impl Whole {
    /// Takes a container that runs under protection.
    pub fn adopt(name: &Name, found: Candidate, options: &Options) -> Result<Self, ContainerError> {
        let dir = options.run_dir.join(name.as_str());
        if dir.exists() {
            return Err(ContainerError::Taken(name.clone()));
        }
        Self::take(name, found, options, &dir).inspect_err(|_| {
            // The first error counts; what this leaves, the next release removes.
            let _ = Self::release(&options.run_dir, name);
        })
    }

    fn take(name: &Name, found: Candidate, options: &Options, dir: &Path) -> Result<Self, ContainerError> {
        let Candidate { spec, init, pid_one, trees, .. } = found;
        let PidOne::Application(bundle) = pid_one else {
            return Err(unfit(spec.engine.container(), "its pid 1 is our init"));
        };
        let record = Record {
            cgroup: container_cgroup(name, init)?,
            netns: has_own("net", init.pid).then(|| netns_of(init)),
            spec,
            boot_id: boot_id().map_err(keeper_error(name))?,
            guard: None,
            root: Some(init),
            bundle,
            trees,
            made: false,
            complete: false,
        };
        private_dir(dir).map_err(keeper_error(name))?;
        let whole = Self::guard(name, record, options, dir)?;
        bare::move_tree(init.pid, whole.keeper.cgroup())
            .map_err(|source| ContainerError::Tree { name: name.clone(), source })?;
        Ok(whole)
    }

    /// Makes ready what a container will be restored into; silent.
    /// `fresh`: whatever an engine has of its files is not those of an epoch.
    pub fn create(spec: &ContainerSpec, options: &Options, fresh: bool) -> Result<Self, ContainerError> {
        let name = &spec.name;
        let dir = options.run_dir.join(name.as_str());
        if dir.exists() {
            return Err(ContainerError::Taken(name.clone()));
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
        let (name, id) = (&spec.name, spec.engine.container());
        private_dir(dir).map_err(keeper_error(name))?;
        let (memory, nothing) = (dir.join("memory"), dir.join("nothing"));
        let mut record = Record {
            spec: spec.clone(),
            boot_id: boot_id().map_err(keeper_error(name))?,
            guard: None,
            root: None,
            bundle: Bundle::default(),
            cgroup: None,
            netns: None,
            trees: Vec::new(),
            made: true,
            complete: false,
        };
        write_record(&dir.join(WHOLE_RECORD), &record).map_err(keeper_error(name))?;
        let config = match &spec.engine {
            Engine::Oci { config, .. } => {
                let parsed = Config::parse(config);
                Some(parsed.map_err(|error| unfit(id, &format!("its config.json: {error}")))?)
            }
            Engine::Docker { .. } => None,
        };
        for (number, tree) in spec.trees.iter().enumerate().filter(|(_, tree)| is_memory(tree)) {
            let at = memory.join(number.to_string());
            let made = mounts::mount_memory(&at, &memory_options(spec, config.as_ref(), &tree.inside));
            made.map_err(file_error(name, "mount a file system in memory at", &at))?;
        }
        mounts::mount_nothing(&nothing).map_err(file_error(name, "mount nothing at", &nothing))?;
        let ours = dir.join("net");
        record.netns = match &config {
            Some(config) if config.netns().is_some() => config.netns(),
            Some(config) if config.has_own_net() => {
                network::make_namespace(&ours).map_err(network_error(name))?;
                Some(ours)
            }
            // A daemon makes it when it starts the container.
            _ => None,
        };
        let (cgroup, merged) = (cgroup_inside(name)?, dir.join(MERGED));
        let prepared = Prepared {
            data_dir: &options.data_dir,
            bundle: &options.bundle,
            memory: &memory,
            nothing: &nothing,
            netns: record.netns.as_deref(),
            cgroup: &cgroup,
            merged: &merged,
            fresh,
            left: Unreplicated::of(spec),
        };
        (record.bundle, record.trees) = engine::prepare(spec, &prepared).map_err(engine_error(id))?;
        Self::guard(name, record, options, dir)
    }

    /// Starts the guard process and, where it is ours, the network.
    fn guard(name: &Name, mut record: Record, options: &Options, dir: &Path) -> Result<Self, ContainerError> {
        let keeper_error = keeper_error(name);
        let path = dir.join(WHOLE_RECORD);
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
        if let Some(netns) =
            record.netns.as_deref().filter(|_| !record.spec.ips.is_empty() && !has_device(name))
        {
            let (inside, open) = (netns.display().to_string(), open_netns(name, netns)?);
            network::create(name, &inside, open.as_fd(), &record.spec.ips).map_err(network_error(name))?;
        }
        record.complete = true;
        write_record(&path, &record).map_err(&keeper_error)?;
        let whole = Self::with(dir.to_owned(), record, keeper)?;
        if let Some(gate) = &whole.gate {
            if whole.record.made {
                gate.close().map_err(network_error(name))?;
            }
            let set = whole.keeper.on_fence(&gate.close_steps());
            set.map_err(|error| keeper_error(error.into()))?;
        }
        Ok(whole)
    }

    /// Finds one that was adopted or created before, by this or an earlier agent.
    pub fn open(run_dir: &Path, name: &Name) -> Result<Self, ContainerError> {
        let dir = run_dir.join(name.as_str());
        let record: Option<Record> = read_record(&dir.join(WHOLE_RECORD)).map_err(keeper_error(name))?;
        let record =
            record.filter(|record| record.complete && boot_id().is_ok_and(|id| id == record.boot_id));
        let unknown = || ContainerError::Unknown(name.clone());
        let record = record.ok_or_else(unknown)?;
        let guard = record.guard.ok_or_else(unknown)?;
        let cgroup = Cgroup::within(name, record.cgroup.as_deref());
        let cgroup = cgroup.map_err(|error| keeper_error(name)(error.into()))?;
        let keeper = Keeper::attach(&dir.join(CONTROL), guard, cgroup).map_err(keeper_error(name))?;
        Self::with(dir, record, keeper)
    }

    fn with(dir: PathBuf, record: Record, keeper: Keeper) -> Result<Self, ContainerError> {
        let (name, ips) = (&record.spec.name, &record.spec.ips);
        let gate = match record.netns.as_deref().map(|netns| open_netns(name, netns)) {
            // It has gone with its last process.
            Some(Err(_)) if record.root.is_some_and(|root| !root.is_alive()) => None,
            Some(netns) if ips.is_empty() => Gate::of_engine(netns?.as_fd()).map_err(network_error(name))?,
            Some(netns) => Some(Gate::of(name, ips, netns?.as_fd()).map_err(network_error(name))?),
            None => None,
        };
        // That of ours counts those below it too.
        let oom_file = match &record.cgroup {
            Some(own) => own.join("memory.events"),
            None => work_of(name)?.join("memory.events"),
        };
        let oom_kills = cgroup::oom_kills(&oom_file).map(|kills| (oom_file, kills));
        Ok(Self { dir, record, keeper, gate, oom_kills })
    }

    /// Whether there is, or was, one of that name in the run directory.
    pub fn is_known(run_dir: &Path, name: &Name) -> bool {
        run_dir.join(name.as_str()).join(WHOLE_RECORD).exists()
    }

    /// Ends it, and what was made for it; also one that is half made or dead. Its files and its log stay.
    pub fn destroy(run_dir: &Path, name: &Name) -> Result<(), ContainerError> {
        Self::end(run_dir, name, false)
    }

    /// The same for good: what was made for a workload that this host no longer stands by for, its engine forgets.
    pub fn remove(run_dir: &Path, name: &Name) -> Result<(), ContainerError> {
        Self::end(run_dir, name, true)
    }

    fn end(run_dir: &Path, name: &Name, for_good: bool) -> Result<(), ContainerError> {
        let keeper_error = keeper_error(name);
        let cgroup_error = |error: CgroupError| keeper_error(error.into());
        let dir = run_dir.join(name.as_str());
        // The network first: dying processes send FIN and RST.
        network::remove(name).map_err(network_error(name))?;
        // A record that cannot be read must not keep the rest alive.
        let record: Option<Record> = read_record(&dir.join(WHOLE_RECORD)).unwrap_or(None);
        let Some(record) = record else { return Ok(()) };
        close_engine_net(&record);
        let cgroup = Cgroup::within(name, record.cgroup.as_deref()).map_err(cgroup_error)?;
        if cgroup.work().exists() {
            cgroup.kill(KILL_LIMIT).map_err(cgroup_error)?;
        }
        let id = record.spec.engine.container();
        // An overlay of ours would keep the engine from removing it.
        mounts::unmount_below(&dir).map_err(file_error(name, "unmount what is below", &dir))?;
        let ended = engine::end_whole(&record.spec.engine, &record.bundle.dir, for_good && record.made);
        ended.map_err(engine_error(id))?;
        // The runtime's own is below it.
        cgroup::remove_below(&cgroup.work());
        cgroup.destroy(KILL_LIMIT).map_err(cgroup_error)?;
        remove_run_dir(&dir).map_err(keeper_error)
    }

    /// Ends the protection of a container that runs on. Idempotent.
    pub fn release(run_dir: &Path, name: &Name) -> Result<(), ContainerError> {
        let keeper_error = keeper_error(name);
        let cgroup_error = |error: CgroupError| keeper_error(error.into());
        let dir = run_dir.join(name.as_str());
        let record: Option<Record> = read_record(&dir.join(WHOLE_RECORD)).unwrap_or(None);
        let Some(record) = record else { return Ok(()) };
        let cgroup = Cgroup::within(name, record.cgroup.as_deref()).map_err(cgroup_error)?;
        let keeper = record.guard.map(|guard| Keeper::attach(&dir.join(CONTROL), guard, cgroup.clone()));
        if let Some(Ok(keeper)) = keeper {
            keeper.command(&Request::Leave).map_err(|error| keeper_error(error.into()))?;
        }
        if cgroup.work().exists() {
            cgroup.thaw(KILL_LIMIT).map_err(cgroup_error)?;
            // One that was restored here is where its runtime has put it.
            let home = record.cgroup.map_or_else(cgroup::v2_root, Ok).map_err(cgroup_error)?;
            bare::give_back(&cgroup, &home).map_err(cgroup_error)?;
        }
        cgroup.remove_if_empty(LEAVE_LIMIT);
        mounts::unmount_below(&dir).map_err(file_error(name, "unmount what is below", &dir))?;
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

    /// Its gate, if it has devices.
    pub fn gate(&self) -> Option<&Gate> {
        self.gate.as_ref()
    }

    /// Whether it waits for its first restore, guarded.
    pub fn is_waiting(&self) -> bool {
        self.record.made && self.record.root.is_none() && self.keeper.is_alive()
    }

    /// Whether no process of it, whole or half restored, is there.
    pub fn is_empty(&self) -> bool {
        self.record.root.is_none() && self.keeper.cgroup().is_empty().unwrap_or(false)
    }

    /// The root's pid here and inside, while it runs.
    pub fn workload_pid(&self) -> Option<(u32, u32)> {
        self.record.root.filter(|root| root.is_alive()).map(|root| (root.pid, 1))
    }

    /// See [`Container::oom_kills`](super::Container::oom_kills).
    pub fn oom_kills(&self) -> Option<u64> {
        let (file, before) = self.oom_kills.as_ref()?;
        cgroup::oom_kills(file)?.checked_sub(*before)
    }

    /// Whether its engine has stopped it.
    pub fn is_paused(&self) -> bool {
        let name = &self.record.spec.name;
        let own = match &self.record.cgroup {
            Some(dir) => Ok(dir.clone()),
            None => work_of(name).map(|work| work.join(&self.record.bundle.leaf)),
        };
        let text = own.ok().and_then(|dir| fs::read_to_string(dir.join("cgroup.freeze")).ok());
        text.is_some_and(|text| text.trim() == "1")
    }

    /// Its root directory, as the host sees it.
    pub fn root(&self) -> &Path {
        &self.record.bundle.root
    }

    /// Its network is made by who restores it, and CRIU leaves it out.
    pub fn has_new_net(&self) -> bool {
        matches!(self.record.spec.engine, Engine::Docker { .. })
            && self.workload_pid().is_some_and(|(pid, _)| has_own("net", pid))
    }

    /// What is not in an image of it, in CRIU's notation.
    pub fn external(&self) -> Result<Vec<String>, ContainerError> {
        let name = &self.record.spec.name;
        let dead = || unfit(self.record.spec.engine.container(), "it has ended");
        let (pid, _) = self.workload_pid().ok_or_else(dead)?;
        let path = PathBuf::from(format!("/proc/{pid}/mountinfo"));
        let found = mounts::Mounts::of(pid).map_err(file_error(name, "read", &path))?;
        let of_daemon = matches!(self.record.spec.engine, Engine::Docker { .. });
        let mut external: Vec<String> = if of_daemon {
            let memory = self.record.spec.trees.iter().filter(|tree| is_memory(tree));
            let memory: Vec<&Path> = memory.map(|tree| tree.inside.as_path()).collect();
            found.as_a_daemon_names_them(&memory).collect()
        } else {
            found.external().map(|inside| format!("mnt[{0}]:{0}", inside.display())).collect()
        };
        if has_own("net", pid) && !of_daemon {
            let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
            let of = fs::metadata(&path).map_err(file_error(name, "look at", &path))?;
            external.push(format!("net[{}]:{NETNS_KEY}", std::os::unix::fs::MetadataExt::ino(&of)));
        }
        Ok(external)
    }

    /// Which of its pid 1's standard streams are pipes, and what CRIU calls them.
    pub fn streams(&self) -> Vec<(u8, String)> {
        self.workload_pid().map(|(pid, _)| streams_of(pid)).unwrap_or_default()
    }

    /// Where its trees are on this host, in their order.
    pub fn trees(&self) -> &[TreeAt] {
        &self.record.trees
    }

    /// The same of one of which there is no handle.
    pub fn trees_of(run_dir: &Path, name: &Name) -> Result<Vec<TreeAt>, ContainerError> {
        let record: Option<Record> =
            read_record(&run_dir.join(name.as_str()).join(WHOLE_RECORD)).map_err(keeper_error(name))?;
        let record = record.filter(|record| record.complete);
        record.map(|record| record.trees).ok_or_else(|| ContainerError::Unknown(name.clone()))
    }

    /// A file system that the container has in its memory, by the number of its tree; while it waits, what will be that.
    pub fn memory(&self, number: usize) -> Result<OwnedFd, ContainerError> {
        let name = &self.record.spec.name;
        if let Some(root) = self.record.root {
            return memory_of(name, root, &self.record.spec.trees[number].inside);
        }
        let path = self.dir.join("memory").join(number.to_string());
        fs::File::open(&path).map(OwnedFd::from).map_err(file_error(name, "open", &path))
    }

    /// Has its runtime restore it from CRIU's images, a directory of ours, which this completes: `streams` as
    /// [`Self::streams`] has told. It runs then, unheard. Returns its pid 1, as the host sees it.
    pub fn restore(
        &mut self,
        images: &Path,
        streams: &[(u8, String)],
        criu: &Path,
    ) -> Result<u32, ContainerError> {
        let name = self.record.spec.name.clone();
        let id = self.record.spec.engine.container().to_owned();
        let cgroup = cgroup_inside(&name)?.join(&self.record.bundle.leaf);
        complete(images, streams, &cgroup).map_err(file_error(&name, "complete the images in", images))?;
        let merged = self.dir.join(MERGED);
        mounts::unmount_at(&merged).map_err(file_error(&name, "unmount", &merged))?;
        let pipe = pipe2(OFlag::O_CLOEXEC).map_err(std::io::Error::from);
        let (read, write) = pipe.map_err(file_error(&name, "make a pipe for", Path::new("the output")))?;
        let kept = self.keeper.client().ask(&Request::KeepLog, &[read.as_fd()]);
        kept.map_err(|error| self.keeper_error(error.into()))?;
        let restore = Restore { bundle: &self.record.bundle, images, criu, output: &write };
        let pid = engine::restore(&self.record.spec.engine, &restore).map_err(engine_error(&id))?;
        self.know(pid).map(|()| pid)
    }

    /// Finds what its runtime has restored for an agent that did not live to hear of it, or is about to.
    pub fn take_up(&mut self) -> Result<(), ContainerError> {
        let id = self.record.spec.engine.container().to_owned();
        let until = Instant::now() + RESTORE_LIMIT;
        loop {
            let found = engine::restored(&self.record.spec.engine, &self.record.bundle.dir);
            match found.map_err(engine_error(&id))? {
                Some(pid) => return self.know(pid),
                None if Instant::now() > until => return Err(unfit(&id, "its runtime has not restored it")),
                None => std::thread::sleep(LOOK_INTERVAL),
            }
        }
    }

    /// Its pid 1 is this one, as the host sees it.
    fn know(&mut self, pid: u32) -> Result<(), ContainerError> {
        let name = self.record.spec.name.clone();
        let id = self.record.spec.engine.container();
        let root = ProcessId::of(pid).map_err(|_| unfit(id, "what was restored has ended"))?;
        self.record.root = Some(root);
        if self.record.netns.is_none() && has_own("net", pid) {
            // The engine has made it only now.
            self.record.netns = Some(netns_of(root));
            let open = open_netns(&name, &netns_of(root))?;
            self.gate = Gate::of_engine(open.as_fd()).map_err(network_error(&name))?;
        }
        let written = write_record(&self.dir.join(WHOLE_RECORD), &self.record);
        written.map_err(|error| self.keeper_error(error))
    }

    fn keeper_error(&self, source: KeeperError) -> ContainerError {
        ContainerError::Keeper { name: self.record.spec.name.clone(), source }
    }
}

/// The options of a container's file system in memory.
fn memory_options(spec: &ContainerSpec, config: Option<&Config>, inside: &Path) -> Vec<String> {
    match (config, &spec.engine) {
        (Some(config), _) => config.options_of(inside).map(str::to_owned).collect(),
        (None, Engine::Docker { config, .. }) => docker::options_of(config, inside),
        (None, Engine::Oci { .. }) => Vec::new(),
    }
}

/// Whether a tree is a file system in memory.
fn is_memory(tree: &ContainerTree) -> bool {
    tree.kind == ContainerTreeKind::Memory
}

/// Below which the runtime's cgroup is of a container that is restored here: its processes are born in it.
fn work_of(name: &Name) -> Result<PathBuf, ContainerError> {
    Ok(Cgroup::of(name).map_err(|source| keeper_error(name)(source.into()))?.work())
}

/// The same from the root of the cgroup file system on.
fn cgroup_inside(name: &Name) -> Result<PathBuf, ContainerError> {
    let dir = work_of(name)?;
    let root = cgroup::v2_root().map_err(|source| keeper_error(name)(source.into()))?;
    Ok(Path::new("/").join(dir.strip_prefix(&root).unwrap_or(&dir)))
}

fn netns_of(init: ProcessId) -> PathBuf {
    format!("/proc/{}/ns/net", init.pid).into()
}

fn open_netns(name: &Name, path: &Path) -> Result<OwnedFd, ContainerError> {
    fs::File::open(path).map(OwnedFd::from).map_err(file_error(name, "open", path))
}

/// Before a container of an engine's network is ended: what is left of it to say goes nowhere. It may be half made.
fn close_engine_net(record: &Record) {
    let Some(netns) = record.netns.as_deref().filter(|_| record.spec.ips.is_empty()) else { return };
    let closed = open_netns(&record.spec.name, netns).and_then(|netns| {
        let closed =
            Gate::of_engine(netns.as_fd()).and_then(|gate| gate.as_ref().map_or(Ok(()), Gate::close));
        closed.map_err(network_error(&record.spec.name))
    });
    if let Err(error) = closed {
        tracing::debug!(%error, "the container's network is gone, or could not be closed");
    }
}

/// Adds to CRIU's images what a runtime expects beside them, and says where the cgroup is here. In the images it is that of
/// the other host, and below it the one of ours that the guard there has.
fn complete(images: &Path, streams: &[(u8, String)], cgroup: &Path) -> std::io::Result<()> {
    let stream = |number: u8| {
        let pipe = streams.iter().find(|(stream, _)| *stream == number);
        pipe.map_or("/dev/null", |(_, key)| key.as_str()).to_owned()
    };
    let descriptors: Vec<String> = (0..3).map(stream).collect();
    put(&images.join(DESCRIPTORS), &serde_json::to_vec(&descriptors)?)?;
    let image = images::read(images, CGROUP_IMAGE).map_err(std::io::Error::other)?;
    let moved = images::move_cgroups(CGROUP_IMAGE, &image, &cgroup.display().to_string());
    put(&images.join(CGROUP_IMAGE), &moved.map_err(std::io::Error::other)?)
}

/// What is there may be the store's own, under another name.
fn put(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let next = path.with_extension("next");
    fs::write(&next, bytes)?;
    fs::rename(next, path)
}
