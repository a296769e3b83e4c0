//! Which entries something happened to: the events of the file systems that the trees are on.
//!
//! ```text
//!   a system call of any process ──► the kernel queues an event before the call returns ──► drained by the next scan
//! ```
//!
//! Invariants:
//! - A mark is there before the walk that it is to spare the next ones: what happens during a walk is seen by the next
//!   scan. Tasks that are frozen have no call under way, so everything they did is in the queue.
//! - An event names the object and its directory by file handles, which the last scan has of every entry: changes
//!   through a name outside the tree, or through none any more, are seen; events of anything else are dropped.
//! - Whatever is not certain (the queue ran over, more changes than are kept, a mount came or went, the root is another
//!   directory) makes the next scan a walk. So does a file system or a kernel that cannot do this.
//!
//! No event tells of stores through a shared mapping nor of writes by `io_submit` (measured on 6.18: `aio_write` does
//! not call fsnotify): the caller names those files, see [`super::InUse`]. Writes of the kernel itself into a file that is
//! a loop device are not seen until it is closed.

mod sys;

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read, Seek},
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    fcntl::{OFlag, openat},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
};

use super::{
    state::{FileId, Owner, State, child_of},
    sys::{Handle, handle_of, mount_id},
    walk::{Doubt, Doubts},
};

/// Most changes of one tree that are kept between two scans; with more, walking is no worse.
const CHANGES_MAX: usize = 1 << 16;
/// What is read of the queue at a time.
const READ_BYTES: usize = 1 << 18;
/// From this kernel on, writes through an overlay raise events of the upper directory's files (and from 6.0 on, writes
/// by io_uring raise any).
const KERNEL_MIN: (u32, u32) = (6, 5);

/// What changes names, in the directory of the event.
const NAMES: u64 = libc::FAN_CREATE | libc::FAN_DELETE | libc::FAN_MOVED_FROM | libc::FAN_MOVED_TO;
/// Closing tells of what was written to a file without an event.
const CONTENT: u64 = libc::FAN_MODIFY | libc::FAN_ATTRIB | libc::FAN_CLOSE_WRITE;

const EVENT_HEAD_LEN: usize = 24;
const INFO_HEAD_LEN: usize = 4;
const FSID_LEN: usize = 8;
const HANDLE_HEAD_LEN: usize = 8;

/// What happened to one tree since the last scan.
#[derive(Debug, Default)]
pub(super) struct Happened {
    doubts: Doubts,
    /// Files that changed, by whatever name.
    files: HashSet<FileId>,
    /// It is not known what else happened.
    unknown: bool,
}

impl Happened {
    /// It is not known any more what happened.
    pub(super) fn lose(&mut self) {
        *self = Self { unknown: true, ..Self::default() };
    }

    /// `None`: anything may have.
    pub(super) fn doubts(self, state: &State) -> Option<Doubts> {
        let mut doubts = self.doubts;
        for name in self.files.into_iter().flat_map(|id| state.names(id)) {
            doubts.entry(name.clone()).or_default();
        }
        (!self.unknown).then_some(doubts)
    }

    fn note(&mut self, event: &Event<'_>, state: &State) {
        if self.unknown {
            return;
        }
        if let Some((dir, name)) = &event.named
            && let Some(Owner::Directory(dir)) = state.owner(dir)
        {
            let itself = name.is_empty() || *name == b".";
            let renamed = event.mask & NAMES != 0 && !itself;
            if itself || renamed {
                self.doubts.entry(dir.clone()).or_default();
            }
            if !itself {
                let doubt = if renamed { Doubt::Renamed } else { Doubt::Changed };
                let noted = self.doubts.entry(child_of(dir, name)).or_default();
                *noted = doubt.max(*noted);
            }
        }
        match event.object.as_ref().and_then(|object| state.owner(object)) {
            Some(Owner::File(id)) => {
                self.files.insert(*id);
            }
            Some(Owner::Directory(key)) => {
                self.doubts.entry(key.clone()).or_default();
            }
            None => {}
        }
        if self.doubts.len() + self.files.len() > CHANGES_MAX {
            self.lose();
        }
    }
}

/// A tree's share in what is told of a file system.
pub(super) struct Listener<'a> {
    pub(super) state: Option<&'a State>,
    pub(super) happened: &'a mut Happened,
}

/// One event; what of it is of no use is left out.
struct Event<'a> {
    mask: u64,
    named: Option<(Handle, &'a [u8])>,
    object: Option<Handle>,
}

/// A fanotify group that watches one file system.
#[derive(Debug)]
pub(super) struct Watch {
    group: File,
    /// The file system's device number.
    pub(super) dev: u64,
    buf: Vec<u8>,
}

impl Watch {
    /// Watches the file system that `root` is on. An error: it cannot be watched, here or on this kernel.
    pub(super) fn new(root: BorrowedFd<'_>, dev: u64) -> io::Result<Self> {
        if kernel()? < KERNEL_MIN {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        let mut watch = Self { group: sys::new_group()?, dev, buf: vec![0; READ_BYTES] };
        watch.check(root)?;
        let mask = NAMES | CONTENT | libc::FAN_ONDIR;
        sys::mark(&watch.group, libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM, mask, root)?;
        Ok(watch)
    }

    /// Whether events call things by the handles that we know them by: tried with the root itself.
    fn check(&mut self, root: BorrowedFd<'_>) -> io::Result<()> {
        let expected = handle_of(root)?;
        let mask = libc::FAN_OPEN | libc::FAN_ONDIR;
        sys::mark(&self.group, libc::FAN_MARK_ADD, mask, root)?;
        let opened =
            openat(root, c".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        let mut met = false;
        let read = self.drain(&mut |event| {
            met |= event.named.as_ref().is_some_and(|(handle, _)| *handle == expected);
        });
        sys::mark(&self.group, libc::FAN_MARK_REMOVE, mask, root)?;
        opened?;
        read?;
        if met { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)) }
    }

    /// Tells the listeners what happened since the last time.
    pub(super) fn tell(&mut self, listeners: &mut [Listener<'_>]) {
        let told = self.drain(&mut |event| {
            for listener in listeners.iter_mut() {
                // What is sent whole needs no events.
                if let Some(state) = listener.state {
                    listener.happened.note(event, state);
                }
            }
        });
        if told.is_err() {
            for listener in listeners {
                listener.happened.lose();
            }
        }
    }

    /// Reads what is in the queue now, which the kernel bounds (`fs.fanotify.max_queued_events`), and not what others add
    /// meanwhile. An error: not all of it could be read, or some was lost.
    fn drain(&mut self, each: &mut dyn FnMut(&Event<'_>)) -> io::Result<()> {
        let mut queued = sys::queued_bytes(&self.group)? / EVENT_HEAD_LEN;
        while queued > 0 {
            let len = match self.group.read(&mut self.buf) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let mut rest = &self.buf[..len];
            while !rest.is_empty() {
                let (event, after) = parse(rest).ok_or(io::ErrorKind::InvalidData)?;
                if event.mask & libc::FAN_Q_OVERFLOW != 0 {
                    return Err(io::ErrorKind::QuotaExceeded.into());
                }
                each(&event);
                queued = queued.saturating_sub(1);
                rest = after;
            }
        }
        Ok(())
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?).into())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The first event, and what follows it.
fn parse(bytes: &[u8]) -> Option<(Event<'_>, &[u8])> {
    let len = u32_at(bytes, 0)? as usize;
    let head_len = u16_at(bytes, 6)?;
    let mask = u64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?);
    let mut infos = bytes.get(head_len.max(EVENT_HEAD_LEN)..len)?;
    let mut event = Event { mask, named: None, object: None };
    while !infos.is_empty() {
        let kind = infos[0];
        let info_len = u16_at(infos, 2)?;
        let info = infos.get(INFO_HEAD_LEN + FSID_LEN..info_len)?;
        let handle_len = u32_at(info, 0)? as usize;
        let end = HANDLE_HEAD_LEN.checked_add(handle_len)?;
        // One of a kind that is not kept stands for nothing that is.
        let handle = Handle::new(u32_at(info, 4)? as i32, info.get(HANDLE_HEAD_LEN..end)?);
        match kind {
            libc::FAN_EVENT_INFO_TYPE_FID => event.object = handle,
            libc::FAN_EVENT_INFO_TYPE_DFID_NAME => {
                let name = info[end..].split(|&byte| byte == 0).next().unwrap_or_default();
                event.named = handle.map(|handle| (handle, name));
            }
            _ => {}
        }
        infos = &infos[info_len..];
    }
    Some((event, &bytes[len..]))
}

/// The kernel's version.
fn kernel() -> io::Result<(u32, u32)> {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut parts = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Tells when something was mounted or unmounted in the mount namespace that the trees are seen in.
#[derive(Debug)]
pub(super) struct Mounts {
    table: File,
}

impl Mounts {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { table: File::open("/proc/thread-self/mountinfo")? })
    }

    /// Whether a directory was opened through one of these mounts; of others nothing would be told.
    pub(super) fn hold(&self, dir: BorrowedFd<'_>) -> io::Result<bool> {
        let id = mount_id(dir)?.to_string();
        let mut text = Vec::new();
        (&self.table).rewind()?;
        (&self.table).read_to_end(&mut text)?;
        let mut ids = text.split(|&byte| byte == b'\n').map(|line| line.split(|&byte| byte == b' ').next());
        Ok(ids.any(|first| first == Some(id.as_bytes())))
    }

    /// Whether there was a change since the last time.
    pub(super) fn changed(&self) -> bool {
        // The kernel says so once, by an exceptional condition.
        let mut fds = [PollFd::new(self.table.as_fd(), PollFlags::POLLPRI)];
        let polled = poll(&mut fds, PollTimeout::ZERO);
        !matches!((polled, fds[0].revents()), (Ok(_), Some(events))
            if !events.intersects(PollFlags::POLLPRI | PollFlags::POLLERR))
    }
}
