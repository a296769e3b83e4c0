//! A CRIU's process: our child, or a fork of another CRIU.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    process::Child,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

/// See the module. Dropped, it goes on, and leaves nothing when it ends.
#[derive(Debug)]
pub(super) enum Process {
    /// To be reaped.
    Child(Option<Child>),
    /// Reaped by the CRIU that it was forked from.
    Forked(OwnedFd),
}

impl Process {
    pub(super) fn has_ended(&mut self) -> bool {
        match self {
            // An error means that there is no such child any more.
            Self::Child(child) => child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None))),
            Self::Forked(pidfd) => {
                let mut asked = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
                !matches!(poll(&mut asked, PollTimeout::ZERO), Ok(0) | Err(Errno::EINTR))
            }
        }
    }

    /// The pid of a child in our pid namespace.
    pub(super) fn id(&self) -> Option<u32> {
        match self {
            Self::Child(child) => child.as_ref().map(Child::id),
            Self::Forked(_) => None,
        }
    }
}

impl From<Child> for Process {
    fn from(child: Child) -> Self {
        Self::Child(Some(child))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Self::Child(child) = self
            && let Some(mut child) = child.take()
            && matches!(child.try_wait(), Ok(None))
        {
            std::thread::spawn(move || child.wait());
        }
    }
}
