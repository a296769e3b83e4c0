//! A planned move, from the owner's side.
//!
//! ```text
//!  ordered ──► pre-copy epochs ──► hold (frozen, silent) ──► final epoch committed ──► the core asks the peer
//!                 │ does not fit        │ refused                │ refused, lost            │
//!                 └─────────────────────┴────────────────────────┴──► runs on here          ├─► running there: killed
//!                                                                                            └─► called back: runs on
//! ```
//!
//! Invariant: from the hold to the verdict nothing but the handoff's outcome lets the copy run.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{
    api::{ApiError, HandoffReport, HandoffRequest},
    fencing::FENCE_LIMIT,
    home::Home,
    mailbox::{Answer, Msg},
    owner::Owner,
    session::{HandoffDone, HandoffOrder, Order, SessionError},
};
use crate::{
    capture::converge::Allowed,
    ha::{Core, Input, Standing},
    model::Term,
    observe::in_full,
    transport::block_in_place,
};

/// A handoff under way.
pub(super) struct Handoff {
    pub(super) answer: Answer<HandoffReport>,
    pub(super) began: Instant,
    pub(super) frozen: Option<Instant>,
    /// When the final epoch was committed there.
    pub(super) committed: Option<Instant>,
    pub(super) running: Option<Instant>,
    pub(super) verdict: Option<std::sync::mpsc::Sender<bool>>,
    /// Why it is called off.
    pub(super) reason: Option<String>,
}

impl Owner {
    pub(super) fn begin_handoff(&mut self, request: &HandoffRequest, answer: Answer<HandoffReport>) {
        let refusal = match (self.standing(), &self.session) {
            _ if self.handoff.is_some() => Some("a handoff is under way already".to_owned()),
            (Some(Standing::Primary), Some(_)) => match (&request.to, &self.durable.peer) {
                (Some(to), Some(peer)) if to != peer => {
                    Some(format!("{} cannot go to {to}: its standby is {peer}", self.name))
                }
                _ if self.home.as_ref().is_some_and(Home::is_paused) => {
                    Some(format!("{} is paused by its engine; unpause it first", self.name))
                }
                _ => None,
            },
            (Some(_), _) => Some(format!(
                "{} does not run here: ask the agent on {}",
                self.name,
                self.durable.peer.as_deref().unwrap_or("the other host")
            )),
            (None, _) => {
                Some(format!("{} is not protected: standin protect {} --to PEER", self.name, self.name))
            }
        };
        if let Some(refusal) = refusal {
            let _ = answer.send(Err(ApiError::refused(refusal)));
            return;
        }
        let (done, finished) = oneshot::channel();
        let order = Order::Handoff(HandoffOrder {
            allowed: Allowed {
                downtime_max: Duration::from_millis(request.max_downtime_ms),
                throttle: request.throttle,
            },
            done,
        });
        let sent = self.session.as_ref().is_some_and(|session| session.orders.try_send(order).is_ok());
        if !sent {
            let _ = answer.send(Err(ApiError::refused("the session of epochs is busy; try again")));
            return;
        }
        self.handoff = Some(Handoff {
            answer,
            began: Instant::now(),
            frozen: None,
            committed: None,
            running: None,
            verdict: None,
            reason: None,
        });
        let to_self = self.to_self.clone();
        tokio::spawn(async move {
            let result = finished.await.unwrap_or(Err(SessionError::Ended));
            let _ = to_self.send(Msg::HandoffDone(result)).await;
        });
    }

    /// The session's part of a handoff is over: the tree was killed, or runs on here.
    pub(super) fn handoff_done(&mut self, result: Result<HandoffDone, SessionError>) {
        let Some(handoff) = self.handoff.take() else { return };
        let since = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => (to - from).as_secs_f64() * 1e3,
            _ => 0.0,
        };
        let answer = match result {
            Ok(done) if done.killed => {
                let report = HandoffReport {
                    name: self.name.clone(),
                    to: self.durable.peer.clone().unwrap_or_default(),
                    term: self.core.as_ref().map_or(Term(0), |core| core.record().term),
                    epoch: done.id,
                    rounds: done.rounds,
                    run_percent: done.run_percent,
                    downtime_ms: since(handoff.frozen, handoff.running),
                    total_ms: handoff.began.elapsed().as_secs_f64() * 1e3,
                    restore_ms: since(handoff.committed, handoff.running),
                };
                let phases = BTreeMap::from([
                    ("downtime".to_owned(), report.downtime_ms),
                    ("restore".to_owned(), report.restore_ms),
                    ("total".to_owned(), report.total_ms),
                ]);
                self.event_with("handed-off", &format!("to {}", report.to), Some(done.id), phases);
                self.finish_demotion();
                Ok(report)
            }
            Ok(_) => Err(handoff.reason.unwrap_or_else(|| "the standby could not take the workload".into())),
            Err(error) => Err(handoff.reason.unwrap_or_else(|| error.to_string())),
        };
        let answer = answer.map_err(|reason| {
            if self.demoting {
                // The peer runs it: whatever CRIU says of its end here, the old copy goes with its place.
                self.event("handed-off", &format!("the old copy was ended by force: {reason}"), None);
                self.finish_demotion();
                return ApiError::failed(format!(
                    "{} runs on {} now; its old copy here had to be ended by force: {reason}",
                    self.name,
                    self.durable.peer.as_deref().unwrap_or("the other host")
                ));
            }
            self.error = Some(format!("the handoff was refused: {reason}"));
            self.event("handoff-failed", &format!("{reason}; the workload runs on here"), None);
            self.release_hold();
            ApiError::refused(format!("{} was not handed off and runs on here: {reason}", self.name))
        });
        let _ = handoff.answer.send(answer);
    }

    /// After a final freeze that came to nothing: back to what the core says.
    pub(super) fn release_hold(&mut self) {
        if !std::mem::take(&mut self.holding) {
            return;
        }
        self.tree_goes_on();
        // For the core the guard has fired just now; the next renewal of the lease lets the copy run.
        self.feed(Input::GuardFired);
    }

    /// The tree of a handoff that came to nothing is the workload again.
    pub(super) fn tree_goes_on(&self) {
        if let Some(Err(error)) = self.home.as_ref().map(|home| home.outlives_its_tree(false)) {
            tracing::warn!(%error, name = %self.name, "the workload's end will not be its container's");
        }
    }

    /// A handoff's final freeze: the copy is silent from here on.
    pub(super) fn hold(&mut self) -> bool {
        let (Some(home), Some(handoff)) = (&self.home, &mut self.handoff) else { return false };
        if self.core.as_ref().map(Core::standing) != Some(Standing::Primary) {
            return false;
        }
        self.holding = true;
        handoff.frozen = Some(Instant::now());
        let held = block_in_place(|| {
            home.outlives_its_tree(true)?;
            anyhow::Ok(home.fence_now(FENCE_LIMIT)?)
        });
        match held {
            Ok(()) => true,
            Err(error) => {
                handoff.reason = Some(in_full(&error));
                false
            }
        }
    }
}
