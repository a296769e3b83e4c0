//! Pages out of a flat image directory, as CRIU or the store writes one.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Mutex,
};

use super::{
    super::images::{self, ImageError, Pagemap},
    PageSource,
};
use crate::model::Space;

/// A flat image directory; each page map is read when the first of its pages is.
#[derive(Debug)]
pub struct FlatImages {
    directory: PathBuf,
    maps: Mutex<HashMap<Space, Option<Map>>>,
}

#[derive(Debug)]
struct Map {
    /// Start and end address, and offset in the file, of each run.
    runs: Vec<(u64, u64, u64)>,
    pages: File,
}

impl FlatImages {
    /// Serves pages of the images in `directory`.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), maps: Mutex::default() }
    }

    fn open(&self, space: Space) -> io::Result<Option<Map>> {
        let name = images::pagemap_file(space);
        let bytes = match images::read(&self.directory, &name) {
            Err(ImageError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other.map_err(io::Error::other)?,
        };
        let map = Pagemap::decode(&name, &bytes).map_err(io::Error::other)?;
        let mut offset = 0;
        let runs = map.runs.iter().map(|run| {
            offset += run.extent.bytes();
            (run.extent.start, run.extent.end(), offset - run.extent.bytes())
        });
        let runs = runs.collect();
        let pages = File::open(self.directory.join(images::pages_file(map.pages_id)))?;
        Ok(Some(Map { runs, pages }))
    }
}

impl PageSource for FlatImages {
    fn read(&self, space: Space, start: u64, buffer: &mut [u8]) -> io::Result<bool> {
        let mut maps = self.maps.lock().map_err(|_| io::Error::other("a reader of pages panicked"))?;
        let map = match maps.entry(space) {
            std::collections::hash_map::Entry::Occupied(found) => found.into_mut(),
            std::collections::hash_map::Entry::Vacant(free) => free.insert(self.open(space)?),
        };
        let Some(map) = map else { return Ok(false) };
        let mut done = 0;
        while done < buffer.len() {
            let at = start + done as u64;
            let next = map.runs.partition_point(|run| run.0 <= at);
            let Some((first, end, offset)) = next.checked_sub(1).map(|index| map.runs[index]) else {
                return Ok(false);
            };
            if at >= end {
                return Ok(false);
            }
            let length = ((end - at) as usize).min(buffer.len() - done);
            map.pages.read_exact_at(&mut buffer[done..done + length], offset + (at - first))?;
            done += length;
        }
        Ok(true)
    }
}
