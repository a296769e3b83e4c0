//! The workload's replicated directories in an epoch: compared and sent while it runs, put right in the freeze.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::engine::{CaptureError, Emit};
use crate::{
    files::{Cloning, FROZEN_BYTES_MAX, FileId, HeldFiles, InUse, Phase, ScanError, Scanner, Source},
    memory::{self, TreeError},
    wire::message::{FileRecord, FrameHead},
};

/// Content that changed during a round: from here on another one before the freeze is worth it.
const ROUND_BYTES_MIN: u64 = 8 << 20;
/// Most rounds of one epoch; files that change faster than they are sent are taken in the freeze all the same.
const ROUNDS_MAX: u32 = 4;
/// What a record takes beside its path and its body, about.
const RECORD_BYTES: u64 = 256;

/// How `maps` ends the line of the ring of an `io_setup`: without one, a task has no writes that raise no event.
const AIO_RING: &[u8] = b"/[aio] (deleted)";

/// A change and its body.
pub(super) type Change = (FileRecord, Vec<u8>);

/// Why the directories could not be read. The epoch fails and the tree runs on.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// Comparing failed.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The tasks that may have mapped files could not be listed.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A task's mappings or open files could not be read.
    #[error("the files that process {pid} has mapped or open cannot be told: {path}: {source}")]
    Mapped {
        /// Which, on the host.
        pid: i32,
        /// What was read.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Too much for one freeze.
    #[error(
        "more than {} MiB changed in the replicated directories since they were sent ahead; lower the load, name \
         smaller directories with --path, or have them on btrfs or XFS, where big files do not count",
        FROZEN_BYTES_MAX >> 20
    )]
    TooMuch,
}

/// The replicated directories of one workload, and what the standby has of them.
#[derive(Debug)]
pub(super) struct Files {
    root: i32,
    scanner: Scanner,
    /// What was mapped at the last look: it may have been written to and unmapped since.
    mapped: HashSet<FileId>,
    /// Of the freeze that is under way, what was found first.
    frozen: Option<Vec<Change>>,
}

impl Files {
    /// None without directories, so that these cost nothing.
    pub(super) fn new(root: i32, trees: &[Source]) -> Option<Self> {
        (!trees.is_empty()).then(|| Self {
            root,
            scanner: Scanner::new(trees.to_vec()),
            mapped: HashSet::new(),
            frozen: None,
        })
    }

    /// The standby may have anything: all is sent anew.
    pub(super) fn reset(&mut self) {
        self.scanner.reset();
        self.frozen = None;
    }

    /// After [`Self::reset`]: the standby has this, as it says.
    pub(super) fn offer(&mut self, held: HeldFiles) {
        self.scanner.offer(held);
    }

    /// Sends what has changed, while the tree runs: what is left for the freeze is little. Gives the bytes that were not sent
    /// because the standby has them as it says.
    pub(super) fn send_ahead(&mut self, emit: &mut Emit<'_>) -> Result<u64, CaptureError> {
        let (mut before, mut kept) = (u64::MAX, 0);
        for _ in 0..ROUNDS_MAX {
            let in_use = self.look_at_tasks()?;
            let mut sent = Ok(());
            let scanned = self.scanner.scan(Phase::Running, &in_use, &mut |record, body| {
                if sent.is_ok() {
                    sent = emit(FrameHead::File(record), body.to_vec());
                }
            });
            sent?;
            let stats = scanned.map_err(FilesError::from)?;
            kept += stats.kept_bytes;
            let changed = stats.data_bytes;
            // Not worth a round, or rounds do not help any more.
            if changed < ROUND_BYTES_MIN || changed > before / 2 {
                break;
            }
            before = changed;
        }
        Ok(kept)
    }

    /// Right before the freeze. `follows`: what the freeze took in is sent after the thaw.
    pub(super) fn write_back(&mut self, follows: bool) {
        self.scanner.write_back(if follows { Cloning::Shorter } else { Cloning::BeyondMemory });
    }

    /// Sends what was left to be read after the thaw.
    pub(super) fn settle(&mut self, emit: &mut Emit<'_>) -> Result<(), CaptureError> {
        let mut sent = Ok(());
        let settled = self.scanner.settle(&mut |record, body| {
            if sent.is_ok() {
                sent = emit(FrameHead::File(record), body.to_vec());
            }
        });
        sent?;
        settled.map_err(FilesError::from)?;
        Ok(())
    }

    /// Finds most of what has changed since, of the frozen tree, while CRIU goes on, which may still change names: what it
    /// does after this is all that [`Self::frozen`] finds. Does nothing where that would look at everything again.
    pub(super) fn freeze(&mut self) -> Result<(), FilesError> {
        if self.scanner.is_told() {
            let in_use = self.look_at_tasks()?;
            self.frozen = Some(self.changes(Phase::Standing, &in_use, Vec::new())?);
        }
        Ok(())
    }

    /// What has changed since, of the frozen tree: to be sent after the thaw.
    pub(super) fn frozen(&mut self) -> Result<Vec<Change>, FilesError> {
        // After the first look no task has written.
        let Some(changes) = self.frozen.take() else {
            let in_use = self.look_at_tasks()?;
            return self.changes(Phase::Frozen, &in_use, Vec::new());
        };
        self.changes(Phase::Frozen, &InUse::default(), changes)
    }

    /// Adds what a scan of the frozen tree finds.
    fn changes(
        &mut self,
        phase: Phase,
        in_use: &InUse,
        mut changes: Vec<Change>,
    ) -> Result<Vec<Change>, FilesError> {
        let size = |record: &FileRecord, body: &[u8]| {
            RECORD_BYTES + path_of(record).len() as u64 + body.len() as u64
        };
        let mut bytes: u64 = changes.iter().map(|(record, body)| size(record, body)).sum();
        self.scanner.scan(phase, in_use, &mut |record, body| {
            bytes += size(&record, body);
            if bytes <= FROZEN_BYTES_MAX {
                changes.push((record, body.to_vec()));
            }
        })?;
        if bytes <= FROZEN_BYTES_MAX { Ok(changes) } else { Err(FilesError::TooMuch) }
    }

    /// The files that some task maps shared and writable, or did at the look before, and those that it may write to by
    /// `io_submit`.
    fn look_at_tasks(&mut self) -> Result<InUse, FilesError> {
        let mut in_use = InUse::default();
        if !self.scanner.has_content() {
            // What is new is read in any case.
            in_use.mapped = std::mem::take(&mut self.mapped);
            return Ok(in_use);
        }
        for task in memory::tasks_of(self.root)? {
            used_by(task.pid, &mut in_use)?;
        }
        let before = std::mem::replace(&mut self.mapped, in_use.mapped.clone());
        in_use.mapped.extend(before);
        Ok(in_use)
    }
}

fn path_of(record: &FileRecord) -> &[u8] {
    match record {
        FileRecord::Entry { path, .. }
        | FileRecord::Data { path, .. }
        | FileRecord::Keep { path, .. }
        | FileRecord::Remove { path, .. } => path,
    }
}

/// Adds the files behind a task's shared writable mappings, and what it has open if it uses `io_submit`.
fn used_by(pid: i32, files: &mut InUse) -> Result<(), FilesError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| FilesError::Mapped { pid, path, source }
    };
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let maps = dir.join("maps");
    let Some(text) = unless_gone(fs::read(&maps)).map_err(failed(&maps))? else { return Ok(()) };
    for line in text.split(|byte| *byte == b'\n') {
        if !is_shared_writable(line) {
            continue;
        }
        // What `maps` calls the device is not what `stat` does on every file system (btrfs, overlays).
        let Some(link) = memory::map_file(pid, line) else { continue };
        // Gone: the task runs, or it was CRIU's own in a frozen one.
        if let Some(meta) = unless_gone(fs::metadata(&link)).map_err(failed(&link))? {
            files.mapped.insert((meta.dev(), meta.ino()));
        }
    }
    let submits = text.split(|byte| *byte == b'\n').any(|line| line.ends_with(AIO_RING));
    if submits { opened_by(&dir.join("fd"), &mut files.submitted).map_err(failed(&dir)) } else { Ok(()) }
}

/// Adds the files that a task has open for writing.
fn opened_by(dir: &Path, files: &mut HashSet<FileId>) -> io::Result<()> {
    for entry in unless_gone(fs::read_dir(dir))?.into_iter().flatten() {
        let Some(entry) = unless_gone(entry)? else { continue };
        // The link's own mode is that of the descriptor.
        let writes = unless_gone(entry.metadata())?.is_some_and(|link| link.mode() & 0o200 != 0);
        if writes && let Some(meta) = unless_gone(fs::metadata(entry.path()))?.filter(fs::Metadata::is_file) {
            files.insert((meta.dev(), meta.ino()));
        }
    }
    Ok(())
}

/// Whether a line of `/proc/PID/maps` is of a file, and shared and writable.
fn is_shared_writable(line: &[u8]) -> bool {
    // The path may hold any byte: only the first five fields are text.
    let mut fields = line.splitn(6, |byte| *byte == b' ').skip(1);
    let shared = matches!(fields.next(), Some([_, b'w', _, b's']));
    shared && fields.nth(2).is_some_and(|inode| inode != b"0")
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn only_shared_writable_mappings_of_files_count() {
        let counts = |line: &str| is_shared_writable(line.as_bytes());
        assert!(counts("7f00-7f01 rw-s 00000000 00:2b 77    /srv/a file with spaces"));
        assert!(!counts("7f00-7f01 r--s 00000000 00:2b 77    /srv/a"));
        assert!(!counts("7f00-7f01 rw-p 00000000 00:2b 77    /srv/a"));
        assert!(!counts("7f00-7f01 rw-s 00000000 00:00 0"));
        assert!(!counts(""));
    }

    /// `maps` pads low addresses with zeros, the links to mappings do not.
    #[test]
    fn a_file_that_is_mapped_low_counts() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(4096).expect("room");
        let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let at = std::ptr::without_provenance_mut(0x0900_0000);
        // SAFETY: a new mapping over nothing, which nobody uses.
        let mapped = unsafe { libc::mmap(at, 4096, access, flags, file.as_file().as_raw_fd(), 0) };
        assert_eq!(mapped, at);
        let mut used = InUse::default();
        used_by(std::process::id() as i32, &mut used).expect("our own");
        let meta = fs::metadata(file.path()).expect("it is there");
        assert!(used.mapped.contains(&(meta.dev(), meta.ino())));
    }

    #[test]
    fn of_open_files_those_that_can_be_written_to_count() {
        let [written, read] = [(); 2].map(|()| tempfile::NamedTempFile::new().expect("a file"));
        let read = read.into_temp_path();
        let _open = fs::File::open(&read).expect("open");
        let mut open = HashSet::new();
        opened_by(Path::new("/proc/thread-self/fd"), &mut open).expect("listed");
        let id = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).expect("there");
        assert!(open.contains(&id(written.path())));
        assert!(!open.contains(&id(&read)));
    }
}
