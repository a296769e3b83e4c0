//! The trial: mappings with each flag, ours, of which `smaps` must say the same.

use std::{fs, io};

use super::{NAMES, Vma, Vmas, VmasError, names_of, range_of, sys::Page};

/// Linux 6.11; asm-generic/mman-common.h.
const MAP_DROPPABLE: i32 = 0x08;

/// The mappings that can be made without a device, huge pages set aside, or a shadow stack.
fn made() -> io::Result<Vec<(&'static str, Page)>> {
    let mut pages = vec![("nr", Page::map(libc::MAP_NORESERVE)?), ("gd", Page::map(libc::MAP_GROWSDOWN)?)];
    let locked = Page::map(0)?;
    // Beyond what this process may lock there is nothing to be learned.
    if locked.lock().is_ok() {
        pages.push(("lo", locked));
    }
    for (name, advice) in [
        ("sr", libc::MADV_SEQUENTIAL),
        ("rr", libc::MADV_RANDOM),
        ("dc", libc::MADV_DONTFORK),
        ("wf", libc::MADV_WIPEONFORK),
        ("dd", libc::MADV_DONTDUMP),
        ("hg", libc::MADV_HUGEPAGE),
        ("nh", libc::MADV_NOHUGEPAGE),
        ("mg", libc::MADV_MERGEABLE),
    ] {
        let page = Page::map(0)?;
        // A kernel may be built without huge or merged pages, and then has no mappings of the kind.
        if page.advise(advice).is_ok() {
            pages.push((name, page));
        }
    }
    // Older kernels take the kind for none.
    pages.extend(Page::map(MAP_DROPPABLE).ok().map(|page| ("dp", page)));
    Ok(pages)
}

/// Makes them and compares.
pub(super) fn run(vmas: &Vmas) -> Result<(), VmasError> {
    let failed = |what| move |source| VmasError::Io { what, source };
    let pages = made().map_err(failed("make mappings for a trial"))?;
    let found = vmas.read(std::process::id() as i32)?;
    let smaps = fs::read_to_string("/proc/self/smaps").map_err(failed("read /proc/self/smaps"))?;
    for (name, page) in &pages {
        let vma = found.iter().find(|vma| vma.start == page.start()).ok_or(VmasError::Differs(name))?;
        let said = said_of(&smaps, vma).ok_or(VmasError::Differs(name))?;
        let told = names_of(vma)?;
        if !told.split(' ').any(|told| told == *name) || told != said {
            return Err(VmasError::Differs(name));
        }
    }
    Ok(())
}

/// What `smaps` says of a mapping, as far as CRIU looks at it, in our order.
fn said_of(smaps: &str, vma: &Vma) -> Option<String> {
    let mut lines = smaps.lines();
    lines.find(|line| range_of(line.as_bytes()) == Some((vma.start, vma.end)))?;
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"))?;
    let said = NAMES.iter().filter(|(_, name)| flags.split(' ').any(|flag| flag == *name));
    Some(said.flat_map(|(_, name)| [" ", name]).collect())
}
