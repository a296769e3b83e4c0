//! Why CRIU refused, where its own words do not tell: of an io_uring it reports only that a descriptor could not be
//! passed on, of processes that share their memory that it cannot make an id.

use std::fs;

use crate::{criu::swrk::CriuError, memory};

/// Most descriptors of a process that are looked at.
const DESCRIPTORS_MAX: usize = 65_536;

/// What CRIU says (both in cr-dump.c), and what it means.
const WORDS: [(&str, &str); 2] = [
    (
        "Can't make VM id",
        "a process shares its memory with another that is no thread of it (clone with CLONE_VM, or a vfork that has not \
         come to its exec yet), which no checkpoint can hold",
    ),
    (
        "with SysVIPC shmem map",
        "a process has System V shared memory attached (shmat), which can be checkpointed only with its own IPC namespace: \
         start it in a sandbox (standin run)",
    ),
];

/// Kinds of descriptors that no checkpoint can hold: how /proc/PID/fd shows them, and what they are called.
const KINDS: [(&str, &str); 4] = [
    ("anon_inode:[io_uring]", "an io_uring"),
    ("anon_inode:[userfaultfd]", "a userfaultfd"),
    ("anon_inode:[perf_event]", "a perf event"),
    ("anon_inode:bpf-", "a BPF object"),
];

/// What a process holds that explains CRIU's refusal.
pub(super) fn explain(error: &CriuError, root: i32) -> Option<String> {
    let CriuError::Refused { reason, .. } = error else { return None };
    if let Some((_, meant)) = WORDS.iter().find(|(words, _)| reason.contains(words)) {
        return Some((*meant).to_owned());
    }
    let tasks = memory::tasks_of(root).ok()?;
    tasks.iter().find_map(|task| {
        let what = held(task.pid)?;
        Some(format!("process {} has {what} open, which it must do without", task.pid))
    })
}

fn held(pid: i32) -> Option<&'static str> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    descriptors.flatten().take(DESCRIPTORS_MAX).find_map(|entry| {
        let link = fs::read_link(entry.path()).ok()?;
        let link = link.to_string_lossy().into_owned();
        KINDS.iter().find(|(shown, _)| link.starts_with(shown)).map(|(_, called)| *called)
    })
}
