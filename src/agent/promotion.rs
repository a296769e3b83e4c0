//! Promotion: an epoch is restored into the place that waits, heard, and announced; its pages may come behind.
//!
//! Invariant: an epoch of a workload that has files is let run once. What it did to them is not undone: a tree that was let
//! run goes on, also under an agent that was not there then, or is lost, as in a crash ([`Standby::has_run`]).

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use anyhow::Context as _;

use super::{
    drill::TAKEN_OVER,
    home::Home,
    hooks::Cause,
    mailbox::Msg,
    orders::BY_OPERATOR,
    owner::{Owner, Promotion},
    standby::{RestorePlan, Standby},
    trees,
};
use crate::{
    drill::Outcome,
    ha::{self, Input, Standing},
    model::{EpochId, Term},
    observe::in_full,
    takeover::announce::due,
    transport::block_in_place,
};

impl Owner {
    pub(super) fn restore(&mut self, epoch: EpochId, term: Term, eager: bool) {
        // Its memory and its processor's time are needed; it is not waited for.
        self.end_drill(Outcome::Interrupted, TAKEN_OVER);
        let silent_ms = self.lease_renewed.map_or(0.0, |at| at.elapsed().as_secs_f64() * 1e3);
        let handed = self.taken_over == Some(epoch);
        let because = self.promote_because.take();
        let cause = match (handed, &because) {
            (true, _) => "handed over by the primary",
            (false, Some(because)) => because,
            (false, None) => "the primary's lease ran out",
        };
        self.hooks.cause = Some(match because.as_deref() {
            _ if handed => Cause::Handoff,
            Some(BY_OPERATOR) => Cause::Failover,
            _ => Cause::Takeover,
        });
        let mut phases = BTreeMap::new();
        if !handed {
            phases.insert("detect".to_owned(), silent_ms);
        }
        if let Some(lag) = self.standby.as_ref().and_then(|standby| standby.lag_ms()) {
            phases.insert("lag".to_owned(), lag as f64);
        }
        self.promotion = Some(Promotion { cause: cause.to_owned(), phases, decided: Instant::now(), epoch });
        let has_files = trees::has_files(&self.agent.config, &self.durable.spec.place);
        if has_files && Standby::has_run(&self.agent, &self.name) == Some(epoch) {
            return self.let_it_go_on(epoch);
        }
        tracing::info!(%term, %epoch, eager, cause, "restoring");
        let (Some(standby), to_self) = (self.standby.clone(), self.to_self.clone()) else {
            self.feed(Input::RestoreFailed { reason: "the image is gone".into() });
            return;
        };
        // A place that an attempt has used is not used again.
        let waiting = standby.waiting();
        let used = eager || self.home.as_ref().is_none_or(|home| !home.is_empty_but(&waiting));
        if used {
            self.kill_copy();
        }
        if let Err(error) = self.warm_place() {
            let _ = to_self.try_send(Msg::RestoreFailed(in_full(&error)));
            return;
        }
        let Some(mut home) = self.home.take() else { return };
        let eager = eager || self.eager || self.durable.spec.place.is_whole();
        let plan = RestorePlan { epoch, eager, has_files, owner: to_self.clone() };
        let agent = Arc::clone(&self.agent);
        self.lazy_pages = !eager;
        tokio::task::spawn_blocking(move || {
            let message = match standby.restore(&agent, &mut home, &plan) {
                Ok((phases, root)) => Msg::Restored { home: Box::new(home), phases, root },
                Err(error) => {
                    drop(home);
                    Msg::RestoreFailed(in_full(&error))
                }
            };
            let _ = to_self.blocking_send(message);
        });
    }

    /// The epoch was restored before, and its tree has changed its files since: it cannot be restored again.
    fn let_it_go_on(&mut self, epoch: EpochId) {
        let message = match block_in_place(|| self.running_tree()) {
            Ok((home, root)) => {
                tracing::info!(%epoch, root, "it was restored before, and goes on");
                Msg::Restored { home: Box::new(home), phases: BTreeMap::new(), root }
            }
            Err(error) => {
                self.kill_copy();
                self.lazy_pages = false;
                Msg::RestoreFailed(format!(
                    "epoch {epoch} ran here and has changed its files since, so that its memory does not fit them any \
                     more: {}. The files are as it left them, as after a crash: start the workload from them",
                    in_full(&error)
                ))
            }
        };
        // This is the owner itself: it has not filled its own queue.
        let _ = self.to_self.try_send(message);
    }

    /// The tree that runs here and has, or is brought, all its pages.
    fn running_tree(&mut self) -> anyhow::Result<(Home, u32)> {
        let marked = Standby::marked(&self.agent, &self.name).is_some();
        anyhow::ensure!(!marked || self.lazy_pages, "nobody brings it the pages that it lacks");
        let standby = self.standby.as_ref().context("the image is gone")?;
        let inside = standby.root()?;
        let home = self.home.as_mut().context("its place is gone")?;
        anyhow::ensure!(!home.keeper().guard().fired(), "the guard has ended it");
        if home.root()?.is_none() {
            home.track(inside)?;
            // An engine may have made its network only with it.
            home.prepare(&self.durable.spec, false)?;
        }
        anyhow::ensure!(home.root()?.is_some(), "it has ended");
        self.home.take().map(|home| (home, inside)).context("its place is gone")
    }

    pub(super) fn restored(&mut self, home: Home, phases: BTreeMap<String, f64>) {
        self.home = Some(home);
        if let Some(promotion) = &mut self.promotion {
            promotion.phases.extend(phases);
            promotion.phases.insert("restore".into(), promotion.decided.elapsed().as_secs_f64() * 1e3);
        }
        match self.pages_lost.take() {
            Some(reason) => self.feed(Input::RestoreFailed { reason }),
            None => self.feed(Input::Restored),
        }
    }

    pub(super) fn announce(&mut self, term: Term) {
        self.error = None;
        let opening = Instant::now();
        if let Some(home) = &self.home {
            home.watch_connections(&self.name);
        }
        self.speak();
        let Some(mut promotion) = self.promotion.take() else { return };
        if let (Some(home), Some(standby)) = (&self.home, &self.standby) {
            home.replay(&standby.inputs_since(promotion.epoch));
        }
        promotion.phases.insert("network".into(), opening.elapsed().as_secs_f64() * 1e3);
        let detail = format!("{}; epoch {} runs here under term {term}", promotion.cause, promotion.epoch);
        self.event_with("promoted", &detail, Some(promotion.epoch), promotion.phases);
        self.last_committed = None;
        if !self.lazy_pages {
            self.pages_served();
        }
    }

    /// Lets the workload be heard, and tells the network where it is: now, and again by the schedule.
    pub(super) fn speak(&mut self) {
        let Some(home) = &self.home else { return };
        if let Err(error) = block_in_place(|| home.open_up().and_then(|()| home.announce(0))) {
            self.error = Some(format!("the workload cannot be heard: {}", in_full(&error)));
        }
        self.announced = Some((Instant::now(), 1));
    }

    /// Repeats an announcement that is due.
    pub(super) fn repeat_announcement(&mut self) {
        let Some((since, round)) = self.announced else { return };
        let for_ever = self.home.as_ref().is_some_and(Home::is_announced_for_ever);
        let Some(at) = due(round, for_ever) else {
            self.announced = None;
            return;
        };
        if since.elapsed() < at {
            return;
        }
        if self.standing() == Some(Standing::Primary)
            && let Some(Err(error)) = self.home.as_ref().map(|home| home.announce(round))
        {
            tracing::debug!(%error, "announcing the address");
        }
        self.announced = Some((since, round + 1));
    }

    /// The restored tree has all its memory: the image is not needed for it any more.
    pub(super) fn pages_served(&mut self) {
        self.lazy_pages = false;
        // An image cannot be removed while it is read: a drill's end comes here again.
        if self.standing() == Some(Standing::Primary)
            && self.drill.is_none()
            && let Some(standby) = self.standby.take()
        {
            block_in_place(|| standby.retire(self.agent.config.store));
        }
    }

    pub(super) fn pages_failed(&mut self, reason: &str) {
        self.lazy_pages = false;
        if self.home.is_none() {
            // The restore is not reported yet. It may never be: CRIU or the tree, touching a page that nobody brings, waits
            // for ever. Its place is ended, upon which it fails.
            self.pages_lost = Some(reason.to_owned());
            self.kill_copy();
            return;
        }
        self.event("pages-failed", reason, None);
        let role = self.durable.record.map(|record| record.role);
        let runs_here = matches!(role, Some(ha::Role::Primary { .. } | ha::Role::Promoting { .. }));
        if runs_here && !std::mem::replace(&mut self.eager, true) {
            // As an agent that starts now would: the mark is still there.
            self.resume();
            return;
        }
        self.error =
            Some(format!("pages could not be brought to the restored workload, which was ended: {reason}"));
        self.kill_copy();
    }
}
