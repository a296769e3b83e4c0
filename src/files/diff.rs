//! What turns what was sent into what was found: the second half of a scan. Its cost is that of the changes.
//!
//! Removals first, then entries in the order of the walk, each followed by its content, then further names of files.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs::File,
    io,
};

use super::{
    BLOCK_SIZE, Blocks,
    clone::Clones,
    held::HeldTree,
    later::{Content, Later},
    look::{View, blocks_in, is_zero, read_block, tag_of},
    scan::{Emit, FilesStats, Phase, ScanError, failed, open_content, raced},
    state::{Key, Node, State, Tag, UNKNOWN, ZEROS, is_at_or_below, key_of, parent_of, path_of},
    tree::Mark,
};
use crate::wire::{
    check::KEPT_RUNS_MAX,
    message::{FileKind, FileMeta, FileRecord},
};

type Changes = BTreeMap<Key, Option<Node>>;

/// What earlier scans of the same epoch emitted. A standby that applies the epoch again meets those records with the
/// epoch's end in its directories: a name may be another file's there.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// Names under which a file was written to.
    written: HashSet<Key>,
    /// Names that were made links.
    linked: HashSet<Key>,
}

pub(super) struct Diff<'a> {
    pub(super) tree: u32,
    pub(super) view: View<'a>,
    /// What the copy is said to hold; only of a tree that is sent whole.
    pub(super) held: Option<HeldTree<'a>>,
    pub(super) emit: Emit<'a>,
    pub(super) stats: &'a mut FilesStats,
    pub(super) ahead: &'a mut Ahead,
    /// Files that are read later.
    pub(super) cloned: HashMap<Key, File>,
    pub(super) clones: &'a mut Clones,
    pub(super) later: &'a mut Later,
    /// Entries whose content is not what was found, to be looked at in the next scan.
    pub(super) again: &'a mut BTreeSet<Key>,
}

impl Diff<'_> {
    /// Emits what `changes` make of what was sent. Content is remembered in them as it was really emitted.
    pub(super) fn run(&mut self, changes: &mut Changes) -> Result<(), ScanError> {
        let mut afresh = self.in_other_directories(changes);
        afresh.extend(self.not_settled(changes));
        // Making or removing an entry moves the mtime of its directory at the other end too.
        let mut touched = BTreeSet::new();
        let mut gone: Option<Key> = None;
        for key in self.replaced(changes, &afresh) {
            if !gone.as_ref().is_some_and(|gone| is_at_or_below(&key, gone)) {
                touched.insert(Key::from(parent_of(&key)));
                self.remove(&key);
                gone = Some(key);
            }
        }
        let linked = self.still_linked(changes, &afresh);
        for (key, change) in &*changes {
            let made = change.as_ref().is_some_and(|now| {
                let link = now.is_link() && !linked.contains(key);
                link || before(self.view.sent, &afresh, key, now).is_none()
            });
            if made {
                touched.insert(parent_of(key).into());
            }
        }
        self.entries(changes, &touched, &afresh)?;
        // Last, so that the first names are there.
        for (key, change) in &*changes {
            if let Some(now) = change.as_ref().filter(|now| now.is_link() && !linked.contains(key)) {
                self.entry(key, &now.meta);
            }
        }
        Ok(())
    }

    /// What must go before the new entries are made; also what is below something else that goes.
    fn replaced(&self, changes: &Changes, afresh: &HashSet<Key>) -> Vec<Key> {
        let overlay = self.view.merged.is_some();
        let goes = |key: &Key, now: Option<&Node>| match self.view.sent.get(key) {
            Some(before) => now.is_none_or(|now| !same_object(before, now) || afresh.contains(key)),
            None => overlay && now.is_some_and(hides),
        };
        changes.iter().filter(|(key, now)| goes(key, now.as_ref())).map(|(key, _)| key.clone()).collect()
    }

    /// What is in directories that stay directories but show other layers: it goes with them, changed or not.
    fn in_other_directories(&self, changes: &mut Changes) -> HashSet<Key> {
        let sent = self.view.sent;
        let differs = |key: &Key, now: &Node| sent.get(key).is_some_and(|before| before.mark != now.mark);
        let nodes = changes.iter().filter_map(|(key, now)| Some((key, now.as_ref()?)));
        let other: Vec<_> =
            nodes.filter(|(key, now)| differs(key, now)).map(|(key, _)| key.clone()).collect();
        let mut afresh = HashSet::new();
        for (key, node) in other.iter().flat_map(|directory| sent.below(directory)) {
            changes.entry(key.clone()).or_insert_with(|| Some(node.clone()));
            afresh.insert(key.clone());
        }
        afresh
    }

    /// What would be another file's when the epoch is applied again: a name that was made a link in it and is none any
    /// more, for it would then be a link to what has taken the first name's place; and a file of which a name becomes
    /// a link that something else was written under.
    fn not_settled(&self, changes: &mut Changes) -> HashSet<Key> {
        let sent = self.view.sent;
        let mut afresh = HashSet::new();
        for (key, now) in changes.iter().filter_map(|(key, now)| Some((key, now.as_ref()?))) {
            let same_kind = sent.get(key).is_some_and(|before| before.meta.kind == now.meta.kind);
            match &now.meta.kind {
                FileKind::HardLink { to } if !same_kind && self.ahead.written.contains(key) => {
                    afresh.insert(Key::from(key_of(to)));
                }
                FileKind::HardLink { .. } => {}
                _ if self.ahead.linked.contains(key) && sent.get(key).is_some_and(Node::is_link) => {
                    afresh.insert(key.clone());
                }
                _ => {}
            }
        }
        for key in &afresh {
            if let Some(node) = sent.get(key) {
                changes.entry(key.clone()).or_insert_with(|| Some(node.clone()));
            }
        }
        afresh
    }

    /// The further names that are linked to their first name at the other end already.
    fn still_linked(&self, changes: &Changes, afresh: &HashSet<Key>) -> HashSet<Key> {
        let sent = self.view.sent;
        let stays = |key: &Key, now: &Node| before(sent, afresh, key, now).is_some();
        let first_stays = |to: &Key| match changes.get(to) {
            Some(change) => change.as_ref().is_some_and(|now| stays(to, now)),
            None => sent.get(to).is_some(),
        };
        let settled = |key: &Key, now: &Node| {
            !self.ahead.linked.contains(key)
                || sent.get(key).is_some_and(|before| before.meta.kind == now.meta.kind)
        };
        let links = changes.iter().filter_map(|(key, now)| Some((key, now.as_ref()?)));
        let linked = links.filter(|(key, now)| {
            let FileKind::HardLink { to } = &now.meta.kind else { return false };
            stays(key, now) && first_stays(&key_of(to).into()) && settled(key, now)
        });
        linked.map(|(key, _)| key.clone()).collect()
    }

    /// The entries that are no links: what changed, and the directories in which something did.
    fn entries(
        &mut self,
        changes: &mut Changes,
        touched: &BTreeSet<Key>,
        afresh: &HashSet<Key>,
    ) -> Result<(), ScanError> {
        let sent = self.view.sent;
        let unchanged: Vec<_> = touched.iter().filter(|key| !changes.contains_key(*key)).collect();
        let mut unchanged = unchanged.into_iter().peekable();
        for (key, change) in changes {
            while let Some(directory) = unchanged.next_if(|directory| *directory < key) {
                self.directory(directory);
            }
            let Some(now) = change.as_mut().filter(|now| !now.is_link() && now.mark != Mark::Whiteout) else {
                continue;
            };
            let before = before(sent, afresh, key, now);
            let blocks = before.map_or(&[][..], |before| blocks_of(before, sent));
            let same_meta = before.is_some_and(|before| before.meta == now.meta) && !touched.contains(key);
            if let Some(clone) = self.cloned.remove(key) {
                if !same_meta {
                    self.entry(key, &now.meta);
                }
                let sent = blocks.to_vec();
                self.later.add(Content {
                    tree: self.tree,
                    key: key.clone(),
                    meta: now.meta.clone(),
                    sent,
                    now: None,
                    clone,
                });
            } else if !same_meta || blocks != now.blocks.as_slice() {
                let kept = self.keep(key, now)?;
                self.entry(key, &now.meta);
                self.content(key, now, kept.as_deref().unwrap_or(blocks))?;
            }
        }
        unchanged.for_each(|directory| self.directory(directory));
        Ok(())
    }

    /// A directory that did not change, but its copy did.
    fn directory(&mut self, key: &Key) {
        if let Some(node) = self.view.sent.get(key).filter(|node| node.is_directory()) {
            self.entry(key, &node.meta);
        }
    }

    fn entry(&mut self, key: &Key, meta: &FileMeta) {
        match meta.kind {
            // Nothing follows in the same epoch.
            _ if self.view.phase == Phase::Frozen => {}
            FileKind::Regular { .. } => drop(self.ahead.written.insert(key.clone())),
            FileKind::HardLink { .. } => drop(self.ahead.linked.insert(key.clone())),
            _ => {}
        }
        let path = path_of(key);
        (self.emit)(FileRecord::Entry { tree: self.tree, path, meta: meta.clone() }, &[]);
        self.stats.changed += 1;
    }

    pub(super) fn remove(&mut self, key: &[u8]) {
        (self.emit)(FileRecord::Remove { tree: self.tree, path: path_of(key) }, &[]);
        self.stats.removed += 1;
    }

    /// Has the copy keep the blocks of a file that are the same there; gives what it has then. A block may have changed since
    /// it was looked at: what was compared is remembered.
    fn keep(&mut self, key: &Key, node: &mut Node) -> Result<Option<Vec<Tag>>, ScanError> {
        let path = path_of(key);
        let (Some(held), FileKind::Regular { size }) = (self.held, &node.meta.kind) else { return Ok(None) };
        let (Some(sums), size) = (held.file(&path).filter(|_| node.stat.nlink == 1), *size) else {
            return Ok(None);
        };
        let file = match open_content(self.view.root, &path, &node.stat) {
            Ok(file) => file,
            // It is found again when its content is to be sent.
            Err(error) if raced(self.view.phase, &error) => return Ok(None),
            Err(error) => return Err(failed("open", self.view.base, &path)(error)),
        };
        let mut kept = vec![ZEROS; node.blocks.len()];
        let mut buf = vec![0; BLOCK_SIZE.min(size as usize)];
        let (mut runs, mut hasher): (Vec<Blocks>, _) = (Vec::new(), blake3::Hasher::new());
        for (block, (tag, sum)) in node.blocks.iter_mut().zip(sums).enumerate() {
            if *tag == ZEROS {
                continue;
            }
            let read = |error: io::Error| failed("read", self.view.base, &path)(error);
            let len = read_block(&file, block, size, &mut buf).map_err(read)?;
            let (found, want) =
                (&buf[..len], (size - block as u64 * BLOCK_SIZE as u64).min(BLOCK_SIZE as u64));
            if (len as u64) < want || is_zero(found) || held.sum_of(found) != *sum {
                continue;
            }
            let same = tag_of(found);
            (*tag, kept[block]) = (same, same);
            let block = block as u64;
            let follows = runs.last().is_some_and(|(first, count)| first + count == block);
            if !follows && runs.len() == KEPT_RUNS_MAX {
                self.kept(&path, std::mem::take(&mut runs), &std::mem::take(&mut hasher));
            }
            match runs.last_mut().filter(|_| follows) {
                Some((_, count)) => *count += 1,
                None => runs.push((block, 1)),
            }
            hasher.update(found);
            self.stats.kept_bytes += len as u64;
        }
        if !runs.is_empty() {
            self.kept(&path, runs, &hasher);
        }
        Ok(Some(kept))
    }

    fn kept(&mut self, path: &[u8], runs: Vec<Blocks>, hasher: &blake3::Hasher) {
        let (path, digest) = (path.to_vec(), *hasher.finalize().as_bytes());
        (self.emit)(FileRecord::Keep { tree: self.tree, path, runs, digest }, &[]);
    }

    /// Emits the blocks that differ, and remembers what was really emitted: a running workload may have
    /// written since.
    fn content(&mut self, key: &Key, node: &mut Node, before: &[Tag]) -> Result<(), ScanError> {
        let FileKind::Regular { size } = node.meta.kind else { return Ok(()) };
        let differs = |block: usize, tag: &Tag| before.get(block).unwrap_or(&ZEROS) != tag;
        if !node.blocks.iter().enumerate().any(|(block, tag)| differs(block, tag)) {
            return Ok(());
        }
        let path = path_of(key);
        let file = match open_content(self.view.root, &path, &node.stat) {
            Ok(file) => file,
            Err(error) if raced(self.view.phase, &error) => {
                node.blocks.fill(UNKNOWN);
                node.racy = true;
                self.again.insert(key.clone());
                return Ok(());
            }
            Err(error) => return Err(failed("open", self.view.base, &path)(error)),
        };
        if self.view.phase != Phase::Running && self.view.cloning.is_some() {
            let blocks = node.blocks.iter().enumerate();
            let bytes = blocks.filter(|(block, tag)| differs(*block, tag)).count() as u64 * BLOCK_SIZE as u64;
            if self.later.is_beyond_memory(bytes)
                && let Some(clone) = self.clones.take_anyway(self.view.root, &file)
            {
                let now = std::mem::replace(&mut node.blocks, vec![UNKNOWN; blocks_in(size)]);
                let (key, meta, sent) = (key.clone(), node.meta.clone(), before.to_vec());
                self.later.add(Content { tree: self.tree, key, meta, sent, now: Some(now), clone });
                return Ok(());
            }
            self.later.hold(bytes);
        }
        let mut buf = vec![0; BLOCK_SIZE.min(size as usize)];
        for (block, tag) in node.blocks.iter_mut().enumerate() {
            if !differs(block, tag) {
                continue;
            }
            let read = |error: io::Error| failed("read", self.view.base, &path)(error);
            let len = read_block(&file, block, size, &mut buf).map_err(read)?;
            // Beyond the end of a file that was cut meanwhile: as zeros, which it would read as if it grew
            // again.
            let want = (size - block as u64 * BLOCK_SIZE as u64).min(BLOCK_SIZE as u64) as usize;
            buf[len..want].fill(0);
            *tag = tag_of(&buf[..want]);
            let offset = block as u64 * BLOCK_SIZE as u64;
            (self.emit)(FileRecord::Data { tree: self.tree, path: path.clone(), offset }, &buf[..want]);
            self.stats.data_bytes += want as u64;
        }
        Ok(())
    }
}

/// Whether the copy's object at this path can be turned into the new one: directories mostly, else the same
/// file.
fn same_object(before: &Node, now: &Node) -> bool {
    let directories = before.is_directory() && now.is_directory();
    let whiteouts = before.mark == Mark::Whiteout;
    before.mark == now.mark && (directories || whiteouts || now.stat.is_same_file(&before.stat))
}

/// What the copy has at a path, if it can be turned into the new entry.
fn before<'a>(sent: &'a State, afresh: &HashSet<Key>, key: &Key, now: &Node) -> Option<&'a Node> {
    sent.get(key).filter(|before| same_object(before, now) && !afresh.contains(key))
}

/// Whether an entry of an overlay that is new hides one of a lower layer, of which nothing may be kept.
fn hides(now: &Node) -> bool {
    now.mark != Mark::None || matches!(now.meta.kind, FileKind::Regular { .. })
}

/// The content that a name stood for at the other end, also if it was a further name.
fn blocks_of<'a>(node: &'a Node, sent: &'a State) -> &'a [Tag] {
    match &node.meta.kind {
        FileKind::HardLink { to } => sent.get(&key_of(to)).map_or(&[], |first| &first.blocks),
        _ => &node.blocks,
    }
}
