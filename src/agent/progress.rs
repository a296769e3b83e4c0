//! What a session knows between two epochs.

use std::time::Duration;

use super::{
    flight::{Capturing, Failed, Hand, Shipping},
    session::SessionError,
};
use crate::{
    capture::{Capturer, pace::Pace},
    model::{Epoch, EpochId},
    workload::spec::Commit,
};

/// What is known between two epochs.
pub(super) struct Progress {
    pub(super) hand: Hand,
    /// Commits of which the capturer was not told yet.
    pub(super) commits: u32,
    /// The newest epoch that the standby holds and that the capturer's knowledge is of.
    pub(super) base: Option<EpochId>,
    /// An epoch whose outcome is unknown.
    pub(super) unsettled: Option<EpochId>,
    /// What was captured failed, and the capturer was not told yet.
    pub(super) failed: bool,
    pub(super) next: Epoch,
    /// Captured, on its way.
    pub(super) shipping: Option<Shipping>,
    /// The next one, of which is done what can be done before it is due.
    pub(super) ahead: Option<Capturing>,
    /// Whether that is little.
    pub(super) ahead_is_short: bool,
    /// From the freeze of the last committed epoch to its commit.
    pub(super) last_cost: Duration,
    /// The standby has accepted the workload, and nothing has gone wrong since.
    pub(super) offered: bool,
    /// The base is known by what the standby told of it, and no epoch upon it was committed yet.
    pub(super) told: bool,
    /// That failed: what the standby tells is not asked for again before all memory was sent.
    pub(super) tells_wrong: bool,
    pub(super) pace: Pace,
    /// What the pace is of.
    pub(super) commit: Commit,
}

impl Progress {
    /// With a fresh capturer.
    pub(super) fn new(capturer: Capturer, pace: Pace, commit: Commit) -> Self {
        Self {
            hand: Hand::Here(Box::new(capturer)),
            commits: 0,
            base: None,
            unsettled: None,
            failed: false,
            next: Epoch(1),
            shipping: None,
            ahead: None,
            ahead_is_short: false,
            last_cost: Duration::ZERO,
            offered: false,
            told: false,
            tells_wrong: false,
            pace,
            commit,
        }
    }

    /// What was begun ahead is not wanted any more.
    pub(super) async fn abandon_ahead(&mut self) {
        if let Some(ahead) = self.ahead.take() {
            ahead.abandon().await;
            self.failed = true;
        }
    }

    pub(super) fn commit(&mut self, id: EpochId, cost: Duration) {
        self.commits += 1;
        self.base = Some(id);
        (self.told, self.tells_wrong) = (false, false);
        self.last_cost = cost;
    }

    /// Takes note of an epoch that failed; says why.
    pub(super) fn fail(&mut self, failed: Failed) -> SessionError {
        let Failed { id, error, held } = failed;
        match &error {
            _ if held => self.commit(id, self.last_cost),
            SessionError::NeedFull(_) => {
                self.failed = true;
                self.base = None;
                self.tells_wrong |= std::mem::take(&mut self.told);
            }
            SessionError::Send(_) | SessionError::NoConnection => self.unsettled = Some(id),
            _ => self.failed = true,
        }
        error
    }
}
