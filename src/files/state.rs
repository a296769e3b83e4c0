//! What the records emitted so far make of a copy: one tree's entries, and the ways to find them.
//!
//! Invariants: two names of one file are links of one another, the first in the order of the walk being the file;
//! every directory on the way to an entry is there; `ids`, `seen`, `handles` and `untold` speak of entries that are
//! there and of no others.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    sync::Arc,
};

use super::{
    sys::{Handle, Stat},
    tree::Mark,
};
use crate::wire::message::{FileKind, FileMeta};

/// Device and inode number, as `stat` gives them.
pub type FileId = (u64, u64);
/// The BLAKE3 hash of a block; all zero for one that holds only zeros.
pub(super) type Tag = [u8; 32];
pub(super) const ZEROS: Tag = [0; 32];
/// A tag that no block has.
pub(super) const UNKNOWN: Tag = [0xff; 32];

/// A path below a root with a zero byte for each slash: so the order of the bytes is that of the walk, and what is
/// below a directory is one range.
pub(super) type Key = Arc<[u8]>;

/// One entry.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) stat: Stat,
    /// Its `stat` may miss a later write.
    pub(super) racy: bool,
    pub(super) mark: Mark,
    /// It may change without an event.
    pub(super) untold: bool,
    /// What the tasks see as its number.
    pub(super) seen_as: Option<FileId>,
    /// What events call it; `None` if nobody listens to them.
    pub(super) handle: Option<Handle>,
    pub(super) meta: FileMeta,
    pub(super) blocks: Vec<Tag>,
}

impl Node {
    pub(super) fn is_directory(&self) -> bool {
        self.meta.kind == FileKind::Directory
    }

    /// Another name of a file.
    pub(super) fn is_link(&self) -> bool {
        matches!(self.meta.kind, FileKind::HardLink { .. })
    }

    fn has_content(&self) -> bool {
        matches!(self.meta.kind, FileKind::Regular { size: 1.. })
    }

    /// The file that it is a name of; whiteouts have none of their own.
    fn file_id(&self) -> Option<FileId> {
        (!self.is_directory() && self.mark != Mark::Whiteout).then(|| self.stat.id())
    }
}

/// The names of a file; mostly it has one.
#[derive(Debug)]
enum Names {
    One(Key),
    Several(BTreeSet<Key>),
}

/// What a handle stands for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Directory(Key),
    File(FileId),
}

/// One tree.
#[derive(Debug, Default)]
pub(super) struct State {
    nodes: BTreeMap<Key, Node>,
    ids: HashMap<FileId, Names>,
    /// Files of an overlay, by what the tasks see as their number.
    seen: HashMap<FileId, FileId>,
    handles: HashMap<Handle, Owner>,
    untold: BTreeSet<Key>,
    /// How many entries have content.
    with_content: usize,
}

impl State {
    pub(super) fn get(&self, key: &[u8]) -> Option<&Node> {
        self.nodes.get(key)
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// In the order of the walk.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, &Node)> {
        self.nodes.iter()
    }

    /// What is below a directory, in the order of the walk.
    pub(super) fn below(&self, directory: &[u8]) -> impl Iterator<Item = (&Key, &Node)> {
        let (mut from, mut to) = (directory.to_vec(), directory.to_vec());
        from.push(SEPARATOR);
        to.push(SEPARATOR + 1);
        let (from, to) = if directory.is_empty() {
            (Bound::Excluded(Vec::new()), Bound::Unbounded)
        } else {
            (Bound::Included(from), Bound::Excluded(to))
        };
        self.nodes.range::<[u8], _>((from.as_ref().map(Vec::as_slice), to.as_ref().map(Vec::as_slice)))
    }

    pub(super) fn has_content(&self) -> bool {
        self.with_content > 0
    }

    /// All names of a file, by the number in the directory that is scanned.
    pub(super) fn names(&self, id: FileId) -> impl Iterator<Item = &Key> {
        let (one, several) = match self.ids.get(&id) {
            Some(Names::One(key)) => (Some(key), None),
            Some(Names::Several(keys)) => (None, Some(keys)),
            None => (None, None),
        };
        one.into_iter().chain(several.into_iter().flatten())
    }

    /// All names of a file, by the number that the tasks see.
    pub(super) fn names_seen(&self, id: FileId) -> impl Iterator<Item = &Key> {
        self.names(self.seen.get(&id).copied().unwrap_or(id))
    }

    pub(super) fn owner(&self, handle: &Handle) -> Option<&Owner> {
        self.handles.get(handle)
    }

    pub(super) fn untold(&self) -> impl Iterator<Item = &Key> {
        self.untold.iter()
    }

    /// Takes over what was emitted of a file's content.
    pub(super) fn take_blocks(&mut self, key: &[u8], blocks: Vec<Tag>) {
        if let Some(node) = self.nodes.get_mut(key) {
            node.blocks = blocks;
        }
    }

    /// Takes over what was emitted; `None` is gone.
    pub(super) fn take(&mut self, changes: BTreeMap<Key, Option<Node>>) {
        for (key, change) in changes {
            match change {
                Some(node) => self.put(&key, node),
                None => self.forget(&key),
            }
        }
    }

    fn put(&mut self, key: &Key, node: Node) {
        self.forget(key);
        if let Some(id) = node.file_id() {
            self.add_name(id, key);
            if let Some(seen) = node.seen_as.filter(|seen| *seen != id) {
                self.seen.insert(seen, id);
            }
        }
        if let Some(handle) = node.handle {
            let owner = node.file_id().map_or_else(|| Owner::Directory(key.clone()), Owner::File);
            self.handles.insert(handle, owner);
        }
        if node.untold {
            self.untold.insert(key.clone());
        }
        self.with_content += usize::from(node.has_content());
        self.nodes.insert(key.clone(), node);
    }

    fn forget(&mut self, key: &Key) {
        let Some(node) = self.nodes.remove(key) else { return };
        self.with_content -= usize::from(node.has_content());
        self.untold.remove(key);
        let last = node.file_id().is_none_or(|id| self.remove_name(id, key));
        if last && let Some(seen) = &node.seen_as {
            self.seen.remove(seen);
        }
        if let Some(handle) = node.handle.filter(|_| last) {
            let is_its_own = |owner: &Owner| match owner {
                // By now it may be another place's: it was moved.
                Owner::Directory(of) => of == key,
                Owner::File(_) => true,
            };
            if self.handles.get(&handle).is_some_and(is_its_own) {
                self.handles.remove(&handle);
            }
        }
    }

    fn add_name(&mut self, id: FileId, key: &Key) {
        let names = self.ids.entry(id).or_insert_with(|| Names::One(key.clone()));
        match names {
            Names::One(one) if one == key => {}
            Names::One(one) => *names = Names::Several(BTreeSet::from([one.clone(), key.clone()])),
            Names::Several(keys) => {
                keys.insert(key.clone());
            }
        }
    }

    /// True: it was the last one.
    fn remove_name(&mut self, id: FileId, key: &Key) -> bool {
        let empty = match self.ids.get_mut(&id) {
            Some(Names::Several(keys)) => {
                keys.remove(key);
                keys.is_empty()
            }
            Some(Names::One(one)) => one == key,
            None => true,
        };
        if empty {
            self.ids.remove(&id);
        }
        empty
    }
}

const SEPARATOR: u8 = 0;

/// The key of a path as records have it.
pub(super) fn key_of(path: &[u8]) -> Vec<u8> {
    path.iter().map(|&byte| if byte == b'/' { SEPARATOR } else { byte }).collect()
}

/// The path as records and the kernel have it.
pub(super) fn path_of(key: &[u8]) -> Vec<u8> {
    key.iter().map(|&byte| if byte == SEPARATOR { b'/' } else { byte }).collect()
}

pub(super) fn child_of(directory: &[u8], name: &[u8]) -> Key {
    if directory.is_empty() { Key::from(name) } else { [directory, &[SEPARATOR], name].concat().into() }
}

/// The directory that it is in, and its name there; the root's name is empty.
pub(super) fn split(key: &[u8]) -> (&[u8], &[u8]) {
    let at = key.iter().rposition(|&byte| byte == SEPARATOR);
    at.map_or((&[], key), |at| (&key[..at], &key[at + 1..]))
}

pub(super) fn parent_of(key: &[u8]) -> &[u8] {
    split(key).0
}

pub(super) fn is_at_or_below(key: &[u8], ancestor: &[u8]) -> bool {
    key == ancestor
        || ancestor.is_empty()
        || (key.starts_with(ancestor) && key.get(ancestor.len()) == Some(&SEPARATOR))
}

pub(super) fn depth_of(key: &[u8]) -> usize {
    if key.is_empty() { 0 } else { key.split(|&byte| byte == SEPARATOR).count() }
}
