//! The flat image: every page at its own address in sparse files, so that no index is needed and
//! writing a page twice changes nothing. Beside it, laid out the same way, each page's checksum.

use std::{
    collections::HashMap,
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use super::{
    disk::{self, Context as _, Durability, IoFault},
    layout::{CHUNK_SHIFT, PAGES_DIR, SUMS_DIR, chunk_name},
    sum::{SUM_LEN, Sum, ZERO_PAGE},
};
use crate::model::{Extent, PAGE_SIZE, Space};

/// A chunk of a space: its pages and their sums.
struct Chunk {
    pages: File,
    pages_path: PathBuf,
    sums: File,
    sums_path: PathBuf,
}

/// Most chunks that are kept open (two files each; a process may often have no more than 1024).
const OPEN_CHUNKS_MAX: usize = 128;

/// Pages whose sums fill a page of their file.
const BLOCK_PAGES: u64 = PAGE_SIZE / SUM_LEN as u64;

/// The page files in an image's directory.
pub(super) struct Flat {
    pages_dir: PathBuf,
    sums_dir: PathBuf,
    /// Open files, at most [`OPEN_CHUNKS_MAX`].
    open: RwLock<HashMap<(Space, u64), Arc<Chunk>>>,
}

fn sum_offset(offset: u64) -> u64 {
    offset / PAGE_SIZE * SUM_LEN as u64
}

/// Cuts a byte range at chunk borders: number of the chunk and range within it.
fn chunks(start: u64, end: u64) -> impl Iterator<Item = (u64, Range<u64>)> {
    let mut from = start;
    std::iter::from_fn(move || {
        if from >= end {
            return None;
        }
        let chunk = from >> CHUNK_SHIFT;
        let base = chunk << CHUNK_SHIFT;
        let to = end.min(base + (1 << CHUNK_SHIFT));
        let range = from - base..to - base;
        from = to;
        Some((chunk, range))
    })
}

impl Flat {
    pub(super) fn create(dir: &Path) -> Result<Self, IoFault> {
        let flat = Self::open(dir);
        disk::make_dir(&flat.pages_dir)?;
        disk::make_dir(&flat.sums_dir)?;
        Ok(flat)
    }

    pub(super) fn open(dir: &Path) -> Self {
        Self { pages_dir: dir.join(PAGES_DIR), sums_dir: dir.join(SUMS_DIR), open: RwLock::default() }
    }

    fn opened(&self, space: Space, chunk: u64) -> Option<Arc<Chunk>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).get(&(space, chunk)).cloned()
    }

    fn keep(&self, space: Space, chunk: u64, files: Chunk) -> Arc<Chunk> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= OPEN_CHUNKS_MAX {
            open.clear(); // rare, and cheaper to open anew than to keep an order
        }
        Arc::clone(open.entry((space, chunk)).or_insert(Arc::new(files)))
    }

    /// The chunk's files; none if it does not exist.
    fn existing(&self, space: Space, chunk: u64) -> Result<Option<Arc<Chunk>>, IoFault> {
        if let Some(files) = self.opened(space, chunk) {
            return Ok(Some(files));
        }
        let (pages_path, sums_path) = self.paths(space, chunk);
        let Some(pages) = disk::open_existing(&pages_path)? else { return Ok(None) };
        let Some(sums) = disk::open_existing(&sums_path)? else { return Ok(None) };
        Ok(Some(self.keep(space, chunk, Chunk { pages, pages_path, sums, sums_path })))
    }

    /// The chunk's files, made if they do not exist.
    fn made(&self, space: Space, chunk: u64) -> Result<Arc<Chunk>, IoFault> {
        if let Some(files) = self.opened(space, chunk) {
            return Ok(files);
        }
        let (pages_path, sums_path) = self.paths(space, chunk);
        let pages = disk::open_or_create(&pages_path)?;
        let sums = disk::open_or_create(&sums_path)?;
        Ok(self.keep(space, chunk, Chunk { pages, pages_path, sums, sums_path }))
    }

    fn paths(&self, space: Space, chunk: u64) -> (PathBuf, PathBuf) {
        let name = chunk_name(space, chunk);
        (self.pages_dir.join(&name), self.sums_dir.join(&name))
    }

    /// Writes whole pages with their sums.
    pub(super) fn write(&self, space: Space, start: u64, bytes: &[u8], sums: &[Sum]) -> Result<(), IoFault> {
        self.write_pages(space, start, bytes)?;
        self.write_sums(space, start, sums)
    }

    fn write_pages(&self, space: Space, start: u64, bytes: &[u8]) -> Result<(), IoFault> {
        let mut done = 0;
        for (chunk, range) in chunks(start, start + bytes.len() as u64) {
            let files = self.made(space, chunk)?;
            let len = (range.end - range.start) as usize;
            disk::write_at(&files.pages, &files.pages_path, &bytes[done..done + len], range.start)?;
            done += len;
        }
        Ok(())
    }

    fn write_sums(&self, space: Space, start: u64, sums: &[Sum]) -> Result<(), IoFault> {
        let mut done = 0;
        for (chunk, range) in chunks(start, start + sums.len() as u64 * PAGE_SIZE) {
            let files = self.made(space, chunk)?;
            let count = ((range.end - range.start) / PAGE_SIZE) as usize;
            let bytes = sums[done..done + count].as_flattened();
            disk::write_at(&files.sums, &files.sums_path, bytes, sum_offset(range.start))?;
            done += count;
        }
        Ok(())
    }

    /// For many short runs; [`Batch::finish`] must be called.
    pub(super) fn batch(&self) -> Batch<'_> {
        Batch { flat: self, place: None, sums: [ZERO_PAGE; BLOCK_PAGES as usize] }
    }

    /// Makes the pages zero, taking no memory.
    pub(super) fn zero(&self, space: Space, extent: Extent) -> Result<(), IoFault> {
        for (chunk, range) in chunks(extent.start, extent.end()) {
            // Made, so that a file that is missing where there should be pages is an error when read.
            self.made(space, chunk)?.punch(range)?;
        }
        Ok(())
    }

    /// Forgets pages that left the image.
    pub(super) fn drop_pages(&self, space: Space, extent: Extent) -> Result<(), IoFault> {
        for (chunk, range) in chunks(extent.start, extent.end()) {
            if let Some(files) = self.existing(space, chunk)? {
                files.punch(range)?;
            }
        }
        Ok(())
    }

    /// Forgets a space that left the image and had pages at these places.
    pub(super) fn drop_space(&self, space: Space, extents: &[Extent]) -> Result<(), IoFault> {
        let mut numbers: Vec<u64> = extents
            .iter()
            .flat_map(|extent| chunks(extent.start, extent.end()).map(|(chunk, _)| chunk))
            .collect();
        numbers.dedup();
        for chunk in numbers {
            self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&(space, chunk));
            let (pages, sums) = self.paths(space, chunk);
            disk::remove_file(&pages)?;
            disk::remove_file(&sums)?;
        }
        Ok(())
    }

    /// Reads whole pages.
    pub(super) fn read(&self, space: Space, start: u64, buf: &mut [u8]) -> Result<(), IoFault> {
        let mut done = 0;
        for (chunk, range) in chunks(start, start + buf.len() as u64) {
            let files = self.needed(space, chunk)?;
            let len = (range.end - range.start) as usize;
            disk::read_at(&files.pages, &files.pages_path, &mut buf[done..done + len], range.start)?;
            done += len;
        }
        Ok(())
    }

    /// Says where pages lie.
    pub(super) fn places(&self) -> Places<'_> {
        Places { flat: self, last: None }
    }

    /// Reads the pages' sums.
    pub(super) fn read_sums(&self, space: Space, start: u64, sums: &mut [Sum]) -> Result<(), IoFault> {
        let mut done = 0;
        for (chunk, range) in chunks(start, start + sums.len() as u64 * PAGE_SIZE) {
            let files = self.needed(space, chunk)?;
            let count = ((range.end - range.start) / PAGE_SIZE) as usize;
            let into = sums[done..done + count].as_flattened_mut();
            disk::read_at(&files.sums, &files.sums_path, into, sum_offset(range.start))?;
            done += count;
        }
        Ok(())
    }

    fn needed(&self, space: Space, chunk: u64) -> Result<Arc<Chunk>, IoFault> {
        let missing = || Err(io::Error::from(io::ErrorKind::NotFound));
        match self.existing(space, chunk)? {
            Some(files) => Ok(files),
            None => missing().context("open", &self.paths(space, chunk).0),
        }
    }

    /// Makes everything written durable.
    pub(super) fn sync(&self, durability: Durability) -> Result<(), IoFault> {
        disk::sync_files_in(&self.pages_dir, durability)?;
        disk::sync_files_in(&self.sums_dir, durability)
    }
}

/// Where the pages of a flat image lie.
pub(super) struct Places<'a> {
    flat: &'a Flat,
    /// The chunk that was asked for last: runs come in order, and a chunk has many.
    last: Option<Opened>,
}

struct Opened {
    space: Space,
    chunk: u64,
    files: Arc<Chunk>,
    bytes: u64,
}

impl Places<'_> {
    /// Calls `each` with the file of each part of a run and the offset in it; with none where the file has ended, behind
    /// which all pages are zero.
    pub(super) fn of(
        &mut self,
        space: Space,
        extent: Extent,
        mut each: impl FnMut(Extent, Option<(&Path, u64)>),
    ) -> Result<(), IoFault> {
        for (chunk, range) in chunks(extent.start, extent.end()) {
            let opened = self.turn_to(space, chunk)?;
            let border = range.end.min((opened.bytes / PAGE_SIZE * PAGE_SIZE).max(range.start));
            let part = |from: u64, to: u64| Extent {
                start: (chunk << CHUNK_SHIFT) + from,
                pages: (to - from) / PAGE_SIZE,
            };
            if border > range.start {
                each(part(range.start, border), Some((&opened.files.pages_path, range.start)));
            }
            if border < range.end {
                each(part(border, range.end), None);
            }
        }
        Ok(())
    }

    fn turn_to(&mut self, space: Space, chunk: u64) -> Result<&Opened, IoFault> {
        let last = self.last.take().filter(|last| last.space == space && last.chunk == chunk);
        let opened = if let Some(opened) = last {
            opened
        } else {
            let files = self.flat.needed(space, chunk)?;
            let bytes = files.pages.metadata().context("examine", &files.pages_path)?.len();
            Opened { space, chunk, files, bytes }
        };
        Ok(self.last.insert(opened))
    }
}

/// Writes pages as they come, and their sums a block at a time: scattered pages would otherwise cost two
/// system calls each.
pub(super) struct Batch<'a> {
    flat: &'a Flat,
    /// Which block `sums` holds.
    place: Option<(Space, u64)>,
    sums: [Sum; BLOCK_PAGES as usize],
}

impl Batch<'_> {
    pub(super) fn write(
        &mut self,
        space: Space,
        start: u64,
        bytes: &[u8],
        sums: &[Sum],
    ) -> Result<(), IoFault> {
        self.flat.write_pages(space, start, bytes)?;
        let first = start / PAGE_SIZE;
        let mut done = 0;
        while done < sums.len() {
            let page = first + done as u64;
            self.turn_to(space, page / BLOCK_PAGES)?;
            let at = (page % BLOCK_PAGES) as usize;
            let count = (sums.len() - done).min(self.sums.len() - at);
            self.sums[at..at + count].copy_from_slice(&sums[done..done + count]);
            done += count;
        }
        Ok(())
    }

    fn turn_to(&mut self, space: Space, block: u64) -> Result<(), IoFault> {
        if self.place == Some((space, block)) {
            return Ok(());
        }
        self.finish()?;
        self.flat.read_sums(space, block * BLOCK_PAGES * PAGE_SIZE, &mut self.sums)?;
        self.place = Some((space, block));
        Ok(())
    }

    pub(super) fn finish(&mut self) -> Result<(), IoFault> {
        match self.place.take() {
            Some((space, block)) => self.flat.write_sums(space, block * BLOCK_PAGES * PAGE_SIZE, &self.sums),
            None => Ok(()),
        }
    }
}

impl Chunk {
    fn punch(&self, range: Range<u64>) -> Result<(), IoFault> {
        disk::punch(&self.pages, &self.pages_path, range.start, range.end - range.start)?;
        let sums = sum_offset(range.start)..sum_offset(range.end);
        disk::punch(&self.sums, &self.sums_path, sums.start, sums.end - sums.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_at_chunk_borders() {
        let border = 3 << CHUNK_SHIFT;
        let cut: Vec<_> = chunks(border - 8192, border + 4096).collect();
        let end = 1 << CHUNK_SHIFT;
        assert_eq!(cut, [(2, end - 8192..end), (3, 0..4096)]);
    }
}
