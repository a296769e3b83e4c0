//! Writes to the arena's memory that the kernel makes: by the page cache, by a device, by a pipe, by another process' way.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::Path,
};

use crate::{
    arena::{Arena, FILE_PAGES, Slot, file_stamp, page_of},
    broken,
    random::Random,
    sys::{self, PAGE},
};

/// The file whose pages are read and mapped: each holds what its stamp says.
pub(crate) fn make_file(path: &Path) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    (0..FILE_PAGES).try_for_each(|page| file.write_all(&page_of(file_stamp(page))))?;
    // The device is read, too.
    file.sync_all()
}

pub(crate) struct Kernel {
    pub(crate) file: File,
    /// Opened with O_DIRECT; not every file system has that.
    direct: Option<File>,
    pipe: (OwnedFd, OwnedFd),
}

impl Kernel {
    pub(crate) fn new(path: &Path) -> Self {
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).ok();
        Self {
            file: File::open(path).expect("the file was made"),
            direct,
            pipe: sys::pipe().expect("a pipe"),
        }
    }

    /// In a child: its data must not meet the parent's in one pipe.
    pub(crate) fn after_fork(&mut self) {
        self.pipe = sys::pipe().expect("a pipe");
    }

    pub(crate) fn write(&self, arena: &mut Arena, random: &mut Random) {
        let range = Arena::range(random);
        let from = random.below(FILE_PAGES);
        let most = range.len().min(FILE_PAGES - from);
        let range = arena.run(range.start, most, Slot::writable);
        if range.is_empty() {
            return;
        }
        let at = arena.address(range.start);
        match random.below(6) {
            0 | 1 => {
                let file = &self.file;
                arena.wrote(range.clone(), |page| file_stamp(from + page));
                all("pread", &sys::read_at(file, from * PAGE, at, range.len() * PAGE), range.len());
            }
            2 | 3 => {
                let file = self.direct.as_ref().unwrap_or(&self.file);
                arena.wrote(range.clone(), |page| file_stamp(from + page));
                all(
                    "pread of O_DIRECT",
                    &sys::read_at(file, from * PAGE, at, range.len() * PAGE),
                    range.len(),
                );
            }
            4 => {
                arena.wrote(range.start..range.start + 1, |_| file_stamp(from));
                let spliced = sys::splice(&self.file, from * PAGE, &self.pipe, at);
                spliced.unwrap_or_else(|error| broken(&format!("splice: {error}")));
            }
            _ => {
                let len = range.len().min(16);
                let stamp = arena.new_stamp();
                let bytes: Vec<u8> = (0..len).flat_map(|_| page_of(stamp)).collect();
                arena.wrote(range.start..range.start + len, |_| stamp);
                all("process_vm_writev", &sys::write_remotely(&bytes, at), len);
            }
        }
    }
}

fn all(what: &str, done: &std::io::Result<usize>, pages: usize) {
    if !matches!(done, Ok(bytes) if *bytes == pages * PAGE) {
        broken(&format!("{what} of {pages} pages: {done:?}"));
    }
}
