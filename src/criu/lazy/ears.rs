//! Who has something to say to the one thread that listens: the caller, CRIU, and the tasks.

use std::os::fd::AsFd;

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

/// Most of them that are told at once; the others come next.
const READY_MAX: usize = 32;
const CALLER: u64 = u64::MAX;
const CRIU: u64 = u64::MAX - 1;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speaker {
    /// See [`super::Caller`].
    Caller,
    /// CRIU connects, or says something.
    Criu,
    /// The task with this number.
    Task(usize),
}

impl Speaker {
    fn word(self) -> u64 {
        match self {
            Self::Caller => CALLER,
            Self::Criu => CRIU,
            Self::Task(number) => number as u64,
        }
    }
}

/// All that is listened to.
#[derive(Debug)]
pub(super) struct Ears(Epoll);

impl Ears {
    pub(super) fn new() -> Result<Self, Errno> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(Self)
    }

    /// Listens to one more, until it is closed or told not to.
    pub(super) fn add(&self, speaker: Speaker, fd: impl AsFd) -> Result<(), Errno> {
        self.0.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, speaker.word()))
    }

    /// Not to this one any more; it may have been given up before.
    pub(super) fn remove(&self, fd: impl AsFd) {
        // ENOENT if so.
        let _ = self.0.delete(fd);
    }

    /// Waits for whoever has something to say.
    pub(super) fn listen(&self, timeout: EpollTimeout) -> Result<Vec<Speaker>, Errno> {
        let mut events = [EpollEvent::empty(); READY_MAX];
        let ready = match self.0.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            ready => ready?,
        };
        let speaker = |event: &EpollEvent| match event.data() {
            CALLER => Speaker::Caller,
            CRIU => Speaker::Criu,
            number => Speaker::Task(number as usize),
        };
        Ok(events[..ready].iter().map(speaker).collect())
    }
}
