//! The mounts of a sandbox, made by its pid 1 before anything else runs in it.
//!
//! The new root is a recursive, private bind of the host's root, *pivoted into*: CRIU's restore hits a BUG
//! on a mount namespace that is a bare copy of the host's mounts. Private, so nothing that is mounted or
//! unmounted on either side later is seen by the other; a host file system therefore stays in use until the
//! sandbox is destroyed.
//!
//! Its own: `/proc` (of the new pid namespace), `/dev/shm` (POSIX shared memory and semaphores, which are replicated as
//! the declared paths are, and nobody else's), `/dev/pts` (so that terminal numbers are free on the standby),
//! and the workload's declared paths. The host's: everything else, `/run` and `/tmp` included: declare
//! `--path /tmp/x` for what the workload needs of them after a takeover.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::{pivot_root, sethostname},
};

use super::at;

const NONE: Option<&Path> = None;

pub(super) fn enter(
    hostname: &str,
    root: &Path,
    shown_as_shm: &Path,
    binds: &[(PathBuf, PathBuf)],
) -> Result<(), String> {
    sethostname(hostname).map_err(at("set the host name"))?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).map_err(at("make mounts private"))?;
    mount(Some("/"), root, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE).map_err(at("bind the root"))?;
    std::env::set_current_dir(root).map_err(at("enter the new root"))?;
    // Root and old root in the same place; the old one is then on top and goes with the next call.
    pivot_root(".", ".").map_err(at("pivot into the new root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(at("leave the old root"))?;
    std::env::set_current_dir("/").map_err(at("enter /"))?;

    mount_new("proc", "/proc", MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, "")
        .map_err(at("mount /proc"))?;
    fs::create_dir_all("/dev/shm").map_err(at("make /dev/shm"))?;
    let shm = Path::new("/dev/shm");
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    bind(shown_as_shm, shm)
        .and_then(|()| mount(NONE, shm, NONE, flags, NONE))
        .map_err(at("bind /dev/shm"))?;
    mount_new(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        "newinstance,ptmxmode=0666,mode=620",
    )
    .map_err(at("mount /dev/pts"))?;
    // Where /dev/ptmx is a link to pts/ptmx it is right already.
    if !fs::symlink_metadata("/dev/ptmx").is_ok_and(|meta| meta.is_symlink()) {
        bind("/dev/pts/ptmx".as_ref(), "/dev/ptmx".as_ref()).map_err(at("bind /dev/ptmx"))?;
    }
    for (from, to) in binds {
        bind(from, to)
            .map_err(|error| format!("cannot show {} as {}: {error}", from.display(), to.display()))?;
    }
    Ok(())
}

fn mount_new(kind: &str, on: &str, flags: MsFlags, data: &str) -> nix::Result<()> {
    mount(Some(kind), on, Some(kind), flags, Some(data))
}

fn bind(from: &Path, to: &Path) -> nix::Result<()> {
    mount(Some(from), to, NONE, MsFlags::MS_BIND, NONE)
}
