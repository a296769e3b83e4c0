//! What is mounted in a container, and what of it CRIU is told to leave to the restoring side.
//!
//! CRIU makes the kernel's own file systems anew. All others it would either refuse (what the container binds) or pack into
//! the image with `tar`, 5 ms of the freeze for each (tmpfs): those have names, which are where they are inside.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};

use super::super::super::cgroup::unescape;

/// File systems that CRIU makes anew.
const OF_KERNEL: [&str; 6] = ["proc", "sysfs", "cgroup", "cgroup2", "mqueue", "devpts"];

/// Options of a mount that are flags; the others are the file system's.
const FLAGS: [(&str, MsFlags); 8] = [
    ("nosuid", MsFlags::MS_NOSUID),
    ("nodev", MsFlags::MS_NODEV),
    ("noexec", MsFlags::MS_NOEXEC),
    ("noatime", MsFlags::MS_NOATIME),
    ("relatime", MsFlags::MS_RELATIME),
    ("strictatime", MsFlags::MS_STRICTATIME),
    ("nodiratime", MsFlags::MS_NODIRATIME),
    // Written to before it is shown.
    ("ro", MsFlags::empty()),
];
/// Options that a file system in memory has, by their beginnings; a runtime's own words are none of them.
const OF_TMPFS: [&str; 6] = ["size=", "mode=", "nr_inodes=", "nr_blocks=", "uid=", "gid="];

/// What a container of a daemon is made to bind so that it can be restored, and never shows: it is not in the image. It lies
/// in a file system in memory, where runc makes no directory for it.
pub(in super::super) const HIDDEN: &str = "/dev/.standin";
/// Below that, what shows nothing.
pub(super) const NOTHING: &str = "nothing";

/// Where a container of a daemon is made to bind what will be its file system in memory.
pub(super) fn hidden(inside: &Path) -> PathBuf {
    Path::new(HIDDEN).join(inside.strip_prefix("/").unwrap_or(inside))
}

/// One of a process.
struct Mount {
    inside: PathBuf,
    /// What of the file system is shown.
    part: String,
    kind: String,
}

/// The mounts of a process, but its root.
pub(super) struct Mounts(Vec<Mount>);

impl Mounts {
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string(format!("/proc/{pid}/mountinfo"))?))
    }

    fn parse(mountinfo: &str) -> Self {
        let mounts = mountinfo.lines().filter_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut fields = mount.split(' ').skip(3);
            let (part, inside) = (fields.next()?.to_owned(), unescape(fields.next()?));
            Some(Mount { inside, part, kind: file_system.split(' ').next()?.to_owned() })
        });
        Self(mounts.filter(|mount| mount.inside != Path::new("/")).collect())
    }

    /// Where those are that are not in an image.
    pub(super) fn external(&self) -> impl Iterator<Item = &Path> {
        let external = self.0.iter().filter(|mount| !OF_KERNEL.contains(&mount.kind.as_str()));
        external.map(|mount| mount.inside.as_path())
    }

    /// Those of a container whose daemon has it restored by runc, with the names that runc has for them: what the container
    /// binds, and `/dev/null` for a file that is masked. `memory` are the container's own file systems in memory: those, and
    /// the directories that are masked, have names of what it is made to bind for that on the standby.
    pub(super) fn as_a_daemon_names_them(&self, memory: &[&Path]) -> impl Iterator<Item = String> {
        let external = self.0.iter().filter(|mount| !OF_KERNEL.contains(&mount.kind.as_str()));
        external.map(|Mount { inside, part, kind }| {
            let name = match part.as_str() {
                "/null" => PathBuf::from("/dev/null"),
                "/" if memory.contains(&inside.as_path()) => hidden(inside),
                "/" if kind == "tmpfs" => hidden(NOTHING.as_ref()),
                _ => inside.clone(),
            };
            format!("mnt[{}]:{}", inside.display(), name.display())
        })
    }
}

/// Whether a path can stand in CRIU's notation and in its settings.
pub(super) fn is_plain(path: &Path) -> bool {
    let is_plain = |c: char| c.is_ascii_graphic() && !"[]\"'#\\".contains(c);
    path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        && path.to_str().is_some_and(|text| text.chars().all(is_plain))
}

/// Mounts a file system in memory, with the options of a container's, over a directory that is made.
pub(super) fn mount_memory(at: &Path, options: &[String]) -> io::Result<()> {
    fs::create_dir_all(at)?;
    let (mut flags, mut data) = (MsFlags::empty(), Vec::new());
    for option in options {
        match FLAGS.iter().find(|(name, _)| name == option) {
            Some((_, flag)) => flags |= *flag,
            None if OF_TMPFS.iter().any(|name| option.starts_with(name)) => data.push(option.as_str()),
            None => {}
        }
    }
    Ok(mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(data.join(",").as_str()))?)
}

/// An empty file system that nobody can write to.
pub(super) fn mount_nothing(at: &Path) -> io::Result<()> {
    fs::create_dir_all(at)?;
    Ok(mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::MS_RDONLY, Some("size=0"))?)
}

/// Mounts an overlay.
pub(super) fn mount_overlay(at: &Path, [lower, upper, work]: [&str; 3]) -> io::Result<()> {
    fs::create_dir_all(at)?;
    let data = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    Ok(mount(Some("overlay"), at, Some("overlay"), MsFlags::empty(), Some(data.as_str()))?)
}

/// Takes down what is mounted there; nothing is fine.
pub(super) fn unmount_at(at: &Path) -> io::Result<()> {
    match umount2(at, MntFlags::empty()) {
        // Not a mount, or not there.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Takes down whatever is mounted below a directory of ours.
pub(super) fn unmount_below(dir: &Path) -> io::Result<()> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    let mut ours: Vec<PathBuf> = points.filter(|point| point != dir && point.starts_with(dir)).collect();
    // What lies deeper goes first.
    ours.sort_unstable_by(|a, b| b.cmp(a));
    ours.iter().try_for_each(|point| Ok(umount2(point, MntFlags::MNT_DETACH)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_the_kernels_is_external() {
        let mounts = Mounts::parse(
            "91 75 0:39 /plain/rootfs / rw,relatime - tmpfs disk rw,mode=755\n\
             92 91 0:73 / /proc rw,relatime - proc proc rw\n\
             76 92 0:73 /bus /proc/bus ro,relatime - proc proc rw\n\
             81 92 0:74 /null /proc/keys rw,nosuid - tmpfs tmpfs rw\n\
             101 91 0:39 /my\\040data /data rw,relatime shared:3 - ext4 /dev/vda rw\n",
        );
        assert_eq!(mounts.external().collect::<Vec<_>>(), [Path::new("/proc/keys"), Path::new("/data")]);
    }

    #[test]
    fn only_plain_paths_go_into_settings() {
        assert!(is_plain(Path::new("/proc/keys")));
        for strange in ["/a b", "/a]", "/a/../b", "/a\n", "/#"] {
            assert!(!is_plain(Path::new(strange)), "{strange:?}");
        }
    }
}
