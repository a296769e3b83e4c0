//! The protocol's times, and the proof obligations that they must meet together.

use std::time::Duration;

/// The times of one workload's lease. Both agents must be given the same `lease`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How often the primary asks for its lease to be extended.
    pub heartbeat: Duration,
    /// How long a granted heartbeat lets the primary run, from the time at which it was *sent*.
    pub lease: Duration,
    /// What the guard may need to freeze and silence the workload; it begins that long before the lease ends.
    pub fence_margin: Duration,
    /// What the standby waits beyond the lease, because two clocks do not run equally fast: it
    /// covers a difference in rate of `drift / lease` between the two hosts.
    pub drift: Duration,
    /// After this time without an answer a handoff is called back.
    pub handoff_patience: Duration,
    /// How often an unanswered request is repeated.
    pub retry: Duration,
}

/// Why a set of times cannot keep the protocol's promises.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TimingError {
    /// A time that must be positive is zero.
    #[error("lease timing: {0} is zero: give it a positive time")]
    Zero(&'static str),
    /// One lost heartbeat would cost the lease.
    #[error(
        "lease timing: a lease of {lease:?} does not outlast two heartbeats of {heartbeat:?} and a fence margin of \
         {fence_margin:?}, so that one lost packet would freeze the workload: make the lease longer than {least:?} or \
         the heartbeat shorter"
    )]
    LeaseTooShort {
        /// As given.
        lease: Duration,
        /// As given.
        heartbeat: Duration,
        /// As given.
        fence_margin: Duration,
        /// The shortest lease that would do with these two.
        least: Duration,
    },
    /// The standby would trust the clocks more than clocks deserve.
    #[error(
        "lease timing: a drift allowance of {drift:?} is less than a thousandth of the lease ({lease:?}): raise it to \
         {least:?} or more, or two hosts whose clocks differ in rate may run the workload at once"
    )]
    DriftTooSmall {
        /// As given.
        drift: Duration,
        /// As given.
        lease: Duration,
        /// The least allowance for that lease.
        least: Duration,
    },
    /// A time so long that it is a mistake in units.
    #[error("lease timing: {what} of {given:?} is longer than {most:?}: check its unit")]
    TooLong {
        /// Which time.
        what: &'static str,
        /// As given.
        given: Duration,
        /// The longest allowed.
        most: Duration,
    },
}

impl Default for Timing {
    fn default() -> Self {
        Self::for_lease(Duration::from_millis(50), Duration::from_millis(300))
    }
}

impl Timing {
    /// The longest that any of the times may be.
    pub const TIME_MAX: Duration = Duration::from_secs(3600);

    /// The times that go with a heartbeat and a lease: a fence margin of a sixth of the lease and a drift
    /// allowance of a fiftieth.
    pub fn for_lease(heartbeat: Duration, lease: Duration) -> Self {
        Self {
            heartbeat,
            lease,
            fence_margin: lease / 6,
            drift: lease / 50,
            handoff_patience: Duration::from_secs(10),
            retry: heartbeat * 2,
        }
    }

    /// Refuses times that contradict each other.
    pub fn validate(&self) -> Result<(), TimingError> {
        let named = [
            ("heartbeat", self.heartbeat),
            ("lease", self.lease),
            ("fence margin", self.fence_margin),
            ("drift allowance", self.drift),
            ("handoff patience", self.handoff_patience),
            ("retry", self.retry),
        ];
        for (what, given) in named {
            if given.is_zero() {
                return Err(TimingError::Zero(what));
            }
            if given > Self::TIME_MAX {
                return Err(TimingError::TooLong { what, given, most: Self::TIME_MAX });
            }
        }
        let least = self.heartbeat * 2 + self.fence_margin;
        if self.lease <= least {
            return Err(TimingError::LeaseTooShort {
                lease: self.lease,
                heartbeat: self.heartbeat,
                fence_margin: self.fence_margin,
                least,
            });
        }
        let least = self.lease / 1000;
        if self.drift < least {
            return Err(TimingError::DriftTooSmall { drift: self.drift, lease: self.lease, least });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        Timing::default().validate().unwrap();
    }

    #[test]
    fn a_lease_that_one_lost_heartbeat_would_end_is_refused() {
        let ms = Duration::from_millis;
        let timing = Timing::for_lease(ms(50), ms(120));
        assert!(
            matches!(timing.validate(), Err(TimingError::LeaseTooShort { least, .. }) if least == ms(120))
        );
    }

    #[test]
    fn trusting_the_clocks_blindly_is_refused() {
        let timing = Timing { drift: Duration::from_micros(10), ..Timing::default() };
        assert!(matches!(timing.validate(), Err(TimingError::DriftTooSmall { .. })));
        let timing = Timing { drift: Duration::ZERO, ..Timing::default() };
        assert_eq!(timing.validate(), Err(TimingError::Zero("drift allowance")));
    }

    #[test]
    fn hours_are_a_mistake_in_units() {
        let timing = Timing { lease: Duration::from_secs(300_000), ..Timing::default() };
        assert!(matches!(timing.validate(), Err(TimingError::TooLong { what: "lease", .. })));
    }
}
