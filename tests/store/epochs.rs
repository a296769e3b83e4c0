//! Epochs whose pages follow from their numbers, so that a reader can tell which epoch it sees.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use standin::{
    model::{Epoch, EpochId, Extent, PAGE_SIZE, Space, Term},
    store::{Durability, Store},
    wire::message::{Manifest, SpaceMap},
};

pub(crate) const SPACE: Space = Space::Task(2);
/// Where the pages begin, as a heap does.
pub(crate) const START: u64 = 0x5555_5555_4000;

pub(crate) fn id(epoch: u64) -> EpochId {
    EpochId { term: Term(1), epoch: Epoch(epoch) }
}

pub(crate) fn open(root: &Path, durability: Durability) -> Store {
    let name = "redis".parse().expect("a name");
    Store::open(root, &name, durability, Box::new(|_| Ok(()))).expect("the store opens")
}

pub(crate) fn manifest(pages: u64) -> Manifest {
    Manifest { spaces: vec![SpaceMap { space: SPACE, extents: vec![Extent { start: START, pages }] }] }
}

/// A page that says which page it is and in which epoch it was written.
pub(crate) fn page_of(page: u64, epoch: u64) -> Vec<u8> {
    let mut bytes = vec![page as u8 ^ epoch as u8; PAGE_SIZE as usize];
    bytes[..8].copy_from_slice(&page.to_le_bytes());
    bytes[8..16].copy_from_slice(&epoch.to_le_bytes());
    bytes
}

/// Bytes that the directory takes of its file system.
pub(crate) fn disk_usage(path: &Path) -> u64 {
    let found = fs::symlink_metadata(path).expect("the file is there");
    if found.is_dir() {
        fs::read_dir(path).expect("a directory").map(|e| disk_usage(&e.expect("an entry").path())).sum()
    } else {
        found.blocks() * 512
    }
}
