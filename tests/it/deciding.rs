//! Who decides besides the two hosts, and what an operator orders.

use std::time::Duration;

use super::{
    cluster::{Cluster, wait_for},
    lab::Host,
    redis::{longest_gap, rolled_back},
};

/// Many leases.
const LONG: Duration = Duration::from_millis(1500);
const FENCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fence.sh");

/// Two agents of which neither takes over before a command has switched the other's host off.
pub(crate) fn by_command(hint: &str) -> Cluster {
    by_command_with(hint, &[])
}

/// The same, with more flags.
pub(crate) fn by_command_with(hint: &str, flags: &[&'static str]) -> Cluster {
    Cluster::with(hint, &[&["--arbiter", "fence-command", "--fence-command", FENCE], flags].concat())
}

#[test]
fn a_standby_takes_over_only_when_the_fence_command_has_switched_the_primary_off() {
    let mut cluster = by_command("fence");
    cluster.protect_redis();
    assert_eq!(cluster.status(Host::A, "redis")["arbiter"], "command");
    let digest = cluster.digest();
    // The agent hangs, the workload does not: without a lease nothing stops it, and nobody may run it elsewhere.
    let counter = cluster.count();
    let pid = cluster.agent_pid(Host::A);
    cluster.lab.ok(Host::A, &["kill", "-STOP", &pid]);
    wait_for("the fence command", || cluster.lab.on(Host::B, &["cat", "/srv/asked"]).stdout == b"a redis\n");
    std::thread::sleep(LONG);
    assert_eq!(cluster.status(Host::B, "redis")["role"], "standby");
    let acks = counter.stop();
    assert!(longest_gap(&acks) < Duration::from_secs(1), "it was served all the time");
    cluster.lab.kill(Host::A);
    cluster.lab.ok(Host::B, &["touch", "/srv/off"]);
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.digest(), digest);
    let history = cluster.history(Host::B);
    for kind in ["fencing-peer", "peer-fenced", "promoted"] {
        assert!(history.iter().any(|event| event == kind), "{history:?}");
    }
    // Without a standby it goes on.
    std::thread::sleep(LONG);
    assert_eq!(cluster.status(Host::B, "redis")["role"], "primary");
    cluster.lab.boot(Host::A);
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "standby", "ready");
    cluster.wait_state(Host::B, "primary", "protected");
    let counter = cluster.count();
    std::thread::sleep(Duration::from_millis(200));
    cluster.json(Host::B, &["handoff", "redis"]);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(rolled_back(&counter.stop()), 0);
    // The loss of the standby is none of its matter.
    cluster.lab.kill(Host::B);
    let counter = cluster.count();
    std::thread::sleep(LONG);
    let acks = counter.stop();
    assert!(acks.len() > 100 && longest_gap(&acks) < Duration::from_secs(1));
}

#[test]
fn an_agent_that_stops_on_purpose_is_not_switched_off() {
    let mut cluster = by_command("fence-stop");
    cluster.protect_redis();
    cluster.end_agent(Host::A, "TERM");
    std::thread::sleep(LONG);
    assert!(!cluster.lab.on(Host::B, &["cat", "/srv/asked"]).status.success());
    assert_eq!(cluster.running_copies(Host::A), 1);
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.wait_state(Host::B, "standby", "ready");
}

#[test]
fn without_a_lease_only_an_operator_has_a_standby_take_over() {
    let mut cluster = Cluster::with("operator", &["--on-standby-loss", "continue"]);
    cluster.protect_redis();
    let digest = cluster.digest();
    let (code, said) = cluster.refused(Host::B, &["failover", "redis"]);
    assert!(code == 4 && said.contains("standin handoff redis") && said.contains("--force"), "{said}");
    cluster.lab.kill(Host::B);
    std::thread::sleep(LONG);
    assert_eq!(cluster.status(Host::A, "redis")["role"], "primary");
    assert_eq!(cluster.digest(), digest);
    cluster.lab.boot(Host::B);
    cluster.start_agent(Host::B);
    cluster.wait_state(Host::B, "standby", "ready");
    cluster.wait_state(Host::A, "primary", "protected");

    cluster.lab.kill(Host::A);
    std::thread::sleep(LONG);
    assert_eq!(cluster.status(Host::B, "redis")["role"], "standby");
    // Nobody can be asked: that needs one more word.
    let (_, said) = cluster.refused(Host::B, &["failover", "redis", "--force"]);
    assert!(said.contains("What clients were told since is lost") && said.contains("--yes"), "{said}");
    let status = cluster.json(Host::B, &["failover", "redis", "--force", "--yes"]);
    assert_eq!(status["role"], "primary");
    assert_eq!(cluster.digest(), digest);
    assert!(cluster.refused(Host::B, &["failover", "redis", "--force", "--yes"]).1.contains("already"));
    cluster.lab.boot(Host::A);
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "standby", "ready");
    cluster.wait_state(Host::B, "primary", "protected");
    assert_eq!(cluster.running_copies(Host::A), 0);
}

#[test]
fn hosts_that_do_not_agree_who_decides_protect_nothing() {
    let mut cluster = Cluster::up("disagree");
    cluster.run_redis();
    cluster.end_agent(Host::B, "TERM");
    let flags = ["--on-standby-loss", "continue"];
    cluster.start_agent_with(Host::B, &flags);
    let (code, said) = cluster.refused(Host::A, &["protect", "redis", "--to", "b"]);
    assert!(code == 4 && said.contains("the peer on a, an operator on b"), "{said}");
    assert_eq!(cluster.running_copies(Host::A), 1);
}

#[test]
fn a_copy_that_an_operator_fenced_stays_silent_and_the_standby_takes_over() {
    let mut cluster = Cluster::up("operators-fence");
    cluster.protect_redis();
    let digest = cluster.digest();
    // The standby cannot take over: the copy comes back when it is told to, and not before.
    cluster.lab.cut_between(Host::A, Host::B);
    cluster.lab.kill(Host::B);
    assert_eq!(cluster.json(Host::A, &["fence", "redis"])["state"], "fenced");
    cluster.end_agent(Host::A, "KILL");
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "fenced", "fenced");
    cluster.lab.heal();
    cluster.lab.boot(Host::B);
    cluster.start_agent(Host::B);
    std::thread::sleep(LONG);
    // What B held was in memory: it cannot have taken over.
    assert_eq!(cluster.status(Host::A, "redis")["state"], "fenced");
    cluster.standin(Host::A, &["unfence", "redis"]);
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.wait_state(Host::B, "standby", "ready");
    assert_eq!(cluster.digest(), digest);
    assert!(cluster.refused(Host::A, &["unfence", "redis"]).1.contains("no operator has fenced"));

    cluster.standin(Host::A, &["fence", "redis"]);
    cluster.wait_state(Host::B, "primary", "protected");
    cluster.wait_state(Host::A, "standby", "ready");
    assert_eq!(cluster.digest(), digest);
    assert_eq!(cluster.running_copies(Host::A), 0);
}

#[test]
fn while_protection_is_paused_nothing_is_captured_and_nobody_takes_over() {
    let mut cluster = Cluster::up("operators-pause");
    cluster.protect_redis();
    assert_eq!(cluster.json(Host::A, &["pause", "redis"])["state"], "unguarded");
    let epoch = cluster.status(Host::B, "redis")["epoch"].clone();
    // The agent dies, and the standby with it.
    cluster.end_agent(Host::A, "KILL");
    std::thread::sleep(LONG);
    assert_eq!(cluster.status(Host::B, "redis")["role"], "standby");
    assert!(cluster.ask_redis(&["ping"]).contains("PONG"));
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "primary", "unguarded");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(cluster.status(Host::B, "redis")["epoch"], epoch);
    assert!(cluster.refused(Host::A, &["handoff", "redis"]).1.contains("redis"));
    cluster.standin(Host::A, &["resume", "redis"]);
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.wait_state(Host::B, "standby", "ready");
    assert!(cluster.refused(Host::A, &["resume", "redis"]).1.contains("not paused"));
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    // A standby that does not answer may take over: it is not paused then.
    cluster.lab.boot(Host::A);
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::B, "primary", "protected");
    cluster.lab.kill(Host::A);
    let (_, said) = cluster.refused(Host::B, &["pause", "redis"]);
    assert!(said.contains("redis"), "{said}");
}

/// Whatever damages memory or a disk.
const DAMAGE: &str = "file=$(ls -S /dev/shm/standin/store/images/redis/image-*/pages/* | head -n 1); \
    python3 -c 'import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
at = os.lseek(fd, 0, os.SEEK_DATA)
os.pwrite(fd, bytes(255 - b for b in os.pread(fd, 4096, at)), at)' $file";

#[test]
fn a_damaged_image_is_found_and_sent_anew() {
    let cluster = Cluster::up("verify");
    cluster.protect_redis();
    let digest = cluster.digest();
    let whole = cluster.json(Host::B, &["verify", "redis"]);
    assert!(whole["bytes"].as_u64().unwrap() > 4 << 20, "{whole}");
    assert!(cluster.refused(Host::A, &["verify", "redis"]).1.contains("standin verify redis, on b"));
    // Until no fold has put a page right again that was damaged.
    let refused = (0..20).find_map(|_| {
        cluster.lab.ok(Host::B, &["sh", "-c", DAMAGE]);
        let output = cluster.lab.on(Host::B, &[super::lab::STANDIN, "verify", "redis"]);
        (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
    });
    let refused = refused.expect("the damage is found");
    assert!(refused.contains("is damaged") && refused.contains("sends the whole memory"), "{refused}");
    cluster.wait_state(Host::B, "standby", "ready");
    wait_for("the primary to go on", || cluster.status(Host::A, "redis")["error"].is_null());
    cluster.json(Host::B, &["verify", "redis"]);
    assert!(cluster.history(Host::B).contains(&"image-damaged".to_owned()));
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.digest(), digest);
}
