//! A primary's encoder and the store.

use std::{collections::BTreeMap, path::Path};

use crate::{
    delta::{BATCH_PAGES_MAX, BatchHead, DecodeError, Encoder, Form, Known, Packing, PageRun},
    model::{Extent, PAGE_SIZE, Space},
    store::{
        Durability, StageError, Staging, Store,
        staging::space_order,
        tests::{Pages, Random, Step, id, leftovers, manifest_of, open, page_of, receive, root, small},
    },
    wire::message::{Manifest, SpaceMap},
};

/// A primary whose pages are known by their bytes, and its standby.
struct Pair {
    store: Store,
    known: Known,
    encoder: Encoder,
    next: u64,
    truth: BTreeMap<u64, Vec<u8>>,
}

const TASK: Space = Space::Task(2);

impl Pair {
    fn new(root: &Path) -> Self {
        let store = open(root, Durability::Memory).unwrap();
        let (known, encoder) = (Known::default(), Encoder::new());
        Self { store, known, encoder, next: 1, truth: BTreeMap::new() }
    }

    /// Pages that are written once or more in an epoch, each time encoded: what is staged, not committed yet.
    fn stage(&mut self, readings: &[Vec<(u64, Vec<u8>)>]) -> Result<Staging, StageError> {
        let base = self.store.held();
        let mut staging = self.store.begin(id(1, self.next), base).unwrap();
        self.next += 1;
        self.known.begin_epoch(base.is_some());
        for reading in readings {
            let starts: Vec<Extent> =
                reading.iter().map(|(page, _)| Extent { start: page * PAGE_SIZE, pages: 1 }).collect();
            let data: Vec<u8> = reading.iter().flat_map(|(_, page)| page.clone()).collect();
            self.known.mark_stale(TASK, &starts);
            let at = self.known.stamp();
            let mut batches = Vec::new();
            let emit = |head, body| batches.push((head, body));
            self.encoder.encode(&mut self.known, TASK, &starts, &data, at, emit);
            batches.iter().try_for_each(|(head, body)| staging.batch(head, body))?;
            self.truth.extend(reading.iter().cloned());
        }
        let pages: Pages = self.truth.keys().map(|page| ((space_order(TASK), *page), 1)).collect();
        staging.manifest(manifest_of(&pages))?;
        staging.image_file("core-2.img", b"x")?;
        Ok(staging)
    }

    fn assert_held(&self) {
        let view = self.store.view().unwrap();
        let mut page = [0; PAGE_SIZE as usize];
        for (at, content) in &self.truth {
            view.read_page(TASK, at * PAGE_SIZE, &mut page).unwrap();
            assert!(page[..] == **content, "page {at}");
        }
        view.verify().unwrap();
    }
}

/// A page that differs from its other versions by a few bytes, and does not compress: else it would go whole.
fn version_of(page: u64, version: u64) -> Vec<u8> {
    let mut content = page_of(0);
    blake3::Hasher::new().update(&page.to_le_bytes()).finalize_xof().fill(&mut content);
    content[(version % 500) as usize * 8..][..8].copy_from_slice(&version.to_le_bytes());
    content
}

#[test]
fn patches_are_resolved_against_the_image_the_waiting_epochs_and_what_was_staged_before() {
    let root = root();
    let mut pair = Pair::new(root.path());
    let mut random = Random(11);
    // More than a megabyte is staged in an epoch, so that what was staged is read from the log and from its buffer.
    for epoch in 0..12 {
        let mut readings = Vec::new();
        for reading in 0..3 {
            let mut pages: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
            for _ in 0..if epoch == 0 { 2_000 } else { 300 } {
                let page = random.below(1_500);
                let content =
                    if random.below(20) == 0 { page_of(0) } else { version_of(page, epoch * 3 + reading) };
                pages.insert(page, content);
            }
            readings.push(pages.into_iter().collect());
        }
        pair.stage(&readings).unwrap().commit().unwrap();
        pair.known.epoch_committed();
        pair.assert_held();
        if random.below(3) == 0 {
            pair.store.fold().unwrap();
            pair.assert_held();
        }
    }
    let stats = pair.encoder.stats();
    assert!(stats.patched * 2 > stats.sent, "{stats:?}");
}

#[test]
fn patches_of_another_base_are_refused_and_the_way_out_is_all_memory() {
    let root = root();
    let mut pair = Pair::new(root.path());
    let pages = |version| vec![(0..40).map(|page| (page, version_of(page, version))).collect::<Vec<_>>()];
    pair.stage(&pages(1)).unwrap().commit().unwrap();
    pair.known.epoch_committed();
    // An epoch of which the primary thinks that it was committed.
    drop(pair.stage(&pages(2)).unwrap());
    pair.known.epoch_committed();
    let error = pair.stage(&pages(3)).err().unwrap();
    assert!(matches!(error, StageError::Batch(DecodeError::Base { .. })), "{error}");
    assert!(error.needs_full());
    assert_eq!((pair.store.held(), leftovers(&pair.store).len()), (Some(id(1, 1)), 1));
    // As the session does: all memory, upon nothing.
    let mut staging = pair.store.begin(id(1, 9), None).unwrap();
    pair.known.epoch_failed();
    pair.known.begin_epoch(false);
    let (at, all) = (pair.known.stamp(), [Extent { start: 0, pages: 40 }]);
    let data: Vec<u8> = pair.truth.values().flatten().copied().collect();
    pair.encoder
        .encode(&mut pair.known, TASK, &all, &data, at, |head, body| staging.batch(&head, &body).unwrap());
    staging.image_file("core-2.img", b"x").unwrap();
    staging.manifest(Manifest { spaces: vec![SpaceMap { space: TASK, extents: all.to_vec() }] }).unwrap();
    staging.commit().unwrap();
    pair.assert_held();
}

#[test]
fn a_patch_of_what_is_not_held_is_refused() {
    let root = root();
    let store = open(root.path(), Durability::Memory).unwrap();
    receive(&store, &small()).unwrap();
    let patch = |page: u64, pages: u32| {
        let runs = vec![PageRun { start: page * PAGE_SIZE, pages, zero: false }];
        // "Nothing before the page's end", as often.
        let body = [0x80, 32].repeat(pages as usize);
        let form = Form::Patches { len: body.len() as u32, digest: [0; 16] };
        (BatchHead { space: Space::Task(2), runs, form, packing: Packing::Raw }, body)
    };
    let mut delta = store.begin(id(1, 2), store.held()).unwrap();
    for (page, pages) in [(6, 2), (4, 1), (1 << 30, BATCH_PAGES_MAX as u32)] {
        let (head, body) = patch(page, pages);
        let error = delta.batch(&head, &body).unwrap_err();
        assert!(matches!(error, StageError::NotHeld { .. }) && error.needs_full(), "{error}");
    }
    let (head, body) = patch(5, 2);
    assert!(matches!(delta.batch(&head, &body), Err(StageError::Batch(DecodeError::Base { .. }))));
    let mut full = store.begin(id(1, 3), None).unwrap();
    assert!(matches!(full.batch(&head, &body), Err(StageError::NoBase)));
    // Overtaken: what is held is not its base any more.
    let mut late = store.begin(id(1, 4), store.held()).unwrap();
    receive(&store, &Step { id: id(1, 5), ..small() }).unwrap();
    assert!(matches!(late.batch(&head, &body), Err(StageError::NoBase)));
}
