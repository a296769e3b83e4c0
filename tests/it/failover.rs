//! What the standby is for: the primary's host dies, falls silent, comes back.

use std::time::Duration;

use super::{
    cluster::{Cluster, wait_for},
    lab::Host,
    redis::{longest_gap, rolled_back},
};

/// Long enough for an automatic promotion to have happened many times over.
const LONG: Duration = Duration::from_millis(1500);

#[test]
fn a_redis_outlives_its_host_and_the_old_host_becomes_the_standby() {
    let mut cluster = Cluster::up("outlives");
    cluster.protect_redis();
    let digest = cluster.digest();
    let counter = cluster.count();
    std::thread::sleep(Duration::from_millis(700));
    // The counter changes pages all the time: this is in the middle of some epoch.
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    std::thread::sleep(Duration::from_millis(500));
    let acks = counter.stop();
    assert!(acks.len() > 100, "{} increments were acknowledged", acks.len());
    assert_eq!(cluster.digest(), digest);

    cluster.lab.boot(Host::A);
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "standby", "ready");
    cluster.wait_state(Host::B, "primary", "protected");
    assert_eq!(cluster.status(Host::A, "redis")["term"], 2);

    // Failback is one handoff.
    let counter = cluster.count();
    std::thread::sleep(Duration::from_millis(300));
    let report = cluster.json(Host::B, &["handoff", "redis"]);
    assert_eq!(report["to"], "a");
    std::thread::sleep(Duration::from_millis(500));
    let acks = counter.stop();
    assert_eq!(rolled_back(&acks), 0, "a handoff loses nothing; longest gap {:?}", longest_gap(&acks));
    assert_eq!(cluster.digest(), digest);
    cluster.wait_state(Host::A, "primary", "protected");
    assert_eq!(cluster.running_copies(Host::B), 0);
    assert!(cluster.history(Host::A).contains(&"became-standby".to_owned()));
    cluster.assert_first_try(Host::A);
    cluster.assert_first_try(Host::B);
}

#[test]
fn a_cut_shorter_than_the_lease_changes_nothing() {
    let cluster = Cluster::with("short-cut", &["--lease-ms", "2000"]);
    cluster.protect_redis();
    let counter = cluster.count();
    std::thread::sleep(Duration::from_millis(200));
    cluster.lab.cut_between(Host::A, Host::B);
    std::thread::sleep(Duration::from_millis(400));
    cluster.lab.heal();
    std::thread::sleep(LONG);
    cluster.wait_state(Host::A, "primary", "protected");
    assert_eq!(cluster.status(Host::A, "redis")["term"], 1);
    assert_eq!(cluster.status(Host::B, "redis")["role"], "standby");
    assert_eq!(rolled_back(&counter.stop()), 0);
}

#[test]
fn the_old_primary_never_runs_beside_the_new_one() {
    let cluster = Cluster::up("long-cut");
    cluster.protect_redis();
    let counter = cluster.count();
    std::thread::sleep(Duration::from_millis(300));
    // The client still reaches both hosts: only the agents lose each other.
    cluster.lab.cut_between(Host::A, Host::B);
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.running_copies(Host::A), 0, "the old copy is frozen");
    assert_eq!(cluster.status(Host::A, "redis")["role"], "fenced");
    assert_eq!(cluster.running_copies(Host::B), 1);
    std::thread::sleep(Duration::from_millis(500));
    cluster.lab.heal();
    cluster.wait_state(Host::A, "standby", "ready");
    cluster.wait_state(Host::B, "primary", "protected");
    assert_eq!(cluster.running_copies(Host::A), 0);
    assert_eq!(cluster.running_copies(Host::B), 1);
    // What was acknowledged after the promotion was counted by one copy alone: strictly upwards but for one step
    // back to the restored epoch.
    let acks = counter.stop();
    let steps_back = acks.windows(2).filter(|pair| pair[1].value <= pair[0].value).count();
    assert!(steps_back <= 1, "{steps_back} steps back");
    cluster.assert_first_try(Host::B);
}

#[test]
fn a_killed_primary_agent_silences_the_workload_before_the_standby_takes_over() {
    let mut cluster = Cluster::up("agent-kill");
    cluster.protect_redis();
    let counter = cluster.count();
    std::thread::sleep(Duration::from_millis(300));
    cluster.end_agent(Host::A, "KILL");
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.running_copies(Host::A), 0, "the guard froze the old copy without its agent");
    std::thread::sleep(Duration::from_millis(300));
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "standby", "ready");
    assert_eq!(cluster.running_copies(Host::A), 0);
    assert_eq!(cluster.running_copies(Host::B), 1);
    let acks = counter.stop();
    let steps_back = acks.windows(2).filter(|pair| pair[1].value <= pair[0].value).count();
    assert!(steps_back <= 1, "{steps_back} steps back");
}

#[test]
fn an_agent_restart_leaves_the_workload_running() {
    let mut cluster = Cluster::up("restart");
    cluster.protect_redis();
    let pid = cluster.status(Host::A, "redis")["pid"].clone();
    let counter = cluster.count();
    std::thread::sleep(Duration::from_millis(300));
    cluster.end_agent(Host::A, "TERM");
    std::thread::sleep(LONG);
    assert_eq!(cluster.running_copies(Host::A), 1, "it runs on without its agent");
    assert_eq!(cluster.status(Host::B, "redis")["role"], "standby", "nobody took over");
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "primary", "protected");
    assert_eq!(cluster.status(Host::A, "redis")["pid"], pid);
    let acks = counter.stop();
    assert_eq!(rolled_back(&acks), 0);

    // And it is as protected as before.
    let digest = cluster.digest();
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.digest(), digest);
}

#[test]
fn a_standby_restart_on_purpose_does_not_disturb_the_workload() {
    let mut cluster = Cluster::up("standby-restart");
    cluster.protect_redis();
    let counter = cluster.count();
    std::thread::sleep(Duration::from_millis(200));
    cluster.end_agent(Host::B, "TERM");
    std::thread::sleep(LONG);
    assert_eq!(cluster.running_copies(Host::A), 1);
    cluster.start_agent(Host::B);
    cluster.wait_state(Host::A, "primary", "protected");
    let acks = counter.stop();
    assert_eq!(rolled_back(&acks), 0);
    assert!(longest_gap(&acks) < Duration::from_secs(1), "longest gap {:?}", longest_gap(&acks));
}

#[test]
fn a_standby_killed_in_the_middle_of_epochs_keeps_a_whole_one() {
    // The lease is long enough for an agent to be started anew: nobody shall be promoted here before the end.
    let mut cluster = Cluster::with("fold-kill", &["--lease-ms", "3000"]);
    cluster.protect_redis();
    let digest = cluster.digest();
    let counter = cluster.count();
    for round in 0..5 {
        std::thread::sleep(Duration::from_millis(150 + 37 * round));
        cluster.end_agent(Host::B, "KILL");
        cluster.start_agent(Host::B);
        cluster.wait_state(Host::A, "primary", "protected");
    }
    cluster.end_agent(Host::B, "KILL");
    cluster.start_agent(Host::B);
    wait_for("the standby to hold an epoch", || cluster.status(Host::B, "redis")["epoch"].is_object());
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    counter.stop();
    assert_eq!(cluster.digest(), digest);
}
