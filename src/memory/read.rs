//! Reads of another process' memory.
//!
//! By `/proc/PID/mem`, never by process_vm_readv, though that takes half the time: it pins what it reads, and of pages
//! that a process shares with its fork the kernel then makes copies for it (gup_must_unshare in mm/gup.c). A database's
//! snapshot process would come to have all of its memory twice. And such a copy is not marked as written, so that the
//! kernel may drop it, data and all, once a later fork has said MADV_FREE about it (madvise_free_pte_range asks that
//! mark alone; seen on Linux 6.18).
//!
//! What cannot be read is reported, page by page: in a running process it is a page that has vanished, in a frozen one a
//! page that the image must do without or the epoch fails, which the caller decides. Protection (`PROT_NONE`, write-only)
//! does not keep us from reading.

use std::{fs::File, io, os::unix::fs::FileExt, thread};

use crate::{
    extents,
    model::{Extent, PAGE_SIZE},
};

/// From this many pages on, two threads read: a page costs 1.1–1.7 µs, a thread about 30 µs to start.
const PARALLEL_PAGES_MIN: u64 = 512;

/// Why a read failed as a whole.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The process has exited.
    #[error("process {0} has exited while its memory was read")]
    Gone(i32),
    /// Not permitted.
    #[error("may not read the memory of process {0}: the agent needs root with CAP_SYS_PTRACE")]
    NotPermitted(i32),
    /// Something else.
    #[error("reading the memory of process {pid} failed: {source}")]
    Io {
        /// The process.
        pid: i32,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl ReadError {
    fn io(pid: i32, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ESRCH | libc::ENOENT) => Self::Gone(pid),
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(pid),
            _ => Self::Io { pid, source },
        }
    }
}

/// Pages that were read. Reuse one from epoch to epoch: its buffer is kept, so that it is faulted in once.
#[derive(Debug, Default)]
pub struct Pages {
    extents: Vec<Extent>,
    unread: Vec<Extent>,
    buffer: Vec<u8>,
}

impl Pages {
    /// The pages, in the order of [`data`](Self::data).
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Their content, one after the other.
    pub fn data(&self) -> &[u8] {
        &self.buffer[..(extents::pages(&self.extents) * PAGE_SIZE) as usize]
    }

    /// Pages that were asked for and could not be read.
    pub fn unread(&self) -> &[Extent] {
        &self.unread
    }

    /// Extents and content, for a caller who keeps them.
    pub fn into_parts(mut self) -> (Vec<Extent>, Vec<u8>) {
        self.buffer.truncate((extents::pages(&self.extents) * PAGE_SIZE) as usize);
        (self.extents, self.buffer)
    }

    /// Gives the buffer back to the system (after a full read, say).
    pub fn shrink(&mut self) {
        *self = Self::default();
    }

    /// Closes the gaps that unread pages left in the buffer.
    fn close_gaps(&mut self) {
        if self.unread.is_empty() {
            return;
        }
        let read = extents::subtract(&self.extents, &self.unread);
        let (mut to, mut from, mut asked) = (0, 0, self.extents.iter());
        let mut within = asked.next().copied();
        for extent in &read {
            // Each run that was read lies within one that was asked for.
            while let Some(outer) = within.filter(|outer| outer.end() <= extent.start) {
                from += outer.bytes() as usize;
                within = asked.next().copied();
            }
            let offset = within.map_or(0, |outer| extent.start - outer.start) as usize;
            let len = extent.bytes() as usize;
            self.buffer.copy_within(from + offset..from + offset + len, to);
            to += len;
        }
        self.extents = read;
    }
}

/// The memory of another process.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pid: i32,
}

impl Memory {
    /// Of a process by its host pid.
    pub fn of(pid: i32) -> Self {
        Self { pid }
    }

    /// Reads pages (a sorted, merged list) into `pages`, replacing what that held. The caller bounds the
    /// list: the buffer grows to its size. Large lists are read by two threads.
    pub fn read(&self, wanted: &[Extent], pages: &mut Pages) -> Result<(), ReadError> {
        let total = extents::pages(wanted);
        let bytes = (total * PAGE_SIZE) as usize;
        pages.extents.clear();
        pages.unread.clear();
        if pages.buffer.len() < bytes {
            pages.buffer.resize(bytes, 0);
        }
        let buffer = &mut pages.buffer[..bytes];
        if total == 0 {
            return Ok(());
        }
        let mem = open(self.pid).map_err(|e| ReadError::io(self.pid, e))?;
        if total < PARALLEL_PAGES_MIN {
            pages.unread = read_part(&mem, wanted, buffer).ok_or(ReadError::Gone(self.pid))?;
        } else {
            let (first, second) = split(wanted, total / 2);
            let (low, high) = buffer.split_at_mut((total / 2 * PAGE_SIZE) as usize);
            let (low, high) = thread::scope(|scope| {
                let other = scope.spawn(|| read_part(&mem, &second, high));
                (read_part(&mem, &first, low), other.join().expect("a reading thread does not panic"))
            });
            let both = low.zip(high).ok_or(ReadError::Gone(self.pid))?;
            pages.unread = [both.0, both.1].concat();
            extents::normalize(&mut pages.unread);
        }
        pages.extents.extend_from_slice(wanted);
        pages.close_gaps();
        Ok(())
    }

    /// Reads pages a part at a time, at most `part_pages` of them, each handed to `sink`: for the first full
    /// read of a running process, whose size has no bound.
    pub fn read_in_parts<E: From<ReadError>>(
        &self,
        wanted: &[Extent],
        part_pages: u64,
        pages: &mut Pages,
        mut sink: impl FnMut(&Pages) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = wanted.to_vec();
        while !rest.is_empty() {
            let (part, left) = split(&rest, part_pages.max(1));
            self.read(&part, pages)?;
            sink(pages)?;
            rest = left;
        }
        Ok(())
    }
}

/// The memory of a process, bound to the address space of now, should it execute another program.
fn open(pid: i32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/mem"))
}

/// Reads a few bytes.
pub(super) fn read_exactly(pid: i32, at: u64, into: &mut [u8]) -> io::Result<()> {
    open(pid)?.read_exact_at(into, at)
}

/// Fills `buffer` with the pages; gives those that could not be read, whose bytes mean nothing. None: the address space is
/// gone.
fn read_part(mem: &File, wanted: &[Extent], mut buffer: &mut [u8]) -> Option<Vec<Extent>> {
    let mut unread = Vec::new();
    for extent in wanted {
        let (run, rest) = buffer.split_at_mut(extent.bytes() as usize);
        buffer = rest;
        let mut done = 0;
        while done < run.len() {
            let at = extent.start + done as u64;
            match mem.read_at(&mut run[done..], at) {
                Ok(got) if got >= PAGE_SIZE as usize => {
                    done += got / PAGE_SIZE as usize * PAGE_SIZE as usize;
                }
                Ok(0) => return None,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    extents::push(&mut unread, at, at + PAGE_SIZE);
                    done += PAGE_SIZE as usize;
                }
            }
        }
    }
    Some(unread)
}

/// The first pages of a list and the rest.
fn split(list: &[Extent], first_pages: u64) -> (Vec<Extent>, Vec<Extent>) {
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    let mut room = first_pages;
    for extent in list {
        let taken = extent.pages.min(room);
        room -= taken;
        let cut = extent.start + taken * PAGE_SIZE;
        extents::push(&mut first, extent.start, cut);
        extents::push(&mut rest, cut, extent.end());
    }
    (first, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(page: u64, pages: u64) -> Extent {
        Extent { start: page * PAGE_SIZE, pages }
    }

    #[test]
    fn a_list_is_split_inside_a_run() {
        let (first, rest) = split(&[run(1, 2), run(5, 4)], 3);
        assert_eq!((first, rest), (vec![run(1, 2), run(5, 1)], vec![run(6, 3)]));
    }

    #[test]
    fn gaps_of_unread_pages_are_closed() {
        let buffer = (0..6u8).flat_map(|page| vec![page; PAGE_SIZE as usize]).collect();
        let mut pages =
            Pages { extents: vec![run(1, 2), run(5, 4)], unread: vec![run(2, 1), run(6, 2)], buffer };
        pages.close_gaps();
        assert_eq!(pages.extents(), [run(1, 1), run(5, 1), run(8, 1)]);
        let first_bytes: Vec<u8> = pages.data().chunks(PAGE_SIZE as usize).map(|page| page[0]).collect();
        assert_eq!(first_bytes, [0, 2, 5]);
    }
}
