//! A range of addresses that one thread maps, moves, protects and writes at random, and a model of what each page of it
//! must hold.
//!
//! Every page has a *stamp*, from which all of its words follow; none is zeroes. A store to one word of it is a *patch*.
//! What the model says and what the memory holds are both in the image, in different pages, so that a restored copy that
//! has lost a page finds out.

use std::{fs::File, ops::Range};

use crate::{
    broken,
    random::Random,
    sys::{self, PAGE},
};

/// Eight huge pages.
pub(crate) const SLOTS: usize = 4096;
pub(crate) const HUGE_SLOTS: usize = 512;
/// Pages of the file that is mapped and read.
pub(crate) const FILE_PAGES: usize = 768;
/// The word of a page that patches go to.
const PATCHED: usize = 77;
const WORDS: usize = PAGE / 8;
const NONE: i32 = libc::PROT_NONE;
const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_WRITE;

/// What is mapped in a page's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Hole,
    Anonymous,
    /// A private page of the file, and which.
    OfFile(u32),
}

/// What the model knows of one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) kind: Kind,
    access: i32,
    /// It may not be touched.
    guard: bool,
    /// After MADV_FREE: it may hold zeroes instead.
    free: bool,
    /// Zeroes, or nothing, in a child.
    wiped_by_fork: bool,
    lost_by_fork: bool,
    /// Neighbours with the same number are in one mapping of the kernel's.
    mapping: u32,
    stamp: u64,
    patch: u64,
}

const HOLE: Slot = Slot {
    kind: Kind::Hole,
    access: NONE,
    guard: false,
    free: false,
    wiped_by_fork: false,
    lost_by_fork: false,
    mapping: 0,
    stamp: 0,
    patch: 0,
};

impl Slot {
    fn mapped(self) -> bool {
        self.kind != Kind::Hole
    }

    pub(crate) fn readable(self) -> bool {
        self.mapped() && self.access & READ != 0 && !self.guard
    }

    pub(crate) fn writable(self) -> bool {
        self.readable() && self.access & WRITE != 0
    }

    fn without_guard(self) -> Self {
        Self { guard: false, ..self }
    }

    /// Without a page of its own: zeroes, or the file's.
    fn emptied(self) -> Self {
        let stamp = if let Kind::OfFile(page) = self.kind { file_stamp(page as usize) } else { 0 };
        Self { stamp, patch: 0, free: false, ..self }
    }
}

/// The stamp of a page of the file.
pub(crate) fn file_stamp(page: usize) -> u64 {
    0xf11e_0000_0000_0001 + page as u64
}

fn word(stamp: u64, at: usize) -> u64 {
    if stamp == 0 { 0 } else { (stamp ^ (at as u64) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15) }
}

/// All of a page by its stamp.
pub(crate) fn page_of(stamp: u64) -> Vec<u8> {
    (0..WORDS).flat_map(|at| word(stamp, at).to_ne_bytes()).collect()
}

/// Whether a page holds what its stamp says, but for one word of the caller's.
pub(crate) fn holds(at: usize, stamp: u64, but: usize) -> bool {
    (0..WORDS).all(|i| i == but || sys::load(at + i * 8) == word(stamp, i))
}

pub(crate) fn fill(at: usize, stamp: u64, but: usize) {
    (0..WORDS).filter(|i| *i != but).for_each(|i| sys::store(at + i * 8, word(stamp, i)));
}

pub(crate) struct Arena {
    start: usize,
    slots: Vec<Slot>,
    mappings: u32,
    stamps: u64,
}

impl Arena {
    /// `number` is one of its own; where no mapping comes by itself.
    pub(crate) fn new(number: u64) -> Self {
        let start = 0x2000_0000_0000 + (number as usize) * 0x1_0000_0000;
        Self { start, slots: vec![HOLE; SLOTS], mappings: 0, stamps: number << 48 }
    }

    pub(crate) fn address(&self, slot: usize) -> usize {
        self.start + slot * PAGE
    }

    pub(crate) fn new_stamp(&mut self) -> u64 {
        self.stamps += 1;
        self.stamps
    }

    /// Neighbours from `from` on, `most` of them, that are all as wanted.
    pub(crate) fn run(&self, from: usize, most: usize, wanted: impl Fn(Slot) -> bool) -> Range<usize> {
        let len = self.slots[from..].iter().take(most).take_while(|slot| wanted(**slot)).count();
        from..from + len
    }

    /// A place and a length, mostly short.
    pub(crate) fn range(random: &mut Random) -> Range<usize> {
        let len = match random.below(16) {
            0..9 => 1 + random.below(8),
            9..14 => 1 + random.below(64),
            _ => 1 + random.below(HUGE_SLOTS),
        };
        let from = random.below(SLOTS);
        from..SLOTS.min(from + len)
    }

    fn mapped_range(&self, random: &mut Random) -> Range<usize> {
        let range = Self::range(random);
        self.run(range.start, range.len(), Slot::mapped)
    }

    fn set(&mut self, range: Range<usize>, change: impl Fn(usize, Slot) -> Slot) {
        for (at, slot) in self.slots[range].iter_mut().enumerate() {
            *slot = change(at, *slot);
        }
    }

    /// The range has other attributes now: each part that was of one mapping is one of its own.
    fn split(&mut self, range: Range<usize>) {
        let mut last = None;
        for slot in &mut self.slots[range] {
            if last.replace(slot.mapping) != Some(slot.mapping) {
                self.mappings += 1;
            }
            slot.mapping = self.mappings;
        }
    }

    /// One random change of what is mapped and how.
    pub(crate) fn change(&mut self, random: &mut Random, file: &File) {
        match random.below(24) {
            0..4 => self.map_memory(random),
            4 | 5 => self.map_file(random, file),
            6 => self.unmap(random),
            7..10 => self.protect(random),
            10 => self.huge(random),
            11..14 => self.advise(random),
            14 | 15 => self.guard(random),
            16 => self.fork_rules(random),
            _ => self.move_part(random),
        }
    }

    fn map_memory(&mut self, random: &mut Random) {
        let range = Self::range(random);
        let flags = [0, libc::MAP_NORESERVE, libc::MAP_POPULATE][random.below(3)];
        self.map(range, flags, None);
    }

    fn map_file(&mut self, random: &mut Random, file: &File) {
        let from = random.below(FILE_PAGES);
        let range = Self::range(random);
        let len = range.len().min(FILE_PAGES - from);
        self.map(range.start..range.start + len, 0, Some((file, from)));
    }

    fn map(&mut self, range: Range<usize>, flags: i32, file: Option<(&File, usize)>) {
        let anonymous = if file.is_some() { 0 } else { libc::MAP_ANONYMOUS };
        let offset = file.map(|(file, page)| (file, page * PAGE));
        let flags = flags | libc::MAP_PRIVATE | anonymous;
        let mapped =
            sys::map(Some(self.address(range.start)), range.len() * PAGE, READ | WRITE, flags, offset);
        mapped.unwrap_or_else(|error| broken(&format!("mmap: {error}")));
        self.mappings += 1;
        let mapping = self.mappings;
        self.set(range, |at, _| {
            let kind = file.map_or(Kind::Anonymous, |(_, page)| Kind::OfFile((page + at) as u32));
            Slot { kind, access: READ | WRITE, mapping, ..HOLE }.emptied()
        });
    }

    fn unmap(&mut self, random: &mut Random) {
        let range = Self::range(random);
        let done = sys::unmap(self.address(range.start), range.len() * PAGE);
        done.unwrap_or_else(|error| broken(&format!("munmap: {error}")));
        self.set(range, |_, _| HOLE);
    }

    fn protect(&mut self, random: &mut Random) {
        let range = self.mapped_range(random);
        // Mostly back to what can be used.
        let access = [NONE, READ, WRITE, READ | WRITE, READ | WRITE, READ | WRITE][random.below(6)];
        if range.is_empty() {
            return;
        }
        let done = sys::protect(self.address(range.start), range.len() * PAGE, access);
        done.unwrap_or_else(|error| broken(&format!("mprotect: {error}")));
        self.set(range.clone(), |_, slot| Slot { access, ..slot });
        self.split(range);
    }

    /// A whole huge page, written in part, perhaps collapsed.
    fn huge(&mut self, random: &mut Random) {
        let from = random.below(SLOTS / HUGE_SLOTS) * HUGE_SLOTS;
        let range = from..from + HUGE_SLOTS;
        if random.one_in(3) {
            self.map(range.clone(), 0, None);
        }
        let range = self.run(range.start, range.len(), Slot::mapped);
        if range.is_empty() {
            return;
        }
        let (at, bytes) = (self.address(range.start), range.len() * PAGE);
        let advice = [libc::MADV_HUGEPAGE, libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE][random.below(3)];
        // Not every kernel has huge pages.
        if sys::advise(at, bytes, advice).is_ok() {
            self.split(range.clone());
        }
        for _ in 0..4 {
            self.write(range.start + random.below(range.len()), random);
        }
        if random.one_in(2) {
            // Best effort of the kernel, and no change of any content.
            let _ = sys::advise(at, bytes, libc::MADV_COLLAPSE);
        }
    }

    /// What gives up content, or may.
    fn advise(&mut self, random: &mut Random) {
        let advice =
            [libc::MADV_DONTNEED, libc::MADV_FREE, libc::MADV_PAGEOUT, libc::MADV_COLD][random.below(4)];
        let range = Self::range(random);
        let wanted = |slot: Slot| match advice {
            libc::MADV_FREE => slot.kind == Kind::Anonymous,
            _ => slot.mapped(),
        };
        let range = self.run(range.start, range.len(), wanted);
        if range.is_empty() {
            return;
        }
        let done = sys::advise(self.address(range.start), range.len() * PAGE, advice);
        done.unwrap_or_else(|error| broken(&format!("madvise {advice}: {error}")));
        match advice {
            libc::MADV_DONTNEED => self.set(range, |_, slot| slot.emptied()),
            libc::MADV_FREE => self.set(range, |_, slot| Slot { free: true, ..slot }),
            _ => {}
        }
    }

    fn guard(&mut self, random: &mut Random) {
        let range = self.mapped_range(random);
        if range.is_empty() {
            return;
        }
        let (at, bytes) = (self.address(range.start), range.len() * PAGE);
        if random.one_in(3) {
            if sys::advise(at, bytes, sys::MADV_GUARD_INSTALL).is_ok() {
                self.set(range, |_, slot| Slot { guard: true, ..slot.emptied() });
            }
        } else if sys::advise(at, bytes, sys::MADV_GUARD_REMOVE).is_ok() {
            self.set(range, |_, slot| Slot { guard: false, ..slot });
        }
    }

    /// What a child does not get.
    fn fork_rules(&mut self, random: &mut Random) {
        let range = Self::range(random);
        let range = self.run(range.start, range.len(), |slot| slot.kind == Kind::Anonymous);
        let advice = [libc::MADV_DONTFORK, libc::MADV_DOFORK, libc::MADV_WIPEONFORK, libc::MADV_KEEPONFORK]
            [random.below(4)];
        if range.is_empty() {
            return;
        }
        let done = sys::advise(self.address(range.start), range.len() * PAGE, advice);
        done.unwrap_or_else(|error| broken(&format!("madvise {advice}: {error}")));
        self.set(range.clone(), |_, slot| match advice {
            libc::MADV_DONTFORK => Slot { lost_by_fork: true, ..slot },
            libc::MADV_DOFORK => Slot { lost_by_fork: false, ..slot },
            libc::MADV_WIPEONFORK => Slot { wiped_by_fork: true, ..slot },
            _ => Slot { wiped_by_fork: false, ..slot },
        });
        self.split(range);
    }

    /// mremap: to another place, over what is there; whole or a part; grown, shrunk or as it is; leaving the old place
    /// mapped or not.
    fn move_part(&mut self, random: &mut Random) {
        let range = self.mapped_range(random);
        let Some(first) = self.slots.get(range.start).copied().filter(|_| !range.is_empty()) else { return };
        let from = self.run(range.start, range.len(), |slot| slot.mapping == first.mapping);
        let anonymous = first.kind == Kind::Anonymous;
        let (len, keep) = match random.below(4) {
            0 if anonymous => (from.len() + random.below(32), false),
            1 => (1 + random.below(from.len()), false),
            2 if anonymous => (from.len(), true),
            _ => (from.len(), false),
        };
        let to = random.below(SLOTS);
        let to = to..to + len;
        if to.end > SLOTS || (to.start < from.end && from.start < to.end) {
            return;
        }
        let flags = if keep { libc::MREMAP_DONTUNMAP } else { 0 };
        let (at, target) = (self.address(from.start), self.address(to.start));
        if let Err(error) = sys::remap(at, from.len() * PAGE, target, len * PAGE, flags) {
            broken(&format!("mremap of {} pages at {at:#x} to {len} at {target:#x}: {error}", from.len()));
        }
        let moved = self.slots[from.clone()].to_vec();
        self.set(from, |_, slot| if keep { slot.emptied().without_guard() } else { HOLE });
        self.mappings += 1;
        let mapping = self.mappings;
        let grown = Slot { mapping, guard: false, ..first }.emptied();
        self.set(to, |at, _| moved.get(at).map_or(grown, |slot| Slot { mapping, ..*slot }));
    }

    /// In a child: what it did not get.
    pub(crate) fn after_fork(&mut self) {
        self.set(0..SLOTS, |_, slot| match slot {
            slot if slot.lost_by_fork => HOLE,
            slot if slot.wiped_by_fork => slot.emptied(),
            slot => slot,
        });
    }

    /// A store of the program's own to one page, if it may be written: to one word, or to all.
    pub(crate) fn write(&mut self, slot: usize, random: &mut Random) {
        let known = self.slots[slot];
        if !known.writable() {
            return;
        }
        let (at, stamp) = (self.address(slot), self.new_stamp());
        // Of a page that may be zeroes or not, all is written, so that it is known again.
        if known.free || random.one_in(4) {
            self.wrote(slot..slot + 1, |_| stamp);
            fill(at, stamp, WORDS);
        } else {
            self.slots[slot].patch = stamp;
            sys::store(at + PATCHED * 8, stamp);
        }
    }

    /// Whole pages are, or are about to be, what these stamps say.
    pub(crate) fn wrote(&mut self, range: Range<usize>, stamp: impl Fn(usize) -> u64) {
        self.set(range, |at, slot| Slot { stamp: stamp(at), patch: 0, free: false, ..slot });
    }

    /// Looks at all pages that can be read.
    pub(crate) fn check(&mut self) {
        for at in 0..SLOTS {
            let Slot { stamp, patch, free, .. } = self.slots[at];
            let address = self.address(at);
            if !self.slots[at].readable() || Self::is(address, stamp, patch) {
                continue;
            }
            if free && Self::is(address, 0, 0) {
                self.slots[at] = self.slots[at].emptied();
                continue;
            }
            let wrong: Vec<_> = (0..WORDS)
                .filter(|i| *i != PATCHED && sys::load(address + i * 8) != word(stamp, *i))
                .collect();
            broken(&format!(
                "the page at {address:#x}, {:?}, {} wrong words, from {:?}, patch {:#x} and not {patch:#x}",
                self.slots[at],
                wrong.len(),
                wrong.first(),
                sys::load(address + PATCHED * 8)
            ));
        }
    }

    fn is(address: usize, stamp: u64, patch: u64) -> bool {
        let patched = if patch == 0 { word(stamp, PATCHED) } else { patch };
        sys::load(address + PATCHED * 8) == patched && holds(address, stamp, PATCHED)
    }
}
