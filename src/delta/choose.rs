//! Which packing is worth its time, pure: for each packing it is remembered what it cost and what it saved, and the one is
//! taken with which encoding a byte and shipping what is left of it take least time, one after the other.
//!
//! Encoding and shipping overlap in a large epoch and hardly do in a small one. What is no slower than raw when their
//! times add up is no slower when they overlap, so the sum is what is compared, for both.
//!
//! What the others would do is found out by trials: a sample is packed another way, and what comes of it is thrown away.
//!
//! Promise: by the times that it was told, all trials together take at most `TRIAL_SHARE` of the time that the best
//! packing takes, the first and the last trial not counted.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::Packing;

/// Of the time that the best packing takes, what trials of others may take.
const TRIAL_SHARE: f64 = 1.0 / 32.0;
/// Bytes of a trial, at most: as many as show what a packing can do.
pub(super) const TRIAL_BYTES: usize = 64 << 10;
/// A packing that is not the best is not tried again before so many bytes were packed.
const TRIAL_EVERY_BYTES: f64 = (1 << 20) as f64;
/// What the first trials may take before there is any time that they could be a share of.
const FIRST_TRIALS_NS: f64 = 500_000.0;
/// Weight of what was learned anew, from as many bytes as a trial has or more.
const WEIGHT: f64 = 0.25;
/// Unpacking takes the standby about a third of the time that packing took.
const WITH_UNPACKING: f64 = 4.0 / 3.0;
/// The link's rate while none was measured, bytes in a second: between the two common ones, 1 and 10 Gbit/s.
const RATE_UNKNOWN: u64 = 400_000_000;
/// A shipment of fewer bytes says more of the link's latency than of its rate.
const SHIPPED_MIN: u64 = 4 << 20;
/// The least and the most that a link is believed to ship in a second.
const RATES: std::ops::RangeInclusive<u64> = 10_000..=100_000_000_000;

/// What the link ships in a second, as measured: told by who ships, asked by who encodes.
#[derive(Debug, Default)]
pub struct LinkRate(AtomicU64);

impl LinkRate {
    /// So many bytes kept the link busy for so long.
    pub fn shipped(&self, bytes: u64, busy: Duration) {
        if bytes < SHIPPED_MIN || busy.is_zero() {
            return;
        }
        let sample = bytes as f64 / busy.as_secs_f64();
        let before = match self.0.load(Ordering::Relaxed) {
            0 => sample,
            before => before as f64,
        };
        let rate = ((before + (sample - before) * WEIGHT) as u64).clamp(*RATES.start(), *RATES.end());
        self.0.store(rate, Ordering::Relaxed);
    }

    /// Bytes in a second.
    pub fn get(&self) -> u64 {
        match self.0.load(Ordering::Relaxed) {
            0 => RATE_UNKNOWN,
            rate => rate,
        }
    }
}

/// What is known of a packing.
#[derive(Clone, Copy, Debug)]
struct Estimate {
    ns_per_byte: f64,
    /// Packed ÷ unpacked.
    ratio: f64,
    /// Bytes that were packed in other ways since something was learned of this one.
    untried_bytes: f64,
    /// Whether this is more than a guess.
    learned: bool,
}

/// Chooses among the packings for one kind of content.
#[derive(Debug)]
pub(super) struct Chooser {
    lz4: Estimate,
    zstd: Estimate,
    /// Nanoseconds that trials may take.
    credit_ns: f64,
}

impl Default for Chooser {
    /// What both do to common pages, until it was tried.
    fn default() -> Self {
        let guess = |ns_per_byte, ratio| Estimate {
            ns_per_byte,
            ratio,
            untried_bytes: TRIAL_EVERY_BYTES,
            learned: false,
        };
        Self { lz4: guess(1.0, 0.4), zstd: guess(1.7, 0.3), credit_ns: FIRST_TRIALS_NS }
    }
}

fn ship_ns_per_byte(rate: u64) -> f64 {
    1e9 / rate as f64
}

impl Chooser {
    fn estimates(&self) -> [(Packing, Estimate); 3] {
        let raw = Estimate { ns_per_byte: 0.0, ratio: 1.0, untried_bytes: 0.0, learned: true };
        [(Packing::Raw, raw), (Packing::Lz4, self.lz4), (Packing::Zstd, self.zstd)]
    }

    fn best(&self, rate: u64) -> (Packing, f64) {
        let ship = ship_ns_per_byte(rate);
        let times = self.estimates().map(|(packing, is)| (packing, is.time(ship)));
        times.into_iter().min_by(|a, b| a.1.total_cmp(&b.1)).expect("three packings")
    }

    /// Nanoseconds that a byte takes the best way.
    pub(super) fn ns_per_byte(&self, rate: u64) -> f64 {
        self.best(rate).1
    }

    /// How to pack so many bytes now. What comes of it must be told to [`learn`](Self::learn).
    pub(super) fn choose(&mut self, bytes: usize, rate: u64) -> Packing {
        let (best, time) = self.best(rate);
        let bytes = bytes as f64;
        self.credit_ns += time * bytes * TRIAL_SHARE;
        self.lz4.untried_bytes += bytes;
        self.zstd.untried_bytes += bytes;
        best
    }

    /// Which packing to try on a sample now, if any. What comes of it must be told to [`tried`](Self::tried).
    pub(super) fn trial(&self, rate: u64) -> Option<Packing> {
        let best = self.best(rate).0;
        let others =
            self.estimates().into_iter().filter(|(packing, _)| ![best, Packing::Raw].contains(packing));
        // Only the longest untried: the credit is saved up for it, however dear it is.
        let (packing, is) = others.max_by(|a, b| a.1.untried_bytes.total_cmp(&b.1.untried_bytes))?;
        let due =
            is.untried_bytes >= TRIAL_EVERY_BYTES && is.ns_per_byte * TRIAL_BYTES as f64 <= self.credit_ns;
        due.then_some(packing)
    }

    /// What a trial has cost and left.
    pub(super) fn tried(&mut self, packing: Packing, bytes: usize, packed: usize, took: Duration) {
        self.credit_ns -= took.as_nanos() as f64;
        self.learn(packing, bytes, packed, took);
    }

    /// What packing has cost and left.
    pub(super) fn learn(&mut self, packing: Packing, bytes: usize, packed: usize, took: Duration) {
        let estimate = match packing {
            Packing::Raw => return,
            Packing::Lz4 => &mut self.lz4,
            Packing::Zstd => &mut self.zstd,
        };
        // Of few bytes little is learned: what a call costs by itself is a large part of their time.
        let size = (bytes as f64 / TRIAL_BYTES as f64).min(1.0);
        let weight = if estimate.learned { WEIGHT * size } else { 1.0 };
        let bytes = bytes as f64;
        let (ns_per_byte, ratio) = (took.as_nanos() as f64 / bytes, (packed as f64 / bytes).min(1.0));
        estimate.ns_per_byte += (ns_per_byte - estimate.ns_per_byte) * weight;
        estimate.ratio += (ratio - estimate.ratio) * weight;
        estimate.untried_bytes = 0.0;
        estimate.learned = true;
    }
}

impl Estimate {
    fn time(self, ship_ns_per_byte: f64) -> f64 {
        self.ns_per_byte * WITH_UNPACKING + self.ratio * ship_ns_per_byte
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BATCH: usize = 1 << 20;

    /// What packings really do: nanoseconds for a byte, and ratio, of LZ4 and zstd.
    type Truth = [(f64, f64); 2];

    fn truth() -> impl Strategy<Value = Truth> {
        let one = || (0.05..20.0, 0.01..1.0);
        (one(), one()).prop_map(|(lz4, zstd)| [lz4, zstd])
    }

    fn time(truth: &Truth, packing: Packing, rate: u64) -> f64 {
        let (cost, ratio) = match packing {
            Packing::Raw => (0.0, 1.0),
            Packing::Lz4 => truth[0],
            Packing::Zstd => truth[1],
        };
        (cost * WITH_UNPACKING + ratio * ship_ns_per_byte(rate)) * BATCH as f64
    }

    /// Packs so many batches; the time that all took, and that of trials alone.
    fn run(chooser: &mut Chooser, truth: &Truth, rate: u64, batches: u32) -> (f64, f64) {
        let (mut total, mut trials) = (0.0, 0.0);
        let of = |packing, bytes: usize| {
            let (cost, ratio) = truth[usize::from(packing == Packing::Zstd)];
            (Duration::from_nanos((cost * bytes as f64) as u64), (ratio * bytes as f64) as usize)
        };
        for _ in 0..batches {
            if let Some(packing) = chooser.trial(rate) {
                let (took, packed) = of(packing, TRIAL_BYTES);
                trials += took.as_nanos() as f64;
                chooser.tried(packing, TRIAL_BYTES, packed, took);
            }
            let packing = chooser.choose(BATCH, rate);
            total += time(truth, packing, rate);
            let (took, packed) = of(packing, BATCH);
            chooser.learn(packing, BATCH, packed, took);
        }
        (total + trials, trials)
    }

    /// The best that one who knows could do, and what no more than a trial of each costs.
    fn best(truth: &Truth, rate: u64, batches: u32) -> (f64, f64) {
        let times = [Packing::Raw, Packing::Lz4, Packing::Zstd].map(|packing| time(truth, packing, rate));
        let trials = (truth[0].0 + truth[1].0) * TRIAL_BYTES as f64;
        (times.into_iter().fold(f64::MAX, f64::min) * f64::from(batches), trials)
    }

    proptest! {
        #[test]
        fn it_is_never_slower_than_raw_and_comes_to_the_best(truth in truth(), mbytes_per_s in 1u64..5_000) {
            let (mut chooser, rate) = (Chooser::default(), mbytes_per_s * 1_000_000);
            let (total, _) = run(&mut chooser, &truth, rate, 2_000);
            // A guess that is wrong costs a batch at most.
            let guesses = time(&truth, Packing::Lz4, rate) + time(&truth, Packing::Zstd, rate);
            let raw = time(&truth, Packing::Raw, rate) * 2_000.0;
            let (_, each_trial) = best(&truth, rate, 1);
            let bound = |time: f64| time * (1.0 + TRIAL_SHARE) + FIRST_TRIALS_NS + 2.0 * each_trial;
            prop_assert!(total <= bound(raw) + guesses, "{total} is slower than {raw}");
            let (settled, trials) = run(&mut chooser, &truth, rate, 2_000);
            let (least, _) = best(&truth, rate, 2_000);
            prop_assert!(settled <= bound(least) * 1.001, "{settled} is not near {least}");
            prop_assert!(trials <= least * TRIAL_SHARE * 1.001 + FIRST_TRIALS_NS + each_trial);
        }

        #[test]
        fn it_follows_a_workload_that_changes(before in truth(), after in truth(), mbytes_per_s in 1u64..5_000) {
            let (mut chooser, rate) = (Chooser::default(), mbytes_per_s * 1_000_000);
            run(&mut chooser, &before, rate, 500);
            // What is slow is looked at rarely, so that it takes a while until it is found to be fast.
            run(&mut chooser, &after, rate, 4_000);
            let (settled, _) = run(&mut chooser, &after, rate, 2_000);
            let (least, each_trial) = best(&after, rate, 2_000);
            let allowed = least * (1.0 + TRIAL_SHARE) + FIRST_TRIALS_NS + each_trial;
            prop_assert!(settled <= allowed * 1.01, "{settled} is not near {least}");
        }
    }

    #[test]
    fn the_link_decides() {
        // As measured on the pages of a redis.
        let redis = [(1.0, 0.3), (1.9, 0.19)];
        for (rate, wanted) in
            [(4_000_000_000, Packing::Raw), (400_000_000, Packing::Lz4), (12_500_000, Packing::Zstd)]
        {
            let mut chooser = Chooser::default();
            run(&mut chooser, &redis, rate, 100);
            assert_eq!(chooser.best(rate).0, wanted);
        }
    }

    #[test]
    fn a_rate_is_measured_by_what_is_large_enough() {
        let rate = LinkRate::default();
        rate.shipped(1000, Duration::from_secs(1));
        assert_eq!(rate.get(), RATE_UNKNOWN);
        for _ in 0..50 {
            rate.shipped(100 << 20, Duration::from_secs(1));
        }
        assert!(rate.get().abs_diff(100 << 20) < 1 << 10);
    }
}
