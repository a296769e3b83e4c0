//! The system calls that neither std nor nix wraps safely, each behind a safe function.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::atomic::AtomicU64,
};

use memmap2::MmapRaw;
use nix::unistd::{ForkResult, Pid};

/// Takes ownership of a descriptor that the kernel has just installed (`accept4`, `SCM_RIGHTS`).
pub(super) fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: every caller passes a number that the kernel has just returned to it and that nothing else closes.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Forks; the child gets `None`.
///
/// Only called by processes of one thread (the init and its launcher), so that the child may allocate.
pub(super) fn fork() -> nix::Result<Option<Pid>> {
    // SAFETY: the calling process has one thread, hence no lock is held by another one across the fork.
    Ok(match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Some(child),
        ForkResult::Child => None,
    })
}

/// A word of a mapping that other processes change too.
///
/// # Panics
/// If the mapping has no such word.
pub(super) fn shared_word(map: &MmapRaw, index: usize) -> &AtomicU64 {
    assert!((index + 1) * size_of::<u64>() <= map.len());
    #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
    let words = map.as_mut_ptr().cast::<u64>();
    // SAFETY: the word is aligned, lies in the mapping (asserted), lives as long as the borrow of the map,
    // and is only ever accessed as an atomic.
    unsafe { AtomicU64::from_ptr(words.add(index)) }
}

/// Keeps all memory of this process, present and future, in RAM.
pub(super) fn lock_memory() -> io::Result<()> {
    // SAFETY: takes no pointer.
    check(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) })
}

/// Puts this process before ordinary ones; its children are ordinary again.
pub(super) fn prefer_realtime() -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: the pointer is to a local of the right type.
    check(unsafe {
        libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &raw const param)
    })
}

/// Sets every signal to its default action, as a program expects that a shell starts.
pub(super) fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL installs no handler of ours; signals that cannot be changed just answer an error.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Closes every descriptor from `first` on, except `keep`.
pub(super) fn close_from(first: RawFd, keep: BorrowedFd<'_>) -> io::Result<()> {
    let (first, keep) = (first.unsigned_abs(), keep.as_raw_fd().unsigned_abs());
    // SAFETY: only called in a fresh child that is about to exec or to start a loop of its own, which uses
    // no other descriptor; nothing that owns one is dropped afterwards.
    unsafe {
        if keep > first {
            check(libc::close_range(first, keep - 1, 0))?;
        }
        check(libc::close_range(first.max(keep + 1), u32::MAX, 0))
    }
}

/// Calls `exec` and returns only with the error.
pub(super) fn exec(file: &CString, argv: &[CString], env: &[CString]) -> nix::errno::Errno {
    let Err(error) = nix::unistd::execve(file, argv, env);
    error
}

/// A descriptor for the process; readable when it has ended.
pub(super) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointer; a non-negative answer is a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    check(fd as libc::c_int)?;
    Ok(own(fd as RawFd))
}

/// A copy of a descriptor of the process behind a pidfd.
pub(super) fn pidfd_getfd(pidfd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointer; a non-negative answer is a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    check(fd as libc::c_int)?;
    Ok(own(fd as RawFd))
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
