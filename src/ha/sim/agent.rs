//! The agent: its life, its mail, and the actions it executes one by one.

use super::{Event, FAULTS_US, Flaw, Guard, Packet, Tree, Work, World};
use crate::ha::{Action, Copy, Core, Input, Message, Start};

impl World {
    pub(super) fn boot(&mut self, node: usize) {
        let now = self.local(node);
        let first_seq = self.rng.next() >> 2;
        let host = &mut self.nodes[node];
        let Some(record) = host.disk else { return };
        let copy = match host.tree {
            Tree::Gone => Copy::Gone,
            Tree::Frozen => Copy::Frozen,
            Tree::Running | Tree::Restoring => Copy::Running,
        };
        let guard_until = host.guard.until.filter(|_| !host.guard.fired);
        let start = Start { arbiter: self.arbiter, record, copy, held: host.held, guard_until, first_seq };
        let (core, actions) = Core::start(self.timing, now, &start).expect("valid timing");
        host.life += 1;
        host.core = Some(core);
        host.actions.extend(actions);
        host.wants_handoff = false;
        // What an earlier life had of the store is given up with the first look at what this one wants.
        host.claims += 1;
        host.claim = None;
        let life = host.life;
        self.after(0, 1_000, Event::Claim { node, life });
        self.note(|| format!("{node} boots {start:?}"));
        self.schedule_wake(node);
        self.work(node);
    }

    pub(super) fn stop_agent(&mut self, node: usize, down: (u64, u64)) {
        let keep = self.rng.one_in(2);
        let host = &mut self.nodes[node];
        host.core = None;
        host.life += 1;
        host.inbox.clear();
        host.actions.clear();
        host.paused = false;
        host.asked = None;
        host.handoff = None;
        if keep && let Some(&(_, record)) = host.writes.front() {
            host.disk = record;
        }
        host.writes.clear();
        if host.tree == Tree::Restoring {
            host.restore_stamp += 1;
            host.tree = if keep { Tree::Running } else { Tree::Gone };
        }
        let life = host.life;
        self.after(down.0, down.1, Event::Boot { node, life });
    }

    pub(super) fn cut_power(&mut self, node: usize) {
        self.note(|| format!("{node} loses power"));
        self.power_cost_a_copy |= self.nodes[node].tree != Tree::Gone;
        self.stop_agent(node, (50_000, 1_500_000));
        let host = &mut self.nodes[node];
        host.tree = Tree::Gone;
        host.guard = Guard { stamp: host.guard.stamp + 1, ..Guard::default() };
        host.booted_us = self.now_us;
    }

    pub(super) fn give(&mut self, node: usize, work: Work) {
        if self.nodes[node].core.is_some() {
            self.nodes[node].inbox.push_back(work);
            self.work(node);
        }
    }

    /// Executes what is due, one thing at a time: between any two the agent may stop for a while, or for
    /// good.
    pub(super) fn work(&mut self, node: usize) {
        loop {
            if self.nodes[node].paused || self.nodes[node].core.is_none() || self.violation.is_some() {
                return;
            }
            if self.now_us < FAULTS_US && self.rng.one_in(self.disturb_one_in) {
                self.disturb(node);
                continue;
            }
            if let Some(action) = self.nodes[node].actions.pop_front() {
                self.execute(node, &action);
                continue;
            }
            self.look_at_claim(node);
            if let Some(work) = self.nodes[node].inbox.pop_front() {
                self.hand_over(node, work);
            } else {
                return;
            }
        }
    }

    pub(super) fn disturb(&mut self, node: usize) {
        match self.rng.range(0, 10) {
            0..=5 => self.pause(node),
            6..=8 => {
                self.note(|| format!("{node} agent dies"));
                self.stop_agent(node, (5_000, 500_000));
            }
            _ if self.power_cuts => self.cut_power(node),
            _ => {}
        }
    }

    pub(super) fn pause(&mut self, node: usize) {
        if self.nodes[node].core.is_some() {
            self.note(|| format!("{node} agent pauses"));
            self.nodes[node].paused = true;
            self.after(5_000, 900_000, Event::Resume { node });
        }
    }

    pub(super) fn hand_over(&mut self, node: usize, work: Work) {
        let input = match work {
            Work::Input(input) => input,
            Work::Packet(Packet::Message(message)) => Input::Message(message),
            Work::Packet(Packet::End(id)) => {
                let accepted = self.nodes[node].core.as_ref().is_some_and(|core| core.accepts_epoch(id));
                if !accepted {
                    return;
                }
                self.nodes[node].held = Some(id);
                self.committed.insert(id);
                self.transmit(node, Packet::Committed(id));
                Input::Committed(id)
            }
            Work::Packet(Packet::Committed(id)) => {
                if self.nodes[node].handoff != Some(id) {
                    return;
                }
                self.nodes[node].handoff = None;
                self.fire_guard_now(node);
                self.nodes[node].hands_off = true;
                if self.rng.one_in(4) {
                    self.nodes[node].inbox.push_back(Work::Input(Input::AbortHandoff));
                }
                Input::HandoffReady(id)
            }
        };
        let now = self.local(node);
        if input != Input::Tick {
            self.note(|| format!("{node} <- {input:?}"));
        }
        let Some(core) = &mut self.nodes[node].core else { return };
        let actions = core.handle(now, input);
        self.nodes[node].actions.extend(actions);
        self.schedule_wake(node);
    }

    pub(super) fn schedule_wake(&mut self, node: usize) {
        let Some(core) = &self.nodes[node].core else { return };
        let deadline = core.next_deadline();
        self.nodes[node].wake_stamp += 1;
        if let Some(deadline) = deadline {
            let stamp = self.nodes[node].wake_stamp;
            let at = self.global(node, deadline).max(self.now_us + 1);
            self.at(at, Event::Wake { node, stamp });
        }
    }

    pub(super) fn execute(&mut self, node: usize, action: &Action) {
        if !matches!(action, Action::Send(Message::Heartbeat { .. } | Message::Ack { .. })) {
            self.note(|| format!("{node} -> {action:?}"));
        }
        match *action {
            Action::Persist { ticket, record } => self.write(node, ticket, record),
            Action::Send(message) => self.send(node, message),
            Action::ArmGuard { until } => self.arm_guard(node, until),
            Action::ExtendGuard { until } => self.extend_guard(node, until),
            Action::DisarmGuard => self.nodes[node].guard.until = None,
            Action::Fence => self.fire_guard_now(node),
            Action::Unfence { until } => self.unfence(node, until),
            Action::MayCommit(epoch) => {
                if self.nodes[node].asked.is_some_and(|(asked, _)| asked == epoch)
                    && self.flaw != Flaw::CommitBeforeArming
                {
                    self.nodes[node].asked = None;
                    self.transmit(node, Packet::End(epoch));
                }
            }
            Action::Restore { epoch, term, .. } => self.restore(node, epoch, term),
            Action::Announce { term } => {
                self.promotions += 1;
                if self.nodes[node].tree != Tree::Running || self.started > term {
                    self.violate(format!("{node} announces term {term} without a running copy of it"));
                }
            }
            Action::DestroyCopy => self.destroy(node),
            Action::Ask { term } => self.ask(node, term),
            Action::Suspended => self.stop_agent(node, (50_000, 600_000)),
            Action::BecomeStandby { .. }
            | Action::Unprotected
            | Action::Forgotten
            | Action::Stuck { .. }
            | Action::Rejected { .. } => {}
        }
    }
}
