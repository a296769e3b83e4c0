//! The place in which a workload runs on this host, with its addresses: what is opened when it may speak and closed when
//! it may not, in the order that `takeover/` gives.

use std::{os::fd::OwnedFd, path::Path, sync::Arc};

use super::{Agent, durable, trees};
use crate::{
    capture::{self, Note, Outside},
    criu::{
        bridge::Bridge,
        images::connections::{TcpConnection, tcp_connections},
    },
    files,
    model::Name,
    restore::Site,
    takeover::{
        address::Addresses,
        gate,
        hold::{Hold, HoldError, Marks},
        inputs::{self, Input},
        lease::{Lease, LeaseError},
        nudge::{Voice, nudge, probe},
        order::{Order, Stage, Step},
        stale::Watch,
    },
    workload::{
        bare::BareTree,
        container::{self, Candidate, Container, Named, whole::Whole},
        keeper::Keeper,
        network::{self, Behind, Gate},
        sandbox::{self, Sandbox},
        spec::{
            Cidr, Commit, ContainerSpec, Lent, MountRule, PlaceSpec, SandboxSpec, Vip, Way, WorkloadSpec,
        },
    },
};

/// Bytes at which a workload's log begins anew.
pub(super) const LOG_BYTES_MAX: u64 = 64 << 20;

/// Where a workload is.
pub(super) enum Place {
    Sandbox(Box<Sandbox>),
    /// Made by an engine.
    Container(Box<Container>),
    /// Of an engine, its pid 1 the application.
    Whole(Box<Whole>),
    /// Started by somebody else in the host's namespaces.
    Bare(BareTree),
}

/// A place and the addresses that belong to it.
pub(super) struct Home {
    pub(super) place: Place,
    pub(super) addresses: Option<Addresses>,
    /// None if nothing tells its packets from others'.
    hold: Option<std::result::Result<Arc<Hold>, HoldError>>,
    /// The guard's deadline, kept by the kernel.
    lease: std::result::Result<Lease, LeaseError>,
    /// Of the tree that was restored here.
    connections: Vec<TcpConnection>,
    /// Their other ends may have had more than was sent by then.
    may_be_stale: bool,
    /// By what it is told of them.
    voices: Vec<Voice>,
    order: Order,
}

/// The root of a workload's tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Root {
    pub(super) host: u32,
    pub(super) inside: u32,
}

type Result<T> = anyhow::Result<T>;

impl Place {
    fn keeper(&self) -> &Keeper {
        match self {
            Self::Sandbox(sandbox) => sandbox.keeper(),
            Self::Container(container) => container.keeper(),
            Self::Whole(whole) => whole.keeper(),
            Self::Bare(tree) => tree.keeper(),
        }
    }

    pub(super) fn gate(&self) -> Option<&Gate> {
        match self {
            Self::Sandbox(sandbox) => sandbox.gate(),
            Self::Container(container) => container.gate(),
            Self::Whole(whole) => whole.gate(),
            Self::Bare(_) => None,
        }
    }
}

impl Home {
    fn at(place: Place, stage: Stage) -> Self {
        Self {
            place,
            order: Order::new(stage),
            addresses: None,
            hold: None,
            lease: Err(LeaseError::NoDevice),
            connections: Vec::new(),
            may_be_stale: false,
            voices: Vec::new(),
        }
    }

    /// Finds the place that an earlier agent made.
    pub(super) fn open(agent: &Agent, spec: &PlaceSpec, bare: bool) -> Result<Self> {
        let dir = agent.sandboxes_dir();
        let place = match spec {
            _ if bare => Place::Bare(BareTree::open(spec.name(), &dir)?),
            PlaceSpec::Sandbox(spec) => Place::Sandbox(Box::new(Sandbox::open(&dir, &spec.name)?)),
            PlaceSpec::Container(spec) if spec.way == Way::Whole => {
                Place::Whole(Box::new(Whole::open(&dir, &spec.name)?))
            }
            PlaceSpec::Container(spec) => Place::Container(Box::new(Container::open(&dir, &spec.name)?)),
        };
        let found = Self::at(place, Stage::Unknown);
        if matches!(found.root(), Ok(Some(_))) {
            found.order.done(Step::Find)?;
        }
        Ok(found)
    }

    /// Makes a place: empty, silent. `fresh`: whatever an engine has of its files is not those of an epoch.
    pub(super) fn create(agent: &Agent, spec: &PlaceSpec, fresh: bool) -> Result<Self> {
        let durable = durable::Place::of(&agent.config.state_dir, spec.name());
        durable.make()?;
        let place = match spec {
            PlaceSpec::Sandbox(spec) => {
                let options = sandbox::Options {
                    program: agent.program.clone(),
                    run_dir: agent.sandboxes_dir(),
                    data_dir: durable.data(),
                    shm_dir: trees::shm_of(&agent.config, &spec.name),
                    log: durable.log(),
                    log_bytes_max: LOG_BYTES_MAX,
                    isolated: None,
                };
                Place::Sandbox(Box::new(Sandbox::create(spec, &options)?))
            }
            PlaceSpec::Container(spec) => {
                let options = container_options(agent, &spec.name);
                if spec.way == Way::Whole {
                    Place::Whole(Box::new(Whole::create(spec, &options, fresh)?))
                } else {
                    Place::Container(Box::new(Container::create(spec, &options, fresh)?))
                }
            }
        };
        Ok(Self::at(place, Stage::Unknown))
    }

    /// Makes a place for a drill: nobody hears what is restored there.
    pub(super) fn isolated(spec: &SandboxSpec, options: &sandbox::Options) -> Result<Self> {
        Ok(Self::at(Place::Sandbox(Box::new(Sandbox::create(spec, options)?)), Stage::Silent))
    }

    /// Adopts a tree that runs.
    pub(super) fn adopt(agent: &Agent, name: &Name, pid: u32) -> Result<Self> {
        let tree = BareTree::adopt(name, pid, &agent.program, &agent.sandboxes_dir())?;
        Ok(Self::at(Place::Bare(tree), Stage::Restored))
    }

    /// Adopts a container that runs.
    pub(super) fn adopt_container(
        agent: &Agent,
        name: &Name,
        named: &Named,
        (ips, mounts): (&[Cidr], &[MountRule]),
        lent: Vec<Lent>,
    ) -> Result<Self> {
        durable::Place::of(&agent.config.state_dir, name).make()?;
        let mut found = Candidate::find(name, named, ips, mounts)?;
        found.lend(lent);
        let options = container_options(agent, name);
        let place = match found.way() {
            Way::Inside => Place::Container(Box::new(Container::adopt(name, found, &options)?)),
            Way::Whole => Place::Whole(Box::new(Whole::adopt(name, found, &options)?)),
        };
        Ok(Self::at(place, Stage::Restored))
    }

    /// Ends whatever place there is of that name, with everything that runs in it.
    pub(super) fn destroy(agent: &Agent, name: &Name) -> Result<()> {
        let dir = agent.sandboxes_dir();
        if Container::is_known(&dir, name) {
            Container::destroy(&dir, name)?;
        } else if Whole::is_known(&dir, name) {
            Whole::destroy(&dir, name)?;
        } else {
            Sandbox::destroy(&dir, name)?;
        }
        // Not before: nothing of it leaves that was held, or after its lease.
        forget_packets(name);
        Ok(())
    }

    /// The same for good: a container that was made here its engine forgets.
    pub(super) fn remove(agent: &Agent, name: &Name) -> Result<()> {
        let dir = agent.sandboxes_dir();
        if Container::is_known(&dir, name) {
            Container::remove(&dir, name)?;
        } else if Whole::is_known(&dir, name) {
            Whole::remove(&dir, name)?;
        } else {
            return Self::destroy(agent, name);
        }
        forget_packets(name);
        Ok(())
    }

    pub(super) fn keeper(&self) -> &Keeper {
        self.place.keeper()
    }

    /// Pid 1 of the place, and a descriptor by which its namespaces are entered.
    pub(super) fn init(&self) -> Result<(u32, OwnedFd)> {
        Ok(match &self.place {
            Place::Sandbox(sandbox) => (sandbox.keeper().pid(), sandbox.keeper().pidfd()?),
            Place::Container(container) => (container.pid(), container.init()?),
            Place::Whole(_) | Place::Bare(_) => anyhow::bail!("nobody of ours is its pid 1"),
        })
    }

    pub(super) fn sandbox(&self) -> Option<&Sandbox> {
        match &self.place {
            Place::Sandbox(sandbox) => Some(sandbox),
            Place::Container(_) | Place::Whole(_) | Place::Bare(_) => None,
        }
    }

    /// How many processes of a container the kernel has killed for want of memory, if that can be told.
    pub(super) fn oom_kills(&self) -> Option<u64> {
        match &self.place {
            Place::Container(container) => container.oom_kills(),
            Place::Whole(whole) => whole.oom_kills(),
            Place::Sandbox(_) | Place::Bare(_) => None,
        }
    }

    /// What it is of a container, if it is one.
    pub(super) fn container_spec(&self) -> Option<&ContainerSpec> {
        match &self.place {
            Place::Container(container) => Some(container.spec()),
            Place::Whole(whole) => Some(whole.spec()),
            Place::Sandbox(_) | Place::Bare(_) => None,
        }
    }

    /// The container that its runtime restores, if it is one.
    pub(super) fn whole(&mut self) -> Option<&mut Whole> {
        match &mut self.place {
            Place::Whole(whole) => Some(whole),
            Place::Sandbox(_) | Place::Container(_) | Place::Bare(_) => None,
        }
    }

    /// Before a restore: what it has of files in memory is what the epoch has of them.
    pub(super) fn fill(&self, agent: &Agent) -> Result<()> {
        match &self.place {
            Place::Container(container) => trees::fill(&agent.config, container.as_ref()),
            Place::Whole(whole) => trees::fill(&agent.config, whole.as_ref()),
            Place::Sandbox(_) | Place::Bare(_) => Ok(()),
        }
    }

    /// Whether it waits for a tree: it is there, whole, and not somebody's.
    pub(super) fn waits(&self) -> bool {
        let waits = match &self.place {
            Place::Sandbox(sandbox) => sandbox.keeper().is_alive(),
            Place::Container(container) => container.is_alive(),
            Place::Whole(whole) => whole.is_waiting(),
            Place::Bare(_) => false,
        };
        // One that was silenced, its tree ended since, would silence the next one from its first moment on.
        let keeper = self.keeper();
        waits && !keeper.guard().fired() && !keeper.cgroup().is_frozen().unwrap_or(true)
    }

    /// Whether a tree can be restored into it: it waits for one that nobody would hear before its time.
    pub(super) fn can_take_a_tree(&self) -> bool {
        self.order.stage() == Stage::Silent && self.waits()
    }

    /// The tree's root, while it runs.
    pub(super) fn root(&self) -> Result<Option<Root>> {
        let found = match &self.place {
            Place::Sandbox(sandbox) => sandbox.workload_pid()?,
            Place::Container(container) => container.workload_pid(),
            Place::Whole(whole) => whole.workload_pid(),
            Place::Bare(tree) => tree.is_alive().then(|| (tree.pid(), tree.pid())),
        };
        Ok(found.map(|(host, inside)| Root { host, inside }))
    }

    /// Whether its engine has stopped it.
    pub(super) fn is_paused(&self) -> bool {
        match &self.place {
            Place::Container(container) => container.is_paused(),
            Place::Whole(whole) => whole.is_paused(),
            Place::Sandbox(_) | Place::Bare(_) => false,
        }
    }

    /// After a restore: this is the tree's root (its pid inside).
    pub(super) fn track(&mut self, inside: u32) -> Result<()> {
        match &mut self.place {
            Place::Sandbox(sandbox) => sandbox.track(inside)?,
            Place::Container(container) => container.track(inside)?,
            Place::Whole(whole) => whole.take_up()?,
            Place::Bare(_) => anyhow::bail!("nothing is restored into a place of somebody else's"),
        }
        Ok(self.order.done(Step::Find)?)
    }

    /// Whether nobody can hear what is restored into it.
    pub(super) fn check_silent(&self) -> Result<()> {
        Ok(self.order.check(Step::Restore)?)
    }

    /// A tree was started in it.
    pub(super) fn started(&self) -> Result<()> {
        Ok(self.order.done(Step::Find)?)
    }

    /// It was silenced, or is heard again.
    pub(super) fn is_heard(&self, heard: bool) -> Result<()> {
        let steps = if heard { &[Step::Find, Step::Open, Step::Answer][..] } else { &[Step::Silence] };
        Ok(steps.iter().try_for_each(|step| self.order.done(*step))?)
    }

    /// Before the end of a tree that is handed off: CRIU ends it from inside the place, which must not end with it.
    pub(super) fn outlives_its_tree(&self, outlives: bool) -> Result<()> {
        match &self.place {
            Place::Container(container) => Ok(container.outlives_its_tree(outlives)?),
            // Their pid 1 is not the tree's to end; or is the tree's root, whose container ends with it.
            Place::Sandbox(_) | Place::Whole(_) | Place::Bare(_) => Ok(()),
        }
    }

    /// Whether no process of a workload, whole or half restored, is in the place; those of `ours` may be.
    pub(super) fn is_empty_but(&self, ours: &[u32]) -> bool {
        if let Place::Whole(whole) = &self.place {
            return whole.is_empty();
        }
        self.keeper().cgroup().pids().is_ok_and(|pids| pids.iter().all(|pid| ours.contains(pid)))
    }

    /// Looks the addresses up, tells the guard what to silence, has the kernel keep the lease too, and makes ready to hold
    /// packets. Must come before anything opens. `held`: its output waits for commits from now on.
    pub(super) fn prepare(&mut self, spec: &WorkloadSpec, held: bool) -> Result<()> {
        let addresses = Addresses::prepare(spec.place.name(), &spec.place.net(), &spec.vips)?;
        addresses.guard(self.keeper(), self.place.gate())?;
        self.addresses = Some(addresses);
        self.order.done(Step::Prepare)?;
        let voices = self.place.gate().map_or(&[][..], Gate::doors).iter().map(Voice::open);
        self.voices = voices.collect::<std::io::Result<_>>().unwrap_or_else(|error| {
            tracing::warn!(%error, name = %spec.place.name(), "its connections will not be told to go on after a takeover");
            Vec::new()
        });
        let marks = self.marks(&spec.vips);
        self.lease = Lease::new(spec.place.name(), &marks, self.keeper().shared_guard());
        if let Err(error) = &self.lease {
            tracing::info!(%error, name = %spec.place.name(), "the guard alone keeps the lease");
        }
        let has_none = !marks.has_device() && marks.addresses.is_empty();
        // Its queues are free for the next one.
        self.hold = None;
        if has_none {
            return Ok(());
        }
        let made = Hold::make(spec.place.name(), marks, Some(self.keeper().shared_guard()), held);
        self.hold = match made {
            Err(error) if spec.commit == Commit::Output => return Err(error.into()),
            made => Some(made.map(Arc::new)),
        };
        if let Some(error) = self.why_no_hold() {
            tracing::warn!(%error, name = %spec.place.name(), "its input is not held while it is frozen");
        }
        Ok(())
    }

    /// By what its packets are known.
    fn marks(&self, vips: &[Vip]) -> Marks {
        let mut marks =
            Marks { addresses: vips.iter().map(|vip| vip.cidr.addr).collect(), ..Marks::default() };
        if let Some(gate) = self.place.gate() {
            let Behind { bridges, macs, addresses } = gate.behind().clone();
            marks.ports = gate.ports().to_vec();
            marks.devices = gate.devices().to_vec();
            (marks.bridges, marks.macs, marks.inner) = (bridges, macs, addresses);
            marks.addresses.extend(gate.ips());
            marks.addresses.sort_unstable();
            marks.addresses.dedup();
        }
        marks
    }

    /// Its packets, if they can be held.
    pub(super) fn hold(&self) -> Option<&Arc<Hold>> {
        self.hold.as_ref()?.as_ref().ok()
    }

    /// Why they cannot, although they are known.
    pub(super) fn why_no_hold(&self) -> Option<&HoldError> {
        self.hold.as_ref()?.as_ref().err()
    }

    /// Where the kernel keeps the lease, or why it does not.
    pub(super) fn lease(&self) -> std::result::Result<&Lease, &LeaseError> {
        self.lease.as_ref()
    }

    /// Lets the workload be heard: the gate, then the addresses. The caller announces.
    pub(super) fn open_up(&self) -> Result<()> {
        let (keeper, gate) = (self.place.keeper(), self.place.gate());
        self.order.check(Step::Open)?;
        gate::open(keeper, gate)?;
        self.order.done(Step::Open)?;
        if let Some(addresses) = &self.addresses {
            addresses.up(keeper)?;
        }
        Ok(self.order.done(Step::Answer)?)
    }

    /// Takes note of the connections that an image has.
    pub(super) fn note_connections(&mut self, dir: &Path, note: &Note) {
        self.may_be_stale = !note.output_held;
        // They go on without it, only later.
        self.connections = tcp_connections(dir).unwrap_or_else(|error| {
            tracing::debug!(%error, "connections of the image");
            Vec::new()
        });
    }

    /// Hears which restored connections cannot go on, and ends those; before the gate opens. Where output was held since the
    /// restored epoch's freeze there are none.
    pub(super) fn watch_connections(&self, name: &Name) {
        if !self.may_be_stale {
            return;
        }
        let doors = self.place.gate().map_or(&[][..], Gate::doors);
        let name = name.clone();
        match Watch::begin(doors, &self.connections) {
            Ok(None) => {}
            Ok(Some(watch)) => drop(std::thread::spawn(move || match watch.run() {
                Ok(0) => {}
                Ok(reset) => tracing::info!(%name, reset, "connections knew more than the restored workload"),
                Err(error) => tracing::warn!(%error, %name, "connections that cannot go on may hang"),
            })),
            Err(error) => tracing::warn!(%error, %name, "connections that cannot go on may hang"),
        }
    }

    /// Sends a round of announcements; with the first ones restored connections are told to go on.
    pub(super) fn announce(&self, round: usize) -> Result<()> {
        const NUDGES: usize = 2;
        self.order.check(Step::Announce)?;
        if round < NUDGES
            && let Err(error) = nudge(&self.voices, &self.connections)
        {
            tracing::debug!(%error, "telling restored connections to go on");
        }
        if let Some(addresses) = &self.addresses {
            addresses.announce()?;
        }
        if round < NUDGES
            && self.may_be_stale
            && let Err(error) = probe(&self.connections)
        {
            tracing::debug!(%error, "asking the other ends of restored connections where they are");
        }
        Ok(self.order.done(Step::Announce)?)
    }

    /// Gives the restored workload what was sent to it since its epoch; after the first announcement, which tells it the way back.
    pub(super) fn replay(&self, inputs: &[Input]) {
        if let Err(error) = self.order.done(Step::Replay) {
            // It is not heard, which its status says.
            tracing::debug!(%error, "nothing is given to it");
            return;
        }
        match inputs::replay(&self.voices, inputs) {
            Ok(0) => {}
            Ok(packets) => tracing::info!(packets, "it was given what was sent to it since its epoch"),
            Err(error) => tracing::debug!(%error, "clients send again what they had on the way"),
        }
    }

    /// This host answers no more for the addresses; the workload itself may run on.
    pub(super) fn give_up_vips(&mut self, name: &Name) -> Result<()> {
        self.order.done(Step::Silence)?;
        let closed = self.addresses.take().map_or(Ok(()), |addresses| addresses.down());
        network::remove_shared_devices(name)?;
        Ok(closed?)
    }

    /// Whether its addresses are announced for as long as they are here.
    pub(super) fn is_announced_for_ever(&self) -> bool {
        self.addresses.as_ref().is_some_and(Addresses::need_repetition)
    }

    /// What a capturer needs to know of the place.
    pub(super) fn source(&self, agent: &Agent, spec: &WorkloadSpec) -> Result<capture::Source> {
        let name = spec.place.name();
        let root = self.root()?.ok_or_else(|| anyhow::anyhow!("the workload {name} has ended"))?;
        let mut source = capture::Source {
            root: root.host as i32,
            root_inside: root.inside,
            init: None,
            own_cgroup_namespace: false,
            whole: None,
            install: agent.install.clone(),
            bridge: Bridge::new(&agent.config.work_dir, agent.install.version)?,
            vmas: agent.vmas.clone(),
            tracking: capture::Tracking::choose(&agent.kernel)?,
            work: agent.config.work_dir.join(format!("dump-{name}")),
            outside: Vec::new(),
            trees: Vec::new(),
            held: Vec::new(),
        };
        match &self.place {
            Place::Sandbox(sandbox) => {
                let durable = durable::Place::of(&agent.config.state_dir, name);
                source.init = Some(sandbox.keeper().pidfd()?);
                source.outside = sandbox.log_pipes()?.into_iter().map(Outside::pipe).collect();
                let trees = trees::of_sandbox(&agent.config, &durable, sandbox.spec());
                source.trees = trees.into_iter().map(files::Source::plain).collect();
            }
            Place::Container(container) => {
                source.init = Some(container.init()?);
                source.own_cgroup_namespace = container.has_cgroup_namespace();
                let streams = container.streams().into_iter();
                source.outside = streams.map(|(stream, key)| Outside { key, stream: Some(stream) }).collect();
                (source.trees, source.held) = trees::of_container(container.as_ref())?;
            }
            Place::Whole(whole) => {
                let (root, external) = (whole.root().to_owned(), whole.external()?);
                let empty_net = whole.has_new_net();
                source.whole = Some(capture::Whole { root, external, empty_net });
                let streams = whole.streams().into_iter();
                source.outside = streams.map(|(stream, key)| Outside { key, stream: Some(stream) }).collect();
                (source.trees, source.held) = trees::of_container(whole.as_ref())?;
            }
            Place::Bare(_) => {}
        }
        Ok(source)
    }

    /// What a CRIU that restores needs to know of the place.
    pub(super) fn site(&self, note: &Note) -> Result<Site> {
        let (keeper, own_ipc) = (self.keeper(), note.own_ipc);
        Ok(match &self.place {
            Place::Sandbox(sandbox) => {
                let stdio = note.outside.iter().map(|_| sandbox.fresh_stdio());
                Site {
                    init: keeper.pidfd()?,
                    cgroups: vec![keeper.cgroup().work()],
                    own_cgroup_namespace: false,
                    stdio: stdio.collect::<std::result::Result<_, _>>()?,
                    own_ipc,
                }
            }
            Place::Container(container) => {
                // A tree that was never in a container has but one kind of output.
                let streams = note.outside.iter().map(|outside| outside.stream.unwrap_or(1));
                let stdio = streams.map(|stream| container.stream(stream));
                Site {
                    init: container.init()?,
                    cgroups: container.cgroups()?,
                    own_cgroup_namespace: container.has_cgroup_namespace(),
                    stdio: stdio.collect::<std::result::Result<_, _>>()?,
                    own_ipc,
                }
            }
            Place::Whole(_) => anyhow::bail!("its runtime restores it"),
            Place::Bare(_) => anyhow::bail!("nothing is restored into a place of somebody else's"),
        })
    }
}

fn container_options(agent: &Agent, name: &Name) -> container::Options {
    let durable = durable::Place::of(&agent.config.state_dir, name);
    container::Options {
        program: agent.program.clone(),
        run_dir: agent.sandboxes_dir(),
        wraps: agent.wraps(),
        data_dir: durable.data(),
        bundle: durable.bundle(),
        log: durable.log(),
        log_bytes_max: LOG_BYTES_MAX,
    }
}

/// Nobody holds or drops its packets any more, nor answers for its addresses.
fn forget_packets(name: &Name) {
    let held = Hold::remove(name).map_err(|error| error.to_string());
    for forgotten in [held, Lease::remove(name).map_err(|error| error.to_string())] {
        if let Err(error) = forgotten {
            // Without nf_tables there is nothing to remove.
            tracing::debug!(%error, %name, "removing its tables of the packet filter");
        }
    }
    if let Err(error) = network::remove_shared_devices(name) {
        tracing::warn!(%error, %name, "removing the devices of its addresses");
    }
}

/// Gives what somebody else started back to them, running.
pub(super) fn release(agent: &Agent, name: &Name) -> Result<()> {
    let dir = agent.sandboxes_dir();
    forget_packets(name);
    if Container::is_known(&dir, name) {
        return Ok(Container::release(&dir, name)?);
    }
    if Whole::is_known(&dir, name) {
        return Ok(Whole::release(&dir, name)?);
    }
    Ok(BareTree::release(name, &dir)?)
}
