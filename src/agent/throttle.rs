//! Slows a workload down: for a handoff that would not come to its end otherwise, and while too much of its output waits.
//!
//! ```text
//!  brake of the session ── a handoff's wish ──┐
//!                          released: a freeze ├──► Speed ──► the workload's init
//!  valve of the output ── the queue's wish ───┘
//! ```
//!
//! The workload's init does it (freezing the tree's cgroup for most of each few milliseconds), asked by whoever wishes it: the
//! owner may be busy for longer than the queue takes to fill. It ends when the init is told, when the agent's connection to it
//! closes, or when the guard fires: never is a workload left slow by an agent that died. The slower wish counts, but none
//! during a freeze: CRIU's work in the frozen tasks needs all of their time.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU8, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::task::JoinHandle;

use super::{home::Home, output, owner::Owner, standby::lock};
use crate::{
    takeover::hold::{Fill, Hold},
    transport::block_in_place,
    workload::keeper::{Keeper, Throttler},
};

/// The whole of its time.
pub(super) const FULL_SPEED: u8 = 100;
/// So often it is looked how much output waits, while any does.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// For which share of its time a workload may run, in percent, as far as output that waits is concerned.
fn share_at(fill: Fill) -> u8 {
    match fill {
        Fill::Little => FULL_SPEED,
        Fill::Much => 20,
        Fill::TooMuch => 0,
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
    /// One tells it at a time, and by this.
    way: Mutex<Way>,
}

/// How its init is told.
#[derive(Debug)]
enum Way {
    Nowhere,
    Init(Throttler),
    #[cfg(test)]
    Noted {
        told: Vec<u8>,
        refuses: bool,
    },
}

impl Way {
    fn tell(&mut self, run_percent: u8) -> Result<(), String> {
        let told = match self {
            Self::Nowhere => None,
            Self::Init(throttler) => throttler.set(run_percent),
            #[cfg(test)]
            Self::Noted { told, refuses } => {
                told.push(run_percent);
                return if std::mem::take(refuses) { Err("not now".to_owned()) } else { Ok(()) };
            }
        };
        told.ok_or("the workload's place is gone")?.map_err(|error| error.to_string())
    }
}

impl Speed {
    pub(super) fn full() -> Arc<Self> {
        let full = || AtomicU8::new(FULL_SPEED);
        Arc::new(Self {
            handoff: full(),
            queue: full(),
            released: AtomicBool::new(false),
            applied: full(),
            way: Mutex::new(Way::Nowhere),
        })
    }

    fn wanted(&self) -> u8 {
        let wish = self.handoff.load(SeqCst).min(self.queue.load(SeqCst));
        if self.released.load(SeqCst) { FULL_SPEED } else { wish }
    }

    /// Has the workload run as fast as is wished now; blocks.
    fn settle(&self) -> Result<(), String> {
        let mut way = lock(&self.way);
        let wanted = self.wanted();
        if self.applied.load(SeqCst) == wanted {
            return Ok(());
        }
        way.tell(wanted)?;
        self.applied.store(wanted, SeqCst);
        Ok(())
    }

    /// One whose guard has fired knows nothing of it.
    pub(super) fn forget(&self) {
        self.applied.store(FULL_SPEED, SeqCst);
    }

    /// It is this one's tree from now on. One that was made anew knows nothing of it.
    fn follow(&self, keeper: Option<&Keeper>) {
        let mut way = lock(&self.way);
        match (&*way, keeper) {
            (Way::Init(throttler), Some(keeper)) if throttler.is_of(keeper) => {}
            (Way::Nowhere, None) => {}
            (_, keeper) => {
                *way = keeper.map_or(Way::Nowhere, |keeper| Way::Init(keeper.throttler()));
                self.forget();
            }
        }
    }
}

/// A session's hold on the workload's speed.
#[derive(Clone)]
pub(super) struct Brake(Arc<Speed>);

impl Brake {
    pub(super) fn new(speed: &Arc<Speed>) -> Self {
        Self(Arc::clone(speed))
    }

    /// Sets how slow it is to be from now on for a handoff; 100 ends it. No freeze is under way. An error: it cannot be
    /// slowed down.
    pub(super) fn set(&self, run_percent: u8) -> Result<(), String> {
        self.0.released.store(false, SeqCst);
        let before = self.0.handoff.swap(run_percent, SeqCst);
        let set = self.0.settle();
        if set.is_err() {
            self.0.handoff.store(before, SeqCst);
        }
        set
    }

    /// Back to what was set, after a release.
    pub(super) fn press(&self) {
        self.0.released.store(false, SeqCst);
        if let Err(error) = self.0.settle() {
            tracing::warn!(error, "the workload is not slowed down");
        }
    }

    /// Full speed for a while, whatever is wished meanwhile.
    pub(super) fn release(&self) {
        self.0.released.store(true, SeqCst);
        if let Err(error) = self.0.settle() {
            tracing::warn!(error, "the workload is still slowed down");
        }
    }
}

/// Slows the workload down while too much of its output waits, and stops it before the kernel would drop any. It goes by the
/// queue alone: epochs may be as long as they like, or fail.
pub(super) struct Valve {
    hold: Arc<Hold>,
    task: JoinHandle<()>,
}

impl Valve {
    fn open(hold: Arc<Hold>, speed: Arc<Speed>) -> Option<Self> {
        let fd = output::watch(&hold)?;
        let watched = Arc::clone(&hold);
        let task = tokio::spawn(async move {
            loop {
                let fill = watched.fill();
                let share = fill.map_or(FULL_SPEED, share_at);
                if speed.queue.swap(share, SeqCst) != share {
                    tracing::debug!(?fill, "output waits");
                }
                if let Err(error) = block_in_place(|| speed.settle()) {
                    tracing::warn!(error, "output fills its queue");
                }
                if fill.is_none() {
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
        self.speed.follow(self.home.as_ref().map(Home::keeper));
        block_in_place(|| self.speed.settle())
    }

    /// A valve is there exactly while output may wait.
    pub(super) fn tend_valve(&mut self) {
        self.speed.follow(self.home.as_ref().map(Home::keeper));
        let hold = self.home.as_ref().and_then(|home| home.hold()).filter(|hold| hold.can_hold_output());
        let hold = hold.filter(|_| self.owes_output());
        match (&self.valve, hold) {
            (None, None) => {}
            (Some(valve), Some(hold)) if Arc::ptr_eq(&valve.hold, hold) => {}
            (_, Some(hold)) => {
                self.valve = Valve::open(Arc::clone(hold), Arc::clone(&self.speed));
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

    /// Told to an init that refuses at first.
    fn noted() -> (Brake, Arc<Speed>) {
        let speed = Speed::full();
        *lock(&speed.way) = Way::Noted { told: Vec::new(), refuses: true };
        (Brake::new(&speed), speed)
    }

    fn told(speed: &Speed) -> Vec<u8> {
        match &*lock(&speed.way) {
            Way::Noted { told, .. } => told.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_not_done_is_asked_for_again_and_what_was_is_not() {
        let (brake, speed) = noted();
        brake.set(20).unwrap_err();
        brake.set(20).unwrap();
        brake.set(20).unwrap();
        brake.release();
        brake.release();
        brake.press();
        brake.set(FULL_SPEED).unwrap();
        assert_eq!(told(&speed), [20, 20, FULL_SPEED, 20, FULL_SPEED]);
    }

    #[test]
    fn the_slower_wish_counts_and_none_during_a_freeze() {
        let (brake, speed) = noted();
        brake.set(50).unwrap_err();
        brake.set(50).unwrap();
        speed.queue.store(0, SeqCst);
        speed.settle().unwrap();
        brake.release();
        speed.queue.store(20, SeqCst);
        speed.settle().unwrap();
        brake.press();
        speed.queue.store(FULL_SPEED, SeqCst);
        speed.settle().unwrap();
        assert_eq!(told(&speed), [50, 50, 0, FULL_SPEED, 20, 50]);
    }

    #[test]
    fn without_a_place_nothing_is_slowed_down() {
        let speed = Speed::full();
        let brake = Brake::new(&speed);
        brake.set(FULL_SPEED).unwrap();
        brake.set(20).unwrap_err();
    }
}
