//! The place in which a workload runs on this host, with its addresses: what is opened when it may speak and closed when
//! it may not, in the order that `takeover/` gives.

use std::os::fd::OwnedFd;

use super::{Agent, trees};
use crate::{
    capture,
    criu::bridge::Bridge,
    files,
    model::Name,
    takeover::{self, address::Addresses},
    workload::{
        bare::BareTree,
        keeper::Keeper,
        sandbox::{Options, Sandbox},
        spec::{Net, SandboxSpec, Vip, WorkloadSpec},
    },
};

/// Bytes at which a workload's log begins anew.
const LOG_BYTES_MAX: u64 = 64 << 20;

/// Where a workload is.
pub(super) enum Place {
    Sandbox(Sandbox),
    /// Started by somebody else in the host's namespaces.
    Bare(BareTree),
}

/// A place and the addresses that belong to it.
pub(super) struct Home {
    pub(super) place: Place,
    addresses: Option<Addresses>,
}

/// The root of a workload's tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Root {
    pub(super) host: u32,
    pub(super) inside: u32,
}

type Result<T> = anyhow::Result<T>;

impl Home {
    /// Finds the place that an earlier agent made.
    pub(super) fn open(agent: &Agent, name: &Name, bare: bool) -> Result<Self> {
        let place = if bare {
            Place::Bare(BareTree::open(name, &agent.sandboxes_dir())?)
        } else {
            Place::Sandbox(Sandbox::open(&agent.sandboxes_dir(), name)?)
        };
        Ok(Self { place, addresses: None })
    }

    /// Makes a sandbox: empty, silent.
    pub(super) fn create(agent: &Agent, spec: &SandboxSpec) -> Result<Self> {
        let durable = super::durable::Place::of(&agent.config.state_dir, &spec.name);
        durable.make()?;
        let options = Options {
            program: agent.program.clone(),
            run_dir: agent.sandboxes_dir(),
            data_dir: durable.data(),
            shm_dir: trees::shm_of(&agent.config, &spec.name),
            log: durable.log(),
            log_bytes_max: LOG_BYTES_MAX,
        };
        let sandbox = Sandbox::create(spec, &options)?;
        Ok(Self { place: Place::Sandbox(sandbox), addresses: None })
    }

    /// Adopts a tree that runs.
    pub(super) fn adopt(agent: &Agent, name: &Name, pid: u32) -> Result<Self> {
        let tree = BareTree::adopt(name, pid, &agent.program, &agent.sandboxes_dir())?;
        Ok(Self { place: Place::Bare(tree), addresses: None })
    }

    /// Removes whatever place there is of that name, with everything in it.
    pub(super) fn destroy(agent: &Agent, name: &Name) -> Result<()> {
        Ok(Sandbox::destroy(&agent.sandboxes_dir(), name)?)
    }

    pub(super) fn keeper(&self) -> &Keeper {
        match &self.place {
            Place::Sandbox(sandbox) => sandbox.keeper(),
            Place::Bare(tree) => tree.keeper(),
        }
    }

    pub(super) fn sandbox(&self) -> Option<&Sandbox> {
        match &self.place {
            Place::Sandbox(sandbox) => Some(sandbox),
            Place::Bare(_) => None,
        }
    }

    fn net(&self) -> Net {
        self.sandbox().map_or(Net::Host, |sandbox| sandbox.spec().net.clone())
    }

    /// The tree's root, while it runs.
    pub(super) fn root(&self) -> Result<Option<Root>> {
        Ok(match &self.place {
            Place::Sandbox(sandbox) => sandbox.workload_pid()?.map(|(host, inside)| Root { host, inside }),
            Place::Bare(tree) => tree.is_alive().then(|| Root { host: tree.pid(), inside: tree.pid() }),
        })
    }

    /// Whether no process of a workload, whole or half restored, is in the place; those of `ours` may be.
    pub(super) fn is_empty_but(&self, ours: &[u32]) -> bool {
        self.keeper().cgroup().pids().is_ok_and(|pids| pids.iter().all(|pid| ours.contains(pid)))
    }

    /// Looks the addresses up and tells the guard what to silence. Must come before anything opens.
    pub(super) fn prepare(&mut self, vips: &[Vip]) -> Result<()> {
        let addresses = Addresses::prepare(&self.net(), vips)?;
        addresses.guard(self.keeper(), self.sandbox().and_then(Sandbox::gate))?;
        self.addresses = Some(addresses);
        Ok(())
    }

    /// Lets the workload be heard: the gate, then the addresses. The caller announces.
    pub(super) fn open_up(&self) -> Result<()> {
        if let Some(sandbox) = self.sandbox() {
            takeover::gate::open(sandbox)?;
        }
        if let Some(addresses) = &self.addresses {
            addresses.up(self.keeper())?;
        }
        Ok(())
    }

    /// Undoes a fence; without a deadline the guard is left disarmed.
    pub(super) fn unfence(&self, until_ns: Option<u64>) -> Result<()> {
        // Far enough for what follows, and a deadline all the same until it is disarmed.
        const GRACE_NS: u64 = 60_000_000_000;
        let deadline = until_ns.unwrap_or_else(|| crate::workload::guard::boot_time_ns() + GRACE_NS);
        let steps = self.addresses.as_ref().map_or(&[][..], Addresses::up_steps);
        match &self.place {
            Place::Sandbox(sandbox) => takeover::gate::unfence(sandbox, deadline, steps)?,
            Place::Bare(tree) => tree.keeper().unfence(deadline, steps)?,
        }
        if until_ns.is_none() {
            self.keeper().guard().disarm()?;
        }
        Ok(())
    }

    /// Sends one round of announcements.
    pub(super) fn announce(&self) -> Result<()> {
        Ok(self.addresses.as_ref().map_or(Ok(()), Addresses::announce)?)
    }

    /// This host answers no more for the addresses; the workload itself may run on.
    pub(super) fn close_vips(&self) -> Result<()> {
        Ok(self.addresses.as_ref().map_or(Ok(()), Addresses::down)?)
    }

    /// What a capturer needs to know of the place.
    pub(super) fn source(&self, agent: &Agent, spec: &WorkloadSpec) -> Result<capture::Source> {
        let name = &spec.sandbox.name;
        let root = self.root()?.ok_or_else(|| anyhow::anyhow!("the workload {name} has ended"))?;
        let durable = super::durable::Place::of(&agent.config.state_dir, name);
        let (init, log_pipes, trees): (Option<OwnedFd>, Vec<u64>, _) = match &self.place {
            Place::Sandbox(sandbox) => {
                let trees = trees::all(&agent.config, &durable, &spec.sandbox);
                (Some(sandbox.keeper().pidfd()?), sandbox.log_pipes()?, trees)
            }
            Place::Bare(_) => (None, Vec::new(), Vec::new()),
        };
        Ok(capture::Source {
            root: root.host as i32,
            root_inside: root.inside,
            init,
            install: agent.install.clone(),
            bridge: Bridge::new(&agent.config.work_dir, agent.install.version)?,
            vmas: agent.vmas.clone(),
            tracking: capture::Tracking::choose(&agent.kernel)?,
            work: agent.config.work_dir.join(format!("dump-{name}")),
            log_pipes,
            trees: trees.into_iter().map(files::Source::plain).collect(),
        })
    }
}

/// Gives a bare tree back to the cgroup that it came from, running.
pub(super) fn release_bare(agent: &Agent, name: &Name) -> Result<()> {
    Ok(BareTree::release(name, &agent.sandboxes_dir())?)
}
