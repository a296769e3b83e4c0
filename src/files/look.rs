//! What there is now, entry by entry, beside what was sent: the first half of a scan.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    io,
    num::NonZero,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStringExt, fs::FileExt},
    },
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat},
    unistd::{Whence, lseek64},
};

use super::{
    BLOCK_SIZE, XATTRS_MAX,
    clone::{Clones, Cloning},
    scan::{ENTRIES_MAX, FilesStats, InUse, Phase, ScanError, failed, full, open_content, raced},
    state::{FileId, Key, Node, State, Tag, UNKNOWN, ZEROS, path_of},
    sys::{self, Stat},
    tree::{Inexpressible, Mark, hides_lower, take_mark, whiteout_meta},
};
use crate::wire::message::{FileKind, FileMeta};

/// Two writes closer than this may leave the same ctime: kernels stamp files with a clock that advances with
/// the timer interrupt, at slowest 100 Hz. Twice that.
const CTIME_TICK: Duration = Duration::from_millis(20);
/// Most threads that compare one file.
const COMPARE_THREADS_MAX: usize = 8;
/// Blocks for which another thread is worth starting (4 MiB: a millisecond's work).
const COMPARE_BLOCKS_MIN: usize = 64;
/// Attributes of the host's policy, not of the file.
const XATTRS_OF_THE_HOST: [&std::ffi::CStr; 3] = [c"security.selinux", c"security.ima", c"security.evm"];

/// Why an entry could not be read.
enum ReadError {
    Io(io::Error),
    Inexpressible(Inexpressible),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Where a tree is and how it is looked at.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) base: &'a Path,
    pub(super) root: BorrowedFd<'a>,
    /// Of an overlay: where it is mounted.
    pub(super) merged: Option<BorrowedFd<'a>>,
    /// It was mounted anew: what the tasks see as numbers is not what it was.
    pub(super) renumbered: bool,
    pub(super) phase: Phase,
    pub(super) in_use: &'a InUse,
    pub(super) cloning: Option<Cloning>,
    pub(super) sent: &'a State,
    /// Somebody listens to events: what they call an entry is worth knowing.
    pub(super) watched: bool,
}

/// What a scan has found so far.
pub(super) struct Look<'a> {
    pub(super) view: View<'a>,
    /// What is not as it was sent; `None` is gone.
    pub(super) changes: BTreeMap<Key, Option<Node>>,
    /// What changed under the scan, and is to be looked at in the next one.
    pub(super) again: BTreeSet<Key>,
    /// Something has no handle that events could call it by.
    pub(super) unwatchable: bool,
    /// Files that were cloned in order to be read later: the tags of their blocks are not known.
    pub(super) cloned: HashMap<Key, File>,
    clones: &'a mut Clones,
    /// The first name found of each file that has several, or may get one while it is looked for.
    firsts: HashMap<(FileId, u32), Key>,
    /// A change after this look leaves a ctime not older than this.
    racy_from: (i64, u32),
    pub(super) stats: &'a mut FilesStats,
}

impl<'a> Look<'a> {
    pub(super) fn new(view: View<'a>, clones: &'a mut Clones, stats: &'a mut FilesStats) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let from = now.saturating_sub(CTIME_TICK);
        let racy_from = (from.as_secs() as i64, from.subsec_nanos());
        Self {
            view,
            changes: BTreeMap::new(),
            again: BTreeSet::new(),
            unwatchable: false,
            cloned: HashMap::new(),
            clones,
            firsts: HashMap::new(),
            racy_from,
            stats,
        }
    }

    /// Whether an error only says that a running workload changed the entry meanwhile.
    pub(super) fn raced(&self, error: &io::Error) -> bool {
        raced(self.view.phase, error)
    }

    pub(super) fn failed(
        &self,
        what: &'static str,
        key: &[u8],
    ) -> impl FnOnce(io::Error) -> ScanError + use<> {
        failed(what, self.view.base, &path_of(key))
    }

    /// An entry is not there.
    pub(super) fn gone(&mut self, key: &Key) {
        if self.view.sent.get(key).is_some() {
            self.changes.insert(key.clone(), None);
        }
    }

    /// An entry is there; all names of its file are found in the order of the walk. False: nothing that is replicated.
    pub(super) fn found(&mut self, key: &Key, stat: Stat) -> Result<bool, ScanError> {
        self.stats.entries += 1;
        if self.stats.entries > ENTRIES_MAX as u64 {
            return Err(ScanError::TooMany);
        }
        let known = self.view.sent.get(key);
        if self.view.merged.is_some() && hides_lower(&stat) {
            if known.is_none_or(|node| node.mark != Mark::Whiteout) {
                self.changes.insert(key.clone(), Some(whiteout(stat)));
            }
            return Ok(true);
        }
        if stat.format() == libc::S_IFSOCK {
            self.gone(key);
            return Ok(false);
        }
        // While the workload runs a file may be met again under a name that it got in between. The copy is told what
        // was met: two names of one file are always links there, so that the next scan can rely on it.
        let linked = stat.format() != libc::S_IFDIR && (stat.nlink > 1 || self.view.phase != Phase::Frozen);
        let file = (stat.id(), stat.format());
        let known = known.filter(|node| node.stat == stat);
        let first = linked.then(|| self.firsts.get(&file).cloned()).flatten();
        let same = match (first, known) {
            (Some(to), _) => self.link(key, stat, &to).map(|()| true),
            (None, Some(node)) if !node.racy && !node.is_link() && !self.is_mapped(node) => Ok(true),
            (None, _) => self.read(key, stat).map(|node| {
                self.changes.insert(key.clone(), Some(node));
                true
            }),
        };
        match same {
            Ok(found) => {
                if linked {
                    self.firsts.entry(file).or_insert_with(|| key.clone());
                }
                Ok(found)
            }
            Err(ReadError::Io(error)) if self.raced(&error) => {
                self.again.insert(key.clone());
                self.gone(key);
                Ok(false)
            }
            Err(ReadError::Io(error)) => Err(self.failed("read", key)(error)),
            Err(ReadError::Inexpressible(what)) => {
                let path = full(self.view.base, &path_of(key));
                Err(ScanError::Overlay { path, option: what.option() })
            }
        }
    }

    /// Whether a task may write to it unseen.
    fn is_mapped(&self, node: &Node) -> bool {
        match node.seen_as.filter(|_| !self.view.renumbered) {
            Some(id) => self.view.in_use.mapped.contains(&id),
            // Nobody knows under which number it would be mapped.
            None => matches!(node.meta.kind, FileKind::Regular { .. }),
        }
    }

    /// Another name of a file already found: its properties are the file's.
    fn link(&mut self, key: &Key, stat: Stat, to: &Key) -> Result<(), ReadError> {
        let first = match self.changes.get(to) {
            Some(change) => change.as_ref(),
            None => self.view.sent.get(to),
        };
        let first = first.ok_or_else(|| io::Error::other(format!("{key:?} lost its first name")))?;
        let meta = meta_of(stat, FileKind::HardLink { to: path_of(to) }, first.meta.xattrs.clone());
        let (untold, seen_as, handle) = (first.untold, first.seen_as, first.handle);
        let known = self.view.sent.get(key);
        if known.is_none_or(|known| known.stat != stat || known.meta != meta) {
            let node = Node { untold, seen_as, handle, ..self.node(stat, meta, Vec::new()) };
            self.changes.insert(key.clone(), Some(node));
        }
        Ok(())
    }

    fn node(&self, stat: Stat, meta: FileMeta, blocks: Vec<Tag>) -> Node {
        let racy = stat.ctime >= self.racy_from;
        Node {
            stat,
            racy,
            mark: Mark::None,
            untold: false,
            seen_as: Some(stat.id()),
            handle: None,
            meta,
            blocks,
        }
    }

    fn read(&mut self, key: &Key, stat: Stat) -> Result<Node, ReadError> {
        let root = self.view.root;
        // The root's own path is empty, which `openat2` does not take.
        let path = if key.is_empty() { b".".to_vec() } else { path_of(key) };
        let entry = open_handle(root, &path, stat.mount_root)?;
        if !sys::stat_at(entry.as_fd(), c"")?.is_same_file(&stat) {
            return Err(io::Error::from_raw_os_error(libc::ESTALE).into());
        }
        let handle = self.handle_of(entry.as_fd(), &stat);
        let mut xattrs = xattrs_of(entry.as_fd())?;
        let (mut mark, mut untold) = (Mark::None, stat.mount_root);
        if self.view.merged.is_some() {
            let (taken, copied_up) = take_mark(&mut xattrs).map_err(ReadError::Inexpressible)?;
            // The root shows all layers whatever it says.
            mark = if key.is_empty() { Mark::None } else { taken };
            // A rename through an overlay that fails at last stamps the directory, without an event (ext4 takes its
            // whiteout back: `ext4_resetent`).
            untold |= stat.format() == libc::S_IFDIR && (copied_up || key.is_empty());
        }
        if mark == Mark::Whiteout {
            return Ok(whiteout(stat));
        }
        let mut seen_as = Some(stat.id());
        let mut blocks = Vec::new();
        let kind = match stat.format() {
            libc::S_IFREG => {
                if let Some(merged) = self.view.merged {
                    seen_as = seen_in(merged, &path)?;
                }
                let file = open_content(root, &path, &stat)?;
                blocks = self.content(key, &file, &stat)?;
                FileKind::Regular { size: stat.size }
            }
            libc::S_IFDIR => FileKind::Directory,
            libc::S_IFLNK => {
                let target = readlinkat(&entry, c"").map_err(io::Error::from)?;
                FileKind::Symlink { target: target.into_vec() }
            }
            libc::S_IFIFO => FileKind::Fifo,
            format => FileKind::Device { block: format == libc::S_IFBLK, rdev: stat.rdev },
        };
        // The kernel stamps devices and pipes as it likes; a file that nobody knows how to recognise may be mapped.
        untold |= matches!(kind, FileKind::Fifo | FileKind::Device { .. }) || seen_as.is_none();
        let meta = meta_of(stat, kind, xattrs);
        Ok(Node { mark, untold, seen_as, handle, ..self.node(stat, meta, blocks) })
    }

    /// What events call an entry, if somebody listens. What is mounted here is of another file system.
    fn handle_of(&mut self, entry: BorrowedFd<'_>, stat: &Stat) -> Option<sys::Handle> {
        if !self.view.watched || stat.mount_root {
            return None;
        }
        let handle = sys::handle_of(entry).ok();
        self.unwatchable |= handle.is_none();
        handle
    }

    /// The tags of all blocks, or, of a file that is cloned, what no block has.
    fn content(&mut self, key: &Key, file: &File, stat: &Stat) -> io::Result<Vec<Tag>> {
        let stands = self.view.phase != Phase::Running;
        if stands
            && let Some(cloning) = self.view.cloning
            && let Some(clone) = self.clones.take(self.view.root, key, file, cloning)
        {
            self.cloned.insert(key.clone(), clone);
            return Ok(vec![UNKNOWN; blocks_in(stat.size)]);
        }
        let began = Instant::now();
        let threads = if stands { COMPARE_THREADS_MAX } else { 1 };
        let (tags, bytes) = tags_of(file, stat.size, threads)?;
        self.stats.compared_bytes += bytes;
        self.clones.was_read(key, bytes, stands.then(|| began.elapsed()));
        Ok(tags)
    }
}

/// How many blocks a file of `size` bytes has.
pub(super) fn blocks_in(size: u64) -> usize {
    size.div_ceil(BLOCK_SIZE as u64) as usize
}

/// The tags of all blocks of a file of `size` bytes, and how many bytes were read for them. In the freeze the workload's
/// processors have nothing else to do.
pub(super) fn tags_of(file: &File, size: u64, threads_max: usize) -> io::Result<(Vec<Tag>, u64)> {
    let mut tags = vec![ZEROS; blocks_in(size)];
    let most = thread::available_parallelism().map_or(1, NonZero::get).min(threads_max);
    let threads = (tags.len() / COMPARE_BLOCKS_MIN).clamp(1, most);
    let part = tags.len().div_ceil(threads).max(1);
    let parts = tags.chunks_mut(part).enumerate();
    let mut parts = parts.map(|(index, tags)| move || compare_blocks(file, size, index * part, tags));
    let mine = parts.next();
    let bytes = thread::scope(|scope| -> io::Result<u64> {
        let others: Vec<_> = parts.map(|part| scope.spawn(part)).collect();
        let mut bytes = mine.map_or(Ok(0), |mut mine| mine())?;
        for other in others {
            bytes +=
                other.join().map_err(|_| io::Error::other("a thread that compares blocks panicked"))??;
        }
        Ok(bytes)
    })?;
    Ok((tags, bytes))
}

/// Fills in the tags of the blocks from `first` on, reading only those that are not holes. How many bytes it read.
fn compare_blocks(file: &File, size: u64, first: usize, tags: &mut [Tag]) -> io::Result<u64> {
    let (end, mut block, mut bytes) = (first + tags.len(), first, 0);
    let mut buf = vec![0; BLOCK_SIZE.min(size as usize)];
    while block < end {
        let Some(data) = next_data(file, (block * BLOCK_SIZE) as u64)? else { break };
        block = (data / BLOCK_SIZE as u64) as usize;
        if block >= end {
            break;
        }
        let len = read_block(file, block, size, &mut buf)?;
        bytes += len as u64;
        tags[block - first] = tag_of(&buf[..len]);
        block += 1;
    }
    Ok(bytes)
}

/// An `O_PATH` descriptor of an entry, which may be what is mounted there.
pub(super) fn open_handle(root: BorrowedFd<'_>, path: &[u8], mount_root: bool) -> io::Result<OwnedFd> {
    let mut resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    resolve.set(ResolveFlag::RESOLVE_NO_XDEV, !mount_root);
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    Ok(openat2(root, path, OpenHow::new().flags(flags).resolve(resolve))?)
}

/// What `stat` says of a file of an overlay where it is mounted; `None` if it is out of reach there.
fn seen_in(merged: BorrowedFd<'_>, path: &[u8]) -> io::Result<Option<FileId>> {
    match open_handle(merged, path, false) {
        Ok(handle) => Ok(Some(sys::stat_at(handle.as_fd(), c"")?.id())),
        Err(error) if is_out_of_reach(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gone meanwhile, or something is mounted over it.
fn is_out_of_reach(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::EXDEV))
}

fn whiteout(stat: Stat) -> Node {
    let meta = whiteout_meta();
    Node {
        stat,
        racy: false,
        mark: Mark::Whiteout,
        untold: false,
        seen_as: None,
        handle: None,
        meta,
        blocks: Vec::new(),
    }
}

fn meta_of(stat: Stat, kind: FileKind, xattrs: Vec<(Vec<u8>, Vec<u8>)>) -> FileMeta {
    FileMeta { kind, mode: stat.mode & 0o7777, uid: stat.uid, gid: stat.gid, mtime: stat.mtime, xattrs }
}

pub(super) fn xattrs_of(fd: BorrowedFd<'_>) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = sys::list_xattrs(fd)?;
    names.retain(|name| !XATTRS_OF_THE_HOST.contains(&name.as_c_str()));
    names.sort_unstable();
    if names.len() > XATTRS_MAX {
        return Err(io::Error::other(format!("it has more than {XATTRS_MAX} extended attributes")));
    }
    let mut xattrs = Vec::with_capacity(names.len());
    for name in names {
        if let Some(value) = sys::get_xattr(fd, &name)? {
            xattrs.push((name.into_bytes(), value));
        }
    }
    Ok(xattrs)
}

/// The next offset from `from` on that is not in a hole.
pub(super) fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match lseek64(file, from as i64, Whence::SeekData) {
        Ok(offset) => Ok(Some((offset as u64).max(from))),
        Err(Errno::ENXIO) => Ok(None),
        // The file system knows no holes.
        Err(Errno::EINVAL) => Ok(Some(from)),
        Err(errno) => Err(errno.into()),
    }
}

/// Reads a block of a file of `size` bytes; short only where the file ends.
pub(super) fn read_block(file: &File, block: usize, size: u64, buf: &mut [u8]) -> io::Result<usize> {
    let offset = block as u64 * BLOCK_SIZE as u64;
    let want = (size - offset).min(BLOCK_SIZE as u64) as usize;
    let mut len = 0;
    while len < want {
        match file.read_at(&mut buf[len..want], offset + len as u64) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    const ZERO: [u8; 4096] = [0; 4096];
    // By memcmp, which ends at the first word of nearly all that is not zero.
    bytes.chunks(ZERO.len()).all(|chunk| chunk == &ZERO[..chunk.len()])
}

pub(super) fn tag_of(bytes: &[u8]) -> Tag {
    if is_zero(bytes) { ZEROS } else { *blake3::hash(bytes).as_bytes() }
}
