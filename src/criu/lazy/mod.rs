//! The server behind `criu restore --lazy-pages`: the tasks run at once, and each page comes when
//! it is touched, the rest behind.
//!
//! ```text
//!   listen ──CRIU connects──► restoring ──"restore finished"──► running ──nothing pending──► done
//!                                │  pid, userfaultfd            faults first, then the next chunk
//!                                └─ EOF: CRIU failed, and killed the tasks
//! ```
//!
//! What CRIU sends on `lazy-pages.socket` (uffd.c): for each task its pid (i32) and then its
//! userfaultfd by SCM_RIGHTS, for each zombie its negated pid alone, and at the end one word.
//!
//! A userfaultfd that is closed lets go of its memory: a page that was not put is then *zero*, and
//! the task goes on with it. So a second process (`holder.rs`) holds each of them too, until the
//! last page is there. If the server fails, or this process dies, a task that touches a missing page
//! waits for ever: stuck, never wrong. Whoever comes next must find a durable mark that a lazy
//! restore was under way (written before the restore, removed when [`LazyServer::serve`] returns
//! well), kill the tasks and restore anew. The holder must not be killed with this process: a
//! service manager that ends all of a service's processes at once (systemd's default KillMode)
//! ends the guarantee.

mod flat;
mod holder;
mod pending;
mod sys;

use std::{
    collections::HashMap,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

pub use self::flat::FlatImages;
pub(super) use self::holder::hold;
use self::{
    holder::Holder,
    pending::{Awaited, Pending},
    sys::Event,
};
use super::{
    Install,
    images::{self, ImageError, Pagemap},
};
use crate::model::{Extent, PAGE_SIZE, Space};

/// Name of the socket in the directory of the images; CRIU knows it by heart.
pub const SOCKET_NAME: &str = "lazy-pages.socket";

/// The word that CRIU sends when the tasks run.
const RESTORE_FINISHED: i32 = 0x5253_5446;
/// Pages put around one that is waited for.
const FAULT_BYTES: u64 = 64 << 10;
/// Chunk of the background transfer right after a fault, and the most it grows to: a fault may
/// have to wait for one (about 0.2 ms at the most).
const CHUNK_BYTES_MIN: u64 = 64 << 10;
const CHUNK_BYTES_MAX: u64 = 1 << 20;
/// Events taken of one task before the others get their turn.
const EVENTS_PER_TURN_MAX: usize = 64;
/// Tasks of one restore, forked ones included.
const TASKS_MAX: usize = 1 << 16;
/// How long the next part of a message may take once CRIU has begun it.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a task's cgroup may be out of memory.
const NO_MEMORY_TIMEOUT: Duration = Duration::from_secs(10);

/// Where pages come from.
pub trait PageSource: Send + Sync {
    /// Fills `buffer` (whole pages) with the pages of `space` from `start` on, which is an address
    /// of the image; false if one of them is not there. Asked for pages of one run of the page map.
    fn read(&self, space: Space, start: u64, buffer: &mut [u8]) -> io::Result<bool>;
}

/// Why pages cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// The images do not say which pages are lazy.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The socket.
    #[error("listening on {SOCKET_NAME} in {directory} failed: {source}", directory = .directory.display())]
    Listen {
        /// The images directory.
        directory: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The process beside us.
    #[error("holding userfaultfds in a process beside the agent failed: {0}")]
    Holder(#[source] io::Error),
    /// [`Stop::stop`] was called before the restore was finished.
    #[error("serving pages was stopped before the restore was finished")]
    Stopped,
    /// CRIU closed the socket; its own error says why.
    #[error("CRIU gave the restore up before it was finished")]
    GivenUp,
    /// CRIU sent something else.
    #[error("CRIU sent {0} on {SOCKET_NAME}: this version's lazy restore is unknown, restore eagerly")]
    Protocol(String),
    /// A page the image should have.
    #[error(
        "the image has no page at {address:#x} of {space:?}: the workload must be killed and restored from a whole image"
    )]
    Missing {
        /// Which space.
        space: Space,
        /// Address in the image.
        address: u64,
    },
    /// Reading a page.
    #[error("reading pages of {space:?} failed: {source}. The workload must be killed and restored anew")]
    Source {
        /// Which space.
        space: Space,
        /// Why.
        source: io::Error,
    },
    /// The kernel.
    #[error("{what} of task {pid} failed: {source}. The workload must be killed and restored anew")]
    Kernel {
        /// What was done.
        what: &'static str,
        /// The task, by its pid in the image.
        pid: u32,
        /// Why.
        source: io::Error,
    },
}

/// What was served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LazySummary {
    /// Tasks, forked ones included.
    pub tasks: usize,
    /// Faults answered.
    pub faults: u64,
    /// Pages put because they were waited for, and their neighbours.
    pub fault_pages: u64,
    /// Pages put in the background.
    pub pushed_pages: u64,
    /// From the end of the restore to the last page.
    pub pushing: Duration,
}

/// Ends a server whose restore is not finished; has no effect on one whose is.
#[derive(Clone, Debug)]
pub struct Stop(Arc<EventFd>);

impl Stop {
    /// Ends it.
    pub fn stop(&self) {
        // Fails only if the counter is full, that is, stopped already.
        let _ = self.0.write(1);
    }
}

/// A server that listens, and knows which pages of which task will come late.
#[derive(Debug)]
pub struct LazyServer {
    listener: UnixListener,
    expected: HashMap<u32, Pending>,
    stop: Arc<EventFd>,
    holder: Holder,
}

impl LazyServer {
    /// Listens in the directory of the images to be restored: their page maps say which pages are
    /// lazy. To be called before the restore is asked for.
    pub fn listen(install: &Install, directory: &Path) -> Result<Self, LazyError> {
        let failed = |source| LazyError::Listen { directory: directory.to_owned(), source };
        let expected = expected_pages(directory)?;
        let path = directory.join(SOCKET_NAME);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        // The path of a socket is limited to 107 bytes, so name it by way of the open directory.
        let open = std::fs::File::open(directory).map_err(failed)?;
        let short = format!("/proc/self/fd/{}/{SOCKET_NAME}", std::os::fd::AsRawFd::as_raw_fd(&open));
        let listener = UnixListener::bind(short).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let stop = Arc::new(stop.map_err(|error| failed(error.into()))?);
        let holder = Holder::start(install).map_err(LazyError::Holder)?;
        Ok(Self { listener, expected, stop, holder })
    }

    /// A handle by which another thread can end it.
    pub fn stopper(&self) -> Stop {
        Stop(self.stop.clone())
    }

    /// Serves one restore until each task has all its pages; blocks. `finished` is called when the
    /// tasks run. After an error tasks that run wait for missing pages, and must be killed.
    pub fn serve(
        self,
        source: &dyn PageSource,
        finished: &mut dyn FnMut(),
    ) -> Result<LazySummary, LazyError> {
        let mut session = Session {
            source,
            expected: self.expected,
            holder: self.holder,
            tasks: Vec::new(),
            buffer: vec![0; CHUNK_BYTES_MAX as usize],
            finished_at: None,
            summary: LazySummary::default(),
        };
        session.run(&self.listener, &self.stop, finished)?;
        session.holder.release();
        Ok(session.summary)
    }
}

/// The lazy pages of each task, cut at the borders of mappings: one copy cannot span two.
fn expected_pages(directory: &Path) -> Result<HashMap<u32, Pending>, LazyError> {
    let mut expected = HashMap::new();
    for task in images::pstree(&images::read(directory, images::PSTREE_FILE)?)? {
        let name = images::pagemap_file(Space::Task(task.pid));
        let bytes = match images::read(directory, &name) {
            // A zombie has no memory.
            Err(ImageError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        let lazy = Pagemap::decode(&name, &bytes)?.runs.into_iter().filter(|run| run.lazy);
        let lazy: Vec<Extent> = lazy.map(|run| run.extent).collect();
        let mm = images::mm_file(task.pid);
        let vmas = images::mappings(&mm, &images::read(directory, &mm)?)?;
        expected.insert(task.pid, Pending::new(&cut_at_mappings(&lazy, &vmas)));
    }
    Ok(expected)
}

fn cut_at_mappings(runs: &[Extent], vmas: &[images::Vma]) -> Vec<Extent> {
    let mut cut = Vec::with_capacity(runs.len());
    for run in runs {
        let mut start = run.start;
        let from = vmas.partition_point(|vma| vma.end <= run.start);
        for border in vmas[from..].iter().map(|vma| vma.end).take_while(|end| *end < run.end()) {
            cut.push(Extent { start, pages: (border - start) / PAGE_SIZE });
            start = border;
        }
        cut.push(Extent { start, pages: (run.end() - start) / PAGE_SIZE });
    }
    cut
}

#[derive(Debug)]
struct Task {
    pid: u32,
    uffd: OwnedFd,
    pending: Pending,
    chunk_bytes: u64,
    exited: bool,
}

/// Who is to be attended to.
struct Ready {
    stopped: bool,
    /// CRIU connects or says something.
    spoken_to: bool,
    /// Indices of tasks that did or want something.
    tasks: Vec<usize>,
}

/// How an attempt to put pages ended.
enum Put {
    /// All, or all that the task still wants of them.
    Done,
    /// The task's mappings are changing: its events must be read first.
    Changing,
    /// The task is gone.
    Exited,
}

struct Session<'a> {
    source: &'a dyn PageSource,
    expected: HashMap<u32, Pending>,
    holder: Holder,
    tasks: Vec<Task>,
    buffer: Vec<u8>,
    finished_at: Option<Instant>,
    summary: LazySummary,
}

impl Session<'_> {
    fn run(
        &mut self,
        listener: &UnixListener,
        stop: &EventFd,
        finished: &mut dyn FnMut(),
    ) -> Result<(), LazyError> {
        let mut socket: Option<UnixStream> = None;
        let mut turn = 0;
        loop {
            if let Some(since) = self.finished_at {
                self.tasks.retain(|task| !task.exited && !task.pending.is_empty());
                if self.tasks.is_empty() {
                    self.summary.pushing = since.elapsed();
                    return Ok(());
                }
            }
            let ready = self.wait(listener, stop, socket.as_ref())?;
            // What CRIU said comes first: it may be that the tasks run.
            if ready.stopped && !ready.spoken_to {
                return Err(LazyError::Stopped);
            }
            for index in ready.tasks.iter().copied() {
                self.events(index)?;
            }
            if ready.spoken_to {
                match &socket {
                    None => socket = Some(accept(listener)?),
                    Some(stream) if self.hear(stream)? => finished(),
                    Some(_) => {}
                }
            }
            if ready.tasks.is_empty() && !self.tasks.is_empty() && self.finished_at.is_some() {
                turn += 1;
                self.push(turn)?;
            }
        }
    }

    /// Waits for the stop handle, the socket and the tasks; once there are pages to push, only
    /// looks at the tasks.
    fn wait(
        &self,
        listener: &UnixListener,
        stop: &EventFd,
        socket: Option<&UnixStream>,
    ) -> Result<Ready, LazyError> {
        let running = self.finished_at.is_some();
        let speaker = socket.map_or_else(|| listener.as_fd(), UnixStream::as_fd);
        let mut fds: Vec<PollFd<'_>> =
            self.tasks.iter().map(|task| PollFd::new(task.uffd.as_fd(), PollFlags::POLLIN)).collect();
        if !running {
            fds.push(PollFd::new(stop.as_fd(), PollFlags::POLLIN));
            fds.push(PollFd::new(speaker, PollFlags::POLLIN));
        }
        let timeout = if running { PollTimeout::ZERO } else { PollTimeout::NONE };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                let source = error.into();
                return Err(LazyError::Kernel { what: "waiting for faults", pid: 0, source });
            }
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let (tasks, head) = fds.split_at(self.tasks.len());
        Ok(Ready {
            stopped: head.first().is_some_and(is_ready),
            spoken_to: head.get(1).is_some_and(is_ready),
            tasks: (0..tasks.len()).filter(|index| is_ready(&tasks[*index])).collect(),
        })
    }

    /// Takes one message of CRIU; true if the restore is finished by it.
    fn hear(&mut self, socket: &UnixStream) -> Result<bool, LazyError> {
        let mut word = [0; 4];
        let mut reader = socket;
        if let Err(error) = reader.read_exact(&mut word) {
            return Err(match error.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => LazyError::GivenUp,
                _ => LazyError::Protocol(format!("no whole word ({error})")),
            });
        }
        let word = i32::from_ne_bytes(word);
        if word == RESTORE_FINISHED {
            self.finished_at = Some(Instant::now());
            return Ok(true);
        }
        let Ok(pid) = u32::try_from(word) else { return Ok(false) };
        let uffd = sys::receive_fd(socket)
            .map_err(|error| LazyError::Protocol(format!("pid {pid} without a descriptor ({error})")))?;
        let Some(pending) = self.expected.remove(&pid) else {
            return Err(LazyError::Protocol(format!("pid {pid}, which is not in the image")));
        };
        self.add(pid, uffd, pending)?;
        Ok(false)
    }

    fn add(&mut self, pid: u32, uffd: OwnedFd, pending: Pending) -> Result<(), LazyError> {
        self.holder.keep(&uffd).map_err(LazyError::Holder)?;
        self.tasks.push(Task { pid, uffd, pending, chunk_bytes: CHUNK_BYTES_MIN, exited: false });
        self.summary.tasks += 1;
        if self.tasks.len() > TASKS_MAX {
            return Err(LazyError::Protocol(format!("more than {TASKS_MAX} tasks")));
        }
        Ok(())
    }

    /// Handles what a task did and wants.
    fn events(&mut self, index: usize) -> Result<(), LazyError> {
        for _ in 0..EVENTS_PER_TURN_MAX {
            let task = &mut self.tasks[index];
            let event = sys::next_event(&task.uffd).map_err(|source| LazyError::Kernel {
                what: "reading a fault",
                pid: task.pid,
                source,
            })?;
            match event {
                None => return Ok(()),
                Some(Event::Fault(address)) => self.fault(index, address - address % PAGE_SIZE)?,
                Some(Event::Gone { start, end }) => task.pending.remove(start, end),
                Some(Event::Remap { from, to, length }) => task.pending.remap(from, to, length),
                // The kernel has held back every copy since the fork began, so what was pending
                // then still is, and is what the child lacks.
                Some(Event::Fork(uffd)) => {
                    let (pid, pending) = (task.pid, task.pending.clone());
                    self.add(pid, uffd, pending)?;
                }
                Some(Event::Unknown(event)) => {
                    let source = io::Error::other(format!("unknown event {event:#x}"));
                    return Err(LazyError::Kernel { what: "reading a fault", pid: task.pid, source });
                }
            }
        }
        Ok(())
    }

    fn fault(&mut self, index: usize, address: u64) -> Result<(), LazyError> {
        self.summary.faults += 1;
        let task = &mut self.tasks[index];
        task.chunk_bytes = CHUNK_BYTES_MIN;
        if let Some(run) = task.pending.at(address) {
            let end = run.end.min(address + FAULT_BYTES);
            let (pages, put) = self.put(index, Awaited { end, ..run })?;
            self.summary.fault_pages += pages;
            if matches!(put, Put::Done) {
                return Ok(());
            }
        } else if let Err(error) = sys::zero(&task.uffd, address, PAGE_SIZE) {
            // Memory that the task had given up or never touched. Present already, or just being
            // unmapped: it shall look again.
            match error {
                Errno::EEXIST | Errno::EAGAIN | Errno::ENOENT => {}
                Errno::ESRCH | Errno::ENOSPC => task.exited = true,
                error => {
                    let source = error.into();
                    return Err(LazyError::Kernel { what: "filling a page", pid: task.pid, source });
                }
            }
        } else {
            return Ok(());
        }
        // One that is woken without its page faults again, which comes behind the event that
        // was in the way. A task that is gone cannot be woken.
        let task = &self.tasks[index];
        let _ = sys::wake(&task.uffd, address, PAGE_SIZE);
        Ok(())
    }

    /// Puts the next chunk of one of the tasks, each in its turn.
    fn push(&mut self, turn: usize) -> Result<(), LazyError> {
        let index = turn % self.tasks.len();
        let task = &mut self.tasks[index];
        let Some(run) = task.pending.first() else { return Ok(()) };
        let end = run.end.min(run.start + task.chunk_bytes);
        task.chunk_bytes = (task.chunk_bytes * 2).min(CHUNK_BYTES_MAX);
        let (pages, put) = self.put(index, Awaited { end, ..run })?;
        self.summary.pushed_pages += pages;
        if matches!(put, Put::Changing) {
            self.events(index)?;
        }
        Ok(())
    }

    /// Reads a run, at most [`CHUNK_BYTES_MAX`], and puts it; what was put is pending no more.
    /// Returns how many pages were put.
    fn put(&mut self, index: usize, run: Awaited) -> Result<(u64, Put), LazyError> {
        let task = &mut self.tasks[index];
        let space = Space::Task(task.pid);
        let bytes = &mut self.buffer[..(run.end - run.start) as usize];
        match self.source.read(space, run.image, bytes) {
            Ok(true) => {}
            Ok(false) => return Err(LazyError::Missing { space, address: run.image }),
            Err(source) => return Err(LazyError::Source { space, source }),
        }
        let page = PAGE_SIZE as usize;
        let (mut done, mut pages) = (0, 0);
        // One page at a time after the kernel did not find one mapping for all.
        let mut step = bytes.len();
        let mut no_memory_since: Option<Instant> = None;
        while done < bytes.len() {
            let at = run.start + done as u64;
            let piece = &bytes[done..bytes.len().min(done + step)];
            match sys::copy(&task.uffd, at, piece) {
                Ok(length) => {
                    pages += (length / page) as u64;
                    done += length;
                    no_memory_since = None;
                }
                Err(Errno::EAGAIN) => {
                    task.pending.remove(run.start, at);
                    return Ok((pages, Put::Changing));
                }
                Err(Errno::ENOENT) if step > page => step = page,
                // Present already; or no mapping of ours is there. Changes of mappings that are
                // under way say EAGAIN, so the latter is one whose event was read.
                Err(Errno::EEXIST | Errno::ENOENT) => done += page,
                Err(Errno::ESRCH | Errno::ENOSPC) => {
                    task.exited = true;
                    return Ok((pages, Put::Exited));
                }
                Err(Errno::ENOMEM)
                    if no_memory_since.get_or_insert_with(Instant::now).elapsed() < NO_MEMORY_TIMEOUT =>
                {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => {
                    let source = error.into();
                    return Err(LazyError::Kernel { what: "putting pages", pid: task.pid, source });
                }
            }
        }
        task.pending.remove(run.start, run.end);
        Ok((pages, Put::Done))
    }
}

fn accept(listener: &UnixListener) -> Result<UnixStream, LazyError> {
    let failed = |error: io::Error| LazyError::Protocol(format!("a connection that failed ({error})"));
    let (socket, _) = listener.accept().map_err(failed)?;
    socket.set_nonblocking(false).map_err(failed)?;
    socket.set_read_timeout(Some(MESSAGE_TIMEOUT)).map_err(failed)?;
    Ok(socket)
}
