//! What reaches a workload's owner, from the control socket, the peer, its own threads and its session.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::oneshot;

use super::{
    api::{
        ApiError, FailoverRequest, HandoffReport, HandoffRequest, History, ProtectRequest, UnprotectRequest,
        VerifyReport, WorkloadStatus,
    },
    home::Home,
    hooks::Told,
    receiving::Received,
    session::{HandoffDone, SessionError},
    standby::Standby,
    verifying::Verified,
};
use crate::{
    arbiter,
    capture::pace::Report,
    drill,
    ha::{Message, Ticket},
    model::{EpochFigures, EpochId, Term},
    transport::Connection,
    wire::message::{EpochAnswer, Reply},
    workload::spec::{Commit, WorkloadSpec},
};

/// Messages that may wait for a workload.
pub(super) const QUEUE_MAX: usize = 256;

pub(super) type Answer<T> = oneshot::Sender<Result<T, ApiError>>;

/// What reaches an owner.
pub(super) enum Msg {
    Protect {
        request: Box<ProtectRequest>,
        /// What its standby was sent for it, for people.
        shipped: Vec<String>,
        answer: Answer<WorkloadStatus>,
    },
    Unprotect {
        request: UnprotectRequest,
        answer: Answer<WorkloadStatus>,
    },
    Handoff {
        request: HandoffRequest,
        answer: Answer<HandoffReport>,
    },
    Failover {
        request: FailoverRequest,
        answer: Answer<WorkloadStatus>,
    },
    Fence {
        answer: Answer<WorkloadStatus>,
    },
    Unfence {
        answer: Answer<WorkloadStatus>,
    },
    Rejoin {
        answer: Answer<WorkloadStatus>,
    },
    Pause {
        answer: Answer<WorkloadStatus>,
    },
    Resume {
        answer: Answer<WorkloadStatus>,
    },
    Commit {
        mode: Commit,
        answer: Answer<WorkloadStatus>,
    },
    /// Of the keys in etcd.
    Arbiter(arbiter::Report),
    /// The fence command has ended.
    PeerFenced {
        term: Term,
        outcome: Result<String, String>,
    },
    Verify {
        answer: Answer<VerifyReport>,
    },
    Verified {
        found: Verified,
        answer: Option<Answer<VerifyReport>>,
    },
    Drill {
        request: drill::Request,
        answer: Answer<drill::Report>,
    },
    EndDrill {
        answer: Answer<()>,
    },
    /// What a drill has found, or why nothing was tried.
    DrillReported(Result<Box<drill::Report>, ApiError>),
    /// Nothing is left of it.
    DrillGone,
    Remove {
        answer: Answer<()>,
    },
    Status {
        answer: oneshot::Sender<WorkloadStatus>,
    },
    History {
        answer: oneshot::Sender<History>,
    },
    /// The agent stops on purpose.
    Stop {
        answer: oneshot::Sender<()>,
    },
    /// A peer's core speaks.
    Lease {
        message: Message,
        via: Connection,
    },
    /// A primary asks this host to be its standby.
    Offer(Box<Offer>),
    /// A whole epoch was received and waits to be committed.
    Received {
        received: Box<Received>,
        answer: oneshot::Sender<EpochAnswer>,
    },
    /// The standby for an epoch of this peer's that begins to arrive.
    StandbyOf {
        peer: String,
        answer: oneshot::Sender<Option<Arc<Standby>>>,
    },
    Persisted(Ticket),
    Restored {
        home: Box<Home>,
        phases: BTreeMap<String, f64>,
        root: u32,
    },
    RestoreFailed(String),
    AskCommit {
        id: EpochId,
        permit: oneshot::Sender<()>,
    },
    EpochCommitted {
        figures: EpochFigures,
        pace: Report,
    },
    EpochFailed {
        term: Term,
        error: SessionError,
    },
    Hold(oneshot::Sender<bool>),
    FinalCommitted {
        id: EpochId,
        verdict: std::sync::mpsc::Sender<bool>,
    },
    HandoffDone(Result<HandoffDone, SessionError>),
    /// Of a hook that was run.
    Hook(Told),
    /// A lazy restore has put every page.
    PagesServed,
    /// It cannot: the restored tree must not go on.
    PagesFailed(String),
}

/// A primary asks this host to be its standby.
pub(super) struct Offer {
    pub(super) peer: String,
    pub(super) spec: WorkloadSpec,
    pub(super) term: Term,
    /// Memory that the image will need at least.
    pub(super) bytes: u64,
    pub(super) answer: oneshot::Sender<Reply>,
}
