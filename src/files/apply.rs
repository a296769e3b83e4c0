//! The standby's side: records become a copy of the trees.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::PathBuf,
};

use nix::{
    fcntl::{AtFlags, FallocateFlags, OFlag, fallocate, open},
    sys::stat::Mode,
    unistd::{Gid, Uid, fchownat, syncfs},
};

use super::{
    BLOCK_SIZE, Blocks, DEPTH_MAX, PATH_LEN_MAX, XATTR_LEN_MAX, XATTRS_MAX,
    look::is_zero,
    make::{Place, is_absent, make, make_as_new, make_link, prune, remove_all, set_xattrs},
    scan::{ENTRIES_MAX, InUse, Phase, ScanError, Scanner, open_in},
    sys,
    tree::{Source, Target},
};
use crate::wire::message::{FileKind, FileMeta, FileRecord};

/// The longest name in a directory.
const NAME_LEN_MAX: usize = 255;
/// The longest name of an extended attribute.
const XATTR_NAME_LEN_MAX: usize = 255;
/// Most runs of blocks that one epoch keeps: each of 256 GiB in blocks, at worst.
const EPOCH_RUNS_MAX: usize = 1 << 22;
/// The longest text of a symbolic link.
const TARGET_LEN_MAX: usize = 4095;
/// Where overlayfs notes of a file which one of a lower layer it was copied from.
const ORIGIN: &CStr = c"trusted.overlay.origin";
/// Why an epoch is refused.
const MORE_ENTRIES: &str = "more entries in one epoch than a scanner sends";

/// Why a record was not applied. The copy is then between two epochs: apply the epoch again, or ask for
/// everything.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The record asks for something that no scanner emits.
    #[error(
        "a file record from the peer is refused ({path:?}): {why}: both agents must be of the same version"
    )]
    Refused {
        /// The path in the record.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A system call failed.
    #[error(
        "could not {what} {path:?} in the copy of tree {tree}: {source}: is the standby's disk full or read-only?"
    )]
    Io {
        /// What was tried.
        what: &'static str,
        /// In which tree.
        tree: u32,
        /// On what.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A copy's root could not be opened.
    #[error("could not open {path:?}, the standby's copy of a replicated directory: {source}: create it")]
    Root {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Why a copy is not what the primary sent.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It could not be read.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// It differs.
    #[error(
        "the standby's copy of the replicated directories differs from what the primary sent: was it written to? have \
         everything sent again"
    )]
    Differs,
}

/// Compares copies with [`Scanner::digest`] of the scanner that sent them. Only plain trees: what an overlay's upper
/// directory holds depends on how it came about.
pub fn verify(trees: Vec<PathBuf>, digest: &[u8; 32]) -> Result<(), VerifyError> {
    let mut scanner = Scanner::untracked(trees.into_iter().map(Source::plain).collect());
    scanner.scan(Phase::Frozen, &InUse::default(), &mut |_, _| {})?;
    if scanner.digest().as_ref() == Some(digest) { Ok(()) } else { Err(VerifyError::Differs) }
}

/// Applies one epoch's records to the copies.
#[derive(Debug)]
pub struct Receiver {
    roots: Vec<Root>,
    /// Properties are set when all content is there and all entries are made: writing drops capabilities and
    /// set-id bits, and moves the mtimes of files and directories.
    properties: BTreeMap<(u32, Vec<u8>), FileMeta>,
    /// Trees that are sent whole, and what is in them. What else is there goes at the end, and what is in both stays the same
    /// object: a directory or file may be where another mount namespace has a file system mounted, which would go with it.
    whole: BTreeMap<u32, BTreeSet<Vec<u8>>>,
    /// Entries that could not be made because something else is in the way, as when an epoch is applied again whose
    /// end has changed it. A later record of the epoch removes what stands here.
    skipped: BTreeSet<(u32, Vec<u8>)>,
    /// Files that are new in an overlay and were removed, emptied so far: most are made again by the next record, and stay the
    /// same object, for the reason above.
    emptied: BTreeSet<(u32, Vec<u8>)>,
    /// What stays of files of trees that are sent whole, until their entries come.
    kept: BTreeMap<(u32, Vec<u8>), Vec<Blocks>>,
    kept_runs: usize,
}

/// A tree's copy, open.
#[derive(Debug)]
struct Root {
    dir: OwnedFd,
    /// Of an overlay: its upper directory, to be read only.
    upper: Option<OwnedFd>,
}

impl Receiver {
    /// A receiver for these copies, in the order of the scanner's trees. What an overlay must be like before a
    /// whole tree is applied to it is said at [`Target::overlay`].
    pub fn open(trees: &[Target]) -> Result<Self, ApplyError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let open_one = |target: &Target| {
            let open = |path: &PathBuf| {
                open(path, flags, Mode::empty())
                    .map_err(|errno| ApplyError::Root { path: path.clone(), source: errno.into() })
            };
            Ok(Root { dir: open(&target.path)?, upper: target.upper.as_ref().map(open).transpose()? })
        };
        let roots = trees.iter().map(open_one).collect::<Result<_, _>>()?;
        Ok(Self {
            roots,
            properties: BTreeMap::new(),
            whole: BTreeMap::new(),
            skipped: BTreeSet::new(),
            emptied: BTreeSet::new(),
            kept: BTreeMap::new(),
            kept_runs: 0,
        })
    }

    /// Applies a record with its body. The records of an epoch may be applied again, from the first on.
    pub fn apply(&mut self, record: &FileRecord, body: &[u8]) -> Result<(), ApplyError> {
        match record {
            FileRecord::Entry { tree, path, meta } => {
                check_path(path)?;
                check_meta(path, meta)?;
                self.entry(*tree, path, meta)
            }
            FileRecord::Data { tree, path, offset } => {
                check_path(path)?;
                if body.is_empty() || body.len() > BLOCK_SIZE {
                    return Err(refused(path, "its content has no size that a scanner sends"));
                }
                if self.skipped.contains(&(*tree, path.clone())) {
                    return Ok(());
                }
                self.data(*tree, path, *offset, body)
            }
            FileRecord::Keep { tree, path, runs, .. } => {
                check_path(path)?;
                self.keep(*tree, path, runs)
            }
            FileRecord::Remove { tree, path } => {
                check_path(path)?;
                self.remove(*tree, path)
            }
        }
    }

    /// Sets the properties of all that was applied and makes the copies durable.
    pub fn finish(mut self) -> Result<(), ApplyError> {
        if let Some((tree, path)) = self.skipped.first() {
            return Err(io_error("make", *tree, path)(io::ErrorKind::NotFound.into()));
        }
        for (tree, path) in std::mem::take(&mut self.emptied) {
            let place = self.place(tree, &path)?;
            remove_all(place.dir.as_fd(), &place.name, 0).map_err(io_error("remove", tree, &path))?;
        }
        for (tree, named) in std::mem::take(&mut self.whole) {
            let root = self.root(tree, b"")?;
            // An overlay's lower layers are not in the records.
            let listed = self.roots[tree as usize].upper.as_ref().map_or(root, AsFd::as_fd);
            prune(root, listed, &mut Vec::new(), &named, 0).map_err(io_error(
                "remove what is not in",
                tree,
                b"",
            ))?;
        }
        // Backwards: what is in a directory comes before it.
        for ((tree, path), meta) in std::mem::take(&mut self.properties).into_iter().rev() {
            self.set_properties(tree, &path, &meta).map_err(io_error(
                "set the properties of",
                tree,
                &path,
            ))?;
        }
        for (tree, root) in self.roots.iter().enumerate() {
            syncfs(&root.dir).map_err(io::Error::from).map_err(io_error("sync", tree as u32, b""))?;
        }
        Ok(())
    }

    fn root(&self, tree: u32, path: &[u8]) -> Result<BorrowedFd<'_>, ApplyError> {
        let root = self.roots.get(tree as usize);
        root.map(|root| root.dir.as_fd()).ok_or_else(|| refused(path, "there is no such tree"))
    }

    fn place(&self, tree: u32, path: &[u8]) -> Result<Place, ApplyError> {
        let root = self.root(tree, path)?;
        let (parent, name) = match path.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&b"."[..], path),
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let dir = open_in(root, parent, flags).map_err(io_error("open the directory of", tree, path))?;
        let name = CString::new(name).map_err(|_| refused(path, "a zero byte in a name"))?;
        Ok(Place { dir, name })
    }

    fn entry(&mut self, tree: u32, path: &[u8], meta: &FileMeta) -> Result<(), ApplyError> {
        if path.is_empty() {
            self.root(tree, path)?;
            if meta.kind != FileKind::Directory {
                return Err(refused(path, "the root of a tree is a directory"));
            }
        } else {
            let is_new = self.name(tree, path)?;
            let kept = self.kept.remove(&(tree, path.to_vec())).unwrap_or_default();
            let made = match &meta.kind {
                FileKind::HardLink { to } => self.link(tree, path, to),
                kind => self.place(tree, path).and_then(|place| {
                    if is_new {
                        make_as_new(&place, &kept).map_err(io_error("empty", tree, path))?;
                    }
                    make(&place, kind).map_err(io_error("create", tree, path))
                }),
            };
            match made {
                Err(ApplyError::Io { source, .. }) if is_in_the_way(&source) => return self.skip(tree, path),
                other => other?,
            }
        }
        let key = (tree, path.to_vec());
        self.skipped.remove(&key);
        self.emptied.remove(&key);
        if matches!(meta.kind, FileKind::HardLink { .. }) {
            // Its properties come with its first name.
            self.properties.remove(&key);
            return Ok(());
        }
        if self.properties.len() >= ENTRIES_MAX {
            return Err(refused(path, MORE_ENTRIES));
        }
        self.properties.insert(key, meta.clone());
        Ok(())
    }

    /// What the next entry of that path, the first in a tree that is sent whole, does not empty.
    fn keep(&mut self, tree: u32, path: &[u8], runs: &[Blocks]) -> Result<(), ApplyError> {
        let is_first = self.whole.get(&tree).is_some_and(|named| !named.contains(path));
        let is_plain = self.roots.get(tree as usize).is_some_and(|root| root.upper.is_none());
        if path.is_empty() || !is_first || !is_plain {
            return Err(refused(path, "blocks of it are to be kept where nothing is"));
        }
        self.kept_runs += runs.len();
        if self.kept_runs > EPOCH_RUNS_MAX {
            return Err(refused(path, "more to be kept in one epoch than a scanner names"));
        }
        let kept = self.kept.entry((tree, path.to_vec())).or_default();
        let end = kept.last().map_or(0, |(first, count)| first.saturating_add(*count));
        if runs.first().is_some_and(|(first, _)| *first < end) {
            return Err(refused(path, "blocks to be kept are out of order"));
        }
        kept.extend_from_slice(runs);
        Ok(())
    }

    fn link(&self, tree: u32, path: &[u8], to: &[u8]) -> Result<(), ApplyError> {
        let (place, first) = (self.place(tree, path)?, self.place(tree, to)?);
        make_link(&place, &first).map_err(io_error("link", tree, path))
    }

    fn skip(&mut self, tree: u32, path: &[u8]) -> Result<(), ApplyError> {
        if self.skipped.len() >= ENTRIES_MAX {
            return Err(refused(path, MORE_ENTRIES));
        }
        self.properties.remove(&(tree, path.to_vec()));
        self.skipped.insert((tree, path.to_vec()));
        Ok(())
    }

    /// Of a tree that is sent whole, this stays. Whether it had not been named before.
    fn name(&mut self, tree: u32, path: &[u8]) -> Result<bool, ApplyError> {
        let Some(named) = self.whole.get_mut(&tree) else { return Ok(false) };
        if named.len() >= ENTRIES_MAX {
            return Err(refused(path, "more entries in one epoch than a scanner sends"));
        }
        Ok(named.insert(path.to_vec()))
    }

    fn data(&self, tree: u32, path: &[u8], offset: u64, body: &[u8]) -> Result<(), ApplyError> {
        let root = self.root(tree, path)?;
        let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK;
        let file = open_in(root, path, flags).map(File::from).map_err(io_error("open", tree, path))?;
        let status = file.metadata().map_err(io_error("stat", tree, path))?;
        let end = offset.checked_add(body.len() as u64);
        if !status.is_file() || end.is_none_or(|end| end > status.len()) {
            return Err(refused(path, "content that does not lie in a regular file"));
        }
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let zero = is_zero(body);
        if zero && fallocate(&file, punch, offset as i64, body.len() as i64).is_ok() {
            return Ok(());
        }
        file.write_all_at(body, offset).map_err(io_error("write", tree, path))
    }

    fn remove(&mut self, tree: u32, path: &[u8]) -> Result<(), ApplyError> {
        if path.is_empty() {
            self.root(tree, path)?;
            self.properties.retain(|key, _| key.0 != tree);
            self.skipped.retain(|key| key.0 != tree);
            self.emptied.retain(|key| key.0 != tree);
            self.kept.retain(|key, _| key.0 != tree);
            self.whole.insert(tree, BTreeSet::new());
            return Ok(());
        }
        self.forget(tree, path);
        let place = match self.place(tree, path) {
            // Its directory went before it, or something else is in that one's place.
            Err(ApplyError::Io { source, .. }) if is_in_the_way(&source) => return Ok(()),
            other => other?,
        };
        if self.emptied.len() < ENTRIES_MAX && self.empties(tree, path, &place) {
            self.emptied.insert((tree, path.to_vec()));
            return Ok(());
        }
        remove_all(place.dir.as_fd(), &place.name, 0).map_err(io_error("remove", tree, path))
    }

    /// Empties a file of an overlay that no lower layer has any part in and that has no other name; whether it is one.
    fn empties(&self, tree: u32, path: &[u8], place: &Place) -> bool {
        let upper = self.roots.get(tree as usize).and_then(|root| root.upper.as_ref());
        let own =
            upper.and_then(|upper| open_in(upper.as_fd(), path, OFlag::O_RDONLY | OFlag::O_NONBLOCK).ok());
        let Some(own) = own else { return false };
        let is_own = sys::stat_at(own.as_fd(), c"")
            .is_ok_and(|it| it.format() == libc::S_IFREG && it.nlink == 1)
            && matches!(sys::get_xattr(own.as_fd(), ORIGIN), Ok(None));
        let is_shown =
            sys::stat_at(place.dir.as_fd(), &place.name).is_ok_and(|it| it.format() == libc::S_IFREG);
        is_own && is_shown && make_as_new(place, &[]).is_ok()
    }

    /// Nothing is known of a path any more, nor of what is below it. A whole tree may come with a removal for each file.
    fn forget(&mut self, tree: u32, path: &[u8]) {
        let from = |path: &[u8]| (tree, path.to_vec());
        let below = [path, b"/"].concat();
        let is_below = |key: &(u32, Vec<u8>)| key.0 == tree && key.1.starts_with(&below);
        self.properties.remove(&from(path));
        let kept = self.properties.range(from(&below)..).map(|(key, _)| key);
        for key in kept.take_while(|key| is_below(key)).cloned().collect::<Vec<_>>() {
            self.properties.remove(&key);
        }
        self.skipped.remove(&from(path));
        self.emptied.remove(&from(path));
        let kept = self.emptied.range(from(&below)..);
        for key in kept.take_while(|key| is_below(key)).cloned().collect::<Vec<_>>() {
            self.emptied.remove(&key);
        }
        let kept = self.skipped.range(from(&below)..);
        for key in kept.take_while(|key| is_below(key)).cloned().collect::<Vec<_>>() {
            self.skipped.remove(&key);
        }
        let Some(named) = self.whole.get_mut(&tree) else { return };
        named.remove(path);
        let kept = named.range(below.clone()..);
        for path in kept.take_while(|path| path.starts_with(&below)).cloned().collect::<Vec<_>>() {
            named.remove(&path);
        }
    }

    fn set_properties(&self, tree: u32, path: &[u8], meta: &FileMeta) -> io::Result<()> {
        let root = self.roots[tree as usize].dir.as_fd();
        let name = if path.is_empty() { b".".as_slice() } else { path };
        let handle = open_in(root, name, OFlag::O_PATH)?;
        fchownat(
            &handle,
            c"",
            Some(Uid::from_raw(meta.uid)),
            Some(Gid::from_raw(meta.gid)),
            AtFlags::AT_EMPTY_PATH,
        )?;
        if !matches!(meta.kind, FileKind::Symlink { .. }) {
            sys::chmod(handle.as_fd(), meta.mode)?;
        }
        set_xattrs(handle.as_fd(), &meta.xattrs)?;
        sys::set_mtime(handle.as_fd(), meta.mtime)
    }
}

fn refused(path: &[u8], why: &'static str) -> ApplyError {
    let shown = &path[..path.len().min(NAME_LEN_MAX)];
    ApplyError::Refused { path: String::from_utf8_lossy(shown).into_owned(), why }
}

fn io_error(what: &'static str, tree: u32, path: &[u8]) -> impl FnOnce(io::Error) -> ApplyError {
    let path = String::from_utf8_lossy(path).into_owned();
    move |source| ApplyError::Io { what, tree, path, source }
}

/// What leads there is not there, or is no directory.
fn is_in_the_way(error: &io::Error) -> bool {
    is_absent(error) || error.raw_os_error() == Some(libc::ELOOP)
}

fn check_path(path: &[u8]) -> Result<(), ApplyError> {
    if path.len() > PATH_LEN_MAX {
        return Err(refused(path, "its path is too long"));
    }
    if path.is_empty() {
        return Ok(());
    }
    let mut depth = 0;
    for name in path.split(|&byte| byte == b'/') {
        depth += 1;
        let named = !name.is_empty() && name != b"." && name != b"..";
        if !named || name.len() > NAME_LEN_MAX || name.contains(&0) || depth > DEPTH_MAX + 1 {
            return Err(refused(path, "its path is no path below the tree's root"));
        }
    }
    Ok(())
}

fn check_meta(path: &[u8], meta: &FileMeta) -> Result<(), ApplyError> {
    let kind_is_sane = match &meta.kind {
        FileKind::Regular { size } => i64::try_from(*size).is_ok(),
        FileKind::Symlink { target } => {
            !target.is_empty() && target.len() <= TARGET_LEN_MAX && !target.contains(&0)
        }
        FileKind::HardLink { to } => {
            check_path(to)?;
            !to.is_empty() && to != path
        }
        FileKind::Directory | FileKind::Fifo | FileKind::Device { .. } => true,
    };
    let names_are_sane = meta.xattrs.iter().all(|(name, value)| {
        (1..=XATTR_NAME_LEN_MAX).contains(&name.len()) && !name.contains(&0) && value.len() <= XATTR_LEN_MAX
    });
    let properties_are_sane =
        meta.mode & !0o7777 == 0 && meta.mtime.1 < 1_000_000_000 && meta.xattrs.len() <= XATTRS_MAX;
    if kind_is_sane && names_are_sane && properties_are_sane {
        Ok(())
    } else {
        Err(refused(path, "properties that no file has"))
    }
}
