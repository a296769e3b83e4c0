//! Packs pages that were read into batches, leaving out what the standby holds.

use lz4_flex::block;

use super::{
    BATCH_PAGES_MAX, BATCH_RUNS_MAX, BatchHead, Known, Packing, PageRun, ReadStamp,
    known::{PageContent, Verdict},
};
use crate::model::{Extent, PAGE_SIZE, Space};

const PAGE: usize = PAGE_SIZE as usize;
/// LZ4 is used if it saves at least 1/8: below that, unpacking costs the standby more than the link saves.
const SAVES_AT_LEAST: usize = 8;
/// Most batches that go uncompressed, after some that did not compress, before compression is tried again.
const SKIP_MAX: u32 = 32;

/// What was encoded, in pages and bytes, since the encoder was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeStats {
    /// Pages given to [`Encoder::encode`].
    pub pages: u64,
    /// Of them: the standby holds the same content.
    pub unchanged: u64,
    /// Of them: sent as zero, without bytes.
    pub zero: u64,
    /// Of them: sent with bytes.
    pub sent: u64,
    /// Of them: reported by a pass since they were read; a newer reading must follow.
    pub outdated: u64,
    /// Bytes of all bodies.
    pub body_bytes: u64,
}

/// Packs pages into batches. Keep one for each workload: it remembers whether its pages compress.
#[derive(Default)]
pub struct Encoder {
    stats: EncodeStats,
    runs: Vec<PageRun>,
    raw: Vec<u8>,
    /// Batches to send raw before compression is tried again.
    skip: u32,
    /// How many will be skipped after the next failure.
    patience: u32,
}

impl Encoder {
    /// An encoder that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Totals so far.
    pub fn stats(&self) -> EncodeStats {
        self.stats
    }

    /// Encodes pages that were read at `at`: `data` is their content, one after the other. Between
    /// [`Known::begin_epoch`] and the epoch's outcome only; each batch is given to `emit`, which must send it
    /// in that epoch.
    ///
    /// # Panics
    /// If `data` has not 4096 bytes for each page, or no epoch was begun.
    pub fn encode(
        &mut self,
        known: &mut Known,
        space: Space,
        extents: &[Extent],
        data: &[u8],
        at: ReadStamp,
        mut emit: impl FnMut(BatchHead, Vec<u8>),
    ) {
        assert_eq!(crate::extents::pages(extents), (data.len() / PAGE) as u64, "pages and their content");
        assert_eq!(data.len() % PAGE, 0, "whole pages");
        let starts = extents.iter().flat_map(|e| (0..e.pages).map(|i| e.start + i * PAGE_SIZE));
        for (start, page) in starts.zip(data.chunks_exact(PAGE)) {
            self.stats.pages += 1;
            let zero = is_zero(page);
            let content = if zero { PageContent::Zero } else { PageContent::Bytes(page) };
            match known.judge(space, start, content, at) {
                Verdict::Unchanged => self.stats.unchanged += 1,
                Verdict::Outdated => self.stats.outdated += 1,
                Verdict::Send => {
                    if self.is_full() {
                        self.flush(space, &mut emit);
                    }
                    self.add(start, page, zero);
                }
            }
        }
        self.flush(space, &mut emit);
    }

    fn is_full(&self) -> bool {
        self.raw.len() == BATCH_PAGES_MAX * PAGE || self.runs.len() == BATCH_RUNS_MAX
    }

    fn add(&mut self, start: u64, page: &[u8], zero: bool) {
        if zero {
            self.stats.zero += 1;
        } else {
            self.stats.sent += 1;
            self.raw.extend_from_slice(page);
        }
        match self.runs.last_mut() {
            Some(run)
                if run.zero == zero
                    && run.pages < u32::MAX
                    && run.start + u64::from(run.pages) * PAGE_SIZE == start =>
            {
                run.pages += 1;
            }
            _ => self.runs.push(PageRun { start, pages: 1, zero }),
        }
    }

    fn flush(&mut self, space: Space, emit: &mut impl FnMut(BatchHead, Vec<u8>)) {
        if self.runs.is_empty() {
            return;
        }
        let runs = std::mem::take(&mut self.runs);
        let (packing, body) = match self.compressed() {
            Some(body) => (Packing::Lz4, body),
            None => (Packing::Raw, self.raw.clone()),
        };
        self.raw.clear();
        self.stats.body_bytes += body.len() as u64;
        emit(BatchHead { space, runs, packing }, body);
    }

    /// The pages as an LZ4 block, if that is worth it.
    fn compressed(&mut self) -> Option<Vec<u8>> {
        if self.raw.is_empty() {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        let body = block::compress(&self.raw);
        if body.len() <= self.raw.len() - self.raw.len() / SAVES_AT_LEAST {
            self.patience = 0;
            return Some(body);
        }
        self.patience = (self.patience * 2).clamp(1, SKIP_MAX);
        self.skip = self.patience;
        None
    }
}

fn is_zero(page: &[u8]) -> bool {
    const ZERO: [u8; PAGE] = [0; PAGE];
    // A comparison by memcmp, which ends at the first word of nearly every page that is not zero.
    page == ZERO
}
