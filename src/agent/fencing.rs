//! The guard and the gate of a workload's copy, as its owner works them: what the core says of leases becomes deadlines
//! of the guard, and only the guard (through the keeper) lets a fenced copy run again.

use std::time::Duration;

use super::{
    hooks::Cause,
    owner::{Owner, boot_now},
};
use crate::{ha::Input, transport::block_in_place};

/// How long freezing may take before it is reported.
pub(super) const FENCE_LIMIT: Duration = Duration::from_secs(2);

impl Owner {
    pub(super) fn arm_guard(&mut self, until: Duration) -> Option<Input> {
        let home = self.home.as_ref()?;
        if boot_now() >= until {
            return Some(Input::GuardLate { until });
        }
        // Should this thread be paused right here, the guard fires, which is safe and reported.
        match home.keeper().guard().arm(until.as_nanos() as u64) {
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
        let extended = home.keeper().guard().extend(until.as_nanos() as u64);
        extended.err().map(|error| {
            tracing::warn!(%error, name = %self.name, "extending the guard");
            Input::GuardFired
        })
    }

    pub(super) fn disarm_guard(&mut self) -> Option<Input> {
        let home = self.home.as_ref().filter(|_| !self.holding)?;
        home.keeper().guard().disarm().err().map(|_| Input::GuardFired)
    }

    pub(super) fn fence(&mut self) {
        self.hooks.cause = Some(Cause::Fenced);
        self.event(
            "fenced",
            "the lease was not renewed in time: the workload is frozen and its address is silent",
            None,
        );
        let Some(home) = &self.home else { return };
        if let Err(error) = block_in_place(|| home.keeper().guard().fence_now(FENCE_LIMIT)) {
            tracing::error!(%error, name = %self.name, "fencing");
        }
    }

    pub(super) fn unfence(&mut self, until: Option<Duration>) -> Option<Input> {
        if self.holding && self.handoff.as_ref().is_some_and(|handoff| handoff.verdict.is_none()) {
            // Not before the handoff's outcome: see `release_hold`.
            return None;
        }
        let rolled_back = std::mem::take(&mut self.holding);
        let home = self.home.as_ref()?;
        if let Err(error) = block_in_place(|| home.unfence(until.map(|until| until.as_nanos() as u64))) {
            tracing::warn!(%error, name = %self.name, "letting the workload run again");
            return Some(Input::GuardFired);
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
}
