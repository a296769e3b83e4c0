//! Mounts that are nowhere yet: the calls that take a copy of one, make a new one, and put either somewhere. A descriptor of a
//! mount can be taken into another mount namespace, which a path cannot.

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use super::super::super::sys::own;

/// A copy of what is mounted at a path of the directory `from`, or shows there, without what is mounted below it. `None`: the
/// working directory.
pub(super) fn clone_mount(from: Option<BorrowedFd<'_>>, path: &Path) -> io::Result<OwnedFd> {
    let from = from.map_or(libc::AT_FDCWD, |from| from.as_raw_fd());
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC as libc::c_uint;
    // SAFETY: the path is a string that outlives the call; the kernel keeps none of it.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, from, path.as_ptr(), flags) })
}

/// A file system of its own.
pub(super) fn new_mount(kind: &str, options: &[(String, String)]) -> io::Result<OwnedFd> {
    const CMD_CREATE: libc::c_uint = 6;
    const SET_STRING: libc::c_uint = 1;
    const CLOEXEC: libc::c_uint = 1;
    let kind = CString::new(kind)?;
    // SAFETY: the name is a string that outlives the call.
    let context = descriptor(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), CLOEXEC) })?;
    let configure = |command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>| {
        let [key, value] = [key, value].map(|text| text.map_or(ptr::null(), CStr::as_ptr));
        // SAFETY: key and value are null or strings that outlive the call.
        check(unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) })
    };
    for (key, value) in options {
        let (key, value) = (CString::new(key.as_str())?, CString::new(value.as_str())?);
        configure(SET_STRING, Some(&key), Some(&value))?;
    }
    configure(CMD_CREATE, None, None)?;
    // SAFETY: takes no pointer.
    descriptor(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOEXEC, 0) })
}

/// Adds attributes (`MOUNT_ATTR_…`) to a mount.
pub(super) fn set_attributes(mount: BorrowedFd<'_>, attributes: u64) -> io::Result<()> {
    let change = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the empty path and the structure outlive the call, and its length is passed along.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    })
}

/// Puts a mount on top of what is open.
pub(super) fn attach(mount: BorrowedFd<'_>, on: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    let (mount, on, nothing) = (mount.as_raw_fd(), on.as_raw_fd(), c"".as_ptr());
    // SAFETY: the empty path outlives the call.
    check(unsafe { libc::syscall(libc::SYS_move_mount, mount, nothing, on, nothing, flags) })
}

fn check(answer: libc::c_long) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The new descriptor that a call answers.
fn descriptor(answer: libc::c_long) -> io::Result<OwnedFd> {
    check(answer)?;
    Ok(own(answer as RawFd))
}
