//! `standin doctor --peer`: what would break a restore is found before anything is moved.

use std::time::Duration;

use serde_json::Value;

use super::{
    cluster::Cluster,
    lab::{Host, STANDIN},
    redis::{Redis, inside},
};

/// A program with a library of its own, the same on both hosts.
const PROGRAM: &str = "
    mkdir -p /srv/app && cp /usr/bin/sleep /srv/app/sleep
    cp \"$(ldd /usr/bin/sleep | awk '/libc.so/ { print $3 }')\" /srv/app/libc.so.6
    touch -d @1000000000 /srv/app/*
";
/// A user on both hosts, as a line of passwd that is only seen on this host.
const USER: &str = "
    (cat /etc/passwd; echo standin-app:x:4711:4711::/:/bin/false) > /srv/passwd && mount --bind /srv/passwd /etc/passwd
    (cat /etc/group; echo standin-app:x:4711:) > /srv/group && mount --bind /srv/group /etc/group
";

fn prepared(hint: &str) -> Cluster {
    let cluster = Cluster::up(hint);
    for host in [Host::A, Host::B] {
        cluster.lab.ok(host, &["sh", "-ec", PROGRAM]);
        cluster.lab.ok(host, &["sh", "-ec", USER]);
    }
    let run = ["run", "app", "--user", "standin-app", "--", "/usr/bin/env"];
    let program = ["LD_LIBRARY_PATH=/srv/app", "/srv/app/sleep", "100000"];
    cluster.standin(Host::A, &[&run[..], &program[..]].concat());
    cluster
}

/// The report of A about B, with the exit code.
fn examine(cluster: &Cluster, more: &[&str]) -> (i32, Value) {
    let command = [&[STANDIN, "doctor", "--peer", "b", "--json"][..], more].concat();
    let output = cluster.lab.on(Host::A, &command);
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code().unwrap(), report)
}

/// What came out so: id and what was found.
fn of_state(report: &Value, state: &str) -> Vec<(String, String)> {
    let checks = report["checks"].as_array().unwrap().iter().filter(|check| check["state"] == state);
    let text = |check: &Value, key: &str| check[key].as_str().unwrap().to_owned();
    checks
        .map(|check| {
            assert_eq!(check["remedy"].is_null(), !matches!(state, "warn" | "fail"), "{check}");
            (text(check, "id"), text(check, "found"))
        })
        .collect()
}

#[track_caller]
fn assert_failed(cluster: &Cluster, id: &str, word: &str) {
    let (code, report) = examine(cluster, &[]);
    let failed = of_state(&report, "fail");
    assert!(failed.iter().any(|(at, found)| at == id && found.contains(word)), "{id}, {word}: {report:#}");
    assert_eq!((code, &report["ok"]), (1, &Value::Bool(false)));
}

#[test]
fn two_hosts_that_fit_are_found_to_and_what_differs_is_named() {
    let cluster = prepared("doctor-peer");
    let (code, report) = examine(&cluster, &[]);
    assert_eq!((code, of_state(&report, "fail")), (0, Vec::new()), "{report:#}");
    assert_eq!(report["workloads"], serde_json::json!(["app"]));
    for id in ["cpu-features", "cpu-state", "criu", "lease", "mtu", "files", "memory", "clock-rate"] {
        assert!(of_state(&report, "ok").iter().any(|(at, _)| at == id), "{id}: {report:#}");
    }
    let text = cluster.standin(Host::A, &["doctor", "--peer", "b", "--workload", "app"]);
    assert!(text.contains("b can take over app"), "{text}");

    let on_b = |script: &str| cluster.lab.ok(Host::B, &["sh", "-ec", script]);
    on_b("mv /srv/app/libc.so.6 /srv/app/kept");
    assert_failed(&cluster, "files", "/srv/app/libc.so.6, which is missing on b");
    // As after an upgrade of one host: another library of the same size.
    on_b("cp /usr/bin/env /srv/app/libc.so.6; truncate -r /srv/app/kept /srv/app/libc.so.6");
    on_b("chmod --reference=/srv/app/kept /srv/app/libc.so.6");
    assert_failed(&cluster, "files", "another build");
    on_b("cp -p /srv/app/kept /srv/app/libc.so.6; chmod 700 /srv/app/sleep");
    assert_failed(&cluster, "files", "has mode 755 here and 700 on b");
    on_b("chmod 755 /srv/app/sleep; umount /etc/passwd");
    let (code, report) = examine(&cluster, &["--workload", "app"]);
    assert_eq!(code, 0, "{report:#}");
    let warned = of_state(&report, "warn");
    let user = warned.iter().any(|(id, found)| id == "users" && found.contains("standin-app"));
    assert!(user, "{report:#}");
    on_b("mount -o remount,size=64k /dev/shm");
    assert_failed(&cluster, "memory", "no room");
}

#[test]
fn what_a_workload_has_with_it_is_not_asked_for_and_hosts_that_disagree_are_told() {
    let mut cluster = prepared("doctor-settings");
    cluster.protect_redis();
    let (code, report) = examine(&cluster, &["--workload", "redis"]);
    assert_eq!(code, 0, "{report:#}");
    assert!(of_state(&report, "ok").iter().any(|(id, found)| id == "address" && found.contains("eth0")));
    let (code, said) = cluster.refused(Host::B, &["doctor", "--peer", "a", "--workload", "redis"]);
    assert!(code == 4 && said.contains("ask on a"), "{said}");
    let (code, said) = cluster.refused(Host::A, &["doctor", "--peer", "c"]);
    assert!(code == 3 && said.contains("pair --list"), "{said}");
    let (code, said) = cluster.refused(Host::A, &["doctor", "--peer", "b", "--workload", "nothing"]);
    assert!(code == 3 && said.contains("nothing"), "{said}");

    cluster.standin(Host::A, &["unprotect", "redis"]);
    cluster.end_agent(Host::B, "TERM");
    cluster.start_agent_with(Host::B, &["--lease-ms", "900", "--on-standby-loss", "continue"]);
    assert_failed(&cluster, "lease", "900 ms");
    assert_failed(&cluster, "arbiter", "an operator on b");
    cluster.end_agent(Host::B, "TERM");
    let (code, said) = cluster.refused(Host::A, &["doctor", "--peer", "b"]);
    assert!(code == 5 && said.contains("is its agent running"), "{said}");
}

/// As a host has it on which Docker runs.
#[test]
fn rules_of_others_that_keep_clients_away_are_told_with_what_to_type() {
    let cluster = Cluster::up("doctor-firewall");
    cluster.protect_redis();
    let policy = || {
        let output = cluster.lab.on(Host::A, &[STANDIN, "doctor", "--json"]);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
        let checks = report["checks"].as_array().expect("checks").clone();
        checks.into_iter().find(|check| check["id"] == "forward-policy").expect("it is looked at")
    };
    let is_reached = || {
        let ping = || Redis::connect(Duration::from_secs(2)).and_then(|mut redis| redis.call(&["PING"]));
        inside(cluster.client_network(), ping).join().expect("the client lives").is_ok()
    };
    assert!(is_reached());
    assert_eq!(policy()["state"], "ok");
    cluster.lab.ok(Host::A, &["iptables", "-P", "FORWARD", "DROP"]);
    assert!(!is_reached());
    let told = policy();
    assert_eq!(told["state"], "warn");
    assert!(told["found"].as_str().unwrap().contains("FORWARD of table ip filter"), "{told}");
    let remedy = told["remedy"].as_str().unwrap();
    let commands = remedy.split('`').nth(1).expect("commands to type");
    cluster.lab.ok(Host::A, &["sh", "-c", commands]);
    assert!(is_reached(), "{commands}");
    assert_eq!(policy()["state"], "ok");
}
