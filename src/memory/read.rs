//! Batched reads of another process' memory.
//!
//! process_vm_readv takes 1024 ranges in a call and stops at the first page that it cannot read; such a page
//! (`PROT_NONE`, write-only) is read through `/proc/PID/mem`, which ignores protection. What that cannot read
//! either is reported, page by page: in a running process it is a page that has vanished, in a frozen one a
//! page that the image must do without or the epoch fails, which the caller decides.

use std::{fs::File, io, os::unix::fs::FileExt, thread};

use super::sys;
use crate::{
    extents,
    model::{Extent, PAGE_SIZE},
};

/// Ranges that the kernel takes in one call (`UIO_MAXIOV`).
const RANGES_MAX: usize = 1024;
/// From this many pages on, two threads read: a page costs 0.3–1.6 µs, a thread about 30 µs to start.
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
        if total < PARALLEL_PAGES_MIN {
            pages.unread = self.read_part(wanted, buffer)?;
        } else {
            let (first, second) = split(wanted, total / 2);
            let (low, high) = buffer.split_at_mut((total / 2 * PAGE_SIZE) as usize);
            let (low, high) = thread::scope(|scope| {
                let other = scope.spawn(|| self.read_part(&second, high));
                let low = self.read_part(&first, low);
                (low, other.join().expect("a reading thread does not panic"))
            });
            pages.unread = low?;
            pages.unread.extend(high?);
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

    /// Fills `buffer` with the pages; gives those that could not be read, whose bytes mean nothing.
    fn read_part(self, wanted: &[Extent], buffer: &mut [u8]) -> Result<Vec<Extent>, ReadError> {
        let mut unread = Vec::new();
        let mut mem = None;
        let (mut rest, mut buffer) = (wanted.iter().copied(), buffer);
        let mut next = rest.next();
        let mut ranges = Vec::with_capacity(RANGES_MAX.min(wanted.len()));
        let mut batch = Vec::with_capacity(RANGES_MAX.min(wanted.len()));
        while next.is_some() {
            ranges.clear();
            batch.clear();
            while let Some(extent) = next.filter(|_| ranges.len() < RANGES_MAX) {
                ranges.push(sys::remote_range(extent.start, extent.bytes()));
                batch.push(extent);
                next = rest.next();
            }
            let (now, later) = buffer.split_at_mut((extents::pages(&batch) * PAGE_SIZE) as usize);
            buffer = later;
            let read = match sys::process_vm_read(self.pid, &ranges, now) {
                Ok(read) => read,
                Err(e) if e.raw_os_error() == Some(libc::EFAULT) => 0,
                Err(e) => return Err(ReadError::io(self.pid, e)),
            };
            if read < now.len() {
                self.read_rest(&batch, now, read, &mut mem, &mut unread)?;
            }
        }
        Ok(unread)
    }

    /// Reads, run by run, what a batch did not reach.
    fn read_rest(
        self,
        batch: &[Extent],
        buffer: &mut [u8],
        read: usize,
        mem: &mut Option<File>,
        unread: &mut Vec<Extent>,
    ) -> Result<(), ReadError> {
        if mem.is_none() {
            let opened = File::open(format!("/proc/{}/mem", self.pid));
            *mem = Some(opened.map_err(|e| ReadError::io(self.pid, e))?);
        }
        let mem = mem.as_ref().expect("was opened above");
        let mut offset = 0;
        for extent in batch {
            let len = extent.bytes() as usize;
            // The whole pages of this run that were read already.
            let mut done = read.saturating_sub(offset).min(len) / PAGE_SIZE as usize * PAGE_SIZE as usize;
            while done < len {
                let at = extent.start + done as u64;
                match mem.read_at(&mut buffer[offset + done..offset + len], at) {
                    Ok(got) if got >= PAGE_SIZE as usize => {
                        done += got / PAGE_SIZE as usize * PAGE_SIZE as usize;
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    // An end of file is an address space that is gone, an error a page that is.
                    Ok(_) | Err(_) => {
                        extents::push(unread, at, at + PAGE_SIZE);
                        done += PAGE_SIZE as usize;
                    }
                }
            }
            offset += len;
        }
        Ok(())
    }
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
