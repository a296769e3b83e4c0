//! Slows a workload down: for a handoff that would not come to its end otherwise, and while too much of its output waits.
//!
//! ```text
//!  brake of the session ── a handoff's wish ──┐
//!                          released: a freeze ├──► Speed ──► the owner asks the workload's init
//!  valve of the output ── the queue's wish ───┘
//! ```
//!
//! The workload's init does it (freezing the tree's cgroup for most of each few milliseconds), asked by the owner. It
//! ends when the init is told, when the agent's connection to it closes, or when the guard fires: never is a workload
//! left slow by an agent that died. The slower wish counts, but none during a freeze: CRIU's work in the frozen tasks needs
//! all of their time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use super::{mailbox::Msg, output, owner::Owner};
use crate::{
    takeover::hold::{Fill, Hold},
    transport::block_in_place,
};

/// The whole of its time.
pub(super) const FULL_SPEED: u8 = 100;
/// So often it is looked how much output waits, while any does. At a million packets a second a queue that is a quarter full
/// is not full then.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// For which share of its time a workload may run, in percent, as far as output that waits is concerned.
fn share_at(fill: Fill) -> u8 {
    match fill {
        Fill::Little => FULL_SPEED,
        Fill::Quarter => 20,
        Fill::Half => 0,
    }
}

/// For which share of its time a workload is to run, in percent, and does.
#[derive(Debug)]
pub(super) struct Speed {
    handoff: AtomicU8,
    queue: AtomicU8,
    released: AtomicBool,
    /// What its init was told last.
    applied: AtomicU8,
}

impl Speed {
    pub(super) fn full() -> Arc<Self> {
        let full = || AtomicU8::new(FULL_SPEED);
        Arc::new(Self { handoff: full(), queue: full(), released: AtomicBool::new(false), applied: full() })
    }

    fn wanted(&self) -> u8 {
        let wish = self.handoff.load(SeqCst).min(self.queue.load(SeqCst));
        if self.released.load(SeqCst) { FULL_SPEED } else { wish }
    }

    fn is_applied(&self) -> bool {
        self.applied.load(SeqCst) == self.wanted()
    }

    /// A place that was made anew knows nothing of it, nor does one whose guard has fired.
    pub(super) fn forget(&self) {
        self.applied.store(FULL_SPEED, SeqCst);
    }
}

/// A session's hold on the workload's speed.
#[derive(Clone)]
pub(super) struct Brake {
    owner: mpsc::Sender<Msg>,
    speed: Arc<Speed>,
}

impl Brake {
    pub(super) fn new(owner: mpsc::Sender<Msg>, speed: Arc<Speed>) -> Self {
        Self { owner, speed }
    }

    /// Sets how slow it is to be from now on for a handoff; 100 ends it. No freeze is under way. An error: it cannot be
    /// slowed down.
    pub(super) async fn set(&self, run_percent: u8) -> Result<(), String> {
        self.speed.released.store(false, SeqCst);
        let before = self.speed.handoff.swap(run_percent, SeqCst);
        let set = self.settle().await;
        if set.is_err() {
            self.speed.handoff.store(before, SeqCst);
        }
        set
    }

    /// Back to what was set, after a release.
    pub(super) async fn press(&self) {
        self.speed.released.store(false, SeqCst);
        if let Err(error) = self.settle().await {
            tracing::warn!(error, "the workload is not slowed down");
        }
    }

    /// Full speed for a while, whatever is wished meanwhile.
    pub(super) async fn release(&self) {
        self.speed.released.store(true, SeqCst);
        if let Err(error) = self.settle().await {
            tracing::warn!(error, "the workload is still slowed down");
        }
    }

    async fn settle(&self) -> Result<(), String> {
        if self.speed.is_applied() {
            return Ok(());
        }
        let (answer, answered) = oneshot::channel();
        let gone = || "the workload has no owner any more".to_owned();
        self.owner.send(Msg::Throttle(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

/// Slows the workload down while too much of its output waits, and stops it before the kernel would drop any. It goes by the
/// queue alone: epochs may be as long as they like, or fail.
pub(super) struct Valve {
    hold: Arc<Hold>,
    task: JoinHandle<()>,
}

impl Valve {
    fn open(hold: Arc<Hold>, brake: Brake) -> Option<Self> {
        let fd = output::watch(&hold)?;
        let watched = Arc::clone(&hold);
        let task = tokio::spawn(async move {
            loop {
                let fill = watched.fill();
                if brake.speed.queue.swap(share_at(fill), SeqCst) != share_at(fill) {
                    tracing::debug!(?fill, "output waits");
                }
                if let Err(error) = brake.settle().await {
                    tracing::warn!(error, "output fills its queue");
                }
                if fill == Fill::Little && !watched.has_any() {
                    let Ok(mut ready) = fd.readable().await else { return };
                    ready.clear_ready();
                }
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        });
        Some(Self { hold, task })
    }
}

impl Drop for Valve {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Owner {
    /// Has the workload run as fast as is wished now.
    pub(super) fn throttle(&self) -> Result<(), String> {
        let run_percent = self.speed.wanted();
        if self.speed.is_applied() {
            return Ok(());
        }
        let home = self.home.as_ref().ok_or("the workload's place is gone")?;
        block_in_place(|| home.keeper().throttle(run_percent)).map_err(|error| error.to_string())?;
        self.speed.applied.store(run_percent, SeqCst);
        Ok(())
    }

    /// A valve is there exactly while output may wait.
    pub(super) fn tend_valve(&mut self) {
        let hold = self.home.as_ref().and_then(|home| home.hold()).filter(|hold| hold.can_hold_output());
        let hold = hold.filter(|_| self.owes_output());
        match (&self.valve, hold) {
            (None, None) => {}
            (Some(valve), Some(hold)) if Arc::ptr_eq(&valve.hold, hold) => {}
            (_, Some(hold)) => {
                let brake = Brake::new(self.to_self.clone(), Arc::clone(&self.speed));
                self.valve = Valve::open(Arc::clone(hold), brake);
            }
            (Some(_), None) => {
                self.valve = None;
                self.speed.queue.store(FULL_SPEED, SeqCst);
                // A tree that is gone, or stands, runs no faster.
                let _ = self.throttle();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers as an owner would whose workload's init refuses at first.
    fn owner(speed: &Arc<Speed>) -> (Brake, JoinHandle<Vec<u8>>) {
        let (owner, mut inbox) = mpsc::channel(4);
        let answering = Arc::clone(speed);
        let told = tokio::spawn(async move {
            let mut asked = Vec::new();
            while let Some(Msg::Throttle(answer)) = inbox.recv().await {
                let done = if asked.is_empty() { Err("not now".to_owned()) } else { Ok(()) };
                asked.push(answering.wanted());
                if done.is_ok() {
                    answering.applied.store(answering.wanted(), SeqCst);
                }
                answer.send(done).unwrap();
            }
            asked
        });
        (Brake::new(owner, Arc::clone(speed)), told)
    }

    #[tokio::test]
    async fn what_was_not_done_is_asked_for_again_and_what_was_is_not() {
        let speed = Speed::full();
        let (brake, told) = owner(&speed);
        brake.set(20).await.unwrap_err();
        brake.set(20).await.unwrap();
        brake.set(20).await.unwrap();
        brake.release().await;
        brake.release().await;
        brake.press().await;
        brake.set(FULL_SPEED).await.unwrap();
        drop(brake);
        assert_eq!(told.await.unwrap(), [20, 20, FULL_SPEED, 20, FULL_SPEED]);
    }

    #[tokio::test]
    async fn the_slower_wish_counts_and_none_during_a_freeze() {
        let speed = Speed::full();
        let (brake, told) = owner(&speed);
        brake.set(50).await.unwrap_err();
        brake.set(50).await.unwrap();
        speed.queue.store(0, SeqCst);
        brake.settle().await.unwrap();
        brake.release().await;
        speed.queue.store(20, SeqCst);
        brake.settle().await.unwrap();
        brake.press().await;
        speed.queue.store(FULL_SPEED, SeqCst);
        brake.settle().await.unwrap();
        drop(brake);
        assert_eq!(told.await.unwrap(), [50, 50, 0, FULL_SPEED, 20, 50]);
    }
}
