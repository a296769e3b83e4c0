//! The agent's end of the socket to the bridge of a dump (`bridge/lists.c`): it is told when lists of the frozen tree are
//! there, and tells when all tasks stand and when CRIU has left one.

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, Shutdown, recv, send, shutdown},
};

/// The bridge's.
const ABOUT_TO_STOP: u32 = 1 << 31;

/// What the bridge is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// One more list is there.
    List,
    /// All lists of mappings are there.
    Mappings,
    /// All lists of what is in the memory are there.
    Pages,
    /// Which protocols the sockets of the tree have.
    Protocols(u32),
}

/// What the bridge tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// CRIU is about to stop the first task, and runs on this processor.
    Stopping(usize),
    /// All tasks of the tree stand.
    Stand,
    /// CRIU is done with the task of this pid, as it sees pids: it runs no code in it any more, nor writes to its memory.
    Left(u32),
}

/// The socket. Once closed, the bridge waits for no list.
#[derive(Debug)]
pub struct Gate(OwnedFd);

impl Gate {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Tells the bridge, which waits if it came to need a list that is not there.
    pub fn tell(&self, told: Told) {
        let words = match told {
            Told::List => [0, 0],
            Told::Mappings => [1, 0],
            Told::Pages => [2, 0],
            Told::Protocols(bits) => [3, bits],
        };
        // A CRIU that is gone needs none.
        let _ = send(self.0.as_raw_fd(), words.map(u32::to_ne_bytes).as_flattened(), MsgFlags::MSG_NOSIGNAL);
    }

    /// Waits for the bridge's next word, for so long without giving up the processor. `None`: there will be no more.
    pub fn hear(&self, awake: Duration) -> Option<Heard> {
        let until = Instant::now() + awake;
        let mut word = [0; 4];
        loop {
            let flags = if Instant::now() < until { MsgFlags::MSG_DONTWAIT } else { MsgFlags::empty() };
            return match recv(self.0.as_raw_fd(), &mut word, flags) {
                Ok(4) => Some(match u32::from_ne_bytes(word) {
                    0 => Heard::Stand,
                    word if word & ABOUT_TO_STOP != 0 => Heard::Stopping((word & !ABOUT_TO_STOP) as usize),
                    pid => Heard::Left(pid),
                }),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => {
                    std::hint::spin_loop();
                    continue;
                }
                _ => None,
            };
        }
    }

    /// The bridge is heard no more, and told still.
    pub fn listen_no_more(&self) {
        // It fails if the other side is gone, to the same effect.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Read);
    }

    /// Ends the talk, for whoever waits on either side.
    pub fn close(&self) {
        // It fails if the other side is gone, to the same effect.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}
