//! CRIU: whether there is one, and whether it works with this kernel.

use std::path::{Path, PathBuf};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::{Check, Group};
use crate::criu::{
    Install,
    install::{InstallError, VERSION_MIN},
    probe::{RoundTripError, round_trip},
};

/// Directories that a tmpfs may be mounted on, seen by the trial alone. Each is there on most hosts, and
/// none is used by CRIU.
const MOUNT_POINTS: [&str; 4] = ["/mnt", "/media", "/srv", "/dev/shm"];
/// What the trial writes is far less.
const SCRATCH_OPTIONS: &str = "size=64m,mode=700";

/// Finds CRIU and tries it. Moves the calling thread into a mount namespace of its own.
pub(super) fn check(explicit: Option<&Path>, launcher: &Path) -> (Vec<Check>, Option<String>) {
    match Install::find(explicit) {
        Ok(install) => {
            let install = install.with_launcher(launcher.to_owned());
            let found = format!("{} at {}", install.version, install.path.display());
            let checks = vec![Check::ok(Group::Criu, "criu", found), trial(&install)];
            (checks, Some(install.version.to_string()))
        }
        Err(error) => {
            let (found, remedy, version) = explain(error);
            let checks = vec![
                Check::fail(Group::Criu, "criu", found, remedy),
                Check::fail(Group::Criu, "dump-and-restore", "not tried without a usable CRIU", "see criu"),
            ];
            (checks, version)
        }
    }
}

fn explain(error: InstallError) -> (String, String, Option<String>) {
    match error {
        InstallError::Missing { looked } => {
            let looked: Vec<_> = looked.iter().map(|path| path.display().to_string()).collect();
            let remedy = "run scripts/setup, which puts one under /opt/standin, or `apt install criu`; or name one with --criu";
            (format!("none at {}", looked.join(", ")), remedy.to_owned(), None)
        }
        InstallError::Broken { path, why } => (
            format!("{} --version failed: {why}", path.display()),
            "reinstall it: scripts/setup, or `apt install criu`".to_owned(),
            None,
        ),
        InstallError::TooOld { path, found } => (
            format!("{} is CRIU {found}, which is too old", path.display()),
            format!("{VERSION_MIN} is the oldest that serves: run scripts/setup for a newer one"),
            Some(found.to_string()),
        ),
    }
}

fn trial(install: &Install) -> Check {
    const ID: &str = "dump-and-restore";
    let scratch = match vanishing_directory(&install.path) {
        Ok(scratch) => scratch,
        Err(reason) => {
            let remedy = "run it as root of the host (CAP_SYS_ADMIN), with tmpfs in the kernel";
            return Check::fail(Group::Criu, ID, reason, remedy);
        }
    };
    match round_trip(install, &scratch) {
        Ok(trip) => {
            let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1000.0;
            let found = format!(
                "a process with a TCP connection: dumped in {:.0} ms, restored in {:.0} ms, runs on",
                ms(trip.dump),
                ms(trip.restore)
            );
            Check::ok(Group::Criu, ID, found)
        }
        Err(RoundTripError::Criu { source }) => {
            let remedy = "if this CRIU is older than the kernel, run scripts/setup for a newer one";
            Check::fail(Group::Criu, ID, source.to_string(), remedy)
        }
        Err(error @ RoundTripError::Mute { .. }) => {
            let remedy = "run scripts/setup for a CRIU that fits the kernel";
            Check::fail(Group::Criu, ID, error.to_string(), remedy)
        }
        Err(error) => {
            let remedy = "run it as root of the host: it makes namespaces and mounts";
            Check::fail(Group::Criu, ID, error.to_string(), remedy)
        }
    }
}

/// A tmpfs that only this thread and what it starts can see, so it is gone when they are, even if they are killed.
fn vanishing_directory(criu: &Path) -> Result<PathBuf, String> {
    let program = std::env::current_exe().map_err(|error| format!("cannot find this executable: {error}"))?;
    let hides = |point: &Path| program.starts_with(point) || criu.starts_with(point);
    let point = MOUNT_POINTS.iter().map(Path::new).find(|point| point.is_dir() && !hides(point));
    let point = point.ok_or_else(|| format!("none of {} can be mounted on", MOUNT_POINTS.join(", ")))?;
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| format!("cannot make a mount namespace: {errno}"))?;
    // Otherwise the mount would show up on the host.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|errno| format!("cannot make the mounts of a new namespace private: {errno}"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("standin"), point, Some("tmpfs"), flags, Some(SCRATCH_OPTIONS)).map_err(|errno| {
        format!("cannot mount a tmpfs on {} of a new namespace: {errno}", point.display())
    })?;
    Ok(point.to_owned())
}
