//! Replicated file trees on real directories: histories of random changes, hostile records, the scanner
//! beside a running writer.

mod keep;
mod overlay;
mod reflink;
mod sys;
mod tracking;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsString,
    fs,
    os::unix::{
        ffi::OsStringExt,
        fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use standin::{
    files::{BLOCK_SIZE, InUse, Phase, Receiver, Scanner, Source, Target, verify},
    wire::message::{FileKind, FileMeta, FileRecord},
};
use tempfile::TempDir;

type Records = Vec<(FileRecord, Vec<u8>)>;

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % end
    }
}

struct Pair {
    source: TempDir,
    copy: TempDir,
    scanner: Scanner,
    in_use: InUse,
}

impl Pair {
    fn new() -> Self {
        Self::new_in(&std::env::temp_dir())
    }

    /// The source is on the file system of `dir`.
    fn new_in(dir: &Path) -> Self {
        let source = TempDir::new_in(dir).unwrap();
        let scanner = Scanner::new(vec![Source::plain(source.path())]);
        Self { source, copy: TempDir::new().unwrap(), scanner, in_use: InUse::default() }
    }

    fn scan(&mut self, phase: Phase, records: &mut Records) {
        let emit = &mut |record, body: &[u8]| records.push((record, body.to_vec()));
        self.scanner.scan(phase, &self.in_use, emit).unwrap();
    }

    fn scanned(&mut self) -> Records {
        let mut records = Vec::new();
        self.scan(Phase::Frozen, &mut records);
        records
    }

    fn apply(&self, records: &[(FileRecord, Vec<u8>)], finish: bool) {
        let mut receiver = Receiver::open(&[Target::plain(self.copy.path())]).unwrap();
        for (record, body) in records {
            receiver.apply(record, body).unwrap_or_else(|error| panic!("{error}: {record:?}"));
        }
        if finish {
            receiver.finish().unwrap();
        }
    }

    fn replicate(&mut self) -> Records {
        let records = self.scanned();
        self.apply(&records, true);
        self.check("replicated");
        records
    }

    fn check(&self, context: &str) {
        let (source, copy) = (contents(self.source.path()), contents(self.copy.path()));
        let paths: HashSet<_> = source.keys().chain(copy.keys()).collect();
        for path in paths {
            assert_eq!(source.get(path), copy.get(path), "{context}: {}", path.display());
        }
        verify(vec![self.copy.path().to_owned()], &self.scanner.digest().unwrap()).unwrap();
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Found {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    rdev: u64,
    target: Option<PathBuf>,
    content: Option<[u8; 32]>,
    xattr: Option<Vec<u8>>,
    /// The first path of the same file.
    same_as: PathBuf,
}

/// Everything below a root, found by other means than the scanner's.
fn contents(root: &Path) -> BTreeMap<PathBuf, Found> {
    let mut found = BTreeMap::new();
    let mut paths = vec![root.to_owned()];
    let mut all = Vec::new();
    while let Some(path) = paths.pop() {
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            paths.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        all.push(path);
    }
    all.sort();
    let mut firsts = HashMap::new();
    for path in all {
        let meta = fs::symlink_metadata(&path).unwrap();
        let relative = path.strip_prefix(root).unwrap().to_owned();
        let same_as = firsts.entry(meta.ino()).or_insert_with(|| relative.clone()).clone();
        let one = Found {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            rdev: meta.rdev(),
            target: meta.is_symlink().then(|| fs::read_link(&path).unwrap()),
            content: meta.is_file().then(|| *blake3::hash(&fs::read(&path).unwrap()).as_bytes()),
            xattr: (meta.is_file() || meta.is_dir()).then(|| sys::xattr(&path, "user.note")).flatten(),
            same_as,
        };
        found.insert(relative, one);
    }
    found
}

fn a_path(rng: &mut Rng, root: &Path) -> PathBuf {
    // Few names, so that histories meet; one that sorts between a directory and what is in it; one that is no
    // UTF-8.
    let names = [b"a".to_vec(), b"a-b".to_vec(), b"b".to_vec(), b"c\xff".to_vec(), b"d".to_vec()];
    let mut path = root.to_owned();
    for _ in 0..=rng.below(3) {
        path.push(OsString::from_vec(names[rng.below(5) as usize].clone()));
    }
    path
}

fn write_somewhere(rng: &mut Rng, path: &Path) {
    let size = fs::metadata(path).map_or(0, |meta| meta.len());
    let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(path);
    let Ok(file) = file else { return };
    let offset = rng.below(size + 200_000);
    let byte = rng.below(3) as u8;
    let len = rng.below(150_000) as usize;
    let _ = file.write_all_at(&vec![byte; len], offset);
}

/// One random change; many do nothing because the path does not fit.
fn change(rng: &mut Rng, root: &Path) {
    let (path, other) = (a_path(rng, root), a_path(rng, root));
    let is_file = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
    let is_dir = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir());
    let exists = fs::symlink_metadata(&path).is_ok();
    match rng.below(16) {
        0..=2 if is_file || !exists => write_somewhere(rng, &path),
        3 => drop(fs::create_dir_all(&path)),
        4 => drop(fs::rename(&path, &other)),
        5 => drop(fs::remove_file(&path)),
        6 if rng.below(3) == 0 => drop(fs::remove_dir_all(&path)),
        7 => drop(symlink(&other, &path)),
        8 => drop(fs::hard_link(&path, &other)),
        9 if is_file || is_dir => {
            let mode = [0o755, 0o4711, 0o1777, 0o000][rng.below(4) as usize];
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        10 if exists => lchown(&path, Some(rng.below(3) as u32), Some(7)).unwrap(),
        11 if is_file || is_dir => sys::set_xattr(&path, "user.note", &[rng.below(9) as u8; 5]),
        12 if is_file || is_dir => sys::remove_xattr(&path, "user.note"),
        13 if !exists => drop(nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)),
        14 if is_file => {
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            let size = [0, 1, 65_536, 100_000, 300_000][rng.below(5) as usize];
            file.set_len(size).unwrap();
        }
        15 if is_file => {
            let time = std::time::UNIX_EPOCH + std::time::Duration::new(rng.below(1 << 31), 12_345);
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_modified(time).unwrap();
        }
        _ => {}
    }
}

/// Two entries change places: what is in them keeps every property, under other paths.
fn swap(rng: &mut Rng, root: &Path) {
    let (one, two, aside) = (a_path(rng, root), a_path(rng, root), root.join("aside"));
    if fs::rename(&one, &aside).is_ok() {
        drop(fs::rename(&two, &one));
        drop(fs::rename(&aside, &two));
        drop(fs::rename(&aside, &one));
    }
}

/// How many histories to try; a soak tries more.
fn seeds(few: u64) -> u64 {
    std::env::var("STANDIN_FILES_SEEDS").map_or(few, |seeds| seeds.parse().expect("a number"))
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn the_copy_equals_the_tree_after_any_history() {
    for seed in 0..seeds(40) {
        let mut rng = Rng(seed);
        let mut pair = Pair::new();
        for epoch in 0..12 {
            for _ in 0..rng.below(30) {
                change(&mut rng, pair.source.path());
            }
            let mut records = Vec::new();
            if rng.below(3) == 0 {
                pair.scan(Phase::Running, &mut records);
                for _ in 0..rng.below(10) {
                    change(&mut rng, pair.source.path());
                }
            }
            if rng.below(8) == 0 {
                // The epoch is not committed, and its records never reach the copy.
                pair.scan(Phase::Frozen, &mut records);
                pair.scanner.reset();
                records.clear();
            }
            pair.scan(Phase::Frozen, &mut records);
            if rng.below(3) == 0 {
                // The standby dies in the middle and applies the epoch again; or it dies before it notes the
                // end.
                let part = rng.below(records.len() as u64 + 1) as usize;
                pair.apply(&records[..part], rng.below(2) == 0);
            }
            pair.apply(&records, true);
            pair.check(&format!("seed {seed}, epoch {epoch}"));
            if rng.below(2) == 0 {
                // The standby dies before it notes that the epoch was applied whole.
                pair.apply(&records, true);
                pair.check(&format!("seed {seed}, epoch {epoch} again"));
            }
        }
    }
}

/// What is done to two files `a` and `b` before the first scan of an epoch, and between that and the second.
type Steps = [fn(&Path); 2];

#[test]
fn an_epoch_of_several_scans_gives_the_same_tree_when_it_is_applied_again() {
    let link_then_replace: Steps = [
        |root| fs::hard_link(root.join("a"), root.join("c")).unwrap(),
        |root| {
            fs::write(root.join("new"), b"another").unwrap();
            fs::rename(root.join("new"), root.join("a")).unwrap();
        },
    ];
    let link_further_then_replace: Steps = [
        |root| {
            fs::hard_link(root.join("a"), root.join("c")).unwrap();
            fs::hard_link(root.join("a"), root.join("aa")).unwrap();
        },
        |root| fs::remove_file(root.join("a")).unwrap(),
    ];
    let write_then_link_over: Steps = [
        |root| fs::write(root.join("b"), b"written").unwrap(),
        |root| {
            fs::remove_file(root.join("b")).unwrap();
            fs::hard_link(root.join("a"), root.join("b")).unwrap();
        },
    ];
    let write_then_replace_the_directory: Steps = [
        |root| fs::write(root.join("d/file"), b"written").unwrap(),
        |root| {
            fs::remove_dir_all(root.join("d")).unwrap();
            symlink("elsewhere", root.join("d")).unwrap();
        },
    ];
    let all = [
        link_then_replace,
        link_further_then_replace,
        write_then_link_over,
        write_then_replace_the_directory,
    ];
    for (index, steps) in all.into_iter().enumerate() {
        let mut pair = Pair::new();
        let root = pair.source.path().to_owned();
        fs::create_dir(root.join("d")).unwrap();
        for name in ["a", "b", "d/file"] {
            fs::write(root.join(name), name.repeat(BLOCK_SIZE)).unwrap();
        }
        pair.replicate();
        let mut records = Vec::new();
        steps[0](&root);
        pair.scan(Phase::Running, &mut records);
        steps[1](&root);
        pair.scan(Phase::Frozen, &mut records);
        for time in ["once", "again", "once more"] {
            pair.apply(&records, true);
            pair.check(&format!("history {index}, applied {time}"));
        }
    }
}

/// Runs `write` again and again in a thread of its own, until `scan` returns or fails; no write is under way while `scan`
/// holds the lock.
fn beside(mut write: impl FnMut() + Send, pause: Duration, scan: impl FnOnce(&Mutex<()>)) {
    let (stop, running) = (AtomicBool::new(false), Mutex::new(()));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                drop(running.lock().map(|_running| write()));
                std::thread::sleep(pause);
            }
        });
        let _stop = Stop(&stop);
        scan(&running);
    });
}

#[test]
fn what_a_running_writer_does_during_the_scan_is_put_right_in_the_freeze() {
    for seed in 0..seeds(10) {
        let mut pair = Pair::new();
        let (root, mut writes) = (pair.source.path().to_owned(), Rng(seed));
        let write = || {
            change(&mut writes, &root);
            swap(&mut writes, &root);
        };
        beside(write, Duration::ZERO, |running| {
            let mut rng = Rng(seed);
            for epoch in 0..8 {
                let mut records = Vec::new();
                for _ in 0..rng.below(4) {
                    pair.scan(Phase::Running, &mut records);
                }
                let _frozen = running.lock().unwrap();
                if rng.below(2) == 0 {
                    // What was scanned is old enough to be believed.
                    std::thread::sleep(Duration::from_millis(30));
                    pair.scan(Phase::Running, &mut records);
                }
                pair.scan(Phase::Frozen, &mut records);
                pair.apply(&records, true);
                pair.check(&format!("seed {seed}, epoch {epoch}"));
            }
        });
    }
}

#[test]
fn a_name_that_a_file_gets_during_the_scan_is_the_same_files_at_the_other_end() {
    let mut pair = Pair::new();
    // The second directory is listed when the first name was looked at long ago.
    let [first, further] = ["a", "z/further"].map(|name| pair.source.path().join(name));
    fs::create_dir(pair.source.path().join("z")).unwrap();
    fs::write(&first, b"content").unwrap();
    for name in 0..300 {
        fs::write(pair.source.path().join(format!("m{name}")), b"something to look at in between").unwrap();
    }
    let toggle = || drop(fs::hard_link(&first, &further).or_else(|_| fs::remove_file(&further)));
    beside(toggle, Duration::from_micros(300), |running| {
        for epoch in 0..100 {
            let mut records = Vec::new();
            pair.scan(Phase::Running, &mut records);
            let _frozen = running.lock().unwrap();
            pair.scan(Phase::Frozen, &mut records);
            pair.apply(&records, true);
            pair.check(&format!("epoch {epoch}"));
        }
    });
}

#[test]
fn content_that_changes_between_reading_and_sending_is_remembered_as_sent() {
    let mut pair = Pair::new();
    let path = pair.source.path().join("file");
    fs::write(&path, b"first").unwrap();
    let mut records = Vec::new();
    let emit = &mut |record, body: &[u8]| {
        if matches!(&record, FileRecord::Entry { path, .. } if path == b"file") {
            fs::write(&path, b"torn!").unwrap();
        }
        records.push((record, body.to_vec()));
    };
    pair.scanner.scan(Phase::Running, &InUse::default(), emit).unwrap();
    fs::write(&path, b"first").unwrap();
    pair.scan(Phase::Frozen, &mut records);
    pair.apply(&records, true);
    pair.check("written twice");
}

#[test]
fn a_further_name_that_becomes_the_first_keeps_its_content() {
    let mut pair = Pair::new();
    let (first, further) = (pair.source.path().join("a"), pair.source.path().join("b"));
    fs::write(&first, vec![5; 2 * BLOCK_SIZE]).unwrap();
    fs::hard_link(&first, &further).unwrap();
    pair.replicate();
    fs::remove_file(&first).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&further).unwrap();
    file.write_all_at(&vec![0; BLOCK_SIZE], 0).unwrap();
    let records = pair.replicate();
    let sent: Vec<_> =
        records.iter().filter(|(record, _)| matches!(record, FileRecord::Data { .. })).collect();
    assert_eq!(sent.len(), 1, "the other block is there already");
}

#[test]
fn what_is_mounted_in_a_tree_is_not_entered() {
    let mut pair = Pair::new();
    let inner = pair.source.path().join("inner");
    fs::create_dir(&inner).unwrap();
    fs::write(pair.source.path().join("bound"), b"below").unwrap();
    fs::write(pair.source.path().join("file"), b"kept").unwrap();
    let records = std::thread::scope(|scope| {
        let mounts = || {
            // A mount namespace of this thread's own: it goes with the thread.
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&Path>;
            let private = nix::mount::MsFlags::MS_PRIVATE | nix::mount::MsFlags::MS_REC;
            nix::mount::mount(none, Path::new("/"), none, private, none).unwrap();
            let plain = nix::mount::MsFlags::empty();
            nix::mount::mount(none, &inner, Some(Path::new("tmpfs")), plain, none).unwrap();
            fs::write(inner.join("secret"), b"of another file system").unwrap();
            let bind = nix::mount::MsFlags::MS_BIND;
            let (file, bound) = (pair.source.path().join("file"), pair.source.path().join("bound"));
            nix::mount::mount(Some(&file), &bound, none, bind, none).unwrap();
            pair.scanned()
        };
        scope.spawn(mounts).join().unwrap()
    });
    pair.apply(&records, true);
    assert_eq!(fs::read_dir(pair.copy.path().join("inner")).unwrap().count(), 0);
    assert_eq!(fs::read(pair.copy.path().join("file")).unwrap(), b"kept");
    assert!(!pair.copy.path().join("bound").exists());
}

#[test]
fn an_unchanged_tree_costs_no_record() {
    let mut pair = Pair::new();
    let mut rng = Rng(1);
    for _ in 0..300 {
        change(&mut rng, pair.source.path());
    }
    pair.replicate();
    assert_eq!(pair.scanned(), []);
}

#[test]
fn only_changed_blocks_are_sent() {
    let mut pair = Pair::new();
    let path = pair.source.path().join("big");
    fs::write(&path, vec![7; 40 * BLOCK_SIZE]).unwrap();
    pair.replicate();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"x", 3 * BLOCK_SIZE as u64 + 5).unwrap();
    let offsets: Vec<_> = pair
        .replicate()
        .into_iter()
        .filter_map(
            |(record, _)| if let FileRecord::Data { offset, .. } = record { Some(offset) } else { None },
        )
        .collect();
    assert_eq!(offsets, [3 * BLOCK_SIZE as u64]);
}

#[test]
fn a_write_within_the_clock_tick_of_the_scan_is_seen() {
    let mut pair = Pair::new();
    let path = pair.source.path().join("file");
    for round in 0..200_u32 {
        fs::write(&path, round.to_le_bytes()).unwrap();
        pair.replicate();
    }
}

#[test]
fn a_store_through_a_shared_mapping_is_seen_if_the_file_is_named() {
    let mut pair = Pair::new();
    let path = pair.source.path().join("mapped");
    fs::write(&path, vec![1; 3 * BLOCK_SIZE]).unwrap();
    let mut map = sys::map(&path);
    map[0] = 2;
    pair.replicate();
    // Long enough for the stat to be trusted again; the page is writable already, so no fault moves the
    // ctime.
    std::thread::sleep(std::time::Duration::from_millis(60));
    pair.replicate();
    map[BLOCK_SIZE + 1] = 3;
    map[1] = 9;
    let meta = fs::metadata(&path).unwrap();
    pair.in_use.mapped.insert((meta.dev(), meta.ino()));
    let records = pair.replicate();
    assert_eq!(records.iter().filter(|(record, _)| matches!(record, FileRecord::Data { .. })).count(), 2);
}

#[test]
fn holes_stay_holes() {
    let mut pair = Pair::new();
    let path = pair.source.path().join("sparse");
    let file = fs::File::create(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    file.write_all_at(b"data", 1 << 30).unwrap();
    let bytes: usize = pair.scanned().iter().map(|(_, body)| body.len()).sum();
    assert!(bytes <= BLOCK_SIZE, "{bytes} bytes for four");
    pair.scanner.reset();
    let records = pair.scanned();
    pair.apply(&records, true);
    let copy = fs::metadata(pair.copy.path().join("sparse")).unwrap();
    assert_eq!((copy.len(), copy.blocks() < 1000), (1 << 40, true));
    file.write_all_at(&[0; 4], 1 << 30).unwrap();
    let records = pair.scanned();
    pair.apply(&records, true);
    assert_eq!(fs::metadata(pair.copy.path().join("sparse")).unwrap().blocks(), 0);
}

#[test]
fn sockets_are_skipped_and_devices_are_not() {
    let mut pair = Pair::new();
    let _socket = std::os::unix::net::UnixListener::bind(pair.source.path().join("socket")).unwrap();
    let null = pair.source.path().join("null");
    let made = Command::new("mknod").arg(&null).args(["c", "1", "3"]).status().unwrap();
    assert!(made.success());
    let records = pair.scanned();
    pair.apply(&records, true);
    assert!(!pair.copy.path().join("socket").exists());
    assert_eq!(
        fs::metadata(pair.copy.path().join("null")).unwrap().rdev(),
        fs::metadata(&null).unwrap().rdev()
    );
}

#[test]
fn set_id_bits_survive_ownership_and_content() {
    let mut pair = Pair::new();
    let path = pair.source.path().join("tool");
    fs::write(&path, b"one").unwrap();
    chown(&path, Some(5), Some(6)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
    pair.replicate();
    fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"two", 0).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
    pair.replicate();
}

#[test]
fn a_damaged_copy_is_told() {
    let mut pair = Pair::new();
    fs::write(pair.source.path().join("file"), b"right").unwrap();
    pair.replicate();
    fs::write(pair.copy.path().join("file"), b"wrong").unwrap();
    let told = verify(vec![pair.copy.path().to_owned()], &pair.scanner.digest().unwrap());
    assert!(matches!(told, Err(standin::files::VerifyError::Differs)));
}

fn meta(kind: FileKind) -> FileMeta {
    FileMeta { kind, mode: 0o644, uid: 0, gid: 0, mtime: (1, 2), xattrs: Vec::new() }
}

fn entry(path: &[u8], kind: FileKind) -> FileRecord {
    FileRecord::Entry { tree: 0, path: path.to_vec(), meta: meta(kind) }
}

#[test]
fn paths_that_leave_the_tree_are_refused() {
    let copy = TempDir::new().unwrap();
    let mut receiver = Receiver::open(&[Target::plain(copy.path())]).unwrap();
    let long = vec![b'x'; 256];
    for path in [&b".."[..], b"a/../../b", b"/etc/x", b"a//b", b"./a", b"a/", b"a\0b", &long] {
        let regular = entry(path, FileKind::Regular { size: 1 });
        let link = entry(b"ok", FileKind::HardLink { to: path.to_vec() });
        let data = FileRecord::Data { tree: 0, path: path.to_vec(), offset: 0 };
        let remove = FileRecord::Remove { tree: 0, path: path.to_vec() };
        for record in [regular, link, data, remove] {
            assert!(receiver.apply(&record, b"x").is_err(), "{record:?}");
        }
    }
    assert!(
        receiver.apply(&FileRecord::Remove { tree: 1, path: b"a".to_vec() }, b"").is_err(),
        "no such tree"
    );
    assert!(receiver.apply(&entry(b"", FileKind::Fifo), b"").is_err(), "the root is a directory");
}

#[test]
fn links_in_the_copy_are_never_followed() {
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("file"), b"untouched").unwrap();
    let before = contents(outside.path());
    let copy = TempDir::new().unwrap();
    let mut receiver = Receiver::open(&[Target::plain(copy.path())]).unwrap();
    let target = |path: &Path| FileKind::Symlink { target: path.as_os_str().as_encoded_bytes().to_vec() };
    receiver.apply(&entry(b"dir", target(outside.path())), b"").unwrap();
    receiver.apply(&entry(b"leaf", target(&outside.path().join("file"))), b"").unwrap();
    let data = |path: &[u8]| FileRecord::Data { tree: 0, path: path.to_vec(), offset: 0 };
    for record in [data(b"dir/file"), data(b"leaf")] {
        assert!(receiver.apply(&record, b"hit").is_err(), "{record:?}");
    }
    // A later record may still put these right.
    for record in [
        entry(b"dir/file", FileKind::Regular { size: 0 }),
        data(b"dir/file"),
        entry(b"dir/new", FileKind::Directory),
        entry(b"mine", FileKind::HardLink { to: b"dir/file".to_vec() }),
    ] {
        receiver.apply(&record, b"hit").unwrap();
    }
    assert!(receiver.finish().is_err(), "nothing put them right");
    let mut receiver = Receiver::open(&[Target::plain(copy.path())]).unwrap();
    // Removing a link, or what a link seems to lead to, touches nothing outside either.
    let _ = receiver.apply(&FileRecord::Remove { tree: 0, path: b"dir/file".to_vec() }, b"");
    receiver.apply(&FileRecord::Remove { tree: 0, path: b"dir".to_vec() }, b"").unwrap();
    receiver.finish().unwrap();
    assert_eq!(contents(outside.path()), before);
}

#[test]
fn content_must_lie_in_the_file() {
    let copy = TempDir::new().unwrap();
    let mut receiver = Receiver::open(&[Target::plain(copy.path())]).unwrap();
    receiver.apply(&entry(b"file", FileKind::Regular { size: 4 }), b"").unwrap();
    let data = |offset| FileRecord::Data { tree: 0, path: b"file".to_vec(), offset };
    receiver.apply(&data(0), b"good").unwrap();
    assert!(receiver.apply(&data(1), b"long").is_err());
    assert!(receiver.apply(&data(u64::MAX), b"long").is_err());
    assert!(receiver.apply(&data(0), &vec![1; BLOCK_SIZE + 1]).is_err());
    assert!(receiver.apply(&entry(b"huge", FileKind::Regular { size: u64::MAX }), b"").is_err());
}
