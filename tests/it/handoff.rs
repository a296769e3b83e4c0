//! Moving a workload on purpose, and refusing to.

use std::time::Duration;

use super::{cluster::Cluster, lab::Host, redis::rolled_back};

#[test]
fn a_handoff_loses_nothing_there_and_back() {
    let cluster = Cluster::up("handoff");
    cluster.protect_redis();
    let digest = cluster.digest();
    let counter = cluster.count();
    for (from, to) in [(Host::A, Host::B), (Host::B, Host::A), (Host::A, Host::B)] {
        std::thread::sleep(Duration::from_millis(300));
        let report = cluster.json(from, &["handoff", "redis"]);
        assert_eq!(report["to"], to.to_string().to_lowercase());
        assert_eq!(cluster.running_copies(from), 0);
        assert_eq!(cluster.running_copies(to), 1);
        cluster.wait_state(to, "primary", "protected");
        cluster.wait_state(from, "standby", "ready");
    }
    let acks = counter.stop();
    assert_eq!(rolled_back(&acks), 0);
    assert_eq!(cluster.digest(), digest);
    cluster.assert_first_try(Host::A);
    cluster.assert_first_try(Host::B);
}

/// Leaves the standby's store no more than it takes between two epochs: an epoch that is there only until it is folded
/// counts for nothing, and while it is there the size is refused.
pub(crate) const NO_ROOM: &str = "
    used() { df --output=used -k /dev/shm | tail -1; }
    least() { for _ in $(seq 20); do used; done | sort -n | head -1; }
    until mount -o remount,size=$(($(least) + 64))k /dev/shm 2>/dev/null; do :; done
";

#[test]
fn a_handoff_refused_by_a_full_standby_leaves_the_workload_running() {
    let cluster = Cluster::up("full");
    cluster.protect_redis();
    let counter = cluster.count();
    cluster.lab.ok(Host::B, &["sh", "-c", NO_ROOM]);
    let (code, text) = cluster.refused(Host::A, &["handoff", "redis"]);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("space") || text.contains("room"), "{text}");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(cluster.running_copies(Host::A), 1);
    assert_eq!(cluster.running_copies(Host::B), 0);
    let status = cluster.status(Host::A, "redis");
    assert_eq!(status["role"], "primary", "{status:#}");
    assert!(
        status["error"].as_str().is_some_and(|error| error.contains("space") || error.contains("room")),
        "{status:#}"
    );
    // With room again, protection goes on by itself.
    cluster.lab.ok(Host::B, &["mount", "-o", "remount,size=50%", "/dev/shm"]);
    cluster.wait_state(Host::A, "primary", "protected");
    assert_eq!(rolled_back(&counter.stop()), 0);
}

#[test]
fn a_handoff_to_the_wrong_peer_is_refused() {
    let cluster = Cluster::up("wrong-peer");
    cluster.protect_redis();
    let (code, text) = cluster.refused(Host::A, &["handoff", "redis", "--to", "c"]);
    assert_eq!(code, 4);
    assert!(text.contains("its standby is b"), "{text}");
    let (code, text) = cluster.refused(Host::B, &["handoff", "redis"]);
    assert_eq!(code, 4);
    assert!(text.contains("ask the agent on a"), "{text}");
}

/// Has an io_uring, which CRIU refuses to dump, for a moment after each signal.
const REFUSED_FOR_A_MOMENT: &str = "
import ctypes, os, signal, time
def hold(*_):
    ring = ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256))
    time.sleep(0.3)
    os.close(ring)
signal.signal(signal.SIGUSR1, hold)
while True:
    time.sleep(0.01)
";

/// What fails one epoch does not fail the handoff.
#[test]
fn a_handoff_goes_on_when_what_criu_refuses_is_gone() {
    let cluster = Cluster::up("moment");
    cluster.standin(Host::A, &["run", "moment", "--", "/usr/bin/python3", "-c", REFUSED_FOR_A_MOMENT]);
    cluster.standin(Host::A, &["protect", "moment", "--to", "b", "--every", "10s"]);
    cluster.wait_state_of("moment", Host::A, "primary", "protected");
    let pid = cluster.status(Host::A, "moment")["pid"].to_string();
    cluster.lab.ok(Host::A, &["kill", "-USR1", &pid]);
    let done = cluster.json(Host::A, &["handoff", "moment"]);
    eprintln!("{done}");
    cluster.wait_state_of("moment", Host::B, "primary", "protected");
    let log = std::fs::read_to_string(cluster.log(Host::A)).unwrap();
    assert!(log.contains("another round"), "nothing was refused: {log}");
}
