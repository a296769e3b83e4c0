//! Who hears a workload on this host, and what it hears: its gate and addresses, packets that wait, connections after a takeover.

use std::{path::Path, sync::Arc};

use super::{Home, Result};
use crate::{
    capture::Note,
    criu::images::connections::tcp_connections,
    model::Name,
    takeover::{
        address::Addresses,
        gate,
        hold::{Hold, HoldError, Marks},
        inputs::{self, Input},
        lease::{Lease, LeaseError},
        nudge::{Voice, nudge, probe},
        order::Step,
        stale::Watch,
    },
    workload::{
        network::{self, Behind, Gate, NetworkError, SEE_BRIDGED, unseen_bridges},
        spec::{Commit, Vip, WorkloadSpec},
    },
};

impl Home {
    /// Whether nobody can hear what is restored into it.
    pub(in crate::agent) fn check_silent(&self) -> Result<()> {
        Ok(self.order.check(Step::Restore)?)
    }

    /// A tree was started in it.
    pub(in crate::agent) fn started(&self) -> Result<()> {
        Ok(self.order.done(Step::Find)?)
    }

    /// It was silenced.
    pub(in crate::agent) fn silenced(&self) -> Result<()> {
        Ok(self.order.done(Step::Silence)?)
    }

    /// A fence was undone: it is heard again.
    pub(in crate::agent) fn unfenced(&self) -> Result<()> {
        let steps = [Step::Find, Step::Open, Step::Answer];
        Ok(steps.into_iter().try_for_each(|step| self.order.done(step))?)
    }

    /// Looks the addresses up, tells the guard what to silence, has the kernel keep the lease too, and makes ready to hold
    /// packets. Must come before anything opens. `held`: its output waits for commits from now on.
    pub(in crate::agent) fn prepare(&mut self, spec: &WorkloadSpec, held: bool) -> Result<()> {
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
        if spec.commit == Commit::Output
            && let Ok([bridge, ..]) = self.unseen_bridges().as_deref()
        {
            let name = spec.place.name();
            tracing::warn!(%name, bridge, "what it says to others on this bridge does not wait: {SEE_BRIDGED}");
        }
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

    /// Bridges on which it says what cannot be held.
    pub(in crate::agent) fn unseen_bridges(&self) -> std::result::Result<Vec<String>, NetworkError> {
        self.place.gate().map_or(Ok(Vec::new()), |gate| unseen_bridges(Some(&gate.behind().bridges)))
    }

    /// Its packets, if they can be held.
    pub(in crate::agent) fn hold(&self) -> Option<&Arc<Hold>> {
        self.hold.as_ref()?.as_ref().ok()
    }

    /// Why they cannot, although they are known.
    pub(in crate::agent) fn why_no_hold(&self) -> Option<&HoldError> {
        self.hold.as_ref()?.as_ref().err()
    }

    /// Where the kernel keeps the lease, or why it does not.
    pub(in crate::agent) fn lease(&self) -> std::result::Result<&Lease, &LeaseError> {
        self.lease.as_ref()
    }

    /// Lets the workload be heard: the gate, then the addresses. The caller announces.
    pub(in crate::agent) fn open_up(&self) -> Result<()> {
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
    pub(in crate::agent) fn note_connections(&mut self, dir: &Path, note: &Note) {
        self.may_be_stale = !note.output_held;
        // They go on without it, only later.
        self.connections = tcp_connections(dir).unwrap_or_else(|error| {
            tracing::debug!(%error, "connections of the image");
            Vec::new()
        });
    }

    /// Hears which restored connections cannot go on, and ends those; before the gate opens. Where output was held since the
    /// restored epoch's freeze there are none.
    pub(in crate::agent) fn watch_connections(&self, name: &Name) {
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
    pub(in crate::agent) fn announce(&self, round: usize) -> Result<()> {
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
    pub(in crate::agent) fn replay(&self, inputs: &[Input]) {
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
    pub(in crate::agent) fn give_up_vips(&mut self, name: &Name) -> Result<()> {
        self.order.done(Step::Silence)?;
        let closed = self.addresses.take().map_or(Ok(()), |addresses| addresses.down());
        network::remove_shared_devices(name)?;
        Ok(closed?)
    }

    /// Whether its addresses are announced for as long as they are here.
    pub(in crate::agent) fn is_announced_for_ever(&self) -> bool {
        self.addresses.as_ref().is_some_and(Addresses::need_repetition)
    }
}

/// Nobody holds or drops its packets any more, nor answers for its addresses.
pub(super) fn forget_network(name: &Name) {
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
