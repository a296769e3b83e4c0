//! When the next epoch starts, pure: a fixed interval, stretched when an epoch takes longer than it, or when the workload
//! would be frozen for more than a quarter of its time.

use std::time::{Duration, Instant};

/// The rhythm of a workload's epochs.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    every: Duration,
    due: Option<Instant>,
    failures: u32,
}

/// An interval is at least so many times the freeze in it: protection that takes all of a workload's time, as of a large
/// one on a kernel with slow tracking, is worse than an older epoch.
const INTERVAL_TO_FROZEN_MIN: u32 = 4;
/// Longest wait after failures in a row.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

impl Pace {
    /// An epoch every so often; the first at once.
    pub fn new(every: Duration) -> Self {
        Self { every, due: None, failures: 0 }
    }

    /// When the next epoch is due.
    pub fn due(&self, now: Instant) -> Instant {
        self.due.unwrap_or(now)
    }

    /// An epoch that began at `began`, with a freeze of `frozen`, was committed: the next is due one interval after it
    /// began, or at once if it took longer. Intervals that were missed are not caught up.
    pub fn committed(&mut self, began: Instant, now: Instant, frozen: Duration) {
        self.failures = 0;
        let interval = self.every.max(frozen * INTERVAL_TO_FROZEN_MIN);
        self.due = Some((began + interval).max(now));
    }

    /// An epoch failed: the next is tried after the interval, then after twice that, and so on up to five seconds.
    pub fn failed(&mut self, now: Instant) {
        let wait = self.every.saturating_mul(1 << self.failures.min(10)).min(BACKOFF_MAX.max(self.every));
        self.failures = self.failures.saturating_add(1);
        self.due = Some(now + wait);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_millis(200);

    #[test]
    fn a_slow_epoch_stretches_the_interval_and_is_not_caught_up() {
        let start = Instant::now();
        let mut pace = Pace::new(EVERY);
        assert_eq!(pace.due(start), start);
        pace.committed(start, start + EVERY / 4, EVERY / 10);
        assert_eq!(pace.due(start), start + EVERY);
        pace.committed(start + EVERY, start + EVERY * 5, EVERY / 10);
        assert_eq!(pace.due(start), start + EVERY * 5);
    }

    #[test]
    fn a_workload_keeps_three_quarters_of_its_time() {
        let start = Instant::now();
        let mut pace = Pace::new(EVERY);
        let (mut now, mut frozen_in_all) = (start, Duration::ZERO);
        for round in 0..100_u32 {
            let (began, frozen) = (now, EVERY * (round % 7) / 3);
            pace.committed(began, began + frozen + EVERY / 10, frozen);
            frozen_in_all += frozen;
            now = pace.due(began);
        }
        assert!(frozen_in_all * 4 <= now - start);
    }

    #[test]
    fn failures_in_a_row_are_spaced_out_and_forgotten_with_the_first_success() {
        let now = Instant::now();
        let mut pace = Pace::new(EVERY);
        let mut waits = Vec::new();
        for _ in 0..8 {
            pace.failed(now);
            waits.push(pace.due(now) - now);
        }
        assert_eq!(waits[..3], [EVERY, EVERY * 2, EVERY * 4]);
        assert_eq!(*waits.last().unwrap(), BACKOFF_MAX);
        pace.committed(now, now, Duration::ZERO);
        pace.failed(now);
        assert_eq!(pace.due(now), now + EVERY);
    }
}
