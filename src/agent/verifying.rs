//! The warm image is read again and compared with what was received: when an operator asks, and by itself from time to time.
//!
//! Invariant: an image that was found damaged is not restored any more: it is thrown away, the core is told that nothing is held,
//! and the primary sends the whole memory.

use std::time::{Duration, Instant};

use super::{
    api::{ApiError, VerifyReport},
    mailbox::{Answer, Msg},
    owner::Owner,
};
use crate::{
    ha::{Input, Standing},
    model::EpochId,
    store::VerifyError,
    transport::block_in_place,
};

/// How often it is done unasked.
const EVERY: Duration = Duration::from_secs(3600);

/// How often the removal of a damaged image is tried, and how long it rests in between.
const REMOVALS_MAX: u32 = 50;
const REMOVAL_REST: Duration = Duration::from_millis(40);

/// What was found.
pub(super) enum Verified {
    Whole(VerifyReport),
    Damaged(EpochId, String),
    /// It could not be read, or none is held.
    Unknown(String),
}

impl Owner {
    /// `answer`: of an operator who waits for it.
    pub(super) fn verify(&mut self, answer: Option<Answer<VerifyReport>>) {
        let standby = self.standby.clone().filter(|_| self.standing() == Some(Standing::Standby));
        let Some(standby) = standby else {
            if let Some(answer) = answer {
                let (name, peer) = (&self.name, self.durable.peer.as_deref().unwrap_or("its standby"));
                let message = format!("no image of {name} is held here: standin verify {name}, on {peer}");
                let _ = answer.send(Err(ApiError::refused(message)));
            }
            return;
        };
        self.verified_at = Instant::now();
        let (name, to_self) = (self.name.clone(), self.to_self.clone());
        // A thread of its own: it gives way to everything else.
        std::thread::spawn(move || {
            // SAFETY: changes the priority of this thread alone, and touches no memory.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
            let began = Instant::now();
            let found = match standby.verify() {
                None => Verified::Unknown("no whole epoch is held yet".to_owned()),
                Some((epoch, Ok(bytes))) => {
                    let took_ms = began.elapsed().as_secs_f64() * 1e3;
                    Verified::Whole(VerifyReport { name, epoch, bytes, took_ms })
                }
                Some((epoch, Err(error @ VerifyError::Mismatch { .. }))) => {
                    Verified::Damaged(epoch, error.to_string())
                }
                Some((_, Err(error))) => Verified::Unknown(error.to_string()),
            };
            drop(standby);
            let _ = to_self.blocking_send(Msg::Verified { found, answer });
        });
    }

    pub(super) fn verify_if_due(&mut self) {
        if self.verified_at.elapsed() > EVERY {
            self.verified_at = Instant::now();
            self.verify(None);
        }
    }

    pub(super) fn verified(&mut self, found: Verified, answer: Option<Answer<VerifyReport>>) {
        let outcome = match found {
            Verified::Whole(report) => Ok(report),
            Verified::Unknown(reason) => {
                Err(ApiError::failed(format!("{} was not verified: {reason}", self.name)))
            }
            Verified::Damaged(epoch, reason) => {
                self.event("image-damaged", &reason, Some(epoch));
                self.discard_image();
                Err(ApiError::failed(format!(
                    "{reason}. It was thrown away; the primary sends the whole memory. See to this host's memory or disk"
                )))
            }
        };
        if let Some(answer) = answer {
            let _ = answer.send(outcome);
        } else if let Err(error) = outcome {
            tracing::warn!(name = %self.name, error = error.message, "the warm image");
        }
    }

    /// A newer epoch may have come meanwhile; it may be built upon the damaged one.
    fn discard_image(&mut self) {
        if self.standing() != Some(Standing::Standby) {
            return;
        }
        self.feed(Input::ImageLost);
        if let Some(standby) = self.standby.take() {
            // What is made ready for a takeover reads it, for an instant.
            let removed = block_in_place(|| {
                (0..REMOVALS_MAX).any(|_| {
                    let removed = standby.remove();
                    if !removed {
                        std::thread::sleep(REMOVAL_REST);
                    }
                    removed
                })
            });
            if !removed {
                self.standby = Some(standby);
                self.error = Some("a damaged image cannot be removed: restart this agent".to_owned());
                return;
            }
        }
        self.refresh_standby();
    }
}
