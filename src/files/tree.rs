//! What a replicated tree is, on either side; and what an overlay's upper directory says in its own way.
//!
//! ```text
//!   primary: the upper directory ──scan──► records ──apply──► standby: the merged mount over the same layers
//! ```
//!
//! The upper directory is only read: overlayfs does not define what happens if it is written to while it is mounted.
//! So the standby writes through the mount, and overlayfs makes whiteouts and opaque directories itself where a record
//! removes what a lower layer holds:
//!
//! | the upper directory holds | what is emitted |
//! |---|---|
//! | a whiteout, or a socket | `Remove`: the name is gone, in the lower layers too |
//! | an opaque directory | `Remove`, then `Entry`: nothing of the lower layers shows in it |
//! | a regular file that is new in it | `Remove`, then `Entry` and its data: no byte is the lower file's |
//! | anything else | `Entry`, as in a plain tree |

use std::path::{Path, PathBuf};

use super::sys::Stat;
use crate::wire::message::{FileKind, FileMeta};

/// A tree on the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub(super) path: PathBuf,
    /// Of an overlay: where it is mounted.
    pub(super) merged: Option<PathBuf>,
}

impl Source {
    /// A directory with all that is in it.
    pub fn plain(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), merged: None }
    }

    /// The upper directory of an overlay (a container's writable layer) that is mounted at `merged`, with nothing
    /// mounted below that hides it. The files that tasks map are known by what `stat` says of them there.
    ///
    /// The overlay is mounted without `redirect_dir`, `metacopy`, `index` and `userxattr`, as container engines do. The
    /// first two are refused where they were used; the others cannot be told from the directory.
    pub fn overlay(upper: impl Into<PathBuf>, merged: impl Into<PathBuf>) -> Self {
        Self { path: upper.into(), merged: Some(merged.into()) }
    }

    /// Where it is scanned.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A tree's copy on the standby.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub(super) path: PathBuf,
    /// Of an overlay: its upper directory.
    pub(super) upper: Option<PathBuf>,
}

impl Target {
    /// The copy of a [`Source::plain`].
    pub fn plain(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), upper: None }
    }

    /// The copy of a [`Source::overlay`]: the mount point of an overlay over the same lower layers, and with an upper
    /// directory of its own.
    ///
    /// A tree that is sent whole does not empty an overlay, as that would hide the lower layers. What its upper directory
    /// holds beyond the records goes, but what it hides or has changed of the lower layers stays so: it must be new, or that
    /// of an earlier epoch of the same overlay. In that one nothing that was changed ever becomes again what it was.
    pub fn overlay(upper: impl Into<PathBuf>, merged: impl Into<PathBuf>) -> Self {
        Self { path: merged.into(), upper: Some(upper.into()) }
    }
}

impl Target {
    /// Where it is written to.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Prefix of the attributes in which overlayfs keeps its state.
const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";
/// Such an attribute that a nested overlay has set, through this one: escaped by another `overlay.` (kernel 6.7).
const ESCAPED_PREFIX: &[u8] = b"trusted.overlay.overlay.";

/// A whiteout is a character device of this number.
const WHITEOUT_RDEV: u64 = 0;

/// What overlayfs says about an entry of an upper directory, beside what it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mark {
    #[default]
    None,
    /// A directory: the lower layers' content of that name is hidden.
    Opaque,
    /// Not there, though it may be in a lower layer.
    Whiteout,
}

/// State of overlayfs that no record can express.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inexpressible {
    Redirect,
    Metacopy,
}

impl Inexpressible {
    /// The module's parameter, and the mount option.
    pub(super) fn option(self) -> &'static str {
        match self {
            Self::Redirect => "redirect_dir",
            Self::Metacopy => "metacopy",
        }
    }
}

/// Takes overlayfs' own attributes out, and leaves those that show in the merged directory, as they show there. Also
/// whether the entry was copied up.
pub(super) fn take_mark(xattrs: &mut Vec<(Vec<u8>, Vec<u8>)>) -> Result<(Mark, bool), Inexpressible> {
    let (mut mark, mut copied_up) = (Mark::None, false);
    let mut inexpressible = None;
    xattrs.retain_mut(|(name, value)| {
        if let Some(inner) = name.strip_prefix(ESCAPED_PREFIX) {
            *name = [OVERLAY_PREFIX, inner].concat();
            return true;
        }
        let Some(own) = name.strip_prefix(OVERLAY_PREFIX) else { return true };
        match own {
            // "x" only says that whiteouts in it may be files.
            b"opaque" if value == b"y" => mark = Mark::Opaque,
            // On a file (kernel 6.7).
            b"whiteout" => mark = Mark::Whiteout,
            b"origin" => copied_up = true,
            b"redirect" => inexpressible = Some(Inexpressible::Redirect),
            b"metacopy" => inexpressible = Some(Inexpressible::Metacopy),
            _ => {}
        }
        false
    });
    inexpressible.map_or(Ok((mark, copied_up)), Err)
}

/// Whether the `stat` alone says that the name is gone from the merged directory, or holds what is not replicated.
pub(super) fn hides_lower(stat: &Stat) -> bool {
    let whiteout = stat.format() == libc::S_IFCHR && stat.rdev == WHITEOUT_RDEV;
    whiteout || stat.format() == libc::S_IFSOCK
}

/// What stands for a hidden name, however it is hidden: whiteouts have nothing that differs.
pub(super) fn whiteout_meta() -> FileMeta {
    let kind = FileKind::Device { block: false, rdev: WHITEOUT_RDEV };
    FileMeta { kind, mode: 0, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(name: &str, value: &str) -> (Vec<u8>, Vec<u8>) {
        (name.into(), value.into())
    }

    #[test]
    fn attributes_of_overlayfs_are_told_from_the_workloads() {
        let mut xattrs = vec![
            attribute("security.capability", "c"),
            attribute("trusted.overlay.opaque", "y"),
            attribute("trusted.overlay.origin", "o"),
            attribute("trusted.overlay.overlay.redirect", "of one inside"),
            attribute("user.note", "n"),
        ];
        assert_eq!(take_mark(&mut xattrs), Ok((Mark::Opaque, true)));
        let left = ["security.capability", "trusted.overlay.redirect", "user.note"];
        assert!(xattrs.iter().map(|(name, _)| name.as_slice()).eq(left.map(str::as_bytes)));
        let mut redirected = vec![attribute("trusted.overlay.redirect", "/elsewhere")];
        assert_eq!(take_mark(&mut redirected), Err(Inexpressible::Redirect));
    }
}
