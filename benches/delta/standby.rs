//! A standby: the store of its agent, in RAM.

use std::{collections::BTreeMap, time::Duration};

use standin::{
    delta::BatchHead,
    extents,
    model::{Epoch, EpochId, Extent, PAGE_SIZE, Space, Term},
    store::{Durability, Store},
    wire::message::{Manifest, SpaceMap},
};

use super::{
    memory::Memory,
    record::{Piece, Result},
    thread_time,
};

/// A store, and the pages that it should hold.
pub(crate) struct Standby {
    store: Store,
    manifest: BTreeMap<Space, Vec<Extent>>,
    epoch: u64,
    _dir: tempfile::TempDir,
}

impl Standby {
    pub(crate) fn new() -> Result<Self> {
        let dir = tempfile::tempdir_in("/dev/shm")?;
        let name = "delta".parse()?;
        let store = Store::open(&dir.path().join("store"), &name, Durability::Memory, Box::new(|_| Ok(())))?;
        Ok(Self { store, manifest: BTreeMap::new(), epoch: 0, _dir: dir })
    }

    /// Takes an epoch in, and folds it; the CPU time up to its commit.
    pub(crate) fn receive(&mut self, pieces: &[Piece], batches: &[(BatchHead, Vec<u8>)]) -> Result<Duration> {
        for piece in pieces {
            let pages = self.manifest.entry(piece.space).or_default();
            pages.extend_from_slice(&piece.extents);
            extents::normalize(pages);
        }
        let spaces =
            self.manifest.iter().map(|(space, extents)| SpaceMap { space: *space, extents: extents.clone() });
        let manifest = Manifest { spaces: spaces.collect() };
        self.epoch += 1;
        let began = thread_time()?;
        let id = EpochId { term: Term(1), epoch: Epoch(self.epoch) };
        let mut staging = self.store.begin(id, self.store.held())?;
        for (head, body) in batches {
            staging.batch(head, body)?;
        }
        staging.image_file("inventory.img", b"of no program")?;
        staging.manifest(manifest)?;
        staging.commit()?;
        let staged = thread_time()?.saturating_sub(began);
        self.store.fold()?;
        Ok(staged)
    }

    /// Whether it holds just these pages.
    pub(crate) fn compare(&self, truth: &Memory) -> Result<()> {
        let view = self.store.view().ok_or("nothing is held")?;
        let mut page = [0; PAGE_SIZE as usize];
        for ((space, at), content) in truth.pages() {
            view.read_page(*space, *at, &mut page)?;
            if page[..] != **content {
                return Err(format!("the page at {at:#x} of {space:?} is not what it was").into());
            }
        }
        Ok(())
    }
}
