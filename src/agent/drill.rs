//! A drill: the newest committed epoch is restored beside everything else, where nobody hears it, probed, and taken away.
//!
//! ```text
//!  asked ──► room? ──► view of the store, files copied ──► place made ──► restored ──► probed ──► all pages there
//!    │        │ no                                                                                   │
//!    │refused ▼                                                                        kept ◄────────┤
//!                                                                                       │ ended      ▼
//!  whenever this host is to be more than a standby: ended at once ─────────────────────►└──► taken away, reported
//! ```
//!
//! A thread of its own conducts it (`conductor`); the owner only tells it to end ([`Owner::watch_drill`]). What it makes is
//! made after what waits for a takeover (`model`) and has names of its own: the place `NAME.drill`, directories `drills/NAME`.
//! Of the warm image it has a view: epochs are committed behind it, but not folded, which is why a drill that takes too long
//! for that ends.
//!
//! Invariants: a takeover waits for no drill; nothing of a drill has a way out, or changes what waits; whatever is left of one is found by
//! `drills/NAME` in the state directory, which is made first and removed last, and swept when an agent starts.

mod conductor;
mod model;
mod output;

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;

use self::{conductor::Conductor, model::Model};
use super::{
    api::ApiError,
    mailbox::{Answer, Msg},
    owner::Owner,
    standby::{Standby, lock},
};
use crate::{
    config::Config,
    drill::{self, Last, Outcome, Report},
    ha::{Core, Standing},
    model::{EpochId, Name},
    observe::unix_ms,
    store::LAYERS_MAX,
    transport::block_in_place,
    workload::{
        cgroup::Cgroup,
        sandbox::Sandbox,
        spec::{PlaceSpec, Way},
    },
};

/// How long a drill may take to restore, and then its pages to come.
const RESTORE_LIMIT: Duration = Duration::from_secs(60);
/// How often a drill that waits looks whether it is to end.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// Epochs that may wait for the drill's view to go.
const WAITING_MAX: usize = LAYERS_MAX / 4 * 3;

/// What ends a drill before all others.
pub(super) const TAKEN_OVER: &str = "the workload is taken over here";

/// Where a drill's things are.
struct Dirs {
    /// Durable, the first and the last of them: files, output.
    base: PathBuf,
    /// Beside the store: what CRIU reads, and the files in memory.
    store: PathBuf,
    /// Holds the place's run directory.
    run: PathBuf,
}

impl Dirs {
    fn of(config: &Config, name: &Name) -> Self {
        Self {
            base: config.state_dir.join("drills").join(name.as_str()),
            store: config.store_dir.join("drills").join(name.as_str()),
            run: config.run_dir.join("drills"),
        }
    }

    fn paths(&self) -> PathBuf {
        self.base.join("paths")
    }

    fn shm(&self) -> PathBuf {
        self.store.join("shm")
    }

    /// What a container writes elsewhere.
    fn layers(&self) -> PathBuf {
        self.base.join("layers")
    }

    fn log(&self) -> PathBuf {
        self.base.join("output.log")
    }

    fn make(&self) -> io::Result<()> {
        [&self.base, &self.store]
            .into_iter()
            .try_for_each(|dir| DirBuilder::new().recursive(true).mode(0o700).create(dir))
    }

    /// Ends whatever runs in the place and removes all of it; nothing is no error.
    fn clear(&self, name: &Name) -> anyhow::Result<()> {
        Sandbox::destroy(&self.run, &name.of_drill())?;
        for dir in [&self.store, &self.base] {
            match fs::remove_dir_all(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("removing {}", dir.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Takes away what drills have left that an earlier agent, or the host, did not live to end.
pub(super) fn sweep(config: &Config) -> anyhow::Result<()> {
    let entries = match fs::read_dir(config.state_dir.join("drills")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        if let Ok(name) = entry?.file_name().to_string_lossy().parse::<Name>() {
            tracing::info!(%name, "a drill was cut off; what it left is taken away");
            Dirs::of(config, &name).clear(&name).with_context(|| format!("what a drill of {name} left"))?;
        }
    }
    Ok(())
}

/// Whether there is a drill of any workload here, or what is left of one.
fn is_any(config: &Config) -> bool {
    fs::read_dir(config.state_dir.join("drills")).is_ok_and(|mut entries| entries.next().is_some())
}

/// Waits until nothing is left of any drill, or the limit has passed.
pub(super) async fn await_none(config: &Config, limit: Duration) {
    let until = Instant::now() + limit;
    while is_any(config) && Instant::now() < until {
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// By which a drill is told to end.
#[derive(Default)]
struct Ender {
    /// As what it ends, and why.
    told: Mutex<Option<(Outcome, String)>>,
    /// When it must be done with what it does.
    deadline: Mutex<Option<Instant>>,
    over: AtomicBool,
}

impl Ender {
    fn told(&self) -> Option<(Outcome, String)> {
        lock(&self.told).clone()
    }

    fn check(&self) -> anyhow::Result<()> {
        self.told().map_or(Ok(()), |(_, reason)| Err(anyhow::anyhow!(reason)))
    }

    fn limit(&self, limit: Option<Duration>) {
        *lock(&self.deadline) = limit.map(|limit| Instant::now() + limit);
    }

    fn is_late(&self) -> bool {
        lock(&self.deadline).is_some_and(|deadline| Instant::now() > deadline)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

/// A drill under way, or one whose workload was kept.
pub(super) struct Drill {
    ender: Arc<Ender>,
    /// Whoever asked; none when it is answered.
    answer: Option<Answer<Report>>,
    /// Whoever wants to hear of its end.
    ending: Vec<Answer<()>>,
    /// Epochs committed since.
    committed: Arc<Mutex<u64>>,
    /// The drill has its view of the store.
    viewing: Arc<AtomicBool>,
}

impl Owner {
    /// Begins a drill; nobody asked for one that was due.
    pub(super) fn begin_drill(&mut self, request: drill::Request, answer: Option<Answer<Report>>) {
        let (standby, model) = match self.check_drill() {
            Ok(found) => found,
            Err(error) => return self.drill_refused(error, answer),
        };
        let timing = self.agent.config.timing;
        let detection_ms = (timing.lease + timing.drift).as_secs_f64() * 1e3;
        let host = self.agent.config.name.clone();
        let ender = Arc::new(Ender::default());
        let (committed, viewing) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let mut conductor = Conductor {
            dirs: Dirs::of(&self.agent.config, &self.name),
            agent: Arc::clone(&self.agent),
            name: self.name.clone(),
            model,
            request,
            standby,
            ender: Arc::clone(&ender),
            committed: Arc::clone(&committed),
            viewing: Arc::clone(&viewing),
            serving: None,
            report: Report::begun(self.name.clone(), host, unix_ms(), detection_ms),
        };
        self.drill = Some(Drill { ender, answer, ending: Vec::new(), committed, viewing });
        let to_self = self.to_self.clone();
        std::thread::spawn(move || {
            conductor.main(|report| {
                let _ = to_self.blocking_send(Msg::DrillReported(report));
            });
            drop(conductor);
            let _ = to_self.blocking_send(Msg::DrillGone);
        });
    }

    fn check_drill(&mut self) -> Result<(Arc<Standby>, Model), ApiError> {
        let name = &self.name;
        match self.standing() {
            None => {
                return Err(ApiError::refused(format!(
                    "{name} is not protected: `standin protect {name} --to PEER`, then drill on that host"
                )));
            }
            Some(Standing::Standby) => {}
            Some(Standing::Primary) => {
                let peer = self.durable.peer.as_deref().unwrap_or("its standby");
                return Err(ApiError::refused(format!(
                    "{name} runs here; a drill is held where it would be restored: type `standin drill {name}` on {peer}"
                )));
            }
            Some(standing) => {
                return Err(ApiError::refused(format!(
                    "{name} stands as {standing:?} here, and a drill needs a standby; see `standin status {name}`"
                )));
            }
        }
        if self.drill.is_some() {
            return Err(ApiError::refused(format!(
                "a drill of {name} is under way here, or its workload was kept: wait, or `standin drill {name} --end`"
            )));
        }
        let spec = &self.durable.spec;
        if let PlaceSpec::Container(container) = &spec.place
            && container.way == Way::Whole
        {
            let engine = container.engine.name();
            return Err(ApiError::refused(format!(
                "{name} is restored whole, namespaces and all, by {engine}, which would have to know the drill's copy as a \
                 container of its own. Have it restored from inside, which can be drilled: `standin wrap {name}` says how its \
                 pid 1 becomes a small init; or try a `standin handoff {name}` there and back in a quiet hour"
            )));
        }
        let model = Model { spec: spec.place.clone(), vips: spec.vips.clone() };
        // One of an older term is a base for the next, and nothing to run.
        let is_current = |held: EpochId| held.term == self.term();
        let standby = self.standby.clone().filter(|standby| standby.held().is_some_and(is_current));
        let standby = standby.ok_or_else(|| {
            ApiError::refused(format!("no epoch of {name} is held here yet; see `standin status {name}`"))
        })?;
        Ok((standby, model))
    }

    /// Tells a drill to end, if there is one; does not wait for it.
    pub(super) fn end_drill(&self, outcome: Outcome, reason: &str) {
        let Some(drill) = &self.drill else { return };
        {
            let mut told = lock(&drill.ender.told);
            if told.is_some() {
                return;
            }
            *told = Some((outcome, reason.to_owned()));
        }
        tracing::info!(name = %self.name, reason, "the drill is ended");
        let (ender, place) = (Arc::clone(&drill.ender), self.name.of_drill());
        std::thread::spawn(move || {
            // Whatever the conductor waits for, CRIU, the probe, pages, ends with the tree. It may be about to make it.
            while !ender.is_over() {
                let _ = Cgroup::of(&place).map(|cgroup| cgroup.kill(LOOK_INTERVAL));
                std::thread::sleep(LOOK_INTERVAL);
            }
        });
    }

    /// The operator ends it.
    pub(super) fn ask_end_of_drill(&mut self, answer: Answer<()>) {
        self.end_drill(Outcome::Interrupted, "the operator ended it");
        if let Some(drill) = &mut self.drill {
            drill.ending.push(answer);
        } else {
            let message = format!("there is no drill of {} here", self.name);
            let _ = answer.send(Err(ApiError::refused(message)));
        }
    }

    /// Ends a drill that must not go on.
    pub(super) fn watch_drill(&mut self) {
        let Some(drill) = &self.drill else { return self.drill_if_due() };
        if self.stopping.is_some() {
            self.end_drill(Outcome::Interrupted, "the agent was stopped");
        } else if self.standing() == Some(Standing::Promoting) {
            self.end_drill(Outcome::Interrupted, TAKEN_OVER);
        } else if self.standing() != Some(Standing::Standby) {
            self.end_drill(Outcome::Interrupted, "this host is the workload's standby no more");
        } else if drill.answer.as_ref().is_some_and(tokio::sync::oneshot::Sender::is_closed) {
            self.end_drill(Outcome::Interrupted, "the operator called it off");
        } else if drill.ender.is_late() {
            let reason =
                format!("it was not restored, with all its pages, within {} s", RESTORE_LIMIT.as_secs());
            self.end_drill(Outcome::Failed, &reason);
        } else if drill.viewing.load(Ordering::Acquire)
            && self.standby.as_ref().is_some_and(|standby| standby.unfolded() > WAITING_MAX)
        {
            self.end_drill(
                Outcome::Failed,
                "it took so long that the epochs which were committed meanwhile became too many to wait for it: \
                 let epochs come less often (`standin protect --every`), or drill when the host is less busy",
            );
        }
    }

    /// An epoch was committed.
    pub(super) fn count_for_drill(&self) {
        if let Some(drill) = &self.drill {
            *lock(&drill.committed) += 1;
        }
    }

    pub(super) fn drill_reported(&mut self, report: Result<Box<Report>, ApiError>) {
        let answer = self.drill.as_mut().and_then(|drill| drill.answer.take());
        let report = match report {
            Ok(report) => report,
            Err(error) => return self.drill_refused(error, answer),
        };
        let kind = format!("drill-{}", report.outcome.word());
        self.event_with(&kind, &report.summary(), report.epoch, report.phases());
        self.remember_drill(Some(Last::from(&*report)));
        if let Some(answer) = answer {
            let _ = answer.send(Ok(*report));
        }
    }

    /// Nothing was tried. Of one that was due people hear by the status, and it is tried when the next one is due.
    fn drill_refused(&mut self, error: ApiError, answer: Option<Answer<Report>>) {
        if let Some(answer) = answer {
            let _ = answer.send(Err(error));
            return;
        }
        self.event("drill-refused", &error.message, None);
        let mut report = Report::begun(self.name.clone(), self.agent.config.name.clone(), unix_ms(), 0.0);
        (report.outcome, report.reason) = (Outcome::Failed, Some(error.message));
        self.remember_drill(Some(Last::from(&report)));
    }

    /// Holds a drill if the settings say so and the last one is that long ago; one at a time on this host.
    fn drill_if_due(&mut self) {
        let config = &self.agent.config;
        let Some(every) = config.drill_every else { return };
        // A clock that was set back is no reason never to drill again.
        let ago = |last: &Last| u128::from(unix_ms().abs_diff(last.at_unix_ms));
        let is_due = self.last_drill.as_ref().is_none_or(|last| ago(last) >= every.as_millis());
        let is_ready = self.standing() == Some(Standing::Standby)
            && self.stopping.is_none()
            && self.core.as_ref().is_some_and(Core::armed);
        if is_due && is_ready && !is_any(config) {
            let probe = config.drill_probe.clone();
            self.begin_drill(drill::Request { probe, ..drill::Request::default() }, None);
        }
    }

    fn remember_drill(&mut self, last: Option<Last>) {
        self.last_drill = last;
        let written = self.last_drill.as_ref().map(|last| self.place.write_drill(last));
        if let Some(Err(error)) = written {
            tracing::warn!(%error, "what the drill found is not on the disk");
        }
    }

    /// Nothing of it is left.
    pub(super) fn drill_gone(&mut self) {
        let Some(drill) = self.drill.take() else { return };
        for answer in drill.ending {
            let _ = answer.send(Ok(()));
        }
        if let Some(last) = self.last_drill.clone().filter(|last| last.kept) {
            self.remember_drill(Some(Last { kept: false, ..last }));
        }
        // Its view may have been in the way.
        if !self.lazy_pages {
            self.pages_served();
        }
    }

    /// Ends a drill and waits until it lets go of the image.
    pub(super) fn finish_drill(&mut self, reason: &str) {
        const LIMIT: Duration = Duration::from_secs(10);
        self.end_drill(Outcome::Interrupted, reason);
        let Some(drill) = &self.drill else { return };
        let until = Instant::now() + LIMIT;
        block_in_place(|| {
            while !drill.ender.is_over() && Instant::now() < until {
                std::thread::sleep(LOOK_INTERVAL);
            }
        });
    }
}
