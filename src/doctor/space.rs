//! Cgroups, directories and their room.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::{
        signal::SigSet,
        statfs::{TMPFS_MAGIC, statfs},
    },
    unistd::{AccessFlags, access},
};

use super::{Check, Group, State, human_bytes};
use crate::{
    config::{Config, StoreKind},
    workload::cgroup::v2_root,
};

const MIB: u64 = 1 << 20;
/// A small tree's images take some hundred KiB; below this not even one fits for sure.
const WORK_BYTES_MIN: u64 = 16 * MIB;
/// Trees of hundreds of tasks have been seen to take this.
const WORK_BYTES_ENOUGH: u64 = 128 * MIB;
/// Identity, peers and the records of workloads.
const STATE_BYTES_MIN: u64 = MIB;
/// Logs and histories of workloads, too.
const STATE_BYTES_ENOUGH: u64 = 64 * MIB;
/// A store with less room than this takes hardly any workload.
const STORE_BYTES_ENOUGH: u64 = 256 * MIB;
/// Always the same, so that one that a kill left is removed by the next doctor.
const CGROUP: &str = "standin-doctor";

/// Makes a cgroup and removes it, while signals to this thread wait: call it before there are others.
pub(super) fn cgroup() -> Check {
    const ID: &str = "cgroup-v2";
    const READ_ONLY: &str =
        "mount it writable for the agent, e.g. `mount -o remount,rw` on it, and run as root of the host";
    let root = match v2_root() {
        Ok(root) => root,
        Err(error) => {
            let remedy = "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified";
            let found = error.to_string();
            let found = found.split(';').next().unwrap_or_default();
            return Check::fail(Group::Space, ID, found, remedy);
        }
    };
    let held = SigSet::all().thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_SETMASK);
    // One doctor after the other: what one removes the other would find missing.
    let alone = File::open(&root).map(|root| Flock::lock(root, FlockArg::LockExclusive));
    let tried = try_cgroup(&root.join(CGROUP));
    drop(alone);
    if let Ok(mask) = held {
        // Restoring what was just in force cannot fail.
        let _ = mask.thread_set_mask();
    }
    match tried {
        Err(error) => Check::fail(Group::Space, ID, format!("{}: {error}", root.display()), READ_ONLY),
        Ok(missing) if missing.is_empty() => {
            Check::ok(Group::Space, ID, format!("{}, writable", root.display()))
        }
        Ok(missing) => {
            let found = format!("{} has no {}", root.display(), missing.join(", "));
            Check::fail(Group::Space, ID, found, "boot a kernel of 5.14 or newer")
        }
    }
}

/// The files that the agent needs and that are missing.
fn try_cgroup(dir: &Path) -> io::Result<Vec<&'static str>> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let needed = ["cgroup.procs", "cgroup.events", "cgroup.freeze", "cgroup.kill"];
    let missing = needed.into_iter().filter(|file| !dir.join(file).exists()).collect();
    match fs::remove_dir(dir) {
        // A doctor that could not be waited for was faster.
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(missing),
    }
}

pub(super) fn directories(config: &Config) -> Vec<Check> {
    vec![
        directory("state-dir", &config.state_dir, STATE_BYTES_MIN, STATE_BYTES_ENOUGH),
        directory("run-dir", &config.run_dir, 0, STATE_BYTES_MIN),
        in_memory(
            directory("work-dir", &config.work_dir, WORK_BYTES_MIN, WORK_BYTES_ENOUGH),
            &config.work_dir,
        ),
        store(config),
    ]
}

/// Epochs' images on a disk make every freeze wait for it.
fn in_memory(check: Check, dir: &Path) -> Check {
    if check.state != State::Ok || is_tmpfs(existing(dir)) {
        return check;
    }
    let remedy = "set `work_dir` to a directory in a tmpfs, such as /dev/shm: each epoch waits for it";
    Check::warn(check.group, check.id, format!("{}, which is no tmpfs", check.found), remedy)
}

/// A primary's store is empty, so a small one is no reason to refuse.
fn store(config: &Config) -> Check {
    let check = directory("store-dir", &config.store_dir, 0, STORE_BYTES_ENOUGH);
    if check.state != State::Ok {
        return check;
    }
    let tmpfs = is_tmpfs(existing(&config.store_dir));
    match config.store {
        StoreKind::Memory if !tmpfs => {
            let remedy = "set `store_dir` to a directory in a tmpfs, or `store = \"disk\"` to have it synced";
            Check::warn(check.group, check.id, format!("{}, which is no tmpfs", check.found), remedy)
        }
        StoreKind::Disk if tmpfs => {
            let remedy = "set `store_dir` to a directory on a disk: this one does not survive a reboot";
            Check::warn(check.group, check.id, format!("{}, which is a tmpfs", check.found), remedy)
        }
        _ => check,
    }
}

fn directory(id: &'static str, dir: &Path, bytes_min: u64, bytes_enough: u64) -> Check {
    let at = existing(dir);
    let made = if at == dir { "" } else { " (to be made)" };
    if let Err(error) = try_write(at) {
        let found = format!("{}: {} cannot be written: {error}", dir.display(), at.display());
        let remedy = format!("make it writable for root, or set `{}` to another", id.replace('-', "_"));
        return Check::fail(Group::Space, id, found, remedy);
    }
    let Some(free) = free_bytes(at) else {
        let found = format!("{}{made}: its free space cannot be read", dir.display());
        return Check::warn(Group::Space, id, found, "see `df` there");
    };
    let found = format!("{}{made}, {} free", dir.display(), human_bytes(free));
    let remedy = format!(
        "free space there, enlarge a tmpfs with `mount -o remount,size=…`, or set `{}` to another",
        id.replace('-', "_")
    );
    if free < bytes_min {
        return Check::fail(
            Group::Space,
            id,
            format!("{found}; {} are needed", human_bytes(bytes_min)),
            remedy,
        );
    }
    if free < bytes_enough {
        return Check::warn(Group::Space, id, format!("{found}, which is little"), remedy);
    }
    Check::ok(Group::Space, id, found)
}

/// The directory itself, or the nearest one above it that is there.
pub(super) fn existing(dir: &Path) -> &Path {
    dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

/// By a file that never has a name, so that none is left; file systems that have no such files are asked
/// what they would allow.
fn try_write(dir: &Path) -> io::Result<()> {
    if !dir.is_dir() {
        return Err(ErrorKind::NotADirectory.into());
    }
    let file = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(dir);
    match file {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            Ok(access(dir, AccessFlags::W_OK | AccessFlags::X_OK)?)
        }
        other => other.map(|_| ()),
    }
}

fn is_tmpfs(dir: &Path) -> bool {
    statfs(dir).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC)
}

/// What can still be written there; in a tmpfs, no more than RAM has left.
pub(super) fn free_bytes(dir: &Path) -> Option<u64> {
    let found = statfs(dir).ok()?;
    let free = found.blocks_available() * u64::try_from(found.block_size()).ok()?;
    if found.filesystem_type() != TMPFS_MAGIC {
        return Some(free);
    }
    // A tmpfs without a limit reports no blocks at all.
    let free = if found.blocks() == 0 { u64::MAX } else { free };
    let memory = fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(available_memory);
    Some(memory.map_or(free, |memory| free.min(memory)))
}

pub(super) fn available_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_tried_without_a_trace() {
        let dir = tempfile::tempdir().unwrap();
        let check = directory("state-dir", &dir.path().join("a/b"), 1, 1);
        assert_eq!(check.state, State::Ok, "{check:?}");
        assert!(check.found.contains("to be made"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_below_a_file_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let check = directory("work-dir", &file.path().join("work"), 0, 0);
        assert_eq!(check.state, State::Fail);
        assert!(check.remedy.unwrap().contains("`work_dir`"));
    }

    #[test]
    fn room_decides_between_ok_warning_and_failure() {
        let dir = tempfile::tempdir().unwrap();
        let state = |min, enough| directory("work-dir", dir.path(), min, enough).state;
        assert_eq!(state(0, 1), State::Ok);
        assert_eq!(state(0, u64::MAX), State::Warn);
        assert_eq!(state(u64::MAX, u64::MAX), State::Fail);
    }
}
