//! What the workload needs of the kernel: memory that is mapped, moved and shared by hand, and forks.

use std::{
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::null_mut,
};

const PAGE: usize = 4096;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A mapping of the workload's own.
pub(crate) struct Mapping {
    start: *mut u8,
    pages: usize,
}

// SAFETY: a plain range of memory; every access is one volatile word, and races are what the test is about.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn private(pages: usize) -> Self {
        Self::map(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    pub(crate) fn shared(pages: usize) -> Self {
        Self::map(pages, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)
    }

    pub(crate) fn of_file(file: BorrowedFd<'_>, pages: usize, shared: bool) -> Self {
        Self::map(pages, if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE }, file.as_raw_fd())
    }

    fn map(pages: usize, flags: i32, fd: i32) -> Self {
        // SAFETY: a new mapping where the kernel likes.
        let start = unsafe { libc::mmap(null_mut(), pages * PAGE, READ_WRITE, flags, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: start.cast(), pages }
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    fn word(&self, page: usize, word: usize) -> *mut u64 {
        assert!(page < self.pages && word < PAGE / 8);
        // SAFETY: within the mapping, as was just checked.
        unsafe { self.start.add(page * PAGE + word * 8).cast() }
    }

    pub(crate) fn write(&self, page: usize, word: usize, value: u64) {
        // SAFETY: `word` gives an aligned place in the mapping, which is writable but while `protect` says otherwise.
        unsafe { self.word(page, word).write_volatile(value) }
    }

    pub(crate) fn read(&self, page: usize, word: usize) -> u64 {
        // SAFETY: as above.
        unsafe { self.word(page, word).read_volatile() }
    }

    /// MADV_DONTNEED.
    pub(crate) fn drop_page(&self, page: usize) {
        let at = self.word(page, 0);
        // SAFETY: a page of the mapping; nothing is referred to in it.
        unsafe { libc::madvise(at.cast(), PAGE, libc::MADV_DONTNEED) };
    }

    pub(crate) fn protect(&self, page: usize, writable: bool) {
        let access = if writable { READ_WRITE } else { libc::PROT_READ };
        let at = self.word(page, 0);
        // SAFETY: a page of the mapping.
        unsafe { libc::mprotect(at.cast(), PAGE, access) };
    }

    /// Grows or shrinks it, perhaps elsewhere.
    pub(crate) fn resize(&mut self, pages: usize) {
        // SAFETY: the mapping is ours, and nothing keeps its address.
        let start =
            unsafe { libc::mremap(self.start.cast(), self.pages * PAGE, pages * PAGE, libc::MREMAP_MAYMOVE) };
        assert_ne!(start, libc::MAP_FAILED);
        *self = Self { start: start.cast(), pages };
    }

    pub(crate) fn unmap(self) {
        // SAFETY: the mapping is ours and not used any more.
        unsafe { libc::munmap(self.start.cast(), self.pages * PAGE) };
    }
}

/// The child's pid; none in the child, which must end with [`exit`].
pub(crate) fn fork() -> Option<i32> {
    // SAFETY: the C library's allocator is usable in the child, which goes on alone.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    (pid > 0).then_some(pid)
}

pub(crate) fn exit() -> ! {
    // SAFETY: no handlers are run.
    unsafe { libc::_exit(0) }
}

/// Reaps a child that has ended.
pub(crate) fn reap() -> bool {
    // SAFETY: no status is asked for.
    unsafe { libc::waitpid(-1, null_mut(), libc::WNOHANG) > 0 }
}

/// A descriptor of a kind that CRIU refuses to dump.
pub(crate) fn userfaultfd() -> OwnedFd {
    // SAFETY: a new descriptor, which nothing else owns.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd as i32)
    }
}

/// Shuts down every connected unix stream socket of this process: those of page servers, the only ones it has.
pub(crate) fn shut_streams() -> usize {
    let mut count = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let option = |name| {
            let (mut value, mut len) = (0_i32, 4);
            // SAFETY: writes an int; a descriptor that is no socket is an error.
            let got = unsafe {
                libc::getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut len)
            };
            (got == 0).then_some(value)
        };
        let stream = option(libc::SO_TYPE) == Some(libc::SOCK_STREAM);
        if stream && option(libc::SO_DOMAIN) == Some(libc::AF_UNIX) {
            // SAFETY: no memory is involved.
            count += usize::from(unsafe { libc::shutdown(fd, libc::SHUT_RDWR) } == 0);
        }
    }
    count
}
