//! What happens to protected containers: kills for want of memory, disks that are full, files that turn into others, mounts
//! that are shared. The container is unharmed, the standby keeps a whole epoch, and it is told.

use std::{path::Path, time::Duration};

use super::{
    cluster::{Cluster, wait_for},
    containers::Oci,
    docker::{DOCKER, Docker},
    handoff::NO_ROOM,
    lab::{Host, STANDIN},
};

/// Where the standby keeps a container's files.
const WORKLOADS: &str = "/var/lib/standin/workloads";

const COUNTS: &str =
    "i=0; while :; do i=$((i+1)); echo line $i > /dev/shm/line; echo line $i; sleep 0.05; done";

impl Oci {
    /// Changes its `config.json` on A, which is `config` to these lines of python, before it is started.
    pub(crate) fn configure(&self, lines: &str) {
        let path = format!("/srv/{}/config.json", self.name());
        let script = format!(
            "import json\npath = '{path}'\nconfig = json.load(open(path))\n{lines}\njson.dump(config, open(path, 'w'))"
        );
        self.cluster.lab.ok(Host::A, &["python3", "-c", &script]);
    }

    fn standby_epoch(&self) -> Option<u64> {
        self.cluster.status(Host::B, self.name())["epoch"]["epoch"].as_u64()
    }

    fn error(&self) -> String {
        let status = self.cluster.status(Host::A, self.name());
        status["error"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits until all that is in its files now is in an epoch that the standby holds.
    fn await_epoch(&self) {
        await_epoch(&self.cluster, Host::A, self.name());
    }

    /// The container runs: it goes on counting.
    fn assert_counts(&self, host: Host) {
        let count = || self.inside(host, &["cat", "/dev/shm/line"]);
        let before = count();
        wait_for("it to count", || count() != before);
    }

    fn kinds(&self, host: Host) -> Vec<String> {
        kinds(&self.cluster, host, self.name())
    }
}

fn kinds(cluster: &Cluster, host: Host, name: &str) -> Vec<String> {
    let history = cluster.json(host, &["history", name]);
    let events = history["events"].as_array().expect("events").clone();
    events.iter().map(|event| event["kind"].as_str().expect("a kind").to_owned()).collect()
}

fn await_epoch(cluster: &Cluster, primary: Host, name: &str) {
    let epoch = || cluster.status(primary, name)["epoch"]["epoch"].as_u64();
    let now = epoch();
    // One may be under way.
    wait_for("an epoch that has it all", || epoch() > now.map(|now| now + 1));
}

fn hand_off(cluster: &Cluster, from: Host, name: &str) {
    cluster.json(from, &["handoff", name, "--max-downtime", "2s"]);
}

const MIB: u64 = 1 << 20;

/// Takes more and more memory when it is told to: by a process of it, or itself.
const GROWS: &str = "while :; do
    if [ -e /grow ]; then rm /grow; (x=0123456789abcdef; while :; do x=$x$x; done); echo $? > /grown; fi
    if [ -e /grow-itself ]; then x=0123456789abcdef; while :; do x=$x$x; done; fi
    sleep 0.05
done";

#[test]
fn what_is_killed_for_want_of_memory_is_told_and_protection_goes_on_with_the_rest() {
    let cluster = Cluster::hybrid("oom");
    let oci = Oci::prepare_in(cluster, "runc", "grows", &[], &["sh", "-c", GROWS]);
    let limit = 32 * MIB;
    oci.configure(&format!(
        "config['linux']['resources'] = {{'memory': {{'limit': {limit}, 'swap': {limit}}}}}"
    ));
    oci.start(true);
    oci.protect(&[]);
    oci.cluster.wait_state_of("grows", Host::B, "standby", "ready");

    // A process of it: the rest goes on, protected.
    oci.inside(Host::A, &["touch", "/grow"]);
    let grown = || oci.inside(Host::A, &["sh", "-c", "cat /grown 2>/dev/null || true"]);
    wait_for("the kill", || !grown().is_empty());
    assert_eq!(grown(), "137");
    wait_for("it to be told", || oci.kinds(Host::A).contains(&"oom-kill".to_owned()));
    assert_eq!(oci.cluster.status(Host::A, "grows")["container"]["oom_kills"], 1);
    oci.await_epoch();
    oci.cluster.wait_state_of("grows", Host::A, "primary", "protected");
    hand_off(&oci.cluster, Host::A, "grows");
    assert_eq!(oci.inside(Host::B, &["cat", "/grown"]), "137");

    // All of it: that is its end and not its host's, so nobody revives it, and its runtime knows how it ended.
    oci.cluster.wait_state_of("grows", Host::B, "primary", "protected");
    let read = "cat /sys/fs/cgroup/memory/grows/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/grows/memory.max";
    let limit = oci.cluster.lab.ok(Host::B, &["sh", "-c", read]);
    assert_eq!(limit.trim(), (32 * MIB).to_string());
    oci.inside(Host::B, &["touch", "/grow-itself"]);
    wait_for("its end", || oci.state(Host::B)["status"] != "running");
    wait_for("the end of its protection", || oci.cluster.status(Host::B, "grows").is_null());
    wait_for("the standby to forget it", || oci.state(Host::A).is_null());
    for (host, kinds) in [(Host::B, ["workload-ended", "oom-kill"].as_slice()), (Host::A, &["forgotten"])] {
        // For a moment it is neither known nor forgotten.
        wait_for("its end to be told", || {
            let told = oci.cluster.lab.on(host, &[super::lab::STANDIN, "history", "grows", "--json"]);
            let told = String::from_utf8_lossy(&told.stdout).into_owned();
            kinds.iter().all(|kind| told.contains(kind))
        });
    }
}

/// A protected container whose standby keeps files on a small disk of their own.
fn with_small_disk(hint: &str) -> Oci {
    let cluster = Cluster::up(hint);
    // What the standby keeps files on is small, and none of the container's own file systems.
    cluster.lab.ok(
        Host::B,
        &["sh", "-c", &format!("mkdir -p {WORKLOADS} && mount -t tmpfs -o size=48m tmpfs {WORKLOADS}")],
    );
    let oci = Oci::prepare_in(cluster, "runc", "counts", &["md5sum"], &["sh", "-c", COUNTS]);
    oci.start(true);
    oci.protect(&[]);
    oci.cluster.wait_state_of("counts", Host::B, "standby", "ready");
    oci
}

/// Leaves that disk no room.
fn fill_disk(oci: &Oci) {
    let ballast = format!("{WORKLOADS}/ballast");
    let fill = format!("dd if=/dev/zero of={ballast} bs=64k 2>/dev/null; truncate -s -1M {ballast}");
    oci.cluster.lab.ok(Host::B, &["sh", "-c", &fill]);
}

fn empty_disk(oci: &Oci) {
    oci.cluster.lab.ok(Host::B, &["rm", &format!("{WORKLOADS}/ballast")]);
}

#[test]
fn a_standby_without_room_for_a_containers_files_keeps_its_epoch_and_goes_on_later() {
    let oci = with_small_disk("no-room-files");
    let write = |file: &str| {
        oci.inside(Host::A, &["dd", "if=/dev/urandom", &format!("of={file}"), "bs=1M", "count=8"]);
    };
    let refused = |what: &str| {
        wait_for(what, || {
            let error = oci.error();
            error.contains("space") || error.contains("room")
        });
        oci.cluster.wait_state_of("counts", Host::A, "primary", "lagging");
        let kept = oci.standby_epoch();
        assert!(kept.is_some());
        oci.assert_counts(Host::A);
        assert_eq!(oci.standby_epoch(), kept, "no epoch is taken that could not be kept whole");
    };
    let goes_on = || {
        oci.cluster.wait_state_of("counts", Host::A, "primary", "protected");
        assert_eq!(oci.error(), "");
        oci.await_epoch();
    };

    // The disk is full when the epoch's files are brought to it.
    fill_disk(&oci);
    write("/data/applied");
    refused("the epoch after it to be refused");
    empty_disk(&oci);
    goes_on();

    // The memory that the store is in is full when the epoch is half received.
    oci.cluster.lab.ok(Host::B, &["sh", "-c", NO_ROOM]);
    write("/etc/received");
    refused("the epoch to be refused");
    oci.cluster.lab.ok(Host::B, &["mount", "-o", "remount,size=50%", "/dev/shm"]);
    goes_on();

    let sums = |host| oci.inside(host, &["md5sum", "/data/applied", "/etc/received"]);
    let before = sums(Host::A);
    hand_off(&oci.cluster, Host::A, "counts");
    assert_eq!(sums(Host::B), before);
    oci.assert_counts(Host::B);
}

/// The host dies while the standby's disk is full: what the standby has is an epoch all the same, and lives once there is room.
#[test]
fn a_standby_without_room_promotes_when_it_has_some() {
    let oci = with_small_disk("no-room-promote");
    fill_disk(&oci);
    oci.inside(Host::A, &["dd", "if=/dev/urandom", "of=/data/applied", "bs=1M", "count=8"]);
    wait_for("the epoch after it to be refused", || oci.error().contains("space"));
    oci.cluster.lab.kill(Host::A);
    oci.cluster.wait_state_of("counts", Host::B, "standby", "promoting");
    let status = oci.cluster.status(Host::B, "counts");
    assert!(status["error"].as_str().is_some_and(|error| error.contains("space")), "{status:#}");
    empty_disk(&oci);
    oci.cluster.wait_state_of("counts", Host::B, "primary", "alone");
    oci.assert_counts(Host::B);
    // As far as it was written at the epoch that did not fit.
    oci.inside(Host::B, &["sh", "-c", "[ -s /data/applied ]"]);
}

/// Makes `DIR/FROM-TO` of each kind, and then of each other; the third step says what they are.
const TURN: &str = r#"
make() {
    case $1 in
    file) echo "$3" > "$2" ;;
    dir) mkdir "$2"; echo "$3" > "$2/in" ;;
    link) ln -s "to-$3" "$2" ;;
    fifo) mkfifo "$2" ;;
    esac
}
for from in file dir link fifo; do
    for to in file dir link fifo; do
        path=$2/$from-$to
        case $1 in
        first) make $from "$path" first ;;
        then) rm -r "$path"; make $to "$path" then ;;
        tell) stat -c '%F %n %N' "$path"; cat "$path/in" 2>/dev/null; [ ! -f "$path" ] || cat "$path" ;;
        esac
    done
done
true
"#;

/// In their root, in what they mount and in their memory.
const PLACES: [&str; 3] = ["/etc", "/data", "/dev/shm"];

fn files_turn(cluster: &Cluster, name: &'static str, inside: &dyn Fn(Host, &[&str]) -> String) {
    let turn =
        |host, step: &str| PLACES.map(|place| inside(host, &["sh", "-c", TURN, "sh", step, place])).concat();
    let mut at = (Host::A, Host::B);
    for round in 0..2 {
        let (primary, standby) = at;
        cluster.wait_state_of(name, primary, "primary", "protected");
        if round == 0 {
            turn(primary, "first");
            await_epoch(cluster, primary, name);
        }
        turn(primary, "then");
        let before = turn(primary, "tell");
        assert_eq!(before.lines().filter(|line| line.contains("-fifo")).count(), 12, "{before}");
        await_epoch(cluster, primary, name);
        hand_off(cluster, primary, name);
        assert_eq!(turn(standby, "tell"), before);
        at = (standby, primary);
    }
}

#[test]
fn a_file_of_a_runc_container_may_become_a_directory_and_anything_else() {
    let cluster = Cluster::up("turns-runc");
    let oci = Oci::prepare_in(cluster, "runc", "counts", &["mkfifo", "stat"], &["sh", "-c", COUNTS]);
    oci.start(true);
    oci.protect(&[]);
    files_turn(&oci.cluster, "counts", &|host, command| oci.inside(host, command));
    oci.assert_counts(Host::A);
}

#[test]
fn what_another_runc_container_mounts_is_refused() {
    let cluster = Cluster::up("shared-runc");
    let oci = Oci::prepare_in(cluster, "runc", "counts", &[], &["sh", "-c", COUNTS]);
    oci.start(true);
    let share = |id: &str, of: &str| {
        format!(
            "mkdir -p /srv/{id}; cp -a /srv/counts/rootfs /srv/{id}/; cd /srv/{id}; \
             python3 -c 'import json; c = json.load(open(\"/srv/counts/config.json\")); c[\"process\"][\"args\"] = [\"sleep\", \"1000\"]; \
                         c[\"mounts\"] = [m for m in c[\"mounts\"] if m[\"destination\"] not in (\"/.standin\", \"/data\")]; \
                         {of}; json.dump(c, open(\"config.json\", \"w\"))'; \
             runc run -d {id} < /dev/null > /dev/null 2>&1"
        )
    };
    let data = "c[\"mounts\"].append({\"destination\": \"/x\", \"type\": \"bind\", \"source\": \"/srv/counts/data\", \
                \"options\": [\"bind\"]})";
    let root = "c[\"root\"][\"path\"] = \"/srv/counts/rootfs\"";
    for (id, of, what) in [("volume", data, "/srv/counts/data"), ("root", root, "/srv/counts/rootfs")] {
        oci.cluster.lab.ok(Host::A, &["sh", "-c", &share(id, of)]);
        let (code, text) =
            oci.cluster.refused(Host::A, &["protect", "counts", "--oci", "counts", "--to", "b"]);
        assert_eq!(code, 4, "{text}");
        assert!(text.contains(what) && text.contains("sleep") && text.contains("stop that one"), "{text}");
        oci.assert_counts(Host::A);
        assert!(oci.cluster.status(Host::B, "counts").is_null());
        oci.cluster.lab.ok(Host::A, &["runc", "delete", "--force", id]);
    }
    oci.protect(&[]);
}

/// What is on storage that both hosts have, and what each has of its own, is left where it is.
#[test]
fn mounts_are_replicated_or_shared_or_ignored_as_the_operator_says() {
    // The hosts of a lab both see the directory of the tests' program.
    let storage = tempfile::tempdir_in(Path::new(STANDIN).parent().unwrap()).unwrap();
    let oci = Oci::prepare_in(Cluster::up("mount-modes"), "runc", "counts", &[], &["sh", "-c", COUNTS]);
    let mount = format!(
        "mkdir -p /srv/nfs && mount --bind {} /srv/nfs && mount -o remount,bind,rw /srv/nfs",
        storage.path().display()
    );
    for host in [Host::A, Host::B] {
        oci.cluster.lab.ok(host, &["sh", "-c", &mount]);
    }
    oci.cluster.lab.ok(Host::A, &["mkdir", "-p", "/srv/cache"]);
    oci.configure(
        "for name in ('nfs', 'cache'):\n  config['mounts'].append({'destination': '/' + name, 'type': 'bind', \
         'source': '/srv/' + name, 'options': ['bind', 'rw']})",
    );
    oci.start(true);
    let refused = |rule: &str| {
        let args = ["protect", "counts", "--oci", "counts", "--to", "b", "--mount", rule];
        oci.cluster.refused(Host::A, &args).1
    };
    let none = refused("/dat=ignore");
    assert!(none.contains("/dat is no mount") && none.contains("/data, /nfs, /cache"), "{none}");
    assert!(refused("/data=lost").contains("replicate|shared|ignore"));
    oci.protect(&["--mount", "/nfs=shared", "--mount", "/cache=ignore"]);
    let mounts = oci.cluster.status(Host::A, "counts")["container"]["mounts"].clone();
    let modes = ["/data", "/nfs", "/cache"].into_iter().zip(["replicate", "shared", "ignore"]);
    let wanted: Vec<_> =
        modes.map(|(inside, mode)| serde_json::json!({"inside": inside, "mode": mode})).collect();
    assert_eq!(mounts, serde_json::Value::Array(wanted));

    let write = |host, word: &str| {
        let script = format!("for dir in data nfs cache; do echo {word} > /$dir/word; done");
        oci.inside(host, &["sh", "-c", &script]);
    };
    let read = |host| {
        let script = "for dir in data nfs cache; do cat /$dir/word 2>/dev/null || echo none; done";
        oci.inside(host, &["sh", "-c", script]).split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    write(Host::A, "first");
    oci.await_epoch();
    hand_off(&oci.cluster, Host::A, "counts");
    assert_eq!(read(Host::B), ["first", "first", "none"]);
    assert_eq!(std::fs::read_to_string(storage.path().join("word")).unwrap().trim(), "first");
    write(Host::B, "second");
    oci.cluster.wait_state_of("counts", Host::B, "primary", "protected");
    hand_off(&oci.cluster, Host::B, "counts");
    assert_eq!(read(Host::A), ["second", "second", "first"]);
    oci.assert_counts(Host::A);
}

#[test]
fn a_containers_root_may_be_on_any_file_system() {
    let cluster = Cluster::up("other-fs");
    // The bundle's, its data's and the standby's: none is the state directory's.
    let mounts = |host, dirs: &[&str]| {
        for dir in dirs {
            let mount = format!("mkdir -p {dir} && mount -t tmpfs -o size=256m tmpfs {dir}");
            cluster.lab.ok(host, &["sh", "-c", &mount]);
        }
    };
    mounts(Host::A, &["/srv/counts", "/srv/counts/data"]);
    mounts(Host::B, &[WORKLOADS]);
    let oci = Oci::prepare_in(cluster, "runc", "counts", &["stat"], &["sh", "-c", COUNTS]);
    oci.start(true);
    oci.protect(&[]);
    let mut at = (Host::A, Host::B);
    for round in 0..3 {
        let (primary, standby) = at;
        oci.cluster.wait_state_of("counts", primary, "primary", "protected");
        let write = format!(
            "echo {round} > /etc/round; echo {round} > /data/round; ln -f /etc/round /etc/also; rm -f /etc/moved; mv /etc/also /etc/moved"
        );
        oci.inside(primary, &["sh", "-c", &write]);
        hand_off(&oci.cluster, primary, "counts");
        for file in ["/etc/round", "/etc/moved", "/data/round"] {
            assert_eq!(oci.inside(standby, &["cat", file]), round.to_string(), "{file}");
        }
        assert_eq!(oci.inside(standby, &["stat", "-c", "%h", "/etc/moved"]), "2");
        oci.assert_counts(standby);
        at = (standby, primary);
    }
}

/// Of docker: its volumes, directories of the host, and an overlay whose files turn into others.
#[test]
fn files_of_docker_containers_are_theirs_alone_and_may_become_anything() {
    let docker = Docker::up("faults-docker", &DOCKER);
    docker.add_programs(&["mkfifo", "stat"]);
    docker.ship_image();
    docker.docker(Host::A, &["volume", "create", "data"]);
    docker.run(&["-v", "data:/data", "-v", "/srv/shared:/shared"], &["sh", "-c", COUNTS]);
    let shared =
        [("data:/mine", ["its volume data", "other"]), ("/srv/shared:/mine", ["/srv/shared", "sleep"])];
    for (mount, [what, whose]) in shared {
        docker.docker(
            Host::A,
            &["run", "-d", "--name", "other", "-v", mount, "--entrypoint", "sleep", "lab", "1000"],
        );
        let (code, text) =
            docker.cluster.refused(Host::A, &["protect", "redis", "--docker", "redis", "--to", "b"]);
        assert_eq!(code, 4, "{text}");
        assert!(text.contains(what) && text.contains(whose) && text.contains("stop that one"), "{text}");
        assert_eq!(docker.state(Host::A), "running");
        docker.docker(Host::A, &["rm", "-f", "other"]);
    }
    docker.protect(&[]);
    files_turn(&docker.cluster, "redis", &|host, command| {
        docker.docker(host, &[&["exec", "redis"], command].concat())
    });
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(docker.state(Host::A), "running");
}
