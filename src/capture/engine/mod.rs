//! The capturer: one call is one epoch. Blocking; the agent calls it from a thread of its own.

mod ahead;
mod crius;
mod freeze;

use std::{
    collections::BTreeMap,
    fs, io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use self::crius::Crius;
use super::{
    files::{Files, FilesError},
    frozen::{FreezeParts, Tracked},
    images::Outside,
    shared::SharedMemory,
    sockets::Likely,
    tracking::{Dumped, Tracking},
};
use crate::{
    criu::{Install, bridge::Bridge, images::namespaces::NamespaceError, parent, swrk::CriuError},
    delta::{Encoder, Known, LinkRate, Offered, ReadStamp},
    files::{self, HeldFiles},
    memory::{self, AttachError, Guards, ReadError, TrackError, Tracker, TreeError, Vmas},
    model::{EpochFigures, Extent, Resync, Space},
    wire::message::{FrameHead, Manifest},
};

/// What was sent ahead so long ago is looked at again before the freeze.
const AHEAD_AGE_MAX: Duration = Duration::from_millis(3);
/// So many processes are asked for the time that they have used: that takes a microsecond each.
const PROCESSES_ASKED_MAX: usize = 100;
/// For so many epochs CRIU is told no guard regions ahead once they were others in the freeze: there are programs that
/// change them all the time.
const GUARDS_DOUBTED_EPOCHS: u32 = 100;

/// Where frames go; an error (the link is gone) ends the epoch.
pub type Emit<'a> = dyn FnMut(FrameHead, Vec<u8>) -> Result<(), io::Error> + 'a;

/// Why an epoch was not captured. The tree runs on.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// CRIU said no, or could not be started.
    #[error(transparent)]
    Criu(#[from] CriuError),
    /// CRIU said no, and this is why.
    #[error("{source}: {reason}")]
    Holds {
        /// CRIU's words.
        source: CriuError,
        /// Which process holds what.
        reason: String,
    },
    /// A task cannot be tracked.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Tracking failed.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Reading failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The tree cannot be listed.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// CRIU lists a task that we cannot find.
    #[error("CRIU dumps a task with pid {0} inside, which is not in the tree")]
    Stranger(u32),
    /// What was told to CRIU ahead was not so any more.
    #[error("guard regions of process {0} changed right before the freeze")]
    Guards(i32),
    /// What was told to CRIU ahead was not so any more.
    #[error("a socket of another protocol than before was made right before the freeze")]
    Sockets,
    /// The image of this freeze would lack it.
    #[error("a System V object (shared memory, semaphore, message queue) was made right before the freeze")]
    Ipc,
    /// The image needs pages that nobody has.
    #[error("{pages} pages of {space:?} from {start:#x} on are needed for the image and cannot be read")]
    Unreadable {
        /// Whose.
        space: Space,
        /// The first.
        start: u64,
        /// How many.
        pages: u64,
    },
    /// The replicated directories.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The small images or the frames.
    #[error("writing the epoch failed: {0}")]
    Io(#[from] io::Error),
    /// CRIU dumped what it could not restore.
    #[error(transparent)]
    Namespaces(#[from] NamespaceError),
    /// CRIU answered well and never asked for the memory.
    #[error("CRIU dumped the tree without its memory: is the page server's protocol of another version?")]
    NoMemory,
    /// Of what the standby holds nothing is known.
    #[error(
        "what was written since the last epoch is not known, because that one failed: the next must be a full one"
    )]
    NeedsFull,
}

/// What is captured, and with what.
pub struct Source {
    /// Host pid of the tree's root.
    pub root: i32,
    /// The same in the workload's pid namespace, as CRIU sees it.
    pub root_inside: u32,
    /// Pid 1 of the sandbox in which CRIU shall run; `None` for a tree that is dumped from the host.
    pub init: Option<OwnedFd>,
    /// It has a cgroup namespace of its own.
    pub own_cgroup_namespace: bool,
    /// The tree's root is pid 1 of namespaces, which are part of the image.
    pub whole: Option<Whole>,
    /// The CRIU.
    pub install: Install,
    /// The bridge for it; not used with soft-dirty bits, since it hides them.
    pub bridge: Bridge,
    /// What lists the mappings of the frozen tasks for CRIU, where the kernel permits it.
    pub vmas: Option<Arc<Vmas>>,
    /// How written pages are found: [`Tracking::choose`].
    pub tracking: Tracking,
    /// A directory of our own on a tmpfs.
    pub work: PathBuf,
    /// What the tree has open and whose other end is not in it.
    pub outside: Vec<Outside>,
    /// Directories that are replicated with each epoch, as this process sees them.
    pub trees: Vec<files::Source>,
    /// By which some of them are named: open for as long as this is.
    pub held: Vec<OwnedFd>,
}

/// What of a container's namespaces is not in the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Whole {
    /// The root directory, as this process sees it.
    pub root: PathBuf,
    /// Mounts and namespaces that the restoring side provides, in CRIU's notation.
    pub external: Vec<String>,
    /// The restoring side makes its network.
    pub empty_net: bool,
}

/// What becomes of the tree at the end of the freeze.
pub enum Finish<'a> {
    /// It runs on: an epoch.
    Continue,
    /// It is held: a handoff. `hold` is called when the image is complete and nothing was sent of it yet; `conclude` when
    /// all frames were emitted. True from both: the tree is killed. False from either: it runs on.
    Final {
        /// Cut the frozen tree off.
        hold: &'a mut dyn FnMut() -> bool,
        /// Send the rest, wait for the verdict.
        conclude: &'a mut dyn FnMut(&Manifest) -> bool,
    },
}

/// An epoch whose frames were all emitted (without the last, `End`).
#[derive(Debug)]
pub struct Captured {
    /// Its cost so far; the caller adds the shipping.
    pub figures: EpochFigures,
    /// What the frozen time was spent on; zeroes if the tree was killed.
    pub parts: FreezeParts,
    /// When the tree ran again, or was known to be handed off.
    pub thawed: Instant,
    /// How long it took to do ahead what can be done while the tree runs.
    pub ahead: Duration,
    /// For which share of the time since the last freeze the tree had used a processor, if that is known.
    pub busy_percent: Option<u8>,
    /// Whether the tree was killed.
    pub killed: bool,
}

/// Captures epochs of one workload.
pub struct Capturer {
    source: Arc<Source>,
    tasks: BTreeMap<i32, Tracked>,
    dumped: Dumped,
    files: Option<Files>,
    known: Known,
    /// In a box: its hash's state would be moved about with the capturer.
    encoder: Box<Encoder>,
    crius: Crius,
    /// An epoch failed: of pages that were sent in it nothing is known.
    unsure: bool,
    /// What the standby tells of what it holds, for the next epoch.
    told: Option<Told>,
    /// Of the tree's root.
    root: Arc<OwnedFd>,
    /// Epochs that will not tell guard regions ahead.
    guards_doubted: u32,
    /// Which protocols CRIU is told ahead.
    likely: Likely,
    shared: SharedMemory,
    on_stages: Option<Box<OnStages>>,
    /// As was said of the newest freeze.
    output_held: bool,
    /// When the newest freeze ended, and the processor time that the tree had used by then.
    thawed: Option<(Instant, Duration)>,
}

/// Where a freeze stands, for who has to do something about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// What can be done ahead is done. Whoever is told may keep the epoch waiting: what is too old then is done again, and this
    /// told again.
    Ready,
    /// Its pre-copy is done, and the freeze begins.
    Freezing,
    /// All tasks stand, and nothing of the kernel's state has been looked at.
    Frozen,
    /// The tree runs again, whether the epoch is whole or not. Perhaps told twice; not told of a tree that was killed.
    Running,
}

/// Told of stages; says whether what the tree sends is held by now. An error at the first three makes the epoch fail.
pub type OnStages = dyn FnMut(Stage) -> Result<bool, io::Error> + Send;

/// What a standby tells of what it holds, in hashes.
#[derive(Debug)]
pub struct Told {
    /// Of the pages of the epoch that is to be the base of the next one; none, if that is to have none.
    pub pages: Option<Offered>,
    /// Of its files.
    pub files: HeldFiles,
    /// Bytes that it took.
    pub bytes: u64,
}

impl Drop for Capturer {
    fn drop(&mut self) {
        self.crius.close();
    }
}

impl Capturer {
    /// Begins to track a tree; nothing is known of its memory yet.
    pub fn new(source: Source) -> Result<Self, CaptureError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&source.work)?;
        parent::create(&source.work.join(parent::DIRECTORY))?;
        let root = Arc::new(memory::pidfd_of(source.root)?);
        let source = Arc::new(source);
        let crius = Crius::new(Arc::clone(&source), Arc::clone(&root));
        let mut capturer = Self {
            files: Files::new(source.root, &source.trees),
            source,
            tasks: BTreeMap::new(),
            dumped: Dumped::default(),
            known: Known::default(),
            encoder: Box::default(),
            crius,
            unsure: false,
            told: None,
            root,
            guards_doubted: 0,
            likely: Likely::default(),
            shared: SharedMemory::default(),
            on_stages: None,
            output_held: false,
            thawed: None,
        };
        capturer.track()?;
        capturer.crius.look_at_ipc()?;
        capturer.spawn_ahead()?;
        Ok(capturer)
    }

    /// Lets copies of pages, which patches are made against, take so much memory. Before the first epoch.
    pub fn limit_references(&mut self, bytes_max: u64) {
        self.known = Known::new(bytes_max);
    }

    /// The rate at which frames are shipped, to be told by who ships them.
    pub fn link(&self) -> Arc<LinkRate> {
        self.encoder.link()
    }

    /// What a standby must have room for; see [`memory::resident_bytes`].
    pub fn resident_bytes(&self) -> Result<u64, CaptureError> {
        Ok(memory::resident_bytes(self.source.root)?)
    }

    /// Has something done in each epoch from now on.
    pub fn on_stages(&mut self, told: Box<OnStages>) {
        self.on_stages = Some(told);
    }

    fn tell(&mut self, stage: Stage) -> Result<(), CaptureError> {
        self.output_held = self.on_stages.as_mut().map_or(Ok(false), |told| told(stage))?;
        Ok(())
    }

    /// Captures one epoch. `base` is the epoch that the standby holds, `None` if it holds nothing usable.
    ///
    /// `None` too if [`needs_full`](Self::needs_full) says so.
    ///
    /// On an error the epoch has failed; call [`failed`](Self::failed) before the next one. After success call
    /// [`committed`](Self::committed) or `failed`, in the order of the epochs; one may be captured before the outcome of
    /// the last is known, on the assumption that it is committed, and must not be sent before it is.
    pub fn capture(
        &mut self,
        head: FrameHead,
        mut finish: Finish<'_>,
        emit: &mut Emit<'_>,
    ) -> Result<Captured, CaptureError> {
        let FrameHead::Begin { id, base, .. } = head else { unreachable!("an epoch begins with Begin") };
        if base.is_some() && self.needs_full() {
            return Err(CaptureError::NeedsFull);
        }
        let mut began = Instant::now();
        let told = self.told.take();
        let resync = told.as_ref().map(|told| Resync { resync_bytes: told.bytes, full_bytes: 0 });
        let full = base.is_none() || told.is_some();
        if full {
            self.files.iter_mut().for_each(Files::reset);
        }
        if let (Some(files), Some(told)) = (&mut self.files, told) {
            files.offer(told.files);
        }
        self.known.begin_epoch(base.is_some());
        emit(head, Vec::new())?;
        let mut figures = EpochFigures { id, full, resync, ..EpochFigures::default() };
        let mut pending = BTreeMap::new();
        let ahead = loop {
            let looked = Instant::now();
            self.send_ahead(&finish, &mut pending, &mut figures, emit)?;
            let ready = Instant::now();
            self.tell(Stage::Ready)?;
            let waited = ready.elapsed();
            began += waited;
            if waited <= AHEAD_AGE_MAX {
                break ready - looked;
            }
        };
        let busy_percent = self.busy_percent();
        let frozen = self
            .tell(Stage::Freezing)
            .and_then(|()| self.freeze(began, pending, &mut finish, &mut figures, emit));
        if frozen.is_err() {
            // Its own error is the one to report.
            let _ = self.tell(Stage::Running);
        }
        self.guards_doubted = match frozen {
            Err(CaptureError::Guards(_)) => GUARDS_DOUBTED_EPOCHS,
            _ => self.guards_doubted.saturating_sub(1),
        };
        let (killed, parts) = frozen?;
        let thawed = began + Duration::from_micros(figures.capture_us);
        Ok(Captured { figures, parts, thawed, ahead, busy_percent, killed })
    }

    /// See [`Captured`].
    fn busy_percent(&mut self) -> Option<u8> {
        let (thawed, before) = self.thawed.take()?;
        let used = processor_time(&self.processes())?.saturating_sub(before);
        let passed = thawed.elapsed().max(Duration::from_micros(1));
        Some((used.as_nanos() * 100 / passed.as_nanos()).min(100) as u8)
    }

    fn processes(&self) -> Vec<i32> {
        self.tasks.keys().copied().collect()
    }

    /// The standby holds the oldest epoch whose outcome is open.
    pub fn committed(&mut self) {
        self.known.epoch_committed();
        self.unsure = false;
    }

    /// The standby may hold any part of the oldest epoch whose outcome is open; those captured after it fail with it.
    pub fn failed(&mut self) {
        self.known.epoch_failed();
        self.files.iter_mut().for_each(Files::reset);
        self.unsure = true;
        if self.source.tracking == Tracking::SoftDirty {
            // CRIU resets the bits as it dumps: what was written before the dump that failed nobody can tell any more.
            self.known.clear();
            self.dumped.clear();
        }
    }

    /// Of what the standby holds nothing is known here but this, which the next epoch is compared with. Of the files nothing is
    /// known otherwise either; of memory, unless the epoch has a base. Its figures count the bytes that this took and those
    /// that need not be sent for it; those that are sent are counted where they are.
    pub fn resync(&mut self, mut told: Told) {
        match told.pages.take() {
            Some(pages) => self.known.offer(pages),
            None => self.known.clear(),
        }
        self.told = Some(told);
    }

    /// Whether files are replicated.
    pub fn has_files(&self) -> bool {
        self.files.is_some()
    }

    /// Whether the next epoch must send all memory, whatever the standby holds.
    pub fn needs_full(&self) -> bool {
        self.source.tracking == Tracking::SoftDirty && self.unsure
    }

    /// Makes sure that a CRIU waits for the next freeze, after which the tree runs on.
    pub fn spawn_ahead(&mut self) -> Result<(), CaptureError> {
        self.crius.spawn_ahead()
    }

    /// Attaches trackers to tasks that are new or have executed another program, and drops those of tasks that ended.
    fn track(&mut self) -> Result<(), CaptureError> {
        if self.source.tracking == Tracking::SoftDirty {
            return Ok(());
        }
        let tasks = memory::tasks_of(self.source.root)?;
        self.tasks.retain(|pid, tracked| {
            tasks.iter().any(|task| task.pid == *pid && task.start_ticks == tracked.start_ticks)
        });
        for task in tasks.iter().filter(|task| !task.zombie) {
            let space = Space::Task(task.inner_pid);
            if let Some(tracked) = self.tasks.get_mut(&task.pid) {
                match tracked.tracker.register() {
                    Ok(_) => continue,
                    Err(TrackError::Replaced(_) | TrackError::Gone(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            match self.attach(task.pid) {
                Ok(tracker) => {
                    // The first pass reports all of its memory, so nothing that is known under this pid is trusted.
                    let start_ticks = task.start_ticks;
                    self.tasks.insert(
                        task.pid,
                        Tracked { tracker, space, start_ticks, ahead: Vec::new(), guards: Guards::default() },
                    );
                }
                // It ended meanwhile; should CRIU see it after all, it is read whole.
                Err(AttachError::Gone(_)) => {
                    self.tasks.remove(&task.pid);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn attach(&self, pid: i32) -> Result<Tracker, AttachError> {
        let back = memory::take_back(self.tasks.values().map(|tracked| &tracked.tracker), pid)?;
        if back > 0 {
            tracing::debug!(pid, "forked while its parent was attached to; what it inherited is closed");
        }
        Tracker::attach(pid)
    }
}

/// What they have used; not known of many, each of which is asked.
fn processor_time(processes: &[i32]) -> Option<Duration> {
    if processes.is_empty() || processes.len() > PROCESSES_ASKED_MAX {
        return None;
    }
    processes.iter().map(|pid| memory::processor_time(*pid)).sum()
}

fn encode(
    encoder: &mut Encoder,
    known: &mut Known,
    space: Space,
    extents: &[Extent],
    data: &[u8],
    at: ReadStamp,
    emit: &mut Emit<'_>,
) -> Result<(), CaptureError> {
    let mut result = Ok(());
    encoder.encode(known, space, extents, data, at, |head, body| {
        if result.is_ok() {
            result = emit(FrameHead::Pages(head), body);
        }
    });
    result.map_err(CaptureError::Io)
}
