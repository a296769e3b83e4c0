//! Packs pages that were read into batches, leaving out what the standby holds.

use std::sync::Arc;

use super::{
    BATCH_PAGES_MAX, BATCH_RUNS_MAX, BatchHead, Form, Known, LinkRate, PATCH_LEN_MAX, PageRun, ReadStamp,
    digest_of,
    known::{Candidate, Verdict},
    packing::Packer,
    patch::Page,
};
use crate::model::{Extent, PAGE_SIZE, Space};

const PAGE: usize = PAGE_SIZE as usize;
/// What a patched page takes beside the bytes of its patch, on both hosts: digests, and reading the base.
const PATCH_NS: f64 = 1500.0;
/// Pages that are hashed at once: of so many BLAKE3 hashes eight or sixteen parts side by side, of one only four.
const HASHED_PAGES: usize = 16;

/// What was encoded, in pages and bytes, since the encoder was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeStats {
    /// Pages given to [`Encoder::encode`].
    pub pages: u64,
    /// Of them: the standby holds the same content.
    pub unchanged: u64,
    /// Of them: sent as zero, without bytes.
    pub zero: u64,
    /// Of them: sent as a patch.
    pub patched: u64,
    /// Of them: sent whole.
    pub sent: u64,
    /// Of them: reported by a pass since they were read; a newer reading must follow.
    pub outdated: u64,
    /// Bytes of all bodies.
    pub body_bytes: u64,
}

/// Packs pages into batches. Keep one for each workload: it learns how its pages are best packed.
#[derive(Default)]
pub struct Encoder {
    stats: EncodeStats,
    link: Arc<LinkRate>,
    whole: Open,
    patched: Open,
    digest: Digest,
}

/// A batch that is being filled.
#[derive(Default)]
struct Open {
    runs: Vec<PageRun>,
    /// Non-zero pages in it.
    pages: usize,
    /// What the body is to hold.
    bytes: Vec<u8>,
    packer: Packer,
}

/// Of the pages that patches make.
#[derive(Default)]
struct Digest {
    hasher: blake3::Hasher,
    /// Pages that are not hashed yet.
    waiting: Vec<u8>,
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

    /// The rate at which batches are shipped, to be told by who ships them; it decides how they are packed.
    pub fn link(&self) -> Arc<LinkRate> {
        Arc::clone(&self.link)
    }

    /// Encodes pages that were read at `at`, each page once: `data` is their content, one after the other. Between
    /// [`Known::begin_epoch`] and the epoch's outcome only; each batch is given to `emit`, which must send it
    /// in that epoch, in this order.
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
        let (pages, rest) = data.as_chunks::<PAGE>();
        assert!(rest.is_empty(), "whole pages");
        assert_eq!(crate::extents::pages(extents), pages.len() as u64, "pages and their content");
        let len_max = self.patch_len_max();
        let starts = extents.iter().flat_map(|e| (0..e.pages).map(|i| e.start + i * PAGE_SIZE));
        for (page, content) in starts.zip(pages) {
            self.make_room(space, &mut emit);
            self.stats.pages += 1;
            let candidate = Candidate { space, page, content, at };
            match known.judge(candidate, &mut self.patched.bytes, len_max) {
                Verdict::Unchanged => self.stats.unchanged += 1,
                Verdict::Outdated => self.stats.outdated += 1,
                Verdict::Zero => {
                    self.stats.zero += 1;
                    self.whole.add(page, true);
                }
                Verdict::Send => {
                    self.stats.sent += 1;
                    self.whole.bytes.extend_from_slice(content);
                    self.whole.add(page, false);
                }
                Verdict::Patched => {
                    self.stats.patched += 1;
                    self.digest.add(content);
                    self.patched.add(page, false);
                }
            }
        }
        self.flush_whole(space, &mut emit);
        self.flush_patched(space, &mut emit);
    }

    /// Most bytes of a patch for which it takes less time, with its shipping, than the whole page does.
    fn patch_len_max(&self) -> usize {
        let rate = self.link.get();
        let whole_ns = self.whole.packer.ns_per_byte(rate) * PAGE as f64;
        let len = (whole_ns - PATCH_NS) / self.patched.packer.ns_per_byte(rate);
        (len.max(0.0) as usize).min(PATCH_LEN_MAX)
    }

    /// Sends what has no room for another page. Before the page is judged, which adds its patch.
    fn make_room(&mut self, space: Space, emit: &mut impl FnMut(BatchHead, Vec<u8>)) {
        if self.whole.is_full() {
            self.flush_whole(space, emit);
        }
        if self.patched.is_full() {
            self.flush_patched(space, emit);
        }
    }

    fn flush_whole(&mut self, space: Space, emit: &mut impl FnMut(BatchHead, Vec<u8>)) {
        self.stats.body_bytes += self.whole.flush(space, Form::Pages, self.link.get(), emit);
    }

    fn flush_patched(&mut self, space: Space, emit: &mut impl FnMut(BatchHead, Vec<u8>)) {
        if self.patched.runs.is_empty() {
            return;
        }
        let form = Form::Patches { len: self.patched.bytes.len() as u32, digest: self.digest.take() };
        self.stats.body_bytes += self.patched.flush(space, form, self.link.get(), emit);
    }
}

impl Open {
    fn is_full(&self) -> bool {
        self.pages == BATCH_PAGES_MAX || self.runs.len() == BATCH_RUNS_MAX
    }

    fn add(&mut self, start: u64, zero: bool) {
        self.pages += usize::from(!zero);
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

    /// Emits what there is; the body's length.
    fn flush(
        &mut self,
        space: Space,
        form: Form,
        rate: u64,
        emit: &mut impl FnMut(BatchHead, Vec<u8>),
    ) -> u64 {
        if self.runs.is_empty() {
            return 0;
        }
        let (packing, body) = self.packer.pack(&self.bytes, rate);
        let runs = std::mem::take(&mut self.runs);
        self.pages = 0;
        self.bytes.clear();
        let len = body.len() as u64;
        emit(BatchHead { space, runs, form, packing }, body);
        len
    }
}

impl Digest {
    fn add(&mut self, page: &Page) {
        self.waiting.extend_from_slice(page);
        if self.waiting.len() == HASHED_PAGES * PAGE {
            self.hasher.update(&self.waiting);
            self.waiting.clear();
        }
    }

    /// Of the pages since the last call.
    fn take(&mut self) -> [u8; super::DIGEST_LEN] {
        self.hasher.update(&self.waiting);
        self.waiting.clear();
        let digest = digest_of(&self.hasher);
        self.hasher.reset();
        digest
    }
}
