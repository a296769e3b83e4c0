//! One restored task: its userfaultfd, and which of its pages are still to come.

use std::{
    os::fd::OwnedFd,
    sync::{
        Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::errno::Errno;

use super::{
    journal::Journal,
    pending::{Awaited, Pending},
    sys::{self, Event, Message},
};
use crate::model::PAGE_SIZE;

/// How an attempt to put pages ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Put {
    /// All, or all that the task still wants of them.
    Done,
    /// The task's mappings are changing: its events must be read first.
    Changing,
    /// Its cgroup, or the host, has no memory left.
    NoMemory,
    /// The task is gone.
    Gone,
}

/// A task of the restored tree, forked ones included.
///
/// The kernel holds a task that changes its mappings until the event is read, and then lets it do so at once. A page
/// that was chosen before the event was read, and is put after, would be one that the task has given up, or elsewhere:
/// so events are read with the gate closed, and whoever else puts pages chooses and puts them within the gate.
#[derive(Debug)]
pub(super) struct Task {
    /// In the image; a forked one has its parent's.
    pub(super) pid: u32,
    pub(super) uffd: OwnedFd,
    gate: RwLock<()>,
    awaited: Mutex<Awaiting>,
    gone: AtomicBool,
}

#[derive(Debug)]
struct Awaiting {
    pending: Pending,
    /// Where the background transfer goes on.
    cursor: u64,
}

impl Task {
    pub(super) fn new(pid: u32, uffd: OwnedFd, pending: Pending) -> Self {
        let awaited = Mutex::new(Awaiting { pending, cursor: 0 });
        Self { pid, uffd, gate: RwLock::new(()), awaited, gone: AtomicBool::new(false) }
    }

    fn awaited(&self) -> MutexGuard<'_, Awaiting> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it lacks, for a child that was just forked.
    pub(super) fn pending(&self) -> Pending {
        self.awaited().pending.clone()
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    pub(super) fn end(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    /// What is awaited from an address on, to the end of its run.
    pub(super) fn at(&self, address: u64) -> Option<Awaited> {
        self.awaited().pending.at(address)
    }

    /// What is awaited first from an address on.
    pub(super) fn next(&self, address: u64) -> Option<Awaited> {
        self.awaited().pending.next(address)
    }

    /// The next part for the background transfer, which goes round until nothing is pending.
    pub(super) fn advance(&self, bytes_max: u64) -> Option<Awaited> {
        if self.is_gone() {
            return None;
        }
        let mut awaited = self.awaited();
        let run = awaited.pending.next(awaited.cursor).or_else(|| awaited.pending.next(0))?;
        let run = Awaited { end: run.end.min(run.start + bytes_max), ..run };
        awaited.cursor = run.end;
        Some(run)
    }

    /// Reads what the task of this number did and wants, changes of its mappings first and taken note of; with what a child
    /// lacks that it forked. Only one thread may.
    pub(super) fn events(
        &self,
        number: usize,
        journal: &mut Journal,
    ) -> std::io::Result<Vec<(Event, Pending)>> {
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let messages = journal.read(number, &self.uffd)?;
        let mut events: Vec<Event> = messages.iter().map(Message::event).collect();
        // What is read has begun to happen: a fault that waits beside it is answered by what holds after.
        events.sort_by_key(|event| matches!(event, Event::Fault(_)));
        let noted = events.into_iter().map(|event| {
            self.note(&event);
            // The kernel holds back every copy from the fork on until its event is read, and the gate does from then on: what
            // is pending now was so at the fork. What the parent does next may have been read with it.
            let lacks = if let Event::Fork(_) = event { self.pending() } else { Pending::default() };
            (event, lacks)
        });
        Ok(noted.collect())
    }

    /// Takes note of what it did with its mappings.
    pub(super) fn note(&self, event: &Event) {
        match event {
            Event::Gone { start, end } => self.awaited().pending.remove(*start, *end),
            Event::Remap { from, to, length } => self.awaited().pending.remap(*from, *to, *length),
            _ => {}
        }
    }

    /// Keeps events from being read until it is dropped.
    pub(super) fn gate(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts what is still awaited of a run whose content was read before; returns how many pages were put.
    /// The caller has the gate, or is the reader of the events.
    pub(super) fn put(&self, run: Awaited, bytes: &[u8]) -> Result<(u64, Put), Errno> {
        let parts = self.awaited().pending.still(run);
        let mut pages = 0;
        for part in parts {
            let content = &bytes[(part.start - run.start) as usize..(part.end - run.start) as usize];
            let (put, ended) = self.put_part(part.start, content)?;
            pages += put;
            if ended != Put::Done {
                return Ok((pages, ended));
            }
        }
        Ok((pages, Put::Done))
    }

    fn put_part(&self, start: u64, bytes: &[u8]) -> Result<(u64, Put), Errno> {
        let page = PAGE_SIZE as usize;
        let (mut done, mut pages) = (0, 0);
        // One page at a time after the kernel did not find one mapping for all.
        let mut step = bytes.len();
        let mut asked_again = false;
        let ended = loop {
            if done == bytes.len() {
                break Put::Done;
            }
            let piece = &bytes[done..bytes.len().min(done + step)];
            match sys::copy(&self.uffd, start + done as u64, piece) {
                Ok(length) => {
                    pages += (length / page) as u64;
                    done += length;
                    asked_again = false;
                }
                Err(Errno::EAGAIN) => break Put::Changing,
                Err(Errno::ENOMEM) => break Put::NoMemory,
                Err(Errno::ENOENT) if step > page => step = page,
                // No mapping of ours is there, or one is being moved away: the kernel looks for changes under way first (EAGAIN) and
                // then for the mapping, so that one that begins in between says this. Asked once more it says EAGAIN until the
                // event is read.
                Err(Errno::ENOENT) if !asked_again => asked_again = true,
                // Present already; or given up by an event that was read.
                Err(Errno::EEXIST | Errno::ENOENT) => {
                    done += page;
                    asked_again = false;
                }
                Err(Errno::ESRCH | Errno::ENOSPC) => {
                    self.end();
                    break Put::Gone;
                }
                Err(error) => return Err(error),
            }
        };
        self.awaited().pending.remove(start, start + done as u64);
        Ok((pages, ended))
    }
}
