//! `--commit output`: what a client was told is never taken back, and its connection goes on.

use std::{
    collections::BTreeSet,
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};

use super::{
    cluster::{Cluster, wait_for},
    lab::{Host, STANDIN},
    redis::{Redis, VIP, inside},
};

/// More than any takeover takes, so that a connection of this patience fails only if it is broken.
pub(crate) const OUTLASTS: Duration = Duration::from_secs(20);

/// One connection that counts in a closed loop and is never opened again.
struct Witness {
    stop: Arc<AtomicBool>,
    told: Arc<AtomicU64>,
    thread: JoinHandle<Vec<(u64, Instant)>>,
}

impl Witness {
    fn start(cluster: &Cluster, key: &'static str) -> Self {
        let (stop, told) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, telling) = (Arc::clone(&stop), Arc::clone(&told));
        let thread = inside(cluster.client_network(), move || {
            let mut redis = Redis::connect(OUTLASTS).expect("redis is reached");
            let mut replies = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let reply = redis.call(&["INCR", key]).expect("the connection goes on");
                replies.push((reply.parse().expect("a number"), Instant::now()));
                telling.store(replies.len() as u64, Ordering::Relaxed);
            }
            replies
        });
        Self { stop, told, thread }
    }

    fn told(&self) -> u64 {
        self.told.load(Ordering::Relaxed)
    }

    /// Waits until it was told more.
    fn await_more(&self) {
        let before = self.told();
        wait_for("the connection to go on", || self.told() > before + 20);
    }

    /// Every number once, in order; the longest gaps.
    fn end(self) -> Vec<u128> {
        self.stop.store(true, Ordering::Relaxed);
        let replies = self.thread.join().expect("the connection went on");
        let wrong = replies.windows(2).find(|pair| pair[1].0 != pair[0].0 + 1);
        assert_eq!(wrong, None, "each increment is told once, in order");
        let mut gaps: Vec<_> = replies.windows(2).map(|pair| (pair[1].1 - pair[0].1).as_millis()).collect();
        gaps.sort_unstable_by(|a, b| b.cmp(a));
        gaps.truncate(5);
        gaps
    }
}

fn protect(cluster: &Cluster) {
    cluster.run_redis();
    cluster.protect_with(&["--commit", "output"]);
    assert_eq!(cluster.status(Host::A, "redis")["held"]["output"], true);
}

#[test]
fn a_connection_counts_on_through_three_power_cuts() {
    let mut cluster = Cluster::up("counts-on");
    protect(&cluster);
    let witness = Witness::start(&cluster, "counter");
    let (mut here, mut there) = (Host::A, Host::B);
    for _ in 0..3 {
        witness.await_more();
        cluster.lab.kill(here);
        cluster.wait_state(there, "primary", "alone");
        witness.await_more();
        cluster.lab.boot(here);
        cluster.start_agent(here);
        cluster.wait_state(there, "primary", "protected");
        (here, there) = (there, here);
    }
    witness.await_more();
    println!("gaps: {:?}", witness.end());
}

#[test]
fn a_handoff_is_not_noticed() {
    let cluster = Cluster::up("moves-on");
    protect(&cluster);
    let witness = Witness::start(&cluster, "counter");
    for (here, there) in [(Host::A, Host::B), (Host::B, Host::A)] {
        witness.await_more();
        cluster.standin(here, &["handoff", "redis"]);
        witness.await_more();
        cluster.wait_state(there, "primary", "protected");
    }
    println!("gaps: {:?}", witness.end());
}

/// Fail closed: without an agent nothing leaves; the next one goes on where it was.
#[test]
fn nothing_leaves_while_the_agent_is_dead() {
    let mut cluster = Cluster::with("dead-agent", &["--lease-ms", "3000"]);
    protect(&cluster);
    let witness = Witness::start(&cluster, "counter");
    witness.await_more();
    cluster.end_agent(Host::A, "KILL");
    std::thread::sleep(Duration::from_millis(100));
    let told = witness.told();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(witness.told(), told);
    assert_eq!(cluster.running_copies(Host::A), 1, "it runs, and waits to be heard");
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "primary", "protected");
    witness.await_more();
    println!("gaps: {:?}", witness.end());
}

/// Sends numbers to the client as fast as it can.
const FLOOD: &str = "
import socket
to = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
number = 0
while True:
    try:
        to.sendto(b'%d' % number, ('10.77.0.9', 7200))
        number += 1
    except InterruptedError:
        pass
";

/// Hears numbers, of which none may be missing in the end; how many there were. When output is not held any more, what comes then
/// may overtake what waited.
fn hear_numbers(cluster: &Cluster) -> (Arc<AtomicU64>, JoinHandle<()>) {
    let told = Arc::new(AtomicU64::new(0));
    let counting = Arc::clone(&told);
    let thread = inside(cluster.client_network(), move || {
        let socket = UdpSocket::bind("0.0.0.0:7200").expect("it is free");
        setsockopt(&socket, RcvBufForce, &(512 << 20)).expect("root may have as much as it likes");
        socket.set_read_timeout(Some(OUTLASTS)).expect("a limit");
        let (mut buffer, mut next, mut missing) = ([0; 32], None, BTreeSet::new());
        loop {
            let length = socket.recv(&mut buffer).expect("numbers keep coming");
            let text = std::str::from_utf8(&buffer[..length]).expect("a number");
            if text == "end" {
                assert_eq!(missing, BTreeSet::new());
                return;
            }
            let number: u64 = text.parse().expect("a number");
            let expected = *next.get_or_insert(number);
            assert!(number >= expected || missing.remove(&number), "{number} came twice");
            missing.extend(expected..number);
            next = Some(expected.max(number + 1));
            counting.fetch_add(1, Ordering::Relaxed);
        }
    });
    (told, thread)
}

/// A standby that takes nothing for a while leaves output waiting; before there is more than fits, the workload is slowed
/// down, and then stopped: nothing is dropped.
#[test]
fn output_that_fills_its_queue_stops_the_workload_and_is_not_dropped() {
    let cluster = Cluster::with("flood", &["--on-standby-loss", "continue"]);
    let (heard, hearing) = hear_numbers(&cluster);
    let flood = ["run", "flood", "--ip", "10.77.0.100/24", "--", "/usr/bin/python3", "-c", FLOOD];
    cluster.standin(Host::A, &flood);
    cluster.standin(Host::A, &["protect", "flood", "--to", "b", "--commit", "output"]);
    let held = || cluster.status(Host::A, "flood")["held"].clone();
    let goes_on = || {
        let before = heard.load(Ordering::Relaxed);
        wait_for("numbers to come", || heard.load(Ordering::Relaxed) > before + 1000);
    };
    wait_for("output to wait", || held()["output"] == true);
    goes_on();
    let pid = cluster.agent_pid(Host::B);
    for _ in 0..2 {
        cluster.lab.ok(Host::B, &["kill", "-STOP", &pid]);
        wait_for("the workload to be stopped", || held()["packets"].as_u64() > Some(8192));
        let mut full = 0;
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(50));
            let held = held();
            assert_eq!(held["dropped"], 0, "{held}");
            let packets = held["packets"].as_u64().unwrap();
            assert!(packets < 65_536, "{held}");
            full = packets.max(full);
        }
        println!("{} heard, {full} packets waited", heard.load(Ordering::Relaxed));
        cluster.lab.ok(Host::B, &["kill", "-CONT", &pid]);
        goes_on();
        goes_on();
    }
    cluster.wait_state_of("flood", Host::A, "primary", "protected");
    assert_eq!(held()["dropped"], 0);
    // With nothing to wait for any more it runs as fast as it can.
    cluster.standin(Host::A, &["unprotect", "flood"]);
    goes_on();
    cluster.standin(Host::A, &["remove", "flood"]);
    let end =
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'end', ('10.77.0.9', 7200))";
    cluster.lab.ok(Host::A, &["python3", "-c", end]);
    hearing.join().expect("none was missing");
}

#[test]
fn the_mode_can_be_changed_while_it_runs() {
    let cluster = Cluster::up("mode");
    protect(&cluster);
    let witness = Witness::start(&cluster, "counter");
    witness.await_more();
    let status = cluster.json(Host::A, &["commit", "redis", "async"]);
    assert_eq!(status["commit"], "async");
    wait_for("output to leave at once", || cluster.status(Host::A, "redis")["held"]["output"] == false);
    witness.await_more();
    wait_for("the standby to know", || cluster.status(Host::B, "redis")["commit"] == "async");
    cluster.standin(Host::A, &["commit", "redis", "output"]);
    wait_for("output to wait", || cluster.status(Host::A, "redis")["held"]["output"] == true);
    witness.await_more();
    cluster.wait_state(Host::A, "primary", "protected");
    // Nobody promotes any more: nothing waits.
    cluster.standin(Host::A, &["pause", "redis"]);
    assert_eq!(cluster.status(Host::A, "redis")["held"]["output"], false);
    witness.await_more();
    cluster.standin(Host::A, &["resume", "redis"]);
    cluster.wait_state(Host::A, "primary", "protected");
    assert_eq!(cluster.status(Host::A, "redis")["held"]["output"], true);
    cluster.standin(Host::A, &["unprotect", "redis"]);
    witness.await_more();
    witness.end();
    cluster.standin(Host::A, &["remove", "redis"]);
    for host in [Host::A, Host::B] {
        let tables = cluster.lab.ok(host, &["nft", "list", "tables"]);
        assert!(!tables.contains("standin"), "{host}: {tables}");
    }
    let (code, why) = cluster.refused(Host::A, &["commit", "redis", "maybe"]);
    assert_eq!(code, 2, "{why}");
}

#[test]
fn a_tree_in_the_host_s_network_cannot_have_its_output_held() {
    let cluster = Cluster::up("no-device");
    let pid = cluster.lab.ok(Host::A, &["sh", "-c", "setsid sleep 600 </dev/null >/dev/null 2>&1 & echo $!"]);
    let (code, why) = cluster
        .refused(Host::A, &["protect", "tree", "--pid", pid.trim(), "--to", "b", "--commit", "output"]);
    assert_eq!(code, 4, "{why}");
    assert!(why.contains("standin run tree --ip"), "{why}");
    assert!(cluster.lab.on(Host::A, &["kill", "-0", pid.trim()]).status.success(), "{STANDIN}");
}

/// A client whose kernel takes a minute to send again what was lost: nothing that it says is.
fn without_retransmission(cluster: &Cluster) {
    let route = format!("{VIP}/32");
    cluster.lab.ok(Host::Client, &["ip", "route", "replace", &route, "dev", "eth0", "rto_min", "60s"]);
}

/// Has a client wait for an element of a list, and returns what it was told once that is there.
fn wait_for_element(cluster: &Cluster, asked: &Arc<AtomicBool>) -> JoinHandle<Result<String, String>> {
    let asks = Arc::clone(asked);
    inside(cluster.client_network(), move || {
        let mut redis = Redis::connect(OUTLASTS).expect("redis is reached");
        // From then on the kernels acknowledge with what they have to say, or 40 ms later.
        for _ in 0..50 {
            redis.call(&["PING"]).expect("a reply");
        }
        asks.store(true, Ordering::Relaxed);
        redis.call(&["BLMOVE", "from", "to", "LEFT", "RIGHT", "0"]).map_err(|error| error.to_string())
    })
}

fn await_soon(asked: &AtomicBool, then: Duration) {
    while !asked.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(then);
}

/// What came since the restored epoch the standby was told of, and gives to the copy.
#[test]
fn what_a_client_had_on_the_way_it_need_not_send_again() {
    let cluster = Cluster::up("on-the-way");
    without_retransmission(&cluster);
    cluster.run_redis();
    // An epoch is due when there is output: not for a request that is not acknowledged yet.
    cluster.protect_with(&["--every", "10s", "--commit", "output"]);
    let asked = Arc::new(AtomicBool::new(false));
    let client = wait_for_element(&cluster, &asked);
    await_soon(&asked, Duration::from_millis(5));
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    cluster.ask_redis(&["RPUSH", "from", "x"]);
    assert_eq!(client.join().expect("the client ran to its end"), Ok("x".to_owned()));
}

/// Without output commit it may have been told that its request came, and never sends it again: it does not wait for a reply.
#[test]
fn a_connection_whose_request_is_lost_is_reset() {
    let cluster = Cluster::up("request-lost");
    cluster.run_redis();
    cluster.protect_with(&["--every", "3s", "--commit", "async"]);
    let epoch = || cluster.status(Host::A, "redis")["epoch"]["epoch"].as_u64().unwrap_or(0);
    let (asked, may_ask) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (asks, may) = (Arc::clone(&asked), Arc::clone(&may_ask));
    let client = inside(cluster.client_network(), move || {
        let mut redis = Redis::connect(OUTLASTS).expect("redis is reached");
        redis.call(&["PING"]).expect("a reply");
        while !may.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        asks.store(true, Ordering::Relaxed);
        redis.call(&["BLMOVE", "from", "to", "LEFT", "RIGHT", "0"]).map_err(|error| error.kind())
    });
    let first = epoch();
    wait_for("an epoch with the connection", || epoch() >= first + 2);
    may_ask.store(true, Ordering::Relaxed);
    // It is acknowledged after 40 ms, and the next epoch seconds away.
    await_soon(&asked, Duration::from_millis(300));
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    let told = client.join().expect("the client ran to its end");
    assert_eq!(told, Err(std::io::ErrorKind::ConnectionReset), "it was not left waiting");
}

/// Without output commit a client may know more than the epoch that is restored: it is told at once, and never waits.
#[test]
fn a_connection_that_knows_more_than_the_restored_epoch_is_reset() {
    knows_more("knows-more", false);
}

/// So it is also right after output commit was ended.
#[test]
fn a_connection_that_knows_more_since_the_mode_was_changed_is_reset() {
    knows_more("knows-since", true);
}

fn knows_more(hint: &str, changes: bool) {
    let cluster = Cluster::up(hint);
    cluster.run_redis();
    cluster.protect_with(&["--every", "10s", "--commit", if changes { "output" } else { "async" }]);
    let (counts, counted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (may_count, replies) = (Arc::clone(&counts), Arc::clone(&counted));
    let client = inside(cluster.client_network(), move || {
        let mut redis = Redis::connect(OUTLASTS).expect("redis is reached");
        let mut quiet = Redis::connect(OUTLASTS).expect("redis is reached");
        redis.call(&["PING"]).expect("a reply");
        quiet.call(&["PING"]).expect("a reply");
        while !may_count.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut asked = Instant::now();
        while redis.call(&["INCR", "counter"]).is_ok() {
            asked = Instant::now();
            replies.fetch_add(1, Ordering::Relaxed);
        }
        // The other one knows nothing newer, and goes on.
        (asked.elapsed(), quiet.call(&["PING"]).map_err(|error| error.to_string()))
    });
    let epoch = || cluster.status(Host::A, "redis")["epoch"]["epoch"].as_u64();
    wait_for("an epoch with both connections", || epoch() >= Some(2));
    if changes {
        let before = epoch();
        cluster.standin(Host::A, &["commit", "redis", "async"]);
        wait_for("output to leave at once", || cluster.status(Host::A, "redis")["held"]["output"] == false);
        assert!(epoch() > before, "an epoch says that output leaves at once");
    }
    counts.store(true, Ordering::Relaxed);
    wait_for("the client to be told more", || counted.load(Ordering::Relaxed) > 50);
    cluster.lab.kill(Host::A);
    let (waited, quiet) = client.join().expect("the client ran to its end");
    cluster.wait_state(Host::B, "primary", "alone");
    assert!(waited < Duration::from_secs(5), "it waited for {waited:?}");
    assert_eq!(quiet, Ok("PONG".to_owned()));
}
