//! What the standby holds, page by page.
//!
//! ```text
//!              encode (sent)              mark_stale
//!   unknown ───────────────────► known ───────────────► stale
//!      ▲                           ▲ ◄──────────────────  │
//!      │  epoch_failed (if sent),  │  encode: content is   │
//!      └── retain, clear ──────────┘  unchanged, or sent ──┘
//! ```
//!
//! - *known*: the standby holds (or will, once the epochs in flight are committed) the content whose
//!   fingerprint is kept, and no pass has reported the page since that content was read.
//! - *stale*: a pass has reported it. The fingerprint still tells what the standby holds, so that a page that
//!   was written with what it held before is not sent again.
//! - *unknown*: what the standby holds is uncertain, or nothing.
//!
//! Invariants:
//! - A page becomes known only through content that was read after the last pass that reported it. The
//!   [`ReadStamp`] of a reading proves that; an older reading changes nothing.
//! - When an epoch fails, every page sent in it or in a later one is unknown: the standby may or may not have
//!   folded it in.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    ops::Range,
};

use crate::{
    extents,
    model::{Extent, PAGE_SIZE, Space},
    wire::message::Manifest,
};

/// Pages of a leaf: 2 MiB.
const LEAF_PAGES: u64 = 512;

/// The first 16 bytes of a page's BLAKE3, or one of two special values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fingerprint(u128);

impl Fingerprint {
    /// Of no page: nothing is known.
    const UNKNOWN: Self = Self(0);
    /// Of a page of zeroes, so that those need no hashing.
    const ZERO: Self = Self(1);

    fn of(page: &[u8]) -> Self {
        let hash = blake3::hash(page);
        let first = hash.as_bytes().first_chunk().expect("a BLAKE3 hash has 32 bytes");
        // Never one of the special values.
        Self(u128::from_le_bytes(*first).max(2))
    }
}

/// Content of a page that is to be compared with what the standby holds.
#[derive(Clone, Copy)]
pub(super) enum PageContent<'a> {
    Zero,
    Bytes(&'a [u8]),
}

/// Whether a page that was read must be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The standby holds it already.
    Unchanged,
    /// It differs, or what the standby holds is unknown.
    Send,
    /// A pass has reported it since it was read: a newer reading must come.
    Outdated,
}

/// A point in the order of passes and readings; take it *after* marking a pass and *before* reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReadStamp(u64);

struct Leaf {
    fingerprints: [Fingerprint; LEAF_PAGES as usize],
    /// When the last pass reported the page.
    marked: [u64; LEAF_PAGES as usize],
    /// A bit for each page that is known and not stale: a whole image is checked against these in the freeze.
    fresh: [u64; LEAF_WORDS],
}

const WORD_BITS: usize = u64::BITS as usize;
const LEAF_WORDS: usize = LEAF_PAGES as usize / WORD_BITS;

impl Leaf {
    fn new(marked: u64) -> Box<Self> {
        Box::new(Self {
            fingerprints: [Fingerprint::UNKNOWN; LEAF_PAGES as usize],
            marked: [marked; LEAF_PAGES as usize],
            fresh: [0; LEAF_WORDS],
        })
    }

    /// Makes pages unknown, and readings that are older than `floor` worthless.
    fn forget(&mut self, slots: Range<usize>, floor: u64) {
        self.fingerprints[slots.clone()].fill(Fingerprint::UNKNOWN);
        self.marked[slots.clone()].fill(floor);
        self.set_fresh(slots, false);
    }

    fn is_fresh(&self, slot: usize) -> bool {
        self.fresh[slot / WORD_BITS] & 1 << (slot % WORD_BITS) != 0
    }

    fn set_fresh(&mut self, slots: Range<usize>, fresh: bool) {
        for (word, mask) in words_of(slots) {
            if fresh {
                self.fresh[word] |= mask;
            } else {
                self.fresh[word] &= !mask;
            }
        }
    }

    /// Whether all of the pages are known and not stale.
    fn all_fresh(&self, slots: Range<usize>) -> bool {
        words_of(slots).all(|(word, mask)| self.fresh[word] & mask == mask)
    }
}

/// Leaves by address of their first page.
type PageTable = BTreeMap<u64, Box<Leaf>>;

/// What the standby holds, per page of each address space: some 24 bytes for each page of 4096.
#[derive(Default)]
pub struct Known {
    spaces: HashMap<Space, PageTable>,
    /// Grows with each stamp that is taken after a pass.
    clock: u64,
    marked_since_stamp: bool,
    /// What is assumed of pages without a leaf: they may have been reported at this time.
    floor: u64,
    /// Pages sent in each epoch that is neither committed nor failed, oldest first.
    in_flight: VecDeque<Vec<(Space, Extent)>>,
}

impl Known {
    /// Nothing is known.
    pub fn new() -> Self {
        Self::default()
    }

    /// Pages that a pass has reported: they must be read again before the next commit.
    pub fn mark_stale(&mut self, space: Space, reported: &[Extent]) {
        self.marked_since_stamp = true;
        let (now, floor) = (self.clock + 1, self.floor);
        let table = self.spaces.entry(space).or_default();
        for (leaf_at, slots) in reported.iter().flat_map(leaves_of) {
            let leaf = table.entry(leaf_at).or_insert_with(|| Leaf::new(floor));
            leaf.marked[slots.clone()].fill(now);
            leaf.set_fresh(slots, false);
        }
    }

    /// The point in time for a reading that is about to begin.
    pub fn stamp(&mut self) -> ReadStamp {
        if self.marked_since_stamp {
            self.clock += 1;
            self.marked_since_stamp = false;
        }
        ReadStamp(self.clock)
    }

    /// Whether the standby holds the page as it is now.
    pub fn is_known(&self, space: Space, page: u64) -> bool {
        let (leaf_at, slot) = place_of(page);
        let leaf = self.spaces.get(&space).and_then(|table| table.get(&leaf_at));
        leaf.is_some_and(|leaf| leaf.is_fresh(slot))
    }

    /// Pages that an image needs and that are unknown or stale. Sorted and merged, if `needed` is.
    pub fn missing(&self, space: Space, needed: &[Extent]) -> Vec<Extent> {
        let table = self.spaces.get(&space);
        let mut missing = Vec::new();
        for (leaf_at, slots) in needed.iter().flat_map(leaves_of) {
            let leaf = table.and_then(|table| table.get(&leaf_at));
            if leaf.is_some_and(|leaf| leaf.all_fresh(slots.clone())) {
                continue;
            }
            for slot in slots {
                if !leaf.is_some_and(|leaf| leaf.is_fresh(slot)) {
                    let start = leaf_at + slot as u64 * PAGE_SIZE;
                    extents::push(&mut missing, start, start + PAGE_SIZE);
                }
            }
        }
        missing
    }

    /// Forgets pages that an epoch's image does not hold, because the standby drops them with it.
    pub fn retain(&mut self, manifest: &Manifest) {
        // A reading from before now must not bring a forgotten page back, nor one whose mark is forgotten.
        self.floor = self.clock + u64::from(self.marked_since_stamp);
        let held: HashSet<Space> = manifest.spaces.iter().map(|map| map.space).collect();
        self.spaces.retain(|space, _| held.contains(space));
        for map in &manifest.spaces {
            if let Some(table) = self.spaces.get_mut(&map.space) {
                retain_pages(table, &map.extents, self.floor);
            }
        }
    }

    /// Forgets everything: the next epoch sends all memory.
    pub fn clear(&mut self) {
        self.spaces.clear();
        self.in_flight.clear();
        self.floor = self.clock + u64::from(self.marked_since_stamp);
    }

    /// Begins an epoch: what is encoded from now on belongs to it. Epochs may be in flight together; they are
    /// committed in order, and fail together.
    pub fn begin_epoch(&mut self) {
        self.in_flight.push_back(Vec::new());
    }

    /// The oldest epoch in flight is committed.
    pub fn epoch_committed(&mut self) {
        self.in_flight.pop_front();
    }

    /// The oldest epoch in flight has failed, and with it all later ones: what they sent is unknown.
    pub fn epoch_failed(&mut self) {
        for (space, extent) in self.in_flight.drain(..).flatten() {
            let Some(table) = self.spaces.get_mut(&space) else { continue };
            for (leaf_at, slots) in leaves_of(&extent) {
                if let Some(leaf) = table.get_mut(&leaf_at) {
                    leaf.fingerprints[slots.clone()].fill(Fingerprint::UNKNOWN);
                    leaf.set_fresh(slots, false);
                }
            }
        }
    }

    /// Takes note of a page's content and says whether it must be sent; if so the caller sends it.
    pub(super) fn judge(
        &mut self,
        space: Space,
        page: u64,
        content: PageContent<'_>,
        at: ReadStamp,
    ) -> Verdict {
        let (leaf_at, slot) = place_of(page);
        let floor = self.floor;
        let table = self.spaces.entry(space).or_default();
        let leaf = table.entry(leaf_at).or_insert_with(|| Leaf::new(floor));
        if leaf.marked[slot] > at.0 {
            return Verdict::Outdated;
        }
        let fingerprint = match content {
            PageContent::Zero => Fingerprint::ZERO,
            PageContent::Bytes(bytes) => Fingerprint::of(bytes),
        };
        leaf.set_fresh(slot..slot + 1, true);
        if leaf.fingerprints[slot] == fingerprint {
            return Verdict::Unchanged;
        }
        leaf.fingerprints[slot] = fingerprint;
        let sent = self.in_flight.back_mut().expect("pages are encoded between begin_epoch and its outcome");
        match sent.last_mut() {
            Some((last, run)) if *last == space && run.end() == page => run.pages += 1,
            _ => sent.push((space, Extent { start: page, pages: 1 })),
        }
        Verdict::Send
    }
}

/// Forgets all but the pages of an ascending list. Leaves move, their content does not: a manifest comes with
/// every epoch.
fn retain_pages(table: &mut PageTable, held: &[Extent], floor: u64) {
    let mut kept = PageTable::new();
    // The leaf that is being worked on, and its first page that the list has not come to.
    let mut current: Option<(u64, Box<Leaf>, usize)> = None;
    let mut finish = |current: Option<(u64, Box<Leaf>, usize)>| {
        if let Some((at, mut leaf, next)) = current {
            leaf.forget(next..LEAF_PAGES as usize, floor);
            kept.insert(at, leaf);
        }
    };
    for (leaf_at, slots) in held.iter().flat_map(leaves_of) {
        if current.as_ref().is_none_or(|(at, ..)| *at != leaf_at) {
            finish(current.take());
            current = table.remove(&leaf_at).map(|leaf| (leaf_at, leaf, 0));
        }
        if let Some((_, leaf, next)) = &mut current {
            leaf.forget(*next..slots.start.max(*next), floor);
            *next = slots.end.max(*next);
        }
    }
    finish(current);
    *table = kept;
}

/// The leaf of a page and its place in it.
fn place_of(page: u64) -> (u64, usize) {
    let number = page / PAGE_SIZE;
    (number / LEAF_PAGES * LEAF_PAGES * PAGE_SIZE, (number % LEAF_PAGES) as usize)
}

/// The words of a leaf's bits that hold some pages, and which bits of each those are.
fn words_of(slots: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let Range { start, end } = slots;
    let words = if start < end { start / WORD_BITS..end.div_ceil(WORD_BITS) } else { 0..0 };
    words.map(move |word| {
        let first = start.saturating_sub(word * WORD_BITS);
        let past = (end - word * WORD_BITS).min(WORD_BITS);
        (word, u64::MAX >> (WORD_BITS - (past - first)) << first)
    })
}

/// The parts of the leaves that a run covers.
fn leaves_of(extent: &Extent) -> impl Iterator<Item = (u64, Range<usize>)> + use<> {
    let Extent { start, pages } = *extent;
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == pages {
            return None;
        }
        let (leaf_at, slot) = place_of(start + done * PAGE_SIZE);
        let count = (LEAF_PAGES - slot as u64).min(pages - done);
        done += count;
        Some((leaf_at, slot..slot + count as usize))
    })
}
