//! What a record makes of an entry: the system calls of the standby's side.

use std::{
    collections::BTreeSet,
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use nix::{
    fcntl::{OFlag, readlinkat},
    sys::stat::{Mode, SFlag, mkdirat, mknodat},
    unistd::{LinkatFlags, UnlinkatFlags, ftruncate, linkat, symlinkat, unlinkat},
};

use super::{
    Blocks, DEPTH_MAX, held,
    look::xattrs_of,
    scan::open_in,
    sys,
    tree::hides_lower,
    walk::{names_of, push_name},
};
use crate::wire::message::FileKind;

/// Where an entry is: its directory, and its name there.
pub(super) struct Place {
    pub(super) dir: OwnedFd,
    pub(super) name: CString,
}

pub(super) fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR))
}

/// Makes the entry what `kind` says, keeping what is there if it is that already.
pub(super) fn make(place: &Place, kind: &FileKind) -> io::Result<()> {
    let (dir, name) = (place.dir.as_fd(), place.name.as_c_str());
    let there = match sys::stat_at(dir, name) {
        Ok(stat) => Some(stat),
        Err(error) if is_absent(&error) => None,
        Err(error) => return Err(error),
    };
    let keep = there.as_ref().is_some_and(|stat| match kind {
        FileKind::Regular { .. } => stat.format() == libc::S_IFREG,
        FileKind::Directory => stat.format() == libc::S_IFDIR,
        FileKind::Symlink { target } => {
            let is_link = stat.format() == libc::S_IFLNK;
            is_link && readlinkat(dir, name).is_ok_and(|text| text.as_bytes() == target)
        }
        FileKind::Fifo => stat.format() == libc::S_IFIFO,
        FileKind::Device { block, rdev } => {
            let format = if *block { libc::S_IFBLK } else { libc::S_IFCHR };
            stat.format() == format && stat.rdev == *rdev
        }
        FileKind::HardLink { .. } => false,
    });
    if there.is_some() && !keep {
        remove_all(dir, name, 0)?;
    }
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    match kind {
        FileKind::Regular { size } => {
            let flags =
                OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let file = nix::fcntl::openat(dir, name, flags, private)?;
            ftruncate(&file, *size as i64)?;
        }
        _ if keep => {}
        FileKind::Directory => mkdirat(dir, name, Mode::S_IRWXU)?,
        FileKind::Symlink { target } => symlinkat(OsStr::from_bytes(target), dir, name)?,
        FileKind::Fifo => mknodat(dir, name, SFlag::S_IFIFO, private, 0)?,
        FileKind::Device { block, rdev } => {
            let format = if *block { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
            mknodat(dir, name, format, private, *rdev)?;
        }
        FileKind::HardLink { .. } => {}
    }
    Ok(())
}

pub(super) fn make_link(place: &Place, first: &Place) -> io::Result<()> {
    let target = sys::stat_at(first.dir.as_fd(), &first.name)?;
    if target.format() == libc::S_IFDIR {
        return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
    }
    match sys::stat_at(place.dir.as_fd(), &place.name) {
        Ok(there) if (there.dev, there.ino) == (target.dev, target.ino) => return Ok(()),
        Ok(_) => remove_all(place.dir.as_fd(), &place.name, 0)?,
        Err(error) if is_absent(&error) => {}
        Err(error) => return Err(error),
    }
    let none = LinkatFlags::empty();
    Ok(linkat(&first.dir, first.name.as_c_str(), &place.dir, place.name.as_c_str(), none)?)
}

/// Removes an entry and everything below it; one that is not there is fine.
pub(super) fn remove_all(dir: BorrowedFd<'_>, name: &std::ffi::CStr, depth: usize) -> io::Result<()> {
    let stat = match sys::stat_at(dir, name) {
        Ok(stat) => stat,
        Err(error) if is_absent(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    if stat.format() != libc::S_IFDIR {
        return Ok(unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)?);
    }
    let inner = open_in(dir, name.to_bytes(), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    clear(inner.as_fd(), depth + 1)?;
    Ok(unlinkat(dir, name, UnlinkatFlags::RemoveDir)?)
}

/// What is sent whole is made of nothing but the blocks that are kept: other content that is there is not what the records add
/// to, and other names of it are not written through.
pub(super) fn make_as_new(place: &Place, kept: &[Blocks]) -> io::Result<()> {
    let (dir, name) = (place.dir.as_fd(), place.name.as_c_str());
    let stat = match sys::stat_at(dir, name) {
        Ok(stat) if stat.format() == libc::S_IFREG => stat,
        Ok(_) => return Ok(()),
        Err(error) if is_absent(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    if !kept.is_empty() {
        return held::keep_only(dir, name, kept, stat.nlink == 1);
    }
    if stat.nlink > 1 {
        return Ok(unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)?);
    }
    let file = open_in(dir, name.to_bytes(), OFlag::O_WRONLY | OFlag::O_NONBLOCK)?;
    Ok(ftruncate(&file, 0)?)
}

/// Removes what is not named from the directory at `path` of a tree, where `listed` has it; a whiteout there is nothing.
pub(super) fn prune(
    dir: BorrowedFd<'_>,
    listed: BorrowedFd<'_>,
    path: &mut Vec<u8>,
    named: &BTreeSet<Vec<u8>>,
    depth: usize,
) -> io::Result<()> {
    if depth > DEPTH_MAX + 1 {
        return Err(io::Error::other("directories nest too deep"));
    }
    for name in names_of(listed)? {
        let end = push_name(path, &name);
        let stat = sys::stat_at(listed, &name)?;
        if !named.contains(path.as_slice()) {
            if !hides_lower(&stat) {
                remove_all(dir, &name, depth)?;
            }
        } else if stat.format() == libc::S_IFDIR {
            let open = |dir| open_in(dir, name.to_bytes(), OFlag::O_RDONLY | OFlag::O_DIRECTORY);
            let (inner, inner_listed) = (open(dir)?, open(listed)?);
            prune(inner.as_fd(), inner_listed.as_fd(), path, named, depth + 1)?;
        }
        path.truncate(end);
    }
    Ok(())
}

/// Removes everything in a directory.
fn clear(dir: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth > DEPTH_MAX + 1 {
        return Err(io::Error::other("directories nest too deep"));
    }
    for name in names_of(dir)? {
        remove_all(dir, &name, depth)?;
    }
    Ok(())
}

pub(super) fn set_xattrs(handle: BorrowedFd<'_>, wanted: &[(Vec<u8>, Vec<u8>)]) -> io::Result<()> {
    for (name, _) in xattrs_of(handle)? {
        if !wanted.iter().any(|(wanted, _)| *wanted == name) {
            sys::remove_xattr(handle, &CString::new(name)?)?;
        }
    }
    for (name, value) in wanted {
        let name = CString::new(name.as_slice())?;
        if sys::get_xattr(handle, &name)?.as_ref() != Some(value) {
            sys::set_xattr(handle, &name, value)?;
        }
    }
    Ok(())
}
