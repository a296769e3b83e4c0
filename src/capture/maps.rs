//! What CRIU is told of the frozen tasks' mappings, so that neither it nor the kernel need walk every page for it.
//!
//! Written to the directory of CRIU's images when it says that the tree is frozen, and waits; the bridge finds it there:
//!
//! - `smaps-PID`: of `/proc/PID/smaps` CRIU uses the lines of the mappings and their flags (parse_smaps in proc_parse.c).
//!   Made of the frozen tree, so there is nothing in it to go stale.
//! - `ours-PID`: mappings whose pages we list. When CRIU asks the kernel which pages such a mapping has, it is told of
//!   the first alone, sends that as a hole, and so says that it wants the mapping in the image. Which pages that are, the
//!   tracker knows ([`Tracker::listed`](crate::memory::Tracker::listed)) or the kernel is asked.

use std::{collections::BTreeMap, fs, io, path::Path};

use crate::{
    extents,
    memory::{self, MappingKind, Task, Vmas},
    model::{Extent, PAGE_SIZE, Space},
};

/// Smaller mappings are not worth it; and CRIU asks for smaller ones together (pmc_fill_cache in pagemap-cache.c).
const OURS_PAGES_MIN: u64 = (2 << 20) / PAGE_SIZE;
/// What the bridge has room for.
const OURS_MAX: usize = 1024;

/// Mappings whose pages we list, per task.
pub(super) type Ours = BTreeMap<Space, Vec<Extent>>;

/// Writes both of all tasks of a frozen tree. Of a task that has none CRIU asks the kernel.
pub(super) fn write(vmas: Option<&Vmas>, tasks: &[Task], dir: &Path) -> io::Result<Ours> {
    let mut ours = Ours::new();
    for task in tasks.iter().filter(|task| !task.zombie) {
        let maps = fs::read(format!("/proc/{}/maps", task.pid))?;
        if let Some(vmas) = vmas {
            match vmas.essence(task.pid, &maps) {
                Ok(essence) => fs::write(dir.join(format!("smaps-{}", task.inner_pid)), essence)?,
                Err(error) => {
                    tracing::debug!(%error, pid = task.pid, "CRIU lists the mappings of this process itself");
                }
            }
        }
        let own = ours_of(&maps)?;
        if !own.is_empty() {
            let words = own.iter().flat_map(|mapping| [mapping.start, mapping.end()]);
            let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
            fs::write(dir.join(format!("ours-{}", task.inner_pid)), bytes)?;
            ours.insert(Space::Task(task.inner_pid), own);
        }
    }
    Ok(ours)
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
