//! The primary's side: what changed since the last scan.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};

use super::{
    BLOCK_SIZE, DEPTH_MAX,
    sys::{self, Stat},
    tree::{Mark, Source},
    walk::{Walk, read_block, tag_of},
};
use crate::wire::message::{FileKind, FileMeta, FileRecord};

/// Entries of all trees together; more would not be walked within any freeze.
pub(super) const ENTRIES_MAX: usize = 4_000_000;
/// Device and inode number, as `stat` gives them.
pub type FileId = (u64, u64);
/// The BLAKE3 hash of a block; all zero for one that holds only zeros.
pub(super) type Tag = [u8; 32];
pub(super) const ZEROS: Tag = [0; 32];
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
    /// An overlay keeps something in another place than it shows it.
    #[error(
        "a container's writable layer cannot be replicated: {path:?} was changed with the overlay option {option}: turn \
         it off (echo N > /sys/module/overlay/parameters/{option}) and make the container anew"
    )]
    Overlay {
        /// What.
        path: PathBuf,
        /// How.
        option: &'static str,
    },
    /// Too many files.
    #[error("replicated directories hold more than {ENTRIES_MAX} entries: declare fewer or smaller ones")]
    TooMany,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) stat: Stat,
    /// Its `stat` may miss a later write.
    pub(super) racy: bool,
    /// Taken over from the scan before as it was.
    pub(super) same: bool,
    pub(super) mark: Mark,
    /// What the tasks see as its number.
    pub(super) seen_as: Option<FileId>,
    pub(super) meta: Arc<FileMeta>,
    pub(super) blocks: Arc<Vec<Tag>>,
}

#[derive(Debug)]
struct Tree {
    source: Source,
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
    /// A scanner of trees as this process sees them (as `/proc/PID/root/srv/data`). The first scan sends
    /// everything.
    pub fn new(trees: Vec<Source>) -> Self {
        Self { trees: trees.into_iter().map(|source| Tree { source, sent: None }).collect() }
    }

    /// The next scan sends everything: what was emitted last did not become a commit, or a scan failed.
    pub fn reset(&mut self) {
        for tree in &mut self.trees {
            tree.sent = None;
        }
    }

    /// Whether the last scan found content, which a mapping may change unseen.
    pub fn has_content(&self) -> bool {
        let nodes = self.trees.iter().filter_map(|tree| tree.sent.as_ref()).flat_map(BTreeMap::values);
        nodes.into_iter().any(|node| matches!(node.meta.kind, FileKind::Regular { size: 1.. }))
    }

    /// Emits what changed since the scan before. `mapped`: the files that some task maps shared and writable;
    /// their content is compared whatever their `stat` says.
    pub fn scan(
        &mut self,
        phase: Phase,
        mapped: &HashSet<FileId>,
        emit: Emit<'_>,
    ) -> Result<FilesStats, ScanError> {
        let mut stats = FilesStats::default();
        for (index, tree) in self.trees.iter_mut().enumerate() {
            let sent = tree.sent.take();
            let base = &tree.source.path;
            let root = open_root(base)?;
            let merged = tree.source.merged.as_deref().map(open_root).transpose()?;
            let (over, old) = (merged.as_ref().map(AsFd::as_fd), sent.as_ref());
            let mut walk = Walk::new(base, root.as_fd(), over, phase, mapped, old, &mut stats);
            walk.root()?;
            let mut found = walk.found;
            let mut diff = Diff {
                tree: index as u32,
                base,
                overlay: tree.source.is_overlay(),
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
                // `Debug` of the meta is unambiguous, and the digest never outlives one version of the
                // program.
                let head = format!("{path:?} {:?} {:?} {}", node.meta, node.mark, node.blocks.len());
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

pub(super) fn failed(what: &'static str, base: &Path, path: &[u8]) -> impl FnOnce(io::Error) -> ScanError {
    let path = full(base, path);
    move |source| ScanError::Io { what, path, source }
}

pub(super) fn full(base: &Path, path: &[u8]) -> PathBuf {
    base.join(OsStr::from_bytes(path))
}

fn open_root(path: &Path) -> Result<OwnedFd, ScanError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(|errno| failed("open", path, b"")(errno.into()))
}

/// Whether an error only says that a running workload changed the entry meanwhile.
pub(super) fn raced(phase: Phase, error: &io::Error) -> bool {
    let codes = [libc::ENOENT, libc::ENOTDIR, libc::ELOOP, libc::ESTALE, libc::ENXIO, libc::EINVAL];
    phase == Phase::Running && error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

/// Opens within a tree: no link is followed, no mount is entered, nothing above the root is reached.
pub(super) fn open_in(root: BorrowedFd<'_>, path: &[u8], flags: OFlag) -> io::Result<OwnedFd> {
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    Ok(openat2(root, path, OpenHow::new().flags(flags).resolve(resolve))?)
}

/// Opens the content of the file that was found at `path`; `ESTALE` if another one has taken its place.
pub(super) fn open_content(root: BorrowedFd<'_>, path: &[u8], found: &Stat) -> io::Result<File> {
    // A pipe that has taken its place does not block the scan.
    let fd = open_in(root, path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
    let same = sys::stat_at(fd.as_fd(), c"")?.is_same_file(found);
    if same { Ok(File::from(fd)) } else { Err(io::Error::from_raw_os_error(libc::ESTALE)) }
}

/// The second pass: what turns the one into the other. Removals first, then entries in the order of their
/// paths, each followed by its content.
struct Diff<'a> {
    tree: u32,
    base: &'a Path,
    root: BorrowedFd<'a>,
    overlay: bool,
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
        for path in self.replaced(sent, found) {
            if !gone.as_ref().is_some_and(|gone| is_at_or_below(&path, gone)) {
                touched.insert(parent_of(&path).to_vec());
                self.remove(path.clone());
                gone = Some(path);
            }
        }
        // What was in a directory that became opaque went with it, whatever is there now.
        let emptied = made_opaque(sent, found);
        let is_left = |path: &[u8]| !emptied.iter().any(|dir| is_at_or_below(path, dir));
        let sent_before = |path: &Vec<u8>, now: &Node| {
            sent.get(path).filter(|before| same_object(before, now) && is_left(path))
        };
        let mut linked = still_linked(sent, found);
        linked.retain(|path| is_left(path));
        let made = found.iter().filter(|(path, now)| {
            let link = is_link(now) && !linked.contains(*path);
            link || sent_before(path, now).is_none()
        });
        touched.extend(made.map(|(path, _)| parent_of(path).to_vec()));
        let stays = |path: &Vec<u8>, node: &Node| {
            node.mark == Mark::Whiteout || node.same && !touched.contains(path) && is_left(path)
        };
        for (path, node) in found.iter_mut().filter(|(path, node)| !is_link(node) && !stays(path, node)) {
            let before = sent_before(path, node);
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

    /// What must go before the new entries are made; also what is below something else that goes.
    fn replaced(&self, sent: &BTreeMap<Vec<u8>, Node>, found: &BTreeMap<Vec<u8>, Node>) -> BTreeSet<Vec<u8>> {
        let stays = |path: &Vec<u8>, before| found.get(path).is_some_and(|now| same_object(before, now));
        let gone = sent.iter().filter(|(path, before)| !stays(path, before));
        let mut replaced: BTreeSet<_> = gone.map(|(path, _)| path.clone()).collect();
        if self.overlay {
            let new = found.iter().filter(|(path, now)| !sent.contains_key(*path) && hides(now));
            replaced.extend(new.map(|(path, _)| path.clone()));
        }
        replaced
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

    /// Emits the blocks that differ, and remembers what was really emitted: a running workload may have
    /// written since.
    fn content(&mut self, path: &[u8], node: &mut Node, before: &[Tag]) -> Result<(), ScanError> {
        let FileKind::Regular { size } = node.meta.kind else { return Ok(()) };
        let differs = |block: usize, tag: &Tag| before.get(block).unwrap_or(&ZEROS) != tag;
        if !node.blocks.iter().enumerate().any(|(block, tag)| differs(block, tag)) {
            return Ok(());
        }
        let file = match open_content(self.root, path, &node.stat) {
            Ok(file) => file,
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
            // Beyond the end of a file that was cut meanwhile: as zeros, which it would read as if it grew
            // again.
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

/// Whether the copy's object at this path can be turned into the new one: directories mostly, else the same
/// file.
fn same_object(before: &Node, now: &Node) -> bool {
    let directories = [before, now].iter().all(|node| node.stat.format() == libc::S_IFDIR);
    let whiteouts = before.mark == Mark::Whiteout;
    before.mark == now.mark && (directories || whiteouts || now.stat.is_same_file(&before.stat))
}

/// Whether an entry of an overlay that is new hides one of a lower layer, of which nothing may be kept.
fn hides(now: &Node) -> bool {
    now.mark != Mark::None || matches!(now.meta.kind, FileKind::Regular { .. })
}

/// The directories that are not what they were, though they stay directories.
fn made_opaque(sent: &BTreeMap<Vec<u8>, Node>, found: &BTreeMap<Vec<u8>, Node>) -> Vec<Vec<u8>> {
    let changed =
        found.iter().filter(|(path, now)| sent.get(*path).is_some_and(|before| before.mark != now.mark));
    changed.map(|(path, _)| path.clone()).collect()
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
    let links = found.iter().filter_map(|(path, now)| match &now.meta.kind {
        FileKind::HardLink { to } => Some((path, now, to)),
        _ => None,
    });
    let stays = |path: &Vec<u8>, now: &Node| sent.get(path).is_some_and(|before| same_object(before, now));
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
