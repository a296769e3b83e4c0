//! A redis in a container, checkpointed while it runs and moved on purpose: Standin beside the runtimes' own means.
//!
//! `cargo bench --bench containers -- [--json FILE] [--quick] [--only MB] [--method METHOD]`, as root.
//!
//! Two hosts, a switch and a client (see `scripts/lab`) on one machine. For each size of the container's resident memory and
//! each method, in one run:
//!
//! **Epochs**: checkpoints after which the container runs on. `frozen` is how long it stood still, by what CRIU says or, of
//! Docker, which keeps that to itself, by the client's longest wait; `epoch ms` and `MB` how long one takes and how much it
//! is: of Standin until the standby holds it and what was sent; of the others until the images lie in the source's memory.
//!
//! **Moves** to the other host and back, in turn. `downtime` is the longest time without an answer of a client on the lab's
//! network that asks every millisecond; `total ms` from the order until it runs on the target and is gone from the source;
//! `MB` what the source has sent meanwhile. Standin's standby holds an epoch already when the order comes: `first MB` is what
//! that took before, once, files included. How the others move is told in `containers/theirs.rs`. A move in which an
//! acknowledged increment is lost is an error.
//!
//! The keys are redis' own for tests, whose values are mostly zeroes: what Standin sends of them is little because it packs
//! what it sends, which the others could do too, at a cost. Where a method does not work here, its row says why.

use std::{
    error::Error,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    time::{Duration, Instant},
};

#[path = "containers/client.rs"]
mod client;
#[expect(dead_code, reason = "shared with the integration tests")]
#[path = "../tests/it/cluster.rs"]
mod cluster;
#[expect(dead_code, reason = "shared with the integration tests")]
#[path = "../tests/it/containers.rs"]
mod containers;
#[expect(dead_code, reason = "shared with the integration tests")]
#[path = "../tests/it/docker.rs"]
mod docker;
#[path = "containers/figures.rs"]
mod figures;
#[expect(dead_code, reason = "shared with the integration tests")]
#[path = "../tests/it/lab.rs"]
mod lab;
#[path = "containers/ours.rs"]
mod ours;
#[path = "../tests/it/redis.rs"]
mod redis;
#[path = "containers/theirs.rs"]
mod theirs;

use containers::ROOTFS;
use figures::{Figures, Row};
use lab::{Host, Lab};
use ours::Ours;
use redis::VIP;
use theirs::Theirs;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const SIZES: [Size; 2] = [Size(21), Size(256)];
/// It writes no file.
const REDIS: &[&str] =
    &["redis-server", "--save", "", "--protected-mode", "no", "--enable-debug-command", "yes"];
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Resident megabytes (10^6 bytes) of redis.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Size(u64);

impl Size {
    fn workload(self) -> String {
        format!("redis-{}mb", self.0)
    }
}

struct Plan {
    epochs: usize,
    moves: usize,
}

const FULL: Plan = Plan { epochs: 10, moves: 3 };
const QUICK: Plan = Plan { epochs: 3, moves: 2 };

#[derive(Clone, Copy)]
enum Method {
    Theirs(Theirs),
    Ours(Ours),
}

impl Method {
    fn all() -> impl Iterator<Item = Self> {
        let theirs = Theirs::ALL.into_iter().map(Self::Theirs);
        theirs.chain(Ours::ALL.into_iter().map(Self::Ours))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Theirs(method) => method.name(),
            Self::Ours(method) => method.name(),
        }
    }

    fn measure(self, size: Size, plan: &Plan) -> Result<Figures> {
        match self {
            Self::Theirs(method) => theirs::measure(method, size, plan.epochs, plan.moves),
            Self::Ours(method) => ours::measure(method, size, plan.epochs, plan.moves),
        }
    }
}

fn main() -> Result<()> {
    let (mut json, mut plan, mut only, mut named) = (None, FULL, None, None);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--json" => json = Some(PathBuf::from(value()?)),
            "--quick" => plan = QUICK,
            "--only" => only = Some(Size(value()?.parse()?)),
            "--method" => named = Some(value()?),
            // Cargo's own.
            "--bench" => {}
            other => {
                let usage = "containers [--json FILE] [--quick] [--only MB] [--method METHOD]";
                return Err(format!("{other}: what is it? usage: {usage}").into());
            }
        }
    }
    let names: Vec<&str> = Method::all().map(Method::name).collect();
    if let Some(name) = named.as_ref().filter(|name| !names.contains(&name.as_str())) {
        return Err(format!("there is no method {name}; there are {}", names.join(", ")).into());
    }
    let mut rows = Vec::new();
    Row::print_head();
    for size in only.map_or(SIZES.to_vec(), |size| vec![size]) {
        for method in Method::all().filter(|it| named.as_ref().is_none_or(|name| name == it.name())) {
            // A step of a lab that fails panics; its lab goes with what is unwound.
            let measured = catch_unwind(AssertUnwindSafe(|| method.measure(size, &plan)));
            let figures = match measured {
                Ok(Ok(figures)) => figures,
                Ok(Err(error)) => Figures { note: Some(error.to_string()), ..Figures::default() },
                Err(_) => Figures { note: Some("it failed; why is said above".into()), ..Figures::default() },
            };
            let row = Row::of(size, method.name(), &figures);
            row.print();
            rows.push(row);
        }
    }
    if let Some(path) = json {
        fs::write(path, serde_json::to_vec_pretty(&rows)?)?;
    }
    Ok(())
}

/// Fills the redis, asked from the client, until its memory has the size.
fn populate(lab: &Lab, size: Size) -> Result<()> {
    const VALUE_BYTES: &str = "1000";
    const KEY_BYTES: u64 = 1150;
    let until = Instant::now() + ANSWER_TIMEOUT;
    let ask = |words: &[&str]| -> Result<String> {
        loop {
            let output = lab.on(Host::Client, &[&["redis-cli", "-h", VIP], words].concat());
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            if output.status.success() && !said.starts_with("ERR") {
                return Ok(said);
            }
            if Instant::now() > until {
                return Err(
                    format!("redis does not answer: {}", String::from_utf8_lossy(&output.stderr)).into()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let resident = || -> Result<u64> {
        let info = ask(&["info", "memory"])?;
        let line = info.lines().find_map(|line| line.strip_prefix("used_memory_rss:"));
        Ok(line.ok_or("redis does not say its size")?.trim().parse()?)
    };
    for part in 0.. {
        let missing = (size.0 * 1_000_000).saturating_sub(resident()?);
        if missing < 500_000 {
            break;
        }
        let count = (missing / KEY_BYTES).max(200).to_string();
        ask(&["debug", "populate", &count, &format!("key{part}"), VALUE_BYTES])?;
        // What it says of its size is not older than a tenth of a second.
        std::thread::sleep(Duration::from_millis(150));
    }
    Ok(())
}
