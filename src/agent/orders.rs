//! What operators order beside handoffs: failover, fence and unfence, pause and resume; for rejoin see [`super::rejoin`].
//!
//! Each is answered when it is done, or will not be; none is safe that cannot be, without `force`.

use super::{
    api::{ApiError, FailoverRequest, WorkloadStatus},
    mailbox::{Answer, Msg},
    owner::Owner,
    rejoin::Rejoin,
};
use crate::{
    arbiter::{Report, Wanted},
    ha::{Arbiter, Core, Input, Standing},
    model::Term,
};

/// Why a promotion is one that an operator has ordered.
pub(super) const BY_OPERATOR: &str = "an operator's failover";

/// An order under way, answered when the core has done it.
pub(super) enum Order {
    Failover(Answer<WorkloadStatus>),
    Fence(Answer<WorkloadStatus>),
    Unfence(Answer<WorkloadStatus>),
    Pause(Answer<WorkloadStatus>),
    Rejoin(Rejoin),
}

impl Order {
    fn answer(self) -> Answer<WorkloadStatus> {
        match self {
            Self::Failover(answer) | Self::Fence(answer) | Self::Unfence(answer) | Self::Pause(answer) => {
                answer
            }
            Self::Rejoin(rejoin) => rejoin.answer,
        }
    }
}

impl Owner {
    fn peer(&self) -> &str {
        self.durable.peer.as_deref().unwrap_or("the other host")
    }

    /// One order at a time.
    fn order(&mut self, order: Order, input: Input) {
        if self.order.is_some() {
            let _ = order.answer().send(Err(ApiError::refused("another order is under way; try again")));
            return;
        }
        self.order = Some(order);
        self.feed(input);
        self.look_at_order();
    }

    pub(super) fn failover(&mut self, request: FailoverRequest, answer: Answer<WorkloadStatus>) {
        let (name, peer) = (&self.name, self.peer());
        let refusal = match self.standing() {
            None => Some(format!("{name} is not protected")),
            Some(Standing::Primary) => {
                Some(format!("{name} runs here already; `standin handoff {name}` moves it away"))
            }
            Some(Standing::Standby) if !request.force => Some(self.why_not_by_itself()),
            Some(Standing::Standby | Standing::Stuck) => None,
            Some(Standing::Promoting) => Some(format!("{name} is being restored here already")),
            Some(_) => Some(format!(
                "this host has an old copy of {name}, or none: ask the agent on {peer}. If {peer} is off for good, \
                 `standin unprotect {name} --force` lets a frozen copy run"
            )),
        };
        if let Some(refusal) = refusal {
            let _ = answer.send(Err(ApiError::refused(refusal)));
            return;
        }
        if self.standing() == Some(Standing::Standby) {
            self.event("forced", &format!("the operator says that {peer} is off: run it here"), None);
        }
        self.promote_because = Some(BY_OPERATOR.to_owned());
        self.order(Order::Failover(answer), Input::ForcePromote);
    }

    /// Why a standby does not take over.
    fn why_not_by_itself(&self) -> String {
        let (name, peer) = (&self.name, self.peer());
        let force = format!("If you know that {peer} is off: standin failover {name} --force");
        if !self.core.as_ref().is_some_and(Core::armed) {
            return format!("this standby holds nothing of {name} that is current. {force}");
        }
        match self.durable.spec.arbiter {
            Arbiter::Operator => format!(
                "nothing here can tell whether {peer} is off, and nobody asks (on_standby_loss = \"continue\"). While {peer} \
                 answers: standin handoff {name}, there. {force}"
            ),
            Arbiter::Command => format!(
                "{name} is taken over when {peer} falls silent and the fence command has switched it off. While {peer} \
                 answers: standin handoff {name}, there. {force}"
            ),
            Arbiter::Peer | Arbiter::Store => format!(
                "{name} is taken over by itself when the lease of {peer} ends; it has not. While {peer} answers: standin \
                 handoff {name}, there. {force}"
            ),
        }
    }

    pub(super) fn fence_by_order(&mut self, answer: Answer<WorkloadStatus>) {
        if self.handoff.is_some() {
            let _ = answer.send(Err(ApiError::refused("a handoff is under way: wait for its end")));
            return;
        }
        self.order(Order::Fence(answer), Input::Fence);
    }

    pub(super) fn unfence_by_order(&mut self, answer: Answer<WorkloadStatus>) {
        self.order(Order::Unfence(answer), Input::Unfence);
    }

    pub(super) fn pause(&mut self, answer: Answer<WorkloadStatus>) {
        if self.standing() != Some(Standing::Primary) || self.handoff.is_some() {
            let reason = format!("{} does not run here, or is being moved: see `standin status`", self.name);
            let _ = answer.send(Err(ApiError::refused(reason)));
            return;
        }
        self.end_session();
        self.order(Order::Pause(answer), Input::Suspend);
    }

    /// The standby was told, durably: this host runs without a guard, and captures nothing.
    pub(super) fn paused(&mut self) {
        self.durable.paused = true;
        self.write_durable();
        self.event("paused", "an operator has paused the protection: no epochs, and nobody takes over", None);
        self.answer_order(Ok(()));
    }

    /// Protection goes on; also what ends a pause that the standby did not answer.
    pub(super) fn resume_protection(&mut self) -> Result<WorkloadStatus, ApiError> {
        let waits = matches!(self.order, Some(Order::Pause(_)));
        if !self.durable.paused && !waits {
            return Err(ApiError::refused(format!("the protection of {} is not paused", self.name)));
        }
        if waits {
            self.order = None;
        }
        if std::mem::take(&mut self.durable.paused) {
            self.write_durable();
            self.event("resumed", "an operator has resumed the protection", None);
        }
        self.last_committed = None;
        self.feed(Input::Resume);
        Ok(self.status())
    }

    fn write_durable(&mut self) {
        if let Err(error) = self.place.write(&self.durable) {
            self.error = Some(format!("the workload's record cannot be written: {error}"));
        }
    }

    /// Answers an order that has been done.
    pub(super) fn look_at_order(&mut self) {
        let kept = self.core.as_ref().is_some_and(|core| core.record().fenced);
        let standing = self.standing();
        let outcome = match &self.order {
            Some(Order::Failover(_)) => match standing {
                Some(Standing::Primary) => Some(Ok(())),
                Some(Standing::Stuck) => Some(Err(self.error.clone().unwrap_or_default())),
                _ => None,
            },
            Some(Order::Fence(_)) => kept.then_some(Ok(())),
            Some(Order::Unfence(_)) => (!kept).then_some(Ok(())),
            Some(Order::Rejoin(_)) => return self.look_at_rejoin(),
            Some(Order::Pause(_)) | None => None,
        };
        match outcome {
            Some(Ok(())) => {
                match self.order {
                    Some(Order::Fence(_)) => {
                        self.event("fenced-by-operator", "until `standin unfence`", None);
                    }
                    Some(Order::Unfence(_)) => {
                        self.event("unfenced-by-operator", "it runs again as after any fencing", None);
                    }
                    _ => {}
                }
                self.answer_order(Ok(()));
            }
            Some(Err(reason)) => self.answer_order(Err(ApiError::failed(reason))),
            None => {}
        }
    }

    pub(super) fn answer_order(&mut self, outcome: Result<(), ApiError>) {
        if let Some(order) = self.order.take() {
            let status = outcome.map(|()| self.status());
            let _ = order.answer().send(status);
        }
    }

    // The arbiter.

    /// The core asks whether the peer's host is off. Of etcd it has asked by its claim.
    pub(super) fn ask_arbiter(&mut self, term: Term) {
        if self.durable.spec.arbiter != Arbiter::Command {
            return;
        }
        let Some(command) = self.agent.config.arbiter.command().cloned() else {
            self.error = Some(
                "the fence command that this protection was begun with is not set here any more: set `fence_command`".to_owned(),
            );
            self.answer_arbiter(term, false);
            return;
        };
        let peer = self.peer().to_owned();
        self.event(
            "fencing-peer",
            &format!("{peer} is silent: {} shall switch it off", command.program.display()),
            None,
        );
        let (agent, name, to_self) = (self.agent.clone(), self.name.clone(), self.to_self.clone());
        let heard = self.lease_renewed;
        tokio::spawn(async move {
            let outcome = agent.fencer.fence(&command, &peer, &name, heard).await;
            let _ = to_self.send(Msg::PeerFenced { term, outcome }).await;
        });
    }

    /// What the core wants of etcd, once all that it has said is done.
    pub(super) fn look_at_claim(&mut self) {
        let Some(core) = self.core.as_ref().filter(|_| self.durable.spec.arbiter == Arbiter::Store) else {
            return self.give_claim_up();
        };
        let (term, record) = (core.claim(), core.record().term);
        if let Some((claimant, wanted)) = &mut self.claimant {
            let generation = wanted.generation + u64::from(wanted.term != term);
            let now = Wanted { generation, term, record };
            if *wanted != now {
                *wanted = now;
                claimant.want(now);
            }
            return;
        }
        let Some(etcd) = &self.agent.etcd else {
            self.error =
                Some("the etcd that this protection was begun with is not set here any more".to_owned());
            return;
        };
        let wanted = Wanted { generation: 1, term, record };
        let to_self = self.to_self.clone();
        // One that does not fit into the queue is made up for by the next.
        let report = move |report| drop(to_self.try_send(Msg::Arbiter(report)));
        self.claimant = Some((etcd.claimant(&self.name, &self.agent.config.name, wanted, report), wanted));
    }

    /// The workload is not protected any more: nobody shall find its terms there.
    fn give_claim_up(&mut self) {
        let (Some(_), Some(etcd)) = (self.claimant.take(), self.agent.etcd.clone()) else { return };
        let (name, host) = (self.name.clone(), self.agent.config.name.clone());
        tokio::spawn(async move {
            if let Err(error) = etcd.forget(&name, &host).await {
                tracing::warn!(%name, %error, "the workload's keys stay in etcd");
            }
        });
    }

    pub(super) fn arbiter_said(&mut self, report: Report) {
        let current = self.claimant.as_ref().map(|(_, wanted)| wanted.generation);
        match report {
            Report::Held { generation, term, until } if current == Some(generation) => {
                self.feed(Input::Leased { term, until });
                self.promote_because =
                    Some("the primary was silent, and has lost its key in etcd".to_owned());
                self.feed(Input::Agreed { term });
                if self.standing() != Some(Standing::Promoting) {
                    self.promote_because = None;
                }
            }
            Report::Refused { generation, term } if current == Some(generation) => {
                self.feed(Input::Disagreed { term });
            }
            // Of a claim that was given up since.
            Report::Held { .. } | Report::Refused { .. } => {}
        }
    }

    fn answer_arbiter(&self, term: Term, agreed: bool) {
        let outcome = if agreed { Ok(String::new()) } else { Err(String::new()) };
        let _ = self.to_self.try_send(Msg::PeerFenced { term, outcome });
    }

    pub(super) fn peer_fenced(&mut self, term: Term, outcome: Result<String, String>) {
        match outcome {
            Ok(detail) => {
                self.event("peer-fenced", &detail, None);
                self.promote_because =
                    Some("the fence command has switched the primary's host off".to_owned());
                self.feed(Input::Agreed { term });
            }
            Err(reason) => {
                if !reason.is_empty() {
                    self.event("fence-failed", &reason, None);
                    self.error = Some(reason);
                }
                self.feed(Input::Disagreed { term });
            }
        }
    }
}
