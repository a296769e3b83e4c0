//! Random histories of a writing process, passes, readings, epochs that commit or fail, and a standby that
//! holds only what it decoded.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    extents,
    model::{Extent, PAGE_SIZE},
    wire::message::{Manifest, SpaceMap},
};

const PAGE: usize = PAGE_SIZE as usize;
const PAGES: u64 = 24;
/// Across the border of two leaves.
const BASE: u64 = (512 - PAGES / 2) * PAGE_SIZE;
const SPACE: Space = Space::Task(1);

type Memory = BTreeMap<u64, Vec<u8>>;

fn page_of(value: u8) -> Vec<u8> {
    // 0 is a page of zeroes, odd values do not compress.
    if value.is_multiple_of(2) {
        vec![value; PAGE]
    } else {
        blake3::Hasher::new().update(&[value]).finalize_xof().bytes(PAGE)
    }
}

trait Bytes {
    fn bytes(self, len: usize) -> Vec<u8>;
}

impl Bytes for blake3::OutputReader {
    fn bytes(mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes);
        bytes
    }
}

/// What a standby does.
fn try_apply(memory: &mut Memory, head: &BatchHead, body: &[u8]) -> Result<(), DecodeError> {
    let mut decoder = Decoder::new();
    let decoded = decoder.decode(head, body, |start, buf| {
        for (i, page) in buf.chunks_mut(PAGE).enumerate() {
            page.copy_from_slice(&memory[&(start + i as u64 * PAGE_SIZE)]);
        }
        Ok::<_, DecodeError>(())
    })?;
    for (start, content) in decoded.runs() {
        let pages = match content {
            Content::Bytes(bytes) => bytes.chunks(PAGE).map(<[u8]>::to_vec).collect(),
            Content::Zero { pages } => vec![vec![0; PAGE]; pages as usize],
        };
        for (i, page) in pages.into_iter().enumerate() {
            memory.insert(start + i as u64 * PAGE_SIZE, page);
        }
    }
    Ok(())
}

fn apply(memory: &mut Memory, batches: &[(BatchHead, Vec<u8>)]) {
    for (head, body) in batches {
        try_apply(memory, head, body).unwrap();
    }
}

/// What happens in a history. Pages are numbers below [`PAGES`].
#[derive(Clone, Debug)]
enum Step {
    Write(u64, u8),
    /// A few bytes of a page.
    Poke(u64, usize, u8),
    Unmap(u64),
    /// A pass: its pages are marked.
    Pass,
    /// The marked pages are read, now; the reading is encoded later.
    Read,
    /// The oldest reading is encoded.
    Encode,
    /// Everything outstanding is encoded, the manifest is checked, the epoch is sent.
    Finish,
    Committed,
    /// The standby may have folded the oldest epoch in or not.
    Failed(bool),
    Clear,
    /// A page of the standby's image is another one now, if it has it; the primary forgets all, and is told by hashes of so
    /// many pages what is there.
    Offer(u64, u8, usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..PAGES, 0u8..6).prop_map(|(page, value)| Step::Write(page, value)),
        8 => (0..PAGES, 0..PAGE - 8, any::<u8>()).prop_map(|(page, at, value)| Step::Poke(page, at, value)),
        2 => (0..PAGES).prop_map(Step::Unmap),
        3 => Just(Step::Pass),
        3 => Just(Step::Read),
        2 => Just(Step::Encode),
        3 => Just(Step::Finish),
        2 => Just(Step::Committed),
        1 => any::<bool>().prop_map(Step::Failed),
        1 => Just(Step::Clear),
        1 => (0..PAGES, 0u8..6, 0..PAGES as usize).prop_map(|(page, value, told)| Step::Offer(page, value, told)),
    ]
}

struct Reading {
    at: ReadStamp,
    extents: Vec<Extent>,
    data: Vec<u8>,
}

type Flight = (Vec<(BatchHead, Vec<u8>)>, Vec<Extent>, Memory);

/// The primary, its process and the standby.
struct World {
    process: Memory,
    /// Pages written since the last pass, which the kernel would report.
    written: Vec<u64>,
    known: Known,
    encoder: Encoder,
    readings: Vec<Reading>,
    batches: Vec<(BatchHead, Vec<u8>)>,
    /// Epochs on their way: batches, manifest, and the memory at the freeze.
    flying: Vec<Flight>,
    standby: Memory,
    commits: usize,
    reference_pages: u64,
}

impl World {
    fn new(reference_pages: u64) -> Self {
        let mut known = Known::new(reference_pages * PAGE_SIZE);
        known.begin_epoch(false);
        Self {
            process: Memory::new(),
            written: Vec::new(),
            known,
            encoder: Encoder::new(),
            readings: Vec::new(),
            batches: Vec::new(),
            flying: Vec::new(),
            standby: Memory::new(),
            commits: 0,
            reference_pages,
        }
    }

    fn pass(&mut self) {
        let mut reported: Vec<Extent> =
            self.written.drain(..).map(|start| Extent { start, pages: 1 }).collect();
        extents::normalize(&mut reported);
        self.known.mark_stale(SPACE, &reported);
    }

    fn manifest(&self) -> Vec<Extent> {
        let mut pages = Vec::new();
        self.process.keys().for_each(|page| extents::push(&mut pages, *page, page + PAGE_SIZE));
        pages
    }

    fn read(&mut self) {
        let at = self.known.stamp();
        let wanted = self.known.missing(SPACE, &self.manifest());
        let pages = wanted.iter().flat_map(|e| (0..e.pages).map(|i| e.start + i * PAGE_SIZE));
        let data = pages.flat_map(|page| self.process[&page].clone()).collect();
        self.readings.push(Reading { at, extents: wanted, data });
    }

    fn encode(&mut self) {
        if self.readings.is_empty() {
            return;
        }
        let Reading { at, extents, data } = self.readings.remove(0);
        let emit = |head, body| self.batches.push((head, body));
        self.encoder.encode(&mut self.known, SPACE, &extents, &data, at, emit);
    }

    fn finish(&mut self) {
        // Frozen from here on: one more pass, the rest is read, all is encoded.
        self.pass();
        self.read();
        while !self.readings.is_empty() {
            self.encode();
        }
        let manifest = self.manifest();
        assert_eq!(self.known.missing(SPACE, &manifest), [], "a frozen epoch is whole");
        let spaces = vec![SpaceMap { space: SPACE, extents: manifest.clone() }];
        self.known.retain(&Manifest { spaces });
        self.flying.push((std::mem::take(&mut self.batches), manifest, self.process.clone()));
        self.known.begin_epoch(true);
        assert!(self.known.reference_bytes() <= self.reference_pages * PAGE_SIZE, "the limit holds");
    }

    fn fold(&mut self) {
        let (batches, manifest, frozen) = self.flying.remove(0);
        apply(&mut self.standby, &batches);
        let held = |page: &u64| manifest.iter().any(|e| (e.start..e.end()).contains(page));
        self.standby.retain(|page, _| held(page));
        assert_eq!(self.standby, frozen, "the standby holds the memory of the freeze");
        self.commits += 1;
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write(page, value) => {
                let page = BASE + page * PAGE_SIZE;
                self.process.insert(page, page_of(value));
                self.written.push(page);
            }
            Step::Poke(page, at, value) => {
                let page = BASE + page * PAGE_SIZE;
                let bytes = self.process.entry(page).or_insert_with(|| page_of(3));
                bytes[at..at + 8].fill(value);
                self.written.push(page);
            }
            Step::Unmap(page) => {
                self.process.remove(&(BASE + page * PAGE_SIZE));
                self.written.retain(|written| self.process.contains_key(written));
            }
            Step::Pass => self.pass(),
            Step::Read => self.read(),
            Step::Encode => self.encode(),
            Step::Finish => self.finish(),
            Step::Committed if !self.flying.is_empty() => {
                self.fold();
                self.known.epoch_committed();
            }
            Step::Failed(folded) if !self.flying.is_empty() => {
                if folded {
                    self.fold();
                }
                self.flying.clear();
                self.batches.clear();
                self.known.epoch_failed();
                self.known.begin_epoch(self.commits > 0);
            }
            Step::Clear => {
                self.flying.clear();
                self.batches.clear();
                self.known.begin_epoch(false);
            }
            Step::Offer(page, value, told) => {
                self.flying.clear();
                self.batches.clear();
                if let Some(page) = self.standby.get_mut(&(BASE + page * PAGE_SIZE)) {
                    *page = page_of(value);
                }
                self.known.offer(offered(&self.standby, told));
                self.known.begin_epoch(true);
            }
            Step::Committed | Step::Failed(_) => {}
        }
    }
}

/// What a standby tells of the first pages that it has.
fn offered(standby: &Memory, told: usize) -> Offered {
    let key = [told as u8; KEY_LEN];
    let mut offered = Offered::new(key, PAGES);
    for (page, content) in standby.iter().take(told) {
        let mut sums = Vec::new();
        sums_of(&key, content, &mut sums);
        offered.add(SPACE, *page, &sums).unwrap();
    }
    offered
}

#[test]
fn of_an_image_that_is_told_of_only_what_differs_is_sent() {
    let mut world = World::new(PAGES);
    for page in 0..PAGES {
        world.step(&Step::Write(page, page as u8));
    }
    world.finish();
    world.step(&Step::Committed);
    // Another agent, which knows nothing.
    world.known = Known::default();
    world.step(&Step::Write(3, 77));
    world.known.offer(offered(&world.standby, PAGES as usize));
    world.known.begin_epoch(true);
    world.finish();
    let sent: Vec<_> = world.flying[0].0.iter().flat_map(|(head, _)| head.runs.clone()).collect();
    assert_eq!(sent, [PageRun { start: BASE + 3 * PAGE_SIZE, pages: 1, zero: false }]);
    // Page 0 is of zeros, which cost nothing in a full copy either.
    assert_eq!(world.known.offered_same_bytes(), (PAGES - 2) * PAGE_SIZE);
    world.step(&Step::Committed);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_dirty_page_is_never_lost(
        steps in proptest::collection::vec(step(), 1..160),
        reference_pages in prop_oneof![Just(0), 1..6u64, Just(PAGES)],
        rate in prop_oneof![Just(1u64 << 20), Just(1 << 40)],
    ) {
        let mut world = World::new(reference_pages);
        world.encoder.link().shipped(rate, std::time::Duration::from_secs(1));
        for step in &steps {
            world.step(step);
        }
        world.finish();
        while !world.flying.is_empty() {
            world.step(&Step::Committed);
        }
        prop_assert!(world.commits > 0);
    }

    #[test]
    fn a_hostile_batch_is_refused_or_decoded_but_never_more(
        runs in proptest::collection::vec(
            (prop_oneof![0u64..4, any::<u64>()], prop_oneof![0u32..5, any::<u32>()], any::<bool>()), 0..6),
        aligned: bool, packing in prop_oneof![Just(Packing::Raw), Just(Packing::Lz4), Just(Packing::Zstd)],
        patches in proptest::option::of((0u32..5000, any::<[u8; DIGEST_LEN]>())),
        body in proptest::collection::vec(any::<u8>(), 0..9000),
        length in proptest::option::of(0usize..3),
    ) {
        let shift = |start: u64| if aligned { start.wrapping_mul(PAGE_SIZE) } else { start };
        let runs: Vec<_> =
            runs.into_iter().map(|(start, pages, zero)| PageRun { start: shift(start), pages, zero }).collect();
        let mut body = body;
        if let Some(pages) = length {
            body.resize(pages * PAGE, 7);
        }
        let form = patches.map_or(Form::Pages, |(len, digest)| Form::Patches { len, digest });
        let head = BatchHead { space: SPACE, runs, form, packing };
        let mut decoder = Decoder::new();
        let Ok(decoded) = decoder.decode::<DecodeError>(&head, &body, |_, _| Ok(())) else { return Ok(()) };
        prop_assert_eq!(decoded.runs().count(), head.runs.len());
        for (start, content) in decoded.runs() {
            let pages = match content {
                Content::Bytes(bytes) => (bytes.len() / PAGE) as u64,
                Content::Zero { pages } => pages.into(),
            };
            assert!(pages > 0 && start % PAGE_SIZE == 0 && start + pages * PAGE_SIZE <= ADDRESS_END);
        }
    }

    #[test]
    fn a_wrong_base_is_found_or_does_not_matter(
        changes in proptest::collection::vec((0..PAGE, 1usize..200, any::<u8>()), 1..5),
        wrong_at in 0..PAGE, wrong_by in 1u8..,
    ) {
        let (mut known, mut encoder, mut standby) = (Known::default(), Encoder::new(), Memory::new());
        let mut page = page_of(5);
        known.begin_epoch(false);
        apply(&mut standby, &encode_all(&mut encoder, &mut known, &page));
        known.epoch_committed();
        known.begin_epoch(true);
        for (at, len, value) in changes {
            page[at..(at + len).min(PAGE)].fill(value);
        }
        let batches = encode_all(&mut encoder, &mut known, &page);
        standby.get_mut(&BASE).unwrap()[wrong_at] ^= wrong_by;
        for (head, body) in &batches {
            prop_assert!(head.form != Form::Pages);
            match try_apply(&mut standby, head, body) {
                Ok(()) => prop_assert!(standby[&BASE] == page),
                Err(error) => {
                    let expected = matches!(error, DecodeError::Base { .. });
                    prop_assert!(expected, "{error}");
                }
            }
        }
    }
}

fn encode_all(encoder: &mut Encoder, known: &mut Known, data: &[u8]) -> Vec<(BatchHead, Vec<u8>)> {
    let at = known.stamp();
    let whole = [Extent { start: BASE, pages: (data.len() / PAGE) as u64 }];
    let mut batches = Vec::new();
    encoder.encode(known, SPACE, &whole, data, at, |head, body| batches.push((head, body)));
    batches
}

#[test]
fn an_unchanged_page_is_not_sent_again_and_one_of_a_failed_epoch_is() {
    let (mut known, mut encoder) = (Known::default(), Encoder::new());
    let data = [page_of(3), page_of(0), page_of(2)].concat();
    known.begin_epoch(false);
    assert_eq!(encode_all(&mut encoder, &mut known, &data).len(), 1);
    known.epoch_committed();
    known.mark_stale(SPACE, &[Extent { start: BASE, pages: 3 }]);
    assert!(!known.is_known(SPACE, BASE));
    known.begin_epoch(true);
    assert!(encode_all(&mut encoder, &mut known, &data).is_empty());
    assert!(known.is_known(SPACE, BASE));
    let changed = [page_of(5), page_of(0), page_of(2)].concat();
    assert_eq!(encode_all(&mut encoder, &mut known, &changed)[0].0.runs.len(), 1);
    known.epoch_failed();
    assert_eq!(
        known.missing(SPACE, &[Extent { start: BASE, pages: 3 }]),
        [Extent { start: BASE, pages: 1 }],
        "what was not sent in the failed epoch is known still"
    );
    let stats = encoder.stats();
    assert_eq!((stats.pages, stats.unchanged, stats.zero, stats.sent), (9, 5, 1, 3));
}

#[test]
fn a_reading_older_than_the_last_pass_changes_nothing() {
    let (mut known, mut encoder) = (Known::default(), Encoder::new());
    let page = [Extent { start: BASE, pages: 1 }];
    known.begin_epoch(false);
    let before = known.stamp();
    known.mark_stale(SPACE, &page);
    encoder.encode(&mut known, SPACE, &page, &page_of(3), before, |_, _| panic!("was sent"));
    assert_eq!(known.missing(SPACE, &page), page);
    let after = known.stamp();
    let mut sent = 0;
    encoder.encode(&mut known, SPACE, &page, &page_of(3), after, |_, _| sent += 1);
    assert_eq!((sent, known.missing(SPACE, &page).len()), (1, 0));
}

#[test]
fn a_large_reading_is_cut_into_batches_within_the_limits() {
    let (mut known, mut encoder) = (Known::default(), Encoder::new());
    known.begin_epoch(false);
    // Zero and other pages in turn: the runs are the limit; then many pages of one run.
    let mixed: Vec<u8> = (0..10_000u32).flat_map(|i| page_of((i % 2) as u8)).collect();
    let batches = encode_all(&mut encoder, &mut known, &mixed);
    let mut memory = Memory::new();
    apply(&mut memory, &batches);
    assert!(batches.len() >= 10_000 / 2 / BATCH_PAGES_MAX);
    assert!(memory.values().flatten().eq(mixed.iter()));
}

#[test]
fn pages_that_do_not_compress_go_raw_and_the_others_packed() {
    let (mut known, mut encoder) = (Known::default(), Encoder::new());
    known.begin_epoch(false);
    let noise = blake3::Hasher::new().finalize_xof().bytes(PAGE * BATCH_PAGES_MAX * 3);
    let raw = encode_all(&mut encoder, &mut known, &noise);
    assert!(
        raw.iter().all(|(head, body)| head.packing == Packing::Raw && body.len() == PAGE * BATCH_PAGES_MAX)
    );
    known.begin_epoch(false);
    encoder.link().shipped(100 << 20, std::time::Duration::from_secs(1));
    let text: Vec<u8> = (0..PAGE * BATCH_PAGES_MAX * 40).map(|i| (i / 300) as u8 | 1).collect();
    let packed = encode_all(&mut encoder, &mut known, &text);
    assert!(packed.iter().filter(|(head, _)| head.packing != Packing::Raw).count() > 30);
    let mut memory = Memory::new();
    apply(&mut memory, &packed);
    assert!(memory.values().flatten().eq(text.iter()));
}

#[test]
fn a_reading_from_before_a_manifest_does_not_bring_back_what_it_dropped() {
    let (mut known, mut encoder) = (Known::default(), Encoder::new());
    let page = [Extent { start: BASE, pages: 1 }];
    known.begin_epoch(false);
    let before = known.stamp();
    known.mark_stale(SPACE, &page);
    // The mark goes with the page.
    known.retain(&Manifest::default());
    encoder.encode(&mut known, SPACE, &page, &page_of(3), before, |_, _| panic!("was sent"));
    assert!(!known.is_known(SPACE, BASE));
}

#[test]
fn a_manifest_keeps_its_pages_and_drops_the_others() {
    let (mut known, mut encoder) = (Known::default(), Encoder::new());
    known.begin_epoch(false);
    let data: Vec<u8> = (0..1600u32).flat_map(|i| page_of(i as u8)).collect();
    encode_all(&mut encoder, &mut known, &data);
    let all = [Extent { start: BASE, pages: 1600 }];
    let kept: Vec<Extent> = [(0, 1), (3, 2), (400, 700), (1599, 1)]
        .map(|(page, pages)| Extent { start: BASE + page * PAGE_SIZE, pages })
        .into();
    known.retain(&Manifest { spaces: vec![SpaceMap { space: SPACE, extents: kept.clone() }] });
    assert_eq!(known.missing(SPACE, &all), extents::subtract(&all, &kept));
    assert_eq!(known.missing(Space::Shared(1), &all), all);
}

/// Pages that change by a few bytes in every epoch; the bytes that all but the first took.
fn small_changes(encoder: &mut Encoder, known: &mut Known, pages: u64, epochs: u8) -> u64 {
    let mut data: Vec<u8> = (0..pages).flat_map(|i| page_of(i as u8 | 1)).collect();
    let mut standby = Memory::new();
    let mut first = 0;
    for epoch in 0..epochs {
        known.begin_epoch(epoch > 0);
        data.chunks_mut(PAGE).for_each(|page| page[100..104].fill(epoch));
        apply(&mut standby, &encode_all(encoder, known, &data));
        assert!(standby.values().flatten().eq(data.iter()));
        known.epoch_committed();
        first = if epoch == 0 { encoder.stats().body_bytes } else { first };
    }
    encoder.stats().body_bytes - first
}

#[test]
fn a_small_change_costs_few_bytes_as_far_as_there_are_copies() {
    let (mut known, mut encoder) = (Known::default(), Encoder::new());
    let bytes = small_changes(&mut encoder, &mut known, 600, 20);
    assert!(bytes < 19 * 600 * 10, "{bytes}");
    assert_eq!(encoder.stats().patched, 19 * 600);
    // For a third of the pages: those keep their copies, although the others come by in every epoch too.
    let (mut known, mut encoder) = (Known::new(200 * PAGE_SIZE), Encoder::new());
    small_changes(&mut encoder, &mut known, 600, 20);
    assert_eq!(encoder.stats().patched, 19 * 200);
    assert_eq!(known.reference_bytes(), 200 * PAGE_SIZE);
}

#[test]
fn an_epoch_without_a_base_has_no_patches() {
    let (mut known, mut encoder) = (Known::default(), Encoder::new());
    known.begin_epoch(false);
    let mut page = page_of(3);
    encode_all(&mut encoder, &mut known, &page);
    page[7] = 0;
    let again = encode_all(&mut encoder, &mut known, &page);
    assert!(again.iter().all(|(head, _)| head.form == Form::Pages));
    assert_eq!(encoder.stats().sent, 2);
}

#[test]
fn on_a_link_faster_than_the_processor_pages_go_as_they_are() {
    let (mut known, mut encoder) = (Known::default(), Encoder::new());
    encoder.link().shipped(1 << 36, std::time::Duration::from_secs(1));
    small_changes(&mut encoder, &mut known, 300, 4);
    assert_eq!(encoder.stats().patched, 0);
}
