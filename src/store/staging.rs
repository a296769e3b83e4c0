//! An epoch while it is received. Its end is in `commit`.

use std::{
    collections::HashMap,
    fs::File,
    io::BufWriter,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    FoldError, Held, Inner, RoomError, State, Store,
    disk::{self, Context as _, IoFault},
    extents::{self, RunMap, Source},
    files,
    flat::Flat,
    layout::{self, FILES_LOG, PAGES_LOG},
    record::{EXTENTS_MAX, SPACES_MAX},
    recover,
    sum::{self, Sum},
};
use crate::{
    delta::{DecodeError, Decoder},
    model::{EpochId, Extent, PAGE_SIZE, Space},
    wire::message::{FileRecord, FrameHead, Manifest},
};

/// Most committed epochs that wait to be folded; one more makes `begin` fold first. Whoever holds a view for longer than a
/// moment must let go of it well before.
pub const LAYERS_MAX: usize = 256;
/// Pages are handed to the log's file in pieces of this size.
const LOG_BUFFER_BYTES: usize = 1 << 20;
/// How often the room is looked at while pages arrive: a tmpfs may be larger than what RAM has left.
const ROOM_CHECK_BYTES: u64 = 64 << 20;
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
    /// Patches for what is not held any more, or in an epoch of all memory.
    #[error("patches were received for an epoch that is not held here: the whole memory is needed")]
    NoBase,
    /// A patch of a page that the base does not have.
    #[error(
        "a patch was received for the {} pages from {:#x} of {space:?}, which are not held here: \
         the whole memory is needed",
        extent.pages,
        extent.start
    )]
    NotHeld {
        /// Which.
        space: Space,
        /// Which.
        extent: Extent,
    },
    /// A batch of pages cannot be decoded, or its patches do not fit what is held.
    #[error(transparent)]
    Batch(#[from] DecodeError),
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
    /// The room is used up.
    #[error("the epoch is refused while it is received: {0}")]
    Room(#[from] RoomError),
    /// A file operation failed.
    #[error("cannot stage the epoch: {0}")]
    Io(#[from] IoFault),
}

impl BeginError {
    /// Whether the sender should send the whole memory.
    pub fn needs_full(&self) -> bool {
        matches!(self, Self::NeedFull { .. })
    }
}

impl StageError {
    /// Whether the sender should send the whole memory.
    pub fn needs_full(&self) -> bool {
        matches!(self, Self::NoBase | Self::NotHeld { .. } | Self::Batch(DecodeError::Base { .. }))
    }
}

/// Where the pages go.
pub(super) enum Pages {
    /// Of a delta: appended to a log, since the image must not change before the commit.
    Log { file: File, path: PathBuf, buffer: Vec<u8>, sums: Vec<Sum> },
    /// Of a full epoch: to their places in the new image.
    Flat(Flat),
}

/// An epoch that is being received. Dropped without [`Staging::commit`] it leaves nothing behind.
pub struct Staging {
    pub(super) inner: Arc<Inner>,
    pub(super) id: EpochId,
    pub(super) base: Option<EpochId>,
    pub(super) serial: u64,
    pub(super) dir: PathBuf,
    pub(super) criu_dir: PathBuf,
    pub(super) pages: Pages,
    pub(super) staged: HashMap<Space, RunMap>,
    pub(super) staged_bytes: u64,
    pub(super) images: u64,
    pub(super) files: Option<BufWriter<File>>,
    pub(super) manifest: Option<Manifest>,
    pub(super) decoder: Decoder,
    pub(super) committed: bool,
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

pub(super) fn resident_bytes(manifest: &Manifest) -> u64 {
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
            decoder: Decoder::new(),
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
        let pieces_before = self.staged_bytes / ROOM_CHECK_BYTES;
        self.staged_bytes += len;
        if self.staged_bytes / ROOM_CHECK_BYTES > pieces_before {
            self.inner.ensure_room(ROOM_CHECK_BYTES)?;
        }
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

    /// Stages what a frame brings; its beginning and its end bring nothing, and others are of no epoch.
    pub fn frame(&mut self, head: FrameHead, body: &[u8]) -> Result<(), StageError> {
        match head {
            FrameHead::Pages(head) => self.batch(&head, body),
            FrameHead::Image { name, .. } => self.image_file(&name, body),
            FrameHead::File(record) => self.file_record(&record, body),
            FrameHead::Manifest(manifest) => self.manifest(manifest),
            FrameHead::Begin { .. }
            | FrameHead::End { .. }
            | FrameHead::Piece
            | FrameHead::Ask(_)
            | FrameHead::Held(_)
            | FrameHead::Inputs { .. }
            | FrameHead::Input { .. } => Ok(()),
        }
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
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            recover::remove_or_warn(&self.dir);
        }
    }
}

/// Writes the buffered pages, which end before page `end` of the log.
pub(super) fn flush(file: &File, path: &Path, buffer: &mut Vec<u8>, end: u64) -> Result<(), IoFault> {
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
