//! Restores from flat images: eager, and with pages coming late.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use standin::{
    criu::{
        lazy::{FlatImages, LazyServer, PageSource},
        swrk::CriuError,
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
    let server = LazyServer::listen(&workload.install, &images).unwrap();
    std::thread::scope(|scope| {
        let source = FlatImages::new(&images);
        let served = scope.spawn(move || server.serve(&source, &mut || eprintln!("running")));
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
    let server = LazyServer::listen(&workload.install, &images).unwrap();
    let stop = server.stopper();
    stop.stop();
    assert!(server.serve(&FlatImages::new(&images), &mut || ()).unwrap_err().to_string().contains("stopped"));

    // Without the registers of a task CRIU gives up behind the connection.
    std::fs::remove_file(images.join(format!("core-{ROOT_PID}.img"))).unwrap();
    let server = LazyServer::listen(&workload.install, &images).unwrap();
    let stop = server.stopper();
    std::thread::scope(|scope| {
        let source = FlatImages::new(&images);
        let served = scope.spawn(move || server.serve(&source, &mut || ()));
        let error = workload.restore(&images, true).unwrap_err();
        assert!(matches!(error, CriuError::Refused { .. }), "{error}");
        eprintln!("{error}");
        stop.stop();
        assert!(served.join().unwrap().is_err());
    });
}

/// Takes its time, and fails when told to.
struct Slow {
    images: FlatImages,
    reads_left: AtomicU32,
}

impl PageSource for Slow {
    fn read(&self, space: Space, start: u64, buffer: &mut [u8]) -> io::Result<bool> {
        std::thread::sleep(Duration::from_micros(200 + 40 * (buffer.len() as u64 / 4096)));
        let left = self.reads_left.fetch_sub(1, Ordering::Relaxed);
        if left == 0 {
            return Err(io::Error::other("as told"));
        }
        self.images.read(space, start, buffer)
    }
}

/// A program that will move its memory about as soon as it is restored, dumped and ended.
fn moving() -> (Workload, PathBuf) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/criu/moving.py");
    let workload = Workload::start(&format!("exec /usr/bin/python3 {}", script.display()));
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
        let (workload, images) = moving();
        let server = LazyServer::listen(&workload.install, &images).unwrap();
        std::thread::scope(|scope| {
            let source = Slow { images: FlatImages::new(&images), reads_left: AtomicU32::new(u32::MAX) };
            let served = scope.spawn(move || server.serve(&source, &mut || ()));
            workload.restore(&images, true).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(result(&workload, "result"), "good");
            assert_eq!(result(&workload, "result-child"), "good");
            let summary = served.join().unwrap().unwrap();
            eprintln!("{summary:?}");
            assert!(summary.tasks >= 2, "no fork was seen while pages were pending: {summary:?}");
        });
    }
}

/// The processes that hold userfaultfds for some server of these tests.
fn holders() -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap();
    let pids = pids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let ours = env!("CARGO_BIN_EXE_standin").as_bytes();
        words.starts_with(ours) && words.ends_with(b"\0enter\0hold\0")
    })
    .collect()
}

/// The workload waits for a page, neither wrong nor gone; it can be killed, and the holder goes too.
fn assert_stuck_and_killable(workload: Workload, images: &Path) {
    let file = workload.directory.path().join("result");
    std::thread::sleep(Duration::from_millis(500));
    assert!(!file.exists(), "it went on without its pages");
    assert!(workload.outside(ROOT_PID).is_some(), "it crashed");
    assert!(!holders().is_empty());
    assert!(images.exists());
    drop(workload);
}

#[test]
fn a_server_that_fails_leaves_the_workload_waiting_until_it_is_killed() {
    let (workload, images) = moving();
    let server = LazyServer::listen(&workload.install, &images).unwrap();
    let source = Slow { images: FlatImages::new(&images), reads_left: AtomicU32::new(60) };
    std::thread::scope(|scope| {
        let served = scope.spawn(move || server.serve(&source, &mut || ()));
        workload.restore(&images, true).unwrap_or_else(|error| panic!("{error}"));
        let error = served.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("as told"), "{error}");
    });
    assert_stuck_and_killable(workload, &images);
}

/// Not a test: the agent that the next test kills. `STANDIN_TEST_SERVE` is the images directory.
#[test]
#[ignore = "started by the test that kills it"]
fn an_agent_serves_pages_slowly() {
    let images = std::env::var_os("STANDIN_TEST_SERVE").map(PathBuf::from).expect("as the test starts it");
    let server = LazyServer::listen(&crate::common::install(), &images).unwrap();
    let source = Slow { images: FlatImages::new(&images), reads_left: AtomicU32::new(60) };
    // The pages stop coming while the descriptors are open; then it is killed.
    let _ = server.serve(&Stalling(source), &mut || fs::write(images.join("running"), "").unwrap());
}

struct Stalling(Slow);

impl PageSource for Stalling {
    fn read(&self, space: Space, start: u64, buffer: &mut [u8]) -> io::Result<bool> {
        while self.0.reads_left.load(Ordering::Relaxed) == 0 {
            std::thread::park();
        }
        self.0.read(space, start, buffer)
    }
}

#[test]
fn an_agent_that_is_killed_while_pages_come_leaves_the_workload_waiting() {
    let (workload, images) = moving();
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "restore::an_agent_serves_pages_slowly"])
        .env("STANDIN_TEST_SERVE", &images)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("it listens", || images.join("lazy-pages.socket").exists());
    workload.restore(&images, true).unwrap_or_else(|error| panic!("{error}"));
    wait_until("the workload runs", || images.join("running").exists());
    std::thread::sleep(Duration::from_millis(50));
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert_stuck_and_killable(workload, &images);
}
