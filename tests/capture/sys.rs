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

    /// A System V segment that nobody else can attach any more.
    pub(crate) fn system_v(pages: usize) -> Self {
        // SAFETY: integers only; the attach makes a new mapping where the kernel likes.
        let start = unsafe {
            let id = libc::shmget(libc::IPC_PRIVATE, pages * PAGE, libc::IPC_CREAT | 0o600);
            let start = libc::shmat(id, std::ptr::null(), 0);
            assert!(id >= 0 && start as isize != -1, "{}", std::io::Error::last_os_error());
            libc::shmctl(id, libc::IPC_RMID, null_mut());
            start
        };
        Self { start: start.cast(), pages }
    }

    /// Private memory at an address of the caller's, in the place of what it may have there.
    pub(crate) fn private_at(at: usize, pages: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: nobody but the caller has anything at that address.
        let start = unsafe { libc::mmap(at as *mut libc::c_void, pages * PAGE, READ_WRITE, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: start.cast(), pages }
    }

    pub(crate) fn start(&self) -> usize {
        self.start as usize
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Makes pages a guard region (Linux 6.13; 6.15 for shared memory); false if the kernel has none.
    pub(crate) fn guard(&self, page: usize, pages: usize) -> bool {
        const MADV_GUARD_INSTALL: i32 = 102;
        self.advise(page, pages, MADV_GUARD_INSTALL)
    }

    /// Makes them places for pages again.
    pub(crate) fn unguard(&self, page: usize, pages: usize) -> bool {
        const MADV_GUARD_REMOVE: i32 = 103;
        self.advise(page, pages, MADV_GUARD_REMOVE)
    }

    fn advise(&self, page: usize, pages: usize, advice: i32) -> bool {
        assert!(page + pages <= self.pages);
        // SAFETY: a range of this mapping, to which nobody holds a reference.
        unsafe { libc::madvise(self.start.add(page * PAGE).cast(), pages * PAGE, advice) == 0 }
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

    /// All of it, read from a file by one system call.
    pub(crate) fn read_from(&self, file: &std::fs::File, offset: usize) {
        // SAFETY: the whole mapping, which only the kernel writes and nobody reads meanwhile.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.start, self.pages * PAGE) };
        std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset as u64).expect("the file is as long");
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

    pub(crate) fn protect_all(&self, access: i32) {
        // SAFETY: all of the mapping.
        let done = unsafe { libc::mprotect(self.start.cast(), self.pages * PAGE, access) };
        assert_eq!(done, 0);
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

/// The same with a pid of the caller's choice.
pub(crate) fn fork_as(pid: i32) -> Option<i32> {
    // SAFETY: clone3 reads its arguments, which live, and one pid; without a stack it is a fork. The C library does not
    // know of the child, which goes on alone and calls nothing that asks for its thread id.
    unsafe {
        let mut arguments: libc::clone_args = std::mem::zeroed();
        arguments.exit_signal = libc::SIGCHLD as u64;
        arguments.set_tid = (&raw const pid) as u64;
        arguments.set_tid_size = 1;
        let child =
            libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) as i32;
        assert!(child >= 0, "clone3: {}", std::io::Error::last_os_error());
        (child > 0).then_some(child)
    }
}

pub(crate) fn kill_and_reap(pid: i32) {
    // SAFETY: integers only.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, null_mut(), 0);
    }
}

/// A System V semaphore, for good: it goes with its namespace.
pub(crate) fn make_semaphore() {
    // SAFETY: integers only.
    let id = unsafe { libc::semget(libc::IPC_PRIVATE, 1, libc::IPC_CREAT | 0o600) };
    assert!(id >= 0, "{}", std::io::Error::last_os_error());
}

/// Makes a process that shares this one's memory and sleeps.
pub(crate) fn share_memory() {
    extern "C" fn sleep(_: *mut libc::c_void) -> i32 {
        loop {
            // SAFETY: a system call without arguments of consequence.
            unsafe { libc::pause() };
        }
    }
    let stack = Mapping::private(16);
    // SAFETY: the stack is the child's for good; `sleep` does nothing but wait.
    let child = unsafe {
        let top = stack.start.add(stack.pages * PAGE).cast();
        libc::clone(sleep, top, libc::CLONE_VM | libc::SIGCHLD, null_mut())
    };
    assert!(child > 0);
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

/// Another one.
pub(crate) fn io_uring() -> OwnedFd {
    // The size of `struct io_uring_params`, all of which may be zero.
    let mut parameters = [0_u8; 120];
    // SAFETY: the kernel writes the parameters; a new descriptor, which nothing else owns.
    unsafe {
        let fd = libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr());
        assert!(fd >= 0, "io_uring_setup: {}", std::io::Error::last_os_error());
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

/// A bound netlink socket.
pub(crate) fn netlink() -> OwnedFd {
    // SAFETY: socket takes three integers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE) };
    assert!(fd >= 0);
    // SAFETY: the kernel has just made it, for nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zeroes is a value of this plain structure.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as u16;
    let size = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: the kernel reads `size` bytes of a live address.
    assert_eq!(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size) }, 0);
    fd
}
