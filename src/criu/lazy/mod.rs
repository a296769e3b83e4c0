//! The server behind `criu restore --lazy-pages`: the tasks run at once, and each page comes when
//! it is touched, the rest behind.
//!
//! ```text
//!   listen ──CRIU connects──► restoring ──"restore finished"──► running ──nothing pending──► done
//!                                │  pid, userfaultfd            faults are answered, and between them the rest comes:
//!                                │                              neighbours of faults, hot pages, all others
//!                                └─ EOF: CRIU failed, and killed the tasks
//! ```
//!
//! What CRIU sends on `lazy-pages.socket` (uffd.c): for each task its pid (i32) and then its
//! userfaultfd by SCM_RIGHTS, for each zombie its negated pid alone, and at the end one word.
//!
//! A userfaultfd that is closed lets go of its memory: a page that was not put is then *zero*, and
//! the task goes on with it. So two processes, which do not depend on the agent, have one table of descriptors
//! (CLONE_FILES): the one that serves, and the one that it was forked from ([`Pager`]), which does nothing but wait for its
//! end. What the tasks did with their memory is in a journal that both have (`journal.rs`).
//!
//! | who is killed | what becomes of the tree |
//! |---|---|
//! | the agent | nothing: it is served to the last page |
//! | who serves | another is forked, which goes on; a task that touches a missing page waits that long |
//! | who waits | nothing |
//! | who serves fails | a task that touches a missing page waits, stuck but never wrong; the agent hears of it, or finds the mark and that nobody holds its lock, and kills the tree |
//!
//! Only the death of both in one moment could let a task see zeros. So neither is killed for memory
//! (oom_score_adj), both ignore what asks a program to end, and a service manager must not end all of a service's
//! processes at once (systemd: `KillMode=process`).
//!
//! The mark is a file that is written before the restore and names the epoch. The pager holds a lock on it (fcntl), and
//! removes it behind the last page: a mark that nobody locks is a restore that did not end.

mod crew;
mod ears;
mod files;
mod journal;
mod pager;
mod pending;
mod session;
mod sys;
mod task;
mod windows;

use std::{
    collections::HashMap,
    io,
    os::unix::net::UnixListener,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::eventfd::{EfdFlags, EventFd},
};

pub(super) use self::pager::page;
use self::{crew::Crew, ears::Ears, journal::Journal, pending::Pending, session::Session, task::Task};
pub use self::{
    files::{OpenFiles, PageFiles},
    pager::{Mark, Pager, PagerHandle},
};
use serde::{Deserialize, Serialize};

use super::images::{self, ImageError, Pagemap};
use crate::model::{Extent, PAGE_SIZE, Space};

/// Name of the socket in the directory of the images; CRIU knows it by heart.
pub const SOCKET_NAME: &str = "lazy-pages.socket";

/// The word that CRIU sends when the tasks run.
const RESTORE_FINISHED: i32 = 0x5253_5446;
/// Tasks of one restore, forked ones included.
const TASKS_MAX: usize = 1 << 16;
/// How long the next part of a message may take once CRIU has begun it.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a task's cgroup may be out of memory.
const NO_MEMORY_TIMEOUT: Duration = Duration::from_secs(10);

/// Where pages come from.
pub trait PageSource: Send + Sync {
    /// The pages of `space` from `start` on, which is an address of the image, as many as `buffer` has room for: put
    /// there, or where they lie anyway; `None` if one of them is not there. Asked for pages of one run of the page map.
    /// The answer is for the kernel to read, and nobody else.
    fn pages<'a>(&'a self, space: Space, start: u64, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>>;
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
    /// The memory by which another process could go on.
    #[error("keeping a journal of what the tasks do with their memory failed: {0}")]
    Journal(#[source] io::Error),
    /// The process that serves pages.
    #[error("the process that serves pages failed: {0}")]
    Pager(String),
    /// [`Caller::stop`] was called before the restore was finished.
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

impl LazyError {
    fn kernel(what: &'static str, pid: u32, errno: Errno) -> Self {
        Self::Kernel { what, pid, source: errno.into() }
    }
}

/// Pages of a task's image.
fn pages<'a>(
    source: &'a dyn PageSource,
    pid: u32,
    image: u64,
    buffer: &'a mut [u8],
) -> Result<&'a [u8], LazyError> {
    let space = Space::Task(pid);
    match source.pages(space, image, buffer) {
        Ok(Some(pages)) => Ok(pages),
        Ok(None) => Err(LazyError::Missing { space, address: image }),
        Err(source) => Err(LazyError::Source { space, source }),
    }
}

/// What was served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LazySummary {
    /// Tasks, forked ones included.
    pub tasks: usize,
    /// Faults answered.
    pub faults: u64,
    /// Pages put because they were waited for.
    pub fault_pages: u64,
    /// Pages put in the background.
    pub pushed_pages: u64,
    /// From the end of the restore to the last page.
    pub pushing: Duration,
}

/// Speaks to a server from another thread.
#[derive(Clone, Debug)]
pub struct Caller(Arc<Calls>);

#[derive(Debug)]
struct Calls {
    event: EventFd,
    stop: AtomicBool,
    hold: AtomicBool,
}

impl Caller {
    fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Calls { event, stop: AtomicBool::new(false), hold: AtomicBool::new(false) })))
    }

    /// Ends a server to which no CRIU has connected; has no effect on another, which ends with its CRIU or its tasks.
    pub fn stop(&self) {
        self.call(&self.0.stop);
    }

    /// Has it say when everything that CRIU has sent by now is held.
    fn hold(&self) {
        self.call(&self.0.hold);
    }

    fn call(&self, what: &AtomicBool) {
        what.store(true, Ordering::Release);
        self.wake();
    }

    /// Has it look around.
    fn wake(&self) {
        // Fails only if the counter is full, that is, called already.
        let _ = self.0.event.write(1);
    }
}

/// A server that listens, and knows which pages of which task will come late.
#[derive(Debug)]
pub struct LazyServer {
    listener: UnixListener,
    expected: HashMap<u32, Pending>,
    caller: Caller,
    journal: Journal,
}

/// The socket for CRIU in the directory of the images.
fn listen(directory: &Path) -> Result<UnixListener, LazyError> {
    let failed = |source| LazyError::Listen { directory: directory.to_owned(), source };
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
    Ok(listener)
}

impl LazyServer {
    /// Listens in the directory of the images to be restored: their page maps say which pages are
    /// lazy. To be called before the restore is asked for.
    pub fn listen(directory: &Path) -> Result<Self, LazyError> {
        Self::with(listen(directory)?, directory)
    }

    fn with(listener: UnixListener, directory: &Path) -> Result<Self, LazyError> {
        let failed = |source| LazyError::Listen { directory: directory.to_owned(), source };
        let expected = expected_pages(directory)?;
        let caller = Caller::new().map_err(failed)?;
        let journal = Journal::new().map_err(LazyError::Journal)?;
        Ok(Self { listener, expected, caller, journal })
    }

    /// A handle by which another thread can speak to it.
    pub fn caller(&self) -> Caller {
        self.caller.clone()
    }

    /// Serves one restore until each task has all its pages, those that are hot first; blocks. `held` is called
    /// when it was told to hold what CRIU has sent, and does. After an error tasks that run
    /// wait for missing pages for as long as this process is there, and must be killed.
    pub fn serve(
        mut self,
        source: &dyn PageSource,
        hot: &[(Space, Extent)],
        held: &mut dyn FnMut(),
    ) -> Result<LazySummary, LazyError> {
        let (served, tasks) = self.serve_tasks(source, hot, held);
        served.inspect_err(|_| std::mem::forget(tasks))
    }

    /// Whether another process can go on with its tasks.
    fn is_held(&self) -> bool {
        self.journal.is_held()
    }

    /// The same; gives the tasks as well, whose userfaultfds close with them. If the journal is held already, another
    /// process has served the tasks, and this one goes on.
    fn serve_tasks(
        &mut self,
        source: &dyn PageSource,
        hot: &[(Space, Extent)],
        held: &mut dyn FnMut(),
    ) -> (Result<LazySummary, LazyError>, Vec<Arc<Task>>) {
        let ears = match Ears::new() {
            Ok(ears) => ears,
            Err(errno) => return (Err(LazyError::kernel("waiting for faults", 0, errno)), Vec::new()),
        };
        let crew = Crew::new(crew::of_tasks(hot));
        let taken_over = self.journal.is_held();
        let mut session = Session {
            source,
            expected: std::mem::take(&mut self.expected),
            journal: &mut self.journal,
            crew: &crew,
            ears,
            caller: self.caller.clone(),
            held,
            summary: LazySummary::default(),
        };
        let begun = if taken_over { session.take_over() } else { session.restore(&self.listener) };
        let served = begun.and_then(|()| {
            std::thread::scope(|scope| {
                for _ in 0..crew::helpers() {
                    scope.spawn(|| crew.help(source));
                }
                let served = session.serve();
                crew.end();
                served
            })
        });
        (served.map(|()| session.summary), crew.tasks())
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
