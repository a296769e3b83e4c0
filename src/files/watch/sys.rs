//! fanotify, as far as `libc` gives only the bare calls.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// A group that reports what changed by file handles, the object's and its directory's, with the name.
pub(super) fn new_group() -> io::Result<File> {
    let flags = libc::FAN_CLASS_NOTIF
        | libc::FAN_CLOEXEC
        | libc::FAN_NONBLOCK
        | libc::FAN_REPORT_FID
        | libc::FAN_REPORT_DFID_NAME
        | libc::FAN_REPORT_TARGET_FID;
    // SAFETY: the call takes no pointer.
    let fd = unsafe { libc::fanotify_init(flags, libc::O_RDONLY as u32) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Adds events to (or removes them from) what a group watches at `dir`, or on its file system.
pub(super) fn mark(group: &File, flags: u32, mask: u64, dir: BorrowedFd<'_>) -> io::Result<()> {
    let here: &CStr = c".";
    // SAFETY: the path is a C string.
    let rc = unsafe {
        libc::fanotify_mark(group.as_fd().as_raw_fd(), flags, mask, dir.as_raw_fd(), here.as_ptr())
    };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What is in a group's queue, as if each event were only its head.
pub(super) fn queued_bytes(group: &File) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one integer.
    let rc = unsafe { libc::ioctl(group.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes as usize) }
}
