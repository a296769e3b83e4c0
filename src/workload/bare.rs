//! Bare trees: processes in the host's namespaces that somebody else started.
//!
//! Adopting one moves its processes into a cgroup of ours and starts a guard process beside it; releasing it
//! moves them back. Neither stops them.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    cgroup::{self, Cgroup, CgroupError},
    control::Request,
    init::Setup,
    keeper::{
        CONTROL, Keeper, KeeperError, ProcessId, SANDBOX_RECORD, Stat, TREE_RECORD, boot_id, private_dir,
        read_record, remove_run_dir, write_record,
    },
};
use crate::model::Name;

const PF_KTHREAD: u32 = 0x0020_0000;
/// Passes over /proc until no process of the tree is left outside of the cgroup.
const SCANS_MAX: usize = 20;

/// Why a tree was not adopted, found or released.
#[derive(Debug, thiserror::Error)]
pub enum BareError {
    /// No such process.
    #[error("there is no process {0}; check the pid with `ps`")]
    NoProcess(u32),
    /// The kernel's own.
    #[error("process {0} is a kernel thread; only programs can be protected")]
    KernelThread(u32),
    /// CRIU cannot dump it.
    #[error(
        "process {pid} is in session {session} and not the leader of its own, which a checkpoint needs; \
         start it with `setsid` or `standin run`"
    )]
    NotSessionLeader {
        /// Process.
        pid: u32,
        /// Its session.
        session: u32,
    },
    /// It is a container's.
    #[error("process {0} is in another pid namespace; protect its container instead")]
    InContainer(u32),
    /// It is somebody's.
    #[error("process {pid} is protected already, in the cgroup {cgroup}; unprotect that workload first")]
    Taken {
        /// Process.
        pid: u32,
        /// Its cgroup.
        cgroup: PathBuf,
    },
    /// It would freeze us.
    #[error(
        "process {0} is an ancestor of this agent, which would freeze itself; start the workload elsewhere"
    )]
    Ourselves(u32),
    /// A name that is in use.
    #[error("a bare tree {0} is adopted already; release it first")]
    Exists(Name),
    /// A name that is a sandbox's.
    #[error("{0} is the name of a sandbox; choose another name")]
    IsSandbox(Name),
    /// A name that is not.
    #[error("no bare tree {0} is adopted")]
    Unknown(Name),
    /// It forks too fast.
    #[error(
        "process {0} and its children start new processes faster than they can be moved into a cgroup; try again"
    )]
    Restless(u32),
    /// Files of /proc.
    #[error("cannot read {path}: {source}")]
    Proc {
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The guard process or the cgroup.
    #[error("bare tree {name}: {source}")]
    Keeper {
        /// Workload.
        name: Name,
        /// Cause.
        source: KeeperError,
    },
}

/// What the run directory keeps.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    boot_id: String,
    root: ProcessId,
    guard: Option<ProcessId>,
    /// The cgroup that the tree's root was in, below the v2 root.
    home: PathBuf,
}

/// A handle on an adopted tree.
#[derive(Debug)]
pub struct BareTree {
    root: ProcessId,
    keeper: Keeper,
}

impl BareTree {
    /// Adopts the process and all its descendants. `program`'s verb `guard` becomes the guard process.
    pub fn adopt(name: &Name, pid: u32, program: &Path, run_dir: &Path) -> Result<Self, BareError> {
        let root = check(pid)?;
        match Self::open(name, run_dir) {
            Ok(_) => return Err(BareError::Exists(name.clone())),
            Err(BareError::Unknown(_)) if !run_dir.join(name.as_str()).exists() => {}
            Err(_) => Self::release(name, run_dir)?,
        }
        Self::build(name, root, program, run_dir).inspect_err(|_| {
            // The first error counts; what this leaves, the next release removes.
            let _ = Self::release(name, run_dir);
        })
    }

    fn build(name: &Name, root: ProcessId, program: &Path, run_dir: &Path) -> Result<Self, BareError> {
        let keeper_error = keeper_error(name);
        let cgroup_error = |error: CgroupError| keeper_error(error.into());
        let dir = run_dir.join(name.as_str());
        private_dir(&dir).map_err(&keeper_error)?;
        let mut record = Record {
            boot_id: boot_id().map_err(&keeper_error)?,
            root,
            guard: None,
            home: cgroup::of_process(root.pid).map_err(cgroup_error)?,
        };
        let path = dir.join(TREE_RECORD);
        write_record(&path, &record).map_err(&keeper_error)?;
        let cgroup = Cgroup::create(name).map_err(cgroup_error)?;
        let setup = Setup { control: dir.join(CONTROL), work_cgroup: cgroup.work(), place: None, log: None };
        let keeper = Keeper::spawn(program, "guard", &setup, cgroup, |id| {
            record.guard = Some(id);
            write_record(&path, &record)
        })
        .map_err(&keeper_error)?;
        move_tree(root.pid, keeper.cgroup())?;
        Ok(Self { root, keeper })
    }

    /// Finds one that was adopted before.
    pub fn open(name: &Name, run_dir: &Path) -> Result<Self, BareError> {
        let keeper_error = keeper_error(name);
        let dir = run_dir.join(name.as_str());
        let record: Option<Record> = read_record(&dir.join(TREE_RECORD)).map_err(&keeper_error)?;
        let record = record
            .filter(|record| boot_id().is_ok_and(|id| id == record.boot_id))
            .ok_or_else(|| BareError::Unknown(name.clone()))?;
        let guard = record.guard.ok_or_else(|| BareError::Unknown(name.clone()))?;
        let cgroup = Cgroup::of(name).map_err(|error| keeper_error(error.into()))?;
        let keeper = Keeper::attach(&dir.join(CONTROL), guard, cgroup).map_err(&keeper_error)?;
        Ok(Self { root: record.root, keeper })
    }

    /// Ends the guard and gives the tree back to the cgroup it came from, running. Idempotent.
    pub fn release(name: &Name, run_dir: &Path) -> Result<(), BareError> {
        let keeper_error = keeper_error(name);
        let cgroup_error = |error: CgroupError| keeper_error(error.into());
        let dir = run_dir.join(name.as_str());
        if dir.join(SANDBOX_RECORD).exists() {
            return Err(BareError::IsSandbox(name.clone()));
        }
        let record: Option<Record> = read_record(&dir.join(TREE_RECORD)).unwrap_or(None);
        if let Ok(tree) = Self::open(name, run_dir) {
            tree.keeper.command(&Request::Leave).map_err(|error| keeper_error(error.into()))?;
        }
        let cgroup = Cgroup::of(name).map_err(cgroup_error)?;
        if cgroup.work().exists() {
            cgroup.thaw(std::time::Duration::from_secs(10)).map_err(cgroup_error)?;
            let root = cgroup::v2_root().map_err(cgroup_error)?;
            let home = record
                .as_ref()
                .and_then(|record| record.home.strip_prefix("/").ok())
                .map(|home| root.join(home));
            // Its old cgroup may have been removed since; then the root takes it.
            give_back(&cgroup, &home.filter(|home| home.exists()).unwrap_or(root)).map_err(cgroup_error)?;
            // What is left in `init` is the guard process, if it did not leave when told.
            cgroup.destroy_guard(std::time::Duration::from_secs(10)).map_err(cgroup_error)?;
        }
        remove_run_dir(&dir).map_err(keeper_error)
    }

    /// Its guard process: guard, cgroup.
    pub fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// Pid of the tree's root.
    pub fn pid(&self) -> u32 {
        self.root.pid
    }

    /// Whether the tree's root lives.
    pub fn is_alive(&self) -> bool {
        self.root.is_alive()
    }
}

fn keeper_error(name: &Name) -> impl Fn(KeeperError) -> BareError + use<'_> {
    move |source| BareError::Keeper { name: name.clone(), source }
}

/// Whether the process may be adopted.
fn check(pid: u32) -> Result<ProcessId, BareError> {
    let stat = Stat::read(pid).map_err(|_| BareError::NoProcess(pid))?;
    if matches!(stat.state, 'Z' | 'X') {
        return Err(BareError::NoProcess(pid));
    }
    if stat.flags & PF_KTHREAD != 0 {
        return Err(BareError::KernelThread(pid));
    }
    let namespace = |who: &str| {
        let path = PathBuf::from(format!("/proc/{who}/ns/pid"));
        fs::read_link(&path).map_err(|source| BareError::Proc { path, source })
    };
    if namespace(&pid.to_string())? != namespace("self")? {
        return Err(BareError::InContainer(pid));
    }
    if stat.session != pid {
        return Err(BareError::NotSessionLeader { pid, session: stat.session });
    }
    let cgroup = cgroup::of_process(pid).map_err(|_| BareError::NoProcess(pid))?;
    if cgroup.starts_with("/standin") {
        return Err(BareError::Taken { pid, cgroup });
    }
    let mut ancestor = std::process::id();
    while ancestor != 0 {
        if ancestor == pid {
            return Err(BareError::Ourselves(pid));
        }
        ancestor = Stat::read(ancestor).map_or(0, |stat| stat.parent);
    }
    Ok(ProcessId { pid, started: stat.started })
}

/// Moves root first: what a moved process forks is born in the cgroup, so each pass leaves fewer outside.
pub(super) fn move_tree(root: u32, cgroup: &Cgroup) -> Result<(), BareError> {
    for _ in 0..SCANS_MAX {
        let inside: HashSet<u32> = cgroup.pids()?.into_iter().collect();
        let tree = descendants(root, &parents()?);
        let outside: Vec<u32> = tree.into_iter().filter(|pid| !inside.contains(pid)).collect();
        if outside.is_empty() {
            return Ok(());
        }
        for pid in outside {
            match cgroup.enter_work(pid) {
                // It has ended meanwhile.
                Err(_) if !ProcessId::of(pid).is_ok_and(ProcessId::is_alive) => {}
                other => other?,
            }
        }
    }
    Err(BareError::Restless(root))
}

/// Moves the tree to another cgroup's directory.
pub(super) fn give_back(cgroup: &Cgroup, home: &Path) -> Result<(), CgroupError> {
    let procs = home.join("cgroup.procs");
    for _ in 0..SCANS_MAX {
        for pid in cgroup.pids()? {
            if let Err(error) = cgroup::write(&procs, &pid.to_string())
                && Stat::read(pid).is_ok()
            {
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Each living process and its parent.
fn parents() -> Result<HashMap<u32, u32>, BareError> {
    let path = PathBuf::from("/proc");
    let entries = fs::read_dir(&path).map_err(|source| BareError::Proc { path, source })?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let alive = pids.filter_map(|pid| {
        let stat = Stat::read(pid).ok()?;
        (!matches!(stat.state, 'Z' | 'X')).then_some((pid, stat.parent))
    });
    Ok(alive.collect())
}

/// The root and everything below it, parents before children.
fn descendants(root: u32, parents: &HashMap<u32, u32>) -> Vec<u32> {
    let mut tree: Vec<u32> = parents.contains_key(&root).then_some(root).into_iter().collect();
    let mut at = 0;
    while at < tree.len() {
        let parent = tree[at];
        tree.extend(parents.iter().filter(|(pid, of)| **of == parent && **pid != root).map(|(pid, _)| *pid));
        at += 1;
    }
    tree
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descendants_are_whole_and_parents_first() {
        let parents = HashMap::from([(1, 0), (5, 1), (6, 5), (7, 6), (8, 1), (9, 5)]);
        let tree = descendants(5, &parents);
        assert_eq!(tree[0], 5);
        assert_eq!(HashSet::<u32>::from_iter(tree.clone()), HashSet::from([5, 6, 7, 9]));
        assert!(tree.iter().position(|p| *p == 6) < tree.iter().position(|p| *p == 7));
        assert!(descendants(4, &parents).is_empty());
    }
}
