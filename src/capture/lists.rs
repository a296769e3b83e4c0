//! What CRIU is told of the frozen tasks, so that neither it nor the kernel need walk all pages and sockets for it.
//!
//! Written to the directory of CRIU's images when it says that the tree is frozen. CRIU goes on meanwhile; the bridge waits
//! where it comes to need a list that is not there yet (`bridge/lists.c`). All but one are made of the frozen tree, so there
//! is nothing in them to go stale. Each gets its name when it is whole; of what has none CRIU asks the kernel. First the bridge
//! is told which protocols the tree's [sockets] have, or had in the freezes before.
//!
//! - `smaps-PID`: of `/proc/PID/smaps` CRIU uses the lines of the mappings and their flags (parse_smaps in proc_parse.c).
//! - `ours-PID`: mappings whose pages we list. When CRIU asks the kernel which pages such a mapping has, it is told of
//!   the first alone, sends that as a hole, and so says that it wants the mapping in the image. Which pages that are, the
//!   tracker knows ([`Tracker::listed`](crate::memory::Tracker::listed)) or the kernel is asked.
//! - `shared-0`: the inodes of shared memory that [we read](super::shared): to CRIU it has no pages.
//! - `guards-PID`: guard regions, for which CRIU would have the kernel look through all of the memory. The first pass over
//!   the frozen memory meets them; with the ranges that it looked at. CRIU comes to need them before that pass can be
//!   over, so it is told those of the last freeze, if the last pass before this one met the same and the mappings are as
//!   they were then. If the frozen memory has others after all, the epoch fails, and the next ones tell nothing ahead.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
    sync::Arc,
};

use super::{
    frozen::Tracked,
    shared::{Mapped, SharedMemory},
    sockets,
};
use crate::{
    criu::gate::{Gate, Told},
    extents,
    memory::{self, Guards, MappingKind, Task, Vmas},
    model::{Extent, PAGE_SIZE, Space},
};

/// Smaller mappings are not worth it; and CRIU asks for smaller ones together (pmc_fill_cache in pagemap-cache.c).
const OURS_PAGES_MIN: u64 = (2 << 20) / PAGE_SIZE;
/// What the bridge has room for.
const OURS_MAX: usize = 1024;
/// What the bridge has room for: numbers in a list of guard regions.
const GUARD_WORDS_MAX: usize = 4096;

/// Mappings whose pages we list, per task.
pub(super) type Ours = BTreeMap<Space, Vec<Extent>>;

/// What CRIU was told of a frozen tree that is still needed.
#[derive(Default)]
pub(super) struct Listed {
    pub(super) ours: Ours,
    /// Tasks whose guard regions were told ahead, as those of the last freeze.
    pub(super) told_ahead: BTreeSet<Space>,
    /// Shared memory that we read.
    pub(super) shared: Vec<Mapped>,
    /// Which protocols the sockets have.
    pub(super) sockets: sockets::Found,
}

/// What CRIU is told before it is looked at.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Whether guard regions are told before the first pass.
    pub(super) guards: bool,
    /// Of sockets.
    pub(super) protocols: Option<u32>,
}

/// Where the lists of a freeze go.
pub(super) struct Lists<'a> {
    pub(super) dir: PathBuf,
    /// CRIU sees the tasks from the host, whatever their pids inside.
    pub(super) from_host: bool,
    pub(super) gate: Arc<Gate>,
    pub(super) ahead: Ahead,
    /// None where the kernel permits no BPF.
    pub(super) vmas: Option<&'a Vmas>,
}

impl Lists<'_> {
    /// Lists what can be told at once, of all tasks of a frozen tree.
    pub(super) fn write(
        &self,
        tasks: &[Task],
        trackers: &BTreeMap<i32, Tracked>,
        shared: &mut SharedMemory,
    ) -> io::Result<Listed> {
        let living = || tasks.iter().filter(|task| !task.zombie);
        let all_maps: Vec<Vec<u8>> =
            living().map(|task| fs::read(format!("/proc/{}/maps", task.pid))).collect::<Result<_, _>>()?;
        // Before CRIU can have a list of mappings: then it has the task open a socket of its own.
        let mapped = all_maps.iter().any(|maps| sockets::has_mapped(maps));
        let ahead = self.ahead.protocols.is_some();
        let found = if mapped { sockets::ANY } else { sockets::protocols_of(tasks, ahead) };
        if !ahead {
            self.gate.tell(Told::Protocols(found.protocols));
        }
        let pids = living().map(|task| task.pid);
        let shared = shared.find(pids.zip(all_maps.iter().map(Vec::as_slice)));
        if !shared.is_empty() {
            let inodes: Vec<u8> = shared.iter().flat_map(|mapped| mapped.inode.to_ne_bytes()).collect();
            self.put("shared", 0, &inodes)?;
        }
        let mut listed = Listed { shared, sockets: found, ..Listed::default() };
        for (task, maps) in living().zip(&all_maps) {
            let space = Space::Task(task.inner_pid);
            let own = ours_of(maps)?;
            if !own.is_empty() {
                self.put("ours", self.seen_as(task.pid, space), &words_of(&own).collect::<Vec<u8>>())?;
                listed.ours.insert(space, own);
            }
            let tracked = trackers.get(&task.pid).filter(|_| self.ahead.guards);
            let likely = tracked.and_then(|tracked| {
                tracked.tracker.likely_guards(maps).filter(|likely| likely.found == tracked.guards.found)
            });
            if let Some(guards) = likely {
                self.write_guards(task.pid, space, guards)?;
                listed.told_ahead.insert(space);
            }
            let Some(vmas) = self.vmas else { continue };
            match vmas.essence(task.pid, maps) {
                Ok(essence) => self.put("smaps", self.seen_as(task.pid, space), essence.as_ref())?,
                Err(error) => {
                    tracing::debug!(%error, pid = task.pid, "CRIU lists the mappings of this process itself");
                }
            }
        }
        self.gate.tell(Told::Mappings);
        Ok(listed)
    }

    /// Tells what can be told before anything is looked at.
    pub(super) fn begin(&self) {
        if let Some(protocols) = self.ahead.protocols {
            self.gate.tell(Told::Protocols(protocols));
        }
    }

    /// Lists the guard regions of a task.
    pub(super) fn write_guards(&self, pid: i32, space: Space, guards: &Guards) -> io::Result<()> {
        let words = 1 + 2 * (guards.looked.len() + guards.found.len());
        if words >= GUARD_WORDS_MAX {
            return Ok(());
        }
        let count = (guards.looked.len() as u64).to_ne_bytes();
        let bytes = count.into_iter().chain(words_of(&guards.looked)).chain(words_of(&guards.found));
        self.put("guards", self.seen_as(pid, space), &bytes.collect::<Vec<u8>>())
    }

    /// The pid by which CRIU knows a task.
    fn seen_as(&self, pid: i32, space: Space) -> u32 {
        match space {
            Space::Task(inner) if !self.from_host => inner,
            _ => pid.unsigned_abs(),
        }
    }

    fn put(&self, name: &str, pid: u32, bytes: &[u8]) -> io::Result<()> {
        let new = self.dir.join("list.new");
        fs::write(&new, bytes)?;
        fs::rename(&new, self.dir.join(format!("{name}-{pid}")))?;
        self.gate.tell(Told::List);
        Ok(())
    }
}

impl Drop for Lists<'_> {
    /// The bridge waits for none any more.
    fn drop(&mut self) {
        self.gate.tell(Told::Mappings);
        self.gate.tell(Told::Pages);
    }
}

fn words_of(extents: &[Extent]) -> impl Iterator<Item = u8> + '_ {
    extents.iter().flat_map(|extent| [extent.start, extent.end()]).flat_map(u64::to_ne_bytes)
}

/// Large private anonymous mappings; of those that may not be read CRIU sends the pages itself.
fn ours_of(maps: &[u8]) -> io::Result<Vec<Extent>> {
    let mappings = memory::mappings_of(maps).map_err(io::Error::other)?;
    let large = mappings.into_iter().filter(|mapping| {
        mapping.kind == MappingKind::Anonymous && mapping.readable && mapping.extent.pages >= OURS_PAGES_MIN
    });
    Ok(large.map(|mapping| mapping.extent).take(OURS_MAX).collect())
}

/// CRIU's list of a task's pages, with those of our mappings for the sign that it wants them.
pub(super) fn with_ours<E>(
    listed: &[Extent],
    ours: &[Extent],
    mut pages_of: impl FnMut(Extent) -> Result<Vec<Extent>, E>,
) -> Result<Vec<Extent>, E> {
    let first = |mapping: &Extent| Extent { pages: 1, ..*mapping };
    let wanted = |mapping: &&Extent| !extents::intersect(listed, &[first(mapping)]).is_empty();
    let wanted: Vec<Extent> = ours.iter().filter(wanted).copied().collect();
    let mut all = extents::subtract(listed, &wanted);
    for mapping in wanted {
        all.extend(pages_of(mapping)?);
    }
    extents::normalize(&mut all);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(page: u64, pages: u64) -> Extent {
        Extent { start: page * PAGE_SIZE, pages }
    }

    #[test]
    fn only_large_readable_private_anonymous_mappings_are_ours() {
        let maps = b"10000000-10400000 rw-p 00000000 00:00 0 \n\
            20000000-20100000 rw-p 00000000 00:00 0 \n\
            30000000-30400000 -w-p 00000000 00:00 0 \n\
            40000000-40400000 rw-s 00000000 00:01 7    /dev/zero (deleted)\n\
            50000000-50400000 rw-p 00000000 08:01 7    /srv/file\n\
            60000000-60400000 r--p 00000000 00:00 0    [heap]\n";
        assert_eq!(ours_of(maps).unwrap(), [run(0x10000, 1024), run(0x60000, 1024)]);
    }

    #[test]
    fn a_mapping_that_criu_does_not_want_stays_as_criu_lists_it() {
        let ours = [run(100, 50), run(150, 50), run(300, 50), run(400, 50)];
        // The sign of the second touches a page of the first's neighbour; the third has a page of CRIU's own finding.
        let listed = [run(10, 1), run(100, 1), run(149, 2), run(310, 2)];
        let pages_of = |mapping: Extent| Ok::<_, io::Error>(vec![run(mapping.start / PAGE_SIZE + 7, 3)]);
        let all = with_ours(&listed, &ours, pages_of).unwrap();
        assert_eq!(all, [run(10, 1), run(107, 3), run(157, 3), run(310, 2)]);
    }
}
