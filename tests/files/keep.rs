//! A copy that holds something: what it has already is kept, and is what the records make of it all the same.

use standin::{
    delta::KEY_LEN,
    files::{HeldFiles, has_blocks, hashes},
};

use super::*;

const KEY: [u8; KEY_LEN] = [9; KEY_LEN];

impl Pair {
    /// A scanner that knows nothing, but what the copy says of itself.
    fn forget(&mut self) {
        self.scanner = Scanner::new(vec![Source::plain(self.source.path())]);
        self.scanner.reset();
        self.scanner.offer(self.held());
    }

    fn held(&self) -> HeldFiles {
        let mut held = HeldFiles::new(KEY);
        hashes(&Target::plain(self.copy.path()), &KEY, &mut |path, first, sums| {
            held.add(0, path.to_vec(), first, &sums).unwrap();
            true
        })
        .unwrap();
        held
    }

    /// As a standby does while it stages.
    fn check_kept(&self, records: &Records) {
        for (record, _) in records {
            if let FileRecord::Keep { path, runs, digest, .. } = record {
                assert!(
                    has_blocks(&Target::plain(self.copy.path()), path, runs, digest).unwrap(),
                    "{record:?}"
                );
            }
        }
    }
}

fn data_bytes(records: &Records) -> usize {
    records
        .iter()
        .filter(|(record, _)| matches!(record, FileRecord::Data { .. }))
        .map(|(_, body)| body.len())
        .sum()
}

#[test]
fn a_copy_that_went_its_own_way_equals_the_tree_after_any_history() {
    let (mut kept, mut sent) = (0, 0);
    for seed in 0..seeds(30) {
        let mut rng = Rng(seed + 1000);
        let mut pair = Pair::new();
        for epoch in 0..8 {
            for _ in 0..rng.below(30) {
                change(&mut rng, pair.source.path());
            }
            // The other host has run it, too.
            for _ in 0..rng.below(12) {
                change(&mut rng, pair.copy.path());
            }
            let mut records = Vec::new();
            if rng.below(4) > 0 {
                pair.forget();
                pair.scan(Phase::Running, &mut records);
                pair.check_kept(&records);
                for _ in 0..rng.below(12) {
                    change(&mut rng, pair.source.path());
                }
                if rng.below(3) == 0 {
                    swap(&mut rng, pair.source.path());
                    pair.scan(Phase::Running, &mut records);
                    swap(&mut rng, pair.source.path());
                }
            } else {
                pair.scanner.reset();
            }
            pair.scan(Phase::Frozen, &mut records);
            for _ in 0..rng.below(3) {
                // The standby dies in the middle and applies the epoch again, from the start.
                let part = rng.below(records.len() as u64 + 1) as usize;
                pair.apply(&records[..part], false);
            }
            pair.apply(&records, true);
            pair.check(&format!("seed {seed}, epoch {epoch}"));
            if rng.below(2) == 0 {
                pair.apply(&records, true);
                pair.check(&format!("seed {seed}, epoch {epoch} again"));
            }
            kept += records.iter().filter(|(record, _)| matches!(record, FileRecord::Keep { .. })).count();
            sent += data_bytes(&records);
        }
    }
    println!("{kept} files were kept in part, {sent} bytes sent");
    assert!(kept > 100);
}

#[test]
fn only_the_blocks_that_differ_are_sent() {
    let mut pair = Pair::new();
    let path = pair.source.path().join("file");
    let mut content: Vec<u8> = (0..64 * BLOCK_SIZE).map(|at| (at / BLOCK_SIZE + 1) as u8).collect();
    content.truncate(63 * BLOCK_SIZE + 100);
    fs::write(&path, &content).unwrap();
    pair.replicate();
    let write = |root: &Path, block: usize, byte: u8| {
        let file = fs::OpenOptions::new().write(true).open(root.join("file")).unwrap();
        file.write_all_at(&vec![byte; BLOCK_SIZE], (block * BLOCK_SIZE) as u64).unwrap();
    };
    // Either side has changed one, and one is empty by now; the copy has more behind its end.
    write(pair.source.path(), 3, 200);
    write(pair.source.path(), 9, 0);
    write(pair.copy.path(), 40, 201);
    write(pair.copy.path(), 41, 0);
    write(pair.copy.path(), 70, 202);
    pair.forget();
    let mut records = Vec::new();
    pair.scan(Phase::Running, &mut records);
    // The last block is shorter than the copy's.
    assert_eq!(data_bytes(&records), 3 * BLOCK_SIZE + 100);
    pair.scan(Phase::Frozen, &mut records);
    assert_eq!(data_bytes(&records), 3 * BLOCK_SIZE + 100);
    pair.check_kept(&records);
    for time in 0..2 {
        pair.apply(&records, true);
        pair.check(&format!("time {time}"));
    }
}

#[test]
fn blocks_that_are_not_there_are_found_out_before_anything_is_done() {
    let pair = Pair::new();
    let copy = Target::plain(pair.copy.path());
    fs::write(pair.copy.path().join("file"), vec![5; 2 * BLOCK_SIZE + 1]).unwrap();
    fs::hard_link(pair.copy.path().join("file"), pair.copy.path().join("further")).unwrap();
    fs::write(pair.copy.path().join("alone"), vec![5; 2 * BLOCK_SIZE + 1]).unwrap();
    symlink("alone", pair.copy.path().join("link")).unwrap();
    let digest = |len| *blake3::hash(&vec![5; len]).as_bytes();
    let has =
        |path: &str, runs: &[(u64, u64)], digest| has_blocks(&copy, path.as_bytes(), runs, &digest).unwrap();
    assert!(has("alone", &[(0, 2)], digest(2 * BLOCK_SIZE)));
    assert!(has("alone", &[(0, 1), (2, 1)], digest(BLOCK_SIZE + 1)));
    assert!(!has("alone", &[(0, 2)], digest(BLOCK_SIZE)));
    assert!(!has("alone", &[(2, 2)], digest(BLOCK_SIZE + 1)), "beyond its end");
    assert!(!has("alone", &[(u64::MAX, 2)], digest(1)));
    for path in ["file", "further", "link", "none", "alone/x"] {
        assert!(!has(path, &[(0, 1)], digest(BLOCK_SIZE)), "{path}");
    }
}

#[test]
fn what_no_scanner_says_of_kept_blocks_is_refused() {
    let pair = Pair::new();
    fs::write(pair.copy.path().join("file"), b"content").unwrap();
    let keep = |path: &str, runs| FileRecord::Keep { tree: 0, path: path.into(), runs, digest: [0; 32] };
    let whole = || {
        let mut receiver = Receiver::open(&[Target::plain(pair.copy.path())]).unwrap();
        receiver.apply(&FileRecord::Remove { tree: 0, path: Vec::new() }, b"").unwrap();
        receiver
    };
    let mut of_a_part = Receiver::open(&[Target::plain(pair.copy.path())]).unwrap();
    assert!(of_a_part.apply(&keep("file", vec![(0, 1)]), b"").is_err(), "of a tree that is not sent whole");
    assert!(whole().apply(&keep("../file", vec![(0, 1)]), b"").is_err());
    assert!(whole().apply(&keep("", vec![(0, 1)]), b"").is_err());
    let mut twice = whole();
    twice.apply(&keep("file", vec![(0, 2)]), b"").unwrap();
    assert!(twice.apply(&keep("file", vec![(1, 1)]), b"").is_err());
    // Of something else than a file, or nothing, nothing is kept.
    fs::create_dir(pair.copy.path().join("directory")).unwrap();
    let mut other = whole();
    for path in ["directory", "none"] {
        other.apply(&keep(path, vec![(0, u64::MAX)]), b"").unwrap();
        let kind = FileKind::Regular { size: 3 };
        let meta = FileMeta { kind, mode: 0o600, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
        other.apply(&FileRecord::Entry { tree: 0, path: path.into(), meta }, b"").unwrap();
    }
    drop(other.finish());
    for path in ["directory", "none"] {
        assert_eq!(fs::read(pair.copy.path().join(path)).unwrap(), [0; 3]);
    }
}
