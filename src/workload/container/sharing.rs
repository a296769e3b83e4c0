//! Whether somebody else has a container's files mounted too: what two change is of two instants on the standby.
//!
//! By the mount namespaces of all processes, so whatever engine the others are of. What is mounted in ours at the same place
//! is in every namespace that was copied from it, and tells nothing.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use super::super::mountinfo::Mount;

fn is_at(mount: &Mount, other: &Mount) -> bool {
    (&mount.device, &mount.root, &mount.point) == (&other.device, &other.root, &other.point)
}

/// A process that sees a directory, or a part of it, as a mount in a namespace that is neither ours nor that of `init`.
pub(super) fn other_user(dir: &Path, init: u32) -> io::Result<Option<u32>> {
    let ours = Mount::all_of("self")?;
    let Some((device, root)) = place_of(dir, &ours)? else { return Ok(None) };
    let mut seen: BTreeSet<PathBuf> = ["self".to_owned(), init.to_string()]
        .iter()
        .filter_map(|process| fs::read_link(format!("/proc/{process}/ns/mnt")).ok())
        .collect();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // It may end at any time.
        let Ok(namespace) = fs::read_link(entry.path().join("ns/mnt")) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        let theirs = Mount::all_of(&pid.to_string()).unwrap_or_default();
        let is_copy = |mount: &Mount| ours.iter().any(|our| is_at(our, mount));
        if theirs.iter().any(|mount| mount.shows(&device, &root) && !is_copy(mount)) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// The file system that a directory is on, and its path there.
fn place_of(dir: &Path, mounts: &[Mount]) -> io::Result<Option<(String, PathBuf)>> {
    let dir = dir.canonicalize()?;
    let opened = File::open(&dir)?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", opened.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse::<u64>().ok());
    let Some(mount) = mounts.iter().find(|mount| Some(mount.id) == id) else { return Ok(None) };
    let below = dir.strip_prefix(&mount.point).unwrap_or(Path::new(""));
    let root = if below.as_os_str().is_empty() { mount.root.clone() } else { mount.root.join(below) };
    Ok(Some((mount.device.clone(), root)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_ours_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(other_user(dir.path(), std::process::id()).unwrap(), None);
    }
}
