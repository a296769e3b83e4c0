//! The init's loop: guard, requests, reaping.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, pipe2},
};

use super::{
    super::{
        control::{self, Exit, Reply, Request, Root},
        guard::{self, GuardState, boot_time_ns},
        netlink::{self, NetError, NetStep},
        sys,
    },
    Hands, Log, at, logger, tree,
};

const CLIENTS_MAX: usize = 8;
const LOG_PIPES_MAX: usize = 4;
/// A step of the fence that failed is tried again after this time, until it succeeds.
const FENCE_RETRY: Duration = Duration::from_millis(5);
/// A logger that dies is not started again more often than this.
const LOGGER_PAUSE: Duration = Duration::from_secs(1);

/// A throttled tree runs for its share of a period, and is frozen for the rest: of this one, or one so long that it runs
/// for a millisecond.
const THROTTLE_PERIOD_MIN: Duration = Duration::from_millis(20);
const THROTTLE_RUN_MIN: Duration = Duration::from_millis(1);
/// A tree that is not to run at all is told so again after this time.
const THROTTLE_STANDS: Duration = Duration::from_secs(1);

/// Slows the tree down for as long as a client wants it and is there.
struct Throttle {
    client: RawFd,
    run_percent: u8,
    frozen: bool,
    /// When that changes.
    next_ns: u64,
}

struct Logger {
    log: Log,
    child: Option<(Pid, OwnedFd)>,
    started: Option<Instant>,
    /// Read ends of pipes with writers; see [`logger`].
    pipes: Vec<(u64, OwnedFd)>,
}

pub(super) struct Server {
    hands: Hands,
    /// It did not start the tree, and may leave it.
    guards: bool,
    signals: SignalFd,
    timer: TimerFd,
    clients: Vec<OwnedFd>,
    logger: Option<Logger>,
    root: Option<Root>,
    throttle: Option<Throttle>,
    on_fence: (Vec<NetStep>, Vec<u8>),
    /// What the workload starts with: the agent's.
    oom_score: String,
}

impl Server {
    pub(super) fn new(
        hands: Hands,
        guards: bool,
        log: Option<Log>,
        oom_score: String,
    ) -> Result<Self, String> {
        let mut children = SigSet::empty();
        children.add(Signal::SIGCHLD);
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let mut server = Self {
            hands,
            guards,
            signals: SignalFd::with_flags(&children, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
                .map_err(at("make a signalfd"))?,
            timer: TimerFd::new(ClockId::CLOCK_BOOTTIME, flags).map_err(at("make a timer"))?,
            clients: Vec::with_capacity(CLIENTS_MAX),
            logger: log.map(|log| Logger { log, child: None, started: None, pipes: Vec::new() }),
            root: None,
            throttle: None,
            on_fence: (Vec::new(), Vec::new()),
            oom_score,
        };
        // Now, so that it has the same pid (2) on both hosts.
        server.tend_logger();
        Ok(server)
    }

    pub(super) fn run(&mut self) -> ! {
        loop {
            self.tend_throttle();
            self.tend_guard();
            self.tend_logger();
            let (fixed, clients) = self.wait();
            let [signal, connection, timer, wake, log] = fixed;
            // The guard's own first; everything else can wait for it.
            if timer || wake {
                // Only to empty them; tend_guard reads the word.
                let _ = nix::unistd::read(self.timer.as_fd(), &mut [0; 8]);
                let _ = nix::unistd::read(self.hands.wake.as_fd(), &mut [0; 8]);
                self.tend_guard();
            }
            if signal {
                while let Ok(Some(_)) = self.signals.read_signal() {}
                self.reap();
            }
            if log {
                self.hear_logger();
            }
            for i in (0..clients.len()).rev().filter(|i| clients[*i]) {
                if !self.serve(i) {
                    let client = self.clients.remove(i);
                    if self.throttle.as_ref().is_some_and(|throttle| throttle.client == client.as_raw_fd()) {
                        self.end_throttle();
                    }
                }
            }
            if connection && self.clients.len() < CLIENTS_MAX {
                self.clients.extend(control::accept(self.hands.listener.as_fd()).ok());
            }
        }
    }

    /// Waits for anything; says what is ready.
    fn wait(&self) -> ([bool; 5], Vec<bool>) {
        let logger = self.logger.as_ref().and_then(|logger| logger.child.as_ref());
        let lacks_logger = self.logger.is_some() && logger.is_none();
        let accepts = if self.clients.len() < CLIENTS_MAX { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = Vec::with_capacity(5 + self.clients.len());
        fds.push(PollFd::new(self.signals.as_fd(), PollFlags::POLLIN));
        fds.push(PollFd::new(self.hands.listener.as_fd(), accepts));
        fds.push(PollFd::new(self.timer.as_fd(), PollFlags::POLLIN));
        fds.push(PollFd::new(self.hands.wake.as_fd(), PollFlags::POLLIN));
        fds.extend(self.clients.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        fds.extend(logger.map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        let timeout = if lacks_logger { PollTimeout::from(1000u16) } else { PollTimeout::NONE };
        if poll(&mut fds, timeout).is_err() {
            return ([false; 5], Vec::new());
        }
        let ready = |i: usize| fds.get(i).and_then(PollFd::any).unwrap_or(false);
        let clients = (0..self.clients.len()).map(|i| ready(4 + i)).collect();
        let log = ready(4 + self.clients.len());
        ([ready(0), ready(1), ready(2), ready(3), log], clients)
    }

    /// Sets the timer by the guard's word, or fires.
    fn tend_guard(&mut self) {
        loop {
            let GuardState::Armed { deadline_ns } = self.hands.page.state() else {
                if self.hands.page.state() == GuardState::Firing {
                    self.fence();
                } else if let Some(throttle) = &self.throttle {
                    self.wake_at(throttle.next_ns);
                }
                return;
            };
            if boot_time_ns() < deadline_ns {
                let next_ns = self.throttle.as_ref().map_or(deadline_ns, |throttle| throttle.next_ns);
                return self.wake_at(deadline_ns.min(next_ns));
            }
            if self.hands.page.begin_firing(deadline_ns) {
                return self.fence();
            }
        }
    }

    /// The fence: freeze, network, FIRED, in that order. See the module [`guard`].
    fn fence(&mut self) {
        // What follows is no turn of it.
        self.throttle = None;
        let frozen = match (&self.hands.freeze).write_all(b"1") {
            // The cgroup is removed: nobody is left to freeze.
            Err(error) => error.raw_os_error() == Some(libc::ENODEV),
            Ok(()) => true,
        };
        let (steps, bytes) = &self.on_fence;
        let silent = self.hands.route.apply_encoded(steps, bytes).is_ok();
        if frozen && silent {
            self.hands.page.end_firing();
        } else {
            self.wake_at(boot_time_ns() + FENCE_RETRY.as_nanos() as u64);
        }
    }

    /// Freezes or thaws a throttled tree when its turn is over.
    fn tend_throttle(&mut self) {
        let fired = self.has_fired();
        let Some(throttle) = self.throttle.as_mut().filter(|_| !fired) else { return };
        let now_ns = boot_time_ns();
        if now_ns < throttle.next_ns {
            return;
        }
        let stands = throttle.run_percent == 0;
        let frozen = stands || !throttle.frozen;
        // Failed: the next turn tries again, and a tree that is gone needs none.
        if (&self.hands.freeze).write_all(if frozen { b"1" } else { b"0" }).is_ok() {
            throttle.frozen = frozen;
        }
        if stands {
            let turn = if throttle.frozen { THROTTLE_STANDS } else { THROTTLE_RUN_MIN };
            throttle.next_ns = now_ns + turn.as_nanos() as u64;
            return;
        }
        let percent = u32::from(if frozen { 100 - throttle.run_percent } else { throttle.run_percent });
        let period = THROTTLE_PERIOD_MIN.max(THROTTLE_RUN_MIN * 100 / u32::from(throttle.run_percent));
        let turn = period * percent / 100;
        throttle.next_ns = now_ns + turn.as_nanos() as u64;
    }

    fn end_throttle(&mut self) {
        if self.throttle.take().is_some_and(|throttle| throttle.frozen) && !self.has_fired() {
            // Nothing else freezes this cgroup; a failure means that it is gone.
            let _ = (&self.hands.freeze).write_all(b"0");
        }
    }

    fn has_fired(&self) -> bool {
        matches!(self.hands.page.state(), GuardState::Firing | GuardState::Fired { .. })
    }

    fn wake_at(&self, deadline_ns: u64) {
        let at = Expiration::OneShot(TimeSpec::from(Duration::from_nanos(deadline_ns)));
        // Cannot fail for a valid time; if it did, waking by poll's timeout would not help either.
        let _ = self.timer.set(at, TimerSetTimeFlags::TFD_TIMER_ABSTIME);
    }

    fn reap(&mut self) {
        loop {
            let (pid, exit) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Exit::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Exit::Signal(signal as i32)),
                Err(Errno::EINTR) => continue,
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            if let Some(root) = self.root.as_mut().filter(|root| root.pid == pid.as_raw().unsigned_abs()) {
                root.exit = Some(exit);
            }
            if let Some(logger) = self.logger.as_mut() {
                logger.child.take_if(|(child, _)| *child == pid);
            }
        }
    }

    /// Starts the logger if there is none, and hands it all pipes.
    fn tend_logger(&mut self) {
        let Some(logger) = self.logger.as_mut().filter(|logger| logger.child.is_none()) else { return };
        if logger.started.is_some_and(|started| started.elapsed() < LOGGER_PAUSE) {
            return;
        }
        logger.started = Some(Instant::now());
        let Ok((ours, theirs)) = control::pair() else { return };
        match sys::fork() {
            Ok(None) => {
                let _ = sys::close_from(3, theirs.as_fd());
                let Log { path, bytes_max } = logger.log.clone();
                logger::run(&theirs, path, bytes_max);
            }
            Ok(Some(child)) => {
                for (_, pipe) in &logger.pipes {
                    let _ = control::send(ours.as_fd(), &(), &[pipe.as_fd()]);
                }
                logger.child = Some((child, ours));
            }
            Err(_) => {}
        }
    }

    fn hear_logger(&mut self) {
        let Some(logger) = &mut self.logger else { return };
        let Some((_, socket)) = &logger.child else { return };
        match control::recv::<u64>(socket.as_fd()) {
            Ok(Some((inode, _))) => logger.pipes.retain(|(other, _)| *other != inode),
            // Dead, or as good as: kill it, so that it is reaped and started again.
            Ok(None) | Err(Errno::EBADMSG | Errno::ECONNRESET) => {
                if let Some((child, _)) = logger.child.take() {
                    let _ = kill(child, Signal::SIGKILL);
                }
            }
            Err(_) => {}
        }
    }

    /// Answers one request; false if the client is gone or does not behave.
    fn serve(&mut self, i: usize) -> bool {
        let client = self.clients[i].as_fd();
        let (request, fds) = match control::recv::<Request>(client) {
            Ok(Some(message)) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return true,
            Ok(None) | Err(_) => return false,
        };
        let leaves = matches!(request, Request::Leave) && self.guards;
        let (reply, fds) = self
            .answer(request, fds, client.as_raw_fd())
            .unwrap_or_else(|reason| (Reply::Refused(reason), Vec::new()));
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let sent = control::send(self.clients[i].as_fd(), &reply, &borrowed).is_ok();
        if leaves {
            std::process::exit(0);
        }
        sent
    }

    fn answer(
        &mut self,
        request: Request,
        fds: Vec<OwnedFd>,
        client: RawFd,
    ) -> Result<(Reply, Vec<OwnedFd>), String> {
        let reply = match request {
            Request::Hello => {
                let copy = |fd: &OwnedFd| fd.try_clone().map_err(at("copy a descriptor"));
                let wake = self.hands.wake.as_fd().try_clone_to_owned().map_err(at("copy a descriptor"))?;
                return Ok((Reply::Hello, vec![copy(&self.hands.page_fd)?, wake]));
            }
            Request::Start(command) => {
                let [failure] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| "a start needs one descriptor")?;
                Reply::Started { pid: self.start(&command, &failure)? }
            }
            Request::FreshStdio => return Ok((Reply::Stdio, vec![self.new_log_pipe()?])),
            Request::KeepLog => {
                let [pipe] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| "a log needs one descriptor")?;
                self.keep_log(pipe)?;
                Reply::Done
            }
            Request::Status => Reply::Status {
                root: self.root,
                log_pipes: self.logger.iter().flat_map(|logger| &logger.pipes).map(|pipe| pipe.0).collect(),
            },
            Request::Track { pid } => {
                let target = i32::try_from(pid).map_err(|_| "no such pid")?;
                kill(Pid::from_raw(target), None).map_err(at("find the tree's root"))?;
                self.root = Some(Root { pid, exit: None });
                Reply::Done
            }
            Request::RaiseLastPid { pid } => {
                raise_last_pid(pid).map_err(at("raise ns_last_pid"))?;
                Reply::Done
            }
            Request::OnFence { steps } => {
                let bytes = netlink::encode(&steps).map_err(|error| error.to_string())?;
                self.on_fence = (steps, bytes);
                Reply::Done
            }
            Request::Apply { steps } => self.apply(&steps)?,
            Request::Unfence { deadline_ns, steps } => self.unfence(deadline_ns, &steps)?,
            Request::Throttle { run_percent } => self.set_throttle(run_percent, client)?,
            Request::Leave if self.guards => Reply::Done,
            Request::Leave => {
                return Err("the init of a sandbox cannot leave it; destroy the sandbox".to_owned());
            }
        };
        Ok((reply, Vec::new()))
    }

    fn start(&mut self, command: &control::Command, failure: &OwnedFd) -> Result<u32, String> {
        if self.guards {
            return Err("this process only guards a tree that it did not start".to_owned());
        }
        if let Some(root) = self.root.filter(|root| root.exit.is_none()) {
            return Err(format!("the workload runs already (pid {} inside)", root.pid));
        }
        let output = self.new_log_pipe()?;
        let pid = tree::start(command, output.as_fd(), failure.as_fd(), &self.hands.procs, &self.oom_score)?;
        let pid = pid.as_raw().unsigned_abs();
        self.root = Some(Root { pid, exit: None });
        Ok(pid)
    }

    /// A pipe whose read end goes to the log; returns the write end.
    fn new_log_pipe(&mut self) -> Result<OwnedFd, String> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(at("make a pipe"))?;
        self.keep_log(read)?;
        Ok(write)
    }

    /// What comes out of this pipe goes to the log.
    fn keep_log(&mut self, read: OwnedFd) -> Result<(), String> {
        let logger = self.logger.as_mut().ok_or("this process keeps no log")?;
        if logger.pipes.len() >= LOG_PIPES_MAX {
            return Err(format!("{LOG_PIPES_MAX} log pipes are in use already"));
        }
        let inode = logger::inode(&read).map_err(at("read a pipe's inode"))?;
        if let Some((_, socket)) = &logger.child {
            control::send(socket.as_fd(), &(), &[read.as_fd()]).map_err(at("reach the logger"))?;
        }
        logger.pipes.push((inode, read));
        Ok(())
    }

    fn set_throttle(&mut self, run_percent: u8, client: RawFd) -> Result<Reply, String> {
        if run_percent > 100 {
            return Err(format!("a tree cannot run for {run_percent} % of its time"));
        }
        self.tend_guard();
        self.end_throttle();
        if run_percent < 100 {
            if self.has_fired() {
                return Ok(Reply::Fired);
            }
            self.throttle = Some(Throttle { client, run_percent, frozen: false, next_ns: boot_time_ns() });
        }
        Ok(Reply::Done)
    }

    /// Opens what the guard may close. The guard cannot fire meanwhile: it is this process.
    fn apply(&mut self, steps: &[NetStep]) -> Result<Reply, String> {
        self.tend_guard();
        if self.has_fired() {
            return Ok(Reply::Fired);
        }
        self.change_network(steps).map(|()| Reply::Done).map_err(|error| error.to_string())
    }

    fn change_network(&self, steps: &[NetStep]) -> Result<(), NetError> {
        self.hands.route.apply(steps)
    }

    fn unfence(&mut self, deadline_ns: u64, steps: &[NetStep]) -> Result<Reply, String> {
        let deadline_ns = guard::check(deadline_ns).map_err(|error| error.to_string())?;
        if deadline_ns <= boot_time_ns() {
            return Err("the new deadline has passed already".to_owned());
        }
        if !self.hands.page.rearm(deadline_ns) {
            return Err("the guard has not fired, or not yet finished".to_owned());
        }
        self.wake_at(deadline_ns);
        (&self.hands.freeze).write_all(b"0").map_err(at("thaw the tree"))?;
        self.change_network(steps).map(|()| Reply::Done).map_err(|error| error.to_string())
    }
}

/// The kernel gives the next process the next higher free pid, in the namespace of the writer.
fn raise_last_pid(pid: u32) -> std::io::Result<()> {
    let mut file = File::options().read(true).write(true).open("/proc/sys/kernel/ns_last_pid")?;
    let mut text = String::new();
    std::io::Read::read_to_string(&mut file, &mut text)?;
    if text.trim().parse::<u32>().is_ok_and(|last| last >= pid) {
        return Ok(());
    }
    std::io::Seek::rewind(&mut file)?;
    file.write_all(pid.to_string().as_bytes())
}
