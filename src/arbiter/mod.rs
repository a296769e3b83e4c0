//! The third party that decides besides the two hosts: keys in etcd, as [`crate::ha::Arbiter::Store`] wants them.
//!
//! One [`Claimant`] for each workload on each host: a task that is told which term's key to hold ([`Wanted`]) and says after
//! each look whether it does ([`Report`]). It decides nothing.
//!
//! ```text
//!  owner ── Wanted { generation, term, record } ──► Claimant ── POST /v3/… ──► etcd  PREFIX/WORKLOAD/holder   (its lease)
//!        ◄── Held { until } / Refused ─────────────    │  ◄────────────────          PREFIX/WORKLOAD/term     (stays)
//!                                    status ◄── Condition
//! ```
//!
//! How to wire it: the value that [`Etcd::claimant`] is given first must be what `Core::claim` says when the core starts
//! (`None` gives up what an earlier life of the agent held). Each time `Core::claim` changes, send a `Wanted` with the next
//! generation; when only the record changes, send it with the same one. Of reports, those of an earlier generation are dropped.
//! `Held` is `Input::Leased` and `Input::Agreed`, `Refused` is `Input::Disagreed`. When protection ends, [`Etcd::forget`], or a
//! later protection of that name would find its terms overtaken.
//!
//! # Why a key is never believed for longer than etcd keeps it
//!
//! - `until` is counted from before the request was sent, a fiftieth short, on a clock that does not stop in suspend. etcd
//!   counts from when it worked on the request, on a clock that does.
//! - A grant and a transaction go through etcd's consensus. The extension of a lease does not: a leader that was replaced and
//!   does not know it answers, too. So both keys are read after each extension, which such a leader cannot do, and the extension
//!   counts only if both came in one term of the consensus. A new leader begins all leases anew: that only makes them longer.
//! - A claim has an etcd lease and a nonce of its own. It is given up by ending that lease *first*: the key goes with it, and
//!   whatever is still on its way fails, since etcd writes no key under a lease that has ended. Then its term is taken back, if
//!   it is above what this host's record has: what this host does not remember durably it has not begun.
//! - A term is given once something older stands there, or the same by the same host. The newest stays when its key ends.
//! - An earlier life of this host's agent is somebody else: its key is waited for, since its guard's deadline comes from it.
//!   Only if no key is wanted here is it taken away.

mod claimant;
mod client;
mod etcd;
mod settings;

use std::time::Duration;

use serde::Serialize;
use tokio::{sync::watch, task::JoinHandle};

use crate::model::{Name, Term};

pub use client::EtcdError;
pub use etcd::Holder;
pub use settings::{ENDPOINTS_MAX, Etcd, REQUEST_TIMEOUT_MIN, Settings, SettingsError, TTL_MAX, TTL_MIN};

/// What a claimant shall hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Grows with each change of `term`, also from a term to the same one by way of none.
    pub generation: u64,
    /// The term whose key to hold; `None`: no key.
    pub term: Option<Term>,
    /// Of this host's durable record. A claim that is given up gives up its term too if that is newer.
    pub record: Term,
}

/// What came of the last look, about every quarter of the TTL, and within half of it and a bit at the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// This host has the key of this term, and nobody else can have one before that time.
    Held {
        /// Of what was wanted.
        generation: u64,
        /// Of what was wanted.
        term: Term,
        /// On this host's boot-time clock.
        until: Duration,
    },
    /// It was not given (again): somebody else has it, a newer term was given, or etcd did not answer. Says nothing about what
    /// was `Held` before, which lasts as long as it was said to.
    Refused {
        /// Of what was wanted.
        generation: u64,
        /// Of what was wanted.
        term: Term,
    },
}

/// How a claimant stands, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// The member that was asked last.
    pub endpoint: String,
    /// Whether one answered at the last look.
    pub reachable: bool,
    /// Whether the last look failed.
    pub failing: bool,
    /// The last failure, with what to do; stays when it is over.
    pub last_error: Option<String>,
    /// What this host wants.
    pub wanted: Option<Term>,
    /// Who had the key when it was last seen.
    pub holder: Option<Holder>,
    /// The newest term that was given by then; 0: none.
    pub newest: Term,
    /// Until when this host has the key, on its boot-time clock.
    pub held_until: Option<Duration>,
}

/// The task of one workload. Dropped, it stops where it is: what it held ends by itself in etcd.
#[derive(Debug)]
pub struct Claimant {
    wanted: watch::Sender<Wanted>,
    condition: watch::Receiver<Condition>,
    task: JoinHandle<()>,
}

impl Etcd {
    /// Starts a claimant for a workload, on the runtime of the caller. `host` must differ between the two hosts and stay the
    /// same through restarts. `report` is called by the task and must not block.
    pub fn claimant(
        &self,
        workload: &Name,
        host: &str,
        wanted: Wanted,
        report: impl Fn(Report) + Send + Sync + 'static,
    ) -> Claimant {
        let store = etcd::Store::new(self.0.clone(), workload);
        let (condition, shown) =
            watch::channel(Condition { endpoint: store.endpoint().to_owned(), ..Condition::default() });
        let (sender, receiver) = watch::channel(wanted);
        let task = claimant::Task {
            etcd: self.0.clone(),
            store,
            workload: workload.clone(),
            host: host.to_owned(),
            wanted: receiver,
            report,
            condition,
            state: claimant::State::default(),
        };
        Claimant { wanted: sender, condition: shown, task: tokio::spawn(task.run()) }
    }

    /// Removes a workload's keys, once it is not protected any more and both claimants have stopped. Refused while another host
    /// holds one. Takes as long as each member may take for an answer, a few times over, at most.
    pub async fn forget(&self, workload: &Name, host: &str) -> Result<(), EtcdError> {
        claimant::forget(&mut etcd::Store::new(self.0.clone(), workload), host).await
    }
}

impl Claimant {
    /// From now on, hold this.
    pub fn want(&self, wanted: Wanted) {
        self.wanted.send_replace(wanted);
    }

    /// How it stands now.
    pub fn condition(&self) -> Condition {
        self.condition.borrow().clone()
    }
}

impl Drop for Claimant {
    fn drop(&mut self) {
        self.task.abort();
    }
}
