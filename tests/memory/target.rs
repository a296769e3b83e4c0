//! The target: this test binary, run again as a program that takes commands on its standard input (a
//! socket) and answers each with a line.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

const PAGE: usize = 4096;
const MARK: &str = "STANDIN_MEMORY_TARGET";

/// A running target; killed and reaped when dropped.
pub(crate) struct Target {
    launcher: Child,
    pid: i32,
    socket: BufReader<UnixStream>,
}

impl Target {
    pub(crate) fn start() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let launcher = Self::command("1")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut target = Self { launcher, pid: 0, socket: BufReader::new(ours) };
        target.pid = target.answer().strip_prefix("ready ").unwrap().parse().unwrap();
        target
    }

    fn command(stage: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "target::the_target_program", "--nocapture"]).env(MARK, stage);
        command
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a command and waits for its answer.
    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer()
    }

    /// Sends a command only.
    pub(crate) fn tell(&mut self, command: &str) {
        writeln!(self.socket.get_mut(), "{command}").unwrap();
    }

    /// Waits for the answer of a command.
    pub(crate) fn answer(&mut self) -> String {
        let mut line = String::new();
        self.socket.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the target has died");
        line.trim_end().to_owned()
    }

    pub(crate) fn signal(&self, signal: i32) {
        signal_process(self.pid(), signal);
    }

    /// Stops it and waits until all threads have stopped.
    pub(crate) fn freeze(&self) {
        self.signal(libc::SIGSTOP);
        await_state(self.pid(), |states| states.chars().all(|state| state == 'T'));
    }

    pub(crate) fn thaw(&self) {
        self.signal(libc::SIGCONT);
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // The program dies with its launcher.
        self.launcher.kill().unwrap();
        self.launcher.wait().unwrap();
    }
}

pub(crate) fn signal_process(pid: i32, signal: i32) {
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::try_from(signal).unwrap(),
    )
    .unwrap();
}

/// The state letters of all threads.
pub(crate) fn states(pid: i32) -> String {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok();
    threads
        .into_iter()
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("stat")).ok())
        .filter_map(|stat| stat.rsplit_once(") ")?.1.chars().next())
        .collect()
}

pub(crate) fn await_state(pid: i32, wanted: impl Fn(&str) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !wanted(&states(pid)) {
        assert!(Instant::now() < deadline, "process {pid} is in states {}", states(pid));
        thread::sleep(Duration::from_millis(1));
    }
}

/// Not a test when run by hand: the program that [`Target::start`] runs.
///
/// libtest runs it on a second thread; a fork makes that the main thread of a process of its own, because
/// the main thread is the one that an attach stops.
#[test]
fn the_target_program() {
    let Some(stage) = std::env::var_os(MARK) else { return };
    // SAFETY: the child goes on alone, and the C library's allocator allows that after a fork.
    let child = if stage == "1" { unsafe { libc::fork() } } else { 0 };
    if child == 0 {
        // SAFETY: integers only.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        Program::default().run();
        std::process::exit(0);
    }
    // SAFETY: waits for the child.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);
static WRITING: AtomicBool = AtomicBool::new(true);

extern "C" fn count_signal(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// One mapping of the target's own.
struct Area {
    start: *mut u8,
    pages: usize,
    writable: bool,
}

#[derive(Default)]
struct Program {
    areas: Vec<Area>,
    named: HashMap<String, (usize, usize)>,
    children: Vec<i32>,
    rng: u64,
}

fn write_page(start: *mut u8, page: usize, value: u64) {
    // SAFETY: callers pass a page of a writable mapping of theirs.
    unsafe { start.add(page * PAGE).cast::<[u8; 8]>().write_volatile(value.to_ne_bytes()) }
}

fn map(pages: usize, flags: i32, fd: i32) -> *mut u8 {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping where the kernel likes.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, access, flags, fd, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    start.cast()
}

fn file_of(pages: usize) -> std::os::fd::OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..pages {
        file.write_all(&[page as u8 | 1; PAGE]).unwrap();
    }
    file.into()
}

/// A system call with its raw answer: `-1` and errno, untouched by a retry loop.
fn timed(call: impl FnOnce() -> i64) -> String {
    let before = Instant::now();
    let result = call();
    let errno = if result < 0 { std::io::Error::last_os_error().raw_os_error().unwrap() } else { 0 };
    format!("{result} {errno} {}", before.elapsed().as_millis())
}

impl Program {
    fn run(&mut self) {
        let mut input = BufReader::with_capacity(256, std::io::stdin());
        // SAFETY: the descriptor is open for the program's life.
        let mut output = unsafe { <UnixStream as std::os::fd::FromRawFd>::from_raw_fd(libc::dup(0)) };
        // SAFETY: the handler only adds to an atomic; no SA_RESTART, so that calls are interrupted.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count_signal as *const () as usize;
            libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
        }
        writeln!(output, "ready {}", std::process::id()).unwrap();
        let mut line = String::new();
        while input.read_line(&mut line).unwrap() > 0 {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            let answer = self.obey(&words);
            writeln!(output, "{answer}").unwrap();
            line.clear();
        }
    }

    fn obey(&mut self, words: &[&str]) -> String {
        let number = |i: usize| words.get(i).map_or(0, |word| word.parse::<u64>().unwrap());
        match words[0] {
            "soak" => {
                self.rng = number(1) | 1;
                (0..number(2)).for_each(|_| self.random_operation());
            }
            "signals" => return SIGNALS.load(Ordering::Relaxed).to_string(),
            "sleep" => return sleep_by(words[1], number(2)),
            "writers" => {
                for _ in 0..number(1) {
                    Self::start_writer();
                }
            }
            "still" => WRITING.store(false, Ordering::Relaxed),
            "exec" => {
                let error = Target::command("2").exec();
                panic!("exec failed: {error}");
            }
            "fork" => return self.fork().to_string(),
            "forks" => return fork_beside(number(1)),
            "vfork" => return vfork_and_sleep(number(1)).to_string(),
            "replace" => return replace_and_move(number(1), false).to_string(),
            "replace-first" => return replace_and_move(number(1), true).to_string(),
            "limit" => return limit_descriptors().to_string(),
            name => return self.on_memory(name, words, &number),
        }
        "done".into()
    }

    /// Commands on a named mapping: `VERB NAME …`.
    fn on_memory(&mut self, verb: &str, words: &[&str], number: &dyn Fn(usize) -> u64) -> String {
        let name = words[1].to_owned();
        let pages = number(2) as usize;
        let known = self.named.get(&name).copied().unwrap_or_default();
        let (start, held) = (known.0 as *mut u8, known.1);
        let new = match verb {
            "anon" => Some(map(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)),
            "shared" => Some(map(pages, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)),
            "file" => {
                let file = file_of(pages);
                Some(map(pages, libc::MAP_PRIVATE, std::os::fd::AsRawFd::as_raw_fd(&file)))
            }
            _ => None,
        };
        if let Some(start) = new {
            self.named.insert(name, (start as usize, pages));
            return (start as usize).to_string();
        }
        match verb {
            // fill NAME VALUE [EVERY]
            "fill" => {
                let every = number(3).max(1) as usize;
                (0..held).step_by(every).for_each(|page| write_page(start, page, number(2) + page as u64));
            }
            "poke" => write_page(start, pages, number(3)),
            "drop" => {
                // SAFETY: a mapping of this program that nothing else refers to.
                let dropped = unsafe { libc::madvise(start.cast(), held * PAGE, libc::MADV_DONTNEED) };
                assert_eq!(dropped, 0);
            }
            // resize NAME PAGES: in place if there is room, else elsewhere
            "resize" | "move" => {
                let (len, flags) = if verb == "move" { (held, libc::MREMAP_FIXED) } else { (pages, 0) };
                let room = map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
                // SAFETY: a mapping of this program that nothing else refers to, and room for it.
                let moved = unsafe {
                    let flags = libc::MREMAP_MAYMOVE | flags;
                    libc::mremap(start.cast(), held * PAGE, len * PAGE, flags, room)
                };
                assert_ne!(moved, libc::MAP_FAILED);
                self.named.insert(name, (moved as usize, len));
                return (moved as usize).to_string();
            }
            // shrink NAME PAGES: a hole behind it
            "shrink" => {
                // SAFETY: as above.
                let cut = unsafe { libc::munmap(start.add(pages * PAGE).cast(), (held - pages) * PAGE) };
                assert_eq!(cut, 0);
                self.named.insert(name, (start as usize, pages));
            }
            // join NAME: the mapping `b` goes right behind it
            "join" => {
                let (from, len) = self.named["b"];
                let behind = start.wrapping_add(held * PAGE);
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                // SAFETY: as above; there is a hole.
                let moved =
                    unsafe { libc::mremap(from as *mut libc::c_void, len * PAGE, len * PAGE, flags, behind) };
                assert_eq!(moved, behind.cast());
            }
            // rejoin NAME US PAGE VALUE: makes the mapping `new`, and after a while joins `b` to NAME and writes a page of it
            "rejoin" => {
                let fresh = map(1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
                write_page(fresh, 0, 1);
                self.named.insert("new".into(), (fresh as usize, 1));
                spin(Duration::from_nanos(number(2)));
                self.on_memory("join", &["join", &name], number);
                write_page(start, number(3) as usize, number(4));
            }
            // unjoin NAME: takes away what `rejoin` has made, and makes `b` anew
            "unjoin" => {
                for (at, len) in [
                    (start.wrapping_add(held * PAGE), self.named["b"].1),
                    (self.named["new"].0 as *mut u8, 1),
                ] {
                    // SAFETY: as above.
                    assert_eq!(unsafe { libc::munmap(at.cast(), len * PAGE) }, 0);
                }
                let (at, len) = self.named["b"];
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
                let access = libc::PROT_READ | libc::PROT_WRITE;
                // SAFETY: nothing is there.
                let again = unsafe { libc::mmap(at as *mut libc::c_void, len * PAGE, access, flags, -1, 0) };
                assert_eq!(again as usize, at);
            }
            "guard" => {
                const MADV_GUARD_INSTALL: i32 = 102;
                // SAFETY: as above; it is not touched again.
                let done = unsafe { libc::madvise(start.cast(), pages * PAGE, MADV_GUARD_INSTALL) };
                return done.to_string();
            }
            "protect" => {
                // SAFETY: as above.
                assert_eq!(unsafe { libc::mprotect(start.cast(), held * PAGE, pages as i32) }, 0);
            }
            "remake" => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                let access = libc::PROT_READ | libc::PROT_WRITE;
                // SAFETY: as above.
                let again = unsafe { libc::mmap(start.cast(), held * PAGE, access, flags, -1, 0) };
                assert_eq!(again, start.cast());
            }
            "receive" => {
                let (mut from, mut to) = UnixStream::pair().unwrap();
                // SAFETY: as above, and writable.
                let into = unsafe { std::slice::from_raw_parts_mut(start.add(pages * PAGE), 64) };
                to.write_all(&[number(3) as u8; 64]).unwrap();
                from.read_exact(into).unwrap();
            }
            _ => panic!("no command {verb}"),
        }
        "done".into()
    }

    fn random(&mut self, below: usize) -> usize {
        // xorshift64: reproducible and without a dependency.
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        (self.rng % below as u64) as usize
    }

    fn random_operation(&mut self) {
        if self.areas.len() < 4 {
            return self.new_area();
        }
        let which = self.random(self.areas.len());
        match self.random(32) {
            0 if self.areas.len() < 24 => self.new_area(),
            1 => {
                let area = self.areas.swap_remove(which);
                // SAFETY: the area is this program's and forgotten.
                unsafe { libc::munmap(area.start.cast(), area.pages * PAGE) };
            }
            2 => self.resize(which),
            3 => self.protect(which),
            4..=6 => self.discard(which),
            7 => self.grow_the_heap(),
            8 => deep_stack(self.random(60)),
            9 => {
                let status = self.fork();
                self.children.push(status);
                self.reap(2);
            }
            10 => {
                let value = self.random(1 << 30) as u64;
                thread::spawn(move || deep_stack((value % 16) as usize)).join().unwrap();
            }
            11..=13 => self.read_into(which),
            _ => {
                let area = &self.areas[which];
                let (start, pages, writable) = (area.start, area.pages, area.writable);
                for _ in 0..self.random(6) {
                    let (page, value) = (self.random(pages), self.random(1 << 40) as u64);
                    if writable {
                        write_page(start, page, value);
                    } else {
                        // SAFETY: a read of a mapped page.
                        unsafe { start.add(page * PAGE).read_volatile() };
                    }
                }
            }
        }
    }

    fn new_area(&mut self) {
        let pages = 1 + self.random(64);
        let start = if self.random(3) == 0 {
            let file = file_of(pages);
            map(pages, libc::MAP_PRIVATE, std::os::fd::AsRawFd::as_raw_fd(&file))
        } else {
            map(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
        };
        self.areas.push(Area { start, pages, writable: true });
    }

    fn resize(&mut self, which: usize) {
        let grown = 1 + self.random(64);
        let area = &mut self.areas[which];
        // SAFETY: the area is this program's; its address is updated.
        let start =
            unsafe { libc::mremap(area.start.cast(), area.pages * PAGE, grown * PAGE, libc::MREMAP_MAYMOVE) };
        assert_ne!(start, libc::MAP_FAILED);
        // A file mapping must not reach behind its file: pages there cannot be touched.
        (area.start, area.pages) = (start.cast(), grown.min(area.pages));
        if grown > area.pages {
            // SAFETY: the tail behind the kept pages.
            unsafe { libc::munmap(area.start.add(area.pages * PAGE).cast(), (grown - area.pages) * PAGE) };
        }
    }

    fn protect(&mut self, which: usize) {
        let area = &mut self.areas[which];
        area.writable = !area.writable;
        let access = if area.writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: the area is this program's and respects `writable`.
        assert_eq!(unsafe { libc::mprotect(area.start.cast(), area.pages * PAGE, access) }, 0);
    }

    fn discard(&mut self, which: usize) {
        let area = &self.areas[which];
        let (start, pages) = (area.start, area.pages);
        let first = self.random(pages);
        let count = 1 + self.random(pages - first);
        // SAFETY: pages of an area of this program, whose content does not matter.
        unsafe { libc::madvise(start.add(first * PAGE).cast(), count * PAGE, libc::MADV_DONTNEED) };
    }

    fn grow_the_heap(&mut self) {
        let pages = self.random(16);
        // SAFETY: the break is only moved up and only the new pages are written; the allocator copes.
        unsafe {
            let at = libc::sbrk((pages * PAGE) as isize).cast::<u8>();
            if at as isize != -1 {
                at.write_bytes(7, pages * PAGE);
            }
        }
    }

    /// The kernel writes, by read().
    fn read_into(&mut self, which: usize) {
        let area = &self.areas[which];
        let (start, pages, writable) = (area.start, area.pages, area.writable);
        if writable {
            let mut random = fs::File::open("/dev/urandom").unwrap();
            let page = self.random(pages);
            // SAFETY: one page of a writable area of this program.
            let into = unsafe { std::slice::from_raw_parts_mut(start.add(page * PAGE), PAGE) };
            random.read_exact(into).unwrap();
        }
    }

    /// A child that writes to its copy of the areas for a while.
    fn fork(&mut self) -> i32 {
        // SAFETY: the child only writes to memory and calls _exit and pause.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            for area in self.areas.iter().filter(|area| area.writable) {
                (0..area.pages).for_each(|page| write_page(area.start, page, 0xc0de));
            }
            // SAFETY: async-signal-safe calls.
            unsafe {
                libc::alarm(60);
                libc::pause();
                libc::_exit(0);
            }
        }
        pid
    }

    fn reap(&mut self, keep: usize) {
        while self.children.len() > keep {
            let pid = self.children.remove(0);
            // SAFETY: a child of this program.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, std::ptr::null_mut(), 0);
            }
        }
    }

    /// A thread that writes all the time.
    fn start_writer() {
        let start = map(256, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1) as usize;
        thread::spawn(move || {
            for value in 0u64.. {
                if !WRITING.load(Ordering::Relaxed) {
                    return;
                }
                write_page(start as *mut u8, (value * 7 % 256) as usize, value);
                if value % 64 == 0 {
                    thread::sleep(Duration::from_micros(200));
                }
            }
        });
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.reap(0);
    }
}

fn deep_stack(depth: usize) {
    let frame = [depth as u8; PAGE];
    std::hint::black_box(&frame);
    if depth > 0 {
        deep_stack(depth - 1);
    }
}

/// Sleeps in a system call of the kind named, for `ms` at most; "result errno ms".
fn sleep_by(kind: &str, ms: u64) -> String {
    let timeout = libc::timespec { tv_sec: (ms / 1000) as i64, tv_nsec: (ms % 1000 * 1_000_000) as i64 };
    // SAFETY: each call gets live objects, or none, as its manual page wants.
    unsafe {
        match kind {
            "nanosleep" => timed(|| libc::nanosleep(&raw const timeout, std::ptr::null_mut()).into()),
            "poll" => timed(|| libc::poll(std::ptr::null_mut(), 0, ms as i32).into()),
            "ppoll" => timed(|| {
                let mut mask: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut mask);
                libc::ppoll(std::ptr::null_mut(), 0, &raw const timeout, &raw const mask).into()
            }),
            "epoll" => timed(|| {
                let fd = libc::epoll_create1(libc::EPOLL_CLOEXEC);
                let mut event = libc::epoll_event { events: 0, u64: 0 };
                let result = libc::epoll_wait(fd, &raw mut event, 1, ms as i32);
                let error = std::io::Error::last_os_error();
                libc::close(fd);
                *libc::__errno_location() = error.raw_os_error().unwrap_or(0);
                result.into()
            }),
            "futex" => timed(|| {
                let word = 0u32;
                let wait = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
                libc::syscall(libc::SYS_futex, &raw const word, wait, 0, &raw const timeout)
            }),
            "pause" => timed(|| libc::pause().into()),
            "spin" => timed(|| {
                let end = Instant::now() + Duration::from_millis(ms);
                let mut sum = 0u64;
                while Instant::now() < end {
                    sum = std::hint::black_box(sum + 1);
                }
                0
            }),
            _ => panic!("no sleep {kind}"),
        }
    }
}

/// Leaves the program no free descriptor.
fn limit_descriptors() -> i32 {
    let limit = libc::rlimit { rlim_cur: 3, rlim_max: 3 };
    // SAFETY: a live object.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }
}

/// Children that wait, made one after the other by a thread of its own; their pids, when all are there. They end with this
/// program.
fn fork_beside(count: u64) -> String {
    let (tell, told) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for _ in 0..count {
            // SAFETY: the child makes system calls only.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                // SAFETY: async-signal-safe calls.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::alarm(60);
                    libc::pause();
                    libc::_exit(0);
                }
            }
            tell.send(pid.to_string()).unwrap();
        }
        drop(tell);
        // Its end would be theirs.
        loop {
            thread::park();
        }
    });
    told.iter().collect::<Vec<_>>().join(" ")
}

/// The parent waits, unkillable by a stop, until the child lets it go.
fn vfork_and_sleep(ms: u64) -> i32 {
    // CLONE_VM is left out, which is enough for the wait and safe for the child.
    // SAFETY: the child only sleeps and exits.
    unsafe {
        let pid = libc::syscall(libc::SYS_clone, libc::CLONE_VFORK | libc::SIGCHLD, 0, 0, 0, 0);
        if pid == 0 {
            libc::usleep(ms as u32 * 1000);
            libc::_exit(0);
        }
        libc::waitpid(pid as i32, std::ptr::null_mut(), 0);
        pid as i32
    }
}

/// Again and again a small mapping, a large one in its place, and that one moved; how often the kernel would not move it.
/// `first`: below all other mappings, the small one not where the large one begins.
fn replace_and_move(times: u64, first: bool) -> u64 {
    const PAGES: usize = 32;
    const LOW: usize = 16 << 20;
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let room = map(PAGES, private, -1);
    let place: *mut u8 = if first { std::ptr::without_provenance_mut(LOW) } else { map(PAGES, private, -1) };
    let small: *mut u8 = if first { place.wrapping_add(PAGES / 2 * PAGE) } else { place };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let mut refused = 0;
    for round in 0..times {
        // SAFETY: both places are this program's own and hold nothing.
        unsafe {
            libc::munmap(place.cast(), PAGES * PAGE);
            libc::mmap(small.cast(), PAGE, access, private | libc::MAP_FIXED, -1, 0);
            // Long enough to be found in the list of mappings, which is then read in vain.
            spin(Duration::from_micros(40 + round % 64));
            libc::munmap(small.cast(), PAGE);
            libc::mmap(place.cast(), PAGES * PAGE, access, private | libc::MAP_FIXED, -1, 0);
            spin(Duration::from_micros(round % 32));
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let moved = libc::mremap(place.cast(), PAGES * PAGE, PAGES * PAGE, flags, room);
            refused += u64::from(moved == libc::MAP_FAILED);
        }
    }
    refused
}

fn spin(time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {}
}
