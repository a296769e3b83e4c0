//! Memory that several processes have mapped, and one of them twice. Each page has one writer, which knows what it must
//! hold; all others see that it is whole.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU64, Ordering, fence},
};

use crate::{
    arena::{fill, holds, page_of},
    broken,
    random::Random,
    sys::{self, PAGE},
};

pub(crate) const PAGES: usize = 64;
/// Each has the pages whose number leaves its own when divided by this.
pub(crate) const WRITERS: usize = 8;
const BYTES: usize = PAGES * PAGE;
/// The word that says which version a page holds; odd while it is written.
const VERSION: usize = 0;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Object {
    Anonymous,
    MemoryFile,
    SystemV,
}

pub(crate) struct Shared {
    /// Each with one or two places where it is mapped.
    objects: Vec<(Object, Vec<usize>)>,
    memory_file: File,
    segment: i32,
    /// Of the whole program: how often each writer has checked everything.
    pub(crate) board: Board,
}

/// Words that all processes see.
#[derive(Clone, Copy)]
pub(crate) struct Board(usize);

impl Board {
    pub(crate) fn word(self, at: usize) -> &'static AtomicU64 {
        // SAFETY: a shared page that is never unmapped, of which only words are used, atomically.
        unsafe { &*((self.0 + at * 8) as *const AtomicU64) }
    }
}

fn map(file: Option<&File>) -> usize {
    let flags = libc::MAP_SHARED | if file.is_some() { 0 } else { libc::MAP_ANONYMOUS };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    sys::map(None, BYTES, access, flags, file.map(|file| (file, 0))).expect("shared memory")
}

impl Shared {
    pub(crate) fn new() -> Self {
        let memory_file = sys::memory_file(BYTES).expect("a memory file");
        let segment = sys::segment(BYTES).expect("a System V segment");
        let attach = || sys::attach(segment).expect("a System V segment is attached");
        let objects = vec![
            (Object::Anonymous, vec![map(None)]),
            (Object::MemoryFile, vec![map(Some(&memory_file)), map(Some(&memory_file))]),
            (Object::SystemV, vec![attach(), attach()]),
        ];
        Self { objects, memory_file, segment, board: Board(map(None)) }
    }
}

/// One of the writers.
pub(crate) struct Writer {
    number: usize,
    /// By object and page: what its pages hold.
    versions: Vec<[u64; PAGES]>,
}

impl Writer {
    pub(crate) fn new(number: usize, shared: &Shared) -> Self {
        Self { number, versions: vec![[0; PAGES]; shared.objects.len()] }
    }

    /// Writes one of its pages: by a mapping, by another, by the file; or punches it out.
    pub(crate) fn write(&mut self, shared: &Shared, random: &mut Random) {
        let which = random.below(shared.objects.len());
        let page = self.number + WRITERS * random.below(PAGES / WRITERS);
        let (object, places) = &shared.objects[which];
        let at = places[random.below(places.len())] + page * PAGE;
        let version = &mut self.versions[which][page];
        if random.one_in(16) {
            *version = 0;
            if sys::advise(at, PAGE, libc::MADV_REMOVE).is_ok() {
                return;
            }
        }
        // Never the same again: a lost page would not be seen.
        let next = (random.next() | 1) ^ 1;
        *version = next.max(2);
        sys::store(at + VERSION * 8, *version | 1);
        fence(Ordering::SeqCst);
        if *object == Object::MemoryFile && random.one_in(3) {
            let bytes = page_of(*version);
            let from = (VERSION + 1) * 8;
            let offset = (page * PAGE + from) as u64;
            shared.memory_file.write_all_at(&bytes[from..], offset).expect("a write to a memory file");
        } else {
            fill(at, *version, VERSION);
        }
        fence(Ordering::SeqCst);
        sys::store(at + VERSION * 8, *version);
        if random.one_in(8) {
            // The page stays, the page table's entry goes.
            sys::advise(at, PAGE, libc::MADV_DONTNEED).expect("DONTNEED of shared memory");
        }
    }

    /// Its own pages hold what it wrote, in every place.
    pub(crate) fn check(&self, shared: &Shared) {
        for ((_, places), versions) in shared.objects.iter().zip(&self.versions) {
            for page in (self.number..PAGES).step_by(WRITERS) {
                for place in places {
                    let (at, version) = (place + page * PAGE, versions[page]);
                    if sys::load(at + VERSION * 8) != version || !holds(at, version, VERSION) {
                        broken(&format!("shared page {page} at {at:#x} is not of version {version:#x}"));
                    }
                }
            }
        }
    }
}

impl Shared {
    /// All pages are whole, whoever wrote them.
    pub(crate) fn check(&self) {
        for at in self.objects.iter().flat_map(|(_, places)| places) {
            for page in 0..PAGES {
                let at = at + page * PAGE;
                let is_whole = || {
                    let version = sys::load(at + VERSION * 8);
                    fence(Ordering::SeqCst);
                    let whole = version % 2 == 1 || holds(at, version, VERSION);
                    fence(Ordering::SeqCst);
                    // Written meanwhile: nothing can be said of it.
                    whole || sys::load(at + VERSION * 8) != version
                };
                // A page that is punched out may be found between two of its words.
                if !is_whole() && !is_whole() && !is_whole() {
                    broken(&format!("shared page {page} at {at:#x} is torn"));
                }
            }
        }
    }

    /// Maps objects anew, elsewhere perhaps. In a process with one thread.
    pub(crate) fn map_again(&mut self) {
        let place = &mut self.objects[1].1[1];
        sys::unmap(*place, BYTES).expect("munmap of shared memory");
        *place = map(Some(&self.memory_file));
        let place = &mut self.objects[2].1[1];
        sys::detach(*place).expect("a System V segment is detached");
        *place = sys::attach(self.segment).expect("a System V segment is attached again");
    }
}
