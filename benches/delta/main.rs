//! What an epoch's pages become before they are shipped, and how fast: on pages of real programs.
//!
//! `cargo bench --bench delta -- [--json FILE] [--quick]`, as root.
//!
//! redis (counters that are incremented), PostgreSQL (under pgbench), Python (a heap of objects that are changed) and a
//! program that fills pages with random bytes run in a sandbox, one after the other. Every 200 ms they are frozen, and the
//! pages that changed since are recorded. The epochs so recorded are encoded again and again, in turn, with each method:
//!
//! | method | what it does with the changed pages |
//! |---|---|
//! | standin | as the agent encodes them while it has not measured the link: zero and unchanged pages, patches, packing |
//! | standin-10g | the same for a link that ships 10 Gbit/s |
//! | standin-1g | the same for one of 1 Gbit/s |
//! | standin-100m | the same for one of 100 Mbit/s |
//! | lz4 | LZ4 of 256 pages at a time |
//! | zstd-1 | zstd at level 1 of 256 pages at a time |
//!
//! `ratio` is shipped ÷ changed bytes, frames' heads included; `gb_s` is changed bytes ÷ CPU time, on one core; `staged_gb_s`
//! the same for what the standby's store does with them, up to the commit, in RAM. Every method's output is read back and
//! compared.

mod memory;
mod record;
#[path = "../common/sandbox.rs"]
mod sandbox;
mod standby;

use std::{fs, path::PathBuf, time::Duration};

use nix::time::ClockId;
use standin::{
    delta::{BATCH_PAGES_MAX, BatchHead, Encoder, Form, Known, Packing, PageRun},
    model::{Extent, PAGE_SIZE, Space},
    wire::{frame, message::FrameHead},
};

use self::{
    memory::Memory,
    record::{PROGRAMS, Piece, Recording, Result, record},
    standby::Standby,
};

const EPOCHS: usize = 16;
const EPOCHS_QUICK: usize = 8;
/// How often each method encodes a recording, in turn.
const ROUNDS: usize = 3;
const ROUNDS_QUICK: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    Standin,
    StandinOver { mbit_per_s: u64 },
    Lz4,
    Zstd,
}

const METHODS: [Method; 6] = [
    Method::Standin,
    Method::StandinOver { mbit_per_s: 10_000 },
    Method::StandinOver { mbit_per_s: 1_000 },
    Method::StandinOver { mbit_per_s: 100 },
    Method::Lz4,
    Method::Zstd,
];

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::Standin => "standin",
            Self::StandinOver { mbit_per_s: 10_000 } => "standin-10g",
            Self::StandinOver { mbit_per_s: 1_000 } => "standin-1g",
            Self::StandinOver { .. } => "standin-100m",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd-1",
        }
    }
}

#[derive(serde::Serialize)]
struct Row {
    source: &'static str,
    method: &'static str,
    ratio: f64,
    gb_s: f64,
    staged_gb_s: f64,
}

/// What one encoding of a recording came to.
struct Run {
    shipped_bytes: u64,
    encoding: Duration,
    staging: Duration,
}

impl Run {
    /// Takes in an epoch; the first is none of those that count.
    fn add(
        &mut self,
        epoch: usize,
        batches: Vec<(BatchHead, Vec<u8>)>,
        encoding: Duration,
        staging: Duration,
    ) -> Result<()> {
        if epoch > 0 {
            self.shipped_bytes += bytes_of(batches)?;
            self.encoding += encoding;
            self.staging += staging;
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let (mut json, mut epochs, mut rounds) = (None, EPOCHS, ROUNDS);
    let mut rest = std::env::args().skip(1);
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--json" => json = Some(PathBuf::from(rest.next().ok_or("--json needs a file")?)),
            "--quick" => (epochs, rounds) = (EPOCHS_QUICK, ROUNDS_QUICK),
            // Cargo's own.
            "--bench" => {}
            other => return Err(format!("{other}: what is it? usage: delta [--json FILE] [--quick]").into()),
        }
    }
    let mut rows = Vec::new();
    println!("{:<11} {:<13} {:>7} {:>7} {:>12}", "source", "method", "ratio", "GB/s", "staged GB/s");
    for program in PROGRAMS {
        let recording = record(program, epochs)?;
        let (epochs, bytes) = (recording.epochs.len() - 1, recording.dirty_bytes());
        println!(
            "{}: {epochs} epochs, {:.1} MB changed in each",
            recording.source,
            bytes as f64 / epochs as f64 / 1e6
        );
        for row in measure(&recording, rounds)? {
            println!(
                "{:<11} {:<13} {:>7.4} {:>7.2} {:>12.2}",
                row.source, row.method, row.ratio, row.gb_s, row.staged_gb_s
            );
            rows.push(row);
        }
    }
    if let Some(path) = json {
        fs::write(path, serde_json::to_vec_pretty(&rows)?)?;
    }
    Ok(())
}

fn measure(recording: &Recording, rounds: usize) -> Result<Vec<Row>> {
    let mut runs: Vec<(Method, Vec<Run>)> = METHODS.map(|method| (method, Vec::new())).into();
    for _ in 0..rounds {
        for (method, runs) in &mut runs {
            runs.push(match *method {
                Method::Standin => standin(recording, None)?,
                Method::StandinOver { mbit_per_s } => standin(recording, Some(mbit_per_s))?,
                Method::Lz4 => plain(recording, Packing::Lz4)?,
                Method::Zstd => plain(recording, Packing::Zstd)?,
            });
        }
    }
    let dirty = recording.dirty_bytes() as f64;
    let row = |(method, runs): (Method, Vec<Run>)| {
        let gb_s = |time: fn(&Run) -> Duration| {
            let mut times: Vec<Duration> = runs.iter().map(time).collect();
            times.sort_unstable();
            dirty / 1e9 / times[times.len() / 2].as_secs_f64()
        };
        Row {
            source: recording.source,
            method: method.name(),
            ratio: runs[0].shipped_bytes as f64 / dirty,
            gb_s: gb_s(|run| run.encoding),
            staged_gb_s: gb_s(|run| run.staging),
        }
    };
    Ok(runs.into_iter().map(row).collect())
}

fn thread_time() -> Result<Duration> {
    Ok(ClockId::CLOCK_THREAD_CPUTIME_ID.now()?.into())
}

/// Encodes the epochs behind the first as the agent does.
fn standin(recording: &Recording, mbit_per_s: Option<u64>) -> Result<Run> {
    let (mut known, mut encoder, mut standby) = (Known::default(), Encoder::new(), Standby::new()?);
    if let Some(mbit_per_s) = mbit_per_s {
        encoder.link().shipped(mbit_per_s * 125_000, Duration::from_secs(1));
    }
    let mut run = Run { shipped_bytes: 0, encoding: Duration::ZERO, staging: Duration::ZERO };
    for (epoch, pieces) in recording.epochs.iter().enumerate() {
        let mut batches = Vec::new();
        let began = thread_time()?;
        known.begin_epoch(epoch > 0);
        for Piece { space, extents, data } in pieces {
            known.mark_stale(*space, extents);
            let at = known.stamp();
            encoder.encode(&mut known, *space, extents, data, at, |head, body| batches.push((head, body)));
        }
        known.epoch_committed();
        let encoding = thread_time()?.saturating_sub(began);
        let staging = standby.receive(pieces, &batches)?;
        run.add(epoch, batches, encoding, staging)?;
    }
    compare(recording, &standby)?;
    Ok(run)
}

/// Packs the pages of the epochs behind the first as they are.
fn plain(recording: &Recording, packing: Packing) -> Result<Run> {
    let mut zstd = zstd::bulk::Compressor::new(1)?;
    let mut packed = |pages: &[u8]| -> Result<Vec<u8>> {
        Ok(match packing {
            Packing::Zstd => zstd.compress(pages)?,
            _ => lz4_flex::block::compress(pages),
        })
    };
    let mut standby = Standby::new()?;
    let mut run = Run { shipped_bytes: 0, encoding: Duration::ZERO, staging: Duration::ZERO };
    for (epoch, pieces) in recording.epochs.iter().enumerate() {
        let mut batches = Vec::new();
        let began = thread_time()?;
        for Piece { space, extents, data } in pieces {
            let mut runs = runs_of(extents);
            for pages in data.chunks(BATCH_PAGES_MAX * PAGE_SIZE as usize) {
                let runs = take(&mut runs, pages.len() as u64 / PAGE_SIZE);
                let body = packed(pages)?;
                batches.push(batch(*space, runs, packing, body, pages));
            }
        }
        let encoding = thread_time()?.saturating_sub(began);
        let staging = standby.receive(pieces, &batches)?;
        run.add(epoch, batches, encoding, staging)?;
    }
    compare(recording, &standby)?;
    Ok(run)
}

fn batch(
    space: Space,
    runs: Vec<PageRun>,
    packing: Packing,
    body: Vec<u8>,
    pages: &[u8],
) -> (BatchHead, Vec<u8>) {
    let (packing, body) =
        if body.len() < pages.len() { (packing, body) } else { (Packing::Raw, pages.to_vec()) };
    (BatchHead { space, runs, form: Form::Pages, packing }, body)
}

fn runs_of(extents: &[Extent]) -> std::collections::VecDeque<PageRun> {
    extents.iter().map(|e| PageRun { start: e.start, pages: e.pages as u32, zero: false }).collect()
}

/// Takes so many pages off.
fn take(runs: &mut std::collections::VecDeque<PageRun>, mut pages: u64) -> Vec<PageRun> {
    let mut taken = Vec::new();
    while pages > 0 {
        let mut run = runs.pop_front().expect("as many pages as there are");
        let count = pages.min(run.pages.into()) as u32;
        if count < run.pages {
            runs.push_front(PageRun {
                start: run.start + u64::from(count) * PAGE_SIZE,
                pages: run.pages - count,
                ..run
            });
            run.pages = count;
        }
        pages -= u64::from(count);
        taken.push(run);
    }
    taken
}

/// What the batches are on the wire.
fn bytes_of(batches: Vec<(BatchHead, Vec<u8>)>) -> Result<u64> {
    let mut bytes = 0;
    for (head, body) in batches {
        bytes += (frame::encode_frame(&FrameHead::Pages(head), body.len())?.len() + body.len()) as u64;
    }
    Ok(bytes)
}

/// The standby must hold what the program had at the end.
fn compare(recording: &Recording, standby: &Standby) -> Result<()> {
    let mut truth = Memory::default();
    for Piece { space, extents, data } in recording.epochs.iter().flatten() {
        truth.differing(*space, extents, data);
    }
    standby.compare(&truth).map_err(|error| format!("{}: {error}", recording.source).into())
}
