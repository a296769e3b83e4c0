//! The end that ships.

use std::{
    io,
    net::{Ipv4Addr, TcpStream},
    path::Path as Dir,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::{prctl, signal::Signal};
use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};
use standin::{
    ha::Message,
    model::Term,
    transport::{Channel, Connection, prompt_runtime},
    wire::message::Datagram,
};

use crate::{
    DIALER_PORT, HEARTBEAT_LEN, Result, Shipped, TCP_PORT, TLS_PORT, WARM_UP, bind,
    carried::{self, Frames, ReadWrite},
};

const HEARTBEAT_EVERY: Duration = Duration::from_millis(4);
/// What a heartbeat without an answer counts as.
const LOST: Duration = Duration::from_secs(1);
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

pub(crate) fn ship(dir: &Dir, to: Ipv4Addr) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let frames = carried::epoch();
    let runtime = prompt_runtime()?;
    let endpoint = runtime.block_on(async { bind(&dir.join("ship"), DIALER_PORT) })?;
    let peer = "serve".parse()?;
    let lease = runtime.block_on(endpoint.connect(&peer, Channel::Lease))?;
    let bulk = runtime.block_on(endpoint.connect(&peer, Channel::Bulk))?;
    let mut tcp = Tcp::dial(|purpose| dial(to, TCP_PORT, None, purpose))?;
    let config = Arc::new(carried::tls_client(dir)?);
    let mut tls = Tcp::dial(|purpose| dial(to, TLS_PORT, Some(&config), purpose))?;
    println!("ready");
    for line in io::stdin().lines() {
        let line = line?;
        let [method, load, ms] = line.split(' ').collect::<Vec<_>>()[..] else { return Err("what?".into()) };
        let round = Round { bulk: load == "bulk", time: Duration::from_millis(ms.parse()?) };
        let shipped = match method {
            "quic" => runtime.block_on(ship_quic(&bulk, &lease, &frames, round))?,
            "tcp-tls" => tls.round(&frames, round)?,
            _ => tcp.round(&frames, round)?,
        };
        println!("{}", serde_json::to_string(&shipped)?);
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Round {
    /// Whether epochs are shipped, or heartbeats are alone.
    bulk: bool,
    time: Duration,
}

/// Ships epoch after epoch for the time of a round.
async fn ship_quic(bulk: &Connection, lease: &Connection, frames: &Frames, round: Round) -> Result<Shipped> {
    let pulse = tokio::spawn(beat(lease.clone(), round.time));
    let (bytes, seconds) = if round.bulk {
        bulk.thread().spawn(ship_epochs(bulk.clone(), Arc::clone(frames), round.time)).await??
    } else {
        (1, round.time.as_secs_f64())
    };
    Ok(Shipped { bytes, seconds, lease_us: pulse.await? })
}

async fn ship_epochs(bulk: Connection, frames: Frames, time: Duration) -> Result<(u64, f64)> {
    let mut count = Count::begin(time);
    while count.goes_on() {
        let mut sender = bulk.send_epoch().await?;
        for (head, body) in &*frames {
            sender.frame(head, body.clone()).await?;
        }
        count.bytes += sender.bytes();
        sender.finish(ANSWER_WITHIN).await?;
    }
    Ok(count.end())
}

/// Counts the bytes of a round, but for its warm-up.
struct Count {
    bytes: u64,
    began: Instant,
    warm: bool,
    time: Duration,
}

impl Count {
    fn begin(time: Duration) -> Self {
        Self { bytes: 0, began: Instant::now(), warm: false, time }
    }

    /// Asked between two epochs.
    fn goes_on(&mut self) -> bool {
        if !self.warm && self.began.elapsed() >= WARM_UP {
            *self = Self { warm: true, ..Self::begin(self.time) };
        }
        !self.warm || self.began.elapsed() < self.time
    }

    /// Bytes and seconds.
    fn end(self) -> (u64, f64) {
        (self.bytes, self.began.elapsed().as_secs_f64())
    }
}

/// Sends heartbeats for the time of a round after the warm-up; the round trip of each in microseconds.
async fn beat(lease: Connection, time: Duration) -> Vec<u64> {
    let clock = Instant::now();
    let sent = Arc::new(Mutex::new(0_u64));
    let counting = Arc::clone(&sent);
    let out = lease.clone();
    let sending = async move {
        tokio::time::sleep(WARM_UP).await;
        let mut ticks = tokio::time::interval(HEARTBEAT_EVERY);
        while clock.elapsed() < WARM_UP + time {
            ticks.tick().await;
            let seq = {
                let mut sent = counting.lock().expect("not poisoned");
                *sent += 1;
                *sent
            };
            let message = Message::Heartbeat { term: Term(1), seq, sent_at: clock.elapsed() };
            out.send_datagram(&Datagram { name: "bench".parse().expect("a name"), message })
                .expect("the lease connection stands");
        }
    };
    let mut trips = Vec::new();
    let receiving = async {
        while let Ok(Datagram { message: Message::Ack { sent_at, .. }, .. }) = lease.recv_datagram().await {
            trips.push((clock.elapsed().saturating_sub(sent_at)).as_micros() as u64);
        }
    };
    let sending = tokio::spawn(sending);
    let _ = tokio::time::timeout(WARM_UP + time + LOST / 4, receiving).await;
    sending.await.expect("heartbeats are sent");
    let sent = *sent.lock().expect("not poisoned");
    trips.resize(trips.len().max(sent as usize), LOST.as_micros() as u64);
    trips
}

/// Bulk and lease connections over TCP.
struct Tcp {
    bulk: Box<dyn ReadWrite>,
    lease: Box<dyn ReadWrite>,
}

impl Tcp {
    fn dial(dial: impl Fn(u8) -> Result<Box<dyn ReadWrite>>) -> Result<Self> {
        Ok(Self { bulk: dial(b'B')?, lease: dial(b'L')? })
    }

    fn round(&mut self, frames: &Frames, round: Round) -> Result<Shipped> {
        let over = AtomicBool::new(false);
        let (bulk, lease) = (&mut self.bulk, &mut self.lease);
        thread::scope(|scope| {
            let pulse = scope.spawn(|| beat_tcp(lease, &over));
            let began = Instant::now();
            let (bytes, seconds) = if round.bulk {
                ship_tcp(bulk, frames, round.time)?
            } else {
                thread::sleep(round.time);
                (1, began.elapsed().as_secs_f64())
            };
            over.store(true, Ordering::Relaxed);
            let lease_us = pulse.join().expect("heartbeats are sent")?;
            Ok(Shipped { bytes, seconds, lease_us })
        })
    }
}

fn ship_tcp(stream: &mut Box<dyn ReadWrite>, frames: &Frames, time: Duration) -> Result<(u64, f64)> {
    let mut count = Count::begin(time);
    while count.goes_on() {
        count.bytes += carried::write_epoch(stream, frames)?;
    }
    Ok(count.end())
}

/// As [`beat`]. A stream delivers in order, so one answer is read for each heartbeat; one that is late makes the next wait,
/// and their time counts from when they were due.
fn beat_tcp(stream: &mut Box<dyn ReadWrite>, over: &AtomicBool) -> Result<Vec<u64>> {
    let mut trips = Vec::new();
    thread::sleep(WARM_UP);
    let mut due = Instant::now();
    while !over.load(Ordering::Relaxed) {
        stream.write_all(&[0; HEARTBEAT_LEN])?;
        stream.flush()?;
        stream.read_exact(&mut [0; HEARTBEAT_LEN])?;
        trips.push(due.elapsed().as_micros() as u64);
        due += HEARTBEAT_EVERY;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(trips)
}

fn dial(to: Ipv4Addr, port: u16, tls: Option<&Arc<ClientConfig>>, purpose: u8) -> Result<Box<dyn ReadWrite>> {
    let stream = TcpStream::connect((to, port))?;
    stream.set_nodelay(true)?;
    let mut stream: Box<dyn ReadWrite> = match tls {
        None => Box::new(stream),
        Some(config) => {
            let name = ServerName::try_from("standin")?;
            Box::new(StreamOwned::new(ClientConnection::new(Arc::clone(config), name)?, stream))
        }
    };
    stream.write_all(&[purpose])?;
    stream.flush()?;
    Ok(stream)
}
