//! The background transfer: threads that put the pages nobody waits for yet, the hot ones first.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Caller, LazyError, NO_MEMORY_TIMEOUT, PageSource,
    pending::Awaited,
    task::{Put, Task},
};
use crate::model::{Extent, Space};

/// What is put at once right after a fault, and the most it grows to while there are none. A fault that comes meanwhile
/// waits for one of them to end: about 15 µs for the smaller, 60 µs for the larger.
const CHUNK_BYTES_MIN: u64 = 64 << 10;
pub(super) const CHUNK_BYTES_MAX: u64 = 256 << 10;
/// Neighbours of a page that was waited for, which come next.
const NEAR_BYTES: u64 = 64 << 10;
/// Such neighbourhoods that wait; more are forgotten, and come with the rest.
const NEAR_MAX: usize = 64;
/// How long a thread rests that has nothing to put, or has found mappings changing.
const REST: Duration = Duration::from_micros(50);
/// How long it waits for memory before it tries again.
pub(super) const NO_MEMORY_REST: Duration = Duration::from_millis(10);
/// More threads than this gain nothing: they wait for memory, not for each other.
const THREADS_MAX: usize = 4;

/// What the threads share.
#[derive(Debug)]
pub(super) struct Crew {
    tasks: RwLock<Vec<Arc<Task>>>,
    order: Mutex<Order>,
    chunk_bytes: AtomicU64,
    pub(super) pages: AtomicU64,
    over: AtomicBool,
    failure: Mutex<Option<LazyError>>,
    /// Called once there may be nothing left to put, or a thread has failed.
    caller: Caller,
}

/// What comes before the rest.
#[derive(Debug)]
struct Order {
    near: VecDeque<(Arc<Task>, u64, u64)>,
    hot: VecDeque<(u32, Extent)>,
    turn: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many threads put pages.
pub(super) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX)
}

impl Crew {
    /// `hot` names the tasks by their pids in the image.
    pub(super) fn new(hot: Vec<(u32, Extent)>, caller: Caller) -> Self {
        Self {
            tasks: RwLock::default(),
            order: Mutex::new(Order { near: VecDeque::new(), hot: hot.into(), turn: 0 }),
            chunk_bytes: AtomicU64::new(CHUNK_BYTES_MIN),
            pages: AtomicU64::new(0),
            over: AtomicBool::new(false),
            failure: Mutex::new(None),
            caller,
        }
    }

    pub(super) fn tasks(&self) -> Vec<Arc<Task>> {
        self.tasks.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn add(&self, task: Task) -> usize {
        let mut tasks = self.tasks.write().unwrap_or_else(PoisonError::into_inner);
        tasks.push(Arc::new(task));
        tasks.len()
    }

    pub(super) fn is_done(&self) -> bool {
        self.tasks.read().unwrap_or_else(PoisonError::into_inner).iter().all(|task| task.is_served())
    }

    /// A page was waited for: smaller chunks, so that the next one need not wait long, and its neighbours next.
    pub(super) fn faulted(&self, task: &Arc<Task>, address: u64) {
        self.chunk_bytes.store(CHUNK_BYTES_MIN, Ordering::Relaxed);
        let mut order = lock(&self.order);
        if order.near.len() == NEAR_MAX {
            order.near.pop_front();
        }
        order.near.push_back((Arc::clone(task), address, address + NEAR_BYTES));
    }

    /// Ends the threads.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(super) fn take_failure(&self) -> Option<LazyError> {
        lock(&self.failure).take()
    }

    /// What one of the threads does until [`Self::end`].
    pub(super) fn work(&self, source: &dyn PageSource) {
        let mut buffer = vec![0; CHUNK_BYTES_MAX as usize];
        while !self.over.load(Ordering::Relaxed) {
            let put = match self.choose() {
                Some((task, run)) => self.put(source, &task, run, &mut buffer),
                None => {
                    self.caller.wake();
                    Ok(Put::Changing)
                }
            };
            match put {
                Ok(Put::Changing) => std::thread::sleep(REST),
                Ok(_) => {}
                Err(error) => {
                    *lock(&self.failure) = Some(error);
                    self.caller.wake();
                    return;
                }
            }
        }
    }

    fn put(
        &self,
        source: &dyn PageSource,
        task: &Task,
        run: Awaited,
        buffer: &mut [u8],
    ) -> Result<Put, LazyError> {
        let bytes = &mut buffer[..(run.end - run.start) as usize];
        super::read(source, task.pid, run.image, bytes)?;
        let mut no_memory_since: Option<Instant> = None;
        loop {
            let gate = task.gate();
            let (pages, put) =
                task.put(run, bytes).map_err(|errno| LazyError::kernel("putting pages", task.pid, errno))?;
            drop(gate);
            self.pages.fetch_add(pages, Ordering::Relaxed);
            if put != Put::NoMemory {
                return Ok(put);
            }
            if no_memory_since.get_or_insert_with(Instant::now).elapsed() > NO_MEMORY_TIMEOUT {
                return Err(LazyError::kernel("putting pages", task.pid, nix::errno::Errno::ENOMEM));
            }
            std::thread::sleep(NO_MEMORY_REST);
        }
    }

    /// Neighbours of what was waited for, then what is hot, then all others: a task each in turn.
    fn choose(&self) -> Option<(Arc<Task>, Awaited)> {
        let chunk = self.chunk_bytes.load(Ordering::Relaxed);
        self.chunk_bytes.store((chunk * 2).min(CHUNK_BYTES_MAX), Ordering::Relaxed);
        let tasks = self.tasks.read().unwrap_or_else(PoisonError::into_inner);
        let mut order = lock(&self.order);
        while let Some((task, start, end)) = order.near.pop_front() {
            let near = task.next(start).filter(|run| run.start < end && !task.is_gone());
            if let Some(run) = near {
                return Some((task, Awaited { end: run.end.min(end), ..run }));
            }
        }
        while let Some((pid, extent)) = order.hot.front_mut() {
            let task = tasks.iter().find(|task| task.pid == *pid);
            // What the task has moved comes with the rest.
            let run = task.and_then(|task| Some((task, task.next(extent.start)?)));
            let run = run
                .filter(|(task, run)| run.start < extent.end() && run.image == run.start && !task.is_gone());
            let Some((task, run)) = run else {
                order.hot.pop_front();
                continue;
            };
            let end = run.end.min(extent.end()).min(run.start + chunk);
            *extent = Extent { start: end, pages: (extent.end() - end) / crate::model::PAGE_SIZE };
            return Some((Arc::clone(task), Awaited { end, ..run }));
        }
        for _ in 0..tasks.len() {
            order.turn += 1;
            let task = &tasks[order.turn % tasks.len()];
            if let Some(run) = task.advance(chunk) {
                return Some((Arc::clone(task), run));
            }
        }
        None
    }
}

/// The hot pages of tasks; shared memory does not come lazily.
pub(super) fn of_tasks(hot: &[(Space, Extent)]) -> Vec<(u32, Extent)> {
    let of_task = |(space, extent): &(Space, Extent)| match space {
        Space::Task(pid) => Some((*pid, *extent)),
        Space::Shared(_) => None,
    };
    hot.iter().filter_map(of_task).collect()
}
