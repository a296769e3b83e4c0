//! What `std` cannot do to a file.

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::Path,
};

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

pub(crate) fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let (path, name) = (c(path), CString::new(name).unwrap());
    // SAFETY: C strings, and a value with its own length.
    let rc = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    assert_eq!(rc, 0, "lsetxattr: {}", std::io::Error::last_os_error());
}

pub(crate) fn remove_xattr(path: &Path, name: &str) {
    let (path, name) = (c(path), CString::new(name).unwrap());
    // SAFETY: C strings. That the attribute may not be there is fine.
    unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) };
}

pub(crate) fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let (path, name) = (c(path), CString::new(name).unwrap());
    let mut value = vec![0_u8; 1024];
    // SAFETY: C strings, and a buffer with its own length.
    let len =
        unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(len).ok()?);
    Some(value)
}

/// A shared mapping of a file.
pub(crate) fn map(path: &Path) -> memmap2::MmapMut {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    // SAFETY: nothing but this test changes the file.
    unsafe { memmap2::MmapMut::map_mut(&file).unwrap() }
}

/// A shared mapping of a file's first byte.
pub(crate) fn map_start(file: &File) -> memmap2::MmapMut {
    // SAFETY: one thread changes the file; it is not stored to while the file is empty.
    unsafe { memmap2::MmapOptions::new().len(1).map_mut(file).unwrap() }
}

/// Copies from the start of a file into another one; that the kernel refuses is fine.
pub(crate) fn copy_range(from: &File, to: &File, mut to_offset: i64, len: usize) {
    let (mut from_offset, from, to) = (0_i64, from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: both offsets are valid for the call.
    unsafe { libc::copy_file_range(from, &raw mut from_offset, to, &raw mut to_offset, len, 0) };
}

/// `struct iocb` of linux/aio_abi.h, little-endian.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buf: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

const IOCB_CMD_PWRITE: u16 = 1;

/// Writes by `io_submit`.
pub(crate) fn submit_write(file: &File, bytes: &[u8], offset: i64) {
    let mut context = 0_u64;
    let write = Iocb {
        opcode: IOCB_CMD_PWRITE,
        fd: file.as_raw_fd() as u32,
        buf: bytes.as_ptr() as u64,
        len: bytes.len() as u64,
        offset,
        ..Iocb::default()
    };
    let list = [&raw const write];
    let mut event = [0_u64; 4];
    // SAFETY: the context and the event have the sizes that the calls expect; what is to be written outlives the write,
    // for which the third call waits.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_io_setup, 1, &raw mut context), 0);
        assert_eq!(libc::syscall(libc::SYS_io_submit, context, 1, list.as_ptr()), 1);
        let none = std::ptr::null_mut::<libc::timespec>();
        assert_eq!(libc::syscall(libc::SYS_io_getevents, context, 1, 1, event.as_mut_ptr(), none), 1);
        libc::syscall(libc::SYS_io_destroy, context);
    }
    assert_eq!(event[2], bytes.len() as u64, "written");
}
