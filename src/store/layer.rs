//! A committed epoch that may not be folded yet: a log of its pages and an index into it. It never
//! changes after its commit. Laid over the image it gives the epoch, folded or not.

use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
};

use super::{
    disk::{self, IoFault},
    extents::{Run, Source},
    layout::{INDEX, PAGES_LOG},
    record::{self, Index, RecordError},
    sum::{Sum, ZERO_PAGE},
};
use crate::model::{EpochId, Extent, PAGE_SIZE, Space};

/// Pages of the log that are read at once when it is folded (1 MiB).
const BLOCK_PAGES: u64 = 256;

/// A committed epoch beside the image.
pub(super) struct Layer {
    pub(super) id: EpochId,
    pub(super) base: EpochId,
    pub(super) dir: PathBuf,
    /// Bytes that its fold may add to the image.
    pub(super) fresh_bytes: u64,
    log: File,
    log_path: PathBuf,
    runs: HashMap<Space, Vec<Run>>,
    sums: Vec<Sum>,
}

impl Layer {
    pub(super) fn open(dir: &Path) -> Result<Self, RecordError> {
        let index = record::read_index(&dir.join(INDEX))?;
        let log_path = dir.join(PAGES_LOG);
        let log = disk::open_existing(&log_path)?.ok_or(RecordError::Damaged("log of pages"))?;
        let len = log.metadata().map(|found| found.len()).unwrap_or_default();
        if len != index.sums.len() as u64 * PAGE_SIZE {
            return Err(RecordError::Damaged("log of pages"));
        }
        // What of it is new to the image is not known any more; all of it is the safe guess.
        let fresh_bytes = len;
        Ok(Self::new(dir.to_owned(), index, log, fresh_bytes))
    }

    pub(super) fn new(dir: PathBuf, index: Index, log: File, fresh_bytes: u64) -> Self {
        let log_path = dir.join(PAGES_LOG);
        let Index { id, base, spaces, sums } = index;
        Self { id, base, dir, fresh_bytes, log, log_path, runs: spaces.into_iter().collect(), sums }
    }

    /// The runs of the layer that overlap the extent, cut to it, ascending.
    pub(super) fn overlapping(&self, space: Space, extent: Extent) -> impl Iterator<Item = Run> {
        let runs = self.runs.get(&space).map_or(&[][..], Vec::as_slice);
        let first = runs.partition_point(|run| run.extent.end() <= extent.start);
        runs[first..]
            .iter()
            .take_while(move |run| run.extent.start < extent.end())
            .map(move |run| run.clip(extent.start, extent.end()))
    }

    /// Reads pages of the log, or zeros.
    pub(super) fn read(&self, source: Source, buf: &mut [u8]) -> Result<(), IoFault> {
        match source {
            Source::Zero => buf.fill(0),
            Source::At(page) => disk::read_at(&self.log, &self.log_path, buf, page * PAGE_SIZE)?,
        }
        Ok(())
    }

    /// Where such pages lie.
    pub(super) fn place(&self, source: Source) -> Option<(&Path, u64)> {
        match source {
            Source::Zero => None,
            Source::At(page) => Some((&self.log_path, page * PAGE_SIZE)),
        }
    }

    /// Every run of the epoch, by space and address.
    pub(super) fn extents(&self) -> Vec<(Space, Extent)> {
        let mut spaces: Vec<_> = self.runs.iter().collect();
        spaces.sort_unstable_by_key(|(space, _)| **space);
        let of_space = |(space, runs): (&Space, &Vec<Run>)| {
            runs.iter().map(|run| (*space, run.extent)).collect::<Vec<_>>()
        };
        spaces.into_iter().flat_map(of_space).collect()
    }

    /// The sums of such pages.
    pub(super) fn sums(&self, source: Source, sums: &mut [Sum]) {
        match source {
            Source::Zero => sums.fill(ZERO_PAGE),
            Source::At(page) => sums.copy_from_slice(&self.sums[page as usize..][..sums.len()]),
        }
    }

    /// Runs of zero pages.
    pub(super) fn zero_runs(&self) -> impl Iterator<Item = (Space, Extent)> {
        let all = self.runs.iter().flat_map(|(space, runs)| runs.iter().map(move |run| (*space, run)));
        all.filter(|(_, run)| run.source == Source::Zero).map(|(space, run)| (space, run.extent))
    }

    /// Calls `each` with every page of the log that still counts, reading the log in its own order.
    pub(super) fn for_each_data(
        &self,
        mut each: impl FnMut(Space, u64, &[u8], &[Sum]) -> Result<(), IoFault>,
    ) -> Result<(), IoFault> {
        let mut runs: Vec<(u64, Space, Extent)> = Vec::new();
        for (space, list) in &self.runs {
            runs.extend(list.iter().filter_map(|run| match run.source {
                Source::Zero => None,
                Source::At(page) => Some((page, *space, run.extent)),
            }));
        }
        runs.sort_unstable_by_key(|(page, ..)| *page);
        let mut block = vec![0; (BLOCK_PAGES * PAGE_SIZE) as usize];
        let mut held = 0..0; // pages of the log that are in `block`
        for (first, space, extent) in runs {
            let mut done = 0;
            while done < extent.pages {
                let page = first + done;
                if !held.contains(&page) {
                    held = page..(page + BLOCK_PAGES).min(self.sums.len() as u64);
                    let bytes = ((held.end - held.start) * PAGE_SIZE) as usize;
                    self.read(Source::At(page), &mut block[..bytes])?;
                }
                let pages = (extent.pages - done).min(held.end - page);
                let at = ((page - held.start) * PAGE_SIZE) as usize;
                let bytes = &block[at..at + (pages * PAGE_SIZE) as usize];
                let sums = &self.sums[page as usize..(page + pages) as usize];
                each(space, extent.start + done * PAGE_SIZE, bytes, sums)?;
                done += pages;
            }
        }
        Ok(())
    }
}
