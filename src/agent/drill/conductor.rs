//! One drill from its begin to its end, on a thread of its own, which may block; see [`super`].

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use super::{
    super::{
        Agent,
        api::ApiError,
        standby::{Standby, lazy_extents, lock, pids},
    },
    Dirs, Ender, LOOK_INTERVAL, RESTORE_LIMIT,
    model::{Copy, Made, Model},
};
use crate::{
    capture::Note,
    criu::{
        bridge::Bridge,
        lazy::{LazyError, Mark, Pager, PagerHandle},
    },
    drill::{self, Kept, Lost, Outcome, PROBE_TIMEOUT_MS, Prober, Report},
    model::{EpochId, Name},
    observe::{in_full, unix_ms},
    restore::{self, Ahead, Mode, Recency, Step},
    store::View,
    workload::cgroup::Cgroup,
};

/// Conducts one drill, on a thread of its own.
pub(super) struct Conductor {
    pub(super) agent: Arc<Agent>,
    pub(super) name: Name,
    pub(super) model: Model,
    pub(super) request: drill::Request,
    pub(super) standby: Arc<Standby>,
    pub(super) dirs: Dirs,
    pub(super) ender: Arc<Ender>,
    pub(super) committed: Arc<Mutex<u64>>,
    pub(super) viewing: Arc<AtomicBool>,
    pub(super) serving: Option<JoinHandle<()>>,
    pub(super) report: Report,
}

/// The pages that follow the restored tree.
struct Pages {
    handle: PagerHandle,
    /// What came of it, and the next epoch with the bytes that it had brought by then.
    served: Receiver<Result<Option<(EpochId, u64)>, LazyError>>,
}

impl Conductor {
    /// From the begin to the end; `reported` hears once what was found, or why nothing was tried.
    pub(super) fn main(&mut self, reported: impl FnOnce(Result<Box<Report>, ApiError>)) {
        let found = self.conduct();
        let refused = match found {
            Ok(()) => {
                self.report.outcome = Outcome::Passed;
                None
            }
            Err(Trouble::Refused(error)) => Some(error),
            Err(Trouble::Failed(error)) => {
                let (outcome, reason) =
                    self.ender.told().unwrap_or_else(|| (Outcome::Failed, in_full(&error)));
                (self.report.outcome, self.report.reason) = (outcome, Some(reason));
                None
            }
        };
        self.report.epochs_committed = *lock(&self.committed);
        if self.report.kept.is_some() {
            reported(Ok(Box::new(self.report.clone())));
            while self.ender.told().is_none() {
                std::thread::sleep(LOOK_INTERVAL);
            }
            self.clear();
            return;
        }
        let began = Instant::now();
        self.clear();
        self.phase("clean-up", began);
        reported(refused.map_or_else(|| Ok(Box::new(self.report.clone())), Err));
    }

    fn clear(&mut self) {
        if let Err(error) = self.dirs.clear(&self.name) {
            tracing::error!(%error, name = %self.name, "what the drill left; the agent's next start tries again");
            self.report.outcome = Outcome::Failed;
            self.report
                .reason
                .get_or_insert_with(|| format!("it could not be taken away: {}", in_full(&error)));
        }
        // Whoever serves pages has the store's view, and ends with the tree.
        if let Some(serving) = self.serving.take() {
            let _ = serving.join();
        }
        self.ender.over.store(true, Ordering::Release);
    }

    fn phase(&mut self, name: &str, since: Instant) {
        self.report.phases_ms.push((name.to_owned(), since.elapsed().as_secs_f64() * 1e3));
    }

    fn conduct(&mut self) -> Result<(), Trouble> {
        self.viewing.store(true, Ordering::Release);
        let view = self.standby.view_with_files().map_err(anyhow::Error::from)?;
        let note = Note::read(&view.criu_dir())?;
        let rpo_ms = unix_ms().saturating_sub(note.frozen_at_unix_ms);
        self.report.epoch = Some(view.id());
        self.report.rpo_ms = Some(rpo_ms);
        self.report.lost = Some(Lost { ms: rpo_ms, ..Lost::default() });
        view.for_each_extent(|_, extent| self.report.memory_bytes += extent.bytes());
        let copies = self.model.copies(&self.agent.config, &self.dirs)?;
        self.check_room(&copies)?;
        self.dirs.make().context("making its directories")?;
        let files = Instant::now();
        for copy in &copies {
            self.copy_files(copy)?;
        }
        self.phase("files", files);
        let (made, pages) = self.restore(view, &note)?;
        let home = &made.home;
        let probed = self.probe(&made);
        let ended = self.await_pages(&pages);
        self.viewing.store(false, Ordering::Release);
        probed?;
        ended?;
        self.ender.check()?;
        if home.root()?.is_none() {
            return Err(anyhow::anyhow!("the restored workload has ended by itself; see its output").into());
        }
        if self.request.keep {
            let (init, log) = (home.keeper().pid(), self.dirs.log());
            self.report.kept = Some(Kept { init, log });
        }
        Ok(())
    }

    fn check_room(&self, copies: &[Copy]) -> Result<(), Trouble> {
        let bytes_of = |is_in_memory: bool| {
            let copies = copies.iter().filter(|copy| copy.is_in_memory == is_in_memory);
            copies.map(|copy| bytes_below(&copy.from)).sum::<u64>()
        };
        let image = self.report.memory_bytes + bytes_of(true);
        let available = memory_available().context("reading /proc/meminfo")?;
        drill::check_memory(available, image).map_err(|error| Trouble::Refused(ApiError::refused(error)))?;
        let (files, free) = (bytes_of(false), disk_available(&self.agent.config.state_dir)?);
        if files > free {
            let dir = self.agent.config.state_dir.display();
            return Err(Trouble::Refused(ApiError::refused(format!(
                "there is no room in {dir} for the drill's copy of the workload's files: {} MiB are free, {} MiB are \
                 needed; make room there",
                free >> 20,
                files >> 20
            ))));
        }
        Ok(())
    }

    /// Copies what is replicated, sharing its blocks where the file system can.
    fn copy_files(&self, Copy { from, to, .. }: &Copy) -> anyhow::Result<()> {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        }
        let mut copy = Command::new("cp")
            .args(["-a", "--reflink=auto", "--"])
            .args([from, to])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("running cp")?;
        // Should the agent end meanwhile, the next one ends what is there. It may be done already.
        let is_kept = Cgroup::create(&self.name.of_drill()).and_then(|cgroup| cgroup.enter_work(copy.id()));
        if let Err(error) = is_kept
            && copy.try_wait()?.is_none()
        {
            copy.kill()?;
            copy.wait()?;
            return Err(error.into());
        }
        while copy.try_wait()?.is_none() {
            if let Err(ended) = self.ender.check() {
                copy.kill()?;
                copy.wait()?;
                return Err(ended);
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        let output = copy.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        anyhow::ensure!(output.status.success(), "copying {}: {said}", from.display());
        self.ender.check()
    }

    /// Restores the view's epoch as a takeover would: what that has ready is made first.
    fn restore(&mut self, view: View, note: &Note) -> anyhow::Result<(Made, Pages)> {
        let making = Instant::now();
        let mut made = self.model.make(&self.agent, &self.dirs)?;
        self.phase("place", making);
        self.ender.check()?;

        let (making, images) = (Instant::now(), self.dirs.store.join("ready"));
        let criu_dir = view.criu_dir();
        let lazy = |space| lazy_extents(&criu_dir, space).unwrap_or_default();
        let ready = restore::materialise(&view, &images, Mode::Lazy, lazy)?;
        let bridge = Bridge::new(&self.agent.config.work_dir, self.agent.install.version)?;
        let site = self.model.site(&made, note, &self.dirs)?;
        let criu = Ahead::start(&self.agent.install, &bridge, &images, &site, &pids(&ready.dir)?)?;
        // Its ends of the streams are CRIU's now: the tree's alone when that has ended.
        drop(site);
        self.phase("images", making);
        self.ender.check()?;

        let began = Instant::now();
        let pages = self.serve_pages(view, &ready.dir)?;
        self.phase("prepare", began);
        let asked = Instant::now();
        let name =
            ready.dir.file_name().and_then(|name| name.to_str()).context("a directory without a name")?;
        self.ender.limit(Some(RESTORE_LIMIT));
        let restored = criu.restore(name, note.keys(), true, &mut |step| match step {
            Step::Restored => pages.handle.hold(),
            Step::Resuming => Ok(()),
        });
        self.ender.limit(None);
        if restored.is_err() {
            pages.handle.stop();
        }
        made.home.track(restored?)?;
        self.phase("criu", asked);
        let restore_ms = began.elapsed().as_secs_f64() * 1e3;
        self.report.restore_ms = Some(restore_ms);
        self.report.rto_ms = Some(self.report.detection_ms + restore_ms);
        Ok((made, pages))
    }

    /// Has pages served, the view being held until they all are there.
    fn serve_pages(&mut self, view: View, dir: &Path) -> anyhow::Result<Pages> {
        let mut recency = Recency::default();
        view.unfolded().for_each(|(id, runs)| recency.note(id, runs));
        let files = restore::page_files(&view, &recency)?;
        let mark = Mark::make(&self.dirs.base.join("lazy-restore.json"), &serde_json::to_vec(&view.id())?)?;
        let pager = Pager::start(&self.agent.install, dir, mark, &files)?;
        let handle = pager.handle()?;
        let (serve, served) = channel();
        let standby = Arc::clone(&self.standby);
        self.serving = Some(std::thread::spawn(move || {
            let ended = pager.wait();
            let next = standby.next_after(view.id());
            drop(view);
            // Nobody hears of it if the drill has ended.
            let _ = serve.send(ended.map(|_| next));
        }));
        Ok(Pages { handle, served })
    }

    fn probe(&mut self, Made { home, address }: &Made) -> anyhow::Result<()> {
        let Some(command) = self.request.probe.clone() else { return Ok(()) };
        let limit = Duration::from_millis(self.request.timeout_ms.unwrap_or(PROBE_TIMEOUT_MS));
        let mut env = vec![("STANDIN_WORKLOAD", self.name.to_string())];
        env.extend(self.report.epoch.map(|epoch| ("STANDIN_EPOCH", epoch.to_string())));
        env.push(("STANDIN_ADDRESS", address.to_string()));
        let prober = Prober {
            program: self.agent.program.clone(),
            init: home.keeper().pidfd()?,
            cgroup: home.keeper().cgroup().work(),
            env,
        };
        let began = Instant::now();
        let result = prober.run(&command, limit, || self.ender.told().is_some());
        self.phase("probe", began);
        // What ends a drill ends its probe as well: that says nothing.
        self.ender.check()?;
        let result = self.report.probe.insert(result?);
        anyhow::ensure!(result.is_content(), "the probe {}", result.ending());
        Ok(())
    }

    /// Until the tree has all its memory, of which a page may be damaged that nothing has touched yet.
    fn await_pages(&mut self, pages: &Pages) -> anyhow::Result<()> {
        let began = Instant::now();
        self.ender.limit(Some(RESTORE_LIMIT));
        let served = loop {
            match pages.served.recv_timeout(LOOK_INTERVAL) {
                Ok(served) => break served,
                Err(RecvTimeoutError::Timeout) => self.ender.check()?,
                Err(RecvTimeoutError::Disconnected) => anyhow::bail!("who waited for its pages has failed"),
            }
        };
        self.ender.limit(None);
        self.phase("pages", began);
        if let (Some((id, bytes)), Some(lost)) = (served?, &mut self.report.lost) {
            (lost.next_epoch, lost.memory_bytes) = (Some(id), Some(bytes));
        }
        Ok(())
    }
}

/// Why a drill did not pass.
enum Trouble {
    /// Nothing was tried.
    Refused(ApiError),
    /// Something was.
    Failed(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Trouble {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Memory that can be had without swapping, bytes.
fn memory_available() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 =
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).context("no MemAvailable")?;
    Ok(kib << 10)
}

fn disk_available(dir: &Path) -> anyhow::Result<u64> {
    let found = nix::sys::statvfs::statvfs(dir).with_context(|| format!("the room in {}", dir.display()))?;
    Ok(found.blocks_available() * found.fragment_size())
}

/// Bytes of the files below a directory as they lie on its disk; none if it is not there, nor for what vanishes meanwhile.
fn bytes_below(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(found) if found.is_dir() => bytes_below(&entry.path()),
        Ok(found) => found.blocks() * 512,
        Err(_) => 0,
    });
    bytes.sum()
}
