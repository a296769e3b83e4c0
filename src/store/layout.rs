//! Names of the files and directories of a store, and nothing else.

use std::path::{Path, PathBuf};

use crate::model::{Epoch, EpochId, Space, Term};

/// Page files are cut at 1 TiB, since ext4 ends a file at 16 TiB.
pub(super) const CHUNK_SHIFT: u32 = 40;

pub(super) const LOCK: &str = "lock";
pub(super) const FILES_TREE: &str = "files";
pub(super) const STATE: &str = "state.json";
/// What `state.json` is called until it is whole.
const STATE_NEW: &str = "state.new";
pub(super) const PAGES_LOG: &str = "pages";
pub(super) const INDEX: &str = "index";
pub(super) const FILES_LOG: &str = "files.log";
pub(super) const PAGES_DIR: &str = "pages";
pub(super) const SUMS_DIR: &str = "sums";

/// What an entry of the store's directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Staging,
    Epoch(EpochId),
    Image(EpochId),
    Other,
}

pub(super) fn staging_name(id: EpochId, serial: u64) -> String {
    format!("staging-{}-{}.{serial}", id.term, id.epoch)
}

pub(super) fn epoch_name(id: EpochId) -> String {
    format!("epoch-{}-{}", id.term, id.epoch)
}

pub(super) fn image_name(id: EpochId) -> String {
    format!("image-{}-{}", id.term, id.epoch)
}

pub(super) fn manifest_name(id: EpochId) -> String {
    format!("manifest-{}-{}", id.term, id.epoch)
}

pub(super) fn criu_name(id: EpochId) -> String {
    format!("criu-{}-{}", id.term, id.epoch)
}

fn id(text: &str) -> Option<EpochId> {
    let (term, epoch) = text.split_once('-')?;
    Some(EpochId { term: Term(term.parse().ok()?), epoch: Epoch(epoch.parse().ok()?) })
}

pub(super) fn entry(name: &str) -> Entry {
    if name.starts_with("staging-") {
        return Entry::Staging;
    }
    if let Some(id) = name.strip_prefix("epoch-").and_then(id) {
        return Entry::Epoch(id);
    }
    match name.strip_prefix("image-").and_then(id) {
        Some(id) => Entry::Image(id),
        None => Entry::Other,
    }
}

/// What an entry of an image's directory is that the image does not need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stale {
    Directory,
    File,
}

/// Whether an entry of an image's directory belongs to another epoch than the `folded` one, or to a
/// write that did not end.
pub(super) fn stale_in_image(name: &str, folded: EpochId) -> Option<Stale> {
    if name.starts_with("criu-") && name != criu_name(folded) {
        return Some(Stale::Directory);
    }
    let other = name.starts_with("manifest-") && name != manifest_name(folded);
    (other || name == STATE_NEW).then_some(Stale::File)
}

/// The name of the file that holds a space's pages from `chunk << CHUNK_SHIFT` on.
pub(super) fn chunk_name(space: Space, chunk: u64) -> String {
    match space {
        Space::Task(pid) => format!("task-{pid}.{chunk}"),
        Space::Shared(id) => format!("shared-{id}.{chunk}"),
    }
}

/// Beside the store: where a store that is being removed waits for its files to go.
pub(super) fn removed_path(root: &Path, name: &str) -> PathBuf {
    root.join(format!(".removed-{name}"))
}

/// Longest name of one of CRIU's images (`NAME_MAX` is 255).
const IMAGE_NAME_LEN_MAX: usize = 200;

/// Whether a name from the network may become a file among CRIU's small images. Page maps and pages
/// are made from the manifest, so those names are kept free.
pub(super) fn is_image_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'@' | b':' | b'+');
    (1..=IMAGE_NAME_LEN_MAX).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(allowed)
        && !name.starts_with("pagemap-")
        && !name.starts_with("pages-")
        && name != "parent"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        let id = EpochId { term: Term(3), epoch: Epoch(14) };
        assert_eq!(entry(&epoch_name(id)), Entry::Epoch(id));
        assert_eq!(entry(&image_name(id)), Entry::Image(id));
        assert_eq!(entry(&staging_name(id, 7)), Entry::Staging);
        assert_eq!(entry("epoch-3"), Entry::Other);
        assert_eq!(entry(LOCK), Entry::Other);
    }

    #[test]
    fn an_image_name_stays_in_its_directory() {
        for good in ["core-2.img", "inventory.img", "tmpfs-dev-1.tar.gz.img"] {
            assert!(is_image_name(good), "{good}");
        }
        for bad in ["", ".", "..", "../x", "a/b", "pages-1.img", "pagemap-2.img", "parent", "a\0b", ".x"] {
            assert!(!is_image_name(bad), "{bad:?}");
        }
        assert!(!is_image_name(&"a".repeat(201)));
    }
}
