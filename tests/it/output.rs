//! `--commit output`, judged by nothing but what concurrent clients asked and were told: their history must be one that a
//! single server, which never fails, could have made.

#[path = "../linear/checker.rs"]
mod checker;
#[path = "../torture/random.rs"]
mod random;

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use checker::{Call, Operation, Reply, check};
use random::Random;

use super::{
    cluster::{Cluster, wait_for},
    committed::OUTLASTS,
    lab::Host,
    redis::{Redis, inside},
};

const CLIENTS: usize = 8;
/// Few, so that clients meet.
const KEYS: [&str; 3] = ["x", "y", "z"];
/// Of each client, between one event and the next.
const OPERATIONS: usize = 10;
/// A power is cut at any instant of this long.
const INSTANTS_MS: usize = 500;

/// Does one operation, and notes it whatever comes of it.
fn perform(
    redis: &mut Redis,
    history: &mut Vec<Operation>,
    began: Instant,
    (client, key, call): (usize, &str, Call),
) -> io::Result<()> {
    let now = || began.elapsed().as_nanos() as u64;
    let asked_at = now();
    let answer = match call {
        Call::Read => redis.call(&["GET", key]),
        Call::Write(value) => redis.call(&["SET", key, &value.to_string()]),
        Call::Increment => redis.call(&["INCR", key]),
    };
    let at = now();
    let value = answer.and_then(|text| match call {
        Call::Write(_) if text == "OK" => Ok(0),
        _ => text.parse().map_err(|_| io::Error::other(format!("{call:?} is answered by {text:?}"))),
    });
    let reply = value.as_ref().ok().map(|value| Reply { at, value: *value });
    history.push(Operation { client, key: key.to_owned(), call, asked_at, reply });
    value.map(drop)
}

/// What one connection, never opened again, asked and was told, and what ended it.
type Account = (Vec<Operation>, Option<io::Error>);

/// One connection that reads, writes and increments by chance.
struct Client {
    answered: Arc<AtomicUsize>,
    thread: JoinHandle<Account>,
}

impl Client {
    fn start(netns: File, number: usize, mut random: Random, began: Instant, stop: &Arc<AtomicBool>) -> Self {
        let (answered, stop) = (Arc::new(AtomicUsize::new(0)), Arc::clone(stop));
        let count = Arc::clone(&answered);
        let thread = inside(netns, move || {
            let mut redis = Redis::connect(OUTLASTS).expect("redis is reached");
            let mut history = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                // No value is written twice, so that a read tells which write it saw.
                let fresh = ((history.len() + 1) * CLIENTS + number) as i64 * 1_000_000;
                let call = match random.below(8) {
                    0..3 => Call::Read,
                    3 => Call::Write(fresh),
                    _ => Call::Increment,
                };
                let key = KEYS[random.below(KEYS.len())];
                if let Err(error) = perform(&mut redis, &mut history, began, (number, key, call)) {
                    return (history, Some(error));
                }
                count.fetch_add(1, Ordering::Relaxed);
                // Not all clients at all times.
                if random.one_in(4) {
                    std::thread::sleep(Duration::from_millis(random.below(20) as u64));
                }
            }
            (history, None)
        });
        Self { answered, thread }
    }

    fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }
}

/// Several clients at once.
struct Clients {
    began: Instant,
    stop: Arc<AtomicBool>,
    all: Vec<Client>,
}

impl Clients {
    /// Each key is 0 before they begin.
    fn start(cluster: &Cluster, random: &mut Random) -> Self {
        cluster.ask_redis(&["MSET", KEYS[0], "0", KEYS[1], "0", KEYS[2], "0"]);
        let (began, stop) = (Instant::now(), Arc::new(AtomicBool::new(false)));
        let client = |number| {
            Client::start(cluster.client_network(), number, Random::new(random.next()), began, &stop)
        };
        Self { began, all: (0..CLIENTS).map(client).collect(), stop }
    }

    /// Waits until each was answered some more, or was cut off.
    fn await_more(&self) {
        let before: Vec<_> = self.all.iter().map(Client::answered).collect();
        wait_for("every client to be answered", || {
            let mut clients = self.all.iter().zip(&before);
            clients.all(|(client, before)| {
                client.thread.is_finished() || client.answered() >= before + OPERATIONS
            })
        });
    }

    /// What all of them asked and were told, and what one more reads at the end; how connections broke.
    fn end(self, cluster: &Cluster) -> (Vec<Operation>, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut history, mut broken) = (Vec::new(), Vec::new());
        for (number, client) in self.all.into_iter().enumerate() {
            let (operations, error) = client.thread.join().expect("the client ran to its end");
            history.extend(operations);
            broken.extend(error.map(|error| format!("client {number}: {error}")));
        }
        let began = self.began;
        let last = inside(cluster.client_network(), move || {
            let mut redis = Redis::connect(OUTLASTS).expect("redis is reached");
            let mut history = Vec::new();
            for key in KEYS {
                perform(&mut redis, &mut history, began, (CLIENTS, key, Call::Read)).expect("an answer");
            }
            history
        });
        history.extend(last.join().expect("redis answers"));
        (history, broken)
    }
}

/// Drawn anew each time, and told.
pub(crate) fn seeded() -> Random {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let seed = seed.as_nanos() as u64;
    println!("seed {seed}");
    Random::new(seed)
}

fn protect(cluster: &Cluster, flags: &[&str]) {
    cluster.run_redis();
    cluster.protect_with(flags);
    cluster.wait_state(Host::A, "primary", "protected");
}

#[test]
fn a_history_through_three_power_cuts_is_linearizable() {
    let mut cluster = Cluster::up("linearizable");
    protect(&cluster, &["--commit", "output"]);
    let mut random = seeded();
    let clients = Clients::start(&cluster, &mut random);
    let (mut here, mut there) = (Host::A, Host::B);
    for _ in 0..3 {
        clients.await_more();
        let status = cluster.status(here, "redis");
        assert_eq!(status["held"]["output"], true, "{status:#}");
        std::thread::sleep(Duration::from_millis(random.below(INSTANTS_MS) as u64));
        cluster.lab.kill(here);
        cluster.wait_state(there, "primary", "alone");
        clients.await_more();
        cluster.lab.boot(here);
        cluster.start_agent(here);
        cluster.wait_state(there, "primary", "protected");
        (here, there) = (there, here);
    }
    clients.await_more();
    let (history, broken) = clients.end(&cluster);
    assert!(broken.is_empty(), "connections broke: {broken:#?}");
    let unanswered = history.iter().filter(|operation| operation.reply.is_none()).count();
    println!("{} operations of {CLIENTS} clients, {unanswered} without an answer", history.len());
    if let Err(refusal) = check(&history) {
        panic!("{refusal}");
    }
}

/// What the checker is there to find, it finds: without output commit a takeover takes back what clients were told.
#[test]
fn a_history_without_output_commit_is_not_linearizable() {
    let cluster = Cluster::up("not-linearizable");
    protect(&cluster, &["--every", "10s"]);
    let mut random = seeded();
    let epoch = cluster.status(Host::A, "redis")["epoch"]["epoch"].as_u64();
    let clients = Clients::start(&cluster, &mut random);
    // One that holds the connections, and after it what will be lost.
    wait_for("an epoch", || cluster.status(Host::A, "redis")["epoch"]["epoch"].as_u64() > epoch);
    clients.await_more();
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    let (history, _) = clients.end(&cluster);
    let refusal = check(&history).expect_err("acknowledged increments were lost");
    assert!(matches!(refusal, checker::Refusal::Illegal { .. }), "{refusal}");
}
