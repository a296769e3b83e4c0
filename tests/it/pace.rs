//! The pace of epochs, and what becomes of it and of a handoff when the workload writes faster than the link can send.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{
    cluster::{Cluster, wait_for},
    lab::{Host, work_cgroup},
};

/// A lease that outlives a link whose queue is full.
const LEASE: [&str; 2] = ["--lease-ms", "2000"];
/// Memory of the writer.
const WRITER_MB: u64 = 24;

/// Writes hardly anything until SIGUSR2, and again after SIGUSR1. In between, pages of its memory one after the other,
/// none of them with what it held before.
fn writer() -> String {
    format!(
        "my $fast = 0; $SIG{{USR1}} = sub {{ $fast = 0 }}; $SIG{{USR2}} = sub {{ $fast = 1 }}; \
         open my $file, '<', '/dev/urandom' or die; read $file, my $random, 1 << 21; close $file; \
         my $size = {WRITER_MB} << 20; my $memory = $random x ($size >> 21); my $at = 0; \
         while (1) {{ \
             substr $memory, $at, 4096, substr $random, int rand((1 << 21) - 4096), 4096; \
             $at = ($at + 4096) % ($size - 4096); \
             if ($fast) {{ my $n = 0; $n += $_ for 1 .. 800 }} else {{ select undef, undef, undef, 0.02 }} \
         }}"
    )
}

/// A protected writer on A, which has been told how to behave.
struct Writer {
    cluster: Cluster,
    pid: String,
}

impl Writer {
    fn start(hint: &str, pace: &[&str]) -> Self {
        let cluster = Cluster::with(hint, &LEASE);
        let reply = cluster.standin(Host::A, &["run", "writer", "--json", "--", "perl", "-e", &writer()]);
        let reply: Value = serde_json::from_str(&reply).expect("JSON");
        let writer = Self { cluster, pid: reply["pid"].to_string() };
        let mut args = vec!["protect", "writer", "--to", "b"];
        args.extend(pace);
        writer.cluster.standin(Host::A, &args);
        writer.cluster.wait_state_of("writer", Host::A, "primary", "protected");
        writer
    }

    fn signal(&self, signal: &str) {
        self.cluster.lab.ok(Host::A, &["kill", &format!("-{signal}"), &self.pid]);
    }

    fn slow_link(&self, mbit: u32) {
        let tbf = format!("tc qdisc replace dev eth0 root tbf rate {mbit}mbit burst 128kb latency 20ms");
        self.cluster.lab.ok(Host::A, &tbf.split(' ').collect::<Vec<_>>());
    }

    fn status(&self) -> Value {
        self.cluster.status(Host::A, "writer")
    }

    fn lag_ms(&self) -> u64 {
        self.status()["lag_ms"].as_u64().expect("a lag")
    }

    fn stretched_by(&self) -> String {
        self.status()["pace"]["stretched_by"].as_str().expect("a cause").to_owned()
    }

    /// Resident memory of a host's agent.
    fn agent_kib(&self, host: Host) -> u64 {
        let pid = self.cluster.agent_pid(host);
        self.cluster.lab.ok(host, &["ps", "-o", "rss=", "-p", &pid]).trim().parse().expect("a number")
    }

    /// Most that the two agents hold for a while, looked at now and then.
    fn agents_peak_kib(&self, time: Duration) -> [u64; 2] {
        let (until, mut peak) = (Instant::now() + time, [0; 2]);
        while Instant::now() < until {
            for (peak, host) in peak.iter_mut().zip([Host::A, Host::B]) {
                *peak = self.agent_kib(host).max(*peak);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        peak
    }

    fn is_frozen(&self) -> bool {
        let script = format!("grep -q 'frozen 1' {}/cgroup.events", work_cgroup("writer"));
        self.cluster.lab.on(Host::A, &["sh", "-c", &script]).status.success()
    }
}

#[test]
fn a_writer_faster_than_the_link_costs_lag_and_not_memory() {
    let writer = Writer::start("faster", &["--every", "100ms"]);
    assert_eq!(writer.stretched_by(), "none");
    let before = writer.agents_peak_kib(Duration::from_millis(500));
    writer.slow_link(80);
    writer.signal("USR2");
    wait_for("the link to be named", || writer.stretched_by() == "link");
    wait_for("the lag to grow", || writer.lag_ms() > 1000);
    let early = writer.agents_peak_kib(Duration::from_secs(4));
    let late = writer.agents_peak_kib(Duration::from_secs(4));
    let loaded = writer.status();
    assert!(loaded["pace"]["interval_ms"].as_f64() > Some(300.0), "{loaded:#}");
    assert_eq!(loaded["state"], "protected", "{loaded:#}");
    for ((before, early), late) in before.into_iter().zip(early).zip(late) {
        println!(
            "an agent holds {before} KiB, and {early} KiB, then {late} KiB at most while the link is full"
        );
        // It does not pile up; and it is no more than what is frozen, what waits to be sent, and what QUIC sends again.
        assert!(late <= early + early / 4 + (WRITER_MB << 10), "it grows: {early} KiB, then {late} KiB");
        assert!(late <= before + 2 * (WRITER_MB << 10) + (96 << 10), "{late} KiB, {before} KiB without load");
    }

    // The workload has had at least three quarters of its time, also meanwhile.
    let history = writer.cluster.json(Host::A, &["history", "writer"]);
    let epochs = history["epochs"].as_array().expect("epochs");
    let of = |epoch: &Value, key: &str| epoch[key].as_u64().expect("a figure");
    let frozen_at_ms = |epoch: Option<&Value>| of(epoch.expect("an epoch"), "frozen_at_unix_ms");
    let before_last = &epochs[..epochs.len() - 1];
    let frozen_ms = before_last.iter().map(|epoch| of(epoch, "frozen_us")).sum::<u64>() / 1000;
    let all_ms = frozen_at_ms(epochs.last()) - frozen_at_ms(epochs.first());
    assert!(frozen_ms * 4 <= all_ms + 100, "frozen for {frozen_ms} ms of {all_ms} ms");
    let told =
        |kind: &str| history["events"].as_array().is_some_and(|all| all.iter().any(|e| e["kind"] == kind));
    assert!(told("pace-stretched"), "{history:#}");

    writer.signal("USR1");
    wait_for("the lag to be as before", || writer.stretched_by() == "none" && writer.lag_ms() < 400);
    writer.cluster.lab.kill(Host::A);
    writer.cluster.wait_state_of("writer", Host::B, "primary", "alone");
}

#[test]
fn a_handoff_over_a_slow_link_is_refused_or_slows_the_workload_down_as_allowed() {
    let writer = Writer::start("converges", &["--continuous"]);
    writer.slow_link(160);
    writer.signal("USR2");
    let handoff = ["handoff", "writer", "--max-downtime", "600ms"];
    let (code, text) = writer.cluster.refused(Host::A, &handoff);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("does not converge") && text.contains("--throttle"), "{text}");
    assert!((0..20).all(|_| !writer.is_frozen()), "it was slowed down without leave");
    writer.cluster.wait_state_of("writer", Host::A, "primary", "protected");

    let mut allowed = handoff.to_vec();
    allowed.push("--throttle");
    let report = writer.cluster.json(Host::A, &allowed);
    assert!(report["run_percent"].as_u64() < Some(100), "{report:#}");
    writer.cluster.wait_state_of("writer", Host::B, "primary", "protected");
}

#[test]
fn epochs_come_at_the_pace_that_was_asked_for() {
    let writer = Writer::start("paces", &["--lag", "400ms", "--max-frozen", "20"]);
    let status = writer.status();
    assert_eq!(status["pace"]["mode"]["lag-ms"], 400, "{status:#}");
    assert_eq!(status["pace"]["frozen_percent_max"], 20, "{status:#}");
    let intervals = |writer: &Writer| writer.status()["pace"]["interval_ms"].as_f64();
    // As few as the lag allows: at least one more than an interval of half of it would be.
    wait_for("the lag to be used", || intervals(&writer) > Some(200.0));
    wait_for("the lag to be kept", || writer.lag_ms() <= 400);
    writer.cluster.standin(Host::A, &["unprotect", "writer"]);
    writer.cluster.standin(Host::A, &["protect", "writer", "--to", "b", "--continuous"]);
    wait_for("many epochs", || writer.status()["epoch"]["epoch"].as_u64() > Some(20));
    assert_eq!(writer.status()["pace"]["mode"], "continuous");
    for (flags, words) in [
        (&["--every", "1ms"][..], "--every"),
        (&["--lag", "2h"], "--lag"),
        (&["--max-frozen", "0"], "--max-frozen"),
        (&["--lag", "1s", "--continuous"], "cannot be used with"),
    ] {
        let mut args = vec!["protect", "writer", "--to", "b"];
        args.extend(flags);
        let (code, text) = writer.cluster.refused(Host::A, &args);
        assert!(code == 2 && text.contains(words) || code == 4, "{args:?}: {code} {text}");
    }
}
