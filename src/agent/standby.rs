//! The standby's side: what was received is folded and made ready; the newest epoch is restored on demand.
//!
//! ```text
//!  receiving ──► commit ──► fold ──► materialise (in the background) ──► restore
//! ```
//!
//! Invariants: a restore works on a frozen view of the store; until a lazy restore has every page, a mark on disk
//! says so, and an agent that finds it waits for whoever serves the pages, or restores anew if nobody does
//! ([`Standby::marked`]); before the tree of a workload with files is let run, another says that ([`Standby::has_run`]).

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::sync::mpsc;

use super::{Agent, durable, home::Home, mailbox::Msg, trees};
use crate::{
    capture::Note,
    config::StoreKind,
    criu::{
        bridge::Bridge,
        images,
        lazy::{Mark, Pager, PagerHandle},
    },
    files::Target,
    model::{EpochId, Extent, Name, Space},
    observe::unix_ms,
    restore::{self, Ahead, Mode, Recency, Step},
    store::{Durability, FileChanges, FoldError, FreezeError, Store, VerifyError, View},
    takeover::inputs::{Input, Log},
    wire::{
        inventory::{Ask, Held},
        message::FileRecord,
    },
};

/// After an epoch it is waited for another so long before this one is folded and made ready: a takeover takes longer to begin.
const FOLLOW_AFTER: Duration = Duration::from_millis(25);
/// From so many on that are not folded it is not waited.
const UNFOLDED_MANY: usize = 16;

/// Files of a standby that nobody changes meanwhile.
pub(super) struct KeptFiles {
    targets: Vec<Target>,
    _view: Option<View>,
}

impl KeptFiles {
    /// Whether the blocks are there that a record wants kept.
    pub(super) fn has(&self, record: &FileRecord) -> anyhow::Result<bool> {
        Ok(trees::has_blocks(&self.targets, record)?)
    }
}

/// The warm image of one workload, and what is made of it.
pub(super) struct Standby {
    pub(super) store: Store,
    ready_root: PathBuf,
    place: durable::Place,
    mark: PathBuf,
    run_mark: PathBuf,
    newest: Mutex<Option<(EpochId, Note)>>,
    /// One fold at a time; why the last one failed, if it did. What is held is whole all the same.
    folding: Mutex<Option<String>>,
    /// One directory is made ready at a time.
    readying: Mutex<()>,
    recency: Mutex<Recency>,
    /// The CRIU that waits in the place; none is started once one was asked for.
    ahead: Mutex<Waiting>,
    /// What was sent to the workload lately.
    inputs: Mutex<Log>,
}

#[derive(Default)]
struct Waiting {
    criu: Option<Ahead>,
    ordered: bool,
}

/// Also after a panic of whoever had it: what is behind these locks is whole at every step.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Standby {
    pub(super) fn open(agent: &Agent, name: &Name) -> anyhow::Result<Self> {
        let durability = match agent.config.store {
            StoreKind::Memory => Durability::Memory,
            StoreKind::Disk => Durability::Disk,
        };
        let root = images_dir(agent);
        let place = durable::Place::of(&agent.config.state_dir, name);
        let (mark, run_mark) = (place.lazy_mark(), place.run_mark());
        let (config, kept) = (agent.config.clone(), place.clone());
        let files = Box::new(move |changes: &FileChanges<'_>| trees::apply(&config, &place, changes));
        let store = Store::open(&root, name, durability, files)?;
        let newest = store.view().and_then(|view| Some((view.id(), Note::read(&view.criu_dir()).ok()?)));
        Ok(Self {
            store,
            ready_root: agent.config.store_dir.join("ready").join(name.as_str()),
            place: kept,
            mark,
            run_mark,
            newest: Mutex::new(newest),
            folding: Mutex::new(None),
            readying: Mutex::new(()),
            recency: Mutex::default(),
            ahead: Mutex::default(),
            inputs: Mutex::default(),
        })
    }

    /// Reads the whole image again and compares it with what was received. Says which epoch it was and how much was read; none
    /// if nothing is held.
    pub(super) fn verify(&self) -> Option<(EpochId, Result<u64, VerifyError>)> {
        let view = self.store.view()?;
        let mut bytes = 0;
        view.for_each_extent(|_, extent| bytes += extent.bytes());
        Some((view.id(), view.verify().map(|()| bytes)))
    }

    /// Tells what the newest epoch is, hashes of its pages and of the files, all read again, until told to stop.
    pub(super) fn inventory(
        &self,
        agent: &Agent,
        ask: &Ask,
        tell: &mut dyn FnMut(Held, Vec<u8>) -> bool,
    ) -> anyhow::Result<()> {
        // With its files as they will be when the next epoch's changes are made.
        let view = self.held().map(|_| self.store.view_with_files()).transpose()?;
        if let Some(view) = view.as_ref().filter(|view| tell(Held::Epoch(view.id()), Vec::new())) {
            view.hash_pages(&ask.key, |space, start, sums| tell(Held::Pages { space, start }, sums))?;
        }
        if ask.blocks_max > 0 {
            trees::hashes(&agent.config, &self.place, &ask.key, tell)?;
        }
        Ok(())
    }

    /// The files that an epoch may keep parts of, as they are when its own changes are made.
    pub(super) fn kept_files(&self, agent: &Agent) -> anyhow::Result<KeptFiles> {
        let view = self.held().map(|_| self.store.view_with_files()).transpose()?;
        Ok(KeptFiles { targets: trees::targets(&agent.config, &self.place)?, _view: view })
    }

    /// The newest committed epoch.
    pub(super) fn held(&self) -> Option<EpochId> {
        self.store.held()
    }

    /// That epoch and its files, for a drill: others are committed meanwhile, and none is folded.
    pub(super) fn view_with_files(&self) -> Result<View, FreezeError> {
        self.store.view_with_files()
    }

    /// Epochs that are committed and not folded.
    pub(super) fn unfolded(&self) -> usize {
        self.store.unfolded()
    }

    /// The epoch that was committed after one of which there is a view, and the bytes of memory that it brought.
    pub(super) fn next_after(&self, id: EpochId) -> Option<(EpochId, u64)> {
        let view = self.store.view()?;
        let (next, extents) = view.unfolded().find(|(unfolded, _)| *unfolded > id)?;
        Some((next, extents.iter().map(|(_, extent)| extent.bytes()).sum()))
    }

    /// Age of the newest committed epoch by both hosts' wall clocks, milliseconds.
    pub(super) fn lag_ms(&self) -> Option<u64> {
        let newest = lock(&self.newest);
        newest.as_ref().map(|(_, note)| unix_ms().saturating_sub(note.frozen_at_unix_ms))
    }

    /// Refuses early what would not fit.
    pub(super) fn ensure_room(&self, bytes: u64) -> Result<(), String> {
        self.store.ensure_room(bytes).map_err(|error| error.to_string())
    }

    /// Takes note of a commit.
    pub(super) fn committed(&self, id: EpochId, note: Note) {
        *lock(&self.newest) = Some((id, note));
        lock(&self.inputs).committed(id);
    }

    /// After a commit, and its answer, which clients may wait for: folds and makes ready, in the background. Of epochs that come
    /// one upon the other only some are.
    pub(super) fn follow(self: &Arc<Self>, agent: &Arc<Agent>, name: &Name, id: EpochId) {
        let (standby, agent, name) = (Arc::clone(self), Arc::clone(agent), name.clone());
        tokio::spawn(async move {
            if standby.unfolded() < UNFOLDED_MANY {
                tokio::time::sleep(FOLLOW_AFTER).await;
            }
            if standby.is_newest(id) {
                tokio::task::spawn_blocking(move || standby.warm(&agent, &name, id));
            }
        });
    }

    fn is_newest(&self, id: EpochId) -> bool {
        self.store.held() == Some(id)
    }

    /// Keeps what was sent to the workload after this epoch's freeze.
    pub(super) fn log_input(&self, after: EpochId, input: Input) {
        lock(&self.inputs).add(after, input);
    }

    /// What was sent to the workload since this epoch's freeze, once.
    pub(super) fn inputs_since(&self, epoch: EpochId) -> Vec<Input> {
        lock(&self.inputs).take_since(epoch)
    }

    fn warm(&self, agent: &Agent, name: &Name, id: EpochId) {
        // A newer one on its way here does all of this too.
        if self.is_newest(id)
            && let Some(view) = self.store.view()
        {
            self.learn(&view);
            if let Err(error) = self.wait_ahead(agent, name, &view) {
                tracing::warn!(%error, "the restore is not prepared ahead");
            }
        }
        let mut trouble = lock(&self.folding);
        if self.is_newest(id) {
            *trouble = match self.store.fold() {
                // A reader (a restore) is in the way; the next epoch's fold makes up for it.
                Ok(_) | Err(FoldError::InUse { .. }) => None,
                Err(error) => Some(error.to_string()),
            };
        }
    }

    /// Learns which pages were written lately, before a fold forgets it.
    fn learn(&self, view: &View) {
        let mut recency = lock(&self.recency);
        view.unfolded().for_each(|(id, runs)| recency.note(id, runs));
    }

    /// Has a CRIU wait in the place, unless one does that can restore this directory.
    fn wait_ahead(&self, agent: &Agent, name: &Name, view: &View) -> anyhow::Result<()> {
        let spec = durable::Place::of(&agent.config.state_dir, name).read()?.spec.place;
        if spec.is_whole() {
            // Its runtime starts one.
            return Ok(());
        }
        let Some(dir) = &self.ready_ahead(view)? else { return Ok(()) };
        let (pids, note) = (pids(dir)?, Note::read(dir)?);
        let mut waiting = lock(&self.ahead);
        let fits =
            waiting.criu.as_mut().is_some_and(|criu| criu.fits(&pids, note.outside.len(), note.own_ipc));
        if !fits && !waiting.ordered {
            waiting.criu = None;
            let home = Home::open(agent, &spec, false)?;
            waiting.criu = Some(self.start_criu(agent, &home, &pids, &note)?);
        }
        Ok(())
    }

    fn start_criu(&self, agent: &Agent, home: &Home, pids: &[u32], note: &Note) -> anyhow::Result<Ahead> {
        let site = home.site(note)?;
        let bridge = Bridge::new(&agent.config.work_dir, agent.install.version)?;
        Ok(Ahead::start(&agent.install, &bridge, &self.ready_root, &site, pids)?)
    }

    /// The processes that wait in the place and are none of a workload.
    pub(super) fn waiting(&self) -> Vec<u32> {
        lock(&self.ahead).criu.as_ref().map(Ahead::processes).unwrap_or_default()
    }

    /// Why the newest epoch could not be folded, if so: the next one may not fit, so none is taken before it is mended.
    pub(super) fn trouble(&self) -> Option<String> {
        self.folding.try_lock().ok().and_then(|trouble| trouble.clone())
    }

    /// Tries again what failed.
    pub(super) fn mend(&self) -> Result<(), String> {
        let mut trouble = lock(&self.folding);
        if trouble.is_some() {
            *trouble = self.store.fold().err().map(|error| error.to_string());
        }
        trouble.clone().map_or(Ok(()), Err)
    }

    /// The directory from which CRIU restores the view's epoch, made unless it is there.
    fn ready(&self, view: &View, mode: Mode) -> anyhow::Result<PathBuf> {
        self.make_ready(view, mode, &lock(&self.readying))
    }

    /// The same before a restore is ordered; that one has a directory of its own, beside which there is no other.
    fn ready_ahead(&self, view: &View) -> anyhow::Result<Option<PathBuf>> {
        let one_at_a_time = lock(&self.readying);
        if lock(&self.ahead).ordered {
            return Ok(None);
        }
        self.make_ready(view, Mode::Lazy, &one_at_a_time).map(Some)
    }

    fn make_ready(&self, view: &View, mode: Mode, _: &MutexGuard<'_, ()>) -> anyhow::Result<PathBuf> {
        if let Some(dir) = restore::ready_dir(&self.ready_root, view.id(), mode) {
            return Ok(dir);
        }
        let dir = view.criu_dir();
        let lazy = |space: Space| lazy_extents(&dir, space).unwrap_or_default();
        let ready = restore::materialise(view, &self.ready_root, mode, lazy)?;
        restore::discard_others(&self.ready_root, Some(&ready.dir))?;
        Ok(ready.dir)
    }

    /// Whether a lazy restore was under way when an earlier agent ended: of which epoch.
    pub(super) fn marked(agent: &Agent, name: &Name) -> Option<EpochId> {
        let mark = durable::Place::of(&agent.config.state_dir, name).lazy_mark();
        serde_json::from_slice(&fs::read(mark).ok()?).ok()
    }

    /// The last epoch of a workload with files that was let run here, or was about to be.
    pub(super) fn has_run(agent: &Agent, name: &Name) -> Option<EpochId> {
        let mark = durable::Place::of(&agent.config.state_dir, name).run_mark();
        serde_json::from_slice(&fs::read(mark).ok()?).ok()
    }

    /// The pid inside of the root of what the newest epoch is restored to.
    pub(super) fn root(&self) -> anyhow::Result<u32> {
        Ok(Note::read(&self.store.view().context("the image is gone")?.criu_dir())?.root)
    }

    /// Whether that restore goes on without the agent that ordered it.
    pub(super) fn is_served(agent: &Agent, name: &Name) -> bool {
        Mark::is_served(&durable::Place::of(&agent.config.state_dir, name).lazy_mark())
    }

    /// Tells the owner when it has ended.
    pub(super) fn await_served(&self, owner: mpsc::Sender<Msg>) {
        let mark = self.mark.clone();
        std::thread::spawn(move || {
            let message = if Mark::wait(&mark) {
                Msg::PagesServed
            } else {
                Msg::PagesFailed("the process that served them ended early".into())
            };
            let _ = owner.blocking_send(message);
        });
    }

    /// Whether there is an image of it here, of whatever epoch.
    pub(super) fn is_kept(agent: &Agent, name: &Name) -> bool {
        images_dir(agent).join(name.as_str()).exists()
    }

    /// The workload runs here and has all its pages. On a disk the image stays, so that this host needs no full copy should
    /// it become the standby again; in RAM it would take the workload's memory twice.
    pub(super) fn retire(&self, kind: StoreKind) {
        if kind == StoreKind::Memory {
            self.remove();
            return;
        }
        lock(&self.ahead).criu = None;
        self.clear_ready();
    }

    /// Removes what was made of the image.
    fn clear_ready(&self) {
        let _ = fs::remove_dir_all(&self.ready_root);
        let _ = fs::remove_file(&self.mark);
    }

    /// Removes the image; whether that was done. It cannot be while it is read.
    pub(super) fn remove(&self) -> bool {
        lock(&self.ahead).criu = None;
        let removed = self.store.clone().remove();
        if let Err(error) = &removed {
            tracing::warn!(%error, "the image could not be removed");
        }
        self.clear_ready();
        removed.is_ok()
    }
}

fn images_dir(agent: &Agent) -> PathBuf {
    agent.config.store_dir.join("images")
}

/// Addresses of a task's memory that may be filled after it runs.
pub(super) fn lazy_extents(dir: &Path, space: Space) -> anyhow::Result<Vec<Extent>> {
    let Space::Task(pid) = space else { return Ok(Vec::new()) };
    let tasks = images::pstree(&images::read(dir, "pstree.img")?)?;
    let name = images::mm_file(pid);
    let vmas = images::mappings(&name, &images::read(dir, &name)?)?;
    let mut stack_pointers = Vec::new();
    for thread in tasks.iter().filter(|task| task.pid == pid).flat_map(|task| &task.threads) {
        let name = images::core_file(*thread);
        stack_pointers.extend(images::stack_pointer(&name, &images::read(dir, &name)?)?);
    }
    Ok(images::lazy_extents(&vmas, &stack_pointers))
}

/// The pids of all processes and threads of an image.
pub(super) fn pids(dir: &Path) -> anyhow::Result<Vec<u32>> {
    let tasks = images::pstree(&images::read(dir, images::PSTREE_FILE)?)?;
    Ok(tasks.iter().flat_map(|task| task.threads.iter().copied().chain([task.pid])).collect())
}

// Restoring.

/// What took how long, milliseconds, and the pid of the tree's root.
type Restored = (BTreeMap<String, f64>, u32);

/// Has a container's runtime restore it; all of its memory is there then.
fn restore_whole(
    agent: &Agent,
    home: &mut Home,
    (dir, note): (&Path, &Note),
    began: Instant,
) -> anyhow::Result<Restored> {
    home.fill(agent)?;
    let prepared = began.elapsed().as_secs_f64() * 1e3;
    let whole = home.whole().context("the place is no container that is restored whole")?;
    let streams = note.outside.iter().filter_map(|outside| Some((outside.stream?, outside.key.clone())));
    let root = whole.restore(dir, &streams.collect::<Vec<_>>(), &agent.install.path)?;
    let spec = durable::Place::of(&agent.config.state_dir, &whole.spec().name).read()?.spec;
    home.started()?;
    // The guard closes what an engine has made only now.
    home.prepare(&spec, false)?;
    let all = began.elapsed().as_secs_f64() * 1e3;
    Ok((BTreeMap::from([("prepare".to_owned(), prepared), ("criu".to_owned(), all - prepared)]), root))
}

/// What a restore needs beside the image.
pub(super) struct RestorePlan {
    pub(super) epoch: EpochId,
    pub(super) eager: bool,
    /// Which the tree changes as soon as it runs.
    pub(super) has_files: bool,
    pub(super) owner: mpsc::Sender<Msg>,
}

impl Standby {
    /// Restores an epoch into a place that waits; blocks until the tree runs (unheard). With lazy pages the rest of the
    /// memory follows behind, from a process of its own.
    pub(super) fn restore(
        self: &Arc<Self>,
        agent: &Agent,
        home: &mut Home,
        plan: &RestorePlan,
    ) -> anyhow::Result<Restored> {
        let began = Instant::now();
        let mut phases = BTreeMap::new();
        home.check_silent()?;
        let view = self.store.freeze_for_restore()?;
        anyhow::ensure!(view.id() == plan.epoch, "the store holds epoch {}, not {}", view.id(), plan.epoch);
        let mode = if plan.eager { Mode::Eager } else { Mode::Lazy };
        lock(&self.ahead).ordered = true;
        let dir = self.ready(&view, mode)?;
        let note = Note::read(&dir)?;
        home.note_connections(&dir, &note);
        if home.whole().is_some() {
            // Its runtime lets it run at a moment that it does not tell.
            self.let_run(plan.epoch)?;
            let restored = restore_whole(agent, home, (&dir, &note), began);
            if restored.is_err() && matches!(home.root(), Ok(None)) {
                let _ = fs::remove_file(&self.run_mark);
            }
            return restored;
        }
        let criu = self.take_criu(agent, home, &dir, &note)?;
        home.fill(agent)?;
        phases.insert("prepare".to_owned(), began.elapsed().as_secs_f64() * 1e3);
        let asked = Instant::now();
        let name = dir.file_name().and_then(|name| name.to_str()).context("a directory without a name")?;
        let pager = if plan.eager { None } else { Some(self.serve_pages(agent, view, &dir, plan)?) };
        let mut resuming = false;
        let restored = criu.restore(name, note.keys(), pager.is_some(), &mut |step| {
            resuming = step == Step::Resuming;
            match &pager {
                _ if resuming => return Ok(()),
                Some((pager, _)) => pager.hold()?,
                None => {}
            }
            if plan.has_files { self.let_run(plan.epoch) } else { Ok(()) }
        });
        if restored.is_err() && !resuming {
            // CRIU has ended what it made.
            let _ = fs::remove_file(&self.run_mark);
        }
        if let (Err(_), Some((pager, serving))) = (&restored, pager) {
            pager.stop();
            // Its thread has nothing to say that the error does not.
            let _ = serving.join();
        }
        let root = restored?;
        phases.insert("criu".to_owned(), asked.elapsed().as_secs_f64() * 1e3);
        home.track(root)?;
        Ok((phases, root))
    }

    /// Says that the epoch runs from now on. On the disk it is a moment later: a host that loses its power before that has
    /// most likely lost what the tree wrote too.
    fn let_run(&self, epoch: EpochId) -> io::Result<()> {
        let new = self.run_mark.with_extension("new");
        fs::write(&new, serde_json::to_vec(&epoch)?)?;
        fs::rename(&new, &self.run_mark)?;
        let mark = self.run_mark.clone();
        std::thread::spawn(move || match durable::sync(&mark) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "it is not on the disk that the workload was let run");
            }
            _ => {}
        });
        Ok(())
    }

    /// The CRIU that waits, or else a new one.
    fn take_criu(&self, agent: &Agent, home: &Home, dir: &Path, note: &Note) -> anyhow::Result<Ahead> {
        let pids = pids(dir)?;
        let waiting = lock(&self.ahead).criu.take();
        let fitting =
            waiting.and_then(|mut criu| criu.fits(&pids, note.outside.len(), note.own_ipc).then_some(criu));
        fitting.map_or_else(|| self.start_criu(agent, home, &pids, note), Ok)
    }

    /// Has pages served until the tasks have them all.
    fn serve_pages(
        self: &Arc<Self>,
        agent: &Agent,
        view: View,
        dir: &Path,
        plan: &RestorePlan,
    ) -> anyhow::Result<(PagerHandle, std::thread::JoinHandle<()>)> {
        self.learn(&view);
        let pages = restore::page_files(&view, &lock(&self.recency))?;
        let mark = Mark::make(&self.mark, &serde_json::to_vec(&plan.epoch)?)?;
        let pager = Pager::start(&agent.install, dir, mark, &pages)?;
        let handle = pager.handle()?;
        let (standby, owner) = (Arc::clone(self), plan.owner.clone());
        let serving = std::thread::spawn(move || {
            // Should the host end meanwhile, the mark says that the epoch is to be restored from a store on a disk.
            if let Err(error) = durable::sync(&standby.mark) {
                tracing::debug!(%error, "the mark is gone already, or not on the disk");
            }
            let served = pager.wait();
            // Before anybody hears of it: a store that is being read cannot be removed.
            drop(view);
            let message = match served {
                Ok(summary) => {
                    tracing::info!(?summary, "every page is in the restored workload");
                    Msg::PagesServed
                }
                Err(failure) => {
                    tracing::error!(%failure, "pages could not be served to the restored workload");
                    // A task that touches a missing page waits, and never runs on with zeros; the owner kills the tree.
                    Msg::PagesFailed(failure.to_string())
                }
            };
            drop(standby);
            let _ = owner.blocking_send(message);
        });
        Ok((handle, serving))
    }
}
