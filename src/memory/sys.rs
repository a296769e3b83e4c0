//! The kernel's calls behind the tracker: userfaultfd, PAGEMAP_SCAN and pidfds.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    panic, ptr, thread,
};

use nix::errno::Errno;

use crate::model::Extent;

/// PAGEMAP_SCAN categories (`PAGE_IS_*` of linux/fs.h).
pub(super) mod category {
    pub(in crate::memory) const WP_ALLOWED: u64 = 1 << 0;
    pub(in crate::memory) const WRITTEN: u64 = 1 << 1;
    /// Of a file, or of shared memory: not the process' own copy.
    pub(in crate::memory) const FILE: u64 = 1 << 2;
    pub(in crate::memory) const PRESENT: u64 = 1 << 3;
    pub(in crate::memory) const SWAPPED: u64 = 1 << 4;
    /// The page of zeroes that all processes share: what reading an empty place maps there.
    pub(in crate::memory) const PFNZERO: u64 = 1 << 5;
    /// Since kernel 6.15: a page of a MADV_GUARD_INSTALL region, which nobody can read.
    pub(in crate::memory) const GUARD: u64 = 1 << 8;
}

const PM_SCAN_WP_MATCHING: u64 = 1;
const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;

const UFFDIO_API: u64 = nix::request_code_readwrite!(0xAA, 0x3F, size_of::<UffdApi>());
const UFFDIO_REGISTER: u64 = nix::request_code_readwrite!(0xAA, 0x00, size_of::<UffdRegister>());
const UFFDIO_WRITEPROTECT: u64 = nix::request_code_readwrite!(0xAA, 0x06, size_of::<UffdWriteProtect>());
const PAGEMAP_SCAN: u64 = nix::request_code_readwrite!(b'f', 16, size_of::<ScanArg>());

#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdWriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// One run in a scan's result vector.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PageRegion {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Those asked for, and not flipped.
    pub(super) categories: u64,
}

/// What a scan looks for: pages whose categories, with `inverted` flipped, hold all of `all` and one of `any`.
#[derive(Clone, Copy, Default)]
pub(super) struct Query {
    pub(super) write_protect: bool,
    pub(super) inverted: u64,
    pub(super) all: u64,
    pub(super) any: u64,
    /// Categories that are told of each region; pages that differ in them are in different regions.
    pub(super) told: u64,
    /// After so many the scan ends; 0: at the end of the range.
    pub(super) pages_max: u64,
}

/// Finishes a userfaultfd's handshake with the features of asynchronous write protection.
pub(super) fn uffd_enable(uffd: BorrowedFd<'_>) -> io::Result<()> {
    let features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED;
    let mut api = UffdApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`, whose layout `UffdApi` has.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut api) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Registers every mapping in a range for write protection; idempotent.
pub(super) fn uffd_register(uffd: BorrowedFd<'_>, range: Extent) -> io::Result<()> {
    let mut register =
        UffdRegister { start: range.start, len: range.bytes(), mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER reads and writes one `uffdio_register`, whose layout `UffdRegister` has;
    // the range is checked by the kernel and concerns the traced process, not this one.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ends the write protection of a range within registered mappings, of markers in the place of pages too.
pub(super) fn uffd_unprotect(uffd: BorrowedFd<'_>, range: Extent) -> io::Result<()> {
    let mut resolve = UffdWriteProtect { start: range.start, len: range.bytes(), mode: 0 };
    // SAFETY: UFFDIO_WRITEPROTECT reads one `uffdio_writeprotect`, whose layout `UffdWriteProtect` has; the range is
    // checked by the kernel and concerns the traced process, not this one.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut resolve) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// One PAGEMAP_SCAN call; gives the number of regions filled. If those are all, go on behind the last of them. (Where the
/// kernel says that the walk ended is not it: with more than 512 regions it is where it last emptied a buffer of its own,
/// if it came to the end after that; seen on Linux 6.18.)
///
/// A vector is always passed: with none, WP_MATCHING plants markers on empty page table entries.
pub(super) fn pagemap_scan(
    pagemap: &File,
    start: u64,
    end: u64,
    query: Query,
    regions: &mut [PageRegion],
) -> io::Result<usize> {
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: if query.write_protect { PM_SCAN_WP_MATCHING } else { 0 },
        start,
        end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        max_pages: query.pages_max,
        category_inverted: query.inverted,
        category_mask: query.all,
        category_anyof_mask: query.any,
        // Beside what is to be told only bits that all matches agree on, so that neighbours merge into one region.
        return_mask: query.all & !query.inverted | query.told,
        ..ScanArg::default()
    };
    // SAFETY: PAGEMAP_SCAN reads and writes one `pm_scan_arg`, whose layout `ScanArg` has, and writes at
    // most `vec_len` regions to `vec`, which is a live, exclusively borrowed slice of that length.
    let filled = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    if filled < 0 { Err(io::Error::last_os_error()) } else { Ok(filled as usize) }
}

/// Opens a pidfd of a process, or of one thread (`PIDFD_THREAD`, kernel 6.9).
pub(super) fn pidfd_open(pid: i32, thread: bool) -> io::Result<OwnedFd> {
    let flags = if thread { libc::O_EXCL } else { 0 };
    // SAFETY: pidfd_open takes two integers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) })
}

/// Takes a duplicate of another process' descriptor.
pub(super) fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three integers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
}

/// Whether a descriptor of another process is one of ours, or a copy of it.
pub(super) fn is_same_file(ours: BorrowedFd<'_>, pid: i32, theirs: i32) -> bool {
    const KCMP_FILE: i32 = 0;
    // SAFETY: kcmp takes five integers.
    let order =
        unsafe { libc::syscall(libc::SYS_kcmp, libc::getpid(), pid, KCMP_FILE, ours.as_raw_fd(), theirs) };
    order == 0
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether the process behind a pidfd has exited (a zombie counts).
pub(super) fn has_exited(pidfd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one live pollfd, no wait.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready != 0
}

/// The stack of a process that shares our memory.
const STACK_BYTES: usize = 256 << 10;

/// Has this done by a process that shares our memory and descriptors, and that goes on when all of our threads are killed. The
/// calling thread waits for it. What it asks of the allocator it may wait for in vain then, if another thread was killed in
/// there; so it had better ask for little.
pub(super) fn outliving<T, F: FnOnce() -> T>(work: F) -> io::Result<T> {
    struct Task<T, F> {
        work: Option<F>,
        result: Option<thread::Result<T>>,
    }
    extern "C" fn run<T, F: FnOnce() -> T>(task: *mut libc::c_void) -> libc::c_int {
        // SAFETY: it is the one below, whose owner stands still until this process has ended.
        let task = unsafe { &mut *task.cast::<Task<T, F>>() };
        let work = task.work.take();
        task.result = work.map(|work| panic::catch_unwind(panic::AssertUnwindSafe(work)));
        0
    }
    let mut task = Task { work: Some(work), result: None };
    let mut stack = vec![0_u128; STACK_BYTES / size_of::<u128>()];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::CLONE_FS;
    // SAFETY: a stack that is aligned and there until this returns, which with CLONE_VFORK is when the child has ended; till then
    // this thread, whose thread-local storage the child shares, does nothing.
    let pid = unsafe {
        let top = stack.as_mut_ptr_range().end;
        libc::clone(run::<T, F>, top.cast(), flags, (&raw mut task).cast())
    };
    let pid = Errno::result(pid)?;
    // SAFETY: the call touches no memory. Without an exit signal only those wait for it who ask for such children.
    while unsafe { libc::waitpid(pid, ptr::null_mut(), libc::__WALL) } < 0 && Errno::last() == Errno::EINTR {}
    match task.result {
        Some(Ok(result)) => Ok(result),
        Some(Err(panicked)) => panic::resume_unwind(panicked),
        None => Err(io::Error::other("the process that was to do it has been killed")),
    }
}
