//! What a standby would hold: built from passes and reads, compared with the truth.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
};

use standin::{
    memory::{MappingKind, Pages, Tracker},
    model::Extent,
};

const PAGE: u64 = 4096;

#[derive(Default)]
pub(crate) struct Replica {
    held: BTreeMap<u64, Vec<u8>>,
    pub(crate) checked: usize,
    pages: Pages,
}

impl Replica {
    /// One pass and read; gives the pages of the pass. `frozen`: nothing may be unreadable.
    pub(crate) fn follow(&mut self, tracker: &mut Tracker, frozen: bool) -> Vec<Extent> {
        let mut dirty = Vec::new();
        tracker.take_dirty(&mut dirty).unwrap();
        tracker.memory().read(&dirty, &mut self.pages).unwrap();
        if frozen {
            assert_eq!(self.pages.unread(), [], "pages of a frozen process");
        }
        let starts = self.pages.extents().iter().flat_map(|e| (0..e.pages).map(|i| e.start + i * PAGE));
        for (start, page) in starts.zip(self.pages.data().chunks(PAGE as usize)) {
            self.held.insert(start, page.to_vec());
        }
        dirty
    }

    /// Compares every page that CRIU would put into an image of the frozen process, then forgets the others,
    /// as a standby does with pages that an image does not hold.
    pub(crate) fn check(&mut self, tracker: &Tracker) {
        let pid = tracker.pid();
        let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
        let image = image_pages(tracker);
        let mut page = vec![0; PAGE as usize];
        for start in &image {
            memory.read_exact_at(&mut page, *start).unwrap();
            let held = self.held.get(start);
            let verdict = if held.is_none() { "missing" } else { "old" };
            assert!(
                held == Some(&page),
                "page {start:#x} is {verdict} in the replica: {}",
                line_of(pid, *start)
            );
        }
        self.checked += image.len();
        check_listing(tracker, &image, &memory);
        self.held.retain(|start, _| image.binary_search(start).is_ok());
    }
}

/// The tracker's list of what anonymous mappings hold is the kernel's, but for zeroes.
fn check_listing(tracker: &Tracker, image: &[u64], memory: &File) {
    let mut page = vec![0; PAGE as usize];
    for mapping in tracker.mappings().filter(|mapping| mapping.kind == MappingKind::Anonymous) {
        let Some(listed) = tracker.listed(mapping.extent) else { continue };
        let listed: Vec<u64> = listed.iter().flat_map(|e| (0..e.pages).map(|i| e.start + i * PAGE)).collect();
        let held = image.iter().filter(|start| (mapping.extent.start..mapping.extent.end()).contains(start));
        for start in held.clone().filter(|start| listed.binary_search(start).is_err()) {
            memory.read_exact_at(&mut page, *start).unwrap();
            assert!(page.iter().all(|byte| *byte == 0), "page {start:#x} is not listed");
        }
        for start in &listed {
            assert!(image.binary_search(start).is_ok(), "page {start:#x} is listed and does not exist");
        }
    }
}

/// CRIU's rule: present or swapped private pages, of file mappings only those copied; all of the vDSO.
fn image_pages(tracker: &Tracker) -> Vec<u64> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;
    /// Since Linux 6.15: of a guard region.
    const GUARD: u64 = 1 << 58;
    let pagemap = File::open(format!("/proc/{}/pagemap", tracker.pid())).unwrap();
    let mut image = Vec::new();
    for mapping in tracker.mappings() {
        let extent = mapping.extent;
        let mut entries = vec![0; extent.pages as usize * 8];
        pagemap.read_exact_at(&mut entries, extent.start / PAGE * 8).unwrap();
        for (i, entry) in entries.chunks_exact(8).enumerate() {
            let entry = u64::from_ne_bytes(entry.try_into().unwrap());
            let wanted = match mapping.kind {
                _ if entry & GUARD != 0 => false,
                MappingKind::Anonymous => entry & (PRESENT | SWAPPED) != 0,
                MappingKind::PrivateFile => {
                    entry & SWAPPED != 0 || entry & PRESENT != 0 && entry & OF_FILE == 0
                }
                MappingKind::Vdso => true,
                MappingKind::Shared | MappingKind::Kernel => false,
            };
            if wanted {
                image.push(extent.start + i as u64 * PAGE);
            }
        }
    }
    image
}

fn line_of(pid: i32, page: u64) -> String {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let holds = |line: &&str| {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split_once(' ').unwrap().0;
        (u64::from_str_radix(start, 16).unwrap()..u64::from_str_radix(end, 16).unwrap()).contains(&page)
    };
    maps.lines().find(holds).unwrap_or("not mapped").to_owned()
}

/// Whether a list holds a page.
pub(crate) fn holds(extents: &[Extent], page: u64) -> bool {
    extents.iter().any(|extent| (extent.start..extent.end()).contains(&page))
}
