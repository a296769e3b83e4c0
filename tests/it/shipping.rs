//! `protect --ship-image`: what a container needs and its standby lacks is sent there, whole or not at all.

use std::process::{Child, Stdio};

use serde_json::Value;

use super::{
    cluster::{Cluster, wait_for},
    containers::Oci,
    docker::{DOCKER, Docker, PODMAN},
    lab::{Host, STANDIN},
    redis::VIP,
};

const REFUSED: i32 = 4;
const UNREACHABLE: i32 = 5;
/// Where a standby has what arrives.
const ARRIVING: &str = "/var/lib/standin/arriving";

const REDIS: [&str; 7] =
    ["redis-server", "--save", "", "--protected-mode", "no", "--enable-debug-command", "yes"];

/// A directory and a file on A that a container mounts read-only, with what makes them hard to copy.
const READ_ONLY: &str = "umask 022; mkdir -p /srv/conf/sub && cd /srv/conf && echo one > sub/a && ln sub/a b && ln -s sub/a c && \
     mkfifo pipe && chown 7:8 sub/a && chmod 2750 sub && truncate -s 300000 sparse && touch -d @1000000000 b && \
     echo greeting > /srv/motd && chmod 640 /srv/motd && chown 0:9 /srv/motd";
/// What a container sees of them.
const LOOK: &str = "cd /conf && cat b c && ls -ln --time-style=+%s sub/a sub pipe sparse | tr -s ' ' | cut -d' ' -f1,3- && \
     [ sub/a -ef b ] && cat /etc/motd && ls -ln /etc/motd | tr -s ' ' | cut -d' ' -f1-5";

/// Adds mounts to a bundle's config: pairs of the host's path and the container's.
const MOUNT: &str = r#"
import json, sys
path = sys.argv[1] + "/config.json"
config = json.load(open(path))
for source, inside in zip(sys.argv[2::2], sys.argv[3::2]):
    config["mounts"].append({"destination": inside, "type": "bind", "source": source, "options": ["rbind", "ro"]})
json.dump(config, open(path, "w"))
"#;

fn read_only(cluster: &Cluster) {
    cluster.lab.ok(Host::A, &["sh", "-c", READ_ONLY]);
}

/// What is on its way from A.
fn sent_bytes(cluster: &Cluster) -> Option<u64> {
    let status = cluster.json(Host::A, &["status"]);
    status["shipments"][0]["sent_bytes"].as_u64()
}

/// How much is below a directory, if it is there.
fn entries_below(cluster: &Cluster, host: Host, dir: &str) -> usize {
    cluster
        .lab
        .ok(host, &["sh", "-c", &format!("find {dir} -mindepth 1 2>/dev/null || true")])
        .lines()
        .count()
}

#[test]
fn an_image_and_mounts_that_the_standby_lacks_are_sent_and_nothing_of_its_own_is_changed() {
    let mut docker = Docker::up("ship-docker", &DOCKER);
    docker.add_programs(&["redis-server", "redis-cli", "tr", "cut"]);
    read_only(&docker.cluster);
    // The standby's image of that name is another one.
    let other =
        "mkdir -p /srv/other && echo other > /srv/other/file && tar -C /srv/other -c . | docker import - lab";
    docker.cluster.lab.ok(Host::B, &["sh", "-c", other]);
    let id_of =
        |docker: &Docker, host, name: &str| docker.docker(host, &["image", "inspect", "-f", "{{.Id}}", name]);
    let (ours, theirs) = (id_of(&docker, Host::A, "lab"), id_of(&docker, Host::B, "lab"));
    assert_ne!(ours, theirs);
    let mounts = ["-v", "/srv/conf:/conf:ro", "-v", "/srv/motd:/etc/motd:ro"];
    docker.run(&[["--network", "app", "-p", "6379:6379"].as_slice(), &mounts].concat(), &REDIS);
    let seen = docker.inside(Host::A, LOOK);
    let vip = format!("{VIP}/24@eth0");
    let protect = ["protect", "redis", "--docker", "redis", "--to", "b", "--every", "100ms", "--vip", &vip];

    let (code, said) = docker.cluster.refused(Host::A, &protect);
    assert_eq!(code, REFUSED);
    assert!(said.contains("no image lab of the same digest") && said.contains("--ship-image"), "{said}");

    docker.cluster.standin(Host::A, &[protect.as_slice(), &["--ship-image"]].concat());
    docker.cluster.wait_state(Host::A, "primary", "protected");
    assert_eq!(id_of(&docker, Host::B, &ours), ours);
    assert_eq!(id_of(&docker, Host::B, "lab"), theirs, "a name of the standby's means what it meant");
    assert!(docker.cluster.history(Host::A).iter().filter(|kind| *kind == "shipped").count() == 3);
    assert_eq!(entries_below(&docker.cluster, Host::B, ARRIVING), 0);

    assert_eq!(docker.cluster.ask_redis(&["DEBUG", "POPULATE", "1000", "key", "100"]), "OK");
    let digest = docker.cluster.digest();
    docker.cluster.wait_state(Host::B, "standby", "ready");
    std::thread::sleep(std::time::Duration::from_millis(500));
    docker.cluster.lab.kill(Host::A);
    docker.cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(docker.cluster.digest(), digest);
    assert_eq!(docker.inside(Host::B, LOOK), seen);
    let written = docker.docker(Host::B, &["exec", "redis", "sh", "-c", "echo x > /conf/new || echo no"]);
    assert_eq!(written, "no", "it is mounted read-only there too");

    // On the way back the first host uses what it has itself.
    docker.cluster.lab.boot(Host::A);
    docker.start_daemon(Host::A);
    docker.cluster.start_agent(Host::A);
    docker.cluster.wait_state(Host::A, "standby", "ready");
    docker.cluster.wait_state(Host::B, "primary", "protected");
    docker.cluster.json(Host::B, &["handoff", "redis", "--max-downtime", "2s"]);
    docker.cluster.wait_state(Host::A, "primary", "protected");
    assert_eq!(docker.cluster.digest(), digest);
    assert_eq!(docker.inside(Host::A, LOOK), seen);
}

#[test]
fn an_image_gets_its_name_where_the_standbys_podman_has_none_of_it() {
    let docker = Docker::up("ship-podman", &PODMAN);
    docker.run(&["--network", "app", "-p", "6379:6379"], &REDIS);
    docker.protect(&["--vip", &format!("{VIP}/24@eth0"), "--ship-image"]);
    let id_of = |host| docker.docker(host, &["image", "inspect", "-f", "{{.Id}}", "lab"]);
    assert_eq!(id_of(Host::A), id_of(Host::B));
    assert_eq!(docker.cluster.ask_redis(&["SET", "key", "value"]), "OK");
    docker.cluster.wait_state(Host::B, "standby", "ready");
    std::thread::sleep(std::time::Duration::from_millis(500));
    docker.cluster.lab.kill(Host::A);
    docker.cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(docker.cluster.ask_redis(&["GET", "key"]), "value");
}

/// A wrapped container of runc on A that sleeps, with more mounts.
fn sleeper(hint: &str, mounts: &[&str]) -> Oci {
    let programs = ["tr", "cut", "cksum"];
    let oci = Oci::prepare_in(Cluster::up(hint), "runc", "sleeper", &programs, &["sleep", "1000"]);
    oci.cluster.lab.ok(Host::A, &[&["python3", "-c", MOUNT, "/srv/sleeper"], mounts].concat());
    oci
}

const PROTECT: [&str; 8] = ["protect", "sleeper", "--oci", "sleeper", "--to", "b", "--every", "100ms"];

#[test]
fn what_a_bundle_mounts_read_only_is_sent_and_again_when_it_has_changed() {
    let oci = sleeper("ship-runc", &["/srv/conf", "/conf", "/srv/motd", "/etc/motd"]);
    read_only(&oci.cluster);
    oci.start(true);
    let seen = oci.inside(Host::A, &["sh", "-c", LOOK]);
    let (code, said) = oci.cluster.refused(Host::A, &PROTECT);
    assert_eq!(code, REFUSED);
    assert!(said.contains("/srv/conf is not there") && said.contains("--ship-image"), "{said}");

    let ship = [PROTECT.as_slice(), &["--ship-image"]].concat();
    let status = oci.cluster.json(Host::A, &ship);
    assert_eq!(status["role"], "primary", "{status:#}");
    // Each time it is protected anew it is what it is by then.
    oci.cluster.standin(Host::A, &["unprotect", "sleeper"]);
    oci.cluster.lab.ok(Host::A, &["sh", "-c", "echo later >> /srv/conf/sub/a"]);
    let later = oci.inside(Host::A, &["sh", "-c", LOOK]);
    assert_ne!(later, seen);
    wait_for("the standby to forget it", || oci.cluster.status(Host::B, "sleeper").is_null());
    oci.cluster.standin(Host::A, &ship);
    oci.cluster.wait_state_of("sleeper", Host::B, "standby", "ready");
    let copies =
        oci.cluster.lab.ok(Host::B, &["sh", "-c", "ls -d /var/lib/standin/workloads/sleeper/paths/lent/*/*"]);
    assert_eq!(copies.lines().count(), 2, "of each the newest: {copies}");
    let history = oci.cluster.json(Host::A, &["history", "sleeper"]);
    let events = history["events"].as_array().unwrap().iter().filter(|event| event["kind"] == "shipped");
    let told: Vec<&str> = events.map(|event| event["detail"].as_str().unwrap()).collect();
    assert_eq!(told.len(), 3, "the file had not changed: {told:?}");

    oci.cluster.lab.kill(Host::A);
    oci.cluster.wait_state_of("sleeper", Host::B, "primary", "alone");
    assert_eq!(oci.inside(Host::B, &["sh", "-c", LOOK]), later);
    assert_eq!(oci.cluster.lab.ok(Host::B, &["sh", "-c", "ls /srv"]).trim(), "", "nothing is put elsewhere");
}

#[test]
fn a_container_that_is_protected_whole_is_restored_with_what_was_sent() {
    let programs = ["tr", "cut"];
    let oci = Oci::unprepared("runc", "sleeper", &programs, &["sleep", "1000"]);
    let mounts = ["/srv/conf", "/conf", "/srv/motd", "/etc/motd"];
    oci.cluster.lab.ok(Host::A, &[&["python3", "-c", MOUNT, "/srv/sleeper"], mounts.as_slice()].concat());
    read_only(&oci.cluster);
    oci.start(true);
    let seen = oci.inside(Host::A, &["sh", "-c", LOOK]);
    oci.protect(&["--ship-image"]);
    assert_eq!(oci.cluster.status(Host::A, "sleeper")["container"]["way"], "whole");
    oci.cluster.wait_state_of("sleeper", Host::B, "standby", "ready");
    oci.cluster.lab.kill(Host::A);
    oci.cluster.wait_state_of("sleeper", Host::B, "primary", "alone");
    assert_eq!(oci.inside(Host::B, &["sh", "-c", LOOK]), seen);
}

/// Begins to protect, and returns when some of it is on its way.
fn begin(oci: &Oci, least_bytes: u64) -> Child {
    let command = [&[STANDIN], PROTECT.as_slice(), &["--ship-image"]].concat();
    let mut begun = oci.cluster.lab.command(Host::A, &command);
    let begun = begun.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("it to be on its way", || sent_bytes(&oci.cluster) > Some(least_bytes));
    begun
}

#[test]
fn what_breaks_off_leaves_nothing_and_can_be_tried_again() {
    let mut oci = sleeper("ship-cut", &["/srv/big", "/big"]);
    let fill = "mkdir /srv/big && head -c 700M /dev/urandom > /srv/big/file";
    oci.cluster.lab.ok(Host::A, &["sh", "-c", fill]);
    oci.start(true);
    let fails = |child: Child| {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(UNREACHABLE), "{said}");
        assert!(said.contains("nothing is protected") && said.contains("try again"), "{said}");
    };
    let untouched = |oci: &Oci| {
        assert_eq!(oci.cluster.status(Host::A, "sleeper"), Value::Null);
        assert_eq!(oci.state(Host::A)["status"], "running");
        wait_for("what had arrived to go", || entries_below(&oci.cluster, Host::B, ARRIVING) == 0);
        assert_eq!(entries_below(&oci.cluster, Host::B, "/var/lib/standin/workloads"), 0);
    };

    // The network.
    let begun = begin(&oci, 1 << 20);
    oci.cluster.lab.cut_between(Host::A, Host::B);
    for flags in [[].as_slice(), &["--ship-image"]] {
        let twice = oci.cluster.refused(Host::A, &[PROTECT.as_slice(), flags].concat()).1;
        assert!(twice.contains("on its way"), "{twice}");
    }
    fails(begun);
    oci.cluster.lab.heal();
    untouched(&oci);

    // The standby's agent: the next one removes what it left.
    let begun = begin(&oci, 1 << 20);
    oci.cluster.end_agent(Host::B, "KILL");
    fails(begun);
    oci.cluster.start_agent(Host::B);
    untouched(&oci);

    // Whoever asked for it.
    let mut begun = begin(&oci, 1 << 20);
    begun.kill().unwrap();
    begun.wait().unwrap();
    wait_for("it to end", || sent_bytes(&oci.cluster).is_none());
    untouched(&oci);

    oci.cluster.standin(Host::A, &[PROTECT.as_slice(), &["--ship-image"]].concat());
    oci.cluster.wait_state_of("sleeper", Host::B, "standby", "ready");
    let sum = |host| oci.inside(host, &["cksum", "/big/file"]);
    let expected = sum(Host::A);
    oci.cluster.json(Host::A, &["handoff", "sleeper", "--max-downtime", "2s"]);
    assert_eq!(sum(Host::B), expected);
}

/// An image of 400 MB; the standby's daemon has its images in a file system of its own.
fn large_image(hint: &str) -> Docker {
    let cluster = Cluster::up(hint);
    let own = "mkdir -p /var/lib/docker && mount -t tmpfs -o size=1400m own /var/lib/docker";
    cluster.lab.ok(Host::B, &["sh", "-c", own]);
    cluster
        .lab
        .ok(Host::A, &["sh", "-c", "mkdir -p /srv/rootfs && head -c 400M /dev/urandom > /srv/rootfs/big"]);
    let docker = Docker::up_in(cluster, &DOCKER);
    docker.run(&[], &["sleep", "1000"]);
    docker
}

#[test]
fn an_image_that_breaks_off_leaves_nothing_in_the_standbys_daemon() {
    let docker = large_image("ship-image-cut");
    let protect = ["protect", "redis", "--docker", "redis", "--to", "b", "--ship-image"];
    let begin = || {
        let mut begun = docker.cluster.lab.command(Host::A, &[&[STANDIN], protect.as_slice()].concat());
        let begun = begun.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("it to be on its way", || sent_bytes(&docker.cluster) > Some(8 << 20));
        begun
    };
    let nothing = || {
        wait_for("it to end", || sent_bytes(&docker.cluster).is_none());
        wait_for("the daemon to drop it", || {
            entries_below(&docker.cluster, Host::B, "/var/lib/docker/tmp") == 0
        });
        assert_eq!(docker.docker(Host::B, &["images", "--all", "--quiet"]), "");
        assert!(docker.cluster.status(Host::A, "redis").is_null());
        assert_eq!(docker.state(Host::A), "running");
    };
    // Whoever asked for it goes away.
    let mut begun = begin();
    begun.kill().unwrap();
    begun.wait().unwrap();
    nothing();

    // The disk fills up in the middle.
    let begun = begin();
    let fill = "dd if=/dev/zero of=/var/lib/docker/full bs=1M 2>/dev/null || true";
    docker.cluster.lab.ok(Host::B, &["sh", "-c", fill]);
    let output = begun.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(REFUSED), "{said}");
    // Whoever notices first.
    let full = ["no room in /var/lib/docker", "no space left on device"].iter().any(|it| said.contains(it));
    assert!(full && said.contains("image lab"), "{said}");
    nothing();
    docker.cluster.lab.ok(Host::B, &["rm", "/var/lib/docker/full"]);

    docker.cluster.standin(Host::A, &protect);
    docker.cluster.wait_state(Host::B, "standby", "ready");
}

#[test]
fn an_image_for_which_the_standby_has_no_room_is_refused_before_it_is_sent() {
    let cluster = Cluster::up("ship-full");
    let small = "mkdir -p /var/lib/docker && mount -t tmpfs -o size=80m small /var/lib/docker";
    cluster.lab.ok(Host::B, &["sh", "-c", small]);
    let docker = Docker::up_in(cluster, &DOCKER);
    docker.run(&[], &["sleep", "1000"]);
    let protect = ["protect", "redis", "--docker", "redis", "--to", "b", "--ship-image"];
    let (code, said) = docker.cluster.refused(Host::A, &protect);
    assert_eq!(code, REFUSED);
    assert!(said.contains("no room in /var/lib/docker") && said.contains("image lab"), "{said}");
    assert_eq!(docker.state(Host::A), "running");
    assert_eq!(docker.docker(Host::B, &["images", "--all", "--quiet"]), "");
    assert!(docker.cluster.status(Host::A, "redis").is_null());
}

#[test]
fn what_cannot_be_sent_is_refused_with_the_reason() {
    let oci = sleeper("ship-refused", &["/srv/conf", "/conf"]);
    read_only(&oci.cluster);
    oci.start(true);
    let ship = [PROTECT.as_slice(), &["--ship-image"]].concat();

    oci.cluster.standin(Host::A, &["run", "sandboxed", "--", "sleep", "1000"]);
    let (code, said) = oci.cluster.refused(Host::A, &["protect", "sandboxed", "--to", "b", "--ship-image"]);
    assert!(code == 2 && said.contains("for containers"), "{said}");
    let nobody = [&ship[..4], &["--to", "nobody", "--ship-image"]].concat();
    let (code, said) = oci.cluster.refused(Host::A, &nobody);
    assert!(code == 3 && said.contains("nobody"), "{said}");

    // The name is somebody else's there.
    oci.cluster.standin(Host::B, &["run", "sleeper", "--", "sleep", "1000"]);
    let (code, said) = oci.cluster.refused(Host::A, &ship);
    assert!(code == REFUSED && said.contains("a workload named sleeper is there"), "{said}");
    oci.cluster.standin(Host::B, &["remove", "sleeper"]);
    assert_eq!(entries_below(&oci.cluster, Host::B, ARRIVING), 0);
    oci.cluster.standin(Host::A, &ship);
}
