//! For tests: ends a store's life at the k-th change of the disk, as if the process had been killed there.

use std::{cell::Cell, io};

thread_local! {
    static STEPS_LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
}

/// From now on this thread may change the disk `steps` times; each later attempt fails.
pub(super) fn die_after(steps: u64) {
    STEPS_LEFT.set(steps);
}

/// Lifts the limit; returns whether it had been reached.
pub(super) fn revive() -> bool {
    STEPS_LEFT.replace(u64::MAX) == 0
}

pub(super) fn step() -> io::Result<()> {
    match STEPS_LEFT.get() {
        u64::MAX => Ok(()),
        0 => Err(io::Error::other("the test ended the store's life here")),
        left => {
            STEPS_LEFT.set(left - 1);
            Ok(())
        }
    }
}
