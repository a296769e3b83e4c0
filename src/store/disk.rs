//! The file operations of the store, each with an error that names what was tried on what.
//!
//! Everything that changes the disk passes through here, so that the tests can end the store's life at
//! any such step (see `fault`), and so that every file is 0600 and every directory 0700.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{FallocateFlags, Flock, FlockArg, fallocate},
    sys::statvfs::statvfs,
};

/// What a store must outlive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The agent: the store lies in RAM (tmpfs); nothing is synced.
    Memory,
    /// The host: every commit is on the disk before it is acknowledged.
    Disk,
}

/// A file operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}: {source}{}", path.display(), hint(source))]
pub struct IoFault {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn hint(error: &io::Error) -> &'static str {
    if is_full(error) {
        " (free space there, enlarge a tmpfs with `mount -o remount,size=…`, or put the store on a larger disk)"
    } else {
        ""
    }
}

impl IoFault {
    /// Whether the file system was full (or a quota used up); worth trying again after space returned.
    pub fn is_full(&self) -> bool {
        is_full(&self.source)
    }
}

pub(super) trait Context<T> {
    fn context(self, doing: &'static str, path: &Path) -> Result<T, IoFault>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, doing: &'static str, path: &Path) -> Result<T, IoFault> {
        self.map_err(|error| IoFault { doing, path: path.to_owned(), source: error.into() })
    }
}

/// Ends the store's life here if a test asked for it.
#[cfg_attr(not(test), expect(clippy::unnecessary_wraps, reason = "fails in tests only"))]
fn step() -> io::Result<()> {
    #[cfg(test)]
    super::fault::step()?;
    Ok(())
}

pub(super) fn make_dir(path: &Path) -> Result<(), IoFault> {
    step().and_then(|()| DirBuilder::new().mode(0o700).create(path)).context("create directory", path)
}

/// Makes the directory if it is missing, and refuses one that somebody else could have prepared:
/// the default root lies in /dev/shm, where everybody may create names.
pub(super) fn own_dir(path: &Path) -> Result<(), IoFault> {
    const OTHERS_WRITE: u32 = 0o022;
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).context("create directory", path);
        }
        _ => {}
    }
    let found = fs::symlink_metadata(path).context("examine", path)?;
    let ours = found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw();
    if ours && found.mode() & OTHERS_WRITE == 0 {
        return Ok(());
    }
    let wrong = "it is not a directory that belongs to this user and that nobody else may write to: \
                 remove it, or choose another root for the store";
    Err(io::Error::new(io::ErrorKind::PermissionDenied, wrong)).context("trust", path)
}

pub(super) fn create(path: &Path) -> Result<File, IoFault> {
    let open = || OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    step().and_then(|()| open()).context("create", path)
}

pub(super) fn open_or_create(path: &Path) -> Result<File, IoFault> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    step().and_then(|()| options.open(path)).context("open", path)
}

/// Opens a file for reading and writing; `None` if it is not there.
pub(super) fn open_existing(path: &Path) -> Result<Option<File>, IoFault> {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("open", path),
    }
}

pub(super) fn append(path: &Path, bytes: &[u8]) -> Result<(), IoFault> {
    let write = || OpenOptions::new().append(true).create(true).mode(0o600).open(path)?.write_all(bytes);
    step().and_then(|()| write()).context("append to", path)
}

pub(super) fn write_at(file: &File, path: &Path, bytes: &[u8], offset: u64) -> Result<(), IoFault> {
    step().and_then(|()| file.write_all_at(bytes, offset)).context("write to", path)
}

/// Gives the bytes' blocks back; they read as zero from then on. The file keeps its length.
pub(super) fn punch(file: &File, path: &Path, offset: u64, len: u64) -> Result<(), IoFault> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let punch = || fallocate(file, flags, offset.cast_signed(), len.cast_signed()).map_err(io::Error::from);
    step().and_then(|()| punch()).context("punch a hole into", path)
}

/// Reads as `read_exact_at`, but what lies behind the end of the file (or in a hole) is zero.
pub(super) fn read_at(file: &File, path: &Path, buf: &mut [u8], offset: u64) -> Result<(), IoFault> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => {
                buf[done..].fill(0);
                return Ok(());
            }
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("read", path),
        }
    }
    Ok(())
}

pub(super) fn rename(from: &Path, to: &Path) -> Result<(), IoFault> {
    step().and_then(|()| fs::rename(from, to)).context("rename", from)
}

/// Gives the file a second name; one that is already there is replaced.
pub(super) fn link_anew(from: &Path, to: &Path) -> Result<(), IoFault> {
    remove_file(to)?;
    step().and_then(|()| fs::hard_link(from, to)).context("link", from)
}

/// Removes a file; one that is not there is fine.
pub(super) fn remove_file(path: &Path) -> Result<(), IoFault> {
    match step().and_then(|()| fs::remove_file(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("remove", path),
        _ => Ok(()),
    }
}

/// Removes a directory with all in it; one that is not there is fine.
pub(super) fn remove_tree(path: &Path) -> Result<(), IoFault> {
    match step().and_then(|()| fs::remove_dir_all(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("remove", path),
        _ => Ok(()),
    }
}

pub(super) fn sync_file(file: &File, path: &Path, durability: Durability) -> Result<(), IoFault> {
    match durability {
        Durability::Memory => Ok(()),
        Durability::Disk => step().and_then(|()| file.sync_all()).context("sync", path),
    }
}

/// Makes names in the directory durable.
pub(super) fn sync_dir(path: &Path, durability: Durability) -> Result<(), IoFault> {
    match durability {
        Durability::Memory => Ok(()),
        Durability::Disk => {
            step().and_then(|()| File::open(path)?.sync_all()).context("sync directory", path)
        }
    }
}

/// Makes every file directly in the directory, and their names, durable.
pub(super) fn sync_files_in(path: &Path, durability: Durability) -> Result<(), IoFault> {
    if durability == Durability::Memory {
        return Ok(());
    }
    for name in list(path)? {
        let path = path.join(name);
        let file = File::open(&path).context("open", &path)?;
        if file.metadata().context("examine", &path)?.is_file() {
            sync_file(&file, &path, durability)?;
        }
    }
    sync_dir(path, durability)
}

/// Makes a file with this content.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), IoFault> {
    write_at(&create(path)?, path, bytes, 0)
}

/// Replaces the file's content as a whole.
pub(super) fn replace(path: &Path, bytes: &[u8], durability: Durability) -> Result<(), IoFault> {
    let fresh = path.with_extension("new");
    remove_file(&fresh)?;
    let file = create(&fresh)?;
    write_at(&file, &fresh, bytes, 0)?;
    sync_file(&file, &fresh, durability)?;
    rename(&fresh, path)?;
    path.parent().map_or(Ok(()), |dir| sync_dir(dir, durability))
}

/// Names in the directory that are text; ours all are.
pub(super) fn list(path: &Path) -> Result<Vec<String>, IoFault> {
    let names = || -> io::Result<Vec<String>> {
        fs::read_dir(path)?
            .map(|entry| Ok(entry?.file_name()))
            .filter_map(|name| match name {
                Ok(name) => name.into_string().ok().map(Ok),
                Err(error) => Some(Err(error)),
            })
            .collect()
    };
    names().context("list", path)
}

/// Reads a file of at most `len_max` bytes.
pub(super) fn read_capped(path: &Path, len_max: u64) -> Result<Vec<u8>, IoFault> {
    let read = || {
        let len = fs::metadata(path)?.len();
        if len > len_max {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("{len} bytes are too many")));
        }
        fs::read(path)
    };
    read().context("read", path)
}

/// Takes the lock that keeps a second agent off the store; `None` if somebody holds it.
pub(super) fn lock(path: &Path) -> Result<Option<Flock<File>>, IoFault> {
    let file = open_or_create(path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error).context("lock", path),
    }
}

/// Bytes that may still be written in the directory's file system. A tmpfs may be larger than what RAM
/// has left, so for a store in memory the kernel's estimate of available memory counts too.
pub(super) fn available(dir: &Path, durability: Durability) -> Result<u64, IoFault> {
    let room = statvfs(dir).context("ask for the free space of", dir)?;
    let free = room.blocks_available() * room.fragment_size();
    // `size=0` means a tmpfs without a limit, which reports no blocks at all.
    let free = if room.blocks() == 0 { u64::MAX } else { free };
    match durability {
        Durability::Disk => Ok(free),
        Durability::Memory => Ok(memory_available().map_or(free, |memory| free.min(memory))),
    }
}

fn memory_available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
