//! The order of a takeover on the host that takes over, in which its steps are done, and no other; each rule was learnt by
//! breaking it.
//!
//! ```text
//!  Unknown ──prepare──► Silent ──restore──► Restored ──open──► Open ──answer──► Answering ──announce──► Announced ──► replay
//!                                               ▲                │                  │                      │
//!                                               └────────────── silence ────────────┴──────────────────────┘
//! ```
//!
//! - Nothing is restored before the guard knows what to take down, and the kernel what not to let out: it could not be silenced.
//! - The gate opens when a tree is there, and the addresses come up behind it: else what a client sends again meets no socket,
//!   and is answered with a reset.
//! - Nobody is told of an address at which nothing answers, and what clients had sent is given when the way back is known.
//!
//! That the old host is silent before all of this is what [`crate::ha`] sees to.

use std::sync::{Mutex, PoisonError};

/// How far a workload's place on this host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Nothing is known of its addresses.
    Unknown,
    /// Nobody can hear what would run here, and the guard keeps it so.
    Silent,
    /// A tree is here, unheard.
    Restored,
    /// It is heard by whoever knows the way.
    Open,
    /// This host answers for its addresses.
    Answering,
    /// The networks were told so.
    Announced,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// What silences it is made ready.
    Prepare,
    /// An epoch becomes a tree.
    Restore,
    /// A tree is found, or started, that was here before, or never anywhere else.
    Find,
    /// Its packets pass.
    Open,
    /// Its addresses are answered for.
    Answer,
    /// The networks are told.
    Announce,
    /// It is given what was sent to it.
    Replay,
    /// It is silenced.
    Silence,
}

/// A step before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a takeover out of order: {step:?} when it was {stage:?}; this is a fault of Standin's, please report it"
)]
pub struct OutOfOrder {
    /// What was to be done.
    pub step: Step,
    /// How far it was.
    pub stage: Stage,
}

impl Stage {
    /// How far it is behind a step.
    fn after(self, step: Step) -> Result<Self, OutOfOrder> {
        let (at_least, then) = match step {
            Step::Prepare => (Self::Unknown, Self::Silent),
            Step::Restore if self > Self::Silent => return Err(OutOfOrder { step, stage: self }),
            Step::Restore => (Self::Silent, Self::Restored),
            Step::Find => (Self::Unknown, Self::Restored),
            Step::Open => (Self::Restored, Self::Open),
            Step::Answer => (Self::Open, Self::Answering),
            Step::Announce => (Self::Answering, Self::Announced),
            Step::Replay => (Self::Announced, Self::Announced),
            Step::Silence => return Ok(self.min(Self::Restored)),
        };
        if self < at_least { Err(OutOfOrder { step, stage: self }) } else { Ok(self.max(then)) }
    }
}

/// Keeps the order in one place.
#[derive(Debug)]
pub struct Order(Mutex<Stage>);

impl Order {
    /// Of a place that is so far.
    pub fn new(stage: Stage) -> Self {
        Self(Mutex::new(stage))
    }

    /// How far it is.
    pub fn stage(&self) -> Stage {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a step's time has come.
    pub fn check(&self, step: Step) -> Result<(), OutOfOrder> {
        self.stage().after(step).map(drop)
    }

    /// A step was done.
    pub fn done(&self, step: Step) -> Result<(), OutOfOrder> {
        let mut stage = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *stage = stage.after(step)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TAKEOVER: [Step; 6] =
        [Step::Prepare, Step::Restore, Step::Open, Step::Answer, Step::Announce, Step::Replay];

    /// The first step that is refused, if one is.
    fn refused(steps: &[Step]) -> Option<OutOfOrder> {
        let order = Order::new(Stage::Unknown);
        steps.iter().find_map(|step| order.done(*step).err())
    }

    #[test]
    fn a_takeover_is_done_in_its_order_and_in_no_other() {
        assert_eq!(refused(&TAKEOVER), None);
        for (one, other) in (0..6).flat_map(|one| (one + 1..6).map(move |other| (one, other))) {
            let mut steps = TAKEOVER;
            steps.swap(one, other);
            assert!(refused(&steps).is_some(), "{steps:?}");
        }
        for missing in 0..5 {
            let steps: Vec<_> =
                TAKEOVER.iter().enumerate().filter(|(at, _)| *at != missing).map(|(_, step)| *step).collect();
            assert_eq!(refused(&steps).map(|refused| refused.step), Some(TAKEOVER[missing + 1]));
        }
    }

    #[test]
    fn what_was_silenced_is_opened_before_it_answers_again() {
        let order = Order::new(Stage::Announced);
        order.done(Step::Silence).unwrap();
        assert_eq!(order.stage(), Stage::Restored);
        assert!(order.check(Step::Answer).is_err());
        assert!(order.check(Step::Restore).is_err(), "a tree is there");
        for step in [Step::Open, Step::Answer, Step::Announce] {
            order.done(step).unwrap();
        }
    }

    proptest! {
        #[test]
        fn nothing_is_heard_before_it_is_there_nor_told_of_before_it_answers(
            steps in prop::collection::vec(0..8usize, 0..40)
        ) {
            let all = [&TAKEOVER[..], &[Step::Find, Step::Silence]].concat();
            let order = Order::new(Stage::Unknown);
            let (mut there, mut open, mut answers) = (false, false, false);
            for step in steps.into_iter().map(|at| all[at]) {
                if order.done(step).is_err() {
                    continue;
                }
                match step {
                    Step::Restore | Step::Find => there = true,
                    Step::Open => { prop_assert!(there); open = true; }
                    Step::Answer => { prop_assert!(open); answers = true; }
                    Step::Announce | Step::Replay => prop_assert!(answers),
                    Step::Silence => (open, answers) = (false, false),
                    Step::Prepare => {}
                }
            }
        }
    }
}
