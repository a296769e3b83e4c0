//! What a drill is asked for and what it finds; how it is conducted is in [`crate::agent`].
//!
//! ```text
//!  newest epoch ──► its files copied ──► place, isolated ──► CRIU restores ──► probe ──► all pages there ──► nothing is left
//!                   └───────── a takeover has these ready ┘ └─ RTO, with the lease ┘
//! ```
//!
//! Words: *RTO* is the time that the standby waits for a primary that has fallen silent (the lease and the allowance for its
//! clock) and the restore as it was measured; announcing the address, a few milliseconds, is no part of it, since a drill
//! announces nothing. *RPO* is the age of the epoch when the drill began: what the workload did in that time would have been
//! lost.
//!
//! Invariants: a report has one outcome, and an exit code that goes with it; [`render`] does no IO.

mod html;
mod probe;
pub mod render;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::probe::{ProbeError, ProbeResult, Prober, SHOWN_BYTES_MAX};
use crate::model::{EpochId, Name};

/// Restore the newest epoch where nobody hears it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Request {
    /// A command for `sh -c`, run beside the restored workload; its exit status decides.
    pub probe: Option<String>,
    /// How long the probe may take, milliseconds.
    pub timeout_ms: Option<u64>,
    /// Leave the restored workload there until it is ended.
    pub keep: bool,
}

/// Default of `--timeout`, milliseconds.
pub const PROBE_TIMEOUT_MS: u64 = 60_000;

/// How a drill ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Restored, and the probe, if there was one, is content.
    Passed,
    /// It could not be restored, or the probe failed.
    Failed,
    /// Something else was more important, or the operator called it off.
    Interrupted,
}

impl Outcome {
    /// One word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
        }
    }
}

/// What the workload did after the epoch, and would have been lost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lost {
    /// The time for which it did it, milliseconds: the RPO.
    pub ms: u64,
    /// The epoch that followed, if one came during the drill.
    pub next_epoch: Option<EpochId>,
    /// Bytes of memory (whole pages) that it had written by that one: at most so many were lost.
    pub memory_bytes: Option<u64>,
}

/// A restored workload that was kept for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Pid of the place's init on this host, by which it can be entered.
    pub init: u32,
    /// Where its output goes.
    pub log: std::path::PathBuf,
}

/// What a drill has found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the workload.
    pub name: Name,
    /// The standby's host.
    pub host: String,
    /// Wall clock when it began, milliseconds since 1970.
    pub at_unix_ms: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, unless it passed.
    pub reason: Option<String>,
    /// The epoch that was restored.
    pub epoch: Option<EpochId>,
    /// From the primary's silence to the restored workload running, milliseconds; unless it could not be restored.
    pub rto_ms: Option<f64>,
    /// Of it: until the standby may believe that the primary is gone, milliseconds, as set.
    pub detection_ms: f64,
    /// Of it: as measured, milliseconds.
    pub restore_ms: Option<f64>,
    /// Age of the epoch when the drill began by both hosts' wall clocks, milliseconds.
    pub rpo_ms: Option<u64>,
    /// What would have been lost.
    pub lost: Option<Lost>,
    /// Memory of the epoch, bytes.
    pub memory_bytes: u64,
    /// Phases in their order, with the milliseconds that each took.
    pub phases_ms: Vec<(String, f64)>,
    /// What the probe found.
    pub probe: Option<ProbeResult>,
    /// Epochs that were committed on the standby during the drill.
    pub epochs_committed: u64,
    /// It is still there.
    pub kept: Option<Kept>,
}

impl Report {
    /// One that has yet to be made.
    pub fn begun(name: Name, host: String, at_unix_ms: u64, detection_ms: f64) -> Self {
        Self {
            name,
            host,
            at_unix_ms,
            outcome: Outcome::Interrupted,
            reason: None,
            epoch: None,
            rto_ms: None,
            detection_ms,
            restore_ms: None,
            rpo_ms: None,
            lost: None,
            memory_bytes: 0,
            phases_ms: Vec::new(),
            probe: None,
            epochs_committed: 0,
            kept: None,
        }
    }

    /// In a sentence, for the history.
    pub fn summary(&self) -> String {
        let mut text = self.outcome.word().to_owned();
        if let (Some(rto), Some(rpo)) = (self.rto_ms, self.rpo_ms) {
            text = format!("{text}: RTO {rto:.0} ms, RPO {rpo} ms");
        }
        if let Some(probe) = &self.probe {
            text = format!("{text}; the probe {}", probe.ending());
        }
        match &self.reason {
            Some(reason) => format!("{text}; {reason}"),
            None => text,
        }
    }

    /// The phases, for the history.
    pub fn phases(&self) -> BTreeMap<String, f64> {
        self.phases_ms.iter().cloned().collect()
    }
}

/// What `status` tells of the last drill.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Last {
    /// Wall clock when it began, milliseconds since 1970.
    pub at_unix_ms: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, unless it passed.
    pub reason: Option<String>,
    /// The epoch that was restored.
    pub epoch: Option<EpochId>,
    /// As in [`Report`], milliseconds.
    pub rto_ms: Option<f64>,
    /// As in [`Report`], milliseconds.
    pub rpo_ms: Option<u64>,
    /// How the probe ended, if there was one and it came to its end.
    pub probe_exit: Option<i32>,
    /// What it restored is still there.
    #[serde(default)]
    pub kept: bool,
}

impl From<&Report> for Last {
    fn from(report: &Report) -> Self {
        Self {
            at_unix_ms: report.at_unix_ms,
            outcome: report.outcome,
            reason: report.reason.clone(),
            epoch: report.epoch,
            rto_ms: report.rto_ms,
            rpo_ms: report.rpo_ms,
            probe_exit: report.probe.as_ref().and_then(|probe| probe.exit),
            kept: report.kept.is_some(),
        }
    }
}

/// Two copies of a workload do not fit into memory.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is not enough memory for a drill: {} MiB are available, and {} MiB are needed, twice the {} MiB of the workload, so \
     that a takeover has room beside it, and {} MiB to spare; free memory on this host, or drill when it has more",
    available >> 20, needed >> 20, image >> 20, SPARE_BYTES >> 20
)]
pub struct NoMemory {
    available: u64,
    needed: u64,
    image: u64,
}

/// What is left of memory in any case.
const SPARE_BYTES: u64 = 64 << 20;

/// Whether memory has room for the drill's copy of a workload of so many bytes, and that of a takeover.
pub fn check_memory(available: u64, image: u64) -> Result<(), NoMemory> {
    let needed = image.saturating_mul(2).saturating_add(SPARE_BYTES);
    if needed <= available { Ok(()) } else { Err(NoMemory { available, needed, image }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_for_a_takeover_is_left() {
        const GIB: u64 = 1 << 30;
        assert_eq!(check_memory(3 * GIB, GIB), Ok(()));
        let refusal = check_memory(2 * GIB, GIB).unwrap_err().to_string();
        for figure in ["2048 MiB are available", "2112 MiB are needed", "the 1024 MiB of the workload"] {
            assert!(refusal.contains(figure), "{refusal}");
        }
        assert!(check_memory(u64::MAX - 1, u64::MAX / 2).is_err());
    }
}
