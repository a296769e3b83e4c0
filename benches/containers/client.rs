//! A client on the lab's network that wants an answer every millisecond, and writes down when it got one.
//!
//! It increments a counter, whether or not the last increment was answered. When nothing has come back for a while it knocks
//! with new connections beside the one it has, and goes on with whichever answers: it waits for no retransmission timer.

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket},
};

use crate::redis::{VIP, inside};

const INTERVAL: Duration = Duration::from_millis(1);
/// Without an answer for so long, it knocks.
const SILENCE: Duration = Duration::from_millis(20);
/// How often, and how long it waits for one who answers the door.
const KNOCK_INTERVAL: Duration = Duration::from_millis(10);
const INCREMENT: &[u8] = b"INCR counter\r\n";

/// Answers that came, oldest first.
pub(crate) struct Answers(Vec<(Instant, u64)>);

impl Answers {
    /// The longest time without an answer between two instants, milliseconds.
    pub(crate) fn longest_gap_ms(&self, from: Instant, to: Instant) -> f64 {
        let inside = |at: &Instant| (from..=to).contains(at);
        let times = [from].into_iter().chain(self.0.iter().map(|(at, _)| *at).filter(inside)).chain([to]);
        let times: Vec<Instant> = times.collect();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default().as_secs_f64() * 1e3
    }

    /// How often a value came that is not higher than one before: what was answered was forgotten.
    pub(crate) fn rolled_back(&self) -> usize {
        self.0.windows(2).filter(|pair| pair[1].1 <= pair[0].1).count()
    }
}

/// The client, which runs until it is asked for its answers.
pub(crate) struct Client {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<(Instant, u64)>>,
}

impl Client {
    pub(crate) fn start(netns: File) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = inside(netns, move || {
            let mut loop_ = Asking::default();
            while !stopped.load(Ordering::Relaxed) {
                loop_.turn();
            }
            loop_.answers
        });
        Self { stop, thread }
    }

    pub(crate) fn stop(self) -> Answers {
        self.stop.store(true, Ordering::Relaxed);
        Answers(self.thread.join().expect("the client ran to its end"))
    }
}

struct Connection {
    stream: TcpStream,
    received: Vec<u8>,
    /// It answers the door: increments may be sent.
    open: bool,
    since: Instant,
}

#[derive(Default)]
struct Asking {
    kept: Option<Connection>,
    knocking: Option<Connection>,
    last: Option<Instant>,
    answers: Vec<(Instant, u64)>,
}

impl Asking {
    fn turn(&mut self) {
        let next = Instant::now() + INTERVAL;
        self.knock();
        if let Some(kept) = &mut self.kept
            && kept.send().is_err()
        {
            self.kept = None;
        }
        while Instant::now() < next {
            self.listen(next);
        }
    }

    /// Opens another connection if nothing has come for a while.
    fn knock(&mut self) {
        if self.kept.is_some() && self.last.is_some_and(|last| last.elapsed() < SILENCE) {
            self.knocking = None;
            return;
        }
        let waits = |knocking: &Connection| knocking.open || knocking.since.elapsed() < KNOCK_INTERVAL;
        if !self.knocking.as_ref().is_some_and(waits) {
            self.knocking = Connection::begin().ok();
        }
    }

    fn listen(&mut self, until: Instant) {
        let connections = [&self.kept, &self.knocking];
        let mut fds: Vec<PollFd> = connections
            .iter()
            .filter_map(|it| it.as_ref())
            .map(|it| {
                let flags = if it.open { PollFlags::POLLIN } else { PollFlags::POLLOUT };
                PollFd::new(it.stream.as_fd(), flags)
            })
            .collect();
        // At least one, or it would spin; a millisecond is as fine as poll gets.
        let left = until.saturating_duration_since(Instant::now()).as_millis().max(1) as u16;
        let _ = poll(&mut fds, PollTimeout::from(left));
        drop(fds);
        let at = Instant::now();
        let before = self.answers.len();
        if let Some(Err(_)) = self.kept.as_mut().map(|kept| kept.receive(at, &mut self.answers)) {
            self.kept = None;
        }
        if self.answers.len() == before {
            match self.knocking.as_mut().map(|it| it.receive(at, &mut self.answers)) {
                Some(Err(_)) => self.knocking = None,
                Some(Ok(())) if self.answers.len() > before => self.kept = self.knocking.take(),
                _ => {}
            }
        }
        if self.answers.len() > before {
            self.last = Some(at);
        }
    }
}

impl Connection {
    /// Connects without waiting for it.
    fn begin() -> std::io::Result<Self> {
        let address: SocketAddr = format!("{VIP}:6379").parse().map_err(std::io::Error::other)?;
        let SocketAddr::V4(address) = address else { return Err(ErrorKind::Unsupported.into()) };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd: OwnedFd = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
        match connect(fd.as_raw_fd(), &SockaddrIn::from(address)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(errno) => return Err(errno.into()),
        }
        let stream = TcpStream::from(fd);
        stream.set_nodelay(true)?;
        Ok(Self { stream, received: Vec::new(), open: false, since: Instant::now() })
    }

    fn send(&mut self) -> std::io::Result<()> {
        match self.stream.write(INCREMENT) {
            // A full buffer: nobody has answered for long.
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            other => other.map(drop),
        }
    }

    /// Takes what has come; each line is an answer.
    fn receive(&mut self, at: Instant, answers: &mut Vec<(Instant, u64)>) -> std::io::Result<()> {
        if !self.open {
            if let Some(error) = self.stream.take_error()? {
                return Err(error);
            }
            if self.stream.peer_addr().is_err() {
                return Ok(());
            }
            self.open = true;
            self.send()?;
        }
        let mut buf = [0; 4096];
        match self.stream.read(&mut buf) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => self.received.extend(&buf[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        while let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.received.drain(..=end).collect();
            let text = String::from_utf8_lossy(&line);
            // Whatever else it says (that it is loading) is no answer.
            if let Some(value) = text.strip_prefix(':').and_then(|value| value.trim().parse().ok()) {
                answers.push((at, value));
            }
        }
        Ok(())
    }
}
