//! The requests of a watchdog device (include/uapi/linux/watchdog.h).

use std::{fs::File, io, os::fd::AsRawFd};

/// `struct watchdog_info`.
#[repr(C)]
pub(super) struct Info {
    options: u32,
    firmware: u32,
    identity: [u8; 32],
}

const HAS_MAGIC_CLOSE: u32 = 0x100;

nix::ioctl_read!(get_support, b'W', 0, Info);
nix::ioctl_readwrite!(set_timeout, b'W', 6, libc::c_int);

/// Whether the device can be closed for good.
pub(super) fn has_magic_close(device: &File) -> io::Result<bool> {
    let mut info = Info { options: 0, firmware: 0, identity: [0; 32] };
    // SAFETY: the kernel writes one whole `struct watchdog_info`, which is what the pointer is to.
    unsafe { get_support(device.as_raw_fd(), &raw mut info) }?;
    Ok(info.options & HAS_MAGIC_CLOSE != 0)
}

/// Asks for so many seconds, and returns what the device makes of it.
pub(super) fn timeout(device: &File, seconds: u32) -> io::Result<u32> {
    let mut seconds = seconds as libc::c_int;
    // SAFETY: the kernel reads and writes one int, which is what the pointer is to.
    unsafe { set_timeout(device.as_raw_fd(), &raw mut seconds) }?;
    u32::try_from(seconds).map_err(|_| io::ErrorKind::InvalidData.into())
}
