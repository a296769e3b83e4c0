//! The tracker of one address space.
//!
//! Invariant: every populated page of private memory is in one of three states, so none is ever missed:
//! write-protected and unwritten since it was last reported; or it will be reported by the next pass; or it
//! is in a mapping that could not be registered, which every pass reports whole.
//!
//! What is registered anew counts as written, all of it ([`Tracker::register_pending`]).
//!
//! The kernel's registration is the truth, not our list of it: each pass asks the page map which populated
//! pages are *not* registered (a mapping can be replaced by one with the same line in `/proc/PID/maps`).
//!
//! A pass looks for all that is not both present and protected, and then protects what of it is written: the first tells
//! in one walk what is new, written or gone, and so keeps the [listing](super::listing) of pages up.

mod register;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use super::{
    inject::{self, AttachError, Injected},
    listing::{Found, Guards, Listing},
    maps::{Mapping, MappingKind, MapsError},
    pagemap::{self, OWN, POPULATED, Walker},
    read::Memory,
    sys::{self, PageRegion, Query, category},
};
use crate::{
    extents,
    model::{Extent, PAGE_SIZE},
};

/// Written pages with fewer pages between them are protected by one call: a call costs as much as a walk over so many.
const GAP_PAGES_MAX: u64 = 1024;

/// From so many reported pages of private file mappings on it is asked which are the file's.
const FILE_PAGES_MIN: u64 = 64;
/// Most of mapped memory that one call walks over (16 MiB): some 10 µs.
const RUN_PAGES_MAX: u64 = 4 << 10;

/// Why tracking failed. After any of these nothing is known of what was written: every page is stale.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The process has exited.
    #[error("process {0} has exited")]
    Gone(i32),
    /// The process has executed another program.
    #[error("process {0} has executed a new program; attach again, all of its memory is new")]
    Replaced(i32),
    /// Its maps are not understood.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// A kernel call failed.
    #[error("{what} of process {pid} failed: {source}; attach again and take all of its memory")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The process.
        pid: i32,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What a pass did beside its result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Mappings that were registered because they are new.
    pub registered: usize,
    /// Mappings that cannot be registered (another userfaultfd is on them), reported whole by every pass.
    pub untracked: usize,
}

/// A mapping and whether the kernel tracks it for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tracked {
    mapping: Mapping,
    registered: bool,
    /// Its pages are in the listing.
    listed: bool,
}

/// Tracks which private pages of one address space are written.
///
/// While it lives, a first write to a page since the last pass costs the process about a microsecond.
/// Dropping it ends that.
#[derive(Debug)]
pub struct Tracker {
    pid: i32,
    pidfd: OwnedFd,
    uffd: OwnedFd,
    /// Under which the process had it for a moment.
    uffd_number: i32,
    /// Bound to the address space of the attach; reads nothing once that is gone.
    attached_pagemap: File,
    stopped: Duration,
    /// Where its first mapping can begin.
    lowest: u64,
    maps_text: Vec<u8>,
    tracked: Vec<Tracked>,
    listing: Listing,
    guards: Guards,
    walker: Walker,
}

impl Tracker {
    /// Begins to track a process (a host pid): stops one of its threads for some 100 µs. Nothing is protected
    /// yet: the first [`take_dirty`](Self::take_dirty) registers the memory and reports all of it.
    pub fn attach(pid: i32) -> Result<Self, AttachError> {
        let pidfd = sys::pidfd_open(pid, false).map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => AttachError::Gone(pid),
            _ => AttachError::io(pid, "opening a pidfd", e),
        })?;
        let begun = begin(pid, pidfd.as_fd());
        let (injected, attached_pagemap, walker) =
            begun.map_err(|e| inject::or_gone(e, pid, pidfd.as_fd()))?;
        Ok(Self {
            pid,
            pidfd,
            uffd: injected.uffd,
            uffd_number: injected.number,
            attached_pagemap,
            stopped: injected.stopped,
            lowest: register::lowest(),
            maps_text: Vec::new(),
            tracked: Vec::new(),
            listing: Listing::default(),
            guards: Guards::default(),
            walker,
        })
    }

    /// The process' pid on the host.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The descriptor, and the number that it had in the process.
    pub(super) fn userfaultfd(&self) -> (BorrowedFd<'_>, i32) {
        (self.uffd.as_fd(), self.uffd_number)
    }

    /// How long the attach stopped one thread.
    pub fn stopped(&self) -> Duration {
        self.stopped
    }

    /// A reader of the process' memory.
    pub fn memory(&self) -> Memory {
        Memory::of(self.pid)
    }

    /// The mappings as of the last pass; shared ones among them are the caller's to dump whole.
    pub fn mappings(&self) -> impl Iterator<Item = Mapping> + '_ {
        self.tracked.iter().map(|tracked| tracked.mapping)
    }

    /// Registers mappings that are new since the last time. [`take_dirty`](Self::take_dirty) does it too; to
    /// do it ahead of a freeze makes that one shorter.
    pub fn register(&mut self) -> Result<Pass, TrackError> {
        let pagemap = self.pagemap()?;
        self.register_all(&pagemap)
    }

    /// One pass: gives, in `out` (cleared first), the private pages that are populated and may have been
    /// written since the last pass, and write-protects them. Sorted, merged.
    ///
    /// Also in it: pages of mappings that are new, moved or cannot be tracked, the vDSO, and the pages of
    /// private file mappings that read as swapped (a copied-on-write page that MADV_DONTNEED dropped leaves
    /// a write-protection marker that looks unwritten, while the content is the file's again).
    ///
    /// On an error some pages may be protected and not reported: treat every page as stale.
    pub fn take_dirty(&mut self, out: &mut Vec<Extent>) -> Result<Pass, TrackError> {
        out.clear();
        self.guards = Guards::default();
        let pagemap = self.pagemap()?;
        let pass = self.register_all(&pagemap)?;
        self.list_new(&pagemap)?;
        for range in runs(&self.tracked, is_tracked) {
            let mut found = self.changed(&pagemap, range)?;
            self.listing.update(&found);
            extents::push(&mut self.guards.looked, range.start, range.end());
            self.guards.found.append(&mut found.guards);
            self.protect(&pagemap, &found.written, out)?;
        }
        self.push_untracked(&pagemap, out)?;
        let swapped = Query { all: category::SWAPPED, ..Query::default() };
        let mut markers = Vec::new();
        for range in runs(&self.tracked, |t| t.mapping.kind == MappingKind::PrivateFile) {
            self.scan(&pagemap, range, self.walker.readable(swapped), &mut markers)?;
        }
        self.remove(&markers);
        out.append(&mut markers);
        self.push_vdso(out);
        extents::normalize(out);
        self.leave_out_file_pages(&pagemap, out)?;
        Ok(pass)
    }

    /// What was written since [`take_dirty`](Self::take_dirty) of a process that stands still since before it: by whoever
    /// dumps it. Nothing can be new or gone then, so this is cheaper: it asks for written pages alone, which the kernel
    /// answers in half the time.
    pub fn take_touched(&mut self, out: &mut Vec<Extent>) -> Result<(), TrackError> {
        out.clear();
        let pagemap = self.pagemap()?;
        let written = Query { all: category::WRITTEN, ..Query::default() };
        for range in runs(&self.tracked, is_tracked) {
            let mut found = Vec::new();
            self.scan(&pagemap, range, written, &mut found)?;
            self.protect(&pagemap, &found, out)?;
        }
        self.push_untracked(&pagemap, out)?;
        extents::normalize(out);
        Ok(())
    }

    /// The pages that a private anonymous mapping has, of a process that stands still since before the last pass; none if
    /// that did not list it. Pages that are the kernel's page of zeroes are left out.
    pub fn listed(&self, mapping: Extent) -> Option<Vec<Extent>> {
        let at = self.tracked.binary_search_by_key(&mapping.start, |t| t.mapping.extent.start).ok()?;
        let tracked = &self.tracked[at];
        (tracked.listed && tracked.mapping.extent == mapping).then(|| self.listing.within(mapping))
    }

    /// The guard regions that the last [`take_dirty`](Self::take_dirty) met; `None` if the kernel does not tell them. They
    /// hold for as long as the process stands still since before it.
    pub fn guards(&self) -> Option<&Guards> {
        (self.walker.guard() != 0).then_some(&self.guards)
    }

    /// The same of a process that runs, if its maps are still those that the last [`take_dirty`](Self::take_dirty) went by:
    /// most likely they hold in a freeze that begins now.
    pub fn likely_guards(&self, maps: &[u8]) -> Option<&Guards> {
        self.guards().filter(|_| self.maps_text == maps)
    }

    /// All pages of private memory that exist now, as of the mappings of the last pass or registration.
    pub fn populated(&mut self, out: &mut Vec<Extent>) -> Result<(), TrackError> {
        out.clear();
        let pagemap = self.pagemap()?;
        let populated = Query { any: POPULATED, ..Query::default() };
        for range in runs(&self.tracked, |t| t.mapping.is_private()) {
            self.scan(&pagemap, range, self.walker.readable(populated), out)?;
        }
        self.push_vdso(out);
        extents::normalize(out);
        self.leave_out_file_pages(&pagemap, out)
    }

    /// Leaves out pages of private file mappings that are still the file's own, which no image has. That makes a new
    /// process a fraction of what it has mapped; a few such pages are cheaper read than asked about.
    fn leave_out_file_pages(&mut self, pagemap: &File, out: &mut Vec<Extent>) -> Result<(), TrackError> {
        let of_files = |t: &&Tracked| t.mapping.kind == MappingKind::PrivateFile;
        let mapped: Vec<Extent> = self.tracked.iter().filter(of_files).map(|t| t.mapping.extent).collect();
        let asked = extents::intersect(out, &mapped);
        if extents::pages(&asked) < FILE_PAGES_MIN {
            return Ok(());
        }
        // One that is copied behind this counts as written in the next pass.
        let of_file = Query { all: category::FILE | category::PRESENT, ..Query::default() };
        let mut theirs = Vec::new();
        for span in spans(&asked) {
            self.scan(pagemap, span, of_file, &mut theirs)?;
        }
        extents::normalize(&mut theirs);
        *out = extents::subtract(out, &extents::intersect(&theirs, &mapped));
        Ok(())
    }

    /// All that is not both present and protected in a range.
    fn changed(&mut self, pagemap: &File, range: Extent) -> Result<Found, TrackError> {
        let query = Query {
            inverted: category::PRESENT,
            any: category::PRESENT | category::WRITTEN,
            told: POPULATED | category::WRITTEN | self.walker.guard(),
            ..Query::default()
        };
        let mut found = Found::default();
        self.walk(pagemap, range, query, |run| {
            extents::push(&mut found.reported, run.start, run.end);
            let is = |category| run.categories & category != 0;
            if is(category::GUARD) {
                extents::push(&mut found.guards, run.start, run.end);
                return;
            }
            if !is(POPULATED) {
                return;
            }
            if is(category::SWAPPED) {
                extents::push(&mut found.swapped, run.start, run.end);
            }
            if is(category::WRITTEN) {
                extents::push(&mut found.written, run.start, run.end);
            }
        })?;
        Ok(found)
    }

    /// Protects the written pages among those found, and all written ones near them; adds them to `out` and the listing.
    fn protect(&mut self, pagemap: &File, found: &[Extent], out: &mut Vec<Extent>) -> Result<(), TrackError> {
        let written = Query {
            write_protect: true,
            all: category::WRITTEN,
            any: POPULATED,
            told: category::PFNZERO,
            ..Query::default()
        };
        let mut listed = Vec::new();
        for span in spans(found) {
            self.walk(pagemap, span, self.walker.readable(written), |run| {
                extents::push(out, run.start, run.end);
                if run.categories & category::PFNZERO == 0 {
                    extents::push(&mut listed, run.start, run.end);
                }
            })?;
        }
        self.listing.add(&listed);
        Ok(())
    }

    /// Lists the pages of anonymous mappings that are new, and forgets those of mappings that are gone.
    fn list_new(&mut self, pagemap: &File) -> Result<(), TrackError> {
        let is_new = |t: &Tracked| is_tracked(t) && t.mapping.kind == MappingKind::Anonymous && !t.listed;
        if !self.tracked.iter().any(is_new) {
            return Ok(());
        }
        for at in 0..self.tracked.len() {
            if is_new(&self.tracked[at]) {
                let (mapping, mut pages) = (self.tracked[at].mapping.extent, Vec::new());
                self.scan(pagemap, mapping, self.walker.readable(OWN), &mut pages)?;
                self.listing.begin(mapping, &pages);
                self.tracked[at].listed = true;
            }
        }
        let listed: Vec<Extent> =
            self.tracked.iter().filter(|t| t.listed).map(|t| t.mapping.extent).collect();
        self.listing.keep(&listed);
        Ok(())
    }

    /// The pages of mappings that cannot be registered.
    fn push_untracked(&mut self, pagemap: &File, out: &mut Vec<Extent>) -> Result<(), TrackError> {
        let populated = Query { any: POPULATED, ..Query::default() };
        let untracked = |t: &Tracked| t.mapping.is_private() && !t.registered;
        for tracked in self.tracked.clone().iter().filter(|t| untracked(t)) {
            self.scan(pagemap, tracked.mapping.extent, self.walker.readable(populated), out)?;
        }
        Ok(())
    }

    /// Takes markers away that DONTNEED has left in the place of protected pages: each pass would report them again, and
    /// MADV_GUARD_INSTALL, which waits for the place to be empty, would never return (guard_install_set_pte and
    /// zap_pte_range in mm/, Linux 6.15 to 6.18).
    fn remove(&self, markers: &[Extent]) {
        for range in markers {
            // If it fails, the mapping is another by now. A page that has come meanwhile counts as written.
            let _ = sys::uffd_unprotect(self.uffd.as_fd(), *range);
        }
    }

    fn push_vdso(&self, out: &mut Vec<Extent>) {
        let vdso = |t: &&Tracked| t.mapping.kind == MappingKind::Vdso;
        out.extend(self.tracked.iter().filter(vdso).map(|t| t.mapping.extent));
    }

    /// The page map of the process' address space of now, which an exec since the attach makes another.
    fn pagemap(&self) -> Result<File, TrackError> {
        let pagemap = pagemap::open(self.pid).map_err(|e| self.failed("opening /proc/PID/pagemap", e))?;
        // Checked after the open: the pid cannot have been another's then.
        if sys::has_exited(self.pidfd.as_fd()) { Err(TrackError::Gone(self.pid)) } else { Ok(pagemap) }
    }

    /// Adds what matches in a range to `out`.
    fn scan(
        &mut self,
        pagemap: &File,
        range: Extent,
        query: Query,
        out: &mut Vec<Extent>,
    ) -> Result<(), TrackError> {
        self.walk(pagemap, range, query, |run| extents::push(out, run.start, run.end))
    }

    fn walk(
        &mut self,
        pagemap: &File,
        range: Extent,
        query: Query,
        each: impl FnMut(&PageRegion),
    ) -> Result<(), TrackError> {
        let walked = self.walker.walk(pagemap, range, query, each);
        walked.map_err(|e| self.failed("scanning the page map", e))
    }

    fn failed(&self, what: &'static str, source: io::Error) -> TrackError {
        // One that is about to exit has no memory any more some time before its pidfd says so.
        let memory_is_gone = source.raw_os_error() == Some(libc::ESRCH);
        if memory_is_gone || sys::has_exited(self.pidfd.as_fd()) {
            TrackError::Gone(self.pid)
        } else {
            TrackError::Io { what, pid: self.pid, source }
        }
    }
}

/// Everything of an attach that can fail: the descriptor, the page map, and what the kernel tells by it.
fn begin(pid: i32, pidfd: BorrowedFd<'_>) -> Result<(Injected, File, Walker), AttachError> {
    let injected = inject::userfaultfd_of(pid, pidfd)?;
    // The memory is gone if the process executes another program right now.
    let refused = |error: io::Error| match error.raw_os_error() {
        Some(libc::ESRCH) => AttachError::Gone(pid),
        _ => AttachError::KernelTooOld(error),
    };
    sys::uffd_enable(injected.uffd.as_fd()).map_err(refused)?;
    let pagemap = pagemap::open(pid).map_err(|e| AttachError::io(pid, "opening /proc/PID/pagemap", e))?;
    let walker = Walker::new(&pagemap).map_err(refused)?;
    Ok((injected, pagemap, walker))
}

/// Whether a pass looks for what was written in a mapping.
fn is_tracked(tracked: &Tracked) -> bool {
    tracked.mapping.is_private() && tracked.registered
}

/// The runs of a list, neighbours taken together.
fn spans(found: &[Extent]) -> Vec<Extent> {
    let mut spans: Vec<Extent> = Vec::new();
    for run in found {
        match spans.last_mut() {
            Some(last) if run.start - last.end() <= GAP_PAGES_MAX * PAGE_SIZE => {
                last.pages = (run.end() - last.start) / PAGE_SIZE;
            }
            _ => spans.push(*run),
        }
    }
    spans
}

/// The ranges from the first to the last of neighbouring mappings that `wanted` accepts, holes included: as
/// few calls as possible, without touching a mapping that it does not accept, and without keeping the process, or a CRIU
/// that dumps it, from changing its mappings for long: the kernel lets nobody do so during a call.
fn runs(tracked: &[Tracked], wanted: impl Fn(&Tracked) -> bool) -> Vec<Extent> {
    let mut runs: Vec<Extent> = Vec::new();
    // How much of the last run is mapped, if it may go on.
    let mut mapped = None;
    for tracked in tracked {
        if !wanted(tracked) {
            mapped = None;
            continue;
        }
        let Extent { mut start, mut pages } = tracked.mapping.extent;
        while pages > 0 {
            let piece = pages.min(RUN_PAGES_MAX);
            match (runs.last_mut(), mapped) {
                (Some(last), Some(so_far)) if so_far + piece <= RUN_PAGES_MAX => {
                    last.pages = (start - last.start) / PAGE_SIZE + piece;
                    mapped = Some(so_far + piece);
                }
                _ => {
                    runs.push(Extent { start, pages: piece });
                    mapped = Some(piece);
                }
            }
            start += piece * PAGE_SIZE;
            pages -= piece;
        }
    }
    runs
}
