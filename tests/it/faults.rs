//! Every fault by every arbiter, under load: who runs the workload afterwards, and how long clients waited. Prints a table.

use std::{
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use tempfile::TempDir;

use super::{
    cluster::{Cluster, wait_for},
    deciding::{by_command, by_command_with},
    etcd::{self, Etcd},
    handoff::NO_ROOM,
    lab::Host,
    output::seeded,
    redis::longest_gap,
};

/// How long a link flaps: a minute, if there is time.
fn flaps_for() -> Duration {
    let seconds = std::env::var("STANDIN_FLAP_S").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(10))
}

/// What a fault does to a cluster whose primary is the first host.
type Deed = fn(&mut Cluster, Host, Host);

/// What becomes of the workload.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It runs on, and clients notice nothing.
    Stays,
    /// It runs on where it was when the fault is over, and clients wait until then.
    Waits,
    /// The other host takes over.
    Moves,
    /// One of the hosts runs it, and which is not said.
    Either,
}

use Outcome::{Either, Moves, Stays, Waits};

struct Fault {
    name: &'static str,
    done: Deed,
    lasts: Duration,
    /// With the peer alone deciding, with an etcd, with a fence command.
    outcomes: [Outcome; 3],
}

fn signal(cluster: &Cluster, host: Host, signal: &str) {
    let pid = cluster.agent_pid(host);
    cluster.lab.ok(host, &["kill", signal, &pid]);
}

/// Cuts the link and heals it again and again, for times that are drawn from these of milliseconds.
fn flap(cluster: &Cluster, one: Host, other: Host, lasts: Duration, ms: [usize; 2]) {
    let mut random = seeded();
    let mut time = || Duration::from_millis((ms[0] + random.below(ms[1] - ms[0])) as u64);
    let until = Instant::now() + lasts;
    while Instant::now() < until {
        cluster.lab.cut_between(one, other);
        std::thread::sleep(time());
        cluster.lab.heal();
        std::thread::sleep(time());
        do_as_fence_commands_say(cluster);
        for host in [one, other] {
            // What was switched off is on again before long.
            if !cluster.lab.is_up(host) {
                return;
            }
        }
    }
}

/// Leaves a file system that is in memory no room; what it needs to be written to goes on failing.
const NO_ROOM_ON_DISK: &str = "size=$(df --output=used -k /var/lib/standin | tail -n 1)
    until mount -o remount,size=$((size + 8))k /var/lib/standin; do size=$((size + 8)); done
    dd if=/dev/zero of=/var/lib/standin/filler bs=4k 2>/dev/null; true";

const FAULTS: [Fault; 15] = [
    Fault {
        name: "the primary's host dies",
        done: |cluster, primary, _| cluster.lab.kill(primary),
        lasts: Duration::from_secs(4),
        outcomes: [Moves; 3],
    },
    Fault {
        name: "the standby's host dies",
        done: |cluster, _, standby| cluster.lab.kill(standby),
        lasts: Duration::from_secs(3),
        // Without anybody else to ask the primary is frozen, and goes on when its standby is back.
        outcomes: [Waits, Stays, Stays],
    },
    Fault {
        name: "the link between the hosts is cut",
        done: |cluster, primary, standby| cluster.lab.cut_between(primary, standby),
        lasts: Duration::from_secs(4),
        outcomes: [Moves, Stays, Moves],
    },
    Fault {
        name: "the primary's host is cut off from all",
        done: |cluster, primary, _| cluster.lab.cut(primary),
        lasts: Duration::from_secs(4),
        outcomes: [Moves; 3],
    },
    Fault {
        name: "the standby does not hear the primary",
        done: |cluster, primary, standby| cluster.lab.cut_one_way(primary, standby),
        lasts: Duration::from_secs(4),
        outcomes: [Moves, Stays, Moves],
    },
    Fault {
        name: "the primary does not hear the standby",
        done: |cluster, primary, standby| cluster.lab.cut_one_way(standby, primary),
        lasts: Duration::from_secs(4),
        outcomes: [Moves, Stays, Moves],
    },
    Fault {
        name: "the primary's agent hangs",
        done: |cluster, primary, _| signal(cluster, primary, "-STOP"),
        lasts: Duration::from_secs(4),
        outcomes: [Moves; 3],
    },
    Fault {
        name: "the standby's agent hangs",
        done: |cluster, _, standby| signal(cluster, standby, "-STOP"),
        lasts: Duration::from_secs(2),
        outcomes: [Waits, Stays, Stays],
    },
    Fault {
        name: "the primary's agent is killed",
        done: |cluster, primary, _| cluster.end_agent(primary, "KILL"),
        lasts: Duration::from_secs(4),
        outcomes: [Moves; 3],
    },
    Fault {
        name: "the standby's agent is killed",
        done: |cluster, _, standby| cluster.end_agent(standby, "KILL"),
        lasts: Duration::from_secs(2),
        outcomes: [Waits, Stays, Stays],
    },
    Fault {
        name: "the link flaps, shorter than a lease",
        done: |cluster, primary, standby| {
            for _ in 0..10 {
                cluster.lab.cut_between(primary, standby);
                cluster.lab.heal();
                std::thread::sleep(Duration::from_millis(300));
            }
        },
        lasts: Duration::ZERO,
        outcomes: [Stays; 3],
    },
    Fault {
        name: "the link flaps, shorter and longer",
        done: |cluster, primary, standby| flap(cluster, primary, standby, flaps_for(), [50, 900]),
        lasts: Duration::from_secs(1),
        outcomes: [Either, Stays, Either],
    },
    Fault {
        name: "the primary's disk is full",
        done: |cluster, primary, _| sh(cluster, primary, NO_ROOM_ON_DISK),
        lasts: Duration::from_secs(2),
        outcomes: [Stays; 3],
    },
    Fault {
        name: "the standby has no room for epochs",
        done: |cluster, _, standby| sh(cluster, standby, NO_ROOM),
        lasts: Duration::from_secs(2),
        outcomes: [Stays; 3],
    },
    Fault {
        name: "the primary's host dies, B's disk full",
        done: |cluster, primary, standby| {
            sh(cluster, standby, NO_ROOM_ON_DISK);
            cluster.lab.kill(primary);
        },
        // The new term cannot be kept, so nobody promotes until there is room.
        lasts: Duration::from_secs(4),
        outcomes: [Moves; 3],
    },
];

fn sh(cluster: &Cluster, host: Host, script: &str) {
    cluster.lab.ok(host, &["sh", "-c", script]);
}

/// Cuts the power of whom a fence command was told to switch off, and tells it so.
fn do_as_fence_commands_say(cluster: &Cluster) {
    for (host, other) in [(Host::A, Host::B), (Host::B, Host::A)] {
        let asked = cluster.lab.on(host, &["test", "-e", "/srv/asked", "-a", "!", "-e", "/srv/off"]);
        if asked.status.success() {
            if cluster.lab.is_up(other) {
                cluster.lab.kill(other);
            }
            cluster.lab.ok(host, &["touch", "/srv/off"]);
        }
    }
}

/// Everything is as it should be again, whatever was done: links, power, disks, agents.
fn mend(cluster: &mut Cluster) {
    cluster.lab.heal();
    for host in [Host::A, Host::B] {
        let was_up = cluster.lab.is_up(host);
        if !was_up {
            cluster.lab.boot(host);
        }
        let mended = "rm -f /var/lib/standin/filler /srv/asked /srv/off
            mount -o remount,size=50% /var/lib/standin && mount -o remount,size=50% /dev/shm
            pkill -CONT -o -f 'standin agen[t]'";
        let has_agent = cluster.lab.on(host, &["sh", "-c", mended]).status.success();
        if !was_up || !has_agent {
            cluster.start_agent(host);
        }
    }
}

/// Lets a fault happen and end; returns who was primary before and is now, and the longest time without a reply.
fn suffer(cluster: &mut Cluster, fault: &Fault, primary: Host, standby: Host) -> (Host, Duration) {
    cluster.wait_state(primary, "primary", "protected");
    cluster.wait_state(standby, "standby", "ready");
    if cluster.status(primary, "redis")["arbiter"] == "store" {
        wait_for("the key", || cluster.status(primary, "redis")["etcd"]["held_for_ms"].is_u64());
    }
    let digest = cluster.digest();
    let counter = cluster.count();
    std::thread::sleep(Duration::from_millis(300));
    (fault.done)(cluster, primary, standby);
    let until = Instant::now() + fault.lasts;
    while Instant::now() < until {
        do_as_fence_commands_say(cluster);
        cluster.assert_never_both(Duration::from_millis(100), fault.name);
    }
    mend(cluster);
    let now = cluster.wait_until_well(fault.name);
    std::thread::sleep(Duration::from_millis(300));
    let gap = longest_gap(&counter.stop());
    assert_eq!(cluster.digest(), digest, "{}", fault.name);
    assert_eq!(cluster.running_copies(Host::A) + cluster.running_copies(Host::B), 1, "{}", fault.name);
    (now, gap)
}

/// All faults, one after the other: the host that is left with the workload suffers the next.
fn suffer_all(cluster: &mut Cluster, arbiter: usize) {
    let (mut primary, mut standby) = (Host::A, Host::B);
    let name = ["peer", "etcd", "command"][arbiter];
    for fault in &FAULTS {
        let (now, gap) = suffer(cluster, fault, primary, standby);
        let outcome = if now == primary { "stays" } else { "moves" };
        println!("{:<42} {name:<7} {outcome:<6} {:>6.0} ms", fault.name, gap.as_secs_f64() * 1e3);
        let expected = fault.outcomes[arbiter];
        if expected != Either {
            assert_eq!(now != primary, expected == Moves, "{} ({name})", fault.name);
        }
        // A takeover's clients wait from the guard's deadline to the restore, which is little.
        let least = Duration::from_millis(if now == primary { 200 } else { 40 });
        let waits = matches!(expected, Moves | Waits);
        assert!(gap > least || !waits, "{} ({name}): nobody waited ({gap:?})?", fault.name);
        assert!(gap < Duration::from_secs(12), "{} ({name}): {gap:?}", fault.name);
        if now != primary {
            std::mem::swap(&mut primary, &mut standby);
        }
    }
}

/// Both hosts die and are booted again, one of them first; the image is on the standby's disk.
fn lose_both(cluster: &mut Cluster, arbiter: &str) {
    cluster.protect_redis();
    let (mut primary, mut standby) = (Host::A, Host::B);
    for returns_first in ["the primary", "the standby"] {
        let digest = cluster.digest();
        let epoch = || cluster.status(standby, "redis")["epoch"].clone();
        for _ in 0..2 {
            let before = epoch();
            wait_for("an epoch", || epoch() != before);
        }
        cluster.lab.kill(primary);
        cluster.lab.kill(standby);
        let (first, last) =
            if returns_first == "the primary" { (primary, standby) } else { (standby, primary) };
        for host in [first, last] {
            if !cluster.lab.is_up(host) {
                cluster.lab.boot(host);
                cluster.start_agent(host);
            }
            let until = Instant::now() + Duration::from_secs(4);
            while Instant::now() < until {
                // A host that says that it has no copy any more is switched off nevertheless.
                do_as_fence_commands_say(cluster);
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        mend(cluster);
        let now = cluster.wait_until_well(returns_first);
        println!("both hosts die, {returns_first} is back first  {arbiter:<7} {now} runs it");
        assert_eq!(cluster.digest(), digest);
        assert_eq!(cluster.running_copies(Host::A) + cluster.running_copies(Host::B), 1);
        assert_eq!(now, standby, "only the standby's host has it");
        std::mem::swap(&mut primary, &mut standby);
    }
}

/// Agents by whose wall clocks it is another time, and then yet another: leases go by none of it.
fn jump(cluster: &mut Cluster, arbiter: &str) {
    let dir = TempDir::new_in("/var/tmp").unwrap();
    let library = dir.path().join("clock.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/clock.c");
    let made = Command::new("gcc").args(["-shared", "-fPIC", "-O", "-o"]).arg(&library).arg(source).status();
    assert!(made.unwrap().success());
    let preload = format!("LD_PRELOAD={}", library.display());
    for host in [Host::A, Host::B] {
        cluster.end_agent(host, "TERM");
        cluster.start_agent_by(host, &["env", &preload, "CLOCK_OFFSET=/run/clock"], &[]);
    }
    cluster.protect_redis();
    let digest = cluster.digest();
    let counter = cluster.count();
    for (host, seconds) in [(Host::A, 3600), (Host::B, -3600), (Host::B, 7200), (Host::A, -3600)] {
        let before = cluster.status(Host::A, "redis")["epoch"].clone();
        sh(cluster, host, &format!("echo {seconds} > /run/clock"));
        std::thread::sleep(Duration::from_secs(1));
        println!("the clock of {host} is off by {seconds:>5} s  {arbiter}");
        cluster.wait_state(Host::A, "primary", "protected");
        cluster.wait_state(Host::B, "standby", "ready");
        assert_ne!(cluster.status(Host::A, "redis")["epoch"], before);
    }
    let gap = longest_gap(&counter.stop());
    assert!(gap < Duration::from_millis(300), "{gap:?}");
    assert_eq!(cluster.digest(), digest);
    // With clocks three hours apart it can be handed off, and taken over.
    cluster.json(Host::A, &["handoff", "redis"]);
    cluster.wait_state(Host::B, "primary", "protected");
    cluster.wait_state(Host::A, "standby", "ready");
    assert_eq!(cluster.digest(), digest);
    let events = cluster.json(Host::B, &["history", "redis"])["events"].clone();
    let newest = events.as_array().and_then(|events| events.last()?["at_unix_ms"].as_u64()).unwrap();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as u64;
    assert!(newest.abs_diff(now + 7_200_000) < 60_000, "the agent has another clock: {newest}, {now}");
    cluster.lab.kill(Host::B);
    cluster.wait_state(Host::A, "primary", "alone");
    assert_eq!(cluster.digest(), digest);
}

#[test]
fn a_wall_clock_that_jumps_is_not_noticed() {
    jump(&mut Cluster::up("clock-peer"), "peer");
}

#[test]
fn a_wall_clock_that_jumps_is_not_noticed_where_an_etcd_decides() {
    let (mut cluster, dir) = etcd::cluster("clock-etcd");
    let mut etcd = Etcd::start(&cluster.lab, dir.path());
    jump(&mut cluster, "etcd");
    etcd.kill(&cluster.lab, dir.path());
}

#[test]
fn when_both_hosts_have_died_one_copy_runs_whichever_is_back_first() {
    lose_both(&mut Cluster::with("both-peer", &["--store", "disk"]), "peer");
}

#[test]
fn when_both_hosts_have_died_one_copy_runs_where_a_fence_command_decides() {
    lose_both(&mut by_command_with("both-command", &["--store", "disk"]), "command");
}

#[test]
fn when_both_hosts_have_died_one_copy_runs_where_an_etcd_decides() {
    let (mut cluster, dir) = etcd::cluster_with("both-etcd", &["--store", "disk"]);
    let mut etcd = Etcd::start(&cluster.lab, dir.path());
    lose_both(&mut cluster, "etcd");
    etcd.kill(&cluster.lab, dir.path());
}

#[test]
fn after_every_fault_one_copy_runs_where_the_peer_decides() {
    let mut cluster = Cluster::up("faults-peer");
    cluster.protect_redis();
    suffer_all(&mut cluster, 0);
}

#[test]
fn after_every_fault_one_copy_runs_where_an_etcd_decides() {
    let (mut cluster, dir) = etcd::cluster("faults-etcd");
    let mut etcd = Etcd::start(&cluster.lab, dir.path());
    cluster.protect_redis();
    suffer_all(&mut cluster, 1);

    let counter = cluster.count();
    etcd.kill(&cluster.lab, dir.path());
    cluster.assert_never_both(Duration::from_secs(4), "etcd is killed");
    let mut etcd = Etcd::start(&cluster.lab, dir.path());
    cluster.wait_until_well("etcd is back");
    let gap = longest_gap(&counter.stop());
    println!("{:<42} etcd    stays  {:>6.0} ms", "etcd is killed", gap.as_secs_f64() * 1e3);
    assert!(gap < Duration::from_secs(1), "{gap:?}");
    etcd.kill(&cluster.lab, dir.path());
}

#[test]
fn after_every_fault_one_copy_runs_where_a_fence_command_decides() {
    let mut cluster = by_command("faults-command");
    cluster.protect_redis();
    suffer_all(&mut cluster, 2);
}
