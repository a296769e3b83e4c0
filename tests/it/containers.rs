//! Containers of OCI runtimes, protected from inside: their runtime knows them after every takeover, with their files.

use std::time::Duration;

use super::{
    cluster::{Cluster, wait_for},
    lab::Host,
    redis::{VIP, longest_gap, rolled_back},
};

pub(crate) const ROOTFS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/rootfs");

/// Changes the runtime's example of a config: no terminal, a root to write to, a command, a directory of the host.
pub(crate) const CONFIGURE: &str = r#"
import json, sys
bundle, command = sys.argv[1], sys.argv[2:]
config = json.load(open(bundle + "/config.json"))
config["process"].update(terminal=False, args=command)
config["root"]["readonly"] = False
config["hostname"] = "inside"
config["linux"].pop("resources", None)
config["mounts"].append({"destination": "/data", "type": "bind", "source": bundle + "/data", "options": ["rbind", "rw"]})
json.dump(config, open(bundle + "/config.json", "w"))
"#;

/// A cluster with a container on A, not yet started.
pub(crate) struct Oci {
    pub(crate) cluster: Cluster,
    pub(crate) runtime: &'static str,
    pub(crate) name: &'static str,
}

impl Oci {
    /// A wrapped one.
    fn prepare(runtime: &'static str, name: &'static str, programs: &[&str], command: &[&str]) -> Self {
        Self::prepare_in(Cluster::up(&format!("{runtime}-{name}")), runtime, name, programs, command)
    }

    /// The same in a cluster that is there.
    pub(crate) fn prepare_in(
        cluster: Cluster,
        runtime: &'static str,
        name: &'static str,
        programs: &[&str],
        command: &[&str],
    ) -> Self {
        let oci = Self::unprepared_in(cluster, runtime, name, programs, command);
        oci.cluster.standin(Host::A, &["wrap", name, "--bundle", &format!("/srv/{name}")]);
        oci
    }

    /// One of which standin knows nothing.
    pub(crate) fn unprepared(
        runtime: &'static str,
        name: &'static str,
        programs: &[&str],
        command: &[&str],
    ) -> Self {
        Self::unprepared_in(Cluster::up(&format!("{runtime}-{name}")), runtime, name, programs, command)
    }

    /// The same in a cluster that is there.
    pub(crate) fn unprepared_in(
        cluster: Cluster,
        runtime: &'static str,
        name: &'static str,
        programs: &[&str],
        command: &[&str],
    ) -> Self {
        let bundle = format!("/srv/{name}");
        let root = format!("{bundle}/rootfs");
        cluster.lab.ok(Host::A, &["mkdir", "-p", &format!("{bundle}/data")]);
        cluster.lab.ok(Host::A, &[&[ROOTFS, &root], programs].concat());
        cluster.lab.ok(Host::A, &["sh", "-c", &format!("cd {bundle} && {runtime} spec")]);
        cluster.lab.ok(Host::A, &[&["python3", "-c", CONFIGURE, &bundle], command].concat());
        Self { cluster, runtime, name }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Its output goes to a pipe, whose reader outlives the command, or to a file of the host.
    pub(crate) fn start(&self, piped: bool) {
        let (runtime, name) = (self.runtime, self.name);
        let log = format!("/srv/{name}.log");
        let output = if piped { format!(">(exec setsid cat > {log} 2>&1)") } else { log };
        let script = format!("{runtime} run -d --bundle /srv/{name} {name} < /dev/null > {output} 2>&1");
        self.cluster.lab.ok(Host::A, &["bash", "-c", &script]);
    }

    pub(crate) fn protect(&self, more: &[&str]) {
        let args = ["protect", self.name, "--oci", self.name, "--to", "b", "--every", "100ms"];
        self.cluster.standin(Host::A, &[&args, more].concat());
        self.cluster.wait_state_of(self.name, Host::A, "primary", "protected");
    }

    /// What the runtime says of it.
    pub(crate) fn state(&self, host: Host) -> serde_json::Value {
        let output = self.cluster.lab.on(host, &[self.runtime, "state", self.name]);
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    pub(crate) fn inside(&self, host: Host, command: &[&str]) -> String {
        self.cluster.lab.ok(host, &[&[self.runtime, "exec", self.name], command].concat()).trim().to_owned()
    }

    /// What it has written to its output on a host.
    pub(crate) fn log(&self, host: Host, first: bool) -> String {
        let path = if first {
            format!("/srv/{}.log", self.name)
        } else {
            format!("/var/lib/standin/workloads/{}/output.log", self.name)
        };
        self.cluster.lab.ok(host, &["cat", &path])
    }
}

pub(super) const REDIS: [&str; 11] = [
    "redis-server",
    "--save",
    "",
    "--protected-mode",
    "no",
    "--enable-debug-command",
    "yes",
    "--dir",
    "/data",
    "--appendonly",
    "yes",
];
pub(super) const REDIS_PROGRAMS: [&str; 2] = ["redis-server", "redis-cli"];

/// A redis is protected, and goes to and fro: its host is killed under load, and it is handed back. Whoever has it at the end
/// gives it back whole.
pub(super) fn redis_goes_round(mut oci: Oci) {
    let runtime = oci.runtime;
    oci.start(true);
    oci.protect(&["--ip", &format!("{VIP}/24"), "--vip", &format!("{VIP}/24@eth0")]);
    assert_eq!(oci.cluster.ask_redis(&["DEBUG", "POPULATE", "20000", "key", "100"]), "OK");
    let mut at = (Host::A, Host::B);
    for round in 0..4_u32 {
        let (primary, standby) = at;
        oci.cluster.wait_state(primary, "primary", "protected");
        oci.cluster.wait_state(standby, "standby", "ready");
        let digest = oci.cluster.digest();
        // In its root, in its memory, in a mount.
        for file in ["/etc/round", "/dev/shm/round", "/data/round"] {
            oci.inside(primary, &["sh", "-c", &format!("echo {round} > {file}; ln -f {file} {file}-too")]);
        }
        let counter = oci.cluster.count();
        std::thread::sleep(Duration::from_millis(700));
        if round % 2 == 0 {
            oci.cluster.lab.kill(primary);
            oci.cluster.wait_state(standby, "primary", "alone");
        } else {
            oci.cluster.json(primary, &["handoff", "redis", "--max-downtime", "2s"]);
        }
        std::thread::sleep(Duration::from_millis(500));
        let acks = counter.stop();
        if round % 2 == 1 {
            assert_eq!(rolled_back(&acks), 0, "a handoff loses nothing");
        }
        assert!(longest_gap(&acks) < Duration::from_secs(10));
        assert_eq!(oci.cluster.digest(), digest);
        assert_eq!(oci.state(standby)["status"], "running");
        for file in ["/etc/round", "/dev/shm/round", "/data/round"] {
            assert_eq!(oci.inside(standby, &["cat", &format!("{file}-too")]), round.to_string(), "{file}");
        }
        // The append-only file goes with the memory: redis finds it as it left it.
        assert!(oci.inside(standby, &["sh", "-c", "cat /data/appendonlydir/*.incr.aof"]).contains("counter"));
        assert_eq!(oci.inside(standby, &["redis-cli", "set", "round", &round.to_string()]), "OK");
        assert_eq!(oci.inside(standby, &["id", "-u"]), "0");
        if round % 2 == 0 {
            oci.cluster.lab.boot(primary);
            oci.cluster.start_agent(primary);
        }
        at = (standby, primary);
    }
    // Whoever ended up as the primary gives it back whole; the other one keeps nothing.
    let (primary, standby) = at;
    oci.cluster.wait_state(primary, "primary", "protected");
    oci.cluster.standin(primary, &["unprotect", "redis"]);
    assert_eq!(oci.state(primary)["status"], "running");
    wait_for("the standby's container to go", || oci.state(standby).is_null());
    assert_eq!(oci.inside(primary, &["redis-cli", "get", "round"]), "3");
    oci.cluster.lab.ok(primary, &[runtime, "delete", "--force", "redis"]);
}

#[test]
fn a_redis_under_runc_goes_round_three_times_and_more() {
    redis_goes_round(Oci::prepare("runc", "redis", &REDIS_PROGRAMS, &REDIS));
}

#[test]
fn a_redis_under_crun_goes_round_three_times_and_more() {
    redis_goes_round(Oci::prepare("crun", "redis", &REDIS_PROGRAMS, &REDIS));
}

pub(super) const COUNTS: &str =
    "trap 'echo bye; exit 7' TERM; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.05; done";

/// Its output, its signals and its exit code are the runtime's matter after a takeover as before.
#[test]
fn a_container_is_its_runtimes_after_a_takeover() {
    let mut oci = Oci::prepare("runc", "counts", &[], &["sh", "-c", COUNTS]);
    oci.start(false);
    let file = oci.cluster.refused(Host::A, &["protect", "counts", "--oci", "counts", "--to", "b"]).1;
    assert!(file.contains("standard output is /srv/counts.log"), "{file}");
    oci.cluster.lab.ok(Host::A, &["runc", "delete", "--force", "counts"]);
    oci.start(true);
    wait_for("output", || oci.log(Host::A, true).contains("line 3"));
    oci.protect(&[]);
    oci.cluster.wait_state_of("counts", Host::B, "standby", "ready");
    std::thread::sleep(Duration::from_millis(300));
    oci.cluster.lab.kill(Host::A);
    oci.cluster.wait_state_of("counts", Host::B, "primary", "alone");
    wait_for("output on B", || oci.log(Host::B, false).lines().count() > 5);
    let lines: Vec<u64> = oci
        .log(Host::B, false)
        .lines()
        .map(|line| line.strip_prefix("line ").expect("a line").parse().expect("a number"))
        .collect();
    assert!(lines[0] > 3 && lines.windows(2).all(|pair| pair[1] == pair[0] + 1), "{lines:?}");
    assert!(oci.cluster.lab.ok(Host::B, &["runc", "ps", "counts"]).contains("while"));

    // Its order outlives the power cut: a runtime that starts it again starts no second copy.
    oci.cluster.lab.boot(Host::A);
    let again = "runc run -d --bundle /srv/counts counts < /dev/null > /srv/again.log 2>&1";
    oci.cluster.lab.ok(Host::A, &["sh", "-c", again]);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(oci.cluster.lab.ok(Host::A, &["cat", "/srv/again.log"]), "");
    oci.cluster.start_agent(Host::A);
    oci.cluster.wait_state_of("counts", Host::A, "standby", "ready");
    oci.cluster.wait_state_of("counts", Host::B, "primary", "protected");

    // It is told to end, and ends the container as it ends; nobody revives it.
    oci.cluster.lab.ok(Host::B, &["runc", "kill", "counts", "TERM"]);
    wait_for("its end", || oci.state(Host::B)["status"] != "running");
    assert!(oci.log(Host::B, false).ends_with("bye\n"));
    wait_for("the standby to forget it", || oci.state(Host::A).is_null());
    assert!(oci.cluster.status(Host::B, "counts").is_null());
}

#[test]
fn containers_that_cannot_be_protected_are_refused_with_the_reason() {
    let oci = Oci::prepare("runc", "counts", &[], &["sh", "-c", COUNTS]);
    let refused = |args: &[&str]| {
        let all = [&["protect", "counts", "--to", "b"], args].concat();
        oci.cluster.refused(Host::A, &all).1
    };
    assert!(refused(&["--oci", "counts"]).contains("no container counts"), "it is not started yet");
    oci.start(true);
    assert!(refused(&["--oci", "counts", "--runtime", "crun"]).contains("crun knows no container"));
    let other = oci.cluster.refused(Host::A, &["protect", "other", "--oci", "counts", "--to", "b"]).1;
    assert!(other.contains("wrapped as counts"), "{other}");

    oci.cluster.lab.ok(Host::A, &["runc", "pause", "counts"]);
    assert!(refused(&["--oci", "counts"]).contains("resume"));
    oci.cluster.lab.ok(Host::A, &["runc", "resume", "counts"]);

    // A container of that id that is not ours stays what it is, on the standby too.
    let foreign = format!(
        "mkdir -p /srv/x/data && {ROOTFS} /srv/x/rootfs && cd /srv/x && runc spec && \
         python3 -c '{CONFIGURE}' /srv/x sleep 1000 && runc run -d counts < /dev/null > /dev/null 2>&1"
    );
    oci.cluster.lab.ok(Host::B, &["sh", "-c", &foreign]);
    let reason = refused(&["--oci", "counts"]);
    assert!(reason.contains("another container named counts"), "{reason}");
    assert_eq!(oci.state(Host::B)["status"], "running");
    assert_eq!(oci.state(Host::A)["status"], "running");
    oci.cluster.lab.ok(Host::B, &["runc", "delete", "--force", "counts"]);

    // After all that it can be protected, and is refused a second time.
    oci.protect(&[]);
    let again = oci.cluster.refused(Host::A, &["protect", "twice", "--oci", "counts", "--to", "b"]).1;
    assert!(again.contains("protected already"), "{again}");
    let unwrapped = oci.cluster.refused(Host::A, &["wrap", "x", "--bundle", "/srv/nothing"]).1;
    assert!(unwrapped.contains("config.json"), "{unwrapped}");
}
