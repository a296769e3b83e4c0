//! The background transfer: puts the pages nobody waits for yet, the hot ones first.
//!
//! The thread that answers faults does it between two of them, since then it need not wake for the next one, which would
//! take longer than all else. Other threads help for as long as nobody waits for a page.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    LazyError, NO_MEMORY_TIMEOUT, PageSource,
    pending::Awaited,
    task::{Put, Task},
};
use crate::model::{Extent, PAGE_SIZE, Space};

/// What is put at once: whoever waits for another page waits until it is there, some 12 µs.
pub(super) const PIECE_BYTES: u64 = 32 << 10;
/// The workload, and whoever answers its faults, go first; it takes a quarter of a processor that others want too.
const NICE: i32 = 5;
/// So long after a fault the helpers leave the processors to the workload.
const FAULTING: Duration = Duration::from_millis(1);
/// Neighbours of a page that was waited for, which come next.
const NEAR_BYTES: u64 = 64 << 10;
/// Such neighbourhoods that wait; more are forgotten, and come with the rest.
const NEAR_MAX: usize = 64;
/// How long a helper rests that has nothing to put, or has found mappings changing.
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
    pub(super) pages: AtomicU64,
    over: AtomicBool,
    began: Instant,
    /// When a page was waited for last, in microseconds since it began.
    faulted_us: AtomicU64,
    no_memory_since: Mutex<Option<Instant>>,
    failure: Mutex<Option<LazyError>>,
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

/// How many threads help the one that answers faults.
pub(super) fn helpers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX) - 1
}

impl Crew {
    /// `hot` names the tasks by their pids in the image.
    pub(super) fn new(hot: Vec<(u32, Extent)>) -> Self {
        Self {
            tasks: RwLock::default(),
            order: Mutex::new(Order { near: VecDeque::new(), hot: hot.into(), turn: 0 }),
            pages: AtomicU64::new(0),
            over: AtomicBool::new(false),
            began: Instant::now(),
            faulted_us: AtomicU64::new(0),
            no_memory_since: Mutex::new(None),
            failure: Mutex::new(None),
        }
    }

    /// The tasks are numbered from 0 in the order in which they were added.
    pub(super) fn task(&self, number: usize) -> Option<Arc<Task>> {
        self.tasks.read().unwrap_or_else(PoisonError::into_inner).get(number).cloned()
    }

    /// All tasks.
    pub(super) fn tasks(&self) -> Vec<Arc<Task>> {
        self.tasks.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the task's number.
    pub(super) fn add(&self, task: Arc<Task>) -> usize {
        let mut tasks = self.tasks.write().unwrap_or_else(PoisonError::into_inner);
        tasks.push(task);
        tasks.len() - 1
    }

    /// A page was waited for: its neighbours come next.
    pub(super) fn faulted(&self, task: &Arc<Task>, address: u64) {
        self.faulted_us.store(self.began.elapsed().as_micros() as u64, Ordering::Relaxed);
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

    fn is_faulting(&self) -> bool {
        let faulted = Duration::from_micros(self.faulted_us.load(Ordering::Relaxed));
        self.began.elapsed() < faulted + FAULTING
    }

    /// What a helper does until [`Self::end`].
    pub(super) fn help(&self, source: &dyn PageSource) {
        super::super::sys::stand_back(NICE);
        let mut buffer = vec![0; PIECE_BYTES as usize];
        while !self.over.load(Ordering::Relaxed) {
            if self.is_faulting() {
                std::thread::sleep(FAULTING / 4);
                continue;
            }
            let chosen = self.choose();
            let put = chosen.map(|(task, run)| {
                let _gate = task.gate();
                self.put(source, &task, run, &mut buffer)
            });
            match put {
                None | Some(Ok(Put::Changing)) => std::thread::sleep(REST),
                Some(Ok(Put::NoMemory)) => std::thread::sleep(NO_MEMORY_REST),
                Some(Ok(Put::Done | Put::Gone)) => {}
                Some(Err(error)) => {
                    *lock(&self.failure) = Some(error);
                    return;
                }
            }
        }
    }

    /// Puts the next piece; `None` if there is none. For the one thread that reads the tasks' events.
    pub(super) fn push(&self, source: &dyn PageSource, buffer: &mut [u8]) -> Result<Option<Put>, LazyError> {
        self.choose().map(|(task, run)| self.put(source, &task, run, buffer)).transpose()
    }

    /// The caller has the task's gate, or is the one who reads its events.
    fn put(
        &self,
        source: &dyn PageSource,
        task: &Task,
        run: Awaited,
        buffer: &mut [u8],
    ) -> Result<Put, LazyError> {
        let buffer = &mut buffer[..(run.end - run.start) as usize];
        let bytes = super::pages(source, task.pid, run.image, buffer)?;
        let put = task.put(run, bytes);
        let (pages, put) = put.map_err(|errno| LazyError::kernel("putting pages", task.pid, errno))?;
        self.pages.fetch_add(pages, Ordering::Relaxed);
        if put == Put::NoMemory {
            let since = *lock(&self.no_memory_since).get_or_insert_with(Instant::now);
            if since.elapsed() > NO_MEMORY_TIMEOUT {
                return Err(LazyError::kernel("putting pages", task.pid, nix::errno::Errno::ENOMEM));
            }
        } else if pages > 0 {
            *lock(&self.no_memory_since) = None;
        }
        Ok(put)
    }

    /// Neighbours of what was waited for, then what is hot, then all others: a task each in turn.
    fn choose(&self) -> Option<(Arc<Task>, Awaited)> {
        let tasks = self.tasks.read().unwrap_or_else(PoisonError::into_inner);
        let mut order = lock(&self.order);
        while let Some((task, start, end)) = order.near.pop_front() {
            let near = task.next(start).filter(|run| run.start < end && !task.is_gone());
            let Some(run) = near else { continue };
            let piece_end = run.end.min(end).min(run.start + PIECE_BYTES);
            if piece_end < end {
                order.near.push_front((Arc::clone(&task), piece_end, end));
            }
            return Some((task, Awaited { end: piece_end, ..run }));
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
            let end = run.end.min(extent.end()).min(run.start + PIECE_BYTES);
            *extent = Extent { start: end, pages: (extent.end() - end) / PAGE_SIZE };
            return Some((Arc::clone(task), Awaited { end, ..run }));
        }
        for _ in 0..tasks.len() {
            order.turn += 1;
            let task = &tasks[order.turn % tasks.len()];
            if let Some(run) = task.advance(PIECE_BYTES) {
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
