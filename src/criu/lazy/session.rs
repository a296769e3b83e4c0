//! One restore: CRIU is heard, faults are answered, and between them all other pages are put.

use std::{
    collections::HashMap,
    io::{self, Read as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc,
        atomic::Ordering::{Acquire, Relaxed},
    },
    time::Instant,
};

use nix::{errno::Errno, sys::epoll::EpollTimeout};

use super::{
    super::sys::own,
    Caller, LazyError, LazySummary, MESSAGE_TIMEOUT, NO_MEMORY_TIMEOUT, PageSource, RESTORE_FINISHED,
    TASKS_MAX,
    crew::{Crew, NO_MEMORY_REST, PIECE_BYTES},
    ears::{Ears, Speaker},
    journal::{Entry, Journal},
    pending::{Awaited, Pending},
    sys::{self, Event},
    task::{Put, Task},
};
use crate::model::PAGE_SIZE;

/// How long the next event may take that has mappings changing, in milliseconds; it is on its way.
const CHANGING_MS: u8 = 1;

pub(super) struct Session<'a> {
    pub(super) source: &'a dyn PageSource,
    pub(super) expected: HashMap<u32, Pending>,
    pub(super) journal: &'a mut Journal,
    pub(super) crew: &'a Crew,
    pub(super) ears: Ears,
    pub(super) caller: Caller,
    /// See [`super::LazyServer::serve`].
    pub(super) held: &'a mut dyn FnMut(),
    pub(super) summary: LazySummary,
}

impl Session<'_> {
    /// From CRIU's connection to the moment when the tasks run.
    pub(super) fn restore(&mut self, listener: &UnixListener) -> Result<(), LazyError> {
        self.listen_to(Speaker::Caller, &self.caller.0.event)?;
        self.listen_to(Speaker::Criu, listener)?;
        let mut socket: Option<UnixStream> = None;
        loop {
            let ready = self.wait(EpollTimeout::NONE)?;
            for speaker in &ready {
                match (speaker, &socket) {
                    (Speaker::Task(number), _) => self.events(*number)?,
                    (Speaker::Criu, None) => {
                        let connected = accept(listener)?;
                        self.ears.remove(listener);
                        self.listen_to(Speaker::Criu, &connected)?;
                        socket = Some(connected);
                    }
                    (Speaker::Criu, Some(stream)) if self.hear(stream)? => {
                        self.ears.remove(stream);
                        return Ok(());
                    }
                    // What CRIU said comes first: userfaultfds to hold, or that the tasks run.
                    (Speaker::Caller, _) if !ready.contains(&Speaker::Criu) => {
                        self.hear_caller()?;
                        if self.caller.0.stop.load(Acquire) && socket.is_none() {
                            return Err(LazyError::Stopped);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// Goes on where a process that served the tasks was ended. Which pages they have by now is not known: what is there
    /// already is refused by the kernel.
    pub(super) fn take_over(&mut self) -> Result<(), LazyError> {
        for entry in self.journal.take_over().map_err(LazyError::Journal)? {
            match entry {
                Entry::Task { pid, uffd } => {
                    let pending = self.expected.remove(&pid).unwrap_or_default();
                    self.add(pid, own(uffd), pending)?;
                }
                Entry::Did { task, message } => {
                    let Some(task) = self.crew.task(task) else { continue };
                    let event = message.event();
                    task.note(&event);
                    if let Event::Fork(uffd) = event {
                        self.add(task.pid, own(uffd), task.pending())?;
                    }
                }
            }
        }
        for task in self.crew.tasks() {
            // Who waits for a page that was asked for asks again. A task that is gone cannot be woken.
            let _ = sys::wake_all(&task.uffd);
        }
        Ok(())
    }

    /// While the tasks run: until each has all its pages.
    pub(super) fn serve(&mut self) -> Result<(), LazyError> {
        let since = Instant::now();
        let mut buffer = vec![0; PIECE_BYTES as usize];
        let mut timeout = EpollTimeout::ZERO;
        loop {
            for speaker in self.wait(timeout)? {
                match speaker {
                    Speaker::Task(number) => self.events(number)?,
                    _ => self.hear_caller()?,
                }
            }
            if let Some(failure) = self.crew.take_failure() {
                return Err(failure);
            }
            timeout = match self.crew.push(self.source, &mut buffer)? {
                None => break,
                Some(Put::Done | Put::Gone) => EpollTimeout::ZERO,
                Some(Put::Changing) => CHANGING_MS.into(),
                Some(Put::NoMemory) => (NO_MEMORY_REST.as_millis() as u8).into(),
            };
        }
        self.summary.pushing = since.elapsed();
        self.summary.pushed_pages = self.crew.pages.load(Relaxed);
        Ok(())
    }

    fn hear_caller(&mut self) -> Result<(), LazyError> {
        // It was readable.
        let _ = self.caller.0.event.read();
        if self.caller.0.hold.swap(false, Acquire) {
            self.journal.hold().map_err(LazyError::Journal)?;
            (self.held)();
        }
        Ok(())
    }

    fn listen_to(&self, speaker: Speaker, fd: impl AsFd) -> Result<(), LazyError> {
        self.ears.add(speaker, fd).map_err(|errno| LazyError::kernel("waiting for faults", 0, errno))
    }

    fn wait(&self, timeout: EpollTimeout) -> Result<Vec<Speaker>, LazyError> {
        self.ears.listen(timeout).map_err(|errno| LazyError::kernel("waiting for faults", 0, errno))
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
            return Ok(true);
        }
        let Ok(pid) = u32::try_from(word) else { return Ok(false) };
        let uffd = sys::receive_fd(socket)
            .map_err(|error| LazyError::Protocol(format!("pid {pid} without a descriptor ({error})")))?;
        let Some(pending) = self.expected.remove(&pid) else {
            return Err(LazyError::Protocol(format!("pid {pid}, which is not in the image")));
        };
        self.journal.add(pid, &uffd).map_err(LazyError::Journal)?;
        self.add(pid, uffd, pending)?;
        Ok(false)
    }

    fn add(&mut self, pid: u32, uffd: OwnedFd, pending: Pending) -> Result<(), LazyError> {
        if self.summary.tasks == TASKS_MAX {
            return Err(LazyError::Protocol(format!("more than {TASKS_MAX} tasks")));
        }
        self.summary.tasks += 1;
        let task = Arc::new(Task::new(pid, uffd, pending));
        self.listen_to(Speaker::Task(self.crew.add(Arc::clone(&task))), &task.uffd)
    }

    /// Handles what a task did and wants.
    fn events(&mut self, number: usize) -> Result<(), LazyError> {
        let Some(task) = self.crew.task(number) else { return Ok(()) };
        let events = task.events(number, self.journal).map_err(|source| LazyError::Kernel {
            what: "reading a fault",
            pid: task.pid,
            source,
        })?;
        for (event, lacks) in events {
            match event {
                Event::Fault(address) => self.fault(&task, address - address % PAGE_SIZE)?,
                Event::Fork(uffd) => self.add(task.pid, own(uffd), lacks)?,
                Event::Gone { .. } | Event::Remap { .. } => {}
                Event::Unknown(event) => {
                    let source = io::Error::other(format!("unknown event {event:#x}"));
                    return Err(LazyError::Kernel { what: "reading a fault", pid: task.pid, source });
                }
            }
        }
        if task.is_gone() {
            // It would be ready for ever.
            self.ears.remove(&task.uffd);
        }
        Ok(())
    }

    fn fault(&mut self, task: &Arc<Task>, address: u64) -> Result<(), LazyError> {
        self.summary.faults += 1;
        if let Some(run) = task.at(address) {
            let put = self.put_page(task, Awaited { end: address + PAGE_SIZE, ..run })?;
            self.crew.faulted(task, address + PAGE_SIZE);
            if put == Put::Done {
                return Ok(());
            }
        } else if let Err(error) = sys::zero(&task.uffd, address, PAGE_SIZE) {
            // Memory that the task had given up or never touched. Present already, or just being
            // unmapped: it shall look again.
            match error {
                Errno::EEXIST | Errno::EAGAIN | Errno::ENOENT => {}
                Errno::ESRCH | Errno::ENOSPC => task.end(),
                errno => return Err(LazyError::kernel("filling a page", task.pid, errno)),
            }
        } else {
            return Ok(());
        }
        // One that is woken without its page faults again, which comes behind the event that
        // was in the way. A task that is gone cannot be woken.
        let _ = sys::wake(&task.uffd, address, PAGE_SIZE);
        Ok(())
    }

    /// Puts the page that is waited for. No event can be read meanwhile, so the gate is not needed.
    fn put_page(&mut self, task: &Task, run: Awaited) -> Result<Put, LazyError> {
        let mut page = [0; PAGE_SIZE as usize];
        let page = super::pages(self.source, task.pid, run.image, &mut page)?;
        let since = Instant::now();
        loop {
            let put = task.put(run, page);
            let (pages, put) = put.map_err(|errno| LazyError::kernel("putting a page", task.pid, errno))?;
            self.summary.fault_pages += pages;
            // Present already: whoever put it came before the fault was read, and woke nobody.
            if put == Put::Done && pages == 0 {
                return Ok(Put::Changing);
            }
            if put != Put::NoMemory {
                return Ok(put);
            }
            if since.elapsed() > NO_MEMORY_TIMEOUT {
                return Err(LazyError::kernel("putting a page", task.pid, Errno::ENOMEM));
            }
            std::thread::sleep(NO_MEMORY_REST);
        }
    }
}

fn accept(listener: &UnixListener) -> Result<UnixStream, LazyError> {
    let failed = |error: io::Error| LazyError::Protocol(format!("a connection that failed ({error})"));
    let (socket, _) = listener.accept().map_err(failed)?;
    socket.set_nonblocking(false).map_err(failed)?;
    socket.set_read_timeout(Some(MESSAGE_TIMEOUT)).map_err(failed)?;
    Ok(socket)
}
