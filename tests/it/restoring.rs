//! Whoever dies while the standby restores.

use std::{path::Path, time::Duration};

use super::{
    cluster::{Cluster, wait_for},
    containers::{Oci, REDIS, REDIS_PROGRAMS},
    lab::Host,
    paths::{digests, digests_in, rewrite_log},
    redis::VIP,
};

/// Has B take the redis over and kills one of those who work on that there, at an instant of the restore, which takes some
/// 10 ms: by the words of `pgrep`, so long after there is a pager.
fn kill_meanwhile(cluster: &mut Cluster, victim: &str, wait: &str) {
    kill_after(cluster, "[e]nter page", victim, wait);
}

/// The same, so long after there is a process of that command line.
fn kill_after(cluster: &mut Cluster, begun: &str, victim: &str, wait: &str) {
    cluster.wait_state(Host::A, "primary", "protected");
    std::thread::sleep(Duration::from_millis(500));
    let script = format!("until pgrep -f '{begun}'; do :; done; sleep {wait}; kill -KILL $(pgrep {victim})");
    let mut killer = cluster.lab.command(Host::B, &["sh", "-c", &script]).spawn().unwrap();
    cluster.lab.kill(Host::A);
    // A pager may have done its work before the signal comes.
    assert!(killer.wait().unwrap().success() || victim.contains("page"), "no {victim} was killed");
    if victim.contains("agent") {
        cluster.reap_agent(Host::B);
        cluster.start_agent(Host::B);
    }
}

fn wait_for_no_pager(cluster: &Cluster) {
    wait_for("nothing to be left of the restore", || {
        !cluster.lab.on(Host::B, &["pgrep", "-f", "[e]nter page"]).status.success()
    });
}

/// Who waits, who serves, both.
const PAGERS: [&str; 3] = ["-o -f '[e]nter page'", "-n -f '[e]nter page'", "-f '[e]nter page'"];
const AGENT: &str = "-o -f '[s]tandin agent'";

/// Whichever instant it is, the workload ends up running with all its memory.
#[test]
fn whatever_dies_on_the_standby_while_it_restores_the_workload_comes_whole() {
    let instants = [(1, "0"), (0, "0.002"), (1, "0.004"), (2, "0.006"), (1, "0.010")];
    let pagers = instants.map(|(who, wait)| (PAGERS[who], wait));
    for (victim, wait) in std::iter::once((AGENT, "0")).chain(pagers) {
        let mut cluster = Cluster::up("restore-kill");
        cluster.protect_redis();
        let digest = cluster.digest();
        kill_meanwhile(&mut cluster, victim, wait);
        // Perhaps it runs for a moment before its host knows that it must be restored again.
        wait_for("the redis to be whole", || {
            cluster.running_copies(Host::B) == 1 && cluster.digest() == digest
        });
        cluster.wait_state(Host::B, "primary", "alone");
        wait_for_no_pager(&cluster);
        assert_eq!(cluster.digest(), digest);
    }
}

/// A workload that has run on from an epoch has changed its files: it is never restored from that epoch again.
#[test]
fn whatever_dies_on_the_standby_while_it_restores_memory_and_files_are_of_one_instant() {
    let agents = ["0", "0.020", "0.050", "0.070", "0.090"].map(|wait| (AGENT, wait));
    let pagers = [(1, "0.020"), (1, "0.050"), (2, "0.060")].map(|(who, wait)| (PAGERS[who], wait));
    for (victim, wait) in agents.into_iter().chain(pagers) {
        let mut cluster = Cluster::up("restore-files");
        cluster.run_redis_with(&["--path", "/srv/redis"], &["--appendonly", "yes", "--dir", "/srv/redis"]);
        rewrite_log(&cluster, Host::A);
        cluster.protect();
        let counter = cluster.count();
        kill_meanwhile(&mut cluster, victim, wait);
        wait_for("an end", || {
            let status = cluster.status(Host::B, "redis");
            status["state"] == "stuck" || status["role"] == "primary" && status["state"] == "alone"
        });
        let stuck = cluster.status(Host::B, "redis")["state"] == "stuck";
        eprintln!("{victim} after {wait}: stuck {stuck}, {:?}", cluster.history(Host::B));
        if stuck {
            // With both gone the tree may have been let see zeros.
            assert_eq!(victim, PAGERS[2]);
            let error = cluster.status(Host::B, "redis")["error"].to_string();
            assert!(error.contains("as after a crash"), "{error}");
            assert_eq!(cluster.running_copies(Host::B), 0);
        } else {
            std::thread::sleep(Duration::from_millis(300));
            counter.stop();
            let (memory, files) = digests(&cluster, Host::B);
            assert_eq!(memory, files, "{victim} after {wait}");
        }
        wait_for_no_pager(&cluster);
    }
}

/// The same of a container that its runtime restores, which says only when it runs already.
#[test]
fn whatever_moment_the_agent_dies_in_a_whole_container_is_restored_once() {
    for wait in ["0", "0.050", "0.100", "0.150", "0.250"] {
        let mut oci = Oci::unprepared("runc", "redis", &REDIS_PROGRAMS, &REDIS);
        oci.start(true);
        oci.protect(&["--ip", &format!("{VIP}/24"), "--vip", &format!("{VIP}/24@eth0")]);
        assert_eq!(oci.cluster.ask_redis(&["DEBUG", "POPULATE", "20000", "key", "100"]), "OK");
        oci.cluster.ask_redis(&["BGREWRITEAOF"]);
        let counter = oci.cluster.count();
        kill_after(&mut oci.cluster, "[r]unc .*restore", AGENT, wait);
        wait_for("an end", || {
            let status = oci.cluster.status(Host::B, "redis");
            status["state"] == "stuck" || status["role"] == "primary" && status["state"] == "alone"
        });
        let stuck = oci.cluster.status(Host::B, "redis")["state"] == "stuck";
        eprintln!("after {wait}: stuck {stuck}, {:?}", oci.cluster.history(Host::B));
        if stuck {
            let error = oci.cluster.status(Host::B, "redis")["error"].to_string();
            assert!(error.contains("as after a crash"), "{error}");
            assert!(oci.state(Host::B).is_null());
            continue;
        }
        std::thread::sleep(Duration::from_millis(300));
        counter.stop();
        assert_eq!(oci.state(Host::B)["status"], "running");
        let find = ["find", "/var/lib/standin/workloads/redis", "-type", "d", "-name", "appendonlydir"];
        let found = oci.cluster.lab.ok(Host::B, &find);
        let dir = Path::new(found.trim()).parent().expect("one directory").display().to_string();
        let (memory, files) = digests_in(&oci.cluster, Host::B, &dir);
        assert_eq!(memory, files, "after {wait}");
    }
}
