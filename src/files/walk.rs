//! The first pass of a scan: what is there now.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStringExt, fs::FileExt},
    },
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat},
    sys::stat::Mode,
    unistd::{Whence, lseek64},
};

use super::{
    BLOCK_SIZE, DEPTH_MAX, XATTRS_MAX,
    scan::{
        ENTRIES_MAX, FileId, FilesStats, Node, Phase, ScanError, Tag, ZEROS, failed, full, open_content,
        raced,
    },
    sys::{self, Stat},
    tree::{Inexpressible, Mark, hides_lower, take_mark, whiteout_meta},
};
use crate::wire::message::{FileKind, FileMeta};

/// Two writes closer than this may leave the same ctime: kernels stamp files with a clock that advances with
/// the timer interrupt, at slowest 100 Hz. Twice that.
const CTIME_TICK: Duration = Duration::from_millis(20);
/// Attributes of the host's policy, not of the file.
const XATTRS_OF_THE_HOST: [&CStr; 3] = [c"security.selinux", c"security.ima", c"security.evm"];

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

pub(super) struct Walk<'a> {
    base: &'a Path,
    /// Of an overlay: where it is mounted.
    merged: Option<BorrowedFd<'a>>,
    root: BorrowedFd<'a>,
    phase: Phase,
    mapped: &'a HashSet<FileId>,
    sent: Option<&'a BTreeMap<Vec<u8>, Node>>,
    pub(super) found: BTreeMap<Vec<u8>, Node>,
    /// The first name found of each file that has several, or may get one while it is looked for.
    names: HashMap<(FileId, u32), Vec<u8>>,
    /// A change after this walk leaves a ctime not older than this.
    racy_from: (i64, u32),
    stats: &'a mut FilesStats,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        base: &'a Path,
        root: BorrowedFd<'a>,
        merged: Option<BorrowedFd<'a>>,
        phase: Phase,
        mapped: &'a HashSet<FileId>,
        sent: Option<&'a BTreeMap<Vec<u8>, Node>>,
        stats: &'a mut FilesStats,
    ) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let from = now.saturating_sub(CTIME_TICK);
        let racy_from = (from.as_secs() as i64, from.subsec_nanos());
        Self {
            base,
            merged,
            root,
            phase,
            mapped,
            sent,
            found: BTreeMap::new(),
            names: HashMap::new(),
            racy_from,
            stats,
        }
    }

    pub(super) fn root(&mut self) -> Result<(), ScanError> {
        let stat = sys::stat_at(self.root, c"").map_err(failed("stat", self.base, b""))?;
        self.add(Vec::new(), stat)?;
        self.directory(self.root, &[], 0)
    }

    fn directory(&mut self, dir: BorrowedFd<'_>, path: &[u8], depth: usize) -> Result<(), ScanError> {
        if depth > DEPTH_MAX {
            return Err(ScanError::TooDeep { path: full(self.base, path) });
        }
        let names = names_of(dir).map_err(failed("list", self.base, path))?;
        for name in names {
            let mut child = path.to_vec();
            if !child.is_empty() {
                child.push(b'/');
            }
            child.extend_from_slice(name.as_bytes());
            let stat = match sys::stat_at(dir, &name) {
                Ok(stat) => stat,
                Err(error) if raced(self.phase, &error) => continue,
                Err(error) => return Err(failed("stat", self.base, &child)(error)),
            };
            let is_directory = stat.format() == libc::S_IFDIR;
            if stat.mount_root && !is_directory {
                continue;
            }
            if !self.add(child.clone(), stat)? || !is_directory || stat.mount_root {
                continue;
            }
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            match openat(dir, name.as_c_str(), flags, Mode::empty()).map_err(io::Error::from) {
                Ok(fd) => self.directory(fd.as_fd(), &child, depth + 1)?,
                Err(error) if raced(self.phase, &error) => {}
                Err(error) => return Err(failed("open", self.base, &child)(error)),
            }
        }
        Ok(())
    }

    /// False: nothing that is replicated.
    fn add(&mut self, path: Vec<u8>, stat: Stat) -> Result<bool, ScanError> {
        self.stats.entries += 1;
        if self.stats.entries > ENTRIES_MAX as u64 {
            return Err(ScanError::TooMany);
        }
        if self.merged.is_some() && hides_lower(&stat) {
            self.found.insert(path, whiteout(stat));
            return Ok(true);
        }
        if stat.format() == libc::S_IFSOCK {
            return Ok(false);
        }
        let racy = stat.ctime >= self.racy_from;
        // While the workload runs a file may be met again under a name that it got in between. The copy is told what
        // was met: two names of one file are always links there, so that the next scan can rely on it.
        let linked = stat.format() != libc::S_IFDIR && (stat.nlink > 1 || self.phase == Phase::Running);
        let key = (stat.id(), stat.format());
        let first = linked.then(|| self.names.get(&key).cloned()).flatten();
        let known = self.sent.and_then(|sent| sent.get(&path)).filter(|node| node.stat == stat);
        let same_content = known.filter(|node| !node.racy && !self.is_mapped(node));
        let node = match (first, same_content) {
            (Some(to), _) => self.linked(&path, stat, racy, to),
            (None, Some(node)) if !matches!(node.meta.kind, FileKind::HardLink { .. }) => {
                Ok(Node { same: true, ..node.clone() })
            }
            (None, _) => self.read(&path, stat, racy),
        };
        match node {
            Ok(node) => {
                if linked {
                    self.names.entry(key).or_insert_with(|| path.clone());
                }
                self.found.insert(path, node);
                Ok(true)
            }
            Err(ReadError::Io(error)) if raced(self.phase, &error) => Ok(false),
            Err(ReadError::Io(error)) => Err(failed("read", self.base, &path)(error)),
            Err(ReadError::Inexpressible(what)) => {
                Err(ScanError::Overlay { path: full(self.base, &path), option: what.option() })
            }
        }
    }

    /// Whether a task may write to it unseen.
    fn is_mapped(&self, node: &Node) -> bool {
        match node.seen_as {
            Some(id) => self.mapped.contains(&id),
            // Nobody knows under which name it would be mapped.
            None => matches!(node.meta.kind, FileKind::Regular { .. }),
        }
    }

    /// Another name of a file already found: its properties are the file's.
    fn linked(&self, path: &[u8], stat: Stat, racy: bool, to: Vec<u8>) -> Result<Node, ReadError> {
        let first = self.found.get(&to);
        let first = first.ok_or_else(|| io::Error::other(format!("{path:?} lost its first name")))?;
        let (seen_as, xattrs) = (first.seen_as, first.meta.xattrs.clone());
        let meta = meta_of(stat, FileKind::HardLink { to }, xattrs);
        Ok(Node { seen_as, ..node_of(stat, racy, meta, Vec::new()) })
    }

    fn read(&mut self, path: &[u8], stat: Stat, racy: bool) -> Result<Node, ReadError> {
        // The root's own path is empty, which `openat2` does not take.
        let name = if path.is_empty() { b".".as_slice() } else { path };
        let handle = open_handle(self.root, name, stat.mount_root)?;
        let now = sys::stat_at(handle.as_fd(), c"")?;
        if !now.is_same_file(&stat) {
            return Err(io::Error::from_raw_os_error(libc::ESTALE).into());
        }
        let mut xattrs = xattrs_of(handle.as_fd())?;
        let mut mark = Mark::None;
        if self.merged.is_some() {
            let taken = take_mark(&mut xattrs).map_err(ReadError::Inexpressible)?;
            // The root shows all layers whatever it says.
            mark = if path.is_empty() { Mark::None } else { taken };
        }
        if mark == Mark::Whiteout {
            return Ok(whiteout(stat));
        }
        let mut seen_as = Some(stat.id());
        let mut blocks = Vec::new();
        let kind = match stat.format() {
            libc::S_IFREG => {
                if let Some(merged) = self.merged {
                    seen_as = seen_in(merged, name)?;
                }
                let file = open_content(self.root, name, &stat)?;
                blocks = self.compare(&file, stat.size)?;
                FileKind::Regular { size: stat.size }
            }
            libc::S_IFDIR => FileKind::Directory,
            libc::S_IFLNK => {
                FileKind::Symlink { target: readlinkat(&handle, c"").map_err(io::Error::from)?.into_vec() }
            }
            libc::S_IFIFO => FileKind::Fifo,
            format => FileKind::Device { block: format == libc::S_IFBLK, rdev: stat.rdev },
        };
        Ok(Node { mark, seen_as, ..node_of(stat, racy, meta_of(stat, kind, xattrs), blocks) })
    }

    /// The tags of all blocks, reading only those that are not holes.
    fn compare(&mut self, file: &File, size: u64) -> io::Result<Vec<Tag>> {
        let count = size.div_ceil(BLOCK_SIZE as u64) as usize;
        let mut tags = vec![ZEROS; count];
        let mut buf = vec![0; BLOCK_SIZE];
        let mut block = 0;
        while block < count {
            let Some(data) = next_data(file, (block * BLOCK_SIZE) as u64)? else { break };
            block = (data / BLOCK_SIZE as u64) as usize;
            if block >= count {
                break;
            }
            let len = read_block(file, block, size, &mut buf)?;
            self.stats.compared_bytes += len as u64;
            tags[block] = tag_of(&buf[..len]);
            block += 1;
        }
        Ok(tags)
    }
}

/// An `O_PATH` descriptor of an entry, which may be what is mounted there.
fn open_handle(root: BorrowedFd<'_>, path: &[u8], mount_root: bool) -> io::Result<OwnedFd> {
    let mut resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    resolve.set(ResolveFlag::RESOLVE_NO_XDEV, !mount_root);
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    Ok(openat2(root, path, OpenHow::new().flags(flags).resolve(resolve))?)
}

/// The names in a directory, sorted.
pub(super) fn names_of(dir: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    // By way of /proc, which opens it anew: reading moves the position.
    let mut names = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()))? {
        names.push(CString::new(entry?.file_name().into_vec())?);
    }
    names.sort_unstable();
    Ok(names)
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

fn node_of(stat: Stat, racy: bool, meta: FileMeta, blocks: Vec<Tag>) -> Node {
    let seen_as = Some(stat.id());
    Node {
        stat,
        racy,
        same: false,
        mark: Mark::None,
        seen_as,
        meta: Arc::new(meta),
        blocks: Arc::new(blocks),
    }
}

fn whiteout(stat: Stat) -> Node {
    Node { mark: Mark::Whiteout, ..node_of(stat, false, whiteout_meta(), Vec::new()) }
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
fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
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
    bytes.iter().all(|&byte| byte == 0)
}

pub(super) fn tag_of(bytes: &[u8]) -> Tag {
    if is_zero(bytes) { ZEROS } else { *blake3::hash(bytes).as_bytes() }
}
