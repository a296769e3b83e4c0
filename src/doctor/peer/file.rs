//! A file that a workload uses, described so that two hosts can tell whether they have the same one.
//!
//! Invariant: a path that a peer names opens nothing but a regular file of a file system for files (no fifo, no device, no
//! automatic mount at its end), changes nothing, and nothing of its content leaves but its build-id and, of one whose mode lets
//! everybody read it, its digest.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
};

use nix::{
    fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2},
    sys::{
        stat::{SFlag, fstat},
        statfs::{self, FsType, fstatfs},
    },
};

use crate::wire::examine::{BUILD_ID_LEN_MAX, FileFacts, FileQuestion, RegularFile};

/// Most bytes that are read for the digests of one question.
const DIGEST_BYTES_MAX: u64 = 256 << 20;
/// Program headers and notes that are looked at.
const HEADERS_MAX: u64 = 128;
const NOTES_LEN_MAX: u64 = 64 << 10;
/// File systems whose files are the kernel's answers: to read one may do something.
const NOT_FOR_FILES: [FsType; 8] = [
    statfs::PROC_SUPER_MAGIC,
    statfs::SYSFS_MAGIC,
    statfs::DEBUGFS_MAGIC,
    statfs::TRACEFS_MAGIC,
    statfs::SECURITYFS_MAGIC,
    statfs::CGROUP2_SUPER_MAGIC,
    statfs::CGROUP_SUPER_MAGIC,
    statfs::BPF_FS_MAGIC,
];

/// What this host has at the paths of one question.
pub(super) fn at_paths(questions: &[FileQuestion]) -> Vec<FileFacts> {
    let mut budget = DIGEST_BYTES_MAX;
    questions
        .iter()
        .map(|question| match open(&question.path) {
            Ok(place) => describe(&place, question.digest, &mut budget),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                FileFacts::Missing
            }
            Err(error) => FileFacts::Unreadable(error.to_string()),
        })
        .collect()
}

/// The place of a file, not opened for anything yet.
fn open(path: &[u8]) -> io::Result<OwnedFd> {
    // Through /proc's links one would be in another process's files.
    let how =
        OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let path = Path::new(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(path));
    Ok(openat2(AT_FDCWD, path, how)?)
}

/// Describes the file that this descriptor (O_PATH will do) stands for.
pub(super) fn describe(place: &OwnedFd, digest: bool, budget: &mut u64) -> FileFacts {
    let stat = match fstat(place) {
        Ok(stat) => stat,
        Err(errno) => return FileFacts::Unreadable(errno.to_string()),
    };
    let regular = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
    if !regular || !fstatfs(place).is_ok_and(|found| !NOT_FOR_FILES.contains(&found.filesystem_type())) {
        return FileFacts::NotAFile;
    }
    match File::open(format!("/proc/self/fd/{}", place.as_raw_fd()))
        .and_then(|file| read(&file, digest, budget))
    {
        Ok(file) => FileFacts::Regular(file),
        Err(error) => FileFacts::Unreadable(error.to_string()),
    }
}

fn read(file: &File, digest: bool, budget: &mut u64) -> io::Result<RegularFile> {
    const OTHERS_READ: u32 = 0o004;
    let metadata = file.metadata()?;
    let (size, mode) = (metadata.size(), metadata.mode() & 0o7777);
    let build_id = build_id(file).unwrap_or_default();
    let wanted = digest && build_id.is_empty() && mode & OTHERS_READ != 0 && size <= *budget;
    let digest = if wanted {
        *budget -= size;
        // No more than was counted: it may grow meanwhile.
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(io::Read::take(file, size))?;
        Some(*hasher.finalize().as_bytes())
    } else {
        None
    };
    Ok(RegularFile { size, mode, uid: metadata.uid(), gid: metadata.gid(), build_id, digest })
}

/// The build-id of an ELF file of 64 bits (elf(5)); none of anything else.
fn build_id(file: &File) -> Option<Vec<u8>> {
    const PT_NOTE: u32 = 4;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).ok()?;
    if header[..5] != *b"\x7fELF\x02" || header[5] != 1 {
        return None;
    }
    let (table, entry_len) = (u64_at(&header, 32)?, u64::from(u16_at(&header, 54)?));
    let entries = u64::from(u16_at(&header, 56)?).min(HEADERS_MAX);
    (0..entries).find_map(|entry| {
        let mut program = [0; 56];
        let at = entry.checked_mul(entry_len).and_then(|offset| table.checked_add(offset))?;
        file.read_exact_at(&mut program, at).ok()?;
        if u32_at(&program, 0)? != PT_NOTE {
            return None;
        }
        let (offset, len) = (u64_at(&program, 8)?, u64_at(&program, 32)?.min(NOTES_LEN_MAX));
        let mut notes = vec![0; len as usize];
        file.read_exact_at(&mut notes, offset).ok()?;
        // Notes are padded to 8 bytes only in segments that are aligned so.
        let align = if u64_at(&program, 48)? == 8 { 8 } else { 4 };
        find_build_id(&notes, align)
    })
}

fn find_build_id(mut notes: &[u8], align: usize) -> Option<Vec<u8>> {
    const NT_GNU_BUILD_ID: u32 = 3;
    const HEADER_LEN: usize = 12;
    loop {
        let (name_len, len) = (u32_at(notes, 0)? as usize, u32_at(notes, 4)? as usize);
        let kind = u32_at(notes, 8)?;
        let content = (HEADER_LEN + name_len.min(notes.len())).next_multiple_of(align);
        let found = notes.get(content..)?.get(..len)?;
        let is_ours = kind == NT_GNU_BUILD_ID && notes.get(HEADER_LEN..)?.starts_with(b"GNU\0");
        if is_ours && (1..=BUILD_ID_LEN_MAX).contains(&len) {
            return Some(found.to_owned());
        }
        notes = notes.get((content + len).next_multiple_of(align)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::{ffi::OsStrExt, fs::PermissionsExt};

    use super::*;

    fn ask(path: &Path) -> FileFacts {
        let question = FileQuestion { path: path.as_os_str().as_bytes().to_owned(), digest: true };
        at_paths(&[question]).remove(0)
    }

    fn regular(path: &Path) -> RegularFile {
        match ask(path) {
            FileFacts::Regular(file) => file,
            other => panic!("{}: {other:?}", path.display()),
        }
    }

    #[test]
    fn a_program_is_known_by_its_build_id_as_the_linker_wrote_it() {
        let program = std::env::current_exe().unwrap();
        let mine = regular(&program);
        let readelf = std::process::Command::new("readelf").arg("-n").arg(&program).output().unwrap();
        let text = String::from_utf8_lossy(&readelf.stdout).into_owned();
        let hex = data_encoding::HEXLOWER.encode(&mine.build_id);
        assert!(!hex.is_empty() && text.contains(&hex), "{hex} in {text}");
        assert_eq!(mine.digest, None);
        assert!(!regular(Path::new("/usr/bin/env")).build_id.is_empty());
    }

    #[test]
    fn what_has_no_build_id_is_known_by_its_digest_if_everybody_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("locale");
        std::fs::write(&path, "text").unwrap();
        let set = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        set(0o644);
        let file = regular(&path);
        assert_eq!((file.size, file.mode), (4, 0o644));
        assert_eq!(file.digest, Some(*blake3::hash(b"text").as_bytes()));
        set(0o640);
        assert_eq!(regular(&path).digest, None);
    }

    #[test]
    fn a_path_opens_nothing_but_files() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // A fifo that was opened would hang.
        for path in [&fifo, dir.path(), Path::new("/dev/null"), Path::new("/proc/version")] {
            assert_eq!(ask(path), FileFacts::NotAFile, "{}", path.display());
        }
        assert_eq!(ask(&dir.path().join("none")), FileFacts::Missing);
        assert_eq!(ask(&fifo.join("below")), FileFacts::Missing);
        let refused = ask(Path::new("/proc/self/exe"));
        assert!(matches!(refused, FileFacts::Unreadable(_)), "{refused:?}");
    }

    #[test]
    fn a_file_that_lies_about_itself_is_only_a_file_without_a_build_id() {
        let mut header = [0; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        header[54..58].fill(0xff);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("elf");
        std::fs::write(&path, header).unwrap();
        assert!(regular(&path).build_id.is_empty());
        for len in [0, 3, 12, 40] {
            assert_eq!(find_build_id(&vec![0xff; len], 4), None);
        }
    }
}
