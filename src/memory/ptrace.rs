//! Thin, safe functions around the ptrace requests that injection needs, and the wait for a stop.
//!
//! ptrace binds a tracee to one *thread*: all of these must be called from the thread that seized it, and
//! when that thread ends the kernel detaches whatever it still traces. Stops are awaited without asking for
//! exits, so that a child of this process is never reaped here.

use std::{io, mem, ptr};

use libc::user_regs_struct;

const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
const PTRACE_EVENT_STOP: i32 = 128;
/// `PTRACE_O_TRACESYSGOOD`: system call stops are told apart from SIGTRAP.
const TRACESYSGOOD: libc::c_long = 1;
/// `PTRACE_O_SUSPEND_SECCOMP`: the tracee's filters do not apply while it is traced.
const SUSPEND_SECCOMP: libc::c_long = 1 << 21;

/// Why a tracee stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// At the entry or the exit of a system call.
    Syscall,
    /// By PTRACE_INTERRUPT, or in a group stop.
    Event,
    /// Before a signal is delivered to it.
    Signal(i32),
}

/// Where the kernel finds a thread's restartable sequence.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct RseqConfig {
    pub(super) abi_pointer: u64,
    pub(super) abi_size: u32,
    pub(super) signature: u32,
    pub(super) flags: u32,
    pad: u32,
}

fn request(code: libc::c_uint, tid: i32, addr: libc::c_long, data: libc::c_long) -> io::Result<i64> {
    // SAFETY: every caller passes either plain integers or, in `data`, the address of a live object of the
    // size that the request writes or reads.
    let done = unsafe { libc::ptrace(code, tid, addr, data) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

fn address<T>(object: &mut T) -> libc::c_long {
    ptr::from_mut(object) as libc::c_long
}

pub(super) fn seize(tid: i32, suspend_seccomp: bool) -> io::Result<()> {
    let options = if suspend_seccomp { TRACESYSGOOD | SUSPEND_SECCOMP } else { TRACESYSGOOD };
    request(libc::PTRACE_SEIZE, tid, 0, options).map(drop)
}

pub(super) fn interrupt(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets it run, delivering a signal first (0: none).
pub(super) fn cont(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal.into()).map(drop)
}

/// Lets it run to the next entry or exit of a system call, delivering a signal first (0: none).
pub(super) fn run_to_syscall(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, signal.into()).map(drop)
}

/// Ends the tracing, delivering a signal (0: none).
pub(super) fn detach(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal.into()).map(drop)
}

pub(super) fn registers(tid: i32) -> io::Result<user_regs_struct> {
    // SAFETY: `user_regs_struct` is made of integers; all zeroes is a value of it.
    let mut registers: user_regs_struct = unsafe { mem::zeroed() };
    request(libc::PTRACE_GETREGS, tid, 0, address(&mut registers))?;
    Ok(registers)
}

pub(super) fn set_registers(tid: i32, registers: &user_regs_struct) -> io::Result<()> {
    let mut registers = *registers;
    request(libc::PTRACE_SETREGS, tid, 0, address(&mut registers)).map(drop)
}

pub(super) fn signal_mask(tid: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    request(PTRACE_GETSIGMASK, tid, size_of::<u64>() as libc::c_long, address(&mut mask))?;
    Ok(mask)
}

pub(super) fn set_signal_mask(tid: i32, mut mask: u64) -> io::Result<()> {
    request(PTRACE_SETSIGMASK, tid, size_of::<u64>() as libc::c_long, address(&mut mask)).map(drop)
}

/// The thread's rseq registration; all zero if it has none. Errors on kernels before 5.13.
pub(super) fn rseq(tid: i32) -> io::Result<RseqConfig> {
    let mut config = RseqConfig::default();
    let size = size_of::<RseqConfig>() as libc::c_long;
    request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, address(&mut config))?;
    Ok(config)
}

/// Whether syscall user dispatch (emulators such as Wine) is on, so that an injected call would be caught.
pub(super) fn dispatches_syscalls(tid: i32) -> bool {
    let mut config = [0u64; 4];
    let size = size_of_val(&config) as libc::c_long;
    // Kernels before 6.4 cannot say; then it is taken to be off, as it nearly always is.
    request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, address(&mut config)).is_ok()
        && config[0] != 0
}

/// The stop that a tracee is in and that was not collected yet, if any.
pub(super) fn poll_stop(tid: i32) -> io::Result<Option<Stop>> {
    // SAFETY: `siginfo_t` is made of integers; all zeroes is a value of it.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    let flags = libc::WSTOPPED | libc::WNOHANG | libc::__WALL | libc::__WNOTHREAD;
    // SAFETY: waitid writes one siginfo_t.
    let done = unsafe { libc::waitid(libc::P_PID, tid as libc::id_t, &raw mut info, flags) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: waitid filled the fields of SIGCHLD, or left all zero if there was nothing to report.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let stop = if status >> 8 == PTRACE_EVENT_STOP {
        Stop::Event
    } else if status == libc::SIGTRAP | 0x80 {
        Stop::Syscall
    } else {
        Stop::Signal(status & 0x7f)
    };
    Ok(Some(stop))
}
