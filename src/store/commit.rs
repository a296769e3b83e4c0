//! The end of an epoch's reception: the checks, what must be on the disk, and the one rename.

use std::{fs::File, io::Write, path::Path, sync::Arc};

use super::{
    Held, Image, IoFault, RoomError, State,
    disk::{self, Context as _},
    extents::{self, Run, RunMap, Source},
    flat::Flat,
    layer::Layer,
    layout::{self, FILES_LOG, INDEX},
    record::{self, Index},
    recover,
    staging::{Pages, Staging, extents_of, flush, resident_bytes},
};
use crate::{
    model::{EpochId, Extent, PAGE_SIZE, Space},
    wire::message::{Manifest, SpaceMap},
};

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

impl Staging {
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
        let _folding = inner.folding(); // a fold into the old image ends first
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
        Ok(()) // the next fold removes the garbage: that takes long for a large image
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
