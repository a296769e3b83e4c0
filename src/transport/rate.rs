//! How fast epochs are shipped, pure: what the pace of epochs and the choice of a packing go by.

use std::time::Duration;

/// The shipping of one epoch, as its sender saw it. The time in which the sender had nothing to send does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shipment {
    /// Bytes handed to QUIC.
    pub bytes: u64,
    /// Spent in handing them over: it grows when the link or the receiver is slower than the sender.
    pub sending: Duration,
    /// From the last byte handed over to the answer: what was still on its way, the round trip, and the commit.
    pub answering: Duration,
}

impl Shipment {
    /// From the first byte to the answer.
    pub fn took(&self) -> Duration {
        self.sending + self.answering
    }
}

/// The rate of the last shipments: an epoch's weight is its length, and falls by a quarter with each later one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ShippingRate {
    bytes: f64,
    seconds: f64,
}

impl ShippingRate {
    /// What an earlier shipment still counts after a later one.
    const KEPT: f64 = 0.75;

    /// Takes a shipment into account.
    pub fn record(&mut self, shipment: Shipment) {
        self.bytes = self.bytes * Self::KEPT + shipment.bytes as f64;
        self.seconds = self.seconds * Self::KEPT + shipment.took().as_secs_f64();
    }

    /// Bytes a second, commits included; `None` before the first shipment.
    pub fn bytes_per_s(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.bytes / self.seconds)
    }

    /// How long an epoch of so many bytes will take to be shipped; `None` before the first shipment.
    pub fn time_for(&self, bytes: u64) -> Option<Duration> {
        let seconds = bytes as f64 / self.bytes_per_s()?;
        // Nothing was shipped in all that time, or it is more than there is.
        Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shipment(bytes: u64, ms: u64) -> Shipment {
        let half = Duration::from_millis(ms) / 2;
        Shipment { bytes, sending: half, answering: half }
    }

    #[test]
    fn nothing_is_said_before_anything_was_shipped() {
        let mut rate = ShippingRate::default();
        assert_eq!((rate.bytes_per_s(), rate.time_for(1)), (None, None));
        rate.record(shipment(0, 10));
        assert_eq!(rate.time_for(1), Some(Duration::MAX));
    }

    #[test]
    fn a_link_that_becomes_slower_is_noticed_within_a_few_epochs() {
        let mut rate = ShippingRate::default();
        for _ in 0..100 {
            rate.record(shipment(100 << 20, 100));
        }
        // A tenth of the speed: an epoch of the same size then takes, and weighs, ten times as long.
        for _ in 0..3 {
            rate.record(shipment(100 << 20, 1000));
        }
        let slow = f64::from(100 << 20);
        assert!(rate.bytes_per_s().unwrap() < slow * 2.0, "{rate:?}");
    }

    proptest! {
        #[test]
        fn a_rate_lies_between_the_slowest_and_the_fastest(
            shipments in prop::collection::vec((1_u64..1 << 40, 1_u64..100_000), 1..50),
        ) {
            let mut rate = ShippingRate::default();
            let each = |(bytes, ms): &(u64, u64)| *bytes as f64 / (*ms as f64 / 1e3);
            for (bytes, ms) in &shipments {
                rate.record(shipment(*bytes, *ms));
            }
            let (slowest, fastest) = shipments
                .iter()
                .map(each)
                .fold((f64::INFINITY, 0.0_f64), |(low, high), rate| (low.min(rate), high.max(rate)));
            let seen = rate.bytes_per_s().unwrap();
            prop_assert!(slowest * 0.999 <= seen && seen <= fastest * 1.001, "{slowest} {seen} {fastest}");
        }
    }
}
