//! An epoch under way: captured on a thread, shipped by a task, so that the next one can be captured meanwhile.
//!
//! ```text
//!  capture ──frames──► ship ──► commit
//!     (at most a few      └─ begins when the epoch before is committed
//!      wait in between)
//! ```
//!
//! What can be done before the freeze may be done ahead: then the epoch waits until it is wanted ([`Capturing::go`]).

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc as std_mpsc,
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, JoinSet},
};

use super::{
    links::Link,
    mailbox::Msg,
    output::{self, Around},
    session::SessionError,
    standby::lock,
    throttle::Brake,
};
use crate::{
    capture::{
        CaptureError, Captured, Capturer, Finish, Stage,
        pace::{Cost, Freeze},
    },
    delta::LinkRate,
    model::{EpochFigures, EpochId},
    takeover::hold::Hold,
    transport::{Connection, EpochSender},
    wire::message::{EpochAnswer, FrameHead},
};

/// Frames between capture and QUIC: with bodies of up to a MiB, what an epoch may hold in between.
const FRAMES_MAX: usize = 8;
/// So often the rate of a long shipment is taken. More than the transport buffers, which takes no time.
const RATE_EVERY_BYTES: u64 = 128 << 20;
/// How long the standby may take to verify and commit an epoch.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long permission to commit may be waited for: the lease must hold for it.
const PERMISSION_TIMEOUT: Duration = Duration::from_secs(5);

type Frame = (FrameHead, Vec<u8>);

/// The capturer, or the thread that works with it.
pub(super) enum Hand {
    Here(Box<Capturer>),
    Away(JoinHandle<Box<Capturer>>),
    Lost,
}

impl Hand {
    /// The capturer, when its thread is done. `None`: it was lost with it.
    pub(super) async fn get(&mut self) -> Option<&mut Capturer> {
        if let Self::Away(thread) = self {
            *self = Self::Here(thread.await.ok()?);
        }
        match self {
            Self::Here(capturer) => Some(capturer),
            Self::Away(_) | Self::Lost => None,
        }
    }
}

/// How long a capture waited before its freeze, since it was wanted.
#[derive(Default)]
struct Waits {
    /// Since when no other epoch had the link.
    free: Option<Instant>,
    /// When the freeze was begun.
    frozen: Option<Instant>,
    all: Duration,
    /// Of it: for the link, which it had to itself.
    alone: Duration,
}

impl Waits {
    /// For the link.
    fn add(&mut self, from: Instant, to: Instant) {
        if self.frozen.is_none() {
            self.all += to - from;
            self.alone +=
                self.free.map_or(Duration::ZERO, |free| to.saturating_duration_since(free.max(from)));
        }
    }
}

/// An epoch that is being captured.
pub(super) struct Capturing {
    id: EpochId,
    /// When it was wanted.
    began: Instant,
    go: Option<std_mpsc::Sender<()>>,
    frames: mpsc::Receiver<Frame>,
    result: oneshot::Receiver<Result<Captured, CaptureError>>,
    waits: Arc<Mutex<Waits>>,
    rate: Arc<LinkRate>,
}

/// The final epoch of a handoff: the tree stays frozen until the owner has judged.
pub(super) struct Final {
    pub(super) verdict: std_mpsc::Sender<bool>,
    pub(super) judged: Judged,
    /// Whether the owner was asked to hold the workload: what fails from then on is the owner's matter.
    pub(super) held: Arc<AtomicBool>,
}

/// The capturing side of a [`Final`].
pub(super) struct Judged {
    verdict: std_mpsc::Receiver<bool>,
    held: Arc<AtomicBool>,
}

impl Final {
    pub(super) fn new() -> Self {
        let ((verdict, judged), held) = (std_mpsc::channel(), Arc::new(AtomicBool::new(false)));
        Self { verdict, judged: Judged { verdict: judged, held: Arc::clone(&held) }, held }
    }
}

/// How an epoch is captured.
pub(super) struct How {
    /// It is frozen then at the earliest.
    pub(super) freeze_after: Option<Instant>,
    /// It is the final one of a handoff, and this is its verdict.
    pub(super) judged: Option<Judged>,
    /// What is done with the workload's packets.
    pub(super) around: Around,
    /// It waits, with what can be done ahead, until it is wanted.
    pub(super) ahead: bool,
}

/// Begins to capture an epoch.
pub(super) fn begin(
    mut capturer: Box<Capturer>,
    (id, head): (EpochId, FrameHead),
    how: How,
    owner: mpsc::Sender<Msg>,
    brake: Brake,
) -> (Hand, Capturing) {
    let How { freeze_after, judged, around, ahead } = how;
    let (frames_tx, frames) = mpsc::channel::<Frame>(FRAMES_MAX);
    let (result_tx, result) = oneshot::channel();
    let waits = Arc::new(Mutex::new(Waits::default()));
    let rate = capturer.link();
    let (go, wanted) = std_mpsc::channel();
    let (go, mut wanted) = if ahead { (Some(go), Some(wanted)) } else { (None, None) };
    let (waiting, began) = (Arc::clone(&waits), Instant::now());
    let thread = tokio::task::spawn_blocking(move || {
        let (freezing, releasing) = (Arc::clone(&waiting), brake.clone());
        let last = judged.is_some();
        capturer.on_stages(Box::new(move |stage| {
            if stage == Stage::Ready
                && let Some(wanted) = wanted.take()
                && wanted.recv().is_err()
            {
                return Err(io::Error::other("the epoch is not wanted any more"));
            }
            if stage == Stage::Freezing {
                let early =
                    freeze_after.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()));
                std::thread::sleep(early);
                let mut waits = lock(&freezing);
                waits.all += early;
                waits.frozen = Some(Instant::now());
            }
            // First of all: packets may take long.
            if stage == Stage::Running && !last {
                releasing.press();
            }
            let held = around.at(stage);
            if stage == Stage::Frozen {
                // CRIU's work in the frozen tasks needs all of their time; before, they would have it.
                releasing.release();
            }
            held
        }));
        let mut emit = |head, body| {
            let from = Instant::now();
            let sent = frames_tx.blocking_send((head, body));
            lock(&waiting).add(from, Instant::now());
            sent.map_err(|_| io::Error::other("the connection to the standby is lost"))
        };
        let mut hold = || {
            if let Some(judged) = &judged {
                judged.held.store(true, Ordering::Release);
            }
            let (held_tx, held) = oneshot::channel();
            owner.blocking_send(Msg::Hold(held_tx)).is_ok() && held.blocking_recv().unwrap_or(false)
        };
        // No verdict (the session has ended) is no: the tree runs on, or its owner has cut it off.
        let mut conclude =
            |_: &_| judged.as_ref().is_some_and(|judged| judged.verdict.recv().unwrap_or(false));
        let finish =
            if last { Finish::Final { hold: &mut hold, conclude: &mut conclude } } else { Finish::Continue };
        let result = capturer.capture(head, finish, &mut emit);
        drop(frames_tx);
        // Where output waits, one has been begun on a thread of its own.
        let spawns = result.as_ref().is_ok_and(|captured| !captured.killed && !captured.figures.output_held);
        // Nobody waits any more if the session has ended.
        let _ = result_tx.send(result);
        // The next freeze shall not wait for a CRIU to start.
        if spawns && let Err(error) = capturer.spawn_ahead() {
            tracing::debug!(%error, "no CRIU waits for the next epoch");
        }
        capturer
    });
    (Hand::Away(thread), Capturing { id, began, go, frames, result, waits, rate })
}

impl Capturing {
    pub(super) fn id(&self) -> EpochId {
        self.id
    }

    /// It is wanted, now. Of one that was not begun ahead this is known.
    pub(super) fn go(&mut self) {
        if let Some(go) = self.go.take() {
            self.began = Instant::now();
            let mut waits = lock(&self.waits);
            *waits = Waits { free: waits.free, ..Waits::default() };
            // It fails if its thread has failed, which tells why.
            let _ = go.send(());
        }
    }

    /// It is not sent after all.
    pub(super) async fn abandon(self) {
        drop((self.frames, self.go));
        // It fails at its next frame.
        let _ = self.result.await;
    }

    /// Ships it from now on: no epoch before it is under way any more.
    pub(super) fn ship(
        self,
        link: &Link,
        owner: mpsc::Sender<Msg>,
        verdict: Option<std_mpsc::Sender<bool>>,
        hold: Option<Arc<Hold>>,
    ) -> Leaving {
        let free = Instant::now();
        lock(&self.waits).free = Some(free);
        let task =
            tokio::spawn(ship(link.clone(), owner, self.id, (self.frames, self.rate), (verdict, hold)));
        let epoch = Under { id: self.id, began: self.began, free, waits: self.waits };
        Leaving { epoch, task, captured: self.result }
    }
}

struct Under {
    id: EpochId,
    began: Instant,
    free: Instant,
    waits: Arc<Mutex<Waits>>,
}

/// An epoch that has the link while it is captured.
pub(super) struct Leaving {
    epoch: Under,
    task: JoinHandle<Result<Shipped, SessionError>>,
    captured: oneshot::Receiver<Result<Captured, CaptureError>>,
}

/// Why an epoch failed, and whether the standby holds it all the same.
pub(super) struct Failed {
    pub(super) id: EpochId,
    pub(super) error: SessionError,
    pub(super) held: bool,
}

impl Leaving {
    /// Waits until it is captured; what is left of it ships. `None`: the capturer was lost with its thread.
    pub(super) async fn captured(self) -> Option<Result<Shipping, Failed>> {
        let Self { epoch, task, captured } = self;
        let error = match captured.await.ok()? {
            Ok(captured) => return Some(Ok(Shipping { epoch, task, captured })),
            Err(error) => error,
        };
        let shipped = task.await.ok()?;
        let held = shipped.is_ok();
        let error = match (error, shipped) {
            // The link's error is why emitting failed.
            (CaptureError::Io(_), Err(error)) => error,
            // Committed, and then CRIU failed to end its dump: the standby holds it all the same.
            (error, _) => error.into(),
        };
        Some(Err(Failed { id: epoch.id, error, held }))
    }
}

/// A captured epoch on its way.
pub(super) struct Shipping {
    epoch: Under,
    task: JoinHandle<Result<Shipped, SessionError>>,
    captured: Captured,
}

/// A committed epoch.
pub(super) struct Committed {
    pub(super) figures: EpochFigures,
    pub(super) cost: Cost,
    pub(super) killed: bool,
}

impl Shipping {
    pub(super) fn id(&self) -> EpochId {
        self.epoch.id
    }

    /// Whether it carries all memory.
    pub(super) fn full(&self) -> bool {
        self.captured.figures.full
    }

    pub(super) fn frozen(&self) -> Duration {
        Duration::from_micros(self.captured.figures.frozen_us)
    }

    /// Since when it has the link to itself and all to ship.
    pub(super) fn since(&self) -> Instant {
        self.epoch.free.max(self.thawed())
    }

    pub(super) fn thawed(&self) -> Instant {
        self.captured.thawed
    }

    pub(super) fn freeze(&self) -> Freeze {
        let (thawed, frozen) = (self.thawed(), self.frozen());
        let begun = lock(&self.epoch.waits).frozen;
        let asked = begun.map_or(Duration::ZERO, |begun| thawed.saturating_duration_since(begun));
        let busy_percent = self.captured.busy_percent.unwrap_or(100);
        Freeze { thawed, frozen, stopping: asked.saturating_sub(frozen), busy_percent }
    }

    /// How long it took to do what can be done ahead.
    pub(super) fn ahead(&self) -> Duration {
        self.captured.ahead
    }

    /// It is not waited for any more: the standby hears no end of it, unless it has already.
    pub(super) async fn abandon(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    /// Waits until it is committed or has failed; may be dropped and called again. `None`: its task was lost.
    pub(super) async fn outcome(&mut self) -> Option<Result<Committed, Failed>> {
        let shipped = match (&mut self.task).await.ok()? {
            Ok(shipped) => shipped,
            Err(error) => return Some(Err(Failed { id: self.epoch.id, error, held: false })),
        };
        let mut figures = self.captured.figures.clone();
        figures.shipped_bytes = shipped.bytes;
        if let Some(resync) = &mut figures.resync {
            resync.resync_bytes += shipped.bytes;
            resync.full_bytes += shipped.bytes;
        }
        let from_thaw = shipped.at.saturating_duration_since(self.thawed());
        figures.ship_us = from_thaw.as_micros() as u64;
        let tail = shipped.at.saturating_duration_since(self.since());
        let (all, alone) = {
            let waits = lock(&self.epoch.waits);
            (waits.all, waits.alone)
        };
        let cost = Cost {
            capture: self.thawed().saturating_duration_since(self.epoch.began).saturating_sub(all),
            frozen: self.frozen(),
            latency: self.frozen() + from_thaw,
            ship: alone + tail,
            tail,
            standby: shipped.standby,
            full: figures.full,
        };
        Some(Ok(Committed { figures, cost, killed: self.captured.killed }))
    }
}

/// An epoch but for its end, and what of it the link's rate knows nothing yet.
struct Sent {
    sender: EpochSender,
    told: u64,
    busy: Duration,
}

/// Sends an epoch's frames up to its manifest.
async fn send_frames(
    bulk: Connection,
    mut frames: mpsc::Receiver<Frame>,
    rate: Arc<LinkRate>,
) -> Result<Sent, SessionError> {
    let mut sender = bulk.send_epoch().await?;
    // What the link itself takes: without the wait for frames, and with that for the commit of what is buffered.
    let (mut told, mut busy) = (0, Duration::ZERO);
    while let Some((head, body)) = frames.recv().await {
        let began = Instant::now();
        sender.frame(&head, body).await?;
        busy += began.elapsed();
        if sender.bytes() - told >= RATE_EVERY_BYTES {
            rate.shipped(sender.bytes() - told, busy);
            (told, busy) = (sender.bytes(), Duration::ZERO);
        }
        if let FrameHead::Manifest(_) = head {
            return Ok(Sent { sender, told, busy });
        }
    }
    // The capture has failed and says why.
    Err(SessionError::Ended)
}

struct Shipped {
    bytes: u64,
    at: Instant,
    /// What the standby kept the link waiting for.
    standby: Duration,
}

/// Sends an epoch's frames and its end. `verdict` (a handoff) is handed to the owner with the commit.
async fn ship(
    link: Link,
    owner: mpsc::Sender<Msg>,
    id: EpochId,
    (frames, rate): (mpsc::Receiver<Frame>, Arc<LinkRate>),
    (verdict, hold): (Option<std_mpsc::Sender<bool>>, Option<Arc<Hold>>),
) -> Result<Shipped, SessionError> {
    let bulk = link.bulk().ok_or(SessionError::NoConnection)?;
    // On bulk's thread; the set ends it with this call.
    let mut sending = JoinSet::new();
    sending.spawn_on(send_frames(bulk.clone(), frames, Arc::clone(&rate)), bulk.thread());
    let Some(Ok(sent)) = sending.join_next().await else { return Err(SessionError::NoConnection) };
    let Sent { sender, told, busy } = sent?;
    // The rest of a capture that goes on (CRIU ending its dump) must not meet a closed channel.
    let (permit, permitted) = oneshot::channel();
    owner.send(Msg::AskCommit { id, permit }).await.map_err(|_| SessionError::Ended)?;
    match tokio::time::timeout(PERMISSION_TIMEOUT, permitted).await {
        Ok(Ok(())) => {}
        _ => return Err(SessionError::NoPermission),
    }
    let (bytes, asked) = (sender.bytes(), Instant::now());
    let standby = match sender.finish(COMMIT_TIMEOUT).await? {
        EpochAnswer::Committed { id: committed, busy_us } if committed == id => {
            Duration::from_micros(busy_us)
        }
        other => return Err(SessionError::answered(other)),
    };
    let at = Instant::now();
    output::release(hold.as_ref(), id);
    rate.shipped(bytes - told, busy + (at - asked));
    if let Some(verdict) = verdict {
        owner.send(Msg::FinalCommitted { id, verdict }).await.map_err(|_| SessionError::Ended)?;
    }
    Ok(Shipped { bytes, at, standby })
}
