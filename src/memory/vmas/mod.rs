//! The flags of a process' mappings, at the price of its mappings alone.
//!
//! CRIU takes them from the `VmFlags` lines of `/proc/PID/smaps`, for which the kernel walks every page: some 20 ms a
//! GiB, in the freeze. A BPF iterator over the mappings (`iter/task_vma`, Linux 6.1 for a single task) says the same in
//! some microseconds a mapping, whatever their size. [`Vmas::essence`] writes what CRIU would have found.
//!
//! Owns: the BPF program, where the kernel keeps what it reads (by the kernel's own type information), and what each
//! flag is called.
//!
//! Invariant: a flag that is not known is an error ([`VmasError::Flag`]) for that process, and the caller lets CRIU read
//! `smaps`. [`Vmas::open`] makes a mapping with each flag that CRIU looks for and compares what it says with what `smaps`
//! says, but for those that need a device, huge pages set aside or a shadow stack (pf, io, ht, ss).

mod btf;
mod sys;
mod trial;

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
};

use super::maps::range_of;
use btf::Btf;

/// `VM_*` of linux/mm.h and their names in show_smap_vma_flags (fs/proc/task_mmu.c), as far as CRIU's parse_vmflags
/// (proc_parse.c) looks for them. On x86-64, Linux 6.7 to 6.18; dp came with 6.11, at the place of nothing else.
const NAMES: [(u32, &str); 16] = [
    (8, "gd"),
    (10, "pf"),
    (13, "lo"),
    (14, "io"),
    (15, "sr"),
    (16, "rr"),
    (17, "dc"),
    (21, "nr"),
    (22, "ht"),
    (25, "wf"),
    (26, "dd"),
    (29, "hg"),
    (30, "nh"),
    (31, "mg"),
    (37, "ss"),
    (40, "dp"),
];
/// Flags that CRIU passes over: accesses and what may become of them (0-7), userfaultfd (9, 12), no expansion (18), lock
/// on fault (19), accounting (20), synchronous page faults (23), PAT (24), soft-dirty (27), device pages (28), protection
/// keys (32-36), sealed (42).
const PASSED_OVER: u64 = 0xff
    | 1 << 9
    | 1 << 12
    | 1 << 18
    | 1 << 19
    | 1 << 20
    | 1 << 23
    | 1 << 24
    | 1 << 27
    | 1 << 28
    | 0b1_1111 << 32
    | 1 << 42;
/// Bytes of one record of the program: start, end, flags.
const RECORD_BYTES: usize = 24;

/// At least what the kernel gathers at a time (32 KiB, of whole records).
const READ_BYTES: usize = 64 << 10;
/// Most mappings of a process.
const VMAS_MAX: usize = 1 << 20;

/// Why the mappings of a process were not told this way.
#[derive(Debug, thiserror::Error)]
pub enum VmasError {
    /// The kernel's types are not to be had, or have no such parts.
    #[error("the kernel's type information (/sys/kernel/btf/vmlinux) does not have {0}")]
    Types(&'static str),
    /// A call failed.
    #[error("could not {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A flag without a name.
    #[error("the mapping at {start:#x} has the flags {flags:#x}, not all of which are known")]
    Flag {
        /// Which.
        start: u64,
        /// Its flags.
        flags: u64,
    },
    /// A line without a record.
    #[error("the mapping at {0:#x} was seen only once in two looks at the process")]
    Changed(u64),
    /// More than can be told in a freeze.
    #[error("there are more than {VMAS_MAX} mappings")]
    TooMany,
    /// The trial.
    #[error("of a mapping with the flag {0:?} the kernel says something else")]
    Differs(&'static str),
}

/// A mapping and the kernel's `vm_flags` of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Vma {
    start: u64,
    end: u64,
    flags: u64,
}

/// A loaded program.
#[derive(Debug)]
pub struct Vmas {
    program: OwnedFd,
}

impl Vmas {
    /// Loads the program and tries it; takes some 20 ms. An error: this kernel does not have or not permit it.
    pub fn open() -> Result<Self, VmasError> {
        let vmas = Self::load()?;
        trial::run(&vmas)?;
        Ok(vmas)
    }

    fn load() -> Result<Self, VmasError> {
        let types = fs::read("/sys/kernel/btf/vmlinux")
            .map_err(|source| VmasError::Io { what: "read the kernel's type information", source })?;
        let types = Btf::parse(types).ok_or(VmasError::Types("the form that this program knows"))?;
        let layout = layout(&types)?;
        let attach = types.function("bpf_iter_task_vma");
        let attach = attach.ok_or(VmasError::Types("an iterator over mappings"))?;
        let program = sys::load_iterator(&sys::program(&layout), attach)
            .map_err(|source| VmasError::Io { what: "load a BPF program", source })?;
        Ok(Self { program })
    }

    /// The mappings of a process that does not run, whose `/proc/PID/maps` is given, in the words of `/proc/PID/smaps`
    /// that CRIU looks at: of each its line and its flags.
    pub fn essence(&self, pid: i32, maps: &[u8]) -> Result<Vec<u8>, VmasError> {
        join(maps, &self.read(pid)?)
    }

    /// Ascending. At the end of a list that took more than one read the kernel begins again with the last of them, without
    /// end (task_vma_seq_get_next in kernel/bpf/task_iter.c, for a single task; seen on Linux 6.18).
    fn read(&self, pid: i32) -> Result<Vec<Vma>, VmasError> {
        let failed = |what| move |source| VmasError::Io { what, source };
        let link = sys::link_to_task(self.program.as_fd(), pid).map_err(failed("aim a BPF iterator"))?;
        let iterator = sys::iterator(link.as_fd()).map_err(failed("start a BPF iterator"))?;
        let mut iterator = File::from(iterator);
        let mut piece = vec![0; READ_BYTES];
        let mut vmas: Vec<Vma> = Vec::new();
        loop {
            let len = iterator.read(&mut piece).map_err(failed("read a BPF iterator"))?;
            for record in piece[..len].chunks_exact(RECORD_BYTES) {
                let vma = Vma::of(record);
                if vmas.last().is_some_and(|last| vma.start < last.end) {
                    return Ok(vmas);
                }
                vmas.push(vma);
            }
            if len == 0 {
                return Ok(vmas);
            }
            if vmas.len() > VMAS_MAX {
                return Err(VmasError::TooMany);
            }
        }
    }
}

impl Vma {
    fn of(record: &[u8]) -> Self {
        let word =
            |at: usize| record[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        Self { start: word(0), end: word(8), flags: word(16) }
    }
}

fn layout(types: &Btf) -> Result<sys::Layout, VmasError> {
    let offset = |structure, member, what| {
        let offset = types.offset(structure, member).and_then(|offset| i16::try_from(offset).ok());
        offset.ok_or(VmasError::Types(what))
    };
    Ok(sys::Layout {
        meta: offset("bpf_iter__task_vma", "meta", "an iterator's context")?,
        vma: offset("bpf_iter__task_vma", "vma", "an iterator's mapping")?,
        seq: offset("bpf_iter_meta", "seq", "an iterator's output")?,
        start: offset("vm_area_struct", "vm_start", "a mapping's start")?,
        end: offset("vm_area_struct", "vm_end", "a mapping's end")?,
        flags: offset("vm_area_struct", "vm_flags", "a mapping's flags")?,
    })
}

/// Adds to each line of `maps` the flags of the mapping.
fn join(maps: &[u8], vmas: &[Vma]) -> Result<Vec<u8>, VmasError> {
    let mut essence = Vec::with_capacity(2 * maps.len());
    let mut vmas = vmas.iter();
    for line in maps.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        essence.extend_from_slice(line);
        essence.extend_from_slice(b"\nVmFlags:");
        let range = range_of(line).ok_or(VmasError::Changed(0))?;
        // The kernel's own page, mapped for all, which no list of mappings has.
        if !line.ends_with(b"[vsyscall]") {
            let vma = vmas.next().filter(|vma| (vma.start, vma.end) == range);
            let vma = vma.ok_or(VmasError::Changed(range.0))?;
            essence.extend_from_slice(names_of(vma)?.as_bytes());
        }
        essence.extend_from_slice(b" \n");
    }
    vmas.next().map_or(Ok(essence), |vma| Err(VmasError::Changed(vma.start)))
}

/// The flags that CRIU looks for, each behind a space.
fn names_of(vma: &Vma) -> Result<String, VmasError> {
    let mut names = String::new();
    let mut left = vma.flags & !PASSED_OVER;
    for (bit, name) in NAMES {
        if left & 1 << bit != 0 {
            left &= !(1 << bit);
            let _ = write!(names, " {name}");
        }
    }
    if left == 0 { Ok(names) } else { Err(VmasError::Flag { start: vma.start, flags: vma.flags }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mapping_gets_its_flags() {
        let maps = b"7f00-7f01 rw-p 00000000 00:00 0    [heap]\n\
                     7f01-7f02 r--s 00001000 00:2b 77    /srv/a file\n\
                     ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0    [vsyscall]\n";
        let heap = Vma { start: 0x7f00, end: 0x7f01, flags: 0x10_0073 | 1 << 25 | 1 << 13 };
        let file = Vma { start: 0x7f01, end: 0x7f02, flags: 0x59 };
        let essence = join(maps, &[heap, file]).unwrap();
        assert_eq!(
            String::from_utf8(essence).unwrap(),
            "7f00-7f01 rw-p 00000000 00:00 0    [heap]\nVmFlags: lo wf \n\
             7f01-7f02 r--s 00001000 00:2b 77    /srv/a file\nVmFlags: \n\
             ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0    [vsyscall]\nVmFlags: \n"
        );
    }

    #[test]
    fn what_is_not_known_is_not_told() {
        let maps = b"7f00-7f01 rw-p 00000000 00:00 0\n";
        let vma = |flags| Vma { start: 0x7f00, end: 0x7f01, flags };
        assert!(matches!(join(maps, &[vma(1 << 39)]), Err(VmasError::Flag { .. })));
        assert!(matches!(join(maps, &[]), Err(VmasError::Changed(0x7f00))));
        assert!(matches!(join(maps, &[vma(1), vma(1)]), Err(VmasError::Changed(_))));
        let other = Vma { start: 0x7f00, end: 0x7f02, flags: 1 };
        assert!(matches!(join(maps, &[other]), Err(VmasError::Changed(_))));
        assert!(matches!(join(b"no list\n", &[]), Err(VmasError::Changed(_))));
    }

    #[test]
    fn names_and_those_passed_over_do_not_meet() {
        for (bit, name) in NAMES {
            assert_eq!(PASSED_OVER & 1 << bit, 0, "{name}");
        }
    }
}
