//! What is measured of every method, and how it is shown.

use crate::Size;

/// One checkpoint of a container that runs on.
pub(crate) struct Epoch {
    pub(crate) frozen_ms: f64,
    /// From its begin until it is complete; of Standin until the standby holds it.
    pub(crate) wall_ms: f64,
    /// Of the image; of Standin what was sent.
    pub(crate) bytes: u64,
}

/// One planned move.
pub(crate) struct Move {
    /// The longest time without an answer that the client saw.
    pub(crate) downtime_ms: f64,
    /// From the order until it runs on the target and is gone from the source.
    pub(crate) total_ms: f64,
    /// From the order until that is told: Standin makes the source ready for the way back before.
    pub(crate) command_ms: f64,
    /// What the source has sent on the network meanwhile.
    pub(crate) bytes: u64,
}

/// All of one method and size.
#[derive(Default)]
pub(crate) struct Figures {
    pub(crate) epochs: Vec<Epoch>,
    pub(crate) moves: Vec<Move>,
    /// Of Standin: from the order to protect until the standby holds an epoch, and what was sent for it.
    pub(crate) first: Option<(f64, u64)>,
    pub(crate) note: Option<String>,
}

#[derive(serde::Serialize)]
pub(crate) struct Row {
    workload: String,
    method: String,
    epochs: usize,
    frozen_ms_p50: Option<f64>,
    epoch_ms_p50: Option<f64>,
    epoch_bytes_p50: Option<u64>,
    moves: usize,
    downtime_ms: Option<f64>,
    total_ms: Option<f64>,
    command_ms: Option<f64>,
    bytes: Option<u64>,
    first_epoch_ms: Option<f64>,
    first_epoch_bytes: Option<u64>,
    note: Option<String>,
}

impl Row {
    pub(crate) fn of(size: Size, method: &str, figures: &Figures) -> Self {
        let Figures { epochs, moves, first, note } = figures;
        let bytes = |value: Option<f64>| value.map(|value| value as u64);
        Self {
            workload: size.workload(),
            method: method.to_owned(),
            epochs: epochs.len(),
            frozen_ms_p50: median(epochs.iter().map(|epoch| epoch.frozen_ms)),
            epoch_ms_p50: median(epochs.iter().map(|epoch| epoch.wall_ms)),
            epoch_bytes_p50: bytes(median(epochs.iter().map(|epoch| epoch.bytes as f64))),
            moves: moves.len(),
            downtime_ms: median(moves.iter().map(|it| it.downtime_ms)),
            total_ms: median(moves.iter().map(|it| it.total_ms)),
            command_ms: median(moves.iter().map(|it| it.command_ms)),
            bytes: bytes(median(moves.iter().map(|it| it.bytes as f64))),
            first_epoch_ms: first.map(|(ms, _)| ms),
            first_epoch_bytes: first.map(|(_, bytes)| bytes),
            note: note.clone(),
        }
    }

    pub(crate) fn print_head() {
        println!(
            "{:11} {:15} {:>7} {:>10} {:>9} {:>9} {:>11} {:>9} {:>9}",
            "workload", "method", "frozen", "epoch ms", "epoch MB", "downtime", "total ms", "MB", "first MB"
        );
    }

    pub(crate) fn print(&self) {
        let ms = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
        let mb =
            |value: Option<u64>| value.map_or("-".to_owned(), |value| format!("{:.2}", value as f64 / 1e6));
        println!(
            "{:11} {:15} {:>7} {:>10} {:>9} {:>9} {:>11} {:>9} {:>9}  {}",
            self.workload,
            self.method,
            ms(self.frozen_ms_p50),
            ms(self.epoch_ms_p50),
            mb(self.epoch_bytes_p50),
            ms(self.downtime_ms),
            ms(self.total_ms),
            mb(self.bytes),
            mb(self.first_epoch_bytes),
            self.note.as_deref().unwrap_or_default()
        );
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}
