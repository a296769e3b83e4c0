//! What protection costs while nothing fails: a redis' throughput, the agents' processor time and memory, and how many
//! epochs a second are possible.
//!
//! `cargo bench --bench overhead -- [--json FILE] [--quick] [throughput|sustained]`, as root.
//!
//! Two agents on two hosts of a lab (see `scripts/lab`), which share this machine's processors with redis and its client.
//!
//! **Throughput**: `redis-benchmark -t set` in rounds; each round runs without protection and with it, at 1, 5 and 10 epochs
//! a second, one after the other. Two loads: `default`, the benchmark's own settings, and `everywhere`, random keys, which
//! writes to nearly all memory between two epochs and is the worst there is. `ops_ratio` is protected ÷ unprotected. Redis
//! and its client take all that two processors have, and so what the agents take, both of them, is missing: `busy_ratio`
//! is unprotected, with as much processor time per epoch taken away by a program that does nothing else, in the same
//! rhythm. `frozen_share` is what the freezes take by themselves.
//!
//! **Sustained**: continuous epochs of a process that writes a number of scattered pages per epoch.
//!
//! Processor time is that of the agent and of the CRIUs that it started; memory is the agent's own (PSS), and of the
//! standby also what its image takes in RAM.

use std::{
    error::Error,
    fs,
    os::fd::AsFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use memmap2::MmapMut;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    time::{ClockId, clock_gettime},
};
use serde_json::Value;
use standin::model::{EpochFigures, EpochId, PAGE_SIZE};

#[expect(dead_code, reason = "shared with the integration tests")]
#[path = "../tests/it/cluster.rs"]
mod cluster;
#[expect(dead_code, reason = "shared with the integration tests")]
#[path = "../tests/it/lab.rs"]
mod lab;
#[expect(dead_code, reason = "shared with the integration tests")]
#[path = "../tests/it/redis.rs"]
mod redis;

use cluster::Cluster;
use lab::Host;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const RATES: [u64; 3] = [1, 5, 10];
/// Their names, and how many keys they write to at random; without a number `redis-benchmark` writes to one.
const LOADS: [(&str, Option<&str>); 2] = [("default", None), ("everywhere", Some(KEYS))];
const KEYS: &str = "200000";
const VALUE_BYTES: &str = "100";
/// Resident megabytes, pages written per epoch.
const TREES: [(u64, u64); 2] = [(16, 250), (1024, 2500)];
/// A writer writes so many times a second.
const TICKS_PER_S: u64 = 500;

struct Plan {
    rounds: usize,
    requests: &'static str,
    sustained: Duration,
}

const FULL: Plan = Plan { rounds: 5, requests: "200000", sustained: Duration::from_secs(10) };
const QUICK: Plan = Plan { rounds: 2, requests: "50000", sustained: Duration::from_secs(2) };

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let ["write", rss_mb, pages_per_s] = args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        return write_pages(rss_mb.parse()?, pages_per_s.parse()?);
    }
    let (mut json, mut plan, mut only) = (None, FULL, None);
    let mut rest = args.into_iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--json" => json = Some(PathBuf::from(rest.next().ok_or("--json needs a file")?)),
            "--quick" => plan = QUICK,
            "throughput" | "sustained" => only = Some(arg),
            // Cargo's own.
            "--bench" => {}
            other => {
                let usage = "overhead [--json FILE] [--quick] [throughput|sustained]";
                return Err(format!("{other}: what is it? usage: {usage}").into());
            }
        }
    }
    let wanted = |part| only.as_deref().is_none_or(|only| only == part);
    let mut rows = Vec::new();
    if wanted("sustained") {
        all_sustained(&plan, &mut rows)?;
    }
    if wanted("throughput") {
        for row in throughput(&plan)? {
            rows.push(serde_json::to_value(row)?);
        }
    }
    if let Some(path) = json {
        fs::write(path, serde_json::to_vec_pretty(&rows)?)?;
    }
    Ok(())
}

fn all_sustained(plan: &Plan, rows: &mut Vec<Value>) -> Result<()> {
    println!("sustained, continuous epochs (cpu ms/dirty MB, agent's MB: primary, standby)");
    println!(
        "rss MB  dirty pages  epochs/s  frozen ms  frozen share   cpu ms/dirty MB   agents' MB     image MB"
    );
    for (rss_mb, dirty_pages) in TREES {
        let row = sustained(rss_mb, dirty_pages, plan.sustained)?;
        let cost = row.cost;
        println!(
            "{:>6}  {:>11}  {:>8.1}  {:>9.1}  {:>10.1} %  {:>8.1} {:>8.1}  {:>5.0} {:>6.0}  {:>11.0}",
            row.rss_mb,
            row.dirty_pages,
            row.epochs_per_s,
            cost.frozen_ms_p50,
            cost.frozen_share * 100.0,
            cost.primary.cpu_ms_per_dirty_mb,
            cost.standby.cpu_ms_per_dirty_mb,
            cost.primary.pss_mb,
            cost.standby.pss_mb,
            cost.image_mb
        );
        rows.push(serde_json::to_value(row)?);
    }
    Ok(())
}

// What an agent takes.

#[derive(Clone, Copy, Default, serde::Serialize)]
struct AgentCost {
    cpu_share: f64,
    cpu_ms_per_dirty_mb: f64,
    pss_mb: f64,
}

/// What protection takes over a while.
#[derive(Clone, Copy, Default, serde::Serialize)]
struct Cost {
    primary: AgentCost,
    standby: AgentCost,
    /// What the standby keeps in RAM of the workload.
    image_mb: f64,
    dirty_mb_per_epoch: f64,
    frozen_ms_p50: f64,
    frozen_share: f64,
    cpu_ms_per_epoch: f64,
}

/// A while of protection that is watched.
struct Watch<'a> {
    cluster: &'a Cluster,
    name: &'a str,
    began: Instant,
    cpu_ms: [f64; 2],
    /// The newest epoch before it.
    newest: EpochId,
}

impl<'a> Watch<'a> {
    fn begin(cluster: &'a Cluster, name: &'a str) -> Result<Self> {
        let cpu_ms = [cpu_ms(cluster, Host::A)?, cpu_ms(cluster, Host::B)?];
        let newest = epochs(cluster, name)?.last().map_or(EpochId::default(), |epoch| epoch.id);
        Ok(Self { cluster, name, began: Instant::now(), cpu_ms, newest })
    }

    /// Epochs a second, and what they took.
    fn end(self) -> Result<(f64, Cost)> {
        let took_s = self.began.elapsed().as_secs_f64();
        let mut used_ms = [cpu_ms(self.cluster, Host::A)?, cpu_ms(self.cluster, Host::B)?];
        used_ms.iter_mut().zip(self.cpu_ms).for_each(|(after, before)| *after -= before);
        let mut epochs = epochs(self.cluster, self.name)?;
        epochs.retain(|epoch| epoch.id > self.newest && !epoch.full);
        let count = epochs.len() as f64;
        let dirty_mb = epochs.iter().map(|epoch| epoch.dirty_bytes).sum::<u64>() as f64 / 1e6;
        let mut frozen_us: Vec<u64> = epochs.iter().map(|epoch| epoch.frozen_us).collect();
        frozen_us.sort_unstable();
        let agent = |host, used_ms: f64| -> Result<AgentCost> {
            Ok(AgentCost {
                cpu_share: used_ms / 1e3 / took_s,
                cpu_ms_per_dirty_mb: used_ms / dirty_mb,
                pss_mb: pss_mb(self.cluster, host)?,
            })
        };
        let used = self.cluster.lab.ok(Host::B, &["df", "--output=used", "-B1", "/dev/shm"]);
        let cost = Cost {
            primary: agent(Host::A, used_ms[0])?,
            standby: agent(Host::B, used_ms[1])?,
            image_mb: used.lines().last().unwrap_or_default().trim().parse::<f64>()? / 1e6,
            dirty_mb_per_epoch: dirty_mb / count,
            frozen_ms_p50: frozen_us.get(frozen_us.len() / 2).map_or(0.0, |us| *us as f64 / 1e3),
            frozen_share: frozen_us.iter().sum::<u64>() as f64 / 1e6 / took_s,
            cpu_ms_per_epoch: (used_ms[0] + used_ms[1]) / count,
        };
        Ok((count / took_s, cost))
    }
}

/// Processor time of a host's agent and its children so far.
fn cpu_ms(cluster: &Cluster, host: Host) -> Result<f64> {
    // A CRIU is forked from one that stays, by which it is reaped.
    let script = format!(
        "cat /proc/{}/stat $(pgrep -f '[s]wrk' | sed 's|.*|/proc/&/stat|') 2> /dev/null || true",
        cluster.agent_pid(host)
    );
    let mut ticks = 0;
    for stat in cluster.lab.ok(host, &["sh", "-c", &script]).lines() {
        let fields = stat.rsplit(')').next().ok_or("a stat line")?;
        // utime, stime, cutime, cstime: in ticks of 10 ms, whatever the kernel's own are.
        let times = fields.split_whitespace().skip(11).take(4);
        ticks += times.map(|field| field.parse().unwrap_or(0)).sum::<u64>();
    }
    Ok(ticks as f64 * 10.0)
}

fn pss_mb(cluster: &Cluster, host: Host) -> Result<f64> {
    let path = format!("/proc/{}/smaps_rollup", cluster.agent_pid(host));
    let text = cluster.lab.ok(host, &["cat", &path]);
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).ok_or("no Pss")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1e3)
}

fn epochs(cluster: &Cluster, name: &str) -> Result<Vec<EpochFigures>> {
    let mut history = cluster.json(Host::A, &["history", name]);
    Ok(serde_json::from_value(history["epochs"].take())?)
}

// Throughput.

#[derive(serde::Serialize)]
struct Throughput {
    load: &'static str,
    epochs_per_s: u64,
    epochs_per_s_seen: f64,
    ops_ratio: f64,
    busy_ratio: f64,
    ops_per_s: f64,
    unprotected_ops_per_s: f64,
    #[serde(flatten)]
    cost: Cost,
}

fn throughput(plan: &Plan) -> Result<Vec<Throughput>> {
    let cluster = Cluster::with("overhead", &["--log", "warn"]);
    cluster.run_redis();
    // Makes the keys that are changed later.
    benchmark(&cluster, plan, Some(KEYS))?;
    let mut rows = Vec::new();
    println!(
        "\nload        epochs/s    seen  ops ratio  busy ratio  frozen share  dirty MB   cpu share   cpu ms/dirty MB   agents' MB"
    );
    for (load, keys) in LOADS {
        rows.extend(throughput_of(&cluster, plan, load, keys)?);
    }
    Ok(rows)
}

fn throughput_of(
    cluster: &Cluster,
    plan: &Plan,
    load: &'static str,
    keys: Option<&str>,
) -> Result<Vec<Throughput>> {
    let mut unprotected = Vec::new();
    let mut protected = RATES.map(|_| Vec::new());
    let mut busy = RATES.map(|_| Vec::new());
    let mut seen = RATES.map(|_| (0.0, Cost::default()));
    for _ in 0..plan.rounds {
        unprotected.push(benchmark(cluster, plan, keys)?);
        for (i, rate) in RATES.into_iter().enumerate() {
            let every = format!("{}ms", 1000 / rate);
            cluster.standin(Host::A, &["protect", "redis", "--to", "b", "--every", &every]);
            // The first sync is folded meanwhile.
            std::thread::sleep(Duration::from_millis(500));
            let watch = Watch::begin(cluster, "redis")?;
            protected[i].push(benchmark(cluster, plan, keys)?);
            seen[i] = watch.end()?;
            cluster.standin(Host::A, &["unprotect", "redis"]);
            let burner = Burner::start(seen[i].1.cpu_ms_per_epoch, rate);
            busy[i].push(benchmark(cluster, plan, keys)?);
            drop(burner);
        }
    }
    let unprotected = median(unprotected);
    let mut rows = Vec::new();
    for (i, (protected, busy)) in protected.into_iter().zip(busy).enumerate() {
        let ops_per_s = median(protected);
        let (epochs_per_s_seen, cost) = seen[i];
        let row = Throughput {
            load,
            epochs_per_s: RATES[i],
            epochs_per_s_seen,
            ops_ratio: ops_per_s / unprotected,
            busy_ratio: median(busy) / unprotected,
            ops_per_s,
            unprotected_ops_per_s: unprotected,
            cost,
        };
        row.print();
        rows.push(row);
    }
    Ok(rows)
}

impl Throughput {
    fn print(&self) {
        let cost = self.cost;
        println!(
            "{:<10}  {:>8}  {:>6.1}  {:>9.3}  {:>10.3}  {:>10.1} %  {:>8.1}  {:>4.2} {:>4.2}  {:>8.1} {:>8.1}  {:>5.0} {:>6.0}",
            self.load,
            self.epochs_per_s,
            self.epochs_per_s_seen,
            self.ops_ratio,
            self.busy_ratio,
            cost.frozen_share * 100.0,
            cost.dirty_mb_per_epoch,
            cost.primary.cpu_share,
            cost.standby.cpu_share,
            cost.primary.cpu_ms_per_dirty_mb,
            cost.standby.cpu_ms_per_dirty_mb,
            cost.primary.pss_mb,
            cost.standby.pss_mb
        );
    }
}

/// Requests a second, by redis' own benchmark; beside it on host A, from where it is reached protected or not.
fn benchmark(cluster: &Cluster, plan: &Plan, keys: Option<&str>) -> Result<f64> {
    let mut args = vec![
        "redis-benchmark",
        "-h",
        redis::VIP,
        "-t",
        "set",
        "-n",
        plan.requests,
        "-d",
        VALUE_BYTES,
        "--csv",
    ];
    if let Some(keys) = keys {
        args.extend(["-r", keys]);
    }
    let text = cluster.lab.ok(Host::A, &args);
    let line = text.lines().find(|line| line.starts_with("\"SET\""));
    let line = line.ok_or("redis-benchmark says nothing of SET")?;
    let field = line.split(',').nth(1).ok_or("no requests per second")?;
    Ok(field.trim_matches('"').parse()?)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Takes processor time in the rhythm of epochs, and does nothing with it.
struct Burner(Arc<AtomicBool>);

impl Burner {
    fn start(ms_per_turn: f64, turns_per_s: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let turn = Duration::from_secs_f64(ms_per_turn / 1e3);
        let period = Duration::from_millis(1000 / turns_per_s);
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let (began, until) = (Instant::now(), thread_time() + turn);
                while thread_time() < until {
                    std::hint::spin_loop();
                }
                std::thread::sleep(period.saturating_sub(began.elapsed()));
            }
        });
        Self(stop)
    }
}

impl Drop for Burner {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every kernel has this clock").into()
}

// Sustained.

#[derive(serde::Serialize)]
struct Sustained {
    rss_mb: u64,
    dirty_pages: u64,
    epochs_per_s: f64,
    #[serde(flatten)]
    cost: Cost,
}

fn sustained(rss_mb: u64, dirty_pages: u64, time: Duration) -> Result<Sustained> {
    let cluster = Cluster::with("sustained", &["--log", "warn"]);
    let program = std::env::current_exe()?.display().to_string();
    // A guess, put right below.
    let first = (dirty_pages * 20).to_string();
    let args = ["run", "writer", "--json", "--", &program, "write", &rss_mb.to_string(), &first];
    let reply: Value = serde_json::from_str(&cluster.standin(Host::A, &args))?;
    let pid = reply["pid"].to_string();
    cluster.standin(Host::A, &["protect", "writer", "--to", "b", "--continuous"]);
    for _ in 0..3 {
        let watch = Watch::begin(&cluster, "writer")?;
        std::thread::sleep(Duration::from_secs(1));
        let (epochs_per_s, _) = watch.end()?;
        let pages_per_s = (dirty_pages as f64 * epochs_per_s) as u32;
        cluster.lab.ok(Host::A, &["env", "kill", "-q", &pages_per_s.to_string(), "-s", "USR1", &pid]);
    }
    let watch = Watch::begin(&cluster, "writer")?;
    std::thread::sleep(time);
    let (epochs_per_s, cost) = watch.end()?;
    let dirty_pages = (cost.dirty_mb_per_epoch * 1e6 / PAGE_SIZE as f64) as u64;
    Ok(Sustained { rss_mb, dirty_pages, epochs_per_s, cost })
}

/// The process that is protected: writes to so many pages a second, all over its memory; SIGUSR1 brings another number.
fn write_pages(rss_mb: u64, pages_per_s: u64) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGUSR1);
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK)?;
    let pages = rss_mb * (1 << 20) / PAGE_SIZE;
    let mut memory = MmapMut::map_anon((pages * PAGE_SIZE) as usize)?;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut write = |page: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let at = (page * PAGE_SIZE) as usize + (random >> 55) as usize * 8;
        memory[at..at + 8].copy_from_slice(&(random | 1).to_le_bytes());
    };
    (0..pages).for_each(&mut write);
    let (began, mut written, mut per_tick) = (Instant::now(), 0_u64, pages_per_s / TICKS_PER_S);
    for tick in 1.. {
        // What a freeze has taken is made up for: so many a second are so many.
        let due = began + Duration::from_millis(tick * 1000 / TICKS_PER_S);
        let wait = PollTimeout::try_from(due.saturating_duration_since(Instant::now()).as_millis())?;
        // Interrupted by a freeze: a tick that comes a little early.
        let _ = poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], wait);
        if let Some(signal) = signals.read_signal()? {
            per_tick = u64::from(signal.ssi_int.unsigned_abs()) / TICKS_PER_S;
        }
        for _ in 0..per_tick {
            // An odd factor visits every page of a power of two before any for the second time.
            written += 1;
            write(written.wrapping_mul(2_654_435_761) % pages);
        }
    }
    Ok(())
}
