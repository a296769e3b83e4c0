//! Random histories against a model, with the store's life ended at every single change of the disk.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::{
    ApplyFiles, BeginError, CommitError, Committed, Durability, FoldError, OpenError, RemoveError, Staging,
    Store, VerifyError, View, fault, staging::space_order,
};
use crate::{
    delta::{KEY_LEN, SUM_LEN, sums_of},
    model::{Epoch, EpochId, Extent, Name, PAGE_SIZE, Space, Term},
    wire::message::{FileRecord, Manifest, SpaceMap},
};

/// What each page of an epoch holds: a number that fills it, 0 for a zero page.
pub(super) type Pages = BTreeMap<((u8, u64), u64), u64>;

/// One epoch of a history.
#[derive(Clone)]
pub(super) struct Step {
    pub(super) id: EpochId,
    pub(super) full: bool,
    pub(super) writes: Vec<(Space, u64, u64)>,
    pub(super) after: Pages,
}

/// xorshift64*: reproducible, and good enough to pick pages.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % end
    }
}

/// Pages close to each other, and on both sides of a border between two chunks.
fn some_page(random: &mut Random) -> u64 {
    let border = (3_u64 << 40) / PAGE_SIZE;
    [16, border - 8][random.below(2) as usize] + random.below(16)
}

fn some_space(random: &mut Random) -> Space {
    [Space::Task(2), Space::Task(7), Space::Shared(7)][random.below(3) as usize]
}

fn space_of(key: (u8, u64)) -> Space {
    if key.0 == 0 { Space::Task(key.1 as u32) } else { Space::Shared(key.1) }
}

pub(super) fn id(term: u64, epoch: u64) -> EpochId {
    EpochId { term: Term(term), epoch: Epoch(epoch) }
}

fn history(seed: u64, len: u64) -> Vec<Step> {
    let mut random = Random(seed * 2 + 1);
    let mut pages = Pages::new();
    let mut steps = Vec::new();
    for epoch in 1..=len {
        let full = epoch == 1 || random.below(5) == 0;
        let mut writes = Vec::new();
        for _ in 0..=random.below(24) {
            let (space, page) = (some_space(&mut random), some_page(&mut random));
            let content = if random.below(4) == 0 { 0 } else { 1 + random.below(1 << 20) };
            writes.push((space, page, content));
            pages.insert((space_order(space), page), content);
        }
        for _ in 0..random.below(8) {
            pages.remove(&(space_order(some_space(&mut random)), some_page(&mut random)));
        }
        if random.below(4) == 0 {
            let gone = space_order(some_space(&mut random));
            pages.retain(|(space, _), _| *space != gone);
        }
        if full {
            writes.extend(pages.iter().map(|((space, page), content)| (space_of(*space), *page, *content)));
        }
        steps.push(Step { id: id(1 + epoch / 4, epoch), full, writes, after: pages.clone() });
    }
    steps
}

pub(super) fn page_of(content: u64) -> Vec<u8> {
    content.to_le_bytes().repeat(PAGE_SIZE as usize / 8)
}

pub(super) fn manifest_of(pages: &Pages) -> Manifest {
    let mut spaces: Vec<SpaceMap> = Vec::new();
    for (space, page) in pages.keys() {
        let (space, start) = (space_of(*space), page * PAGE_SIZE);
        if spaces.last().is_none_or(|map| map.space != space) {
            spaces.push(SpaceMap { space, extents: Vec::new() });
        }
        let Some(map) = spaces.last_mut() else { continue };
        match map.extents.last_mut() {
            Some(last) if last.end() == start => last.pages += 1,
            _ => map.extents.push(Extent { start, pages: 1 }),
        }
    }
    Manifest { spaces }
}

fn stage(store: &Store, step: &Step) -> Result<Staging, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let base = if step.full { None } else { store.held() };
    let mut staging = store.begin(step.id, base).map_err(|e| text(&e))?;
    for (space, page, content) in &step.writes {
        let start = page * PAGE_SIZE;
        match content {
            0 => staging.zero(*space, start, 1).map_err(|e| text(&e))?,
            _ => staging.pages(*space, start, &page_of(*content)).map_err(|e| text(&e))?,
        }
    }
    let label = step.id.to_string();
    staging.image_file("core-2.img", &label.as_bytes()[..1]).map_err(|e| text(&e))?;
    staging.image_file("core-2.img", &label.as_bytes()[1..]).map_err(|e| text(&e))?;
    let record = FileRecord::Data { tree: 0, path: b"label".to_vec(), offset: 0 };
    staging.file_record(&record, label.as_bytes()).map_err(|e| text(&e))?;
    staging.manifest(manifest_of(&step.after)).map_err(|e| text(&e))?;
    Ok(staging)
}

pub(super) fn receive(store: &Store, step: &Step) -> Result<Committed, String> {
    stage(store, step)?.commit().map_err(|error| error.to_string())
}

/// Keeps the label of the newest epoch whose files were applied in the tree.
fn keep_label() -> ApplyFiles {
    Box::new(|changes| {
        changes.for_each(|record, body| match record {
            FileRecord::Data { path, .. } => {
                fs::write(changes.tree.join(std::str::from_utf8(path).map_err(io::Error::other)?), body)
            }
            _ => Ok(()),
        })
    })
}

pub(super) fn open(root: &Path, durability: Durability) -> Result<Store, OpenError> {
    let name: Name = "redis".parse().expect("a name");
    Store::open(root, &name, durability, keep_label())
}

fn assert_is(store: &Store, step: &Step) {
    let view = store.view().expect("something is held");
    assert_eq!(view.id(), step.id);
    assert_eq!(**view.manifest(), manifest_of(&step.after));
    let mut page = [0; PAGE_SIZE as usize];
    for ((space, at), content) in &step.after {
        view.read_page(space_of(*space), at * PAGE_SIZE, &mut page).expect("the page is held");
        assert!(page[..] == page_of(*content), "page {at:#x} of {space:?} in {}", step.id);
    }
    view.for_each_extent(|space, extent| {
        let mut all = vec![0; extent.bytes() as usize];
        view.read_pages(space, extent.start, &mut all).expect("the extent is held");
        for (i, page) in all.chunks_exact(PAGE_SIZE as usize).enumerate() {
            let at = extent.start / PAGE_SIZE + i as u64;
            assert!(page == page_of(step.after[&(space_order(space), at)]));
        }
    });
    assert_lies_where_it_says(&view, &step.after);
    assert_tells(&view, &step.after);
    view.verify().expect("the image is what was received");
    let label = fs::read_to_string(view.criu_dir().join("core-2.img")).expect("the small image");
    assert_eq!(label, step.id.to_string());
}

/// Whoever reads the files of the image by themselves finds every page there, whole.
fn assert_lies_where_it_says(view: &View, pages: &Pages) {
    let mut told = 0;
    let each = |space, extent: Extent, place: Option<(&Path, u64)>| {
        let mut all = vec![0; extent.bytes() as usize];
        if let Some((path, offset)) = place {
            fs::File::open(path)
                .and_then(|file| file.read_exact_at(&mut all, offset))
                .expect("the file has it");
        }
        for (i, page) in all.chunks_exact(PAGE_SIZE as usize).enumerate() {
            let at = extent.start / PAGE_SIZE + i as u64;
            assert!(page == page_of(pages[&(space_order(space), at)]), "page {at:#x} of {space:?}");
        }
        told += extent.pages;
    };
    view.for_each_place(each).expect("the files can be examined");
    assert_eq!(told, pages.len() as u64);
}

/// What it tells of its pages are the hashes of what they hold, of each once.
fn assert_tells(view: &View, pages: &Pages) {
    let (key, mut told) = ([3; KEY_LEN], 0);
    let each = |space, start: u64, sums: Vec<u8>| {
        let first = start / PAGE_SIZE;
        let count = (sums.len() / SUM_LEN) as u64;
        let content = (first..first + count).flat_map(|at| page_of(pages[&(space_order(space), at)]));
        let mut expected = Vec::new();
        sums_of(&key, &content.collect::<Vec<u8>>(), &mut expected);
        assert!(sums == expected, "{count} pages from {start:#x} of {space:?}");
        told += count;
        true
    };
    view.hash_pages(&key, each).expect("the image can be read");
    assert_eq!(told, pages.len() as u64);
    let mut calls = 0;
    let stopped = view.hash_pages(&key, |_, _, _| {
        calls += 1;
        false
    });
    assert!(stopped.is_ok() && calls <= 1);
}

pub(super) fn root() -> TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory in RAM")
}

fn label_in_tree(store: &Store) -> String {
    fs::read_to_string(store.dir().join("files/label")).expect("the tree has the label")
}

/// Names in the store's directory but `lock` and `files`.
pub(super) fn leftovers(store: &Store) -> Vec<String> {
    let names = fs::read_dir(store.dir()).expect("the directory").map(|e| e.expect("an entry").file_name());
    let mut names: Vec<String> = names.filter_map(|name| name.into_string().ok()).collect();
    names.retain(|name| name != "lock" && name != "files");
    names
}

#[test]
fn a_random_history_reads_as_the_model_says() {
    for seed in 0..40 {
        let root = root();
        let store = open(root.path(), Durability::Memory).unwrap();
        let mut random = Random(seed * 77 + 5);
        for step in history(seed, 12) {
            receive(&store, &step).unwrap();
            assert_is(&store, &step);
            if random.below(3) == 0 {
                store.fold().unwrap();
                assert_eq!(store.unfolded(), 0);
                assert_eq!(label_in_tree(&store), step.id.to_string());
                assert_eq!(leftovers(&store).len(), 1, "{:?}", leftovers(&store));
                assert_is(&store, &step);
            }
        }
    }
}

/// Runs a history until the life ends; returns which epochs had been acknowledged and what was under way.
fn live(root: &Path, steps: &[Step], durability: Durability) -> (usize, bool) {
    let Ok(store) = open(root, durability) else { return (0, false) };
    for (done, step) in steps.iter().enumerate() {
        if receive(&store, step).is_err() {
            return (done, false);
        }
        if done % 2 == 1 && store.fold().is_err() {
            return (done + 1, false);
        }
    }
    (steps.len(), true)
}

fn crash_everywhere(seed: u64, durability: Durability) -> u64 {
    let steps = history(seed, 6);
    for k in 0.. {
        let root = root();
        fault::die_after(k);
        let (acked, finished) = live(root.path(), &steps, durability);
        fault::revive();
        // A second crash, during the recovery from the first.
        fault::die_after(k % 13);
        drop(open(root.path(), durability));
        fault::revive();
        let store = open(root.path(), durability).unwrap();
        assert!(!leftovers(&store).iter().any(|name| name.starts_with("staging")));
        let held = steps.iter().position(|step| Some(step.id) == store.held()).map_or(0, |at| at + 1);
        assert!(
            held == acked || held == acked + 1,
            "seed {seed}, step {k}: {held} held, {acked} acknowledged"
        );
        if held > 0 {
            assert_is(&store, &steps[held - 1]);
            store.fold().unwrap();
            assert_is(&store, &steps[held - 1]);
            assert_eq!(label_in_tree(&store), steps[held - 1].id.to_string());
            assert_eq!(leftovers(&store).len(), 1);
        }
        for step in &steps[held..] {
            receive(&store, step).unwrap();
            store.fold().unwrap();
            assert_is(&store, step);
        }
        if finished {
            return k;
        }
    }
    unreachable!("the history ends");
}

#[test]
fn a_crash_at_any_step_leaves_exactly_one_whole_epoch() {
    for seed in 0..4 {
        let steps = crash_everywhere(seed, Durability::Memory);
        assert!(steps > 100, "only {steps} steps were tried");
    }
}

#[test]
fn a_crash_at_any_step_leaves_exactly_one_whole_epoch_on_disk() {
    crash_everywhere(11, Durability::Disk);
}

#[test]
fn a_fold_that_fails_anywhere_can_be_retried_and_never_changes_what_is_read() {
    let steps = history(3, 4);
    for k in 0.. {
        let root = root();
        let store = open(root.path(), Durability::Memory).unwrap();
        for step in &steps[..3] {
            receive(&store, step).unwrap();
        }
        fault::die_after(k);
        let folded = store.fold();
        let died = fault::revive();
        assert_is(&store, &steps[2]);
        receive(&store, &steps[3]).unwrap();
        assert_is(&store, &steps[3]);
        store.fold().unwrap();
        assert_is(&store, &steps[3]);
        if folded.is_ok() && !died {
            return;
        }
    }
}

pub(super) fn small() -> Step {
    let after = Pages::from([((space_order(Space::Task(2)), 5), 9), ((space_order(Space::Task(2)), 6), 8)]);
    let writes = vec![(Space::Task(2), 5, 9), (Space::Task(2), 6, 8)];
    Step { id: id(1, 1), full: true, writes, after }
}

#[test]
fn only_newer_epochs_upon_what_is_held_are_begun() {
    let root = root();
    let store = open(root.path(), Durability::Memory).unwrap();
    assert!(matches!(store.begin(id(1, 1), Some(id(1, 0))), Err(BeginError::NeedFull { held: None, .. })));
    receive(&store, &small()).unwrap();
    assert!(matches!(store.begin(id(1, 1), None), Err(BeginError::Stale { .. })));
    assert!(matches!(store.begin(id(0, 9), Some(id(1, 1))), Err(BeginError::Stale { .. })));
    let error = store.begin(id(1, 3), Some(id(1, 2))).err().unwrap();
    assert!(error.needs_full());
    assert!(store.begin(id(2, 1), Some(id(1, 1))).is_ok());
}

#[test]
fn a_page_that_nobody_has_is_never_guessed() {
    let root = root();
    let store = open(root.path(), Durability::Memory).unwrap();
    receive(&store, &small()).unwrap();
    let mut next = small();
    next.id = id(1, 2);
    next.full = false;
    next.writes = vec![(Space::Task(2), 8, 3)];
    next.after.insert((space_order(Space::Task(2)), 7), 1);
    let error = stage(&store, &next).unwrap().commit().unwrap_err();
    assert!(error.needs_full());
    let CommitError::MissingPages { space, first, pages, .. } = error else { panic!("{error}") };
    assert_eq!((space, first.start, pages), (Space::Task(2), 7 * PAGE_SIZE, 1));
    assert_is(&store, &small());
    assert_eq!(leftovers(&store).len(), 1);
}

#[test]
fn an_overtaken_staging_cannot_be_committed() {
    let root = root();
    let store = open(root.path(), Durability::Memory).unwrap();
    let first = stage(&store, &small()).unwrap();
    let second = stage(&store, &small()).unwrap();
    assert!(matches!(first.commit(), Err(CommitError::Overtaken(_))));
    second.commit().unwrap();
    assert_is(&store, &small());
}

#[test]
fn what_is_being_restored_from_does_not_change() {
    let root = root();
    let store = open(root.path(), Durability::Memory).unwrap();
    assert!(store.freeze_for_restore().is_err());
    let steps = history(5, 8);
    for step in &steps[..3] {
        receive(&store, step).unwrap();
    }
    let under_way = stage(&store, &steps[3]).unwrap();
    let frozen = store.freeze_for_restore().unwrap();
    assert_eq!(label_in_tree(&store), steps[2].id.to_string());
    assert!(matches!(under_way.commit(), Err(CommitError::Overtaken(_))));
    assert!(matches!(store.begin(steps[3].id, store.held()), Err(BeginError::Frozen(_))));
    assert!(matches!(store.clone().remove(), Err(RemoveError::InUse(_))));
    assert_eq!(frozen.id(), steps[2].id);
    drop(frozen);
    receive(&store, &steps[3]).unwrap();
    assert_is(&store, &steps[3]);
}

#[test]
fn a_view_stays_what_it_is_while_later_epochs_come() {
    for seed in 0..20 {
        let root = root();
        let store = open(root.path(), Durability::Memory).unwrap();
        let steps = history(seed, 9);
        for step in &steps[..4] {
            receive(&store, step).unwrap();
        }
        let view = store.view().unwrap();
        let criu_dir = view.criu_dir();
        store.fold().unwrap(); // of the viewed epoch itself
        for step in &steps[4..] {
            receive(&store, step).unwrap();
            assert!(matches!(store.fold(), Err(FoldError::InUse { .. })));
        }
        let mut page = [0; PAGE_SIZE as usize];
        for ((space, at), content) in &steps[3].after {
            view.read_page(space_of(*space), at * PAGE_SIZE, &mut page).unwrap();
            assert!(page[..] == page_of(*content));
        }
        view.verify().unwrap();
        assert_eq!(fs::read_to_string(criu_dir.join("core-2.img")).unwrap(), steps[3].id.to_string());
        assert_eq!(label_in_tree(&store), steps[3].id.to_string());
        drop(view);
        store.fold().unwrap();
        assert_is(&store, &steps[8]);
        assert_eq!(leftovers(&store).len(), 1);
    }
}

fn only_file_in(dir: PathBuf) -> PathBuf {
    fs::read_dir(dir).unwrap().next().unwrap().unwrap().path()
}

#[test]
fn damage_to_a_page_is_found() {
    let root = root();
    let store = open(root.path(), Durability::Memory).unwrap();
    receive(&store, &small()).unwrap();
    let image = store.dir().join(&leftovers(&store)[0]);
    let pages = only_file_in(image.join("pages"));
    let mut bytes = fs::read(&pages).unwrap();
    bytes[6 * PAGE_SIZE as usize + 17] ^= 1;
    fs::write(&pages, bytes).unwrap();
    let Err(VerifyError::Mismatch { addr, .. }) = store.view().unwrap().verify() else { panic!() };
    assert_eq!(addr, 6 * PAGE_SIZE);
}

#[test]
fn damage_to_a_waiting_epoch_is_found_when_the_store_is_opened() {
    let root = root();
    let store = open(root.path(), Durability::Memory).unwrap();
    receive(&store, &small()).unwrap();
    receive(&store, &Step { id: id(1, 2), full: false, ..small() }).unwrap();
    assert_eq!(store.unfolded(), 1);
    let epoch = leftovers(&store).into_iter().find(|name| name.starts_with("epoch")).unwrap();
    let index = store.dir().join(epoch).join("index");
    drop(store);
    let mut bytes = fs::read(&index).unwrap();
    bytes[40] ^= 1;
    fs::write(&index, bytes).unwrap();
    assert!(matches!(open(root.path(), Durability::Memory), Err(OpenError::Damaged { .. })));
}

#[test]
fn one_agent_has_a_store() {
    let root = root();
    let store = open(root.path(), Durability::Memory).unwrap();
    assert!(matches!(open(root.path(), Durability::Memory), Err(OpenError::Busy(_))));
    drop(store);
    open(root.path(), Durability::Memory).unwrap();
}

#[test]
fn a_root_that_somebody_else_prepared_is_refused() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let root = root();
    let open_to_all = root.path().join("open");
    fs::create_dir(&open_to_all).unwrap();
    fs::set_permissions(&open_to_all, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(open(&open_to_all, Durability::Memory).is_err());
    let link = root.path().join("link");
    symlink(root.path(), &link).unwrap();
    assert!(open(&link, Durability::Memory).is_err());
}

#[test]
fn a_removed_store_leaves_nothing_and_takes_nothing_in() {
    let root = root();
    let store = open(root.path(), Durability::Disk).unwrap();
    receive(&store, &small()).unwrap();
    let other = store.clone();
    store.remove().unwrap();
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    assert_eq!(other.held(), None);
    assert!(matches!(other.begin(id(1, 2), None), Err(BeginError::Removed(_))));
    drop(other);
    assert_eq!(open(root.path(), Durability::Disk).unwrap().held(), None);
}
