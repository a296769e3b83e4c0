//! Containers of Docker and Podman, protected from inside: their daemons know them after every takeover, with what they wrote.

use std::{process::Stdio, time::Duration};

use super::{
    cluster::{Cluster, wait_for},
    lab::Host,
    redis::{VIP, rolled_back},
};

const ROOTFS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/rootfs");

/// A daemon with Docker's API, and how it is started by hand: nothing is configured, not even experimental features.
pub(crate) struct Daemon {
    name: &'static str,
    /// Its containers have our init.
    wraps: bool,
    pub(crate) command: &'static [&'static str],
    start: &'static str,
    /// Of `run`, where a host has no controllers of cgroups.
    flags: &'static [&'static str],
    /// It restarts containers when it starts.
    restarts: bool,
}

pub(crate) const DOCKER: Daemon = Daemon {
    name: "docker",
    wraps: true,
    command: &["docker"],
    start: "dockerd --storage-driver overlay2 --exec-opt native.cgroupdriver=cgroupfs",
    flags: &["--memory", "1g", "--restart", "always"],
    restarts: true,
};

/// With what it needs to restore containers whole.
pub(crate) const DOCKER_WHOLE: Daemon = Daemon {
    wraps: false,
    start: "mkdir -p /etc/docker /etc/criu; cp /usr/bin/tini-static /srv/init; \
            echo '{\"experimental\": true, \"init-path\": \"/srv/init\"}' > /etc/docker/daemon.json; \
            echo tcp-established > /etc/criu/runc.conf; PATH=/opt/standin/criu/bin:$PATH \
            dockerd --storage-driver overlay2 --exec-opt native.cgroupdriver=cgroupfs",
    flags: &["--memory", "1g"],
    restarts: false,
    ..DOCKER
};

pub(crate) const PODMAN: Daemon = Daemon {
    name: "podman",
    wraps: true,
    command: &["podman", "--remote", "--url", "unix:///run/podman/podman.sock"],
    // crun would raise a limit, for which hosts without CAP_SYS_RESOURCE have no right. Leases of addresses from before go at
    // boot: podman's tmpfiles.d says so.
    start: "mkdir -p /run/podman; rm -rf /var/lib/cni/networks; podman --root /srv/containers --runroot /run/containers --runtime /usr/sbin/runc \
            --storage-driver overlay --cgroup-manager cgroupfs --events-backend file \
            system service --time=0 unix:///run/podman/podman.sock",
    flags: &["--pids-limit", "-1"],
    restarts: false,
};

pub(crate) struct Docker {
    pub(crate) cluster: Cluster,
    daemon: &'static Daemon,
}

impl Docker {
    /// A daemon on each host; an image and a network on A.
    pub(crate) fn up(hint: &str, daemon: &'static Daemon) -> Self {
        Self::up_in(Cluster::up(hint), daemon)
    }

    /// The same in a cluster that is there.
    pub(crate) fn up_in(cluster: Cluster, daemon: &'static Daemon) -> Self {
        let docker = Self { cluster, daemon };
        docker.start_daemon(Host::A);
        docker.start_daemon(Host::B);
        let command = daemon.command.join(" ");
        let import = format!(
            "{ROOTFS} /srv/rootfs redis-server redis-cli && tar -C /srv/rootfs -c . | {command} import - lab && \
             {command} network create --subnet 172.30.0.0/24 app"
        );
        docker.cluster.lab.ok(Host::A, &["sh", "-c", &import]);
        if daemon.wraps {
            docker.cluster.standin(Host::A, &["wrap", "redis"]);
        }
        docker
    }

    pub(crate) fn start_daemon(&self, host: Host) {
        let Daemon { command, start, .. } = self.daemon;
        let script = format!(
            "mkdir -p /var/lib/docker; {start} > /srv/daemon.log 2>&1 < /dev/null & \
             for i in $(seq 200); do {0} info > /dev/null 2>&1 && exit 0; sleep 0.1; done; cat /srv/daemon.log; exit 1",
            command.join(" ")
        );
        self.cluster.lab.ok(host, &["setsid", "sh", "-c", &script]);
    }

    /// The image is made anew with more programs.
    pub(crate) fn add_programs(&self, programs: &[&str]) {
        let import = format!(
            "{ROOTFS} /srv/rootfs {} && tar -C /srv/rootfs -c . | {} import - lab",
            programs.join(" "),
            self.daemon.command.join(" ")
        );
        self.cluster.lab.ok(Host::A, &["sh", "-c", &import]);
    }

    /// What an operator does who has no registry.
    pub(crate) fn ship_image(&self) {
        let (lab, command) = (&self.cluster.lab, self.daemon.command);
        let mut save = lab.command(Host::A, &[command, &["save", "lab"]].concat());
        let mut save = save.stdout(Stdio::piped()).spawn().unwrap();
        let mut load = lab.command(Host::B, &[command, &["load"]].concat());
        let load = load.stdin(save.stdout.take().unwrap()).stdout(Stdio::null()).status().unwrap();
        assert!(load.success() && save.wait().unwrap().success());
    }

    /// `docker run` of a container, wrapped if that is how the daemon's are.
    pub(crate) fn run(&self, flags: &[&str], command: &[&str]) {
        let wrap =
            ["--entrypoint", "/.standin/init", "-v", "/var/lib/standin/wrap/redis:/.standin:ro"].as_slice();
        let wrap = if self.daemon.wraps { wrap } else { &[] };
        let fixed = [["run", "-d", "--name", "redis"].as_slice(), wrap].concat();
        self.docker(Host::A, &[&fixed, self.daemon.flags, flags, &["lab"], command].concat());
    }

    pub(crate) fn protect(&self, more: &[&str]) {
        let daemon = format!("--{}", self.daemon.name);
        let args = ["protect", "redis", &daemon, "redis", "--to", "b", "--every", "100ms"];
        self.cluster.standin(Host::A, &[&args, more].concat());
        self.cluster.wait_state(Host::A, "primary", "protected");
    }

    pub(crate) fn docker(&self, host: Host, args: &[&str]) -> String {
        self.cluster.lab.ok(host, &[self.daemon.command, args].concat()).trim().to_owned()
    }

    pub(crate) fn inside(&self, host: Host, script: &str) -> String {
        self.docker(host, &["exec", "redis", "sh", "-c", script])
    }

    /// What the daemon says of the container; nothing if it knows none.
    pub(crate) fn state(&self, host: Host) -> String {
        let args = ["inspect", "-f", "{{.State.Status}}", "redis"];
        let output = self.cluster.lab.on(host, &[self.daemon.command, &args].concat());
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

const COUNTS: &str =
    "trap 'echo bye; exit 7' TERM; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.05; done";

/// What an operator does to a protected container, each with a defined outcome.
#[test]
fn docker_pauses_restarts_logs_and_stops_a_protected_container() {
    let docker = Docker::up("docker-counts", &DOCKER);
    docker.ship_image();
    docker.run(&[], &["sh", "-c", COUNTS]);
    docker.protect(&[]);

    // Paused: no epoch, no alarm; what the standby holds is the last one.
    docker.docker(Host::A, &["pause", "redis"]);
    docker.cluster.wait_state(Host::A, "primary", "paused");
    let epoch = docker.cluster.status(Host::B, "redis")["epoch"].clone();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(docker.cluster.status(Host::B, "redis")["epoch"], epoch);
    assert!(docker.cluster.refused(Host::A, &["handoff", "redis"]).1.contains("unpause"));
    docker.docker(Host::A, &["unpause", "redis"]);
    docker.cluster.wait_state(Host::A, "primary", "protected");
    wait_for("new epochs", || docker.cluster.status(Host::B, "redis")["epoch"] != epoch);

    // What is executed beside the workload stays behind.
    docker.docker(Host::A, &["exec", "-d", "redis", "sleep", "1234"]);
    assert!(docker.docker(Host::A, &["top", "redis"]).contains("sleep 1234"));
    docker.cluster.json(Host::A, &["handoff", "redis", "--max-downtime", "2s"]);
    assert!(!docker.docker(Host::B, &["top", "redis"]).contains("sleep 1234"));

    // Its output goes on where it was, into the daemon's log.
    wait_for("output", || docker.docker(Host::B, &["logs", "redis"]).lines().count() > 5);
    let log = docker.docker(Host::B, &["logs", "redis"]);
    let numbers: Vec<u64> =
        log.lines().map(|line| line.strip_prefix("line ").unwrap().parse().unwrap()).collect();
    assert!(numbers[0] > 10 && numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
    docker.cluster.wait_state(Host::B, "primary", "protected");

    // A restart ends the workload, and so its protection; the container runs its command anew.
    docker.docker(Host::B, &["restart", "-t", "5", "redis"]);
    wait_for("the end of its protection", || docker.cluster.status(Host::B, "redis").is_null());
    let first = || docker.docker(Host::B, &["logs", "--tail", "1", "redis"]);
    wait_for("the command to run anew", || first().strip_prefix("line ").is_some_and(|n| n.len() < 3));
    wait_for("the standby to forget it", || docker.state(Host::A).is_empty());

    // The same when it stops, and its exit code is the daemon's.
    docker
        .cluster
        .standin(Host::B, &["protect", "redis", "--docker", "redis", "--to", "a", "--every", "100ms"]);
    docker.cluster.wait_state(Host::B, "primary", "protected");
    docker.cluster.json(Host::B, &["handoff", "redis", "--max-downtime", "2s"]);
    docker.cluster.wait_state(Host::A, "primary", "protected");
    docker.docker(Host::A, &["stop", "redis"]);
    assert_eq!(docker.docker(Host::A, &["inspect", "-f", "{{.State.ExitCode}}", "redis"]), "7");
    assert!(docker.docker(Host::A, &["logs", "redis"]).ends_with("bye"));
    wait_for("the standby to forget it", || docker.state(Host::B).is_empty());
    assert!(docker.cluster.status(Host::A, "redis").is_null());
    for host in [Host::A, Host::B] {
        // Neither guards nor their cgroups are left.
        let left = "ls /sys/fs/cgroup/standin /run/standin/sandboxes 2>/dev/null; pgrep -f '[s]tandin guard' || true";
        let left = docker.cluster.lab.ok(host, &["sh", "-c", left]);
        assert_eq!(left.trim(), "/run/standin/sandboxes:", "on {host}");
    }
}

/// See that of [`super::containers`].
pub(super) fn redis_goes_round(daemon: &'static Daemon) {
    let mut docker = Docker::up(&format!("{}-redis{}", daemon.name, u8::from(daemon.wraps)), daemon);
    let redis = ["redis-server", "--save", "", "--protected-mode", "no", "--enable-debug-command", "yes"];
    let files = ["--dir", "/data", "--appendonly", "yes"];
    docker.run(
        &["--network", "app", "-v", "data:/data", "-p", "6379:6379"],
        &[redis.as_slice(), &files].concat(),
    );
    let refused = docker
        .cluster
        .refused(Host::A, &["protect", "redis", &format!("--{}", daemon.name), "redis", "--to", "b"])
        .1;
    assert!(refused.contains("save") && refused.contains("lab"), "{refused}");
    assert_eq!(docker.state(Host::A), "running");
    docker.ship_image();
    docker.protect(&["--vip", &format!("{VIP}/24@eth0")]);
    assert_eq!(docker.cluster.ask_redis(&["DEBUG", "POPULATE", "20000", "key", "100"]), "OK");
    let address =
        "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.MacAddress}}{{end}} {{.HostConfig.Memory}}";
    let address_of = |docker: &Docker, host| docker.docker(host, &["inspect", "-f", address, "redis"]);
    let before = address_of(&docker, Host::A);
    let mut at = (Host::A, Host::B);
    for round in 0..4_u32 {
        let (primary, standby) = at;
        docker.cluster.wait_state(primary, "primary", "protected");
        docker.cluster.wait_state(standby, "standby", "ready");
        let digest = docker.cluster.digest();
        for file in ["/etc/round", "/dev/shm/round", "/data/round"] {
            docker.inside(primary, &format!("echo {round} > {file}; ln -f {file} {file}-too"));
        }
        // Of the image: one file goes, one changes, and in a second life a directory is another.
        docker.inside(
            primary,
            &format!(
                "rm -f /usr/bin/touch; echo {round} >> /etc/nsswitch.conf; rm -rf /var/lib; \
                                          mkdir -p /var/lib/{round}"
            ),
        );
        let written = docker.inside(primary, "cat /etc/nsswitch.conf");
        let counter = docker.cluster.count();
        std::thread::sleep(Duration::from_millis(700));
        if round % 2 == 0 {
            docker.cluster.lab.kill(primary);
            docker.cluster.wait_state(standby, "primary", "alone");
        } else {
            docker.cluster.json(primary, &["handoff", "redis", "--max-downtime", "2s"]);
        }
        std::thread::sleep(Duration::from_millis(500));
        let acks = counter.stop();
        if round % 2 == 1 {
            assert_eq!(rolled_back(&acks), 0, "a handoff loses nothing");
        }
        assert_eq!(docker.cluster.digest(), digest);
        assert_eq!(docker.state(standby), "running");
        assert_eq!(address_of(&docker, standby), before);
        for file in ["/etc/round", "/dev/shm/round", "/data/round"] {
            assert_eq!(docker.inside(standby, &format!("cat {file}-too")), round.to_string(), "{file}");
        }
        assert_eq!(docker.inside(standby, "cat /etc/nsswitch.conf"), written);
        assert_eq!(
            docker.inside(standby, "ls /usr/bin/touch /var/lib 2>/dev/null || true"),
            format!("/var/lib:\n{round}")
        );
        assert!(docker.inside(standby, "cat /data/appendonlydir/*.incr.aof").contains("counter"));
        assert!(docker.docker(standby, &["top", "redis"]).contains("redis-server"));
        if round % 2 == 0 {
            docker.cluster.lab.boot(primary);
            docker.start_daemon(primary);
            if daemon.restarts {
                // The daemon starts it, and nothing in it starts the workload a second time.
                wait_for("the daemon's restart", || docker.state(primary) == "running");
                assert!(!docker.docker(primary, &["top", "redis"]).contains("redis-server *:6379"));
            }
            docker.cluster.start_agent(primary);
        }
        at = (standby, primary);
    }
    let (primary, standby) = at;
    docker.cluster.wait_state(primary, "primary", "protected");
    docker.cluster.standin(primary, &["unprotect", "redis"]);
    assert_eq!(docker.state(primary), "running");
    wait_for("the standby's container to go", || docker.state(standby).is_empty());
    assert!(docker.inside(primary, "redis-cli dbsize").starts_with("2000"));
}

/// Output commit holds what a container says to another one on its bridge as what it says to others.
#[test]
fn what_a_neighbour_on_the_bridge_is_told_waits_too() {
    let cluster = Cluster::with("docker-neighbour", &["--lease-ms", "3000"]);
    let mut docker = Docker::up_in(cluster, &DOCKER);
    let redis = ["redis-server", "--save", "", "--protected-mode", "no"];
    docker.run(&["--network", "app", "--ip", "172.30.0.9"], &redis);
    docker.docker(Host::A, &["run", "-d", "--name", "neighbour", "--network", "app", "lab", "sleep", "1000"]);
    let ask = |docker: &Docker| {
        let ask = ["exec", "neighbour", "redis-cli", "-h", "172.30.0.9", "INCR", "asked"];
        let asked =
            docker.cluster.lab.on(Host::A, &[&["timeout", "1"], docker.daemon.command, &ask].concat());
        String::from_utf8_lossy(&asked.stdout).trim().to_owned()
    };
    docker.ship_image();
    wait_for("redis", || ask(&docker) == "1");
    docker.protect(&[]);
    let see = |sees| {
        let key = "net.bridge.bridge-nf-call-iptables";
        docker.cluster.lab.ok(Host::A, &["sysctl", "-qw", &format!("{key}={sees}")]);
    };
    see(0);
    let why = docker.cluster.refused(Host::A, &["commit", "redis", "output"]).1;
    assert!(why.contains("br_netfilter") && why.contains("the bridge br-"), "{why}");
    let doctor = docker.cluster.lab.on(Host::A, &[super::lab::STANDIN, "doctor"]);
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("does not see what these pass"));
    see(1);
    docker.cluster.standin(Host::A, &["commit", "redis", "output"]);
    wait_for("output to wait", || docker.cluster.status(Host::A, "redis")["held"]["output"] == true);
    assert_eq!(ask(&docker), "2");
    docker.cluster.end_agent(Host::A, "KILL");
    assert_eq!(ask(&docker), "", "nobody lets it out");
    docker.cluster.start_agent(Host::A);
    docker.cluster.wait_state(Host::A, "primary", "protected");
    assert_ne!(ask(&docker), "");
}

#[test]
fn a_redis_in_docker_goes_round_three_times_and_more() {
    redis_goes_round(&DOCKER);
}

#[test]
fn a_redis_in_podman_goes_round_three_times_and_more() {
    redis_goes_round(&PODMAN);
}
