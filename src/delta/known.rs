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
//! - *unknown*: what the standby holds is uncertain, or nothing; or only the standby's word for it is there
//!   ([`Known::offer`]), which makes a page stale when it is judged first.
//!
//! Invariants:
//! - A page becomes known only through content that was read after the last pass that reported it. The
//!   [`ReadStamp`] of a reading proves that; an older reading changes nothing.
//! - When an epoch fails, every page sent in it or in a later one is unknown: the standby may or may not have
//!   folded it in.
//! - The copy of a page, where there is one, is what its fingerprint would be of: what the standby holds. It goes when
//!   the page becomes unknown.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    ops::Range,
};

use super::{
    offered::{self, KEY_LEN, Offered, SUM_LEN},
    patch::{self, Page},
    reference::{References, Slot},
};
use crate::{
    extents,
    model::{Extent, PAGE_SIZE, Space},
    wire::message::Manifest,
};

/// Pages of a leaf: 2 MiB.
const LEAF_PAGES: u64 = 512;
/// Memory for copies of pages, unless said otherwise.
pub const REFERENCE_BYTES_MAX: u64 = 256 << 20;

/// The first 16 bytes of a page's keyed BLAKE3, or one of three special values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fingerprint(u128);

impl Fingerprint {
    /// Of no page: nothing is known.
    const UNKNOWN: Self = Self(0);
    /// Of a page of zeroes, so that those need no hashing.
    const ZERO: Self = Self(1);
    /// Of a page with a copy, which is compared itself.
    const COPIED: Self = Self(2);

    fn of(key: &[u8; KEY_LEN], page: &Page) -> Self {
        Self::from_hash(offered::hash_of(key, page))
    }

    /// Never one of the special values.
    fn from_hash(hash: [u8; SUM_LEN]) -> Self {
        Self(u128::from_le_bytes(hash).max(3))
    }

    /// What a standby says of a page.
    fn offered(sum: [u8; SUM_LEN]) -> Self {
        if sum == [0; SUM_LEN] { Self::ZERO } else { Self::from_hash(sum) }
    }
}

/// Whether a page that was read must be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The standby holds it already.
    Unchanged,
    /// It is zero and the standby does not hold that.
    Zero,
    /// It differs from what the standby holds by the patch that was appended.
    Patched,
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
    copies: [Slot; LEAF_PAGES as usize],
}

const WORD_BITS: usize = u64::BITS as usize;
const LEAF_WORDS: usize = LEAF_PAGES as usize / WORD_BITS;

impl Leaf {
    fn new(marked: u64) -> Box<Self> {
        Box::new(Self {
            fingerprints: [Fingerprint::UNKNOWN; LEAF_PAGES as usize],
            marked: [marked; LEAF_PAGES as usize],
            fresh: [0; LEAF_WORDS],
            copies: [Slot::NONE; LEAF_PAGES as usize],
        })
    }

    /// Makes what the standby holds of pages unknown.
    fn doubt(&mut self, slots: Range<usize>, references: &mut References) {
        self.fingerprints[slots.clone()].fill(Fingerprint::UNKNOWN);
        self.copies[slots.clone()].iter_mut().for_each(|copy| references.release(copy));
        self.set_fresh(slots, false);
    }

    /// Makes pages unknown, and readings that are older than `floor` worthless.
    fn forget(&mut self, slots: Range<usize>, floor: u64, references: &mut References) {
        self.doubt(slots.clone(), references);
        self.marked[slots].fill(floor);
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

/// An epoch that is neither committed nor failed.
struct Flight {
    sent: Vec<(Space, Extent)>,
    /// It has a base, which its patches may be made against.
    has_base: bool,
}

/// What the standby holds, per page of each address space: some 28 bytes for each page of 4096, and copies of as many pages as
/// there is room for, with 32 bytes each.
pub struct Known {
    spaces: HashMap<Space, PageTable>,
    references: References,
    /// Number of epochs begun.
    epochs: u64,
    /// Grows with each stamp that is taken after a pass.
    clock: u64,
    marked_since_stamp: bool,
    /// What is assumed of pages without a leaf: they may have been reported at this time.
    floor: u64,
    /// What was sent in each epoch that is neither committed nor failed, oldest first.
    in_flight: VecDeque<Flight>,
    /// Of the fingerprints.
    key: [u8; KEY_LEN],
    /// What the standby says it holds, until the end of the first epoch upon it.
    offered: Option<Offered>,
    /// Pages that were found to be what it says, zero pages not counted.
    offered_same: u64,
}

impl Default for Known {
    fn default() -> Self {
        Self::new(REFERENCE_BYTES_MAX)
    }
}

/// A page whose content is to be compared with what the standby holds.
#[derive(Clone, Copy)]
pub(super) struct Candidate<'a> {
    pub(super) space: Space,
    pub(super) page: u64,
    pub(super) content: &'a Page,
    /// When it was read.
    pub(super) at: ReadStamp,
}

impl Known {
    /// Nothing is known. Copies of pages may take so much memory.
    pub fn new(reference_bytes_max: u64) -> Self {
        Self {
            spaces: HashMap::new(),
            references: References::new(reference_bytes_max),
            epochs: 0,
            clock: 0,
            marked_since_stamp: false,
            floor: 0,
            in_flight: VecDeque::new(),
            key: [0; KEY_LEN],
            offered: None,
            offered_same: 0,
        }
    }

    /// Memory that copies of pages take now, bytes.
    pub fn reference_bytes(&self) -> u64 {
        self.references.len() as u64 * PAGE_SIZE
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
        for (_, mut table) in self.spaces.extract_if(|space, _| !held.contains(space)) {
            retain_pages(&mut table, &[], self.floor, &mut self.references);
        }
        for map in &manifest.spaces {
            if let Some(table) = self.spaces.get_mut(&map.space) {
                retain_pages(table, &map.extents, self.floor, &mut self.references);
            }
        }
        // What of it the image holds was judged; the rest goes.
        self.offered = None;
    }

    /// Forgets everything but what the standby says it holds, which the next epoch is to be based upon: it sends what
    /// differs from that.
    pub fn offer(&mut self, offered: Offered) {
        self.clear();
        self.key = offered.key;
        self.offered = Some(offered);
    }

    /// Bytes of memory that were not sent since the last offer, because the standby holds them as it says.
    pub fn offered_same_bytes(&self) -> u64 {
        self.offered_same * PAGE_SIZE
    }

    /// Forgets everything: the next epoch sends all memory.
    pub fn clear(&mut self) {
        (self.offered, self.offered_same) = (None, 0);
        self.spaces.clear();
        self.references.clear();
        self.in_flight.clear();
        self.floor = self.clock + u64::from(self.marked_since_stamp);
    }

    /// Begins an epoch: what is encoded from now on belongs to it. Epochs may be in flight together; they are
    /// committed in order, and fail together. One without a base forgets everything first.
    pub fn begin_epoch(&mut self, has_base: bool) {
        if !has_base {
            self.clear();
        }
        self.epochs += 1;
        self.in_flight.push_back(Flight { sent: Vec::new(), has_base });
    }

    /// The oldest epoch in flight is committed.
    pub fn epoch_committed(&mut self) {
        self.in_flight.pop_front();
    }

    /// The oldest epoch in flight has failed, and with it all later ones: what they sent is unknown.
    pub fn epoch_failed(&mut self) {
        for (space, extent) in self.in_flight.drain(..).flat_map(|flight| flight.sent) {
            let Some(table) = self.spaces.get_mut(&space) else { continue };
            for (leaf_at, slots) in leaves_of(&extent) {
                if let Some(leaf) = table.get_mut(&leaf_at) {
                    leaf.doubt(slots, &mut self.references);
                }
            }
        }
    }

    /// Takes note of a page's content and says whether it must be sent; if so the caller sends it. If a patch of at most
    /// `len_max` bytes does for it, that is appended to `patches`.
    pub(super) fn judge(&mut self, of: Candidate<'_>, patches: &mut Vec<u8>, len_max: usize) -> Verdict {
        let Candidate { space, page, content, at } = of;
        let (leaf_at, slot) = place_of(page);
        let floor = self.floor;
        let table = self.spaces.entry(space).or_default();
        let leaf = table.entry(leaf_at).or_insert_with(|| Leaf::new(floor));
        if leaf.marked[slot] > at.0 {
            return Verdict::Outdated;
        }
        leaf.set_fresh(slot..slot + 1, true);
        let flight =
            self.in_flight.back_mut().expect("pages are encoded between begin_epoch and its outcome");
        let word = self.offered.as_ref().filter(|_| leaf.fingerprints[slot] == Fingerprint::UNKNOWN);
        let word = word.and_then(|offered| offered.get(space, page)).map(Fingerprint::offered);
        let held = word.unwrap_or(leaf.fingerprints[slot]);
        leaf.fingerprints[slot] = held;
        if is_zero(content) {
            if held == Fingerprint::ZERO {
                return Verdict::Unchanged;
            }
            leaf.fingerprints[slot] = Fingerprint::ZERO;
            self.references.release(&mut leaf.copies[slot]);
            flight.sends(space, page);
            return Verdict::Zero;
        }
        let copied = leaf.copies[slot];
        if copied == Slot::NONE {
            let fingerprint = match held {
                Fingerprint::UNKNOWN | Fingerprint::ZERO => None,
                _ => Some(Fingerprint::of(&self.key, content)),
            };
            if fingerprint == Some(held) {
                self.offered_same += u64::from(word.is_some());
                return Verdict::Unchanged;
            }
            flight.sends(space, page);
            self.remember(space, page, content, fingerprint);
            return Verdict::Send;
        }
        let copy = self.references.copy(copied);
        if copy == content {
            return Verdict::Unchanged;
        }
        let patched = flight.has_base && len_max > 0 && patch::append(patches, copy, content, len_max);
        *copy = *content;
        if patched || !flight.has_base {
            self.references.used(copied, self.epochs);
        } else {
            self.references.useless(copied);
        }
        flight.sends(space, page);
        if patched { Verdict::Patched } else { Verdict::Send }
    }

    /// Keeps what the standby will hold of a page: a copy, or if there is no room the fingerprint.
    fn remember(&mut self, space: Space, page: u64, content: &Page, fingerprint: Option<Fingerprint>) {
        if let Some((space, page, mut copied)) = self.references.make_room(self.epochs) {
            let fingerprint = Fingerprint::of(&self.key, self.references.copy(copied));
            self.references.release(&mut copied);
            let (leaf, slot) = self.leaf_of(space, page);
            leaf.fingerprints[slot] = fingerprint;
            leaf.copies[slot] = Slot::NONE;
        }
        let copy = self.references.keep(space, page, content, self.epochs);
        let fingerprint = match fingerprint {
            _ if copy != Slot::NONE => Fingerprint::COPIED,
            Some(fingerprint) => fingerprint,
            None => Fingerprint::of(&self.key, content),
        };
        let (leaf, slot) = self.leaf_of(space, page);
        leaf.copies[slot] = copy;
        leaf.fingerprints[slot] = fingerprint;
    }

    /// The leaf of a page that has one, and its place in it.
    fn leaf_of(&mut self, space: Space, page: u64) -> (&mut Leaf, usize) {
        let (leaf_at, slot) = place_of(page);
        let leaf = self.spaces.get_mut(&space).and_then(|table| table.get_mut(&leaf_at));
        (leaf.expect("a page of which something is kept has a leaf"), slot)
    }
}

impl Flight {
    fn sends(&mut self, space: Space, page: u64) {
        match self.sent.last_mut() {
            Some((last, run)) if *last == space && run.end() == page => run.pages += 1,
            _ => self.sent.push((space, Extent { start: page, pages: 1 })),
        }
    }
}

pub(super) fn is_zero(page: &Page) -> bool {
    const ZERO: Page = [0; PAGE_SIZE as usize];
    // A comparison by memcmp, which ends at the first word of nearly every page that is not zero.
    *page == ZERO
}

/// Forgets all but the pages of an ascending list. Leaves move, their content does not: a manifest comes with
/// every epoch.
fn retain_pages(table: &mut PageTable, held: &[Extent], floor: u64, references: &mut References) {
    const END: usize = LEAF_PAGES as usize;
    let mut kept = PageTable::new();
    // The leaf that is being worked on, and its first page that the list has not come to.
    let mut current: Option<(u64, Box<Leaf>, usize)> = None;
    for (leaf_at, slots) in held.iter().flat_map(leaves_of) {
        if current.as_ref().is_none_or(|(at, ..)| *at != leaf_at) {
            let next = table.remove(&leaf_at).map(|leaf| (leaf_at, leaf, 0));
            if let Some((at, mut leaf, from)) = std::mem::replace(&mut current, next) {
                leaf.forget(from..END, floor, references);
                kept.insert(at, leaf);
            }
        }
        if let Some((_, leaf, next)) = &mut current {
            leaf.forget(*next..slots.start.max(*next), floor, references);
            *next = slots.end.max(*next);
        }
    }
    if let Some((at, mut leaf, from)) = current {
        leaf.forget(from..END, floor, references);
        kept.insert(at, leaf);
    }
    for leaf in std::mem::replace(table, kept).values_mut() {
        leaf.forget(0..END, floor, references);
    }
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
