//! File systems with reflinks: what is read after the thaw is what there was in the freeze.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::mount::{MntFlags, umount2};
use standin::files::{BLOCK_SIZE, Cloning, FROZEN_BYTES_MAX, FilesStats, InUse, Phase};
use tempfile::TempDir;

use super::{Found, Pair, Records, Rng, change, contents, overlay::with_own_mounts, seeds, swap, sys};

const MIB: usize = 1 << 20;
const IMAGE_BYTES: u64 = 4 << 30;
/// Reading it takes long enough for a clone to be a gain.
const BIG_MIB: usize = 256;

/// A file system in a file, unmounted when dropped; else with its mount namespace.
pub(crate) struct Mounted {
    dir: TempDir,
}

impl Mounted {
    fn new(make: &[&str]) -> Self {
        let mounted = Self { dir: TempDir::new().unwrap() };
        let image = mounted.dir.path().join("image");
        File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
        run(Command::new(make[0]).args(&make[1..]).arg(&image));
        fs::create_dir(mounted.path()).unwrap();
        // The loop device goes with the mount.
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(mounted.path()));
        mounted
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("mount")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.path(), MntFlags::MNT_DETACH);
    }
}

fn run(command: &mut Command) -> String {
    let output = command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// On btrfs and on XFS.
fn on_both(run: impl Fn(&Path) + Sync) {
    for make in [&["mkfs.btrfs", "-q"][..], &["mkfs.xfs", "-q", "-m", "reflink=1"]] {
        with_own_mounts(|| run(&Mounted::new(make).path()));
    }
}

impl Pair {
    fn stats_of(&mut self, phase: Phase, records: &mut Records) -> FilesStats {
        let emit = &mut |record, body: &[u8]| records.push((record, body.to_vec()));
        self.scanner.scan(phase, &self.in_use, emit).unwrap()
    }

    fn settle(&mut self, records: &mut Records) -> FilesStats {
        let emit = &mut |record, body: &[u8]| records.push((record, body.to_vec()));
        self.scanner.settle(emit).unwrap()
    }

    fn check_against(&self, then: &BTreeMap<PathBuf, Found>, context: &str) {
        let copy = contents(self.copy.path());
        for path in then.keys().chain(copy.keys()) {
            assert_eq!(then.get(path), copy.get(path), "{context}: {}", path.display());
        }
        let digest = self.scanner.digest().unwrap();
        standin::files::verify(vec![self.copy.path().to_owned()], &digest).unwrap();
    }
}

/// A file of which every page holds its number.
fn big_file(path: &Path) -> File {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    for mib in 0..BIG_MIB {
        let bytes: Vec<u8> =
            (0..MIB / 8).flat_map(|word| ((mib * MIB + word) as u64).to_le_bytes()).collect();
        file.write_all_at(&bytes, (mib * MIB) as u64).unwrap();
    }
    file
}

#[test]
fn what_is_read_after_the_thaw_is_what_there_was_in_the_freeze() {
    on_both(|dir| {
        let mut pair = Pair::new_in(dir);
        let root = pair.source.path().to_owned();
        let file = big_file(&root.join("big"));
        pair.replicate();
        let mut clones = 0;
        for epoch in 0..8_u64 {
            let before = fs::metadata(&root).unwrap().modified().unwrap();
            let mut records = Vec::new();
            pair.scan(Phase::Running, &mut records);
            pair.scanner.write_back(Cloning::Shorter);
            for page in 0..5 {
                file.write_all_at(&[epoch as u8 + 1; 100], page * 40_000_000 + epoch * 4096).unwrap();
            }
            let then = contents(&root);
            let stats = pair.stats_of(Phase::Frozen, &mut records);
            clones += stats.cloned;
            if stats.cloned > 0 {
                assert_eq!(stats.data_bytes, 0);
                assert_eq!(pair.scanner.digest(), None, "it is not known yet");
            }
            // The tasks run on.
            file.write_all_at(&vec![0xee; 3 * MIB], epoch * MIB as u64).unwrap();
            file.write_all_at(&[0xdd; 100], 40_000_000 + epoch * 4096).unwrap();
            let settled = pair.settle(&mut records);
            let data = stats.data_bytes + settled.data_bytes;
            assert_eq!(settled.compared_bytes > 0, stats.cloned > 0);
            assert!(data <= (3 * MIB + 8 * BLOCK_SIZE) as u64, "{data} bytes of content in epoch {epoch}");
            pair.apply(&records, true);
            pair.check_against(&then, &format!("epoch {epoch}"));
            pair.apply(&records, true);
            pair.check_against(&then, &format!("epoch {epoch} again"));
            assert_eq!(fs::metadata(&root).unwrap().modified().unwrap(), before, "nothing was made in it");
        }
        // The first one could not know what reading takes; a busy disk may make another one not worth it.
        assert!(clones > 0, "no clone was a gain");
        pair.replicate();
    });
}

#[test]
fn stores_through_a_shared_mapping_right_before_the_freeze_are_in_the_clone() {
    on_both(|dir| {
        let mut pair = Pair::new_in(dir);
        let path = pair.source.path().join("mapped");
        drop(big_file(&path));
        let mut map = sys::map(&path);
        pair.replicate();
        let id = fs::metadata(&path).map(|meta| {
            use std::os::unix::fs::MetadataExt;
            (meta.dev(), meta.ino())
        });
        pair.in_use = InUse { mapped: [id.unwrap()].into(), ..InUse::default() };
        for round in 1..6_u8 {
            pair.scanner.write_back(Cloning::Always);
            // The first is dirty in the file system by then, the others only in the page table.
            for page in 0..50 {
                map[page * 999_983] = round;
            }
            let then = contents(pair.source.path());
            let mut records = Vec::new();
            map[7] = round;
            let seven = map[..BLOCK_SIZE].to_vec();
            assert_eq!(pair.stats_of(Phase::Frozen, &mut records).cloned, 1);
            map[7] = 0;
            map[8 * MIB] ^= 1;
            pair.settle(&mut records);
            pair.apply(&records, true);
            let copied = fs::read(pair.copy.path().join("mapped")).unwrap();
            assert!(copied[..BLOCK_SIZE] == seven[..], "round {round}");
            map[7] = copied[7];
            map[8 * MIB] ^= 1;
            let now = fs::read(&path).unwrap();
            assert!(copied == now, "round {round}: all else is what there was");
            assert_eq!(then.len(), 2);
            map[7] = 0;
        }
    });
}

/// With every file cloned, links, renames and removals between the two scans of a freeze included.
#[test]
fn clones_fit_into_any_history() {
    on_both(|dir| {
        let mut clones = 0;
        for seed in 0..seeds(20) {
            let mut rng = Rng(seed);
            let mut pair = Pair::new_in(dir);
            let root = pair.source.path().to_owned();
            for epoch in 0..8 {
                let context = format!("{}: seed {seed}, epoch {epoch}", dir.display());
                let few = |rng: &mut Rng, most| {
                    for _ in 0..rng.below(most) {
                        change(rng, &root);
                    }
                };
                few(&mut rng, 30);
                let mut records = Vec::new();
                if rng.below(3) > 0 {
                    pair.scan(Phase::Running, &mut records);
                    few(&mut rng, 10);
                    swap(&mut rng, &root);
                }
                pair.scanner.write_back(Cloning::Always);
                if rng.below(2) == 0 {
                    clones += pair.stats_of(Phase::Standing, &mut records).cloned;
                    let _ = fs::hard_link(super::a_path(&mut rng, &root), root.join("aa-link"));
                    swap(&mut rng, &root);
                }
                let then = contents(&root);
                clones += pair.stats_of(Phase::Frozen, &mut records).cloned;
                few(&mut rng, 10);
                if rng.below(8) == 0 {
                    // The epoch ends before it is settled, which the scanner notices if there was something to settle.
                    if rng.below(2) == 0 || pair.scanner.digest().is_some() {
                        pair.scanner.reset();
                    }
                    pair.replicate();
                    continue;
                }
                pair.settle(&mut records);
                if rng.below(3) == 0 {
                    let part = rng.below(records.len() as u64 + 1) as usize;
                    pair.apply(&records[..part], false);
                }
                pair.apply(&records, true);
                pair.check_against(&then, &context);
                if rng.below(2) == 0 {
                    pair.apply(&records, true);
                    pair.check_against(&then, &format!("{context}, again"));
                }
            }
        }
        assert!(clones > 50, "{clones} clones");
    });
}

#[test]
fn more_than_a_freeze_may_hold_is_cloned() {
    on_both(|dir| {
        let mut pair = Pair::new_in(dir);
        let root = pair.source.path().to_owned();
        let files: Vec<_> = ["a", "b"].iter().map(|name| big_file(&root.join(name))).collect();
        pair.replicate();
        for round in 1..3_u8 {
            for file in &files {
                (0..BIG_MIB)
                    .for_each(|mib| file.write_all_at(&vec![round; MIB], (mib * MIB) as u64).unwrap());
            }
            pair.scanner.write_back(Cloning::BeyondMemory);
            let then = contents(&root);
            let mut records = Vec::new();
            let stats = pair.stats_of(Phase::Frozen, &mut records);
            assert!(stats.cloned > 0 && stats.data_bytes < FROZEN_BYTES_MAX, "{stats:?}");
            for file in &files {
                file.write_all_at(&vec![0xee; 40 * MIB], 0).unwrap();
            }
            pair.settle(&mut records);
            pair.apply(&records, true);
            pair.check_against(&then, &format!("round {round}"));
        }
        pair.replicate();
    });
}

/// The file system is shut down with what has not reached the disk, as by a disk that fails.
#[test]
fn a_clone_that_cannot_be_read_fails_the_epoch_and_the_next_is_right() {
    with_own_mounts(|| {
        let mounted = Mounted::new(&["mkfs.xfs", "-q", "-m", "reflink=1"]);
        let mut pair = Pair::new_in(&mounted.path());
        let root = pair.source.path().to_owned();
        drop(big_file(&root.join("big")));
        pair.replicate();
        run(&mut Command::new("sync"));
        let file = OpenOptions::new().write(true).open(root.join("big")).unwrap();
        file.write_all_at(b"changed", 100 * MIB as u64).unwrap();
        pair.scanner.write_back(Cloning::Always);
        let mut records = Vec::new();
        assert_eq!(pair.stats_of(Phase::Frozen, &mut records).cloned, 1);
        run(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(mounted.path()));
        let error = pair.scanner.settle(&mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("big"), "{error}");
        drop(file);
        pair.scanner.reset();
        umount2(&mounted.path(), MntFlags::MNT_DETACH).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let image = mounted.dir.path().join("image");
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(mounted.path()));
        // It is another mount of another device.
        pair.replicate();
    });
}

/// What btrfs writes in place is cloned only to a file of the same kind.
#[test]
fn a_file_without_copy_on_write_is_cloned_too() {
    with_own_mounts(|| {
        let mounted = Mounted::new(&["mkfs.btrfs", "-q"]);
        let mut pair = Pair::new_in(&mounted.path());
        let path = pair.source.path().join("in-place");
        File::create(&path).unwrap();
        run(Command::new("chattr").arg("+C").arg(&path));
        fs::write(&path, vec![1; MIB]).unwrap();
        let mut records = Vec::new();
        pair.scanner.write_back(Cloning::Always);
        assert_eq!(pair.stats_of(Phase::Frozen, &mut records).cloned, 1);
        let then = contents(pair.source.path());
        fs::write(&path, vec![2; MIB]).unwrap();
        pair.settle(&mut records);
        pair.apply(&records, true);
        pair.check_against(&then, "in place");
    });
}

/// Else a workload that fills its quota would be charged for the clone.
#[test]
fn a_clone_is_not_of_the_directorys_project() {
    with_own_mounts(|| {
        let mounted = Mounted::new(&["mkfs.xfs", "-q", "-m", "reflink=1"]);
        let mut pair = Pair::new_in(&mounted.path());
        let root = pair.source.path().to_owned();
        run(Command::new("xfs_io").args(["-c", "chproj 7", "-c", "chattr +P"]).arg(&root));
        fs::write(root.join("file"), vec![1; MIB]).unwrap();
        let project_of = |path: &Path| run(Command::new("xfs_io").args(["-r", "-c", "lsproj"]).arg(path));
        assert!(project_of(&root.join("file")).contains("projid = 7"));
        pair.scanner.write_back(Cloning::Always);
        assert_eq!(pair.stats_of(Phase::Frozen, &mut Vec::new()).cloned, 1);
        let pid = std::process::id();
        let open = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
        let is_clone = |fd: &PathBuf| {
            fs::read_link(fd)
                .is_ok_and(|to| to.starts_with(&root) && to.to_string_lossy().ends_with("(deleted)"))
        };
        let clones: Vec<_> = open.filter(is_clone).collect();
        assert_eq!(clones.len(), 1, "{clones:?}");
        let clone = Path::new("/proc").join(pid.to_string()).join("fd").join(clones[0].file_name().unwrap());
        assert!(project_of(&clone).contains("projid = 0"));
    });
}
