//! What a host does that holds the image: grants, the decision to promote, restoring, and what it gives up on
//! request.

use std::time::Duration;

use super::{
    machine::{Core, Mode, Then},
    types::{Action, Arbiter, Message, Role},
};
use crate::model::{Epoch, EpochId, Term};

/// Restores that are tried before a person is asked; all but the first are eager.
const RESTORE_ATTEMPTS_MAX: u32 = 3;

impl Core {
    // Lease.

    pub(super) fn on_heartbeat(&mut self, now: Duration, term: Term, seq: u64, sent_at: Duration) {
        if self.mode == Mode::Forgotten {
            return;
        }
        if term > self.record.term {
            return self.learn(term, true);
        }
        // A host that has decided to promote is not `Following` any more, although its record may still say
        // so.
        let granted = term == self.record.term && self.mode == Mode::Following && !self.stopped;
        if granted {
            self.granted_at = now;
            self.grace = None;
            if self.arbiter == Arbiter::Store {
                self.asking = None;
            }
        }
        self.send(Message::Ack { term: self.record.term, seq, sent_at, granted });
    }

    /// Whether an epoch of that name may be made the newest in the store. Ask right before the atomic step of
    /// the commit, and give the core nothing else until `Committed` has been handed to it.
    pub fn accepts_epoch(&self, id: EpochId) -> bool {
        self.mode == Mode::Following && id.term == self.record.term && self.held.is_none_or(|held| held < id)
    }

    // Promotion.

    /// When this standby promotes, or asks whether it may, if it hears nothing more.
    pub(super) fn promote_at(&self) -> Option<Duration> {
        let may = self.mode == Mode::Following && self.armed() && self.arbiter != Arbiter::Operator;
        if !may || self.is_writing() || !self.may_begin_next() {
            return None;
        }
        // The promise: *later* than the lease's end by the allowance.
        let after = self.granted_at + self.timing.lease + self.timing.drift + Duration::from_nanos(1);
        Some(self.grace.map_or(after, |grace| grace.max(after)))
    }

    /// When there is something to decide.
    pub(super) fn decide_at(&self) -> Option<Duration> {
        let at = self.promote_at().filter(|_| self.asking.is_none())?;
        Some(if self.arbiter.is_asked() { at.max(self.ask_again_at) } else { at })
    }

    fn may_begin_next(&self) -> bool {
        self.record.term >= self.record.refused
    }

    pub(super) fn consider_promotion(&mut self, now: Duration) {
        let Some(at) = self.decide_at() else { return };
        if now < at {
            return;
        }
        if self.grace.is_none() && now > at + self.timing.heartbeat {
            // We were asleep ourselves: let the heartbeats that wait in our socket be read first.
            self.grace = Some(now + self.timing.heartbeat * 2);
            return;
        }
        if self.arbiter.is_asked() {
            let term = Term(self.record.term.0 + 1);
            self.asking = Some(term);
            return self.act(Action::Ask { term });
        }
        self.promote();
    }

    /// Of a store: the primary's lease there has ended. Whether the grants have, too, is this host's to know, and may have
    /// changed since. Of a command: the primary's host is off, whatever was heard of it before.
    pub(super) fn on_agreed(&mut self, now: Duration, term: Term) {
        if self.asking.take_if(|asking| *asking == term).is_none() {
            return;
        }
        let silent = self.promote_at().is_some_and(|at| now >= at);
        let off = self.arbiter == Arbiter::Command && self.promote_at().is_some();
        if silent || off {
            self.promote();
        }
    }

    pub(super) fn on_disagreed(&mut self, now: Duration, term: Term) {
        if self.asking.take_if(|asking| *asking == term).is_some() {
            self.ask_again_at = now + self.timing.lease;
        }
    }

    pub(super) fn on_force_promote(&mut self) {
        match self.mode {
            Mode::Following if self.held.is_none() => {
                self.reject("no whole epoch is held here: there is nothing to run");
            }
            Mode::Following if !self.may_begin_next() => {
                self.reject(
                    "this host has given that term up: hand the workload over, or run it where it is",
                );
            }
            Mode::Following => self.promote(),
            Mode::Stuck { .. } => self.on_retry_restore(),
            Mode::Promoting { .. } => self.reject("it is being restored already"),
            Mode::Running => self.reject("the workload runs here already"),
            _ => self.reject("this host is no standby: see the status"),
        }
    }

    fn promote(&mut self) {
        let Some(epoch) = self.held else { return };
        let term = Term(self.record.term.0 + 1);
        self.mode = Mode::Promoting { epoch, attempt: 1 };
        self.grace = None;
        self.asking = None;
        let mut record = self.record;
        record.term = term;
        record.role = Role::Promoting { epoch };
        self.persist(record, Then::Restore);
    }

    pub(super) fn restore(&mut self) {
        if let Mode::Promoting { epoch, attempt } = self.mode {
            self.act(Action::Restore { epoch, term: self.record.term, eager: attempt > 1 });
        }
    }

    pub(super) fn on_restored(&mut self) {
        if !matches!(self.mode, Mode::Promoting { .. }) {
            return;
        }
        // Once it has been heard, restoring the same epoch again would take back what clients have seen.
        let role = Role::Primary { armed: None, handoff: false };
        self.persist(self.record.moved_to(self.record.term, role), Then::Announce);
    }

    pub(super) fn promoted(&mut self, now: Duration) {
        let term = self.record.term;
        self.mode = Mode::Running;
        self.next_heartbeat = now;
        self.act(Action::Announce { term });
        self.send(Message::Running { term });
        self.stop_if_wanted();
    }

    pub(super) fn on_restore_failed(&mut self, reason: String) {
        let Mode::Promoting { epoch, attempt } = self.mode else { return };
        if attempt < RESTORE_ATTEMPTS_MAX {
            self.mode = Mode::Promoting { epoch, attempt: attempt + 1 };
            return self.restore();
        }
        self.mode = Mode::Stuck { epoch, reason: reason.clone() };
        self.act(Action::Stuck { reason });
        // A peer that still has its frozen copy takes the workload back.
        self.send_known();
    }

    pub(super) fn on_retry_restore(&mut self) {
        if let Mode::Stuck { epoch, .. } = self.mode {
            self.mode = Mode::Promoting { epoch, attempt: 1 };
            self.restore();
        } else {
            self.reject("no restore has failed here: there is nothing to try again");
        }
    }

    // Handoff.

    pub(super) fn on_take_over(&mut self, term: Term, epoch: EpochId) {
        if term <= self.record.refused {
            return self.send(Message::Yielded { term });
        }
        match self.mode {
            Mode::Following if term <= self.record.term => self.send_known(),
            Mode::Following => {
                let held = self.held == Some(epoch) && self.armed();
                if held && term.0 == self.record.term.0 + 1 {
                    self.promote();
                } else {
                    self.refuse(term);
                }
            }
            Mode::Running if term == self.record.term => self.send(Message::Running { term }),
            _ => self.send_known(),
        }
    }

    pub(super) fn on_abort(&mut self, term: Term) {
        if term <= self.record.refused {
            return self.send(Message::Yielded { term });
        }
        match self.mode {
            // This host runs under a term only after the one before it was its primary's: never under an
            // older one.
            Mode::Following if term <= self.record.term => self.send(Message::Yielded { term }),
            Mode::Following => self.refuse(term),
            Mode::Stuck { .. } if term == self.record.term => self.refuse(term),
            _ => self.send_known(),
        }
    }

    /// Never to begin `term`, nor to promote from anything committed so far: the asker will run without a
    /// lease.
    fn refuse(&mut self, term: Term) {
        let mut record = self.record;
        record.role = Role::Standby;
        record.refused = term;
        let all = EpochId { term: record.term, epoch: Epoch(u64::MAX) };
        record.disarmed_through = record.disarmed_through.max(all);
        self.persist(record, Then::Yielded { term });
    }

    pub(super) fn yielded(&mut self, term: Term) {
        if matches!(self.mode, Mode::Stuck { .. }) {
            self.mode = Mode::Following;
            self.act(Action::BecomeStandby { term: self.record.term });
        }
        self.send(Message::Yielded { term });
    }

    // Disarming.

    pub(super) fn on_suspend(&mut self, term: Term, through: EpochId) {
        if self.mode != Mode::Following || term < self.record.term {
            return self.send_known();
        }
        if term > self.record.term {
            return self.learn(term, true);
        }
        let mut record = self.record;
        record.disarmed_through = record.disarmed_through.max(through);
        if record == self.record {
            self.standby_suspended(through);
        } else {
            self.persist(record, Then::Suspended { through });
        }
    }

    pub(super) fn standby_suspended(&mut self, through: EpochId) {
        self.send(Message::Suspended { term: self.record.term, through });
        if self.stopping && !self.stopped {
            self.stopped = true;
            self.act(Action::Suspended);
        }
    }

    pub(super) fn on_withdraw(&mut self, term: Term) {
        if self.mode != Mode::Following || term < self.record.term {
            return self.send_known();
        }
        self.mode = Mode::Forgotten;
        self.forget(term);
    }
}
