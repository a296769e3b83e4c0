//! How long a restore takes: CRIU with all pages at once, CRIU's own lazy pages, and Standin's, side by side.
//!
//! `cargo bench --bench restore -- [--json FILE] [--quick] [--size MB]`, as root. A size needs three times its memory.
//!
//! One process is captured as the agent does it: a full epoch and two small ones, each folded. From what the store then
//! holds each method restores it in turn, into a new sandbox every time.
//!
//! | method | what happens from the order on |
//! |---|---|
//! | criu-eager | `criu restore` of the flat image in a tmpfs: CRIU starts, and reads all pages |
//! | criu-lazy | `criu restore --lazy-pages`; the daemon `criu lazy-pages` runs already and serves the same image |
//! | standin | what the agent of a standby does: its CRIU waits in the sandbox already; a pager serves the store |
//!
//! `first_instruction_ms` and `last_page_ms` count from the order: to the moment that the restored process itself reads
//! from the clock first, and to the end of whatever brings pages. `gb_s` is the memory by the time between the two (from
//! the order if all comes at once). Until the last page the process touches a page, works for 20 µs, and so on: half of
//! them pages that it wrote before its last epochs, half any. A touch of more than 2 µs has waited for its page; those are
//! `fault_us_p50` and `fault_us_p99`. At the end the process looks whether every page is what it was.

#[path = "common/sandbox.rs"]
mod sandbox;

use std::{
    error::Error,
    fs::{self, File},
    hint::black_box,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use memmap2::MmapMut;
use nix::time::{ClockId, clock_gettime};
use standin::{
    capture::{Capturer, Finish, Note, Outside, Source, Tracking},
    criu::{
        Install,
        bridge::Bridge,
        images,
        lazy::{Mark, Pager, SOCKET_NAME},
        probe::Kernel,
        spawn::{Place, Spawn},
        swrk::{RestoreOptions, Swrk},
    },
    model::{Epoch, EpochId, Extent, PAGE_SIZE, Space, Term},
    restore::{self, Ahead, Mode, Recency, Site, Step},
    store::{Durability, Store, View},
    wire::message::FrameHead,
    workload::control::{Command, User},
};

use self::sandbox::{Home, PROGRAM};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const RSS_MB: [u64; 4] = [16, 256, 1024, 4096];
const RSS_MB_QUICK: [u64; 2] = [16, 256];
const ROUNDS: usize = 5;
const ROUNDS_QUICK: usize = 3;
/// Most memory that one method restores of one size.
const MB_RESTORED: u64 = 8 << 10;
/// Pages that the process writes between the epochs.
const HOT_PAGES: u64 = 250;
/// Shortest touch that counts as a fault.
const FAULT_NS: u64 = 2_000;
/// What the process works between two touches.
const WORK: Duration = Duration::from_micros(20);
const TIMEOUT: Duration = Duration::from_secs(120);
const LOOK_INTERVAL: Duration = Duration::from_micros(200);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    CriuEager,
    CriuLazy,
    Standin,
}

const METHODS: [Method; 3] = [Method::CriuEager, Method::CriuLazy, Method::Standin];

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::CriuEager => "criu-eager",
            Self::CriuLazy => "criu-lazy",
            Self::Standin => "standin",
        }
    }
}

#[derive(serde::Serialize)]
struct Row {
    rss_mb: u64,
    method: &'static str,
    first_instruction_ms: f64,
    last_page_ms: f64,
    gb_s: f64,
    fault_us_p50: Option<f64>,
    fault_us_p99: Option<f64>,
    faults: usize,
}

/// What one restore took.
#[derive(Default)]
struct Taken {
    first_ns: u64,
    last_ns: u64,
    /// Nanoseconds of each.
    faults: Vec<u64>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let ["run", control, rss_mb] = args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        return Restored::new(Path::new(control), rss_mb.parse()?)?.run();
    }
    let (mut json, mut rounds, mut sizes) = (None, ROUNDS, RSS_MB.to_vec());
    let mut rest = args.into_iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--json" => json = Some(PathBuf::from(rest.next().ok_or("--json needs a file")?)),
            "--quick" => (rounds, sizes) = (ROUNDS_QUICK, RSS_MB_QUICK.to_vec()),
            "--size" => sizes = vec![rest.next().ok_or("--size needs a number")?.parse()?],
            // Cargo's own.
            "--bench" => {}
            other => {
                let usage = "usage: restore [--json FILE] [--quick] [--size MB]";
                return Err(format!("{other}: what is it? {usage}").into());
            }
        }
    }
    println!("medians of {rounds} restores each, of fewer from 4 GB on");
    println!(
        "{:>6}  {:<10} {:>9} {:>9} {:>6} {:>9} {:>9} {:>7}",
        "rss MB", "method", "first ms", "last ms", "GB/s", "fault p50", "p99 µs", "faults"
    );
    let mut rows = Vec::new();
    for rss_mb in sizes {
        // The largest takes most of a minute to make, and ten seconds a round.
        let rounds = rounds.min((MB_RESTORED / rss_mb) as usize).max(1);
        for row in measure(rss_mb, rounds)? {
            let us = |value: Option<f64>| value.map_or("-".to_owned(), |us| format!("{us:.1}"));
            println!(
                "{rss_mb:>6}  {:<10} {:>9.1} {:>9.1} {:>6.2} {:>9} {:>9} {:>7}",
                row.method,
                row.first_instruction_ms,
                row.last_page_ms,
                row.gb_s,
                us(row.fault_us_p50),
                us(row.fault_us_p99),
                row.faults
            );
            rows.push(row);
        }
    }
    if let Some(path) = json {
        fs::write(path, serde_json::to_vec_pretty(&rows)?)?;
    }
    Ok(())
}

fn measure(rss_mb: u64, rounds: usize) -> Result<Vec<Row>> {
    let image = Image::capture(rss_mb)?;
    let mut taken: Vec<Vec<Taken>> = METHODS.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (method, taken) in METHODS.iter().zip(&mut taken) {
            taken.push(image.restore(*method)?);
        }
    }
    Ok(METHODS.iter().zip(taken).map(|(method, taken)| row(rss_mb, *method, &taken)).collect())
}

fn row(rss_mb: u64, method: Method, taken: &[Taken]) -> Row {
    let sorted = |of: &dyn Fn(&Taken) -> u64| {
        let mut all: Vec<u64> = taken.iter().map(of).collect();
        all.sort_unstable();
        all
    };
    let first = percentile(&sorted(&|taken| taken.first_ns), 50) as f64;
    let last = percentile(&sorted(&|taken| taken.last_ns), 50) as f64;
    let moving_ns = if method == Method::CriuEager { last } else { last - first };
    let mut faults: Vec<u64> = taken.iter().flat_map(|taken| taken.faults.iter().copied()).collect();
    faults.sort_unstable();
    let us = |percent| (!faults.is_empty()).then(|| percentile(&faults, percent) as f64 / 1e3);
    Row {
        rss_mb,
        method: method.name(),
        first_instruction_ms: first / 1e6,
        last_page_ms: last / 1e6,
        gb_s: (rss_mb << 20) as f64 / moving_ns,
        fault_us_p50: us(50),
        fault_us_p99: us(99),
        faults: faults.len(),
    }
}

/// Nearest rank.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1]
}

/// The one clock of bench and restored process: CRIU gives the latter a time namespace, in which the monotonic one goes on
/// from where it was dumped.
fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).expect("every Linux has this clock");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

// Both sides.

/// Words in a file by which bench and process speak.
#[derive(Clone, Copy)]
enum Word {
    /// How often the process shall have written its hot pages; it has, when the next says the same.
    Write,
    Written,
    /// The process shall run; when its first instruction was; it shall stop; it has, and so many pages were wrong.
    Go,
    First,
    Stop,
    Wrong,
}

/// In the place of a number of pages.
const NONE: u64 = u64::MAX;

struct Control(File);

impl Control {
    fn create(path: &Path) -> Result<Self> {
        let control = Self(File::options().read(true).write(true).create(true).truncate(true).open(path)?);
        control.reset()?;
        Ok(control)
    }

    fn reset(&self) -> Result<()> {
        for word in [Word::Go, Word::First, Word::Stop] {
            self.set(word, 0)?;
        }
        self.set(Word::Wrong, NONE)
    }

    fn get(&self, word: Word) -> Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, word as u64 * 8)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn set(&self, word: Word, value: u64) -> Result<()> {
        Ok(self.0.write_all_at(&value.to_le_bytes(), word as u64 * 8)?)
    }

    fn wait(&self, word: Word, done: impl Fn(u64) -> bool) -> Result<u64> {
        let until = Instant::now() + TIMEOUT;
        loop {
            let value = self.get(word)?;
            if done(value) {
                return Ok(value);
            }
            if Instant::now() > until {
                return Err("the restored process does not answer".into());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }
}

// The process that is restored.

struct Restored {
    control: Control,
    /// Made when it has run: CRIU wants files to be as they were.
    faults: PathBuf,
    memory: MmapMut,
    pages: u64,
    random: u64,
}

fn content(page: u64) -> u64 {
    (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn hot(number: u64, pages: u64) -> u64 {
    number.wrapping_mul(2_654_435_761) % pages
}

impl Restored {
    fn new(path: &Path, rss_mb: u64) -> Result<Self> {
        let control = Control(File::options().read(true).write(true).open(path)?);
        let faults = path.with_extension("faults");
        let pages = rss_mb * (1 << 20) / PAGE_SIZE;
        let mut memory = MmapMut::map_anon((pages * PAGE_SIZE) as usize)?;
        for page in 0..pages {
            let at = (page * PAGE_SIZE) as usize;
            memory[at..at + 8].copy_from_slice(&content(page).to_le_bytes());
            memory[at + 4088..at + 4096].copy_from_slice(&content(!page).to_le_bytes());
        }
        control.set(Word::Written, 1)?;
        Ok(Self { control, faults, memory, pages, random: 1 })
    }

    fn run(mut self) -> Result<()> {
        while self.control.get(Word::Go)? == 0 {
            let write = self.control.get(Word::Write)?;
            if write > self.control.get(Word::Written)? {
                self.write(write);
                self.control.set(Word::Written, write)?;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        self.control.set(Word::First, now_ns())?;
        let faults = self.touch()?;
        let wrong = (0..self.pages).filter(|page| !self.is_right(*page)).count();
        fs::write(&self.faults, &faults)?;
        self.control.set(Word::Wrong, wrong as u64)?;
        loop {
            std::thread::sleep(TIMEOUT);
        }
    }

    fn write(&mut self, value: u64) {
        for number in 0..HOT_PAGES {
            let at = (hot(number, self.pages) * PAGE_SIZE) as usize + 64;
            self.memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Touches pages until it is told to stop; how long each fault took, in nanoseconds of eight bytes.
    fn touch(&mut self) -> Result<Vec<u8>> {
        let mut faults = Vec::new();
        for round in 0_u64.. {
            if round.is_multiple_of(32) && self.control.get(Word::Stop)? != 0 {
                break;
            }
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let any = self.random >> 33;
            let page = if any & 1 == 0 { hot(any % HOT_PAGES, self.pages) } else { any % self.pages };
            let at = (page * PAGE_SIZE) as usize;
            let began = Instant::now();
            black_box(self.memory[at]);
            let ns = began.elapsed().as_nanos() as u64;
            if ns >= FAULT_NS {
                faults.extend_from_slice(&ns.to_le_bytes());
            }
            while began.elapsed() < WORK {
                std::hint::spin_loop();
            }
        }
        Ok(faults)
    }

    fn is_right(&self, page: u64) -> bool {
        let at = (page * PAGE_SIZE) as usize;
        self.memory[at..at + 8] == content(page).to_le_bytes()
            && self.memory[at + 4088..at + 4096] == content(!page).to_le_bytes()
    }
}

// The bench.

/// What is restored, and where.
struct Image {
    control: Control,
    store: Store,
    recency: Recency,
    install: Install,
    bridge: Bridge,
    /// Directories that are ready: the store's own, CRIU's with all pages, and that with lazy marks.
    lazy: PathBuf,
    eager: PathBuf,
    marked: PathBuf,
    note: Note,
    pids: Vec<u32>,
    dir: tempfile::TempDir,
    ram: tempfile::TempDir,
}

impl Image {
    fn capture(rss_mb: u64) -> Result<Self> {
        let (dir, ram) = (tempfile::tempdir()?, tempfile::tempdir_in("/dev/shm")?);
        let path = dir.path().join("control");
        let control = Control::create(&path)?;
        control.set(Word::Written, 0)?;
        let install = Install::find(None)?.with_launcher(PROGRAM.into());
        let bridge = Bridge::new(ram.path(), install.version)?;
        let place = Home::create("restore", "place", dir.path())?;
        let argv = [
            std::env::current_exe()?.display().to_string(),
            "run".to_owned(),
            path.display().to_string(),
            rss_mb.to_string(),
        ];
        place.start(&Command {
            argv: argv.to_vec(),
            env: Vec::new(),
            cwd: "/".into(),
            user: User::default(),
        })?;
        control.wait(Word::Written, |written| written == 1)?;
        let store =
            Store::open(&ram.path().join("store"), &place.name, Durability::Memory, Box::new(|_| Ok(())))?;
        let recency = capture(&place, &install, ram.path(), &store, &control)?;
        drop(place);
        let view = store.view().ok_or("nothing was captured")?;
        let (ready, flat) = (ram.path().join("ready"), ram.path().join("flat"));
        let lazy_of = |space| lazy_extents(&view.criu_dir(), space).unwrap_or_default();
        let lazy = restore::materialise(&view, &ready, Mode::Lazy, lazy_of)?.dir;
        let eager = restore::materialise(&view, &flat, Mode::Eager, |_| Vec::new())?.dir;
        let marked = with_marks(&lazy, &eager, &flat.join("marked"))?;
        let note = Note::read(&lazy)?;
        let tasks = images::pstree(&images::read(&lazy, images::PSTREE_FILE)?)?;
        let pids = tasks.iter().flat_map(|task| task.threads.iter().copied()).collect();
        Ok(Self { control, store, recency, install, bridge, lazy, eager, marked, note, pids, dir, ram })
    }

    fn restore(&self, method: Method) -> Result<Taken> {
        self.control.reset()?;
        let place = Home::create("restore", "place", self.dir.path())?;
        let (root, ordered, last_ns) = match method {
            Method::Standin => self.standin(&place)?,
            Method::CriuEager | Method::CriuLazy => self.criu(&place, method == Method::CriuLazy)?,
        };
        place.track(root)?;
        let first = self.control.wait(Word::First, |first| first != 0)?;
        self.control.set(Word::Stop, 1)?;
        let wrong = self.control.wait(Word::Wrong, |wrong| wrong != NONE)?;
        if wrong != 0 {
            return Err(format!("{}: {wrong} pages are not what they were", method.name()).into());
        }
        let faults = fs::read(self.dir.path().join("control.faults"))?;
        let (words, _) = faults.as_chunks::<8>();
        let first_ns = first - ordered;
        Ok(Taken {
            first_ns,
            last_ns: last_ns.map_or(first_ns, |last| last - ordered),
            faults: words.iter().map(|word| u64::from_le_bytes(*word)).collect(),
        })
    }

    /// As `agent/standby.rs` does it. Returns the root's pid, the time of the order and that of the last page.
    fn standin(&self, place: &Home) -> Result<(u32, u64, Option<u64>)> {
        let root = self.lazy.parent().ok_or("a directory without a parent")?;
        let mut criu =
            Ahead::start(&self.install, &self.bridge, root, &site(place, &self.note)?, &self.pids)?;
        settle();
        self.control.set(Word::Go, 1)?;
        let ordered = now_ns();
        let view: View = self.store.freeze_for_restore()?;
        if !criu.fits(&self.pids, self.note.outside.len(), false) {
            return Err("the CRIU that waited has ended".into());
        }
        let mark = Mark::make(&self.ram.path().join("mark"), b"")?;
        let pages = restore::page_files(&view, &self.recency)?;
        let pager = Pager::start(&self.install, &self.lazy, mark, &pages)?;
        let name = self.lazy.file_name().and_then(|name| name.to_str()).ok_or("no name")?;
        let handle = pager.handle()?;
        let root = criu.restore(name, self.note.keys(), true, &mut |step| match step {
            Step::Restored => handle.hold(),
            Step::Resuming => Ok(()),
        })?;
        pager.wait()?;
        Ok((root, ordered, Some(now_ns())))
    }

    fn criu(&self, place: &Home, lazy: bool) -> Result<(u32, u64, Option<u64>)> {
        let dir = if lazy { &self.marked } else { &self.eager };
        let mut daemon = lazy.then(|| self.daemon(dir)).transpose()?;
        settle();
        self.control.set(Word::Go, 1)?;
        let site = site(place, &self.note)?;
        let ordered = now_ns();
        let opened = File::open(dir)?;
        let pipes = self.note.keys().into_iter().zip(&site.stdio);
        let spawn = Spawn {
            place: Place::Inside { init: site.init.as_fd(), cgroup: false, ipc: Some(site.init.as_fd()) },
            bridge: Some(&self.bridge),
            cgroups: site.cgroups.clone(),
            pids_above: self.pids.iter().copied().max(),
            inherit: pipes.map(|(key, fd)| (key, fd.as_fd())).collect(),
            ..Spawn::new(opened.as_fd())
        };
        let options = RestoreOptions { lazy, ..RestoreOptions::default() };
        let root = Swrk::spawn(&self.install, &spawn)?.restore(&options, &mut |_| true)?;
        let ended = daemon.as_mut().map(Child::wait).transpose()?;
        if ended.is_some_and(|status| !status.success()) {
            return Err("criu lazy-pages has failed".into());
        }
        Ok((root, ordered, lazy.then(now_ns)))
    }

    /// CRIU's own, listening.
    fn daemon(&self, dir: &Path) -> Result<Child> {
        let socket = dir.join(SOCKET_NAME);
        let _ = fs::remove_file(&socket);
        let [program, words @ ..] = self.install.command() else { return Err("no CRIU".into()) };
        let child = std::process::Command::new(program)
            .args(words)
            .args(["lazy-pages", "--images-dir"])
            .arg(dir)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let until = Instant::now() + TIMEOUT;
        while !socket.exists() {
            if Instant::now() > until {
                return Err("criu lazy-pages does not listen".into());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        Ok(child)
    }
}

/// What was started ahead comes to rest.
fn settle() {
    std::thread::sleep(Duration::from_millis(100));
}

/// Three epochs into the store, the last of which ends the process.
fn capture(place: &Home, install: &Install, ram: &Path, store: &Store, control: &Control) -> Result<Recency> {
    let (host, inside) = place.workload_pid()?.ok_or("the process has ended")?;
    let mut capturer = Capturer::new(Source {
        root: host as i32,
        root_inside: inside,
        init: Some(place.keeper().pidfd()?),
        bridge: Bridge::new(ram, install.version)?,
        vmas: None,
        tracking: Tracking::choose(&Kernel::probe(Path::new(PROGRAM))?)?,
        install: install.clone(),
        work: ram.join("dump"),
        outside: place.log_pipes()?.into_iter().map(Outside::pipe).collect(),
        own_cgroup_namespace: false,
        whole: None,
        trees: Vec::new(),
        held: Vec::new(),
    })?;
    let mut recency = Recency::default();
    let id = |epoch| EpochId { term: Term(1), epoch: Epoch(epoch) };
    for epoch in 1..=3 {
        control.set(Word::Write, epoch)?;
        control.wait(Word::Written, |written| written >= epoch)?;
        let base = (epoch > 1).then(|| id(epoch - 1));
        let mut staging = store.begin(id(epoch), base)?;
        let mut emit = |head, body: Vec<u8>| staging.frame(head, &body).map_err(io::Error::other);
        let mut yes = || true;
        let mut conclude = |_: &_| true;
        let finish = if epoch == 3 {
            Finish::Final { hold: &mut yes, conclude: &mut conclude }
        } else {
            Finish::Continue
        };
        let head = FrameHead::Begin { name: place.name.clone(), id: id(epoch), base };
        capturer.capture(head, finish, &mut emit)?;
        staging.commit()?;
        capturer.committed();
        store.view().iter().for_each(|view| view.unfolded().for_each(|(id, runs)| recency.note(id, runs)));
        store.fold()?;
    }
    Ok(recency)
}

/// Which of a task's pages may come late; the process has one thread.
fn lazy_extents(dir: &Path, space: Space) -> Result<Vec<Extent>> {
    let Space::Task(pid) = space else { return Ok(Vec::new()) };
    let (mm, core) = (images::mm_file(pid), images::core_file(pid));
    let stack = images::stack_pointer(&core, &images::read(dir, &core)?)?;
    let stacks: Vec<u64> = stack.into_iter().collect();
    Ok(images::lazy_extents(&images::mappings(&mm, &images::read(dir, &mm)?)?, &stacks))
}

/// The directory with all pages once more (as links), its page maps marked: what CRIU's daemon serves.
fn with_marks(lazy: &Path, eager: &Path, into: &Path) -> Result<PathBuf> {
    fs::create_dir(into)?;
    for entry in fs::read_dir(eager)? {
        let name = entry?.file_name();
        let marked = name.to_string_lossy().starts_with("pagemap-");
        fs::hard_link(if marked { lazy } else { eager }.join(&name), into.join(&name))?;
    }
    Ok(into.to_owned())
}

/// Of the sandbox, for one restore.
fn site(place: &Home, note: &Note) -> Result<Site> {
    let keeper = place.keeper();
    let stdio = note.outside.iter().map(|_| place.fresh_stdio());
    Ok(Site {
        init: keeper.pidfd()?,
        own_cgroup_namespace: false,
        cgroups: vec![keeper.cgroup().work()],
        stdio: stdio.collect::<std::result::Result<_, _>>()?,
        own_ipc: false,
    })
}
