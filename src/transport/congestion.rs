//! Bulk's congestion control: CUBIC, which here also takes a queue for congestion, before that costs packets.
//!
//! Between two hosts an epoch is the largest thing on the link, and CUBIC fills whatever buffer there is: a heartbeat behind
//! it then waits for as long as the buffer takes to drain. So a round trip that has become longer than it was counts as a
//! loss does, unless so little is on its way that others, who fill the buffer too, would be left the whole link.

use std::{
    any::Any,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;

/// How long packets may wait in queues, as round trips tell.
const QUEUED_MAX: Duration = Duration::from_millis(2);
/// The shortest round trip is looked for in so much time, and in as much before: a route may change.
const BASE_INTERVAL: Duration = Duration::from_secs(10);

/// Makes the controllers of bulk connections.
pub(super) struct Considerate {
    cubic: Arc<CubicConfig>,
    /// A window that is no larger is not made smaller because of a queue.
    window_min: u64,
}

impl Considerate {
    pub(super) fn new(cubic: CubicConfig, window_min: u64) -> Self {
        Self { cubic: Arc::new(cubic), window_min }
    }
}

impl ControllerFactory for Considerate {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        let cubic = Arc::clone(&self.cubic).build(now, mtu);
        Box::new(ConsiderateCubic { cubic, window_min: self.window_min, queue: Queue::new(now) })
    }
}

struct ConsiderateCubic {
    cubic: Box<dyn Controller>,
    window_min: u64,
    queue: Queue,
}

impl Controller for ConsiderateCubic {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        if self.queue.delay(now, rtt.get()) > QUEUED_MAX && self.window() > self.window_min {
            // Once a round trip: CUBIC passes over what was sent before it last gave way.
            self.cubic.on_congestion_event(now, sent, false, 0);
        }
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        self.cubic.on_congestion_event(now, sent, persistent, lost_bytes);
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.cubic.on_mtu_update(mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.cubic.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { cubic: self.cubic.clone_box(), window_min: self.window_min, queue: self.queue })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// What round trips tell of queues.
#[derive(Clone, Copy, Debug)]
struct Queue {
    /// The shortest round trips of the interval before, and of the one that began at `since`.
    shortest: [Duration; 2],
    since: Instant,
}

impl Queue {
    fn new(now: Instant) -> Self {
        Self { shortest: [Duration::MAX; 2], since: now }
    }

    /// How much longer a round trip is than the shortest.
    fn delay(&mut self, now: Instant, rtt: Duration) -> Duration {
        if now.saturating_duration_since(self.since) >= BASE_INTERVAL {
            (self.shortest, self.since) = ([self.shortest[1], rtt], now);
        }
        self.shortest[1] = self.shortest[1].min(rtt);
        rtt.saturating_sub(self.shortest[0].min(self.shortest[1]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_queue_is_what_a_round_trip_has_become_longer_by() {
        let start = Instant::now();
        let mut queue = Queue::new(start);
        assert_eq!(queue.delay(start, MS * 5), Duration::ZERO);
        assert_eq!(queue.delay(start + MS, MS), Duration::ZERO);
        assert_eq!(queue.delay(start + MS * 2, MS * 4), MS * 3);
    }

    #[test]
    fn a_longer_route_is_no_queue_for_ever() {
        let start = Instant::now();
        let mut queue = Queue::new(start);
        queue.delay(start, MS);
        let delays = [1, 2].map(|intervals| queue.delay(start + BASE_INTERVAL * intervals, MS * 9));
        assert_eq!(delays, [MS * 8, Duration::ZERO]);
    }
}
