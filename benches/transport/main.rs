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

mod carried;
mod serve;
mod ship;

use std::{
    error::Error,
    fs,
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr},
    path::{Path as Dir, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::{SysconfVar, sysconf},
};
use serde::{Deserialize, Serialize};
use standin::transport::{Endpoint, Identity, Peer, Peers};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const METHODS: [&str; 3] = ["quic", "tcp-tls", "tcp"];
const PATHS: [Path; 4] = [
    Path { name: "loopback", mtu: 65_536, shaper: None },
    Path { name: "veth", mtu: 1500, shaper: None },
    Path { name: "veth", mtu: 9000, shaper: None },
    Path { name: "gigabit", mtu: 1500, shaper: Some("tbf rate 1gbit burst 128kb limit 1mb") },
];
const ROUNDS: usize = 8;
const ROUNDS_QUICK: usize = 3;
const ROUND: Duration = Duration::from_millis(1500);
const ROUND_QUICK: Duration = Duration::from_secs(1);
/// At the start of a round, not counted: congestion windows open, caches and CPUs settle.
const WARM_UP: Duration = Duration::from_millis(300);
/// A heartbeat's bytes on a lease connection over TCP, about what a datagram of ours has.
const HEARTBEAT_LEN: usize = 48;
const QUIC_PORT: u16 = 7177;
const DIALER_PORT: u16 = 7178;
const TLS_PORT: u16 = 7179;
const TCP_PORT: u16 = 7180;
const SHIP_IP: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const SERVE_IP: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);

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
        ["serve", dir, own_net] => return serve::serve(Dir::new(dir), own_net == "own-net"),
        ["ship", dir, to] => return ship::ship(Dir::new(dir), to.parse()?),
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

// Of both ends.

fn bind(dir: &Dir, port: u16) -> Result<Endpoint> {
    let peers = Arc::new(Peers::load(dir)?);
    Ok(Endpoint::bind((Ipv4Addr::UNSPECIFIED, port).into(), Identity::load_or_create(dir)?, peers)?)
}
