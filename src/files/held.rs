//! What a standby has of files already: told by hashes of blocks, kept instead of being sent.
//!
//! ```text
//!   the standby's trees ── hashes(key) ──► HeldFiles ──► Scanner::offer ──► Keep, Entry, Data of what differs
//!                                                            │
//!   Receiver: keeps those blocks, empties the rest ◄── has_blocks: it really has them, else everything is asked for
//! ```
//!
//! Only of files with one name in plain trees: what an overlay has is not all in its upper directory. As with a removal of the
//! whole tree, which comes first, an epoch with such records may be applied again: what was kept is then what later records
//! of the epoch make of it anyway.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt as _,
    },
};

use nix::{
    fcntl::{FallocateFlags, OFlag, fallocate, open, openat, renameat},
    sys::stat::Mode,
    unistd::{ftruncate, syncfs},
};

use super::{
    BLOCK_SIZE, DEPTH_MAX,
    later::next_block,
    look::{blocks_in, is_zero, read_block},
    scan::open_in,
    sys,
    tree::Target,
    walk::{names_of, push_name},
};
use crate::delta::{KEY_LEN, SUM_LEN, ZEROS, hash_of};

/// Blocks whose hashes are told at once (64 MiB).
const TOLD_BLOCKS: usize = 1024;

/// Blocks that lie together: the first one's number, and how many.
pub type Blocks = (u64, u64);
/// The hash of a block under a key; all zero for one that holds only zeros.
pub(super) type BlockSum = [u8; SUM_LEN];

/// Why hashes are not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the hashes of a file's blocks are out of order")]
pub struct OutOfOrder;

/// What a standby says it has of files.
#[derive(Debug)]
pub struct HeldFiles {
    key: [u8; KEY_LEN],
    trees: HashMap<u32, HashMap<Vec<u8>, Vec<BlockSum>>>,
}

/// That of one tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeldTree<'a> {
    key: &'a [u8; KEY_LEN],
    files: &'a HashMap<Vec<u8>, Vec<BlockSum>>,
}

impl HeldFiles {
    /// For hashes under this key.
    pub fn new(key: [u8; KEY_LEN]) -> Self {
        Self { key, trees: HashMap::new() }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.trees.is_empty()
    }

    /// Takes the hashes of a file's blocks from number `first` on, behind those that came before.
    pub fn add(&mut self, tree: u32, path: Vec<u8>, first: u64, sums: &[u8]) -> Result<(), OutOfOrder> {
        let (sums, rest) = sums.as_chunks::<SUM_LEN>();
        let file = self.trees.entry(tree).or_default().entry(path).or_default();
        if first != file.len() as u64 || !rest.is_empty() {
            return Err(OutOfOrder);
        }
        file.extend_from_slice(sums);
        Ok(())
    }

    pub(super) fn tree(&self, tree: u32) -> Option<HeldTree<'_>> {
        self.trees.get(&tree).map(|files| HeldTree { key: &self.key, files })
    }
}

impl HeldTree<'_> {
    /// The hashes of a file's blocks.
    pub(super) fn file(&self, path: &[u8]) -> Option<&[BlockSum]> {
        self.files.get(path).map(Vec::as_slice)
    }

    pub(super) fn sum_of(&self, block: &[u8]) -> BlockSum {
        sum_of(self.key, block)
    }
}

fn sum_of(key: &[u8; KEY_LEN], block: &[u8]) -> BlockSum {
    if is_zero(block) { ZEROS } else { hash_of(key, block) }
}

/// Is told a file's path, the number of a block, and the hashes of that one and those behind it; false for no more.
pub type EachFile<'a> = dyn FnMut(&[u8], u64, Vec<u8>) -> bool + 'a;

/// Reads the files of a copy and tells the hashes of their blocks: nothing, if there is no copy, or if it is an overlay's. False
/// if it was told to stop.
///
/// What a crash of the host would take back is written to its disk first.
pub fn hashes(copy: &Target, key: &[u8; KEY_LEN], each: &mut EachFile<'_>) -> io::Result<bool> {
    let Some(root) = open_copy(copy)? else { return Ok(true) };
    syncfs(&root)?;
    in_directory(root.as_fd(), &mut Vec::new(), key, each, 0)
}

/// Opens the root of a copy that can be told of.
fn open_copy(copy: &Target) -> io::Result<Option<OwnedFd>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    match open(&copy.path, flags, Mode::empty()) {
        _ if copy.upper.is_some() => Ok(None),
        Ok(root) => Ok(Some(root)),
        Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn in_directory(
    dir: BorrowedFd<'_>,
    path: &mut Vec<u8>,
    key: &[u8; KEY_LEN],
    each: &mut EachFile<'_>,
    depth: usize,
) -> io::Result<bool> {
    if depth > DEPTH_MAX {
        return Ok(true);
    }
    for name in names_of(dir)? {
        let end = push_name(path, &name);
        let stat = sys::stat_at(dir, &name)?;
        let goes_on = match stat.format() {
            libc::S_IFDIR if !stat.mount_root => {
                let inner = open_in(dir, name.to_bytes(), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
                in_directory(inner.as_fd(), path, key, each, depth + 1)?
            }
            libc::S_IFREG if stat.nlink == 1 && stat.size > 0 && !stat.mount_root => {
                let file = open_in(dir, name.to_bytes(), OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
                in_file(&File::from(file), stat.size, path, key, each)?
            }
            _ => true,
        };
        path.truncate(end);
        if !goes_on {
            return Ok(false);
        }
    }
    Ok(true)
}

fn in_file(
    file: &File,
    size: u64,
    path: &[u8],
    key: &[u8; KEY_LEN],
    each: &mut EachFile<'_>,
) -> io::Result<bool> {
    let (blocks, mut buf) = (blocks_in(size), vec![0; BLOCK_SIZE.min(size as usize)]);
    let mut data = next_block(file, 0)?;
    for first in (0..blocks).step_by(TOLD_BLOCKS) {
        let mut sums = Vec::new();
        for block in first..blocks.min(first + TOLD_BLOCKS) {
            if data.is_some_and(|data| data < block) {
                data = next_block(file, block)?;
            }
            let is_hole = data != Some(block);
            let len = if is_hole { 0 } else { read_block(file, block, size, &mut buf)? };
            sums.extend(sum_of(key, &buf[..len]));
        }
        if !each(path, first as u64, sums) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a copy really has these blocks of a file: `digest` is the BLAKE3 of their content, one after the other. Then a
/// [`Receiver`](super::Receiver) can keep them.
pub fn has_blocks(copy: &Target, path: &[u8], runs: &[Blocks], digest: &[u8; 32]) -> io::Result<bool> {
    let Some(root) = open_copy(copy)? else { return Ok(false) };
    let file = match open_in(root.as_fd(), path, OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
        Ok(file) => File::from(file),
        Err(error) if is_elsewhere(&error) => return Ok(false),
        Err(error) => return Err(error),
    };
    let stat = sys::stat_at(file.as_fd(), c"")?;
    if stat.format() != libc::S_IFREG || stat.nlink != 1 {
        return Ok(false);
    }
    let (blocks, mut hasher) = (blocks_in(stat.size) as u64, blake3::Hasher::new());
    let mut buf = vec![0; BLOCK_SIZE];
    for (first, count) in runs {
        let Some(end) = first.checked_add(*count).filter(|end| *end <= blocks) else { return Ok(false) };
        for block in *first..end {
            let len = read_block(&file, block as usize, stat.size, &mut buf)?;
            hasher.update(&buf[..len]);
        }
    }
    Ok(hasher.finalize() == *digest)
}

/// The path leads nowhere, or out of the tree.
fn is_elsewhere(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::EXDEV))
}

/// Makes of a file that is there what a new one would be but for these blocks. If it has other names by now, which it can
/// only have where the epoch is applied again, those keep what it was.
pub(super) fn keep_only(dir: BorrowedFd<'_>, name: &CStr, runs: &[Blocks], is_alone: bool) -> io::Result<()> {
    let file = File::from(open_in(dir, name.to_bytes(), OFlag::O_RDWR | OFlag::O_NONBLOCK)?);
    let size = file.metadata()?.len();
    let bytes = |(first, count): &Blocks| {
        let start = first.saturating_mul(BLOCK_SIZE as u64).min(size);
        start..first.saturating_add(*count).saturating_mul(BLOCK_SIZE as u64).min(size)
    };
    if is_alone {
        let mut from = 0;
        for kept in runs.iter().map(bytes) {
            empty(&file, from, kept.start)?;
            from = kept.end;
        }
        return empty(&file, from, size);
    }
    // Under another name until it is whole: a crash must not leave a part of it under this one. What is left of such a one goes
    // with all that is not of the epoch.
    let (spare, new) = new_file(dir)?;
    ftruncate(&new, size.cast_signed())?;
    let mut buf = vec![0; BLOCK_SIZE];
    for kept in runs.iter().map(bytes) {
        for start in kept.clone().step_by(BLOCK_SIZE) {
            let part = &mut buf[..(kept.end - start).min(BLOCK_SIZE as u64) as usize];
            file.read_exact_at(part, start)?;
            new.write_all_at(part, start)?;
        }
    }
    new.sync_all()?;
    Ok(renameat(dir, spare.as_c_str(), dir, name)?)
}

/// Makes a file under a name that nothing has.
fn new_file(dir: BorrowedFd<'_>) -> io::Result<(CString, File)> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    for number in 0_u64.. {
        let name = CString::new(format!(".standin-{number}"))?;
        match openat(dir, name.as_c_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(file) => return Ok((name, file.into())),
            Err(nix::Error::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Makes bytes zeros, without space where the file system can.
fn empty(file: &File, from: u64, to: u64) -> io::Result<()> {
    if from >= to {
        return Ok(());
    }
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    if fallocate(file, punch, from.cast_signed(), (to - from).cast_signed()).is_ok() {
        return Ok(());
    }
    let zeros = vec![0; BLOCK_SIZE];
    for start in (from..to).step_by(BLOCK_SIZE) {
        file.write_all_at(&zeros[..(to - start).min(BLOCK_SIZE as u64) as usize], start)?;
    }
    Ok(())
}
