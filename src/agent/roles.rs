//! What an owner does when its host's part changes: begins to protect, becomes a standby, is demoted; for promotion see
//! [`super::promotion`].

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{
    api::{ApiError, ProtectRequest, Source, WorkloadStatus},
    home::Home,
    hooks::Cause,
    links::Link,
    mailbox::{Answer, Msg, Offer},
    orders,
    owner::{Owner, Running, boot_now},
    session::{Permit, Session},
    standby::Standby,
    throttle::Brake,
    trees,
};
use crate::{
    capture::Capturer,
    ha::{self, Copy, Core, Input, Message, Record, Standing, Start},
    model::{Epoch, Term},
    observe::in_full,
    takeover::check::check_vip,
    transport::block_in_place,
    wire::message::Reply,
    workload::{
        guard::GuardState,
        spec::{Net, Vip},
    },
};

/// Orders that may wait for a session.
const ORDERS_MAX: usize = 4;

impl Owner {
    /// The way to the other host.
    pub(super) fn link(&self) -> Option<Link> {
        let peer = self.durable.peer.as_ref()?.parse().ok()?;
        Some(self.agent.links.to(&self.agent, &peer))
    }

    // Starting.

    /// Goes on where an earlier agent of this host ended.
    pub(super) fn resume(&mut self) {
        let Some(mut record) = self.durable.record else { return };
        let marked = Standby::marked(&self.agent, &self.name);
        self.lazy_pages = marked.is_some() && Standby::is_served(&self.agent, &self.name);
        if let (Some(epoch), ha::Role::Primary { .. }, false) = (marked, record.role, self.lazy_pages) {
            // The tree lacks pages that nobody brings any more: it is restored anew from the same epoch, if that can be.
            let once = trees::has_files(&self.agent.config, &self.durable.spec.place);
            self.event(
                if once { "pages-lost" } else { "restored-anew" },
                "what brought the workload its pages ended before the last one was there",
                Some(epoch),
            );
            self.kill_copy();
            record.role = ha::Role::Promoting { epoch };
        }
        if (!matches!(record.role, ha::Role::Primary { .. }) || marked.is_some())
            && let Err(error) = self.open_standby()
        {
            self.error = Some(in_full(&error));
        }
        if let (true, Some(standby)) = (self.lazy_pages, &self.standby) {
            standby.await_served(self.to_self.clone());
        }
        let copy = self.copy();
        // Also of a standby's place that waits: what it restores must be reached at once.
        self.prepare_addresses();
        let guard_until = self.home.as_ref().and_then(|home| match home.keeper().guard().state() {
            GuardState::Armed { deadline_ns } => Some(std::time::Duration::from_nanos(deadline_ns)),
            _ => None,
        });
        self.start_core(record, copy, guard_until);
        if copy == Copy::Running && self.standing() == Some(Standing::Primary) {
            // The agent before may have ended when the copy ran and was not heard yet. A guard that has fired refuses it.
            self.speak();
        }
    }

    fn copy(&self) -> Copy {
        let Some(home) = &self.home else { return Copy::Gone };
        match home.root() {
            Ok(Some(_)) if home.keeper().guard().fired() => Copy::Frozen,
            Ok(Some(_)) if home.keeper().cgroup().is_frozen().unwrap_or(false) => Copy::Frozen,
            Ok(Some(_)) => Copy::Running,
            _ => Copy::Gone,
        }
    }

    fn start_core(&mut self, record: Record, copy: Copy, guard_until: Option<std::time::Duration>) {
        let held = self.standby.as_ref().and_then(|standby| standby.held());
        let mut seed = [0; 8];
        // A kernel without random numbers has worse troubles; the clock tells one life from another too.
        if getrandom::fill(&mut seed).is_err() {
            seed = boot_now().as_nanos().to_le_bytes()[..8].try_into().unwrap_or_default();
        }
        let start = Start {
            arbiter: self.durable.spec.arbiter,
            record,
            copy,
            held,
            guard_until,
            first_seq: u64::from_le_bytes(seed) >> 1,
        };
        match Core::start(self.agent.config.timing, boot_now(), &start) {
            Ok((core, actions)) => {
                self.core = Some(core);
                self.perform(actions);
            }
            // The settings were validated when the agent started.
            Err(error) => self.error = Some(error.to_string()),
        }
    }

    fn prepare_addresses(&mut self) {
        let (spec, held) = (self.durable.spec.clone(), self.owes_output());
        if let Some(home) = &mut self.home
            && let Err(error) = block_in_place(|| home.prepare(&spec, held))
        {
            self.error = Some(format!("the address cannot be served here: {}", in_full(&error)));
        }
    }

    // Protecting.

    pub(super) fn protect(
        &mut self,
        request: &ProtectRequest,
        shipped: &[String],
        answer: Answer<WorkloadStatus>,
    ) {
        if let Err(error) = self.check_protect(request) {
            let _ = answer.send(Err(error));
            return;
        }
        for what in shipped {
            self.event("shipped", what, None);
        }
        let begun = self.begin_protection(request);
        match begun {
            Ok(()) => self.protecting = Some(answer),
            Err(error) => {
                if !matches!(request.source, Source::Run(_)) {
                    self.release();
                    self.gone = true;
                }
                let _ = answer.send(Err(error));
            }
        }
    }

    fn check_protect(&self, request: &ProtectRequest) -> Result<(), ApiError> {
        if self.core.is_some() {
            let peer = self.durable.peer.as_deref().unwrap_or("?");
            return Err(ApiError::refused(format!(
                "{} is protected already, with {peer}; see `standin status {}`",
                self.name, self.name
            )));
        }
        request.pace.check().map_err(ApiError::invalid)?;
        let peer = request.to.parse().map_err(ApiError::invalid)?;
        if self.agent.endpoint.peers().by_name(&peer).is_none() {
            return Err(ApiError::not_found(format!(
                "{} is not paired with this host: `standin pair --listen` there, then `standin pair HOST:PORT CODE` here",
                request.to
            )));
        }
        for vip in &request.vips {
            self.check_address(vip)?;
        }
        Ok(())
    }

    fn check_address(&self, vip: &Vip) -> Result<(), ApiError> {
        check_vip(vip, None).map_err(ApiError::invalid)?;
        if let Net::Own { ips } = &self.durable.spec.place.net()
            && !ips.iter().any(|ip| ip.addr == vip.cidr.addr)
        {
            return Err(ApiError::invalid(format!(
                "{} is not an address of {}: start or protect it with --ip {}",
                vip.cidr.addr, self.name, vip.cidr
            )));
        }
        Ok(())
    }

    fn begin_protection(&mut self, request: &ProtectRequest) -> Result<(), ApiError> {
        let home = self.home.as_mut().ok_or_else(|| ApiError::failed("the workload's place is gone"))?;
        match home.root() {
            Ok(Some(_)) => {}
            Ok(None) => {
                return Err(ApiError::refused(format!(
                    "{} has ended: there is nothing to protect",
                    self.name
                )));
            }
            Err(error) => return Err(ApiError::failed(in_full(&error))),
        }
        let mut durable = self.durable.clone();
        durable.spec.vips.clone_from(&request.vips);
        durable.spec.pace = request.pace;
        durable.spec.commit = request.commit;
        durable.spec.arbiter = self.agent.config.arbiter.kind();
        durable.peer = Some(request.to.clone());
        // A term that no earlier protection of this name has used here.
        let term = Term(unused_term(&self.history));
        durable.record = Some(Record::primary(term));
        block_in_place(|| home.prepare(&durable.spec, false))
            .map_err(|error| ApiError::failed(in_full(&error)))?;
        self.check_commit(request.commit)?;
        block_in_place(|| self.place.write(&durable)).map_err(ApiError::failed)?;
        self.durable = durable;
        self.event("protecting", &format!("{} is to be the standby", request.to), None);
        self.hooks.cause = Some(Cause::Protected);
        self.start_core(Record::primary(term), Copy::Running, None);
        self.speak();
        Ok(())
    }

    // Session.

    /// Keeps a session running exactly while this host is the primary.
    pub(super) fn drive_session(&mut self) {
        let term = self.durable.record.map_or(Term(0), |record| record.term);
        let pauses = self.durable.paused || matches!(self.order, Some(orders::Order::Pause(_)));
        let primary = self.standing() == Some(Standing::Primary) && self.stopping.is_none() && !pauses;
        let first_epoch = self.core.as_ref().map_or(Epoch(1), Core::first_epoch);
        // CRIU cannot reach tasks that a cgroup has stopped.
        let stopped = self.holding || self.home.as_ref().is_some_and(Home::is_paused);
        let (commit, owes_output) = (self.durable.spec.commit, self.owes_output());
        let permit = Permit { may_capture: primary && !stopped, first_epoch, commit, owes_output };
        self.permit_epochs.send_if_modified(|current| std::mem::replace(current, permit) != permit);
        if let Some(session) = &self.session {
            if session.task.is_finished() {
                self.session = None;
            } else if session.term != term {
                self.end_session();
            }
            return;
        }
        if !primary
            || self.demoting
            || self.lazy_pages
            || self.unprotecting.is_some()
            || self.error_is_final()
        {
            return;
        }
        let (Some(link), Some(home)) = (self.link(), &self.home) else { return };
        let source = match home.source(&self.agent, &self.durable.spec) {
            Ok(source) => source,
            Err(error) => {
                tracing::debug!(%error, "no session yet");
                if matches!(home.root(), Ok(None)) {
                    self.workload_ended();
                }
                return;
            }
        };
        let (orders_tx, orders) = mpsc::channel(ORDERS_MAX);
        let session = Session {
            name: self.name.clone(),
            spec: self.durable.spec.clone(),
            term,
            link,
            owner: self.to_self.clone(),
            orders,
            permit: self.permit_epochs.subscribe(),
            hold: home.hold().cloned(),
            doors: home.place.gate().map_or_else(Vec::new, |gate| gate.doors().to_vec()),
            brake: Brake::new(&self.speed),
        };
        let owner = self.to_self.clone();
        let reference_bytes = self.agent.config.reference_bytes;
        let task = tokio::spawn(async move {
            let begin = move || {
                Capturer::new(source).map(|mut capturer| {
                    capturer.limit_references(reference_bytes);
                    capturer
                })
            };
            match tokio::task::spawn_blocking(begin).await {
                Ok(Ok(capturer)) => session.run(capturer).await,
                Ok(Err(error)) => {
                    let _ = owner.send(Msg::EpochFailed { term, error: error.into() }).await;
                    // Not again at once: what CRIU or the kernel refuses, it refuses for a while.
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                }
                Err(error) => tracing::error!(%error, "the thread that was to track the workload"),
            }
        });
        self.session = Some(Running { term, task, orders: orders_tx });
    }

    /// Protection is being given up because the workload has ended, or could not be begun.
    fn error_is_final(&self) -> bool {
        self.core.as_ref().is_some_and(Core::is_ending)
    }

    /// No more epochs; one that is under way ends by itself.
    pub(super) fn end_session(&mut self) {
        if let Some(session) = &mut self.session {
            let (closed, _) = mpsc::channel(1);
            session.orders = closed;
        }
    }

    // Standby.

    /// A primary asks this host to be its standby. An offer of a newer term is answered when this host has found out
    /// what that means for its own copy.
    pub(super) fn answer_offer(&mut self, offer: Offer) {
        let own = self.term();
        let peer_is_ours = self.durable.peer.as_deref() == Some(&offer.peer);
        if self.standing().is_some() && peer_is_ours && (offer.term > own || self.demoting) {
            let (term, spec) = (offer.term, offer.spec.clone());
            self.waiting_offer = Some(offer);
            if !self.demoting {
                self.durable.spec = spec;
                self.feed(Input::Message(Message::Known { term, standing: Standing::Primary, held: None }));
            }
            return;
        }
        let reply = self.judge_offer(&offer).unwrap_or_else(|reason| Reply::Refused { term: own, reason });
        // A primary that has gone away asks again.
        let _ = offer.answer.send(reply);
    }

    /// The term that is on disk here.
    pub(super) fn term(&self) -> Term {
        self.core.as_ref().map_or(Term(0), |core| core.record().term)
    }

    fn judge_offer(&mut self, offer: &Offer) -> Result<Reply, String> {
        let own = self.term();
        self.check_arbiter(offer)?;
        match self.standing() {
            None if self.home.is_some() => {
                return Err(format!(
                    "a workload named {} runs there, unprotected: remove or rename one of them",
                    self.name
                ));
            }
            None => self.begin_standby(offer)?,
            Some(_) if self.durable.peer.as_deref() != Some(&offer.peer) => {
                return Err(format!("a workload named {} is protected there with another host", self.name));
            }
            Some(Standing::Standby) if offer.term == own => {
                if self.durable.spec != offer.spec {
                    if self.durable.spec.place != offer.spec.place {
                        // What waits here is another one.
                        self.kill_copy();
                    }
                    self.durable.spec = offer.spec.clone();
                    block_in_place(|| self.place.write(&self.durable))
                        .map_err(|error| format!("its state cannot be written there: {error}"))?;
                }
            }
            Some(standing) => {
                return Err(format!("{} stands as {standing:?} there, under term {own}", self.name));
            }
        }
        self.open_standby()
            .map_err(|error| format!("its image cannot be kept there: {}", in_full(&error)))?;
        self.warm_place().map_err(|error| format!("its place cannot be made there: {}", in_full(&error)))?;
        let standby = self.standby.as_ref().ok_or("its image cannot be kept there")?;
        let held = standby.held();
        if held.is_none() {
            standby.ensure_room(offer.bytes)?;
        }
        Ok(Reply::Accepted { held })
    }

    /// Who decides must be the same on both hosts: a standby that promotes when the lease ends is none for a primary that runs
    /// without one.
    fn check_arbiter(&self, offer: &Offer) -> Result<(), String> {
        let (theirs, ours) = (offer.spec.arbiter, self.agent.config.arbiter.kind());
        if theirs != ours {
            return Err(format!(
                "who decides is not the same on both hosts: {theirs} on {}, {ours} on {}; set `arbiter` and \
                 `on_standby_loss` alike, restart the agents, and protect it anew",
                offer.peer, self.agent.config.name
            ));
        }
        if self.standing().is_some() && self.durable.spec.arbiter != theirs {
            return Err(
                "who decides has changed since the protection began: end it and protect it anew".to_owned()
            );
        }
        Ok(())
    }

    /// A workload that is new on this host.
    fn begin_standby(&mut self, offer: &Offer) -> Result<(), String> {
        let record = Record::standby(offer.term);
        self.durable.spec = offer.spec.clone();
        self.durable.peer = Some(offer.peer.clone());
        self.durable.record = Some(record);
        let begun = block_in_place(|| self.place.write(&self.durable))
            .map_err(anyhow::Error::from)
            .and_then(|()| self.open_standby());
        if let Err(error) = begun {
            self.gone = true;
            // Nothing depends on it yet; a record that stays is found by the next agent and offered to again.
            let _ = self.place.forget();
            return Err(format!("its image cannot be kept there: {}", in_full(&error)));
        }
        self.start_core(record, Copy::Gone, None);
        self.event("became-standby", &format!("of {}", offer.peer), None);
        Ok(())
    }

    fn answer_waiting_offer(&mut self) {
        if let Some(offer) = self.waiting_offer.take() {
            self.answer_offer(offer);
        }
    }

    pub(super) fn open_standby(&mut self) -> anyhow::Result<()> {
        if self.standby.is_none() {
            self.standby = Some(Arc::new(block_in_place(|| Standby::open(&self.agent, &self.name))?));
        }
        Ok(())
    }

    /// The place into which the workload would be restored: there, empty, silent.
    pub(super) fn warm_place(&mut self) -> anyhow::Result<()> {
        if self.home.as_ref().is_some_and(Home::can_take_a_tree) {
            return Ok(());
        }
        self.home = None;
        let (agent, spec) = (Arc::clone(&self.agent), self.durable.spec.clone());
        // Files that the workload has changed since the held epoch are not those of it.
        let ran = Standby::has_run(&self.agent, &self.name);
        let fresh =
            self.standby.as_ref().and_then(|standby| standby.held()).is_none_or(|held| ran >= Some(held));
        let mut home = block_in_place(|| {
            Home::destroy(&agent, spec.place.name())?;
            Home::create(&agent, &spec.place, fresh)
        })?;
        if let Err(error) = block_in_place(|| home.prepare(&spec, false)) {
            // A takeover would restore it and could not be reached: better to be told now.
            block_in_place(|| Home::destroy(&agent, spec.place.name()))?;
            return Err(error);
        }
        self.home = Some(home);
        Ok(())
    }

    pub(super) fn become_standby(&mut self, term: Term) {
        if self.handoff.is_some() {
            self.demoting = true;
            return;
        }
        let peer = self.durable.peer.clone().unwrap_or_default();
        self.event("became-standby", &format!("of {peer}, which runs it under term {term}"), None);
        self.refresh_standby();
    }

    /// The source's CRIU has ended: the place is made anew for the way back.
    pub(super) fn finish_demotion(&mut self) {
        if std::mem::take(&mut self.demoting) {
            self.holding = false;
            let term = self.durable.record.map_or(Term(0), |record| record.term);
            self.become_standby(term);
        }
    }

    pub(super) fn refresh_standby(&mut self) {
        self.kill_copy();
        self.last_committed = None;
        self.error = None;
        let opened = self.open_standby().and_then(|()| self.warm_place());
        if let Err(error) = opened {
            self.error = Some(format!("this host cannot be the standby: {}", in_full(&error)));
        }
        self.answer_waiting_offer();
    }

    // Ending.

    pub(super) fn destroy_copy(&mut self) {
        self.end_session();
        if let Some(verdict) = self.handoff.as_mut().and_then(|handoff| handoff.verdict.take()) {
            // What came for it meanwhile is sent after it, now that the address is not here any more.
            if let Some(Err(error)) = self
                .home
                .as_ref()
                .and_then(|home| home.hold())
                .map(|hold| block_in_place(|| hold.pass_input()))
            {
                tracing::debug!(%error, "what clients sent during the handoff is lost to them");
            }
            // The tree is frozen and silent; CRIU kills it when it hears yes.
            self.hooks.cause = Some(Cause::HandedOff);
            let _ = verdict.send(true);
            return;
        }
        self.hooks.cause = Some(Cause::Replaced);
        if self.home.is_some() {
            self.event("destroyed", "the copy on this host is out of date", None);
        }
        self.kill_copy();
    }

    /// Cuts the copy off, then ends it and takes its place down.
    pub(super) fn kill_copy(&mut self) {
        self.forget_guard();
        let bare = std::mem::take(&mut self.durable.bare);
        self.home = None;
        let destroyed = block_in_place(|| Home::destroy(&self.agent, &self.name));
        if let Err(error) = destroyed {
            tracing::error!(%error, name = %self.name, "taking the old place down");
        }
        if bare {
            self.release();
        }
    }

    /// Gives what somebody else started back to them, running.
    pub(super) fn release(&mut self) {
        self.forget_guard();
        self.home = None;
        if let Err(error) = block_in_place(|| super::home::release(&self.agent, &self.name)) {
            tracing::warn!(%error, name = %self.name, "giving the workload back");
        }
    }

    /// For good.
    pub(super) fn destroy_home(&mut self) {
        self.forget_guard();
        self.home = None;
        if let Err(error) = block_in_place(|| Home::remove(&self.agent, &self.name)) {
            tracing::error!(%error, name = %self.name, "taking the place down");
        }
        self.kill_copy();
    }
}

/// Terms grow for ever, also from one protection to the next.
fn unused_term(history: &crate::observe::HistoryLog) -> u64 {
    history.events().iter().map(|event| event.term.0).max().unwrap_or(0) + 1
}
