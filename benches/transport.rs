//! How fast epochs are shipped, and what the lease pays for it: QUIC as the product sets it up, TLS over TCP, and TCP,
//! side by side.
//!
//! `cargo bench --bench transport -- [--json FILE] [--quick]`, as root (it makes network namespaces).
//!
//! All three carry the same epochs, with the product's frames and digest, one after the other as a session does; only the
//! carrier differs. The two ends are processes of their own, joined by the loopback of a network namespace or by a veth
//! pair between two, which in one case is as slow as a link of 1 Gbit/s. In every round each method in turn ships for a while, so that whatever else the machine does meets
//! all of them.
//!
//! | method | bulk | lease |
//! |---|---|---|
//! | quic | [`standin::transport`]'s bulk connection | its lease connection: a heartbeat datagram and the answer to it |
//! | tcp-tls | rustls over TCP, the same crypto provider | a second such connection, as many bytes to and fro |
//! | tcp | TCP, in the clear | a second such connection |
//!
//! A heartbeat is sent every few milliseconds, whether the last was answered or not; one that is never answered counts as
//! the longest time there is. CPU is that of both ends' processes for each byte shipped; where they share all cores, the
//! sum of the two bounds the rate.

use std::{
    error::Error,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path as Dir, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use nix::{
    sched::{CloneFlags, unshare},
    sys::{prctl, signal::Signal},
    unistd::{SysconfVar, sysconf},
};
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName},
    version::TLS13,
};
use serde::{Deserialize, Serialize};
use standin::{
    delta::{BatchHead, Packing, PageRun},
    ha::Message,
    model::{Epoch, EpochId, Extent, Space, Term},
    transport::{Channel, Connection, Endpoint, EpochReceiver, Identity, Peer, Peers},
    wire::{
        epoch::{EpochReader, EpochWriter},
        frame::{HEADER_LEN, Header},
        message::{Datagram, EpochAnswer, FrameHead, Manifest, SpaceMap},
    },
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const METHODS: [&str; 3] = ["quic", "tcp-tls", "tcp"];
const PATHS: [Path; 4] = [
    Path { name: "loopback", mtu: 65_536, shaper: None },
    Path { name: "veth", mtu: 1500, shaper: None },
    Path { name: "veth", mtu: 9000, shaper: None },
    Path { name: "gigabit", mtu: 1500, shaper: Some("tbf rate 1gbit burst 128kb limit 1mb") },
];
/// Batches of an epoch, of a MiB each: as long as a large epoch takes, and more than the caches hold.
const BATCHES: usize = 64;
const BATCH_LEN: usize = 1 << 20;
const ROUNDS: usize = 8;
const ROUNDS_QUICK: usize = 3;
const ROUND: Duration = Duration::from_millis(1500);
const ROUND_QUICK: Duration = Duration::from_secs(1);
/// At the start of a round, not counted: congestion windows open, caches and CPUs settle.
const WARM_UP: Duration = Duration::from_millis(300);
const HEARTBEAT_EVERY: Duration = Duration::from_millis(4);
/// What a heartbeat without an answer counts as.
const LOST: Duration = Duration::from_secs(1);
/// A heartbeat's bytes on a lease connection over TCP, about what a datagram of ours has.
const HEARTBEAT_LEN: usize = 48;
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
const QUIC_PORT: u16 = 7177;
const DIALER_PORT: u16 = 7178;
const TLS_PORT: u16 = 7179;
const TCP_PORT: u16 = 7180;
const SHIP_IP: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const SERVE_IP: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
const ID: EpochId = EpochId { term: Term(1), epoch: Epoch(1) };

/// What joins the two ends: the loopback, or a veth pair, slowed down or not.
#[derive(Clone, Copy)]
struct Path {
    name: &'static str,
    mtu: u32,
    /// For `tc`: a slow link behind a buffer of 8 ms, which is where a lease waits in a real network.
    shaper: Option<&'static str>,
}

impl Path {
    fn is_veth(self) -> bool {
        self.name != "loopback"
    }
}

#[derive(Serialize)]
struct Row {
    path: &'static str,
    mtu: u32,
    method: &'static str,
    gb_s: f64,
    lease_ms_p99: f64,
    lease_ms_p50: f64,
    lease_idle_ms_p50: f64,
    sender_cpu_ns_per_byte: f64,
    receiver_cpu_ns_per_byte: f64,
}

/// What the shipping end reports of a round.
#[derive(Serialize, Deserialize)]
struct Shipped {
    bytes: u64,
    seconds: f64,
    lease_us: Vec<u64>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", dir, own_net] => return serve(Dir::new(dir), own_net == "own-net"),
        ["ship", dir, to] => return ship(Dir::new(dir), to.parse()?),
        _ => {}
    }
    let (mut json, mut rounds, mut round) = (None, ROUNDS, ROUND);
    let mut rest = args.into_iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--json" => json = Some(PathBuf::from(rest.next().ok_or("--json needs a file")?)),
            "--quick" => (rounds, round) = (ROUNDS_QUICK, ROUND_QUICK),
            // Cargo's own.
            "--bench" => {}
            other => {
                return Err(format!("{other}: what is it? usage: transport [--json FILE] [--quick]").into());
            }
        }
    }
    // All that is made here goes with this process and its children, however they end.
    unshare(CloneFlags::CLONE_NEWNET).map_err(|e| format!("no network namespace ({e}): run it as root"))?;
    ip("link set lo up")?;
    println!("{rounds} rounds of {} ms each, medians; lease: round trips in ms", round.as_millis());
    println!(
        "{:<8} {:>6}  {:<8} {:>6} {:>10} {:>10} {:>10}  {:>9} {:>9}",
        "path", "mtu", "method", "GB/s", "lease p99", "p50", "p50 idle", "CPU ns/B", "receiver"
    );
    let mut rows = Vec::new();
    for path in PATHS {
        rows.extend(measure(path, rounds, round)?);
    }
    if let Some(path) = json {
        fs::write(path, serde_json::to_vec_pretty(&rows)?)?;
    }
    Ok(())
}

/// All methods on one path.
fn measure(path: Path, rounds: usize, round: Duration) -> Result<Vec<Row>> {
    let dir = tempfile::tempdir()?;
    let mut pair = Pair::start(dir.path(), path)?;
    let mut rows = Vec::new();
    let mut seen = METHODS.map(|_| Vec::new());
    let idle = METHODS.iter().map(|m| pair.round(m, "idle", round)).collect::<Result<Vec<_>>>()?;
    for _ in 0..rounds {
        for (method, seen) in METHODS.iter().zip(&mut seen) {
            seen.push(pair.round(method, "bulk", round)?);
        }
    }
    for ((method, seen), idle) in METHODS.into_iter().zip(seen).zip(idle) {
        let median = |of: &dyn Fn(&Seen) -> f64| {
            let mut all: Vec<f64> = seen.iter().map(of).collect();
            all.sort_unstable_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let lease = seen.iter().flat_map(|seen| &seen.shipped.lease_us).copied();
        let row = Row {
            path: path.name,
            mtu: path.mtu,
            method,
            gb_s: median(&|seen| seen.shipped.bytes as f64 / seen.shipped.seconds / 1e9),
            lease_ms_p99: percentile_ms(lease.clone(), 99),
            lease_ms_p50: percentile_ms(lease, 50),
            lease_idle_ms_p50: percentile_ms(idle.shipped.lease_us.into_iter(), 50),
            sender_cpu_ns_per_byte: median(&|seen| seen.sender_ns_per_byte),
            receiver_cpu_ns_per_byte: median(&|seen| seen.receiver_ns_per_byte),
        };
        println!(
            "{:<8} {:>6}  {:<8} {:>6.2} {:>10.2} {:>10.2} {:>10.2}  {:>9.2} {:>9.2}",
            row.path,
            row.mtu,
            row.method,
            row.gb_s,
            row.lease_ms_p99,
            row.lease_ms_p50,
            row.lease_idle_ms_p50,
            row.sender_cpu_ns_per_byte,
            row.receiver_cpu_ns_per_byte
        );
        rows.push(row);
    }
    Ok(rows)
}

/// Nearest rank.
fn percentile_ms(us: impl Iterator<Item = u64>, percent: usize) -> f64 {
    let mut sorted: Vec<u64> = us.collect();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).map_or(f64::NAN, |us| *us as f64 / 1000.0)
}

fn ip(args: &str) -> Result<()> {
    run("ip", args)
}

fn run(program: &str, args: &str) -> Result<()> {
    let status = Command::new(program).args(args.split(' ')).status();
    let status = status.map_err(|e| format!("{program} of iproute2 cannot be run: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{program} {args}: {status}").into()) }
}

// The two ends, as the parent sees them.

/// A process that is one end.
struct End {
    process: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl End {
    fn start(args: &[&str]) -> Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = process.stdin.take().ok_or("no stdin")?;
        let stdout = BufReader::new(process.stdout.take().ok_or("no stdout")?);
        Ok(Self { process, stdin, stdout })
    }

    fn tell(&mut self, line: &str) -> Result<()> {
        writeln!(self.stdin, "{line}")?;
        Ok(self.stdin.flush()?)
    }

    fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stdout.read_line(&mut line)? == 0 {
            return Err("one end has failed; its message stands above".into());
        }
        Ok(line.trim_end().to_owned())
    }

    /// CPU time of all its threads so far, in nanoseconds.
    fn cpu_ns(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        let (_, fields) = stat.rsplit_once(')').ok_or("no stat")?;
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
        let ticks: u64 = ticks.collect::<std::result::Result<Vec<_>, _>>()?.iter().sum();
        let hz = sysconf(SysconfVar::CLK_TCK)?.ok_or("no clock ticks")?;
        Ok(ticks as f64 / hz as f64 * 1e9)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

struct Pair {
    serve: End,
    ship: End,
    /// The veth pair's end here; a namespace that goes takes its links with it, but later.
    link: Option<&'static str>,
}

impl Drop for Pair {
    fn drop(&mut self) {
        // If it stays, the next pair cannot be made, and says so.
        let _ = self.link.map(|link| ip(&format!("link del {link}")));
    }
}

/// What a round showed.
struct Seen {
    shipped: Shipped,
    sender_ns_per_byte: f64,
    receiver_ns_per_byte: f64,
}

impl Pair {
    fn start(dir: &Dir, path: Path) -> Result<Self> {
        let (here, there) =
            if path.is_veth() { (SHIP_IP, SERVE_IP) } else { (Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST) };
        for (name, ip, port) in [("ship", here, DIALER_PORT), ("serve", there, QUIC_PORT)] {
            let fingerprint = Identity::load_or_create(&dir.join(name))?.fingerprint();
            let peer = Peer { name: name.parse()?, fingerprint, addr: SocketAddr::new(ip.into(), port) };
            let other = if name == "ship" { "serve" } else { "ship" };
            Identity::load_or_create(&dir.join(other))?;
            Peers::load(&dir.join(other))?.add(peer)?;
        }
        let text = dir.to_str().ok_or("the temporary directory's name")?;
        let own_net = if path.is_veth() { "own-net" } else { "same-net" };
        let mut serve = End::start(&["serve", text, own_net])?;
        if path.is_veth() {
            serve.hear()?;
            let (pid, mtu) = (serve.process.id(), path.mtu);
            ip(&format!("link add ship mtu {mtu} type veth peer name serve mtu {mtu} netns {pid}"))?;
            ip(&format!("addr add {SHIP_IP}/30 dev ship"))?;
            ip("link set ship up")?;
            if let Some(shaper) = path.shaper {
                run("tc", &format!("qdisc add dev ship root {shaper}"))?;
            }
            serve.tell("go")?;
        }
        serve.hear()?;
        let mut ship = End::start(&["ship", text, &there.to_string()])?;
        ship.hear()?;
        Ok(Self { serve, ship, link: path.is_veth().then_some("ship") })
    }

    fn round(&mut self, method: &str, load: &str, round: Duration) -> Result<Seen> {
        let (sender, receiver) = (self.ship.cpu_ns()?, self.serve.cpu_ns()?);
        self.ship.tell(&format!("{method} {load} {}", round.as_millis()))?;
        let shipped: Shipped = serde_json::from_str(&self.ship.hear()?)?;
        // The CPU clock also counts the warm-up, whose bytes do not.
        let scale = shipped.seconds / (shipped.seconds + WARM_UP.as_secs_f64()) / shipped.bytes as f64;
        Ok(Seen {
            sender_ns_per_byte: (self.ship.cpu_ns()? - sender) * scale,
            receiver_ns_per_byte: (self.serve.cpu_ns()? - receiver) * scale,
            shipped,
        })
    }
}

// What is shipped.

type Frames = Arc<[(FrameHead, Bytes)]>;

/// The frames of an epoch and their bodies.
fn epoch() -> Frames {
    let name = "bench".parse().expect("a name");
    let mut frames = vec![(FrameHead::Begin { name, id: ID, base: None }, Bytes::new())];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for number in 0..BATCHES as u64 {
        let runs = vec![PageRun { start: number << 20, pages: 256, zero: false }];
        let head = BatchHead { space: Space::Task(1), runs, packing: Packing::Raw };
        let mut body = Vec::with_capacity(BATCH_LEN);
        while body.len() < BATCH_LEN {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            body.extend_from_slice(&random.to_le_bytes());
        }
        frames.push((FrameHead::Pages(head), body.into()));
    }
    let extents = vec![Extent { start: 0, pages: 256 * BATCHES as u64 }];
    let manifest = Manifest { spaces: vec![SpaceMap { space: Space::Task(1), extents }] };
    frames.push((FrameHead::Manifest(manifest), Bytes::new()));
    frames.into()
}

/// Writes an epoch to a stream and waits for the answer.
fn write_epoch(stream: &mut impl ReadWrite, frames: &Frames) -> Result<u64> {
    let mut writer = EpochWriter::new();
    for (head, body) in &**frames {
        stream.write_all(&writer.frame(head, body)?)?;
        stream.write_all(body)?;
    }
    stream.write_all(&writer.end()?)?;
    stream.flush()?;
    stream.read_exact(&mut [0])?;
    Ok(writer.bytes())
}

/// Reads epochs from a stream and answers them.
fn read_epochs(stream: &mut impl ReadWrite) -> Result<()> {
    loop {
        let mut reader = EpochReader::new();
        while !reader.is_whole() {
            let mut header = [0; HEADER_LEN];
            stream.read_exact(&mut header)?;
            let lens = Header::decode(&header)?;
            let (mut head, mut body) = (vec![0; lens.head_len], vec![0; lens.body_len]);
            stream.read_exact(&mut head)?;
            stream.read_exact(&mut body)?;
            reader.frame(&header, &head, &body)?;
        }
        stream.write_all(&[1])?;
        stream.flush()?;
    }
}

trait ReadWrite: Read + Write + Send {}
impl<T: Read + Write + Send> ReadWrite for T {}

// The end that receives.

fn serve(dir: &Dir, own_net: bool) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let mut stdin = io::stdin().lines();
    if own_net {
        unshare(CloneFlags::CLONE_NEWNET)?;
        println!("net");
        stdin.next();
        ip("link set lo up")?;
        ip(&format!("addr add {SERVE_IP}/30 dev serve"))?;
        ip("link set serve up")?;
    }
    let tls = Arc::new(tls_server(dir)?);
    for (port, tls) in [(TCP_PORT, None), (TLS_PORT, Some(tls))] {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let tls = tls.clone();
                thread::spawn(move || serve_tcp(stream, tls));
            }
        });
    }
    let runtime = runtime()?;
    let endpoint = runtime.block_on(async { bind(&dir.join("serve"), QUIC_PORT) })?;
    runtime.spawn(async move {
        while let Some(connection) = endpoint.accept().await {
            match connection.channel() {
                Channel::Lease => drop(tokio::spawn(answer_heartbeats(connection))),
                Channel::Bulk => drop(connection.thread().clone().spawn(async move {
                    while let Ok(receiver) = connection.accept_epoch().await {
                        take_epoch(receiver).await.expect("an epoch arrives whole");
                    }
                })),
            }
        }
    });
    println!("ready");
    // Until the parent ends.
    stdin.next();
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(standin::transport::prompt_runtime()?)
}

fn bind(dir: &Dir, port: u16) -> Result<Endpoint> {
    let peers = Arc::new(Peers::load(dir)?);
    Ok(Endpoint::bind((Ipv4Addr::UNSPECIFIED, port).into(), Identity::load_or_create(dir)?, peers)?)
}

async fn answer_heartbeats(connection: Connection) {
    while let Ok(Datagram { name, message }) = connection.recv_datagram().await {
        if let Message::Heartbeat { term, seq, sent_at } = message {
            let message = Message::Ack { term, seq, sent_at, granted: true };
            // The peer may have closed it.
            let _ = connection.send_datagram(&Datagram { name, message });
        }
    }
}

async fn take_epoch(mut receiver: EpochReceiver) -> Result<()> {
    while receiver.next_frame().await?.is_some() {}
    Ok(receiver.answer(&EpochAnswer::Committed { id: ID }).await?)
}

/// Serves a TCP connection: its first byte says what it is for.
fn serve_tcp(stream: TcpStream, tls: Option<Arc<ServerConfig>>) -> Result<()> {
    stream.set_nodelay(true)?;
    match tls {
        None => serve_stream(stream),
        Some(config) => serve_stream(StreamOwned::new(ServerConnection::new(config)?, stream)),
    }
}

fn serve_stream(mut stream: impl ReadWrite) -> Result<()> {
    let mut purpose = [0];
    stream.read_exact(&mut purpose)?;
    if purpose == *b"B" {
        return read_epochs(&mut stream);
    }
    loop {
        let mut heartbeat = [0; HEARTBEAT_LEN];
        stream.read_exact(&mut heartbeat)?;
        stream.write_all(&heartbeat)?;
        stream.flush()?;
    }
}

// The end that ships.

fn ship(dir: &Dir, to: Ipv4Addr) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let frames = epoch();
    let runtime = runtime()?;
    let endpoint = runtime.block_on(async { bind(&dir.join("ship"), DIALER_PORT) })?;
    let peer = "serve".parse()?;
    let lease = runtime.block_on(endpoint.connect(&peer, Channel::Lease))?;
    let bulk = runtime.block_on(endpoint.connect(&peer, Channel::Bulk))?;
    let mut tcp = Tcp::dial(|purpose| dial(to, TCP_PORT, None, purpose))?;
    let config = Arc::new(tls_client(dir)?);
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
        count.bytes += write_epoch(stream, frames)?;
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

// TLS over TCP, with the provider and the cipher that the product uses.

fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// Makes a certificate, which the other end finds in the directory.
fn tls_server(dir: &Dir) -> Result<ServerConfig> {
    let made = rcgen::generate_simple_self_signed(["standin".to_owned()])?;
    fs::write(dir.join("certificate"), made.cert.der())?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    Ok(builder.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key.into())?)
}

fn tls_client(dir: &Dir) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(fs::read(dir.join("certificate"))?))?;
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}
