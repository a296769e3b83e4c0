//! Claimants against the etcd that Debian installs.

mod claims;
mod faults;
mod relay;
mod secrets;
mod server;

use std::time::Duration;

use standin::{
    arbiter::{Claimant, Etcd, Report, Settings, Wanted},
    model::Term,
    workload::guard::boot_time_ns,
};
use tokio::{
    sync::mpsc::{self, UnboundedReceiver},
    time::timeout,
};

/// Longer than anything takes here, on a busy machine too.
const SOON: Duration = Duration::from_secs(30);
/// The shortest.
const TTL: Duration = Duration::from_secs(2);
const WORKLOAD: &str = "redis";

fn now() -> Duration {
    Duration::from_nanos(boot_time_ns())
}

/// One host's claimant and what it reports.
struct Host {
    claimant: Claimant,
    reports: UnboundedReceiver<Report>,
    generation: u64,
}

impl Host {
    fn new(settings: Settings, name: &str, term: Option<u64>, record: u64) -> Self {
        let (sender, reports) = mpsc::unbounded_channel();
        let wanted = Wanted { generation: 1, term: term.map(Term), record: Term(record) };
        let claimant =
            Etcd::new(settings).unwrap().claimant(&WORKLOAD.parse().unwrap(), name, wanted, move |report| {
                let _ = sender.send(report);
            });
        Self { claimant, reports, generation: 1 }
    }

    fn want(&mut self, term: Option<u64>, record: u64) {
        self.generation += 1;
        self.claimant.want(Wanted {
            generation: self.generation,
            term: term.map(Term),
            record: Term(record),
        });
    }

    /// The next report about what is wanted now; `None`: it was refused.
    async fn report(&mut self) -> Option<Duration> {
        loop {
            let report = timeout(SOON, self.reports.recv()).await;
            match report.unwrap_or_else(|_| panic!("no report: {:?}", self.claimant.condition())).unwrap() {
                Report::Held { generation, until, .. } if generation == self.generation => {
                    return Some(until);
                }
                Report::Refused { generation, .. } if generation == self.generation => return None,
                _ => {}
            }
        }
    }

    async fn held(&mut self) -> Duration {
        let begun = now();
        loop {
            if let Some(until) = self.report().await {
                return until;
            }
            assert!(now() < begun + SOON, "never given: {:?}", self.claimant.condition());
        }
    }

    async fn refused(&mut self) {
        let begun = now();
        while self.report().await.is_some() {
            assert!(now() < begun + SOON, "never refused: {:?}", self.claimant.condition());
        }
    }

    /// For so many looks to come.
    async fn refused_times(&mut self, times: usize) {
        for _ in 0..times {
            assert_eq!(self.report().await, None, "{:?}", self.claimant.condition());
        }
    }

    async fn held_times(&mut self, times: usize) {
        for _ in 0..times {
            assert!(self.report().await.is_some(), "{:?}", self.claimant.condition());
        }
    }

    async fn error(&mut self) -> String {
        self.refused().await;
        self.claimant.condition().last_error.unwrap_or_default()
    }
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let begun = now();
    while !holds() {
        assert!(now() < begun + SOON, "never so: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
