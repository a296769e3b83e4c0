//! A host on which nobody can act any more falls silent in time: what its client and its cgroup say.

use std::{fs::File, time::Duration};

use standin::workload::guard::boot_time_ns;

use super::{
    cluster::{Cluster, wait_for},
    lab::{Host, work_cgroup},
    redis::inside,
};

#[path = "../workload/ear.rs"]
mod ear;
use ear::{Ear, Heard, talk_script};

const LEASE: Duration = Duration::from_millis(300);
const MS: u64 = 1_000_000;
const NAME: &str = "talker";
const VIP: &str = "10.77.0.120/24";

/// A workload that says numbers to the client all the time, protected on A, and the client's ear.
fn talking(hint: &str, flags: &[&'static str]) -> (Cluster, Ear) {
    let cluster = Cluster::with(hint, flags);
    let client: File = cluster.client_network();
    let ear = inside(client, Ear::here).join().expect("the client can listen");
    let script = format!("exec {}", talk_script(Host::Client.ipv4()));
    cluster.standin(Host::A, &["run", NAME, "--ip", VIP, "--", "sh", "-c", &script]);
    ear.settle();
    cluster
        .standin(Host::A, &["protect", NAME, "--to", "b", "--vip", &format!("{VIP}@eth0"), "--every", "2s"]);
    cluster.wait_state_of(NAME, Host::A, "primary", "protected");
    ear.await_next();
    (cluster, ear)
}

/// What keeps the guards of a host's workloads.
fn guards(cluster: &Cluster, host: Host) -> Vec<String> {
    let pids = cluster.lab.ok(host, &["pgrep", "-f", "standin (init|guard)"]);
    pids.lines().map(str::to_owned).collect()
}

fn signal(cluster: &Cluster, host: Host, signal: &str, pids: &[String]) {
    let mut command = vec!["kill", signal];
    command.extend(pids.iter().map(String::as_str));
    cluster.lab.ok(host, &command);
}

fn is_frozen(cluster: &Cluster, host: Host) -> bool {
    let events = format!("{}/cgroup.events", work_cgroup(NAME));
    cluster.lab.ok(host, &["cat", &events]).contains("frozen 1")
}

/// Heard from one host, then from the other, and never from both. Returns when the first one was heard last and the second one
/// first.
fn one_after_the_other(heard: &[Heard]) -> (u64, u64) {
    let old = heard.first().expect("something was heard").from;
    let last = heard.iter().filter(|it| it.from == old).map(|it| it.at_ns).max();
    let first = heard.iter().filter(|it| it.from != old).map(|it| it.at_ns).min();
    let (last, first) = (last.unwrap(), first.expect("heard from the other host"));
    assert!(last < first, "both speak for {} us", (last - first) / 1000);
    (last, first)
}

#[test]
fn a_workload_whose_guard_and_agent_are_stopped_falls_silent_within_its_lease() {
    let (cluster, ear) = talking("stopped", &[]);
    let status = cluster.status(Host::A, NAME);
    assert_eq!(status["kernel_lease"]["at"], "device", "{status:#}");
    let (guards, agent) = (guards(&cluster, Host::A), cluster.agent_pid(Host::A));
    let all: Vec<String> = guards.iter().cloned().chain([agent.clone()]).collect();
    signal(&cluster, Host::A, "-STOP", &all);
    let stopped = boot_time_ns();
    std::thread::sleep(10 * LEASE);
    cluster.wait_state_of(NAME, Host::B, "primary", "alone");
    ear.await_next();
    assert!(!is_frozen(&cluster, Host::A), "nobody has frozen it: it runs, and is not heard");
    let (last, first) = one_after_the_other(&ear.heard());
    println!(
        "silent {} ms after the stop, heard of the other host {} ms later",
        (last as i64 - stopped as i64) / MS as i64,
        (first - last) / MS
    );
    assert!(last <= stopped + LEASE.as_nanos() as u64, "{} ms late", (last - stopped) / MS);
    assert!(last > stopped + 100 * MS, "it was not the lease that silenced it");

    // The agent is back first, and has nobody to fence for it: it is muted all the same.
    signal(&cluster, Host::A, "-CONT", std::slice::from_ref(&agent));
    std::thread::sleep(5 * LEASE);
    one_after_the_other(&ear.heard());
    signal(&cluster, Host::A, "-CONT", &guards);
    cluster.wait_state_of(NAME, Host::A, "standby", "ready");
    cluster.wait_state_of(NAME, Host::B, "primary", "protected");
    ear.await_next();
    one_after_the_other(&ear.heard());
}

#[test]
fn a_workload_whose_agent_is_stopped_and_killed_neither_speaks_nor_runs_beside_the_new_one() {
    let (mut cluster, ear) = talking("stop-kill", &[]);
    let agent = cluster.agent_pid(Host::A);
    signal(&cluster, Host::A, "-STOP", &[agent]);
    let stopped = boot_time_ns();
    // It runs here until the guard fires, and there only after that.
    let runs_there = || {
        let procs = format!("cat {}/cgroup.procs 2>/dev/null | wc -l", work_cgroup(NAME));
        cluster.lab.ok(Host::B, &["sh", "-c", &procs]).trim() != "0"
    };
    wait_for("the other host's copy", || {
        let runs = runs_there() && cluster.status(Host::B, NAME)["role"] == "primary";
        assert!(!runs || is_frozen(&cluster, Host::A), "both run");
        runs
    });
    std::thread::sleep(10 * LEASE);
    assert!(is_frozen(&cluster, Host::A));
    cluster.end_agent(Host::A, "KILL");
    std::thread::sleep(3 * LEASE);
    assert!(is_frozen(&cluster, Host::A), "an agent's end thaws nothing");
    let (last, _) = one_after_the_other(&ear.heard());
    assert!(last <= stopped + LEASE.as_nanos() as u64, "{} ms late", (last - stopped) / MS);
    cluster.start_agent(Host::A);
    cluster.wait_state_of(NAME, Host::A, "standby", "ready");
    cluster.wait_state_of(NAME, Host::B, "primary", "protected");
    ear.await_next();
    one_after_the_other(&ear.heard());
}

#[test]
fn an_agent_that_is_killed_and_back_within_its_lease_mutes_nothing() {
    let (mut cluster, ear) = talking("back-in-time", &["--lease-ms", "20000"]);
    for _ in 0..3 {
        cluster.end_agent(Host::A, "KILL");
        cluster.start_agent(Host::A);
        cluster.wait_state_of(NAME, Host::A, "primary", "protected");
    }
    // One that ends in order leaves a workload that needs no lease.
    cluster.end_agent(Host::A, "TERM");
    std::thread::sleep(Duration::from_millis(500));
    ear.await_next();
    cluster.start_agent(Host::A);
    cluster.wait_state_of(NAME, Host::A, "primary", "protected");
    ear.await_next();
    ear.assert_whole();
    let tables = cluster.lab.ok(Host::A, &["nft", "list", "tables"]);
    assert!(tables.contains("standin-lease-"), "{tables}");
    cluster.standin(Host::A, &["unprotect", NAME]);
    ear.await_next();
    cluster.standin(Host::A, &["remove", NAME]);
    assert_eq!(cluster.lab.ok(Host::A, &["nft", "list", "tables"]), "", "nothing is left");
}

/// This machine has no watchdog: one that is none is told of, and nothing is harmed.
#[test]
fn a_device_that_is_no_watchdog_is_told_of_and_harms_no_protection() {
    let (cluster, ear) = talking("no-watchdog", &["--lease-ms", "3000", "--watchdog", "/dev/null"]);
    let watchdog = || cluster.json(Host::A, &["status"])["watchdog"].clone();
    wait_for("the watchdog to be tried", || watchdog()["error"].is_string());
    assert_eq!((&watchdog()["open"], &watchdog()["timeout_s"]), (&false.into(), &2.into()));
    assert!(watchdog()["error"].as_str().is_some_and(|error| error.contains("wdctl")), "{}", watchdog());
    assert_eq!(cluster.json(Host::B, &["status"])["watchdog"]["error"], serde_json::Value::Null);
    ear.assert_whole();
    let (_, refused) = cluster.refused(Host::B, &["agent", "--watchdog", "/dev/watchdog"]);
    assert!(refused.contains("lease_ms to 1200"), "{refused}");
}
