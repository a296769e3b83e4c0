//! Restores from flat images: eager, and with pages coming late.

use std::{
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use standin::{
    criu::{
        bridge::Bridge,
        lazy::{LazyServer, Mark, OpenFiles, PageFiles, PageSource, Pager},
        spawn::{Place, Spawn},
        swrk::{CriuError, RestoreOptions, Swrk},
    },
    model::Space,
};

use crate::common::{Collector, ROOT_PID, Workload, wait_until};

/// Dumps a redis and ends it; returns its digest and the flat image.
fn dumped(workload: &Workload, tracked: bool) -> (String, PathBuf) {
    let digest = workload.redis_cli(&["debug", "digest"]);
    assert_eq!(digest.len(), 40, "{digest}");
    let images = workload.images("1");
    let mut collector = Collector::new(workload, tracked);
    let (result, served) = workload.dump(&images, tracked, false, &mut collector, &mut |_| true);
    result.unwrap_or_else(|error| panic!("{error}"));
    served.unwrap();
    collector.write_flat(&images);
    wait_until("the tree is gone", || workload.outside(ROOT_PID).is_none());
    (digest, images)
}

#[test]
fn a_flat_image_restores_eagerly() {
    for tracked in [false, true] {
        let workload = Workload::redis();
        let (digest, images) = dumped(&workload, tracked);
        let began = Instant::now();
        let pid = workload.restore(&images, false).unwrap_or_else(|error| panic!("{error}"));
        eprintln!("eager, tracked {tracked}: {:?}", began.elapsed());
        assert_eq!(pid, ROOT_PID);
        assert_eq!(workload.redis_cli(&["debug", "digest"]), digest);
        workload.assert_running();
    }
}

#[test]
fn a_flat_image_restores_lazily() {
    let workload = Workload::redis();
    let (digest, images) = dumped(&workload, true);
    let server = LazyServer::listen(&images).unwrap();
    std::thread::scope(|scope| {
        let source = open(&images);
        let served = scope.spawn(move || server.serve(&source, &[], &mut || ()));
        let began = Instant::now();
        workload.restore(&images, true).unwrap_or_else(|error| panic!("{error}"));
        eprintln!("lazy: {:?}", began.elapsed());
        assert_eq!(workload.redis_cli(&["debug", "digest"]), digest);
        eprintln!("{:?}", served.join().unwrap().unwrap());
    });
    assert_eq!(workload.redis_cli(&["debug", "digest"]), digest);
    workload.assert_running();
}

#[test]
fn a_lazy_server_can_be_stopped_and_a_failed_restore_ends_it() {
    let workload = Workload::redis();
    let (_, images) = dumped(&workload, true);
    let server = LazyServer::listen(&images).unwrap();
    let stop = server.caller();
    stop.stop();
    assert!(server.serve(&open(&images), &[], &mut || ()).unwrap_err().to_string().contains("stopped"));

    // Without the registers of a task CRIU gives up behind the connection.
    std::fs::remove_file(images.join(format!("core-{ROOT_PID}.img"))).unwrap();
    let server = LazyServer::listen(&images).unwrap();
    let stop = server.caller();
    std::thread::scope(|scope| {
        let source = open(&images);
        let served = scope.spawn(move || server.serve(&source, &[], &mut || ()));
        let error = workload.restore(&images, true).unwrap_err();
        assert!(matches!(error, CriuError::Refused { .. }), "{error}");
        eprintln!("{error}");
        stop.stop();
        assert!(served.join().unwrap().is_err());
    });
}

fn open(images: &Path) -> OpenFiles {
    PageFiles::of_images(images).unwrap().open().unwrap()
}

/// Takes its time, and fails when told to.
struct Slow {
    images: OpenFiles,
    reads_left: AtomicU32,
}

impl PageSource for Slow {
    fn pages<'a>(&'a self, space: Space, start: u64, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        std::thread::sleep(Duration::from_micros(200 + 40 * (buffer.len() as u64 / 4096)));
        let left = self.reads_left.fetch_sub(1, Ordering::Relaxed);
        if left == 0 {
            return Err(io::Error::other("as told"));
        }
        self.images.pages(space, start, buffer)
    }
}

/// A program that will move its memory about as soon as it is restored, dumped and ended.
fn moving(pages: u32) -> (Workload, PathBuf) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/criu/moving.py");
    let workload = Workload::start(&format!("exec /usr/bin/python3 {} {pages}", script.display()));
    wait_until("it is ready", || workload.directory.path().join("ready").exists());
    let images = workload.images("1");
    let mut collector = Collector::new(&workload, true);
    let (result, _) = workload.dump(&images, true, false, &mut collector, &mut |_| true);
    result.unwrap_or_else(|error| panic!("{error}"));
    collector.write_flat(&images);
    wait_until("the tree is gone", || workload.outside(ROOT_PID).is_none());
    fs::write(workload.directory.path().join("go"), "").unwrap();
    (workload, images)
}

fn result(workload: &Workload, name: &str) -> String {
    let file = workload.directory.path().join(name);
    wait_until("there is a result", || file.exists());
    fs::read_to_string(file).unwrap()
}

#[test]
fn memory_that_is_moved_given_up_and_forked_while_pages_come_is_what_it_was() {
    for _ in 0..3 {
        let (workload, images) = moving(1024);
        let server = LazyServer::listen(&images).unwrap();
        std::thread::scope(|scope| {
            let source = Slow { images: open(&images), reads_left: AtomicU32::new(u32::MAX) };
            let served = scope.spawn(move || server.serve(&source, &[], &mut || ()));
            workload.restore(&images, true).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(result(&workload, "result"), "good");
            assert_eq!(result(&workload, "result-child"), "good");
            let summary = served.join().unwrap().unwrap();
            eprintln!("{summary:?}");
            assert!(summary.tasks >= 2, "no fork was seen while pages were pending: {summary:?}");
        });
    }
}

/// The process that serves, if the pager has one.
fn server_of(pager: Pid) -> Option<Pid> {
    let children = fs::read_to_string(format!("/proc/{pager}/task/{pager}/children")).ok()?;
    Some(Pid::from_raw(children.split_whitespace().next()?.parse().ok()?))
}

fn is_running(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// The workload waits for a page, neither wrong nor gone.
fn assert_stuck(workload: &Workload, images: &Path) {
    let file = workload.directory.path().join("result");
    std::thread::sleep(Duration::from_millis(500));
    assert!(!file.exists(), "it went on without its pages");
    assert!(workload.outside(ROOT_PID).is_some(), "it crashed");
    assert!(images.exists());
}

#[test]
fn a_server_that_fails_leaves_the_workload_waiting_until_it_is_killed() {
    let (workload, images) = moving(1024);
    let server = LazyServer::listen(&images).unwrap();
    let source = Slow { images: open(&images), reads_left: AtomicU32::new(60) };
    std::thread::scope(|scope| {
        let served = scope.spawn(move || server.serve(&source, &[], &mut || ()));
        workload.restore(&images, true).unwrap_or_else(|error| panic!("{error}"));
        let error = served.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("as told"), "{error}");
    });
    assert_stuck(&workload, &images);
}

/// Not a test: the agent that the tests below kill. It restores lazily, and has the pager stop before the tasks run. Its
/// standard input is the pidfd of the place's pid 1, `STANDIN_TEST_RESTORE` the images directory, and
/// `STANDIN_TEST_DIE_AT` the stage of CRIU at which it is killed.
#[test]
#[ignore = "started by the tests that kill it"]
fn an_agent_restores() {
    let images = std::env::var_os("STANDIN_TEST_RESTORE").map(PathBuf::from).expect("as a test starts it");
    let die_at = std::env::var("STANDIN_TEST_DIE_AT").unwrap_or_default();
    let install = crate::common::install();
    let bridge = Bridge::new(&images, install.version).unwrap();
    let mark = Mark::make(&images.join("mark"), b"").unwrap();
    let pager = Pager::start(&install, &images, mark, &PageFiles::of_images(&images).unwrap()).unwrap();
    fs::write(images.join("pager"), pager.id().to_string()).unwrap();
    let (handle, id) = (pager.handle().unwrap(), Pid::from_raw(pager.id() as i32));
    let (opened, init) = (fs::File::open(&images).unwrap(), io::stdin());
    let spawn = Spawn {
        place: Place::Inside { init: init.as_fd(), cgroup: false, ipc: Some(init.as_fd()) },
        bridge: Some(&bridge),
        pids_above: Some(5000),
        ..Spawn::new(opened.as_fd())
    };
    let criu = Swrk::spawn(&install, &spawn).unwrap();
    let options = RestoreOptions { lazy: true, ..RestoreOptions::default() };
    let restored = criu.restore(&options, &mut |stage| {
        if stage == die_at {
            kill(Pid::this(), Signal::SIGKILL).unwrap();
        }
        if stage == "post-restore" {
            handle.hold().unwrap();
        }
        if stage == "pre-resume" {
            let server = server_of(id).expect("a server");
            kill(server, Signal::SIGSTOP).unwrap();
            fs::write(images.join("server"), server.to_string()).unwrap();
        }
        true
    });
    restored.unwrap_or_else(|error| panic!("{error}"));
    fs::write(images.join("running"), "").unwrap();
    let outcome = pager.wait().map_or_else(|error| error.to_string(), |summary| format!("{summary:?}"));
    fs::write(images.join("outcome"), outcome).unwrap();
}

/// An agent that restores, and the workload that it restores.
struct Orphans {
    workload: Workload,
    images: PathBuf,
    agent: Child,
}

impl Orphans {
    fn new(die_at: &str) -> Self {
        let (workload, images) = moving(8192);
        let Place::Inside { init, .. } = workload.room.place() else { panic!("a room has a pid 1") };
        let agent = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "restore::an_agent_restores"])
            .env("STANDIN_TEST_RESTORE", &images)
            .env("STANDIN_TEST_DIE_AT", die_at)
            .stdin(init.try_clone_to_owned().unwrap())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { workload, images, agent }
    }

    /// One whose workload runs, and gets no pages.
    fn running() -> Self {
        let orphans = Self::new("");
        wait_until("the workload runs", || orphans.images.join("running").exists());
        orphans
    }

    fn pager(&self) -> Pid {
        self.pid_in("pager")
    }

    /// The one that was stopped.
    fn server(&self) -> Pid {
        self.pid_in("server")
    }

    fn pid_in(&self, file: &str) -> Pid {
        Pid::from_raw(fs::read_to_string(self.images.join(file)).unwrap().parse().unwrap())
    }

    fn mark(&self) -> PathBuf {
        self.images.join("mark")
    }

    fn kill_agent(&mut self) {
        self.agent.kill().unwrap();
        self.agent.wait().unwrap();
    }

    /// Nothing is left of the restore but the workload, if it is.
    fn assert_no_helpers(&self) {
        let (pager, server) = (self.pager(), self.images.join("server").exists().then(|| self.server()));
        wait_until("the pager has ended", || !is_running(pager) && !server.is_some_and(is_running));
    }

    fn assert_good(&self) {
        assert_eq!(result(&self.workload, "result"), "good");
        assert_eq!(result(&self.workload, "result-child"), "good");
        self.assert_no_helpers();
        assert!(!self.mark().exists(), "the mark says that pages are missing");
    }
}

impl Drop for Orphans {
    fn drop(&mut self) {
        // What has ended already need not be.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        if self.images.join("server").exists() && is_running(self.server()) {
            let _ = kill(self.server(), Signal::SIGCONT);
        }
    }
}

#[test]
fn an_agent_that_is_killed_while_pages_come_costs_the_workload_nothing() {
    let mut orphans = Orphans::running();
    orphans.kill_agent();
    assert!(Mark::is_served(&orphans.mark()));
    kill(orphans.server(), Signal::SIGCONT).unwrap();
    orphans.assert_good();
}

#[test]
fn a_server_that_is_killed_while_pages_come_costs_the_workload_nothing() {
    let orphans = Orphans::running();
    kill(orphans.server(), Signal::SIGKILL).unwrap();
    orphans.assert_good();
}

/// At whatever instant: of the ones that follow each is killed while the workload moves, forks and gives up its memory.
#[test]
fn servers_that_are_killed_one_after_the_other_cost_the_workload_nothing() {
    for round in 0..4 {
        let mut orphans = Orphans::running();
        if round == 0 {
            orphans.kill_agent();
        }
        kill(orphans.server(), Signal::SIGKILL).unwrap();
        for server in 1..6 {
            let last = Instant::now();
            let next = || server_of(orphans.pager()).filter(|pid| is_running(*pid));
            wait_until("another server, or the end", || next().is_some() || !is_running(orphans.pager()));
            std::thread::sleep(Duration::from_micros((server * (round * 7919 + 1733)) % 60_000));
            if let Some(server) = next() {
                // It may end just now.
                let _ = kill(server, Signal::SIGKILL);
            }
            eprintln!("round {round}, server {server}: after {:?}", last.elapsed());
        }
        orphans.assert_good();
    }
}

#[test]
fn servers_that_are_killed_whenever_they_begin_leave_the_workload_waiting_and_the_agent_knows() {
    let orphans = Orphans::running();
    kill(orphans.server(), Signal::SIGKILL).unwrap();
    wait_until("the agent knows", || {
        if let Some(server) = server_of(orphans.pager()) {
            // It may have ended just now.
            let _ = kill(server, Signal::SIGKILL);
        }
        orphans.images.join("outcome").exists()
    });
    let outcome = fs::read_to_string(orphans.images.join("outcome")).unwrap();
    assert!(outcome.contains("servers of its pages were killed"), "{outcome}");
    assert!(orphans.mark().exists() && !Mark::is_served(&orphans.mark()));
    let Orphans { ref images, ref workload, .. } = orphans;
    assert_stuck(workload, images);
    let pager = orphans.pager();
    drop(orphans);
    wait_until("the pager has ended with the last task", || !is_running(pager));
}

#[test]
fn a_pager_and_its_server_that_are_killed_leave_a_mark_and_the_agent_knows() {
    for agent_dies in [false, true] {
        let mut orphans = Orphans::running();
        if agent_dies {
            orphans.kill_agent();
        }
        kill(orphans.pager(), Signal::SIGKILL).unwrap();
        kill(orphans.server(), Signal::SIGKILL).unwrap();
        wait_until("nobody serves", || !Mark::is_served(&orphans.mark()));
        assert!(orphans.mark().exists());
        if !agent_dies {
            wait_until("the agent knows", || orphans.images.join("outcome").exists());
            let outcome = fs::read_to_string(orphans.images.join("outcome")).unwrap();
            assert!(outcome.contains("ended early"), "{outcome}");
        }
    }
}

#[test]
fn a_pager_that_is_killed_is_not_missed() {
    let orphans = Orphans::running();
    kill(orphans.pager(), Signal::SIGKILL).unwrap();
    kill(orphans.server(), Signal::SIGCONT).unwrap();
    orphans.assert_good();
}

#[test]
fn an_agent_that_is_killed_before_the_workload_runs_leaves_nothing_half_restored() {
    let mut orphans = Orphans::new("post-restore");
    orphans.agent.wait().unwrap();
    wait_until("CRIU has ended what it made", || orphans.workload.outside(ROOT_PID).is_none());
    orphans.assert_no_helpers();
    assert!(orphans.mark().exists() && !Mark::is_served(&orphans.mark()));
    // From here on CRIU does not ask any more.
    let mut orphans = Orphans::new("pre-resume");
    orphans.agent.wait().unwrap();
    orphans.assert_good();
}

#[test]
fn a_pager_whose_agent_is_killed_before_criu_comes_ends() {
    let (workload, images) = moving(16);
    let mark = images.join("mark");
    let pages = PageFiles::of_images(&images).unwrap();
    let pager = Pager::start(&workload.install, &images, Mark::make(&mark, b"").unwrap(), &pages).unwrap();
    let id = pager.id() as i32;
    assert!(Mark::is_served(&mark));
    // All that the kernel does about it for an agent that is killed.
    drop(pager);
    wait_until("the pager has ended", || !Mark::is_served(&mark));
    assert!(mark.exists());
    wait_until("it is gone", || {
        fs::read_to_string(format!("/proc/{id}/stat")).is_ok_and(|stat| stat.contains(") Z "))
    });
}

#[test]
fn the_order_to_hold_is_answered_to_whoever_gave_it_while_another_waits_for_the_end() {
    let (workload, images) = moving(1024);
    let pages = PageFiles::of_images(&images).unwrap();
    let mark = Mark::make(&images.join("mark"), b"").unwrap();
    let pager = Pager::start(&workload.install, &images, mark, &pages).unwrap();
    let handle = pager.handle().unwrap();
    let waiting = std::thread::spawn(move || pager.wait());
    // The one that waits is asleep in its read before the other one is.
    std::thread::sleep(Duration::from_millis(100));
    handle.hold().unwrap();
    handle.stop();
    assert!(waiting.join().unwrap().unwrap_err().to_string().contains("stopped before"));
}
