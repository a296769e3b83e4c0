//! What a test has done at the stages of a freeze; and epochs that are not wanted at once, or not at all.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use standin::capture::{CaptureError, OnStages, Stage, Tracking};

use crate::host::Primary;

/// Has this done right before each freeze.
pub(crate) fn before_freeze(mut work: impl FnMut() + Send + 'static) -> Box<OnStages> {
    Box::new(move |stage| {
        if stage == Stage::Freezing {
            work();
        }
        Ok(false)
    })
}

/// Whether it is wanted when all that was sent ahead is new, or when much of it has changed since; and whether the next CRIU is
/// forked in the freeze or behind it.
#[test]
fn an_epoch_that_waits_until_it_is_wanted_is_right() {
    let mut primary = Primary::start("churn", Tracking::WriteProtect);
    primary.true_epoch(false);
    for (wait_ms, output_held) in [(0, true), (1, true), (20, false), (100, true), (300, true), (0, true)] {
        let (mut wait, told) = (Some(Duration::from_millis(wait_ms)), Arc::new(AtomicU32::new(0)));
        let count = Arc::clone(&told);
        primary.capturer.on_stages(Box::new(move |stage| {
            if stage == Stage::Ready {
                count.fetch_add(1, Ordering::Relaxed);
                wait.take().into_iter().for_each(thread::sleep);
            }
            Ok(output_held)
        }));
        primary.true_epoch(false);
        let told = told.load(Ordering::Relaxed);
        assert!(told > u32::from(wait_ms >= 20), "after {wait_ms} ms it was looked again ({told})");
    }
}

#[test]
fn after_an_epoch_that_was_not_wanted_the_next_is_right() {
    let mut primary = Primary::start("churn", Tracking::WriteProtect);
    primary.true_epoch(false);
    for wait_ms in [0, 50, 200] {
        primary.capturer.on_stages(Box::new(move |stage| {
            if stage == Stage::Ready {
                thread::sleep(Duration::from_millis(wait_ms));
                return Err(io::Error::other("it is not wanted"));
            }
            Ok(true)
        }));
        let error = primary.failing(&mut |_, _| Ok(()));
        assert!(matches!(error, CaptureError::Io(_)), "{error}");
        primary.capturer.on_stages(before_freeze(|| ()));
        primary.true_epoch(false);
    }
}
