//! The parent directory: what makes CRIU write holes in place of pages.
//!
//! With `track_mem`, a parent directory and a page server that says "this task has a parent", CRIU
//! asks of each page whether it is soft-dirty, and writes the clean ones as holes. The bridge says
//! that all are clean, so the holes are the list of the pages the image must hold.
//!
//! Of the parent directory itself CRIU 4.x then reads `inventory.img` alone, and of that one field:
//! `dump_uptime`, the time of the parent dump. A task that started later cannot be in it, has its
//! pid by reuse, and is sent whole (`detect_pid_reuse` in mem.c; without the file it fails). We
//! know each task by the tracker and not by its pid, and a task the tracker has not seen reads as
//! all dirty. So one constant inventory, as of the end of time, serves every epoch, the first one
//! included: every task comes as holes, and no earlier epoch's files are needed.
//!
//! What comes as pages even so, because CRIU knows better than to trust a parent: mappings without
//! PROT_READ, huge pages and AIO rings (`generate_vma_iovs`), and all shared memory, if the page
//! server says that shared memory has no parent.

use std::{fs, io, path::Path};

use super::images;

/// Name of the parent directory, made beside the images directories: CRIU takes a path relative to
/// the images directory.
pub const DIRECTORY: &str = "parent";

/// Makes the parent directory at `path`; to do so again changes nothing.
pub fn create(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    let file = path.join("inventory.img");
    let bytes = images::inventory(u64::MAX);
    if fs::read(&file).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    let unfinished = path.join("inventory.img.new");
    fs::write(&unfinished, bytes)?;
    fs::rename(unfinished, file)
}
