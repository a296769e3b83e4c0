//! What a host does that runs the workload, or has run it: heartbeats, lease and guard, permission to commit,
//! disarming, handoff, and what follows when the peer holds a newer term.

use std::time::Duration;

use super::{
    machine::{Core, Ending, Mode, Then},
    types::{Action, Arbiter, Copy, Message, Record, Role, Standing, Start},
};
use crate::model::{Epoch, EpochId, Term};

/// Epochs that may be committed before the record is written again.
const EPOCHS_PER_WRITE: u64 = 64;

impl Core {
    pub(super) fn start_primary(&mut self, now: Duration, start: &Start, armed: bool, handoff: bool) {
        // An earlier life may have suspended the peer through these without hearing the answer.
        self.inherited = self.newest_epoch();
        if start.copy == Copy::Gone {
            // Started again from what? An image of ours would be older than what clients have seen, and the
            // peer may run a newer one: wait to learn.
            self.mode = Mode::Lost;
            return;
        }
        if handoff {
            self.mode = Mode::Handoff { epoch: None, abort_at: now };
            if start.copy == Copy::Running {
                self.act(Action::Fence);
            }
            return;
        }
        self.mode = if start.copy == Copy::Running { Mode::Running } else { Mode::Fenced };
        if self.kept_fenced {
            if start.copy == Copy::Running {
                self.fence();
            }
            self.guarded = armed && self.arbiter.leases();
            return;
        }
        if armed && !self.arbiter.leases() {
            // A frozen copy waits for the peer's word: it may have been frozen because of a newer term.
            return;
        }
        self.guarded = armed;
        match (armed, start.guard_until) {
            (true, Some(until)) => self.lease_end = until + self.timing.fence_margin,
            // The peer may promote and nothing would stop this copy.
            (true, None) if self.mode == Mode::Running => self.fence(),
            (true, None) => {}
            (false, _) => self.release(),
        }
    }

    /// The guard's deadline.
    pub(super) fn guard_until(&self) -> Duration {
        self.lease_end.saturating_sub(self.timing.fence_margin)
    }

    fn fence(&mut self) {
        self.act(Action::Fence);
        self.mode = Mode::Fenced;
    }

    /// The peer cannot promote: runs without a guard.
    fn release(&mut self) {
        self.guarded = false;
        self.arming = None;
        self.act(Action::DisarmGuard);
        if self.mode == Mode::Fenced {
            self.act(Action::Unfence { until: None });
            self.mode = Mode::Running;
        }
    }

    pub(super) fn expire_lease(&mut self, now: Duration) {
        if self.mode == Mode::Running && self.guarded && now >= self.guard_until() {
            self.fence();
        }
    }

    pub(super) fn on_guard_fired(&mut self) {
        if self.mode != Mode::Running {
            return;
        }
        self.mode = Mode::Fenced;
        if !self.guarded {
            // It fired just before it was told that it is not needed.
            self.act(Action::Unfence { until: None });
            self.mode = Mode::Running;
        }
    }

    pub(super) fn on_guard_armed(&mut self, now: Duration, until: Duration) {
        if self.arming.take_if(|arming| *arming == until).is_none() {
            return;
        }
        self.guarded = true;
        if self.guard_until() > until {
            self.act(Action::ExtendGuard { until: self.guard_until() });
        }
        self.expire_lease(now);
        self.try_commit(now);
    }

    /// The next ack tries again.
    pub(super) fn on_guard_late(&mut self, until: Duration) {
        self.arming.take_if(|arming| *arming == until);
    }

    // Lease.

    pub(super) fn sends_heartbeats(&self) -> bool {
        matches!(self.mode, Mode::Running | Mode::Fenced) && !self.kept_fenced
    }

    pub(super) fn send_heartbeat(&mut self, now: Duration) {
        let seq = self.remember_sent(now);
        self.next_heartbeat = now + self.timing.heartbeat;
        self.send(Message::Heartbeat { term: self.record.term, seq, sent_at: now });
    }

    pub(super) fn on_ack(&mut self, now: Duration, term: Term, seq: u64, sent_at: Duration, granted: bool) {
        if !granted {
            return self.learn(term, false);
        }
        // Only what this life sent counts: another life's clock may have been another.
        let ours = self.sent.iter().any(|&sent| sent == (seq, sent_at));
        if term != self.record.term || !ours || !self.sends_heartbeats() {
            return;
        }
        if self.arbiter.leases() {
            self.extend_lease(now, sent_at + self.timing.lease);
            return;
        }
        if self.mode == Mode::Fenced {
            // The peer follows in this very term.
            self.mode = Mode::Running;
            self.act(Action::Unfence { until: None });
        }
        self.try_commit(now);
    }

    /// The arbiter's word counts as the peer's does: while this host has the key there, nobody else gets it.
    pub(super) fn on_leased(&mut self, now: Duration, term: Term, until: Duration) {
        if self.arbiter == Arbiter::Store && term == self.record.term && self.sends_heartbeats() {
            self.extend_lease(now, until);
        }
    }

    fn extend_lease(&mut self, now: Duration, until: Duration) {
        self.lease_end = self.lease_end.max(until);
        if self.guarded && self.lease_holds(now) {
            let until = self.guard_until();
            if self.mode == Mode::Fenced {
                self.mode = Mode::Running;
                self.act(Action::Unfence { until: Some(until) });
            } else {
                self.act(Action::ExtendGuard { until });
            }
        }
        self.try_commit(now);
    }

    fn lease_holds(&self, now: Duration) -> bool {
        now < self.guard_until()
    }

    fn drop_lease(&mut self) {
        self.lease_end = Duration::ZERO;
        self.sent.clear();
    }

    // Commit.

    /// Answers `AskCommit` once the guard stands: a commit gives the peer the right to promote when the lease
    /// ends.
    pub(super) fn try_commit(&mut self, now: Duration) {
        let Some(asked) = self.asked else { return };
        let Role::Primary { armed, .. } = self.record.role else { return };
        if asked.term != self.record.term {
            self.asked = None;
            return self.reject("the epoch is of another term: capture a new one");
        }
        let fits = self.sends_heartbeats() && self.ending.is_none() && !self.stopping;
        if !fits || self.is_writing() {
            return;
        }
        // The peer may hold an epoch that it has promised not to promote from.
        let harmless = asked <= self.record.disarmed_through;
        let covered = armed.is_some_and(|through| asked.epoch <= through);
        let leases = self.arbiter.leases();
        if harmless || (covered && (self.guarded || !leases)) {
            self.asked = None;
            return self.act(Action::MayCommit(asked));
        }
        if leases && !self.lease_holds(now) {
            return;
        }
        if covered {
            if self.arming.is_none() {
                let until = self.guard_until();
                self.arming = Some(until);
                self.act(Action::ArmGuard { until });
            }
            return;
        }
        let through = Epoch(asked.epoch.0.saturating_add(EPOCHS_PER_WRITE - 1));
        let mut record = self.record;
        record.role = Role::Primary { armed: Some(through), handoff: false };
        self.persist(record, Then::Commit);
    }

    /// The least number whose commit would surely let the peer promote; captures are numbered from it (or
    /// from behind what the peer holds, if that is more). It grows when the agent starts and when the peer
    /// was suspended.
    pub fn first_epoch(&self) -> Epoch {
        let behind = self.record.disarmed_through.max(self.inherited);
        if behind.term == self.record.term { Epoch(behind.epoch.0.saturating_add(1)) } else { Epoch(1) }
    }

    // Disarming.

    /// The newest epoch that may ever have been on its way to the peer.
    fn newest_epoch(&self) -> EpochId {
        let Role::Primary { armed: Some(epoch), .. } = self.record.role else {
            return self.record.disarmed_through;
        };
        self.record.disarmed_through.max(EpochId { term: self.record.term, epoch })
    }

    pub(super) fn on_suspend_command(&mut self, now: Duration) {
        match self.mode {
            Mode::Running | Mode::Fenced if self.armed() => {
                self.stopping = true;
                self.asked = None;
                self.end(now, Ending::Suspend { through: self.newest_epoch() });
            }
            Mode::Following if !self.stopped => {
                self.stopping = true;
                self.retry_at = now;
            }
            _ => {
                self.stopping = true;
                self.stop_if_wanted();
            }
        }
    }

    /// For an agent that waits to stop, in a state that needs no more from the peer.
    pub(super) fn stop_if_wanted(&mut self) {
        if self.stopping {
            self.act(Action::Suspended);
        }
    }

    pub(super) fn on_withdraw_command(&mut self, now: Duration) {
        if !self.sends_heartbeats() {
            return self.reject("only the primary ends protection: ask the host that runs the workload");
        }
        self.asked = None;
        if !self.armed() {
            // The peer cannot promote from anything that it may hold, so it is told and not asked.
            self.send(Message::Withdraw { term: self.record.term });
            return self.disarm(self.newest_epoch(), true);
        }
        self.end(now, Ending::Withdraw);
    }

    fn end(&mut self, now: Duration, ending: Ending) {
        self.ending = Some(ending);
        self.retry_at = now;
    }

    pub(super) fn on_ask_suspend(&mut self, now: Duration, term: Term) {
        if !self.sends_heartbeats() || term > self.record.term {
            return self.send_known();
        }
        if self.armed() {
            if self.ending.is_none() {
                self.end(now, Ending::Suspend { through: self.newest_epoch() });
            }
        } else {
            // Nothing to take back; but nothing may be armed on the strength of earlier acks either.
            self.drop_lease();
            self.send(Message::Suspend { term: self.record.term, through: self.newest_epoch() });
        }
    }

    pub(super) fn on_suspended(&mut self, term: Term, through: EpochId) {
        if term == self.record.term && self.ending == Some(Ending::Suspend { through }) {
            self.disarm(through, false);
        }
    }

    pub(super) fn on_withdrawn(&mut self, term: Term) {
        if term == self.record.term && self.ending == Some(Ending::Withdraw) {
            self.disarm(self.newest_epoch(), true);
        }
    }

    fn disarm(&mut self, through: EpochId, unprotect: bool) {
        let mut record = self.record;
        record.role = Role::Primary { armed: None, handoff: false };
        record.disarmed_through = record.disarmed_through.max(through);
        self.persist(record, Then::Disarmed { unprotect });
    }

    pub(super) fn disarmed(&mut self, unprotect: bool) {
        self.ending = None;
        self.drop_lease();
        self.release();
        if unprotect {
            self.act(Action::Unprotected);
        } else {
            self.stop_if_wanted();
        }
    }

    // Handoff.

    pub(super) fn on_handoff_ready(&mut self, now: Duration, epoch: EpochId) {
        let Role::Primary { armed, .. } = self.record.role else {
            return self.reject("only the primary hands a workload off: ask the host that runs it");
        };
        let committed = armed.is_some_and(|through| epoch.epoch <= through) && epoch.term == self.record.term;
        if !self.sends_heartbeats() || self.ending.is_some() || !committed {
            self.reject(
                "no handoff now: it needs a running workload, an epoch committed in this term, and nothing else under \
                 way: see the status and try again",
            );
            // The copy is frozen; let it run on as after any fencing.
            return self.on_guard_fired();
        }
        self.mode = Mode::Handoff { epoch: Some(epoch), abort_at: now + self.timing.handoff_patience };
        let mut record = self.record;
        record.role = Role::Primary { armed, handoff: true };
        self.persist(record, Then::SendTakeOver);
    }

    pub(super) fn on_abort_handoff(&mut self, now: Duration) {
        if let Mode::Handoff { abort_at, .. } = &mut self.mode {
            *abort_at = now;
            self.retry_at = now;
        } else {
            self.reject("no handoff is under way");
        }
    }

    /// The peer does not run under `term` and never will.
    pub(super) fn on_yielded(&mut self, term: Term) {
        let awaited = match self.mode {
            Mode::Handoff { .. } => term == Term(self.record.term.0 + 1),
            Mode::Superseded { newer } => term == newer,
            _ => false,
        };
        if awaited {
            self.newest = self.newest.max(term);
            self.adopt_newer();
        }
    }

    /// Takes the least term of ours that is newer than every one heard of, and runs under it.
    ///
    /// Each promotion adds one, so that the terms of the two hosts alternate; a host that keeps the workload
    /// adds two. Its new term can thus never be one that the peer takes without having heard of it.
    fn adopt_newer(&mut self) {
        let own = self.record.term.0;
        let ahead = self.newest.0.max(own) - own;
        let term = Term(own + (ahead / 2 + 1) * 2);
        let record = self.record.moved_to(term, Role::Primary { armed: None, handoff: false });
        self.persist(record, Then::RunOn);
    }

    pub(super) fn run_on(&mut self, now: Duration) {
        self.mode = Mode::Fenced;
        self.kept_fenced = false;
        self.asked = None;
        if let Some(Ending::Suspend { .. }) = self.ending {
            self.ending = None;
        }
        self.drop_lease();
        self.release();
        self.next_heartbeat = now;
        self.stop_if_wanted();
    }

    // An operator's fence.

    pub(super) fn on_fence_command(&mut self) {
        if !matches!(self.mode, Mode::Running | Mode::Fenced) {
            return self.reject("no copy runs on this host that could be fenced");
        }
        self.act(Action::Fence);
        self.mode = Mode::Fenced;
        self.kept_fenced = true;
        self.asked = None;
        self.persist(Record { fenced: true, ..self.record }, Then::KeepFenced);
    }

    pub(super) fn on_unfence_command(&mut self) {
        if !self.kept_fenced {
            return self.reject("no operator has fenced this copy: see the status");
        }
        self.persist(Record { fenced: false, ..self.record }, Then::Unfenced);
    }

    /// The peer is asked whether it has taken over; where it could not, the copy runs at once.
    pub(super) fn unfenced(&mut self, now: Duration) {
        self.kept_fenced = false;
        self.drop_lease();
        self.next_heartbeat = now;
        self.arming = None;
        self.guarded = self.armed() && self.arbiter.leases();
        if self.mode == Mode::Fenced && !self.armed() {
            self.release();
        }
    }

    pub(super) fn on_resume_command(&mut self, now: Duration) {
        self.stopping = false;
        self.stopped = false;
        if let Some(Ending::Suspend { .. }) = self.ending {
            // The peer may have done it without our hearing of it: epochs up to here arm it no more.
            self.ending = None;
            self.inherited = self.newest_epoch();
        }
        self.try_commit(now);
    }

    pub(super) fn on_force(&mut self) {
        match self.mode {
            Mode::Fenced | Mode::Handoff { .. } | Mode::Superseded { .. } => self.adopt_newer(),
            Mode::Running => self.reject("the workload runs here already"),
            Mode::Lost => self.reject("no copy is left on this host: restore it where its image is"),
            Mode::Following | Mode::Promoting { .. } | Mode::Stuck { .. } | Mode::Forgotten => {
                self.reject("this host holds no fenced copy of the workload");
            }
        }
    }

    // A newer term.

    pub(super) fn on_known(&mut self, term: Term, standing: Standing) {
        let started = matches!(standing, Standing::Primary | Standing::Fenced);
        self.learn(term, started);
        let gave_up = matches!(standing, Standing::Stuck | Standing::Standby);
        let awaited = match self.mode {
            Mode::Superseded { newer } => newer == term,
            Mode::Handoff { .. } => term > self.record.term,
            _ => false,
        };
        if gave_up && awaited && !self.kept_fenced {
            self.send(Message::Abort { term });
        }
    }

    /// This host's copy is out of date for good.
    pub(super) fn demoted(&mut self, now: Duration) {
        if self.mode != Mode::Following {
            self.act(Action::DestroyCopy);
            self.act(Action::DisarmGuard);
            self.mode = Mode::Following;
            self.held = None;
        }
        self.guarded = false;
        self.arming = None;
        self.asked = None;
        self.ending = None;
        self.stopped = false;
        self.kept_fenced = false;
        self.asking = None;
        self.drop_lease();
        self.granted_at = now;
        self.act(Action::BecomeStandby { term: self.record.term });
    }
}
