//! A container's writable layer: what is done through one overlay shows through another one over the same layers.

use std::{
    collections::HashSet,
    fs::{self, FileTimes, Permissions},
    os::unix::{
        fs::{FileExt, MetadataExt, PermissionsExt, lchown, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, SFlag, makedev, mknod},
    unistd::mkfifo,
};
use standin::{
    files::{BLOCK_SIZE, InUse, Phase, Receiver, ScanError, Scanner, Source, Target},
    wire::message::FileRecord,
};
use tempfile::TempDir;

use super::{Records, Rng, change, contents, seeds, swap, sys, tracking::Twins};

/// Runs in a mount namespace of its own, which goes with its thread however it ends.
pub(crate) fn with_own_mounts(run: impl FnOnce() + Send) {
    let run = || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&Path>;
        mount(none, Path::new("/"), none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
        run();
    };
    std::thread::scope(|scope| {
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// An overlay over layers that others may use too.
pub(crate) struct Overlay {
    dir: TempDir,
}

impl Overlay {
    pub(crate) fn new(layers: &[PathBuf], options: &str) -> Self {
        let overlay = Self { dir: TempDir::new().unwrap() };
        for dir in ["upper", "work", "merged"] {
            fs::create_dir(overlay.dir.path().join(dir)).unwrap();
        }
        let lower: Vec<_> = layers.iter().map(|path| path.to_str().unwrap()).collect();
        let work = overlay.dir.path().join("work");
        let data = format!(
            "lowerdir={},upperdir={},workdir={}{options}",
            lower.join(":"),
            overlay.upper().display(),
            work.display()
        );
        let kind = Some("overlay");
        mount(kind, &overlay.merged(), kind, MsFlags::empty(), Some(data.as_str())).unwrap();
        overlay
    }

    fn upper(&self) -> PathBuf {
        self.dir.path().join("upper")
    }

    pub(crate) fn merged(&self) -> PathBuf {
        self.dir.path().join("merged")
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = umount2(&self.merged(), MntFlags::MNT_DETACH);
    }
}

/// A container's file system, the standby's, and what is between them.
struct Pair {
    layers: TempDir,
    source: Overlay,
    copy: Overlay,
    twins: Twins,
    in_use: InUse,
}

impl Pair {
    /// `fill` makes the image: what is in its upper layer, then what is below.
    fn new(mut fill: impl FnMut(&Path)) -> Self {
        let layers = TempDir::new().unwrap();
        for layer in ["one", "two"] {
            let filling = layers.path().join("filling");
            fs::create_dir(&filling).unwrap();
            fill(&filling);
            // No link leads into a layer, which must not change any more.
            fs::rename(filling, layers.path().join(layer)).unwrap();
        }
        let [source, copy] = [(); 2].map(|()| Overlay::new(&layers_in(layers.path()), ""));
        let twins = Twins::new(&Source::overlay(source.upper(), source.merged()));
        Self { layers, source, copy, twins, in_use: InUse::default() }
    }

    /// The standby's container is made anew, and everything will be sent.
    fn anew(&mut self) {
        self.copy = Overlay::new(&layers_in(self.layers.path()), "");
        self.twins.reset();
    }

    fn scan(&mut self, phase: Phase, records: &mut Records) {
        records.extend(self.twins.scan(phase, &self.in_use, "overlay").0);
    }

    fn apply(&self, records: &[(FileRecord, Vec<u8>)], finish: bool) {
        let mut receiver = Receiver::open(&[Target::overlay(self.copy.upper(), self.copy.merged())]).unwrap();
        for (record, body) in records {
            receiver.apply(record, body).unwrap_or_else(|error| panic!("{error}: {record:?}"));
        }
        if finish {
            receiver.finish().unwrap();
        }
    }

    fn check(&self, context: &str) {
        let (source, copy) = (contents(&self.source.merged()), contents(&self.copy.merged()));
        let paths: HashSet<_> = source.keys().chain(copy.keys()).collect();
        for path in paths {
            assert_eq!(source.get(path), copy.get(path), "{context}: {}", path.display());
        }
    }

    /// Sends what changed, twice as after a crash, and expects equal directories.
    fn replicate(&mut self, context: &str) -> Records {
        let mut records = Vec::new();
        self.scan(Phase::Frozen, &mut records);
        self.apply(&records, true);
        self.check(context);
        self.apply(&records, true);
        self.check(&format!("{context}, applied again"));
        records
    }
}

fn layers_in(dir: &Path) -> [PathBuf; 2] {
    ["one", "two"].map(|layer| dir.join(layer))
}

/// An image with one of each that the tests change.
fn image(layer: &Path) {
    fs::create_dir_all(layer.join("etc/deep/deeper")).unwrap();
    fs::create_dir_all(layer.join("srv/empty")).unwrap();
    for file in ["etc/one", "etc/two", "etc/deep/three", "etc/deep/deeper/four", "srv/five", "top"] {
        fs::write(layer.join(file), vec![b'i'; 3 * BLOCK_SIZE]).unwrap();
    }
    fs::hard_link(layer.join("etc/one"), layer.join("srv/one too")).unwrap();
    symlink("../etc/one", layer.join("srv/link")).unwrap();
    mkfifo(&layer.join("srv/pipe"), Mode::S_IRWXU).unwrap();
    sys::set_xattr(&layer.join("etc/two"), "user.note", b"of the image");
}

fn set_modified(path: &Path, seconds: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    fs::File::open(path).unwrap().set_times(FileTimes::new().set_modified(time)).unwrap();
}

/// What can be done to a container's files, one thing after another.
type Step = (&'static str, fn(&Path));

const STEPS: [Step; 22] = [
    ("a new file", |root| fs::write(root.join("new"), b"new").unwrap()),
    ("a file of the image is written to", |root| {
        let file = fs::OpenOptions::new().write(true).open(root.join("etc/one")).unwrap();
        file.write_all_at(&vec![0; BLOCK_SIZE], BLOCK_SIZE as u64).unwrap();
    }),
    ("it is written to again", |root| fs::write(root.join("etc/one"), b"short").unwrap()),
    ("its mode changes alone", |root| {
        fs::set_permissions(root.join("etc/deep/three"), Permissions::from_mode(0o4711)).unwrap();
    }),
    ("an owner, an attribute and a time", |root| {
        lchown(root.join("srv/link"), Some(3), Some(4)).unwrap();
        sys::set_xattr(&root.join("etc/two"), "user.note", b"changed");
        sys::set_xattr(&root.join("etc/deep"), "user.note", b"of a directory");
        set_modified(&root.join("srv"), 1_000_000_007);
    }),
    ("an attribute of the image goes", |root| sys::remove_xattr(&root.join("etc/two"), "user.note")),
    ("a file of the image goes", |root| fs::remove_file(root.join("srv/five")).unwrap()),
    ("a new one in its place", |root| {
        let file = fs::File::create(root.join("srv/five")).unwrap();
        // The hole is no hole in the image's.
        file.write_all_at(b"behind a hole", 2 * BLOCK_SIZE as u64).unwrap();
    }),
    ("a directory of the image goes", |root| fs::remove_dir_all(root.join("etc/deep")).unwrap()),
    ("a new one in its place", |root| {
        fs::create_dir_all(root.join("etc/deep")).unwrap();
        fs::write(root.join("etc/deep/other"), b"other").unwrap();
    }),
    ("a directory instead of a file", |root| {
        fs::remove_file(root.join("top")).unwrap();
        fs::create_dir(root.join("top")).unwrap();
        fs::write(root.join("top/inside"), b"inside").unwrap();
    }),
    ("a file instead of a directory", |root| {
        fs::remove_dir_all(root.join("srv/empty")).unwrap();
        fs::write(root.join("srv/empty"), b"not any more").unwrap();
    }),
    ("a file of the image is renamed", |root| {
        fs::rename(root.join("etc/two"), root.join("srv/two")).unwrap();
    }),
    ("a new directory is renamed", |root| fs::rename(root.join("top"), root.join("moved")).unwrap()),
    ("and takes the place of the image's", |root| {
        fs::remove_dir_all(root.join("etc/deep")).unwrap();
        fs::rename(root.join("moved"), root.join("etc/deep")).unwrap();
    }),
    ("a link to a file of the image", |root| {
        fs::hard_link(root.join("srv/one too"), root.join("srv/linked")).unwrap();
        fs::hard_link(root.join("srv/one too"), root.join("another")).unwrap();
    }),
    ("written to through one name", |root| fs::write(root.join("another"), b"all three").unwrap()),
    ("the first name goes", |root| fs::remove_file(root.join("another")).unwrap()),
    ("links, pipes, devices", |root| {
        fs::remove_file(root.join("srv/link")).unwrap();
        symlink("elsewhere", root.join("srv/link")).unwrap();
        mkfifo(&root.join("pipe"), Mode::S_IRWXU).unwrap();
        mknod(&root.join("null"), SFlag::S_IFCHR, Mode::S_IRWXU, makedev(1, 3)).unwrap();
        fs::remove_file(root.join("srv/pipe")).unwrap();
    }),
    ("what was deleted is there again, as the image has it", |root| {
        mkfifo(&root.join("srv/pipe"), Mode::S_IRWXU).unwrap();
    }),
    ("attributes of an overlay inside", |root| {
        sys::set_xattr(&root.join("etc/deep"), "trusted.overlay.opaque", b"y");
    }),
    ("nearly everything goes", |root| {
        fs::remove_dir_all(root.join("etc")).unwrap();
        fs::remove_dir_all(root.join("srv")).unwrap();
    }),
];

#[test]
fn what_is_done_through_an_overlay_shows_through_the_standbys() {
    with_own_mounts(|| {
        let mut pair = Pair::new(image);
        pair.replicate("nothing is changed");
        for (what, step) in STEPS {
            step(&pair.source.merged());
            pair.replicate(what);
            let mut again = Vec::new();
            pair.scan(Phase::Frozen, &mut again);
            assert_eq!(again, [], "{what}: nothing is sent twice");
        }
    });
}

#[test]
fn an_overlay_is_sent_whole_to_a_container_made_anew() {
    with_own_mounts(|| {
        let mut pair = Pair::new(image);
        for (what, step) in STEPS {
            step(&pair.source.merged());
            pair.anew();
            pair.replicate(what);
        }
    });
}

#[test]
fn an_overlay_is_sent_whole_to_a_container_that_holds_an_earlier_epoch() {
    with_own_mounts(|| {
        let mut pair = Pair::new(image);
        for (what, step) in STEPS {
            step(&pair.source.merged());
            pair.twins.reset();
            pair.replicate(what);
        }
    });
}

/// The engine mounts single files on files that it makes in the container's own layer: in another mount namespace, where what
/// is mounted goes with the file.
#[test]
fn a_file_of_the_containers_own_layer_stays_the_same_object() {
    with_own_mounts(|| {
        let mut pair = Pair::new(image);
        let inode = |root: PathBuf| fs::metadata(root.join("etc/mounted-on")).unwrap().ino();
        for root in [pair.source.merged(), pair.copy.merged()] {
            fs::write(root.join("etc/mounted-on"), b"").unwrap();
            fs::write(root.join("etc/other"), b"one that is not there any more").unwrap();
        }
        let before = inode(pair.copy.merged());
        fs::remove_file(pair.source.merged().join("etc/other")).unwrap();
        pair.replicate("sent whole");
        assert_eq!(inode(pair.copy.merged()), before);
        fs::write(pair.source.merged().join("etc/mounted-on"), b"written to").unwrap();
        pair.replicate("changed");
        pair.twins.reset();
        pair.replicate("sent whole again");
        assert_eq!(inode(pair.copy.merged()), before);
    });
}

#[test]
fn overlays_are_equal_after_any_history() {
    with_own_mounts(|| {
        for seed in 0..seeds(25) {
            let mut rng = Rng(seed);
            let mut pair = Pair::new(|layer| {
                for _ in 0..60 {
                    change(&mut rng, layer);
                }
            });
            for epoch in 0..10 {
                let mut records = Vec::new();
                let mut some = |pair: &Pair, most| {
                    for _ in 0..rng.below(most) {
                        change(&mut rng, &pair.source.merged());
                        if rng.below(8) == 0 {
                            swap(&mut rng, &pair.source.merged());
                        }
                    }
                    rng.below(4)
                };
                if some(&pair, 20) == 0 {
                    pair.scan(Phase::Running, &mut records);
                }
                match some(&pair, 10) {
                    0 => {
                        pair.anew();
                        records.clear();
                    }
                    1 => pair.twins.reset(),
                    _ => {}
                }
                pair.scan(Phase::Frozen, &mut records);
                if some(&pair, 1) == 0 {
                    pair.apply(&records, false);
                }
                pair.apply(&records, true);
                pair.check(&format!("seed {seed}, epoch {epoch}"));
            }
        }
    });
}

#[test]
fn a_store_through_a_mapping_of_an_overlays_file_is_seen() {
    with_own_mounts(|| {
        let mut pair = Pair::new(image);
        let path = pair.source.merged().join("etc/one");
        let mut map = sys::map(&path);
        map[0] = 1;
        pair.replicate("copied up");
        // Until the stat is trusted again; the page is writable already, so no fault moves the ctime.
        std::thread::sleep(Duration::from_millis(60));
        pair.replicate("trusted");
        map[1] = 2;
        let start = map.as_ptr() as usize;
        let range = format!("{start:x}-{:x}", start + map.len());
        // As the capture finds it.
        let meta = fs::metadata(Path::new("/proc/self/map_files").join(range)).unwrap();
        pair.in_use.mapped.insert((meta.dev(), meta.ino()));
        let records = pair.replicate("stored to");
        let data = records.iter().filter(|(record, _)| matches!(record, FileRecord::Data { .. }));
        assert_eq!(data.count(), 1);
    });
}

#[test]
fn a_socket_hides_what_the_image_has_there() {
    with_own_mounts(|| {
        let mut pair = Pair::new(image);
        let path = pair.source.merged().join("top");
        fs::remove_file(&path).unwrap();
        let _socket = UnixListener::bind(&path).unwrap();
        let mut records = Vec::new();
        pair.scan(Phase::Frozen, &mut records);
        pair.apply(&records, true);
        assert!(!pair.copy.merged().join("top").exists());
    });
}

#[test]
fn an_overlay_that_moved_something_by_a_redirect_is_refused() {
    with_own_mounts(|| {
        let layer = TempDir::new().unwrap();
        image(layer.path());
        let overlay = Overlay::new(&[layer.path().to_owned()], ",redirect_dir=on");
        fs::rename(overlay.merged().join("etc"), overlay.merged().join("moved")).unwrap();
        let mut scanner = Scanner::new(vec![Source::overlay(overlay.upper(), overlay.merged())]);
        let refused = scanner.scan(Phase::Frozen, &InUse::default(), &mut |_, _| {});
        assert!(
            matches!(&refused, Err(ScanError::Overlay { path, option: "redirect_dir" }) if path.ends_with("moved")),
            "{refused:?}"
        );
    });
}
