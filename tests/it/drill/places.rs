//! Drills of what has other places than sandboxes: containers of all engines, trees in the host's network. What waits for a
//! takeover is not changed, and takes over afterwards.

use std::time::Duration;

use serde_json::Value;

use super::{
    super::{
        cluster::Cluster,
        container_keeps::{CONFIGURE, LIMITED},
        containers::{COUNTS, Oci, REDIS},
        docker::{DOCKER, Daemon, Docker, PODMAN},
        lab::Host,
        redis::{VIP, longest_gap, rolled_back},
    },
    FAILED, REFUSED,
};

/// What is wanted in a container's root for the probes.
const PROGRAMS: [&str; 7] = ["redis-server", "redis-cli", "grep", "ip", "ping", "find", "mknod"];

/// Looks at what a container holds, changes all of it, and looks for a way out.
const PROBE_OF_CONTAINER: &str = r#"set -e
cli="redis-cli -h $STANDIN_ADDRESS"
echo keys $($cli dbsize)
$cli info server | grep run_id
for file in /etc/round /dev/shm/round /data/round; do cat $file-too; done
grep -l key:7 /data/appendonlydir/*.incr.aof
grep -q redis-server /proc/*/comm
$cli set drilled yes
for dir in / /etc /data /dev /dev/shm; do echo probed > $dir/probed; done
rm -r /etc/round /data/round /dev/shm/round
if ping -c 1 -W 1 10.77.0.1; then exit 9; fi
mknod /tmp/kmsg c 1 11
if (exec < /tmp/kmsg); then exit 8; fi
echo x > /dev/null
hostname=$(cat /proc/sys/kernel/hostname); echo host $hostname
"#;

/// What the container that waits on B has of files: names, and what is in them.
fn files_of(cluster: &Cluster, init: &str) -> String {
    let script = format!(
        "cd /proc/{init}/root && find . -xdev -type f ! -path './proc/*' | sort | xargs -d '\\n' md5sum; \
         for dir in data dev dev/shm .standin; do find ./$dir -xdev ! -type f | sort; \
         find ./$dir -xdev -type f | sort | xargs -rd '\\n' md5sum; done"
    );
    cluster.lab.ok(Host::B, &["sh", "-c", &script])
}

/// Lines of a probe's output that begin with a word, without it.
fn said(report: &Value, word: &str) -> String {
    let output = report["probe"]["output"].as_str().expect("an output");
    let line =
        output.lines().find_map(|line| line.strip_prefix(word)).unwrap_or_else(|| panic!("{word}: {output}"));
    line.trim().to_owned()
}

fn run_id(text: &str) -> String {
    text.lines().find(|line| line.starts_with("run_id:")).expect("a line").trim().to_owned()
}

/// A redis of which B waits with a copy is drilled under load, while its agent ends, and while it is taken over.
fn a_redis_is_drilled_when_much_happens(cluster: &mut Cluster) {
    let redis = run_id(&cluster.ask_redis(&["INFO", "server"]));
    let digest = cluster.digest();

    // Epochs are committed all the while.
    let counter = cluster.count();
    let held = cluster.held("redis");
    std::thread::sleep(Duration::from_millis(300));
    let probe = "redis-cli -h $STANDIN_ADDRESS get counter; sleep 1";
    let report = cluster.drilled("redis", &["--probe", probe]);
    assert!(report["epochs_committed"].as_u64() >= Some(3), "{report:#}");
    eprintln!("under load: {} ms to restore, {}", report["restore_ms"], report["phases_ms"]);
    let acks = counter.stop();
    assert_eq!(rolled_back(&acks), 0);
    assert!(longest_gap(&acks) < Duration::from_secs(1), "{:?}", longest_gap(&acks));
    cluster.wait_state(Host::B, "standby", "ready");
    assert!(cluster.held("redis") > held);
    cluster.assert_nothing_left("redis");

    // The agent's end without a word.
    let mut drill = cluster.drill_in_background("redis");
    cluster.end_agent(Host::B, "KILL");
    drill.wait().expect("it ends");
    assert!(!cluster.left("redis").is_empty());
    cluster.start_agent(Host::B);
    cluster.assert_nothing_left("redis");
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.wait_state(Host::B, "standby", "ready");

    // A takeover finds what waits as it should be.
    let drill = cluster.drill_in_background("redis");
    assert_eq!(cluster.digest(), digest);
    std::thread::sleep(Duration::from_millis(500));
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    let output = drill.wait_with_output().expect("it ends");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    let outcome = (output.status.code(), &report["outcome"]);
    assert_eq!(outcome, (Some(FAILED), &"interrupted".into()), "{report:#}");
    cluster.assert_nothing_left("redis");
    cluster.assert_first_try(Host::B);
    assert_eq!(cluster.ask_redis(&["EXISTS", "drilled"]), "0");
    assert_eq!(run_id(&cluster.ask_redis(&["INFO", "server"])), redis);
    assert_eq!(cluster.digest(), digest);
}

/// A script that is run in the container on a host.
type Inside = dyn Fn(&Cluster, Host, &str) -> String;

/// A redis in a container of which B waits with the same; `init_of` tells its pid 1 there.
fn a_redis_in_a_container_is_drilled(
    cluster: &mut Cluster,
    inside: &Inside,
    init_of: &dyn Fn(&Cluster) -> String,
) {
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.wait_state(Host::B, "standby", "ready");
    for key in 0..10 {
        inside(cluster, Host::A, &format!("redis-cli set key:{key} value"));
    }
    assert_eq!(cluster.ask_redis(&["DEBUG", "POPULATE", "20000", "filler", "100"]), "OK");
    let files = ["/etc/round", "/dev/shm/round", "/data/round"];
    for file in files {
        inside(cluster, Host::A, &format!("echo {file} > {file}; ln -f {file} {file}-too"));
    }
    let redis = run_id(&cluster.ask_redis(&["INFO", "server"]));
    // Idle, so that files stay as they are.
    std::thread::sleep(Duration::from_millis(600));
    let init = init_of(cluster);
    let before = files_of(cluster, &init);
    let report = cluster.drilled("redis", &["--probe", PROBE_OF_CONTAINER]);
    eprintln!("{report:#}");
    assert_eq!(said(&report, "keys"), "20010");
    assert_eq!(format!("run_id:{}", said(&report, "run_id:")), redis);
    for file in files {
        assert_eq!(said(&report, file), "", "it has {file}");
    }
    assert_eq!(init_of(cluster), init);
    assert_eq!(files_of(cluster, &init), before);
    cluster.assert_nothing_left("redis");

    // It can be kept, while what it is a copy of goes on.
    let probe = "redis-cli -h $STANDIN_ADDRESS debug log whispered";
    let report = cluster.drilled("redis", &["--keep", "--probe", probe]);
    assert_eq!(cluster.ask_redis(&["SET", "since", "then"]), "OK");
    std::thread::sleep(Duration::from_millis(300));
    assert!(!cluster.left("redis").is_empty());
    let log = report["kept"]["log"].as_str().expect("a file");
    assert!(cluster.lab.ok(Host::B, &["cat", log]).contains("whispered"));
    cluster.standin(Host::B, &["drill", "redis", "--end"]);
    cluster.assert_nothing_left("redis");

    a_redis_is_drilled_when_much_happens(cluster);
    for file in files {
        assert_eq!(inside(cluster, Host::B, &format!("cat {file}")), file);
    }
    assert_eq!(inside(cluster, Host::B, "find / -path /proc -prune -o -name probed -print"), "");
}

#[test]
fn a_container_of_runc_is_drilled_beside_the_one_that_waits() {
    let mut oci = Oci::prepare_in(Cluster::up("drill-runc"), "runc", "redis", &PROGRAMS, &REDIS);
    oci.start(true);
    oci.protect(&["--ip", &format!("{VIP}/24"), "--vip", &format!("{VIP}/24@eth0")]);
    let runc = |cluster: &Cluster, host: Host, script: &str| {
        cluster.lab.ok(host, &["runc", "exec", "redis", "sh", "-c", script]).trim().to_owned()
    };
    a_redis_in_a_container_is_drilled(&mut oci.cluster, &runc, &|cluster| {
        let state: Value =
            serde_json::from_str(&cluster.lab.ok(Host::B, &["runc", "state", "redis"])).expect("JSON");
        state["pid"].to_string()
    });
    assert_eq!(oci.cluster.lab.ok(Host::B, &["runc", "list", "-q"]).trim(), "redis");
}

#[test]
fn a_container_of_docker_is_drilled_beside_the_one_that_waits() {
    a_container_of_a_daemon_is_drilled(Docker::up("drill-docker", &DOCKER), &DOCKER);
}

#[test]
fn a_container_of_podman_is_drilled_beside_the_one_that_waits() {
    a_container_of_a_daemon_is_drilled(Docker::up("drill-podman", &PODMAN), &PODMAN);
}

fn a_container_of_a_daemon_is_drilled(mut docker: Docker, daemon: &'static Daemon) {
    docker.add_programs(&PROGRAMS);
    for host in [Host::A, Host::B] {
        let script = "mkdir -p /srv/shared /srv/conf; echo both > /srv/shared/file; echo conf > /srv/conf/file; \
                      setsid redis-server --port 0 --save '' --unixsocket /srv/shared/sock > /dev/null 2>&1 < /dev/null &";
        docker.cluster.lab.ok(host, &["sh", "-c", script]);
    }
    let mounts = ["-v", "data:/data", "-v", "/srv/shared:/shared", "-v", "/srv/conf:/conf:ro"];
    let others = ["--network", "app", "-p", "6379:6379", "--hostname", "inside"];
    docker.run(&[mounts.as_slice(), &others].concat(), &REDIS);
    docker.ship_image();
    docker.protect(&["--vip", &format!("{VIP}/24@eth0"), "--mount", "/shared=shared"]);
    // Of the image: one file goes, one changes, and a directory is another.
    let change =
        "rm -f /usr/bin/touch; echo more >> /etc/nsswitch.conf; rm -rf /var/lib; mkdir -p /var/lib/other";
    docker.inside(Host::A, change);
    let inside = |cluster: &Cluster, host: Host, script: &str| {
        let command = [daemon.command, &["exec", "redis", "sh", "-c", script]].concat();
        cluster.lab.ok(host, &command).trim().to_owned()
    };
    docker.cluster.wait_state(Host::B, "standby", "ready");
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(inside(&docker.cluster, Host::B, "redis-cli -s /shared/sock ping"), "PONG");
    let hosts = inside(&docker.cluster, Host::B, "cat /etc/hosts");
    // What is shared it sees and does not change, and who listens there does not hear it.
    let probe = "set -e; cat /proc/self/mountinfo; ip -o addr; ls /dev; echo; \
                 grep more /etc/nsswitch.conf; ls /var/lib; cat /shared/file /conf/file; grep inside /etc/hosts; \
                 echo probed > /shared/probed; echo probed >> /shared/file; echo probed >> /etc/hosts; \
                 for path in /conf/probed /proc/sys/kernel/hostname; do \
                   if echo probed > $path; then exit 9; fi; \
                 done; \
                 if redis-cli -s /shared/sock ping || ls /usr/bin/touch; then exit 8; fi";
    let report = docker.cluster.drilled("redis", &["--probe", probe]);
    let output = report["probe"]["output"].as_str().expect("an output").to_owned();
    eprintln!("{output}");
    assert!(output.contains("more\nother\nboth\nconf\n"), "{output}");
    assert!(output.contains(" eth0 ") && output.contains("172.30.0.2/24"), "{output}");
    assert_eq!(
        docker.cluster.lab.ok(Host::B, &["sh", "-c", "ls /srv/shared; cat /srv/shared/file"]),
        "file\nsock\nboth\n"
    );
    assert_eq!(inside(&docker.cluster, Host::B, "cat /etc/hosts"), hosts);
    a_redis_in_a_container_is_drilled(&mut docker.cluster, &inside, &|cluster| {
        let command = [daemon.command, &["inspect", "-f", "{{.State.Pid}}", "redis"]].concat();
        cluster.lab.ok(Host::B, &command).trim().to_owned()
    });
    assert_eq!(docker.docker(Host::B, &["ps", "--all", "--format", "{{.Names}}"]), "redis");
}

#[test]
fn a_tree_in_the_hosts_network_is_drilled_in_one_of_its_own() {
    let mut cluster = Cluster::up("drill-bare");
    let redis = "redis-server --save '' --protected-mode no --bind 0.0.0.0 --enable-debug-command yes";
    let pid = cluster.start_session(&format!("cd /; echo $$ >&3; exec 3>&- {redis} < /dev/null"));
    let vip = format!("{VIP}/24@eth0");
    cluster.standin(
        Host::A,
        &["protect", "redis", "--pid", &pid, "--to", "b", "--vip", &vip, "--every", "100ms"],
    );
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.wait_state(Host::B, "standby", "ready");
    assert_eq!(cluster.ask_redis(&["DEBUG", "POPULATE", "20000", "filler", "100"]), "OK");
    std::thread::sleep(Duration::from_millis(300));
    let redis = run_id(&cluster.ask_redis(&["INFO", "server"]));
    // By its own address, by one of the standby's, and by loopback.
    let probe = "set -e; echo address $STANDIN_ADDRESS; redis-cli -h $STANDIN_ADDRESS info server | grep run_id; \
                 redis-cli -h 10.77.0.2 set drilled yes; echo keys $(redis-cli dbsize); \
                 if ping -c 1 -W 1 10.77.0.1; then exit 9; fi";
    let report = cluster.drilled("redis", &["--probe", probe]);
    eprintln!("{report:#}");
    assert_eq!(said(&report, "address"), VIP);
    assert_eq!(said(&report, "keys"), "20001");
    assert_eq!(format!("run_id:{}", said(&report, "run_id:")), redis);
    cluster.assert_nothing_left("redis");
    a_redis_is_drilled_when_much_happens(&mut cluster);
}

/// By cgroup v1, and with another runtime.
#[test]
fn processes_may_do_in_a_drill_what_they_might_before() {
    let oci = Oci::prepare_in(
        Cluster::hybrid("drill-limits"),
        "crun",
        "limited",
        &["grep"],
        &["sh", "-c", LIMITED],
    );
    oci.configure(CONFIGURE);
    oci.start(true);
    oci.protect(&[]);
    oci.cluster.wait_state_of("limited", Host::B, "standby", "ready");
    let of = |pid: &str| {
        format!(
            "grep -E '^(Umask|Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp|Seccomp_filters):' /proc/{pid}/status; cat /proc/{pid}/limits"
        )
    };
    let root = oci.cluster.lab.ok(Host::A, &["pgrep", "-f", "-o", "^sh -c umask"]).trim().to_owned();
    let status = oci.cluster.lab.ok(Host::A, &["cat", &format!("/proc/{root}/status")]);
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).expect("pids");
    let pid_inside = pids.split_whitespace().next_back().expect("a pid");
    let before = oci.cluster.lab.ok(Host::A, &["sh", "-c", &of(&root)]);
    let probe = format!("{}; rm -f /tmp/tried; sleep 0.5; cat /tmp/tried", of(pid_inside));
    let report = oci.cluster.drilled("limited", &["--probe", &probe]);
    let output = report["probe"]["output"].as_str().expect("an output");
    assert_eq!(output, format!("{before}refused\n"));
    oci.cluster.assert_nothing_left("limited");
}

#[test]
fn a_container_that_is_restored_whole_is_refused_a_drill() {
    let oci = Oci::unprepared("runc", "counts", &[], &["sh", "-c", COUNTS]);
    oci.start(true);
    oci.protect(&[]);
    oci.cluster.wait_state_of("counts", Host::B, "standby", "ready");
    let (code, text) = oci.cluster.refused(Host::B, &["drill", "counts"]);
    assert_eq!(code, REFUSED, "{text}");
    for word in ["whole", "runc", "standin wrap counts", "standin handoff counts"] {
        assert!(text.contains(word), "it should speak of {word:?}: {text}");
    }
}
