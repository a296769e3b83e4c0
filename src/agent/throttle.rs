//! Slows a workload down: for a handoff that would not come to its end otherwise, and while too much of its output waits.
//!
//! The workload's init does it (freezing the tree's cgroup for most of each few milliseconds), asked by the owner. It
//! ends when the init is told, when the agent's connection to it closes, or when the guard fires: never is a workload
//! left slow by an agent that died. A session has one brake, which its captures release for their freezes.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use tokio::sync::{mpsc, oneshot};

use super::{mailbox::Msg, owner::Owner};
use crate::transport::block_in_place;

/// The whole of its time.
pub(super) const FULL_SPEED: u8 = 100;

/// A session's hold on the workload's speed.
pub(super) struct Brake {
    owner: mpsc::Sender<Msg>,
    /// Share of its time for which the workload may run, in percent.
    run_percent: AtomicU8,
    pressed: AtomicBool,
}

impl Brake {
    pub(super) fn new(owner: mpsc::Sender<Msg>) -> Self {
        Self { owner, run_percent: AtomicU8::new(FULL_SPEED), pressed: AtomicBool::new(false) }
    }

    /// Sets how slow it is to be from now on; 100 ends it. An error: it cannot be slowed down.
    pub(super) async fn set(&self, run_percent: u8) -> Result<(), String> {
        if self.run_percent.load(Ordering::Relaxed) == run_percent {
            return Ok(());
        }
        self.ask(run_percent).await?;
        self.run_percent.store(run_percent, Ordering::Relaxed);
        self.pressed.store(run_percent < FULL_SPEED, Ordering::Relaxed);
        Ok(())
    }

    /// Whether it was released, and should not be.
    pub(super) fn is_slack(&self) -> bool {
        self.run_percent.load(Ordering::Relaxed) < FULL_SPEED && !self.pressed.load(Ordering::Relaxed)
    }

    /// Back to what was set, after a release.
    pub(super) async fn press(&self) {
        self.pressed.store(true, Ordering::Relaxed);
        if let Err(error) = self.ask(self.run_percent.load(Ordering::Relaxed)).await {
            tracing::warn!(error, "the workload is not slowed down");
        }
    }

    /// Full speed for a while.
    pub(super) async fn release(&self) {
        if self.pressed.swap(false, Ordering::Relaxed)
            && let Err(error) = self.ask(FULL_SPEED).await
        {
            tracing::warn!(error, "the workload is still slowed down");
        }
    }

    async fn ask(&self, run_percent: u8) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        let gone = || "the workload has no owner any more".to_owned();
        self.owner.send(Msg::Throttle { run_percent, answer }).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

impl Owner {
    /// Has the workload run for a share of its time only.
    pub(super) fn throttle(&self, run_percent: u8) -> Result<(), String> {
        let home = self.home.as_ref().ok_or("the workload's place is gone")?;
        block_in_place(|| home.keeper().throttle(run_percent)).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_not_done_is_asked_for_again_and_what_was_is_not() {
        let (owner, mut inbox) = mpsc::channel(4);
        let brake = Brake::new(owner);
        let answering = tokio::spawn(async move {
            let mut asked = Vec::new();
            while let Some(Msg::Throttle { run_percent, answer }) = inbox.recv().await {
                let done = if asked.is_empty() { Err("not now".to_owned()) } else { Ok(()) };
                asked.push(run_percent);
                answer.send(done).unwrap();
            }
            asked
        });
        brake.set(20).await.unwrap_err();
        brake.set(20).await.unwrap();
        brake.set(20).await.unwrap();
        brake.release().await;
        brake.release().await;
        assert!(brake.is_slack());
        brake.press().await;
        assert!(!brake.is_slack());
        brake.set(FULL_SPEED).await.unwrap();
        drop(brake);
        assert_eq!(answering.await.unwrap(), [20, 20, FULL_SPEED, 20, FULL_SPEED]);
    }
}
