//! Which mappings the kernel tracks for us.
//!
//! Evidence is the kernel's scan alone. The list of mappings says where to look, and what to register before it holds a
//! page; that one is new, moved, grown or another's the scan would find without it, as soon as there is a page in it.
//!
//! Of a mapping that is registered anew no page counts as unwritten, whatever marks it bears. So a mapping that loses its
//! registration unseen would be no harm, if the kernel did not take its marks for true once it is registered again, by a
//! call that reaches over it ([`Tracker::register_pending`]). Hence, in a process that runs:
//!
//! ```text
//!  maps ──► scan: what is not registered? ──► register it, take its marks away ──► maps: is what the call reached over
//!                                                                                  the same? If not: not registered
//! ```
//!
//! The kernel ends a registration and keeps the marks in one case: `mremap` joins another registered mapping to it (see
//! there), and then the mapping is a larger one. What is left is a store to a mapping that is joined and cut apart again
//! between the scan and the second look at the maps, some tens of microseconds: a program would have to move memory up to
//! a neighbour, write to the neighbour, and take the memory away at once. In a frozen process nothing happens between
//! them, and what it lost before the scan finds.

use std::{
    fs::{self, File},
    os::{fd::AsFd, unix::fs::FileExt},
};

use super::{Guards, POPULATED, Pass, TrackError, Tracked, Tracker, is_tracked, runs};
use crate::{
    extents,
    memory::{
        maps::{self, Mapping, MapsError, TASK_END},
        sys::{self, PageRegion, Query, category},
    },
    model::{Extent, PAGE_SIZE},
};

/// How often a pass registers what it finds unregistered before it concludes that the memory is another.
const REGISTER_ROUNDS_MAX: usize = 3;
/// How often mappings are listed that change while they are, which is rare.
const LISTINGS_MAX: usize = 8;
/// The end of what a process can map (TASK_SIZE of the kernel's).
const HIGHEST: u64 = TASK_END - PAGE_SIZE;
/// Below it Linux lets nobody map, as it is configured mostly (CONFIG_LSM_MMAP_MIN_ADDR).
const LOWEST_MIN: u64 = 64 << 10;

/// Where the first mapping of a process can begin.
pub(super) fn lowest() -> u64 {
    let told = fs::read_to_string("/proc/sys/vm/mmap_min_addr").ok();
    told.and_then(|told| told.trim().parse().ok()).unwrap_or(0).max(LOWEST_MIN)
}

/// `/proc/PID/maps`.
struct Listed {
    text: Vec<u8>,
    mappings: Vec<Mapping>,
}

impl Tracker {
    /// Brings `tracked` up to date and registers what is not.
    pub(super) fn register_all(&mut self, pagemap: &File) -> Result<Pass, TrackError> {
        let mut pass = Pass { registered: self.read_maps(pagemap)?, untracked: 0 };
        for round in 0..=REGISTER_ROUNDS_MAX {
            // Right before a registration, behind which it cannot be told what was not registered.
            let stray = self.unregistered(pagemap)?;
            let is_stray =
                |t: &Tracked| t.registered && !extents::intersect(&[t.mapping.extent], &stray).is_empty();
            let mut found = 0;
            for tracked in self.tracked.iter_mut().filter(|t| is_stray(t)) {
                (tracked.registered, tracked.listed) = (false, false);
                found += 1;
            }
            pass.untracked = self.tracked.iter().filter(|t| t.mapping.is_private() && !t.registered).count();
            if pass.untracked == 0 || round > 0 && found == 0 {
                return Ok(pass);
            }
            pass.registered += found;
            // Those refused before may be free now; they are few.
            let passed = self.register_pending()?;
            self.doubt_changed(&passed)?;
        }
        // The kernel says that it registers, and the page map that it is not so: not the same memory.
        Err(TrackError::Replaced(self.pid))
    }

    /// `/proc/PID/maps`, if it is not as the last time.
    fn changed_maps(&self) -> Result<Option<Listed>, TrackError> {
        for _ in 0..LISTINGS_MAX {
            let text = fs::read(format!("/proc/{}/maps", self.pid))
                .map_err(|e| self.failed("reading /proc/PID/maps", e))?;
            if text == self.maps_text {
                return Ok(None);
            }
            match maps::parse(&text) {
                Err(MapsError::Torn) => {}
                mappings => return Ok(Some(Listed { mappings: mappings?, text })),
            }
        }
        Err(MapsError::Torn.into())
    }

    /// Reads `/proc/PID/maps`; gives the number of new private mappings.
    fn read_maps(&mut self, pagemap: &File) -> Result<usize, TrackError> {
        let Some(Listed { text, mappings }) = self.changed_maps()? else { return Ok(0) };
        let registered: Vec<Extent> =
            self.tracked.iter().filter(|t| t.registered).map(|t| t.mapping.extent).collect();
        let mut old = self.tracked.iter().peekable();
        let mut new = 0;
        let mut tracked = Vec::new();
        for mapping in mappings {
            while old.next_if(|t| t.mapping.extent.start < mapping.extent.start).is_some() {}
            let same = old.peek().filter(|t| t.mapping.is_same(mapping) && t.registered);
            let listed = same.is_some_and(|t| t.listed);
            let registered = same.is_some()
                || mapping.is_private() && self.has_changed(mapping.extent, &registered, pagemap)?;
            new += usize::from(!registered && mapping.is_private());
            tracked.push(Tracked { mapping, registered, listed });
        }
        self.tracked = tracked;
        self.maps_text = text;
        self.guards = Guards::default();
        Ok(new)
    }

    /// Whether a mapping is one of the registered that has grown or shrunk: then the kernel says of each of its pages that
    /// it is registered.
    fn has_changed(&self, extent: Extent, registered: &[Extent], pagemap: &File) -> Result<bool, TrackError> {
        let behind = registered.partition_point(|other| other.end() <= extent.start);
        if registered.get(behind).is_none_or(|other| other.start >= extent.end()) {
            return Ok(false);
        }
        let any_page = Query { all: category::WP_ALLOWED, any: POPULATED, pages_max: 1, ..Query::default() };
        let one = &mut [PageRegion::default()];
        let scanned = sys::pagemap_scan(pagemap, extent.start, extent.end(), any_page, one);
        scanned.map(|found| found > 0).map_err(|e| self.failed("scanning the page map", e))
    }

    /// Registers all private mappings that are not: all between two that are not private in one call, one by one if that
    /// fails. Of what was not registered no page counts as unwritten.
    ///
    /// The kernel splits a mapping at the end of what is registered, and the process, which runs, may have made a larger
    /// one in the place of one that was listed. Then its `mremap` of that fails (EFAULT) until the rest is registered
    /// too. So a call reaches over holes and over what is registered already, to where something was that is not private,
    /// and below the first mapping and behind the last as far as there is memory.
    ///
    /// A page may bear the mark of a protection that did not hold: when `mremap` joins a mapping to its neighbour, the
    /// kernel takes both off our list (copy_vma, then mremap_userfaultfd_prep, seen on Linux 6.18) and leaves the
    /// neighbour's marks, and takes them for true when it is registered again, whatever was written meanwhile. So the
    /// marks are taken away. Gives the mappings that a call reached over and that were registered, or so we think.
    fn register_pending(&mut self) -> Result<Vec<Mapping>, TrackError> {
        let mut passed = Vec::new();
        let uffd = self.uffd.as_fd();
        let lowest = self.tracked.first().map_or(0, |first| first.mapping.extent.start);
        let mut start = lowest.min(self.lowest);
        let mut at = 0;
        while at < self.tracked.len() {
            let len = self.tracked[at..].iter().take_while(|t| t.mapping.is_private()).count();
            let run = at..at + len;
            let other = self.tracked.get(run.end).map(|other| other.mapping.extent);
            let end = other.map_or(HIGHEST, |other| other.start);
            if self.tracked[run.clone()].iter().any(|t| !t.registered) {
                let whole = Extent { start, pages: (end - start) / PAGE_SIZE };
                let all = sys::uffd_register(uffd, whole).is_ok();
                if all {
                    let registered = self.tracked[run.clone()].iter().filter(|t| t.registered);
                    passed.extend(registered.map(|t| t.mapping));
                }
                for tracked in self.tracked[run.clone()].iter_mut().filter(|t| !t.registered) {
                    let extent = tracked.mapping.extent;
                    tracked.registered = (all || sys::uffd_register(uffd, extent).is_ok())
                        && sys::uffd_unprotect(uffd, extent).is_ok();
                }
                if !all && !self.attached_memory_lives() {
                    return Err(TrackError::Replaced(self.pid));
                }
            }
            (at, start) = (run.end + 1, other.map_or(end, |other| other.end()));
        }
        Ok(passed)
    }

    /// Of mappings that a registration reached over: those that are others by now may have lost their own before it, and
    /// been written. They count as unregistered, and so does all in them as written, until the next pass registers them.
    fn doubt_changed(&mut self, passed: &[Mapping]) -> Result<(), TrackError> {
        if passed.is_empty() {
            return Ok(());
        }
        let Some(Listed { mappings: now, .. }) = self.changed_maps()? else { return Ok(()) };
        let is_as_it_was = |mapping: Mapping| {
            let at = now.binary_search_by_key(&mapping.extent.start, |other| other.extent.start);
            at.is_ok_and(|at| now[at].is_same(mapping))
        };
        let changed: Vec<u64> =
            passed.iter().filter(|m| !is_as_it_was(**m)).map(|m| m.extent.start).collect();
        for tracked in &mut self.tracked {
            if changed.binary_search(&tracked.mapping.extent.start).is_ok() {
                (tracked.registered, tracked.listed) = (false, false);
            }
        }
        Ok(())
    }

    /// Whether the address space of the attach is still in use.
    fn attached_memory_lives(&self) -> bool {
        let mut entry = [0; 8];
        self.attached_pagemap.read_at(&mut entry, 0).is_ok_and(|read| read == entry.len())
    }

    /// Populated pages that are not registered, between shared mappings.
    fn unregistered(&mut self, pagemap: &File) -> Result<Vec<Extent>, TrackError> {
        let query = Query {
            write_protect: false,
            inverted: category::WP_ALLOWED,
            all: category::WP_ALLOWED,
            any: POPULATED,
            ..Query::default()
        };
        let mut stray = Vec::new();
        for range in runs(&self.tracked, is_tracked) {
            self.scan(pagemap, range, query, &mut stray)?;
        }
        Ok(stray)
    }
}
