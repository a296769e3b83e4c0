//! What a freeze costs with clones of big files and without.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    time::Instant,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use serde_json::{Value, json};
use standin::files::{Cloning, InUse, Phase, Scanner, Source};

use super::{BIG_WRITE_BYTES, BIG_WRITES, MIB, Result, Rng, median_ms, run};

const LATE_WRITES: u64 = 5;

/// A file system on a loop device, which goes with the mount; and that with this thread's mount namespace at last.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(kind: &str, place: &Path) -> Result<Self> {
        let dir = tempfile::tempdir_in(place)?;
        let (image, path) = (dir.path().join("image"), dir.path().join("mount"));
        File::create(&image)?.set_len(6 << 30)?;
        run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image))?;
        fs::create_dir(&path)?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&path))?;
        Ok(Self(dir))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0.path().join("mount"), MntFlags::MNT_DETACH);
    }
}

/// In a mount namespace of its own.
pub(crate) fn measure(sizes_mib: &[usize], rounds: usize, place: &Path) -> Result<Vec<Value>> {
    let all = || -> Result<Vec<Value>> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none = None::<&Path>;
        mount(none, Path::new("/"), none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
        println!(
            "\n{:34} {:>10} {:>10} {:>8} {:>9} {:>10} {:>9}",
            "frozen, median ms", "read", "clone", "ratio", "clones", "write-back", "settling"
        );
        let mut rows = Vec::new();
        for kind in ["btrfs", "xfs"] {
            for &mib in sizes_mib {
                rows.push(one(kind, mib, rounds, place)?);
            }
        }
        Ok(rows)
    };
    let all = || all().map_err(|error| error.to_string());
    let rows = std::thread::scope(|scope| scope.spawn(all).join()).map_err(|_| "a panic")?;
    Ok(rows?)
}

fn one(kind: &str, mib: usize, rounds: usize, place: &Path) -> Result<Value> {
    let mounted = Mounted::new(kind, place)?;
    let tree = mounted.0.path().join("mount/tree");
    fs::create_dir(&tree)?;
    let file = File::options().create_new(true).read(true).write(true).open(tree.join("big"))?;
    let mut rng = Rng(3);
    let bytes: Vec<u8> = (0..MIB / 8).flat_map(|_| rng.below(u64::MAX).to_le_bytes()).collect();
    (0..mib).try_for_each(|at| file.write_all_at(&bytes, (at * MIB) as u64))?;
    file.sync_all()?;
    let pages = (mib * MIB / BIG_WRITE_BYTES) as u64;
    let mut write = |count| {
        (0..count).try_for_each(|_| {
            let page = vec![rng.below(256) as u8; BIG_WRITE_BYTES];
            file.write_all_at(&page, rng.below(pages) * BIG_WRITE_BYTES as u64)
        })
    };
    let mut scanner = Scanner::new(vec![Source::plain(&tree)]);
    let [mut reads, mut clones, mut written_back, mut settled] = [(); 4].map(|()| Vec::new());
    for round in 0..=2 * rounds {
        let cloning = round % 2 == 0;
        scanner.scan(Phase::Running, &InUse::default(), &mut |_, _| {})?;
        write(BIG_WRITES)?;
        let began = Instant::now();
        if cloning {
            scanner.write_back(Cloning::Shorter);
        }
        written_back.extend(cloning.then(|| began.elapsed()));
        write(LATE_WRITES)?;
        let began = Instant::now();
        let stats = scanner.scan(Phase::Frozen, &InUse::default(), &mut |_, _| {})?;
        let took = began.elapsed();
        if round == 0 {
            // Everything was new.
            continue;
        }
        if stats.cloned > 0 {
            clones.push(took);
        } else {
            reads.push(took);
        }
        let began = Instant::now();
        scanner.settle(&mut |_, _| {})?;
        settled.extend((stats.cloned > 0).then(|| began.elapsed()));
    }
    let taken = clones.len();
    let [read, clone, written_back, settled] = [reads, clones, written_back, settled].map(median_ms);
    let ratio = read.zip(clone).map(|(read, clone)| read / clone);
    let shown = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.3}"));
    let name = format!("{mib} MiB on {kind}, 25 x 4 KiB changed");
    println!(
        "{name:34} {:>10} {:>10} {:>8} {:>9} {:>10} {:>9}",
        shown(read),
        shown(clone),
        ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.1}")),
        format!("{taken}/{rounds}"),
        shown(written_back),
        shown(settled)
    );
    Ok(json!({
        "case": name, "frozen_read_ms": read, "frozen_clone_ms": clone, "read_per_clone": ratio, "clones": taken,
        "of_rounds": rounds, "write_back_ms": written_back, "settle_ms": settled,
    }))
}
