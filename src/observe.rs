//! What people and scripts are shown: the log, the history of a workload, figures over its epochs.
//!
//! Owns the history file of each workload (`history.jsonl`, one event a line, the newest
//! [`EVENTS_MAX`] kept) and the ring of the last [`EPOCHS_MAX`] epochs' figures, which lives in memory.

use std::{
    collections::VecDeque,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    agent::api::{Event, Summary},
    model::EpochFigures,
};

/// Most events kept of a workload.
pub const EVENTS_MAX: usize = 1000;
/// Most epochs whose figures are kept.
pub const EPOCHS_MAX: usize = 4096;

/// What went wrong, and why, for people. Many of our errors say their cause themselves: that is not said again.
pub fn in_full(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Milliseconds since 1970 by the wall clock: for people, decides nothing.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_millis() as u64)
}

/// An instant as people read it: `2026-11-21 20:15:03.250Z`.
pub fn utc(unix_ms: u64) -> String {
    let (days, ms) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    let (year, month, day) = civil(days as i64);
    let (hour, minute, second) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:03}Z", ms % 1000)
}

/// Year, month and day of a day counted from 1970-01-01 (Gregorian; Hinnant's `civil_from_days`).
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

/// A workload's history.
#[derive(Debug)]
pub struct HistoryLog {
    path: PathBuf,
    events: VecDeque<Event>,
    epochs: VecDeque<EpochFigures>,
}

impl HistoryLog {
    /// Reads what earlier agents wrote; lines that a crash cut short are passed over.
    pub fn open(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let mut events: VecDeque<Event> =
            text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let surplus = events.len().saturating_sub(EVENTS_MAX);
        events.drain(..surplus);
        let log = Self { path: path.to_owned(), events, epochs: VecDeque::new() };
        if surplus > 0 || !(text.is_empty() || text.ends_with('\n')) {
            // A history that cannot be shortened is a long history, no more.
            let _ = log.rewrite();
        }
        log
    }

    /// Adds an event, to the file too. History is for people: a disk that is full does not stop anything.
    pub fn add(&mut self, event: Event) {
        tracing::info!(kind = event.kind, term = event.term.0, detail = event.detail, "history");
        if let Err(error) = self.append(&event) {
            tracing::warn!(%error, path = %self.path.display(), "the history could not be written");
        }
        self.events.push_back(event);
        if self.events.len() > EVENTS_MAX {
            self.events.pop_front();
        }
    }

    /// Remembers an epoch's figures.
    pub fn add_epoch(&mut self, figures: EpochFigures) {
        self.epochs.push_back(figures);
        if self.epochs.len() > EPOCHS_MAX {
            self.epochs.pop_front();
        }
    }

    /// The events, oldest first.
    pub fn events(&self) -> Vec<Event> {
        self.events.iter().cloned().collect()
    }

    /// The epochs' figures, oldest first.
    pub fn epochs(&self) -> Vec<EpochFigures> {
        self.epochs.iter().cloned().collect()
    }

    /// Figures over the epochs remembered, without the full ones (the first of a standby's life);
    /// `None` before the first.
    pub fn summary(&self) -> Option<Summary> {
        let last = self.epochs.back()?;
        let incremental: Vec<&EpochFigures> = self.epochs.iter().filter(|epoch| !epoch.full).collect();
        let of = |value: fn(&EpochFigures) -> u64| -> Vec<u64> {
            if incremental.is_empty() {
                vec![value(last)]
            } else {
                incremental.iter().map(|e| value(e)).collect()
            }
        };
        Some(Summary {
            epochs: self.epochs.len() as u64,
            frozen_ms_p50: percentile_ms(of(|e| e.frozen_us), 50),
            frozen_ms_p99: percentile_ms(of(|e| e.frozen_us), 99),
            commit_ms_p50: percentile_ms(of(|e| e.ship_us + e.frozen_us), 50),
            dirty_bytes: of(|e| e.dirty_bytes).iter().sum(),
            shipped_bytes: of(|e| e.shipped_bytes).iter().sum(),
        })
    }

    fn append(&self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        let mut file = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?;
        file.write_all(&line)
    }

    fn rewrite(&self) -> io::Result<()> {
        let mut text = Vec::new();
        for event in &self.events {
            serde_json::to_writer(&mut text, event)?;
            text.push(b'\n');
        }
        let temporary = self.path.with_extension("new");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&text)?;
        std::fs::rename(&temporary, &self.path)
    }
}

/// The nearest-rank percentile of microseconds, in milliseconds.
fn percentile_ms(mut values_us: Vec<u64>, percent: usize) -> f64 {
    values_us.sort_unstable();
    let rank = (values_us.len() * percent).div_ceil(100).max(1);
    values_us.get(rank - 1).map_or(0.0, |&value| value as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_line_is_passed_over_and_the_history_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.jsonl");
        let event = Event {
            at_unix_ms: 5,
            term: crate::model::Term(2),
            kind: "promoted".into(),
            detail: "lease ran out".into(),
            phases_ms: [("restore".to_owned(), 12.5)].into(),
            epoch: None,
        };
        HistoryLog::open(&path).add(event.clone());
        let mut text = std::fs::read(&path).unwrap();
        text.extend_from_slice(b"{\"at_unix");
        std::fs::write(&path, text).unwrap();
        assert_eq!(HistoryLog::open(&path).events(), vec![event]);
    }

    #[test]
    fn instants_are_written_in_utc() {
        assert_eq!(utc(0), "1970-01-01 00:00:00.000Z");
        assert_eq!(utc(951_782_400_123), "2000-02-29 00:00:00.123Z");
        assert_eq!(utc(1_795_305_303_250), "2026-11-21 23:55:03.250Z");
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let values: Vec<u64> = (1..=100).map(|n| n * 1000).rev().collect();
        assert!((percentile_ms(values.clone(), 50) - 50.0).abs() < f64::EPSILON);
        assert!((percentile_ms(values, 99) - 99.0).abs() < f64::EPSILON);
    }
}
