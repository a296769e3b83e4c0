//! Shared memory of a tree that is no file of anybody's (`MAP_SHARED | MAP_ANONYMOUS`, memfds), read by us.
//!
//! A store through one mapping leaves no trace in another, and none at all once its process has ended, so nothing tells
//! which pages were written. CRIU therefore sends all of it, through a pipe, 3 ms a MB. We keep a copy of what each object
//! held when it was looked at last, and compare: what differs is read, which takes a tenth of that. The bridge says to CRIU
//! that the object is a hole (`bridge/scan.c`), and which pages it has we list.
//!
//! Invariant: after a look the copy is what the object held then. So what is known of a page is of the copy, and a page that
//! the standby lacks is read from there.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::AsFd as _,
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    path::PathBuf,
};

use nix::{
    errno::Errno,
    sys::memfd::{MFdFlags, memfd_create},
    unistd::{Whence, lseek},
};

use crate::{
    extents,
    model::{Extent, PAGE_SIZE},
};

/// Memory for copies. Objects for which there is no room CRIU sends, as it does without us.
const COPIES_BYTES_MAX: u64 = 4 << 30;
/// Objects of a tree that are ours; the bridge has room for as many.
const OBJECTS_MAX: usize = 256;
/// What is read at once: it is compared while it is in the processor's cache.
const PIECE_BYTES: u64 = 256 << 10;
/// So many pages that differed in a freeze are worth a look before the next one.
const AHEAD_PAGES_MIN: u64 = 1024;

/// All that was seen, by inode, which is what CRIU calls it by.
#[derive(Debug, Default)]
pub(super) struct SharedMemory {
    objects: BTreeMap<u64, Object>,
    /// The device of all such inodes.
    device: Option<u64>,
    settled: bool,
}

#[derive(Debug)]
struct Object {
    file: File,
    copy: Vec<u8>,
}

/// An object that tasks of the tree have mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    pub(super) inode: u64,
    /// How much of it CRIU dumps, if that does not go by its size.
    bytes: Option<u64>,
    /// By which it can be opened.
    path: PathBuf,
}

/// What was seen of one.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// Its pages; addresses are offsets.
    pub(super) there: Vec<Extent>,
    /// Those of them that differ from what they were at the look before.
    pub(super) changed: Vec<Extent>,
}

impl SharedMemory {
    /// The objects of a tree that are read by us, by the tasks' pids and `/proc/PID/maps`; copies of others go. What cannot
    /// be opened, because its task is gone, is left out.
    pub(super) fn find<'a>(&mut self, tasks: impl Iterator<Item = (i32, &'a [u8])>) -> Vec<Mapped> {
        let mut found: BTreeMap<u64, Mapped> = BTreeMap::new();
        for (pid, maps) in tasks {
            for line in maps.split(|byte| *byte == b'\n') {
                let Some(mapped) = mapped(pid, line) else { continue };
                let known = found.entry(mapped.inode).or_insert_with(|| mapped.clone());
                known.bytes = known.bytes.max(mapped.bytes);
            }
        }
        self.objects.retain(|inode, _| found.contains_key(inode));
        let mut room = COPIES_BYTES_MAX;
        let mut ours: Vec<Mapped> = found.into_values().collect();
        ours.retain(|mapped| match self.open(mapped) {
            Ok(bytes) if bytes <= room => {
                room -= bytes;
                true
            }
            Ok(_) => {
                self.objects.remove(&mapped.inode);
                false
            }
            Err(error) => {
                tracing::debug!(%error, inode = mapped.inode, "CRIU sends this shared memory itself");
                false
            }
        });
        ours.truncate(OBJECTS_MAX);
        ours
    }

    /// Makes sure that an object is open and its copy long enough; gives its size.
    fn open(&mut self, mapped: &Mapped) -> io::Result<u64> {
        let object = if let Some(object) = self.objects.remove(&mapped.inode) {
            object
        } else {
            let file = File::open(&mapped.path)?;
            let found = file.metadata()?;
            if found.ino() != mapped.inode || found.dev() != self.device()? {
                return Err(io::Error::other("another file is there"));
            }
            Object { file, copy: Vec::new() }
        };
        let size = object.file.metadata()?.size();
        let bytes = mapped.bytes.map_or(size, |bytes| bytes.min(size)).next_multiple_of(PAGE_SIZE);
        let fits = bytes <= COPIES_BYTES_MAX && object.copy.len() as u64 >= bytes;
        // Not touched, a page of it takes no memory.
        let copy = if fits { object.copy } else { vec![0; bytes.min(COPIES_BYTES_MAX) as usize] };
        self.objects.insert(mapped.inode, Object { file: object.file, copy });
        Ok(bytes)
    }

    /// The device on which the kernel keeps such memory.
    fn device(&mut self) -> io::Result<u64> {
        if let Some(device) = self.device {
            return Ok(device);
        }
        let device = File::from(memfd_create(c"standin", MFdFlags::MFD_CLOEXEC)?).metadata()?.dev();
        Ok(*self.device.insert(device))
    }

    /// Whether it is worth a look before the freeze too.
    pub(super) fn is_unsettled(&self) -> bool {
        !self.settled
    }

    /// How much had changed in the freeze.
    pub(super) fn settle(&mut self, changed_pages: u64) {
        self.settled = changed_pages < AHEAD_PAGES_MIN;
    }

    /// Compares an object that was [found](Self::find) with its copy, and brings that up to date.
    pub(super) fn look(&mut self, mapped: &Mapped) -> io::Result<Looked> {
        let gone = || io::Error::other("shared memory that was not found");
        let object = self.objects.get_mut(&mapped.inode).ok_or_else(gone)?;
        let mut looked = Looked { there: object.data(mapped.bytes)?, changed: Vec::new() };
        let mut buffer = vec![0; PIECE_BYTES as usize];
        for run in &looked.there {
            for at in (run.start..run.end()).step_by(PIECE_BYTES as usize) {
                let piece = &mut buffer[..(run.end() - at).min(PIECE_BYTES) as usize];
                read_to_end(&object.file, at, piece)?;
                update(
                    &mut object.copy[at as usize..at as usize + piece.len()],
                    piece,
                    at,
                    &mut looked.changed,
                );
            }
        }
        Ok(looked)
    }

    /// The content of pages as of the last look.
    pub(super) fn content(&self, inode: u64, pages: &[Extent]) -> Vec<u8> {
        let mut content = Vec::with_capacity((extents::pages(pages) * PAGE_SIZE) as usize);
        if let Some(object) = self.objects.get(&inode) {
            for run in pages {
                content.extend_from_slice(&object.copy[run.start as usize..run.end() as usize]);
            }
        }
        content
    }
}

impl Object {
    /// The pages that it has, as far as the copy reaches.
    fn data(&self, bytes: Option<u64>) -> io::Result<Vec<Extent>> {
        let size = self.file.metadata()?.size();
        let end = bytes.map_or(size, |bytes| bytes.min(size)).next_multiple_of(PAGE_SIZE);
        let end = end.min(self.copy.len() as u64);
        let (mut runs, mut at) = (Vec::new(), 0);
        while at < end {
            let start = match lseek(self.file.as_fd(), at as i64, Whence::SeekData) {
                Ok(start) => start as u64 / PAGE_SIZE * PAGE_SIZE,
                Err(Errno::ENXIO) => break,
                Err(errno) => return Err(errno.into()),
            };
            // It may be cut meanwhile by a tree that runs.
            let hole = match lseek(self.file.as_fd(), start as i64, Whence::SeekHole) {
                Ok(hole) => (hole as u64).next_multiple_of(PAGE_SIZE),
                Err(Errno::ENXIO) => break,
                Err(errno) => return Err(errno.into()),
            };
            at = hole.min(end).max(start + PAGE_SIZE);
            if start < end {
                extents::push(&mut runs, start, at.min(end));
            }
        }
        Ok(runs)
    }
}

/// Behind the end of the object there are zeros.
fn read_to_end(file: &File, at: u64, into: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], at + done as u64) {
            Ok(0) => {
                into[done..].fill(0);
                break;
            }
            Ok(length) => done += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes a part of the copy what was read, and adds the pages in which it differed.
fn update(copy: &mut [u8], read: &[u8], at: u64, changed: &mut Vec<Extent>) {
    if copy == read {
        return;
    }
    let (mine, _) = copy.as_chunks_mut::<{ PAGE_SIZE as usize }>();
    let (theirs, _) = read.as_chunks::<{ PAGE_SIZE as usize }>();
    for (number, (mine, theirs)) in mine.iter_mut().zip(theirs).enumerate() {
        if mine != theirs {
            *mine = *theirs;
            let start = at + number as u64 * PAGE_SIZE;
            extents::push(changed, start, start + PAGE_SIZE);
        }
    }
}

/// `start-end perms offset dev inode  path` of an object that is ours to read. System V segments are not: their inodes are
/// numbered apart, and they have an image of their own.
fn mapped(pid: i32, line: &[u8]) -> Option<Mapped> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let (range, perms, offset, _device, inode) =
        (words.next()?, words.next()?, words.next()?, words.next()?, words.next()?);
    let name = words.next()?;
    let is_memfd = name.starts_with("/memfd:");
    if !perms.ends_with('s') || !(is_memfd || name == "/dev/zero") || !line.ends_with(" (deleted)") {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    // Of a memfd CRIU dumps all, of other memory as much as is mapped.
    let bytes = hex(offset)? + (hex(end)? - hex(start)?);
    Some(Mapped {
        inode: inode.parse().ok()?,
        bytes: (!is_memfd).then_some(bytes),
        path: crate::memory::map_file(pid, line.as_bytes())?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_found_once_and_the_copy_is_what_was_there() {
        let page = |number: u64| Extent { start: number * PAGE_SIZE, pages: 1 };
        let file = File::from(memfd_create(c"shared", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(9 * PAGE_SIZE + 100).unwrap();
        file.write_all_at(&[1; 4096], 2 * PAGE_SIZE).unwrap();
        file.write_all_at(&[2; 50], 9 * PAGE_SIZE).unwrap();
        let map = memmap2::MmapOptions::new().len(9 * 4096).map_raw(&file).unwrap();
        let inode = file.metadata().unwrap().ino();
        let maps = std::fs::read("/proc/self/maps").unwrap();
        let pid = std::process::id() as i32;
        let mut shared = SharedMemory::default();
        let look = |shared: &mut SharedMemory| {
            let found = shared.find([(pid, maps.as_slice())].into_iter());
            let ours = found.iter().find(|mapped| mapped.inode == inode).expect("it is mapped");
            shared.look(ours).unwrap()
        };
        let first = look(&mut shared);
        assert_eq!((&first.there, &first.changed), (&vec![page(2), page(9)], &vec![page(2), page(9)]));
        assert_eq!(shared.content(inode, &[page(9)])[..51], [[2; 50].as_slice(), &[0]].concat());
        assert_eq!(look(&mut shared).changed, []);
        file.write_all_at(&[3; 1], 2 * PAGE_SIZE + 7).unwrap();
        let second = look(&mut shared);
        assert_eq!((second.there.len(), &second.changed), (2, &vec![page(2)]));
        assert_eq!(shared.content(inode, &[page(2)])[..9], [1, 1, 1, 1, 1, 1, 1, 3, 1]);
        // Cut and grown, it has no old page.
        file.set_len(PAGE_SIZE).unwrap();
        assert_eq!(look(&mut shared).there, []);
        file.set_len(20 * PAGE_SIZE).unwrap();
        file.write_all_at(&[5; 1], 19 * PAGE_SIZE).unwrap();
        assert_eq!(look(&mut shared).changed, vec![page(19)]);
        drop(map);
    }

    #[test]
    fn only_memory_without_a_file_is_ours() {
        let of = |line: &str| mapped(7, line.as_bytes());
        let zero = of("7f0000000000-7f0000003000 rw-s 00001000 00:01 99   /dev/zero (deleted)").unwrap();
        assert_eq!((zero.inode, zero.bytes), (99, Some(0x4000)));
        assert!(of("7f0000000000-7f0000003000 rw-s 00000000 00:01 5   /memfd:a b (deleted)").is_some());
        assert_eq!(of("7f0000000000-7f0000003000 rw-s 00000000 00:01 5   /SYSV00000000 (deleted)"), None);
        assert_eq!(of("7f0000000000-7f0000003000 rw-p 00000000 00:01 5   /memfd:a (deleted)"), None);
        assert_eq!(of("7f0000000000-7f0000003000 rw-s 00000000 00:19 5   /dev/shm/x"), None);
        assert_eq!(of("7f0000000000-7f0000003000 rw-p 00000000 00:00 0"), None);
    }
}
