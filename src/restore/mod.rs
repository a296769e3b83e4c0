//! From the store to what `criu restore` reads, kept ready ahead of time, and the checks before it.
//!
//! [`materialise`] makes a directory `MODE-TERM-EPOCH` of one epoch:
//! - CRIU's small images, as hard links to those in the store; those of connections may be changed for a lazy restore
//!   ([`connections::unsent`]);
//! - a page map for each address space, whole, without parents;
//! - a file of pages for each. [`Mode::Eager`]: all pages, for a plain `criu restore`. [`Mode::Lazy`]: only
//!   the pages that cannot come through userfaultfd; the file is a hole where the others would be, so that
//!   it costs no memory and no time, whatever the size of the workload.
//!
//! An [`Ahead`] is a CRIU that waits in the place where the tree will be, so that a restore begins with its first system
//! call. [`page_files`] tells the process that serves the lazy pages where they lie in the store, and which of them the
//! workload wrote lately ([`Recency`]): those come first.
//!
//! Invariants: a directory under its final name is complete (it is made under another and renamed), and
//! making one changes nothing in the store.

mod ahead;
mod recency;

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

pub use self::{
    ahead::{Ahead, Site, Step},
    recency::Recency,
};
use crate::{
    criu::images::{Pagemap, Run, connections, mark_lazy, pagemap_file, pages_file},
    criu::lazy::PageFiles,
    extents,
    model::{EpochId, Extent, PAGE_SIZE, Space},
    store::{ReadError, View},
};

/// Pages that are copied at once (1 MiB).
const PIECE_PAGES: u64 = 256;
/// Largest page map that preflight reads.
const PAGEMAP_BYTES_MAX: u64 = 1 << 30;

/// How the pages get into the restored tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// CRIU reads those that must be there at once; the others follow when they are touched.
    Lazy,
    /// CRIU reads all before the first instruction.
    Eager,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Lazy => "lazy",
            Self::Eager => "eager",
        }
    }
}

/// A directory that CRIU can restore from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Which epoch.
    pub id: EpochId,
    /// For which kind of restore.
    pub mode: Mode,
    /// Where.
    pub dir: PathBuf,
    /// Pages of all address spaces.
    pub pages: u64,
    /// Those of them that come later.
    pub lazy_pages: u64,
}

/// Why no directory was made.
#[derive(Debug, thiserror::Error)]
pub enum MaterialiseError {
    /// A file operation failed.
    #[error("cannot make {} ready for a restore: {source}; check the free space there", path.display())]
    Io {
        /// On what.
        path: PathBuf,
        /// What.
        source: io::Error,
    },
    /// Pages cannot be read from the store.
    #[error("cannot make epoch {id} ready for a restore: {source}")]
    Read {
        /// Epoch.
        id: EpochId,
        /// Why.
        source: ReadError,
    },
}

/// Something that would make a restore fail.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// One of CRIU's images is missing or empty.
    #[error("the image {0} is missing or empty")]
    NoImage(String),
    /// A page map cannot be read.
    #[error("the page map {name}: {what}")]
    BadPagemap {
        /// File.
        name: String,
        /// What about it.
        what: String,
    },
    /// A file of pages does not have the length that its page map says.
    #[error("{name} has {found} bytes instead of {wanted}")]
    PagesLength {
        /// File.
        name: String,
        /// Bytes.
        found: u64,
        /// Bytes.
        wanted: u64,
    },
    /// A pid of the workload is in use where it would be restored.
    #[error("pid {0} is in use: end that process, or restore into a pid namespace of its own")]
    PidTaken(u32),
}

/// All that would make a restore fail.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be restored from: {}", dir.display(), listed(problems))]
pub struct PreflightError {
    /// Directory.
    pub dir: PathBuf,
    /// At least one.
    pub problems: Vec<Problem>,
}

fn listed(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("; ")
}

fn on(path: &Path) -> impl FnOnce(io::Error) -> MaterialiseError {
    move |source| MaterialiseError::Io { path: path.to_owned(), source }
}

/// The directory of an epoch under `root`, if it was made.
pub fn ready_dir(root: &Path, id: EpochId, mode: Mode) -> Option<PathBuf> {
    Some(root.join(dir_name(id, mode))).filter(|dir| dir.is_dir())
}

fn dir_name(id: EpochId, mode: Mode) -> String {
    format!("{}-{}-{}", mode.name(), id.term, id.epoch)
}

/// Makes a directory under `root` from which CRIU restores the view's epoch; one that was made of the same
/// epoch before is replaced. `root` is made if needed, and may hold nothing but what is made here; if it is
/// in the store's file system, the small images cost nothing.
///
/// `lazy_extents` says which addresses of a space may be filled later (CRIU: private anonymous mappings
/// other than the stack); asked only for [`Mode::Lazy`]. It takes time by the number of extents and of
/// pages that are copied.
pub fn materialise(
    view: &View,
    root: &Path,
    mode: Mode,
    lazy_extents: impl Fn(Space) -> Vec<Extent>,
) -> Result<Ready, MaterialiseError> {
    DirBuilder::new().mode(0o700).recursive(true).create(root).map_err(on(root))?;
    let name = dir_name(view.id(), mode);
    let making = root.join(format!(".{name}"));
    remove(&making)?;
    DirBuilder::new().mode(0o700).create(&making).map_err(on(&making))?;
    link_images(&view.criu_dir(), &making, mode)?;
    let dir = root.join(name);
    let mut ready = Ready { id: view.id(), mode, dir, pages: 0, lazy_pages: 0 };
    for (at, map) in view.manifest().spaces.iter().enumerate() {
        let mut lazy = match mode {
            Mode::Eager => Vec::new(),
            Mode::Lazy => lazy_extents(map.space),
        };
        extents::normalize(&mut lazy);
        let pagemap = Pagemap { pages_id: at as u32 + 1, runs: mark_lazy(&map.extents, &lazy) };
        let path = making.join(pagemap_file(map.space));
        let file = create(&path)?;
        file.write_all_at(&pagemap.encode(), 0).map_err(on(&path))?;
        write_pages(view, map.space, &pagemap.runs, &making.join(pages_file(pagemap.pages_id)))?;
        let pages = |run: &Run| run.extent.pages;
        ready.pages += pagemap.runs.iter().map(pages).sum::<u64>();
        ready.lazy_pages += pagemap.runs.iter().filter(|run| run.lazy).map(pages).sum::<u64>();
    }
    retire(&ready.dir)?;
    fs::rename(&making, &ready.dir).map_err(on(&making))?;
    Ok(ready)
}

/// Where the pages of the view's epoch lie, those that were written lately first.
pub fn page_files(view: &View, recency: &Recency) -> Result<PageFiles, ReadError> {
    let mut pages = PageFiles::default();
    view.for_each_place(|space, extent, place| {
        // Shared memory does not come lazily.
        if matches!(space, Space::Task(_)) {
            pages.add(space, extent, place);
        }
    })?;
    pages.set_hot(recency.order());
    Ok(pages)
}

/// Removes every directory that [`materialise`] made (or did not finish) under `root`, but the one to keep.
pub fn discard_others(root: &Path, keep: Option<&Path>) -> Result<(), MaterialiseError> {
    for entry in fs::read_dir(root).map_err(on(root))? {
        let entry = entry.map_err(on(root))?;
        let ours = entry.file_name().to_str().is_some_and(|name| {
            let name = name.trim_start_matches('.');
            [Mode::Lazy, Mode::Eager]
                .iter()
                .any(|mode| name.strip_prefix(mode.name()).is_some_and(|rest| rest.starts_with('-')))
        });
        if ours && Some(entry.path().as_path()) != keep {
            retire(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a directory that may be complete; under its name it never is anything else.
fn retire(dir: &Path) -> Result<(), MaterialiseError> {
    let doomed = dir.with_extension("gone");
    match fs::rename(dir, &doomed) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        renamed => renamed.map_err(on(dir)).and_then(|()| remove(&doomed)),
    }
}

fn remove(dir: &Path) -> Result<(), MaterialiseError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(on(dir)(error)),
        _ => Ok(()),
    }
}

fn create(path: &Path) -> Result<File, MaterialiseError> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(on(path))
}

fn link_images(from: &Path, to: &Path, mode: Mode) -> Result<(), MaterialiseError> {
    for entry in fs::read_dir(from).map_err(on(from))? {
        let name = entry.map_err(on(from))?.file_name();
        // What is restored whole may have no network yet by which something could be sent.
        if mode == Mode::Lazy && write_stream(from, to, &name)? {
            continue;
        }
        let (from, to) = (from.join(&name), to.join(&name));
        match fs::hard_link(&from, &to) {
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                fs::copy(&from, &to).map_err(on(&to))?;
            }
            linked => linked.map_err(on(&from))?,
        }
    }
    Ok(())
}

/// Writes the image of a connection anew, if it is to be another one; false if it is not.
fn write_stream(from: &Path, to: &Path, name: &OsStr) -> Result<bool, MaterialiseError> {
    let Some(name) = name.to_str().filter(|name| connections::is_stream(name)) else { return Ok(false) };
    let (from, to) = (from.join(name), to.join(name));
    let image = fs::read(&from).map_err(on(&from))?;
    // What is damaged CRIU refuses, and says more of it.
    let Ok(Some(changed)) = connections::unsent(name, &image) else { return Ok(false) };
    create(&to)?.write_all_at(&changed, 0).map_err(on(&to))?;
    Ok(true)
}

/// Writes the pages of a map at the places where CRIU looks for them: lazy and zero pages are holes.
fn write_pages(view: &View, space: Space, runs: &[Run], path: &Path) -> Result<(), MaterialiseError> {
    let file = create(path)?;
    let mut buf = vec![0; (PIECE_PAGES * PAGE_SIZE) as usize];
    let mut place = 0;
    for run in runs {
        let bytes = run.extent.bytes();
        let copied = if run.lazy { 0 } else { bytes };
        for from in (0..copied).step_by(buf.len()) {
            let piece = &mut buf[..(bytes - from).min(PIECE_PAGES * PAGE_SIZE) as usize];
            view.read_pages(space, run.extent.start + from, piece)
                .map_err(|source| MaterialiseError::Read { id: view.id(), source })?;
            write_sparse(&file, piece, place + from).map_err(on(path))?;
        }
        place += bytes;
    }
    file.set_len(place).map_err(on(path))
}

/// Writes runs of pages that are not zero.
fn write_sparse(file: &File, pages: &[u8], place: u64) -> io::Result<()> {
    let page_len = PAGE_SIZE as usize;
    let is_zero = |at: usize| pages[at..at + page_len].iter().all(|byte| *byte == 0);
    let mut at = 0;
    while at < pages.len() {
        let start = at;
        while at < pages.len() && !is_zero(at) {
            at += page_len;
        }
        if start < at {
            file.write_all_at(&pages[start..at], place + start as u64)?;
        }
        while at < pages.len() && is_zero(at) {
            at += page_len;
        }
    }
    Ok(())
}

/// Looks for what would make a restore from the directory fail: images that are missing, files of pages
/// that do not fit their page maps, and pids (of processes and threads) of which `taken` says that they are
/// in use where the workload would be restored.
pub fn preflight(dir: &Path, pids: &[u32], taken: impl Fn(u32) -> bool) -> Result<(), PreflightError> {
    let mut problems = Vec::new();
    let filled = |name: &str| fs::metadata(dir.join(name)).is_ok_and(|found| found.len() > 0);
    let mut need = vec!["inventory.img".to_owned(), "pstree.img".to_owned()];
    let mut names: Vec<String> = fs::read_dir(dir)
        .map(|entries| entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    names.sort_unstable();
    for name in &names {
        let Some(of) = name.strip_prefix("pagemap-").and_then(|name| name.strip_suffix(".img")) else {
            continue;
        };
        if of.parse::<u32>().is_ok() {
            need.extend([format!("core-{of}.img"), format!("mm-{of}.img")]);
        }
        problems.extend(check_pages(dir, name).err());
    }
    need.retain(|name| !filled(name));
    problems.extend(need.into_iter().map(Problem::NoImage));
    problems.extend(pids.iter().copied().filter(|pid| taken(*pid)).map(Problem::PidTaken));
    if problems.is_empty() { Ok(()) } else { Err(PreflightError { dir: dir.to_owned(), problems }) }
}

fn check_pages(dir: &Path, name: &str) -> Result<(), Problem> {
    let bad = |what: String| Problem::BadPagemap { name: name.to_owned(), what };
    let path = dir.join(name);
    let len = fs::metadata(&path).map_err(|error| bad(error.to_string()))?.len();
    if len > PAGEMAP_BYTES_MAX {
        return Err(bad(format!("{len} bytes are too many")));
    }
    let image = fs::read(&path).map_err(|error| bad(error.to_string()))?;
    let pagemap = Pagemap::decode(name, &image).map_err(|error| bad(error.to_string()))?;
    // Apart and in order: the sum fits.
    let wanted = pagemap.runs.iter().map(|run| run.extent.bytes()).sum::<u64>();
    let name = pages_file(pagemap.pages_id);
    match fs::metadata(dir.join(&name)) {
        Err(_) => Err(Problem::NoImage(name)),
        Ok(found) if found.len() != wanted => Err(Problem::PagesLength { name, found: found.len(), wanted }),
        Ok(_) => Ok(()),
    }
}
