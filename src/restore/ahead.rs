//! A CRIU that waits for the order to restore: starting one takes as long as restoring does.

use std::{
    fs::File,
    io,
    ops::RangeInclusive,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use crate::criu::{
    Install,
    bridge::Bridge,
    spawn::{Place, Spawn},
    swrk::{CriuError, RestoreOptions, Swrk},
};

/// CRIU's own pids begin so far above the workload's: those grow from epoch to epoch.
const PIDS_AHEAD: u32 = 1000;
/// Pids that CRIU may take for itself.
const PIDS_OF_CRIU: u32 = 64;
/// CRIU's last stage that can be refused: it has sent every userfaultfd, and nothing runs yet.
const POST_RESTORE: &str = "post-restore";
/// Its next one: whatever is answered, the tasks run.
const PRE_RESUME: &str = "pre-resume";
/// A restore that reads no pages takes milliseconds: what holds it up for so long holds it up for ever.
const LAZY_SILENCE_MAX: Duration = Duration::from_secs(30);

/// What a restore has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// CRIU has sent every userfaultfd, and nothing runs yet: a failure calls the restore off. Once this is answered the
    /// tasks may come to run, also if nobody is there to hear of it.
    Restored,
    /// The tasks run next.
    Resuming,
}

/// The place in which a tree will be restored.
#[derive(Debug)]
pub struct Site {
    /// Its pid 1.
    pub init: OwnedFd,
    /// The directories of the tree's cgroups.
    pub cgroups: Vec<PathBuf>,
    /// Pid 1 has a cgroup namespace of its own.
    pub own_cgroup_namespace: bool,
    /// What the tree's ways to its log become, in their order.
    pub stdio: Vec<OwnedFd>,
    /// The tree's IPC namespace comes with the image; otherwise it is that of pid 1.
    pub own_ipc: bool,
}

/// A CRIU that waits there. Dropping it ends it.
#[derive(Debug)]
pub struct Ahead {
    criu: Swrk,
    pids: RangeInclusive<u32>,
    stdio: usize,
    own_ipc: bool,
}

impl Ahead {
    /// Starts one that will restore a directory of `root`, of a tree with these pids; 10 to 20 ms.
    pub fn start(
        install: &Install,
        bridge: &Bridge,
        root: &Path,
        site: &Site,
        pids: &[u32],
    ) -> Result<Self, CriuError> {
        let opened = File::open(root).map_err(|source| CriuError::Rpc { what: "restore", source })?;
        let above = pids.iter().copied().max().unwrap_or(1).saturating_add(PIDS_AHEAD);
        let inherit = site.stdio.iter().map(|fd| (String::new(), fd.as_fd())).collect();
        let spawn = Spawn {
            place: Place::Inside {
                init: site.init.as_fd(),
                cgroup: site.own_cgroup_namespace,
                ipc: (!site.own_ipc).then_some(site.init.as_fd()),
            },
            bridge: Some(bridge),
            cgroups: site.cgroups.clone(),
            pids_above: Some(above),
            inherit,
            ..Spawn::new(opened.as_fd())
        };
        let criu = Swrk::spawn(install, &spawn)?;
        let pids = above + 1..=above + PIDS_OF_CRIU;
        Ok(Self { criu, pids, stdio: site.stdio.len(), own_ipc: site.own_ipc })
    }

    /// Whether it still waits, and can restore a tree with these pids and so many ways to its log, its IPC namespace in the
    /// image or not.
    pub fn fits(&mut self, pids: &[u32], stdio: usize, own_ipc: bool) -> bool {
        let fits = self.stdio == stdio && self.own_ipc == own_ipc;
        fits && self.criu.is_waiting() && !pids.iter().any(|pid| self.pids.contains(pid))
    }

    /// Its processes, in our pid namespace.
    pub fn processes(&self) -> Vec<u32> {
        self.criu.processes()
    }

    /// Restores the directory `name` of the root, what CRIU is given descriptors for named by `keys`; `reached` hears how far
    /// it has come. Returns the pid of the tree's root in its namespace, when the tree runs.
    pub fn restore(
        self,
        name: &str,
        keys: Vec<String>,
        lazy: bool,
        reached: &mut dyn FnMut(Step) -> io::Result<()>,
    ) -> Result<u32, CriuError> {
        let options = RestoreOptions {
            lazy,
            directory: Some(name.to_owned()),
            inherit: Some(keys),
            silence_max: if lazy { LAZY_SILENCE_MAX } else { RestoreOptions::default().silence_max },
            ..RestoreOptions::default()
        };
        self.criu.restore(&options, &mut |stage| {
            let reached = match stage {
                POST_RESTORE => reached(Step::Restored),
                PRE_RESUME => reached(Step::Resuming),
                _ => Ok(()),
            };
            reached
                .inspect_err(|error| tracing::error!(%error, stage, "before the restored tree runs"))
                .is_ok()
        })
    }
}
