//! What holding a workload's packets costs its clients: a redis without protection, the gate alone, and all of it.
//!
//! `cargo bench --bench gate -- [--json FILE] [--quick]`, as root.
//!
//! Two hosts, a switch and a client (see `scripts/lab`) on one machine; one redis of 16 MB, in one run:
//!
//! | mode | what is between it and its clients |
//! |---|---|
//! | `unprotected` | nothing |
//! | `gate open` | the gate, which lets everything through |
//! | `5 ms`, `20 ms` | the gate alone, no checkpoints: what was sent before one tick leaves at the next |
//! | `async` | protection, every 200 ms: replies leave at once, requests wait while redis is frozen |
//! | `output` | protection, epochs back to back: replies wait until the standby has theirs |
//!
//! `latency` is that of one connection that increments a key in a closed loop; `ops/s` what fifty of those do together; `bulk` is
//! one connection that reads a value of 4 MiB, the next one asked for before the last has come.

use std::{
    error::Error,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::fd::AsFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use standin::{
    model::{Epoch, EpochId, Name, Term},
    takeover::hold::{Hold, Marks},
    workload::network::within,
};

#[expect(dead_code, reason = "shared with the integration tests")]
#[path = "../tests/it/cluster.rs"]
mod cluster;
#[expect(dead_code, reason = "shared with the integration tests")]
#[path = "../tests/it/lab.rs"]
mod lab;
#[expect(dead_code, reason = "shared with the integration tests")]
#[path = "../tests/it/redis.rs"]
mod redis;

use cluster::{Cluster, wait_for};
use lab::Host;
use redis::{VIP, inside};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const CONNECTIONS: usize = 50;
const BULK_BYTES: usize = 4 << 20;
/// More than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(serde::Serialize)]
struct Row {
    mode: String,
    latency_ms_p50: f64,
    latency_ms_p99: f64,
    ops_s: f64,
    bulk_mb_s: f64,
}

fn main() -> Result<()> {
    let (mut json, mut length) = (None, Duration::from_secs(8));
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--json" => json = Some(PathBuf::from(args.next().ok_or("--json needs a value")?)),
            "--quick" => length = Duration::from_secs(2),
            // Cargo's own.
            "--bench" => {}
            other => return Err(format!("{other}: what is it? usage: gate [--json FILE] [--quick]").into()),
        }
    }
    let cluster = Cluster::up("gate");
    cluster.run_redis();
    // Nobody announces the address before it is protected.
    cluster.lab.ok(Host::Client, &["ip", "route", "add", VIP, "via", Host::A.ipv4()]);
    cluster.lab.ok(Host::A, &["sysctl", "-qw", "net.ipv4.ip_forward=1"]);
    let clients = Clients { netns: cluster.client_network(), length };
    clients.store_bulk()?;
    let mut rows = Vec::new();
    println!("{:12} {:>11} {:>11} {:>9} {:>10}", "mode", "p50 ms", "p99 ms", "ops/s", "bulk MB/s");
    let mut measure = |mode: &str| -> Result<()> {
        let row = clients.measure(mode)?;
        println!(
            "{mode:12} {:>11.2} {:>11.2} {:>9.0} {:>10.0}",
            row.latency_ms_p50, row.latency_ms_p99, row.ops_s, row.bulk_mb_s
        );
        rows.push(row);
        Ok(())
    };
    measure("unprotected")?;
    for (mode, tick) in [
        ("gate open", None),
        ("5 ms", Some(Duration::from_millis(5))),
        ("20 ms", Some(Duration::from_millis(20))),
    ] {
        let gate = Gate::make(&cluster, tick)?;
        measure(mode)?;
        gate.remove()?;
    }
    cluster.protect_with(&["--every", "200ms"]);
    cluster.wait_state(Host::A, "primary", "protected");
    measure("async")?;
    cluster.standin(Host::A, &["commit", "redis", "output"]);
    wait_for("output to wait", || cluster.status(Host::A, "redis")["held"]["output"] == true);
    measure("output")?;
    if let Some(path) = json {
        fs::write(path, serde_json::to_vec_pretty(&rows)?)?;
    }
    Ok(())
}

/// The gate alone, in front of the redis on A.
struct Gate {
    host: File,
    name: Name,
    stop: Arc<AtomicBool>,
    ticking: Option<JoinHandle<std::result::Result<(), String>>>,
    hold: Arc<Hold>,
}

impl Gate {
    fn make(cluster: &Cluster, tick: Option<Duration>) -> Result<Self> {
        let host = File::open(format!("/proc/{}/ns/net", cluster.lab.pid(Host::A)))?;
        let links = cluster.lab.ok(Host::A, &["ip", "-o", "link"]);
        let device = links.lines().find(|line| line.contains(" sd-")).and_then(|line| line.split(':').next());
        let device = device.ok_or("redis has no device on its host")?.trim().parse()?;
        let marks = Marks { devices: vec![device], addresses: vec![VIP.parse()?], ..Marks::default() };
        let name: Name = "gate".parse()?;
        let hold = within(host.as_fd(), || Hold::make(&name, marks, None, tick.is_some()))??;
        let (hold, stop) = (Arc::new(hold), Arc::new(AtomicBool::new(false)));
        let ticking = tick.map(|tick| {
            let (hold, stop) = (Arc::clone(&hold), Arc::clone(&stop));
            std::thread::spawn(move || beat(&hold, tick, &stop).map_err(|error| error.to_string()))
        });
        Ok(Self { host, name, stop, ticking, hold })
    }

    fn remove(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.ticking.map_or(Ok(Ok(())), JoinHandle::join).map_err(|_| "the gate's thread panicked")??;
        self.hold.open()?;
        within(self.host.as_fd(), || Hold::remove(&self.name))??;
        Ok(())
    }
}

/// Each tick is a freeze, and the commit of the one before.
fn beat(hold: &Hold, tick: Duration, stop: &AtomicBool) -> Result<()> {
    let (mut due, mut number) = (Instant::now(), 1);
    while !stop.load(Ordering::Relaxed) {
        due += tick;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let epoch = |number| EpochId { term: Term(1), epoch: Epoch(number) };
        hold.release(epoch(number - 1))?;
        hold.mark(epoch(number))?;
        number += 1;
    }
    Ok(())
}

/// What asks redis, on the lab's client.
struct Clients {
    netns: File,
    length: Duration,
}

/// One connection.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open() -> Result<Self> {
        let stream = TcpStream::connect_timeout(&format!("{VIP}:6379").parse()?, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::with_capacity(1 << 18, stream)))
    }

    fn send(&mut self, words: &[&[u8]]) -> Result<()> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend(format!("${}\r\n", word.len()).into_bytes());
            request.extend_from_slice(word);
            request.extend(b"\r\n");
        }
        Ok(self.0.get_mut().write_all(&request)?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        if line.starts_with(['+', ':', '$']) { Ok(line) } else { Err(format!("redis says {line:?}").into()) }
    }
}

impl Clients {
    fn on_client<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        self.begin(work)?.join().map_err(|_| "a client panicked")?.map_err(Into::into)
    }

    fn begin<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<std::result::Result<T, String>>> {
        Ok(inside(self.netns.try_clone()?, move || work().map_err(|error| error.to_string())))
    }

    fn store_bulk(&self) -> Result<()> {
        self.on_client(|| {
            let mut connection = Connection::open()?;
            connection.send(&[b"SET", b"bulk", &vec![b'x'; BULK_BYTES]])?;
            connection.line().map(drop)
        })
    }

    fn measure(&self, mode: &str) -> Result<Row> {
        let length = self.length;
        let mut waits = self.on_client(move || loop_for(length, 0))?;
        let counting: Vec<_> = (0..CONNECTIONS)
            .map(|number| self.begin(move || loop_for(length, number)))
            .collect::<Result<_>>()?;
        let mut ops = 0;
        for counted in counting {
            ops += counted.join().map_err(|_| "a client panicked")??.len();
        }
        let bytes = self.on_client(move || stream_for(length))?;
        waits.sort_unstable();
        let at =
            |percent: usize| waits[(waits.len() * percent / 100).min(waits.len() - 1)].as_secs_f64() * 1e3;
        Ok(Row {
            mode: mode.to_owned(),
            latency_ms_p50: at(50),
            latency_ms_p99: at(99),
            ops_s: ops as f64 / length.as_secs_f64(),
            bulk_mb_s: bytes as f64 / length.as_secs_f64() / 1e6,
        })
    }
}

/// How long each increment's answer took, one after the other.
fn loop_for(length: Duration, number: usize) -> Result<Vec<Duration>> {
    let mut connection = Connection::open()?;
    let key = format!("counter{number}");
    let (began, mut waits) = (Instant::now(), Vec::new());
    while began.elapsed() < length {
        let asked = Instant::now();
        connection.send(&[b"INCR", key.as_bytes()])?;
        connection.line()?;
        waits.push(asked.elapsed());
    }
    Ok(waits)
}

/// How many bytes came.
fn stream_for(length: Duration) -> Result<usize> {
    let mut connection = Connection::open()?;
    let mut value = vec![0; BULK_BYTES + 2];
    connection.send(&[b"GET", b"bulk"])?;
    let (began, mut bytes) = (Instant::now(), 0);
    while began.elapsed() < length {
        connection.send(&[b"GET", b"bulk"])?;
        connection.line()?;
        connection.0.read_exact(&mut value)?;
        bytes += value.len();
    }
    Ok(bytes)
}
