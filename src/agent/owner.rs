//! One task owns each workload on this host: whatever happens to it goes through [`Owner::run`], one thing after the other.
//!
//! The owner executes what [`ha::Core`](crate::ha::Core) decides and decides nothing of its own about who may run. It
//! keeps the place (sandbox or bare tree), the store, the session of epochs and the history.
//!
//! ```text
//!   control socket ─┐                 ┌─► durable record        (Persist → Persisted)
//!   peer ───────────┤   ┌──────────┐  ├─► guard, gate, address  (ExtendGuard, Fence, Unfence, Announce)
//!   session ────────┼──►│  owner   ├──┼─► restore               (Restore → Restored)
//!   timer ──────────┤   │ ha::Core │  ├─► session of epochs     (MayCommit)
//!   standby ────────┘   └──────────┘  └─► peer                  (Send)
//! ```
//!
//! Invariant: while a handoff's final epoch is held (`holding`), the copy is frozen and silent by the guard, and nothing
//! but the handoff's outcome lets it run again.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Agent,
    api::{ApiError, History, WorkloadStatus},
    drill::Drill,
    durable::{self, Durable},
    handoff::Handoff,
    home::Home,
    hooks::Hooks,
    mailbox::{Answer, Msg, Offer},
    orders,
    receiving::Received,
    session::{Order, Permit, SessionError},
    standby::Standby,
    throttle::{Speed, Valve},
};
use crate::{
    arbiter::{Claimant, Wanted},
    capture::pace::{Report, StretchedBy},
    drill,
    ha::{self, Action, Core, Input, Message, Standing, Ticket},
    model::{EpochFigures, EpochId, Name, Term},
    observe::HistoryLog,
    transport::{Connection, block_in_place},
    wire::message::{EpochAnswer, Reply, Request},
    workload::guard::boot_time_ns,
};

/// How long a peer may take to take in a message.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);
/// How often the owner looks whether the guard has fired and the tree lives.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The running session of epochs.
pub(super) struct Running {
    pub(super) term: Term,
    pub(super) task: tokio::task::JoinHandle<()>,
    pub(super) orders: mpsc::Sender<Order>,
}

/// A promotion under way, for its history.
pub(super) struct Promotion {
    pub(super) cause: String,
    pub(super) phases: BTreeMap<String, f64>,
    pub(super) decided: Instant,
    pub(super) epoch: EpochId,
}

pub(super) struct Owner {
    pub(super) agent: Arc<Agent>,
    pub(super) name: Name,
    pub(super) durable: Durable,
    pub(super) place: durable::Place,
    pub(super) home: Option<Home>,
    pub(super) standby: Option<Arc<Standby>>,
    pub(super) core: Option<Core>,
    pub(super) inbox: mpsc::Receiver<Msg>,
    pub(super) to_self: mpsc::Sender<Msg>,
    pub(super) session: Option<Running>,
    pub(super) permit: Option<oneshot::Sender<()>>,
    pub(super) handoff: Option<Handoff>,
    pub(super) drill: Option<Drill>,
    pub(super) last_drill: Option<drill::Last>,
    pub(super) holding: bool,
    pub(super) promotion: Option<Promotion>,
    pub(super) history: HistoryLog,
    pub(super) via: Option<Connection>,
    pub(super) protecting: Option<Answer<WorkloadStatus>>,
    pub(super) unprotecting: Option<Answer<WorkloadStatus>>,
    pub(super) stopping: Option<oneshot::Sender<()>>,
    /// When the image was verified last, or the agent came to have it.
    pub(super) verified_at: Instant,
    /// What an operator ordered.
    pub(super) order: Option<orders::Order>,
    /// Has the workload's key in etcd, if that decides.
    pub(super) claimant: Option<(Claimant, Wanted)>,
    /// Why the next promotion is one, if not for a lease that ran out.
    pub(super) promote_because: Option<String>,
    /// The newest message that is on its way to the peer.
    telling: Option<tokio::task::JoinHandle<()>>,
    pub(super) last_committed: Option<(EpochFigures, Instant)>,
    /// How epochs go of late, and what of it the history was told when.
    pub(super) pace: Report,
    pub(super) pace_told: (StretchedBy, Option<Instant>),
    pub(super) lease_renewed: Option<Instant>,
    pub(super) error: Option<String>,
    pub(super) gone: bool,
    /// Demoted while CRIU still ends the tree of a handoff.
    pub(super) demoting: bool,
    /// Pages are still on their way to a restored tree.
    pub(super) lazy_pages: bool,
    /// Pages did not come once: restores take all of them at once.
    pub(super) eager: bool,
    /// Why pages will not come to a tree whose restore has not been reported yet.
    pub(super) pages_lost: Option<String>,
    /// The epoch that a handoff brought, to tell a takeover from a failover.
    pub(super) taken_over: Option<EpochId>,
    /// When the addresses were announced first, and the next round.
    pub(super) announced: Option<(Instant, usize)>,
    pub(super) permit_epochs: watch::Sender<Permit>,
    /// An offer that is answered when this host has become a standby.
    pub(super) waiting_offer: Option<Offer>,
    /// Processes of it that were killed for want of memory, as far as that was told.
    pub(super) oom_kills: u64,
    pub(super) hooks: Hooks,
    pub(super) speed: Arc<Speed>,
    pub(super) valve: Option<Valve>,
    /// Until then output waits at most although the mode was changed, unless an epoch that says so is committed before.
    pub(super) still_held: Option<Instant>,
}

impl Owner {
    pub(super) fn new(
        agent: Arc<Agent>,
        durable: Durable,
        home: Option<Home>,
        (to_self, inbox): (mpsc::Sender<Msg>, mpsc::Receiver<Msg>),
    ) -> Self {
        let name = durable.spec.place.name().clone();
        let place = durable::Place::of(&agent.config.state_dir, &name);
        Self {
            hooks: Hooks::start(&agent.config, &place, to_self.clone()),
            history: HistoryLog::open(&place.history()),
            drill: None,
            speed: Speed::full(),
            valve: None,
            still_held: None,
            last_drill: place.last_drill(),
            agent,
            name,
            durable,
            place,
            home,
            standby: None,
            core: None,
            inbox,
            to_self,
            session: None,
            permit: None,
            handoff: None,
            holding: false,
            promotion: None,
            via: None,
            protecting: None,
            unprotecting: None,
            stopping: None,
            verified_at: Instant::now(),
            order: None,
            claimant: None,
            promote_because: None,
            telling: None,
            last_committed: None,
            pace: Report::default(),
            pace_told: (StretchedBy::None, None),
            lease_renewed: None,
            error: None,
            gone: false,
            demoting: false,
            lazy_pages: false,
            eager: false,
            pages_lost: None,
            taken_over: None,
            announced: None,
            permit_epochs: watch::Sender::new(Permit::default()),
            waiting_offer: None,
            oom_kills: 0,
        }
    }

    /// Owns the workload until it is removed or forgotten.
    pub(super) async fn run(mut self) {
        if self.durable.record.is_some() {
            self.resume();
            self.look_at_claim();
        }
        while !self.gone {
            let wake = self.wake();
            tokio::select! {
                message = self.inbox.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
                () = tokio::time::sleep(wake) => self.tick(),
            }
            self.look_at_claim();
            self.look_at_order();
            self.drive_session();
            self.look_at_held();
            self.tend_valve();
            self.watch_drill();
            self.watch_hooks();
        }
        self.agent.drop_owner(&self.name);
    }

    fn wake(&self) -> Duration {
        let deadline = self.core.as_ref().and_then(Core::next_deadline);
        let until = deadline.map_or(LOOK_INTERVAL, |deadline| deadline.saturating_sub(boot_now()));
        until.min(LOOK_INTERVAL)
    }

    fn tick(&mut self) {
        if self.standing() == Some(Standing::Primary) && !self.holding {
            let fired = self.home.as_ref().is_some_and(|home| home.keeper().guard().fired());
            if fired {
                self.feed(Input::GuardFired);
            }
        }
        self.watch_memory();
        self.feed(Input::Tick);
        self.repeat_announcement();
        self.verify_if_due();
    }

    fn handle(&mut self, message: Msg) {
        match message {
            Msg::Protect { request, shipped, answer } => self.protect(&request, &shipped, answer),
            Msg::Unprotect { request, answer } => self.unprotect(request, answer),
            Msg::Handoff { request, answer } => self.begin_handoff(&request, answer),
            Msg::Failover { request, answer } => self.failover(request, answer),
            Msg::Fence { answer } => self.fence_by_order(answer),
            Msg::Unfence { answer } => self.unfence_by_order(answer),
            Msg::Rejoin { answer } => self.rejoin(answer),
            Msg::Pause { answer } => self.pause(answer),
            Msg::Resume { answer } => {
                let _ = answer.send(self.resume_protection());
            }
            Msg::Commit { mode, answer } => {
                let _ = answer.send(self.set_commit(mode));
            }
            Msg::Arbiter(report) => self.arbiter_said(report),
            Msg::PeerFenced { term, outcome } => self.peer_fenced(term, outcome),
            Msg::Verify { answer } => self.verify(Some(answer)),
            Msg::Verified { found, answer } => self.verified(found, answer),
            Msg::Drill { request, answer } => self.begin_drill(request, Some(answer)),
            Msg::EndDrill { answer } => self.ask_end_of_drill(answer),
            Msg::DrillReported(report) => self.drill_reported(report),
            Msg::DrillGone => self.drill_gone(),
            Msg::Remove { answer } => {
                let _ = answer.send(self.remove());
            }
            Msg::Status { answer } => {
                let _ = answer.send(self.status());
            }
            Msg::History { answer } => {
                let _ = answer.send(History { events: self.history.events(), epochs: self.history.epochs() });
            }
            Msg::Stop { answer } => self.stop(answer),
            Msg::Lease { message, via } => self.heard(message, via),
            Msg::Offer(offer) => self.answer_offer(*offer),
            Msg::StandbyOf { peer, answer } => {
                let is_ours =
                    self.standing() == Some(Standing::Standby) && self.durable.peer.as_deref() == Some(&peer);
                let standby = self.standby.clone().filter(|_| is_ours);
                let _ = answer.send(standby);
            }
            Msg::Received { received, answer } => {
                let reply = self.commit(*received);
                let _ = answer.send(reply);
            }
            Msg::Persisted(ticket) => self.feed(Input::Persisted(ticket)),
            Msg::Restored { home, phases, root } => {
                tracing::info!(root, "restored");
                self.restored(*home, phases);
            }
            Msg::RestoreFailed(reason) => {
                self.pages_lost = None;
                self.event("restore-failed", &reason, None);
                self.feed(Input::RestoreFailed { reason });
            }
            // A session of a term that has passed: dropping the permit tells it so.
            Msg::AskCommit { id, .. } if !self.is_current(id.term) => {}
            Msg::EpochCommitted { figures, .. } if !self.is_current(figures.id.term) => {}
            Msg::EpochFailed { term, .. } if !self.is_current(term) => {}
            Msg::AskCommit { id, permit } => {
                self.permit = Some(permit);
                self.feed(Input::AskCommit(id));
            }
            Msg::EpochCommitted { figures, pace } => {
                self.note_pace(pace, figures.id);
                self.epoch_committed(figures);
            }
            Msg::EpochFailed { error, .. } => self.epoch_failed(&error),
            Msg::Hold(answer) => {
                let _ = answer.send(self.hold());
            }
            Msg::FinalCommitted { id, verdict } => {
                if let Some(handoff) = &mut self.handoff {
                    handoff.verdict = Some(verdict);
                    handoff.committed = Some(Instant::now());
                    self.feed(Input::HandoffReady(id));
                }
            }
            Msg::HandoffDone(result) => self.handoff_done(result),
            Msg::Hook(told) => self.hook_told(told),
            Msg::PagesServed => self.pages_served(),
            Msg::PagesFailed(reason) => self.pages_failed(&reason),
        }
    }

    /// The peer's core speaks.
    fn heard(&mut self, message: Message, via: Connection) {
        if let Message::Running { .. } = message
            && let Some(handoff) = &mut self.handoff
        {
            handoff.running.get_or_insert_with(Instant::now);
        }
        if let Message::Ack { granted: true, .. } | Message::Heartbeat { .. } = message {
            self.lease_renewed = Some(Instant::now());
        }
        if let Message::TakeOver { epoch, .. } = message {
            self.taken_over = Some(epoch);
        }
        self.heard_for_rejoin(&message);
        self.via = Some(via);
        if self.core.is_some() {
            self.feed(Input::Message(message));
        } else if let Reply::Said(message) = self.agent.unknown(&self.name, message) {
            // Of another workload by that name, which is not protected here.
            self.tell(message);
        }
    }

    /// Gives the core what happened and does what it says.
    pub(super) fn feed(&mut self, input: Input) {
        let Some(core) = &mut self.core else { return };
        let actions = core.handle(boot_now(), input);
        self.perform(actions);
    }

    /// Does what the core says, in order, and feeds back what follows at once.
    pub(super) fn perform(&mut self, actions: Vec<Action>) {
        let mut actions: VecDeque<Action> = actions.into();
        while let Some(action) = actions.pop_front() {
            if let Some(more) = self.act(action)
                && let Some(core) = &mut self.core
            {
                actions.extend(core.handle(boot_now(), more));
            }
        }
    }

    /// Does one thing; what follows from it at once is returned.
    fn act(&mut self, action: Action) -> Option<Input> {
        match action {
            Action::Ask { term } => self.ask_arbiter(term),
            Action::Persist { ticket, record } => self.persist(ticket, record),
            Action::Send(message) => self.tell(message),
            Action::ArmGuard { until } => return self.arm_guard(until),
            Action::ExtendGuard { until } => return self.extend_guard(until),
            Action::DisarmGuard => return self.disarm_guard(),
            Action::Fence => self.fence(),
            Action::Unfence { until } => return self.unfence(until),
            Action::MayCommit(_) => {
                if let Some(permit) = self.permit.take() {
                    let _ = permit.send(());
                }
            }
            Action::Restore { epoch, term, eager } => self.restore(epoch, term, eager),
            Action::Announce { term } => self.announce(term),
            Action::DestroyCopy => self.destroy_copy(),
            Action::BecomeStandby { term } => self.become_standby(term),
            Action::Suspended => {
                if let Some(stopping) = self.stopping.take() {
                    let telling = self.telling.take();
                    tokio::spawn(async move {
                        // The peer waits for this word: the endpoint must not close under it.
                        if let Some(telling) = telling {
                            let _ = telling.await;
                        }
                        let _ = stopping.send(());
                    });
                } else if matches!(self.order, Some(orders::Order::Pause(_))) {
                    self.paused();
                }
            }
            Action::Unprotected => self.unprotected(),
            Action::Forgotten => self.forgotten(),
            Action::Stuck { reason } => {
                self.error = Some(format!("the workload could not be restored: {reason}"));
                self.event("stuck", &reason, None);
            }
            Action::Rejected { reason } => self.rejected(reason),
        }
        None
    }

    fn persist(&mut self, ticket: Ticket, record: Option<ha::Record>) {
        self.durable.record = record;
        let (durable, place, to_self) = (self.durable.clone(), self.place.clone(), self.to_self.clone());
        tokio::task::spawn_blocking(move || {
            loop {
                let written = if durable.record.is_some() { place.write(&durable) } else { place.forget() };
                match written {
                    Ok(()) => break,
                    // Nothing that depends on it happens until it is written.
                    Err(error) => {
                        tracing::error!(%error, "the workload's record cannot be written: make room on its disk");
                    }
                }
                std::thread::sleep(Duration::from_millis(200));
            }
            let _ = to_self.blocking_send(Msg::Persisted(ticket));
        });
    }

    pub(super) fn tell(&mut self, message: Message) {
        let heartbeat = matches!(message, Message::Heartbeat { .. } | Message::Ack { .. });
        let lease = self.link().and_then(|link| link.lease());
        // An ack goes back the way its heartbeat came; everything else prefers the connection that we dialled.
        let via = if matches!(message, Message::Ack { .. }) {
            self.via.clone().or(lease)
        } else {
            lease.or(self.via.clone())
        };
        let Some(via) = via else { return };
        if heartbeat {
            let datagram = crate::wire::message::Datagram { name: self.name.clone(), message };
            if let Err(error) = via.send_datagram(&datagram) {
                tracing::trace!(%error, "a heartbeat was not sent");
            }
            return;
        }
        let request = Request::Tell { name: self.name.clone(), message };
        let to_self = self.to_self.clone();
        self.telling = Some(tokio::spawn(async move {
            match via.request(&request, TELL_TIMEOUT).await {
                Ok(Reply::Said(message)) => {
                    let _ = to_self.send(Msg::Lease { message, via }).await;
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "a message did not reach the peer"),
            }
        }));
    }

    // Requests.

    pub(super) fn rejected(&mut self, reason: &'static str) {
        if let Some(answer) = self.unprotecting.take() {
            let _ = answer.send(Err(ApiError::refused(reason)));
        } else if self.order.is_some() {
            self.answer_order(Err(ApiError::refused(reason)));
        } else if let Some(handoff) = &mut self.handoff {
            handoff.reason = Some(reason.to_owned());
            if let Some(verdict) = handoff.verdict.take() {
                let _ = verdict.send(false);
            }
        } else {
            self.error = Some(reason.to_owned());
        }
    }

    // Epochs.

    fn epoch_committed(&mut self, figures: EpochFigures) {
        self.held_until(&figures);
        if self.last_committed.is_none() || figures.full {
            self.event("protected", "the standby holds a whole epoch", Some(figures.id));
        }
        if let Some(resync) = figures.resync {
            self.event("resynced", &resync.to_string(), Some(figures.id));
        }
        self.history.add_epoch(figures.clone());
        self.last_committed = Some((figures, Instant::now()));
        self.error = None;
        if self.keeps_its_word()
            && let Some(answer) = self.protecting.take()
        {
            let _ = answer.send(Ok(self.status()));
        }
    }

    fn epoch_failed(&mut self, error: &SessionError) {
        if self.standing() == Some(Standing::Primary) && self.has_ended() {
            self.workload_ended();
            return;
        }
        let text = error.to_string();
        if self.error.as_ref() != Some(&text) {
            self.event("epoch-failed", &text, None);
        }
        self.error = Some(text.clone());
        if let Some(answer) = self.protecting.take() {
            self.end_session();
            self.feed(Input::Withdraw);
            let message = format!("{} cannot be protected: {text}; it runs on as before", self.name);
            let _ = answer.send(Err(ApiError::new(error.code(), message)));
        }
    }

    fn commit(&mut self, received: Received) -> EpochAnswer {
        let id = received.id();
        let Some(core) = &self.core else {
            return EpochAnswer::Refused { term: Term(0), reason: "the workload is not known here".into() };
        };
        if !core.accepts_epoch(id) {
            let term = core.record().term;
            return EpochAnswer::Refused {
                term,
                reason: format!("epoch {id} is not wanted here (term {term})"),
            };
        }
        match block_in_place(|| received.commit()) {
            Ok(note) => {
                if let Some(standby) = &self.standby {
                    standby.committed(id, note);
                }
                self.feed(Input::Committed(id));
                self.count_for_drill();
                EpochAnswer::Committed { id, busy_us: 0 }
            }
            Err(answer) => answer,
        }
    }

    // Who is what.

    fn is_current(&self, term: Term) -> bool {
        self.core.as_ref().is_some_and(|core| core.record().term == term)
    }

    pub(super) fn standing(&self) -> Option<Standing> {
        self.core.as_ref().map(Core::standing)
    }
}

/// The clock of leases and guards.
pub(super) fn boot_now() -> Duration {
    Duration::from_nanos(boot_time_ns())
}
