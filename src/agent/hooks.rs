//! The operator's commands for a change of roles: for what moves with a workload and is none of Standin's, as a cloud's
//! address, a route that BGP announces, a name in DNS.
//!
//! ```text
//!  role ──► what is wanted (promote under a term, or demote) ──► differs from what was run last?
//!                                                                   │ yes: noted on disk, then run
//!             a newer want ends what runs, and is run itself ◄──────┘
//! ```
//!
//! Invariants:
//! - Nothing waits for a hook: no takeover, no fence, no handoff, no other workload.
//! - Those of one workload on one host run one after the other, and the last one to run is that of the role it has. A role that
//!   comes and goes while a hook runs is passed over.
//! - Each is begun at least once, also if the agent or the host ends in between: it is noted before and after. What it does
//!   must bear being done twice, and being ended half-way when the role changes again.
//! - `on_demote` follows an `on_promote` of this host, and nothing else.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use super::{
    api::{HookEvent, HookState, HookStatus, Role},
    durable::{self, write_synced},
    mailbox::Msg,
    owner::Owner,
    program,
};
use crate::{
    config::{Config, HookFailure},
    ha::Standing,
    model::{Name, Term},
    workload::spec::Vip,
};

/// How long the first that failed rests before it is tried again; twice that after each more.
const REST_MIN: Duration = Duration::from_millis(500);
const REST_MAX: Duration = Duration::from_secs(60);

/// What the operator says of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookCommands {
    /// Run when a workload is heard from this host.
    pub on_promote: Option<PathBuf>,
    /// Run when it is not any more.
    pub on_demote: Option<PathBuf>,
    /// How long each may take.
    pub timeout: Duration,
    /// What follows when one fails.
    pub failure: HookFailure,
}

impl HookCommands {
    fn of(&self, event: HookEvent) -> Option<&PathBuf> {
        match event {
            HookEvent::Promote => self.on_promote.as_ref(),
            HookEvent::Demote => self.on_demote.as_ref(),
        }
    }
}

/// Why a role changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    Protected,
    Takeover,
    Failover,
    Handoff,
    Unfenced,
    Fenced,
    HandedOff,
    Replaced,
    Unprotected,
    Ended,
    /// Before the agent was started.
    Restarted,
}

impl Cause {
    fn word(self) -> &'static str {
        match self {
            Self::Protected => "protected",
            Self::Takeover => "takeover",
            Self::Failover => "failover",
            Self::Handoff => "handoff",
            Self::Unfenced => "unfenced",
            Self::Fenced => "fenced",
            Self::HandedOff => "handed-off",
            Self::Replaced => "replaced",
            Self::Unprotected => "unprotected",
            Self::Ended => "ended",
            Self::Restarted => "restarted",
        }
    }
}

/// Which hook is to be run, and what it is told.
#[derive(Clone, Debug)]
struct Call {
    event: HookEvent,
    term: Term,
    cause: Cause,
    workload: Name,
    role: &'static str,
    addresses: Vec<Vip>,
    peer: String,
    host: String,
}

impl Call {
    fn environment(&self, attempt: u32) -> Vec<(&'static str, String)> {
        let addresses = self.addresses.iter().map(ToString::to_string);
        vec![
            ("STANDIN_EVENT", self.event.word().to_owned()),
            ("STANDIN_WORKLOAD", self.workload.to_string()),
            ("STANDIN_TERM", self.term.to_string()),
            ("STANDIN_ROLE", self.role.to_owned()),
            ("STANDIN_CAUSE", self.cause.word().to_owned()),
            ("STANDIN_ADDRESSES", addresses.collect::<Vec<_>>().join(" ")),
            ("STANDIN_PEER", self.peer.clone()),
            ("STANDIN_HOST", self.host.clone()),
            ("STANDIN_ATTEMPT", attempt.to_string()),
        ]
    }
}

/// What is on disk of the one that was run last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    event: HookEvent,
    term: Term,
    /// It needs no run any more.
    done: bool,
}

/// What became of a hook, for its workload's owner.
pub(super) struct Told {
    status: HookStatus,
    /// Its output, or why it failed.
    said: String,
    took: Duration,
}

/// A workload's hooks, as its owner has them.
pub(super) struct Hooks {
    /// None if there is nothing to run.
    calls: Option<watch::Sender<Option<Call>>>,
    /// What was ordered last, or run by an earlier agent.
    last: Option<(HookEvent, Term)>,
    /// Why the role has changed since.
    pub(super) cause: Option<Cause>,
    pub(super) status: Option<HookStatus>,
}

impl Hooks {
    /// Takes up what an earlier agent left.
    pub(super) fn start(config: &Config, place: &durable::Place, owner: mpsc::Sender<Msg>) -> Self {
        let commands = config.hooks.clone();
        if commands.on_promote.is_none() && commands.on_demote.is_none() {
            return Self { calls: None, last: None, cause: None, status: None };
        }
        let mark: Option<Mark> =
            fs::read(place.hook_mark()).ok().and_then(|text| serde_json::from_slice(&text).ok());
        // One that was not done is as good as never run, but that a demotion is owed after any promotion.
        let last = match mark {
            Some(Mark { done: false, .. }) => Some((HookEvent::Promote, Term(0))),
            Some(Mark { event, term, done: true }) => Some((event, term)),
            None => None,
        };
        let (calls, newest) = watch::channel(None);
        tokio::spawn(Runner { commands, mark: place.hook_mark(), calls: newest, owner }.serve());
        Self { calls: Some(calls), last, cause: None, status: None }
    }
}

impl Owner {
    /// Has the hook run that belongs to the role, unless that was the last.
    pub(super) fn watch_hooks(&mut self) {
        let Some(event) = self.wanted_hook() else { return };
        let term = match (self.durable.record, self.hooks.last) {
            (Some(record), _) => record.term,
            (None, Some((_, last))) => last,
            (None, None) => Term(0),
        };
        let is_last = match (self.hooks.last, event) {
            (Some((HookEvent::Promote, last)), HookEvent::Promote) => last == term,
            // Without a promotion there is nothing to take back.
            (last, HookEvent::Demote) => last.is_none_or(|(last, _)| last == HookEvent::Demote),
            (None | Some((HookEvent::Demote, _)), HookEvent::Promote) => false,
        };
        let Some(calls) = self.hooks.calls.as_ref().filter(|_| !is_last) else { return };
        let role = match self.status().role {
            Role::Primary => "primary",
            Role::Standby => "standby",
            Role::Fenced => "fenced",
            Role::Unprotected => "unprotected",
        };
        calls.send_replace(Some(Call {
            event,
            term,
            cause: self.hooks.cause.take().unwrap_or(Cause::Restarted),
            workload: self.name.clone(),
            role,
            addresses: self.durable.spec.vips.clone(),
            peer: self.durable.peer.clone().unwrap_or_default(),
            host: self.agent.config.name.clone(),
        }));
        self.hooks.last = Some((event, term));
    }

    /// What the role asks for; nothing while it is on its way.
    fn wanted_hook(&self) -> Option<HookEvent> {
        match self.standing() {
            Some(Standing::Primary) => Some(HookEvent::Promote),
            Some(Standing::Promoting) => None,
            // The outcome of a handoff is open: it runs on here, or the next standing is a standby's.
            Some(Standing::Fenced) if self.handoff.is_some() => None,
            None | Some(_) => Some(HookEvent::Demote),
        }
    }

    pub(super) fn hook_told(&mut self, told: Told) {
        let Told { status, said, took } = told;
        let (name, cause) = (status.event.word(), &status.cause);
        let again = self.hooks.status.as_ref().is_some_and(|last| last.state == HookState::Retrying);
        let (kind, detail) = match status.state {
            HookState::Running => ("", String::new()),
            HookState::Done => ("hook-done", format!("on_{name} ({cause}), try {}: {said}", status.attempts)),
            // Once for all its tries.
            HookState::Retrying if again && status.attempts > 1 => ("", String::new()),
            HookState::Retrying => ("hook-failed", format!("on_{name} ({cause}): {said}; it is tried again")),
            HookState::Failed => {
                ("hook-failed", format!("on_{name} ({cause}): {said}; it is not tried again"))
            }
            HookState::CutOff => {
                ("hook-cut-off", format!("on_{name} ({cause}): the role has changed, so it was ended"))
            }
        };
        if !kind.is_empty() {
            let phases = [("hook".to_owned(), took.as_secs_f64() * 1e3)].into();
            self.event_with(kind, &detail, None, phases);
        }
        self.hooks.status = Some(status);
    }
}

/// Runs the hooks of one workload, also when its owner has ended.
struct Runner {
    commands: HookCommands,
    mark: PathBuf,
    calls: watch::Receiver<Option<Call>>,
    owner: mpsc::Sender<Msg>,
}

impl Runner {
    async fn serve(mut self) {
        while self.calls.changed().await.is_ok() {
            let call = self.calls.borrow_and_update().clone();
            if let Some(call) = call {
                self.see_to(&call).await;
            }
        }
    }

    /// Runs a hook until it is done, given up, or not wanted any more.
    async fn see_to(&mut self, call: &Call) {
        let Some(program) = self.commands.of(call.event).cloned() else {
            return self.note(call, true).await;
        };
        self.note(call, false).await;
        let mut rest = REST_MIN;
        let mut error = None;
        for attempts in 1.. {
            let began = Instant::now();
            let status = |state, error: &Option<String>| HookStatus {
                event: call.event,
                term: call.term,
                cause: call.cause.word().to_owned(),
                state,
                attempts,
                error: error.clone(),
            };
            if error.is_none() {
                self.tell(status(HookState::Running, &error), String::new(), Duration::ZERO).await;
            }
            let environment = call.environment(attempts);
            let arguments = [call.event.word(), call.workload.as_str()];
            let run = program::run(program::Run {
                program: &program,
                arguments: &arguments,
                environment: &environment,
                timeout: self.commands.timeout,
            });
            let result = tokio::select! {
                result = run => Some(result),
                () = newer(&mut self.calls) => None,
            };
            let took = began.elapsed();
            tracing::info!(
                workload = %call.workload, hook = call.event.word(), term = %call.term, attempts, took_ms = took.as_millis(),
                ?result, "hook"
            );
            match result {
                None => return self.tell(status(HookState::CutOff, &None), String::new(), took).await,
                Some(Ok(said)) => {
                    self.note(call, true).await;
                    return self.tell(status(HookState::Done, &None), said, took).await;
                }
                Some(Err(reason)) => {
                    error = Some(reason.clone());
                    if self.commands.failure == HookFailure::Ignore {
                        self.note(call, true).await;
                        return self.tell(status(HookState::Failed, &error), reason, took).await;
                    }
                    self.tell(status(HookState::Retrying, &error), reason, took).await;
                }
            }
            if self.owner.is_closed() {
                // Nobody's role: nobody would call it off.
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(rest) => {}
                () = newer(&mut self.calls) => {
                    return self.tell(status(HookState::CutOff, &error), String::new(), took).await;
                }
            }
            rest = (rest * 2).min(REST_MAX);
        }
    }

    async fn tell(&self, status: HookStatus, said: String, took: Duration) {
        // An owner that has ended needs to know nothing; the log has it.
        let _ = self.owner.send(Msg::Hook(Told { status, said, took })).await;
    }

    /// A disk that is full lets a hook run twice at worst.
    async fn note(&self, call: &Call, done: bool) {
        let (path, mark) = (self.mark.clone(), Mark { event: call.event, term: call.term, done });
        let written = tokio::task::spawn_blocking(move || {
            write_synced(&path, &serde_json::to_vec(&mark).map_err(std::io::Error::other)?)
        });
        if let Ok(Err(error)) = written.await {
            tracing::warn!(%error, path = %self.mark.display(), "which hook was run cannot be noted");
        }
    }
}

/// Waits until another hook is wanted; for ever if the owner has ended.
async fn newer(calls: &mut watch::Receiver<Option<Call>>) {
    if calls.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
    // It is for the next turn to take.
    calls.mark_changed();
}
