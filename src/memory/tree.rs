//! The tasks of a process tree.

use std::{fs, io, os::fd::OwnedFd, time::Duration};

use nix::unistd::Pid;

use super::sys;

/// Most tasks that a tree may have.
pub const TASKS_MAX: usize = 65_536;
/// `PF_KTHREAD` of the flags in `/proc/PID/stat`.
const PF_KTHREAD: u64 = 0x0020_0000;

/// Why a tree could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// The root has exited.
    #[error("process {0}, the root of the tree, has exited")]
    Gone(i32),
    /// Too many tasks.
    #[error("the tree below process {0} has more than {TASKS_MAX} tasks; protect a smaller part of it")]
    TooMany(i32),
    /// A file of /proc has another form.
    #[error("{0} is not understood; is this kernel newer than this program?")]
    Form(String),
    /// A file of /proc could not be read.
    #[error("reading {path} failed: {source}; is /proc the host's, and CONFIG_PROC_CHILDREN set?")]
    Io {
        /// Which.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A descriptor of a process, by its pid on the host.
pub fn pidfd_of(pid: i32) -> io::Result<OwnedFd> {
    sys::pidfd_open(pid, false)
}

/// A process of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its pid on the host.
    pub pid: i32,
    /// Its pid in its own, innermost pid namespace: what CRIU's images name it by.
    pub inner_pid: u32,
    /// Host pid of its parent; for the root too, outside of the tree.
    pub parent: i32,
    /// Number of its threads.
    pub threads: u32,
    /// When it started, in clock ticks since boot: with the pid it names one process for good.
    pub start_ticks: u64,
    /// It has exited and was not waited for; it has no memory.
    pub zombie: bool,
}

/// Lists a tree from its root, parents before children.
///
/// Exact for a frozen tree. In a running one a process that starts during the walk may be missing and one
/// that exits is left out; the next walk shows it.
pub fn tasks_of(root: i32) -> Result<Vec<Task>, TreeError> {
    let mut tasks: Vec<Task> = Vec::new();
    let mut pending = vec![root];
    while let Some(pid) = pending.pop() {
        let Some(task) = absent_is_none(task(pid))? else { continue };
        if tasks.len() == TASKS_MAX {
            return Err(TreeError::TooMany(root));
        }
        tasks.push(task);
        // A child hangs below the thread that made it.
        let Some(threads) = absent_is_none(numbers_in(&format!("/proc/{pid}/task")))? else { continue };
        for tid in threads {
            let path = format!("/proc/{pid}/task/{tid}/children");
            let Some(text) = absent_is_none(read(path))? else { continue };
            pending.extend(text.split_ascii_whitespace().filter_map(|child| child.parse::<i32>().ok()));
        }
    }
    if tasks.is_empty() { Err(TreeError::Gone(root)) } else { Ok(tasks) }
}

/// Memory that an image of the tree would hold, as far as the kernel's counters tell: what each process has for itself,
/// and the shared memory of the one that has touched most of it (how much of it is the same they do not tell).
pub fn resident_bytes(root: i32) -> Result<u64, TreeError> {
    let (mut private_kib, mut shared_kib) = (0, 0);
    for task in tasks_of(root)? {
        let Some(status) = absent_is_none(read(format!("/proc/{}/status", task.pid)))? else { continue };
        // A zombie has no such lines.
        let field = |name: &str| {
            let rest = status.lines().find_map(|line| line.strip_prefix(name));
            rest.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        private_kib += field("RssAnon:");
        shared_kib = field("RssShmem:").max(shared_kib);
    }
    Ok((private_kib + shared_kib) * 1024)
}

/// Whether a process is a thread of the kernel.
pub fn is_kernel_thread(pid: i32) -> io::Result<bool> {
    let text = String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/stat"))?).into_owned();
    // The seventh field after the name.
    let flags = after_name(&text).and_then(|mut fields| fields.nth(6)?.parse::<u64>().ok());
    Ok(flags.is_some_and(|flags| flags & PF_KTHREAD != 0))
}

fn task(pid: i32) -> Result<Task, TreeError> {
    let path = format!("/proc/{pid}/stat");
    let stat = read(path.clone())?;
    let path = || TreeError::Form(path.clone());
    let fields: Vec<&str> = after_name(&stat).ok_or_else(path)?.collect();
    // proc_pid_stat(5), counted from the state: ppid 1, num_threads 17, starttime 19.
    let number = |i: usize| fields.get(i).and_then(|field| field.parse::<u64>().ok()).ok_or_else(path);
    let status_path = format!("/proc/{pid}/status");
    let status = read(status_path.clone())?;
    let inner = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let inner = inner.and_then(|pids| pids.split_ascii_whitespace().last()?.parse().ok());
    Ok(Task {
        pid,
        inner_pid: inner.ok_or(TreeError::Form(status_path))?,
        parent: number(1)? as i32,
        threads: number(17)? as u32,
        start_ticks: number(19)?,
        zombie: matches!(fields.first(), Some(&("Z" | "X"))),
    })
}

/// The fields behind the name, which may itself hold spaces and parentheses.
fn after_name(stat: &str) -> Option<impl Iterator<Item = &str>> {
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace())
}

fn numbers_in(directory: &str) -> Result<Vec<i32>, TreeError> {
    let failed = |source| TreeError::Io { path: directory.to_owned(), source };
    let mut numbers = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        numbers.extend(entry.map_err(failed)?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(numbers)
}

fn read(path: String) -> Result<String, TreeError> {
    match fs::read(&path) {
        Ok(text) => Ok(String::from_utf8_lossy(&text).into_owned()),
        Err(source) => Err(TreeError::Io { path, source }),
    }
}

/// Nothing, if what was read has exited meanwhile.
fn absent_is_none<T>(read: Result<T, TreeError>) -> Result<Option<T>, TreeError> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(TreeError::Io { source, .. })
            if matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The time for which the threads of a process have used processors. None: it is gone, or not to be told.
pub fn processor_time(pid: i32) -> Option<Duration> {
    let clock = nix::time::clock_getcpuclockid(Pid::from_raw(pid)).ok()?;
    nix::time::clock_gettime(clock).ok().map(Duration::from)
}
