//! Dumps: what they contain, and that the workload outlives those that fail.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, FromRawFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::Path,
    process::{Command, Stdio},
};

use standin::{
    criu::{
        bridge::Bridge,
        page_server::{self, Handler, PageServerError},
        spawn::{Place, Spawn},
        swrk::{CriuError, DUMP_LOG, DumpOptions, Swrk},
    },
    model::{Extent, PAGE_SIZE, Space},
};

use crate::common::{Collector, ROOT_PID, Workload, install, wait_until};

/// Memory of every kind that CRIU tells apart.
const MEMORY: &str = "
import mmap, os, time
big = bytearray(os.urandom(9 << 20))
with open('file', 'wb') as f: f.write(os.urandom(6 << 20))
f = open('file', 'rb')
cow = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ|mmap.PROT_WRITE)
total = sum(cow[::4096])
for page in range(0, 6 << 20, 4 << 14): cow[page] = 7
untouched = mmap.mmap(-1, 5 << 20, flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)
zeros = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)
total += sum(zeros[::4096])
shared = mmap.mmap(-1, 1 << 20)
shared[:] = os.urandom(1 << 20)
os.fork()
open('ready%d' % os.getpid(), 'w').close()
while True: time.sleep(1)
";

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;
const FRAME: u64 = (1 << 55) - 1;

fn page_entry(pid: u32, address: u64) -> u64 {
    let mut entry = [0; 8];
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    pagemap.read_exact_at(&mut entry, address / PAGE_SIZE * 8).unwrap();
    u64::from_ne_bytes(entry)
}

/// The kernel's page of zeros: what reading untouched memory maps.
fn zero_frame() -> u64 {
    let memory = memmap2::MmapOptions::new().len(PAGE_SIZE as usize).map_anon().unwrap();
    assert_eq!(std::hint::black_box(memory[0]), 0);
    page_entry(std::process::id(), memory.as_ptr() as u64) & FRAME
}

/// Pages that only the process has: in private mappings, present or swapped, neither of a file nor
/// of zeros. CRIU leaves out those that the kernel may drop at any time (`MAP_DROPPABLE`, in which newer C libraries
/// keep the state of their random numbers).
fn private_pages(pid: u32, zero: u64) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let is_property = |line: &&str| line.starts_with(|c: char| c.is_ascii_uppercase());
    let mut lines = smaps.lines().peekable();
    while let Some(line) = lines.next() {
        let properties: Vec<&str> = std::iter::from_fn(|| lines.next_if(is_property)).collect();
        if properties.iter().any(|line| line.starts_with("VmFlags:") && line.contains(" dp")) {
            continue;
        }
        let mut words = line.split_whitespace();
        let (range, access) = (words.next().unwrap(), words.next().unwrap());
        if access.ends_with('s') || ["[vvar", "[vsyscall", "[vdso"].iter().any(|name| line.contains(name)) {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let parse = |text| u64::from_str_radix(text, 16).unwrap();
        for page in (parse(start)..parse(end)).step_by(PAGE_SIZE as usize) {
            let entry = page_entry(pid, page);
            if entry & (PRESENT | SWAPPED) != 0 && entry & FILE == 0 && entry & FRAME != zero {
                pages.insert(page);
            }
        }
    }
    pages
}

#[test]
fn the_holes_of_a_tracked_dump_are_all_private_pages() {
    let workload = Workload::start(&format!("exec /usr/bin/python3 -c \"{MEMORY}\""));
    let ready = |pid: u32| workload.directory.path().join(format!("ready{pid}")).exists();
    wait_until("both processes are ready", || ready(2) && ready(3));
    let zero = zero_frame();
    let images = workload.images("1");
    let mut collector = Collector::new(&workload, true);
    let mut wanted = Vec::new();
    let (dumped, served) = workload.dump(&images, true, true, &mut collector, &mut |stage| {
        if stage == "post-dump" {
            wanted = [2, 3].map(|pid| (pid, private_pages(workload.outside(pid).unwrap(), zero))).to_vec();
        }
        true
    });
    dumped.unwrap();
    let summary = served.unwrap();
    for (pid, wanted) in wanted {
        let space = Space::Task(pid);
        assert!(wanted.len() > 2300 && wanted.len() < 6000, "{} pages", wanted.len());
        let got: BTreeSet<u64> = collector.pages[&space].keys().copied().collect();
        let missing: Vec<_> = wanted.difference(&got).collect();
        assert!(missing.is_empty(), "task {pid}: {} pages are missing: {missing:x?}", missing.len());
        let needless = got.difference(&wanted).count();
        assert!(needless <= 4, "task {pid}: {needless} more than the vdso's");
        let sent = got.len() - collector.holes[&space].len();
        assert!(sent <= 4, "task {pid}: {sent} pages were sent and not holes");
    }
    let shared: usize =
        collector.pages.iter().filter(|(s, _)| matches!(s, Space::Shared(_))).map(|(_, p)| p.len()).sum();
    assert_eq!(shared, 256);
    eprintln!("{summary:?}");
}

#[test]
fn a_dump_called_off_at_post_dump_lets_the_workload_run_on() {
    let workload = Workload::redis();
    let mut collector = Collector::new(&workload, true);
    let images = workload.images("1");
    let mut stages = Vec::new();
    let (dumped, served) = workload.dump(&images, true, false, &mut collector, &mut |stage| {
        stages.push(stage.to_owned());
        stage != "post-dump"
    });
    served.unwrap();
    assert!(matches!(dumped, Err(CriuError::CalledOff { stage, .. }) if stage == "post-dump"));
    eprintln!("{stages:?}");
    workload.assert_running();
}

#[test]
fn a_dump_that_leaves_nothing_running_ends_the_tree() {
    let workload = Workload::redis();
    let mut collector = Collector::new(&workload, true);
    let (dumped, served) = workload.dump(&workload.images("1"), true, false, &mut collector, &mut |_| true);
    dumped.unwrap();
    served.unwrap();
    wait_until("the tree is gone", || workload.outside(ROOT_PID).is_none());
}

/// Fails at a given call, counted over all.
struct Failing<'a> {
    inner: Collector<'a>,
    calls_left: u32,
    at_close: bool,
}

impl Failing<'_> {
    fn count(&mut self) -> io::Result<()> {
        self.calls_left = self.calls_left.checked_sub(1).ok_or_else(|| io::Error::other("as told"))?;
        Ok(())
    }
}

impl Handler for Failing<'_> {
    fn opened(&mut self, space: Space) -> io::Result<bool> {
        self.inner.opened(space)
    }
    fn hole(&mut self, space: Space, extent: Extent) -> io::Result<()> {
        self.count()?;
        self.inner.hole(space, extent)
    }
    fn pages(&mut self, space: Space, extent: Extent, lazy: bool, bytes: &[u8]) -> io::Result<()> {
        self.count()?;
        self.inner.pages(space, extent, lazy, bytes)
    }
    fn close(&mut self) -> io::Result<()> {
        if self.at_close { Err(io::Error::other("as told")) } else { Ok(()) }
    }
}

#[test]
fn a_page_server_that_fails_lets_the_workload_run_on() {
    let workload = Workload::redis();
    for (number, (tracked, calls_left, at_close)) in
        [(true, 10, false), (false, 3, false), (true, u32::MAX, true)].into_iter().enumerate()
    {
        let mut failing = Failing { inner: Collector::new(&workload, tracked), calls_left, at_close };
        let images = workload.images(&number.to_string());
        let (dumped, served) = workload.dump(&images, tracked, true, &mut failing, &mut |_| true);
        assert!(matches!(served, Err(PageServerError::Handler { .. })), "{served:?}");
        assert!(matches!(dumped, Err(CriuError::Refused { .. })), "{dumped:?}");
        workload.assert_running();
    }
    let mut collector = Collector::new(&workload, true);
    let (dumped, _) = workload.dump(&workload.images("good"), true, true, &mut collector, &mut |_| true);
    dumped.unwrap();
    workload.assert_running();
}

#[test]
fn an_agent_that_goes_away_during_a_dump_leaves_the_workload_running() {
    let workload = Workload::redis();
    let images = workload.images("1");
    let mut criu = workload.spawn(&images, true, None);
    // Nobody serves the pages: the socket is closed while CRIU is at work.
    drop(criu.take_page_server());
    let options = DumpOptions::new(ROOT_PID);
    assert!(criu.dump(&options, &mut |_| true).is_err());
    workload.assert_running();
}

#[test]
fn a_refusal_gives_the_reason_and_leaves_the_workload_running() {
    let workload = Workload::start(
        "exec /usr/bin/python3 -c \"
import ctypes, time
fd = ctypes.CDLL(None).syscall(323, 0)
n = 0
while True:
    n += 1
    open('count', 'w').write(str(n))
    time.sleep(0.01)
\"",
    );
    let count = workload.directory.path().join("count");
    let counted = || fs::read_to_string(&count).ok().and_then(|text| text.parse::<u64>().ok());
    wait_until("it counts", || counted() > Some(2));
    let images = workload.images("1");
    let (dumped, _) = workload.dump(&images, true, true, &mut Collector::new(&workload, true), &mut |_| true);
    let error = dumped.unwrap_err().to_string();
    eprintln!("{error}");
    assert!(error.contains("userfaultfd"), "{error}\n{}", fs::read_to_string(images.join(DUMP_LOG)).unwrap());
    let before = counted().unwrap_or(0);
    wait_until("it counts on", || counted() > Some(before + 2));
}

/// Takes the list alone.
#[derive(Default)]
struct Count(u64);
impl Handler for Count {
    fn opened(&mut self, space: Space) -> io::Result<bool> {
        Ok(matches!(space, Space::Task(_)))
    }
    fn hole(&mut self, _: Space, extent: Extent) -> io::Result<()> {
        self.0 += extent.pages;
        Ok(())
    }
    fn pages(&mut self, _: Space, _: Extent, _: bool, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn close(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_gigabyte_comes_as_a_list_without_content() {
    let workload = Workload::start(
        "exec /usr/bin/python3 -c \"
import mmap, time
big = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)
for page in range(0, 1 << 30, 4096): big[page] = 1
open('ready', 'w').close()
while True: time.sleep(1)
\"",
    );
    wait_until("it is ready", || workload.directory.path().join("ready").exists());
    for number in 0..4 {
        let mut count = Count::default();
        let directory = workload.images(&number.to_string());
        let began = std::time::Instant::now();
        let (dumped, served) = workload.dump(&directory, true, true, &mut count, &mut |_| true);
        dumped.unwrap();
        let summary = served.unwrap();
        eprintln!("{:?} with the start; {summary:?}", began.elapsed());
        assert!(count.0 > 262_144 && summary.content_pages < 16);
    }
}

/// Hangs in the middle of a dump, at a given call.
struct Hanging<'a> {
    directory: &'a Path,
    stage: &'a str,
}

impl Hanging<'_> {
    fn at(&self, stage: &str) {
        if stage == self.stage {
            fs::write(self.directory.join("frozen"), "").unwrap();
            loop {
                std::thread::park();
            }
        }
    }
}

impl Handler for Hanging<'_> {
    fn opened(&mut self, _: Space) -> io::Result<bool> {
        Ok(false)
    }
    fn hole(&mut self, _: Space, _: Extent) -> io::Result<()> {
        Ok(())
    }
    fn pages(&mut self, _: Space, _: Extent, _: bool, _: &[u8]) -> io::Result<()> {
        self.at("pages");
        Ok(())
    }
    fn close(&mut self) -> io::Result<()> {
        self.at("close");
        Ok(())
    }
}

/// Not a test: the agent that the next test kills. `STANDIN_TEST_HANG` has the room's init, where
/// to hang, and the directory.
#[test]
#[ignore = "started by the test that kills it"]
fn an_agent_hangs_in_a_dump() {
    let words = std::env::var("STANDIN_TEST_HANG").expect("started by the test that kills it");
    let [init, stage, directory] = words.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let directory = Path::new(directory);
    let room = pidfd(init.parse().unwrap());
    let images = File::open(directory).unwrap();
    let bridge = Bridge::new(directory, install().version).unwrap();
    let place = Place::Inside { init: room.as_fd(), cgroup: false, ipc: Some(room.as_fd()) };
    let spawn = Spawn { place, bridge: Some(&bridge), page_server: true, ..Spawn::new(images.as_fd()) };
    let mut criu = Swrk::spawn(&install(), &spawn).unwrap();
    let (socket, version) = (criu.take_page_server().unwrap(), criu.version());
    std::thread::scope(|scope| {
        scope.spawn(|| page_server::serve(&socket, version, &mut Hanging { directory, stage }));
        criu.dump(&DumpOptions::new(ROOT_PID), &mut |name| {
            Hanging { directory, stage }.at(name);
            true
        })
    })
    .unwrap();
}

fn pidfd(pid: i32) -> OwnedFd {
    // SAFETY: the call touches no memory, and what it returns, if no error, is a new descriptor.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd as i32)
    }
}

#[test]
fn an_agent_that_is_killed_during_a_dump_leaves_the_workload_running() {
    let workload = Workload::redis();
    for stage in ["pre-dump", "pages", "close", "post-dump"] {
        let directory = workload.images(stage);
        let words = format!("{} {stage} {}", workload.room.init(), directory.display());
        let mut agent = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "dump::an_agent_hangs_in_a_dump"])
            .env("STANDIN_TEST_HANG", words)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        wait_until(stage, || directory.join("frozen").exists());
        agent.kill().unwrap();
        agent.wait().unwrap();
        wait_until("redis answers again", || workload.redis_cli(&["ping"]) == "PONG");
        workload.assert_running();
    }
    let mut collector = Collector::new(&workload, true);
    let (dumped, _) = workload.dump(&workload.images("good"), true, true, &mut collector, &mut |_| true);
    dumped.unwrap_or_else(|error| panic!("{error}"));
    workload.assert_running();
}
