//! Clones of big files, so that the freeze need not read them: the file system shares their blocks until either side
//! writes (`FICLONE`: btrfs, XFS with reflinks). A clone has no name and goes with its descriptor.
//!
//! ```text
//!   running ── write_back ──► little is dirty, what a clone will take is known
//!   frozen  ── take ──► a clone         (else: read and compared at once)
//!   thawed  ── the clone is read and compared, see `later`
//! ```
//!
//! A clone is no gain in itself. The kernel first writes what is dirty of the file, and waits for the disk; then it shares
//! the extents one by one. Milliseconds in the freeze (two processors, loop devices, 6.18; the second figure is of one on a
//! disk):
//!
//! | a file of 512 MiB | btrfs | XFS |
//! |---|---|---|
//! | reading all of it out of the page cache, without a hash | 57, 115 | 62, 70 |
//! | a clone, nothing dirty | 0.25, 0.24 | 0.42, 0.23 |
//! | a clone, 20 pages dirty | 2.5, 5.2 | 8.0, 5.0 |
//! | a clone, 250 pages dirty, 2,500 extents | 20, 35 | 62, 29 |
//! | a clone, all dirty | 1700, 364 | 148, 409 |
//! | a clone right after what was dirty has been written back | 0.4, 0.5 | 1.5, 1 |
//! | a clone of 25,000 extents, however little is dirty | 250, 400 | 700 to 1700 |
//!
//! So what is dirty is written back right before the freeze, and a file is cloned only if what that and its extents let
//! expect is clearly less than what reading it in a freeze really took: of a database that rewrites scattered pages, whose
//! extents are small, a clone costs more than it saves. (On XFS the clones themselves make extents small: what is written
//! while one is there goes elsewhere.) What a clone took is remembered, in case it was expected wrongly.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};

use super::{
    scan::open_content,
    state::{Key, State, path_of},
    sys,
};

/// A smaller file is not worth it, whatever it takes.
const BYTES_MIN: u64 = 8 << 20;
/// Reading that takes no longer hides beside what CRIU does meanwhile.
const READ_MIN: Duration = Duration::from_millis(6);
/// What a clone takes in any case, and for each extent, the most that was measured, until some were taken: from 10 µs (on
/// btrfs) on.
const ALWAYS: Duration = Duration::from_micros(500);
const EXTENT: Duration = Duration::from_micros(60);
/// A clone of that many extents tells what one takes.
const EXTENTS_TELLING: u32 = 64;
/// A clone is taken if it is expected to cost at most one part in so many of the reading that it spares.
const GAIN_MIN: u32 = 2;
/// Write-backs before a freeze, each of what was dirtied during the one before; enough if one takes no longer than this.
const ROUNDS_MAX: u32 = 3;
const ROUND_ENOUGH: Duration = Duration::from_millis(1);
/// From the last write-back to the freeze more time passes than one takes.
const MORE_DIRTY: u32 = 4;
/// A file that was not read for so many epochs is forgotten.
const IDLE_EPOCHS_MAX: u32 = 16;
/// Most files that are remembered, and clones of one freeze: descriptors.
const FILES_MAX: usize = 64;

/// In which freezes files may be cloned, on file systems that can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cloning {
    /// Only where content would otherwise be more than a freeze may hold in memory: what follows the freeze is waited for
    /// as well.
    #[default]
    BeyondMemory,
    /// Also where it makes the freeze shorter.
    Shorter,
    /// Whatever is read, though it makes the freeze longer: to try what follows.
    Always,
}

/// The big files of a tree, and what it takes to clone them.
#[derive(Debug, Default)]
pub(super) struct Clones {
    /// Whether the file system can, once it was tried.
    able: Option<bool>,
    /// What sharing an extent takes, if clones have told.
    extent: Option<Duration>,
    files: HashMap<Key, Big>,
}

#[derive(Debug, Default)]
struct Big {
    /// Reading it in a freeze took so long the last time.
    read: Option<Duration>,
    /// Cloning it in the next freeze is expected to take so long; known right before it.
    expected: Option<Duration>,
    /// In how many pieces it was then.
    extents: u32,
    /// Cloning it took so long; less with every epoch, so that it is tried again.
    took: Duration,
    idle_epochs: u32,
}

impl Big {
    /// Whether a clone that takes so long shortens the freeze.
    fn is_gain(&self, expected: Duration) -> bool {
        let takes = expected.max(self.took) * GAIN_MIN;
        self.read.is_some_and(|read| read >= READ_MIN && takes <= read)
    }

    /// Has what is dirty written, if a clone may be a gain, and says what it will take.
    fn prepare(&mut self, file: &File, extent: Duration) -> io::Result<()> {
        let sharing = |extents: u32| ALWAYS + extent.saturating_mul(extents);
        if !self.is_gain(sharing(sys::extents_of(file)?)) {
            return Ok(());
        }
        let mut last = Duration::ZERO;
        for _ in 0..ROUNDS_MAX {
            let began = Instant::now();
            sys::write_back(file)?;
            last = began.elapsed();
            if last <= ROUND_ENOUGH {
                break;
            }
        }
        self.extents = sys::extents_of(file)?;
        self.expected = Some(sharing(self.extents) + last * MORE_DIRTY);
        Ok(())
    }
}

impl Clones {
    /// A file was read and compared; `took`: in a freeze.
    pub(super) fn was_read(&mut self, key: &Key, bytes: u64, took: Option<Duration>) {
        if bytes < BYTES_MIN || (self.files.len() >= FILES_MAX && !self.files.contains_key(key)) {
            return;
        }
        let big = self.files.entry(key.clone()).or_default();
        big.idle_epochs = 0;
        big.read = took.or(big.read);
    }

    /// Right before a freeze: has what is dirty of the big files written, so that a clone need not wait for it.
    pub(super) fn write_back(&mut self, root: BorrowedFd<'_>, sent: &State) {
        self.files.retain(|_, big| {
            big.idle_epochs += 1;
            (big.took, big.expected) = (big.took / 2, None);
            big.idle_epochs <= IDLE_EPOCHS_MAX
        });
        for (key, big) in &mut self.files {
            if big.read.is_none_or(|read| read < READ_MIN) {
                continue;
            }
            let Some(node) = sent.get(key) else { continue };
            self.able = self.able.or_else(|| is_able(root));
            if self.able != Some(true) {
                return;
            }
            // One that is gone by now is not cloned.
            let file = open_content(root, &path_of(key), &node.stat);
            let prepared = file.and_then(|file| big.prepare(&file, self.extent.unwrap_or(EXTENT)));
            if let Err(error) = prepared {
                tracing::debug!(%error, "a file is not cloned in this freeze");
            }
        }
    }

    /// In the freeze: a clone of the file, if that is a gain and the file system agrees.
    pub(super) fn take(
        &mut self,
        root: BorrowedFd<'_>,
        key: &Key,
        file: &File,
        cloning: Cloning,
    ) -> Option<File> {
        match cloning {
            Cloning::BeyondMemory => return None,
            Cloning::Shorter => {}
            Cloning::Always => return self.take_anyway(root, file),
        }
        let big = self.files.get_mut(key)?;
        let expected = big.expected.take().filter(|expected| big.is_gain(*expected))?;
        let began = Instant::now();
        let clone = clone_of(root, file);
        big.took = began.elapsed();
        tracing::trace!(took = ?big.took, ?expected, big.extents, read = ?big.read, "cloned");
        if big.extents >= EXTENTS_TELLING {
            let told = big.took / big.extents;
            self.extent = Some(self.extent.map_or(told, |before| (before + told) / 2));
        }
        if let Err(error) = &clone {
            tracing::debug!(%error, "a file is read in the freeze, as it cannot be cloned");
            self.files.remove(key);
        }
        clone.ok()
    }

    /// In the freeze: a clone of the file, whatever it takes, if the file system can.
    pub(super) fn take_anyway(&mut self, root: BorrowedFd<'_>, file: &File) -> Option<File> {
        if self.able == Some(false) {
            return None;
        }
        clone_of(root, file).ok()
    }
}

/// Whether the file system of a directory can clone, tried without touching anything that is in it; `None`: that was no
/// answer.
fn is_able(root: BorrowedFd<'_>) -> Option<bool> {
    let tried = unnamed(root).and_then(|empty| clone_of(root, &empty));
    let lacking = [libc::ENOSPC, libc::EDQUOT, libc::ENOMEM, libc::EMFILE, libc::ENFILE];
    match tried {
        Ok(_) => Some(true),
        Err(error) if error.raw_os_error().is_some_and(|code| lacking.contains(&code)) => None,
        Err(_) => Some(false),
    }
}

fn clone_of(root: BorrowedFd<'_>, file: &File) -> io::Result<File> {
    let clone = unnamed(root)?;
    sys::set_clonable(&clone, file)?;
    sys::clone(&clone, file.as_fd())?;
    Ok(clone)
}

/// A file on a directory's file system that has no name: nothing is left of it when it is closed.
fn unnamed(root: BorrowedFd<'_>) -> io::Result<File> {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    Ok(File::from(openat(root, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR)?))
}
