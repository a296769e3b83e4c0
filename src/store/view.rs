//! Reading what is held: the image with the committed epochs laid over it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    FoldError, Held, Image, Inner, Store,
    disk::IoFault,
    extents,
    flat::Places,
    layer::Layer,
    layout,
    staging::extents_of,
    sum::{self, Sum, ZERO_PAGE},
};
use crate::{
    delta::{KEY_LEN, SUM_LEN, sums_of},
    model::{EpochId, Extent, PAGE_SIZE, Space},
    wire::message::Manifest,
};

/// Pages that are verified at once (1 MiB).
const PIECE_PAGES: u64 = 256;
/// Pages whose hashes are told at once (32 MiB, 128 KiB of hashes).
const HASHED_PAGES: u64 = 8192;

/// Why pages were not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The image does not have them all.
    #[error("epoch {id} does not have the {} pages from {:#x} of {space:?}", extent.pages, extent.start)]
    NotHeld {
        /// Epoch.
        id: EpochId,
        /// Which.
        space: Space,
        /// Which.
        extent: Extent,
    },
    /// A file operation failed.
    #[error("cannot read the warm image: {0}")]
    Io(#[from] IoFault),
}

/// Why the image cannot be frozen for a restore.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// No epoch was ever committed.
    #[error("nothing is held here: no epoch was ever committed, so there is nothing to restore")]
    Nothing,
    /// The replicated files could not be brought to the epoch.
    #[error("the files of the held epoch are not ready: {0}")]
    Files(#[source] FoldError),
}

/// What is wrong with the image.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// A page is not what was staged.
    #[error(
        "epoch {id} is damaged: the page at {addr:#x} of {space:?} is not the one that was received; \
         do not restore it, let the primary send the whole memory"
    )]
    Mismatch {
        /// Epoch.
        id: EpochId,
        /// Where.
        space: Space,
        /// Where.
        addr: u64,
    },
    /// A page cannot be read.
    #[error("cannot verify the warm image: {0}")]
    Read(#[from] ReadError),
}

/// One whole epoch, held for reading: for as long as a view lives, its pages and images stay.
///
/// Reading needs no lock and may be done by many threads at a time.
pub struct View {
    inner: Arc<Inner>,
    held: Held,
    image: Arc<Image>,
    /// Newest first; where none has a page, the image does.
    layers: Vec<Arc<Layer>>,
    criu_dir: PathBuf,
    freezes: bool,
}

impl Store {
    /// The newest committed epoch for reading, `None` if nothing is held. New epochs may be committed in
    /// the meantime (the view stays what it is), but are not folded before it is dropped.
    pub fn view(&self) -> Option<View> {
        self.make_view(false)
    }

    /// The newest committed epoch for restoring: until the view is dropped no epoch is taken in any more.
    /// The replicated files are brought to the epoch before it returns.
    pub fn freeze_for_restore(&self) -> Result<View, FreezeError> {
        let view = self.make_view(true).ok_or(FreezeError::Nothing)?;
        self.inner.apply_files(view.id()).map_err(FreezeError::Files)?;
        Ok(view)
    }

    /// The newest committed epoch with its files: the replicated files are brought to it before this returns, and stay as they
    /// are until the view is dropped, or frozen for a restore. New epochs may be committed in the meantime, as for any view.
    pub fn view_with_files(&self) -> Result<View, FreezeError> {
        let view = self.make_view(false).ok_or(FreezeError::Nothing)?;
        self.inner.apply_files(view.id()).map_err(FreezeError::Files)?;
        Ok(view)
    }

    fn make_view(&self, freezes: bool) -> Option<View> {
        let mut state = self.inner.state();
        let held = state.held()?;
        let image = Arc::clone(state.image.as_ref()?);
        let layers: Vec<_> = state.layers.iter().rev().map(|(layer, _)| Arc::clone(layer)).collect();
        let criu_dir = layers.first().map_or(&image.dir, |layer| &layer.dir).join(layout::criu_name(held.id));
        state.views.push(held.id);
        state.freezes += usize::from(freezes);
        Some(View { inner: Arc::clone(&self.inner), held, image, layers, criu_dir, freezes })
    }
}

impl View {
    /// Which epoch it is.
    pub fn id(&self) -> EpochId {
        self.held.id
    }

    /// Its pages; spaces ascend, tasks before shared memory.
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.held.manifest
    }

    /// Directory of CRIU's small images of the epoch. They must not be written to.
    pub fn criu_dir(&self) -> PathBuf {
        self.criu_dir.clone()
    }

    /// Directory that the store reserves for the replicated file trees.
    pub fn files_dir(&self) -> PathBuf {
        self.inner.dir.join(layout::FILES_TREE)
    }

    /// Calls `each` with every run of pages of the epoch.
    pub fn for_each_extent(&self, mut each: impl FnMut(Space, Extent)) {
        for map in &self.held.manifest.spaces {
            map.extents.iter().for_each(|extent| each(map.space, *extent));
        }
    }

    /// Reads one page, e.g. for a page fault of a lazily restored task.
    pub fn read_page(
        &self,
        space: Space,
        addr: u64,
        page: &mut [u8; PAGE_SIZE as usize],
    ) -> Result<(), ReadError> {
        self.read_pages(space, addr, page)
    }

    /// Reads whole pages from the address `start` on; all must be in the epoch.
    pub fn read_pages(&self, space: Space, start: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let extent = self.checked(space, start, buf.len() as u64)?;
        Ok(read(&self.image, &self.layers, space, extent, buf)?)
    }

    /// Calls `each` with every run of the epoch's pages, in order, and where its content lies: a file and the offset
    /// in it, or nowhere if the pages are zero. The files stay what they are while the view lives; after that, for
    /// whoever has them open, until a newer epoch is folded.
    pub fn for_each_place(
        &self,
        mut each: impl FnMut(Space, Extent, Option<(&Path, u64)>),
    ) -> Result<(), ReadError> {
        let mut flat = self.image.flat.places();
        for map in &self.held.manifest.spaces {
            for extent in &map.extents {
                places(&mut flat, &self.layers, map.space, *extent, &mut |extent, place| {
                    each(map.space, extent, place);
                })?;
            }
        }
        Ok(())
    }

    /// The runs of pages that each epoch brought which is not folded yet, oldest first.
    pub fn unfolded(&self) -> impl Iterator<Item = (EpochId, Vec<(Space, Extent)>)> {
        self.layers.iter().rev().map(|layer| (layer.id, layer.extents()))
    }

    fn checked(&self, space: Space, start: u64, bytes: u64) -> Result<Extent, ReadError> {
        let extent = Extent { start, pages: bytes / PAGE_SIZE };
        let held = bytes.is_multiple_of(PAGE_SIZE)
            && extents::is_valid(extent)
            && extents::covers(extents_of(&self.held.manifest, space), extent);
        if held { Ok(extent) } else { Err(ReadError::NotHeld { id: self.held.id, space, extent }) }
    }

    /// Reads every page again and compares it with the checksum taken when it was received.
    pub fn verify(&self) -> Result<(), VerifyError> {
        let mut buf = vec![0; (PIECE_PAGES * PAGE_SIZE) as usize];
        let mut sums = vec![ZERO_PAGE; PIECE_PAGES as usize];
        for map in &self.held.manifest.spaces {
            for extent in &map.extents {
                for piece in extents::parts(*extent, PIECE_PAGES) {
                    let buf = &mut buf[..piece.bytes() as usize];
                    self.verify_piece(map.space, piece, buf, &mut sums[..piece.pages as usize])?;
                }
            }
        }
        Ok(())
    }

    /// Reads every page again and calls `each` with the hashes under a key of those that lie together, in order, until it
    /// says false; see [`sums_of`].
    pub fn hash_pages(
        &self,
        key: &[u8; KEY_LEN],
        mut each: impl FnMut(Space, u64, Vec<u8>) -> bool,
    ) -> Result<(), ReadError> {
        let mut buf = vec![0; (PIECE_PAGES * PAGE_SIZE) as usize];
        for map in &self.held.manifest.spaces {
            for extent in &map.extents {
                for part in extents::parts(*extent, HASHED_PAGES) {
                    let mut sums = Vec::with_capacity(part.pages as usize * SUM_LEN);
                    for piece in extents::parts(part, PIECE_PAGES) {
                        let buf = &mut buf[..piece.bytes() as usize];
                        read(&self.image, &self.layers, map.space, piece, buf)?;
                        sums_of(key, buf, &mut sums);
                    }
                    if !each(map.space, part.start, sums) {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    fn verify_piece(
        &self,
        space: Space,
        piece: Extent,
        buf: &mut [u8],
        sums: &mut [Sum],
    ) -> Result<(), VerifyError> {
        read(&self.image, &self.layers, space, piece, buf).map_err(ReadError::from)?;
        read_sums(&self.image, &self.layers, space, piece, sums).map_err(ReadError::from)?;
        let pages = buf.chunks_exact(PAGE_SIZE as usize).zip(sums.iter());
        match pages.enumerate().find(|(_, (page, sum))| !sum::matches(page, **sum)) {
            None => Ok(()),
            Some((at, _)) => {
                let addr = piece.start + at as u64 * PAGE_SIZE;
                Err(VerifyError::Mismatch { id: self.held.id, space, addr })
            }
        }
    }
}

/// Splits what is asked for between the uppermost layer and what lies below it. Deep at most as many
/// calls as there are layers, which staging bounds.
pub(super) fn read(
    image: &Image,
    layers: &[Arc<Layer>],
    space: Space,
    extent: Extent,
    buf: &mut [u8],
) -> Result<(), IoFault> {
    let Some((top, below)) = layers.split_first() else {
        return image.flat.read(space, extent.start, buf);
    };
    let mut from = extent.start;
    let at = |addr: u64| (addr - extent.start) as usize;
    for run in top.overlapping(space, extent) {
        if from < run.extent.start {
            let gap = Extent { start: from, pages: (run.extent.start - from) / PAGE_SIZE };
            read(image, below, space, gap, &mut buf[at(gap.start)..at(gap.end())])?;
        }
        top.read(run.source, &mut buf[at(run.extent.start)..at(run.extent.end())])?;
        from = run.extent.end();
    }
    if from < extent.end() {
        let gap = Extent { start: from, pages: (extent.end() - from) / PAGE_SIZE };
        read(image, below, space, gap, &mut buf[at(gap.start)..])?;
    }
    Ok(())
}

/// Is told where a run lies, or that it is zero.
type EachPlace<'a> = dyn FnMut(Extent, Option<(&Path, u64)>) + 'a;

/// As [`read`], for the places.
fn places(
    flat: &mut Places<'_>,
    layers: &[Arc<Layer>],
    space: Space,
    extent: Extent,
    each: &mut EachPlace<'_>,
) -> Result<(), IoFault> {
    let Some((top, below)) = layers.split_first() else {
        return flat.of(space, extent, each);
    };
    let mut from = extent.start;
    for run in top.overlapping(space, extent) {
        if from < run.extent.start {
            let gap = Extent { start: from, pages: (run.extent.start - from) / PAGE_SIZE };
            places(flat, below, space, gap, each)?;
        }
        each(run.extent, top.place(run.source));
        from = run.extent.end();
    }
    if from < extent.end() {
        let gap = Extent { start: from, pages: (extent.end() - from) / PAGE_SIZE };
        places(flat, below, space, gap, each)?;
    }
    Ok(())
}

/// As [`read`], for the checksums.
fn read_sums(
    image: &Image,
    layers: &[Arc<Layer>],
    space: Space,
    extent: Extent,
    sums: &mut [Sum],
) -> Result<(), IoFault> {
    let Some((top, below)) = layers.split_first() else {
        return image.flat.read_sums(space, extent.start, sums);
    };
    let mut from = extent.start;
    let at = |addr: u64| ((addr - extent.start) / PAGE_SIZE) as usize;
    for run in top.overlapping(space, extent) {
        if from < run.extent.start {
            let gap = Extent { start: from, pages: (run.extent.start - from) / PAGE_SIZE };
            read_sums(image, below, space, gap, &mut sums[at(gap.start)..at(gap.end())])?;
        }
        top.sums(run.source, &mut sums[at(run.extent.start)..at(run.extent.end())]);
        from = run.extent.end();
    }
    if from < extent.end() {
        let gap = Extent { start: from, pages: (extent.end() - from) / PAGE_SIZE };
        read_sums(image, below, space, gap, &mut sums[at(gap.start)..])?;
    }
    Ok(())
}

impl Drop for View {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        if let Some(at) = state.views.iter().position(|view| *view == self.held.id) {
            state.views.swap_remove(at);
        }
        state.freezes -= usize::from(self.freezes);
        drop(state);
        // A fold that is under way sweeps when it ends.
        if let Ok(folding) = self.inner.folding.try_lock() {
            self.inner.sweep(&folding);
        }
    }
}
