//! Replicated files on file systems with reflinks, which the freeze clones: memory and files of an epoch are of one
//! instant, and a freeze may take in more than it can hold.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use standin::{
    capture::{CaptureError, Finish, Tracking},
    files::{Receiver, Source, Target},
    model::{PAGE_SIZE, Space},
    wire::message::{FileRecord, FrameHead},
};

use crate::{
    host::{Home, Primary},
    stages::before_freeze,
    sys::Mapping,
    workload::DIR,
};

const MIB: usize = 1 << 20;
/// Reading it takes long enough for a clone to be a gain.
const BIG_MIB: usize = 256;
const BIG: &str = "big";
const PLACES: usize = 16;
/// Where the program has the page that its file is compared with.
const PAGE_AT: usize = 0x5a5a_0000_0000;
const EPOCHS: usize = 12;

fn place(index: usize) -> u64 {
    // In different blocks, some at their ends.
    (index * (BIG_MIB / PLACES) * MIB) as u64 + [0, 65_528, 40_000][index % 3]
}

/// The program: writes a number to memory, then to all places of a big file, by calls and through a mapping in turn, then
/// to memory again; then the next number.
pub(crate) fn in_step() {
    let tree = PathBuf::from(std::env::var_os(DIR).unwrap()).join("tree");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(tree.join(BIG)).unwrap();
    (0..BIG_MIB).for_each(|mib| file.write_all_at(&vec![mib as u8; MIB], (mib * MIB) as u64).unwrap());
    (0..PLACES).for_each(|index| file.write_all_at(&[0; 8], place(index)).unwrap());
    let mapped = Mapping::of_file(file.as_fd(), BIG_MIB * MIB / PAGE_SIZE as usize, true);
    let memory = Mapping::private_at(PAGE_AT, 1);
    for number in 1.. {
        memory.write(0, 0, number);
        for index in 0..PLACES {
            let at = place(index);
            if index % 2 == 0 {
                file.write_all_at(&number.to_le_bytes(), at).unwrap();
            } else {
                mapped.write((at / PAGE_SIZE) as usize, (at % PAGE_SIZE / 8) as usize, number);
            }
        }
        memory.write(0, 1, number);
        if number % 64 == 0 {
            println!("tick {number}");
        }
        thread::sleep(Duration::from_micros(300));
    }
}

/// A file system of the calling thread's mount namespace, with which it goes at last.
struct Mounted(tempfile::TempDir);

impl Mounted {
    /// On a loop device, which goes with the mount.
    fn new(make: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (image, path) = (dir.path().join("image"), dir.path().join("mount"));
        File::create(&image).unwrap().set_len(4 << 30).unwrap();
        run(Command::new(make[0]).args(&make[1..]).arg(&image));
        fs::create_dir(&path).unwrap();
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&path));
        Self(dir)
    }

    fn tmpfs() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mount");
        fs::create_dir(&path).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&path));
        Self(dir)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("mount")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.path(), MntFlags::MNT_DETACH);
    }
}

fn run(command: &mut Command) {
    let output = command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// In a thread with a mount namespace of its own.
fn with_own_mounts(test: impl FnOnce() + Send) {
    let run = || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&Path>;
        mount(none, Path::new("/"), none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
        test();
    };
    thread::scope(|scope| {
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// On btrfs and on XFS.
fn on_both(test: impl Fn(&Path) + Sync) {
    for make in [&["mkfs.btrfs", "-q"][..], &["mkfs.xfs", "-q", "-m", "reflink=1"]] {
        with_own_mounts(|| test(&Mounted::new(make).path()));
    }
}

/// A primary whose files are in `place`, and the copy of its tree.
struct Pair {
    primary: Primary,
    copy: tempfile::TempDir,
    tree: PathBuf,
}

impl Pair {
    fn start(place: &Path) -> Self {
        let home = Home::new_in(place);
        let tree = home.dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let sources = vec![Source::plain(&tree)];
        let primary = Primary::start_at("in-step", Tracking::WriteProtect, home, &sources);
        Self { primary, copy: tempfile::tempdir_in("/dev/shm").unwrap(), tree }
    }

    /// An epoch, committed; whether content of a clone was sent in it.
    fn epoch(&mut self) -> Result<bool, CaptureError> {
        let head = self.primary.next_head();
        let FrameHead::Begin { id, base, .. } = head else { unreachable!() };
        let mut staging = self.primary.store.begin(id, base).unwrap();
        let mut receiver = Receiver::open(&[Target::plain(self.copy.path())]).unwrap();
        let (tree, mut cloned) = (&self.tree, false);
        let captured = self.primary.capturer.capture(head, Finish::Continue, &mut |head, body| match head {
            FrameHead::File(record) => {
                cloned |= matches!(record, FileRecord::Data { .. }) && has_clone(tree);
                receiver.apply(&record, &body).map_err(io::Error::other)
            }
            head => staging.frame(head, &body).map_err(io::Error::other),
        });
        if let Err(error) = captured {
            self.primary.capturer.failed();
            return Err(error);
        }
        receiver.finish().unwrap();
        staging.commit().unwrap();
        self.primary.capturer.committed();
        self.primary.base = Some(id);
        Ok(cloned)
    }

    /// The first two words of the program's page, in the image.
    fn remembered(&self) -> [u64; 2] {
        let view = self.primary.store.view().unwrap();
        let (mut page, mut space) = ([0; PAGE_SIZE as usize], None);
        view.for_each_extent(|of, extent| {
            if (extent.start..extent.end()).contains(&(PAGE_AT as u64)) && matches!(of, Space::Task(_)) {
                space = Some(of);
            }
        });
        view.read_pages(space.expect("the page is in the image"), PAGE_AT as u64, &mut page).unwrap();
        [0, 8].map(|at| u64::from_le_bytes(page[at..at + 8].try_into().unwrap()))
    }

    /// What is at the places of the copy.
    fn copied(&self) -> Vec<u64> {
        let file = File::open(self.copy.path().join(BIG)).unwrap();
        let word = |index| {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, place(index)).unwrap();
            u64::from_le_bytes(word)
        };
        (0..PLACES).map(word).collect()
    }

    fn assert_of_one_instant(&self, context: &str) {
        let ([first, last], copied) = (self.remembered(), self.copied());
        let written = copied.iter().take_while(|number| **number == first).count();
        let rest_is_before = copied[written..].iter().all(|number| *number == first - 1);
        assert!(rest_is_before, "{context}: {first} in memory, in the file {copied:?}");
        let end_is_right = last == first - 1 || last == first && written == PLACES;
        assert!(end_is_right, "{context}: {first} and {last} in memory, in the file {copied:?}");
    }
}

/// Whether this process has a file without a name open that was made in a directory.
fn has_clone(dir: &Path) -> bool {
    let open =
        fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    open.into_iter().any(|to| to.starts_with(dir) && to.to_string_lossy().ends_with("(deleted)"))
}

#[test]
fn memory_and_cloned_files_are_of_one_instant() {
    on_both(|place| {
        let mut pair = Pair::start(place);
        let mut clones = 0;
        for epoch in 0..EPOCHS {
            clones += usize::from(pair.epoch().unwrap_or_else(|error| panic!("epoch {epoch}: {error}")));
            pair.assert_of_one_instant(&format!("epoch {epoch}"));
            pair.primary.home.await_ticks(pair.primary.home.ticks());
        }
        println!("{clones} of {EPOCHS} epochs with a clone");
        assert!(clones > 0, "no clone was a gain");
    });
}

const MORE_MIB: usize = 400;
const MORE: &str = "more";

/// Has `MORE_MIB` written right before a freeze, with the number that is asked for.
fn write_before_freeze(pair: &mut Pair) -> Arc<AtomicBool> {
    let (asked, path) = (Arc::new(AtomicBool::new(false)), pair.tree.join(MORE));
    let hook = Arc::clone(&asked);
    pair.primary.capturer.on_stages(before_freeze(move || {
        if hook.swap(false, Relaxed) {
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).unwrap();
            let block = |mib: usize| vec![mib as u8 | 1; MIB];
            (0..MORE_MIB).for_each(|mib| file.write_all_at(&block(mib), (mib * MIB) as u64).unwrap());
        }
    }));
    asked
}

#[test]
fn a_freeze_takes_in_more_than_it_can_hold_where_files_can_be_cloned() {
    on_both(|place| {
        let mut pair = Pair::start(place);
        let asked = write_before_freeze(&mut pair);
        pair.epoch().unwrap_or_else(|error| panic!("{error}"));
        asked.store(true, Relaxed);
        assert!(pair.epoch().unwrap_or_else(|error| panic!("{error}")), "it was cloned");
        pair.assert_of_one_instant("with more");
        let copied = File::open(pair.copy.path().join(MORE)).unwrap();
        assert_eq!(copied.metadata().unwrap().len(), (MORE_MIB * MIB) as u64);
        let mut found = vec![0; MIB];
        for mib in 0..MORE_MIB {
            copied.read_exact_at(&mut found, (mib * MIB) as u64).unwrap();
            assert!(found.iter().all(|byte| *byte == mib as u8 | 1), "MiB {mib}");
        }
        pair.epoch().unwrap_or_else(|error| panic!("{error}"));
        pair.assert_of_one_instant("after more");
    });
}

/// tmpfs has no reflinks.
#[test]
fn more_than_a_freeze_can_hold_is_refused_where_files_cannot_be_cloned() {
    with_own_mounts(|| {
        let mounted = Mounted::tmpfs();
        let mut pair = Pair::start(&mounted.path());
        let asked = write_before_freeze(&mut pair);
        pair.epoch().unwrap_or_else(|error| panic!("{error}"));
        asked.store(true, Relaxed);
        let error = pair.epoch().expect_err("it is too much");
        assert!(error.to_string().contains("MiB changed"), "{error}");
        pair.epoch().unwrap_or_else(|error| panic!("{error}"));
        pair.assert_of_one_instant("after an epoch that failed");
    });
}
