//! The bpf(2) calls: which programs are in force in a cgroup, and attaching one to another.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

use super::super::sys::own;

const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Beside others.
const BPF_F_ALLOW_MULTI: u32 = 2;
/// Those of the cgroups above it too.
const BPF_F_QUERY_EFFECTIVE: u32 = 1;
/// The most that the kernel attaches to one cgroup, as often as cgroups are nested here.
const PROGRAMS_MAX: usize = 64 * 4;

/// `union bpf_attr` as BPF_PROG_QUERY takes it.
#[repr(C)]
struct Query {
    cgroup: u32,
    kind: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
}

/// The ids of the programs that say what may be done with devices in a cgroup.
pub(super) fn programs(cgroup: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut ids = vec![0_u32; PROGRAMS_MAX];
    let mut query = Query {
        cgroup: cgroup.as_raw_fd().unsigned_abs(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_QUERY_EFFECTIVE,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: PROGRAMS_MAX as u32,
        padding: 0,
    };
    match bpf(BPF_PROG_QUERY, &mut query) {
        // A kernel without them: nobody attached any.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {
            return Ok(Vec::new());
        }
        asked => asked?,
    };
    ids.truncate(query.count as usize);
    Ok(ids)
}

/// A descriptor of a program.
pub(super) fn program(id: u32) -> io::Result<OwnedFd> {
    bpf(BPF_PROG_GET_FD_BY_ID, &mut [id, 0, 0]).map(own)
}

/// Has a program decide in a cgroup too.
pub(super) fn attach(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> io::Result<()> {
    let [program, cgroup] = [program, cgroup].map(|fd| fd.as_raw_fd().unsigned_abs());
    bpf(BPF_PROG_ATTACH, &mut [cgroup, program, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI]).map(drop)
}

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: every caller passes the beginning of `union bpf_attr` as the command takes it, which outlives the call, as does
    // what it points to; its length is passed along, and the kernel takes the rest for zeros.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as libc::c_int) }
}
