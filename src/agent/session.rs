//! The primary's epochs: capture, ship, wait for the commit, at the workload's pace. One task a workload while it runs
//! here.
//!
//! ```text
//!  offer ──► accepted(held) ──► capture ──► ship ──► committed
//!    ▲                             │ ▲        │ meanwhile the next is captured
//!    └── what does it hold? ───────┴─┴────────┘ failed
//! ```
//!
//! Invariants: one epoch is shipped, and at most one captured ahead of it, which is sent only when that one is
//! committed: so the interval stretches with the link and nothing piles up. The last frame of an epoch is sent only when
//! the workload's owner has permitted the commit, because a commit is what lets the standby promote.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot, watch};

use super::{
    api::ErrorCode,
    flight::{self, Capturing, Committed, Failed, Final, Hand, Judged, Shipping},
    inputs,
    inventory::{self, Wanted},
    links::Link,
    mailbox::Msg,
    output,
    progress::Progress,
    throttle::{Brake, FULL_SPEED},
};
use crate::{
    capture::{
        CaptureError, Capturer,
        converge::{Allowed, Convergence, Step},
    },
    delta::Offered,
    model::{Epoch, EpochId, Name, Term},
    takeover::hold::Hold,
    transport::{block_in_place, connection::RequestError, epoch::SendEpochError},
    wire::message::{EpochAnswer, FrameHead, Reply, Request},
    workload::{
        network::Door,
        spec::{Commit, WorkloadSpec},
    },
};

/// So many captures of a handoff may fail before it is given up: bytes that come while CRIU reads a connection's queue, or
/// a mapping that changes at the wrong moment, fail one.
const HANDOFF_FAILURES_MAX: u32 = 4;
/// How long it rests after one.
const HANDOFF_REST: Duration = Duration::from_millis(100);
/// What can be done of an epoch before it is due is little if it takes no longer.
const AHEAD_SHORT: Duration = Duration::from_millis(3);
/// How long the standby may take to accept or refuse an offer.
const OFFER_TIMEOUT: Duration = Duration::from_secs(10);
/// What restoring on the target takes beside shipping.
const RESTORE_ALLOWANCE: Duration = Duration::from_millis(60);

/// Orders to a session.
pub(super) enum Order {
    /// Move the workload: pre-copy rounds until the rest fits, then the final epoch.
    Handoff(HandoffOrder),
}

/// A handoff to be done.
pub(super) struct HandoffOrder {
    pub(super) allowed: Allowed,
    /// Told how the final epoch went; a failure before the final freeze leaves nothing changed.
    pub(super) done: oneshot::Sender<Result<HandoffDone, SessionError>>,
}

/// The final epoch of a handoff that the peer confirmed, or that was rolled back by its owner.
pub(super) struct HandoffDone {
    pub(super) rounds: u32,
    /// Share of its time for which the workload ran in the last round.
    pub(super) run_percent: u8,
    pub(super) id: EpochId,
    /// Whether the source's tree was killed.
    pub(super) killed: bool,
}

/// Why a session's epoch failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error("the standby cannot be reached: {0}")]
    Offer(#[from] RequestError),
    #[error("the epoch could not be sent: {0}")]
    Send(#[source] SendEpochError),
    #[error("the standby cannot be reached: no connection stands")]
    NoConnection,
    #[error("the standby refuses: {0}")]
    Refused(String),
    #[error("the standby needs the whole memory: {0}")]
    NeedFull(String),
    #[error("the lease did not hold for long enough to commit an epoch")]
    NoPermission,
    #[error(
        "the handoff does not converge: after {rounds} rounds it would still take {needed_ms} ms; allow that with --max-downtime, or slowing the workload down with --throttle, or lower the load"
    )]
    NoConvergence { rounds: u32, needed_ms: u64 },
    #[error("the workload cannot be slowed down: {0}; try without --throttle")]
    NoThrottle(String),
    #[error("the workload is not running on this host any more")]
    Ended,
}

impl SessionError {
    /// An answer that is no commit.
    pub(super) fn answered(answer: EpochAnswer) -> Self {
        match answer {
            EpochAnswer::Committed { id, .. } => {
                Self::Refused(format!("it committed epoch {id}, which was not sent"))
            }
            EpochAnswer::NeedFull { reason, .. } => Self::NeedFull(reason),
            EpochAnswer::Refused { reason, .. } => Self::Refused(reason),
        }
    }

    /// Kind of error for whoever asked for protection.
    pub(super) fn code(&self) -> ErrorCode {
        match self {
            Self::Offer(_) | Self::Send(_) | Self::NoConnection => ErrorCode::Unreachable,
            _ => ErrorCode::Refused,
        }
    }
}

impl From<SendEpochError> for SessionError {
    /// An answer that came early is the standby's, and no fault of the connection.
    fn from(error: SendEpochError) -> Self {
        match error {
            SendEpochError::Answered { answer, .. } => Self::answered(*answer),
            error => Self::Send(error),
        }
    }
}

/// What a session works with.
pub(super) struct Session {
    pub(super) name: Name,
    pub(super) spec: WorkloadSpec,
    pub(super) term: Term,
    pub(super) link: Link,
    pub(super) owner: mpsc::Sender<Msg>,
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) permit: watch::Receiver<Permit>,
    /// The workload's packets.
    pub(super) hold: Option<Arc<Hold>>,
    /// By what those come that are sent to it.
    pub(super) doors: Vec<Door>,
    /// Of the workload's speed.
    pub(super) brake: Brake,
}

/// What the owner permits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Permit {
    /// False while the copy is frozen by its guard: CRIU could not dump it.
    pub(super) may_capture: bool,
    /// The least number of an epoch whose commit lets the standby promote.
    pub(super) first_epoch: Epoch,
    /// When output leaves.
    pub(super) commit: Commit,
    /// A standby could promote: only then does output wait.
    pub(super) owes_output: bool,
}

/// What ended a pause between two epochs.
enum Next {
    Due,
    Ordered(HandoffOrder),
}

impl Session {
    /// Runs until the owner drops it. `capturer` is fresh.
    pub(super) async fn run(mut self, capturer: Capturer) {
        let commit = self.permit.borrow().commit;
        let mut progress = Progress::new(capturer, output::pace(&self.spec, commit), commit);
        let _inputs = self
            .hold
            .as_ref()
            .map(|hold| inputs::tell(&self.name, &self.link, hold, &self.permit, &self.doors));
        // It ends when the owner is gone, or the capturer was lost with its thread.
        while self.turn(&mut progress).await.is_some() {}
        self.let_run();
        // What the next session begins with, its directory and the way to the standby, must be free.
        progress.abandon_ahead().await;
        if let Some(shipping) = progress.shipping.take() {
            shipping.abandon().await;
        }
        let _ = progress.hand.get().await;
    }

    /// One epoch, or a whole handoff if one is ordered. `None`: the session ends.
    async fn turn(&mut self, at: &mut Progress) -> Option<()> {
        let next = self.pause(at).await?;
        if !self.permit.borrow().may_capture {
            self.let_run();
        }
        let permit = *self.permit.wait_for(|permit| permit.may_capture).await.ok()?;
        at.next = at.next.max(permit.first_epoch);
        match next {
            Next::Due => match self.epoch(at).await? {
                Ok(()) => Some(()),
                Err(error) => self.report(at, error).await,
            },
            Next::Ordered(HandoffOrder { allowed, done }) => {
                let result = self.handoff(at, allowed).await?;
                let gone = result.as_ref().is_ok_and(|done| done.killed);
                if result.is_err() {
                    at.pace.failed(Instant::now());
                }
                // Whatever became of it, what the standby holds is asked anew. The one who asked may have gone away.
                at.offered = false;
                let _ = done.send(result);
                (!gone).then_some(())
            }
        }
    }

    /// Nobody looks any more whether the workload should be slow.
    fn let_run(&self) {
        // A tree that is gone, or stands, runs no faster.
        let _ = block_in_place(|| self.brake.set(FULL_SPEED));
    }

    /// Waits until the next epoch is due, or something is ordered. What ships meanwhile is concluded.
    async fn pause(&mut self, at: &mut Progress) -> Option<Next> {
        self.follow_mode(at);
        if self.may_begin_ahead(at) {
            at.ahead = Some(self.begin(at, None, true).await?);
        }
        let output = output::Awaited::new(self.hold.as_ref(), at.commit, self.spec.pace);
        loop {
            let due = tokio::time::Instant::from_std(at.pace.due(Instant::now()));
            // Nothing tells how long all memory will be on its way.
            let may_begin = !at.shipping.as_ref().is_some_and(Shipping::full);
            tokio::select! {
                Some(outcome) = outcome(&mut at.shipping) => {
                    at.shipping = None;
                    if let Err(error) = self.conclude(at, outcome?).await? {
                        self.report(at, error).await?;
                    }
                }
                () = output.due(due), if may_begin => return Some(Next::Due),
                changed = self.permit.changed() => {
                    changed.ok()?;
                    if self.permit.borrow().commit != at.commit {
                        // Clients wait for it.
                        self.follow_mode(at);
                        return Some(Next::Due);
                    }
                }
                received = self.orders.recv() => {
                    return received.map(|Order::Handoff(handoff)| Next::Ordered(handoff));
                }
            }
        }
    }

    /// Tells the owner of a failure.
    async fn report(&mut self, at: &mut Progress, error: SessionError) -> Option<()> {
        at.abandon_ahead().await;
        at.offered = false;
        at.pace.failed(Instant::now());
        self.owner.send(Msg::EpochFailed { term: self.term, error }).await.ok()
    }

    /// Offers the workload to the standby and settles what it holds. Nothing is on its way.
    async fn offer(&mut self, at: &mut Progress) -> Option<Result<(), SessionError>> {
        let capturer = at.hand.get().await?;
        for _ in 0..std::mem::take(&mut at.commits) {
            capturer.committed();
        }
        let resident = block_in_place(|| capturer.resident_bytes());
        let held = match resident {
            Ok(bytes) => self.ask_standby(bytes).await.map(|held| (held, bytes)),
            Err(error) => Err(error.into()),
        };
        let (held, resident_bytes) = match held {
            Ok(held) => held,
            Err(error) => return Some(Err(error)),
        };
        if let Some(unsettled) = at.unsettled.take() {
            if held == Some(unsettled) {
                capturer.committed();
                (at.base, at.told) = (held, false);
                output::release(self.hold.as_ref(), unsettled);
            } else {
                at.failed = true;
            }
        }
        if at.base != held || std::mem::take(&mut at.told) {
            at.base = None;
        }
        if at.base.is_none() && !at.tells_wrong {
            self.resync(at, held, resident_bytes).await?;
        }
        if let Some(held) = held.filter(|held| held.term == self.term) {
            at.next = at.next.max(Epoch(held.epoch.0 + 1));
        }
        at.offered = true;
        Some(Ok(()))
    }

    /// Asks the standby what it holds, of which nothing is known here. If it does not say, all is sent.
    async fn resync(&self, at: &mut Progress, held: Option<EpochId>, resident_bytes: u64) -> Option<()> {
        let capturer = at.hand.get().await?;
        if std::mem::take(&mut at.failed) {
            capturer.failed();
        }
        let files = capturer.has_files();
        if capturer.needs_full() || (held.is_none() && !files) {
            return Some(());
        }
        match inventory::ask(&self.link, &self.name, &Wanted { held, resident_bytes, files }).await {
            Ok(told) if told.pages.is_none() && told.files.is_empty() => {}
            Ok(told) => {
                let (pages, bytes) = (told.pages.as_ref().map(Offered::pages), told.bytes);
                tracing::info!(name = %self.name, ?held, pages, bytes, "the standby tells what it holds");
                at.base = held.filter(|_| pages.is_some());
                at.told = true;
                capturer.resync(told);
            }
            Err(error) => {
                tracing::warn!(name = %self.name, ?held, %error, "what the standby holds is not known: all is sent");
            }
        }
        Some(())
    }

    /// Offers it; what the standby holds.
    async fn ask_standby(&mut self, resident_bytes: u64) -> Result<Option<EpochId>, SessionError> {
        if tokio::time::timeout(OFFER_TIMEOUT, self.link.up()).await.is_err() {
            return Err(SessionError::NoConnection);
        }
        let lease = self.link.lease().ok_or(SessionError::NoConnection)?;
        let spec = WorkloadSpec { commit: self.permit.borrow().commit, ..self.spec.clone() };
        let request = Request::Offer { spec: Box::new(spec), term: self.term, resident_bytes };
        match lease.request(&request, OFFER_TIMEOUT).await? {
            Reply::Accepted { held } => Ok(held),
            Reply::Refused { reason, .. } => Err(SessionError::Refused(reason)),
            other => Err(SessionError::Refused(format!("an answer that makes no sense: {other:?}"))),
        }
    }

    /// Captures one epoch, and sends it as soon as the one before is committed. It is left on its way.
    async fn epoch(&mut self, at: &mut Progress) -> Option<Result<(), SessionError>> {
        let overtaken =
            at.ahead.as_ref().is_some_and(|ahead| ahead.id().epoch < self.permit.borrow().first_epoch);
        // What the capturer is told of it must follow what it is told of the one on its way.
        at.offered &= !overtaken;
        if !at.offered {
            at.abandon_ahead().await;
            if let Err(error) = self.settle(at).await? {
                return Some(Err(error));
            }
            if let Err(error) = self.offer(at).await? {
                return Some(Err(error));
            }
        }
        let capturing = match at.ahead.take() {
            Some(mut ahead) => {
                at.pace.began(Instant::now());
                ahead.go();
                ahead
            }
            None => self.begin(at, None, false).await?,
        };
        if let Some(mut before) = at.shipping.take() {
            let outcome = before.outcome().await?;
            if let Err(error) = self.conclude(at, outcome).await? {
                capturing.abandon().await;
                at.failed = true;
                return Some(Err(error));
            }
        }
        match capturing.ship(&self.link, self.owner.clone(), None, self.hold.clone()).captured().await? {
            Ok(shipping) => {
                at.pace.captured(&shipping.freeze());
                at.ahead_is_short = shipping.ahead() <= AHEAD_SHORT;
                at.pace.shipping(shipping.since());
                at.shipping = Some(shipping);
                Some(Ok(()))
            }
            Err(failed) => Some(Err(at.fail(failed))),
        }
    }

    /// Whether what can be done of the next epoch before it is due is done at once. It may have to be done again if that one is
    /// not due soon, and what changed most lately is best not sent ahead; so only where it is little, and clients wait for it.
    fn may_begin_ahead(&self, at: &Progress) -> bool {
        let is_settled = at.shipping.as_ref().map_or(at.base.is_some(), |shipping| !shipping.full());
        at.commit == Commit::Output
            && at.offered
            && at.ahead_is_short
            && at.ahead.is_none()
            && is_settled
            && self.permit.borrow().may_capture
    }

    /// Begins to capture the next epoch; what is on its way is taken for committed. `ahead`: it is not due yet.
    async fn begin(&mut self, at: &mut Progress, judged: Option<Judged>, ahead: bool) -> Option<Capturing> {
        at.hand.get().await?;
        let Hand::Here(mut capturer) = std::mem::replace(&mut at.hand, Hand::Lost) else { return None };
        for _ in 0..std::mem::take(&mut at.commits) {
            capturer.committed();
        }
        if std::mem::take(&mut at.failed) {
            debug_assert!(at.shipping.is_none(), "it would be taken for the one that failed");
            capturer.failed();
        }
        let id = EpochId { term: self.term, epoch: at.next };
        at.next = Epoch(at.next.0 + 1);
        let base = at.shipping.as_ref().map(Shipping::id).or(at.base);
        let head =
            FrameHead::Begin { name: self.name.clone(), id, base: base.filter(|_| !capturer.needs_full()) };
        if !ahead {
            at.pace.began(Instant::now());
        }
        let freeze_after = at.pace.freeze_after().filter(|_| judged.is_none());
        let follows = matches!(head, FrameHead::Begin { base: Some(_), .. });
        let around = output::Around {
            hold: self.hold.clone(),
            epoch: id,
            // The first epoch takes as long as all memory does; what a takeover needs of it is there with the second.
            holds: at.commit == Commit::Output && follows && !at.told,
            commit: at.commit,
            permit: self.permit.clone(),
        };
        let how = flight::How { freeze_after, judged, around, ahead };
        let (hand, capturing) =
            flight::begin(capturer, (id, head), how, self.owner.clone(), self.brake.clone());
        at.hand = hand;
        Some(capturing)
    }

    /// Takes note of how an epoch ended that was on its way. `None`: the owner is gone.
    async fn conclude(
        &mut self,
        at: &mut Progress,
        outcome: Result<Committed, Failed>,
    ) -> Option<Result<(), SessionError>> {
        match outcome {
            Ok(Committed { figures, cost, .. }) => {
                at.commit(figures.id, cost.latency);
                at.pace.committed(&cost);
                let pace = at.pace.report();
                self.owner.send(Msg::EpochCommitted { figures, pace }).await.ok()?;
                Some(Ok(()))
            }
            Err(failed) => Some(Err(at.fail(failed))),
        }
    }

    /// Rounds of epochs until what is left is little enough, then the final one.
    async fn handoff(
        &mut self,
        at: &mut Progress,
        allowed: Allowed,
    ) -> Option<Result<HandoffDone, SessionError>> {
        let result = self.handoff_with(at, allowed).await?;
        if let Err(error) = block_in_place(|| self.brake.set(FULL_SPEED)) {
            tracing::warn!(error, name = %self.name, "the workload may still be slowed down");
        }
        Some(result)
    }

    async fn handoff_with(
        &mut self,
        at: &mut Progress,
        allowed: Allowed,
    ) -> Option<Result<HandoffDone, SessionError>> {
        let mut convergence = Convergence::new(allowed);
        let (mut run_percent, mut failures) = (convergence.run_percent(), 0);
        loop {
            if let Err(error) = block_in_place(|| self.brake.set(run_percent)) {
                return Some(Err(SessionError::NoThrottle(error)));
            }
            let (error, is_ours) = match self.round(at).await? {
                Ok(()) => {
                    let (downtime, rounds) = (at.last_cost + RESTORE_ALLOWANCE, convergence.rounds());
                    tracing::debug!(name = %self.name, rounds, run_percent, ?downtime, "a round");
                    match convergence.after(downtime) {
                        Step::Round { run_percent: next } => {
                            run_percent = next;
                            continue;
                        }
                        Step::Final => {}
                        Step::GiveUp => {
                            let (rounds, needed_ms) = (convergence.rounds(), downtime.as_millis() as u64);
                            return Some(Err(SessionError::NoConvergence { rounds, needed_ms }));
                        }
                    }
                    match self.leave(at).await? {
                        Ok((id, killed)) => {
                            let (rounds, run_percent) = (convergence.rounds(), convergence.run_percent());
                            return Some(Ok(HandoffDone { rounds, run_percent, id, killed }));
                        }
                        Err(failed) => failed,
                    }
                }
                Err(error) => (error, true),
            };
            failures += 1;
            if !is_ours || !matches!(error, SessionError::Capture(_)) || failures > HANDOFF_FAILURES_MAX {
                return Some(Err(error));
            }
            tracing::warn!(%error, name = %self.name, "what fails an epoch once seldom does again: another round");
            tokio::time::sleep(HANDOFF_REST).await;
        }
    }

    /// The final epoch. After an error: whether the owner knows nothing of it yet.
    async fn leave(&mut self, at: &mut Progress) -> Option<Result<(EpochId, bool), (SessionError, bool)>> {
        let Final { verdict, judged, held } = Final::new();
        let capturing = self.begin(at, Some(judged), false).await?;
        let leaving = capturing.ship(&self.link, self.owner.clone(), Some(verdict), None);
        let outcome = match leaving.captured().await? {
            Ok(mut shipping) => shipping.outcome().await?,
            Err(failed) => Err(failed),
        };
        Some(match outcome {
            Ok(Committed { figures, cost, killed }) => {
                at.commit(figures.id, cost.latency);
                Ok((figures.id, killed))
            }
            Err(failed) => {
                let is_ours = !failed.held && !held.load(Ordering::Acquire);
                Err((at.fail(failed), is_ours))
            }
        })
    }

    /// An epoch and its commit.
    async fn round(&mut self, at: &mut Progress) -> Option<Result<(), SessionError>> {
        match self.epoch(at).await? {
            Ok(()) => self.settle(at).await,
            failed => Some(failed),
        }
    }

    /// Waits for what is on its way.
    async fn settle(&mut self, at: &mut Progress) -> Option<Result<(), SessionError>> {
        let Some(mut shipping) = at.shipping.take() else { return Some(Ok(())) };
        let outcome = shipping.outcome().await?;
        self.conclude(at, outcome).await
    }
}

/// How the epoch on its way ended; never, if there is none.
async fn outcome(shipping: &mut Option<Shipping>) -> Option<Option<Result<Committed, Failed>>> {
    match shipping {
        Some(shipping) => Some(shipping.outcome().await),
        None => std::future::pending().await,
    }
}
