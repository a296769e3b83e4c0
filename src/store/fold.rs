//! Moving committed epochs into the flat image, lowest first. The committed epoch is the redo log: every
//! step here may be done twice, and `state.json` is replaced only after all others.

use std::{
    fs,
    path::Path,
    sync::{Arc, MutexGuard, PoisonError},
};

use super::{
    Held, Image, Inner, Store,
    disk::{self, Context as _, IoFault},
    extents,
    files::FileChanges,
    layer::Layer,
    layout::{self, FILES_LOG, FILES_TREE},
    recover,
    staging::{extents_of, space_order},
};
use crate::{model::EpochId, wire::message::Manifest};

/// Why an epoch was not folded. It stays committed, readable and restorable; folding it again later is
/// all that is needed.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// An earlier epoch is being restored from or read; fold after its view is gone.
    #[error(
        "epoch {id} is not folded yet, since the image of an earlier one is in use; it is kept beside it"
    )]
    InUse {
        /// Which is the lowest that waits.
        id: EpochId,
    },
    /// The changes of files could not be applied.
    #[error(
        "the file changes of epoch {id} cannot be applied (the epoch is kept; it is tried again): {source}"
    )]
    Files {
        /// Epoch.
        id: EpochId,
        /// What the hook says.
        source: std::io::Error,
    },
    /// A file operation failed.
    #[error("epoch {id} cannot be folded (it is kept beside the image; it is tried again): {source}")]
    Io {
        /// Epoch.
        id: EpochId,
        /// What.
        source: IoFault,
    },
}

/// A fold that is due.
struct Due {
    image: Arc<Image>,
    folded: Held,
    layer: Arc<Layer>,
    manifest: Arc<Manifest>,
}

impl Store {
    /// Folds all committed epochs into the image and removes what is not needed any more; returns how
    /// many were folded. Off the critical path: what is held can be restored without it.
    pub fn fold(&self) -> Result<usize, FoldError> {
        let inner = &self.inner;
        let folding = inner.folding();
        let mut folded = 0;
        let result = loop {
            match inner.fold_next() {
                Ok(true) => folded += 1,
                Ok(false) => break Ok(folded),
                Err(error) => break Err(error),
            }
        };
        inner.sweep(&folding);
        result
    }
}

impl Inner {
    /// Folds the lowest epoch, if there is one; the caller holds `folding`.
    fn fold_next(&self) -> Result<bool, FoldError> {
        let (id, due) = {
            let state = self.state();
            let (Some(image), Some(folded)) = (&state.image, &state.folded) else { return Ok(false) };
            let due = state.layers.first().map(|(layer, manifest)| Due {
                image: Arc::clone(image),
                folded: folded.clone(),
                layer: Arc::clone(layer),
                manifest: Arc::clone(manifest),
            });
            let id = due.as_ref().map_or(folded.id, |due| due.layer.id);
            if state.views.iter().any(|view| *view < id) {
                return Err(FoldError::InUse { id });
            }
            (id, due)
        };
        self.apply_files(id)?;
        let Some(due) = due else { return Ok(false) };
        self.fold_layer(&due).map_err(|source| FoldError::Io { id, source })?;
        let mut state = self.state();
        state.layers.remove(0);
        let old = state.folded.replace(Held { id, manifest: due.manifest });
        state.garbage.push(due.layer.dir.clone());
        if let Some(old) = old {
            state.garbage.push(due.image.dir.join(layout::manifest_name(old.id)));
            state.garbage.push(due.image.dir.join(layout::criu_name(old.id)));
        }
        Ok(true)
    }

    fn fold_layer(&self, due: &Due) -> Result<(), IoFault> {
        let flat = &due.image.flat;
        for (space, extent) in due.layer.zero_runs() {
            flat.zero(space, extent)?;
        }
        let mut batch = flat.batch();
        due.layer.for_each_data(|space, start, bytes, sums| batch.write(space, start, bytes, sums))?;
        batch.finish()?;
        for map in &due.folded.manifest.spaces {
            let key = space_order(map.space);
            let stays = due.manifest.spaces.binary_search_by_key(&key, |map| space_order(map.space)).is_ok();
            if !stays {
                flat.drop_space(map.space, &map.extents)?;
                continue;
            }
            for gone in extents::subtract(&map.extents, extents_of(&due.manifest, map.space)) {
                flat.drop_pages(map.space, gone)?;
            }
        }
        flat.sync(self.durability)?;
        let (id, from, to) = (due.layer.id, &due.layer.dir, &due.image.dir);
        let name = layout::manifest_name(id);
        disk::link_anew(&from.join(&name), &to.join(&name))?;
        let name = layout::criu_name(id);
        self.link_images(&from.join(&name), &to.join(&name))?;
        disk::sync_dir(to, self.durability)?;
        recover::write_state(to, id, self.durability)
    }

    fn link_images(&self, from: &Path, to: &Path) -> Result<(), IoFault> {
        disk::remove_tree(to)?;
        disk::make_dir(to)?;
        for name in disk::list(from)? {
            disk::link_anew(&from.join(&name), &to.join(&name))?;
        }
        disk::sync_dir(to, self.durability)
    }

    /// Applies the file changes of the epochs up to this one, as far as that was not done yet.
    pub(super) fn apply_files(&self, last: EpochId) -> Result<(), FoldError> {
        let mut applied = self.files_applied.lock().unwrap_or_else(PoisonError::into_inner);
        let (image, mut due) = {
            let state = self.state();
            let (Some(image), Some(folded)) = (&state.image, &state.folded) else { return Ok(()) };
            let mut due = vec![(folded.id, image.dir.join(FILES_LOG), true)];
            due.extend(state.layers.iter().map(|(layer, _)| (layer.id, layer.dir.join(FILES_LOG), false)));
            (Arc::clone(image), due)
        };
        let is_due = |id: EpochId| id <= last && applied.is_none_or(|applied| applied < id);
        due.retain(|(id, log, _)| is_due(*id) && log.exists());
        for (id, log, full) in due {
            let tree = self.dir.join(FILES_TREE);
            disk::own_dir(&tree).map_err(|source| FoldError::Io { id, source })?;
            let changes = FileChanges { tree: &tree, full, durability: self.durability, log };
            (self.apply_files)(&changes).map_err(|source| FoldError::Files { id, source })?;
            *applied = Some(id);
            if full {
                let log = image.dir.join(FILES_LOG);
                disk::remove_file(&log).map_err(|source| FoldError::Io { id, source })?;
            }
        }
        Ok(())
    }

    /// Removes what neither the newest state nor a view needs. What cannot be removed is tried again.
    pub(super) fn sweep(&self, _folding: &MutexGuard<'_, ()>) {
        let garbage = {
            let mut state = self.state();
            if !state.views.is_empty() {
                return;
            }
            std::mem::take(&mut state.garbage)
        };
        for path in garbage {
            let removed = match fs::symlink_metadata(&path) {
                Ok(found) if found.is_dir() => disk::remove_tree(&path),
                Ok(_) => disk::remove_file(&path),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error).context("examine", &path),
            };
            if let Err(error) = removed {
                tracing::warn!(%error, "what a folded epoch has left cannot be removed; it is tried again with the next");
                self.state().garbage.push(path);
            }
        }
    }
}
