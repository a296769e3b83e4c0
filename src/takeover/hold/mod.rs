//! Holding a workload's packets: what it sends until the state that it tells of is committed, and what is sent to it
//! while it is frozen.
//!
//! ```text
//!             freeze of epoch n                      n committed at the standby
//!   input   ──┤held├──────────────────────────────────────────────────────────►
//!   output  ────┬ marked n ─────────────────────────────┬ all up to mark n leave
//!               └ what is sent from here on waits for n+1
//! ```
//!
//! Invariants:
//! - A packet of the workload that is marked with an epoch was sent before that epoch's freeze; nothing behind the newest
//!   committed mark leaves while output is held.
//! - Input is held from before the freeze until the tree runs again (or, if it is handed off, until it runs elsewhere): nothing
//!   is acknowledged that is not in the image.
//! - It fails closed. Packets wait in the kernel, in queues of this process; when it ends they are dropped, as are all that
//!   come later until the next process has made the table anew. A device's end that the guard sets down drops what waits by it.

mod queue;
mod rules;

use std::{
    collections::VecDeque,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

pub(super) use self::rules::AFTER_QUEUES;
pub use self::rules::Marks;
use self::{
    queue::{PacketId, Queue},
    rules::{Direction, Rules},
};
use crate::{
    model::{EpochId, Name},
    workload::{guard::Guard, network::host_device},
};

/// The first queue that is tried; others' rules mostly use small numbers.
const QUEUE_FIRST: u16 = 21_000;

/// Why packets cannot be held.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The kernel has it not, or this host's rules.
    #[error(
        "this kernel cannot hold packets ({0}): it lacks nf_tables, nfnetlink_queue, or both nft_queue and \
         nft_compat with xt_NFQUEUE; `--commit async` needs none of them"
    )]
    Absent(#[source] Errno),
    /// The queue.
    #[error(
        "cannot {what} packets of the workload: {errno}; see `nft list ruleset` and /proc/net/netfilter/nfnetlink_queue"
    )]
    Kernel {
        /// Verb.
        what: &'static str,
        /// Cause.
        errno: Errno,
    },
    /// Nothing to be known by.
    #[error("the workload uses the host's own network: nothing tells its packets from others'")]
    NoDevice,
}

/// What is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Held {
    /// Whether output waits for its epoch, and the standby has one since it does.
    pub output: bool,
    /// Packets that wait; of those that leave together one.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How long the oldest of those that left last had waited, at most, milliseconds.
    pub delay_ms: f64,
    /// Packets that were dropped because too many waited.
    pub dropped: u64,
}

/// How much waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Nothing to do about it.
    Little,
    /// The workload is to be slowed down.
    Much,
    /// It is to stand.
    TooMuch,
}

/// So many packets are much, and so many too much; what the kernel has no room for, which is far more, it drops.
const MUCH: u64 = 4096;
const TOO_MUCH: u64 = 8192;

/// The packets of one workload.
#[derive(Debug)]
pub struct Hold {
    rules: Rules,
    guard: Option<Arc<Guard>>,
    /// The queue of output.
    output: u16,
    state: Mutex<State>,
    /// Readable when there is output that no mark covers.
    output_waits: OwnedFd,
}

#[derive(Debug)]
struct State {
    output: Queue,
    input: Queue,
    holds_output: bool,
    holds_input: bool,
    /// By then nothing waited that no mark covers.
    clear_at: Instant,
    marks: VecDeque<Marked>,
    /// The newest packet that a mark covers.
    marked: Option<PacketId>,
    /// The newest epoch for which the tree was frozen while output waited.
    frozen: Option<EpochId>,
    gated: bool,
    delay: Duration,
}

/// Output up to here was sent before this epoch's freeze.
#[derive(Clone, Copy, Debug)]
struct Marked {
    epoch: EpochId,
    newest: Option<PacketId>,
    /// None of those that it covers, and an older one does not, waited before; `None` if there are none.
    since: Option<Instant>,
}

/// Marks that are kept: of more failures in a row than that, the newest one stands for the one before it too.
const MARKS_MAX: usize = 256;

fn table(name: &Name) -> String {
    format!("standin-{}", host_device(name))
}

impl Hold {
    /// Makes ready, in place of what a former process has left: nothing is held, but for output if `holds_output`.
    /// Nothing that was held leaves once the deadline of `guard` has passed.
    pub fn make(
        name: &Name,
        marks: Marks,
        guard: Option<Arc<Guard>>,
        holds_output: bool,
    ) -> Result<Self, HoldError> {
        if holds_output && !marks.has_device() {
            return Err(HoldError::NoDevice);
        }
        let output = Queue::bind(QUEUE_FIRST).map_err(HoldError::Absent)?;
        let input = Queue::bind(output.number() + 1).map_err(HoldError::Absent)?;
        let queues = (output.number(), input.number());
        let held = if holds_output { &[Direction::Output][..] } else { &[] };
        let rules = Rules::make(table(name), marks, queues, held).map_err(HoldError::Absent)?;
        let output_waits = output.as_fd().try_clone_to_owned();
        let output_waits = output_waits.map_err(|error| HoldError::Kernel {
            what: "watch",
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE)),
        })?;
        let state = State {
            output,
            input,
            holds_output,
            holds_input: false,
            clear_at: Instant::now(),
            marks: VecDeque::new(),
            marked: None,
            frozen: None,
            gated: false,
            delay: Duration::ZERO,
        };
        Ok(Self { rules, guard, output: queues.0, state: Mutex::new(state), output_waits })
    }

    /// Removes what there is of a workload by that name; nothing is fine. What waits is dropped unless it was let go before.
    pub fn remove(name: &Name) -> Result<(), HoldError> {
        Rules::remove(&table(name)).map_err(|errno| HoldError::Kernel { what: "forget the held", errno })
    }

    /// Whether output can be told from that of others.
    pub fn can_hold_output(&self) -> bool {
        self.rules.marks().has_device()
    }

    /// Whether output is held.
    pub fn holds_output(&self) -> bool {
        self.state().holds_output
    }

    /// Whether an epoch was committed while output waited for it: what a client was told is in one that is.
    pub fn is_gated(&self) -> bool {
        self.state().gated
    }

    /// Readable while output waits that no mark covers.
    pub fn output_waits(&self) -> &OwnedFd {
        &self.output_waits
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on what is sent to the workload waits.
    pub fn hold_input(&self) -> Result<(), HoldError> {
        let mut state = self.state();
        self.rules.hold(Direction::Input, true).map_err(kernel("hold the input"))?;
        state.holds_input = true;
        Ok(())
    }

    /// What waits goes on, then all that comes.
    pub fn pass_input(&self) -> Result<(), HoldError> {
        let mut state = self.state();
        if !state.holds_input {
            return Ok(());
        }
        let error = kernel("let in the held");
        // Once before, so that nothing that comes later overtakes most of it; once after, for what came in between.
        state.input.let_all_go().map_err(&error)?;
        self.rules.hold(Direction::Input, false).map_err(&error)?;
        state.input.let_all_go().map_err(&error)?;
        state.holds_input = false;
        Ok(())
    }

    /// From now on what the workload sends waits for its epoch.
    pub fn hold_output(&self) -> Result<(), HoldError> {
        if !self.can_hold_output() {
            return Err(HoldError::NoDevice);
        }
        let mut state = self.state();
        if state.holds_output {
            return Ok(());
        }
        self.rules.hold(Direction::Output, true).map_err(kernel("hold the output"))?;
        state.holds_output = true;
        state.clear_at = Instant::now();
        Ok(())
    }

    /// The tree is frozen for this epoch: what it has sent waits for its commit.
    pub fn mark(&self, epoch: EpochId) -> Result<(), HoldError> {
        let mut state = self.state();
        if !state.holds_output {
            return Ok(());
        }
        state.frozen = Some(epoch);
        let newest = state.output.look().map_err(kernel("mark the held"))?;
        let since = state.is_unmarked(newest).then_some(state.clear_at);
        state.marked = newest.or(state.marked);
        state.clear_at = Instant::now();
        let mut mark = Marked { epoch, newest, since };
        if state.marks.len() == MARKS_MAX
            && let Some(last) = state.marks.pop_back()
        {
            mark = Marked { epoch, newest: newest.or(last.newest), since: last.since.or(since) };
        }
        state.marks.push_back(mark);
        Ok(())
    }

    /// The newest epoch for which the tree was frozen while output waited.
    pub fn frozen(&self) -> Option<EpochId> {
        self.state().frozen
    }

    /// This epoch is committed: what was sent before its freeze leaves.
    pub fn release(&self, epoch: EpochId) -> Result<(), HoldError> {
        let mut state = self.state();
        let mut through = None;
        while let Some(mark) = state.marks.front().copied().filter(|mark| mark.epoch <= epoch) {
            state.marks.pop_front();
            through = mark.newest.or(through);
            state.gated = true;
            state.delay = mark.since.map_or(state.delay, |since| since.elapsed());
        }
        let Some(through) = through.filter(|_| !self.is_fenced()) else { return Ok(()) };
        state.output.release(through).map_err(kernel("let out the held"))
    }

    /// Output is not held any more: what waits leaves.
    pub fn open(&self) -> Result<(), HoldError> {
        let mut state = self.state();
        if !state.holds_output {
            return Ok(());
        }
        if self.is_fenced() {
            return Ok(());
        }
        let error = kernel("let out the held");
        state.output.let_all_go().map_err(&error)?;
        self.rules.hold(Direction::Output, false).map_err(&error)?;
        state.output.let_all_go().map_err(&error)?;
        (state.holds_output, state.gated) = (false, false);
        state.marks.clear();
        Ok(())
    }

    /// A device's end that was set down has dropped what waits; what is behind a bridge waits still, as does all while the guard
    /// is stopped: what has passed the device before the deadline would leave after it.
    fn is_fenced(&self) -> bool {
        self.guard.as_ref().is_some_and(|guard| !guard.permits())
    }

    /// Whether output waits that no mark covers.
    pub fn has_unmarked(&self) -> bool {
        let mut state = self.state();
        let newest = state.output.look().ok().flatten();
        let waits = state.is_unmarked(newest);
        if !waits {
            state.clear_at = Instant::now();
        }
        waits
    }

    /// Some output has come just now, when there was none that no mark covers.
    pub fn begins_to_wait(&self) {
        self.state().clear_at = Instant::now();
    }

    /// What waits now.
    pub fn held(&self) -> Held {
        let mut state = self.state();
        // The next call that needs it tells of an error.
        let _ = state.output.look();
        let (packets, bytes) = state.output.waiting();
        let queues = [state.output.number(), state.input.number()];
        let (output, delay_ms) = (state.gated, state.delay.as_secs_f64() * 1e3);
        // A freeze may wait for it.
        drop(state);
        let dropped = queue::told(&queues).map_or(0, |told| told.dropped);
        Held { output, packets, bytes, delay_ms, dropped }
    }

    /// How much output waits; none if nothing does. Letting go what waits takes long if it is much, so that
    /// who does that is not waited for.
    pub fn fill(&self) -> Option<Fill> {
        let waiting = queue::told(&[self.output]).map_or(0, |told| told.waiting);
        // What is not read is dropped in the end. Errors the next call tells of that needs it.
        if let Ok(mut state) = self.state.try_lock() {
            let _ = state.output.look();
        }
        match waiting {
            0 => None,
            packets if packets > TOO_MUCH => Some(Fill::TooMuch),
            packets if packets > MUCH => Some(Fill::Much),
            _ => Some(Fill::Little),
        }
    }
}

impl State {
    fn is_unmarked(&self, newest: Option<PacketId>) -> bool {
        newest.is_some_and(|newest| self.marked.is_none_or(|marked| newest.is_behind(marked)))
    }
}

impl Queue {
    fn let_all_go(&mut self) -> nix::Result<()> {
        match self.look()? {
            Some(newest) => self.release(newest),
            None => Ok(()),
        }
    }
}

fn kernel(what: &'static str) -> impl Fn(Errno) -> HoldError {
    move |errno| HoldError::Kernel { what, errno }
}
