//! Files as memory, so that the kernel copies a page straight from where it lies.
//!
//! A file of pages has each at its own address, and so may be as long as an address space: only windows of it are mapped,
//! each when it is first asked for.

use std::{fs::File, io, os::unix::fs::FileExt as _, sync::OnceLock};

use memmap2::{Mmap, MmapOptions};

/// What is mapped at once: 4 TiB of memory make as many mappings as a process may have.
const WINDOW_BYTES: u64 = 64 << 20;

/// A file, and those of its windows that have pages.
#[derive(Debug)]
pub(super) struct Windows {
    file: File,
    bytes: u64,
    /// By their number, in order.
    maps: Vec<(u64, OnceLock<Mmap>)>,
}

impl Windows {
    /// Of a file whose pages lie in these ranges of offsets.
    pub(super) fn new(file: File, ranges: &[(u64, u64)]) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        let mut numbers: Vec<u64> = Vec::new();
        for (start, end) in ranges {
            for number in start / WINDOW_BYTES..end.div_ceil(WINDOW_BYTES) {
                // Runs come nearly in order.
                if numbers.last() != Some(&number) {
                    numbers.push(number);
                }
            }
        }
        numbers.sort_unstable();
        numbers.dedup();
        let maps = numbers.into_iter().map(|number| (number, OnceLock::new())).collect();
        Ok(Self { file, bytes, maps })
    }

    /// Where these bytes lie, if one window has them all.
    ///
    /// They are for the kernel alone to read: should the disk fail, it says so (EFAULT), and whoever else reads ends.
    pub(super) fn view(&self, offset: u64, length: usize) -> Option<&[u8]> {
        let number = offset / WINDOW_BYTES;
        let index = self.maps.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        let window = &self.maps[index].1;
        let map = if let Some(map) = window.get() {
            map
        } else {
            let map = self.map(number)?;
            window.get_or_init(|| map)
        };
        let start = (offset % WINDOW_BYTES) as usize;
        map.get(start..start + length)
    }

    fn map(&self, number: u64) -> Option<Mmap> {
        let start = number * WINDOW_BYTES;
        let length = self.bytes.checked_sub(start)?.min(WINDOW_BYTES) as usize;
        let mut options = MmapOptions::new();
        // SAFETY: nobody writes to the files of an image while its pages are served, and only the kernel reads the map.
        unsafe { options.offset(start).len(length).map(&self.file) }.ok()
    }

    /// Reads bytes, wherever they lie.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_what_the_file_has_there_and_none_spans_two_windows() {
        let file = nix::sys::memfd::memfd_create(c"windows", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(file);
        let page = 4096;
        file.write_all_at(&[7; 4096], WINDOW_BYTES - page).unwrap();
        file.write_all_at(&[8; 4096], WINDOW_BYTES).unwrap();
        let ranges =
            [(WINDOW_BYTES - page, WINDOW_BYTES + page), (5 * WINDOW_BYTES, 5 * WINDOW_BYTES + page)];
        let windows = Windows::new(file, &ranges).unwrap();
        assert_eq!(windows.maps.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 1, 5]);
        assert_eq!(windows.view(WINDOW_BYTES - page, 4096).unwrap(), [7; 4096]);
        assert_eq!(windows.view(WINDOW_BYTES, 4096).unwrap(), [8; 4096]);
        assert_eq!(windows.view(WINDOW_BYTES - page, 8192), None);
        // A file that is shorter than its description says.
        assert_eq!(windows.view(5 * WINDOW_BYTES, 4096), None);
        assert_eq!(windows.view(3 * WINDOW_BYTES, 4096), None);
        let mut both = [0; 8192];
        windows.read(WINDOW_BYTES - page, &mut both).unwrap();
        assert_eq!((both[0], both[4096]), (7, 8));
        assert!(windows.read(5 * WINDOW_BYTES, &mut both).is_err());
    }
}
