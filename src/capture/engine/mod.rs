//! The capturer: one call is one epoch. Blocking; the agent calls it from a thread of its own.

mod freeze;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use super::{
    files::{Files, FilesError},
    frozen::{FreezeParts, Tracked},
    images::Outside,
    ipc,
    shared::SharedMemory,
    tracking::{Dumped, Tracking},
};
use crate::{
    criu::{
        Install,
        bridge::Bridge,
        fork_server::ForkServer,
        images::namespaces::NamespaceError,
        parent,
        spawn::{Place, Spawn},
        swrk::{CriuError, Swrk},
    },
    delta::{Encoder, Known, LinkRate, Offered, ReadStamp},
    extents,
    files::{self, HeldFiles},
    memory::{self, AttachError, Guards, Pages, ReadError, Task, TrackError, Tracker, TreeError, Vmas},
    model::{EpochFigures, Extent, PAGE_SIZE, Resync, Space},
    wire::message::{FrameHead, Manifest},
};

/// From this many stale pages on, they are read and sent before the freeze.
const PRECOPY_PAGES_MIN: u64 = 32;
/// From this many on, it is looked again what was written meanwhile, and perhaps sent, before the freeze.
const PRECOPY_AGAIN_PAGES_MIN: u64 = 1024;
/// Most pre-copy rounds of one epoch; a tree that dirties faster than it is read is frozen all the same.
const PRECOPY_ROUNDS_MAX: u32 = 4;
/// Pages read at a time while the tree runs (4 MiB): what the primary holds of a pre-copy.
const PART_PAGES: u64 = 1024;
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
    /// Whether the tree was killed.
    pub killed: bool,
}

/// Captures epochs of one workload.
pub struct Capturer {
    source: Source,
    tasks: BTreeMap<i32, Tracked>,
    dumped: Dumped,
    files: Option<Files>,
    known: Known,
    /// In a box: its hash's state would be moved about with the capturer.
    encoder: Box<Encoder>,
    /// None with soft-dirty bits: there is no bridge that would fork.
    fork_server: Option<ForkServer>,
    spare: Option<Spare>,
    next_dir: u32,
    /// An epoch failed: of pages that were sent in it nothing is known.
    unsure: bool,
    /// What the standby tells of what it holds, for the next epoch.
    told: Option<Told>,
    /// Of the tree's root.
    root: OwnedFd,
    /// The tree's IPC namespace is part of the image.
    own_ipc: bool,
    /// Epochs that will not tell guard regions ahead.
    guards_doubted: u32,
    shared: SharedMemory,
    on_stages: Option<Box<OnStages>>,
    /// As was said of the newest freeze.
    output_held: bool,
}

/// Where a freeze stands, for who has to do something about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its pre-copy is done, and the freeze begins.
    Freezing,
    /// All tasks stand, and nothing of the kernel's state has been looked at.
    Frozen,
    /// The tree runs again, whether the epoch is whole or not. Perhaps told twice; not told of a tree that was killed.
    Running,
}

/// Told of stages; says whether what the tree sends is held by now. An error at the first two makes the epoch fail.
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

/// A CRIU that waits, and the directory that it will write to.
struct Spare {
    swrk: Swrk,
    dir: PathBuf,
}

impl Capturer {
    /// Begins to track a tree; nothing is known of its memory yet.
    pub fn new(source: Source) -> Result<Self, CaptureError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&source.work)?;
        parent::create(&source.work.join(parent::DIRECTORY))?;
        let root = source.root;
        let mut capturer = Self {
            files: Files::new(source.root, &source.trees),
            source,
            tasks: BTreeMap::new(),
            dumped: Dumped::default(),
            known: Known::default(),
            encoder: Box::default(),
            fork_server: None,
            spare: None,
            next_dir: 0,
            unsure: false,
            told: None,
            root: memory::pidfd_of(root)?,
            own_ipc: false,
            guards_doubted: 0,
            shared: SharedMemory::default(),
            on_stages: None,
            output_held: false,
        };
        capturer.track()?;
        capturer.look_at_ipc()?;
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
        let began = Instant::now();
        self.look_at_ipc()?;
        if matches!(finish, Finish::Continue) {
            self.spawn_ahead()?;
        } else {
            // The one that waits was asked to let the tree run on.
            self.spare = None;
            self.spawn()?;
        }
        self.track()?;
        let told = self.told.take();
        let mut resync = told.as_ref().map(|told| Resync { resync_bytes: told.bytes, full_bytes: 0 });
        let full = base.is_none() || told.is_some();
        if full {
            self.files.iter_mut().for_each(Files::reset);
        }
        if let (Some(files), Some(told)) = (&mut self.files, told) {
            files.offer(told.files);
        }
        self.known.begin_epoch(base.is_some());
        emit(head, Vec::new())?;
        if let Some(files) = &mut self.files {
            let kept_bytes = files.send_ahead(emit)?;
            if let Some(resync) = &mut resync {
                resync.full_bytes = kept_bytes;
            }
        }
        let mut figures = EpochFigures { id, full, resync, ..EpochFigures::default() };
        let pending = self.precopy(&mut figures, emit)?;
        self.precopy_shared(&figures, emit)?;
        if let Some(files) = &mut self.files {
            files.write_back(matches!(finish, Finish::Continue));
        }
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
        Ok(Captured { figures, parts, killed })
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
        if self.spare.is_some() {
            return Ok(());
        }
        self.spawn()?;
        let options = self.dump_options(true);
        if let Some(spare) = &mut self.spare
            && let Err(error) = spare.swrk.begin(&options)
        {
            self.spare = None;
            return Err(error.into());
        }
        Ok(())
    }

    fn spawn(&mut self) -> Result<(), CaptureError> {
        let dir = self.source.work.join(format!("dump-{}", self.next_dir % 2));
        self.next_dir += 1;
        fresh_dir(&dir)?;
        let images = File::open(&dir)?;
        let swrk = match self.source.tracking {
            Tracking::WriteProtect => self.fork_criu(&images)?,
            Tracking::SoftDirty => {
                let spawn = Spawn { place: self.place(), page_server: true, ..Spawn::new(images.as_fd()) };
                Swrk::spawn(&self.source.install, &spawn)?
            }
        };
        self.spare = Some(Spare { swrk, dir });
        Ok(())
    }

    /// Whether the next image must have the IPC namespace. A tree without a sandbox shares the host's, which it cannot have.
    fn look_at_ipc(&mut self) -> Result<(), CaptureError> {
        let own_ipc = self.source.init.is_some() && ipc::has_objects(self.root.as_fd())?;
        if std::mem::replace(&mut self.own_ipc, own_ipc) != own_ipc {
            // They are in the wrong one.
            (self.spare, self.fork_server) = (None, None);
        }
        Ok(())
    }

    fn place(&self) -> Place<'_> {
        match &self.source.init {
            Some(init) => {
                let ipc = (!self.own_ipc).then_some(self.root.as_fd());
                Place::Inside { init: init.as_fd(), cgroup: self.source.own_cgroup_namespace, ipc }
            }
            None => Place::Here,
        }
    }

    /// Has a CRIU forked; the one that forks is started first if there is none, or it does not fork any more.
    fn fork_criu(&mut self, images: &File) -> Result<Swrk, CaptureError> {
        let install = &self.source.install;
        if let Some(server) = &self.fork_server {
            match Swrk::fork(install, server, images.as_fd()) {
                Ok(swrk) => return Ok(swrk),
                Err(error) => tracing::warn!(%error, "CRIU is started anew"),
            }
        }
        let work = File::open(&self.source.work)?;
        let bridge = Some(&self.source.bridge);
        let spawn = Spawn { place: self.place(), bridge, ..Spawn::new(work.as_fd()) };
        let server = self.fork_server.insert(ForkServer::start(install, &spawn).map_err(CriuError::from)?);
        Ok(Swrk::fork(install, server, images.as_fd())?)
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
            match Tracker::attach(task.pid) {
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

    /// Scans while the tree runs; if much is stale, sends it now. Returns what must be read in the freeze.
    fn precopy(
        &mut self,
        figures: &mut EpochFigures,
        emit: &mut Emit<'_>,
    ) -> Result<BTreeMap<Space, Vec<Extent>>, CaptureError> {
        let mut pending: BTreeMap<Space, Vec<Extent>> = BTreeMap::new();
        let mut pages = Pages::default();
        let mut stale_before = u64::MAX;
        for _ in 0..PRECOPY_ROUNDS_MAX {
            self.scan(figures, &mut pending)?;
            let stale: u64 = pending.values().map(|extents| extents::pages(extents)).sum();
            // Not worth a round, or rounds do not help any more.
            if stale < PRECOPY_PAGES_MIN || stale > stale_before / 2 {
                break;
            }
            stale_before = stale;
            for tracked in self.tasks.values_mut() {
                let Some(wanted) = pending.get_mut(&tracked.space) else { continue };
                let (space, known, encoder) = (tracked.space, &mut self.known, &mut self.encoder);
                let mut read: Vec<Extent> = Vec::new();
                let at = known.stamp();
                let sent = tracked.tracker.memory().read_in_parts(wanted, PART_PAGES, &mut pages, |part| {
                    read.extend_from_slice(part.extents());
                    encode(encoder, known, space, part.extents(), part.data(), at, emit)
                });
                extents::normalize(&mut read);
                *wanted = extents::subtract(wanted, &read);
                if memory::reads_directly(tracked.tracker.pid()) {
                    tracked.ahead.append(&mut read);
                }
                match sent {
                    // It ended meanwhile, as processes do; what was sent of it the manifest will not list.
                    Ok(()) | Err(CaptureError::Read(ReadError::Gone(_))) => {}
                    Err(error) => return Err(error),
                }
            }
            if stale < PRECOPY_AGAIN_PAGES_MIN {
                break;
            }
        }
        pages.shrink();
        Ok(pending)
    }

    /// Sends shared memory while the tree runs, if there is much of it to be sent.
    fn precopy_shared(&mut self, figures: &EpochFigures, emit: &mut Emit<'_>) -> Result<(), CaptureError> {
        // Without a bridge CRIU sends it.
        let is_ours = self.source.tracking == Tracking::WriteProtect;
        if !is_ours || !(figures.full || self.unsure || self.shared.is_unsettled()) {
            return Ok(());
        }
        let tasks = memory::tasks_of(self.source.root)?;
        // Of a task that has ended nothing is mapped.
        let maps = |task: &Task| Some((task.pid, fs::read(format!("/proc/{}/maps", task.pid)).ok()?));
        let maps: Vec<(i32, Vec<u8>)> = tasks.iter().filter_map(maps).collect();
        for mapped in self.shared.find(maps.iter().map(|(pid, maps)| (*pid, maps.as_slice()))) {
            let space = Space::Shared(mapped.inode);
            let looked = self.shared.look(&mapped)?;
            self.known.mark_stale(space, &looked.changed);
            let missing = self.known.missing(space, &looked.there);
            let at = self.known.stamp();
            for run in &missing {
                for start in (run.start..run.end()).step_by((PART_PAGES * PAGE_SIZE) as usize) {
                    let pages = ((run.end() - start) / PAGE_SIZE).min(PART_PAGES);
                    let part = [Extent { start, pages }];
                    let content = self.shared.content(mapped.inode, &part);
                    encode(&mut self.encoder, &mut self.known, space, &part, &content, at, emit)?;
                }
            }
        }
        Ok(())
    }

    /// One pass over every task; adds what it finds, and what the standby does not have, to `pending`.
    fn scan(
        &mut self,
        figures: &mut EpochFigures,
        pending: &mut BTreeMap<Space, Vec<Extent>>,
    ) -> Result<(), CaptureError> {
        let (mut dirty, mut populated) = (Vec::new(), Vec::new());
        for pid in self.tasks.keys().copied().collect::<Vec<_>>() {
            let Some(tracked) = self.tasks.get_mut(&pid) else { continue };
            let space = tracked.space;
            let mut scanned = tracked.tracker.take_dirty(&mut dirty).map(drop);
            if scanned.is_ok() {
                self.known.mark_stale(space, &dirty);
                figures.dirty_bytes += extents::pages(&dirty) * PAGE_SIZE;
                let wanted = pending.entry(space).or_default();
                wanted.extend_from_slice(&dirty);
                if figures.full || self.unsure {
                    scanned = tracked.tracker.populated(&mut populated);
                    wanted.extend_from_slice(&self.known.missing(space, &populated));
                }
                extents::normalize(wanted);
            }
            if let Err(error) = scanned {
                // Without a tracker it is read whole: the next look at the tree finds out what became of it. Kept, the
                // tracker of a pass that failed would hide pages that it protected and did not report.
                self.tasks.remove(&pid);
                if !matches!(error, TrackError::Gone(_) | TrackError::Replaced(_)) {
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }
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

fn fresh_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(dir)
}
