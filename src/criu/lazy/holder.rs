//! A process that holds the tasks' userfaultfds too, so that they outlive the server.
//!
//! When the last descriptor of a userfaultfd closes, a page that was not put reads as zeros. With
//! a second holder the death of the server leaves the tasks waiting instead: stuck, but never wrong,
//! until whoever comes next kills them. The holder ends when it is told that all pages are there,
//! or, once the server is gone, with the last of the tasks.

use std::{
    convert::Infallible,
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
    path::Path,
    process::{Child, Command, Stdio, exit},
    time::Duration,
};

use nix::sys::{
    socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, recv, recvmsg, send, sendmsg,
        setsockopt, socketpair, sockopt,
    },
    time::TimeVal,
};

use super::{super::sys::descriptors, pager, sys};

/// To the holder: keep the descriptor beside this; its answer is the same.
const KEEP: &[u8] = b"k";
/// To the holder: all pages are there.
const DONE: &[u8] = b"d";
/// How long the holder may take to answer.
const ANSWER_SECONDS: i64 = 10;
/// How often it looks for the end of the tasks once the server is gone.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// The server's side of the holder.
#[derive(Debug)]
pub(super) struct Holder {
    child: Option<Child>,
    socket: OwnedFd,
}

impl Holder {
    pub(super) fn start(launcher: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_SECONDS, 0))?;
        let child = Command::new(launcher)
            .args(["enter", "hold"])
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { child: Some(child), socket })
    }

    /// Returns when the holder has the descriptor.
    pub(super) fn keep(&self, uffd: &OwnedFd) -> io::Result<()> {
        let socket = self.socket.as_raw_fd();
        let fds = [uffd.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<UnixAddr>(socket, &[io::IoSlice::new(KEEP)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        let mut answer = [0];
        match recv(socket, &mut answer, MsgFlags::empty())? {
            1 if answer == *KEEP => Ok(()),
            _ => Err(io::Error::other("the process that holds the userfaultfds has ended")),
        }
    }

    /// All pages are there: it may let go.
    pub(super) fn release(self) {
        // If it is gone, there is nothing to release.
        let _ = send(self.socket.as_raw_fd(), DONE, MsgFlags::MSG_NOSIGNAL);
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            std::thread::spawn(move || child.wait());
        }
    }
}

/// The holder itself: the verb `enter hold`, with the server at its standard input.
pub(in super::super) fn hold() -> Result<Infallible, io::Error> {
    pager::endure()?;
    let server = io::stdin();
    let server = server.as_fd().as_raw_fd();
    let mut held = Vec::new();
    loop {
        let mut word = [0];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let mut slices = [io::IoSliceMut::new(&mut word)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let Ok(message) = recvmsg::<UnixAddr>(server, &mut slices, Some(&mut space), flags) else { break };
        let kept = descriptors(&message)?;
        if !kept.is_empty() {
            held.extend(kept);
            send(server, KEEP, MsgFlags::MSG_NOSIGNAL)?;
        }
        match message.bytes {
            0 => break,
            _ if word == *DONE => exit(0),
            _ => {}
        }
    }
    while !held.is_empty() {
        held.retain(|uffd| !sys::is_over(uffd));
        std::thread::sleep(LOOK_INTERVAL);
    }
    exit(0)
}
