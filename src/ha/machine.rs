//! The state machine's frame: state, dispatch, timers, durable writes. What a primary does is in `primary`,
//! what a standby does in `standby`.

use std::{collections::VecDeque, time::Duration};

use super::{
    timing::{Timing, TimingError},
    types::{Action, Arbiter, Copy, Input, Message, Record, Role, Standing, Start, Ticket},
};
use crate::model::{EpochId, Term};

/// Heartbeats whose ack may still come; older ones than that are not worth a lease.
const SENT_MAX: usize = 64;
/// How many leases a standby that has just started waits for its primary's first heartbeat.
const STARTS_LEASES: u32 = 5;
/// Commands that may wait for a durable write.
const DEFERRED_MAX: usize = 16;

/// Where the machine is. The first five belong to a host that has run the workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Running,
    Fenced,
    /// Frozen; the peer was, or will be, asked to take over `epoch`.
    Handoff {
        epoch: Option<EpochId>,
        abort_at: Duration,
    },
    /// Fenced; the peer holds the term `newer` but is not known to run.
    Superseded {
        newer: Term,
    },
    Lost,
    Following,
    Promoting {
        epoch: EpochId,
        attempt: u32,
    },
    Stuck {
        epoch: EpochId,
        reason: String,
    },
    Forgotten,
}

/// What was waiting for a durable write.
#[derive(Clone, Debug)]
pub(super) enum Then {
    /// The epoch that was asked for may be sent if the lease still holds.
    Commit,
    /// The peer never promotes from what it holds.
    Disarmed {
        unprotect: bool,
    },
    SendTakeOver,
    RunOn,
    /// The copy stays frozen whatever happens.
    KeepFenced,
    Unfenced,
    Demoted,
    Restore,
    Announce,
    /// The standby has disarmed itself.
    Suspended {
        through: EpochId,
    },
    Yielded {
        term: Term,
    },
    Forgotten {
        term: Term,
    },
}

#[derive(Clone, Debug)]
struct Writing {
    ticket: Ticket,
    record: Option<Record>,
    then: Then,
}

/// A request to the standby that ends its right to promote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Suspend { through: EpochId },
    Withdraw,
}

/// The decisions about one workload on one host. See the module's docs.
#[derive(Clone, Debug)]
pub struct Core {
    pub(super) timing: Timing,
    pub(super) arbiter: Arbiter,
    /// As it is on disk, never ahead of it.
    pub(super) record: Record,
    pub(super) mode: Mode,
    pub(super) held: Option<EpochId>,
    /// The newest term heard of.
    pub(super) newest: Term,
    /// The agent is about to stop.
    pub(super) stopping: bool,
    /// Standby: it has disarmed itself in order to stop, and grants nothing any more.
    pub(super) stopped: bool,

    // Primary.
    /// An operator has fenced the copy; its record says so, or is about to.
    pub(super) kept_fenced: bool,
    pub(super) next_heartbeat: Duration,
    pub(super) next_seq: u64,
    pub(super) sent: VecDeque<(u64, Duration)>,
    pub(super) lease_end: Duration,
    /// The guard has a deadline: the lease's end less the margin.
    pub(super) guarded: bool,
    /// The first deadline, until the guard says that it has it.
    pub(super) arming: Option<Duration>,
    pub(super) asked: Option<EpochId>,
    pub(super) ending: Option<Ending>,
    /// What an earlier life may have committed.
    pub(super) inherited: EpochId,

    // Standby.
    /// When a heartbeat was last granted, or could have been by an earlier life.
    pub(super) granted_at: Duration,
    /// Promotion waits at least until then, and the wait was given once in this silence.
    pub(super) grace: Option<Duration>,
    /// The term under which the arbiter was asked to let this host run the workload.
    pub(super) asking: Option<Term>,
    /// It said no, and is not asked again before this time.
    pub(super) ask_again_at: Duration,

    pub(super) retry_at: Duration,
    writing: Option<Writing>,
    next_ticket: u64,
    deferred: VecDeque<Input>,
    actions: Vec<Action>,
}

impl Core {
    /// Begins a life of the agent (or of the workload's protection) and says what is to be done first.
    pub fn start(timing: Timing, now: Duration, start: &Start) -> Result<(Self, Vec<Action>), TimingError> {
        timing.validate()?;
        let mut core = Self {
            timing,
            arbiter: start.arbiter,
            record: start.record,
            mode: Mode::Following,
            held: start.held,
            newest: start.record.term,
            stopping: false,
            stopped: false,
            kept_fenced: start.record.fenced,
            next_heartbeat: now,
            next_seq: start.first_seq,
            sent: VecDeque::new(),
            lease_end: Duration::ZERO,
            guarded: false,
            arming: None,
            asked: None,
            ending: None,
            inherited: EpochId::default(),
            granted_at: now,
            grace: None,
            asking: None,
            ask_again_at: now,
            retry_at: now,
            writing: None,
            next_ticket: 0,
            deferred: VecDeque::new(),
            actions: Vec::new(),
        };
        match start.record.role {
            Role::Primary { armed, handoff } => core.start_primary(now, start, armed.is_some(), handoff),
            Role::Promoting { epoch } => {
                core.mode = Mode::Promoting { epoch, attempt: 1 };
                core.restore();
            }
            Role::Standby => {
                // The primary is to find this host again first: it may be waiting for its lease.
                core.grace = Some(now + core.timing.lease * STARTS_LEASES);
                if start.copy != Copy::Gone {
                    core.act(Action::DestroyCopy);
                }
            }
        }
        core.run_timers(now);
        let actions = core.take_actions();
        Ok((core, actions))
    }

    /// Takes what happened, says what to do. `now` must not be earlier than in the call before.
    pub fn handle(&mut self, now: Duration, input: Input) -> Vec<Action> {
        self.expire_lease(now);
        self.dispatch(now, input);
        self.run_timers(now);
        self.take_actions()
    }

    /// When [`Input::Tick`] is wanted next.
    pub fn next_deadline(&self) -> Option<Duration> {
        let heartbeat = self.sends_heartbeats().then_some(self.next_heartbeat);
        let guard = (self.mode == Mode::Running && self.guarded).then(|| self.guard_until());
        let retry = self.retries().then_some(self.retry_at);
        [heartbeat, guard, retry, self.decide_at()].into_iter().flatten().min()
    }

    /// [`Arbiter::Store`]: the term whose key this host shall have there, `None` for no key. To be looked at whenever all
    /// actions have been done, and not before: a copy that is to be fenced may need the key until it is. What was answered about
    /// an earlier claim, be it of the same term, must not be handed in any more.
    pub fn claim(&self) -> Option<Term> {
        if self.arbiter != Arbiter::Store {
            return None;
        }
        match (&self.mode, self.record.role) {
            (Mode::Running | Mode::Fenced, _) => (!self.kept_fenced).then_some(self.record.term),
            (Mode::Promoting { .. }, Role::Promoting { .. }) => Some(self.record.term),
            // Not durable yet.
            (Mode::Promoting { .. }, _) => Some(Term(self.record.term.0 + 1)),
            _ => self.asking,
        }
    }

    /// How this host stands.
    pub fn standing(&self) -> Standing {
        match self.mode {
            Mode::Running => Standing::Primary,
            Mode::Fenced | Mode::Handoff { .. } | Mode::Superseded { .. } => Standing::Fenced,
            Mode::Lost => Standing::Lost,
            Mode::Following => Standing::Standby,
            Mode::Promoting { .. } => Standing::Promoting,
            Mode::Stuck { .. } => Standing::Stuck,
            Mode::Forgotten => Standing::Forgotten,
        }
    }

    /// The record as it is on disk.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Why the workload could not be restored, if it is [`Standing::Stuck`].
    pub fn stuck_reason(&self) -> Option<&str> {
        if let Mode::Stuck { reason, .. } = &self.mode { Some(reason) } else { None }
    }

    /// Primary: the end of the lease, if running needs one. Standby: the earliest time of a promotion, if it
    /// may.
    pub fn lease_end(&self) -> Option<Duration> {
        if self.guarded { Some(self.lease_end) } else { self.promote_at() }
    }

    /// Whether protection is being ended, or suspended for an agent that stops.
    pub fn is_ending(&self) -> bool {
        self.ending.is_some() || self.stopping
    }

    /// Whether the standby can run the workload if the primary vanishes: on the primary, as far as it has
    /// permitted it.
    pub fn armed(&self) -> bool {
        match self.record.role {
            Role::Primary { armed, .. } => armed.is_some(),
            Role::Promoting { .. } => false,
            Role::Standby => self.held.is_some_and(|held| held > self.record.disarmed_through),
        }
    }

    fn dispatch(&mut self, now: Duration, input: Input) {
        if self.writing.is_some() && defers(&input) {
            if self.deferred.len() < DEFERRED_MAX {
                self.deferred.push_back(input);
            } else {
                self.reject("too many commands wait for a disk that does not answer: repair the disk");
            }
            return;
        }
        match input {
            Input::Tick => self.consider_promotion(now),
            Input::Message(message) => self.on_message(now, message),
            Input::Persisted(ticket) => self.on_persisted(now, ticket),
            Input::GuardFired => self.on_guard_fired(),
            Input::GuardArmed { until } => self.on_guard_armed(now, until),
            Input::GuardLate { until } => self.on_guard_late(until),
            Input::AskCommit(epoch) => {
                self.asked = Some(epoch);
                self.try_commit(now);
            }
            Input::Committed(epoch) => {
                if self.accepts_epoch(epoch) {
                    self.held = Some(epoch);
                }
            }
            Input::ImageLost => {
                if self.mode == Mode::Following {
                    (self.held, self.asking) = (None, None);
                }
            }
            Input::Restored => self.on_restored(),
            Input::RestoreFailed { reason } => self.on_restore_failed(reason),
            Input::HandoffReady(epoch) => self.on_handoff_ready(now, epoch),
            Input::AbortHandoff => self.on_abort_handoff(now),
            Input::Leased { term, until } => self.on_leased(now, term, until),
            Input::Agreed { term } => self.on_agreed(now, term),
            Input::Disagreed { term } => self.on_disagreed(now, term),
            Input::ForcePromote => self.on_force_promote(),
            Input::Fence => self.on_fence_command(),
            Input::Unfence => self.on_unfence_command(),
            Input::Resume => self.on_resume_command(now),
            Input::Suspend => self.on_suspend_command(now),
            Input::Withdraw => self.on_withdraw_command(now),
            Input::ForceRunAlone => self.on_force(),
            Input::RetryRestore => self.on_retry_restore(),
        }
    }

    fn on_message(&mut self, now: Duration, message: Message) {
        match message {
            Message::Heartbeat { term, seq, sent_at } => return self.on_heartbeat(now, term, seq, sent_at),
            Message::Ack { term, seq, sent_at, granted } => {
                return self.on_ack(now, term, seq, sent_at, granted);
            }
            _ => {}
        }
        // Everything else may need a durable write. One is enough at a time: the peer asks again.
        if self.writing.is_some() {
            return;
        }
        if self.mode == Mode::Forgotten {
            if let Message::Withdraw { term } = message {
                self.send(Message::Withdrawn { term });
            }
            return;
        }
        match message {
            Message::Suspend { term, through } => self.on_suspend(term, through),
            Message::Withdraw { term } => self.on_withdraw(term),
            Message::TakeOver { term, epoch } => self.on_take_over(term, epoch),
            Message::Abort { term } => self.on_abort(term),
            Message::AskSuspend { term } => self.on_ask_suspend(now, term),
            Message::Inquire { term } => {
                self.learn(term, false);
                self.send_known();
            }
            Message::Suspended { term, through } => self.on_suspended(term, through),
            Message::Withdrawn { term } => self.on_withdrawn(term),
            Message::Running { term } => self.learn(term, true),
            Message::Yielded { term } => self.on_yielded(term),
            Message::Known { term, standing, .. } => self.on_known(term, standing),
            Message::Heartbeat { .. } | Message::Ack { .. } => {}
        }
    }

    /// The peer holds `term`. `started`: it has run the workload under it. A copy of an older term is cut off
    /// at once, but destroyed only when the newer one has started: until then it is the only one there is.
    pub(super) fn learn(&mut self, term: Term, started: bool) {
        self.newest = self.newest.max(term);
        if term <= self.record.term {
            return;
        }
        match self.mode {
            Mode::Running | Mode::Fenced => {
                self.act(Action::Fence);
                self.mode = Mode::Superseded { newer: term };
            }
            Mode::Superseded { newer } => self.mode = Mode::Superseded { newer: newer.max(term) },
            Mode::Forgotten => return,
            Mode::Following
            | Mode::Handoff { .. }
            | Mode::Lost
            | Mode::Promoting { .. }
            | Mode::Stuck { .. } => {}
        }
        // Unless the disk is busy: then the peer's next message does it.
        if started && self.writing.is_none() {
            self.persist(self.record.moved_to(term, Role::Standby), Then::Demoted);
        }
    }

    fn on_persisted(&mut self, now: Duration, ticket: Ticket) {
        let Some(writing) = self.writing.take_if(|writing| writing.ticket == ticket) else { return };
        if let Some(record) = writing.record {
            self.record = record;
            self.newest = self.newest.max(record.term);
        }
        match writing.then {
            Then::Commit => self.try_commit(now),
            Then::Disarmed { unprotect } => self.disarmed(unprotect),
            Then::SendTakeOver => self.retry_at = now,
            Then::RunOn => self.run_on(now),
            Then::KeepFenced => {}
            Then::Unfenced => self.unfenced(now),
            Then::Demoted => self.demoted(now),
            Then::Restore => self.restore(),
            Then::Announce => self.promoted(now),
            Then::Suspended { through } => self.standby_suspended(through),
            Then::Yielded { term } => self.yielded(term),
            Then::Forgotten { term } => {
                self.mode = Mode::Forgotten;
                self.asking = None;
                self.send(Message::Withdrawn { term });
                self.act(Action::Forgotten);
            }
        }
        while self.writing.is_none() {
            let Some(input) = self.deferred.pop_front() else { break };
            self.dispatch(now, input);
        }
    }

    fn run_timers(&mut self, now: Duration) {
        if self.sends_heartbeats() && now >= self.next_heartbeat {
            self.send_heartbeat(now);
        }
        if self.retries() && now >= self.retry_at {
            self.retry_at = now + self.timing.retry;
            self.retry(now);
        }
    }

    fn retries(&self) -> bool {
        let waits = matches!(self.mode, Mode::Lost | Mode::Superseded { .. } | Mode::Handoff { .. });
        let stops = self.mode == Mode::Following && self.stopping && !self.stopped;
        self.writing.is_none() && (waits || stops || self.ending.is_some())
    }

    fn retry(&mut self, now: Duration) {
        let term = self.record.term;
        match (&self.mode, self.ending) {
            (Mode::Lost | Mode::Superseded { .. }, _) => self.send(Message::Inquire { term }),
            (&Mode::Handoff { epoch: Some(epoch), abort_at }, _) if now < abort_at => {
                self.send(Message::TakeOver { term: Term(term.0 + 1), epoch });
            }
            (Mode::Handoff { .. }, _) => self.send(Message::Abort { term: Term(term.0 + 1) }),
            (Mode::Following, _) => self.send(Message::AskSuspend { term }),
            (_, Some(Ending::Suspend { through })) => self.send(Message::Suspend { term, through }),
            (_, Some(Ending::Withdraw)) => self.send(Message::Withdraw { term }),
            (_, None) => {}
        }
    }

    pub(super) fn remember_sent(&mut self, now: Duration) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        if self.sent.len() == SENT_MAX {
            self.sent.pop_front();
        }
        self.sent.push_back((seq, now));
        seq
    }

    pub(super) fn persist(&mut self, record: Record, then: Then) {
        self.write(Some(record), then);
    }

    pub(super) fn forget(&mut self, term: Term) {
        self.write(None, Then::Forgotten { term });
    }

    fn write(&mut self, record: Option<Record>, then: Then) {
        debug_assert!(self.writing.is_none(), "one durable write at a time");
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.writing = Some(Writing { ticket, record, then });
        self.act(Action::Persist { ticket, record });
    }

    pub(super) fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    pub(super) fn send_known(&mut self) {
        let (term, standing, held) = (self.record.term, self.standing(), self.held);
        self.send(Message::Known { term, standing, held });
    }

    pub(super) fn send(&mut self, message: Message) {
        self.act(Action::Send(message));
    }

    pub(super) fn reject(&mut self, reason: &'static str) {
        self.act(Action::Rejected { reason });
    }

    pub(super) fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }
}

/// Whether a command may need a durable write and so waits for the one under way.
fn defers(input: &Input) -> bool {
    match input {
        Input::HandoffReady(_)
        | Input::Suspend
        | Input::Withdraw
        | Input::ForceRunAlone
        | Input::RetryRestore
        | Input::ForcePromote
        | Input::Fence
        | Input::Unfence
        | Input::Resume
        | Input::Agreed { .. }
        | Input::Restored
        | Input::RestoreFailed { .. } => true,
        Input::Tick
        | Input::Message(_)
        | Input::Persisted(_)
        | Input::GuardFired
        | Input::GuardArmed { .. }
        | Input::GuardLate { .. }
        | Input::AskCommit(_)
        | Input::Committed(_)
        | Input::ImageLost
        | Input::Leased { .. }
        | Input::Disagreed { .. }
        | Input::AbortHandoff => false,
    }
}
