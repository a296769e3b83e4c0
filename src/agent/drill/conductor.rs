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
        durable,
        home::{Home, LOG_BYTES_MAX},
        standby::{Standby, lazy_extents, lock, pids},
        trees,
    },
    Dirs, Ender, LOOK_INTERVAL, RESTORE_LIMIT,
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
    workload::{
        sandbox,
        spec::{Net, SandboxSpec},
    },
};

/// Conducts one drill, on a thread of its own.
pub(super) struct Conductor {
    pub(super) agent: Arc<Agent>,
    pub(super) name: Name,
    pub(super) spec: SandboxSpec,
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
        self.check_room()?;
        self.dirs.make().context("making its directories")?;
        let files = Instant::now();
        self.copy_files()?;
        self.phase("files", files);
        let (home, pages) = self.restore(view, &note)?;
        let probed = self.probe(&home);
        let ended = self.await_pages(&pages);
        self.viewing.store(false, Ordering::Release);
        probed?;
        ended?;
        self.ender.check()?;
        if home.root()?.is_none() {
            return Err(anyhow::anyhow!("the restored workload has ended by itself; see its output").into());
        }
        if self.request.keep {
            let (init, log) = (home.keeper().pid(), self.dirs.base.join("output.log"));
            self.report.kept = Some(Kept { init, log });
        }
        Ok(())
    }

    fn check_room(&self) -> Result<(), Trouble> {
        let shm = bytes_below(&trees::shm_of(&self.agent.config, &self.name));
        let image = self.report.memory_bytes + shm;
        let available = memory_available().context("reading /proc/meminfo")?;
        drill::check_memory(available, image).map_err(|error| Trouble::Refused(ApiError::refused(error)))?;
        let place = durable::Place::of(&self.agent.config.state_dir, &self.name);
        let (files, free) = (bytes_below(&place.data()), disk_available(&self.agent.config.state_dir)?);
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
    fn copy_files(&self) -> anyhow::Result<()> {
        let config = &self.agent.config;
        let place = durable::Place::of(&config.state_dir, &self.name);
        for (from, to) in [
            (place.data(), self.dirs.base.join("paths")),
            (trees::shm_of(config, &self.name), self.dirs.store.join("shm")),
        ] {
            if !from.exists() {
                continue;
            }
            let mut copy = Command::new("cp")
                .args(["-a", "--reflink=auto", "--"])
                .args([&from, &to])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .context("running cp")?;
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
        }
        self.ender.check()
    }

    /// Restores the view's epoch as a takeover would: what that has ready is made first.
    fn restore(&mut self, view: View, note: &Note) -> anyhow::Result<(Home, Pages)> {
        let making = Instant::now();
        let spec = SandboxSpec { name: self.name.of_drill(), ..self.spec.clone() };
        let options = sandbox::Options {
            program: self.agent.program.clone(),
            run_dir: self.dirs.run.clone(),
            data_dir: self.dirs.base.join("paths"),
            shm_dir: self.dirs.store.join("shm"),
            log: self.dirs.base.join("output.log"),
            log_bytes_max: LOG_BYTES_MAX,
            drill_of: Some(self.name.clone()),
        };
        let home = Home::isolated(&spec, &options)?;
        self.phase("place", making);

        let (making, images) = (Instant::now(), self.dirs.store.join("ready"));
        let criu_dir = view.criu_dir();
        let lazy = |space| lazy_extents(&criu_dir, space).unwrap_or_default();
        let ready = restore::materialise(&view, &images, Mode::Lazy, lazy)?;
        let bridge = Bridge::new(&self.agent.config.work_dir, self.agent.install.version)?;
        let criu =
            Ahead::start(&self.agent.install, &bridge, &images, &home.site(note)?, &pids(&ready.dir)?)?;
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
        let mut home = home;
        home.track(restored?)?;
        self.phase("criu", asked);
        let restore_ms = began.elapsed().as_secs_f64() * 1e3;
        self.report.restore_ms = Some(restore_ms);
        self.report.rto_ms = Some(self.report.detection_ms + restore_ms);
        Ok((home, pages))
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

    fn probe(&mut self, home: &Home) -> anyhow::Result<()> {
        let Some(command) = self.request.probe.clone() else { return Ok(()) };
        let limit = Duration::from_millis(self.request.timeout_ms.unwrap_or(PROBE_TIMEOUT_MS));
        let mut env = vec![("STANDIN_WORKLOAD", self.name.to_string())];
        env.extend(self.report.epoch.map(|epoch| ("STANDIN_EPOCH", epoch.to_string())));
        if let Net::Own { ips } = &self.spec.net {
            env.extend(ips.first().map(|ip| ("STANDIN_ADDRESS", ip.addr.to_string())));
        }
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
