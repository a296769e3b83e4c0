//! System V objects: shared memory, semaphores, message queues.
//!
//! They belong to an IPC namespace and to no process, so CRIU saves them only as part of a namespace: of one that is not
//! its own. A sandbox has one for itself. While there is such an object in it CRIU is kept out of that namespace, and it
//! becomes part of the image; the restored tree then has one that CRIU made, and no longer the sandbox's. Otherwise CRIU
//! joins the tree's, which is part of no image: to dump one takes its time.

use std::{fs, io, os::fd::BorrowedFd};

use nix::sched::CloneFlags;

use crate::workload::network::within_namespaces;

/// Each lists its objects, of the reader's namespace, below one line of titles.
const LISTS: [&str; 3] = ["/proc/sysvipc/shm", "/proc/sysvipc/sem", "/proc/sysvipc/msg"];

/// Whether there are such objects in the IPC namespace of the process behind this pidfd.
pub(super) fn has_objects(process: BorrowedFd<'_>) -> io::Result<bool> {
    within_namespaces(process, CloneFlags::CLONE_NEWIPC, look)?
}

fn look() -> io::Result<bool> {
    for list in LISTS {
        match fs::read_to_string(list) {
            Ok(text) if text.lines().nth(1).is_some() => return Ok(true),
            // A kernel without them.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(false)
}
