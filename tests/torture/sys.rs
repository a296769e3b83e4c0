//! The kernel's calls that the program tortures its memory with. Each is raw: its answer is the caller's to judge.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr::null_mut,
};

pub(crate) const PAGE: usize = 4096;
/// Since Linux 6.13; of private file mappings since 6.15.
pub(crate) const MADV_GUARD_INSTALL: i32 = 102;
pub(crate) const MADV_GUARD_REMOVE: i32 = 103;

fn check(result: i64) -> io::Result<usize> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as usize) }
}

/// mmap(2); with an address, in the place of whatever is there.
pub(crate) fn map(
    at: Option<usize>,
    bytes: usize,
    access: i32,
    flags: i32,
    file: Option<(&File, usize)>,
) -> io::Result<usize> {
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    let (fd, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
    let at = at.unwrap_or(0) as *mut libc::c_void;
    // SAFETY: what is replaced is within the arena of the caller, who keeps no reference into it.
    check(unsafe { libc::mmap(at, bytes, access, flags | fixed, fd, offset as i64) } as i64)
}

pub(crate) fn unmap(at: usize, bytes: usize) -> io::Result<usize> {
    // SAFETY: memory of the caller's own, which keeps no reference into it.
    check(unsafe { libc::munmap(at as *mut libc::c_void, bytes) }.into())
}

pub(crate) fn protect(at: usize, bytes: usize, access: i32) -> io::Result<usize> {
    // SAFETY: as above; the caller knows what it may touch.
    check(unsafe { libc::mprotect(at as *mut libc::c_void, bytes, access) }.into())
}

pub(crate) fn advise(at: usize, bytes: usize, advice: i32) -> io::Result<usize> {
    // SAFETY: as above.
    check(unsafe { libc::madvise(at as *mut libc::c_void, bytes, advice) }.into())
}

/// mremap(2) to a given place.
pub(crate) fn remap(at: usize, bytes: usize, to: usize, to_bytes: usize, flags: i32) -> io::Result<usize> {
    let flags = flags | libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: both places are within the arena of the caller, who keeps no reference into them.
    check(unsafe { libc::mremap(at as *mut libc::c_void, bytes, to_bytes, flags, to) } as i64)
}

/// Moves the break; the one before.
pub(crate) fn move_break(bytes: isize) -> io::Result<usize> {
    // SAFETY: the caller is the process' only thread and gives back only what it got.
    let before = unsafe { libc::sbrk(bytes) } as i64;
    check(before)
}

pub(crate) fn load(at: usize) -> u64 {
    // SAFETY: the callers' models say that the page is mapped and readable; if that is wrong, the test has failed.
    unsafe { (at as *const u64).read_volatile() }
}

pub(crate) fn store(at: usize, value: u64) {
    // SAFETY: as above, and writable.
    unsafe { (at as *mut u64).write_volatile(value) }
}

/// The pages of a mapping as the kernel's calls take them.
fn bytes_at<'a>(at: usize, len: usize) -> &'a mut [u8] {
    // SAFETY: only the kernel writes through it, in a call that the slice does not outlive; the pages are mapped.
    unsafe { std::slice::from_raw_parts_mut(at as *mut u8, len) }
}

/// pread(2) into memory, by way of the page cache or, if the file is so opened, by the device.
pub(crate) fn read_at(file: &File, offset: usize, at: usize, len: usize) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, bytes_at(at, len), offset as u64)
}

/// process_vm_writev(2) into this process' own memory: the kernel pins the page and copies.
pub(crate) fn write_remotely(from: &[u8], at: usize) -> io::Result<usize> {
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: from.len() };
    // SAFETY: `local` is only read; `remote` is the caller's page.
    check(unsafe {
        libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) as i64
    })
}

/// A page of a file through a pipe to memory: splice(2), then vmsplice(2).
pub(crate) fn splice(file: &File, offset: usize, pipe: &(OwnedFd, OwnedFd), at: usize) -> io::Result<()> {
    let mut offset = offset as i64;
    let (read, write) = (pipe.0.as_raw_fd(), pipe.1.as_raw_fd());
    // SAFETY: the offset lives.
    let moved = unsafe { libc::splice(file.as_raw_fd(), &raw mut offset, write, null_mut(), PAGE, 0) };
    let mut left = check(moved as i64)?;
    let mut at = at;
    while left > 0 {
        let part = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: left };
        // SAFETY: the caller's page.
        let got = check(unsafe { libc::vmsplice(read, &raw const part, 1, 0) } as i64)?;
        at += got;
        left -= got;
    }
    Ok(())
}

pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(io::Error::from)
}

pub(crate) fn memory_file(bytes: usize) -> io::Result<File> {
    // SAFETY: a literal name.
    let fd = check(unsafe { libc::memfd_create(c"torture".as_ptr(), libc::MFD_CLOEXEC) }.into())?;
    // SAFETY: the kernel has just given it to us.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    file.set_len(bytes as u64)?;
    Ok(file)
}

/// A System V segment, for as long as its namespace.
pub(crate) fn segment(bytes: usize) -> io::Result<i32> {
    // SAFETY: integers only.
    Ok(check(unsafe { libc::shmget(libc::IPC_PRIVATE, bytes, libc::IPC_CREAT | 0o600) }.into())? as i32)
}

/// Maps it where the kernel likes.
pub(crate) fn attach(segment: i32) -> io::Result<usize> {
    // SAFETY: a new mapping.
    check(unsafe { libc::shmat(segment, std::ptr::null(), 0) } as i64)
}

pub(crate) fn detach(at: usize) -> io::Result<()> {
    // SAFETY: the callers' models say that it is what `attach` has mapped.
    check(unsafe { libc::shmdt(at as *const libc::c_void) }.into()).map(drop)
}

/// The child's pid; none in the child, which must end with [`exit`].
pub(crate) fn fork() -> io::Result<Option<i32>> {
    // SAFETY: the C library's allocator is usable in the child, which goes on alone.
    let pid = check(unsafe { libc::fork() }.into())? as i32;
    Ok((pid > 0).then_some(pid))
}

/// A process that shares our memory, runs `of` and ends.
pub(crate) fn clone_with_memory(
    of: extern "C" fn(*mut libc::c_void) -> i32,
    argument: usize,
) -> io::Result<i32> {
    const STACK_BYTES: usize = 64 * PAGE;
    thread_local! {
        static STACK: usize = map(
            None,
            STACK_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            None,
        )
        .expect("memory for a stack");
    }
    let top = STACK.with(|stack| stack + STACK_BYTES);
    // SAFETY: the stack is used by one child at a time, which its parent waits for. The child shares the parent's thread
    // area: `of` does nothing but store to memory and make system calls of its own.
    check(
        unsafe {
            let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::SIGCHLD;
            libc::clone(of, top as *mut libc::c_void, flags, argument as *mut libc::c_void)
        }
        .into(),
    )
    .map(|pid| pid as i32)
}

/// A sleep that leaves errno alone, for a child that shares it with its parent.
pub(crate) fn raw_sleep_us(us: u64) {
    let time = libc::timespec { tv_sec: 0, tv_nsec: (us * 1000) as i64 };
    // SAFETY: the kernel reads the time and writes nothing.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") libc::SYS_nanosleep => _,
            in("rdi") &raw const time,
            in("rsi") 0,
            out("rcx") _,
            out("r11") _,
        );
    }
}

pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: no handlers are run.
    unsafe { libc::_exit(code) }
}

/// How a child has ended, if it has; or waits for that.
pub(crate) fn ended(pid: i32, wait: bool) -> Option<i32> {
    let mut status = 0;
    // SAFETY: the status lives.
    let done = unsafe { libc::waitpid(pid, &raw mut status, if wait { 0 } else { libc::WNOHANG }) };
    (done == pid).then_some(status)
}

/// One line of output, in one piece and without any lock that a fork could leave held.
pub(crate) fn say(line: &str) {
    let line = format!("{line}\n");
    // SAFETY: the bytes live; a failure shows in the missing line.
    unsafe { libc::write(1, line.as_ptr().cast(), line.len()) };
}
