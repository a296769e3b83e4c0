//! What `std` cannot do to a file.

use std::{ffi::CString, fs::OpenOptions, os::unix::ffi::OsStrExt, path::Path};

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
