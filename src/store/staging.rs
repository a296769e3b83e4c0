//! An epoch while it is received, and its commit.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    FoldError, Held, Image, Inner, RoomError, State, Store,
    disk::{self, Context as _, IoFault},
    extents::{self, Run, RunMap, Source},
    files,
    flat::Flat,
    layer::Layer,
    layout::{self, FILES_LOG, INDEX, PAGES_LOG},
    record::{self, EXTENTS_MAX, Index, SPACES_MAX},
    recover,
    sum::{self, Sum},
};
use crate::{
    model::{EpochId, Extent, PAGE_SIZE, Space},
    wire::message::{FileRecord, Manifest, SpaceMap},
};

/// Most committed epochs that wait to be folded; one more makes `begin` fold first.
const LAYERS_MAX: usize = 32;
/// Pages are handed to the log's file in pieces of this size.
const LOG_BUFFER_BYTES: usize = 1 << 20;
/// Most pages of a log (256 GiB); its numbers and sums are held in memory.
const LOG_PAGES_MAX: u64 = 1 << 26;
/// Most small images of an epoch.
const IMAGES_MAX: u64 = 1 << 17;

/// Numbers the stagings of the process, so that no two ever share a directory.
static NEXT_STAGING: AtomicU64 = AtomicU64::new(1);

/// Why an epoch is not received.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// The epoch is not newer than what is held.
    #[error(
        "epoch {id} is not newer than {held}, which is held: its sender's term is over or it repeats itself"
    )]
    Stale {
        /// Offered.
        id: EpochId,
        /// Held.
        held: EpochId,
    },
    /// The delta's base is not what is held: the whole memory is needed.
    #[error(
        "epoch {id} is a delta against {base}, but {} is held: the whole memory is needed",
        held.map_or_else(|| "nothing".to_owned(), |held| held.to_string())
    )]
    NeedFull {
        /// Offered.
        id: EpochId,
        /// What it builds upon.
        base: EpochId,
        /// Held.
        held: Option<EpochId>,
    },
    /// The image is being restored from.
    #[error("epoch {0} is refused: the image is being restored from and must not change")]
    Frozen(EpochId),
    /// The store was removed.
    #[error("epoch {0} is refused: the store was removed, protection has ended")]
    Removed(EpochId),
    /// There is too little room.
    #[error("epoch {id} is refused: {source}")]
    Room {
        /// Offered.
        id: EpochId,
        /// How much, and where.
        source: RoomError,
    },
    /// Too many epochs wait for being folded, and folding one failed.
    #[error("epoch {id} is refused, since {LAYERS_MAX} epochs wait to be folded and that failed: {source}")]
    Fold {
        /// Offered.
        id: EpochId,
        /// Why.
        source: FoldError,
    },
    /// A file operation failed.
    #[error("epoch {id} cannot be staged: {source}")]
    Io {
        /// Offered.
        id: EpochId,
        /// What.
        source: IoFault,
    },
}

/// Why something was not staged.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// A run of pages that cannot be: empty, not aligned, or not within an address space.
    #[error(
        "pages from {start:#x} ({bytes} bytes) are no whole pages of an address space: the peer is damaged or hostile"
    )]
    BadRun {
        /// Address.
        start: u64,
        /// Length.
        bytes: u64,
    },
    /// The name cannot be one of CRIU's small images.
    #[error(
        "{0:?} is refused as the name of a CRIU image (page maps and pages are made here from the manifest)"
    )]
    BadImageName(String),
    /// A limit is exceeded.
    #[error("the epoch has more {what} than {max}, the most that is accepted")]
    TooMany {
        /// What.
        what: &'static str,
        /// Limit.
        max: u64,
    },
    /// A manifest that is not ascending, or names a space twice.
    #[error("the manifest is malformed ({0}): the peer is damaged or hostile")]
    BadManifest(&'static str),
    /// A file operation failed.
    #[error("cannot stage the epoch: {0}")]
    Io(#[from] IoFault),
}

/// Why an epoch was not committed; the store holds what it held.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// No manifest was staged.
    #[error("epoch {0} came without a manifest")]
    NoManifest(EpochId),
    /// No small image was staged.
    #[error("epoch {0} came without CRIU's small images")]
    NoImages(EpochId),
    /// Pages that the image needs are neither in the epoch nor held: the whole memory is needed.
    #[error(
        "epoch {id} needs {pages} pages that are neither in it nor held here, the first at {:#x} of {space:?}: \
         the whole memory is needed",
        first.start
    )]
    MissingPages {
        /// Epoch.
        id: EpochId,
        /// Where the first ones are missing.
        space: Space,
        /// Which.
        first: Extent,
        /// How many in all.
        pages: u64,
    },
    /// Another epoch was begun or committed, or the image was frozen or removed, in the meantime.
    #[error("epoch {0} was overtaken: a newer one was begun, or the image is being restored from")]
    Overtaken(EpochId),
    /// There is too little room to fold it.
    #[error("epoch {id} is refused: {source}")]
    Room {
        /// Epoch.
        id: EpochId,
        /// How much, and where.
        source: RoomError,
    },
    /// A file operation failed.
    #[error("epoch {id} cannot be committed: {source}")]
    Io {
        /// Epoch.
        id: EpochId,
        /// What.
        source: IoFault,
    },
}

impl BeginError {
    /// Whether the sender should send the whole memory.
    pub fn needs_full(&self) -> bool {
        matches!(self, Self::NeedFull { .. })
    }
}

impl CommitError {
    /// Whether the sender should send the whole memory.
    pub fn needs_full(&self) -> bool {
        matches!(self, Self::MissingPages { .. })
    }
}

/// What was committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Which epoch.
    pub id: EpochId,
    /// Bytes of pages that it brought (zero pages not counted).
    pub staged_bytes: u64,
    /// Bytes of all pages of the image.
    pub resident_bytes: u64,
}

/// Where the pages go.
enum Pages {
    /// Of a delta: appended to a log, since the image must not change before the commit.
    Log { file: File, path: PathBuf, buffer: Vec<u8>, sums: Vec<Sum> },
    /// Of a full epoch: to their places in the new image.
    Flat(Flat),
}

/// An epoch that is being received. Dropped without [`Staging::commit`] it leaves nothing behind.
pub struct Staging {
    inner: Arc<Inner>,
    id: EpochId,
    base: Option<EpochId>,
    serial: u64,
    dir: PathBuf,
    criu_dir: PathBuf,
    pages: Pages,
    staged: HashMap<Space, RunMap>,
    staged_bytes: u64,
    images: u64,
    files: Option<BufWriter<File>>,
    manifest: Option<Manifest>,
    committed: bool,
}

impl Store {
    /// Starts to receive an epoch: a delta against `base`, or (without a base) the whole memory.
    ///
    /// A staging that is still open is overtaken: it cannot be committed any more.
    pub fn begin(&self, id: EpochId, base: Option<EpochId>) -> Result<Staging, BeginError> {
        if self.unfolded() >= LAYERS_MAX {
            self.fold().map_err(|source| BeginError::Fold { id, source })?;
        }
        let inner = &self.inner;
        let mut state = inner.state();
        let held = state.held();
        admit(&state, held.as_ref(), id, base)?;
        let needed = match (base, &held) {
            // The new image stands beside the old one until the commit, and is about as large.
            (None, Some(held)) => resident_bytes(&held.manifest),
            _ => 0,
        };
        inner.ensure_room(needed).map_err(|source| BeginError::Room { id, source })?;
        let serial = NEXT_STAGING.fetch_add(1, Ordering::Relaxed);
        state.newest_staging = serial;
        drop(state);
        Staging::create(inner, id, base, serial).map_err(|source| BeginError::Io { id, source })
    }
}

fn admit(state: &State, held: Option<&Held>, id: EpochId, base: Option<EpochId>) -> Result<(), BeginError> {
    if state.removed {
        return Err(BeginError::Removed(id));
    }
    if state.freezes > 0 {
        return Err(BeginError::Frozen(id));
    }
    let held = held.map(|held| held.id);
    match (held, base) {
        (Some(held), _) if id <= held => Err(BeginError::Stale { id, held }),
        (_, Some(base)) if held != Some(base) => Err(BeginError::NeedFull { id, base, held }),
        _ => Ok(()),
    }
}

fn resident_bytes(manifest: &Manifest) -> u64 {
    manifest.spaces.iter().map(|map| extents::pages(&map.extents) * PAGE_SIZE).sum()
}

impl Staging {
    fn create(inner: &Arc<Inner>, id: EpochId, base: Option<EpochId>, serial: u64) -> Result<Self, IoFault> {
        let dir = inner.dir.join(layout::staging_name(id, serial));
        disk::make_dir(&dir)?;
        let made = Self::fill(&dir, id, base);
        let (criu_dir, pages) = match made {
            Ok(made) => made,
            Err(error) => {
                recover::remove_or_warn(&dir);
                return Err(error);
            }
        };
        Ok(Self {
            inner: Arc::clone(inner),
            id,
            base,
            serial,
            dir,
            criu_dir,
            pages,
            staged: HashMap::new(),
            staged_bytes: 0,
            images: 0,
            files: None,
            manifest: None,
            committed: false,
        })
    }

    fn fill(dir: &Path, id: EpochId, base: Option<EpochId>) -> Result<(PathBuf, Pages), IoFault> {
        let criu_dir = dir.join(layout::criu_name(id));
        disk::make_dir(&criu_dir)?;
        let pages = if base.is_none() {
            Pages::Flat(Flat::create(dir)?)
        } else {
            let path = dir.join(PAGES_LOG);
            let buffer = Vec::with_capacity(LOG_BUFFER_BYTES);
            Pages::Log { file: disk::create(&path)?, path, buffer, sums: Vec::new() }
        };
        Ok((criu_dir, pages))
    }

    /// Which epoch it is.
    pub fn id(&self) -> EpochId {
        self.id
    }

    /// Stages whole pages from the address `start` on; they override what was staged of them before.
    pub fn pages(&mut self, space: Space, start: u64, bytes: &[u8]) -> Result<(), StageError> {
        let len = bytes.len() as u64;
        let extent = Extent { start, pages: len / PAGE_SIZE };
        if !len.is_multiple_of(PAGE_SIZE) || !extents::is_valid(extent) {
            return Err(StageError::BadRun { start, bytes: len });
        }
        let source = match &mut self.pages {
            Pages::Log { file, path, buffer, sums } => {
                let first = sums.len() as u64;
                if first + extent.pages > LOG_PAGES_MAX {
                    return Err(StageError::TooMany { what: "pages", max: LOG_PAGES_MAX });
                }
                // Bounded by the caller's piece; only then is it worth a copy into the buffer.
                if buffer.len() + bytes.len() > LOG_BUFFER_BYTES {
                    flush(file, path, buffer, first)?;
                }
                if bytes.len() > LOG_BUFFER_BYTES {
                    disk::write_at(file, path, bytes, first * PAGE_SIZE)?;
                } else {
                    buffer.extend_from_slice(bytes);
                }
                sums.extend(sum::of_pages(bytes));
                Source::At(first)
            }
            Pages::Flat(flat) => {
                let sums: Vec<Sum> = sum::of_pages(bytes).collect();
                flat.write(space, start, bytes, &sums)?;
                Source::At(start / PAGE_SIZE)
            }
        };
        self.staged_bytes += len;
        self.note(space, extent, source)
    }

    /// Stages pages that are zero.
    pub fn zero(&mut self, space: Space, start: u64, pages: u32) -> Result<(), StageError> {
        let extent = Extent { start, pages: u64::from(pages) };
        if !extents::is_valid(extent) {
            return Err(StageError::BadRun { start, bytes: u64::from(pages) * PAGE_SIZE });
        }
        if let Pages::Flat(flat) = &self.pages {
            flat.zero(space, extent)?;
        }
        self.note(space, extent, Source::Zero)
    }

    fn note(&mut self, space: Space, extent: Extent, source: Source) -> Result<(), StageError> {
        if self.staged.len() >= SPACES_MAX && !self.staged.contains_key(&space) {
            return Err(StageError::TooMany { what: "address spaces", max: SPACES_MAX as u64 });
        }
        self.staged.entry(space).or_default().insert(extent, source);
        Ok(())
    }

    /// Stages one of CRIU's small images; bytes for a name that was staged before are appended to it.
    pub fn image_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), StageError> {
        if !layout::is_image_name(name) {
            return Err(StageError::BadImageName(name.to_owned()));
        }
        if self.images >= IMAGES_MAX {
            return Err(StageError::TooMany { what: "pieces of CRIU images", max: IMAGES_MAX });
        }
        self.images += 1;
        Ok(disk::append(&self.criu_dir.join(name), bytes)?)
    }

    /// Stages a change of the replicated files.
    pub fn file_record(&mut self, record: &FileRecord, body: &[u8]) -> Result<(), StageError> {
        let path = self.dir.join(FILES_LOG);
        let log = match &mut self.files {
            Some(log) => log,
            None => self.files.insert(BufWriter::with_capacity(LOG_BUFFER_BYTES, disk::create(&path)?)),
        };
        if files::append(log, record, body).context("append to", &path)? {
            return Ok(());
        }
        Err(StageError::TooMany { what: "bytes in a file record", max: files::FILE_BODY_LEN_MAX as u64 })
    }

    /// Stages the list of all pages that the image holds.
    pub fn manifest(&mut self, mut manifest: Manifest) -> Result<(), StageError> {
        let extents: usize = manifest.spaces.iter().map(|map| map.extents.len()).sum();
        if manifest.spaces.len() > SPACES_MAX || extents > EXTENTS_MAX {
            return Err(StageError::TooMany { what: "extents in its manifest", max: EXTENTS_MAX as u64 });
        }
        if !manifest.spaces.iter().all(|map| extents::is_ascending(&map.extents)) {
            return Err(StageError::BadManifest("extents are not ascending"));
        }
        manifest.spaces.sort_by_key(|map| space_order(map.space));
        if !manifest.spaces.is_sorted_by(|a, b| space_order(a.space) < space_order(b.space)) {
            return Err(StageError::BadManifest("an address space is named twice"));
        }
        self.manifest = Some(manifest);
        Ok(())
    }

    /// Makes the epoch what the store holds. After it returns the epoch may be acknowledged.
    pub fn commit(mut self) -> Result<Committed, CommitError> {
        let id = self.id;
        let manifest = self.manifest.take().ok_or(CommitError::NoManifest(id))?;
        if self.images == 0 {
            return Err(CommitError::NoImages(id));
        }
        let inner = Arc::clone(&self.inner);
        let held = inner.state().held();
        let base = held.filter(|held| self.base == Some(held.id));
        if self.base.is_some() && base.is_none() {
            return Err(CommitError::Overtaken(id));
        }
        self.check_pages(&manifest, base.as_ref().map(|held| &*held.manifest))?;
        let committed =
            Committed { id, staged_bytes: self.staged_bytes, resident_bytes: resident_bytes(&manifest) };
        match base {
            Some(base) => self.commit_delta(&base, manifest)?,
            None => self.commit_full(manifest)?,
        }
        Ok(committed)
    }

    /// Page-exact: what the manifest names must be staged or held.
    fn check_pages(&self, manifest: &Manifest, base: Option<&Manifest>) -> Result<(), CommitError> {
        let mut first = None;
        let mut pages = 0;
        for map in &manifest.spaces {
            let staged = self.staged.get(&map.space).map(RunMap::extents).unwrap_or_default();
            let held = base.map_or(&[][..], |base| extents_of(base, map.space));
            let missing = extents::subtract(&extents::subtract(&map.extents, &staged), held);
            pages += extents::pages(&missing);
            first = first.or_else(|| missing.first().map(|extent| (map.space, *extent)));
        }
        match first {
            Some((space, first)) => Err(CommitError::MissingPages { id: self.id, space, first, pages }),
            None => Ok(()),
        }
    }

    fn commit_delta(&mut self, base: &Held, manifest: Manifest) -> Result<(), CommitError> {
        let id = self.id;
        let io = |source| CommitError::Io { id, source };
        let inner = Arc::clone(&self.inner);
        let fresh_bytes = self.fresh_bytes(&manifest, &base.manifest);
        let waiting: u64 = inner.state().layers.iter().map(|(layer, _)| layer.fresh_bytes).sum();
        inner.ensure_room(fresh_bytes + waiting).map_err(|source| CommitError::Room { id, source })?;
        let (log, index) = self.write_delta(base.id, &manifest).map_err(io)?;
        let dir = inner.dir.join(layout::epoch_name(id));
        let mut state = inner.state();
        let current = state.held().is_some_and(|held| held.id == base.id);
        if !current || !self.may_commit(&state) {
            return Err(CommitError::Overtaken(id));
        }
        self.publish(&dir).map_err(io)?;
        let layer = Layer::new(dir, index, log, fresh_bytes);
        state.layers.push((Arc::new(layer), Arc::new(manifest)));
        Ok(())
    }

    /// Bytes of staged pages for which the image has no place yet.
    fn fresh_bytes(&self, manifest: &Manifest, base: &Manifest) -> u64 {
        let fresh = self.staged.iter().map(|(space, runs)| {
            let runs = runs.within(extents_of(manifest, *space));
            let data = runs.iter().filter(|run| run.source != Source::Zero).map(|run| run.extent);
            let data: Vec<Extent> = data.collect();
            extents::pages(&extents::subtract(&data, extents_of(base, *space)))
        });
        fresh.sum::<u64>() * PAGE_SIZE
    }

    /// Writes everything of a delta that is not on the disk yet.
    fn write_delta(&mut self, base: EpochId, manifest: &Manifest) -> Result<(File, Index), IoFault> {
        let durability = self.inner.durability;
        self.finish_files()?;
        let Pages::Log { file, path, buffer, sums } = &mut self.pages else {
            unreachable!("an epoch with a base has a log");
        };
        flush(file, path, buffer, sums.len() as u64)?;
        let log = file.try_clone().context("keep open", path)?;
        let runs = |map: &SpaceMap| -> Option<(Space, Vec<Run>)> {
            Some((map.space, self.staged.get(&map.space)?.within(&map.extents)))
        };
        let spaces = manifest.spaces.iter().filter_map(runs).collect();
        let index = Index { id: self.id, base, spaces, sums: std::mem::take(sums) };
        disk::write_new(&self.dir.join(INDEX), &record::write_index(&index))?;
        self.write_manifest(manifest)?;
        disk::sync_files_in(&self.criu_dir, durability)?;
        disk::sync_files_in(&self.dir, durability)?;
        Ok((log, index))
    }

    fn finish_files(&mut self) -> Result<(), IoFault> {
        match &mut self.files {
            Some(log) => log.flush().context("write to", &self.dir.join(FILES_LOG)),
            None => Ok(()),
        }
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<(), IoFault> {
        let path = self.dir.join(layout::manifest_name(self.id));
        disk::write_new(&path, &record::write_manifest(manifest))
    }

    fn commit_full(&mut self, manifest: Manifest) -> Result<(), CommitError> {
        let id = self.id;
        let io = |source| CommitError::Io { id, source };
        let inner = Arc::clone(&self.inner);
        self.write_full(&manifest).map_err(io)?;
        let dir = inner.dir.join(layout::image_name(id));
        let folding = inner.folding(); // a fold into the old image ends first
        let mut state = inner.state();
        let newer = state.held().is_none_or(|held| held.id < id);
        if !newer || !self.may_commit(&state) {
            return Err(CommitError::Overtaken(id));
        }
        self.publish(&dir).map_err(io)?;
        let old_layers = std::mem::take(&mut state.layers);
        state.garbage.extend(old_layers.into_iter().map(|(layer, _)| layer.dir.clone()));
        let image = Arc::new(Image { flat: Flat::open(&dir), dir });
        if let Some(old) = state.image.replace(image) {
            state.garbage.push(old.dir.clone());
        }
        state.folded = Some(Held { id, manifest: Arc::new(manifest) });
        drop(state);
        inner.sweep(&folding);
        Ok(())
    }

    fn write_full(&mut self, manifest: &Manifest) -> Result<(), IoFault> {
        let durability = self.inner.durability;
        self.finish_files()?;
        let Pages::Flat(flat) = &self.pages else {
            unreachable!("an epoch without a base is staged flat");
        };
        for (space, runs) in &self.staged {
            for extent in extents::subtract(&runs.extents(), extents_of(manifest, *space)) {
                flat.drop_pages(*space, extent)?;
            }
        }
        flat.sync(durability)?;
        self.write_manifest(manifest)?;
        recover::write_state(&self.dir, self.id, durability)?;
        disk::sync_files_in(&self.criu_dir, durability)?;
        disk::sync_files_in(&self.dir, durability)
    }

    /// The commit point. If it cannot be made durable it is taken back, as far as that is possible: then
    /// the epoch is not acknowledged, and the primary sends another.
    fn publish(&mut self, dir: &Path) -> Result<(), IoFault> {
        let inner = &self.inner;
        disk::remove_tree(dir)?; // left by a commit that could not be taken back
        disk::rename(&self.dir, dir)?;
        if let Err(error) = disk::sync_dir(&inner.dir, inner.durability) {
            disk::rename(dir, &self.dir)?;
            return Err(error);
        }
        self.committed = true;
        Ok(())
    }

    fn may_commit(&self, state: &State) -> bool {
        state.freezes == 0 && !state.removed && state.newest_staging == self.serial
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            recover::remove_or_warn(&self.dir);
        }
    }
}

/// Writes the buffered pages, which end before page `end` of the log.
fn flush(file: &File, path: &Path, buffer: &mut Vec<u8>, end: u64) -> Result<(), IoFault> {
    disk::write_at(file, path, buffer, end * PAGE_SIZE - buffer.len() as u64)?;
    buffer.clear();
    Ok(())
}

/// Order in which a manifest is kept.
pub(super) fn space_order(space: Space) -> (u8, u64) {
    match space {
        Space::Task(pid) => (0, u64::from(pid)),
        Space::Shared(id) => (1, id),
    }
}

/// The extents of a space in a manifest that is in order.
pub(super) fn extents_of(manifest: &Manifest, space: Space) -> &[Extent] {
    let key = space_order(space);
    match manifest.spaces.binary_search_by_key(&key, |map| space_order(map.space)) {
        Ok(at) => &manifest.spaces[at].extents,
        Err(_) => &[],
    }
}
