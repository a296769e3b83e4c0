//! When the kernel runs a thread.

use std::cell::Cell;

use nix::libc::{self, sched_attr};

thread_local! {
    static BEFORE_OTHERS: Cell<bool> = const { Cell::new(false) };
}

/// Has the kernel run this thread at once when it wakes, before ordinary ones, for up to a quarter of a CPU. Children, and
/// threads that it starts, are ordinary. Without CAP_SYS_NICE nothing changes.
pub(super) fn before_others() {
    /// In each period the thread may run for so long; a flood of packets takes no more from the workload.
    const RUNTIME_NS: u64 = 5_000_000;
    const PERIOD_NS: u64 = 20_000_000;
    if !BEFORE_OTHERS.replace(true) {
        schedule(&sched_attr {
            sched_policy: libc::SCHED_DEADLINE as u32,
            sched_flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
            sched_runtime: RUNTIME_NS,
            sched_deadline: PERIOD_NS,
            sched_period: PERIOD_NS,
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
