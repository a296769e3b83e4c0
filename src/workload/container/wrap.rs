//! Wrapped containers: those whose pid 1 is our init (`init.c`), and what it is told.
//!
//! Each has a directory on its host that is shown inside, read-only, as [`INSIDE`]: the init's program and the *order*,
//! which says what it does when it starts and when its child ends. The table is in `init.c`.
//!
//! Invariant: from before a container is protected until it no longer is, the order lets nobody start its command a second
//! time, neither an operator nor an engine after a reboot: it would be a second copy.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::model::Name;

/// Where the directory is shown.
pub const INSIDE: &str = "/.standin";
/// The init there: a container's entry point.
pub const INIT: &str = "/.standin/init";

const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/init"));

/// What the init is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// It is a container as any other.
    Run,
    /// Wait for a tree to be restored; start nothing.
    Wait,
    /// This child is the workload (its pid inside). A new init starts nothing.
    Track(u32),
}

/// Makes a workload's directory below `wraps`, or brings it up to date; anybody may read it, since a container's processes
/// may be anybody's. Returns it.
pub fn provide(wraps: &Path, name: &Name) -> io::Result<PathBuf> {
    let dir = wraps.join(name.as_str());
    fs::DirBuilder::new().recursive(true).mode(0o755).create(&dir)?;
    let init = dir.join("init");
    if fs::read(&init).ok().as_deref() != Some(PROGRAM) {
        // One that runs is not written to.
        replace(&init, PROGRAM, 0o755)?;
    }
    Ok(dir)
}

/// Tells the init. Whether it starts the command is on the disk when this returns: it must hold after a power cut. Which child
/// it tracks need not be, there is none then, and what cannot be read is an order to wait.
pub(super) fn tell(dir: &Path, order: Order) -> io::Result<()> {
    let path = dir.join("order");
    let text = match order {
        Order::Run => "run\n".to_owned(),
        Order::Wait => "wait\n".to_owned(),
        Order::Track(pid) => format!("track {pid}\n"),
    };
    let starts_nothing = fs::read_to_string(&path).is_ok_and(|before| !before.starts_with("run"));
    if starts_nothing && order != Order::Run {
        return put(&path, text.as_bytes(), 0o644).map(drop);
    }
    replace(&path, text.as_bytes(), 0o644)
}

fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    put(path, bytes, mode)?.sync_all()?;
    fs::File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// Whoever reads the file sees the old or the new one.
fn put(path: &Path, bytes: &[u8], mode: u32) -> io::Result<fs::File> {
    let next = path.with_extension("next");
    fs::write(&next, bytes)?;
    fs::set_permissions(&next, fs::Permissions::from_mode(mode))?;
    fs::rename(&next, path)?;
    fs::File::open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_brought_up_to_date() {
        let wraps = tempfile::tempdir().unwrap();
        let name = "web".parse().unwrap();
        let dir = provide(wraps.path(), &name).unwrap();
        fs::write(dir.join("init"), "an older one").unwrap();
        assert_eq!(provide(wraps.path(), &name).unwrap(), dir);
        assert_eq!(fs::read(dir.join("init")).unwrap(), PROGRAM);
        tell(&dir, Order::Track(7)).unwrap();
        assert_eq!(fs::read_to_string(dir.join("order")).unwrap(), "track 7\n");
    }
}
