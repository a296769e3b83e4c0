//! userfaultfd as a server of missing pages uses it (include/uapi/linux/userfaultfd.h).

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
};

use nix::errno::Errno;

use super::super::sys::own;

const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;

const UFFDIO_CONTINUE: libc::c_ulong = 0xc020_aa07;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;

/// `struct uffd_msg`: the event, 7 bytes of padding, three words.
const MESSAGE_BYTES: usize = 32;

/// What a task did, or wants.
#[derive(Debug)]
pub(super) enum Event {
    /// It waits for the page around this address.
    Fault(u64),
    /// It forked; this is the child's userfaultfd.
    Fork(OwnedFd),
    /// It moved memory.
    Remap { from: u64, to: u64, length: u64 },
    /// It unmapped this, or gave its content up (MADV_DONTNEED and the like).
    Gone { start: u64, end: u64 },
    /// Something this file does not know.
    Unknown(u8),
}

/// Most events that are read at once.
const EVENTS_MAX: usize = 32;

/// Reads the events that are there, in the kernel's order (faults come before what else happened, whenever they did);
/// the descriptor does not block.
pub(super) fn read_events(uffd: &OwnedFd) -> io::Result<Vec<Event>> {
    let mut messages = [0u8; EVENTS_MAX * MESSAGE_BYTES];
    let length = match nix::unistd::read(uffd, &mut messages) {
        Ok(length) => length,
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    if !length.is_multiple_of(MESSAGE_BYTES) {
        return Err(io::Error::other(format!("userfaultfd messages of {length} bytes")));
    }
    Ok(messages[..length].chunks_exact(MESSAGE_BYTES).map(event).collect())
}

fn event(message: &[u8]) -> Event {
    let word = |index: usize| {
        let at = 8 + 8 * index;
        u64::from_ne_bytes(std::array::from_fn(|i| message[at + i]))
    };
    match message[0] {
        // Word 0 has the flags, word 1 the address.
        EVENT_PAGEFAULT => Event::Fault(word(1)),
        EVENT_FORK => Event::Fork(own(word(0) as u32 as i32)),
        EVENT_REMAP => Event::Remap { from: word(0), to: word(1), length: word(2) },
        EVENT_REMOVE | EVENT_UNMAP => Event::Gone { start: word(0), end: word(1) },
        other => Event::Unknown(other),
    }
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    done: i64,
}

/// Puts `bytes` (whole pages) at `to`, and wakes who waits for them. Returns how many bytes were
/// put; fewer than all, or an error if none.
pub(super) fn copy(uffd: &OwnedFd, to: u64, bytes: &[u8]) -> Result<usize, Errno> {
    let mut request = Copy { to, from: bytes.as_ptr() as u64, length: bytes.len() as u64, mode: 0, done: 0 };
    // SAFETY: the request is laid out as struct uffdio_copy; the kernel reads `length` bytes of
    // `bytes`, which lives until the call returns, and writes to the other process.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut request) };
    match Errno::result(result) {
        Ok(_) => Ok(bytes.len()),
        Err(_) if request.done > 0 => Ok(request.done as usize),
        Err(error) => Err(error),
    }
}

/// Puts a page of zeros at `at`, and wakes who waits for it.
pub(super) fn zero(uffd: &OwnedFd, at: u64, length: u64) -> Result<(), Errno> {
    let mut request = ZeroPage { range: Range { start: at, length }, mode: 0, done: 0 };
    // SAFETY: the request is laid out as struct uffdio_zeropage and refers to no memory of ours.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut request) };
    Errno::result(result).map(drop)
}

/// Whether the memory behind a userfaultfd is gone with its last task. Asked by way of a request
/// that anonymous memory refuses after the kernel has looked for the memory itself.
pub(super) fn is_over(uffd: &OwnedFd) -> bool {
    const ANY_ADDRESS: u64 = 1 << 30;
    // struct uffdio_continue is laid out as struct uffdio_zeropage.
    let mut request = ZeroPage { range: Range { start: ANY_ADDRESS, length: 4096 }, mode: 0, done: 0 };
    // SAFETY: the request is laid out as said and refers to no memory of ours.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_CONTINUE, &raw mut request) };
    Errno::result(result) == Err(Errno::ESRCH)
}

/// Has those who wait for a page in the range look again.
pub(super) fn wake(uffd: &OwnedFd, start: u64, length: u64) -> Result<(), Errno> {
    let mut request = Range { start, length };
    // SAFETY: the request is laid out as struct uffdio_range and refers to no memory of ours.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WAKE, &raw mut request) };
    Errno::result(result).map(drop)
}

/// Receives the descriptor that follows a pid on CRIU's socket, beside one byte of no meaning.
pub(super) fn receive_fd(socket: &impl AsFd) -> io::Result<OwnedFd> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
    let mut byte = [0];
    let mut slices = [io::IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let raw = socket.as_fd().as_raw_fd();
    let message = recvmsg::<UnixAddr>(raw, &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            let mut fds = fds.into_iter().map(own);
            return fds.next().ok_or_else(|| io::Error::other("no descriptor came"));
        }
    }
    Err(io::Error::other("a message without a descriptor came"))
}
