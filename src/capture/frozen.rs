//! What is read while the tree is frozen.
//!
//! CRIU's page-server records arrive on one thread ([`super::collector`]); the lists for CRIU, the scan and the reads run
//! on another, begun when the tree stands so that they overlap with what CRIU does anyway, and finished when CRIU closes.
//! What CRIU wrote to a task's memory itself is looked for as soon as it has left the task.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::BorrowedFd,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use super::{
    collector::{AWAKE_MAX, Ends, Order, Sent, receive_soon},
    engine::CaptureError,
    files::{Change, Files},
    ipc,
    lists::{self, Listed, Lists},
    shared::SharedMemory,
    sockets::Likely,
    tracking::{Dumped, Tracking},
};
use crate::{
    criu::{
        Elsewhere,
        gate::{Gate, Heard},
        keep_off,
    },
    delta::{Known, ReadStamp},
    extents,
    memory::{self, Guards, Memory, Pages, Task, TrackError, Tracker},
    model::{Extent, PAGE_SIZE, Space},
    wire::message::Manifest,
};

/// A tracked task.
#[derive(Debug)]
pub(super) struct Tracked {
    pub(super) tracker: Tracker,
    pub(super) space: Space,
    /// Distinguishes a reused pid.
    pub(super) start_ticks: u64,
    /// Pages that were read while a device may have been about to write them; read again in the next freeze.
    pub(super) ahead: Vec<Extent>,
    /// The guard regions of the last freeze.
    pub(super) guards: Guards,
}

/// Pages read in this epoch's freeze, in the order in which they were read: a later piece overrides an earlier one.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) space: Space,
    pub(super) extents: Vec<Extent>,
    pub(super) data: Vec<u8>,
    /// When it was read, in the order of passes.
    pub(super) at: ReadStamp,
}

/// All of a freeze.
#[derive(Debug, Default)]
pub(super) struct Frozen {
    pub(super) pieces: Vec<Piece>,
    pub(super) manifest: Manifest,
    /// What changed in the replicated directories since they were sent ahead.
    pub(super) files: Vec<Change>,
    /// Pages found written in the freeze.
    pub(super) dirty_pages: u64,
    /// What took how long.
    pub(super) parts: FreezeParts,
}

/// What of the frozen time is ours. Scan and read run beside CRIU's work; it waits for the lists and at the close.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FreezeParts {
    /// CRIU's figure: from the first task stopped to the last task stopped.
    pub stopping_us: u64,
    /// Making the lists for CRIU, which goes on meanwhile, until it needs them.
    pub lists_us: u64,
    /// Finding the written pages, in both passes.
    pub scan_us: u64,
    /// Reading those, and what was found stale before the freeze, in both passes.
    pub read_us: u64,
    /// From CRIU's close of the page server to our answer, for which it waits: what is left of both passes, and the
    /// replicated directories.
    pub close_us: u64,
}

/// The reader's side.
pub(super) struct Reader<'a, F> {
    pub(super) ends: Ends,
    pub(super) root: i32,
    /// Pages that were found stale before the freeze and not read since.
    pub(super) pending: BTreeMap<Space, Vec<Extent>>,
    /// None with soft-dirty bits: there is no bridge that would find them.
    pub(super) lists: Option<Lists<'a>>,
    /// A process whose IPC namespace is not part of the image.
    pub(super) without_ipc: Option<BorrowedFd<'a>>,
    /// Called when the first pass is over, and this thread waits for CRIU.
    pub(super) meanwhile: F,
}

/// What the reader works with, lent by the capturer for the freeze.
pub(super) struct Lent<'a> {
    pub(super) tracking: Tracking,
    /// None with soft-dirty bits.
    pub(super) tasks: &'a mut BTreeMap<i32, Tracked>,
    pub(super) dumped: &'a mut Dumped,
    pub(super) known: &'a mut Known,
    pub(super) shared: &'a mut SharedMemory,
    pub(super) files: &'a mut Option<Files>,
    pub(super) likely: &'a mut Likely,
}

/// How a pass takes what was written.
type Take<'a> = dyn FnMut(&mut Tracker, &mut Vec<Extent>) -> Result<(), TrackError> + 'a;

/// What the reader works on.
struct Freeze<'a, 'b> {
    root: i32,
    lent: &'a mut Lent<'b>,
    pending: BTreeMap<Space, Vec<Extent>>,
    listed: Listed,
    /// Until the first pass is over.
    lists: Option<Lists<'a>>,
    /// Tasks that CRIU has left, and that were looked at since.
    left: BTreeSet<Space>,
    /// The pages of shared memory that we read.
    shared: BTreeMap<Space, Vec<Extent>>,
}

impl<F: FnOnce() + Send> Reader<'_, F> {
    /// Serves one freeze; returns what was read, or why the epoch must fail. `None`: CRIU never got so far, or gave up by
    /// itself, and the tree runs: what goes wrong here then is of no frozen tree, and CRIU knows the reason.
    pub(super) fn serve(mut self, lent: &mut Lent<'_>) -> Option<Result<Frozen, CaptureError>> {
        let (gate, own_orders) =
            (self.lists.as_ref().map(|lists| Arc::clone(&lists.gate)), self.ends.own_orders.take());
        let (stands, elsewhere) = gate.as_ref().map_or((false, None), |gate| self.stand(gate));
        // A bridge that has said its last has no more orders: were this kept, no end of the others would be heard.
        let own_orders = own_orders.filter(|_| stands);
        if !stands && !matches!(self.ends.orders.recv(), Ok(Order::Begin)) {
            return None;
        }
        std::thread::scope(|scope| {
            if let (Some(gate), Some(orders)) = (&gate, own_orders) {
                // It says which tasks CRIU has left.
                scope.spawn(move || {
                    while let Some(heard) = gate.hear(Duration::ZERO) {
                        if let Heard::Left(pid) = heard {
                            // The reader ends last.
                            let _ = orders.send(Order::Left(pid));
                        }
                    }
                });
            }
            // Threads that help to read may run anywhere.
            drop(elsewhere);
            let served = self.serve_frozen(lent);
            if let Some(gate) = &gate {
                gate.close();
            }
            served
        })
    }

    /// Waits for the bridge to say that all tasks stand, elsewhere than on CRIU's processor; false if it says no more.
    fn stand(&self, gate: &Gate) -> (bool, Option<Elsewhere>) {
        let (mut awake, mut elsewhere) = (Duration::ZERO, None);
        loop {
            match gate.hear(awake) {
                // A wake-up takes longer than what lies between; and where the processors are busy this thread would
                // come to run on CRIU's, in its place.
                Some(Heard::Stopping(processor)) => {
                    elsewhere = Some(keep_off(processor));
                    awake = AWAKE_MAX;
                }
                Some(Heard::Stand) => {
                    self.ends.begun.store(true, Ordering::Release);
                    return (true, elsewhere);
                }
                Some(Heard::Left(_)) => {}
                None => return (false, elsewhere),
            }
        }
    }

    fn serve_frozen(self, lent: &mut Lent<'_>) -> Option<Result<Frozen, CaptureError>> {
        let mut frozen = Frozen::default();
        let (tasks, listed) = match list(self.root, self.lists.as_ref(), lent, &mut frozen.parts) {
            Ok(listed) => listed,
            Err(error) => {
                // CRIU waits for none any more.
                drop(self.lists);
                return refuse(&self.ends, error);
            }
        };
        let from_host = self.lists.as_ref().is_some_and(|lists| lists.from_host);
        let (lists, left, shared) = (self.lists, BTreeSet::new(), BTreeMap::new());
        let mut freeze = Freeze { root: self.root, lent, pending: self.pending, listed, lists, left, shared };
        let take = &mut |tracker: &mut Tracker, dirty: &mut Vec<Extent>| tracker.take_dirty(dirty).map(drop);
        let first = freeze.pass(&mut frozen, None, take);
        freeze.lists = None;
        let mut result = first.map(|pages| frozen.dirty_pages = pages);
        if result.is_ok() {
            result = freeze.read_shared(&mut frozen);
        }
        if let Some(process) = self.without_ipc.filter(|_| result.is_ok()) {
            result = match ipc::has_objects(process) {
                Ok(false) => Ok(()),
                Ok(true) => Err(CaptureError::Ipc),
                Err(error) => Err(error.into()),
            };
        }
        // For a file that is open and has lost this name CRIU makes another one, which the restore needs: when it dumps
        // the task's files, which is before its memory. Only with a single task is that all done now, and the scan can
        // run beside CRIU's work.
        let early = tasks.len() == 1;
        if result.is_ok() && !early {
            result = freeze.lent.files.as_mut().map_or(Ok(()), Files::freeze).map_err(CaptureError::from);
        }
        (self.meanwhile)();
        let (manifest, sent, closed) = loop {
            // CRIU closes soon after it has left the last task.
            let last = freeze.left.len() == freeze.lent.tasks.len();
            match if last { receive_soon(&self.ends.orders) } else { self.ends.orders.recv() } {
                Ok(Order::Opened) if result.is_ok() && early => {
                    result = frozen.scan_files(freeze.lent.files.as_mut());
                }
                Ok(Order::Left(pid)) if result.is_ok() => {
                    let known = freeze.lent.tasks.get(&pid.cast_signed()).filter(|_| from_host);
                    let space = known.map_or(Space::Task(pid), |tracked| tracked.space);
                    result = freeze.look_again(&mut frozen, Some(space));
                }
                Ok(Order::Finish { manifest, sent, closed }) => break (manifest, sent, closed),
                Ok(_) => {}
                Err(_) => return result.err().and_then(unless_criu_knows),
            }
        };
        result = result.and_then(|()| freeze.finish(&mut frozen, manifest, sent));
        if result.is_ok() && !early {
            result = frozen.scan_files(freeze.lent.files.as_mut());
        }
        frozen.parts.close_us = us_since(closed);
        // CRIU that is gone by now rolls back by itself.
        let _ = self.ends.verdict.send(result.is_ok());
        Some(result.map(|()| frozen))
    }
}

/// Lets CRIU go on as far as its close, and has the epoch fail there.
fn refuse(ends: &Ends, error: CaptureError) -> Option<Result<Frozen, CaptureError>> {
    loop {
        match ends.orders.recv() {
            Ok(Order::Finish { .. }) => break,
            Ok(_) => {}
            Err(_) => return unless_criu_knows(error),
        }
    }
    // CRIU that is gone by now rolls back by itself.
    let _ = ends.verdict.send(false);
    Some(Err(error))
}

/// What is the reason when CRIU has given up: that it was told something wrong, or else its own.
fn unless_criu_knows(error: CaptureError) -> Option<Result<Frozen, CaptureError>> {
    matches!(error, CaptureError::Guards(_) | CaptureError::Sockets).then_some(Err(error))
}

/// Makes the lists for CRIU; gives the tree, and the mappings whose pages we list.
fn list(
    root: i32,
    lists: Option<&Lists<'_>>,
    lent: &mut Lent<'_>,
    parts: &mut FreezeParts,
) -> Result<(Vec<Task>, Listed), CaptureError> {
    let began = Instant::now();
    if let Some(lists) = lists {
        lists.begin();
    }
    let tasks = memory::tasks_of(root)?;
    let Some(lists) = lists else { return Ok((tasks, Listed::default())) };
    let listed = lists.write(&tasks, lent.tasks, lent.shared)?;
    parts.lists_us = us_since(began);
    if !lent.likely.learn(lists.ahead.protocols, listed.sockets) {
        return Err(CaptureError::Sockets);
    }
    Ok((tasks, listed))
}

impl Frozen {
    fn scan_files(&mut self, files: Option<&mut Files>) -> Result<(), CaptureError> {
        if let Some(files) = files {
            self.files = files.frozen()?;
        }
        Ok(())
    }
}

impl Freeze<'_, '_> {
    /// Takes what was written of one tracked task, or of all but those looked at since CRIU left them, and reads it; gives
    /// the number of pages that were. What cannot be read stays stale, which matters only if CRIU lists it.
    ///
    /// A task that ended, or executed another program, between the last look at the tree and the freeze loses its
    /// tracker: if CRIU lists it, or another under its pid, that one is read whole. (Of another program's memory a tracker
    /// would report all, none of it being registered; this does not rest on that.) So does a task whose pass failed,
    /// because pages may be protected by then that nobody will report again.
    fn pass(
        &mut self,
        frozen: &mut Frozen,
        only: Option<Space>,
        take: &mut Take<'_>,
    ) -> Result<u64, CaptureError> {
        let (mut dirty, mut found) = (Vec::new(), 0);
        for pid in self.lent.tasks.keys().copied().collect::<Vec<_>>() {
            let Some(tracked) = self.lent.tasks.get_mut(&pid) else { continue };
            let space = tracked.space;
            if only.map_or(self.left.contains(&space), |only| only != space) {
                continue;
            }
            let began = Instant::now();
            if let Err(error) = take(&mut tracked.tracker, &mut dirty) {
                self.lent.tasks.remove(&pid);
                match error {
                    error if self.listed.told_ahead.contains(&space) => {
                        tracing::warn!(%error, pid, "the pass that was to confirm what was told ahead failed");
                        return Err(CaptureError::Guards(pid));
                    }
                    TrackError::Gone(_) | TrackError::Replaced(_) => continue,
                    error => return Err(error.into()),
                }
            }
            dirty.append(&mut tracked.ahead);
            extents::normalize(&mut dirty);
            self.lent.known.mark_stale(tracked.space, &dirty);
            if let Some(lists) = &self.lists {
                let guards = tracked.tracker.guards().cloned().unwrap_or_default();
                let told = self.listed.told_ahead.remove(&space);
                // Where it was looked may differ: the mappings are those that were told of, and CRIU's own among them.
                if told && tracked.guards.found != guards.found {
                    tracing::warn!(told = ?tracked.guards, now = ?guards, pid, "guard regions are others now");
                    return Err(CaptureError::Guards(pid));
                }
                if !told && let Err(error) = lists.write_guards(pid, space, &guards) {
                    tracing::debug!(%error, pid, "CRIU looks for the guard regions of this process itself");
                }
                tracked.guards = guards;
            }
            found += extents::pages(&dirty);
            let mut wanted = self.pending.remove(&tracked.space).unwrap_or_default();
            wanted.extend_from_slice(&dirty);
            extents::normalize(&mut wanted);
            let at = self.lent.known.stamp();
            frozen.parts.scan_us += us_since(began);
            let began = Instant::now();
            read(tracked.tracker.memory(), tracked.space, &wanted, at, &mut frozen.pieces)?;
            frozen.parts.read_us += us_since(began);
        }
        Ok(found)
    }

    /// The second pass over a task's memory, or over that of all that are left: pages that CRIU's parasite touched.
    fn look_again(&mut self, frozen: &mut Frozen, only: Option<Space>) -> Result<(), CaptureError> {
        self.pass(frozen, only, &mut Tracker::take_touched)?;
        self.left.extend(only);
        Ok(())
    }

    /// Reads what the standby lacks of shared memory.
    fn read_shared(&mut self, frozen: &mut Frozen) -> Result<(), CaptureError> {
        let mut changed = 0;
        for mapped in &self.listed.shared {
            let began = Instant::now();
            let (space, Lent { shared, known, .. }) = (Space::Shared(mapped.inode), &mut *self.lent);
            let looked = shared.look(mapped)?;
            changed += extents::pages(&looked.changed);
            frozen.parts.scan_us += us_since(began);
            let began = Instant::now();
            known.mark_stale(space, &looked.changed);
            let extents = known.missing(space, &looked.there);
            let (at, data) = (known.stamp(), shared.content(mapped.inode, &extents));
            frozen.pieces.push(Piece { space, extents, data, at });
            self.shared.insert(space, looked.there);
            frozen.parts.read_us += us_since(began);
        }
        self.lent.shared.settle(changed);
        frozen.dirty_pages += changed;
        Ok(())
    }

    /// What is left of the second pass, tasks that were born after the last look, and whatever the
    /// list names that neither the standby nor this freeze has.
    fn finish(
        &mut self,
        frozen: &mut Frozen,
        mut manifest: Manifest,
        sent: Vec<Sent>,
    ) -> Result<(), CaptureError> {
        self.look_again(frozen, None)?;
        for map in &mut manifest.spaces {
            if let Some(ours) = self.listed.ours.get(&map.space) {
                let pages_of = |mapping| self.pages_of(map.space, mapping);
                map.extents = lists::with_ours(&map.extents, ours, pages_of)?;
            }
            if let Some(there) = self.shared.get(&map.space) {
                // CRIU sends what it was not told of in time: as good.
                map.extents.extend_from_slice(there);
                extents::normalize(&mut map.extents);
            }
        }
        let same = self.same_tasks()?;
        // No pass follows: what CRIU sent, and what is read from here on, is of the freeze itself.
        let at = self.lent.known.stamp();
        if self.lent.tracking == Tracking::SoftDirty {
            let private = sent.iter().filter(|sent| matches!(sent.space, Space::Task(_)));
            frozen.dirty_pages = private.map(|sent| extents::pages(&sent.extents)).sum();
        }
        let sent = sent.into_iter();
        frozen.pieces.extend(sent.map(|Sent { space, extents, data }| Piece { space, extents, data, at }));
        for map in &manifest.spaces {
            let mut have: Vec<Extent> = Vec::new();
            for piece in frozen.pieces.iter().filter(|piece| piece.space == map.space) {
                have.extend_from_slice(&piece.extents);
            }
            extents::normalize(&mut have);
            // Shared memory is among them if we have looked at it; all other must have come from CRIU.
            let is_same = same.contains(&map.space) || self.shared.contains_key(&map.space);
            let needed =
                if is_same { self.lent.known.missing(map.space, &map.extents) } else { map.extents.clone() };
            let missing = extents::subtract(&needed, &have);
            let Some(&first) = missing.first() else { continue };
            let Space::Task(inside) = map.space else {
                return Err(unreadable(map.space, first, &missing));
            };
            let memory = Memory::of(self.host_pid(inside)?);
            read(memory, map.space, &missing, at, &mut frozen.pieces)?;
            let got = frozen.pieces.last().map_or(&[][..], |piece| &piece.extents);
            let lost = extents::subtract(&missing, got);
            if let Some(&first) = lost.first() {
                return Err(unreadable(map.space, first, &lost));
            }
        }
        frozen.manifest = manifest;
        Ok(())
    }

    /// The pages of a mapping of ours.
    fn pages_of(&self, space: Space, mapping: Extent) -> Result<Vec<Extent>, CaptureError> {
        let tracked = self.lent.tasks.values().find(|tracked| tracked.space == space);
        if let Some(pages) = tracked.and_then(|tracked| tracked.tracker.listed(mapping)) {
            return Ok(pages);
        }
        let Space::Task(inside) = space else { return Ok(Vec::new()) };
        Ok(memory::pages_of(self.host_pid(inside)?, mapping)?)
    }

    /// The spaces of tasks of which something is known; what is known under another task's pid is not of that one.
    fn same_tasks(&mut self) -> Result<Vec<Space>, CaptureError> {
        Ok(match self.lent.tracking {
            Tracking::WriteProtect => self.lent.tasks.values().map(|tracked| tracked.space).collect(),
            Tracking::SoftDirty => self.lent.dumped.renew(&memory::tasks_of(self.root)?),
        })
    }

    fn host_pid(&self, inside: u32) -> Result<i32, CaptureError> {
        let tracked = self.lent.tasks.iter().find(|(_, tracked)| tracked.space == Space::Task(inside));
        if let Some((&pid, _)) = tracked {
            return Ok(pid);
        }
        let tasks = memory::tasks_of(self.root)?;
        let task = tasks.iter().find(|task| task.inner_pid == inside);
        task.map(|task| task.pid).ok_or(CaptureError::Stranger(inside))
    }
}

fn us_since(began: Instant) -> u64 {
    began.elapsed().as_micros() as u64
}

pub(super) fn unreadable(space: Space, first: Extent, missing: &[Extent]) -> CaptureError {
    CaptureError::Unreadable { space, start: first.start, pages: extents::pages(missing) }
}

/// Reads a list, all of it that can be read, as one more piece.
fn read(
    memory: Memory,
    space: Space,
    wanted: &[Extent],
    at: ReadStamp,
    pieces: &mut Vec<Piece>,
) -> Result<(), CaptureError> {
    if wanted.is_empty() {
        return Ok(());
    }
    let mut pages = Pages::default();
    memory.read(wanted, &mut pages)?;
    let (extents, data) = pages.into_parts();
    pieces.push(Piece { space, extents, data, at });
    Ok(())
}

impl Piece {
    /// The piece without the pages that are not in `listed`; most pieces lose none.
    pub(super) fn only(self, listed: &[Extent]) -> Self {
        let kept = extents::intersect(&self.extents, listed);
        if kept == self.extents {
            return self;
        }
        let mut data = Vec::with_capacity((extents::pages(&kept) * PAGE_SIZE) as usize);
        let mut offset = 0;
        let mut wanted = kept.iter().peekable();
        for extent in &self.extents {
            // `kept` is a subset: its runs lie one after the other within the piece's own.
            while let Some(run) = wanted.next_if(|run| run.start < extent.end()) {
                let from = offset + (run.start - extent.start) as usize;
                data.extend_from_slice(&self.data[from..from + run.bytes() as usize]);
            }
            offset += extent.bytes() as usize;
        }
        Self { extents: kept, data, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        capture::collector::{Collector, channels},
        criu::page_server::Handler as _,
        delta::Encoder,
        wire::message::SpaceMap,
    };

    /// A hole says that a page is as it was, which of shared memory nobody can tell.
    #[test]
    fn a_hole_in_shared_memory_fails_the_epoch_though_the_page_is_known() {
        let (space, page) = (Space::Shared(5), Extent { start: 0, pages: 1 });
        let (_, mut collector, _) = channels(None);
        assert!(!collector.opened(space).unwrap() && collector.opened(Space::Task(1)).unwrap());

        let mut known = Known::default();
        known.begin_epoch(false);
        let at = known.stamp();
        let data = [7; PAGE_SIZE as usize];
        Encoder::default().encode(&mut known, space, &[page], &data, at, |_, _| ());
        known.epoch_committed();
        known.begin_epoch(true);
        assert_eq!(known.missing(space, &[page]), []);
        let manifest = Manifest { spaces: vec![SpaceMap { space, extents: vec![page] }] };
        let mut lent = Lent {
            tracking: Tracking::WriteProtect,
            tasks: &mut BTreeMap::new(),
            dumped: &mut Dumped::default(),
            known: &mut known,
            shared: &mut SharedMemory::default(),
            files: &mut None,
            likely: &mut Likely::default(),
        };
        let (pending, left, shared) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        let listed = Listed::default();
        let mut freeze = Freeze { root: 1, lent: &mut lent, pending, listed, lists: None, left, shared };
        let mut frozen = Frozen::default();
        let lost = freeze.finish(&mut frozen, manifest.clone(), Vec::new());
        assert!(matches!(lost, Err(CaptureError::Unreadable { pages: 1, .. })), "{lost:?}");
        let sent = Sent { space, extents: vec![page], data: data.to_vec() };
        freeze.finish(&mut frozen, manifest, vec![sent]).unwrap();
        assert_eq!(frozen.pieces.len(), 1);
    }

    /// CRIU asks the page server to close and waits for it also when the tree has just ended, and nothing stands.
    #[test]
    fn a_criu_that_gives_up_early_is_not_kept_waiting() {
        let (_starter, mut collector, _ends) = channels(None);
        assert!(collector.close().is_err());
    }

    /// The tree runs again then, and its tasks end.
    #[test]
    fn what_goes_wrong_once_criu_has_given_up_is_not_the_reason() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let root = child.id().cast_signed();
        let serve = |criu: fn(Collector)| {
            let (starter, collector, ends) = channels(None);
            let (pending, lists, without_ipc) = (BTreeMap::new(), None, None);
            let reader = Reader { ends, root, pending, lists, without_ipc, meanwhile: || () };
            starter.begin();
            let criu = std::thread::spawn(move || criu(collector));
            let served = reader.serve(&mut Lent {
                tracking: Tracking::WriteProtect,
                tasks: &mut BTreeMap::new(),
                dumped: &mut Dumped::default(),
                known: &mut Known::default(),
                shared: &mut SharedMemory::default(),
                files: &mut None,
                likely: &mut Likely::default(),
            });
            criu.join().unwrap();
            served
        };
        let gave_up = serve(drop);
        assert!(gave_up.is_none(), "{gave_up:?}");
        let asked = serve(|mut criu| {
            criu.opened(Space::Task(1)).unwrap();
            assert!(criu.close().is_err());
        });
        assert!(matches!(asked, Some(Err(CaptureError::Tree(_)))), "{asked:?}");
    }

    #[test]
    fn a_piece_keeps_just_the_listed_pages() {
        let page = |n: u8| vec![n; PAGE_SIZE as usize];
        let run = |start: u64, pages: u64| Extent { start: start * PAGE_SIZE, pages };
        let piece = Piece {
            space: Space::Task(7),
            extents: vec![run(1, 2), run(5, 3)],
            data: [1, 2, 5, 6, 7].into_iter().flat_map(page).collect(),
            at: Known::default().stamp(),
        };
        let piece = piece.only(&[run(0, 2), run(6, 1), run(7, 9)]);
        assert_eq!(piece.extents, vec![run(1, 1), run(6, 2)]);
        assert_eq!(piece.data, [1, 6, 7].into_iter().flat_map(page).collect::<Vec<u8>>());
    }
}
