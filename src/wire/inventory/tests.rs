use proptest::prelude::*;

use super::*;
use crate::model::{Epoch, PAGE_SIZE, Term};

const MAX: u64 = 1000;

fn ask(pages_max: u64, blocks_max: u64) -> Ask {
    Ask { name: "db".parse().unwrap(), key: [1; KEY_LEN], pages_max, blocks_max }
}

type Frames = Vec<(Held, Vec<u8>)>;

fn id() -> EpochId {
    EpochId { term: Term(2), epoch: Epoch(7) }
}

fn pages(start: u64, count: usize) -> (Held, Vec<u8>) {
    (Held::Pages { space: Space::Task(3), start: start * PAGE_SIZE }, vec![9; count * SUM_LEN])
}

fn write(frames: &Frames) -> Result<Vec<u8>, InventoryError> {
    let (mut writer, mut bytes) = (InventoryWriter::new(&ask(MAX, MAX)), Vec::new());
    for (held, body) in frames {
        bytes.extend(writer.frame(held.clone(), body)?);
        bytes.extend(body);
    }
    bytes.extend(writer.end()?);
    Ok(bytes)
}

/// As the transport does: `Ok` only with a right end and nothing behind it.
fn read(mut bytes: &[u8], pages_max: u64) -> Result<Frames, String> {
    let (mut reader, mut frames, all) =
        (InventoryReader::new(&ask(pages_max, MAX)), Frames::new(), bytes.len() as u64);
    loop {
        let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>().ok_or("cut in a header")?;
        let sizes = Header::decode(header).map_err(|e| e.to_string())?;
        let (head, rest) = rest.split_at_checked(sizes.head_len).ok_or("cut in a head")?;
        let (body, rest) = rest.split_at_checked(sizes.body_len).ok_or("cut in a body")?;
        bytes = rest;
        match reader.frame(header, head, body).map_err(|e| e.to_string())? {
            Some(held) => frames.push((held, body.to_vec())),
            None if bytes.is_empty() && reader.bytes() == all => return Ok(frames),
            None => return Err("bytes behind the end".into()),
        }
    }
}

fn any_inventory() -> impl Strategy<Value = Frames> {
    let space = prop_oneof![(1..1u32 << 22).prop_map(Space::Task), any::<u64>().prop_map(Space::Shared)];
    let run = (space, 0..1u64 << 34, prop::collection::vec(any::<[u8; SUM_LEN]>(), 1..40));
    let path = "[a-z]{1,8}(/[a-z]{1,8}){0,3}".prop_map(String::into_bytes);
    let file = (0..64u32, path, 0..BLOCKS_MAX, prop::collection::vec(any::<[u8; SUM_LEN]>(), 1..40));
    (prop::collection::vec(run, 0..20), prop::collection::vec(file, 0..15)).prop_map(|(runs, files)| {
        let pages = runs.into_iter().map(|(space, page, sums)| {
            (Held::Pages { space, start: page * PAGE_SIZE }, sums.as_flattened().to_vec())
        });
        let files = files.into_iter().map(|(tree, path, first, sums)| {
            (Held::File { tree, path, first }, sums.as_flattened().to_vec())
        });
        std::iter::once((Held::Epoch(id()), Vec::new())).chain(pages).chain(files).collect()
    })
}

proptest! {
    #[test]
    fn an_inventory_reads_back_and_one_that_was_cut_or_changed_does_not(
        frames in any_inventory(), cut in any::<prop::sample::Index>(), flip in 1..=255u8
    ) {
        let bytes = write(&frames).unwrap();
        prop_assert_eq!(read(&bytes, MAX).unwrap(), frames);
        let at = cut.index(bytes.len());
        prop_assert!(read(&bytes[..at], MAX).is_err());
        let mut changed = bytes;
        changed[at] ^= flip;
        prop_assert!(read(&changed, MAX).is_err());
    }

    #[test]
    fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(read(&bytes, MAX).is_err());
    }
}

#[test]
fn frames_out_of_order_or_beyond_what_was_asked_for_are_refused() {
    let epoch = || (Held::Epoch(id()), Vec::new());
    assert!(write(&vec![epoch(), pages(0, 1)]).is_ok());
    assert!(write(&vec![pages(0, 1)]).is_err(), "of no epoch");
    assert!(write(&vec![epoch(), epoch()]).is_err());
    assert!(write(&Frames::new()).is_ok(), "nothing is held");
    let file =
        |sums: usize| (Held::File { tree: 0, path: b"a/b".to_vec(), first: 0 }, vec![9; sums * SUM_LEN]);
    assert!(write(&vec![file(600), file(398)]).is_ok(), "of files alone; each counts one more");
    assert!(matches!(write(&vec![file(600), file(399)]), Err(InventoryError::TooMany)));
    assert!(write(&vec![epoch(), pages(0, 600), pages(600, 400)]).is_ok());
    assert!(matches!(write(&vec![epoch(), pages(0, 600), pages(600, 401)]), Err(InventoryError::TooMany)));
    let bytes = write(&vec![epoch(), pages(0, 600)]).unwrap();
    assert!(read(&bytes, 599).is_err());
    assert!(read(&[bytes.as_slice(), &[0]].concat(), MAX).is_err());
}

#[test]
fn hashes_that_cannot_be_are_refused() {
    for (held, len) in [
        (Held::Epoch(id()), 1),
        (Held::Epoch(EpochId::default()), 0),
        (Held::Pages { space: Space::Task(1), start: 0 }, 0),
        (Held::Pages { space: Space::Task(1), start: 0 }, SUM_LEN + 1),
        (Held::Pages { space: Space::Task(1), start: 1 }, SUM_LEN),
        (Held::Pages { space: Space::Task(0), start: 0 }, SUM_LEN),
        (Held::Pages { space: Space::Task(1), start: check::ADDRESS_END - PAGE_SIZE }, 2 * SUM_LEN),
        (Held::Pages { space: Space::Task(1), start: 0 }, (SUMS_MAX + 1) * SUM_LEN),
    ] {
        assert!(check_held(&held, len).is_err(), "{held:?} {len}");
    }
    for path in ["", "/a", "a//b", "..", "a/../b", "a\0"] {
        let held = Held::File { tree: 0, path: path.into(), first: 0 };
        assert!(check_held(&held, SUM_LEN).is_err(), "{path:?}");
    }
    assert!(check_held(&Held::File { tree: 64, path: b"a".to_vec(), first: 0 }, SUM_LEN).is_err());
    assert!(check_ask(&ask(PAGES_MAX, BLOCKS_MAX)).is_ok());
    assert!(check_ask(&ask(PAGES_MAX + 1, 0)).is_err());
    assert!(check_ask(&ask(1, BLOCKS_MAX + 1)).is_err());
    assert!(check_ask(&ask(0, 0)).is_err());
}

/// A piece that is left out makes a gap: a smaller one that would fit does not follow it.
#[test]
fn once_something_did_not_fit_nothing_of_its_kind_does() {
    let ask = Ask { name: "db".parse().unwrap(), key: [0; KEY_LEN], pages_max: 10, blocks_max: 10 };
    let pages = Held::Pages { space: Space::Task(1), start: 0x1000 };
    let file = Held::File { tree: 0, path: b"a".to_vec(), first: 0 };
    let mut room = Room::new(&ask);
    assert!(room.take(&pages, 6 * SUM_LEN) && room.take(&pages, 4 * SUM_LEN));
    assert!(!room.take(&pages, SUM_LEN));
    assert!(room.take(&file, 3 * SUM_LEN));
    assert!(!room.take(&file, 60 * SUM_LEN));
    assert!(!room.take(&file, SUM_LEN), "it would have fit before");
}
