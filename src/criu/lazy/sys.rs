//! userfaultfd as a server of missing pages uses it (include/uapi/linux/userfaultfd.h).

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd},
};

use memmap2::{MmapMut, MmapOptions};
use nix::errno::Errno;

use super::super::sys::own;
use crate::model::PAGE_SIZE;

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
pub(super) const MESSAGE_BYTES: usize = 32;
/// Most messages that are read at once.
pub(super) const EVENTS_MAX: usize = 32;

/// What the kernel says of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message([u8; MESSAGE_BYTES]);

/// What a task did, or wants.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    /// It waits for the page around this address.
    Fault(u64),
    /// It forked; this is the child's userfaultfd.
    Fork(RawFd),
    /// It moved memory.
    Remap { from: u64, to: u64, length: u64 },
    /// It unmapped this, or gave its content up (MADV_DONTNEED and the like).
    Gone { start: u64, end: u64 },
    /// Something this file does not know.
    Unknown(u8),
}

impl From<[u8; MESSAGE_BYTES]> for Message {
    fn from(bytes: [u8; MESSAGE_BYTES]) -> Self {
        Self(bytes)
    }
}

impl Message {
    pub(super) fn new(event: u8, words: [u64; 3]) -> Self {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0] = event;
        bytes[8..].copy_from_slice(words.map(u64::to_ne_bytes).as_flattened());
        Self(bytes)
    }

    #[cfg(test)]
    pub(super) fn gone(start: u64, end: u64) -> Self {
        Self::new(EVENT_UNMAP, [start, end, 0])
    }

    pub(super) fn bytes(&self) -> &[u8; MESSAGE_BYTES] {
        &self.0
    }

    pub(super) fn word(&self, index: usize) -> u64 {
        let at = 8 + 8 * index;
        u64::from_ne_bytes(std::array::from_fn(|i| self.0[at + i]))
    }

    /// Whether it is said once; who waits for a page can be made to say so again.
    pub(super) fn lasts(&self) -> bool {
        self.0[0] != EVENT_PAGEFAULT
    }

    pub(super) fn event(&self) -> Event {
        match self.0[0] {
            // Word 0 has the flags, word 1 the address.
            EVENT_PAGEFAULT => Event::Fault(self.word(1)),
            EVENT_FORK => Event::Fork(self.word(0) as u32 as RawFd),
            EVENT_REMAP => Event::Remap { from: self.word(0), to: self.word(1), length: self.word(2) },
            EVENT_REMOVE | EVENT_UNMAP => Event::Gone { start: self.word(0), end: self.word(1) },
            other => Event::Unknown(other),
        }
    }
}

/// Reads the messages that are there into a buffer, and says which, in the kernel's order (faults come before what else
/// happened, whenever they did); the descriptor does not block.
pub(super) fn read_messages(uffd: &OwnedFd, buffer: &mut [u8]) -> io::Result<Vec<Message>> {
    let length = match nix::unistd::read(uffd, buffer) {
        Ok(length) => length,
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    if !length.is_multiple_of(MESSAGE_BYTES) {
        return Err(io::Error::other(format!("userfaultfd messages of {length} bytes")));
    }
    Ok(messages(&buffer[..length]))
}

/// The messages of a buffer, to the first that is none.
pub(super) fn messages(buffer: &[u8]) -> Vec<Message> {
    let (chunks, _) = buffer.as_chunks::<MESSAGE_BYTES>();
    chunks.iter().take_while(|bytes| bytes[0] != 0).map(|bytes| Message(*bytes)).collect()
}

/// The first page of a file as memory that all have who map it.
pub(super) fn shared_page(file: &File) -> io::Result<MmapMut> {
    // SAFETY: the file is a memfd that nobody cuts, and is written to elsewhere only behind the bytes that are read here.
    unsafe { MmapOptions::new().len(PAGE_SIZE as usize).map_mut(file) }
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

/// Has all who wait for a page look again.
pub(super) fn wake_all(uffd: &OwnedFd) -> Result<(), Errno> {
    /// Below it nobody maps anything (mmap_min_addr), and behind the end nobody can.
    const FIRST: u64 = 1 << 16;
    const END: u64 = (1 << 47) - PAGE_SIZE;
    wake(uffd, FIRST, END - FIRST)
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
