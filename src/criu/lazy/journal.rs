//! What the tasks did with their memory since they were restored, kept where the end of the process that serves them does
//! not reach it (a memfd): whoever goes on knows by it which page is awaited where.
//!
//! ```text
//!   page 0: messages being read ‖ whose they are, before which entry ‖ how many entries, phase
//!   then:   entries ── a task that CRIU sent, or a message of one (fork, move, gone), in the order in which they were read
//! ```
//!
//! Invariants, at whatever instruction the writer is killed: the kernel puts a message into page 0 in the same call by
//! which it lets the task go on, so none is lost; an entry counts once the number of entries says so, and page 0 says
//! before which entry its messages come, so none is there twice. Each step is a system call of its own, which no compiler
//! reorders.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd, RawFd},
        unix::fs::FileExt as _,
    },
};

use memmap2::MmapMut;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::sys::{self, EVENTS_MAX, Event, MESSAGE_BYTES, Message};
use crate::model::PAGE_SIZE;

/// Messages that are read at once.
const READING_BYTES: usize = EVENTS_MAX * MESSAGE_BYTES;
/// Whose messages they are (from 1; 0 is nobody), and the number of entries before them.
const READING_AT: u64 = 1024;
const COUNT_AT: u64 = 1040;
const PHASE_AT: u64 = 1048;
const ENTRIES_AT: u64 = PAGE_SIZE;
/// Task, message.
const ENTRY_BYTES: usize = 8 + MESSAGE_BYTES;
/// 80 MB. A task that changes its mappings more often before its pages are there cannot be served by another any more.
const ENTRIES_MAX: u64 = 2 << 20;

const HELD: u64 = 1;
const OVERFLOWN: u64 = 2;

const _: () = assert!(READING_BYTES as u64 <= READING_AT);

/// One entry.
#[derive(Debug)]
pub(super) enum Entry {
    /// CRIU has sent a task, by its pid in the image, and its userfaultfd.
    Task { pid: u32, uffd: RawFd },
    /// The task of this number (they are numbered as they come, forked ones too) did this.
    Did { task: usize, message: Message },
}

impl Entry {
    /// The userfaultfd that came with it: of a task that CRIU sent, or of one that was forked.
    pub(super) fn uffd(&self) -> Option<RawFd> {
        match self {
            Self::Task { uffd, .. } => Some(*uffd),
            Self::Did { message, .. } => match message.event() {
                Event::Fork(uffd) => Some(uffd),
                _ => None,
            },
        }
    }
}

/// The journal of one restore.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    /// Page 0.
    reading: MmapMut,
    count: u64,
}

impl Journal {
    /// An empty one.
    pub(super) fn new() -> io::Result<Self> {
        let file = File::from(memfd_create(c"standin-tasks", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(ENTRIES_AT)?;
        let reading = sys::shared_page(&file)?;
        Ok(Self { file, reading, count: 0 })
    }

    /// Whether all that CRIU has sent is in it, so that another process can go on by it.
    pub(super) fn is_held(&self) -> bool {
        self.word(PHASE_AT).is_ok_and(|phase| phase == HELD)
    }

    /// CRIU has sent all it has: from now on the tasks may run.
    pub(super) fn hold(&self) -> io::Result<()> {
        self.file.write_all_at(&HELD.to_ne_bytes(), PHASE_AT)
    }

    /// CRIU has sent a task.
    pub(super) fn add(&mut self, pid: u32, uffd: &OwnedFd) -> io::Result<()> {
        let message = Message::new(0, [u64::from(pid), uffd.as_raw_fd() as u64, 0]);
        self.append(&[(0, message)])
    }

    /// Reads what the task of a number did and wants.
    pub(super) fn read(&mut self, task: usize, uffd: &OwnedFd) -> io::Result<Vec<Message>> {
        self.reading[..READING_BYTES].fill(0);
        let whose = [task as u64 + 1, self.count].map(u64::to_ne_bytes);
        self.file.write_all_at(whose.as_flattened(), READING_AT)?;
        let messages = sys::read_messages(uffd, &mut self.reading[..READING_BYTES])?;
        self.keep(task, &messages)?;
        Ok(messages)
    }

    /// Makes entries of what another process will have to know.
    fn keep(&mut self, task: usize, messages: &[Message]) -> io::Result<()> {
        let lasting = messages.iter().filter(|message| message.lasts());
        let entries: Vec<(u64, Message)> = lasting.map(|message| (task as u64 + 1, *message)).collect();
        if entries.is_empty() { Ok(()) } else { self.append(&entries) }
    }

    fn append(&mut self, entries: &[(u64, Message)]) -> io::Result<()> {
        if self.count + entries.len() as u64 > ENTRIES_MAX {
            return self.file.write_all_at(&OVERFLOWN.to_ne_bytes(), PHASE_AT);
        }
        let mut bytes = Vec::with_capacity(entries.len() * ENTRY_BYTES);
        for (task, message) in entries {
            bytes.extend_from_slice(&task.to_ne_bytes());
            bytes.extend_from_slice(message.bytes());
        }
        self.file.write_all_at(&bytes, ENTRIES_AT + self.count * ENTRY_BYTES as u64)?;
        self.count += entries.len() as u64;
        self.file.write_all_at(&self.count.to_ne_bytes(), COUNT_AT)
    }

    /// For a process that goes on where another was ended: all entries, what was being read among them.
    pub(super) fn take_over(&mut self) -> io::Result<Vec<Entry>> {
        self.count = self.word(COUNT_AT)?;
        let (task, before) = (self.word(READING_AT)?, self.word(READING_AT + 8)?);
        if let (Some(task), true) = (task.checked_sub(1), before == self.count) {
            let messages = sys::messages(&self.reading[..READING_BYTES]);
            self.keep(task as usize, &messages)?;
        }
        let mut bytes = vec![0; self.count as usize * ENTRY_BYTES];
        self.file.read_exact_at(&mut bytes, ENTRIES_AT)?;
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        Ok(entries.iter().map(entry).collect())
    }

    fn word(&self, at: u64) -> io::Result<u64> {
        let mut word = [0; 8];
        self.file.read_exact_at(&mut word, at)?;
        Ok(u64::from_ne_bytes(word))
    }
}

fn entry(bytes: &[u8; ENTRY_BYTES]) -> Entry {
    let task = u64::from_ne_bytes(std::array::from_fn(|at| bytes[at]));
    let message = Message::from(std::array::from_fn(|at| bytes[8 + at]));
    match task.checked_sub(1) {
        None => Entry::Task { pid: message.word(0) as u32, uffd: message.word(1) as RawFd },
        Some(task) => Entry::Did { task: task as usize, message },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a process that is killed leaves it.
    fn left(journal: &Journal) -> Journal {
        let file = journal.file.try_clone().unwrap();
        let reading = sys::shared_page(&file).unwrap();
        Journal { file, reading, count: 0 }
    }

    fn texts(journal: &Journal) -> Vec<String> {
        left(journal).take_over().unwrap().iter().map(|entry| format!("{entry:?}")).collect()
    }

    #[test]
    fn whatever_was_read_when_the_writer_was_killed_is_there_once() {
        let mut journal = Journal::new().unwrap();
        let uffd = OwnedFd::from(File::open("/dev/null").unwrap());
        journal.add(7, &uffd).unwrap();
        journal.hold().unwrap();
        assert!(left(&journal).is_held());
        assert_eq!(texts(&journal).len(), 1);

        let gone = Message::gone(0x1000, 0x3000);
        // A message was put there, and nothing was done about it.
        let whose = [1, journal.count].map(u64::to_ne_bytes);
        journal.file.write_all_at(whose.as_flattened(), READING_AT).unwrap();
        journal.reading[..MESSAGE_BYTES].copy_from_slice(gone.bytes());
        let after = texts(&journal);
        assert_eq!(after.len(), 2, "{after:?}");
        // The one that took over was killed too, before or after it had counted the entry.
        assert_eq!(texts(&journal), after);
        // An entry that was written and not counted.
        let at = ENTRIES_AT + journal.count * ENTRY_BYTES as u64;
        journal.file.write_all_at(&[9; ENTRY_BYTES], at + ENTRY_BYTES as u64).unwrap();
        assert_eq!(texts(&journal), after);
    }

    #[test]
    fn a_journal_that_is_full_can_be_gone_on_by_nobody() {
        let mut journal = Journal::new().unwrap();
        journal.hold().unwrap();
        journal.count = ENTRIES_MAX;
        journal.keep(0, &[Message::gone(0, 4096)]).unwrap();
        assert!(!journal.is_held());
    }
}
