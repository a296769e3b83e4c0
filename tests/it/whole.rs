//! Containers of which nothing was prepared: their pid 1 is the application, and their runtime restores them.

use std::time::Duration;

use super::{
    cluster::{Cluster, wait_for},
    containers::{COUNTS, Oci, REDIS, REDIS_PROGRAMS, redis_goes_round},
    docker::{self, DOCKER_WHOLE, Docker},
    lab::Host,
};

#[test]
fn an_unprepared_redis_under_runc_goes_round_three_times_and_more() {
    redis_goes_round(Oci::unprepared("runc", "redis", &REDIS_PROGRAMS, &REDIS));
}

/// Debian 12's crun was built without CRIU: hosts have one of a newer Debian, which `scripts/setup` has put beside.
fn with_a_crun_that_restores(hint: &str) -> Cluster {
    let cluster = Cluster::up(hint);
    let link = "crun --version | grep -q +CRIU && exit
        mountpoint -q /usr && { echo '/usr is no part of the host: what is changed there would stay'; exit 1; }
        ln -s /opt/standin/crun/bin/crun /usr/local/sbin/crun && /usr/local/sbin/crun --version | grep +CRIU";
    for host in [Host::A, Host::B] {
        cluster.lab.ok(host, &["sh", "-c", link]);
    }
    cluster
}

#[test]
fn an_unprepared_redis_under_crun_goes_round_three_times_and_more() {
    let cluster = with_a_crun_that_restores("crun-whole");
    redis_goes_round(Oci::unprepared_in(cluster, "crun", "redis", &REDIS_PROGRAMS, &REDIS));
}

/// Its processes, its output, its signals and its exit code are the runtime's matter after a takeover as before.
#[test]
fn an_unprepared_container_is_its_runtimes_after_a_takeover() {
    let mut oci = Oci::unprepared("runc", "counts", &[], &["sh", "-c", COUNTS]);
    oci.start(true);
    wait_for("output", || oci.log(Host::A, true).contains("line 3"));
    oci.protect(&[]);
    assert_eq!(oci.cluster.status(Host::A, "counts")["container"]["way"], "whole");
    let said = oci.cluster.standin(Host::A, &["status", "counts"]);
    assert!(said.contains("way       whole: slower"), "{said}");
    oci.cluster.wait_state_of("counts", Host::B, "standby", "ready");
    assert!(oci.state(Host::B).is_null(), "nothing runs there yet");
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
    assert!(oci.cluster.lab.ok(Host::B, &["runc", "list"]).contains("counts"));
    assert!(oci.cluster.lab.ok(Host::B, &["runc", "ps", "counts"]).contains("while"));

    // In the runtime's own cgroup, which is the root of its namespace, and where the runtime stops it.
    let pid = oci.state(Host::B)["pid"].to_string();
    let cgroup = oci.cluster.lab.ok(Host::B, &["grep", "^0::", &format!("/proc/{pid}/cgroup")]);
    assert_eq!(cgroup.trim(), "0::/standin/counts/work/counts");
    assert!(oci.inside(Host::B, &["cat", "/proc/1/cgroup"]).ends_with("0::/"));
    // What it is not to see is masked as before, and devices are there.
    assert_eq!(oci.inside(Host::B, &["cat", "/proc/keys"]), "");
    assert_eq!(oci.inside(Host::B, &["ls", "/sys/firmware"]), "");
    oci.inside(Host::B, &["sh", "-c", "echo x > /dev/null && head -c 4 /dev/urandom > /dev/shm/x"]);

    oci.cluster.lab.boot(Host::A);
    oci.cluster.start_agent(Host::A);
    oci.cluster.wait_state_of("counts", Host::A, "standby", "ready");
    oci.cluster.wait_state_of("counts", Host::B, "primary", "protected");
    oci.cluster.lab.ok(Host::B, &["runc", "pause", "counts"]);
    oci.cluster.wait_state_of("counts", Host::B, "primary", "paused");
    assert!(oci.cluster.refused(Host::B, &["handoff", "counts"]).1.contains("unpause"));
    oci.cluster.lab.ok(Host::B, &["runc", "resume", "counts"]);
    oci.cluster.wait_state_of("counts", Host::B, "primary", "protected");

    // It is told to end, and ends; nobody revives it.
    oci.cluster.lab.ok(Host::B, &["runc", "kill", "counts", "TERM"]);
    wait_for("its end", || oci.state(Host::B)["status"] != "running");
    assert!(oci.log(Host::B, false).ends_with("bye\n"));
    wait_for("the protection to end", || oci.cluster.status(Host::B, "counts").is_null());
    wait_for("the standby to forget it", || oci.cluster.status(Host::A, "counts").is_null());
    let left = "ls -d /sys/fs/cgroup/standin/*/init /run/standin/sandboxes/* 2>/dev/null; \
                grep ' /run/standin/' /proc/self/mounts; pgrep -f '[s]tandin guard'; true";
    assert_eq!(oci.cluster.lab.ok(Host::A, &["sh", "-c", left]), "");
}

/// Neither an agent that ends, on either side, nor a cut between the hosts makes a second copy or loses the one.
#[test]
fn an_unprepared_container_outlives_agents_and_cuts() {
    let mut oci = Oci::unprepared("runc", "counts", &[], &["sh", "-c", COUNTS]);
    oci.start(true);
    oci.protect(&[]);
    oci.cluster.wait_state_of("counts", Host::B, "standby", "ready");
    for host in [Host::A, Host::B] {
        oci.cluster.end_agent(host, "TERM");
        oci.cluster.start_agent(host);
        oci.cluster.wait_state_of("counts", Host::A, "primary", "protected");
        oci.cluster.wait_state_of("counts", Host::B, "standby", "ready");
    }

    // The agents lose each other: the old copy stands still before the new one runs.
    oci.cluster.lab.cut_between(Host::A, Host::B);
    oci.cluster.wait_state_of("counts", Host::B, "primary", "alone");
    assert_eq!(oci.cluster.status(Host::A, "counts")["role"], "fenced");
    let standing = oci.log(Host::A, true);
    wait_for("output on B", || oci.log(Host::B, false).lines().count() > 5);
    assert_eq!(oci.log(Host::A, true), standing, "the old copy is frozen");
    oci.cluster.lab.heal();
    oci.cluster.wait_state_of("counts", Host::A, "standby", "ready");
    oci.cluster.wait_state_of("counts", Host::B, "primary", "protected");
    wait_for("the old copy to be gone", || oci.state(Host::A).is_null());

    // What was restored outlives the agent as well, and is the same process to the next one.
    let pid = oci.state(Host::B)["pid"].clone();
    oci.cluster.end_agent(Host::B, "TERM");
    oci.cluster.start_agent(Host::B);
    oci.cluster.wait_state_of("counts", Host::B, "primary", "protected");
    assert_eq!(oci.state(Host::B)["pid"], pid);

    // A standby that cannot restore it says so; the workload runs on, and can be moved when that is mended.
    let runtime = "mount --bind /bin/false $(command -v runc)";
    oci.cluster.lab.ok(Host::A, &["sh", "-c", runtime]);
    let reason = oci.cluster.refused(Host::B, &["handoff", "counts", "--max-downtime", "3s"]).1;
    assert!(reason.contains("runs on here"), "{reason}");
    oci.cluster.lab.ok(Host::A, &["sh", "-c", "umount $(command -v runc)"]);
    oci.cluster.wait_state_of("counts", Host::B, "primary", "protected");
    assert_eq!(oci.state(Host::B)["pid"], pid);
    oci.cluster.wait_state_of("counts", Host::A, "standby", "ready");
    oci.cluster.json(Host::B, &["handoff", "counts", "--max-downtime", "3s"]);
    assert_eq!(oci.state(Host::A)["status"], "running");
    let log = oci.log(Host::A, false);
    let lines: Vec<u64> = log.lines().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
    assert!(lines.windows(2).all(|pair| pair[1] == pair[0] + 1), "{lines:?}");
}

/// A container that cannot be protected whole is told why, and what to do.
#[test]
fn unprepared_containers_that_cannot_be_restored_are_refused_with_the_reason() {
    let oci = Oci::unprepared("crun", "counts", &["mount"], &["sh", "-c", COUNTS]);
    oci.start(true);
    let refused = |args: &[&str]| {
        let all = [&["protect", "counts", "--to", "b"], args].concat();
        oci.cluster.refused(Host::A, &all).1
    };
    let built_with = oci.cluster.lab.ok(Host::A, &["crun", "--version"]);
    assert!(!built_with.contains("+CRIU"), "this test is of a crun without CRIU");
    let reason = refused(&["--oci", "counts"]);
    assert!(reason.contains("built without CRIU") && reason.contains("standin wrap"), "{reason}");
    assert_eq!(oci.state(Host::A)["status"], "running");
    oci.cluster.lab.ok(Host::A, &["crun", "delete", "--force", "counts"]);

    // A mount that somebody made in it later would not be there on the standby.
    let start =
        "runc run -d --bundle /srv/counts counts < /dev/null > >(exec setsid cat > /srv/out 2>&1) 2>&1";
    oci.cluster.lab.ok(Host::A, &["bash", "-c", start]);
    let mount = "pid=$(runc state counts | sed -n 's/.*\"pid\": \\([0-9]*\\).*/\\1/p'); mkdir -p /srv/counts/rootfs/mnt; \
                 nsenter -t $pid -m mount -t tmpfs none /mnt";
    oci.cluster.lab.ok(Host::A, &["sh", "-c", mount]);
    let reason = refused(&["--oci", "counts"]);
    assert!(reason.contains("does not tell of its mount /mnt"), "{reason}");
    oci.cluster.lab.ok(Host::A, &["runc", "delete", "--force", "counts"]);

    // A container of that id that is not ours stays what it is, on the standby too.
    oci.cluster.lab.ok(Host::A, &["bash", "-c", start]);
    let foreign = format!(
        "mkdir -p /srv/x && {} /srv/x/rootfs && cd /srv/x && runc spec && sed -i 's/\"terminal\": true/\"terminal\": false/; \
         s/\"sh\"/\"sleep\", \"1000\"/' config.json && runc run -d counts < /dev/null > /dev/null 2>&1",
        concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/rootfs")
    );
    oci.cluster.lab.ok(Host::B, &["sh", "-c", &foreign]);
    let reason = refused(&["--oci", "counts"]);
    assert!(reason.contains("another container named counts"), "{reason}");
    let state = oci.cluster.lab.ok(Host::B, &["runc", "state", "counts"]);
    assert!(state.contains("running"), "{state}");
    oci.cluster.lab.ok(Host::B, &["runc", "delete", "--force", "counts"]);

    // After all that it can be protected, and given back as it was.
    oci.cluster.standin(Host::A, &["protect", "counts", "--oci", "counts", "--to", "b"]);
    oci.cluster.wait_state_of("counts", Host::A, "primary", "protected");
    oci.cluster.standin(Host::A, &["unprotect", "counts"]);
    let state = oci.cluster.lab.ok(Host::A, &["runc", "state", "counts"]);
    assert!(state.contains("running"), "{state}");
}

#[test]
fn an_unprepared_redis_in_docker_goes_round_three_times_and_more() {
    docker::redis_goes_round(&DOCKER_WHOLE);
}

/// Its output, its pause and its end are the daemon's after a takeover as before.
#[test]
fn an_unprepared_container_is_docker_s_after_a_takeover() {
    let docker = Docker::up("docker-whole", &DOCKER_WHOLE);
    docker.ship_image();
    for host in [Host::A, Host::B] {
        docker.cluster.lab.ok(host, &["sh", "-c", "mkdir /srv/both; hostname > /srv/both/name"]);
    }
    docker.cluster.lab.ok(Host::A, &["sh", "-c", "mkdir /srv/own; echo A > /srv/own/name"]);
    let mounts = ["--tmpfs", "/scratch:size=1m", "-v", "/srv/own:/own", "-v", "/srv/both:/both"];
    docker.run(&mounts, &["sh", "-c", COUNTS]);
    docker.protect(&["--mount", "/own=ignore", "--mount", "/both=shared"]);
    assert_eq!(docker.cluster.status(Host::A, "redis")["container"]["way"], "whole");
    docker.cluster.wait_state(Host::B, "standby", "ready");
    let inside = |host, script: &str| docker.docker(host, &["exec", "redis", "sh", "-c", script]);
    inside(Host::A, "echo kept > /scratch/file");
    docker.cluster.json(Host::A, &["handoff", "redis", "--max-downtime", "3s"]);
    wait_for("output", || docker.docker(Host::B, &["logs", "redis"]).lines().count() > 5);
    let log = docker.docker(Host::B, &["logs", "redis"]);
    let lines: Vec<u64> =
        log.lines().map(|line| line.strip_prefix("line ").unwrap().parse().unwrap()).collect();
    assert!(lines[0] > 3 && lines.windows(2).all(|pair| pair[1] == pair[0] + 1), "{lines:?}");
    let found = "cat /scratch/file; ls /dev/null; ls /sys/firmware; [ -e /dev/.standin ] || echo hidden";
    assert_eq!(inside(Host::B, found), "kept\n/dev/null\nhidden");
    let of_the_host = docker.cluster.lab.ok(Host::B, &["hostname"]);
    assert_eq!(inside(Host::B, "ls /own; cat /both/name"), of_the_host.trim());
    assert!(docker.docker(Host::B, &["top", "redis"]).contains("while"));

    docker.cluster.wait_state(Host::B, "primary", "protected");
    docker.docker(Host::B, &["pause", "redis"]);
    docker.cluster.wait_state(Host::B, "primary", "paused");
    docker.docker(Host::B, &["unpause", "redis"]);
    docker.cluster.wait_state(Host::B, "primary", "protected");
    docker.docker(Host::B, &["stop", "redis"]);
    assert_eq!(docker.docker(Host::B, &["inspect", "-f", "{{.State.ExitCode}}", "redis"]), "7");
    assert!(docker.docker(Host::B, &["logs", "redis"]).ends_with("bye"));
    wait_for("the protection to end", || docker.cluster.status(Host::B, "redis").is_null());
    wait_for("the standby to forget it", || docker.cluster.status(Host::A, "redis").is_null());
}

/// Docker's own init is pid 1, and reaps; the workload is below it.
#[test]
fn a_container_with_dockers_own_init_goes_whole() {
    let mut docker = Docker::up("docker-init", &DOCKER_WHOLE);
    docker.ship_image();
    for host in [Host::A, Host::B] {
        docker.cluster.lab.ok(host, &["sh", "-c", "echo UTC > /srv/UTC; ln -s UTC /srv/zone"]);
    }
    docker.run(&["--init", "-v", "/srv/zone:/etc/zone:ro"], &["sh", "-c", COUNTS]);
    docker.protect(&[]);
    assert_eq!(docker.cluster.status(Host::A, "redis")["container"]["way"], "whole");
    let mut at = (Host::A, Host::B);
    for round in 0..3 {
        let (primary, standby) = at;
        docker.cluster.wait_state(primary, "primary", "protected");
        docker.cluster.wait_state(standby, "standby", "ready");
        if round == 1 {
            // What enters a container that was restored before, and stays: CRIU would dump it, and never restore it.
            docker.inside(primary, "sleep 2 &");
            let told = || docker.cluster.status(primary, "redis")["error"].to_string();
            wait_for("the reason", || told().contains("time namespace"));
            docker.cluster.wait_state(primary, "primary", "protected");
        }
        // Somebody must reap what it leaves behind.
        docker.inside(primary, "sleep 0.1 &");
        if round == 1 {
            docker.cluster.json(primary, &["handoff", "redis", "--max-downtime", "3s"]);
        } else {
            docker.cluster.lab.kill(primary);
            docker.cluster.wait_state(standby, "primary", "alone");
        }
        assert_eq!(docker.inside(standby, "cat /proc/1/comm /etc/zone"), "docker-init\nUTC");
        let lines = || docker.docker(standby, &["logs", "redis"]).lines().count();
        let before = lines();
        wait_for("output", || lines() > before + 5);
        wait_for("no zombies", || {
            !docker.inside(standby, "cat /proc/[0-9]*/stat 2>/dev/null; true").contains(") Z ")
        });
        if round != 1 {
            docker.cluster.lab.boot(primary);
            docker.start_daemon(primary);
            docker.cluster.start_agent(primary);
        }
        at = (standby, primary);
    }
    docker.docker(at.0, &["stop", "redis"]);
    assert_eq!(docker.docker(at.0, &["inspect", "-f", "{{.State.ExitCode}}", "redis"]), "7");
}

#[test]
fn unprepared_containers_of_docker_that_would_run_twice_are_refused() {
    let docker = Docker::up("docker-refusals", &DOCKER_WHOLE);
    let command = ["sh", "-c", COUNTS];
    let refused =
        || docker.cluster.refused(Host::A, &["protect", "redis", "--docker", "redis", "--to", "b"]).1;
    docker.run(&["--restart", "always"], &command);
    let reason = refused();
    assert!(reason.contains("docker update --restart no") && reason.contains("standin wrap"), "{reason}");
    docker.docker(Host::A, &["rm", "--force", "redis"]);
    docker.run(&["--ipc", "shareable"], &command);
    assert!(refused().contains("--ipc private"));
    docker.docker(Host::A, &["rm", "--force", "redis"]);
    docker.run(&["--init"], &command);
    docker.cluster.lab.ok(Host::A, &["sh", "-c", "mv /srv/init /srv/tini; ln -s tini /srv/init"]);
    let reason = refused();
    assert!(reason.contains("\"init-path\": \"/srv/tini\""), "{reason}");
    docker.docker(Host::A, &["rm", "--force", "redis"]);
    docker.run(&[], &command);
    docker.cluster.lab.ok(Host::A, &["rm", "/etc/criu/runc.conf"]);
    assert!(refused().contains("echo tcp-established"));
    assert_eq!(docker.docker(Host::A, &["inspect", "-f", "{{.State.Status}}", "redis"]), "running");
}
