//! The program: this test binary, run again in a sandbox.
//!
//! ```text
//!  root ── threads, each with an arena ── children that fork, execute, share the memory, end
//!    └──── partner: one process with one thread, an arena, a break, a stack that grows; it shares memory with the root
//! ```
//!
//! It counts a tick whenever every thread, and the partner, has found all that it knows of to be right since the last
//! one. What is wrong it says, and then there are no more ticks.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::Ordering::SeqCst,
    thread,
    time::{Duration, Instant},
};

use standin::workload::control;

use crate::{
    arena::{Arena, SLOTS, fill, holds},
    kernel::{self, Kernel},
    random::Random,
    shared::{Board, Shared, WRITERS, Writer},
    sys::{self, PAGE},
};

const ROLE: &str = "STANDIN_TORTURE_ROLE";
const DIR: &str = "STANDIN_TORTURE_DIR";
const THREADS: usize = 3;
/// The partner's number among the writers; the root's main thread comes behind it.
const PARTNER: usize = THREADS;
/// Of one thread; a child may have one less.
const CHILDREN_MAX: usize = 2;
const STEP: Duration = Duration::from_millis(2);
/// The word of the board that counts what is broken; those of the writers come first.
const BROKEN: usize = WRITERS;

/// The command for a sandbox.
pub(crate) fn command(role: &str, dir: &Path) -> control::Command {
    control::Command {
        argv: vec![env::current_exe().unwrap().to_str().unwrap().to_owned()],
        env: vec![format!("{ROLE}={role}"), format!("{DIR}={}", dir.display())],
        cwd: "/".into(),
        user: control::User::default(),
    }
}

/// Runs the role that this process was started for, if there is one.
pub(crate) fn run_role() {
    let Ok(role) = env::var(ROLE) else { return };
    let (name, seed) = role.split_once(' ').expect("a role and a seed");
    let seed = seed.parse().expect("a seed is a number");
    match name {
        "root" => root(seed),
        "leaf" => leaf(seed),
        _ => unreachable!("no role {name}"),
    }
}

fn data_file() -> PathBuf {
    PathBuf::from(env::var_os(DIR).expect("a directory")).join("data")
}

fn root(seed: u64) {
    kernel::make_file(&data_file()).expect("a file");
    let shared = Shared::new();
    BOARD.set(shared.board).ok().expect("set once");
    if sys::fork().expect("a fork").is_none() {
        partner(seed, shared);
    }
    let shared: &Shared = Box::leak(Box::new(shared));
    for number in 0..THREADS {
        thread::spawn(move || {
            let mut writer = Writer::new(number, shared);
            let mut worker = Worker::new(seed, number as u64);
            loop {
                worker.steps(Some((shared, &mut writer)));
                worker.check();
                writer.check(shared);
                shared.board.word(number).fetch_add(1, SeqCst);
                thread::sleep(STEP);
            }
        });
    }
    let (mut writer, mut random) = (Writer::new(PARTNER + 1, shared), Random::new(seed ^ 0x7007));
    let (mut ticks, mut seen) = (0_u64, [0; PARTNER + 1]);
    loop {
        thread::sleep(STEP);
        writer.write(shared, &mut random);
        writer.check(shared);
        let counts: [u64; PARTNER + 1] = std::array::from_fn(|at| shared.board.word(at).load(SeqCst));
        let all_went_on = counts.iter().zip(seen).all(|(count, seen)| *count > seen);
        if all_went_on && shared.board.word(BROKEN).load(SeqCst) == 0 {
            shared.check();
            (ticks, seen) = (ticks + 1, counts);
            sys::say(&format!("tick {ticks}"));
        }
    }
}

static BOARD: std::sync::OnceLock<Board> = std::sync::OnceLock::new();

/// Says what is wrong, and ends the process.
pub(crate) fn broken(what: &str) -> ! {
    sys::say(&format!("BROKEN {}: {what}", std::process::id()));
    if let Some(board) = BOARD.get() {
        board.word(BROKEN).fetch_add(1, SeqCst);
    }
    std::process::abort()
}

/// Works until it is killed.
fn partner(seed: u64, mut shared: Shared) -> ! {
    let mut writer = Writer::new(PARTNER, &shared);
    let mut worker = Worker::new(seed, PARTNER as u64);
    let mut stack = GrowingStack::new();
    loop {
        worker.steps(Some((&shared, &mut writer)));
        worker.heap.change(&mut worker.random);
        stack.grow(&mut worker.random);
        if worker.random.one_in(16) {
            shared.map_again();
        }
        worker.check();
        stack.check();
        writer.check(&shared);
        shared.board.word(PARTNER).fetch_add(1, SeqCst);
        thread::sleep(STEP);
    }
}

/// Another program, for a short while.
fn leaf(seed: u64) -> ! {
    let mut worker = Worker::new(seed, 0x100 + seed % 0x100);
    let mut stack = GrowingStack::new();
    for _ in 0..worker.random.below(30) {
        worker.steps(None);
        worker.heap.change(&mut worker.random);
        stack.grow(&mut worker.random);
        worker.check();
        stack.check();
        thread::sleep(STEP);
    }
    worker.await_children();
    sys::exit(0)
}

/// One thread with its arena.
struct Worker {
    random: Random,
    arena: Arena,
    kernel: Kernel,
    heap: Heap,
    children: Vec<i32>,
    depth: usize,
}

impl Worker {
    fn new(seed: u64, number: u64) -> Self {
        Self {
            random: Random::new(seed << 16 ^ number),
            arena: Arena::new(number),
            kernel: Kernel::new(&data_file()),
            heap: Heap::default(),
            children: Vec::new(),
            depth: 0,
        }
    }

    fn steps(&mut self, mut writer: Option<(&Shared, &mut Writer)>) {
        for _ in 0..=self.random.below(24) {
            match self.random.below(12) {
                0..3 => self.arena.change(&mut self.random, &self.kernel.file),
                3 | 4 => self.kernel.write(&mut self.arena, &mut self.random),
                5 => {
                    if let Some((shared, writer)) = &mut writer {
                        writer.write(shared, &mut self.random);
                    }
                }
                6 if self.random.one_in(4) => deep_stack(self.random.below(100), self.random.next()),
                7 if self.random.one_in(24) => self.child(),
                _ => self.write(),
            }
        }
    }

    fn write(&mut self) {
        let range = Arena::range(&mut self.random);
        for slot in range.step_by(1 + self.random.below(3)).take(48) {
            self.arena.write(slot, &mut self.random);
        }
    }

    fn check(&mut self) {
        self.arena.check();
        self.heap.check();
        self.children.retain(|child| {
            let status = sys::ended(*child, false);
            status.is_none() || !is_well(*child, status)
        });
    }

    /// One more process, of one kind or another.
    fn child(&mut self) {
        if self.children.len() + self.depth >= CHILDREN_MAX {
            return;
        }
        let role = format!("leaf {}", self.random.below(1 << 30));
        match self.random.below(8) {
            // What the C library makes of this is a vfork.
            0 | 1 => {
                let program = env::current_exe().expect("a program");
                let child =
                    Command::new(program).env(ROLE, role).stdout(std::process::Stdio::inherit()).spawn();
                self.children.push(child.expect("a child").id() as i32);
            }
            2 => self.sharer(),
            kind => match sys::fork().expect("a fork") {
                Some(pid) => self.children.push(pid),
                None if kind == 3 => execute(&role),
                None => self.in_child(),
            },
        }
    }

    fn in_child(&mut self) -> ! {
        self.arena.after_fork();
        self.kernel.after_fork();
        self.children.clear();
        self.depth += 1;
        self.check();
        let until = Instant::now() + Duration::from_millis(self.random.below(300) as u64);
        while Instant::now() < until {
            self.steps(None);
            self.heap.change(&mut self.random);
            self.check();
            thread::sleep(STEP);
        }
        self.await_children();
        if self.random.one_in(4) {
            execute(&format!("leaf {}", self.random.below(1 << 30)));
        }
        sys::exit(0)
    }

    /// Orphans would be adopted by the sandbox's init, outside of the tree.
    fn await_children(&mut self) {
        for child in std::mem::take(&mut self.children) {
            is_well(child, sys::ended(child, true));
        }
    }

    /// A process that shares this one's memory writes a page of it.
    fn sharer(&mut self) {
        let slot = self.random.below(SLOTS);
        let run = self.arena.run(slot, 1, crate::arena::Slot::writable);
        if run.is_empty() {
            return;
        }
        let stamp = self.arena.new_stamp();
        let mut order = Order { at: self.arena.address(slot), stamp, us: self.random.below(4000) as u64 };
        self.arena.wrote(run, |_| stamp);
        let pid = sys::clone_with_memory(share, (&raw mut order) as usize).expect("a clone");
        is_well(pid, sys::ended(pid, true));
    }
}

/// True: a child has found nothing wrong.
fn is_well(child: i32, status: Option<i32>) -> bool {
    if status == Some(0) { true } else { broken(&format!("child {child} ended with status {status:x?}")) }
}

/// What a process with its parent's memory does.
struct Order {
    at: usize,
    stamp: u64,
    us: u64,
}

extern "C" fn share(order: *mut libc::c_void) -> i32 {
    // SAFETY: the parent waits for this process and keeps the order.
    let order = unsafe { &*order.cast::<Order>() };
    sys::raw_sleep_us(order.us / 2);
    fill(order.at, order.stamp, usize::MAX);
    sys::raw_sleep_us(order.us / 2);
    0
}

fn execute(role: &str) -> ! {
    use std::os::unix::process::CommandExt;
    let error = Command::new(env::current_exe().expect("a program")).env(ROLE, role).exec();
    broken(&format!("exec: {error}"))
}

/// Frames of a page each, which must be the same on the way back.
#[inline(never)]
fn deep_stack(depth: usize, stamp: u64) {
    let frame = [stamp; PAGE / 8];
    std::hint::black_box(&frame);
    if depth > 0 {
        deep_stack(depth - 1, stamp.wrapping_add(1));
    } else {
        thread::sleep(STEP);
    }
    if std::hint::black_box(&frame).iter().any(|word| *word != stamp) {
        broken(&format!("a frame of the stack, {depth} frames from the end"));
    }
}

/// Memory by brk(2), in a process with one thread.
#[derive(Default)]
struct Heap {
    start: usize,
    stamps: Vec<u64>,
}

impl Heap {
    const PAGES_MAX: usize = 64;

    /// Grows it, shrinks it or writes to it; left alone once the C library has taken more behind it.
    fn change(&mut self, random: &mut Random) {
        if self.start == 0 {
            let now = sys::move_break(0).expect("a break");
            self.start = now.next_multiple_of(PAGE);
            sys::move_break((self.start - now) as isize).expect("a break that moves");
        }
        let end = self.start + self.stamps.len() * PAGE;
        if sys::move_break(0).expect("a break") == end {
            let pages = random.below(Self::PAGES_MAX);
            sys::move_break((pages as isize - self.stamps.len() as isize) * PAGE as isize).expect("a break");
            self.stamps.resize(pages, 0);
        }
        if let Some(last) = self.stamps.len().checked_sub(1) {
            let (page, stamp) = (random.below(last + 1), random.next());
            self.stamps[page] = stamp;
            fill(self.start + page * PAGE, stamp, usize::MAX);
        }
    }

    fn check(&self) {
        for (page, stamp) in self.stamps.iter().enumerate() {
            if !holds(self.start + page * PAGE, *stamp, usize::MAX) {
                broken(&format!("page {page} of the break"));
            }
        }
    }
}

/// A mapping that grows downwards by itself.
struct GrowingStack {
    /// Where it begins; it lies below.
    top: usize,
    stamps: Vec<u64>,
}

impl GrowingStack {
    const PAGES_MAX: usize = 256;

    fn new() -> Self {
        let top = 0x1f00_0000_0000;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        sys::map(Some(top - 4 * PAGE), 4 * PAGE, access, flags, None).expect("a mapping that grows");
        Self { top, stamps: vec![0; 4] }
    }

    /// A few pages further down, as calls do, and a write to one.
    fn grow(&mut self, random: &mut Random) {
        for _ in 0..random.below(4) {
            if self.stamps.len() < Self::PAGES_MAX {
                self.stamps.push(random.next());
                fill(self.top - self.stamps.len() * PAGE, self.stamps[self.stamps.len() - 1], usize::MAX);
            }
        }
        let page = random.below(self.stamps.len());
        self.stamps[page] = random.next();
        fill(self.top - (page + 1) * PAGE, self.stamps[page], usize::MAX);
    }

    fn check(&self) {
        for (page, stamp) in self.stamps.iter().enumerate() {
            if !holds(self.top - (page + 1) * PAGE, *stamp, usize::MAX) {
                broken(&format!("page {page} of a stack that grew"));
            }
        }
    }
}
