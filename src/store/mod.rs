//! The standby's warm image of one workload: staging, atomic commit, fold, verification, recovery.
//!
//! A store owns the directory `ROOT/NAME` and nothing outside it:
//!
//! ```text
//! lock                      held while a store is open: one agent only
//! staging-TERM-EPOCH.N/     an epoch that is being received; discarded by recovery
//! epoch-TERM-EPOCH/         a committed delta that is not folded yet: log of pages, index, log of file
//!                           changes, and manifest-TERM-EPOCH and criu-TERM-EPOCH/ as below
//! image-TERM-EPOCH/         the flat image; TERM-EPOCH is the full epoch that it began with
//!   pages/task-PID.C        pages at their own addresses from C TiB on, sparse
//!   sums/task-PID.C         their checksums, laid out the same way
//!   manifest-TERM-EPOCH     which pages the image holds; state.json says of which epoch it is whole
//!   criu-TERM-EPOCH/        CRIU's small images
//!   files.log               of a full epoch, until its file changes were applied
//!   state.json              written last by a rename: the epoch that is folded completely
//! files/                    for the replicated file trees; filled by the hook given to [`Store::open`]
//! ```
//!
//! ```text
//!            begin             commit (one rename)            fold (redo log)
//!  (nothing) ─────► staging ──────────────────────► epoch-… ─────────────────► image-…
//!                      │ drop, crash                   ▲ │ crash, disk full: done again
//!                      ▼                               └─┘
//!                  discarded       a full epoch is an image from the start: its commit renames
//!                                  staging-… to image-…, and the older image is garbage
//! ```
//!
//! Invariants:
//! - The rename at the end of [`Staging::commit`] is the commit point. Before it the store holds the
//!   epoch it held; after it the new one, whole. There is nothing between the two.
//! - What the store holds is the newest image with all committed epochs laid over it. Folding moves
//!   pages from the lowest epoch into the image, where no reader looks for them before: so a fold that
//!   was interrupted, or is under way, changes nothing that can be read, and doing it again does no harm.
//! - Patches are resolved into whole pages as they are staged, against what is held and what was staged before, and
//!   what comes of them is compared with the sender's digest: no file here depends on another's content.
//! - A page of a manifest is in the epoch or in what was held before it; else the commit is refused.
//! - While a [`View`] of an epoch lives, no later epoch is folded, and no file it needs is removed.
//! - What waits is bounded: with 32 epochs waiting, the next one is begun only after a fold. A view that is
//!   kept for longer than that many epochs (other than for a restore) holds replication up.
//!
//! The agent's part: [`Store::fold`] after each commit, off the critical path, and again after an error.

mod batch;
mod commit;
mod disk;
mod extents;
#[cfg(test)]
mod fault;
mod files;
mod flat;
mod fold;
mod layer;
mod layout;
mod record;
mod recover;
mod staging;
mod sum;
#[cfg(test)]
mod tests;
mod view;

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::fcntl::Flock;

pub use self::{
    commit::{CommitError, Committed},
    disk::{Durability, IoFault},
    extents::{ADDRESS_END, intersect},
    files::{ApplyFiles, FILE_BODY_LEN_MAX, FileChanges},
    fold::FoldError,
    recover::{OpenError, RemoveError},
    staging::{BeginError, LAYERS_MAX, StageError, Staging},
    view::{FreezeError, ReadError, VerifyError, View},
};
use self::{flat::Flat, layer::Layer};
use crate::{
    model::{EpochId, Name},
    wire::message::Manifest,
};

/// Room that must be left in the file system whatever is asked for.
const ROOM_RESERVE_BYTES: u64 = 1 << 20;

/// There is too little room for what is to come.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    /// Too few bytes are free.
    #[error(
        "no room for the image in {}: {needed} bytes are needed and {available} are available; free space or \
         memory there, enlarge a tmpfs with `mount -o remount,size=…`, or keep the store on a disk (store = \"disk\")",
        dir.display()
    )]
    NoRoom {
        /// Where.
        dir: PathBuf,
        /// Bytes.
        needed: u64,
        /// Bytes.
        available: u64,
    },
    /// The file system did not say.
    #[error(transparent)]
    Io(#[from] IoFault),
}

/// The warm image of one workload. Clones are handles of the same store. All calls block.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

/// A flat image in its directory.
struct Image {
    dir: PathBuf,
    flat: Flat,
}

struct Inner {
    dir: PathBuf,
    name: Name,
    durability: Durability,
    apply_files: ApplyFiles,
    state: Mutex<State>,
    /// Held by whoever changes the image or removes files of it: one at a time. Taken before `state`.
    folding: Mutex<()>,
    /// Epochs up to this one have had their file changes applied in this process's life. Held while such
    /// changes are applied, so that a restore waits for those and not for a fold. Taken before `state`.
    files_applied: Mutex<Option<EpochId>>,
    /// Keeps other agents away for as long as a handle lives.
    _lock: Flock<File>,
}

/// An epoch that is held: what it is and which pages it has.
#[derive(Clone)]
struct Held {
    id: EpochId,
    manifest: Arc<Manifest>,
}

#[derive(Default)]
struct State {
    image: Option<Arc<Image>>,
    /// The epoch that is folded into `image` completely.
    folded: Option<Held>,
    /// Committed epochs that are not folded, oldest first, each the base of the next; with manifests.
    layers: Vec<(Arc<Layer>, Arc<Manifest>)>,
    /// Epochs of the living views.
    views: Vec<EpochId>,
    /// Number of living views that forbid new epochs.
    freezes: usize,
    /// Number of the newest staging; an older one may not commit any more.
    newest_staging: u64,
    /// No longer needed by the newest state, but perhaps by a view.
    garbage: Vec<PathBuf>,
    removed: bool,
}

impl State {
    fn held(&self) -> Option<Held> {
        match self.layers.last() {
            Some((layer, manifest)) => Some(Held { id: layer.id, manifest: Arc::clone(manifest) }),
            None => self.folded.clone(),
        }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folding(&self) -> MutexGuard<'_, ()> {
        self.folding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ensure_room(&self, bytes: u64) -> Result<(), RoomError> {
        let available = disk::available(&self.dir, self.durability)?;
        let needed = bytes.saturating_add(ROOM_RESERVE_BYTES);
        if needed <= available {
            return Ok(());
        }
        Err(RoomError::NoRoom { dir: self.dir.clone(), needed, available })
    }
}

impl Store {
    /// The newest committed epoch: what would be restored if the primary vanished now.
    pub fn held(&self) -> Option<EpochId> {
        self.inner.state().held().map(|held| held.id)
    }

    /// The pages of that epoch.
    pub fn manifest(&self) -> Option<Arc<Manifest>> {
        self.inner.state().held().map(|held| held.manifest)
    }

    /// Number of committed epochs that are not folded yet.
    pub fn unfolded(&self) -> usize {
        self.inner.state().layers.len()
    }

    /// The store's directory.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// Checks that so many more bytes can be stored, e.g. before an offer is accepted.
    pub fn ensure_room(&self, bytes: u64) -> Result<(), RoomError> {
        self.inner.ensure_room(bytes)
    }
}
