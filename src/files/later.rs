//! Content of clones that is read, compared and emitted after the thaw.
//!
//! Invariants: until it is emitted, the scanner knows nothing of the file's blocks at the other end; what is emitted is what
//! the tasks left in the freeze, or the epoch fails.

use std::{fs::File, io};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::{
    BLOCK_SIZE,
    look::{blocks_in, next_data, read_block, tag_of},
    scan::{Emit, FilesStats, Phase},
    state::{Key, Tag, UNKNOWN, ZEROS, path_of},
};
use crate::wire::message::{FileKind, FileMeta, FileRecord};

/// Of what a freeze may hold in memory, this much is content of files; the rest is for what goes with it.
const HELD_BYTES_MAX: u64 = super::FROZEN_BYTES_MAX / 8 * 7;

/// From so much content of a file on, a clone may stand for it in memory; and most clones of a freeze: descriptors.
const CLONED_BYTES_MIN: u64 = 1 << 20;
const CLONES_MAX: usize = 256;
/// How far is read ahead of what is compared (16 MiB).
const AHEAD_BLOCKS: usize = 256;

/// A file that was cloned.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) tree: u32,
    pub(super) key: Key,
    pub(super) meta: FileMeta,
    /// What the other end has.
    pub(super) sent: Vec<Tag>,
    /// What is in the clone, if it is known.
    pub(super) now: Option<Vec<Tag>>,
    pub(super) clone: File,
}

/// What is left to be read of a freeze, and how much content it holds in memory.
#[derive(Debug, Default)]
pub(super) struct Later {
    contents: Vec<Content>,
    /// Of the scan that is under way.
    new: Vec<Content>,
    /// The freeze's last scan is over.
    is_whole: bool,
    held_bytes: u64,
}

impl Later {
    /// A scan begins, or not if something is left of another freeze, which is then never emitted.
    pub(super) fn begin(&mut self, phase: Phase) -> bool {
        if phase == Phase::Running {
            self.held_bytes = 0;
        }
        self.contents.is_empty() || (phase != Phase::Running && !self.is_whole)
    }

    /// A scan of one tree is over. What it has looked at again is not what was to be read of it before. How many clones
    /// it took.
    pub(super) fn end(&mut self, tree: u32, phase: Phase, is_changed: impl Fn(&Key) -> bool) -> u64 {
        let cloned = self.new.len() as u64;
        self.contents.retain(|content| content.tree != tree || !is_changed(&content.key));
        self.contents.append(&mut self.new);
        self.is_whole = phase == Phase::Frozen;
        cloned
    }

    /// Whether so much content of a file is better cloned than held.
    pub(super) fn is_beyond_memory(&self, bytes: u64) -> bool {
        let has_room = self.held_bytes + bytes <= HELD_BYTES_MAX;
        !has_room && bytes >= CLONED_BYTES_MIN && self.contents.len() + self.new.len() < CLONES_MAX
    }

    pub(super) fn hold(&mut self, bytes: u64) {
        self.held_bytes += bytes;
    }

    pub(super) fn add(&mut self, content: Content) {
        self.new.push(content);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.contents.is_empty()
    }

    pub(super) fn into_contents(self) -> Vec<Content> {
        self.contents
    }
}

impl Content {
    pub(super) fn path(&self) -> Vec<u8> {
        path_of(&self.key)
    }

    /// Emits what differs from what was sent; gives the tags of all blocks.
    pub(super) fn emit(&self, emit: Emit<'_>, stats: &mut FilesStats) -> io::Result<Vec<Tag>> {
        let FileKind::Regular { size } = self.meta.kind else { return Ok(Vec::new()) };
        let (count, tree) = (blocks_in(size), self.tree);
        let mut tags = vec![ZEROS; count];
        let mut buf = vec![0; BLOCK_SIZE.min(size as usize)];
        let (mut data, mut is_first) = (next_block(&self.clone, 0)?, true);
        for (block, tag) in tags.iter_mut().enumerate() {
            if block % AHEAD_BLOCKS == 0 {
                self.read_ahead(block + AHEAD_BLOCKS);
            }
            let known = self.now.as_ref().and_then(|now| now.get(block)).filter(|known| **known != UNKNOWN);
            let sent = self.sent.get(block).unwrap_or(&ZEROS);
            if known == Some(sent) {
                *tag = *sent;
                continue;
            }
            if data.is_some_and(|data| data < block) {
                data = next_block(&self.clone, block)?;
            }
            let want = (size - block as u64 * BLOCK_SIZE as u64).min(BLOCK_SIZE as u64) as usize;
            let is_hole = data != Some(block);
            if is_hole {
                buf[..want].fill(0);
            } else {
                if read_block(&self.clone, block, size, &mut buf)? < want {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                *tag = tag_of(&buf[..want]);
                stats.compared_bytes += want as u64;
            }
            if known.is_some_and(|known| known != tag) {
                return Err(io::Error::other("its clone is not what it was"));
            }
            if tag == sent {
                continue;
            }
            if std::mem::take(&mut is_first) {
                emit(FileRecord::Entry { tree, path: self.path(), meta: self.meta.clone() }, &[]);
            }
            let offset = block as u64 * BLOCK_SIZE as u64;
            emit(FileRecord::Data { tree, path: self.path(), offset }, &buf[..want]);
            stats.data_bytes += want as u64;
        }
        stats.changed += u64::from(!is_first);
        Ok(tags)
    }

    /// Has blocks read meanwhile: nothing of a clone is in memory, and alone the kernel reads too little ahead.
    fn read_ahead(&self, block: usize) {
        let [offset, len] = [block, AHEAD_BLOCKS].map(|blocks| (blocks * BLOCK_SIZE) as i64);
        // Where this fails it only takes longer.
        let _ = posix_fadvise(&self.clone, offset, len, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    }
}

/// The first block from `from` on that is not all in a hole.
pub(super) fn next_block(file: &File, from: usize) -> io::Result<Option<usize>> {
    let data = next_data(file, (from * BLOCK_SIZE) as u64)?;
    Ok(data.map(|offset| (offset / BLOCK_SIZE as u64) as usize))
}
