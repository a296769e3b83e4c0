//! When the next epoch starts, pure: a fixed interval, stretched when an epoch takes longer than it.

use std::time::{Duration, Instant};

/// The rhythm of a workload's epochs.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    every: Duration,
    due: Option<Instant>,
    failures: u32,
}

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

    /// An epoch that began at `began` was committed: the next is due one interval after it began, or at once if it took
    /// longer. Intervals that were missed are not caught up.
    pub fn committed(&mut self, began: Instant, now: Instant) {
        self.failures = 0;
        self.due = Some((began + self.every).max(now));
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
        pace.committed(start, start + EVERY / 4);
        assert_eq!(pace.due(start), start + EVERY);
        pace.committed(start + EVERY, start + EVERY * 5);
        assert_eq!(pace.due(start), start + EVERY * 5);
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
        pace.committed(now, now);
        pace.failed(now);
        assert_eq!(pace.due(now), now + EVERY);
    }
}
