//! What an owner tells people: its workload's status and history.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::{
    api::{ContainerStatus, EtcdStatus, Event, KernelLease, PaceStatus, Role, WorkloadStatus},
    home::Home,
    owner::{Owner, boot_now},
};
use crate::{
    capture::pace::{Report, StretchedBy},
    ha::{Core, Standing},
    model::{EpochId, Term},
    observe::unix_ms,
    takeover::lease::Lease,
    workload::spec::PlaceSpec,
};

/// The history tells of the pace no more often than this.
const PACE_TELLING_INTERVAL: Duration = Duration::from_secs(60);

impl Home {
    fn kernel_lease(&self) -> KernelLease {
        let hook = self.lease().map_err(Clone::clone).and_then(Lease::hook);
        match hook {
            Ok(Some(hook)) => KernelLease::At(hook),
            Ok(None) => KernelLease::Idle,
            Err(error) => KernelLease::Absent(error.to_string()),
        }
    }
}

impl Owner {
    pub(super) fn status(&self) -> WorkloadStatus {
        let standing = self.standing();
        let role = match standing {
            None => Role::Unprotected,
            Some(Standing::Primary) => Role::Primary,
            Some(Standing::Standby | Standing::Promoting | Standing::Forgotten) => Role::Standby,
            Some(Standing::Fenced | Standing::Lost | Standing::Stuck) => Role::Fenced,
        };
        let held = self.standby.as_ref().and_then(|standby| standby.held());
        let connected = self.link().is_some_and(|link| link.lease().is_some());
        let state = match standing {
            None if self.home.as_ref().is_some_and(|home| matches!(home.root(), Ok(None))) => "ended",
            None => "running",
            Some(Standing::Primary) if self.handoff.is_some() => "handing-off",
            Some(Standing::Primary) if self.home.as_ref().is_some_and(Home::is_paused) => "paused",
            Some(Standing::Primary) if self.durable.paused => "unguarded",
            Some(Standing::Primary) if self.last_committed.is_some() && !self.keeps_its_word() => "syncing",
            Some(Standing::Primary) if self.last_committed.is_some() && self.error.is_none() => "protected",
            Some(Standing::Primary) if self.last_committed.is_some() => "lagging",
            Some(Standing::Primary) if connected => "syncing",
            Some(Standing::Primary) => "alone",
            Some(Standing::Standby) if self.core.as_ref().is_some_and(Core::armed) => "ready",
            Some(Standing::Standby) => "syncing",
            Some(Standing::Promoting) => "promoting",
            Some(Standing::Stuck) => "stuck",
            Some(Standing::Lost) => "lost",
            Some(Standing::Fenced) if self.core.as_ref().is_some_and(|core| core.record().fenced) => "fenced",
            Some(Standing::Fenced) => "frozen",
            Some(Standing::Forgotten) => "forgotten",
        };
        let root = self.home.as_ref().and_then(|home| home.root().ok().flatten());
        let pace = self.last_committed.as_ref().map_or_else(Report::default, |_| self.pace);
        let primary_lag = self.last_committed.as_ref().map(|(figures, at)| {
            at.elapsed().as_millis() as u64 + (figures.frozen_us + figures.ship_us) / 1000
        });
        WorkloadStatus {
            name: self.name.clone(),
            role,
            state: state.to_owned(),
            term: self.durable.record.map_or(Term(0), |record| record.term),
            peer: self.durable.peer.clone(),
            peer_connected: connected,
            epoch: self.last_committed.as_ref().map(|(figures, _)| figures.id).or(held),
            lag_ms: primary_lag.or_else(|| self.standby.as_ref().and_then(|standby| standby.lag_ms())),
            lease_age_ms: standing
                .and(self.lease_renewed)
                .map(|renewed| renewed.elapsed().as_millis() as u64),
            arbiter: self.durable.spec.arbiter,
            etcd: self.claimant.as_ref().map(|(claimant, _)| {
                let seen = claimant.condition();
                let left = seen.held_until.map(|until| until.saturating_sub(boot_now()).as_millis() as u64);
                EtcdStatus {
                    endpoint: seen.endpoint,
                    reachable: seen.reachable,
                    error: seen.last_error.filter(|_| seen.failing),
                    holder: seen.holder.map(|holder| holder.host),
                    held_for_ms: left.filter(|left| *left > 0),
                }
            }),
            kernel_lease: self.home.as_ref().filter(|_| standing.is_some()).map(Home::kernel_lease),
            commit: self.durable.spec.commit,
            held: self
                .home
                .as_ref()
                .filter(|_| standing == Some(Standing::Primary))
                .and_then(|home| home.hold())
                .map(|hold| hold.held()),
            pace: PaceStatus {
                wanted: self.durable.spec.pace.within(self.durable.spec.commit),
                interval_ms: pace.interval.map(|interval| interval.as_secs_f64() * 1e3),
                stretched_by: pace.stretched_by,
            },
            container: match &self.durable.spec.place {
                PlaceSpec::Sandbox(_) => None,
                PlaceSpec::Container(spec) => Some(ContainerStatus {
                    engine: spec.engine.name().to_owned(),
                    id: spec.engine.container().to_owned(),
                    way: spec.way,
                    mounts: spec.mounts(),
                    oom_kills: self.oom_kills,
                }),
            },
            pid: root.map(|root| root.host as i32),
            vips: self.durable.spec.vips.clone(),
            last: self.last_committed.as_ref().map(|(figures, _)| figures.clone()),
            summary: self.last_committed.as_ref().and_then(|_| self.history.summary()),
            last_drill: self.last_drill.clone(),
            hook: self.hooks.status.clone(),
            error: self.error.clone().or_else(|| self.standby.as_ref().and_then(|standby| standby.trouble())),
        }
    }

    /// Notes how epochs go; that they are held up, or not any more, goes into the history, but not all the time.
    pub(super) fn note_pace(&mut self, pace: Report, epoch: EpochId) {
        self.pace = pace;
        let (told, at) = self.pace_told;
        if pace.stretched_by == told || at.is_some_and(|at| at.elapsed() < PACE_TELLING_INTERVAL) {
            return;
        }
        self.pace_told = (pace.stretched_by, Some(Instant::now()));
        let interval_ms = pace.interval.map_or(0, |interval| interval.as_millis());
        let wanted = self.durable.spec.pace.mode;
        let (kind, why) = match pace.stretched_by {
            StretchedBy::None => ("pace-kept", ""),
            StretchedBy::Link => ("pace-stretched", ": the link is slower than the workload writes"),
            StretchedBy::Standby => ("pace-stretched", ": the standby is slower than the workload writes"),
            StretchedBy::Freeze => {
                ("pace-stretched", ": the workload would be frozen for too much of its time")
            }
            StretchedBy::Capture => ("pace-stretched", ": capturing an epoch takes longer"),
        };
        self.event(kind, &format!("an epoch every {interval_ms} ms, wanted: {wanted}{why}"), Some(epoch));
    }

    pub(super) fn event(&mut self, kind: &str, detail: &str, epoch: Option<EpochId>) {
        self.event_with(kind, detail, epoch, BTreeMap::new());
    }

    pub(super) fn event_with(
        &mut self,
        kind: &str,
        detail: &str,
        epoch: Option<EpochId>,
        phases_ms: BTreeMap<String, f64>,
    ) {
        let term = self.durable.record.map_or(Term(0), |record| record.term);
        let (kind, detail) = (kind.to_owned(), detail.to_owned());
        self.history.add(Event { at_unix_ms: unix_ms(), term, kind, detail, phases_ms, epoch });
    }
}
