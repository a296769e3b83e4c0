//! The primary's side: what changed since the last scan.

use std::{
    collections::{BTreeSet, HashSet},
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};

use super::{
    DEPTH_MAX,
    clone::{Clones, Cloning},
    diff::{Ahead, Diff},
    held::HeldFiles,
    later::Later,
    look::{Look, View},
    state::{FileId, Key, State},
    sys::{self, Stat},
    tree::Source,
    walk::{Doubt, Doubts},
    watch::{Happened, Listener, Mounts, Watch},
};
use crate::wire::message::FileRecord;

/// Entries of all trees together; more would not be walked within any freeze.
pub(super) const ENTRIES_MAX: usize = 4_000_000;
/// Whether the workload may change its files meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It runs: what vanishes or changes under the scan is left for the next one.
    Running,
    /// It is frozen, but names may still come and go: CRIU makes some for files that have none. Another scan follows.
    Standing,
    /// It is frozen: the result is consistent.
    Frozen,
}

/// Files that change without any event, and some without a trace in their `stat`.
#[derive(Clone, Debug, Default)]
pub struct InUse {
    /// Those that some task maps shared and writable: their content is compared whatever their `stat` says.
    pub mapped: HashSet<FileId>,
    /// Those that a task that writes by `io_submit` has open: their `stat` is looked at.
    pub submitted: HashSet<FileId>,
}

/// What a scan cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilesStats {
    /// Entries looked at: all, or those that something happened to.
    pub entries: u64,
    /// Trees of which everything was looked at.
    pub walked: u64,
    /// Records of entries that are new or changed.
    pub changed: u64,
    /// Records of removals.
    pub removed: u64,
    /// Content read in order to compare it.
    pub compared_bytes: u64,
    /// Content emitted.
    pub data_bytes: u64,
    /// Content that was not, because the copy holds it as it says.
    pub kept_bytes: u64,
    /// Files of which a clone was taken, to be read by [`Scanner::settle`].
    pub cloned: u64,
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

/// Where a tree's root is, as long as it is the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    mount: u64,
    root: FileId,
}

/// How a tree's changes are heard of.
#[derive(Debug)]
struct Tracked {
    /// Index of the watch.
    watch: usize,
    place: Place,
    happened: Happened,
}

#[derive(Debug)]
struct Tree {
    source: Source,
    /// What the records make of the copy; `None`: nothing is known of it.
    sent: Option<State>,
    /// `None`: every scan is a walk.
    tracked: Option<Tracked>,
    /// What changed under the last scan.
    again: BTreeSet<Key>,
    ahead: Ahead,
    clones: Clones,
    /// The overlay's number for its root: files have others when it was mounted anew.
    merged: Option<FileId>,
}

/// Finds what changed in a set of trees.
#[derive(Debug)]
pub struct Scanner {
    trees: Vec<Tree>,
    /// One for each file system; `None`: none are wanted.
    watches: Option<Vec<Watch>>,
    mounts: Option<Mounts>,
    cloning: Option<Cloning>,
    later: Later,
    /// What the copies are said to hold, for the next scan of all.
    held: Option<HeldFiles>,
}

pub(super) type Emit<'a> = &'a mut dyn FnMut(FileRecord, &[u8]);

impl Scanner {
    /// A scanner of trees as this process sees them (as `/proc/PID/root/srv/data`). The first scan sends
    /// everything. Where the kernel tells what changes, the following ones look at nothing else.
    pub fn new(trees: Vec<Source>) -> Self {
        Self { watches: Some(Vec::new()), ..Self::untracked(trees) }
    }

    /// A scanner that looks at everything in every scan: for a single one.
    pub fn untracked(trees: Vec<Source>) -> Self {
        let tree = |source| Tree {
            source,
            sent: None,
            tracked: None,
            again: BTreeSet::new(),
            ahead: Ahead::default(),
            clones: Clones::default(),
            merged: None,
        };
        Self {
            trees: trees.into_iter().map(tree).collect(),
            watches: None,
            mounts: None,
            cloning: None,
            later: Later::default(),
            held: None,
        }
    }

    /// The next scan sends everything: what was emitted last did not become a commit, or a scan failed.
    pub fn reset(&mut self) {
        self.later = Later::default();
        self.held = None;
        for tree in &mut self.trees {
            (tree.sent, tree.ahead) = (None, Ahead::default());
        }
    }

    /// The next scan sends everything but the blocks that the copies hold as they say. After [`Self::reset`].
    pub fn offer(&mut self, held: HeldFiles) {
        self.held = Some(held);
    }

    /// Whether the next scan looks only at what the kernel tells of.
    pub fn is_told(&self) -> bool {
        self.trees.iter().all(|tree| tree.sent.is_some() && tree.tracked.is_some())
    }

    /// Whether the last scan found content, which a mapping may change unseen.
    pub fn has_content(&self) -> bool {
        self.trees.iter().filter_map(|tree| tree.sent.as_ref()).any(State::has_content)
    }

    /// Right before a freeze: has written to disk what would keep the freeze waiting if files are cloned in it. `cloning`:
    /// when they are; [`Self::settle`] must follow then. In a freeze that this does not precede nothing is cloned.
    pub fn write_back(&mut self, cloning: Cloning) {
        self.cloning = Some(cloning);
        for tree in self.trees.iter_mut().filter(|_| cloning == Cloning::Shorter) {
            if let (Some(sent), Ok(root)) = (&tree.sent, open_root(&tree.source.path)) {
                tree.clones.write_back(root.as_fd(), sent);
            }
        }
    }

    /// After the thaw, before the epoch ends: reads what was cloned in the freeze, and emits what changed of it. On an error
    /// the epoch has failed, as after one of [`Self::scan`].
    pub fn settle(&mut self, emit: Emit<'_>) -> Result<FilesStats, ScanError> {
        let mut stats = FilesStats::default();
        for content in std::mem::take(&mut self.later).into_contents() {
            let tree = &mut self.trees[content.tree as usize];
            let failed = failed("read the clone of", &tree.source.path, &content.path());
            let blocks = content.emit(emit, &mut stats).map_err(failed)?;
            if let Some(sent) = &mut tree.sent {
                sent.take_blocks(&content.key, blocks);
            }
        }
        Ok(stats)
    }

    /// Emits what changed since the scan before. `in_use`: files that change unseen.
    pub fn scan(&mut self, phase: Phase, in_use: &InUse, emit: Emit<'_>) -> Result<FilesStats, ScanError> {
        if !self.later.begin(phase) {
            self.reset();
        }
        self.listen();
        let mut stats = FilesStats::default();
        for index in 0..self.trees.len() {
            self.scan_tree(index, phase, in_use, emit, &mut stats)?;
        }
        self.held = None;
        if phase == Phase::Frozen {
            self.cloning = None;
        }
        Ok(stats)
    }

    /// Takes in what happened since the last scan.
    fn listen(&mut self) {
        let remounted = self.mounts.as_ref().is_some_and(Mounts::changed);
        for (index, watch) in self.watches.iter_mut().flatten().enumerate() {
            let mut listeners = Vec::new();
            for tree in &mut self.trees {
                if let Some(tracked) = tree.tracked.as_mut().filter(|tracked| tracked.watch == index) {
                    listeners.push(Listener { state: tree.sent.as_ref(), happened: &mut tracked.happened });
                }
            }
            watch.tell(&mut listeners);
        }
        if remounted {
            self.trees.iter_mut().filter_map(|tree| tree.tracked.as_mut()).for_each(|it| it.happened.lose());
        }
    }

    fn scan_tree(
        &mut self,
        index: usize,
        phase: Phase,
        in_use: &InUse,
        emit: Emit<'_>,
        stats: &mut FilesStats,
    ) -> Result<(), ScanError> {
        let sent = self.trees[index].sent.take();
        let base = self.trees[index].source.path.clone();
        let root = open_root(&base)?;
        let place = Place::of(root.as_fd()).map_err(failed("stat", &base, b""))?;
        let whole = sent.is_none();
        if whole {
            self.trees[index].tracked = self.track(root.as_fd(), place).ok();
        }
        let tree = &mut self.trees[index];
        let merged = tree.source.merged.as_deref().map(open_root).transpose()?;
        let merged_id = merged.as_ref().map(|fd| id_of(fd.as_fd())).transpose();
        let merged_id = merged_id.map_err(failed("stat", &base, b""))?;
        let renumbered = std::mem::replace(&mut tree.merged, merged_id) != merged_id;
        tree.tracked.take_if(|tracked| tracked.place != place);
        let mut state = sent.unwrap_or_default();
        let doubts = tree.doubts(&state, in_use).filter(|_| !whole && !renumbered);
        let view = View {
            base: &base,
            root: root.as_fd(),
            merged: merged.as_ref().map(AsFd::as_fd),
            renumbered,
            phase,
            in_use,
            cloning: self.cloning,
            sent: &state,
            watched: tree.tracked.is_some(),
        };
        let mut look = Look::new(view, &mut tree.clones, stats);
        match doubts {
            Some(doubts) => look.at(doubts)?,
            None => look.at_all()?,
        }
        let Look { mut changes, mut again, unwatchable, cloned, .. } = look;
        // In a freeze nothing is read twice.
        let is_plain = whole && phase == Phase::Running && merged.is_none();
        let mut diff = Diff {
            held: self.held.as_ref().filter(|_| is_plain).and_then(|held| held.tree(index as u32)),
            tree: index as u32,
            view,
            emit,
            stats,
            ahead: &mut tree.ahead,
            cloned,
            clones: &mut tree.clones,
            later: &mut self.later,
            again: &mut again,
        };
        if whole {
            diff.remove(b"");
        }
        diff.run(&mut changes)?;
        stats.cloned += self.later.end(index as u32, phase, |key| changes.contains_key(key));
        if phase == Phase::Frozen {
            // The epoch is whole.
            tree.ahead = Ahead::default();
        }
        state.take(changes);
        if state.len() > ENTRIES_MAX {
            return Err(ScanError::TooMany);
        }
        tree.tracked.take_if(|_| unwatchable);
        (tree.again, tree.sent) = (again, Some(state));
        Ok(())
    }

    /// Begins to listen to what happens to a tree; before it is walked.
    fn track(&mut self, root: BorrowedFd<'_>, place: Place) -> io::Result<Tracked> {
        let watches = self.watches.as_mut().ok_or(io::ErrorKind::Unsupported)?;
        let mounts = match &mut self.mounts {
            Some(mounts) => mounts,
            none => none.insert(Mounts::new()?),
        };
        if !mounts.hold(root)? {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let dev = place.root.0;
        let watch = watches.iter().position(|watch| watch.dev == dev).unwrap_or(watches.len());
        if watch == watches.len() {
            watches.push(Watch::new(root, dev)?);
        }
        Ok(Tracked { watch, place, happened: Happened::default() })
    }

    /// A digest of all that was sent: equal for trees that are equal in everything that is replicated.
    /// `None` after [`Scanner::reset`], and before [`Scanner::settle`] if that has something to do.
    pub fn digest(&self) -> Option<[u8; 32]> {
        if !self.later.is_empty() {
            return None;
        }
        let mut hasher = blake3::Hasher::new();
        for tree in &self.trees {
            let sent = tree.sent.as_ref()?;
            hasher.update(&(sent.len() as u64).to_le_bytes());
            for (key, node) in sent.iter() {
                // `Debug` of the meta is unambiguous, and the digest never outlives one version of the
                // program.
                let head = format!("{key:?} {:?} {:?} {}", node.meta, node.mark, node.blocks.len());
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

impl Tree {
    /// The entries that may have changed, if that is known.
    fn doubts(&mut self, sent: &State, in_use: &InUse) -> Option<Doubts> {
        let again = std::mem::take(&mut self.again);
        let tracked = self.tracked.as_mut()?;
        let mut doubts = std::mem::take(&mut tracked.happened).doubts(sent)?;
        let used = in_use.mapped.iter().chain(&in_use.submitted).flat_map(|id| sent.names_seen(*id));
        for key in used.chain(sent.untold()) {
            doubts.entry(key.clone()).or_default();
        }
        for key in again {
            doubts.insert(key, Doubt::Renamed);
        }
        Some(doubts)
    }
}

impl Place {
    fn of(root: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self { mount: sys::mount_id(root).unwrap_or_default(), root: id_of(root)? })
    }
}

fn id_of(dir: BorrowedFd<'_>) -> io::Result<FileId> {
    Ok(sys::stat_at(dir, c"")?.id())
}

pub(super) fn failed(
    what: &'static str,
    base: &Path,
    path: &[u8],
) -> impl FnOnce(io::Error) -> ScanError + use<> {
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
    phase != Phase::Frozen && error.raw_os_error().is_some_and(|code| codes.contains(&code))
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
