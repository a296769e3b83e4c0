//! Opening a store after whatever ended its last life, and removing it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use serde::{Deserialize, Serialize};

use super::{
    Held, Image, Inner, State, Store,
    disk::{self, Context as _, Durability, IoFault},
    files::ApplyFiles,
    flat::Flat,
    layer::Layer,
    layout::{self, Entry, LOCK, STATE},
    record::{self, RecordError},
};
use crate::model::{EpochId, Name};

/// A `state.json` has no more than this.
const STATE_BYTES_MAX: u64 = 4096;
/// Layout of the directory, written into `state.json`.
const FORMAT: u32 = 1;

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another agent has it.
    #[error("the store {} is open in another process: only one agent may run on a host", .0.display())]
    Busy(PathBuf),
    /// A file of it cannot be believed.
    #[error(
        "{} of the store is damaged ({what}): remove {}, and the primary will send the whole memory again",
        path.display(),
        dir.display()
    )]
    Damaged {
        /// The store.
        dir: PathBuf,
        /// Which file or directory.
        path: PathBuf,
        /// What about it.
        what: String,
    },
    /// A file operation failed.
    #[error("cannot open the store: {0}")]
    Io(#[from] IoFault),
}

/// Why a store cannot be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// It is being read or restored from.
    #[error("the store {} is being restored from or read: end that first", .0.display())]
    InUse(PathBuf),
    /// A file operation failed.
    #[error("cannot remove the store: {0}")]
    Io(#[from] IoFault),
}

/// What `state.json` says.
#[derive(Serialize, Deserialize)]
struct StateFile {
    format: u32,
    /// The epoch that is folded completely.
    folded: EpochId,
}

/// Says in an image's directory which epoch it is whole of.
pub(super) fn write_state(dir: &Path, folded: EpochId, durability: Durability) -> Result<(), IoFault> {
    let path = dir.join(STATE);
    let text = serde_json::to_vec(&StateFile { format: FORMAT, folded })
        .map_err(std::io::Error::from)
        .context("encode", &path)?;
    disk::replace(&path, &text, durability)
}

/// Removes what recovery would discard anyway.
pub(super) fn remove_or_warn(dir: &Path) {
    if let Err(error) = disk::remove_tree(dir) {
        tracing::warn!(%error, "a discarded epoch stays on the disk until the store is opened again");
    }
}

/// The directory of a store while it is being opened.
struct Recovery {
    dir: PathBuf,
    images: Vec<EpochId>,
    epochs: Vec<EpochId>,
}

impl Store {
    /// Opens the store of a workload under `root`, making it if there is none, and recovers from whatever
    /// ended its last life: what is held afterwards is exactly one whole epoch, or nothing.
    ///
    /// `apply_files` is called when epochs are folded, perhaps already here.
    pub fn open(
        root: &Path,
        name: &Name,
        durability: Durability,
        apply_files: ApplyFiles,
    ) -> Result<Self, OpenError> {
        if let Some(parent) = root.parent() {
            fs::create_dir_all(parent).context("create directory", parent)?;
        }
        disk::own_dir(root)?;
        disk::remove_tree(&layout::removed_path(root, name.as_str()))?;
        let dir = root.join(name.as_str());
        disk::own_dir(&dir)?;
        disk::sync_dir(root, durability)?;
        let lock = disk::lock(&dir.join(LOCK))?.ok_or_else(|| OpenError::Busy(dir.clone()))?;
        let state = Recovery::scan(&dir)?.recover()?;
        let inner = Inner {
            dir,
            name: name.clone(),
            durability,
            apply_files,
            state: Mutex::new(state),
            folding: Mutex::default(),
            files_applied: Mutex::default(),
            _lock: lock,
        };
        let store = Self { inner: Arc::new(inner) };
        if let Err(error) = store.fold() {
            tracing::warn!(%error, %name, "what is held is whole, but not folded yet");
        }
        Ok(store)
    }

    /// Removes the store with everything in it. Other handles of it hold nothing from then on.
    pub fn remove(self) -> Result<(), RemoveError> {
        let inner = &self.inner;
        let _folding = inner.folding();
        let mut state = inner.state();
        if !state.views.is_empty() {
            return Err(RemoveError::InUse(inner.dir.clone()));
        }
        let root = inner.dir.parent().unwrap_or(Path::new("/"));
        let doomed = layout::removed_path(root, inner.name.as_str());
        disk::remove_tree(&doomed)?;
        disk::rename(&inner.dir, &doomed)?;
        *state = State { removed: true, ..State::default() };
        drop(state);
        disk::sync_dir(root, inner.durability)?;
        disk::remove_tree(&doomed)?;
        Ok(())
    }
}

impl Recovery {
    /// Looks through the directory and discards what was never committed.
    fn scan(dir: &Path) -> Result<Self, OpenError> {
        let mut found = Self { dir: dir.to_owned(), images: Vec::new(), epochs: Vec::new() };
        for name in disk::list(dir)? {
            match layout::entry(&name) {
                Entry::Staging => disk::remove_tree(&dir.join(name))?,
                Entry::Epoch(id) => found.epochs.push(id),
                Entry::Image(id) => found.images.push(id),
                Entry::Other => {}
            }
        }
        found.images.sort_unstable();
        found.epochs.sort_unstable();
        Ok(found)
    }

    fn damaged(&self, path: &Path, what: impl Into<String>) -> OpenError {
        OpenError::Damaged { dir: self.dir.clone(), path: path.to_owned(), what: what.into() }
    }

    fn believed<T>(&self, path: &Path, read: Result<T, RecordError>) -> Result<T, OpenError> {
        read.map_err(|error| match error {
            RecordError::Io(fault) => OpenError::Io(fault),
            RecordError::Damaged(_) => self.damaged(path, error.to_string()),
        })
    }

    fn recover(mut self) -> Result<State, OpenError> {
        let mut state = State::default();
        // A full epoch is newer than everything held before it: so the newest image is the one.
        let Some(newest) = self.images.pop() else {
            return match self.epochs.first() {
                None => Ok(state),
                Some(id) => {
                    let path = self.dir.join(layout::epoch_name(*id));
                    Err(self.damaged(&path, "there is no image that it could be folded into"))
                }
            };
        };
        for old in &self.images {
            disk::remove_tree(&self.dir.join(layout::image_name(*old)))?;
        }
        let dir = self.dir.join(layout::image_name(newest));
        let folded = self.open_image(&dir)?;
        let mut top = folded.id;
        state.image = Some(Arc::new(Image { flat: Flat::open(&dir), dir }));
        state.folded = Some(folded);
        for id in &self.epochs {
            let dir = self.dir.join(layout::epoch_name(*id));
            if *id <= top {
                disk::remove_tree(&dir)?; // folded, or overtaken by a full epoch
                continue;
            }
            let layer = self.believed(&dir, Layer::open(&dir))?;
            if layer.id != *id || layer.base != top {
                return Err(self.damaged(&dir, format!("it builds upon epoch {}, not on {top}", layer.base)));
            }
            let path = dir.join(layout::manifest_name(*id));
            let manifest = self.believed(&path, record::read_manifest(&path))?;
            state.layers.push((Arc::new(layer), Arc::new(manifest)));
            top = *id;
        }
        Ok(state)
    }

    fn open_image(&self, dir: &Path) -> Result<Held, OpenError> {
        let path = dir.join(STATE);
        let bytes = disk::read_capped(&path, STATE_BYTES_MAX)?;
        let state: StateFile =
            serde_json::from_slice(&bytes).map_err(|error| self.damaged(&path, error.to_string()))?;
        if state.format != FORMAT {
            let what = format!("its format is {}, this program knows {FORMAT}", state.format);
            return Err(self.damaged(&path, what));
        }
        for name in disk::list(dir)? {
            let path = dir.join(&name);
            match layout::stale_in_image(&name, state.folded) {
                Some(layout::Stale::Directory) => disk::remove_tree(&path)?,
                Some(layout::Stale::File) => disk::remove_file(&path)?,
                None => {}
            }
        }
        let path = dir.join(layout::manifest_name(state.folded));
        let manifest = self.believed(&path, record::read_manifest(&path))?;
        Ok(Held { id: state.folded, manifest: Arc::new(manifest) })
    }
}
