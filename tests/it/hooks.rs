//! The operator's commands for a change of roles.

use super::{
    cluster::{Cluster, wait_for},
    lab::Host,
};

const HOOK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/hook.sh");

fn hooked(hint: &str, more: &[&'static str]) -> Cluster {
    Cluster::with(hint, &[&["--on-promote", HOOK, "--on-demote", HOOK][..], more].concat())
}

/// What was noted at a host, a line a hook.
fn noted(cluster: &Cluster, host: Host) -> Vec<String> {
    let output = cluster.lab.on(host, &["cat", "/srv/hooks"]);
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

#[track_caller]
fn await_noted(cluster: &Cluster, host: Host, lines: usize) -> Vec<String> {
    wait_for("hooks", || noted(cluster, host).len() >= lines);
    let noted = noted(cluster, host);
    assert_eq!(noted.len(), lines, "{noted:?}");
    noted
}

fn has(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "{part} in {line:?}");
    }
}

fn processes(cluster: &Cluster, host: Host, command: &str) -> usize {
    let found = cluster.lab.on(host, &["pgrep", "-c", "-f", "-x", command]);
    String::from_utf8_lossy(&found.stdout).trim().parse().unwrap()
}

fn does(cluster: &Cluster, host: Host, what: &str) {
    cluster.lab.ok(host, &["sh", "-c", &format!("echo {what} > /srv/hook-does")]);
}

#[test]
fn hooks_follow_the_workload_through_a_handoff_a_takeover_and_its_end() {
    let mut cluster = hooked("hooks", &[]);
    cluster.protect_redis();
    let at_a = await_noted(&cluster, Host::A, 1);
    has(
        &at_a[0],
        &["promote redis promote redis term=1 role=primary cause=protected", "@eth0 peer=b host=a"],
    );
    cluster.standin(Host::A, &["handoff", "redis"]);
    has(&await_noted(&cluster, Host::A, 2)[1], &["demote redis", "role=standby cause=handed-off"]);
    has(&await_noted(&cluster, Host::B, 1)[0], &["promote redis", "term=2 role=primary cause=handoff"]);
    cluster.wait_state(Host::A, "standby", "ready");
    cluster.wait_state(Host::B, "primary", "protected");
    let status = cluster.status(Host::B, "redis");
    wait_for("the hook's end", || cluster.status(Host::B, "redis")["hook"]["state"] == "done");
    assert_eq!(status["hook"]["event"], "promote");
    assert!(cluster.standin(Host::B, &["status", "redis"]).contains("on_promote (term 2, handoff) done"));
    let history = cluster.standin(Host::B, &["history", "redis"]);
    assert!(
        history.contains("hook-done: on_promote (handoff), try 1: moved 10.77.0.100/24@eth0"),
        "{history}"
    );

    // The agent is started again: nothing has changed.
    cluster.end_agent(Host::A, "TERM");
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "standby", "ready");
    cluster.wait_state(Host::B, "primary", "protected");
    cluster.end_agent(Host::B, "TERM");
    cluster.start_agent(Host::B);
    cluster.wait_state(Host::B, "primary", "protected");
    cluster.wait_state(Host::A, "standby", "ready");
    cluster.lab.kill(Host::B);
    has(&await_noted(&cluster, Host::A, 3)[2], &["promote redis", "term=3 role=primary cause=takeover"]);
    // What was promoted when its power was cut is told when it is back.
    cluster.lab.boot(Host::B);
    cluster.start_agent(Host::B);
    cluster.wait_state(Host::B, "standby", "ready");
    has(&await_noted(&cluster, Host::B, 2)[1], &["demote redis", "term="]);
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.standin(Host::A, &["unprotect", "redis"]);
    has(
        &await_noted(&cluster, Host::A, 4)[3],
        &["demote redis", "term=3 role=unprotected cause=unprotected"],
    );
}

#[test]
fn a_hook_that_fails_holds_up_nothing_and_is_tried_again_until_it_is_done() {
    let cluster = hooked("hook-fails", &[]);
    cluster.protect_redis();
    does(&cluster, Host::B, "fail");
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.ask_redis(&["ping"]).trim_start_matches('+'), "PONG");
    wait_for("a second try", || noted(&cluster, Host::B).len() >= 2);
    let status = cluster.status(Host::B, "redis");
    assert_eq!(status["hook"]["state"], "retrying", "{status:#}");
    assert!(status["hook"]["error"].as_str().unwrap().contains("no route to the cloud"), "{status:#}");
    let failures = || cluster.history(Host::B).iter().filter(|kind| *kind == "hook-failed").count();
    assert_eq!(failures(), 1);
    does(&cluster, Host::B, "well");
    wait_for("it to be done", || cluster.status(Host::B, "redis")["hook"]["state"] == "done");
    has(noted(&cluster, Host::B).last().unwrap(), &["promote redis", "cause=takeover"]);
    assert_eq!(failures(), 1);
}

#[test]
fn a_hook_that_hangs_holds_up_nothing_and_is_ended_with_what_it_started() {
    let mut cluster = hooked("hook-hangs", &["--hook-timeout-ms", "60000", "--hook-failure", "ignore"]);
    does(&cluster, Host::A, "hang");
    cluster.protect_redis();
    wait_for("the hook", || processes(&cluster, Host::A, "sleep 4711") == 2);
    assert_eq!(cluster.status(Host::A, "redis")["hook"]["state"], "running");
    // A new role: the old one's hook is not wanted any more, and the new one's comes.
    does(&cluster, Host::A, "well");
    cluster.standin(Host::A, &["handoff", "redis"]);
    has(&await_noted(&cluster, Host::A, 2)[1], &["demote redis", "cause=handed-off"]);
    assert_eq!(processes(&cluster, Host::A, "sleep 4711"), 0);
    assert!(cluster.history(Host::A).contains(&"hook-cut-off".to_owned()));
    cluster.wait_state(Host::A, "standby", "ready");
    cluster.wait_state(Host::B, "primary", "protected");

    // One that the end of the agent interrupts is run again by the next one.
    does(&cluster, Host::B, "hang");
    cluster.standin(Host::B, &["handoff", "redis"]);
    wait_for("the hook", || processes(&cluster, Host::B, "sleep 4711") == 2);
    cluster.end_agent(Host::B, "TERM");
    wait_for("its end", || processes(&cluster, Host::B, "sleep 4711") == 0);
    does(&cluster, Host::B, "well");
    cluster.start_agent(Host::B);
    let noted = await_noted(&cluster, Host::B, 3);
    has(&noted[2], &["demote redis", "cause=restarted"]);
}

#[test]
fn a_hook_is_ended_when_its_time_is_over() {
    let cluster = hooked("hook-late", &["--hook-timeout-ms", "300", "--hook-failure", "ignore"]);
    does(&cluster, Host::A, "hang");
    cluster.protect_redis();
    wait_for("it to be given up", || cluster.status(Host::A, "redis")["hook"]["state"] == "failed");
    let status = cluster.status(Host::A, "redis");
    assert!(status["hook"]["error"].as_str().unwrap().contains("300 ms"), "{status:#}");
    assert_eq!(processes(&cluster, Host::A, "sleep 4711"), 0);
    std::thread::sleep(std::time::Duration::from_millis(1200));
    assert_eq!(noted(&cluster, Host::A), ["promote hangs"]);
    assert_eq!(cluster.status(Host::A, "redis")["state"], "protected");
}
