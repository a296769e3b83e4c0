//! Whoever dies while the standby restores.

use std::time::Duration;

use super::{
    cluster::{Cluster, wait_for},
    lab::Host,
    paths::{digests, rewrite_log},
};

/// Has B take the redis over and kills one of those who work on that there, at an instant of the restore, which takes some
/// 10 ms: by the words of `pgrep`, so long after there is a pager.
fn kill_meanwhile(cluster: &mut Cluster, victim: &str, wait: &str) {
    cluster.wait_state(Host::A, "primary", "protected");
    std::thread::sleep(Duration::from_millis(500));
    let script =
        format!("until pgrep -f '[e]nter page'; do :; done; sleep {wait}; kill -KILL $(pgrep {victim})");
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
