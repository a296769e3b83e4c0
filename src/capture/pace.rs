//! When the next epoch starts, pure: told what happens and when, it says when the next one is due, and what holds it up.
//!
//! ```text
//!  began ── capture ──► thawed ── (the one before ships) ── ship ──► committed
//!    └──── wanted by the mode; longer for the workload's sake ────► the next one may begin
//! ```
//!
//! | mode | the next begins |
//! |---|---|
//! | every T | T after the last began; what was missed is not caught up |
//! | lag X | as late as keeps the age of what the standby holds at or below X, by the smoothed durations of late |
//! | continuous | when the last one is captured |
//!
//! In every mode:
//! - An epoch may be captured while the last one ships, and then no sooner than to be ready when that one is committed:
//!   captured earlier it would only be older when it arrives. So epochs get as long as link or standby need.
//! - An interval is so long that the freeze is no more than its share of it: protection that takes all of a workload's
//!   time, as of a large one on a kernel with slow tracking, is worse than an older epoch. A workload that sleeps for most of
//!   what it is left may be granted less ([`Pace::asleep`]).
//! - Failures in a row are spaced out, up to five seconds.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::workload::spec::{FROZEN_PERCENT, PaceMode, PaceSpec};

/// Longest wait after failures in a row, unless the operator's interval is longer.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// First wait after a failure in continuous mode.
const BACKOFF_CONTINUOUS: Duration = Duration::from_millis(100);
/// A cause is reported when it has held for so many epochs.
const STREAK: u32 = 3;

/// What makes epochs longer than the operator wants them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StretchedBy {
    /// Nothing: they start when they should.
    #[default]
    None,
    /// Shipping one takes longer, on the way to the standby.
    Link,
    /// Shipping one takes longer, because the standby takes it in no faster.
    Standby,
    /// The workload would be frozen for more than its share.
    Freeze,
    /// Capturing one takes longer, beside the freeze.
    Capture,
}

/// How a workload's epochs go of late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Time from the begin of one to that of the next; `None` before the second.
    pub interval: Option<Duration>,
    /// What makes it longer than wanted.
    pub stretched_by: StretchedBy,
}

/// What an epoch took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// From its begin to the thaw, without waiting for the link or its time to freeze.
    pub capture: Duration,
    /// Frozen time.
    pub frozen: Duration,
    /// From the freeze to the commit.
    pub latency: Duration,
    /// For how long it had the link, or waited for nothing else: during its capture, and then up to the commit.
    pub ship: Duration,
    /// Of the shipping: after the thaw.
    pub tail: Duration,
    /// Of the shipping: what the standby kept the link waiting for.
    pub standby: Duration,
    /// All memory was sent: nothing follows from it for those to come.
    pub full: bool,
}

/// A freeze that is over.
#[derive(Clone, Copy, Debug)]
pub struct Freeze {
    /// When the tree ran again.
    pub thawed: Instant,
    /// For how long it had stood.
    pub frozen: Duration,
    /// For how long it had been asked to, before its first task stood.
    pub stopping: Duration,
    /// For which share of the time before, since the last freeze, it had used a processor.
    pub busy_percent: u8,
}

/// The rhythm of a workload's epochs.
#[derive(Clone, Debug)]
pub struct Pace {
    spec: PaceSpec,
    /// The largest share of a workload that sleeps.
    asleep_percent: Option<u8>,
    /// Of late.
    busy_percent: u8,
    began: Option<Instant>,
    /// Of the newest epoch.
    frozen: Duration,
    freeze_after: Option<Instant>,
    /// Since when the newest, captured, has the link to itself.
    shipping: Option<Instant>,
    retry: Option<Instant>,
    failures: u32,
    capture: Smoothed,
    ship: Smoothed,
    tail: Smoothed,
    standby: Smoothed,
    latency: Smoothed,
    /// From begin to commit: how much it varies.
    whole: Smoothed,
    interval: Smoothed,
    /// Whether the interval that runs is one of those to come, and not of the first sync or a failure.
    regular: bool,
    cause: StretchedBy,
    /// What the last epochs say, and how many.
    candidate: (StretchedBy, u32),
}

/// A mean and a deviation that follow their samples, as TCP follows its round trips (RFC 6298).
#[derive(Clone, Copy, Debug, Default)]
struct Smoothed {
    mean: Duration,
    deviation: Duration,
    known: bool,
}

impl Smoothed {
    fn add(&mut self, sample: Duration) {
        if self.known {
            self.deviation = (self.deviation * 3 + self.mean.abs_diff(sample)) / 4;
            self.mean = (self.mean * 7 + sample) / 8;
        } else {
            *self = Self { mean: sample, deviation: sample / 4, known: true };
        }
    }
}

impl Pace {
    /// The first epoch at once, the others as `spec` wants them.
    pub fn new(spec: PaceSpec) -> Self {
        Self {
            spec,
            asleep_percent: None,
            busy_percent: 100,
            began: None,
            frozen: Duration::ZERO,
            freeze_after: None,
            shipping: None,
            retry: None,
            failures: 0,
            capture: Smoothed::default(),
            ship: Smoothed::default(),
            tail: Smoothed::default(),
            standby: Smoothed::default(),
            latency: Smoothed::default(),
            whole: Smoothed::default(),
            interval: Smoothed::default(),
            regular: false,
            cause: StretchedBy::None,
            candidate: (StretchedBy::None, 0),
        }
    }

    /// The workload may be frozen for this share of its time as far as it sleeps for the rest.
    #[must_use]
    pub fn asleep(self, percent: u8) -> Self {
        Self { asleep_percent: Some(percent), ..self }
    }

    /// When the next epoch is due. It changes with everything that is told.
    pub fn due(&self, now: Instant) -> Instant {
        if let Some(retry) = self.retry {
            return retry;
        }
        let Some(began) = self.began else { return now };
        let due = began + self.wanted().max(self.freeze_floor(self.frozen));
        match self.shipping {
            Some(since) => due.max((since + self.tail.mean).checked_sub(self.capture.mean).unwrap_or(since)),
            None => due,
        }
    }

    /// An epoch begins.
    pub fn began(&mut self, now: Instant) {
        if let Some(before) = self.began.filter(|_| self.regular) {
            self.interval.add(now.saturating_duration_since(before));
        }
        self.regular = true;
        self.retry = None;
        self.began = Some(now);
    }

    /// It is captured.
    pub fn captured(&mut self, freeze: &Freeze) {
        // One that begins to work is believed at once, and one that has slept for a moment is not.
        let busy = u16::from(freeze.busy_percent.min(100));
        self.busy_percent = busy.max((u16::from(self.busy_percent) * 3 + busy) / 4) as u8;
        self.frozen = freeze.frozen;
        let floor = self.freeze_floor(freeze.frozen).saturating_sub(freeze.stopping);
        self.freeze_after = freeze.thawed.checked_sub(freeze.frozen).map(|froze| froze + floor);
    }

    /// When the next freeze may be begun: [`due`](Self::due) counts from one begin to the next, and what an epoch does before its
    /// freeze may take longer in one than in another.
    pub fn freeze_after(&self) -> Option<Instant> {
        self.freeze_after
    }

    /// The newest captured epoch has the link to itself since `since`.
    pub fn shipping(&mut self, since: Instant) {
        self.shipping = Some(since);
    }

    /// The epoch that was shipping is committed.
    pub fn committed(&mut self, cost: &Cost) {
        self.failures = 0;
        self.shipping = None;
        if cost.full {
            self.regular = false;
            return;
        }
        self.capture.add(cost.capture);
        self.ship.add(cost.ship);
        self.tail.add(cost.tail);
        self.standby.add(cost.standby.min(cost.ship));
        self.latency.add(cost.latency);
        self.whole.add(cost.capture + cost.latency);
        self.judge(cost.frozen);
    }

    /// An epoch failed, and with it whatever was under way: the next is tried after the interval, then after twice that,
    /// and so on.
    pub fn failed(&mut self, now: Instant) {
        let first = match self.spec.mode {
            PaceMode::EveryMs(ms) | PaceMode::LagMs(ms) => Duration::from_millis(ms),
            PaceMode::Continuous => BACKOFF_CONTINUOUS,
        };
        let wait = first.saturating_mul(1 << self.failures.min(10)).min(BACKOFF_MAX.max(first));
        self.failures = self.failures.saturating_add(1);
        self.shipping = None;
        self.regular = false;
        self.retry = Some(now + wait);
    }

    /// How it goes.
    pub fn report(&self) -> Report {
        let interval = self.interval.known.then_some(self.interval.mean);
        Report { interval, stretched_by: self.cause }
    }

    /// What the mode wants.
    fn wanted(&self) -> Duration {
        match self.spec.mode {
            PaceMode::EveryMs(ms) => Duration::from_millis(ms),
            // Just before a commit the standby holds what was frozen an interval and a latency ago. Until the latency is
            // known it may be half of it all.
            PaceMode::LagMs(ms) if !self.latency.known => Duration::from_millis(ms) / 2,
            PaceMode::LagMs(ms) => Duration::from_millis(ms)
                .saturating_sub(self.latency.mean)
                .saturating_sub(self.whole.deviation * 4),
            PaceMode::Continuous => Duration::ZERO,
        }
    }

    /// The shortest interval in which a freeze is no more than its share.
    fn freeze_floor(&self, frozen: Duration) -> Duration {
        let percent = u32::from(self.spec.frozen_percent_max.unwrap_or(FROZEN_PERCENT).max(1));
        let asleep = u32::from(self.asleep_percent.unwrap_or(0)).saturating_sub(percent);
        frozen * 100 / (percent + asleep * u32::from(100 - self.busy_percent) / 100)
    }

    /// Finds what holds the epochs up, and believes it when it holds for some of them.
    fn judge(&mut self, frozen: Duration) {
        let wanted = match self.spec.mode {
            // As often as one can be captured.
            PaceMode::Continuous => self.capture.mean,
            _ => self.wanted(),
        };
        let shipping =
            if self.standby.mean * 2 > self.ship.mean { StretchedBy::Standby } else { StretchedBy::Link };
        let (needed, cause) = [
            (self.capture.mean, StretchedBy::Capture),
            (self.ship.mean, shipping),
            (self.freeze_floor(frozen), StretchedBy::Freeze),
        ]
        .into_iter()
        .max_by_key(|(needed, _)| *needed)
        .unwrap_or_default();
        // A tenth is nobody's trouble.
        let cause = if needed > wanted * 11 / 10 { cause } else { StretchedBy::None };
        let (candidate, streak) = self.candidate;
        self.candidate = (cause, if candidate == cause { streak.saturating_add(1) } else { 1 });
        if self.candidate.1 >= STREAK {
            self.cause = cause;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVERY: Duration = Duration::from_millis(200);

    fn spec(mode: PaceMode) -> PaceSpec {
        PaceSpec { mode, ..PaceSpec::default() }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// What an epoch takes on its own, in milliseconds.
    #[derive(Clone, Copy, Debug)]
    struct Load {
        before: u64,
        frozen: u64,
        ship: u64,
        standby_percent: u64,
    }

    /// When an epoch of a simulated session began, was frozen, committed.
    #[derive(Clone, Copy, Debug)]
    struct Times {
        began: Instant,
        froze: Instant,
        thawed: Instant,
        committed: Instant,
    }

    fn freeze(thawed: Instant, frozen: u64, busy_percent: u8) -> Freeze {
        Freeze { thawed, frozen: ms(frozen), stopping: Duration::ZERO, busy_percent }
    }

    /// A session as the agent runs it: one epoch is captured ahead of the one that ships.
    fn simulate(pace: &mut Pace, loads: &[Load]) -> Vec<Times> {
        let mut now = Instant::now();
        let mut all: Vec<Times> = Vec::new();
        // What ships, and what it costs.
        let mut shipping: Option<(Instant, Cost)> = None;
        for load in loads {
            let mut begin = pace.due(now).max(now);
            if let Some((committed, cost)) = shipping.take_if(|(committed, _)| *committed <= begin) {
                pace.committed(&cost);
                begin = pace.due(committed).max(committed);
            }
            pace.began(begin);
            let free = shipping.as_ref().map_or(begin, |(committed, _)| *committed);
            if let Some((_, cost)) = shipping.take() {
                pace.committed(&cost);
            }
            let ready = begin + ms(load.before);
            let froze = pace.freeze_after().map_or(ready, |after| after.max(ready));
            let thawed = froze + ms(load.frozen);
            pace.captured(&freeze(thawed, load.frozen, 100));
            let has_link = free.max(thawed);
            pace.shipping(has_link);
            let committed = has_link + ms(load.ship);
            let cost = Cost {
                capture: ms(load.before + load.frozen),
                frozen: ms(load.frozen),
                latency: committed - froze,
                ship: ms(load.ship),
                tail: ms(load.ship),
                standby: ms(load.ship * load.standby_percent / 100),
                full: false,
            };
            all.push(Times { began: begin, froze, thawed, committed });
            shipping = Some((committed, cost));
            now = thawed;
        }
        all
    }

    /// Age of what the standby holds, just before each commit.
    fn lags(all: &[Times]) -> Vec<Duration> {
        all.windows(2).map(|pair| pair[1].committed - pair[0].froze).collect()
    }

    fn load(before: u64, frozen: u64, ship: u64) -> Load {
        Load { before, frozen, ship, standby_percent: 0 }
    }

    fn any_load() -> impl Strategy<Value = Load> {
        (0..40_u64, 0..60_u64, 0..400_u64, 0..=100_u64).prop_map(|(before, frozen, ship, standby_percent)| {
            Load { before, frozen, ship, standby_percent }
        })
    }

    fn any_mode() -> impl Strategy<Value = PaceMode> {
        prop_oneof![
            (10..1000_u64).prop_map(PaceMode::EveryMs),
            (10..1000_u64).prop_map(PaceMode::LagMs),
            Just(PaceMode::Continuous)
        ]
    }

    proptest! {
        #[test]
        fn a_workload_keeps_its_share_of_the_time(
            mode in any_mode(),
            percent in 1..=90_u8,
            loads in prop::collection::vec(any_load(), 2..60),
        ) {
            let mut pace = Pace::new(PaceSpec { mode, frozen_percent_max: Some(percent) });
            let all = simulate(&mut pace, &loads);
            for pair in all.windows(2) {
                let frozen = pair[0].thawed - pair[0].froze;
                let interval = pair[1].froze - pair[0].froze + Duration::from_micros(1);
                prop_assert!(frozen * 100 <= interval * u32::from(percent));
            }
        }

        #[test]
        fn a_fixed_interval_is_never_undercut(
            every in 10..1000_u64,
            loads in prop::collection::vec(any_load(), 2..60),
        ) {
            let all = simulate(&mut Pace::new(spec(PaceMode::EveryMs(every))), &loads);
            prop_assert!(all.windows(2).all(|pair| pair[1].began - pair[0].began >= ms(every)));
        }

        #[test]
        fn an_interval_with_room_for_its_epochs_is_kept(
            every in 100..1000_u64,
            loads in prop::collection::vec((0..20_u64, 0..20_u64, 0..40_u64), 8..60),
        ) {
            let loads: Vec<_> = loads.into_iter().map(|(before, frozen, ship)| load(before, frozen, ship)).collect();
            let mut pace = Pace::new(spec(PaceMode::EveryMs(every)));
            let all = simulate(&mut pace, &loads);
            prop_assert!(all.windows(2).all(|pair| pair[1].began - pair[0].began == ms(every)));
            prop_assert_eq!(pace.report().stretched_by, StretchedBy::None);
        }

        #[test]
        fn a_lag_that_can_be_kept_is_kept_with_few_epochs(
            lag in 100..2000_u64,
            (before, frozen, ship) in (0..10_u64, 1..8_u64, 1..20_u64),
        ) {
            let mut pace = Pace::new(spec(PaceMode::LagMs(lag)));
            let all = simulate(&mut pace, &[load(before, frozen, ship); 60]);
            let settled = &all[40..];
            prop_assert!(lags(settled).iter().all(|age| *age <= ms(lag)));
            // No more than the few that are due to what the durations may vary by.
            prop_assert!(lags(settled).iter().all(|age| *age >= ms(lag * 8 / 10)));
            prop_assert_eq!(pace.report().stretched_by, StretchedBy::None);
        }

        #[test]
        fn a_lag_is_kept_while_the_durations_vary(
            lag in 200..2000_u64,
            loads in prop::collection::vec((0..10_u64, 1..8_u64, 1..20_u64), 60..120),
        ) {
            let loads: Vec<_> = loads.into_iter().map(|(before, frozen, ship)| load(before, frozen, ship)).collect();
            let all = simulate(&mut Pace::new(spec(PaceMode::LagMs(lag))), &loads);
            let late = lags(&all).iter().filter(|age| **age > ms(lag)).count();
            prop_assert!(late * 20 <= all.len(), "{} of {} were late", late, all.len());
        }

        #[test]
        fn what_is_captured_ahead_does_not_wait_long(
            mode in any_mode(),
            (before, frozen, ship) in (0..30_u64, 1..10_u64, 60..400_u64),
        ) {
            let all = simulate(&mut Pace::new(spec(mode)), &[load(before, frozen, ship); 40]);
            for pair in all[20..].windows(2) {
                // Thawed, it waits for the one before by no more than rounding.
                let waits = pair[0].committed.saturating_duration_since(pair[1].thawed);
                prop_assert!(waits <= ms(2), "{:?}", waits);
            }
        }

        #[test]
        fn failures_are_spaced_out_up_to_a_bound(mode in any_mode(), failures in 1..40_usize) {
            let mut pace = Pace::new(spec(mode));
            let now = Instant::now();
            let mut before = Duration::ZERO;
            for _ in 0..failures {
                pace.began(now);
                pace.failed(now);
                let wait = pace.due(now) - now;
                prop_assert!(wait >= before && wait > Duration::ZERO && wait <= BACKOFF_MAX);
                before = wait;
            }
        }
    }

    #[test]
    fn a_slow_epoch_stretches_the_interval_and_is_not_caught_up() {
        let mut pace = Pace::new(spec(PaceMode::EveryMs(200)));
        let mut loads = [load(0, 10, 20); 12];
        loads[5].ship = 900;
        let all = simulate(&mut pace, &loads);
        assert!(all.windows(2).all(|pair| pair[1].began - pair[0].began >= EVERY));
        assert_eq!(all[11].began - all[10].began, EVERY);
    }

    #[test]
    fn a_workload_that_sleeps_is_frozen_more_often_and_one_that_works_keeps_its_share() {
        let spec = PaceSpec { mode: PaceMode::Continuous, frozen_percent_max: Some(50) };
        let mut pace = Pace::new(spec).asleep(80);
        let interval = |pace: &mut Pace, busy_percent| {
            let thawed = Instant::now();
            pace.captured(&freeze(thawed, 8, busy_percent));
            pace.freeze_after().map(|after| after + ms(8) - thawed)
        };
        assert_eq!(interval(&mut pace, 100), Some(ms(16)), "at first it is taken for busy");
        assert_eq!(interval(&mut pace, 0), Some(ms(16) * 50 / 57));
        for _ in 0..20 {
            interval(&mut pace, 0);
        }
        assert!(interval(&mut pace, 0).is_some_and(|interval| interval <= ms(11)));
        assert_eq!(interval(&mut pace, 100), Some(ms(16)));
        let mut strict = Pace::new(spec);
        assert_eq!(interval(&mut strict, 0), Some(ms(16)), "what is said counts");
    }

    #[test]
    fn continuous_epochs_begin_when_the_last_is_captured() {
        let mut pace = Pace::new(spec(PaceMode::Continuous));
        let all = simulate(&mut pace, &[load(8, 2, 5); 20]);
        assert!(all.windows(2).all(|pair| pair[1].began == pair[0].thawed));
        // Slower to ship than to capture: one after the other on the link, without a gap.
        let mut pace = Pace::new(spec(PaceMode::Continuous));
        let all = simulate(&mut pace, &[load(8, 2, 50); 40]);
        let last = &all[38..];
        assert!(last[1].committed - last[0].committed <= ms(52));
        assert_eq!(pace.report().stretched_by, StretchedBy::Link);
    }

    #[test]
    fn who_holds_the_epochs_up_is_told_and_taken_back() {
        let slow = |load: Load| {
            let mut pace = Pace::new(spec(PaceMode::EveryMs(100)));
            simulate(&mut pace, &[load; 30]);
            pace
        };
        assert_eq!(slow(load(5, 5, 300)).report().stretched_by, StretchedBy::Link);
        assert_eq!(slow(load(5, 40, 10)).report().stretched_by, StretchedBy::Freeze);
        assert_eq!(slow(load(150, 5, 10)).report().stretched_by, StretchedBy::Capture);
        let standby = Load { standby_percent: 80, ..load(5, 5, 300) };
        let mut pace = slow(standby);
        assert_eq!(pace.report().stretched_by, StretchedBy::Standby);
        assert!(pace.report().interval.is_some_and(|interval| interval > ms(250)));
        simulate(&mut pace, &[load(5, 5, 5); 60]);
        assert_eq!(pace.report().stretched_by, StretchedBy::None);
    }

    #[test]
    fn a_failure_is_forgotten_with_the_first_success() {
        let now = Instant::now();
        let mut pace = Pace::new(spec(PaceMode::EveryMs(200)));
        let waits: Vec<_> = (0..8)
            .map(|_| {
                pace.failed(now);
                pace.due(now) - now
            })
            .collect();
        assert_eq!(waits[..3], [EVERY, EVERY * 2, EVERY * 4]);
        assert_eq!(*waits.last().unwrap(), BACKOFF_MAX);
        pace.began(now);
        pace.committed(&Cost::default());
        pace.failed(now);
        assert_eq!(pace.due(now), now + EVERY);
    }
}
