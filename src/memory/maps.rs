//! `/proc/PID/maps`: which mappings there are and what each means for tracking, pure.

use std::path::PathBuf;

use crate::model::{Extent, PAGE_SIZE};

/// First address that no page of a task may have: 4-level page tables, as CRIU's images assume.
pub const TASK_END: u64 = 1 << 47;

/// What a mapping's pages are to a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingKind {
    /// Private memory without a file: pages are tracked.
    Anonymous,
    /// Private mapping of a file: copied-on-write pages are tracked.
    PrivateFile,
    /// `MAP_SHARED`: not tracked. A write through another mapping or process leaves this one's page table
    /// entry clean, so shared memory is dumped whole (by CRIU), and shared file pages live in their file.
    Shared,
    /// The vDSO: always taken whole, because CRIU's images always hold all of it.
    Vdso,
    /// `[vvar]` and the like: the kernel's own pages, in no image.
    Kernel,
}

/// One line of `/proc/PID/maps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where.
    pub extent: Extent,
    /// What.
    pub kind: MappingKind,
    /// Whether the process may read it.
    pub readable: bool,
}

impl Mapping {
    /// Whether it is the same as far as tracking goes, whatever the process may do with it.
    pub(super) fn is_same(&self, other: Self) -> bool {
        (self.extent, self.kind) == (other.extent, other.kind)
    }

    /// Whether its pages are private to the process, and so in its page image.
    pub fn is_private(&self) -> bool {
        matches!(self.kind, MappingKind::Anonymous | MappingKind::PrivateFile)
    }
}

/// Why a text is not understood as `/proc/PID/maps`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MapsError {
    /// A line has another form.
    #[error("line {0} of the process' maps is not understood; is this kernel newer than this program?")]
    Line(usize),
    /// A mapping lies above the 47 bits of 4-level page tables.
    #[error(
        "the process has mapped {0:#x}, above 2^47; such memory (5-level page tables) cannot be checkpointed"
    )]
    High(u64),
    /// A line reaches back behind the one before it.
    #[error("the process changes its mappings faster than they can be listed; try again")]
    Torn,
}

/// The mappings in the text of `/proc/PID/maps`, in ascending order.
///
/// The kernel gives the text in pieces of some 4 KiB and lets the process go on between two of them: a mapping that has
/// come meanwhile over the end of the last piece is told whole, after others in the place of which it came (m_start in
/// fs/proc/task_mmu.c). Such a text is refused. That of a process that stands still never is.
pub fn parse(text: &[u8]) -> Result<Vec<Mapping>, MapsError> {
    let lines = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    let mut mappings = Vec::new();
    for (number, line) in lines.enumerate() {
        let mapping = parse_line(line).ok_or(MapsError::Line(number + 1))?;
        if mappings.last().is_some_and(|last: &Mapping| mapping.extent.start < last.extent.end()) {
            return Err(MapsError::Torn);
        }
        if mapping.extent.end() <= TASK_END {
            mappings.push(mapping);
        } else if mapping.kind != MappingKind::Kernel {
            return Err(MapsError::High(mapping.extent.start));
        }
    }
    Ok(mappings)
}

/// The start and end in a line of `maps` or in the first of a mapping in `smaps`.
pub(super) fn range_of(line: &[u8]) -> Option<(u64, u64)> {
    let range = std::str::from_utf8(line.split(|b| *b == b' ').next()?).ok()?;
    let (start, end) = range.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

/// The link to the file of a line's mapping. Its name has the range without the zeros that the line begins with.
pub fn map_file(pid: i32, line: &[u8]) -> Option<PathBuf> {
    let (start, end) = range_of(line)?;
    Some(format!("/proc/{pid}/map_files/{start:x}-{end:x}").into())
}

/// `start-end perms offset dev inode  path`
fn parse_line(line: &[u8]) -> Option<Mapping> {
    // The path may hold any byte: only the first five fields are text.
    let (start, end) = range_of(line)?;
    let mut fields = line.splitn(6, |b| *b == b' ').skip(1);
    let (readable, shared) = match fields.next()? {
        [read, _, _, b'p'] => (*read == b'r', false),
        [read, _, _, b's'] => (*read == b'r', true),
        _ => return None,
    };
    let inode = fields.nth(2)?;
    let path = fields.next().unwrap_or_default().trim_ascii_start();
    if start >= end || start % PAGE_SIZE != 0 || end % PAGE_SIZE != 0 {
        return None;
    }
    let kind = match path {
        b"[vdso]" => MappingKind::Vdso,
        b"[vvar]" | b"[vvar_vclock]" | b"[uprobes]" | b"[vsyscall]" => MappingKind::Kernel,
        _ if shared => MappingKind::Shared,
        _ if inode != b"0" => MappingKind::PrivateFile,
        _ => MappingKind::Anonymous,
    };
    Some(Mapping { extent: Extent { start, pages: (end - start) / PAGE_SIZE }, kind, readable })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_kind_is_told_apart() {
        let text = b"55d0a000-55d0c000 r-xp 00000000 08:01 1234                       /usr/bin/a b\n\
            55d0c000-55d0d000 rw-p 00000000 00:00 0                          [heap]\n\
            7f000000-7f002000 rw-s 00000000 00:01 77                         /memfd:x (deleted)\n\
            7f004000-7f005000 rw-p 00000000 00:00 0 \n\
            7f005000-7f006000 r--p 00000000 00:00 0                          [vvar]\n\
            7f006000-7f008000 r-xp 00000000 00:00 0                          [vdso]\n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
        let kinds: Vec<_> = parse(text).unwrap().iter().map(|m| (m.kind, m.extent.pages)).collect();
        let expected = [
            (MappingKind::PrivateFile, 2),
            (MappingKind::Anonymous, 1),
            (MappingKind::Shared, 2),
            (MappingKind::Anonymous, 1),
            (MappingKind::Kernel, 1),
            (MappingKind::Vdso, 2),
        ];
        assert_eq!(kinds, expected);
    }

    #[test]
    fn a_mapping_that_came_over_others_while_they_were_listed_is_noticed() {
        let text = b"10000000-10002000 rw-p 00000000 00:00 0 \n\
            10003000-10005000 rw-p 00000000 00:00 0 \n";
        assert_eq!(parse(text).unwrap().len(), 2);
        for start in [b'0', b'1', b'4'] {
            let mut text = text.to_vec();
            text.extend(b"1000");
            text.push(start);
            text.extend(b"000-10009000 rw-p 00000000 00:00 0 \n");
            assert_eq!(parse(&text), Err(MapsError::Torn));
        }
    }

    #[test]
    fn a_mapping_above_47_bits_is_an_error() {
        let text = b"800000000000-800000001000 rw-p 00000000 00:00 0 \n";
        assert_eq!(parse(text), Err(MapsError::High(1 << 47)));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }
    }
}
