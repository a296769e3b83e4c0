//! A primary without an agent: a workload in a sandbox, its capturer, and the store that a standby would have.

use std::{
    fs, io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use standin::{
    capture::{CaptureError, Captured, Capturer, Finish, Outside, Source, Tracking},
    criu::{Install, bridge::Bridge},
    files,
    memory::{AttachError, Vmas},
    model::{Epoch, EpochId, Name, Term},
    store::{Durability, Store},
    wire::message::FrameHead,
    workload::{
        sandbox::{Options, Sandbox},
        spec::{Net, SandboxSpec},
    },
};

use crate::{truth::Truth, workload};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_standin");

/// The CRIU, started by the built `standin`.
pub(crate) fn install() -> Install {
    Install::find(None).unwrap().with_launcher(PROGRAM.into())
}

/// A sandbox, removed with whatever is in it when dropped.
pub(crate) struct Home {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) name: Name,
    pub(crate) sandbox: Sandbox,
}

impl Home {
    pub(crate) fn new() -> Self {
        Self::new_in(&std::env::temp_dir())
    }

    /// With its directories on the file system of `place`.
    pub(crate) fn new_in(place: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name: Name =
            format!("capture-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed)).parse().unwrap();
        let dir = tempfile::tempdir_in(place).unwrap();
        let spec =
            SandboxSpec { name: name.clone(), net: Net::Host, paths: Vec::new(), hostname: "box".to_owned() };
        let options = Options {
            program: PROGRAM.into(),
            run_dir: dir.path().join("run"),
            data_dir: dir.path().join("data"),
            shm_dir: dir.path().join("shm"),
            log: dir.path().join("log"),
            log_bytes_max: 1 << 20,
            isolated: None,
        };
        let sandbox = Sandbox::create(&spec, &options).unwrap();
        Self { dir, name, sandbox }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// The newest count of the workload.
    pub(crate) fn ticks(&self) -> u64 {
        newest_tick(&self.log())
    }

    /// Waits until the workload has counted further than `from`.
    pub(crate) fn await_ticks(&self, from: u64) {
        await_true("the workload to go on", || self.ticks() > from);
    }
}

/// The newest count in what a workload has said, none of which may be a complaint.
pub(crate) fn newest_tick(log: &str) -> u64 {
    assert!(!log.contains("BROKEN") && !log.contains("panicked"), "{log}");
    // The last line may be in the making.
    let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let last = whole.lines().rev().find_map(|line| line.strip_prefix("tick ")?.parse().ok());
    last.unwrap_or(0)
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = Sandbox::destroy(&self.dir.path().join("run"), &self.name);
    }
}

/// A running workload with its capturer and store.
pub(crate) struct Primary {
    pub(crate) capturer: Capturer,
    pub(crate) store: Store,
    pub(crate) base: Option<EpochId>,
    tracking: Tracking,
    next: u64,
    pub(crate) home: Home,
    /// In RAM: the images, the store, the workload's files.
    pub(crate) ram: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Primary {
    pub(crate) fn start(role: &str, tracking: Tracking) -> Self {
        Self::start_at(role, tracking, Home::new(), &[])
    }

    /// `trees` are replicated: what becomes of them is the caller's affair.
    pub(crate) fn start_at(role: &str, tracking: Tracking, home: Home, trees: &[files::Source]) -> Self {
        // They measure and disturb their own process: one at a time.
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let ram = tempfile::tempdir_in("/dev/shm").unwrap();
        home.sandbox.start(&workload::command(role, home.dir.path())).unwrap();
        home.await_ticks(0);
        // A process of it may wait in a vfork just now.
        let mut capturer = None;
        await_true("all of the workload to be tracked", || {
            match Capturer::new(source(&home, ram.path(), tracking, trees.to_vec())) {
                Err(CaptureError::Attach(AttachError::NotStopping { .. })) => false,
                made => {
                    capturer = Some(made.unwrap_or_else(|error| panic!("{error}")));
                    true
                }
            }
        });
        let store =
            Store::open(&ram.path().join("store"), &home.name, Durability::Memory, Box::new(|_| Ok(())));
        Self {
            capturer: capturer.expect("it was made"),
            store: store.unwrap(),
            base: None,
            tracking,
            next: 1,
            home,
            ram,
            _alone: alone,
        }
    }

    pub(crate) fn next_head(&mut self) -> FrameHead {
        let id = EpochId { term: Term(1), epoch: Epoch(self.next) };
        self.next += 1;
        FrameHead::Begin { name: self.home.name.clone(), id, base: self.base }
    }

    /// An epoch into the store, which may fail as one in earnest may.
    pub(crate) fn attempt(&mut self, finish: Finish<'_>) -> Result<Captured, CaptureError> {
        self.attempt_after(finish, &mut || ())
    }

    /// `between` is called when the tree has been looked at and is not frozen yet.
    fn attempt_after(
        &mut self,
        finish: Finish<'_>,
        between: &mut dyn FnMut(),
    ) -> Result<Captured, CaptureError> {
        let head = self.next_head();
        let FrameHead::Begin { id, base, .. } = head else { unreachable!() };
        let mut staging = self.store.begin(id, base).unwrap();
        let captured = self.capturer.capture(head, finish, &mut |head, body| {
            if matches!(head, FrameHead::Begin { .. }) {
                between();
            }
            staging.frame(head, &body).map_err(io::Error::other)
        });
        if captured.is_ok() {
            staging.commit().unwrap();
            self.capturer.committed();
            self.base = Some(id);
        } else {
            self.capturer.failed();
        }
        captured
    }

    /// The same, compared with the frozen tree page by page.
    pub(crate) fn try_true_epoch(&mut self, kill: bool) -> Result<Truth, CaptureError> {
        self.compared(kill, &mut || ())
    }

    /// The same, and `between` as with [`Self::attempt_after`].
    pub(crate) fn compared(&mut self, kill: bool, between: &mut dyn FnMut()) -> Result<Truth, CaptureError> {
        let (run_dir, name) = (self.home.dir.path().join("run"), self.home.name.clone());
        let sandbox = Sandbox::open(&run_dir, &name).unwrap();
        let mut truth = None;
        let mut conclude = |manifest: &_| {
            truth = Some(Truth::read(&sandbox, manifest));
            kill
        };
        let finish = Finish::Final { hold: &mut || true, conclude: &mut conclude };
        let captured = self.attempt_after(finish, between)?;
        assert_eq!(captured.killed, kill);
        let mut truth = truth.expect("the final epoch was concluded");
        truth.sent_by_criu = self.tracking == Tracking::SoftDirty;
        assert_eq!(truth.uncovered, Vec::<String>::new(), "pages that the image of {:?} lacks", self.base);
        let check = |when| {
            let wrong = truth.mismatches(&self.store.view().unwrap());
            assert_eq!(wrong, Vec::<String>::new(), "wrong pages of {:?}, {when}", self.base);
        };
        check("committed");
        self.store.fold().unwrap();
        check("folded");
        Ok(truth)
    }
}

fn source(home: &Home, ram: &Path, tracking: Tracking, trees: Vec<files::Source>) -> Source {
    let (host, inside) = home.sandbox.workload_pid().unwrap().unwrap();
    let install = install();
    Source {
        root: host as i32,
        root_inside: inside,
        init: Some(home.sandbox.keeper().pidfd().unwrap()),
        bridge: Bridge::new(ram, install.version).unwrap(),
        vmas: Some(Arc::new(Vmas::open().unwrap())),
        tracking,
        install,
        work: ram.join("dump"),
        outside: home.sandbox.log_pipes().unwrap().into_iter().map(Outside::pipe).collect(),
        own_cgroup_namespace: false,
        whole: None,
        trees,
        held: Vec::new(),
    }
}

pub(crate) fn await_true(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < until, "waited 20 s for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
