//! A scan that looks only at what something happened to emits what a walk would have emitted.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt, symlink},
    },
    path::{Path, PathBuf},
    sync::RwLock,
};

use memmap2::MmapMut;
use nix::{
    fcntl::{AT_FDCWD, AtFlags, FallocateFlags, RenameFlags, fallocate, renameat2},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat},
        time::TimeSpec,
    },
    unistd::linkat,
};
use standin::{
    files::{FileId, FilesStats, InUse, Phase, Receiver, Scanner, Source, Target},
    wire::message::FileRecord,
};
use tempfile::TempDir;

use super::{
    Records, Rng, a_path, change, contents,
    overlay::{Overlay, with_own_mounts},
    seeds, swap, sys,
};

/// A scanner that listens and one that does not.
pub(crate) struct Twins {
    tracked: Scanner,
    walking: Scanner,
}

impl Twins {
    pub(crate) fn new(source: &Source) -> Self {
        let sources = || vec![source.clone()];
        Self { tracked: Scanner::new(sources()), walking: Scanner::untracked(sources()) }
    }

    pub(crate) fn reset(&mut self) {
        self.tracked.reset();
        self.walking.reset();
    }

    /// What both emit, which is the same.
    pub(crate) fn scan(&mut self, phase: Phase, in_use: &InUse, context: &str) -> (Records, FilesStats) {
        let scan = |scanner: &mut Scanner| {
            let mut records = Vec::new();
            let emit = &mut |record, body: &[u8]| records.push((record, body.to_vec()));
            let stats =
                scanner.scan(phase, in_use, emit).unwrap_or_else(|error| panic!("{context}: {error}"));
            (records, stats)
        };
        let (tracked, stats) = scan(&mut self.tracked);
        let (walked, _) = scan(&mut self.walking);
        if tracked != walked {
            let heads = |records: &Records| {
                records.iter().map(|(head, _)| format!("{head:?}")).collect::<Vec<_>>().join("\n")
            };
            panic!("{context}:\ntracked\n{}\nwalked\n{}", heads(&tracked), heads(&walked));
        }
        assert_eq!(self.tracked.digest(), self.walking.digest(), "{context}");
        (tracked, stats)
    }
}

/// A tree, a directory beside it on the same file system, and what programs hold open of both.
struct World {
    dir: TempDir,
    open: Vec<File>,
    maps: Vec<(MmapMut, File)>,
    in_use: InUse,
}

fn id_of(file: &File) -> FileId {
    let meta = file.metadata().unwrap();
    (meta.dev(), meta.ino())
}

impl World {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        for name in ["tree", "beside", "copy"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Self { dir, open: Vec::new(), maps: Vec::new(), in_use: InUse::default() }
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    fn beside(&self) -> PathBuf {
        self.dir.path().join("beside")
    }

    fn copy(&self) -> PathBuf {
        self.dir.path().join("copy")
    }

    fn apply(&self, records: &Records) {
        let mut receiver = Receiver::open(&[Target::plain(self.copy())]).unwrap();
        for (record, body) in records {
            receiver.apply(record, body).unwrap_or_else(|error| panic!("{error}: {record:?}"));
        }
        receiver.finish().unwrap();
    }

    fn check(&self, context: &str) {
        let (mut source, copy) = (contents(&self.tree()), contents(&self.copy()));
        source.retain(|_, found| found.mode & libc::S_IFMT != libc::S_IFSOCK);
        for path in source.keys().chain(copy.keys()) {
            assert_eq!(source.get(path), copy.get(path), "{context}: {}", path.display());
        }
    }

    fn somewhere(&self, rng: &mut Rng) -> PathBuf {
        let root = if rng.below(3) == 0 { self.beside() } else { self.tree() };
        a_path(rng, &root)
    }

    fn is_file(path: &Path) -> bool {
        fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file())
    }

    /// One random thing that a program does.
    fn happen(&mut self, rng: &mut Rng) {
        let (path, other) = (self.somewhere(rng), self.somewhere(rng));
        match rng.below(24) {
            0..=5 => change(rng, &self.tree()),
            6 => swap(rng, &self.tree()),
            7 => change(rng, &self.beside()),
            8..=9 => drop(fs::rename(&path, &other)),
            10 => drop(fs::hard_link(&path, &other)),
            11 => drop(renameat2(AT_FDCWD, &path, AT_FDCWD, &other, RenameFlags::RENAME_EXCHANGE)),
            12 if Self::is_file(&path) => {
                self.open.extend(OpenOptions::new().read(true).write(true).open(&path));
            }
            13 => {
                // Without a name, which it may get later.
                let dir = if fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
                    path
                } else {
                    self.tree()
                };
                let mut options = OpenOptions::new();
                let unnamed = options.read(true).write(true).custom_flags(libc::O_TMPFILE).open(dir);
                self.open.extend(unnamed);
            }
            14..=18 if !self.open.is_empty() => self.happen_to_open(rng, &path),
            19 => {
                let kind =
                    [SFlag::S_IFCHR, SFlag::S_IFBLK, SFlag::S_IFIFO, SFlag::S_IFSOCK][rng.below(4) as usize];
                let _ = mknod(&path, kind, Mode::S_IRWXU, makedev(1, rng.below(4) + 3));
            }
            20 if Self::is_file(&path) => {
                drop(OpenOptions::new().append(true).open(&path).unwrap().write(b"more"));
            }
            21 => drop(symlink("anywhere", &path)),
            22 => {
                let time = TimeSpec::new(rng.below(1 << 30) as i64, 5);
                let _ = utimensat(AT_FDCWD, &path, &time, &time, UtimensatFlags::NoFollowSymlink);
            }
            23 if !self.maps.is_empty() => {
                let which = rng.below(self.maps.len() as u64) as usize;
                let (map, file) = &mut self.maps[which];
                // What is behind the end of the file cannot be stored to.
                if file.metadata().unwrap().len() > 0 {
                    map[0] = rng.below(256) as u8;
                }
            }
            _ => {}
        }
    }

    /// One thing that is done to an open file, whatever names it has by now.
    fn happen_to_open(&mut self, rng: &mut Rng, path: &Path) {
        let which = rng.below(self.open.len() as u64) as usize;
        let file = &self.open[which];
        let size = file.metadata().unwrap().len();
        let at = rng.below(size + 1);
        let byte = rng.below(4) as u8;
        match rng.below(10) {
            0..=2 => drop(file.write_at(&vec![byte; rng.below(90_000) as usize], at)),
            3 => file.set_len(at).unwrap(),
            4 => {
                let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let _ = fallocate(file, punch, at as i64, 70_000);
            }
            5 => {
                let from = &self.open[rng.below(self.open.len() as u64) as usize];
                sys::copy_range(from, file, at as i64, 100_000);
            }
            6 => {
                let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
                let follow = AtFlags::AT_SYMLINK_FOLLOW;
                let _ = linkat(AT_FDCWD, unnamed.as_str(), AT_FDCWD, path, follow);
            }
            7 if size > 0 && self.maps.len() < 3 => {
                self.in_use.mapped.insert(id_of(file));
                self.maps.push((sys::map_start(file), file.try_clone().unwrap()));
            }
            8 => {
                sys::submit_write(file, &vec![byte; 5000], at as i64);
                self.in_use.submitted.insert(id_of(file));
            }
            _ if rng.below(3) == 0 => drop(self.open.swap_remove(which)),
            _ => {}
        }
    }
}

#[test]
fn a_tracked_scan_emits_what_a_walk_would_have() {
    let _few = EVENTS.read();
    let mut tracked = 0;
    for seed in 0..seeds(40) {
        let mut rng = Rng(seed);
        let mut world = World::new();
        for _ in 0..30 {
            world.happen(&mut rng);
        }
        let mut twins = Twins::new(&Source::plain(world.tree()));
        for epoch in 0..25 {
            let context = format!("seed {seed}, epoch {epoch}");
            let mut records = Vec::new();
            if rng.below(3) == 0 {
                records.extend(twins.scan(Phase::Running, &world.in_use, &context).0);
                for _ in 0..rng.below(20) {
                    world.happen(&mut rng);
                }
            }
            let (frozen, stats) = twins.scan(Phase::Frozen, &world.in_use, &context);
            tracked += u64::from(stats.walked == 0);
            records.extend(frozen);
            world.apply(&records);
            world.check(&context);
            if rng.below(12) == 0 {
                twins.reset();
            }
            for _ in 0..rng.below(40) {
                world.happen(&mut rng);
            }
        }
    }
    assert!(tracked > seeds(40) * 15, "only {tracked} scans were tracked");
}

/// The kernel tells each listener of all that happens on a file system: one that runs over takes others along.
static EVENTS: RwLock<()> = RwLock::new(());

/// A tree of many files of which nothing is new to the scanner.
fn many(files: usize) -> (World, Twins) {
    let world = World::new();
    for file in 0..files {
        let dir = world.tree().join(format!("dir {}", file % 10));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("file {file}")), b"content").unwrap();
    }
    let mut twins = Twins::new(&Source::plain(world.tree()));
    twins.scan(Phase::Frozen, &world.in_use, "at first");
    (world, twins)
}

#[test]
fn a_scan_looks_at_what_changed_and_at_nothing_else() {
    let _few = EVENTS.read();
    let (world, mut twins) = many(1000);
    let (records, stats) = twins.scan(Phase::Frozen, &world.in_use, "unchanged");
    assert_eq!((records, stats.entries, stats.walked), (Vec::new(), 0, 0));
    fs::write(world.tree().join("dir 3/file 3"), b"changed").unwrap();
    let (_, stats) = twins.scan(Phase::Frozen, &world.in_use, "one changed");
    assert_eq!((stats.entries, stats.walked, stats.changed), (1, 0, 1));
    fs::remove_file(world.tree().join("dir 4/file 4")).unwrap();
    let (_, stats) = twins.scan(Phase::Frozen, &world.in_use, "one removed");
    assert_eq!((stats.entries, stats.walked, stats.removed), (1, 0, 1), "its directory");
    // Somebody else's files, on the same file system.
    fs::write(world.beside().join("file"), b"content").unwrap();
    let (_, stats) = twins.scan(Phase::Frozen, &world.in_use, "beside");
    assert_eq!((stats.entries, stats.walked), (0, 0));
}

#[test]
fn a_queue_that_ran_over_leads_to_a_walk() {
    let _many = EVENTS.write();
    let (world, mut twins) = many(10);
    let queued = fs::read_to_string("/proc/sys/fs/fanotify/max_queued_events").unwrap();
    let queued: usize = queued.trim().parse().unwrap();
    for file in 0..=queued {
        fs::write(world.beside().join(format!("{file}")), b"").unwrap();
    }
    fs::write(world.tree().join("dir 3/file 3"), b"changed").unwrap();
    let (_, stats) = twins.scan(Phase::Frozen, &world.in_use, "ran over");
    assert_eq!((stats.walked, stats.changed), (1, 1));
    let (_, stats) = twins.scan(Phase::Frozen, &world.in_use, "again");
    assert_eq!(stats.walked, 0, "it listens again");
}

#[test]
fn a_mount_in_the_tree_leads_to_a_walk() {
    with_own_mounts(|| {
        let (world, mut twins) = many(100);
        let (none, dir) = (None::<&Path>, world.tree().join("dir 3"));
        mount(none, &dir, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        let (_, stats) = twins.scan(Phase::Frozen, &world.in_use, "mounted over");
        // Before the directory is removed. Should the scan fail, it goes with the namespace.
        umount2(&dir, MntFlags::MNT_DETACH).unwrap();
        assert_eq!((stats.walked, stats.removed), (1, 10));
    });
}

/// As a volume is that has a file system of its own.
#[test]
fn a_tree_that_is_a_mount_itself_is_tracked_as_any() {
    with_own_mounts(|| {
        let dir = TempDir::new().unwrap();
        let none = None::<&Path>;
        mount(none, dir.path(), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        let mut twins = Twins::new(&Source::plain(dir.path()));
        twins.scan(Phase::Frozen, &InUse::default(), "empty");
        fs::write(dir.path().join("file"), b"content").unwrap();
        fs::create_dir(dir.path().join("dir")).unwrap();
        let (records, stats) = twins.scan(Phase::Frozen, &InUse::default(), "filled");
        // The root, whose times are others, and what is in it.
        assert_eq!((stats.walked, stats.changed, records.is_empty()), (0, 3, false));
        umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
    });
}

#[test]
fn where_nothing_tells_what_changes_every_scan_is_a_walk() {
    with_own_mounts(|| {
        // An overlay as a whole cannot be watched.
        let layer = TempDir::new().unwrap();
        let overlay = Overlay::new(&[layer.path().to_owned()], "");
        fs::write(overlay.merged().join("file"), b"content").unwrap();
        let mut twins = Twins::new(&Source::plain(overlay.merged()));
        twins.scan(Phase::Frozen, &InUse::default(), "at first");
        fs::write(overlay.merged().join("file"), b"changed").unwrap();
        let (_, stats) = twins.scan(Phase::Frozen, &InUse::default(), "changed");
        assert_eq!((stats.walked, stats.entries, stats.changed), (1, 2, 1));
    });
}

#[test]
fn trees_of_several_file_systems_are_tracked_by_one_scanner() {
    let dirs = ["/tmp", "/tmp", "/dev/shm"].map(|place| TempDir::new_in(place).unwrap());
    let mut scanner = Scanner::new(dirs.iter().map(|dir| Source::plain(dir.path())).collect());
    let mut changed = || {
        let mut trees = Vec::new();
        let emit = &mut |record, _: &[u8]| {
            if let FileRecord::Entry { tree, path, .. } = record
                && path == b"file"
            {
                trees.push(tree);
            }
        };
        let stats = scanner.scan(Phase::Frozen, &InUse::default(), emit).unwrap();
        (trees, stats.walked)
    };
    changed();
    for (tree, dir) in dirs.iter().enumerate() {
        fs::write(dir.path().join("file"), b"content").unwrap();
        assert_eq!(changed(), (vec![tree as u32], 0));
        fs::write(dir.path().join("file"), b"changed").unwrap();
        assert_eq!(changed(), (vec![tree as u32], 0));
    }
}

#[test]
fn a_write_through_a_name_beside_the_tree_is_seen() {
    let (world, mut twins) = many(100);
    let beside = world.beside().join("name");
    fs::hard_link(world.tree().join("dir 3/file 3"), &beside).unwrap();
    let file = OpenOptions::new().write(true).open(&beside).unwrap();
    twins.scan(Phase::Frozen, &world.in_use, "linked");
    fs::remove_file(&beside).unwrap();
    twins.scan(Phase::Frozen, &world.in_use, "no link any more");
    file.write_all_at(b"changed", 0).unwrap();
    let (records, stats) = twins.scan(Phase::Frozen, &world.in_use, "written to through a name that is gone");
    assert_eq!((records.len(), stats.walked), (2, 0));
}

#[test]
fn a_write_by_io_submit_is_seen_if_the_file_is_named() {
    let (mut world, mut twins) = many(100);
    let path = world.tree().join("dir 3/file 3");
    let file = OpenOptions::new().write(true).open(path).unwrap();
    sys::submit_write(&file, b"changed", 0);
    world.in_use.submitted.insert(id_of(&file));
    let (records, stats) = twins.scan(Phase::Frozen, &world.in_use, "submitted");
    assert_eq!((records.len(), stats.entries, stats.walked), (2, 1, 0));
}
