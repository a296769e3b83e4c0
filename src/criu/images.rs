//! CRIU's image files, as far as we read or write them: little-endian magics, then entries of a
//! u32 length and a protobuf message (images/*.proto of CRIU 4.x; field numbers are theirs).
//!
//! Pure but for [`read`], which reads one file of a directory under a size limit.

pub mod connections;
pub mod namespaces;

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use prost::Message;

use crate::model::{Extent, PAGE_SIZE, Space};

/// Largest image file that is read whole: a page map of 512 GiB in scattered pages.
pub const FILE_BYTES_MAX: u64 = 4 << 30;

const COMMON_MAGIC: u32 = 0x5456_4319;
const INVENTORY_MAGIC: u32 = 0x5831_3116;
const PSTREE_MAGIC: u32 = 0x5027_3030;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
const CORE_MAGIC: u32 = 0x5505_3847;
const CGROUP_MAGIC: u32 = 0x5938_3330;
const MM_MAGIC: u32 = 0x5749_2820;

/// Why an image is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file could not be read.
    #[error("reading the image {name} failed: {source}")]
    Read {
        /// Name of the file.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// It is something else or damaged.
    #[error("the image {name} is damaged or from an unknown CRIU: {why}. A full resync replaces it")]
    Damaged {
        /// Name of the file.
        name: String,
        /// What is wrong.
        why: String,
    },
}

/// Name of the page map of a space.
pub fn pagemap_file(space: Space) -> String {
    match space {
        Space::Task(pid) => format!("pagemap-{pid}.img"),
        Space::Shared(id) => format!("pagemap-shmem-{id}.img"),
    }
}

/// Name of the file of pages that a page map with this `pages_id` refers to.
pub fn pages_file(pages_id: u32) -> String {
    format!("pages-{pages_id}.img")
}

/// Name of a task's memory mappings.
pub fn mm_file(pid: u32) -> String {
    format!("mm-{pid}.img")
}

/// Name of a thread's registers and more.
pub fn core_file(thread: u32) -> String {
    format!("core-{thread}.img")
}

/// Name of the process tree.
pub const PSTREE_FILE: &str = "pstree.img";

/// Reads the file `name` of `directory`, at most [`FILE_BYTES_MAX`] of it.
pub fn read(directory: &Path, name: &str) -> Result<Vec<u8>, ImageError> {
    let failed = |source| ImageError::Read { name: name.to_owned(), source };
    let file = File::open(directory.join(name)).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    if length > FILE_BYTES_MAX {
        return Err(damaged(name, format!("{length} bytes are more than {FILE_BYTES_MAX}")));
    }
    let mut bytes = Vec::with_capacity(length as usize);
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn damaged(name: &str, why: impl Into<String>) -> ImageError {
    ImageError::Damaged { name: name.to_owned(), why: why.into() }
}

/// Entries of an image, one after the other, borrowed from its bytes.
struct Entries<'a> {
    name: &'a str,
    rest: &'a [u8],
}

impl<'a> Entries<'a> {
    fn open(name: &'a str, bytes: &'a [u8], magic: u32) -> Result<Self, ImageError> {
        let wanted = [COMMON_MAGIC.to_le_bytes(), magic.to_le_bytes()].concat();
        let rest = bytes.strip_prefix(wanted.as_slice());
        Ok(Self { name, rest: rest.ok_or_else(|| damaged(name, "it begins with another magic"))? })
    }

    fn next<M: Message + Default>(&mut self) -> Result<Option<M>, ImageError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let cut = self
            .rest
            .split_first_chunk::<4>()
            .and_then(|(length, rest)| rest.split_at_checked(u32::from_le_bytes(*length) as usize));
        let (entry, rest) = cut.ok_or_else(|| damaged(self.name, "it ends within an entry"))?;
        self.rest = rest;
        M::decode(entry).map(Some).map_err(|error| damaged(self.name, error.to_string()))
    }

    fn first<M: Message + Default>(&mut self) -> Result<M, ImageError> {
        self.next()?.ok_or_else(|| damaged(self.name, "it has no entry"))
    }
}

fn push_entry(out: &mut Vec<u8>, entry: &impl Message) {
    out.extend((entry.encoded_len() as u32).to_le_bytes());
    // Writing to a Vec does not run out of space.
    out.extend(entry.encode_to_vec());
}

// ---- inventory ----

#[derive(Clone, PartialEq, Message)]
struct InventoryEntry {
    #[prost(uint32, required, tag = "1")]
    img_version: u32,
    #[prost(uint64, optional, tag = "8")]
    dump_uptime: Option<u64>,
}

/// An inventory of a dump at `dump_uptime` (microseconds since boot) and nothing else: enough for a
/// parent directory.
pub fn inventory(dump_uptime: u64) -> Vec<u8> {
    // The inventory alone has no common magic; it says with which version others have one.
    let mut out = INVENTORY_MAGIC.to_le_bytes().to_vec();
    push_entry(&mut out, &InventoryEntry { img_version: 2, dump_uptime: Some(dump_uptime) });
    out
}

/// The `dump_uptime` of an inventory.
pub fn inventory_uptime(bytes: &[u8]) -> Result<Option<u64>, ImageError> {
    let name = "inventory.img";
    let rest = bytes.strip_prefix(&INVENTORY_MAGIC.to_le_bytes());
    let rest = rest.ok_or_else(|| damaged(name, "it begins with another magic"))?;
    Ok(Entries { name, rest }.first::<InventoryEntry>()?.dump_uptime)
}

// ---- process tree ----

#[derive(Clone, PartialEq, Message)]
struct PstreeEntry {
    #[prost(uint32, required, tag = "1")]
    pid: u32,
    #[prost(uint32, required, tag = "2")]
    ppid: u32,
    #[prost(uint32, required, tag = "3")]
    pgid: u32,
    #[prost(uint32, required, tag = "4")]
    sid: u32,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    threads: Vec<u32>,
}

/// A task of the tree; all ids are of the workload's pid namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its pid.
    pub pid: u32,
    /// Its parent's pid; 0 for the root.
    pub parent: u32,
    /// Its threads, itself included; a zombie has none but itself.
    pub threads: Vec<u32>,
}

/// Reads the process tree, the root first.
///
/// CRIU looks at no threads of a zombie, and writes as the one that it has whatever stood in its memory (seen with 4.2.1).
pub fn pstree(bytes: &[u8]) -> Result<Vec<Task>, ImageError> {
    let mut entries = Entries::open(PSTREE_FILE, bytes, PSTREE_MAGIC)?;
    let mut tasks = Vec::new();
    while let Some(entry) = entries.next::<PstreeEntry>()? {
        let PstreeEntry { pid, ppid: parent, threads, .. } = entry;
        let threads = if threads.contains(&pid) { threads } else { vec![pid] };
        tasks.push(Task { pid, parent, threads });
    }
    Ok(tasks)
}

// ---- mappings ----

#[derive(Clone, PartialEq, Message)]
struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint64, required, tag = "4")]
    shmid: u64,
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    #[prost(uint32, required, tag = "7")]
    status: u32,
    #[prost(uint64, optional, tag = "9")]
    madv: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct MmEntry {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaEntry>,
}

/// A memory mapping of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// Address behind the last.
    pub end: u64,
    /// Shared object, for shared mappings.
    pub shmid: u64,
    /// `MAP_*` flags of mmap.
    pub flags: u32,
    /// CRIU's `VMA_*` bits.
    pub status: u32,
    /// The `MADV_*` that hold for it, a bit each.
    pub madvised: u64,
}

/// CRIU's `VMA_AREA_VSYSCALL | VMA_AREA_VDSO | VMA_AREA_VVAR` (include/image.h).
const STATUS_OF_KERNEL: u32 = 1 << 2 | 1 << 3 | 1 << 12;

impl Vma {
    /// Whether its pages may be restored lazily: `vma_entry_can_be_lazy` of CRIU, which is what
    /// its restorer registers with userfaultfd.
    pub fn can_be_lazy(&self) -> bool {
        let wanted = (libc::MAP_ANONYMOUS | libc::MAP_PRIVATE) as u32;
        let barred = (libc::MAP_LOCKED | libc::MAP_HUGETLB) as u32;
        self.flags & wanted == wanted && self.flags & barred == 0 && self.status & STATUS_OF_KERNEL == 0
    }

    /// Whether a forked child finds it empty: it must not be brought the pages that its parent lacks.
    fn is_wiped_on_fork(&self) -> bool {
        self.madvised & 1 << libc::MADV_WIPEONFORK != 0
    }
}

/// Reads a task's mappings, in the order of their addresses.
pub fn mappings(name: &str, bytes: &[u8]) -> Result<Vec<Vma>, ImageError> {
    let entry: MmEntry = Entries::open(name, bytes, MM_MAGIC)?.first()?;
    let vmas: Vec<Vma> = entry
        .vmas
        .into_iter()
        .map(|v| Vma {
            start: v.start,
            end: v.end,
            shmid: v.shmid,
            flags: v.flags,
            status: v.status,
            madvised: v.madv.unwrap_or(0),
        })
        .collect();
    let bounded = |vma: &Vma| {
        vma.start < vma.end && vma.start.is_multiple_of(PAGE_SIZE) && vma.end.is_multiple_of(PAGE_SIZE)
    };
    if vmas.iter().all(bounded) && vmas.is_sorted_by(|a, b| a.end <= b.start) {
        Ok(vmas)
    } else {
        Err(damaged(name, "its mappings are not apart and in order"))
    }
}

// ---- registers ----

#[derive(Clone, PartialEq, Message)]
struct Registers {
    #[prost(uint64, required, tag = "20")]
    sp: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ThreadInfo {
    #[prost(message, optional, tag = "2")]
    registers: Option<Registers>,
}

#[derive(Clone, PartialEq, Message)]
struct CoreEntry {
    #[prost(message, optional, tag = "2")]
    thread: Option<ThreadInfo>,
}

/// The stack pointer of a thread; a zombie has none.
pub fn stack_pointer(name: &str, bytes: &[u8]) -> Result<Option<u64>, ImageError> {
    let core: CoreEntry = Entries::open(name, bytes, CORE_MAGIC)?.first()?;
    Ok(core.thread.and_then(|thread| thread.registers).map(|registers| registers.sp))
}

// ---- page maps ----

#[derive(Clone, PartialEq, Message)]
struct PagemapHead {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, PartialEq, Message)]
struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    #[prost(uint32, required, tag = "2")]
    compat_nr_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

const PE_PARENT: u32 = 1;
const PE_LAZY: u32 = 2;
const PE_PRESENT: u32 = 4;
/// Pages of one entry that we write.
const RUN_PAGES_MAX: u64 = 1 << 18;

/// A run of pages in a page map; its content is the next in the file of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which pages.
    pub extent: Extent,
    /// Whether they may be restored lazily.
    pub lazy: bool,
}

/// The page map of a space in a flat image: every page it names is in its file of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pagemap {
    /// Which file of pages (see [`pages_file`]).
    pub pages_id: u32,
    /// Runs in the order of their addresses, which is also that of their content.
    pub runs: Vec<Run>,
}

impl Pagemap {
    /// Reads a page map; one with pages in a parent image or elsewhere is refused.
    pub fn decode(name: &str, bytes: &[u8]) -> Result<Self, ImageError> {
        let mut entries = Entries::open(name, bytes, PAGEMAP_MAGIC)?;
        let pages_id = entries.first::<PagemapHead>()?.pages_id;
        let mut runs = Vec::new();
        while let Some(entry) = entries.next::<PagemapEntry>()? {
            // Without flags (CRIU before 2.x) an entry was present or, by another field, in the parent.
            let parent = if entry.in_parent == Some(true) { PE_PARENT } else { 0 };
            let flags = entry.flags.unwrap_or(PE_PRESENT) | parent;
            if flags & PE_PRESENT == 0 || flags & PE_PARENT != 0 {
                return Err(damaged(name, "it refers to pages outside this image"));
            }
            let pages = entry.nr_pages.unwrap_or(u64::from(entry.compat_nr_pages));
            let end = pages.checked_mul(PAGE_SIZE).and_then(|bytes| bytes.checked_add(entry.vaddr));
            if pages == 0 || end.is_none() || !entry.vaddr.is_multiple_of(PAGE_SIZE) {
                return Err(damaged(name, "it has a run of pages that cannot be"));
            }
            let extent = Extent { start: entry.vaddr, pages };
            runs.push(Run { extent, lazy: flags & PE_LAZY != 0 });
        }
        if !runs.is_sorted_by(|a, b| a.extent.end() <= b.extent.start) {
            return Err(damaged(name, "its runs are not apart and in order"));
        }
        Ok(Self { pages_id, runs })
    }

    /// Writes a page map that CRIU from 4.0 on reads: older ones look at the 32-bit number of
    /// pages alone, and all keep some counts of pages in an `int`, so a long run is cut.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = [COMMON_MAGIC.to_le_bytes(), PAGEMAP_MAGIC.to_le_bytes()].concat();
        push_entry(&mut out, &PagemapHead { pages_id: self.pages_id });
        for run in &self.runs {
            let flags = PE_PRESENT | if run.lazy { PE_LAZY } else { 0 };
            let mut start = run.extent.start;
            while start < run.extent.end() {
                let pages = ((run.extent.end() - start) / PAGE_SIZE).min(RUN_PAGES_MAX);
                let entry = PagemapEntry {
                    vaddr: start,
                    compat_nr_pages: pages as u32,
                    in_parent: None,
                    flags: Some(flags),
                    nr_pages: Some(pages),
                };
                push_entry(&mut out, &entry);
                start += pages * PAGE_SIZE;
            }
        }
        out
    }
}

// ---- cgroups ----

#[derive(Clone, PartialEq, Message)]
struct CgroupEntry {
    #[prost(message, repeated, tag = "1")]
    sets: Vec<CgroupSet>,
    #[prost(message, repeated, tag = "2")]
    controllers: Vec<CgroupController>,
}

#[derive(Clone, PartialEq, Message)]
struct CgroupSet {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(message, repeated, tag = "2")]
    members: Vec<CgroupMember>,
}

#[derive(Clone, PartialEq, Message)]
struct CgroupMember {
    #[prost(string, required, tag = "1")]
    controller: String,
    #[prost(string, required, tag = "2")]
    path: String,
    /// Bytes of the path that lie outside of the cgroup namespace.
    #[prost(uint32, optional, tag = "3")]
    outside: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct CgroupController {
    #[prost(string, repeated, tag = "1")]
    names: Vec<String>,
}

/// An image of cgroups with all tasks in one, which is there on the restoring host: of cgroup v2 alone, and without anything
/// to be set. If their cgroup namespace was one of their own, that cgroup becomes its root.
pub fn move_cgroups(name: &str, bytes: &[u8], path: &str) -> Result<Vec<u8>, ImageError> {
    let mut image = Entries::open(name, bytes, CGROUP_MAGIC)?.first::<CgroupEntry>()?;
    for set in &mut image.sets {
        let is_own = set.members.iter().any(|member| member.outside.is_some());
        let outside = is_own.then_some(path.len() as u32);
        set.members = vec![CgroupMember { controller: String::new(), path: path.to_owned(), outside }];
    }
    // The one hierarchy of v2 has no name.
    image.controllers = vec![CgroupController { names: vec![String::new()] }];
    let mut out = [COMMON_MAGIC.to_le_bytes(), CGROUP_MAGIC.to_le_bytes()].concat();
    push_entry(&mut out, &image);
    Ok(out)
}

// ---- which pages may come late ----

/// The parts of a task's memory whose pages may be restored lazily, in order: its lazy mappings
/// but for the pages that its threads' stack pointers are in.
///
/// CRIU marks such pages when it sends them, but not when it sends holes, so it must be worked out.
/// (CRIU's own `is_stack` means to leave the stack pages out and compares the wrong bits.)
pub fn lazy_extents(vmas: &[Vma], stack_pointers: &[u64]) -> Vec<Extent> {
    let mut stacks: Vec<u64> = stack_pointers.iter().map(|sp| sp - sp % PAGE_SIZE).collect();
    stacks.sort_unstable();
    stacks.dedup();
    let mut extents = Vec::new();
    for vma in vmas.iter().filter(|vma| vma.can_be_lazy() && !vma.is_wiped_on_fork()) {
        let from = stacks.partition_point(|page| *page < vma.start);
        let within = stacks[from..].iter().take_while(|page| **page < vma.end);
        let mut start = vma.start;
        for page in within {
            extents.extend(extent(start, *page));
            start = page + PAGE_SIZE;
        }
        extents.extend(extent(start, vma.end));
    }
    extents
}

/// Cuts the pages of an image (in order) at the borders of the lazy parts, and marks them.
pub fn mark_lazy(present: &[Extent], lazy: &[Extent]) -> Vec<Run> {
    let mut runs = Vec::with_capacity(present.len());
    let mut lazy = lazy.iter().peekable();
    for run in present {
        let mut start = run.start;
        while start < run.end() {
            while lazy.next_if(|part| part.end() <= start).is_some() {}
            let (end, is_lazy) = match lazy.peek() {
                Some(part) if part.start <= start => (part.end(), true),
                Some(part) => (part.start, false),
                None => (u64::MAX, false),
            };
            let end = end.min(run.end());
            runs.extend(extent(start, end).map(|extent| Run { extent, lazy: is_lazy }));
            start = end;
        }
    }
    runs
}

fn extent(start: u64, end: u64) -> Option<Extent> {
    (start < end).then(|| Extent { start, pages: (end - start) / PAGE_SIZE })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vma(start: u64, end: u64, flags: i32) -> Vma {
        Vma { start: start << 12, end: end << 12, shmid: 0, flags: flags as u32, status: 1, madvised: 0 }
    }

    #[test]
    fn cgroups_are_moved_with_the_root_of_their_namespace() {
        let member = |controller: &str, outside| CgroupMember {
            controller: controller.to_owned(),
            path: "/web/standin".to_owned(),
            outside,
        };
        let set = |id, outside| CgroupSet { id, members: vec![member("pids", None), member("", outside)] };
        let controllers = vec![CgroupController { names: vec!["pids".to_owned()] }];
        let image = CgroupEntry { sets: vec![set(2, Some(4)), set(3, None)], controllers };
        let mut bytes = [COMMON_MAGIC.to_le_bytes(), CGROUP_MAGIC.to_le_bytes()].concat();
        push_entry(&mut bytes, &image);

        let moved = move_cgroups("cgroup.img", &bytes, "/there").unwrap();
        let moved =
            Entries::open("cgroup.img", &moved, CGROUP_MAGIC).unwrap().first::<CgroupEntry>().unwrap();
        let there =
            |outside| vec![CgroupMember { controller: String::new(), path: "/there".to_owned(), outside }];
        let expected =
            [CgroupSet { id: 2, members: there(Some(6)) }, CgroupSet { id: 3, members: there(None) }];
        assert_eq!(moved.sets, expected);
        assert!(move_cgroups("cgroup.img", b"something else", "/there").is_err());
    }

    #[test]
    fn stack_pages_files_and_locked_memory_are_not_lazy() {
        let private = libc::MAP_PRIVATE;
        let anonymous = private | libc::MAP_ANONYMOUS;
        let vmas = [
            vma(1, 4, private),
            vma(4, 9, anonymous),
            vma(9, 12, anonymous | libc::MAP_LOCKED),
            vma(12, 14, libc::MAP_SHARED | libc::MAP_ANONYMOUS),
            vma(20, 22, anonymous),
        ];
        let parts = lazy_extents(&vmas, &[0x6010, 0x6ff0, 0x14000, 0x2000]);
        let wanted = [(4, 2), (7, 2), (21, 1)].map(|(s, pages)| Extent { start: s << 12, pages });
        assert_eq!(parts, wanted);
    }

    #[test]
    fn a_zombie_has_no_thread_but_itself() {
        let entry =
            |pid, threads: &[u32]| PstreeEntry { pid, ppid: 1, pgid: 1, sid: 1, threads: threads.to_vec() };
        let entries = [entry(3, &[3, 5]), entry(7, &[1_698_084_144])].map(|entry| entry.encode_to_vec());
        let mut bytes: Vec<u8> =
            [COMMON_MAGIC, PSTREE_MAGIC].into_iter().flat_map(u32::to_le_bytes).collect();
        for entry in entries {
            bytes.extend((entry.len() as u32).to_le_bytes());
            bytes.extend(entry);
        }
        let threads: Vec<Vec<u32>> = pstree(&bytes).unwrap().into_iter().map(|task| task.threads).collect();
        assert_eq!(threads, [vec![3, 5], vec![7]]);
    }

    #[test]
    fn damaged_page_maps_are_refused() {
        let good = Pagemap {
            pages_id: 1,
            runs: vec![Run { extent: Extent { start: 0x1000, pages: 2 }, lazy: false }],
        };
        let bytes = good.encode();
        assert_eq!(Pagemap::decode("p", &bytes).unwrap(), good);
        assert!(Pagemap::decode("p", &bytes[..bytes.len() - 1]).is_err());
        assert!(Pagemap::decode("p", &bytes[4..]).is_err());
        let mut long = bytes.clone();
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Pagemap::decode("p", &long).is_err());
    }

    #[test]
    fn a_long_run_is_cut() {
        let run = |start, pages| Run { extent: Extent { start, pages }, lazy: true };
        let map = Pagemap { pages_id: 1, runs: vec![run(0x1000, 2 * RUN_PAGES_MAX + 5)] };
        let cut = Pagemap::decode("p", &map.encode()).unwrap().runs;
        let bytes = RUN_PAGES_MAX * PAGE_SIZE;
        let parts = [(0, RUN_PAGES_MAX), (bytes, RUN_PAGES_MAX), (2 * bytes, 5)];
        assert_eq!(cut, parts.map(|(from, pages)| run(0x1000 + from, pages)));
    }

    #[test]
    fn the_inventory_says_when_it_was() {
        assert_eq!(inventory_uptime(&inventory(u64::MAX)).unwrap(), Some(u64::MAX));
        assert!(inventory_uptime(b"nonsense").is_err());
    }

    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        prop::collection::vec((0u64..5, 1u64..9), 0..40).prop_map(|steps| {
            let mut at = 0x10;
            let mut out = Vec::new();
            for (gap, pages) in steps {
                at += gap;
                out.push(Extent { start: at << 12, pages });
                at += pages;
            }
            out
        })
    }

    proptest! {
        #[test]
        fn page_maps_come_back_as_written(parts in extents(), lazy in extents(), pages_id: u32) {
            let map = Pagemap { pages_id, runs: mark_lazy(&parts, &lazy) };
            prop_assert_eq!(Pagemap::decode("p", &map.encode()).unwrap(), map);
        }

        #[test]
        fn marking_keeps_every_page_and_marks_those_within(parts in extents(), lazy in extents()) {
            let runs = mark_lazy(&parts, &lazy);
            let pages = |e: &Extent| (e.start..e.end()).step_by(4096);
            let all: Vec<u64> = parts.iter().flat_map(pages).collect();
            let marked: Vec<u64> = runs.iter().flat_map(|run| pages(&run.extent)).collect();
            prop_assert_eq!(all, marked);
            for run in &runs {
                for page in pages(&run.extent) {
                    let within = lazy.iter().any(|part| part.start <= page && page < part.end());
                    prop_assert_eq!(run.lazy, within);
                }
            }
        }
    }
}
