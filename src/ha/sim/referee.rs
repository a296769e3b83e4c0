//! Those who decide besides the two hosts: a store that both can reach, at times, and a command that cuts the peer's power.

use std::{collections::BTreeSet, time::Duration};

use super::{Event, FAULTS_US, Flaw, Work, World};
use crate::{
    ha::{Arbiter, Input},
    model::Term,
};

/// How long a key stays that is not asked for again.
const KEY_US: u64 = 400_000;
/// How often it is.
const ASK_US: u64 = 60_000;

/// One claim of one node: what belongs to it can be told from what belongs to any other.
type Claim = (usize, u64);

/// What the store keeps.
#[derive(Default)]
pub(super) struct Store {
    /// Which claim has the key, and until when unless it is extended.
    key: Option<(Claim, u64)>,
    /// The newest term that was given a key, for which claim, and what stood there before.
    top: Term,
    by: Option<Claim>,
    was: Term,
    /// Claims that were given up: what still comes of them is refused.
    over: BTreeSet<Claim>,
    /// No packet goes to or from a node before this time.
    cut_until: [u64; 2],
}

#[derive(Clone, Copy)]
pub(super) struct Question {
    claim: Claim,
    life: u64,
    /// `None`: the claim is given up, and so is the right of this node to any term above that.
    term: Option<Term>,
    record: Term,
    sent: Duration,
}

#[derive(Clone, Copy)]
pub(super) struct Answer {
    question: Question,
    given: bool,
}

impl World {
    pub(super) fn ask(&mut self, node: usize, term: Term) {
        if self.arbiter != Arbiter::Command {
            return;
        }
        let life = self.nodes[node].life;
        self.after(20_000, 400_000, Event::FenceEnds { node, life, term });
    }

    /// The command ran: should the agent have died, its peer is off all the same.
    pub(super) fn fence_ends(&mut self, node: usize, life: u64, term: Term) {
        let works = self.now_us >= FAULTS_US || !self.rng.one_in(4);
        if works && self.flaw != Flaw::FenceLies {
            self.note(|| format!("{node} has the other one's power cut"));
            self.cut_power(1 - node);
        }
        if self.nodes[node].life == life {
            let input = if works { Input::Agreed { term } } else { Input::Disagreed { term } };
            self.give(node, Work::Input(input));
        }
    }

    /// What the core wants of the store now.
    pub(super) fn look_at_claim(&mut self, node: usize) {
        let host = &mut self.nodes[node];
        let Some(core) = &host.core else { return };
        let claim = core.claim();
        if claim == host.claim {
            return;
        }
        if host.claim.is_some() {
            // Given up before anything else is asked for.
            host.claim = None;
            self.question(node);
        }
        let host = &mut self.nodes[node];
        host.claims += 1;
        host.claim = claim;
        self.question(node);
    }

    pub(super) fn send_claim(&mut self, node: usize, life: u64) {
        if self.nodes[node].life != life {
            return;
        }
        self.after(ASK_US, ASK_US + 1, Event::Claim { node, life });
        if !self.nodes[node].paused {
            self.question(node);
        }
    }

    fn question(&mut self, node: usize) {
        let host = &self.nodes[node];
        let Some(core) = &host.core else { return };
        let question = Question {
            claim: (node, host.claims),
            life: host.life,
            term: host.claim,
            record: core.record().term,
            sent: self.local(node),
        };
        self.questions.push(question);
        let question = self.questions.len() - 1;
        self.carry(node, Event::AtStore { question });
    }

    fn carry(&mut self, node: usize, event: Event) {
        let quiet = self.now_us >= FAULTS_US;
        if !quiet && (self.now_us < self.store.cut_until[node] || self.rng.one_in(self.loss_one_in)) {
            return;
        }
        let most = if quiet || !self.rng.one_in(5) { 1_000 } else { self.delay_max_us };
        self.after(100, most + 1, event);
    }

    pub(super) fn cut_store(&mut self, node: usize) {
        let until = self.now_us + self.rng.range(50_000, 1_200_000);
        self.store.cut_until[node] = until;
        if self.rng.one_in(2) {
            self.store.cut_until[1 - node] = until;
        }
    }

    pub(super) fn at_store(&mut self, question: usize) {
        let question = self.questions[question];
        let (node, now) = (question.claim.0, self.now_us);
        let overtaken_too = self.flaw == Flaw::OvertakenKeyGiven;
        let store = &mut self.store;
        store.key = store.key.filter(|(_, until)| now < *until);
        let given = match question.term {
            None => {
                store.over.insert(question.claim);
                store.key = store.key.filter(|(claim, _)| *claim != question.claim);
                if store.by.is_some_and(|by| by.0 == node && by.1 <= question.claim.1)
                    && store.top > question.record
                {
                    store.top = store.was;
                    store.by = None;
                }
                return;
            }
            Some(term) => {
                let free = store.key.is_none_or(|(claim, _)| claim == question.claim);
                let mine = store.top == term && store.by.is_none_or(|by| by.0 == node);
                let newest = store.top < term || mine || overtaken_too;
                free && newest && !store.over.contains(&question.claim) && {
                    if store.top < term {
                        store.was = store.top;
                    }
                    store.top = store.top.max(term);
                    store.by = Some(question.claim);
                    store.key = Some((question.claim, now + KEY_US));
                    true
                }
            }
        };
        self.answers.push(Answer { question, given });
        let answer = self.answers.len() - 1;
        self.carry(node, Event::FromStore { answer });
    }

    pub(super) fn store_answers(&mut self, answer: usize) {
        let Answer { question, given } = self.answers[answer];
        let (node, number) = question.claim;
        let host = &self.nodes[node];
        if host.life != question.life || host.claims != number || host.claim != question.term {
            return;
        }
        let Some(term) = question.term else { return };
        let from = if self.flaw == Flaw::KeyFromReceive { self.local(node) } else { question.sent };
        // The store's clock may be faster by as much as two hosts' may differ.
        let until = from + Duration::from_micros(KEY_US - KEY_US / 50);
        if given {
            self.give(node, Work::Input(Input::Leased { term, until }));
            self.give(node, Work::Input(Input::Agreed { term }));
        } else {
            self.give(node, Work::Input(Input::Disagreed { term }));
        }
    }
}
