//! The place in which a workload runs on this host, with its addresses: what is opened when it may speak and closed when
//! it may not, in the order that `takeover/` gives.

mod heard;

use std::{os::fd::OwnedFd, sync::Arc};

use self::heard::forget_network;
use super::{Agent, durable, trees};
use crate::{
    capture::{self, Note, Outside},
    criu::{bridge::Bridge, images::connections::TcpConnection},
    files,
    model::Name,
    restore::Site,
    takeover::{
        address::Addresses,
        hold::{Hold, HoldError},
        lease::{Lease, LeaseError},
        nudge::Voice,
        order::{Order, Stage, Step},
    },
    workload::{
        bare::BareTree,
        container::{self, Candidate, Container, Named, whole::Whole},
        keeper::Keeper,
        network::Gate,
        sandbox::{self, Sandbox},
        spec::{Cidr, ContainerSpec, Lent, MountRule, PlaceSpec, SandboxSpec, Way, WorkloadSpec},
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
        forget_network(name);
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
        forget_network(name);
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

/// Gives what somebody else started back to them, running.
pub(super) fn release(agent: &Agent, name: &Name) -> Result<()> {
    let dir = agent.sandboxes_dir();
    forget_network(name);
    if Container::is_known(&dir, name) {
        return Ok(Container::release(&dir, name)?);
    }
    if Whole::is_known(&dir, name) {
        return Ok(Whole::release(&dir, name)?);
    }
    Ok(BareTree::release(name, &dir)?)
}
