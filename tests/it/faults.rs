//! Every fault by every arbiter, under load: who runs the workload afterwards, and how long clients waited. Prints a table.

use std::time::{Duration, Instant};

use super::{
    cluster::{Cluster, wait_for},
    etcd::{self, Etcd},
    lab::Host,
    redis::longest_gap,
};

/// What a fault does to a cluster whose primary is the first host.
type Deed = fn(&mut Cluster, Host, Host);

struct Fault {
    name: &'static str,
    done: Deed,
    lasts: Duration,
    mended: Deed,
    /// Who runs it in the end, with the peer alone deciding, and with an etcd.
    moves: [bool; 2],
    /// Whether clients wait for the other host, or for the end of the fault, in either.
    waits: [bool; 2],
}

fn boot(cluster: &mut Cluster, host: Host) {
    cluster.lab.boot(host);
    cluster.start_agent(host);
}

fn signal(cluster: &Cluster, host: Host, signal: &str) {
    let pid = cluster.agent_pid(host);
    cluster.lab.ok(host, &["kill", signal, &pid]);
}

const NOTHING: Deed = |_, _, _| {};
const HEAL: Deed = |cluster, _, _| cluster.lab.heal();

const FAULTS: [Fault; 9] = [
    Fault {
        name: "the primary's host dies",
        done: |cluster, primary, _| cluster.lab.kill(primary),
        lasts: Duration::from_secs(4),
        mended: |cluster, primary, _| boot(cluster, primary),
        moves: [true, true],
        waits: [true, true],
    },
    Fault {
        name: "the standby's host dies",
        done: |cluster, _, standby| cluster.lab.kill(standby),
        lasts: Duration::from_secs(3),
        mended: |cluster, _, standby| boot(cluster, standby),
        // Without anybody else to ask the primary is frozen, and goes on when its standby is back.
        moves: [false, false],
        waits: [true, false],
    },
    Fault {
        name: "the link between the hosts is cut",
        done: |cluster, primary, standby| cluster.lab.cut_between(primary, standby),
        lasts: Duration::from_secs(4),
        mended: HEAL,
        moves: [true, false],
        waits: [true, false],
    },
    Fault {
        name: "the primary's host is cut off from all",
        done: |cluster, primary, _| cluster.lab.cut(primary),
        lasts: Duration::from_secs(4),
        mended: HEAL,
        moves: [true, true],
        waits: [true, true],
    },
    Fault {
        name: "the primary's agent hangs",
        done: |cluster, primary, _| signal(cluster, primary, "-STOP"),
        lasts: Duration::from_secs(4),
        mended: |cluster, primary, _| signal(cluster, primary, "-CONT"),
        moves: [true, true],
        waits: [true, true],
    },
    Fault {
        name: "the standby's agent hangs",
        done: |cluster, _, standby| signal(cluster, standby, "-STOP"),
        lasts: Duration::from_secs(2),
        mended: |cluster, _, standby| signal(cluster, standby, "-CONT"),
        moves: [false, false],
        waits: [true, false],
    },
    Fault {
        name: "the primary's agent is killed",
        done: |cluster, primary, _| cluster.end_agent(primary, "KILL"),
        lasts: Duration::from_secs(4),
        mended: |cluster, primary, _| cluster.start_agent(primary),
        moves: [true, true],
        waits: [true, true],
    },
    Fault {
        name: "the standby's agent is killed",
        done: |cluster, _, standby| cluster.end_agent(standby, "KILL"),
        lasts: Duration::from_secs(2),
        mended: |cluster, _, standby| cluster.start_agent(standby),
        moves: [false, false],
        waits: [true, false],
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
        mended: NOTHING,
        moves: [false, false],
        waits: [false, false],
    },
];

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
        // A host that is off has no copy that could be asked for.
        let runs =
            |host| cluster.lab.on(host, &["true"]).status.success() && cluster.running_copies(host) == 1;
        // Before the other one was seen to run, and after it.
        let both = runs(primary) && runs(standby) && runs(primary);
        assert!(!both, "{}: two copies run", fault.name);
        std::thread::sleep(Duration::from_millis(100));
    }
    (fault.mended)(cluster, primary, standby);
    let is_well = |host: Host, role: &str, state: &str| {
        let status = cluster.status(host, "redis");
        status["role"] == role && status["state"] == state
    };
    let well = |one, other| is_well(one, "primary", "protected") && is_well(other, "standby", "ready");
    wait_for(fault.name, || well(primary, standby) || well(standby, primary));
    let now = if is_well(primary, "primary", "protected") { primary } else { standby };
    std::thread::sleep(Duration::from_millis(300));
    let gap = longest_gap(&counter.stop());
    assert_eq!(cluster.digest(), digest, "{}", fault.name);
    assert_eq!(cluster.running_copies(Host::A) + cluster.running_copies(Host::B), 1, "{}", fault.name);
    (now, gap)
}

/// All faults, one after the other: the host that is left with the workload suffers the next.
fn suffer_all(cluster: &mut Cluster, arbiter: usize) {
    let (mut primary, mut standby) = (Host::A, Host::B);
    let name = ["peer", "etcd"][arbiter];
    for fault in &FAULTS {
        let (now, gap) = suffer(cluster, fault, primary, standby);
        let outcome = if now == primary { "stays" } else { "moves" };
        println!("{:<42} {name:<6} {outcome:<6} {:>6.0} ms", fault.name, gap.as_secs_f64() * 1e3);
        assert_eq!(now != primary, fault.moves[arbiter], "{} ({name})", fault.name);
        // A takeover's clients wait from the guard's deadline to the restore, which is little.
        let least = Duration::from_millis(if now == primary { 200 } else { 40 });
        assert!(gap > least || !fault.waits[arbiter], "{} ({name}): nobody waited ({gap:?})?", fault.name);
        assert!(!fault.waits[arbiter] || gap < Duration::from_secs(12), "{} ({name}): {gap:?}", fault.name);
        if now != primary {
            std::mem::swap(&mut primary, &mut standby);
        }
    }
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
    etcd.kill(&cluster.lab, dir.path());
}
