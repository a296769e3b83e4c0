//! System calls of this module that have no safe wrapper elsewhere.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::socket::{ControlMessageOwned, RecvMsg, UnixAddr},
    unistd::{ForkResult, Pid},
};

/// Takes charge of a descriptor that the kernel just gave this process (SCM_RIGHTS, an ioctl).
pub(super) fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: callers pass a descriptor that was received in this moment, open and owned by nobody.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The descriptors that came with a message.
pub(super) fn descriptors(message: &RecvMsg<'_, '_, UnixAddr>) -> nix::Result<Vec<OwnedFd>> {
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            fds.extend(raw.into_iter().map(own));
        }
    }
    Ok(fds)
}

/// Makes `slot` refer to what `fd` does, and survive an exec.
pub(super) fn dup_to(fd: &OwnedFd, slot: RawFd) -> io::Result<()> {
    // SAFETY: dup2 touches no memory. The slots lie above all descriptors in use (see spawn::slot),
    // so none that has an owner is replaced.
    let result = unsafe { libc::dup2(fd.as_raw_fd(), slot) };
    nix::errno::Errno::result(result)?;
    Ok(())
}

/// Forks; `None` in the child. For single-threaded programs (the verb `enter`) alone.
pub(super) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the process has one thread, so the child may do whatever the parent may.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => Ok(None),
        ForkResult::Parent { child } => Ok(Some(child)),
    }
}

/// Forks a process that has this one's table of descriptors, not a copy of it: what one opens the other has. `None` in the
/// child. For single-threaded programs (the verb `enter`) alone.
pub(super) fn fork_with_descriptors() -> io::Result<Option<Pid>> {
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: without a stack of its own and CLONE_VM it is a fork (see above); owners of descriptors in the child are
    // copies of owners here, and whichever closes one first has closed it for both, which is the caller's to keep from.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags as libc::c_ulong, 0, 0, 0, 0) };
    Ok(Some(nix::errno::Errno::result(pid)?).filter(|pid| *pid != 0).map(|pid| Pid::from_raw(pid as i32)))
}

/// Closes all descriptors from `first` up. For a process that uses none of them any more.
pub(super) fn close_from(first: RawFd) {
    // SAFETY: the caller only waits and exits from here on; no owner of such a descriptor runs
    // its destructor (`exit` runs none).
    unsafe { libc::close_range(first as libc::c_uint, libc::c_uint::MAX, 0) };
}

/// Has all descriptors from `first` to before `end` closed by an exec: those of the agent are
/// anyway, and these are what the agent itself was given by whoever started it.
pub(super) fn close_on_exec(first: RawFd, end: RawFd) -> io::Result<()> {
    // SAFETY: the call closes nothing and touches no memory.
    let result = unsafe {
        libc::close_range(
            first as libc::c_uint,
            end as libc::c_uint - 1,
            libc::CLOSE_RANGE_CLOEXEC as libc::c_int,
        )
    };
    nix::errno::Errno::result(result)?;
    Ok(())
}

/// Asks the scheduler to run this thread, and what it executes, before others: for what happens while a workload is
/// frozen. Without CAP_SYS_NICE it stays as it is. CRIU sets the priority of what it restores itself.
pub(crate) fn hurry() {
    const NICE: libc::c_int = -15;
    // SAFETY: the call touches no memory; who 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

/// Keeps this thread, and those that it starts, off a processor that another needs, if there are others, for as long as
/// what is returned lives. Where it runs then it mostly stays.
pub(crate) fn keep_off(processor: usize) -> Elsewhere {
    let this = Pid::from_raw(0);
    let before = sched_getaffinity(this).ok();
    if let Some(mut allowed) = before
        && allowed.unset(processor).is_ok()
    {
        // Refused if no processor is left.
        let _ = sched_setaffinity(this, &allowed);
    }
    Elsewhere { before, not_elsewhere: PhantomData }
}

/// Of the thread that called, and to be dropped by it.
pub(crate) struct Elsewhere {
    before: Option<CpuSet>,
    not_elsewhere: PhantomData<*const ()>,
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = sched_setaffinity(Pid::from_raw(0), before);
        }
    }
}

/// Hurries for as long as what is returned lives.
pub(crate) fn hurry_meanwhile() -> Hurried {
    // SAFETY: the call touches no memory; who 0 is the calling thread.
    let before = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    hurry();
    Hurried { before, not_elsewhere: PhantomData }
}

/// Of the thread that called, and to be dropped by it.
pub(crate) struct Hurried {
    before: libc::c_int,
    not_elsewhere: PhantomData<*const ()>,
}

impl Drop for Hurried {
    fn drop(&mut self) {
        // SAFETY: the call touches no memory; who 0 is the calling thread.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, self.before) };
    }
}

/// Asks the scheduler to run others before this thread: one that wakes then runs at once.
pub(super) fn stand_back(nice: libc::c_int) {
    // SAFETY: the call touches no memory; who 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
}

/// Goes on when a signal asks this process to end.
pub(super) fn ignore(signal: nix::sys::signal::Signal) -> io::Result<()> {
    use nix::sys::signal::{SigHandler, signal as handle};
    // SAFETY: no handler is installed.
    unsafe { handle(signal, SigHandler::SigIgn) }?;
    Ok(())
}

/// Has the kernel kill this process when its parent's thread ends.
pub(super) fn die_with_parent() -> io::Result<()> {
    Ok(nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?)
}

/// Brings the loopback device of this network namespace up.
pub(super) fn loopback_up() -> io::Result<()> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero ifreq is valid, its name is terminated by the zeros that follow, and
    // SIOCSIFFLAGS reads the union as flags.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        nix::errno::Errno::result(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request))?;
    }
    Ok(())
}

/// A descriptor of the process `pid`.
pub(super) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    Ok(own(nix::errno::Errno::result(fd)? as RawFd))
}

/// Whether a child of ours can be attached to.
pub(super) fn can_trace(pid: Pid) -> bool {
    use nix::sys::{ptrace, wait};
    // `__WALL` and so on are not needed: a child with one thread.
    let traced = ptrace::seize(pid, ptrace::Options::empty())
        .and_then(|()| ptrace::interrupt(pid))
        .and_then(|()| wait::waitpid(pid, None));
    traced.and_then(|_| ptrace::detach(pid, None)).is_ok()
}

/// Whether a descriptor can be taken from a child of ours.
pub(super) fn can_take_descriptor(pid: Pid) -> bool {
    let Ok(pidfd) = pidfd_open(pid.as_raw() as u32) else { return false };
    // SAFETY: the call touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), 0, 0) };
    nix::errno::Errno::result(fd).map(|fd| own(fd as RawFd)).is_ok()
}

/// `struct pm_scan_arg` (include/uapi/linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct PagemapScan {
    size: u64,
    /// Flags, start, end, walk_end, vec, vec_len, max_pages, and four masks.
    rest: [u64; 11],
}

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_PRESENT: u64 = 1 << 3;

/// Whether the kernel knows PAGEMAP_SCAN: it is asked about an empty range.
pub(super) fn has_pagemap_scan() -> io::Result<bool> {
    let pagemap = std::fs::File::open("/proc/self/pagemap")?;
    let mut request = PagemapScan { size: size_of::<PagemapScan>() as u64, ..PagemapScan::default() };
    request.rest[10] = PAGE_IS_PRESENT;
    // SAFETY: the request is laid out as struct pm_scan_arg and has no result vector.
    let result = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut request) };
    Ok(result == 0)
}

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// Whether userfaultfd has the features that the tracker wants, with or without USER_MODE_ONLY.
pub(super) fn has_uffd_wp_async(user_mode_only: bool) -> bool {
    let flags = libc::O_CLOEXEC | if user_mode_only { UFFD_USER_MODE_ONLY } else { 0 };
    // SAFETY: the call touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let Ok(fd) = nix::errno::Errno::result(fd).map(|fd| own(fd as RawFd)) else { return false };
    // struct uffdio_api: the version, features, ioctls.
    let mut request: [u64; 3] = [UFFD_API, UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED, 0];
    // SAFETY: the request is laid out as struct uffdio_api. The kernel refuses unknown features.
    unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, request.as_mut_ptr()) == 0 }
}

/// Whether a page that was just written is marked soft-dirty, as all new pages are where the kernel
/// has it.
pub(super) fn has_soft_dirty() -> io::Result<bool> {
    use std::os::unix::fs::FileExt as _;
    const SOFT_DIRTY: u64 = 1 << 55;
    let page = vec![1u8; 2 * 4096];
    let address = page.as_ptr() as u64 + 4096;
    let mut entry = [0; 8];
    std::fs::File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, address / 4096 * 8)?;
    Ok(u64::from_ne_bytes(entry) & SOFT_DIRTY != 0)
}
