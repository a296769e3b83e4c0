//! Programs that find out by themselves whether all is as they left it, and say so in their output ("ok N"), through
//! takeovers to and fro.

use std::time::Duration;

use super::{
    cluster::{Cluster, wait_for},
    lab::Host,
};

/// How often a program has found all right, by its output on a host.
fn checks(cluster: &Cluster, name: &str, host: Host) -> u64 {
    let log = cluster.lab.on(host, &["cat", &format!("/var/lib/standin/workloads/{name}/output.log")]);
    let log = String::from_utf8_lossy(&log.stdout).into_owned();
    let wrong: Vec<&str> = log.lines().filter(|line| !line.starts_with("ok ")).collect();
    assert!(wrong.is_empty(), "on {host}: {wrong:#?}");
    let last = log.lines().next_back().and_then(|line| line.strip_prefix("ok "));
    last.map_or(0, |count| count.parse().expect("a number"))
}

fn wait_checks(cluster: &Cluster, name: &str, host: Host, more: u64) {
    let wanted = checks(cluster, name, host) + more;
    wait_for("the program to check", || checks(cluster, name, host) >= wanted);
}

/// Runs it in a sandbox, `args` being those of `run` behind the name, and takes it over again and again.
pub(crate) fn survives(name: &str, args: &[&str]) {
    let mut cluster = Cluster::up(name);
    let run: Vec<&str> = ["run", name].into_iter().chain(args.iter().copied()).collect();
    cluster.standin(Host::A, &run);
    wait_checks(&cluster, name, Host::A, 1);
    cluster.standin(Host::A, &["protect", name, "--to", "b", "--every", "50ms"]);
    let mut at = (Host::A, Host::B);
    for round in 0..4_u64 {
        let (primary, standby) = at;
        cluster.wait_state_of(name, primary, "primary", "protected");
        cluster.wait_state_of(name, standby, "standby", "ready");
        wait_checks(&cluster, name, primary, 3);
        std::thread::sleep(Duration::from_millis(113 * round));
        if round % 2 == 0 {
            cluster.lab.kill(primary);
            cluster.wait_state_of(name, standby, "primary", "alone");
            wait_checks(&cluster, name, standby, 3);
            cluster.lab.boot(primary);
            cluster.start_agent(primary);
        } else {
            cluster.json(primary, &["handoff", name, "--max-downtime", "2s"]);
            wait_checks(&cluster, name, standby, 3);
        }
        at = (standby, primary);
    }
}

/// Shared memory, semaphores and message queues, of System V and of POSIX.
#[test]
fn what_processes_share_is_so_after_every_takeover() {
    survives("sharing", &["--", "/usr/bin/python3", "-c", include_str!("sharing.py")]);
}
