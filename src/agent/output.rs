//! What is done with a workload's packets around its epochs, and who says when its output waits.
//!
//! Output begins to wait with the freeze of the first epoch that follows another: the first one takes as long as all memory
//! does. From that one's commit on nothing that a client was told can be lost; until then the workload counts as syncing.
//! It waits no longer once no standby could promote: then nobody would lose what clients were told. With the next standby it
//! begins to wait as with the first.

use std::{
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use super::{
    api::{ApiError, WorkloadStatus},
    home::Home,
    owner::Owner,
    progress::Progress,
    session::{Permit, Session},
};
use crate::{
    capture::{Stage, pace::Pace},
    ha::{Role, Standing},
    model::{EpochFigures, EpochId},
    takeover::hold::{Hold, HoldError},
    transport::block_in_place,
    workload::{
        network::SEE_BRIDGED,
        spec::{Commit, FROZEN_PERCENT_ASLEEP, PaceMode, PaceSpec, WorkloadSpec},
    },
};

/// How long a change to `async` waits for an epoch. With none, as when the standby is lost, output is let go all the same.
const CHANGE_LIMIT: Duration = Duration::from_secs(5);

/// Handles packets at the stages of one epoch.
pub(super) struct Around {
    pub(super) hold: Option<Arc<Hold>>,
    pub(super) epoch: EpochId,
    /// Output waits from this epoch's freeze on, if it does not already.
    pub(super) holds: bool,
    /// The mode in which it was begun: in `async`, output that still waits does so for this epoch, and not for the next.
    pub(super) commit: Commit,
    /// What the owner permits by now.
    pub(super) permit: watch::Receiver<Permit>,
}

impl Around {
    /// Says whether output waits for a later epoch. Where it need not, what cannot be done is no reason to have no epoch.
    pub(super) fn at(&self, stage: Stage) -> io::Result<bool> {
        let Some(hold) = &self.hold else { return Ok(false) };
        if let Err(error) = self.handle(hold, stage) {
            if self.holds || hold.holds_output() {
                return Err(io::Error::other(error));
            }
            tracing::warn!(%error, epoch = %self.epoch, ?stage, "packets around a freeze");
        }
        Ok(hold.holds_output() && self.commit == Commit::Output)
    }

    fn handle(&self, hold: &Hold, stage: Stage) -> Result<(), HoldError> {
        match stage {
            Stage::Ready => Ok(()),
            Stage::Freezing => {
                if self.holds && self.permit.borrow().owes_output {
                    hold.hold_output()?;
                    // The owner says so before it lets output leave: whoever looks last sees both.
                    if !self.permit.borrow().owes_output {
                        hold.open()?;
                    }
                }
                hold.hold_input()
            }
            Stage::Frozen => hold.mark(self.epoch),
            Stage::Running => hold.pass_input(),
        }
    }
}

/// The standby holds this epoch: what clients may know of it leaves.
pub(super) fn release(hold: Option<&Arc<Hold>>, epoch: EpochId) {
    if let Some(Err(error)) = hold.map(|hold| hold.release(epoch)) {
        // The next epoch's commit covers it.
        tracing::warn!(%error, %epoch, "output that waits");
    }
}

/// Where output waits, an epoch is due as soon as some does; how often otherwise is what the operator says.
pub(super) fn pace(spec: &WorkloadSpec, commit: Commit) -> Pace {
    let wanted = spec.pace.within(commit);
    match commit {
        Commit::Async => Pace::new(wanted),
        Commit::Output => {
            let pace = Pace::new(PaceSpec { mode: PaceMode::Continuous, ..wanted });
            // What the operator says counts for one that sleeps too.
            if spec.pace.frozen_percent_max.is_some() { pace } else { pace.asleep(FROZEN_PERCENT_ASLEEP) }
        }
    }
}

/// Waits until an epoch is due.
pub(super) struct Awaited {
    output: Option<(Arc<Hold>, AsyncFd<OwnedFd>)>,
    /// After so much time without output one is due all the same.
    idle: Duration,
}

impl Awaited {
    pub(super) fn new(hold: Option<&Arc<Hold>>, commit: Commit, pace: PaceSpec) -> Self {
        let idle = match pace.mode {
            PaceMode::EveryMs(ms) => Duration::from_millis(ms),
            PaceMode::LagMs(ms) => Duration::from_millis(ms / 2),
            PaceMode::Continuous => Duration::ZERO,
        };
        let watched = hold
            .filter(|_| commit == Commit::Output && !idle.is_zero())
            .and_then(|hold| Some((Arc::clone(hold), watch(hold)?)));
        Self { output: watched, idle }
    }

    /// `due`: at the earliest.
    pub(super) async fn due(&self, due: tokio::time::Instant) {
        tokio::time::sleep_until(due).await;
        let Some((hold, fd)) = &self.output else { return };
        tokio::select! {
            () = tokio::time::sleep_until(due + self.idle) => {}
            () = output_waits(hold, fd) => {}
        }
    }
}

/// Readable when output has come to wait.
pub(super) fn watch(hold: &Hold) -> Option<AsyncFd<OwnedFd>> {
    readable(hold.output_waits().try_clone().ok()?).ok()
}

/// A descriptor whose being readable is waited for.
pub(super) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor, which is open until it is dropped with what registers it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

async fn output_waits(hold: &Hold, fd: &AsyncFd<OwnedFd>) {
    // Looking empties the socket: what comes later makes it readable again.
    while !hold.has_unmarked() {
        match fd.readable().await {
            Ok(mut ready) => {
                hold.begins_to_wait();
                ready.clear_ready();
            }
            Err(_) => return std::future::pending().await,
        }
    }
}

impl Session {
    /// Takes up a change of the mode.
    pub(super) fn follow_mode(&self, at: &mut Progress) {
        let commit = self.permit.borrow().commit;
        if at.commit != commit {
            at.commit = commit;
            at.pace = pace(&self.spec, commit);
            // The standby is told with the next offer.
            at.offered = false;
        }
    }
}

impl Owner {
    /// A standby could promote, so that what clients are told must wait for it.
    pub(super) fn owes_output(&self) -> bool {
        let role = self.durable.record.map(|record| record.role);
        let still_held = self.still_held.is_some_and(|until| Instant::now() < until);
        (self.durable.spec.commit == Commit::Output || still_held)
            && matches!(role, Some(Role::Primary { armed: Some(_), .. }))
    }

    /// The standby holds this epoch. After a change to `async` the first one that was begun since is what output still waits for:
    /// a takeover from one before it would take all connections for such that know no more than it does.
    pub(super) fn held_until(&mut self, figures: &EpochFigures) {
        if !figures.output_held {
            self.still_held = None;
        }
    }

    /// Lets output leave that nobody could lose any more. After [`Owner::drive_session`], which tells the session.
    pub(super) fn look_at_held(&mut self) {
        let Some(hold) = self.home.as_ref().and_then(|home| home.hold()) else { return };
        let runs = matches!(self.standing(), None | Some(Standing::Primary));
        if hold.holds_output() && runs && !self.owes_output() {
            self.open_output();
        }
    }

    fn open_output(&mut self) {
        let opened =
            self.home.as_ref().and_then(|home| home.hold()).map(|hold| block_in_place(|| hold.open()));
        if let Some(Err(error)) = opened {
            self.error = Some(format!("output still waits: {error}"));
        }
    }

    /// Whether what a client was told is safe with the standby, as far as that was asked for.
    pub(super) fn keeps_its_word(&self) -> bool {
        self.durable.spec.commit == Commit::Async
            || self.home.as_ref().and_then(|home| home.hold()).is_some_and(|hold| hold.is_gated())
    }

    /// Why this workload's output cannot wait.
    pub(super) fn check_commit(&self, mode: Commit) -> Result<(), ApiError> {
        let home = self.home.as_ref();
        if mode == Commit::Async {
            return Ok(());
        }
        if home.and_then(Home::hold).is_some_and(|hold| hold.can_hold_output()) {
            let unseen = home.map_or(Ok(Vec::new()), Home::unseen_bridges).map_err(ApiError::failed)?;
            let Some(bridge) = unseen.first() else { return Ok(()) };
            return Err(ApiError::refused(format!(
                "what {} says to others on the bridge {bridge} could not wait, because this host's packet filter does not see it: \
                 {SEE_BRIDGED}, or `--commit async`",
                self.name
            )));
        }
        if let Some(why) = home.and_then(Home::why_no_hold) {
            return Err(ApiError::refused(format!("{}: {why}", self.name)));
        }
        Err(ApiError::refused(format!(
            "{0} uses the host's own network, where its packets cannot be told from others' and held: `--commit async` is what \
             it can have. Started with `standin run {0} --ip CIDR -- CMD`, or as a container in a network of its own, it can \
             have `--commit output`",
            self.name
        )))
    }

    /// Changes when output leaves, of a workload that runs here and is protected.
    pub(super) fn set_commit(&mut self, mode: Commit) -> Result<WorkloadStatus, ApiError> {
        if self.standing() != Some(Standing::Primary) {
            return Err(ApiError::refused(format!(
                "{} does not run here, or is not protected: see `standin status`",
                self.name
            )));
        }
        self.check_commit(mode)?;
        if self.durable.spec.commit != mode {
            let mut durable = self.durable.clone();
            durable.spec.commit = mode;
            block_in_place(|| self.place.write(&durable)).map_err(ApiError::failed)?;
            self.durable = durable;
            let holds =
                self.home.as_ref().and_then(|home| home.hold()).is_some_and(|hold| hold.holds_output());
            let until = Instant::now() + CHANGE_LIMIT;
            self.still_held = (mode == Commit::Async && holds).then_some(until);
            self.event("commit-mode", &format!("{mode}: {}", told(mode)), None);
            self.drive_session();
            self.look_at_held();
            self.tend_valve();
        }
        Ok(self.status())
    }
}

fn told(mode: Commit) -> &'static str {
    match mode {
        Commit::Async => "from the next epoch on output leaves at once",
        Commit::Output => "output waits until the standby has what it depends on",
    }
}
