//! When the kernel runs a thread.

use std::cell::Cell;

use nix::libc::{self, sched_attr};

thread_local! {
    static BEFORE_OTHERS: Cell<bool> = const { Cell::new(false) };
}

/// Has the kernel run this thread at once when it wakes, before ordinary ones. Children, and threads that it starts, are
/// ordinary. Without CAP_SYS_NICE nothing changes.
///
/// Not `SCHED_DEADLINE`, which would bound what a flood of packets takes from the workload: what the kernel does for others in
/// this thread's time, such as letting go thousands of packets, counts as its own, and it does not run again before that is
/// paid for. That was seconds, and on Linux 6.18 for ever.
pub(super) fn before_others() {
    const NICE: i32 = -20;
    /// The shortest turn that there is: who has shorter ones than others interrupts them (Linux 6.12; ignored before).
    const TURN_NS: u64 = 100_000;
    if !BEFORE_OTHERS.replace(true) {
        schedule(&sched_attr {
            sched_flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
            sched_nice: NICE,
            sched_runtime: TURN_NS,
            ..ORDINARY
        });
    }
}

/// Undoes [`before_others`].
pub(super) fn among_others() {
    if BEFORE_OTHERS.replace(false) {
        schedule(&ORDINARY);
    }
}

const ORDINARY: sched_attr = sched_attr {
    size: size_of::<sched_attr>() as u32,
    sched_policy: libc::SCHED_OTHER as u32,
    sched_flags: 0,
    sched_nice: 0,
    sched_priority: 0,
    sched_runtime: 0,
    sched_deadline: 0,
    sched_period: 0,
};

fn schedule(attr: &sched_attr) {
    // SAFETY: the pointer is to a value of the size that it names; 0 is the calling thread. A refusal leaves the thread as
    // it is, which is all that can be done about it.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const *attr, 0) };
}
