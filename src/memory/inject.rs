//! Makes another process call `userfaultfd()` and takes the descriptor out of it.
//!
//! ```text
//!  running ─ SEIZE, INTERRUPT ─► stopped ─ userfaultfd ─► pidfd_getfd ─ close ─► registers back ─ DETACH ─► running
//! ```
//!
//! Invariants:
//! - Registers, among them `orig_rax`, and the signal mask are put back on every path, and the thread is let
//!   go from a stop inside the kernel's signal delivery: there, and only there, the kernel turns the
//!   interrupted system call's `-ERESTART…` into a restart or EINTR, as if nothing had happened. The few calls
//!   that the kernel fails with EINTR for any stop are begun again.
//! - All signals are blocked while the injected calls run: one that arrives stays pending and is delivered
//!   after. (SIGSTOP cannot be blocked; it is let through and the group stop stands after the detach.)
//! - System call stops are used, not single steps: a step raises SIGTRAP, and the kernel resets that signal's
//!   disposition if the process ignores or blocks it.
//! - All of it happens in a process of its own, which has the agent's memory and outlives it: were the tracer killed
//!   with the agent, the thread would go on with the registers of the injected call, and crash. When that process ends,
//!   whatever it still traces is detached by the kernel, so a thread that did not stop in time is not left traced, and
//!   never left stopped.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use libc::user_regs_struct;

use super::{
    maps::{self, MappingKind},
    ptrace::{self, Stop},
    read::read_exactly,
    sys,
    tracker::Tracker,
    tree,
};

/// How long one thread may take to stop; one that sleeps or runs needs microseconds.
const STOP_WAIT: Duration = Duration::from_millis(250);
/// How long an injected call may take before the thread is interrupted again.
const CALL_WAIT: Duration = Duration::from_secs(2);
/// How many threads are tried if the first ones cannot be stopped.
const THREADS_TRIED_MAX: usize = 4;
/// A vDSO is two pages today.
const VDSO_BYTES_MAX: u64 = 64 * 1024;
const UFFD_USER_MODE_ONLY: u64 = 1;
/// Length of the `syscall` instruction.
const SYSCALL_BYTES: u64 = 2;
/// The code segment selector of 64-bit code.
const USER_CS_64: u64 = 0x33;

/// Why a process cannot be tracked. In every case it runs on as before.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It has exited, or there never was one.
    #[error("process {0} has exited")]
    Gone(i32),
    /// The main thread has exited while others run on.
    #[error(
        "process {0} runs on without its main thread, which CRIU cannot dump; restart the program under \
         protection or leave it out"
    )]
    LeaderExited(i32),
    /// A thread of the kernel.
    #[error("process {0} is a kernel thread and has no memory of its own; protect a user process")]
    KernelThread(i32),
    /// 32-bit code.
    #[error("process {0} runs 32-bit code, which is not supported; run a 64-bit build of it")]
    Compat(i32),
    /// A debugger holds it.
    #[error(
        "process {pid} is traced by {tracer} (process {tracer_pid}), and only one tracer is possible; \
         detach that debugger or strace first"
    )]
    Traced {
        /// The process.
        pid: i32,
        /// Who traces it.
        tracer_pid: i32,
        /// Its name.
        tracer: String,
    },
    /// No thread stopped in time.
    #[error(
        "no thread of process {pid} stopped within {} ms (state {state}); it waits in the kernel for a \
         device, a vfork child or a frozen cgroup: try again when it does not",
        STOP_WAIT.as_millis()
    )]
    NotStopping {
        /// The process.
        pid: i32,
        /// State letter of its main thread.
        state: char,
    },
    /// ptrace is not allowed.
    #[error(
        "may not trace process {0}: the agent needs root with CAP_SYS_PTRACE, and the process must not be \
         shut off by a security module (Yama ptrace_scope 3, AppArmor, SELinux)"
    )]
    NotPermitted(i32),
    /// It has a seccomp filter that cannot be suspended.
    #[error(
        "process {0} has a seccomp filter, and suspending it was refused: the agent needs CAP_SYS_ADMIN, no \
         seccomp filter of its own, and a kernel with CONFIG_CHECKPOINT_RESTORE"
    )]
    Seccomp(i32),
    /// It catches system calls.
    #[error(
        "process {0} catches its own system calls (syscall user dispatch, as Wine does), so none can be \
         made in its name; it cannot be tracked"
    )]
    Dispatch(i32),
    /// No system call instruction.
    #[error("process {0} has no usable vDSO, from which the call would be made; boot without vdso=0")]
    NoVdso(i32),
    /// It has no free descriptor.
    #[error("process {0} has no free file descriptor; raise its RLIMIT_NOFILE (prlimit --nofile)")]
    DescriptorLimit(i32),
    /// The call failed.
    #[error("userfaultfd() in process {pid} failed: {source}; is CONFIG_USERFAULTFD set?")]
    Userfaultfd {
        /// The process.
        pid: i32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel is too old.
    #[error(
        "this kernel's userfaultfd has no asynchronous write protection ({0}): kernel 6.7 or newer is needed"
    )]
    KernelTooOld(io::Error),
    /// Its maps are not understood.
    #[error(transparent)]
    Maps(#[from] maps::MapsError),
    /// A signal that cannot be blocked came in between; it was delivered.
    #[error("process {pid} received signal {signal} while it was stopped, which was delivered; try again")]
    Signalled {
        /// The process.
        pid: i32,
        /// Which signal.
        signal: i32,
    },
    /// Something else.
    #[error("{what} of process {pid} failed: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The process.
        pid: i32,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl AttachError {
    pub(super) fn io(pid: i32, what: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ESRCH | libc::ECHILD | libc::ENOENT) => Self::Gone(pid),
            _ => Self::Io { what, pid, source },
        }
    }
}

/// The result of an injection.
pub(super) struct Injected {
    /// The descriptor, a duplicate of the one that was closed in the process.
    pub(super) uffd: OwnedFd,
    /// The number that it had there.
    pub(super) number: i32,
    /// How long the one thread was stopped.
    pub(super) stopped: Duration,
}

/// Makes `pid` open a userfaultfd and takes it.
pub(super) fn userfaultfd_of(pid: i32, pidfd: BorrowedFd<'_>) -> Result<Injected, AttachError> {
    check(pid)?;
    let ((uffd, number), stopped) = in_thread(pid, |tracee| take_userfaultfd(tracee, pidfd))?;
    Ok(Injected { uffd, number, stopped })
}

/// Closes userfaultfds of these trackers that a process has inherited, because it was forked in the moment in which its
/// parent had them open; gives how many. A process with more than one thread may have another file under that number at
/// any time: it is left alone.
pub fn take_back<'a>(
    trackers: impl IntoIterator<Item = &'a Tracker>,
    pid: i32,
) -> Result<usize, AttachError> {
    let (mut is_open, mut closed) = (BTreeMap::new(), 0);
    for tracker in trackers {
        let (uffd, number) = tracker.userfaultfd();
        let is_some = is_open.entry(number).or_insert_with(|| is_userfaultfd(pid, number));
        if !*is_some || !sys::is_same_file(uffd, pid, number) {
            continue;
        }
        let close = |tracee: &Tracee| {
            let alone = thread_ids(pid)?.len() == 1;
            // It ran until now.
            if !alone || !sys::is_same_file(uffd, pid, number) {
                return Ok(false);
            }
            tracee.call(libc::SYS_close, number as u64).map(|result| result == 0)
        };
        let pidfd = sys::pidfd_open(pid, false).map_err(|e| AttachError::io(pid, "opening a pidfd", e))?;
        let done = check(pid).and_then(|()| in_thread(pid, close));
        let (is_closed, _) = done.map_err(|e| or_gone(e, pid, pidfd.as_fd()))?;
        closed += usize::from(is_closed);
    }
    Ok(closed)
}

fn is_userfaultfd(pid: i32, number: i32) -> bool {
    let target = fs::read_link(format!("/proc/{pid}/fd/{number}"));
    target.is_ok_and(|target| target == Path::new("anon_inode:[userfaultfd]"))
}

/// The error, or `Gone` if the process is dying: then it answers with all kinds of errors.
pub(super) fn or_gone(error: AttachError, pid: i32, pidfd: BorrowedFd<'_>) -> AttachError {
    let gone = sys::has_exited(pidfd) || Status::of(pid, pid).map_or(true, |status| !status.has_memory);
    let precise = matches!(error, AttachError::KernelThread(_) | AttachError::LeaderExited(_));
    if gone && !precise { AttachError::Gone(pid) } else { error }
}

/// Finds what would make an attach fail or harm, before the process is touched.
fn check(pid: i32) -> Result<(), AttachError> {
    if tree::is_kernel_thread(pid).map_err(|e| AttachError::io(pid, "reading /proc/PID/stat", e))? {
        return Err(AttachError::KernelThread(pid));
    }
    let status = Status::of(pid, pid)?;
    if status.state == 'Z' || status.state == 'X' {
        return Err(match thread_ids(pid)?.len() {
            0 | 1 => AttachError::Gone(pid),
            _ => AttachError::LeaderExited(pid),
        });
    }
    check_untraced(pid, &status)
}

fn check_untraced(pid: i32, status: &Status) -> Result<(), AttachError> {
    if status.tracer == 0 {
        return Ok(());
    }
    let tracer = fs::read_to_string(format!("/proc/{}/comm", status.tracer)).unwrap_or_default();
    Err(AttachError::Traced { pid, tracer_pid: status.tracer, tracer: tracer.trim_end().to_owned() })
}

/// What `/proc/PID/task/TID/status` tells of a thread.
struct Status {
    state: char,
    tracer: i32,
    seccomp: bool,
    has_memory: bool,
    signal_pending: bool,
}

impl Status {
    fn of(pid: i32, tid: i32) -> Result<Self, AttachError> {
        let text = fs::read(format!("/proc/{pid}/task/{tid}/status"))
            .map_err(|e| AttachError::io(pid, "reading /proc/PID/status", e))?;
        let text = String::from_utf8_lossy(&text);
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map_or("", str::trim)
        };
        Ok(Self {
            state: field("State").chars().next().unwrap_or('X'),
            tracer: field("TracerPid").parse().unwrap_or(0),
            seccomp: !matches!(field("Seccomp"), "" | "0"),
            has_memory: !field("VmSize").is_empty(),
            signal_pending: [field("SigPnd"), field("ShdPnd")].iter().any(|set| set.contains(|c| c != '0')),
        })
    }
}

fn thread_ids(pid: i32) -> Result<Vec<i32>, AttachError> {
    let failed = |e| AttachError::io(pid, "listing the threads", e);
    let mut ids = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task")).map_err(failed)? {
        ids.extend(entry.map_err(failed)?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(ids)
}

/// Address of a `syscall` instruction in the process' vDSO.
fn syscall_gadget(pid: i32) -> Result<u64, AttachError> {
    let text = fs::read(format!("/proc/{pid}/maps"))
        .map_err(|e| AttachError::io(pid, "reading /proc/PID/maps", e))?;
    let mappings = maps::parse(&text)?;
    let vdso = mappings.iter().find(|m| m.kind == MappingKind::Vdso).ok_or(AttachError::NoVdso(pid))?.extent;
    let mut code = vec![0; vdso.bytes().min(VDSO_BYTES_MAX) as usize];
    read_exactly(pid, vdso.start, &mut code).map_err(|e| match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => AttachError::NotPermitted(pid),
        Some(libc::EIO) => AttachError::NoVdso(pid),
        None => AttachError::Gone(pid),
        Some(_) => AttachError::io(pid, "reading the vDSO", e),
    })?;
    // EI_CLASS of the ELF header: 1 is 32-bit.
    if code.get(4) == Some(&1) {
        return Err(AttachError::Compat(pid));
    }
    let at = code.windows(2).position(|pair| pair == [0x0f, 0x05]).ok_or(AttachError::NoVdso(pid))?;
    Ok(vdso.start + at as u64)
}

/// Has something done to a stopped thread, by who outlives us; tries threads, the main one first, until one stops. Gives
/// for how long it stood, too.
fn in_thread<T>(
    pid: i32,
    act: impl Fn(&Tracee) -> Result<T, AttachError>,
) -> Result<(T, Duration), AttachError> {
    let done = sys::outliving(|| in_first_thread(pid, act));
    done.map_err(|e| AttachError::io(pid, "starting the process for the attach", e))?
}

fn in_first_thread<T>(
    pid: i32,
    act: impl Fn(&Tracee) -> Result<T, AttachError>,
) -> Result<(T, Duration), AttachError> {
    let mut candidates = thread_ids(pid)?;
    // Those that wait in the kernel come last; they may still be worth a try.
    candidates.sort_by_cached_key(|tid| {
        let state = Status::of(pid, *tid).map_or('X', |status| status.state);
        (matches!(state, 'D' | 'X' | 'Z'), *tid != pid)
    });
    for tid in candidates.into_iter().take(THREADS_TRIED_MAX) {
        let started = Instant::now();
        let Some(tracee) = Tracee::stop(pid, tid)? else { continue };
        let acted = act(&tracee);
        let released = tracee.release();
        let stopped = started.elapsed();
        let acted = acted?;
        released?;
        return Ok((acted, stopped));
    }
    Err(AttachError::NotStopping { pid, state: Status::of(pid, pid)?.state })
}

fn take_userfaultfd(tracee: &Tracee, pidfd: BorrowedFd<'_>) -> Result<(OwnedFd, i32), AttachError> {
    let pid = tracee.pid;
    let flags = libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64 | UFFD_USER_MODE_ONLY;
    let fd = tracee.call(libc::SYS_userfaultfd, flags)?;
    if fd < 0 {
        let source = io::Error::from_raw_os_error(-fd as i32);
        return Err(match source.raw_os_error() {
            Some(libc::EMFILE) => AttachError::DescriptorLimit(pid),
            _ => AttachError::Userfaultfd { pid, source },
        });
    }
    // A thread may have unshared its descriptors from the process: ask the thread itself.
    let own = if tracee.tid == pid { None } else { sys::pidfd_open(tracee.tid, true).ok() };
    let taken = sys::pidfd_getfd(own.as_ref().map_or(pidfd, AsFd::as_fd), fd as i32)
        .map_err(|e| AttachError::io(pid, "taking the userfaultfd", e));
    let closed = tracee.call(libc::SYS_close, fd as u64)?;
    if closed < 0 {
        let source = io::Error::from_raw_os_error(-closed as i32);
        return Err(AttachError::io(pid, "closing the userfaultfd", source));
    }
    taken.map(|uffd| (uffd, fd as i32))
}

/// A stopped thread whose registers and signal mask are kept.
struct Tracee {
    pid: i32,
    tid: i32,
    gadget: u64,
    registers: user_regs_struct,
    signal_mask: u64,
}

impl Tracee {
    /// Seizes and stops a thread; `None` if it does not stop in time.
    fn stop(pid: i32, tid: i32) -> Result<Option<Self>, AttachError> {
        seize(pid, tid)?;
        let failed = |e| AttachError::io(pid, "stopping a thread", e);
        ptrace::interrupt(tid).map_err(failed)?;
        let deadline = Instant::now() + STOP_WAIT;
        loop {
            match wait_stop(pid, tid, Some(deadline))? {
                None => return Ok(None),
                Some(Stop::Event) => break,
                // It was about to be delivered when we came: let it, the interrupt is still pending.
                Some(Stop::Signal(signal)) => ptrace::cont(tid, signal).map_err(failed)?,
                Some(Stop::Syscall) => ptrace::cont(tid, 0).map_err(failed)?,
            }
        }
        let kept = Self::keep(pid, tid);
        if kept.is_err() {
            // Nothing was changed yet; if it died meanwhile there is nothing to let go.
            let _ = ptrace::detach(tid, 0);
        }
        kept.map(Some)
    }

    fn keep(pid: i32, tid: i32) -> Result<Self, AttachError> {
        // Of a thread that is stopped: one that runs may execute another program, which has its vDSO elsewhere.
        let gadget = syscall_gadget(pid)?;
        let failed = |e| AttachError::io(pid, "reading the registers", e);
        let mut registers = ptrace::registers(tid).map_err(failed)?;
        if registers.cs != USER_CS_64 {
            return Err(AttachError::Compat(pid));
        }
        if ptrace::dispatches_syscalls(tid) {
            return Err(AttachError::Dispatch(pid));
        }
        if let Some(abort) = rseq_abort(pid, tid, registers.rip) {
            registers.rip = abort;
        }
        let signal_mask = ptrace::signal_mask(tid).map_err(failed)?;
        ptrace::set_signal_mask(tid, u64::MAX).map_err(failed)?;
        Ok(Self { pid, tid, gadget, registers, signal_mask })
    }

    /// Makes the thread call `number(argument, 0, 0, …)`; the kernel's answer, negative for an error.
    fn call(&self, number: libc::c_long, argument: u64) -> Result<i64, AttachError> {
        let failed = |e| AttachError::io(self.pid, "running a system call in a thread", e);
        let mut registers = self.registers;
        registers.rip = self.gadget;
        registers.rax = number as u64;
        // Not inside a system call: nothing to restart on the way out.
        registers.orig_rax = u64::MAX;
        registers.rdi = argument;
        for zero in
            [&mut registers.rsi, &mut registers.rdx, &mut registers.r10, &mut registers.r8, &mut registers.r9]
        {
            *zero = 0;
        }
        ptrace::set_registers(self.tid, &registers).map_err(failed)?;
        let (mut entered, mut interrupted, mut signal) = (false, false, 0);
        loop {
            ptrace::run_to_syscall(self.tid, signal).map_err(failed)?;
            signal = 0;
            // The registers are ours now: the thread may not be left before it stops again. Something that
            // holds it (a cgroup v2 freezer) lets it stop for an interrupt.
            let deadline = Some(Instant::now() + CALL_WAIT).filter(|_| !interrupted);
            let mut stop = wait_stop(self.pid, self.tid, deadline)?;
            if stop.is_none() {
                interrupted = true;
                ptrace::interrupt(self.tid).map_err(failed)?;
                stop = wait_stop(self.pid, self.tid, None)?;
            }
            match stop.expect("an unbounded wait ends with a stop") {
                Stop::Syscall if entered => {
                    return ptrace::registers(self.tid).map(|r| r.rax as i64).map_err(failed);
                }
                Stop::Syscall => entered = true,
                Stop::Event if interrupted && !entered => {
                    let state = Status::of(self.pid, self.tid)?.state;
                    return Err(AttachError::NotStopping { pid: self.pid, state });
                }
                Stop::Event => {}
                Stop::Signal(libc::SIGSTOP) => signal = libc::SIGSTOP,
                Stop::Signal(other) => {
                    // Forced by the kernel in spite of the mask: it must meet the thread's own registers.
                    self.put_back().map_err(failed)?;
                    ptrace::detach(self.tid, other).map_err(failed)?;
                    return Err(AttachError::Signalled { pid: self.pid, signal: other });
                }
            }
        }
    }

    fn put_back(&self) -> io::Result<()> {
        ptrace::set_registers(self.tid, &self.registers)?;
        ptrace::set_signal_mask(self.tid, self.signal_mask)
    }

    /// Puts everything back and lets the thread go.
    fn release(mut self) -> Result<(), AttachError> {
        let pid = self.pid;
        let failed = |e| AttachError::io(pid, "letting a thread go", e);
        if fails_for_a_stop(&self.registers) && Status::of(pid, self.tid).is_ok_and(|s| !s.signal_pending) {
            self.registers.rip -= SYSCALL_BYTES;
            self.registers.rax = self.registers.orig_rax;
            self.registers.orig_rax = u64::MAX;
        }
        match ptrace::set_registers(self.tid, &self.registers) {
            // Already let go, with a signal.
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            done => done.map_err(failed)?,
        }
        // From the exit of a system call to a stop within signal delivery; the signals are still blocked.
        ptrace::interrupt(self.tid).map_err(failed)?;
        let mut signal = 0;
        loop {
            ptrace::cont(self.tid, signal).map_err(failed)?;
            match wait_stop(self.pid, self.tid, None)? {
                Some(Stop::Signal(libc::SIGSTOP)) => signal = libc::SIGSTOP,
                Some(Stop::Signal(other)) => {
                    signal = other;
                    break;
                }
                Some(Stop::Event) | None => {
                    signal = 0;
                    break;
                }
                Some(Stop::Syscall) => signal = 0,
            }
        }
        ptrace::set_signal_mask(self.tid, self.signal_mask).map_err(failed)?;
        ptrace::detach(self.tid, signal).map_err(failed)
    }
}

fn seize(pid: i32, tid: i32) -> Result<(), AttachError> {
    let status = Status::of(pid, tid)?;
    if ptrace::seize(tid, true).is_ok() {
        return Ok(());
    }
    if status.seccomp {
        check_untraced(pid, &status)?;
        return Err(AttachError::Seccomp(pid));
    }
    ptrace::seize(tid, false).map_err(|e| match e.raw_os_error() {
        // Also what the kernel answers if somebody began to trace it since the check.
        Some(libc::EPERM) => match check_untraced(pid, &status) {
            Err(traced) => traced,
            Ok(()) => AttachError::NotPermitted(pid),
        },
        _ => AttachError::io(pid, "tracing a thread", e),
    })
}

/// Whether it is leaving a call that the kernel ends with EINTR for any stop, with or without a signal
/// (signal(7), "Interruption of system calls by stop signals"), instead of restarting it.
///
/// Made again from its beginning it is as if the thread had come to it a little later; an EINTR out of
/// nothing some programs cannot bear. With a signal pending, EINTR is what they wait for.
fn fails_for_a_stop(registers: &user_regs_struct) -> bool {
    const CALLS: [libc::c_long; 7] = [
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_semop,
        libc::SYS_semtimedop,
        libc::SYS_rt_sigtimedwait,
        libc::SYS_io_getevents,
    ];
    registers.rax as i64 == -i64::from(libc::EINTR) && CALLS.contains(&(registers.orig_rax as i64))
}

/// If the thread is inside a restartable sequence: where it must continue.
///
/// The kernel aborts a sequence that was preempted when it returns to user mode, but if it finds the thread
/// elsewhere (in our call) it forgets the sequence, and the thread would later run on in the middle of it.
fn rseq_abort(pid: i32, tid: i32, rip: u64) -> Option<u64> {
    /// Offset of the pointer to the active sequence in `struct rseq`.
    const RSEQ_CS: u64 = 8;
    let read = |at: u64, into: &mut [u8]| read_exactly(pid, at, into).is_ok();
    let config = ptrace::rseq(tid).ok().filter(|config| config.abi_pointer != 0)?;
    let mut pointer = [0; 8];
    if !read(config.abi_pointer + RSEQ_CS, &mut pointer) || pointer == [0; 8] {
        return None;
    }
    // struct rseq_cs: version, flags (u32 each), start_ip, post_commit_offset, abort_ip (u64 each).
    let mut sequence = [0; 32];
    if !read(u64::from_ne_bytes(pointer), &mut sequence) {
        return None;
    }
    let word = |i: usize| u64::from_ne_bytes(*sequence[i * 8..].first_chunk().expect("32 bytes are 4 words"));
    (rip.wrapping_sub(word(1)) < word(2)).then_some(word(3))
}

/// Waits for a stop. Polls, because a blocking wait has no time limit; the first stop takes microseconds.
fn wait_stop(pid: i32, tid: i32, deadline: Option<Instant>) -> Result<Option<Stop>, AttachError> {
    const SPIN: Duration = Duration::from_micros(300);
    let started = Instant::now();
    loop {
        let stop = ptrace::poll_stop(tid).map_err(|e| AttachError::io(pid, "waiting for a thread", e))?;
        if stop.is_some() {
            return Ok(stop);
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(None);
        }
        if started.elapsed() < SPIN {
            thread::yield_now();
            continue;
        }
        // A tracee that dies gives no stop, ever.
        if matches!(Status::of(pid, tid)?.state, 'Z' | 'X') {
            return Err(AttachError::Gone(pid));
        }
        thread::sleep(Duration::from_micros(200));
    }
}
