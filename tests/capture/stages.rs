//! What a test has done at the stages of a freeze.

use standin::capture::{OnStages, Stage};

/// Has this done right before each freeze.
pub(crate) fn before_freeze(mut work: impl FnMut() + Send + 'static) -> Box<OnStages> {
    Box::new(move |stage| {
        if stage == Stage::Freezing {
            work();
        }
        Ok(false)
    })
}
