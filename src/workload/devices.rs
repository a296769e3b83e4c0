//! Which devices the processes of a cgroup may use and make: in cgroup v2 what BPF programs say that are attached to it, by the
//! engine of a container. In cgroup v1 a controller does.

mod sys;

use std::{fs::File, io, os::fd::AsFd as _, path::Path};

/// Has the processes of a cgroup use no other devices than those of another one may.
pub(super) fn allow_as(model: &Path, cgroup: &Path) -> io::Result<()> {
    let (model, cgroup) = (File::open(model)?, File::open(cgroup)?);
    for id in sys::programs(model.as_fd())? {
        sys::attach(sys::program(id)?.as_fd(), cgroup.as_fd())?;
    }
    Ok(())
}
