//! Which bytes of which files the pages are: what a process that serves pages is told, and reads from.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use super::{
    super::images::{self, ImageError, Pagemap},
    PageSource,
    windows::Windows,
};
use crate::model::{Extent, Space};

/// In the place of a file's number: pages of zeros.
const ZERO: u64 = u64::MAX;
/// Most files, spaces and pieces of one description; a page map of 4 TiB in scattered pages has fewer.
const COUNT_MAX: u64 = 1 << 30;

/// A run of pages: its start and end address, the file's number, and where in the file it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    start: u64,
    end: u64,
    file: u64,
    offset: u64,
}

/// Where the pages of an image lie, and which of them are hot. Made by whoever knows the image; [`PageFiles::open`]
/// opens the files, after which they may be removed, but not written to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageFiles {
    files: Vec<PathBuf>,
    spaces: HashMap<Space, Vec<Piece>>,
    hot: Vec<(Space, Extent)>,
}

impl PageFiles {
    /// Says where a run lies; `None` if its pages are zero. Runs of a space must come in order.
    pub fn add(&mut self, space: Space, extent: Extent, place: Option<(&Path, u64)>) {
        let (file, offset) = match place {
            None => (ZERO, 0),
            Some((path, offset)) => (self.number(path), offset),
        };
        self.spaces.entry(space).or_default().push(Piece {
            start: extent.start,
            end: extent.end(),
            file,
            offset,
        });
    }

    fn number(&mut self, path: &Path) -> u64 {
        // The newest are the likeliest.
        let found = self.files.iter().rposition(|known| known.as_os_str() == path.as_os_str());
        found.unwrap_or_else(|| {
            self.files.push(path.to_owned());
            self.files.len() - 1
        }) as u64
    }

    /// Says which pages shall come first, in this order.
    pub fn set_hot(&mut self, hot: Vec<(Space, Extent)>) {
        self.hot = hot;
    }

    /// Which pages shall come first.
    pub fn hot(&self) -> &[(Space, Extent)] {
        &self.hot
    }

    /// The pages of a flat image directory, as CRIU or the store writes one.
    pub fn of_images(directory: &Path) -> Result<Self, ImageError> {
        let mut files = Self::default();
        for task in images::pstree(&images::read(directory, images::PSTREE_FILE)?)? {
            let space = Space::Task(task.pid);
            let name = images::pagemap_file(space);
            let bytes = match images::read(directory, &name) {
                // A zombie has no memory.
                Err(ImageError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            let map = Pagemap::decode(&name, &bytes)?;
            let path = directory.join(images::pages_file(map.pages_id));
            let mut offset = 0;
            for run in map.runs {
                files.add(space, run.extent, Some((&path, offset)));
                offset += run.extent.bytes();
            }
        }
        Ok(files)
    }

    /// Opens all the files.
    pub fn open(self) -> io::Result<OpenFiles> {
        let mut ranges = vec![Vec::new(); self.files.len()];
        for piece in self.spaces.values().flatten().filter(|piece| piece.file != ZERO) {
            ranges[piece.file as usize].push((piece.offset, piece.offset + (piece.end - piece.start)));
        }
        let open = |(path, ranges): (&PathBuf, &Vec<(u64, u64)>)| {
            let windows = File::open(path).and_then(|file| Windows::new(file, ranges));
            windows.map_err(|error| io::Error::other(format!("{}: {error}", path.display())))
        };
        let files = self.files.iter().zip(&ranges).map(open).collect::<io::Result<_>>()?;
        Ok(OpenFiles { files, spaces: self.spaces })
    }

    /// As bytes, for another process of this program.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut put =
            |numbers: &[u64]| numbers.iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
        put(&[self.files.len() as u64, self.spaces.len() as u64, self.hot.len() as u64]);
        for (space, pieces) in &self.spaces {
            let (kind, id) = words(*space);
            put(&[kind, id, pieces.len() as u64]);
            for piece in pieces {
                put(&[piece.start, piece.end, piece.file, piece.offset]);
            }
        }
        for (space, extent) in &self.hot {
            let (kind, id) = words(*space);
            put(&[kind, id, extent.start, extent.pages]);
        }
        for path in &self.files {
            let path = path.as_os_str().as_bytes();
            out.extend_from_slice(&(path.len() as u64).to_le_bytes());
            out.extend_from_slice(path);
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut from = Words(bytes);
        let [files, spaces, hot] = from.take()?;
        let mut made = Self::default();
        for _ in 0..spaces.min(COUNT_MAX) {
            let [kind, id, count] = from.take()?;
            let pieces = (0..count.min(COUNT_MAX)).map(|_| {
                let [start, end, file, offset] = from.take()?;
                (start < end && (file == ZERO || file < files)).then_some(Piece { start, end, file, offset })
            });
            let pieces = pieces.collect::<Option<_>>()?;
            made.spaces.insert(space(kind, id)?, pieces);
        }
        for _ in 0..hot.min(COUNT_MAX) {
            let [kind, id, start, pages] = from.take()?;
            made.hot.push((space(kind, id)?, Extent { start, pages }));
        }
        for _ in 0..files.min(COUNT_MAX) {
            let [length] = from.take()?;
            let (path, rest) = from.0.split_at_checked(length as usize)?;
            from.0 = rest;
            made.files.push(std::ffi::OsStr::from_bytes(path).into());
        }
        Some(made)
    }
}

fn words(space: Space) -> (u64, u64) {
    match space {
        Space::Task(pid) => (0, u64::from(pid)),
        Space::Shared(id) => (1, id),
    }
}

fn space(kind: u64, id: u64) -> Option<Space> {
    match kind {
        0 => u32::try_from(id).ok().map(Space::Task),
        1 => Some(Space::Shared(id)),
        _ => None,
    }
}

struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u64; N]> {
        let (head, rest) = self.0.split_at_checked(8 * N)?;
        self.0 = rest;
        let (words, _) = head.as_chunks::<8>();
        Some(std::array::from_fn(|at| u64::from_le_bytes(words[at])))
    }
}

/// The files of an image's pages, open.
#[derive(Debug)]
pub struct OpenFiles {
    files: Vec<Windows>,
    spaces: HashMap<Space, Vec<Piece>>,
}

impl OpenFiles {
    fn piece(&self, space: Space, at: u64) -> Option<Piece> {
        let pieces = self.spaces.get(&space)?;
        let next = pieces.partition_point(|piece| piece.start <= at);
        next.checked_sub(1).map(|index| pieces[index]).filter(|piece| at < piece.end)
    }
}

impl PageSource for OpenFiles {
    fn pages<'a>(&'a self, space: Space, start: u64, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        let mut done = 0;
        while done < buffer.len() {
            let at = start + done as u64;
            let Some(piece) = self.piece(space, at) else { return Ok(None) };
            let length = ((piece.end - at) as usize).min(buffer.len() - done);
            let offset = piece.offset + (at - piece.start);
            if piece.file == ZERO {
                buffer[done..done + length].fill(0);
            } else {
                let file = &self.files[piece.file as usize];
                if length == buffer.len()
                    && let Some(view) = file.view(offset, length)
                {
                    return Ok(Some(view));
                }
                file.read(offset, &mut buffer[done..done + length])?;
            }
            done += length;
        }
        Ok(Some(buffer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PAGE_SIZE;

    #[test]
    fn a_description_comes_back_as_written_and_a_damaged_one_is_refused() {
        let extent = |start, pages| Extent { start: start * PAGE_SIZE, pages };
        let mut files = PageFiles::default();
        files.add(Space::Task(7), extent(1, 2), Some((Path::new("/a"), 4096)));
        files.add(Space::Task(7), extent(5, 1), None);
        files.add(Space::Shared(9), extent(1, 1), Some((Path::new("/b"), 0)));
        files.set_hot(vec![(Space::Task(7), extent(2, 1))]);
        let bytes = files.encode();
        assert_eq!(PageFiles::decode(&bytes), Some(files));
        assert_eq!(PageFiles::decode(&bytes[..bytes.len() - 1]), None);
        assert_eq!(PageFiles::decode(&[0xff; 64]), None);
    }
}
