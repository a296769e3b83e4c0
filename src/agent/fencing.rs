//! The guard and the gate of a workload's copy, as its owner works them: what the core says of leases becomes deadlines
//! of the guard, and only the guard (through the keeper) lets a fenced copy run again.
//!
//! The lease that the kernel keeps ([`crate::takeover::lease`]) follows the guard in each of these, and decides nothing.

use std::time::Duration;

use super::{
    home::Home,
    hooks::Cause,
    owner::{Owner, boot_now},
};
use crate::{
    ha::Input,
    takeover::{address::Addresses, gate},
    transport::block_in_place,
    workload::guard::{GuardError, boot_time_ns},
};

/// How long freezing may take before it is reported.
pub(super) const FENCE_LIMIT: Duration = Duration::from_secs(2);

impl Home {
    /// Sets the guard's deadline, earlier or later than it was.
    fn arm(&self, until: Duration) -> Result<(), GuardError> {
        let armed = self.keeper().guard().arm(until.as_nanos() as u64);
        self.follow_guard();
        armed
    }

    /// Moves it on.
    fn extend(&self, until: Duration) -> Result<(), GuardError> {
        let extended = self.keeper().guard().extend(until.as_nanos() as u64);
        self.follow_guard();
        extended
    }

    /// No lease is needed any more.
    fn disarm(&self) -> Result<(), GuardError> {
        let disarmed = self.keeper().guard().disarm();
        self.follow_guard();
        disarmed
    }

    /// Freezes and silences it now.
    pub(super) fn fence_now(&self, limit: Duration) -> Result<(), GuardError> {
        let fenced = self.keeper().guard().fence_now(limit);
        // It is no earlier than any step.
        let _ = self.silenced();
        // Also if the guard does not answer.
        self.follow_guard();
        fenced
    }

    /// Undoes a fence; without a deadline the guard is left disarmed. False: there was none, and the guard has the deadline.
    fn unfence_until(&self, until: Option<Duration>) -> anyhow::Result<bool> {
        // Far enough for what follows, and a deadline all the same until it is disarmed.
        const GRACE_NS: u64 = 60_000_000_000;
        let deadline_ns = until.map_or_else(|| boot_time_ns() + GRACE_NS, |until| until.as_nanos() as u64);
        let steps = self.addresses.as_ref().map_or(&[][..], Addresses::up_steps);
        if !self.keeper().guard().fired() {
            // It runs already: of two orders to let it run this is the second.
            until.map_or_else(|| self.disarm(), |until| self.arm(until))?;
            return Ok(false);
        }
        // It may not have done yet what it has decided.
        self.fence_now(FENCE_LIMIT)?;
        if let Ok(lease) = self.lease() {
            // Nothing leaves before the gate is open; then nothing is to be lost.
            lease.grant(deadline_ns);
        }
        let unfenced = gate::unfence(self.keeper(), self.place.gate(), deadline_ns, steps);
        self.follow_guard();
        unfenced?;
        self.unfenced()?;
        if until.is_none() {
            self.disarm()?;
        }
        Ok(true)
    }

    fn follow_guard(&self) {
        if let Ok(lease) = self.lease() {
            lease.follow();
        }
    }
}

impl Owner {
    pub(super) fn arm_guard(&mut self, until: Duration) -> Option<Input> {
        let home = self.home.as_ref()?;
        if boot_now() >= until {
            return Some(Input::GuardLate { until });
        }
        if let Some(watchdog) = &self.agent.watchdog {
            watchdog.watch(&self.name, home.keeper().shared_guard());
        }
        // Should this thread be paused right here, the guard fires, which is safe and reported.
        match block_in_place(|| home.arm(until)) {
            Ok(()) => Some(Input::GuardArmed { until }),
            Err(error) => {
                tracing::warn!(%error, name = %self.name, "arming the guard");
                Some(Input::GuardFired)
            }
        }
    }

    pub(super) fn extend_guard(&mut self, until: Duration) -> Option<Input> {
        if self.holding {
            return None;
        }
        let home = self.home.as_ref()?;
        home.extend(until).err().map(|error| {
            tracing::warn!(%error, name = %self.name, "extending the guard");
            Input::GuardFired
        })
    }

    pub(super) fn disarm_guard(&mut self) -> Option<Input> {
        let home = self.home.as_ref().filter(|_| !self.holding)?;
        home.disarm().err().map(|_| Input::GuardFired)
    }

    pub(super) fn fence(&mut self) {
        self.hooks.cause = Some(Cause::Fenced);
        self.event(
            "fenced",
            "the lease was not renewed in time: the workload is frozen and its address is silent",
            None,
        );
        let Some(home) = &self.home else { return };
        if let Err(error) = block_in_place(|| home.fence_now(FENCE_LIMIT)) {
            tracing::error!(%error, name = %self.name, "fencing");
        }
    }

    pub(super) fn unfence(&mut self, until: Option<Duration>) -> Option<Input> {
        if self.holding && self.handoff.as_ref().is_some_and(|handoff| handoff.verdict.is_none()) {
            // Not before the handoff's outcome: see `release_hold`.
            return None;
        }
        let is_judged = self.handoff.as_ref().is_some_and(|handoff| handoff.verdict.is_some());
        let rolled_back = std::mem::take(&mut self.holding) || is_judged;
        let home = self.home.as_ref()?;
        match block_in_place(|| home.unfence_until(until)) {
            Ok(false) if !rolled_back => return None,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, name = %self.name, "letting the workload run again");
                // With a lease its next renewal tries again, and without one the owner's next look, which finds the guard fired.
                // At once would be for ever, if its keeper is gone.
                return until.map(|_| Input::GuardFired);
            }
        }
        // The guard has ended whatever slowed it down.
        self.speed.forget();
        if let Err(error) = self.throttle() {
            tracing::warn!(error, name = %self.name, "the workload is not slowed down");
        }
        let detail = if rolled_back {
            self.tree_goes_on();
            // CRIU lets the tree go when it hears no.
            if let Some(verdict) = self.handoff.as_mut().and_then(|handoff| handoff.verdict.take()) {
                let _ = verdict.send(false);
            }
            "the handoff was called back: the workload runs on here"
        } else {
            "the lease was renewed before anybody took over: the workload runs on"
        };
        self.hooks.cause = Some(Cause::Unfenced);
        self.event("unfenced", detail, None);
        None
    }

    /// Its place is taken down, and the guard with it.
    pub(super) fn forget_guard(&self) {
        if let Some(watchdog) = &self.agent.watchdog {
            watchdog.forget(&self.name);
        }
    }
}
