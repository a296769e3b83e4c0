//! The kernel's name of what a socket is, and what this process keeps of freed memory.

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

/// Has threads share two heaps. By default each has one of its own (up to eight a processor), and each keeps the largest
/// buffers that it once had: the content of a few epochs in all. To be called before there are threads.
pub fn share_heaps() {
    const HEAPS: libc::c_int = 2;
    // SAFETY: the call touches no memory of ours. Refused, which it never is, it costs memory only.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, HEAPS) };
}
