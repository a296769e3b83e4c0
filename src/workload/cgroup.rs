//! The cgroups of a workload: `standin/NAME/init` for its init or guard, `standin/NAME/work` for its tree. The tree of a
//! container whose engine limits it with cgroup v2 is in one below the container's instead, so that its limits hold.
//!
//! They lie directly below the root of the agent's cgroup namespace and not below the agent's own cgroup:
//! a service manager kills or removes everything in the latter when the agent's unit is stopped, and the
//! workload outlives us. No controller is enabled; the workload's limits stay what they were (on a hybrid
//! host its v1 cgroups are those of the agent).
//!
//! Invariant: whatever is in these cgroups was put there by us, so killing them kills nobody else.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Seek},
    os::{fd::AsFd, unix::ffi::OsStringExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::devices;
use crate::model::Name;

/// Why a change of a workload's cgroup failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup v2.
    #[error(
        "no cgroup2 file system is mounted in this mount namespace; mount one, \
         e.g. `mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`"
    )]
    NoV2,
    /// A file of it.
    #[error("cannot {what} cgroup file {path}: {source}; is the cgroup2 mount writable?")]
    File {
        /// Verb.
        what: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Time was up.
    #[error("the tasks in {path} were not {state} within {} ms; see their state with `cat /proc/PID/stack`", waited.as_millis())]
    Timeout {
        /// Directory.
        path: PathBuf,
        /// What was waited for.
        state: &'static str,
        /// How long.
        waited: Duration,
    },
}

/// The cgroup directory of one workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    dir: PathBuf,
    work: PathBuf,
}

/// The tree's cgroup below that of a container.
const WITHIN: &str = "standin";

impl Cgroup {
    /// Makes the directories, or takes those that are there.
    pub fn create(name: &Name) -> Result<Self, CgroupError> {
        Self::of(name)?.make()
    }

    /// The same with the tree's in a container's cgroup; that of nobody is as if there were none.
    pub(super) fn within(name: &Name, container: Option<&Path>) -> Result<Self, CgroupError> {
        let ours = Self::of(name)?;
        Ok(match container {
            Some(dir) => Self { work: dir.join(WITHIN), ..ours },
            None => ours,
        })
    }

    pub(super) fn make(self) -> Result<Self, CgroupError> {
        let cgroup = self;
        for dir in [cgroup.init(), cgroup.work()] {
            // Another workload's end may remove `standin` between the steps of this.
            let made = fs::create_dir_all(&dir).or_else(|_| fs::create_dir_all(&dir));
            made.map_err(file_error("create", &dir))?;
        }
        Ok(cgroup)
    }

    /// Where the workload's cgroup is, whether or not it exists.
    pub fn of(name: &Name) -> Result<Self, CgroupError> {
        let dir = v2_root()?.join("standin").join(name.as_str());
        Ok(Self { work: dir.join("work"), dir })
    }

    /// The cgroup of the init or guard.
    pub fn init(&self) -> PathBuf {
        self.dir.join("init")
    }

    /// The cgroup of the workload's tree. Whoever restores it enters this one first.
    pub fn work(&self) -> PathBuf {
        self.work.clone()
    }

    /// Moves a process of any pid namespace (by its pid in ours) into `work`.
    pub fn enter_work(&self, pid: u32) -> Result<(), CgroupError> {
        write(&self.work().join("cgroup.procs"), &pid.to_string())
    }

    /// Moves a process into `init`.
    pub(super) fn enter_init(&self, pid: u32) -> Result<(), CgroupError> {
        write(&self.init().join("cgroup.procs"), &pid.to_string())
    }

    /// The processes of the tree, in our pid namespace.
    pub fn pids(&self) -> Result<Vec<u32>, CgroupError> {
        let path = self.work().join("cgroup.procs");
        let text = fs::read_to_string(&path).map_err(file_error("read", &path))?;
        // A process of a pid namespace that is no descendant of ours reads as 0.
        Ok(text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0).collect())
    }

    /// Stops every task of the tree, and waits until the last one has stopped.
    pub fn freeze(&self, limit: Duration) -> Result<(), CgroupError> {
        write(&self.work().join("cgroup.freeze"), "1")?;
        self.await_frozen(true, limit)
    }

    /// Lets the tree run on.
    pub fn thaw(&self, limit: Duration) -> Result<(), CgroupError> {
        write(&self.work().join("cgroup.freeze"), "0")?;
        self.await_frozen(false, limit)
    }

    /// Whether every task of the tree is stopped by the cgroup.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        let path = self.work().join("cgroup.events");
        let text = fs::read_to_string(&path).map_err(file_error("read", &path))?;
        Ok(event(&text, "frozen"))
    }

    /// Whether there is no process in `work`, nor in a cgroup below it.
    pub(super) fn is_empty(&self) -> Result<bool, CgroupError> {
        let path = self.work().join("cgroup.events");
        let text = fs::read_to_string(&path).map_err(file_error("read", &path))?;
        Ok(!event(&text, "populated"))
    }

    fn await_frozen(&self, wanted: bool, limit: Duration) -> Result<(), CgroupError> {
        let state = if wanted { "frozen" } else { "thawed" };
        await_event(&self.work(), limit, state, |text| event(text, "frozen") == wanted)
    }

    /// Kills the tree, frozen or not, and waits until it is gone.
    pub fn kill(&self, limit: Duration) -> Result<(), CgroupError> {
        kill_dir(&self.work(), limit)
    }

    /// Kills the init as well, then removes the directories. Nothing to do is no error.
    pub(super) fn destroy(&self, limit: Duration) -> Result<(), CgroupError> {
        if !self.dir.exists() {
            return Ok(());
        }
        if self.work.exists() {
            kill_dir(&self.work, limit)?;
        }
        kill_dir(&self.dir, limit)?;
        self.remove()
    }

    /// Kills what is in `init` only, then removes the directories: `work` must be empty.
    pub(super) fn destroy_guard(&self, limit: Duration) -> Result<(), CgroupError> {
        kill_dir(&self.init(), limit)?;
        self.remove()
    }

    /// Removes the directories if they become empty of processes within the limit. Who stays in one of them, the logger of a
    /// guard that has left, ends by itself.
    pub(super) fn remove_if_empty(&self, limit: Duration) {
        let until = Instant::now() + limit;
        while self.remove().is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Removes the directories, which must be empty of processes.
    fn remove(&self) -> Result<(), CgroupError> {
        for dir in [self.work(), self.init(), self.dir.clone()] {
            match fs::remove_dir(&dir) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(file_error("remove", &dir)(error));
                }
                _ => {}
            }
        }
        // The last workload takes `standin` along; where there are others, it is not empty.
        let _ = self.dir.parent().map(fs::remove_dir);
        Ok(())
    }
}

/// Removes the cgroups below a directory that nobody is in any more.
pub(super) fn remove_below(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path());
            // One that is in use is ended by whoever looks for what is left.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

fn kill_dir(dir: &Path, limit: Duration) -> Result<(), CgroupError> {
    write(&dir.join("cgroup.kill"), "1")?;
    await_event(dir, limit, "dead", |text| !event(text, "populated"))
}

fn await_event(
    dir: &Path,
    limit: Duration,
    state: &'static str,
    done: impl Fn(&str) -> bool,
) -> Result<(), CgroupError> {
    let path = dir.join("cgroup.events");
    let mut file = File::open(&path).map_err(file_error("open", &path))?;
    let until = Instant::now() + limit;
    let mut text = String::new();
    loop {
        text.clear();
        file.rewind().and_then(|()| file.read_to_string(&mut text)).map_err(file_error("read", &path))?;
        if done(&text) {
            return Ok(());
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(CgroupError::Timeout { path: dir.to_owned(), state, waited: limit });
        }
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        let timeout = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(file_error("poll", &path)(errno.into())),
        }
    }
}

/// The cgroup of a process below the v2 root, e.g. `/standin/web/work`.
pub(super) fn of_process(pid: u32) -> Result<PathBuf, CgroupError> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&path).map_err(file_error("read", &path))?;
    text.lines().find_map(|line| line.strip_prefix("0::")).map(PathBuf::from).ok_or(CgroupError::NoV2)
}

/// The file that reads 1 while an engine has stopped all tasks of a container: of its own cgroup v2, or else of its pid 1's v1
/// freezer.
pub(super) fn pause_file(v2: Option<&Path>, init: u32) -> Result<Option<PathBuf>, CgroupError> {
    if let Some(dir) = v2 {
        return Ok(Some(dir.join("cgroup.freeze")));
    }
    let mut files = v1_of_process(init)?.into_iter().map(|dir| dir.join("freezer.self_freezing"));
    Ok(files.find(|file| file.exists()))
}

/// The file that counts the processes of a container which the kernel has killed for want of memory: of its own cgroup v2, or
/// else of its pid 1's in v1. `None` where no memory controller is in force.
pub(super) fn oom_file(v2: Option<&Path>, init: u32) -> Result<Option<PathBuf>, CgroupError> {
    let v2 = v2.map(|dir| dir.join("memory.events"));
    let v1 = v1_of_process(init)?.into_iter().map(|dir| dir.join("memory.oom_control"));
    Ok(v2.into_iter().chain(v1).find(|file| file.exists()))
}

/// The count in such a file; `None` if its cgroup is gone.
pub(super) fn oom_kills(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}

/// The directories of the v1 cgroups of a process; none on a host without cgroup v1.
pub(super) fn v1_of_process(pid: u32) -> Result<Vec<PathBuf>, CgroupError> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&path).map_err(file_error("read", &path))?;
    let mounts = Path::new("/proc/self/mountinfo");
    let mounts = fs::read_to_string(mounts).map_err(file_error("read", mounts))?;
    Ok(v1_dirs(&text, &mounts).into_iter().filter(|dir| dir.exists()).collect())
}

fn v1_dirs(cgroups: &str, mountinfo: &str) -> Vec<PathBuf> {
    let dir = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let point = (number != "0").then(|| v1_mount(mountinfo, controllers)).flatten()?;
        Some(point.join(path.strip_prefix('/')?))
    };
    cgroups.lines().filter_map(dir).collect()
}

/// Where the hierarchy with these controllers is mounted.
fn v1_mount(mountinfo: &str, controllers: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = file_system.split(' ');
        let is_v1 = fields.next()? == "cgroup";
        let options: Vec<&str> = fields.nth(1)?.split(',').collect();
        let fits = is_v1 && controllers.split(',').all(|controller| options.contains(&controller));
        fits.then(|| mount.split(' ').nth(4).map(unescape)).flatten()
    })
}

/// Has processes of a cgroup use no other devices than a process may.
pub(super) fn allow_devices_as(pid: u32, cgroup: &Cgroup) -> Result<(), CgroupError> {
    let path = cgroup.work();
    devices::allow_as(&dir_of_process(pid)?, &path).map_err(file_error("limit the devices of", &path))
}

/// The directory of a process' cgroup v2.
pub(super) fn dir_of_process(pid: u32) -> Result<PathBuf, CgroupError> {
    let path = of_process(pid)?;
    Ok(v2_root()?.join(path.strip_prefix("/").unwrap_or(&path)))
}

/// Where cgroup v2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a hybrid host.
pub fn v2_root() -> Result<PathBuf, CgroupError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(path).map_err(file_error("read", path))?;
    v2_mount(&text).ok_or(CgroupError::NoV2)
}

fn v2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        let is_v2 = file_system.split(' ').next()? == "cgroup2";
        is_v2.then(|| unescape(point))
    })
}

/// mountinfo writes blanks and backslashes as `\040` and the like.
pub(super) fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = (bytes[at] == b'\\')
            .then(|| bytes.get(at + 1..at + 4))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(octal.unwrap_or(bytes[at]));
        at += if octal.is_some() { 4 } else { 1 };
    }
    std::ffi::OsString::from_vec(out).into()
}

fn event(text: &str, key: &str) -> bool {
    text.lines().any(|line| line.split_once(' ') == Some((key, "1")))
}

pub(super) fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    fs::write(path, text).map_err(file_error("write", path))
}

fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::File { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_v2_mount_is_found_on_hybrid_hosts() {
        let text = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw\n\
                    32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                    41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(v2_mount(text), Some(PathBuf::from("/sys/fs/cgroup/uni fied")));
        assert_eq!(v2_mount("garbage\n"), None);
    }

    #[test]
    fn v1_cgroups_are_found_by_their_controllers() {
        let mounts = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      33 31 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n";
        let cgroups = "4:cpu,cpuacct:/box/a:b\n1:name=systemd:/box\n3:pids:/box\n0::/elsewhere\n";
        let dirs = v1_dirs(cgroups, mounts);
        assert_eq!(
            dirs,
            [Path::new("/sys/fs/cgroup/cpu,cpuacct/box/a:b"), Path::new("/sys/fs/cgroup/systemd/box")]
        );
    }

    #[test]
    fn events_are_whole_words() {
        assert!(event("populated 1\nfrozen 0\n", "populated"));
        assert!(!event("populated 1\nfrozen 0\n", "frozen"));
        assert!(!event("unfrozen 1\n", "frozen"));
    }
}
