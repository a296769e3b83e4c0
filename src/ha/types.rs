//! What goes into the core and what comes out: the durable record, messages, inputs, actions.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::{Epoch, EpochId, Term};

/// Who decides that the standby runs the workload. Both hosts have the same for as long as it is protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arbiter {
    /// The standby itself, by its grants: a primary that gets none falls silent in time.
    #[default]
    Peer,
    /// Besides the grants, a store of keys that a third party keeps: the primary runs by a lease from there or by the standby's
    /// grants, and the standby only when it has neither granted nor found the primary's lease there.
    Store,
    /// A command that makes sure that the primary's host is off. The primary needs no lease.
    Command,
    /// A person. The primary needs no lease.
    Operator,
}

impl std::fmt::Display for Arbiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Peer => "the peer",
            Self::Store => "etcd",
            Self::Command => "a fence command",
            Self::Operator => "an operator",
        })
    }
}

impl Arbiter {
    /// A primary whose standby may promote runs by a lease, with a guard.
    pub fn leases(self) -> bool {
        matches!(self, Self::Peer | Self::Store)
    }

    /// Somebody else must agree before a standby promotes.
    pub(super) fn is_asked(self) -> bool {
        matches!(self, Self::Store | Self::Command)
    }
}

/// What an agent must remember of a workload through a crash or a power cut. Written whole, atomically.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The newest term that this host has held or followed.
    pub term: Term,
    /// Its part in that term.
    pub role: Role,
    /// Epochs up to this one never let a standby promote, held or not; on a primary: what it knows to be so
    /// there.
    pub disarmed_through: EpochId,
    /// This host never begins to run under a term up to this one (a handoff that was refused or called back).
    pub refused: Term,
    /// An operator has fenced this host's copy: nothing but an operator lets it run again.
    #[serde(default)]
    pub fenced: bool,
}

/// A host's part in a term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Runs the workload.
    Primary {
        /// `Some`: the peer may promote, so running needs a lease and a guard. Epochs up to this number may
        /// have been committed; more need this record to be written again first.
        armed: Option<Epoch>,
        /// `TakeOver` may have been sent: the copy stays frozen until the peer's answer is known.
        handoff: bool,
    },
    /// Decided to run the workload from this epoch; nothing has been announced yet.
    Promoting {
        /// A committed epoch.
        epoch: EpochId,
    },
    /// Holds its image, or is about to.
    Standby,
}

impl Record {
    /// The record of a host that begins to protect a workload that it runs.
    pub fn primary(term: Term) -> Self {
        let role = Role::Primary { armed: None, handoff: false };
        Self { term, role, disarmed_through: Self::before(term), refused: Term(0), fenced: false }
    }

    /// The record of a host that accepts to be standby of a primary of `term`.
    pub fn standby(term: Term) -> Self {
        Self { role: Role::Standby, ..Self::primary(term) }
    }

    /// Lies behind every epoch of older terms and before the first of `term`.
    fn before(term: Term) -> EpochId {
        EpochId { term, epoch: Epoch(0) }
    }

    /// This record moved to a newer term in which no epoch has been committed yet.
    pub(super) fn moved_to(self, term: Term, role: Role) -> Self {
        let disarmed_through = self.disarmed_through.max(Self::before(term));
        Self { term, role, disarmed_through, fenced: false, ..self }
    }
}

/// What the peers' cores say to each other. `term` is always one that is durable at the sender,
/// except in `TakeOver`, `Abort` and `Yielded`, where it is the term that is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The primary asks for its lease to be extended.
    Heartbeat {
        /// The primary's.
        term: Term,
        /// Grows by one with each.
        seq: u64,
        /// The primary's clock.
        sent_at: Duration,
    },
    /// The standby's answer.
    Ack {
        /// The answering side's.
        term: Term,
        /// Of the heartbeat.
        seq: u64,
        /// Of the heartbeat.
        sent_at: Duration,
        /// Whether the lease is extended.
        granted: bool,
    },
    /// Primary to standby: never promote from epochs up to `through`.
    Suspend {
        /// The primary's.
        term: Term,
        /// No later epoch can be on its way.
        through: EpochId,
    },
    /// So be it, durably.
    Suspended {
        /// Of the request.
        term: Term,
        /// Of the request.
        through: EpochId,
    },
    /// Standby to primary: my agent is about to stop; please send `Suspend`.
    AskSuspend {
        /// The standby's.
        term: Term,
    },
    /// Primary to standby: forget the workload.
    Withdraw {
        /// The primary's.
        term: Term,
    },
    /// Forgotten, durably.
    Withdrawn {
        /// Of the request.
        term: Term,
    },
    /// Handoff: the source is frozen and silent; run this epoch under this term.
    TakeOver {
        /// The source's plus one.
        term: Term,
        /// The last epoch.
        epoch: EpochId,
    },
    /// The sender runs the workload under this term.
    Running {
        /// The new term.
        term: Term,
    },
    /// Give this term back if you do not run under it.
    Abort {
        /// The term to give back.
        term: Term,
    },
    /// The answer to `Abort`, or to a `TakeOver` that is refused: the sender does not run under this term
    /// and, durably, never will, nor does it promote from what it holds now.
    Yielded {
        /// Of the request.
        term: Term,
    },
    /// How do you stand?
    Inquire {
        /// The asker's.
        term: Term,
    },
    /// The answer, also to anything that comes with an older term.
    Known {
        /// The answering side's.
        term: Term,
        /// How it stands.
        standing: Standing,
        /// The epoch that its store holds.
        held: Option<EpochId>,
    },
}

/// How a host stands to the workload, for its peer and for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// Runs it.
    Primary,
    /// Holds a copy that may not run now.
    Fenced,
    /// Was primary; the copy is gone (the host was restarted).
    Lost,
    /// Is restoring it.
    Promoting,
    /// Could not restore it.
    Stuck,
    /// Holds its image, or nothing yet.
    Standby,
    /// Knows it no more.
    Forgotten,
}

/// Names one durable write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What the agent finds of the workload's copy when it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copy {
    /// Runs.
    Running,
    /// Frozen and silent.
    Frozen,
    /// No process is left.
    Gone,
}

/// What the core begins with: a new agent's life, or a new workload.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Agreed upon when the protection began.
    pub arbiter: Arbiter,
    /// As it is on disk.
    pub record: Record,
    /// As found.
    pub copy: Copy,
    /// The newest epoch that the store holds whole.
    pub held: Option<EpochId>,
    /// The deadline of a guard that is armed and has not fired.
    pub guard_until: Option<Duration>,
    /// A number that no heartbeat of an earlier life used or will reach: a random one with its top bit clear
    /// will do.
    pub first_seq: u64,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// [`super::Core::next_deadline`] was reached.
    Tick,
    /// The peer said something.
    Message(Message),
    /// That [`Action::Persist`] is on stable storage. A write that fails is repeated until it succeeds: the
    /// core waits.
    Persisted(Ticket),
    /// The guard fired, or refused an extension because it had: the copy is frozen and silent.
    GuardFired,
    /// The guard, which had no deadline, has that of [`Action::ArmGuard`].
    GuardArmed {
        /// Of the action.
        until: Duration,
    },
    /// The deadline of [`Action::ArmGuard`] had passed when the guard saw it: it has none.
    GuardLate {
        /// Of the action.
        until: Duration,
    },
    /// Primary: may the `End` frame of this epoch be sent?
    AskCommit(EpochId),
    /// Standby: the store holds this epoch whole, durably. See [`super::Core::accepts_epoch`].
    Committed(EpochId),
    /// Standby: what the store held was found damaged and is thrown away.
    ImageLost,
    /// The copy was restored and runs, still unheard.
    Restored,
    /// Nothing of the restored copy is left.
    RestoreFailed {
        /// For people.
        reason: String,
    },
    /// Handoff: this epoch is committed, was the last, and the copy was frozen and silenced through the guard
    /// (as for [`Action::Fence`]) when it was taken. If it is rejected the copy is let run again as after any
    /// fencing.
    HandoffReady(EpochId),
    /// Call the handoff back.
    AbortHandoff,
    /// [`Arbiter::Store`]: this host has the key of its term there, and nobody else can have it before this time.
    Leased {
        /// Under which the key was taken.
        term: Term,
        /// On this host's boot-time clock: counted from when the request that extended it was *sent*.
        until: Duration,
    },
    /// The arbiter that [`Action::Ask`] named agrees: the primary's lease has ended and it gets no other, or its host is off.
    Agreed {
        /// Of the action.
        term: Term,
    },
    /// The arbiter said no, or nothing within its time; it is asked again.
    Disagreed {
        /// Of the action.
        term: Term,
    },
    /// The agent is about to stop on purpose; wait for [`Action::Suspended`].
    Suspend,
    /// The workload shall not be protected any more; wait for [`Action::Unprotected`].
    Withdraw,
    /// Operator: run the fenced copy although the peer cannot be asked.
    ///
    /// **Unsafe** unless the peer is known to be down and stays cut off until it has heard of the new term.
    ForceRunAlone,
    /// Operator: try again to restore what is [`Standing::Stuck`].
    RetryRestore,
    /// Operator: run the workload on this standby although nothing says that the primary's copy is silent.
    ///
    /// **Unsafe** unless the primary's host is known to be off.
    ForcePromote,
    /// Operator: this host's copy shall be frozen and silent until [`Input::Unfence`], and a standby may take over.
    Fence,
    /// Operator: the copy that was fenced may run again as after any fencing.
    Unfence,
    /// The agent does not stop after all, or protection goes on that [`Input::Suspend`] paused.
    Resume,
}

/// What the agent must do, in this order, each done before the next is begun (`Persist` and `Restore`, which
/// report their end, only need to be begun).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Put this on stable storage (`None`: forget the workload), then give [`Input::Persisted`].
    Persist {
        /// To be given back.
        ticket: Ticket,
        /// The whole record.
        record: Option<Record>,
    },
    /// To the peer; may be lost, repeated, or late.
    Send(Message),
    /// The guard, which has no deadline, shall freeze and silence the copy at this time. Its answer is
    /// [`Input::GuardArmed`], or [`Input::GuardLate`] if the time has passed (an agent can be paused right
    /// here).
    ArmGuard {
        /// On this host's boot-time clock.
        until: Duration,
    },
    /// The guard's deadline is now this later one. A guard that has fired refuses and reports
    /// [`Input::GuardFired`].
    ExtendGuard {
        /// On this host's boot-time clock.
        until: Duration,
    },
    /// The guard shall have no deadline. One that has fired reports [`Input::GuardFired`].
    DisarmGuard,
    /// Freeze and silence the copy now, through the guard.
    Fence,
    /// Let the copy run and speak. The *guard* does it, in one step with its new deadline; if that
    /// has passed it refuses and reports [`Input::GuardFired`].
    Unfence {
        /// The guard's new deadline, if it needs one.
        until: Option<Duration>,
    },
    /// The answer to [`Input::AskCommit`]: send the `End` frame.
    MayCommit(EpochId),
    /// Destroy what is left of an earlier attempt, then restore; give [`Input::Restored`] or
    /// [`Input::RestoreFailed`].
    Restore {
        /// What to restore.
        epoch: EpochId,
        /// The term under which it will run.
        term: Term,
        /// Read all pages before the first instruction: slower, with fewer things that can fail.
        eager: bool,
    },
    /// Let the copy be heard: lift the drop, take over the address.
    Announce {
        /// For fencing tokens.
        term: Term,
    },
    /// Destroy the copy (or stop restoring it), cut off first.
    DestroyCopy,
    /// From now on this host receives epochs of that term.
    BecomeStandby {
        /// The primary's.
        term: Term,
    },
    /// The agent may stop: the peer does not promote, this copy runs without a guard.
    Suspended,
    /// Protection has ended; the core may be dropped and the record removed.
    Unprotected,
    /// Ask the arbiter whether this host may run the workload under this term; give [`Input::Agreed`] or
    /// [`Input::Disagreed`]. Asked again while it is under way, it is the same question.
    Ask {
        /// The term that it would run under.
        term: Term,
    },
    /// The primary withdrew the workload; the core may be dropped and the image removed.
    Forgotten,
    /// The workload could not be restored and nothing more is tried before a person decides.
    Stuck {
        /// The last failure.
        reason: String,
    },
    /// A command does not fit how things stand.
    Rejected {
        /// Why, and what to do.
        reason: &'static str,
    },
}
