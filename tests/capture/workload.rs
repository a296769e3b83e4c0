//! The workload: this test binary, run again in the sandbox. It forks, executes, shares and remaps memory all the time,
//! and checks of itself that it goes on from where it was.

use std::{
    fs::File,
    io::Write,
    os::{fd::AsFd, unix::process::CommandExt},
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use standin::workload::control;

use crate::{
    answers, clones,
    sys::{self, Mapping},
    traps,
};

pub(crate) const ROLE: &str = "STANDIN_CAPTURE_ROLE";
pub(crate) const DIR: &str = "STANDIN_CAPTURE_DIR";
/// Of the test that is the workload.
pub(crate) const NAME: &str = "workload::the_workload";
/// Makes the workload hold a descriptor that CRIU refuses, of the kind that is written in it, while a file of this name is
/// in its directory.
pub(crate) const REFUSED: &str = "refused";
/// Pages of the hot and the idle memory of the role `hot`.
pub(crate) const HOT_PAGES: usize = 8 << 10;
pub(crate) const IDLE_PAGES: usize = 32 << 10;

const PAGES: usize = 512;
const SHARED_PAGES: usize = 64;
const CHILDREN_MAX: usize = 4;
const STEP: Duration = Duration::from_millis(2);

/// The command for a sandbox.
pub(crate) fn command(role: &str, dir: &std::path::Path) -> control::Command {
    let program = std::env::current_exe().unwrap();
    let argv = [program.to_str().unwrap(), "--exact", NAME, "--nocapture"];
    control::Command {
        argv: argv.map(str::to_owned).to_vec(),
        env: vec![format!("{ROLE}={role}"), format!("{DIR}={}", dir.display())],
        cwd: "/".into(),
        user: control::User::default(),
    }
}

/// Not a test when run by hand.
#[test]
fn the_workload() {
    match std::env::var(ROLE).as_deref() {
        Ok("churn") => Churn::new().run(),
        Ok("leaf") => leaf(),
        Ok("hot") => hot(),
        Ok("in-step") => clones::in_step(),
        Ok(role) => {
            traps::run(role);
            answers::run(role);
        }
        Err(_) => {}
    }
}

/// A small generator: what is written need not be the same in each run.
struct Random(u64);

impl Random {
    fn new() -> Self {
        Self(u64::from(std::process::id()) << 32 | 0x9e37_79b9)
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 as usize % end
    }
}

/// What the root and its children write.
struct Memory {
    private: Mapping,
    shared: Mapping,
    /// The same memory file, mapped twice.
    memfd: [Mapping; 2],
    file: Mapping,
}

struct Churn {
    memory: &'static Memory,
    steady: Mapping,
    others: Vec<Mapping>,
    random: Random,
    children: usize,
    ticks: u64,
    dir: PathBuf,
    refused: Option<std::os::fd::OwnedFd>,
}

impl Churn {
    fn new() -> Self {
        let dir = PathBuf::from(std::env::var_os(DIR).unwrap());
        let path = dir.join("file");
        let mut file = File::create(&path).unwrap();
        (0..SHARED_PAGES).for_each(|page| file.write_all(&[page as u8 | 1; 4096]).unwrap());
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let memfd = File::from(memfd_create(c"standin-test", MFdFlags::MFD_CLOEXEC).unwrap());
        memfd.set_len((SHARED_PAGES * 4096) as u64).unwrap();
        let of_memfd = || Mapping::of_file(memfd.as_fd(), SHARED_PAGES, true);
        let memory = Memory {
            private: Mapping::private(PAGES),
            shared: Mapping::shared(SHARED_PAGES),
            memfd: [of_memfd(), of_memfd()],
            file: Mapping::of_file(file.as_fd(), SHARED_PAGES, false),
        };
        let steady = Mapping::private(PAGES);
        (0..PAGES).for_each(|page| steady.write(page, page % 512, page as u64 ^ 0x5a5a));
        Self {
            memory: Box::leak(Box::new(memory)),
            steady,
            others: Vec::new(),
            random: Random::new(),
            children: 0,
            ticks: 0,
            dir,
            refused: None,
        }
    }

    fn run(mut self) {
        for _ in 0..2 {
            let memory = self.memory;
            thread::spawn(move || {
                let mut random = Random::new();
                loop {
                    memory.write_some(&mut random);
                    thread::sleep(STEP);
                }
            });
        }
        loop {
            (0..4).for_each(|_| self.step());
            self.tick();
            thread::sleep(STEP);
        }
    }

    /// Counts in three kinds of memory at once, and sees whether they agree.
    fn tick(&mut self) {
        let counters = [&self.memory.private, &self.memory.shared, &self.memory.memfd[0]];
        let agree = counters.iter().all(|counter| counter.read(0, 0) == self.ticks)
            && self.memory.memfd[1].read(0, 0) == self.ticks;
        let page = self.ticks as usize % PAGES;
        let steady = self.steady.read(page, page % 512) == page as u64 ^ 0x5a5a;
        if !agree || !steady {
            println!("BROKEN at {}", self.ticks);
        }
        self.ticks += 1;
        for counter in counters {
            counter.write(0, 0, self.ticks);
        }
        if self.ticks.is_multiple_of(8) {
            println!("tick {}", self.ticks);
        }
        let refused = self.dir.join(REFUSED).exists();
        if refused != self.refused.is_some() {
            self.refused =
                refused.then(|| match std::fs::read_to_string(self.dir.join(REFUSED)).as_deref() {
                    Ok("io_uring") => sys::io_uring(),
                    _ => sys::userfaultfd(),
                });
            println!("refused {}", self.refused.is_some());
        }
    }

    fn step(&mut self) {
        match self.random.below(12) {
            0..4 => self.memory.write_some(&mut self.random),
            4 => self.memory.private.drop_page(1 + self.random.below(PAGES - 1)),
            5 | 6 => self.copy_on_write(),
            7 => self.remap(),
            8 => self.protect(),
            // A child would keep the descriptor.
            9 if self.children < CHILDREN_MAX && self.refused.is_none() => self.fork(),
            _ => {}
        }
        self.children -= usize::from(self.children > 0 && sys::reap());
    }

    /// A private page of a file that is copied, and perhaps the file's again: then it reads as unwritten.
    fn copy_on_write(&mut self) {
        let page = self.random.below(SHARED_PAGES);
        self.memory.file.write(page, self.random.below(512), self.random.0);
        if self.random.below(2) == 0 {
            self.memory.file.drop_page(self.random.below(SHARED_PAGES));
        }
    }

    fn remap(&mut self) {
        match self.random.below(3) {
            0 => {
                let mapping = Mapping::private(1 + self.random.below(32));
                mapping.write(self.random.below(mapping.pages()), 0, self.random.0);
                self.others.push(mapping);
            }
            1 if !self.others.is_empty() => {
                let at = self.random.below(self.others.len());
                self.others[at].resize(1 + self.random.below(64));
                let page = self.random.below(self.others[at].pages());
                self.others[at].write(page, 7, self.random.0);
            }
            _ if self.others.len() > 4 => {
                let at = self.random.below(self.others.len());
                self.others.swap_remove(at).unmap();
            }
            _ => {}
        }
    }

    /// A page that is read-only for a while splits its mapping.
    fn protect(&mut self) {
        let page = self.random.below(PAGES);
        self.steady.protect(page, false);
        if self.random.below(2) == 0 {
            self.steady.protect(page, true);
        }
    }

    fn fork(&mut self) {
        self.children += 1;
        let life = Duration::from_millis(self.random.below(150) as u64);
        let kind = self.random.below(3);
        if sys::fork().is_some() {
            return;
        }
        if kind == 0 {
            let program = std::env::current_exe().unwrap();
            let error = Command::new(program)
                .args(["--exact", NAME, "--nocapture"])
                .env(ROLE, "leaf")
                .stdout(std::process::Stdio::null())
                .exec();
            panic!("exec: {error}");
        }
        let until = Instant::now() + life;
        let mut random = Random::new();
        while Instant::now() < until {
            self.memory.write_some(&mut random);
            thread::sleep(STEP);
        }
        sys::exit();
    }
}

impl Memory {
    /// Page 0 of each is the counter's.
    fn write_some(&self, random: &mut Random) {
        for _ in 0..4 {
            self.private.write(1 + random.below(PAGES - 1), random.below(512), random.0);
        }
        for mapping in [&self.shared, &self.memfd[0], &self.memfd[1]] {
            mapping.write(1 + random.below(SHARED_PAGES - 1), random.below(512), random.0);
        }
    }
}

/// Another program for a short while.
fn leaf() {
    let heap = Mapping::private(256);
    let mut random = Random::new();
    for _ in 0..random.below(60) {
        heap.write(random.below(256), 3, random.0);
        thread::sleep(STEP);
    }
}

/// Much memory that rests, and some that is written faster than anybody reads it.
fn hot() {
    let (idle, hot) = (Mapping::private(IDLE_PAGES), Mapping::private(HOT_PAGES));
    (0..IDLE_PAGES).for_each(|page| idle.write(page, page % 512, page as u64 | 1));
    for round in 1_u64.. {
        (0..HOT_PAGES).for_each(|page| hot.write(page, page % 512, round));
        if round == 1 {
            println!("tick {round}");
        }
    }
}
