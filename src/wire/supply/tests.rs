use proptest::prelude::*;

use super::*;
use crate::wire::{
    codec::{decode_message, encode_message, message_len},
    message::{FileKind, FileMeta},
};
use crate::workload::spec::Daemon;

const DIGEST: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const PLENTY: Size = Size { stream_bytes: 1 << 30, room_bytes: 1 << 30 };

fn an_image() -> Supply {
    let (id, name) = (format!("sha256:{DIGEST}"), "registry.example:5000/app/db:7.2".to_owned());
    Supply::Image(ImageId { daemon: Daemon::Docker, id, name })
}

fn files() -> Supply {
    Supply::Files(Lent { inside: "/etc/db".into(), digest: DIGEST.into(), is_file: false })
}

fn entry(tree: u32, path: &str) -> (FrameHead, Vec<u8>) {
    let kind = FileKind::Regular { size: 4 };
    let meta = FileMeta { kind, mode: 0o644, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
    (FrameHead::File(FileRecord::Entry { tree, path: path.into(), meta }), Vec::new())
}

fn data(body: &[u8]) -> (FrameHead, Vec<u8>) {
    (FrameHead::File(FileRecord::Data { tree: 0, path: b"a".into(), offset: 0 }), body.into())
}

fn piece(body: &[u8]) -> (FrameHead, Vec<u8>) {
    (FrameHead::Piece, body.into())
}

fn write(supply: &Supply, size: Size, frames: &[(FrameHead, Vec<u8>)]) -> Result<Vec<u8>, SupplyError> {
    let mut writer = SupplyWriter::new(supply, size);
    let mut bytes = Vec::new();
    for (head, body) in frames {
        bytes.extend(writer.frame(head, body)?);
        bytes.extend(body);
    }
    bytes.extend(writer.end()?);
    Ok(bytes)
}

/// Reads a stream as the transport does: `Ok` only if it ends with a right `End` and nothing behind it.
fn read(supply: &Supply, size: Size, mut bytes: &[u8]) -> Result<Vec<(FrameHead, Vec<u8>)>, String> {
    let mut reader = SupplyReader::new(supply, size);
    let mut frames = Vec::new();
    loop {
        let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>().ok_or("cut in a header")?;
        let sizes = Header::decode(header).map_err(|e| e.to_string())?;
        let (head, rest) = rest.split_at_checked(sizes.head_len).ok_or("cut in a head")?;
        let (body, rest) = rest.split_at_checked(sizes.body_len).ok_or("cut in a body")?;
        match reader.frame(header, head, body).map_err(|e| e.to_string())? {
            Some(value) => frames.push((value, body.to_vec())),
            None if rest.is_empty() => return Ok(frames),
            None => return Err("something follows".into()),
        }
        bytes = rest;
    }
}

#[test]
fn a_supply_reads_back_as_written_and_only_whole() {
    for (supply, frames) in [
        (an_image(), vec![piece(b"archive"), piece(&[7; 100_000])]),
        (files(), vec![entry(0, ""), entry(0, "a"), data(b"text")]),
    ] {
        let frames: Vec<_> = frames
            .into_iter()
            .map(|(head, body)| match head {
                // The root is a directory.
                FrameHead::File(FileRecord::Entry { tree, path, mut meta }) if path.is_empty() => {
                    meta.kind = FileKind::Directory;
                    (FrameHead::File(FileRecord::Entry { tree, path, meta }), body)
                }
                other => (other, body),
            })
            .collect();
        let bytes = write(&supply, PLENTY, &frames).unwrap();
        assert_eq!(read(&supply, PLENTY, &bytes).unwrap(), frames);
        let exact = Size { stream_bytes: bytes.len() as u64, room_bytes: 0 };
        assert_eq!(read(&supply, exact, &bytes).unwrap(), frames);
        for end in 0..bytes.len().min(3000) {
            assert!(read(&supply, PLENTY, &bytes[..end]).is_err(), "cut at {end}");
        }
        let less = Size { stream_bytes: bytes.len() as u64 - 1, room_bytes: 0 };
        assert!(read(&supply, less, &bytes).unwrap_err().contains("announced"));
        let mut behind = bytes.clone();
        behind.push(0);
        assert!(read(&supply, PLENTY, &behind).is_err());
    }
}

#[test]
fn what_does_not_belong_to_a_supply_is_refused() {
    assert!(write(&an_image(), PLENTY, &[entry(0, "a")]).is_err());
    assert!(write(&files(), PLENTY, &[piece(b"x")]).is_err());
    assert!(write(&files(), PLENTY, &[entry(1, "a")]).is_err(), "another tree");
    assert!(write(&files(), PLENTY, &[entry(0, "../a")]).is_err());
    assert!(write(&an_image(), PLENTY, &[piece(b"")]).is_err(), "it would never end");
    let other = write(&an_image(), PLENTY, &[piece(b"x")]).unwrap();
    assert!(read(&files(), PLENTY, &other).is_err());
    let end = (FrameHead::End { digest: [0; 32] }, Vec::new());
    assert!(write(&an_image(), PLENTY, &[end]).is_err());
}

#[test]
fn requests_that_would_reach_elsewhere_are_refused() {
    let ship = |supply| SupplyRequest::Ship { name: "db".parse().unwrap(), supply, size: PLENTY };
    let round = |mut request: SupplyRequest| {
        let bytes = encode_message(&request).unwrap();
        let (prefix, rest) = bytes.split_first_chunk().unwrap();
        assert_eq!(message_len::<SupplyRequest>(*prefix).unwrap(), rest.len());
        let decoded = decode_message::<SupplyRequest>(rest).map_err(|e| e.to_string());
        assert_eq!(decoded.is_ok(), request.check().is_ok());
        decoded.inspect(|decoded| assert_eq!(*decoded, request))
    };
    round(ship(an_image())).unwrap();
    round(ship(files())).unwrap();
    let Supply::Image(image) = an_image() else { unreachable!() };
    for id in ["", "sha256:", "../x", "sha256:0123/../../containers"] {
        round(ship(Supply::Image(ImageId { id: id.into(), ..image.clone() }))).unwrap_err();
    }
    for name in ["", "a b", "a?force=true", "a&b", "a%2e", "a\n"] {
        round(ship(Supply::Image(ImageId { name: name.into(), ..image.clone() }))).unwrap_err();
    }
    let Supply::Files(lent) = files() else { unreachable!() };
    for digest in ["", "..", "../../x", &DIGEST.to_uppercase(), &format!("{DIGEST}0")] {
        round(ship(Supply::Files(Lent { digest: digest.into(), ..lent.clone() }))).unwrap_err();
    }
    for inside in ["etc", "/etc/../x", ""] {
        round(ship(Supply::Files(Lent { inside: inside.into(), ..lent.clone() }))).unwrap_err();
    }
    let ask = |files: Vec<PathBuf>| SupplyRequest::Ask { name: "db".parse().unwrap(), image: None, files };
    round(ask(vec!["/etc/db".into()])).unwrap();
    round(ask(vec!["etc/db".into()])).unwrap_err();
    round(ask(vec!["/etc/db".into(); FILES_MAX + 1])).unwrap_err();
}

#[test]
fn what_a_standby_says_is_safe_to_print() {
    let mut answer = SupplyAnswer::Refused { reason: "\x1b[31m".repeat(4096) };
    answer.check().unwrap();
    let SupplyAnswer::Refused { reason } = answer else { unreachable!() };
    assert!(reason.len() <= check::REASON_LEN_MAX && !reason.contains(char::is_control));
    assert!(SupplyAnswer::Lacks { image: true, files: vec![1, 1] }.check().is_err());
    assert!(SupplyAnswer::Lacks { image: true, files: vec![0, 3] }.check().is_ok());
}

proptest! {
    #[test]
    fn a_supply_that_was_changed_on_the_way_is_refused(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 1..6),
        at in any::<prop::sample::Index>(),
        bit in 0..8u32,
    ) {
        let frames: Vec<_> = bodies.iter().map(|body| piece(body)).collect();
        let mut bytes = write(&an_image(), PLENTY, &frames).unwrap();
        prop_assert_eq!(&read(&an_image(), PLENTY, &bytes).unwrap(), &frames);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(read(&an_image(), PLENTY, &bytes).is_err());
    }

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = read(&an_image(), PLENTY, &bytes);
        let _ = read(&files(), PLENTY, &bytes);
        let _ = decode_message::<SupplyRequest>(&bytes);
        let _ = decode_message::<SupplyAnswer>(&bytes);
    }
}
