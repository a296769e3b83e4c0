//! How long a workload is frozen for an epoch: CRIU alone, CRIU into a page server, and Standin, side by side.
//!
//! `cargo bench --bench freeze -- [--json FILE] [--quick] [--only RSS_MB[,DIRTY_PAGES]] [--method METHOD]`, as root.
//!
//! Each method has a process of its own, all alike, in a sandbox of its own. In every round each process in turn writes
//! some scattered pages and is then captured, so that whatever else the machine does meets all of them. Of 4 GB there is
//! room for one at a time: there one method follows the other.
//!
//! | method | what it does in the freeze |
//! |---|---|
//! | criu-full | `criu dump --leave-running` into a tmpfs |
//! | criu-page-server | the same, with the pages sent to a socket and dropped there |
//! | standin-without-bpf | as the next, where the kernel permits no BPF: CRIU lists the mappings |
//! | standin | an incremental epoch, as the agent captures it; its frames are dropped |
//!
//! Frozen time is CRIU's own figure in all of them, `freezing_time + frozen_time` of its statistics: from the first task
//! stopped to the last task running again. Of Standin's it is split, in medians: `freeze` until all tasks stand, `lists`
//! for CRIU, `fold` from its close of the page server to our answer, for which it waits; `criu` is the rest of
//! the frozen time. `lists`, `scan` and `read` run beside that.

#[path = "common/sandbox.rs"]
mod sandbox;

use std::{
    error::Error,
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use memmap2::MmapMut;
use nix::{
    sys::signal::{SigSet, Signal, kill},
    unistd::Pid,
};
use standin::{
    capture::{Capturer, Finish, FreezeParts, Outside, Source, Tracking},
    criu::{
        Install,
        bridge::Bridge,
        page_server::{self, Handler},
        probe::Kernel,
        spawn::{Place, Spawn},
        stats,
        swrk::{DumpOptions, Swrk},
    },
    memory::Vmas,
    model::{Epoch, EpochId, Extent, PAGE_SIZE, Space, Term},
    wire::message::FrameHead,
    workload::control::{Command, User},
};

use self::sandbox::{Home, PROGRAM};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const RSS_MB: [u64; 4] = [16, 256, 1024, 4096];
const DIRTY_PAGES: [u64; 3] = [250, 2500, 25_000];
const EPOCHS: usize = 40;
/// Of what takes seconds.
const EPOCHS_FEW: usize = 20;
const EPOCHS_QUICK: usize = 5;
/// Sizes of which there is room for all methods at once.
const TOGETHER_MB_MAX: u64 = 1024;
const QUICK_MB_MAX: u64 = 256;
/// The first epoch of a process is a full one, and the caches of the second are cold.
const WARM_UP: usize = 2;
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    CriuFull,
    CriuPageServer,
    /// CRIU lists the mappings, as where the kernel permits no BPF.
    StandinWithoutBpf,
    Standin,
}

const METHODS: [Method; 4] =
    [Method::CriuFull, Method::CriuPageServer, Method::StandinWithoutBpf, Method::Standin];

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::CriuFull => "criu-full",
            Self::CriuPageServer => "criu-page-server",
            Self::StandinWithoutBpf => "standin-without-bpf",
            Self::Standin => "standin",
        }
    }
}

#[derive(serde::Serialize)]
struct Row {
    rss_mb: u64,
    dirty_pages: u64,
    method: &'static str,
    epochs: usize,
    frozen_ms_p50: f64,
    frozen_ms_p99: f64,
    /// Medians of Standin's parts, milliseconds.
    #[serde(flatten)]
    parts: Option<Parts>,
}

#[derive(serde::Serialize)]
struct Parts {
    #[serde(rename = "freeze_ms")]
    freeze: f64,
    #[serde(rename = "criu_ms")]
    criu: f64,
    #[serde(rename = "lists_ms")]
    lists: f64,
    #[serde(rename = "scan_ms")]
    scan: f64,
    #[serde(rename = "read_ms")]
    read: f64,
    #[serde(rename = "fold_ms")]
    fold: f64,
}

/// One epoch's.
struct Sample {
    frozen_us: u64,
    parts: Option<FreezeParts>,
}

/// What to measure.
struct Wanted {
    epochs: usize,
    quick: bool,
    rss_mb: Option<u64>,
    dirty_pages: Option<u64>,
    method: Option<String>,
    json: Option<PathBuf>,
}

const USAGE: &str = "usage: freeze [--json FILE] [--quick] [--only RSS_MB[,DIRTY_PAGES]] [--method METHOD]";

impl Wanted {
    fn parse(args: impl Iterator<Item = String>) -> Result<Self> {
        let mut wanted =
            Self { epochs: EPOCHS, quick: false, rss_mb: None, dirty_pages: None, method: None, json: None };
        let mut args = args;
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} needs a value; {USAGE}"));
            match arg.as_str() {
                "--json" => wanted.json = Some(value()?.into()),
                "--quick" => (wanted.quick, wanted.epochs) = (true, EPOCHS_QUICK),
                "--only" => {
                    let only = value()?;
                    let (rss_mb, dirty_pages) = only.split_once(',').unwrap_or((&only, ""));
                    wanted.rss_mb = Some(rss_mb.parse()?);
                    wanted.dirty_pages =
                        (!dirty_pages.is_empty()).then(|| dirty_pages.parse()).transpose()?;
                }
                "--method" => wanted.method = Some(value()?),
                // Cargo's own.
                "--bench" => {}
                other => return Err(format!("{other}: what is it? {USAGE}").into()),
            }
        }
        Ok(wanted)
    }

    fn sizes(&self) -> Vec<u64> {
        let most = if self.quick { QUICK_MB_MAX } else { u64::MAX };
        self.rss_mb.map_or_else(|| RSS_MB.into_iter().filter(|mb| *mb <= most).collect(), |mb| vec![mb])
    }

    /// As many as the memory has.
    fn dirty_pages(&self, rss_mb: u64) -> Vec<u64> {
        let wanted = self.dirty_pages.map_or_else(|| DIRTY_PAGES.to_vec(), |pages| vec![pages]);
        wanted.into_iter().filter(|pages| *pages <= rss_mb * (1 << 20) / PAGE_SIZE).collect()
    }

    fn methods(&self) -> Vec<Method> {
        let named = |method: &Method| self.method.as_ref().is_none_or(|name| name == method.name());
        METHODS.into_iter().filter(named).collect()
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let ["write", counter, rss_mb, dirty_pages] = args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        return write_pages(Path::new(counter), rss_mb.parse()?, dirty_pages.parse()?);
    }
    let wanted = Wanted::parse(args.into_iter())?;
    let mut rows = Vec::new();
    println!("frozen time in ms; the parts are medians");
    println!(
        "{:>6} {:>6}  {:<19} {:>6} {:>8} {:>8} {:>8}  {:>7} {:>6} {:>6} {:>6} {:>6} {:>6}",
        "rss MB",
        "dirty",
        "method",
        "epochs",
        "p50",
        "p99",
        "of full",
        "freeze",
        "criu",
        "lists",
        "fold",
        "scan",
        "read"
    );
    for rss_mb in wanted.sizes() {
        for dirty_pages in wanted.dirty_pages(rss_mb) {
            let mut measured = Vec::new();
            let methods = wanted.methods();
            let together = if rss_mb <= TOGETHER_MB_MAX { methods.len() } else { 1 };
            for methods in methods.chunks(together.max(1)) {
                measured.extend(measure(methods, rss_mb, dirty_pages, wanted.epochs)?);
            }
            for row in &measured {
                row.print(measured[0].frozen_ms_p50);
            }
            rows.extend(measured);
        }
    }
    if let Some(path) = wanted.json {
        fs::write(path, serde_json::to_vec_pretty(&rows)?)?;
    }
    Ok(())
}

fn measure(methods: &[Method], rss_mb: u64, dirty_pages: u64, epochs: usize) -> Result<Vec<Row>> {
    let mut subjects = Vec::new();
    for method in methods {
        subjects.push((Subject::start(*method, rss_mb, dirty_pages)?, Vec::new()));
    }
    let epochs = if rss_mb > QUICK_MB_MAX { epochs.min(EPOCHS_FEW) } else { epochs };
    for round in 0..WARM_UP + epochs {
        for (subject, samples) in &mut subjects {
            subject.write()?;
            let sample = subject.capture()?;
            if round >= WARM_UP {
                samples.push(sample);
            }
        }
    }
    let row = |(subject, samples): (Subject, Vec<Sample>)| Row {
        rss_mb,
        dirty_pages,
        method: subject.method.name(),
        epochs,
        frozen_ms_p50: percentile_ms(&samples, 50, |sample| Some(sample.frozen_us)).unwrap_or_default(),
        frozen_ms_p99: percentile_ms(&samples, 99, |sample| Some(sample.frozen_us)).unwrap_or_default(),
        parts: Parts::of(&samples),
    };
    Ok(subjects.into_iter().map(row).collect())
}

impl Row {
    fn print(&self, full_ms: f64) {
        print!(
            "{:>6} {:>6}  {:<19} {:>6} {:>8.1} {:>8.1} {:>8.2}",
            self.rss_mb,
            self.dirty_pages,
            self.method,
            self.epochs,
            self.frozen_ms_p50,
            self.frozen_ms_p99,
            self.frozen_ms_p50 / full_ms
        );
        if let Some(parts) = &self.parts {
            let Parts { freeze, criu, lists, scan, read, fold } = parts;
            print!("  {freeze:>7.2} {criu:>6.2} {lists:>6.2} {fold:>6.2} {scan:>6.2} {read:>6.2}");
        }
        println!();
    }
}

impl Parts {
    fn of(samples: &[Sample]) -> Option<Self> {
        let median = |part: &dyn Fn(&FreezeParts) -> u64| {
            percentile_ms(samples, 50, |sample| sample.parts.as_ref().map(part))
        };
        let criu = |sample: &Sample| {
            let parts = sample.parts?;
            Some(sample.frozen_us.saturating_sub(parts.stopping_us + parts.close_us))
        };
        Some(Self {
            freeze: median(&|parts| parts.stopping_us)?,
            criu: percentile_ms(samples, 50, criu)?,
            lists: median(&|parts| parts.lists_us)?,
            scan: median(&|parts| parts.scan_us)?,
            read: median(&|parts| parts.read_us)?,
            fold: median(&|parts| parts.close_us)?,
        })
    }
}

/// Nearest rank; none if a sample has no such figure.
fn percentile_ms(samples: &[Sample], percent: usize, figure: impl Fn(&Sample) -> Option<u64>) -> Option<f64> {
    let mut us = samples.iter().map(figure).collect::<Option<Vec<u64>>>()?;
    us.sort_unstable();
    let rank = (us.len() * percent).div_ceil(100).max(1);
    Some(*us.get(rank - 1)? as f64 / 1000.0)
}

/// A process in its sandbox, and what captures it.
struct Subject {
    /// Goes first.
    sandbox: Home,
    method: Method,
    install: Install,
    capturer: Option<Capturer>,
    epochs: u64,
    pids: (u32, u32),
    counter: PathBuf,
    _dir: tempfile::TempDir,
    ram: tempfile::TempDir,
}

impl Subject {
    fn start(method: Method, rss_mb: u64, dirty_pages: u64) -> Result<Self> {
        let (dir, ram) = (tempfile::tempdir()?, tempfile::tempdir_in("/dev/shm")?);
        let sandbox = Home::create("freeze", method.name(), dir.path())?;
        let counter = dir.path().join("counter");
        let install = Install::find(None)?.with_launcher(PROGRAM.into());
        let mut subject = Self {
            method,
            sandbox,
            install,
            capturer: None,
            epochs: 0,
            pids: (0, 0),
            counter,
            _dir: dir,
            ram,
        };
        let argv = [
            std::env::current_exe()?.display().to_string(),
            "write".to_owned(),
            subject.counter.display().to_string(),
            rss_mb.to_string(),
            dirty_pages.to_string(),
        ];
        subject.sandbox.start(&Command {
            argv: argv.to_vec(),
            env: Vec::new(),
            cwd: "/".into(),
            user: User::default(),
        })?;
        subject.await_count(1)?;
        subject.pids = subject.sandbox.workload_pid()?.ok_or("the writer has ended")?;
        if matches!(method, Method::Standin | Method::StandinWithoutBpf) {
            subject.capturer = Some(Capturer::new(subject.source()?)?);
        }
        Ok(subject)
    }

    fn source(&self) -> Result<Source> {
        Ok(Source {
            root: self.pids.0 as i32,
            root_inside: self.pids.1,
            init: Some(self.sandbox.keeper().pidfd()?),
            bridge: Bridge::new(self.ram.path(), self.install.version)?,
            vmas: (self.method == Method::Standin).then(Vmas::open).transpose()?.map(Arc::new),
            tracking: Tracking::choose(&Kernel::probe(Path::new(PROGRAM))?)?,
            install: self.install.clone(),
            work: self.ram.path().join("dump"),
            outside: self.sandbox.log_pipes()?.into_iter().map(Outside::pipe).collect(),
            own_cgroup_namespace: false,
            whole: None,
            trees: Vec::new(),
            held: Vec::new(),
        })
    }

    fn count(&self) -> u64 {
        let bytes = fs::read(&self.counter).unwrap_or_default();
        bytes.try_into().map_or(0, u64::from_le_bytes)
    }

    fn await_count(&self, count: u64) -> Result<()> {
        let until = Instant::now() + WRITE_TIMEOUT;
        while self.count() < count {
            if Instant::now() > until {
                return Err("the process to be captured does not write".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Has the process write its pages once.
    fn write(&self) -> Result<()> {
        let count = self.count();
        kill(Pid::from_raw(self.pids.0 as i32), Signal::SIGUSR1)?;
        self.await_count(count + 1)
    }

    fn capture(&mut self) -> Result<Sample> {
        self.epochs += 1;
        let Some(capturer) = &mut self.capturer else {
            return Ok(Sample { frozen_us: self.dump()?, parts: None });
        };
        let id = |epoch| EpochId { term: Term(1), epoch: Epoch(epoch) };
        let base = (self.epochs > 1).then(|| id(self.epochs - 1));
        let head = FrameHead::Begin { name: self.sandbox.name.clone(), id: id(self.epochs), base };
        let captured = capturer.capture(head, Finish::Continue, &mut |_, _| Ok(()))?;
        capturer.committed();
        capturer.spawn_ahead()?;
        Ok(Sample { frozen_us: captured.figures.frozen_us, parts: Some(captured.parts) })
    }

    /// The frozen time, microseconds.
    fn dump(&self) -> Result<u64> {
        let images = self.ram.path().join("images");
        fs::create_dir(&images)?;
        let opened = File::open(&images)?;
        let init = self.sandbox.keeper().pidfd()?;
        let place = Place::Inside { init: init.as_fd(), cgroup: false, ipc: Some(init.as_fd()) };
        let page_server = self.method == Method::CriuPageServer;
        let spawn = Spawn { place, page_server, ..Spawn::new(opened.as_fd()) };
        let mut criu = Swrk::spawn(&self.install, &spawn)?;
        let (socket, version) = (criu.take_page_server(), criu.version());
        let options = DumpOptions::new(self.pids.1);
        std::thread::scope(|scope| {
            if let Some(socket) = &socket {
                // What goes wrong there CRIU reports.
                scope.spawn(move || drop(page_server::serve(socket, version, &mut Discard)));
            }
            criu.dump(&options, &mut |_| true)
        })?;
        let (freezing_us, frozen_us) = stats::frozen(&images)?;
        fs::remove_dir_all(&images)?;
        Ok(freezing_us + frozen_us)
    }
}

/// A page server that keeps nothing.
struct Discard;

impl Handler for Discard {
    fn opened(&mut self, _: Space) -> io::Result<bool> {
        Ok(false)
    }

    fn hole(&mut self, _: Space, _: Extent) -> io::Result<()> {
        Err(io::Error::other("a hole in a full dump"))
    }

    fn pages(&mut self, _: Space, _: Extent, _: bool, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn close(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The process that is captured: with each SIGUSR1 it writes to `dirty_pages` pages all over its memory, and counts in a
/// file how often it did.
fn write_pages(counter: &Path, rss_mb: u64, dirty_pages: u64) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGUSR1);
    signals.thread_block()?;
    let pages = rss_mb * (1 << 20) / PAGE_SIZE;
    assert!(pages.is_power_of_two() && dirty_pages <= pages);
    let mut memory = MmapMut::map_anon((pages * PAGE_SIZE) as usize)?;
    let (mut random, mut next) = (0x9e37_79b9_7f4a_7c15_u64, 0_u64);
    let mut write = |page: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let at = (page * PAGE_SIZE) as usize + (random >> 55) as usize * 8;
        memory[at..at + 8].copy_from_slice(&(random | 1).to_le_bytes());
    };
    (0..pages).for_each(&mut write);
    let file = File::create(counter)?;
    for count in 1_u64.. {
        file.write_all_at(&count.to_le_bytes(), 0)?;
        signals.wait()?;
        for _ in 0..dirty_pages {
            // An odd factor visits every page of a power of two before any for the second time.
            next += 1;
            write(next.wrapping_mul(2_654_435_761) % pages);
        }
    }
    Ok(())
}
