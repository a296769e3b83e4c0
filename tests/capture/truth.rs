//! What a frozen tree holds, read from it by other means than the capturer's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    os::unix::fs::FileExt,
};

use standin::{
    model::{Extent, PAGE_SIZE, Space},
    store::View,
    wire::message::Manifest,
    workload::sandbox::Sandbox,
};

/// The pages of a manifest as the tree held them.
pub(crate) struct Truth {
    pages: Vec<(Space, Extent, Vec<u8>)>,
    /// Pages that the tree has and the manifest does not name.
    pub(crate) uncovered: Vec<String>,
    /// CRIU has sent the pages itself. It has the threads run code of its own once more after that, and then the kernel
    /// writes to each thread's `struct rseq` on which processor it is; a restored thread gets that anew.
    pub(crate) sent_by_criu: bool,
    tasks: BTreeMap<u32, Task>,
}

/// A line of /proc/PID/maps.
struct Line {
    start: u64,
    end: u64,
    shared: bool,
    offset: u64,
    inode: u64,
    path: String,
}

/// A task of the tree, and its mappings.
struct Task {
    pid: u32,
    lines: Vec<Line>,
    memory: File,
}

impl Truth {
    /// Reads all pages of a manifest from the frozen tree in a sandbox.
    pub(crate) fn read(sandbox: &Sandbox, manifest: &Manifest) -> Self {
        let pids = sandbox.keeper().cgroup().pids().unwrap();
        let tasks: BTreeMap<u32, Task> = pids.into_iter().filter_map(Task::open).collect();
        let mut pages = Vec::new();
        for map in &manifest.spaces {
            for extent in &map.extents {
                pages.push((map.space, *extent, content(&tasks, map.space, *extent)));
            }
        }
        let mut uncovered = Vec::new();
        for (inner, task) in &tasks {
            let listed = manifest.spaces.iter().find(|map| map.space == Space::Task(*inner));
            task.uncovered(listed.map_or(&[], |map| &map.extents), &mut uncovered);
        }
        Self { pages, uncovered, sent_by_criu: false, tasks }
    }

    /// Whether two pages differ in one `struct rseq` (linux/rseq.h) and there in the number of the processor alone.
    fn differs_in_rseq_alone(&self, truth: &[u8], found: &[u8]) -> bool {
        const ALIGNMENT: usize = 32;
        let differs = |at: &usize| truth[*at] != found[*at];
        let Some(at) = (0..truth.len()).find(differs) else { return true };
        let base = at - at % ALIGNMENT;
        let is_sane = |page: &[u8]| page[base..base + 4] == page[base + 4..base + 8];
        // cpu_id_start, cpu_id; behind rseq_cs and flags: node_id, mm_cid.
        let is_the_kernels = |at: usize| matches!(at - base, 0..8 | 20..28);
        self.sent_by_criu
            && is_sane(truth)
            && is_sane(found)
            && (at..truth.len()).filter(differs).all(is_the_kernels)
    }

    /// What is mapped at an address.
    fn name_of(&self, space: Space, addr: u64) -> &str {
        let Space::Task(inner) = space else { return "" };
        let lines = self.tasks.get(&inner).map_or(&[][..], |task| &task.lines);
        lines.iter().find(|line| line.start <= addr && addr < line.end).map_or("", |line| &line.path)
    }

    /// Number of tasks, and of shared objects.
    pub(crate) fn spaces(&self) -> (usize, usize) {
        let spaces: BTreeSet<Space> = self.pages.iter().map(|(space, ..)| *space).collect();
        let tasks = spaces.iter().filter(|space| matches!(space, Space::Task(_))).count();
        (tasks, spaces.len() - tasks)
    }

    /// Number of pages.
    pub(crate) fn count(&self) -> u64 {
        self.pages.iter().map(|(_, extent, _)| extent.pages).sum()
    }

    /// The pages that a view of the store holds otherwise.
    pub(crate) fn mismatches(&self, view: &View) -> Vec<String> {
        let mut held = 0;
        view.for_each_extent(|_, extent| held += extent.pages);
        let mut wrong = Vec::new();
        if held != self.count() {
            wrong.push(format!("{held} pages are held, {} should be", self.count()));
        }
        for (space, extent, truth) in &self.pages {
            let mut found = vec![0; truth.len()];
            view.read_pages(*space, extent.start, &mut found).unwrap();
            let pages = truth.chunks(PAGE_SIZE as usize).zip(found.chunks(PAGE_SIZE as usize));
            let differ = pages
                .enumerate()
                .filter(|(_, (truth, found))| truth != found && !self.differs_in_rseq_alone(truth, found));
            wrong.extend(differ.map(|(at, (truth, found))| {
                let addr = extent.start + at as u64 * PAGE_SIZE;
                let first = truth.iter().zip(found).position(|(truth, found)| truth != found);
                let last = truth.iter().zip(found).rposition(|(truth, found)| truth != found);
                let name = self.name_of(*space, addr);
                let word = |page: &[u8]| first.and_then(|at| page[at..].iter().take(8).max().copied());
                format!(
                    "{space:?} {addr:#x} from byte {first:?} to {last:?}: at most {:x?} and not {:x?}, {name}",
                    word(found),
                    word(truth)
                )
            }));
        }
        wrong
    }
}

fn content(tasks: &BTreeMap<u32, Task>, space: Space, extent: Extent) -> Vec<u8> {
    let mut bytes = vec![0; extent.bytes() as usize];
    match space {
        Space::Task(inner) => {
            let task = tasks.get(&inner).unwrap_or_else(|| panic!("no task has pid {inner} inside"));
            task.memory.read_exact_at(&mut bytes, extent.start).unwrap();
        }
        Space::Shared(id) => {
            for (at, page) in
                (extent.start..).step_by(PAGE_SIZE as usize).zip(bytes.chunks_mut(PAGE_SIZE as usize))
            {
                let (task, address) = tasks
                    .values()
                    .find_map(|task| Some((task, task.address_of(id, at)?)))
                    .unwrap_or_else(|| panic!("shared object {id} has no mapping of {at:#x}"));
                task.memory.read_exact_at(page, address).unwrap();
            }
        }
    }
    bytes
}

impl Task {
    /// With its pid inside; none for one that has ended.
    fn open(pid: u32) -> Option<(u32, Self)> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        let inner = pids.split_ascii_whitespace().last()?.parse().ok()?;
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
        let lines: Vec<Line> = maps.lines().map(Line::parse).collect();
        if lines.is_empty() {
            return None;
        }
        let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
        Some((inner, Self { pid, lines, memory }))
    }

    /// Where it has mapped an offset of a shared object.
    fn address_of(&self, id: u64, at: u64) -> Option<u64> {
        let holds = |line: &&Line| {
            line.shared
                && line.inode == id
                && (line.offset..line.offset + line.end - line.start).contains(&at)
        };
        self.lines.iter().find(holds).map(|line| line.start + at - line.offset)
    }

    /// Private pages that hold something of their own and are not listed.
    fn uncovered(&self, listed: &[Extent], out: &mut Vec<String>) {
        const PRESENT_OR_SWAPPED: u64 = 3 << 62;
        const OF_FILE: u64 = 1 << 61;
        /// Since Linux 6.15: a guard region's, which holds nothing and cannot be read.
        const GUARD: u64 = 1 << 58;
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid)).unwrap();
        let private = self.lines.iter().filter(|line| !line.shared && !line.path.starts_with("[v"));
        for line in private {
            let mut entries = vec![0; ((line.end - line.start) / PAGE_SIZE * 8) as usize];
            pagemap.read_exact_at(&mut entries, line.start / PAGE_SIZE * 8).unwrap();
            let addresses = (line.start..line.end).step_by(PAGE_SIZE as usize);
            for (address, entry) in addresses.zip(entries.chunks_exact(8)) {
                let entry = u64::from_ne_bytes(entry.try_into().unwrap());
                let own = entry & PRESENT_OR_SWAPPED != 0
                    && entry & GUARD == 0
                    && (line.inode == 0 || entry & OF_FILE == 0);
                let behind = listed.partition_point(|extent| extent.start <= address);
                let is_listed = behind > 0 && address < listed[behind - 1].end();
                if own && !is_listed && self.differs(line, address) {
                    out.push(format!("pid {} {address:#x} of {}", self.pid, line.path));
                }
            }
        }
    }

    /// Whether a page holds anything but what a new mapping in its place would: the file's content, or zeroes.
    fn differs(&self, line: &Line, address: u64) -> bool {
        let (mut page, mut plain) = (vec![0; PAGE_SIZE as usize], vec![0; PAGE_SIZE as usize]);
        self.memory.read_exact_at(&mut page, address).unwrap();
        if line.inode != 0 {
            let file = File::open(format!("/proc/{}/root{}", self.pid, line.path)).unwrap();
            let _ = file.read_at(&mut plain, line.offset + address - line.start).unwrap();
        }
        page != plain
    }
}

impl Line {
    fn parse(line: &str) -> Self {
        let mut fields = line.splitn(6, ' ');
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let (start, end) = fields.next().unwrap().split_once('-').unwrap();
        let shared = fields.next().unwrap().ends_with('s');
        let offset = hex(fields.next().unwrap());
        let inode = fields.nth(1).unwrap().parse().unwrap();
        let path = fields.next().unwrap_or_default().trim().to_owned();
        Self { start: hex(start), end: hex(end), shared, offset, inode, path }
    }
}
