//! Copies of pages as the standby holds them, which patches are made against. Bounded: what is over the limit is not kept,
//! or takes the place of a copy that has long been of no use.

use super::patch::Page;
use crate::model::{PAGE_SIZE, Space};

const PAGE: usize = PAGE_SIZE as usize;
/// Memory for copies is taken in pieces of so many pages (1 MiB), and kept.
const CHUNK_PAGES: usize = 256;
/// A copy may be replaced when so many epochs have not used it. Those of the last epochs are kept even if others then
/// have no room: of a dirty set that is larger than the memory for it, a part always has copies, where replacing the
/// oldest would leave every page without one when its turn comes.
const UNUSED_EPOCHS_MIN: u64 = 8;
/// Most copies that are looked at for one to replace.
const LOOK_MAX: usize = 16;

/// A copy's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot(u32);

impl Slot {
    /// Of a page without a copy.
    pub(super) const NONE: Self = Self(u32::MAX);
}

#[derive(Clone, Copy)]
struct Owner {
    space: Space,
    page: u64,
    /// The epoch in which it served last.
    used: u64,
}

/// The copies.
pub(super) struct References {
    chunks: Vec<Box<[u8]>>,
    /// Whose copy is in each slot; `None` for those that are free.
    owners: Vec<Option<Owner>>,
    free: Vec<Slot>,
    pages_max: usize,
    /// Where the search for a copy to replace goes on.
    hand: usize,
}

impl References {
    /// Room for so many bytes of copies.
    pub(super) fn new(bytes_max: u64) -> Self {
        // A slot's number must differ from `Slot::NONE`: 16 TiB is the limit.
        let pages_max = (bytes_max / PAGE_SIZE).min(u64::from(u32::MAX - 1)) as usize;
        Self { chunks: Vec::new(), owners: Vec::new(), free: Vec::new(), pages_max, hand: 0 }
    }

    pub(super) fn copy(&mut self, slot: Slot) -> &mut Page {
        let (chunk, at) = (slot.0 as usize / CHUNK_PAGES, slot.0 as usize % CHUNK_PAGES * PAGE);
        (&mut self.chunks[chunk][at..at + PAGE]).try_into().expect("a slot is a page long")
    }

    /// The copy has served in this epoch.
    pub(super) fn used(&mut self, slot: Slot, epoch: u64) {
        if let Some(owner) = &mut self.owners[slot.0 as usize] {
            owner.used = epoch;
        }
    }

    /// The copy is of no use: the first to be replaced.
    pub(super) fn useless(&mut self, slot: Slot) {
        self.used(slot, 0);
    }

    /// Makes room for one more, as far as that is possible. If a copy must go for it, the page that it is of.
    pub(super) fn make_room(&mut self, epoch: u64) -> Option<(Space, u64, Slot)> {
        if !self.free.is_empty() || self.owners.len() < self.pages_max {
            return None;
        }
        for _ in 0..LOOK_MAX.min(self.owners.len()) {
            self.hand = (self.hand + 1) % self.owners.len();
            if let Some(owner) = self.owners[self.hand]
                && owner.used + UNUSED_EPOCHS_MIN <= epoch
            {
                return Some((owner.space, owner.page, Slot(self.hand as u32)));
            }
        }
        None
    }

    /// Keeps a copy, if there is room.
    pub(super) fn keep(&mut self, space: Space, page: u64, content: &Page, epoch: u64) -> Slot {
        let owner = Some(Owner { space, page, used: epoch });
        let slot = if let Some(slot) = self.free.pop() {
            self.owners[slot.0 as usize] = owner;
            slot
        } else if self.owners.len() < self.pages_max {
            self.owners.push(owner);
            Slot(self.owners.len() as u32 - 1)
        } else {
            return Slot::NONE;
        };
        if slot.0 as usize / CHUNK_PAGES == self.chunks.len() {
            let pages = CHUNK_PAGES.min(self.pages_max - self.chunks.len() * CHUNK_PAGES);
            self.chunks.push(vec![0; pages * PAGE].into_boxed_slice());
        }
        *self.copy(slot) = *content;
        slot
    }

    /// Forgets a copy, if there is one.
    pub(super) fn release(&mut self, slot: &mut Slot) {
        let slot = std::mem::replace(slot, Slot::NONE);
        if slot != Slot::NONE {
            self.owners[slot.0 as usize] = None;
            self.free.push(slot);
        }
    }

    /// Forgets all, and gives the memory back.
    pub(super) fn clear(&mut self) {
        *self = Self { pages_max: self.pages_max, ..Self::new(0) };
    }

    /// Number of copies.
    pub(super) fn len(&self) -> usize {
        self.owners.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: Space = Space::Task(1);

    fn page(value: u8) -> Page {
        [value; PAGE]
    }

    #[test]
    fn no_more_is_kept_than_the_limit_and_what_serves_stays() {
        let mut references = References::new(3 * PAGE_SIZE + 1);
        let slots = [1, 2, 3].map(|n| references.keep(SPACE, n * PAGE_SIZE, &page(n as u8), 1));
        assert_eq!(references.keep(SPACE, 4 * PAGE_SIZE, &page(4), 1), Slot::NONE);
        assert_eq!(references.make_room(UNUSED_EPOCHS_MIN), None);
        let epoch = 1 + UNUSED_EPOCHS_MIN;
        references.used(slots[0], epoch);
        references.used(slots[2], epoch);
        let (space, at, mut slot) = references.make_room(epoch).unwrap();
        assert_eq!((space, at, slot), (SPACE, 2 * PAGE_SIZE, slots[1]));
        references.release(&mut slot);
        assert_eq!(slot, Slot::NONE);
        assert_eq!(references.keep(SPACE, 4 * PAGE_SIZE, &page(4), epoch), slots[1]);
        assert_eq!(references.make_room(epoch), None);
        assert_eq!(references.len(), 3);
        assert!(slots.iter().zip([1, 4, 3]).all(|(slot, value)| *references.copy(*slot) == page(value)));
    }

    #[test]
    fn without_a_limit_nothing_is_kept() {
        let mut references = References::new(PAGE_SIZE - 1);
        assert_eq!(references.keep(SPACE, 0, &page(1), 1), Slot::NONE);
        assert_eq!(references.make_room(100), None);
    }
}
