//! The CRIUs of a capturer: one waits for the next freeze, forked from another that is never given a task.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use super::{CaptureError, Source};
use crate::{
    capture::{ipc, tracking::Tracking},
    criu::{
        fork_server::ForkServer,
        parent,
        spawn::{Place, Spawn},
        swrk::{CriuError, DumpOptions, Swrk},
    },
};

/// How long CRIU may be silent in a dump before it is told to give up.
const DUMP_SILENCE_MAX: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Clone)]
pub(super) struct Crius(Arc<Mutex<Kept>>);

struct Kept {
    source: Arc<Source>,
    /// Of the tree.
    root: Arc<OwnedFd>,
    /// None with soft-dirty bits: there is no bridge that would fork.
    fork_server: Option<ForkServer>,
    spare: Option<Spare>,
    next_dir: u32,
    /// The tree's IPC namespace is part of the image.
    own_ipc: bool,
    /// There will be no freeze any more.
    closed: bool,
}

/// A CRIU that waits, and the directory that it will write to.
pub(super) struct Spare {
    pub(super) swrk: Swrk,
    pub(super) dir: PathBuf,
    /// It was asked for a dump after which the tree runs on.
    runs_on: bool,
}

impl Source {
    /// For an epoch after which the tree runs on, or for one that hands it off.
    pub(super) fn dump_options(&self, runs_on: bool) -> DumpOptions {
        let mut options = DumpOptions::new(self.root_inside);
        if let Some(whole) = &self.whole {
            options.pid = self.root.unsigned_abs();
            options.root = Some(whole.root.display().to_string());
            options.external.clone_from(&whole.external);
            options.empty_net = whole.empty_net;
        }
        options.leave_running = runs_on;
        options.parent = Some(format!("../{}", parent::DIRECTORY));
        options.silence_max = DUMP_SILENCE_MAX;
        options
    }
}

impl Crius {
    pub(super) fn new(source: Arc<Source>, root: Arc<OwnedFd>) -> Self {
        let kept =
            Kept { source, root, fork_server: None, spare: None, next_dir: 0, own_ipc: false, closed: false };
        Self(Arc::new(Mutex::new(kept)))
    }

    /// Waits for who spawns one.
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn own_ipc(&self) -> bool {
        self.kept().own_ipc
    }

    /// Whether the next image must have the IPC namespace. A tree without a sandbox shares the host's, which it cannot have.
    pub(super) fn look_at_ipc(&self) -> Result<(), CaptureError> {
        let mut kept = self.kept();
        let own_ipc = kept.source.init.is_some() && ipc::has_objects(kept.root.as_fd())?;
        if std::mem::replace(&mut kept.own_ipc, own_ipc) != own_ipc {
            // They are in the wrong one.
            (kept.spare, kept.fork_server) = (None, None);
        }
        Ok(())
    }

    /// The one that waits, for the freeze that begins.
    pub(super) fn take_spare(&self) -> Option<Spare> {
        self.kept().spare.take()
    }

    /// All end, and nobody writes to their directories any more.
    pub(super) fn close(&self) {
        let mut kept = self.kept();
        (kept.spare, kept.fork_server, kept.closed) = (None, None, true);
    }

    /// Makes sure that one waits for a freeze, after which the tree runs on if `runs_on`.
    pub(super) fn wait_for_freeze(&self, runs_on: bool) -> Result<(), CaptureError> {
        let mut kept = self.kept();
        match &kept.spare {
            Some(spare) if spare.runs_on == runs_on => Ok(()),
            _ if runs_on => kept.spawn_ahead(),
            _ => kept.spawn(),
        }
    }

    /// Makes sure that one waits for a freeze after which the tree runs on.
    pub(super) fn spawn_ahead(&self) -> Result<(), CaptureError> {
        self.wait_for_freeze(true)
    }

    /// The same on a thread of its own, if one can be forked.
    pub(super) fn spawn_beside(&self) {
        let kept = Arc::clone(&self.0);
        let spawn = move || {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            if !kept.closed
                && kept.fork_server.is_some()
                && kept.spare.is_none()
                && let Err(error) = kept.spawn_ahead()
            {
                tracing::debug!(%error, "no CRIU waits for the next epoch");
            }
        };
        // If there can be no thread, the next epoch sees to it.
        let _ = thread::Builder::new().name("standin-criu".into()).spawn(spawn);
    }
}

impl Kept {
    fn spawn_ahead(&mut self) -> Result<(), CaptureError> {
        self.spawn()?;
        let options = self.source.dump_options(true);
        if let Some(spare) = &mut self.spare {
            if let Err(error) = spare.swrk.begin(&options) {
                self.spare = None;
                return Err(error.into());
            }
            spare.runs_on = true;
        }
        Ok(())
    }

    fn spawn(&mut self) -> Result<(), CaptureError> {
        self.spare = None;
        let dir = self.source.work.join(format!("dump-{}", self.next_dir % 2));
        self.next_dir += 1;
        fresh_dir(&dir)?;
        let images = File::open(&dir)?;
        let swrk = match self.source.tracking {
            Tracking::WriteProtect => self.fork(&images)?,
            Tracking::SoftDirty => {
                let spawn = Spawn { place: self.place(), page_server: true, ..Spawn::new(images.as_fd()) };
                Swrk::spawn(&self.source.install, &spawn)?
            }
        };
        self.spare = Some(Spare { swrk, dir, runs_on: false });
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

    /// Has one forked; the one that forks is started first if there is none, or it does not fork any more.
    fn fork(&mut self, images: &File) -> Result<Swrk, CaptureError> {
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
        let server = ForkServer::start(install, &spawn).map_err(CriuError::from)?;
        Ok(Swrk::fork(install, self.fork_server.insert(server), images.as_fd())?)
    }
}

fn fresh_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(dir)
}
