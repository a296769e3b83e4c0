//! How a handoff comes to its final freeze, pure: rounds of epochs while the workload runs, until what would be left for
//! the freeze is little enough, or gets no less.
//!
//! ```text
//!  round ─► little enough? ─yes──────────────────────────────────────► final freeze
//!    ▲          │ no                                                     ▲
//!    ├─ shrinks ┤                                                        │
//!    └─ slower ─┴─ not any more: may the workload be slowed down? ─no─► within what is allowed? ─no─► given up
//! ```
//!
//! Invariant: it ends, after [`ROUNDS_MAX`] rounds at the latest.

use std::time::Duration;

/// A downtime that needs no more rounds, if the operator allows it.
const GOAL: Duration = Duration::from_millis(200);
/// Most rounds of one handoff.
pub const ROUNDS_MAX: u32 = 30;
/// Rounds get no shorter when so many in a row did not come below 3/4 of the best one before. A round sends what was
/// written in the one before it, so that the first after a change tells nothing of it.
const STALLED_ROUNDS: u32 = 2;
/// Shares of its time that the workload runs for when it is slowed down, in percent, one after the other.
const RUN_PERCENT: [u8; 5] = [50, 25, 10, 4, 1];

/// What the operator allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Longest time that clients may be without the workload.
    pub downtime_max: Duration,
    /// Whether it may be slowed down.
    pub throttle: bool,
}

/// What a handoff does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Another round, in which the workload runs for so many percent of its time.
    Round {
        /// 100: not slowed down.
        run_percent: u8,
    },
    /// The final freeze.
    Final,
    /// It takes too long; the workload stays where it is.
    GiveUp,
}

/// A handoff's rounds so far.
#[derive(Clone, Debug)]
pub struct Convergence {
    allowed: Allowed,
    rounds: u32,
    best: Option<Duration>,
    stalled: u32,
    /// How many of [`RUN_PERCENT`] were begun.
    slowed: usize,
}

impl Convergence {
    /// None so far.
    pub fn new(allowed: Allowed) -> Self {
        Self { allowed, rounds: 0, best: None, stalled: 0, slowed: 0 }
    }

    /// Rounds so far.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Share of its time for which the workload runs now, in percent.
    pub fn run_percent(&self) -> u8 {
        self.slowed.checked_sub(1).map_or(100, |slowed| RUN_PERCENT[slowed])
    }

    /// A round has ended: had it been the final one, clients would have been without the workload for `downtime`.
    pub fn after(&mut self, downtime: Duration) -> Step {
        self.rounds += 1;
        if downtime <= self.allowed.downtime_max.min(GOAL) {
            return Step::Final;
        }
        if self.best.is_none_or(|best| downtime <= best * 3 / 4) {
            self.stalled = 0;
        } else {
            self.stalled += 1;
        }
        self.best = Some(self.best.map_or(downtime, |best| best.min(downtime)));
        let mut goes_on = self.stalled < STALLED_ROUNDS;
        if !goes_on && self.allowed.throttle && self.slowed < RUN_PERCENT.len() {
            self.slowed += 1;
            self.stalled = 0;
            goes_on = true;
        }
        match downtime <= self.allowed.downtime_max {
            _ if goes_on && self.rounds < ROUNDS_MAX => Step::Round { run_percent: self.run_percent() },
            true => Step::Final,
            false => Step::GiveUp,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A workload that dirties so many bytes a millisecond, up to its size, over a link; each round ships what was
    /// dirtied in the one before. Returns the last step, the rounds and the slowest that the workload was.
    fn simulate(
        allowed: Allowed,
        dirty_per_ms: u64,
        link_per_ms: u64,
        bytes_max: u64,
    ) -> (Step, u32, u8, Duration) {
        let mut convergence = Convergence::new(allowed);
        let mut left = bytes_max;
        let mut slowest = 100;
        loop {
            let took = ms(20 + left / link_per_ms);
            let step = convergence.after(took);
            let Step::Round { run_percent } = step else {
                return (step, convergence.rounds(), slowest, took);
            };
            slowest = slowest.min(run_percent);
            left = (took.as_millis() as u64 * dirty_per_ms * u64::from(run_percent) / 100).min(bytes_max);
        }
    }

    proptest! {
        #[test]
        fn it_always_ends_and_keeps_to_what_is_allowed(
            downtimes in prop::collection::vec(0..100_000_u64, ROUNDS_MAX as usize),
            downtime_max in 1..10_000_u64,
            throttle: bool,
        ) {
            let allowed = Allowed { downtime_max: ms(downtime_max), throttle };
            let mut convergence = Convergence::new(allowed);
            let mut slowest = 100;
            for downtime in downtimes {
                match convergence.after(ms(downtime)) {
                    Step::Round { run_percent } => {
                        prop_assert!(throttle || run_percent == 100);
                        prop_assert!(run_percent <= slowest && run_percent > 0);
                        slowest = run_percent;
                    }
                    Step::Final => {
                        prop_assert!(downtime <= downtime_max);
                        return Ok(());
                    }
                    Step::GiveUp => {
                        prop_assert!(downtime > downtime_max);
                        return Ok(());
                    }
                }
            }
            prop_assert!(false, "it went on after {} rounds", ROUNDS_MAX);
        }

        #[test]
        fn a_link_faster_than_the_writer_converges_without_slowing_it(
            dirty in 1..70_u64,
            bytes_max in 1_000..10_000_000_u64,
            throttle: bool,
        ) {
            let allowed = Allowed { downtime_max: ms(200), throttle };
            let (step, _, slowest, _) = simulate(allowed, dirty, 100, bytes_max);
            prop_assert_eq!((step, slowest), (Step::Final, 100));
        }

        #[test]
        fn a_writer_faster_than_the_link_is_slowed_down_if_allowed(dirty in 120..600_u64) {
            let allowed = Allowed { downtime_max: ms(200), throttle: true };
            let (step, _, slowest, took) = simulate(allowed, dirty, 100, 10_000_000);
            prop_assert_eq!(step, Step::Final);
            prop_assert!(slowest < 100 && took <= ms(200));
            let (step, rounds, slowest, _) = simulate(Allowed { throttle: false, ..allowed }, dirty, 100, 10_000_000);
            prop_assert_eq!((step, slowest), (Step::GiveUp, 100));
            prop_assert!(rounds <= 5);
        }
    }

    #[test]
    fn a_long_downtime_that_is_allowed_is_still_made_as_short_as_rounds_can() {
        let allowed = Allowed { downtime_max: ms(10_000), throttle: false };
        let mut convergence = Convergence::new(allowed);
        for downtime in [8000, 4000, 2000, 1000, 900] {
            assert_eq!(convergence.after(ms(downtime)), Step::Round { run_percent: 100 });
        }
        assert_eq!(convergence.after(ms(950)), Step::Final);
        assert_eq!(convergence.rounds(), 6);
    }
}
