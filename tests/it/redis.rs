//! A redis client that speaks from inside the lab's client host and writes down what it was told.

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};

/// The address that every test gives its redis.
pub(crate) const VIP: &str = "10.77.0.100";
const PORT: u16 = 6379;

/// One connection.
pub(crate) struct Redis {
    stream: BufReader<TcpStream>,
}

impl Redis {
    /// Connects from the thread's network namespace.
    pub(crate) fn connect(timeout: Duration) -> io::Result<Self> {
        let address: SocketAddr = format!("{VIP}:{PORT}").parse().expect("an address");
        let stream = TcpStream::connect_timeout(&address, timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Sends a command and returns its reply as text.
    pub(crate) fn call(&mut self, words: &[&str]) -> io::Result<String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            write!(request, "${}\r\n{word}\r\n", word.len()).map_err(io::Error::other)?;
        }
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        match line.split_at_checked(1) {
            Some(("+" | ":", text)) => Ok(text.to_owned()),
            Some(("$", length)) => {
                let length: usize = length.parse().map_err(io::Error::other)?;
                let mut body = vec![0; length + 2];
                self.stream.read_exact(&mut body)?;
                body.truncate(length);
                Ok(String::from_utf8_lossy(&body).into_owned())
            }
            _ => Err(io::Error::other(format!("redis says {line:?}"))),
        }
    }
}

/// Runs `work` in a thread inside a network namespace.
pub(crate) fn inside<T: Send + 'static>(
    netns: File,
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    std::thread::spawn(move || {
        setns(&netns, CloneFlags::CLONE_NEWNET).expect("the client's network namespace can be entered");
        work()
    })
}

/// An acknowledged increment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ack {
    pub(crate) received: Instant,
    pub(crate) value: u64,
}

/// A client that increments a counter in a closed loop, through reconnects.
pub(crate) struct Counter {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Ack>>,
}

impl Counter {
    pub(crate) fn start(netns: File) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = inside(netns, move || {
            let mut acks = Vec::new();
            let mut connection: Option<Redis> = None;
            while !stopped.load(Ordering::Relaxed) {
                let reply = match &mut connection {
                    Some(redis) => redis.call(&["INCR", "counter"]),
                    None => match Redis::connect(Duration::from_millis(250)) {
                        Ok(redis) => {
                            connection = Some(redis);
                            continue;
                        }
                        Err(error) => Err(error),
                    },
                };
                match reply.and_then(|text| text.parse().map_err(io::Error::other)) {
                    Ok(value) => acks.push(Ack { received: Instant::now(), value }),
                    Err(_) => connection = None,
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            acks
        });
        Self { stop, thread }
    }

    /// Ends the load; returns what was acknowledged, in order.
    pub(crate) fn stop(self) -> Vec<Ack> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the counter ran to its end")
    }
}

/// Acknowledged increments that the server later did not know of.
pub(crate) fn rolled_back(acks: &[Ack]) -> u64 {
    acks.windows(2).map(|pair| (pair[0].value + 1).saturating_sub(pair[1].value)).sum()
}

/// The longest time between two acknowledgements.
pub(crate) fn longest_gap(acks: &[Ack]) -> Duration {
    acks.windows(2).map(|pair| pair[1].received - pair[0].received).max().unwrap_or_default()
}
