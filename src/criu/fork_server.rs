//! A CRIU that is never given a task: those that dump are forked from it (`bridge/fork.c`).
//!
//! ```text
//!  agent ──descriptors and their numbers──► fork server ──fork──► CRIU that waits for its dump
//!        ◄──pid, pidfd──────────────────────
//! ```
//!
//! Starting a CRIU takes more processor time than it then takes to dump, nearly all of it for its libraries.
//!
//! Invariants: a fork has just the descriptors that it was made with, none of another's; both end when the agent does.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
};

use nix::sys::{
    socket::{ControlMessage, MsgFlags, UnixAddr, recvmsg, sendmsg, setsockopt, sockopt},
    time::TimeVal,
};

use super::{
    Install,
    process::Process,
    spawn::{self, Spawn, SpawnError, Started, slot},
    sys,
};

/// How long a fork may take: a millisecond, unless the machine is starved.
const FORK_SECONDS_MAX: i64 = 10;

/// See the module. Dropped, it ends; what was forked goes on.
#[derive(Debug)]
pub struct ForkServer {
    _process: Process,
    orders: OwnedFd,
}

impl ForkServer {
    /// Starts one; as long as starting any CRIU. Of `options` it takes where, and the bridge, which it needs.
    pub fn start(install: &Install, options: &Spawn<'_>) -> Result<Self, SpawnError> {
        let Started { process, ends } = spawn::start_to_fork(install, options)?;
        let rpc = ends.rpc;
        setsockopt(&rpc, sockopt::ReceiveTimeout, &TimeVal::new(FORK_SECONDS_MAX, 0)).map_err(|error| {
            SpawnError::Prepare { what: "limiting the wait for a fork", source: error.into() }
        })?;
        Ok(Self { _process: process, orders: rpc })
    }

    /// A CRIU for a dump to the directory `images`.
    pub(super) fn fork(&self, images: BorrowedFd<'_>) -> Result<Started, SpawnError> {
        let (ours, theirs) = spawn::dump_ends()?;
        let mut numbered: Vec<(RawFd, i32)> =
            theirs.iter().map(|(fd, slot)| (fd.as_raw_fd(), *slot)).collect();
        numbered.push((images.as_raw_fd(), slot::IMAGES));
        let failed = |source| SpawnError::Prepare { what: "forking a CRIU", source };
        let pidfd = self.order(&numbered).map_err(failed)?;
        Ok(Started { process: Process::Forked(pidfd), ends: ours })
    }

    fn order(&self, numbered: &[(RawFd, i32)]) -> io::Result<OwnedFd> {
        let (fds, numbers): (Vec<RawFd>, Vec<i32>) = numbered.iter().copied().unzip();
        let numbers: Vec<u8> = numbers.into_iter().flat_map(i32::to_ne_bytes).collect();
        let orders = self.orders.as_raw_fd();
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<UnixAddr>(orders, &[IoSlice::new(&numbers)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;

        let mut word = [0; 4];
        let mut space = nix::cmsg_space!(RawFd);
        let mut parts = [IoSliceMut::new(&mut word)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(orders, &mut parts, Some(&mut space), flags)?;
        let (length, pidfd) = (message.bytes, sys::descriptors(&message)?.pop());
        match (length, i32::from_ne_bytes(word), pidfd) {
            (4, _, Some(pidfd)) => Ok(pidfd),
            (4, error, None) if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the CRIU to be forked has ended")),
        }
    }
}
