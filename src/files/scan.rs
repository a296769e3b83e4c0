//! The primary's side: what changed since the last scan.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::FileExt,
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat},
    sys::stat::Mode,
    unistd::{Whence, lseek64},
};

use super::{
    BLOCK_SIZE, DEPTH_MAX, XATTRS_MAX,
    sys::{self, Stat},
};
use crate::wire::message::{FileKind, FileMeta, FileRecord};

/// Entries of all trees together; more would not be walked within any freeze.
const ENTRIES_MAX: usize = 4_000_000;
/// Two writes closer than this may leave the same ctime: kernels stamp files with a clock that advances with the timer
/// interrupt, at slowest 100 Hz. Twice that.
const CTIME_TICK: Duration = Duration::from_millis(20);
/// Attributes of the host's policy, not of the file.
const XATTRS_OF_THE_HOST: [&CStr; 3] = [c"security.selinux", c"security.ima", c"security.evm"];

/// Device and inode number, as `stat` gives them.
pub type FileId = (u64, u64);
/// The BLAKE3 hash of a block; all zero for one that holds only zeros.
type Tag = [u8; 32];
const ZEROS: Tag = [0; 32];
/// A tag that no block has.
const UNKNOWN: Tag = [0xff; 32];

/// Whether the workload may change its files meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It runs: what vanishes or changes under the scan is left for the next one.
    Running,
    /// It is frozen: the result is consistent.
    Frozen,
}

/// What a scan cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilesStats {
    /// Entries looked at.
    pub entries: u64,
    /// Records of entries that are new or changed.
    pub changed: u64,
    /// Records of removals.
    pub removed: u64,
    /// Content read in order to compare it.
    pub compared_bytes: u64,
    /// Content emitted.
    pub data_bytes: u64,
}

/// Why a tree could not be scanned. The next scan must send everything: call [`Scanner::reset`].
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// A system call failed.
    #[error("could not {what} {path:?} while scanning a replicated directory: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Directories nest too deep.
    #[error(
        "replicated directory: {path:?} is more than {DEPTH_MAX} levels deep: declare a directory further down"
    )]
    TooDeep {
        /// Where.
        path: PathBuf,
    },
    /// Too many files.
    #[error("replicated directories hold more than {ENTRIES_MAX} entries: declare fewer or smaller ones")]
    TooMany,
}

#[derive(Clone, Debug)]
struct Node {
    stat: Stat,
    /// Its `stat` may miss a later write.
    racy: bool,
    /// Taken over from the scan before as it was.
    same: bool,
    meta: Arc<FileMeta>,
    blocks: Arc<Vec<Tag>>,
}

#[derive(Debug)]
struct Tree {
    root: PathBuf,
    /// What the records make of the copy; `None`: nothing is known of it.
    sent: Option<BTreeMap<Vec<u8>, Node>>,
}

/// Finds what changed in a set of trees.
#[derive(Debug)]
pub struct Scanner {
    trees: Vec<Tree>,
}

type Emit<'a> = &'a mut dyn FnMut(FileRecord, &[u8]);

impl Scanner {
    /// A scanner of trees as this process sees them (as `/proc/PID/root/srv/data`). The first scan sends everything.
    pub fn new(trees: Vec<PathBuf>) -> Self {
        Self { trees: trees.into_iter().map(|root| Tree { root, sent: None }).collect() }
    }

    /// The next scan sends everything: what was emitted last did not become a commit, or a scan failed.
    pub fn reset(&mut self) {
        for tree in &mut self.trees {
            tree.sent = None;
        }
    }

    /// Emits what changed since the scan before. `mapped`: the files that some task maps shared and writable; their
    /// content is compared whatever their `stat` says.
    pub fn scan(
        &mut self,
        phase: Phase,
        mapped: &HashSet<FileId>,
        emit: Emit<'_>,
    ) -> Result<FilesStats, ScanError> {
        let mut stats = FilesStats::default();
        for (index, tree) in self.trees.iter_mut().enumerate() {
            let sent = tree.sent.take();
            let root = open_root(&tree.root)?;
            let old = sent.as_ref();
            let mut walk = Walk::new(&tree.root, root.as_fd(), phase, mapped, old, &mut stats);
            walk.root()?;
            let mut found = walk.found;
            let mut diff = Diff {
                tree: index as u32,
                base: &tree.root,
                root: root.as_fd(),
                phase,
                emit,
                stats: &mut stats,
            };
            diff.run(sent.as_ref(), &mut found)?;
            tree.sent = Some(found);
        }
        Ok(stats)
    }

    /// A digest of all that was sent: equal for trees that are equal in everything that is replicated.
    /// `None` after [`Scanner::reset`].
    pub fn digest(&self) -> Option<[u8; 32]> {
        let mut hasher = blake3::Hasher::new();
        for tree in &self.trees {
            let sent = tree.sent.as_ref()?;
            hasher.update(&(sent.len() as u64).to_le_bytes());
            for (path, node) in sent {
                // `Debug` of the meta is unambiguous, and the digest never outlives one version of the program.
                let head = format!("{path:?} {:?} {}", node.meta, node.blocks.len());
                hasher.update(&(head.len() as u64).to_le_bytes());
                hasher.update(head.as_bytes());
                node.blocks.iter().for_each(|tag| {
                    hasher.update(tag);
                });
            }
        }
        Some(*hasher.finalize().as_bytes())
    }
}

fn failed(what: &'static str, base: &Path, path: &[u8]) -> impl FnOnce(io::Error) -> ScanError {
    let path = full(base, path);
    move |source| ScanError::Io { what, path, source }
}

fn full(base: &Path, path: &[u8]) -> PathBuf {
    base.join(std::ffi::OsStr::from_bytes(path))
}

fn open_root(path: &Path) -> Result<OwnedFd, ScanError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(|errno| failed("open", path, b"")(errno.into()))
}

/// Whether an error only says that a running workload changed the entry meanwhile.
fn raced(phase: Phase, error: &io::Error) -> bool {
    let codes = [libc::ENOENT, libc::ENOTDIR, libc::ELOOP, libc::ESTALE, libc::ENXIO, libc::EINVAL];
    phase == Phase::Running && error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

/// Opens a file of the tree for reading, following no link on the way; without blocking on a pipe in its place.
fn open_in(root: BorrowedFd<'_>, path: &[u8], flags: OFlag) -> io::Result<OwnedFd> {
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    Ok(openat2(root, path, OpenHow::new().flags(flags).resolve(resolve))?)
}

/// The first pass: what is there now.
struct Walk<'a> {
    base: &'a Path,
    root: BorrowedFd<'a>,
    phase: Phase,
    mapped: &'a HashSet<FileId>,
    sent: Option<&'a BTreeMap<Vec<u8>, Node>>,
    found: BTreeMap<Vec<u8>, Node>,
    /// The first name found of each file that has several.
    names: HashMap<FileId, Vec<u8>>,
    /// A change after this walk leaves a ctime not older than this.
    racy_from: (i64, u32),
    stats: &'a mut FilesStats,
}

impl<'a> Walk<'a> {
    fn new(
        base: &'a Path,
        root: BorrowedFd<'a>,
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

    fn root(&mut self) -> Result<(), ScanError> {
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
        if stat.format() == libc::S_IFSOCK {
            return Ok(false);
        }
        let racy = stat.ctime >= self.racy_from;
        let linked = stat.format() != libc::S_IFDIR && stat.nlink > 1;
        let first = linked.then(|| self.names.get(&(stat.dev, stat.ino)).cloned()).flatten();
        let mapped = self.mapped.contains(&(stat.dev, stat.ino));
        let known = self.sent.and_then(|sent| sent.get(&path)).filter(|node| node.stat == stat);
        let same_content = known.filter(|node| !node.racy && !mapped);
        let node = match (first, same_content) {
            (Some(to), _) => self.linked(&path, stat, to).map(|meta| node_of(stat, racy, meta, Vec::new())),
            (None, Some(node)) if !matches!(node.meta.kind, FileKind::HardLink { .. }) => {
                Ok(Node { same: true, ..node.clone() })
            }
            (None, _) => self.read(&path, stat, racy),
        };
        match node {
            Ok(node) => {
                if linked {
                    self.names.entry((stat.dev, stat.ino)).or_insert_with(|| path.clone());
                }
                self.found.insert(path, node);
                Ok(true)
            }
            Err(error) if raced(self.phase, &error) => Ok(false),
            Err(error) => Err(failed("read", self.base, &path)(error)),
        }
    }

    /// Another name of a file already found: its properties are the file's.
    fn linked(&self, path: &[u8], stat: Stat, to: Vec<u8>) -> io::Result<FileMeta> {
        let first = self.found.get(&to).map(|node| node.meta.xattrs.clone());
        let xattrs = first.ok_or_else(|| io::Error::other(format!("{path:?} lost its first name")))?;
        Ok(meta_of(stat, FileKind::HardLink { to }, xattrs))
    }

    fn read(&mut self, path: &[u8], stat: Stat, racy: bool) -> io::Result<Node> {
        // The root's own path is empty, which `openat2` does not take.
        let name = if path.is_empty() { b".".as_slice() } else { path };
        let handle = open_handle(self.root, name, stat.mount_root)?;
        let now = sys::stat_at(handle.as_fd(), c"")?;
        if (now.dev, now.ino, now.format()) != (stat.dev, stat.ino, stat.format()) {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        let mut blocks = Vec::new();
        let kind = match stat.format() {
            libc::S_IFREG => {
                let file = File::from(open_in(self.root, name, OFlag::O_RDONLY)?);
                blocks = self.compare(&file, stat.size)?;
                FileKind::Regular { size: stat.size }
            }
            libc::S_IFDIR => FileKind::Directory,
            libc::S_IFLNK => FileKind::Symlink { target: readlinkat(&handle, c"")?.into_vec() },
            libc::S_IFIFO => FileKind::Fifo,
            format => FileKind::Device { block: format == libc::S_IFBLK, rdev: stat.rdev },
        };
        let xattrs = xattrs_of(handle.as_fd())?;
        Ok(node_of(stat, racy, meta_of(stat, kind, xattrs), blocks))
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

fn node_of(stat: Stat, racy: bool, meta: FileMeta, blocks: Vec<Tag>) -> Node {
    Node { stat, racy, same: false, meta: Arc::new(meta), blocks: Arc::new(blocks) }
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
fn read_block(file: &File, block: usize, size: u64, buf: &mut [u8]) -> io::Result<usize> {
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

fn tag_of(bytes: &[u8]) -> Tag {
    if is_zero(bytes) { ZEROS } else { *blake3::hash(bytes).as_bytes() }
}

/// The second pass: what turns the one into the other. Removals first, then entries in the order of their paths, each
/// followed by its content.
struct Diff<'a> {
    tree: u32,
    base: &'a Path,
    root: BorrowedFd<'a>,
    phase: Phase,
    emit: Emit<'a>,
    stats: &'a mut FilesStats,
}

impl Diff<'_> {
    fn run(
        &mut self,
        sent: Option<&BTreeMap<Vec<u8>, Node>>,
        found: &mut BTreeMap<Vec<u8>, Node>,
    ) -> Result<(), ScanError> {
        let all_same = || found.values().all(|node| node.same);
        if sent.is_some_and(|sent| sent.len() == found.len()) && all_same() {
            return Ok(());
        }
        let empty = BTreeMap::new();
        if sent.is_none() {
            self.remove(Vec::new());
        }
        let sent = sent.unwrap_or(&empty);
        // Making or removing an entry moves the mtime of its directory at the other end too.
        let mut touched = HashSet::new();
        let mut gone: Option<Vec<u8>> = None;
        for (path, node) in sent {
            let inside = gone.as_ref().is_some_and(|gone| is_at_or_below(path, gone));
            let stays = found.get(path).is_some_and(|now| same_object(node, now));
            if !inside && !stays {
                touched.insert(parent_of(path).to_vec());
                self.remove(path.clone());
                gone = Some(path.clone());
            }
        }
        let linked = still_linked(sent, found);
        let made = found.iter().filter(|(path, now)| {
            let link = is_link(now) && !linked.contains(*path);
            link || !now.same && sent.get(*path).is_none_or(|before| !same_object(before, now))
        });
        touched.extend(made.map(|(path, _)| parent_of(path).to_vec()));
        let stays = |path: &Vec<u8>, node: &Node| node.same && !touched.contains(path);
        for (path, node) in found.iter_mut().filter(|(path, node)| !is_link(node) && !stays(path, node)) {
            let before = sent.get(path).filter(|before| same_object(before, node));
            let blocks = before.map_or(&[][..], |before| blocks_of(before, sent));
            let same_meta = before.is_some_and(|before| before.meta == node.meta) && !touched.contains(path);
            if !same_meta || blocks != node.blocks.as_slice() {
                self.entry(path, node);
                self.content(path, node, blocks)?;
            }
        }
        // Last, so that the first names are there.
        for (path, node) in found.iter().filter(|(path, node)| is_link(node) && !linked.contains(*path)) {
            self.entry(path, node);
        }
        Ok(())
    }

    fn entry(&mut self, path: &[u8], node: &Node) {
        let entry =
            FileRecord::Entry { tree: self.tree, path: path.to_vec(), meta: FileMeta::clone(&node.meta) };
        (self.emit)(entry, &[]);
        self.stats.changed += 1;
    }

    fn remove(&mut self, path: Vec<u8>) {
        (self.emit)(FileRecord::Remove { tree: self.tree, path }, &[]);
        self.stats.removed += 1;
    }

    /// Emits the blocks that differ, and remembers what was really emitted: a running workload may have written since.
    fn content(&mut self, path: &[u8], node: &mut Node, before: &[Tag]) -> Result<(), ScanError> {
        let FileKind::Regular { size } = node.meta.kind else { return Ok(()) };
        let differs = |block: usize, tag: &Tag| before.get(block).unwrap_or(&ZEROS) != tag;
        if !node.blocks.iter().enumerate().any(|(block, tag)| differs(block, tag)) {
            return Ok(());
        }
        let file = match open_in(self.root, path, OFlag::O_RDONLY) {
            Ok(fd) => File::from(fd),
            Err(error) if raced(self.phase, &error) => {
                Arc::make_mut(&mut node.blocks).fill(UNKNOWN);
                node.racy = true;
                return Ok(());
            }
            Err(error) => return Err(failed("open", self.base, path)(error)),
        };
        let mut buf = vec![0; BLOCK_SIZE];
        for (block, tag) in Arc::make_mut(&mut node.blocks).iter_mut().enumerate() {
            if !differs(block, tag) {
                continue;
            }
            let len = read_block(&file, block, size, &mut buf).map_err(failed("read", self.base, path))?;
            // Beyond the end of a file that was cut meanwhile: as zeros, which it would read as if it grew again.
            let want = (size - block as u64 * BLOCK_SIZE as u64).min(BLOCK_SIZE as u64) as usize;
            buf[len..want].fill(0);
            *tag = tag_of(&buf[..want]);
            let offset = block as u64 * BLOCK_SIZE as u64;
            (self.emit)(FileRecord::Data { tree: self.tree, path: path.to_vec(), offset }, &buf[..want]);
            self.stats.data_bytes += want as u64;
        }
        Ok(())
    }
}

/// Whether the copy's object at this path can be turned into the new one: directories always, else the same file.
fn same_object(before: &Node, now: &Node) -> bool {
    let format = now.stat.format();
    let same_file = (before.stat.dev, before.stat.ino) == (now.stat.dev, now.stat.ino);
    before.stat.format() == format && (same_file || format == libc::S_IFDIR)
}

fn is_link(node: &Node) -> bool {
    matches!(node.meta.kind, FileKind::HardLink { .. })
}

/// The content that a name stood for at the other end, also if it was a further name.
fn blocks_of<'a>(node: &'a Node, sent: &'a BTreeMap<Vec<u8>, Node>) -> &'a [Tag] {
    match &node.meta.kind {
        FileKind::HardLink { to } => sent.get(to).map_or(&[], |first| &first.blocks),
        _ => &node.blocks,
    }
}

/// The further names that are linked to their first name at the other end already.
fn still_linked(sent: &BTreeMap<Vec<u8>, Node>, found: &BTreeMap<Vec<u8>, Node>) -> HashSet<Vec<u8>> {
    let id = |node: &Node| (node.stat.dev, node.stat.ino);
    let links = found.iter().filter_map(|(path, now)| match &now.meta.kind {
        FileKind::HardLink { to } => Some((path, now, to)),
        _ => None,
    });
    let stays = |path: &Vec<u8>, now: &Node| sent.get(path).is_some_and(|before| id(before) == id(now));
    links
        .filter(|(path, now, to)| stays(path, now) && stays(to, now))
        .map(|(path, ..)| path.clone())
        .collect()
}

fn parent_of(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&byte| byte == b'/').map_or(&[], |slash| &path[..slash])
}

pub(super) fn is_at_or_below(path: &[u8], ancestor: &[u8]) -> bool {
    path == ancestor
        || ancestor.is_empty()
        || (path.starts_with(ancestor) && path.get(ancestor.len()) == Some(&b'/'))
}
