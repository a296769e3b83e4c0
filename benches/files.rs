//! What it costs to find the changes of replicated directories, as in each freeze.
//!
//! `cargo bench --bench files -- [--json FILE] [--quick] [DIRECTORY]`, as root. The trees are made in a temporary
//! directory of DIRECTORY (else of the system's): its file system matters.
//!
//! **Small files**: 100,000 of 1 KiB in 1,000 directories; before each scan 10 of them are changed (or none).
//! **A big file**: 512 MiB; before each scan 20 scattered blocks of 4 KiB are written to.
//!
//! **Clones**: files on btrfs and on XFS, each on a loop device of a file in DIRECTORY; in every round the running scan, 20
//! scattered pages of 4 KiB, the write-back, 5 more pages, and the scan in the freeze: in turn without clones and with them
//! where the scanner expects a gain; with the latter, what follows the thaw.
//!
//! Each round of the first two does the same with a scanner that listens to what changes, with one that looks at everything, and with the
//! plain tools: `find -newer`, which sees no removal and no write within a tick of the clock, and `rsync -an` against a copy.

#[path = "files/clones.rs"]
mod clones;

use std::{
    error::Error,
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use standin::files::{FilesStats, InUse, Phase, Scanner, Source};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const DIRECTORIES: usize = 1000;
const SMALL_BYTES: usize = 1024;
const CHANGED_FILES: u64 = 10;
const BIG_WRITES: u64 = 20;
const BIG_WRITE_BYTES: usize = 4096;
const MIB: usize = 1 << 20;

/// How much is done.
struct Plan {
    files: usize,
    big_mib: usize,
    clone_mib: &'static [usize],
    clone_rounds: usize,
    rounds: usize,
}

const FULL: Plan =
    Plan { files: 100_000, big_mib: 512, clone_mib: &[16, 64, 512, 2048], clone_rounds: 8, rounds: 20 };
const QUICK: Plan =
    Plan { files: 20_000, big_mib: 64, clone_mib: &[16, 64, 512], clone_rounds: 5, rounds: 5 };

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

fn main() -> Result<()> {
    let (mut json, mut plan, mut place) = (None, FULL, std::env::temp_dir());
    let mut rest = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--json" => json = Some(PathBuf::from(rest.next().ok_or("--json needs a file")?)),
            "--quick" => plan = QUICK,
            path if !path.starts_with('-') => place = path.into(),
            _ => return Err("usage: files [--json FILE] [--quick] [DIRECTORY]".into()),
        }
    }
    println!(
        "{:34} {:>10} {:>10} {:>8} {:>9} {:>9} {:>9}",
        "median ms", "tracked", "walk", "ratio", "looked at", "find", "rsync"
    );
    let mut rows = small_files(&plan, &place)?;
    rows.push(big_file(&plan, &place)?);
    rows.extend(clones::measure(plan.clone_mib, plan.clone_rounds, &place)?);
    if let Some(path) = json {
        fs::write(path, serde_json::to_vec_pretty(&rows)?)?;
    }
    Ok(())
}

fn small_files(plan: &Plan, place: &Path) -> Result<Vec<Value>> {
    let dir = tempfile::tempdir_in(place)?;
    let tree = dir.path().join("tree");
    let path = |file: usize| tree.join(format!("{}/{file}", file % DIRECTORIES));
    for directory in 0..DIRECTORIES {
        fs::create_dir_all(tree.join(directory.to_string()))?;
    }
    for file in 0..plan.files {
        fs::write(path(file), vec![b'.'; SMALL_BYTES])?;
    }
    let mut rng = Rng(1);
    let mut bench = Bench::new(dir.path())?;
    let mut rows = Vec::new();
    for (changed, name) in [(0, "none changed"), (CHANGED_FILES, "10 changed")] {
        let name = format!("{} small files, {name}", plan.files);
        rows.push(bench.measure(&name, plan.rounds, || {
            for _ in 0..changed {
                let file = rng.below(plan.files as u64) as usize;
                OpenOptions::new().append(true).open(path(file))?.write_all(b"more")?;
            }
            Ok(())
        })?);
    }
    Ok(rows)
}

fn big_file(plan: &Plan, place: &Path) -> Result<Value> {
    let dir = tempfile::tempdir_in(place)?;
    fs::create_dir(dir.path().join("tree"))?;
    let file = File::create(dir.path().join("tree/big"))?;
    let mut rng = Rng(2);
    for at in 0..plan.big_mib {
        let bytes: Vec<u8> = (0..MIB / 8).flat_map(|_| rng.below(u64::MAX).to_le_bytes()).collect();
        file.write_all_at(&bytes, (at * MIB) as u64)?;
    }
    let pages = (plan.big_mib * MIB / BIG_WRITE_BYTES) as u64;
    let name = format!("{} MiB in a file, 20 x 4 KiB changed", plan.big_mib);
    Bench::new(dir.path())?.measure(&name, plan.rounds, || {
        for _ in 0..BIG_WRITES {
            let bytes = vec![rng.below(256) as u8; BIG_WRITE_BYTES];
            file.write_all_at(&bytes, rng.below(pages) * BIG_WRITE_BYTES as u64)?;
        }
        Ok(())
    })
}

/// One tree and all that finds its changes.
struct Bench {
    dir: PathBuf,
    tracked: Scanner,
    walking: Scanner,
    rsync: bool,
}

impl Bench {
    fn new(dir: &Path) -> Result<Self> {
        let source = || vec![Source::plain(dir.join("tree"))];
        let (mut tracked, mut walking) = (Scanner::new(source()), Scanner::untracked(source()));
        scan(&mut tracked)?;
        scan(&mut walking)?;
        let mut bench = Self { dir: dir.to_owned(), tracked, walking, rsync: true };
        File::create(bench.stamp())?;
        bench.rsync = Command::new("rsync").arg("--version").stdout(Stdio::null()).status().is_ok();
        if bench.rsync {
            run(Command::new("rsync").arg("-a").arg(dir.join("tree")).arg(dir.join("copy")))?;
        }
        Ok(bench)
    }

    fn stamp(&self) -> PathBuf {
        self.dir.join("stamp")
    }

    /// Changes something and finds it, in each round by all means.
    fn measure(
        &mut self,
        name: &str,
        rounds: usize,
        mut change: impl FnMut() -> Result<()>,
    ) -> Result<Value> {
        let [mut tracked, mut walk, mut find, mut rsync] = [(); 4].map(|()| Vec::new());
        let mut looked_at = 0;
        // What was written just before the last scan is looked at again by a walk.
        std::thread::sleep(Duration::from_millis(100));
        self.walking.scan(Phase::Frozen, &InUse::default(), &mut |_, _| {})?;
        for _ in 0..rounds {
            File::create(self.stamp())?;
            std::thread::sleep(Duration::from_millis(30));
            change()?;
            let (took, stats) = scan(&mut self.tracked)?;
            if stats.walked > 0 {
                return Err("the kernel does not tell what changes here".into());
            }
            looked_at = stats.entries;
            tracked.push(took);
            let (took, walked) = scan(&mut self.walking)?;
            assert_eq!(
                (stats.changed, stats.data_bytes),
                (walked.changed, walked.data_bytes),
                "both find the same"
            );
            walk.push(took);
            let tree = self.dir.join("tree");
            find.push(run(Command::new("find").arg(&tree).arg("-newer").arg(self.stamp()))?);
            if self.rsync {
                rsync.push(run(Command::new("rsync").arg("-an").arg(&tree).arg(self.dir.join("copy")))?);
            }
        }
        let [tracked, walk, find, rsync] = [tracked, walk, find, rsync].map(median_ms);
        let ratio = walk.zip(tracked).map(|(walk, tracked)| walk / tracked);
        let shown = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.3}"));
        println!(
            "{name:34} {:>10} {:>10} {:>8} {looked_at:>9} {:>9} {:>9}",
            shown(tracked),
            shown(walk),
            ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.0}")),
            shown(find),
            shown(rsync)
        );
        Ok(json!({
            "case": name, "tracked_ms": tracked, "walk_ms": walk, "walk_per_tracked": ratio,
            "entries_looked_at": looked_at, "find_newer_ms": find, "rsync_ms": rsync,
        }))
    }
}

fn scan(scanner: &mut Scanner) -> Result<(Duration, FilesStats)> {
    let start = Instant::now();
    let stats = scanner.scan(Phase::Frozen, &InUse::default(), &mut |_, _| {})?;
    Ok((start.elapsed(), stats))
}

fn run(command: &mut Command) -> Result<Duration> {
    let start = Instant::now();
    let status = command.stdout(Stdio::null()).status()?;
    if !status.success() {
        return Err(format!("{command:?} ended with {status}").into());
    }
    Ok(start.elapsed())
}

fn median_ms(mut took: Vec<Duration>) -> Option<f64> {
    took.sort_unstable();
    took.get(took.len() / 2).map(|took| took.as_secs_f64() * 1e3)
}
