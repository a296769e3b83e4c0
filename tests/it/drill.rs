//! Drills: what would be taken over is restored beside everything else, heard by nobody, and leaves nothing.

mod places;

use std::{
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    cluster::{Cluster, wait_for},
    lab::{Host, STANDIN, work_cgroup},
    paths::{digests, rewrite_log},
    redis::{VIP, rolled_back},
};

/// Exit codes, as `standin --help` lists them.
const FAILED: i32 = 1;
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const REFUSED: i32 = 4;

const REDIS_PROBE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/probe/redis");

impl Cluster {
    /// Holds a drill on B; its exit code and report.
    fn drill(&self, name: &str, args: &[&str]) -> (i32, Value) {
        let output = self.lab.on(Host::B, &[&[STANDIN, "drill", name, "--json"], args].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let report = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}{said}"));
        (output.status.code().unwrap_or(-1), report)
    }

    /// One that passes.
    fn drilled(&self, name: &str, args: &[&str]) -> Value {
        let (code, report) = self.drill(name, args);
        assert_eq!((code, &report["outcome"]), (0, &Value::from("passed")), "{report:#}");
        report
    }

    /// Begins one with a probe that does not end by itself, and waits until that runs.
    fn drill_in_background(&self, name: &str) -> Child {
        let command = [STANDIN, "drill", name, "--json", "--probe", "exec sleep 4321"];
        let child = self.lab.command(Host::B, &command).stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let child = child.expect("scripts/lab can be run");
        wait_for("the probe to run", || {
            self.lab.on(Host::B, &["pgrep", "-fx", "sleep 4321"]).status.success()
        });
        child
    }

    /// Whatever a drill of it could have left on B.
    fn left(&self, name: &str) -> String {
        let script = format!(
            "cd /; ls -d {} /var/lib/standin/drills/* /run/standin/drills/* /dev/shm/standin/store/drills/* 2>/dev/null; \
             for p in /proc/[0-9]*; do \
               grep -q 'drills/' $p/mountinfo 2>/dev/null && echo $p mounts; \
               grep -q '{name}[.]drill' $p/cgroup 2>/dev/null && echo $p $(cat $p/comm); \
               grep -qs '^ *nowhere:' $p/net/dev && echo $p network; \
             done; pgrep -fx 'sleep 4321'; :",
            work_cgroup(&format!("{name}.drill"))
        );
        self.lab.ok(Host::B, &["sh", "-c", &script])
    }

    fn assert_nothing_left(&self, name: &str) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let left = self.left(name);
            if left.trim().is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "a drill has left {left}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn held(&self, name: &str) -> u64 {
        self.status(Host::B, name)["epoch"]["epoch"].as_u64().expect("an epoch")
    }
}

#[test]
fn a_drill_finds_what_a_takeover_would_and_production_goes_on() {
    let cluster = Cluster::up("drill");
    cluster.protect_redis();
    cluster.wait_state(Host::B, "standby", "ready");
    let counter = cluster.count();
    // Which process it is.
    let run_id = || {
        let info = cluster.ask_redis(&["INFO", "server"]);
        info.lines().find(|line| line.starts_with("run_id:")).expect("a line").to_owned()
    };
    let redis = run_id();
    let before = cluster.held("redis");
    let probe = format!(
        "{REDIS_PROBE} 20000 && redis-cli -h $STANDIN_ADDRESS info server | grep run_id && \
         redis-cli -h $STANDIN_ADDRESS set drilled $STANDIN_EPOCH && sleep 1 && ip -o link && \
         ! ping -c 1 -W 1 10.77.0.1"
    );
    let report = cluster.drilled("redis", &["--probe", &probe, "--report", "/tmp/drill.html"]);
    eprintln!("{report:#}");

    let probe = &report["probe"];
    assert_eq!(probe["exit"], 0, "{report:#}");
    let output = probe["output"].as_str().expect("an output");
    assert!(output.contains("keys: 2000"), "{output}");
    assert!(output.contains(&redis), "{redis} is in {output}");
    let [rto, restore, detection] =
        ["rto_ms", "restore_ms", "detection_ms"].map(|key| report[key].as_f64().expect("a time"));
    assert!(detection >= 300.0 && restore > 0.0 && (rto - detection - restore).abs() < 0.001, "{report:#}");
    assert!(report["rpo_ms"].as_u64().is_some_and(|ms| ms < 5000), "{report:#}");
    // The probe alone takes longer than several epochs.
    assert!(report["epochs_committed"].as_u64() >= Some(4), "{report:#}");
    assert!(report["lost"]["next_epoch"].is_object() || report["lost"]["next_epoch"].is_null(), "{report:#}");
    let page = cluster.lab.ok(Host::B, &["cat", "/tmp/drill.html"]);
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("passed") && page.ends_with("</html>\n"));

    cluster.assert_nothing_left("redis");
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.wait_state(Host::B, "standby", "ready");
    assert!(cluster.held("redis") > before);
    assert_eq!(cluster.ask_redis(&["EXISTS", "drilled"]), "0");
    let last = cluster.status(Host::B, "redis")["last_drill"].clone();
    assert_eq!((&last["outcome"], &last["probe_exit"]), (&"passed".into(), &0.into()), "{last:#}");
    assert!(cluster.standin(Host::B, &["status", "redis"]).contains("  drill     "));
    assert!(cluster.history(Host::B).contains(&"drill-passed".to_owned()));
    let acks = counter.stop();
    assert_eq!(rolled_back(&acks), 0);
    let gap = acks.windows(2).map(|pair| pair[1].received - pair[0].received).max().expect("increments");
    eprintln!("the client waited {gap:?} at most; {} increments", acks.len());
    assert!(gap < Duration::from_secs(1), "the client waited {gap:?}");

    // A takeover is what it was.
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.ask_redis(&["EXISTS", "drilled"]), "0");
    assert_eq!(run_id(), redis);
    cluster.assert_first_try(Host::B);
}

#[test]
fn a_drill_has_files_of_its_own() {
    let cluster = Cluster::up("drill-files");
    cluster.run_redis_with(&["--path", "/srv/redis"], &["--appendonly", "yes", "--dir", "/srv/redis"]);
    rewrite_log(&cluster, Host::A);
    cluster.protect();
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.wait_state(Host::B, "standby", "ready");
    let sums = || {
        let script = "cd /var/lib/standin/workloads/redis/paths && find . -type f | sort | xargs md5sum";
        cluster.lab.ok(Host::B, &["sh", "-c", script])
    };
    // Idle, so that its files stay as they are.
    std::thread::sleep(Duration::from_millis(500));
    let before = sums();
    let probe = "set -e; cli='redis-cli -h '$STANDIN_ADDRESS; $cli set drilled yes; $cli debug digest; \
                 grep -l drilled /srv/redis/appendonlydir/*; touch /srv/redis/probed; $cli bgrewriteaof; sleep 0.5";
    let report = cluster.drilled("redis", &["--probe", probe]);
    assert_eq!(sums(), before, "{report:#}");
    cluster.assert_nothing_left("redis");

    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.ask_redis(&["EXISTS", "drilled"]), "0");
    let (memory, files) = digests(&cluster, Host::B);
    assert_eq!(memory, files);
    assert!(report["probe"]["output"].as_str().is_some_and(|output| !output.contains(&memory)), "{report:#}");
}

#[test]
fn a_drill_whose_probe_fails_or_hangs_has_failed() {
    let mut cluster = Cluster::up("drill-fails");
    cluster.protect_redis();
    cluster.wait_state(Host::B, "standby", "ready");

    let (code, report) = cluster.drill("redis", &["--probe", "echo so it is; echo and so >&2; exit 3"]);
    assert_eq!((code, &report["outcome"], &report["probe"]["exit"]), (FAILED, &"failed".into(), &3.into()));
    assert_eq!(report["probe"]["output"], "so it is\nand so\n", "{report:#}");
    assert!(report["reason"].as_str().is_some_and(|reason| reason.contains("exit status 3")), "{report:#}");
    assert!(report["rto_ms"].is_f64(), "it was restored all the same: {report:#}");
    assert_eq!(cluster.status(Host::B, "redis")["last_drill"]["probe_exit"], 3);
    cluster.assert_nothing_left("redis");

    let began = Instant::now();
    let (code, report) =
        cluster.drill("redis", &["--timeout", "1s", "--probe", "sleep 4321 & yes | head -c 1000000; wait"]);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(
        (code, &report["probe"]["timed_out"], &report["probe"]["cut"]),
        (FAILED, &true.into(), &true.into())
    );
    assert_eq!(report["probe"]["exit"], Value::Null, "{report:#}");
    cluster.assert_nothing_left("redis");

    // It can be kept, until its end, or the agent's.
    cluster.drilled("redis", &["--keep"]);
    let (code, text) = cluster.refused(Host::B, &["drill", "redis"]);
    assert!(code == REFUSED && text.contains("standin drill redis --end"), "{text}");
    assert!(!cluster.left("redis").is_empty());
    cluster.standin(Host::B, &["drill", "redis", "--end"]);
    cluster.assert_nothing_left("redis");
    assert_eq!(cluster.status(Host::B, "redis")["last_drill"]["kept"], false);
    cluster.drilled("redis", &["--keep"]);
    cluster.end_agent(Host::B, "TERM");
    cluster.assert_nothing_left("redis");
}

#[test]
fn a_drill_that_is_cut_off_leaves_nothing() {
    let mut cluster = Cluster::up("drill-cut-off");
    cluster.protect_redis();
    cluster.wait_state(Host::B, "standby", "ready");

    // The operator's ^C.
    let mut drill = cluster.drill_in_background("redis");
    let (code, text) = cluster.refused(Host::B, &["drill", "redis"]);
    assert!(code == REFUSED && text.contains("under way"), "{text}");
    cluster.lab.ok(Host::B, &["pkill", "-INT", "-f", "standin drill redis"]);
    drill.wait().expect("it ends");
    cluster.assert_nothing_left("redis");
    wait_for("the drill to be remembered", || {
        cluster.status(Host::B, "redis")["last_drill"]["outcome"] == "interrupted"
    });

    // The agent's end without a word.
    let mut drill = cluster.drill_in_background("redis");
    cluster.end_agent(Host::B, "KILL");
    drill.wait().expect("it ends");
    cluster.start_agent(Host::B);
    cluster.assert_nothing_left("redis");
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.wait_state(Host::B, "standby", "ready");
    cluster.drilled("redis", &[]);

    // The host's.
    let mut drill = cluster.drill_in_background("redis");
    cluster.lab.kill(Host::B);
    drill.wait().expect("it ends");
    cluster.lab.boot(Host::B);
    cluster.start_agent(Host::B);
    cluster.assert_nothing_left("redis");
    cluster.wait_state(Host::B, "standby", "ready");
    assert_eq!(cluster.running_copies(Host::A), 1);
}

#[test]
fn a_takeover_waits_for_no_drill() {
    let cluster = Cluster::up("drill-takeover");
    cluster.protect_redis();
    cluster.wait_state(Host::B, "standby", "ready");
    let digest = cluster.ask_redis(&["DEBUG", "DIGEST"]);
    let drill = cluster.drill_in_background("redis");
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    let history = cluster.json(Host::B, &["history", "redis"]);
    let events = history["events"].as_array().expect("events");
    let promoted = events.iter().find(|event| event["kind"] == "promoted").expect("it was promoted");
    eprintln!("{promoted:#}");
    assert!(promoted["phases_ms"]["restore"].as_f64().is_some_and(|ms| ms < 2000.0), "{promoted:#}");
    assert_eq!(cluster.digest(), digest);

    let output = drill.wait_with_output().expect("it ends");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert_eq!(
        (output.status.code(), &report["outcome"]),
        (Some(FAILED), &"interrupted".into()),
        "{report:#}"
    );
    assert!(report["reason"].as_str().is_some_and(|reason| reason.contains("taken over")), "{report:#}");
    assert_eq!(report["probe"], Value::Null, "{report:#}");
    cluster.assert_nothing_left("redis");
    cluster.assert_first_try(Host::B);
    // The image goes when nobody reads it any more.
    wait_for("the image to be removed", || {
        !cluster.lab.on(Host::B, &["test", "-e", "/dev/shm/standin/store/images/redis"]).status.success()
    });
    assert_eq!(cluster.running_copies(Host::B), 1);
}

#[test]
fn a_drill_that_cannot_be_held_is_refused_with_the_reason() {
    let cluster = Cluster::up("drill-refused");
    let refused = |host: Host, args: &[&str], code: i32, words: &[&str]| {
        let (was, text) = cluster.refused(host, &[&["drill"], args].concat());
        assert_eq!(was, code, "{args:?}: {text}");
        for word in words {
            assert!(text.contains(word), "{args:?} should speak of {word:?}: {text}");
        }
    };
    refused(Host::B, &["nobody"], NOT_FOUND, &["no workload named nobody"]);
    cluster.standin(Host::A, &["run", "sleeper", "--", "sleep", "1000"]);
    refused(Host::A, &["sleeper"], REFUSED, &["not protected", "standin protect sleeper"]);
    cluster.standin(Host::A, &["protect", "sleeper", "--to", "b", "--every", "100ms"]);
    cluster.wait_state_of("sleeper", Host::B, "standby", "ready");
    refused(Host::A, &["sleeper"], REFUSED, &["type `standin drill sleeper` on b"]);
    refused(Host::B, &["sleeper", "--end"], REFUSED, &["no drill of sleeper"]);
    refused(Host::B, &["sleeper", "--report", "/tmp/report.pdf"], USAGE, &[".html, .json or .txt"]);
    refused(Host::B, &["sleeper", "--report", "/no/such/report.html"], USAGE, &["no directory /no/such"]);
    refused(Host::B, &["sleeper", "--epoch", "1"], USAGE, &["latest"]);
    cluster.drilled("sleeper", &["--probe", "pgrep -x sleep"]);
}

#[test]
fn drills_are_held_when_they_are_due() {
    let cluster = Cluster::with(
        "drill-due",
        &["--drill-every", "10s", "--drill-probe", "test $STANDIN_WORKLOAD = redis"],
    );
    cluster.protect_redis();
    let last = || cluster.status(Host::B, "redis")["last_drill"].clone();
    wait_for("the first drill", || last().is_object());
    let first = last();
    assert_eq!((&first["outcome"], &first["probe_exit"]), (&"passed".into(), &0.into()), "{first:#}");
    wait_for("the next drill", || last()["at_unix_ms"] != first["at_unix_ms"]);
    let next = last();
    let between =
        next["at_unix_ms"].as_u64().zip(first["at_unix_ms"].as_u64()).map(|(next, first)| next - first);
    assert!(between.is_some_and(|ms| (10_000..15_000).contains(&ms)), "{next:#}");
    assert_eq!(next["outcome"], "passed", "{next:#}");
    cluster.assert_nothing_left("redis");
    assert_eq!(cluster.status(Host::A, "redis")["last_drill"], Value::Null, "the primary holds none");
}

/// Its pages come while epochs are committed that wait for its view.
#[test]
fn a_drill_of_much_memory_does_not_hold_epochs_up() {
    let cluster = Cluster::up("drill-large");
    cluster.run_redis();
    cluster.lab.ok(Host::A, &["redis-cli", "-h", VIP, "debug", "populate", "300000", "large", "1024"]);
    cluster.standin(Host::A, &["protect", "redis", "--to", "b", "--every", "20ms"]);
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.wait_state(Host::B, "standby", "ready");
    let counter = cluster.count();
    for _ in 0..3 {
        let report = cluster.drilled("redis", &["--probe", "redis-cli -h $STANDIN_ADDRESS debug digest"]);
        let memory = report["memory_bytes"].as_u64().expect("a size");
        assert!(memory > 300 << 20, "{memory}");
        assert!(report["epochs_committed"].as_u64() >= Some(2), "{report:#}");
        eprintln!("{} epochs, {}", report["epochs_committed"], report["phases_ms"]);
    }
    cluster.wait_state(Host::A, "primary", "protected");
    assert_eq!(rolled_back(&counter.stop()), 0);
    let history = cluster.history(Host::A);
    assert!(!history.contains(&"epoch-failed".to_owned()), "{history:?}");
    cluster.assert_nothing_left("redis");
}
