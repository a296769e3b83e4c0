//! The kernel's name of what a socket is.

use std::{ffi::CStr, io};

/// The kernel's names are shorter (`struct proto`, include/net/sock.h).
const NAME_BYTES_MAX: usize = 64;

/// Protocol of a socket, as it was made (sockfs_xattr_get in net/socket.c); `path` is a link to it, in `/proc/PID/fd`.
pub(super) fn socket_protocol(path: &CStr) -> io::Result<String> {
    let mut name = [0_u8; NAME_BYTES_MAX];
    let attribute = c"system.sockprotoname";
    // SAFETY: both names are C strings and the kernel writes at most `name.len()` bytes into `name`.
    let len =
        unsafe { libc::getxattr(path.as_ptr(), attribute.as_ptr(), name.as_mut_ptr().cast(), name.len()) };
    if len < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = &name[..len as usize];
    Ok(String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(name)).into_owned())
}
