use proptest::prelude::*;

use super::*;
use crate::{
    delta::{BatchHead, DIGEST_LEN, Form, Packing, PageRun},
    model::{Epoch, EpochId, Extent, Space, Term},
    wire::message::{FileKind, FileMeta, FileRecord, Manifest, SpaceMap},
};

type Frames = Vec<(FrameHead, Vec<u8>)>;

fn id(term: u64, epoch: u64) -> EpochId {
    EpochId { term: Term(term), epoch: Epoch(epoch) }
}

fn begin() -> (FrameHead, Vec<u8>) {
    (FrameHead::Begin { name: "db".parse().unwrap(), id: id(2, 7), base: Some(id(2, 6)) }, Vec::new())
}

fn listed(extents: Vec<Extent>) -> (FrameHead, Vec<u8>) {
    let spaces = vec![SpaceMap { space: Space::Task(1), extents }];
    (FrameHead::Manifest(Manifest { spaces }), Vec::new())
}

fn image(name: &str, offset: u64, more: bool, body: &[u8]) -> (FrameHead, Vec<u8>) {
    (FrameHead::Image { name: name.into(), offset, more }, body.to_vec())
}

fn write(frames: &Frames) -> Result<Vec<u8>, EpochError> {
    let mut writer = EpochWriter::new();
    let mut bytes = Vec::new();
    for (head, body) in frames {
        bytes.extend(writer.frame(head, body)?);
        bytes.extend(body);
    }
    bytes.extend(writer.end()?);
    assert_eq!(writer.bytes(), bytes.len() as u64);
    Ok(bytes)
}

/// Reads a stream as the transport does: `Ok` only if it ends with a right `End` and nothing behind it.
fn read(mut bytes: &[u8]) -> Result<Frames, String> {
    let mut reader = EpochReader::new();
    let mut frames = Frames::new();
    while !bytes.is_empty() {
        let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>().ok_or("cut in a header")?;
        let sizes = Header::decode(header).map_err(|e| e.to_string())?;
        let (head, rest) = rest.split_at_checked(sizes.head_len).ok_or("cut in a head")?;
        let (body, rest) = rest.split_at_checked(sizes.body_len).ok_or("cut in a body")?;
        if let Some(value) = reader.frame(header, head, body).map_err(|e| e.to_string())? {
            frames.push((value, body.to_vec()));
        }
        bytes = rest;
    }
    if reader.is_whole() { Ok(frames) } else { Err("no end".into()) }
}

fn any_space() -> impl Strategy<Value = Space> {
    prop_oneof![(1..1u32 << 22).prop_map(Space::Task), any::<u64>().prop_map(Space::Shared)]
}

fn any_pages() -> impl Strategy<Value = (FrameHead, Vec<u8>)> {
    let run = (0..1u64 << 34, 1..4u32, any::<bool>());
    (any_space(), prop::collection::vec(run, 1..20), any::<u8>(), any::<bool>()).prop_map(
        |(space, runs, fill, patches)| {
            let zero = |zero| zero && !patches;
            let runs: Vec<_> = runs
                .into_iter()
                .map(|(page, pages, is_zero)| PageRun { start: page * 4096, pages, zero: zero(is_zero) })
                .collect();
            let full: u32 = runs.iter().filter(|run| !run.zero).map(|run| run.pages).sum();
            let (form, len) = if patches {
                (Form::Patches { len: full * 9, digest: [fill; DIGEST_LEN] }, full * 9)
            } else {
                (Form::Pages, full * 4096)
            };
            let body = vec![fill; len as usize];
            (FrameHead::Pages(BatchHead { space, runs, form, packing: Packing::Raw }), body)
        },
    )
}

fn any_file() -> impl Strategy<Value = (FrameHead, Vec<u8>)> {
    let path = "[a-z]{1,8}(/[a-z]{1,8}){0,3}".prop_map(String::into_bytes);
    let kind = prop_oneof![
        (0..1u64 << 40).prop_map(|size| FileKind::Regular { size }),
        Just(FileKind::Directory),
        prop::collection::vec(1..=255u8, 1..80).prop_map(|target| FileKind::Symlink { target }),
        (any::<bool>(), any::<u64>()).prop_map(|(block, rdev)| FileKind::Device { block, rdev }),
    ];
    let body = prop::collection::vec(any::<u8>(), 1..2000);
    (path, kind, 0..=0o7777u32, any::<i64>(), body, 0..4).prop_map(|(path, kind, mode, at, body, which)| {
        let tree = 1;
        match which {
            0 => (FrameHead::File(FileRecord::Data { tree, path, offset: 4096 }), body),
            1 => (FrameHead::File(FileRecord::Remove { tree, path }), Vec::new()),
            2 => {
                let runs =
                    body.iter().enumerate().map(|(at, count)| (at as u64 * 300, u64::from(*count) + 1));
                let (runs, digest) = (runs.collect(), [mode as u8; 32]);
                (FrameHead::File(FileRecord::Keep { tree, path, runs, digest }), Vec::new())
            }
            _ => {
                let xattrs = vec![(b"user.note".to_vec(), body)];
                let meta = FileMeta { kind, mode, uid: 1000, gid: 0, mtime: (at, 5), xattrs };
                (FrameHead::File(FileRecord::Entry { tree, path, meta }), Vec::new())
            }
        }
    })
}

fn any_manifest() -> impl Strategy<Value = (FrameHead, Vec<u8>)> {
    prop::collection::vec((0..100u64, 1..100u64), 0..50).prop_map(|steps| {
        let mut at = 0;
        let extents = steps.into_iter().map(|(gap, pages)| {
            let start = at + gap * 4096;
            at = start + pages * 4096;
            Extent { start, pages }
        });
        listed(extents.collect())
    })
}

fn any_epoch() -> impl Strategy<Value = Frames> {
    let middle = prop::collection::vec(prop_oneof![any_pages(), any_file()], 0..12);
    (middle, prop::collection::vec(1..3000usize, 0..4), any_manifest()).prop_map(
        |(middle, images, manifest)| {
            let mut frames = vec![begin()];
            for (number, len) in images.into_iter().enumerate() {
                let name = format!("core-{number}.img");
                frames.push(image(&name, 0, true, &vec![1; len]));
                frames.push(image(&name, len as u64, false, b"end"));
            }
            frames.extend(middle);
            frames.push(manifest);
            frames
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn an_epoch_reads_back_as_it_was_written(frames in any_epoch()) {
        prop_assert_eq!(read(&write(&frames).unwrap()).unwrap(), frames);
    }

    #[test]
    fn a_cut_epoch_is_never_whole(frames in any_epoch(), at in any::<prop::sample::Index>()) {
        let bytes = write(&frames).unwrap();
        prop_assert!(read(&bytes[..at.index(bytes.len())]).is_err());
    }

    #[test]
    fn an_epoch_with_a_flipped_bit_is_never_whole(
        frames in any_epoch(),
        at in any::<prop::sample::Index>(),
        bit in 0..8u8,
    ) {
        let mut bytes = write(&frames).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn arbitrary_bytes_are_refused_without_a_panic(
        header in any::<[u8; HEADER_LEN]>(),
        kind in 1..7u8,
        head in prop::collection::vec(any::<u8>(), 0..300),
        body in prop::collection::vec(any::<u8>(), 0..50),
    ) {
        let _ = Header::decode(&header);
        let mut head = head;
        if let Some(first) = head.first_mut() {
            *first = kind - 1;
        }
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = frame::VERSION << 4 | kind;
        bytes[1..5].copy_from_slice(&(head.len() as u32).to_le_bytes());
        bytes[5..].copy_from_slice(&(body.len() as u32).to_le_bytes());
        let _ = EpochReader::new().frame(&bytes, &head, &body);
    }
}

#[test]
fn bytes_behind_the_end_are_refused() {
    let frames = vec![begin(), listed(vec![])];
    let mut bytes = write(&frames).unwrap();
    bytes.extend(write(&frames).unwrap());
    assert!(read(&bytes).unwrap_err().contains("out of order"));
}

#[test]
fn frames_out_of_order_are_refused() {
    let piece = || image("core-1.img", 0, true, b"a");
    let cases: [Frames; 7] = [
        vec![listed(vec![])],
        vec![begin(), begin()],
        vec![begin(), listed(vec![]), listed(vec![])],
        vec![begin(), listed(vec![]), image("core-1.img", 0, false, b"a")],
        vec![begin(), piece(), listed(vec![])],
        vec![begin(), piece(), image("core-2.img", 1, false, b"a")],
        vec![begin(), image("core-1.img", 1, false, b"a")],
    ];
    for frames in cases {
        assert!(write(&frames).is_err(), "{frames:?}");
    }
    assert!(matches!(write(&vec![begin()]), Err(EpochError::Order(Kind::End))));
}

#[test]
fn an_image_that_comes_twice_or_with_a_gap_is_refused() {
    let whole = || image("core-1.img", 0, false, b"a");
    assert!(matches!(write(&vec![begin(), whole(), whole()]), Err(EpochError::ImageTwice(_))));
    let gap = vec![begin(), image("a.img", 0, true, b"ab"), image("a.img", 3, false, b"c")];
    assert!(matches!(write(&gap), Err(EpochError::ImageGap { expected: 2, offset: 3, .. })));
}

#[test]
fn what_breaks_a_rule_is_refused_by_the_sender_already() {
    let run = |start, pages| Extent { start, pages };
    let batch = |runs: Vec<PageRun>, packing, body: usize| {
        let form = Form::Pages;
        (FrameHead::Pages(BatchHead { space: Space::Task(1), runs, form, packing }), vec![0; body])
    };
    let patches = |runs: Vec<PageRun>, len: u32| {
        let form = Form::Patches { len, digest: [0; DIGEST_LEN] };
        let head = BatchHead { space: Space::Task(1), runs, form, packing: Packing::Raw };
        (FrameHead::Pages(head), vec![0; len as usize])
    };
    let full = |start, pages| PageRun { start, pages, zero: false };
    let remove = |path: &[u8]| (FrameHead::File(FileRecord::Remove { tree: 0, path: path.into() }), vec![]);
    let bad: Frames = vec![
        listed(vec![run(4096, 1), run(0, 1)]),
        listed(vec![run(0, 2), run(4096, 1)]),
        listed(vec![run(5, 1)]),
        listed(vec![run(0, 0)]),
        listed(vec![run(0, u64::MAX)]),
        listed(vec![run(1 << 47, 1)]),
        batch(vec![], Packing::Raw, 0),
        batch(vec![full(0, 257)], Packing::Raw, 257 * 4096),
        batch(vec![full(0, 2)], Packing::Raw, 4096),
        batch(vec![full(0, 1)], Packing::Lz4, 0),
        batch(vec![full(0, 1)], Packing::Lz4, 4096),
        batch(vec![full(0, 1)], Packing::Zstd, 4096),
        patches(vec![full(0, 1)], 3073),
        patches(vec![full(0, 1), PageRun { start: 4096, pages: 1, zero: true }], 2),
        image("../x", 0, false, b""),
        image(".x", 0, false, b""),
        image("a/b", 0, false, b""),
        image("", 0, false, b""),
        image("a.img", u64::MAX, false, b"x"),
        remove(b"/etc"),
        remove(b"a/../b"),
        remove(b"a//b"),
        remove(b"a\0b"),
    ];
    for frame in bad {
        let kind = Kind::of(&frame.0);
        let refused = write(&vec![begin(), frame.clone()]);
        assert!(
            matches!(&refused, Err(EpochError::Frame(FrameError::Illegal { kind: k, .. })) if *k == kind),
            "{frame:?}: {refused:?}"
        );
    }
}

#[test]
fn hostile_lengths_are_refused_before_anything_is_allocated() {
    for kind in 1..7u8 {
        let mut header = [0xff; HEADER_LEN];
        header[0] = frame::VERSION << 4 | kind;
        assert!(matches!(Header::decode(&header), Err(FrameError::TooLong { .. })));
    }
    // A manifest that claims 2^60 address spaces in ten bytes.
    let mut head = vec![4u8, 253];
    head.extend((1u64 << 60).to_le_bytes());
    let header = Header { kind: Kind::Manifest, head_len: head.len(), body_len: 0 };
    let mut reader = EpochReader::new();
    assert!(matches!(reader.frame(&header.encode(), &head, &[]), Err(EpochError::Frame(_))));
    // And the reader stays failed.
    let (head, body) = begin();
    let bytes = frame::encode_frame(&head, body.len()).unwrap();
    let (header, head) = bytes.split_first_chunk().unwrap();
    assert!(matches!(reader.frame(header, head, &body), Err(EpochError::Failed)));
}

#[test]
fn the_largest_manifest_fits_its_limits() {
    let extents: Vec<_> =
        (0..380_000u64).map(|n| Extent { start: 0x7000_0000_0000 + n * 8192, pages: 1 }).collect();
    let frames = vec![begin(), listed(extents)];
    assert_eq!(read(&write(&frames).unwrap()).unwrap(), frames);
}
