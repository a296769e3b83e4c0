//! What the agent works with: disk, network, guard, workload.

use std::time::Duration;

use super::{Event, FAULTS_US, Flaw, Guard, Packet, Tree, Work, World};
use crate::{
    ha::{Input, Message, Record, Standing, Ticket},
    model::{Epoch, EpochId, Term},
};

impl World {
    pub(super) fn write(&mut self, node: usize, ticket: Ticket, record: Option<Record>) {
        self.nodes[node].writes.push_back((ticket, record));
        let life = self.nodes[node].life;
        let most = if self.rng.one_in(10) { 150_000 } else { 8_000 };
        self.after(200, most, Event::Durable { node, life, ticket: ticket.0 });
        if self.flaw == Flaw::PromoteBeforePersisted {
            self.nodes[node].inbox.push_back(Work::Input(Input::Persisted(ticket)));
        }
    }

    pub(super) fn durable(&mut self, node: usize, life: u64, ticket: u64) {
        if self.nodes[node].life != life {
            return;
        }
        if let Some((ticket, record)) = self.nodes[node].writes.pop_front_if(|write| write.0.0 == ticket) {
            self.nodes[node].disk = record;
            self.give(node, Work::Input(Input::Persisted(ticket)));
        }
    }

    // Network.

    pub(super) fn send(&mut self, node: usize, message: Message) {
        let message = match message {
            Message::Ack { term, seq, sent_at, granted: false } if self.flaw == Flaw::OldTermAccepted => {
                Message::Ack { term: Term(term.0 - 1), seq, sent_at, granted: true }
            }
            other => other,
        };
        self.transmit(node, Packet::Message(message));
    }

    pub(super) fn transmit(&mut self, from: usize, packet: Packet) {
        let quiet = self.now_us >= FAULTS_US;
        if !quiet && (self.now_us < self.cut_until[from] || self.rng.one_in(self.loss_one_in)) {
            return;
        }
        let copies = if !quiet && self.rng.one_in(20) { 2 } else { 1 };
        for _ in 0..copies {
            self.packets.push(packet);
            let most = if quiet || !self.rng.one_in(5) { 1_000 } else { self.delay_max_us };
            let packet = self.packets.len() - 1;
            self.after(100, most + 1, Event::Deliver { to: 1 - from, packet });
        }
    }

    // Guard.

    pub(super) fn arm_guard(&mut self, node: usize, until: Duration) {
        let until_set = self.flawed_deadline(node, until);
        let input = if until_set > self.local(node) {
            self.set_guard(node, Some(until_set));
            Input::GuardArmed { until }
        } else {
            Input::GuardLate { until }
        };
        self.nodes[node].inbox.push_back(Work::Input(input));
    }

    pub(super) fn flawed_deadline(&self, node: usize, until: Duration) -> Duration {
        if self.flaw == Flaw::LeaseFromReceive {
            self.local(node) + self.timing.lease.saturating_sub(self.timing.fence_margin)
        } else {
            until
        }
    }

    pub(super) fn extend_guard(&mut self, node: usize, until: Duration) {
        let until = self.flawed_deadline(node, until);
        if self.nodes[node].guard.fired {
            self.nodes[node].inbox.push_back(Work::Input(Input::GuardFired));
        } else {
            self.set_guard(node, Some(until));
        }
    }

    pub(super) fn set_guard(&mut self, node: usize, until: Option<Duration>) {
        let guard = &mut self.nodes[node].guard;
        *guard = Guard { until, fired: false, stamp: guard.stamp + 1 };
        let stamp = guard.stamp;
        if let Some(until) = until {
            let at = self.global(node, until);
            self.at(at, Event::GuardDue { node, stamp });
        }
    }

    pub(super) fn guard_due(&mut self, node: usize, stamp: u64) {
        let guard = &mut self.nodes[node].guard;
        if guard.stamp == stamp && guard.until.is_some() {
            guard.until = None;
            guard.fired = true;
            let most = self.timing.fence_margin.as_micros() as u64 * 95 / 100;
            self.after(0, most, Event::GuardFroze { node, stamp });
        }
    }

    pub(super) fn guard_froze(&mut self, node: usize, stamp: u64) {
        if self.nodes[node].guard.stamp == stamp {
            self.freeze(node);
            self.note(|| format!("{node} guard froze the copy"));
            self.give(node, Work::Input(Input::GuardFired));
        }
    }

    pub(super) fn fire_guard_now(&mut self, node: usize) {
        let guard = &mut self.nodes[node].guard;
        *guard = Guard { until: None, fired: true, stamp: guard.stamp + 1 };
        self.freeze(node);
    }

    pub(super) fn freeze(&mut self, node: usize) {
        let tree = &mut self.nodes[node].tree;
        if *tree == Tree::Running {
            *tree = Tree::Frozen;
        }
    }

    pub(super) fn unfence(&mut self, node: usize, until: Option<Duration>) {
        if until.is_some_and(|until| until <= self.local(node)) {
            self.fire_guard_now(node);
            self.nodes[node].inbox.push_back(Work::Input(Input::GuardFired));
            return;
        }
        let term = self.nodes[node].disk.map_or(Term(0), |record| record.term);
        if self.started > term {
            self.violate(format!(
                "{node} un-fences a copy of term {term}, but term {} has started",
                self.started
            ));
        }
        self.started = self.started.max(term);
        self.set_guard(node, until);
        self.nodes[node].tree_term = term;
        self.called_back += u64::from(std::mem::take(&mut self.nodes[node].hands_off));
        if self.nodes[node].tree == Tree::Frozen {
            self.nodes[node].tree = Tree::Running;
        }
    }

    // The workload.

    pub(super) fn restore(&mut self, node: usize, epoch: EpochId, term: Term) {
        if !self.committed.contains(&epoch) || self.nodes[node].held != Some(epoch) {
            self.violate(format!("{node} restores epoch {epoch}, which its store does not hold committed"));
        }
        let host = &mut self.nodes[node];
        host.tree = Tree::Restoring;
        host.tree_term = term;
        host.restore_stamp += 1;
        host.guard = Guard { stamp: host.guard.stamp + 1, ..Guard::default() };
        let stamp = host.restore_stamp;
        self.after(5_000, 100_000, Event::RestoreEnds { node, stamp });
    }

    pub(super) fn restore_ends(&mut self, node: usize, stamp: u64) {
        if self.nodes[node].restore_stamp != stamp || self.nodes[node].tree != Tree::Restoring {
            return;
        }
        if self.now_us < FAULTS_US && self.rng.one_in(3) {
            self.nodes[node].tree = Tree::Gone;
            self.give(node, Work::Input(Input::RestoreFailed { reason: "bad luck".to_owned() }));
        } else {
            self.nodes[node].tree = Tree::Running;
            self.started = self.started.max(self.nodes[node].tree_term);
            self.give(node, Work::Input(Input::Restored));
        }
    }

    pub(super) fn destroy(&mut self, node: usize) {
        let host = &self.nodes[node];
        // What an agent that died left half restored was never heard, and is replaced by what it was made
        // from.
        if host.tree == Tree::Frozen && host.tree_term >= self.started {
            let term = host.tree_term;
            self.violate(format!("{node} destroys the copy of term {term} though no newer one has started"));
        } else if host.tree == Tree::Running {
            self.violate(format!("{node} destroys a running copy"));
        }
        self.handed_off += u64::from(std::mem::take(&mut self.nodes[node].hands_off));
        self.nodes[node].tree = Tree::Gone;
        self.nodes[node].restore_stamp += 1;
    }

    pub(super) fn capture(&mut self, node: usize) {
        self.after(30_000, 120_000, Event::Capture { node });
        let now = self.now_us;
        let host = &mut self.nodes[node];
        let Some(core) = &host.core else { return };
        let waits = host.asked.is_some_and(|(_, since)| now < since + 300_000);
        if host.paused || host.tree != Tree::Running || core.standing() != Standing::Primary || waits {
            return;
        }
        host.last_epoch = (host.last_epoch + 1).max(core.first_epoch().0);
        let id = EpochId { term: core.record().term, epoch: Epoch(host.last_epoch) };
        host.asked = Some((id, now));
        // Restarting the workload's own numbers is the agent's affair; a final epoch is captured like any
        // other.
        host.handoff = std::mem::take(&mut host.wants_handoff).then_some(id);
        if self.flaw == Flaw::CommitBeforeArming {
            self.transmit(node, Packet::End(id));
        }
        self.give(node, Work::Input(Input::AskCommit(id)));
    }
}
