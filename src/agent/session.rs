//! The primary's side of an epoch: capture it, ship it, wait for the commit. One task a workload while it runs here.
//!
//! ```text
//!  offer ──► accepted(held) ──► epoch ──► committed ──► wait ──► epoch …
//!    ▲            │                │ failed: what does the standby hold?
//!    └────────────┴────────────────┘
//! ```
//!
//! Invariants: one epoch is in flight; the next begins when the last was committed or has failed, so nothing is captured
//! that cannot be shipped yet, and the interval stretches with the link. The last frame of an epoch is sent only when the
//! workload's owner has permitted the commit, because a commit is what lets the standby promote.

use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::{api::ErrorCode, links::Link, owner::Msg};
use crate::{
    capture::{CaptureError, Captured, Capturer, Finish, pace::Pace},
    delta::LinkRate,
    model::{Epoch, EpochFigures, EpochId, Name, Term},
    transport::{connection::RequestError, epoch::SendEpochError},
    wire::message::{EpochAnswer, FrameHead, Reply, Request},
    workload::spec::WorkloadSpec,
};

/// Frames between capture and QUIC: with bodies of up to a MiB, what an epoch may hold in between.
const FRAMES_MAX: usize = 8;
/// So often the rate of a long shipment is taken. More than the transport buffers, which takes no time.
const RATE_EVERY_BYTES: u64 = 128 << 20;
/// How long the standby may take to verify and commit an epoch.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take to accept or refuse an offer.
const OFFER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long permission to commit may be waited for: the lease must hold for it.
const PERMISSION_TIMEOUT: Duration = Duration::from_secs(5);

/// Orders to a session.
pub(super) enum Order {
    /// Move the workload: pre-copy rounds until the rest fits, then the final epoch.
    Handoff(HandoffOrder),
}

/// A handoff to be done.
pub(super) struct HandoffOrder {
    /// Budget of the final epoch.
    pub(super) max_downtime: Duration,
    /// Told how the final epoch went; a failure before the final freeze leaves nothing changed.
    pub(super) done: oneshot::Sender<Result<HandoffDone, SessionError>>,
}

/// The final epoch of a handoff that the peer confirmed, or that was rolled back by its owner.
pub(super) struct HandoffDone {
    pub(super) rounds: u32,
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
        "the handoff does not converge: after {rounds} rounds an epoch still takes {needed_ms} ms; allow more with --max-downtime, or lower the load"
    )]
    NoConvergence { rounds: u32, needed_ms: u64 },
    #[error("the workload is not running on this host any more")]
    Ended,
}

impl SessionError {
    /// An answer that is no commit.
    fn answered(answer: EpochAnswer) -> Self {
        match answer {
            EpochAnswer::Committed { id } => {
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
}

/// What is known between two epochs.
struct Progress {
    capturer: Capturer,
    /// The newest epoch that the standby holds and that the capturer's knowledge is of.
    base: Option<EpochId>,
    /// An epoch whose outcome is unknown.
    unsettled: Option<EpochId>,
    next: Epoch,
    /// Frozen time of the last committed epoch, and that with its shipping.
    last_frozen: Duration,
    last_cost: Option<Duration>,
    /// The standby has accepted the workload, and nothing has gone wrong since.
    offered: bool,
}

/// What a step came to.
enum Step {
    Committed,
    /// The tree is on the other host.
    Gone,
}

/// What the owner permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Permit {
    /// False while the copy is frozen by its guard: CRIU could not dump it.
    pub(super) may_capture: bool,
    /// The least number of an epoch whose commit lets the standby promote.
    pub(super) first_epoch: Epoch,
}

impl Session {
    /// Runs until the owner drops it. `capturer` is fresh.
    pub(super) async fn run(mut self, capturer: Capturer) {
        let next = Epoch(1);
        let mut progress = Progress {
            capturer,
            base: None,
            unsettled: None,
            next,
            last_cost: None,
            last_frozen: Duration::ZERO,
            offered: false,
        };
        let mut pace = Pace::new(Duration::from_millis(self.spec.every_ms));
        let mut order: Option<HandoffOrder> = None;
        loop {
            let Ok(permit) = self.permit.wait_for(|permit| permit.may_capture).await.map(|permit| *permit)
            else {
                return;
            };
            progress.next = progress.next.max(permit.first_epoch);
            let began = Instant::now();
            let Some((back, outcome)) = self.step(progress, &mut order).await else { return };
            progress = back;
            match outcome {
                Ok(Step::Gone) => return,
                Ok(Step::Committed) => pace.committed(began, Instant::now(), progress.last_frozen),
                Err(error) => {
                    progress.offered = false;
                    pace.failed(Instant::now());
                    if let Some(order) = order.take() {
                        // The one who asked may have gone away.
                        let _ = order.done.send(Err(error));
                    } else if self.owner.send(Msg::EpochFailed { term: self.term, error }).await.is_err() {
                        return;
                    }
                }
            }
            let due = tokio::time::Instant::from_std(pace.due(Instant::now()));
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                received = self.orders.recv() => match received {
                    Some(Order::Handoff(handoff)) => order = Some(handoff),
                    None => return,
                },
            }
        }
    }

    /// One epoch, or a whole handoff if one is ordered. `None`: the capturer was lost with its thread, or the owner is
    /// gone.
    async fn step(
        &mut self,
        mut progress: Progress,
        order: &mut Option<HandoffOrder>,
    ) -> Option<(Progress, Result<Step, SessionError>)> {
        if !progress.offered {
            if let Err(error) = self.offer(&mut progress).await {
                return Some((progress, Err(error)));
            }
            progress.offered = true;
        }
        let Some(HandoffOrder { max_downtime, done }) = order.take() else {
            let (progress, result) = self.epoch(progress).await?;
            return Some((progress, result.map(|()| Step::Committed)));
        };
        let (mut progress, result) = self.handoff(progress, max_downtime).await?;
        let step = if result.as_ref().is_ok_and(|done| done.killed) { Step::Gone } else { Step::Committed };
        // Whatever became of it, what the standby holds is asked anew.
        progress.offered = false;
        let _ = done.send(result);
        Some((progress, Ok(step)))
    }

    /// Offers the workload to the standby and settles what it holds.
    async fn offer(&mut self, progress: &mut Progress) -> Result<(), SessionError> {
        if tokio::time::timeout(OFFER_TIMEOUT, self.link.up()).await.is_err() {
            return Err(SessionError::NoConnection);
        }
        let lease = self.link.lease().ok_or(SessionError::NoConnection)?;
        let resident_bytes = tokio::task::block_in_place(|| progress.capturer.resident_bytes())?;
        let request = Request::Offer { spec: self.spec.clone(), term: self.term, resident_bytes };
        let held = match lease.request(&request, OFFER_TIMEOUT).await? {
            Reply::Accepted { held } => held,
            Reply::Refused { reason, .. } => return Err(SessionError::Refused(reason)),
            other => return Err(SessionError::Refused(format!("an answer that makes no sense: {other:?}"))),
        };
        if let Some(unsettled) = progress.unsettled.take() {
            if held == Some(unsettled) {
                progress.capturer.committed();
                progress.base = held;
            } else {
                progress.capturer.failed();
            }
        }
        if progress.base != held {
            progress.base = None;
        }
        if let Some(held) = held.filter(|held| held.term == self.term) {
            progress.next = progress.next.max(Epoch(held.epoch.0 + 1));
        }
        Ok(())
    }

    /// One epoch. `None`: the capturer was lost with its thread, or the owner is gone.
    async fn epoch(&mut self, progress: Progress) -> Option<(Progress, Result<(), SessionError>)> {
        let (progress, result) = self.capture_and_ship(progress, None).await?;
        let result = match result {
            Ok((figures, _)) => {
                self.owner.send(Msg::EpochCommitted(figures)).await.ok()?;
                Ok(())
            }
            Err(error) => Err(error),
        };
        Some((progress, result))
    }

    /// Pre-copy epochs until the last one's cost fits the budget, then the final one.
    async fn handoff(
        &mut self,
        mut progress: Progress,
        max_downtime: Duration,
    ) -> Option<(Progress, Result<HandoffDone, SessionError>)> {
        const ROUNDS_MAX: u32 = 10;
        /// What restoring on the target takes beside shipping.
        const RESTORE_ALLOWANCE: Duration = Duration::from_millis(60);
        let mut rounds = 0;
        loop {
            let (back, result) = self.epoch(progress).await?;
            progress = back;
            if let Err(error) = result {
                return Some((progress, Err(error)));
            }
            rounds += 1;
            let cost = progress.last_cost.unwrap_or_default() + RESTORE_ALLOWANCE;
            if cost <= max_downtime {
                break;
            }
            if rounds == ROUNDS_MAX {
                let needed_ms = cost.as_millis() as u64;
                return Some((progress, Err(SessionError::NoConvergence { rounds, needed_ms })));
            }
        }
        let (verdict, judged) = std::sync::mpsc::channel();
        let (progress, result) = self.capture_and_ship(progress, Some((verdict, judged))).await?;
        let result = result.map(|(figures, killed)| HandoffDone { rounds, id: figures.id, killed });
        Some((progress, result))
    }

    /// Captures and ships at the same time. With a verdict's channel it is the final epoch of a handoff: the tree stays
    /// frozen until the owner has judged.
    async fn capture_and_ship(
        &mut self,
        mut progress: Progress,
        verdict: Option<(std::sync::mpsc::Sender<bool>, std::sync::mpsc::Receiver<bool>)>,
    ) -> Option<(Progress, Result<(EpochFigures, bool), SessionError>)> {
        let id = EpochId { term: self.term, epoch: progress.next };
        progress.next = Epoch(progress.next.0 + 1);
        let head = FrameHead::Begin {
            name: self.name.clone(),
            id,
            base: progress.base.filter(|_| !progress.capturer.needs_full()),
        };
        let (frames_tx, frames) = mpsc::channel::<(FrameHead, Vec<u8>)>(FRAMES_MAX);
        let (verdict, judged) = verdict.unzip();
        let owner = self.owner.clone();
        let mut capturer = progress.capturer;
        let rate = capturer.link();
        let capturing = tokio::task::spawn_blocking(move || {
            let mut emit = |head, body| {
                frames_tx
                    .blocking_send((head, body))
                    .map_err(|_| std::io::Error::other("the connection to the standby is lost"))
            };
            let mut hold = || {
                let (held_tx, held) = oneshot::channel();
                owner.blocking_send(Msg::Hold(held_tx)).is_ok() && held.blocking_recv().unwrap_or(false)
            };
            // No verdict (the session has ended) is no: the tree runs on, or its owner has cut it off.
            let mut conclude = |_: &_| judged.as_ref().is_some_and(|judged| judged.recv().unwrap_or(false));
            let finish = if judged.is_some() {
                Finish::Final { hold: &mut hold, conclude: &mut conclude }
            } else {
                Finish::Continue
            };
            let result = capturer.capture(head, finish, &mut emit);
            (capturer, result)
        });
        let thawed_by = Instant::now();
        let shipped = self.ship(id, frames, &rate, verdict).await;
        let shipped_at = Instant::now();
        let (capturer, captured) = capturing.await.ok()?;
        progress.capturer = capturer;
        let (progress, result) = settle(progress, id, captured, shipped, thawed_by, shipped_at);
        // The next freeze shall not wait for a CRIU to start.
        let mut progress = progress;
        if result.is_ok() {
            let (back, _) = tokio::task::spawn_blocking(move || {
                let spawned = progress.capturer.spawn_ahead();
                (progress, spawned)
            })
            .await
            .ok()?;
            progress = back;
        }
        Some((progress, result))
    }

    /// Sends an epoch's frames and its end, and takes the link's rate. `verdict` (a handoff) is handed to the owner with
    /// the commit.
    async fn ship(
        &mut self,
        id: EpochId,
        mut frames: mpsc::Receiver<(FrameHead, Vec<u8>)>,
        rate: &LinkRate,
        verdict: Option<std::sync::mpsc::Sender<bool>>,
    ) -> Result<Shipped, SessionError> {
        let bulk = self.link.bulk().ok_or(SessionError::NoConnection)?;
        let mut sender = bulk.send_epoch().await?;
        let mut whole = false;
        // What the link itself takes: without the wait for frames, and with that for the commit of what is buffered.
        let (mut told, mut busy) = (0, Duration::ZERO);
        while let Some((head, body)) = frames.recv().await {
            whole = matches!(head, FrameHead::Manifest(_));
            let began = Instant::now();
            sender.frame(&head, &body).await?;
            busy += began.elapsed();
            if sender.bytes() - told >= RATE_EVERY_BYTES {
                rate.shipped(sender.bytes() - told, busy);
                (told, busy) = (sender.bytes(), Duration::ZERO);
            }
            if whole {
                break;
            }
        }
        if !whole {
            // The capture has failed and says why.
            return Err(SessionError::Ended);
        }
        // The rest of a capture that goes on (CRIU ending its dump) must not meet a closed channel.
        let (permit, permitted) = oneshot::channel();
        self.owner.send(Msg::AskCommit { id, permit }).await.map_err(|_| SessionError::Ended)?;
        match tokio::time::timeout(PERMISSION_TIMEOUT, permitted).await {
            Ok(Ok(())) => {}
            _ => return Err(SessionError::NoPermission),
        }
        let bytes = sender.bytes();
        let asked = Instant::now();
        let answer = sender.finish(COMMIT_TIMEOUT).await?;
        match answer {
            EpochAnswer::Committed { id: committed } if committed == id => {}
            EpochAnswer::Committed { .. } => {
                return Err(SessionError::Refused("it committed another epoch".into()));
            }
            EpochAnswer::NeedFull { reason, .. } => return Err(SessionError::NeedFull(reason)),
            EpochAnswer::Refused { reason, .. } => return Err(SessionError::Refused(reason)),
        }
        rate.shipped(bytes - told, busy + asked.elapsed());
        tracing::trace!(%id, commit_us = asked.elapsed().as_micros() as u64, "committed");
        if let Some(verdict) = verdict {
            self.owner.send(Msg::FinalCommitted { id, verdict }).await.map_err(|_| SessionError::Ended)?;
        }
        Ok(Shipped { bytes })
    }
}

struct Shipped {
    bytes: u64,
}

/// Brings together how capture and shipping went.
fn settle(
    mut progress: Progress,
    id: EpochId,
    captured: Result<Captured, CaptureError>,
    shipped: Result<Shipped, SessionError>,
    began: Instant,
    shipped_at: Instant,
) -> (Progress, Result<(EpochFigures, bool), SessionError>) {
    let error = match (captured, shipped) {
        (Ok(Captured { mut figures, killed, .. }), Ok(shipped)) => {
            progress.capturer.committed();
            progress.base = Some(id);
            figures.shipped_bytes = shipped.bytes;
            let total_us = (shipped_at - began).as_micros() as u64;
            figures.ship_us = total_us.saturating_sub(figures.capture_us);
            progress.last_frozen = Duration::from_micros(figures.frozen_us);
            progress.last_cost = Some(progress.last_frozen + Duration::from_micros(figures.ship_us));
            return (progress, Ok((figures, killed)));
        }
        (Err(error), Ok(_)) => {
            // Committed, and then CRIU failed to end its dump: the standby holds it all the same.
            progress.capturer.committed();
            progress.base = Some(id);
            return (progress, Err(error.into()));
        }
        // The link's error is why emitting failed.
        (Err(CaptureError::Io(_)) | Ok(_), Err(error)) => error,
        (Err(error), Err(_)) => error.into(),
    };
    match &error {
        SessionError::NeedFull(_) => {
            progress.capturer.failed();
            progress.base = None;
        }
        SessionError::Send(_) | SessionError::NoConnection => progress.unsettled = Some(id),
        _ => progress.capturer.failed(),
    }
    (progress, Err(error))
}
