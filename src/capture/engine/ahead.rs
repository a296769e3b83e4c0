//! What of an epoch is done while the tree runs, so that its freeze has little left to do.

use std::{collections::BTreeMap, fs};

use super::{CaptureError, Capturer, Emit, Finish, encode};
use crate::{
    capture::tracking::Tracking,
    extents,
    memory::{self, Pages, ReadError, Task, TrackError},
    model::{EpochFigures, Extent, PAGE_SIZE, Space},
};

/// From this many stale pages on, they are read and sent before the freeze.
const PRECOPY_PAGES_MIN: u64 = 32;
/// From this many on, it is looked again what was written meanwhile, and perhaps sent, before the freeze.
const PRECOPY_AGAIN_PAGES_MIN: u64 = 1024;
/// Most pre-copy rounds of one epoch; a tree that dirties faster than it is read is frozen all the same.
const PRECOPY_ROUNDS_MAX: u32 = 4;
/// Pages read at a time while the tree runs (4 MiB): what the primary holds of a pre-copy.
const PART_PAGES: u64 = 1024;
impl Capturer {
    /// Does what can be done while the tree runs; adds what must be read in the freeze to `pending`.
    pub(super) fn send_ahead(
        &mut self,
        finish: &Finish<'_>,
        pending: &mut BTreeMap<Space, Vec<Extent>>,
        figures: &mut EpochFigures,
        emit: &mut Emit<'_>,
    ) -> Result<(), CaptureError> {
        let runs_on = matches!(finish, Finish::Continue);
        self.track()?;
        if let Some(files) = &mut self.files {
            let kept_bytes = files.send_ahead(emit)?;
            if let Some(resync) = &mut figures.resync {
                resync.full_bytes += kept_bytes;
            }
        }
        self.precopy(figures, pending, emit)?;
        self.precopy_shared(figures, emit)?;
        // Last, because one may just be on its way.
        self.crius.look_at_ipc()?;
        self.crius.wait_for_freeze(runs_on)?;
        if let Some(files) = &mut self.files {
            files.write_back(runs_on);
        }
        Ok(())
    }

    /// Scans while the tree runs; if much is stale, sends it now. What must be read in the freeze is `pending`.
    fn precopy(
        &mut self,
        figures: &mut EpochFigures,
        pending: &mut BTreeMap<Space, Vec<Extent>>,
        emit: &mut Emit<'_>,
    ) -> Result<(), CaptureError> {
        let mut pages = Pages::default();
        let mut stale_before = u64::MAX;
        for _ in 0..PRECOPY_ROUNDS_MAX {
            self.scan(figures, pending)?;
            let stale: u64 = pending.values().map(|extents| extents::pages(extents)).sum();
            // Not worth a round, or rounds do not help any more.
            if stale < PRECOPY_PAGES_MIN || stale > stale_before / 2 {
                break;
            }
            stale_before = stale;
            for tracked in self.tasks.values_mut() {
                let Some(wanted) = pending.get_mut(&tracked.space) else { continue };
                let (space, known, encoder) = (tracked.space, &mut self.known, &mut self.encoder);
                let mut read: Vec<Extent> = Vec::new();
                let at = known.stamp();
                let sent = tracked.tracker.memory().read_in_parts(wanted, PART_PAGES, &mut pages, |part| {
                    read.extend_from_slice(part.extents());
                    encode(encoder, known, space, part.extents(), part.data(), at, emit)
                });
                extents::normalize(&mut read);
                *wanted = extents::subtract(wanted, &read);
                if memory::reads_directly(tracked.tracker.pid()) {
                    tracked.ahead.append(&mut read);
                }
                match sent {
                    // It ended meanwhile, as processes do; what was sent of it the manifest will not list.
                    Ok(()) | Err(CaptureError::Read(ReadError::Gone(_))) => {}
                    Err(error) => return Err(error),
                }
            }
            if stale < PRECOPY_AGAIN_PAGES_MIN {
                break;
            }
        }
        pages.shrink();
        Ok(())
    }

    /// Sends shared memory while the tree runs, if there is much of it to be sent.
    fn precopy_shared(&mut self, figures: &EpochFigures, emit: &mut Emit<'_>) -> Result<(), CaptureError> {
        // Without a bridge CRIU sends it.
        let is_ours = self.source.tracking == Tracking::WriteProtect;
        if !is_ours || !(figures.full || self.unsure || self.shared.is_unsettled()) {
            return Ok(());
        }
        let tasks = memory::tasks_of(self.source.root)?;
        // Of a task that has ended nothing is mapped.
        let maps = |task: &Task| Some((task.pid, fs::read(format!("/proc/{}/maps", task.pid)).ok()?));
        let maps: Vec<(i32, Vec<u8>)> = tasks.iter().filter_map(maps).collect();
        for mapped in self.shared.find(maps.iter().map(|(pid, maps)| (*pid, maps.as_slice()))) {
            let space = Space::Shared(mapped.inode);
            let looked = self.shared.look(&mapped)?;
            self.known.mark_stale(space, &looked.changed);
            let missing = self.known.missing(space, &looked.there);
            let at = self.known.stamp();
            for run in &missing {
                for start in (run.start..run.end()).step_by((PART_PAGES * PAGE_SIZE) as usize) {
                    let pages = ((run.end() - start) / PAGE_SIZE).min(PART_PAGES);
                    let part = [Extent { start, pages }];
                    let content = self.shared.content(mapped.inode, &part);
                    encode(&mut self.encoder, &mut self.known, space, &part, &content, at, emit)?;
                }
            }
        }
        Ok(())
    }

    /// One pass over every task; adds what it finds, and what the standby does not have, to `pending`.
    fn scan(
        &mut self,
        figures: &mut EpochFigures,
        pending: &mut BTreeMap<Space, Vec<Extent>>,
    ) -> Result<(), CaptureError> {
        let (mut dirty, mut populated) = (Vec::new(), Vec::new());
        for pid in self.tasks.keys().copied().collect::<Vec<_>>() {
            let Some(tracked) = self.tasks.get_mut(&pid) else { continue };
            let space = tracked.space;
            let mut scanned = tracked.tracker.take_dirty(&mut dirty).map(drop);
            if scanned.is_ok() {
                self.known.mark_stale(space, &dirty);
                figures.dirty_bytes += extents::pages(&dirty) * PAGE_SIZE;
                let wanted = pending.entry(space).or_default();
                wanted.extend_from_slice(&dirty);
                if figures.full || self.unsure {
                    scanned = tracked.tracker.populated(&mut populated);
                    wanted.extend_from_slice(&self.known.missing(space, &populated));
                }
                extents::normalize(wanted);
            }
            if let Err(error) = scanned {
                // Without a tracker it is read whole: the next look at the tree finds out what became of it. Kept, the
                // tracker of a pass that failed would hide pages that it protected and did not report.
                self.tasks.remove(&pid);
                if !matches!(error, TrackError::Gone(_) | TrackError::Replaced(_)) {
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }
}
