//! Walks over a process' page map.

use std::{fs::File, io};

use super::sys::{self, PageRegion, Query, category};
use crate::{
    extents,
    model::{Extent, PAGE_SIZE},
};

/// Regions that one PAGEMAP_SCAN call may fill.
const REGIONS: usize = 16 * 1024;
pub(super) const POPULATED: u64 = category::PRESENT | category::SWAPPED;

/// Pages that exist, but for the kernel's page of zeroes.
pub(super) const OWN: Query = Query {
    write_protect: false,
    inverted: category::PFNZERO,
    all: category::PFNZERO,
    any: POPULATED,
    told: 0,
    pages_max: 0,
};

pub(super) fn open(pid: i32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/pagemap"))
}

/// The pages that a mapping of a process has, but for the kernel's page of zeroes, if no tracker
/// [lists](super::Tracker::listed) them.
pub fn pages_of(pid: i32, mapping: Extent) -> io::Result<Vec<Extent>> {
    let pagemap = open(pid)?;
    let mut walker = Walker::new(&pagemap)?;
    let mut pages = Vec::new();
    let own = walker.readable(OWN);
    walker.walk(&pagemap, mapping, own, |run| extents::push(&mut pages, run.start, run.end))?;
    Ok(pages)
}

/// Runs queries over ranges of any length.
#[derive(Debug)]
pub(super) struct Walker {
    guards_known: bool,
    regions: Vec<PageRegion>,
}

impl Walker {
    /// Looks, by way of any page map, for what this kernel can tell.
    pub(super) fn new(pagemap: &File) -> io::Result<Self> {
        let probe = |all| {
            let query = Query { all, ..Query::default() };
            sys::pagemap_scan(pagemap, 0, PAGE_SIZE, query, &mut [PageRegion::default()])
        };
        probe(category::PRESENT)?;
        Ok(Self {
            guards_known: probe(category::GUARD).is_ok(),
            regions: vec![PageRegion::default(); REGIONS],
        })
    }

    /// Hands out what matches in a range, in order.
    pub(super) fn walk(
        &mut self,
        pagemap: &File,
        range: Extent,
        query: Query,
        mut each: impl FnMut(&PageRegion),
    ) -> io::Result<()> {
        let mut from = range.start;
        loop {
            let filled = sys::pagemap_scan(pagemap, from, range.end(), query, &mut self.regions)?;
            self.regions[..filled].iter().for_each(&mut each);
            if filled < self.regions.len() {
                return Ok(());
            }
            from = self.regions[filled - 1].end;
        }
    }

    /// The query without pages of guard regions, which hold nothing.
    pub(super) fn readable(&self, query: Query) -> Query {
        let guard = self.guard();
        Query { inverted: query.inverted | guard, all: query.all | guard, ..query }
    }

    /// The category of guard regions, if this kernel has it.
    pub(super) fn guard(&self) -> u64 {
        if self.guards_known { category::GUARD } else { 0 }
    }
}
