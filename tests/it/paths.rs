//! Declared paths: the files of a restored workload are those of the same instant as its memory.

use std::time::{Duration, Instant};

use super::{
    cluster::{Cluster, wait_for},
    lab::Host,
    redis::{VIP, rolled_back},
    turns::survives,
};

/// Changes files in every way and keeps in memory what they must be.
const SCRIBE: &str = include_str!("scribe.py");
/// Where a host keeps the files of the first declared path.
pub(crate) const REDIS_FILES: &str = "/var/lib/standin/workloads/redis/paths/0";

/// redis' digest of its memory, and that of a second redis which has read its files.
pub(crate) fn digests(cluster: &Cluster, host: Host) -> (String, String) {
    digests_in(cluster, host, REDIS_FILES)
}

/// The same, its files being there.
pub(crate) fn digests_in(cluster: &Cluster, host: Host, dir: &str) -> (String, String) {
    let memory = cluster.ask_redis(&["DEBUG", "DIGEST"]);
    let script = format!(
        "set -e; rm -rf /tmp/copy; cp -a {dir} /tmp/copy; cd /tmp/copy; \
         redis-check-aof appendonlydir/appendonly.aof.manifest >&2; \
         redis-server --port 0 --unixsocket /tmp/copy/socket --dir /tmp/copy --appendonly yes --save '' \
           --enable-debug-command yes >/dev/null & pid=$!; \
         n=0; until redis-cli -s /tmp/copy/socket ping 2>/dev/null | grep -q PONG; do \
           n=$((n+1)); [ $n -lt 300 ]; sleep 0.1; done; \
         redis-cli -s /tmp/copy/socket debug digest; kill $pid; wait $pid || true"
    );
    let files = cluster.lab.ok(host, &["sh", "-c", &script]);
    (memory, files.trim().to_owned())
}

pub(crate) fn rewrite_log(cluster: &Cluster, from: Host) {
    let client = |words: &[&str]| {
        let mut command = vec!["redis-cli", "-h", VIP];
        command.extend(words);
        String::from_utf8_lossy(&cluster.lab.on(from, &command).stdout).into_owned()
    };
    client(&["bgrewriteaof"]);
    wait_for("redis to have rewritten its log", || {
        let info = client(&["info", "persistence"]);
        info.contains("aof_rewrite_in_progress:0") && info.contains("aof_rewrite_scheduled:0")
    });
}

#[test]
fn the_append_only_file_of_a_redis_goes_with_its_memory() {
    let mut cluster = Cluster::up("aof");
    cluster.run_redis_with(&["--path", "/srv/redis"], &["--appendonly", "yes", "--dir", "/srv/redis"]);
    // What `debug populate` makes is in no log before that.
    rewrite_log(&cluster, Host::A);
    cluster.protect();
    cluster.wait_state(Host::A, "primary", "protected");
    let counter = cluster.count();
    rewrite_log(&cluster, Host::Client);
    std::thread::sleep(Duration::from_millis(700));
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    std::thread::sleep(Duration::from_millis(500));
    let acks = counter.stop();
    assert!(acks.len() > 100, "{} increments were acknowledged", acks.len());
    let (memory, files) = digests(&cluster, Host::B);
    assert_eq!(memory, files);

    cluster.lab.boot(Host::A);
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "standby", "ready");
    cluster.wait_state(Host::B, "primary", "protected");
    let counter = cluster.count();
    std::thread::sleep(Duration::from_millis(300));
    cluster.json(Host::B, &["handoff", "redis"]);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(rolled_back(&counter.stop()), 0);
    cluster.wait_state(Host::A, "primary", "protected");
    let (memory, files) = digests(&cluster, Host::A);
    assert_eq!(memory, files);
}

#[test]
fn what_a_process_believes_of_its_files_is_so_after_every_takeover() {
    survives("scribe", &["--path", "/srv/scribe", "--", "/usr/bin/python3", "-c", SCRIBE, "/srv/scribe"]);
}

/// What was shipped for the epochs that began after `work` did, once there are some. An epoch that fails in between is none of
/// its matter, and all is sent anew after it: then it is tried again.
fn shipped_during(cluster: &Cluster, count: u64, work: impl Fn()) -> Vec<u64> {
    loop {
        if let Some(shipped) = shipped_once(cluster, count, &work) {
            return shipped;
        }
    }
}

fn shipped_once(cluster: &Cluster, count: u64, work: impl Fn()) -> Option<Vec<u64>> {
    let newest = || cluster.status(Host::A, "idle")["epoch"]["epoch"].as_u64().expect("an epoch");
    // One may be under way.
    let first = newest() + 2;
    wait_for("an epoch", || newest() >= first);
    work();
    let until = newest() + count;
    wait_for("more epochs", || newest() >= until);
    let history = cluster.json(Host::A, &["history", "idle"]);
    let epochs = history["epochs"].as_array().expect("epochs").iter();
    let recent: Vec<_> = epochs.filter(|figures| figures["id"]["epoch"].as_u64() >= Some(first)).collect();
    let shipped = recent.iter().map(|figures| figures["shipped_bytes"].as_u64().expect("a size")).collect();
    (!recent.iter().any(|figures| figures["full"] == true)).then_some(shipped)
}

#[test]
fn only_what_changed_in_a_directory_is_sent() {
    const MIB: u64 = 1 << 20;
    const PLACE: &str = "/var/lib/standin/workloads/idle/paths/0";
    let cluster = Cluster::up("idle");
    let path = "/srv/idle";
    let fill = format!("mkdir {path} && head -c 32M /dev/urandom > {path}/big && ln {path}/big {path}/other");
    cluster.lab.ok(Host::A, &["sh", "-c", &fill]);
    let began = Instant::now();
    cluster.standin(Host::A, &["run", "idle", "--path", path, "--", "sleep", "1000"]);
    cluster.standin(Host::A, &["protect", "idle", "--to", "b", "--every", "100ms"]);
    cluster.wait_state_of("idle", Host::A, "primary", "protected");
    eprintln!("32 MiB seeded and protected after {:?}", began.elapsed());
    let sum = |host: Host, dir: &str| {
        cluster.lab.ok(host, &["sh", "-c", &format!("cd {dir} && find -type f | sort | xargs md5sum")])
    };
    // An epoch's files are held when it is acknowledged, and applied soon after.
    wait_for("the declared directory's files to come along", || sum(Host::B, PLACE) == sum(Host::A, path));

    let still = shipped_during(&cluster, 5, || {});
    eprintln!("shipped with nothing changed: {still:?}");
    assert!(still.iter().all(|bytes| *bytes < MIB / 4), "{still:?}");

    // One block of the big file, by a process in the sandbox.
    let pid = cluster.status(Host::A, "idle")["pid"].to_string();
    let write =
        format!("dd if=/dev/urandom of=/proc/{pid}/root{path}/big bs=4096 count=1 seek=999 conv=notrunc");
    let changed = shipped_during(&cluster, 5, || {
        cluster.lab.ok(Host::A, &["sh", "-c", &write]);
    });
    eprintln!("shipped around one changed block: {changed:?}");
    assert!(changed.iter().all(|bytes| *bytes < MIB / 2), "{changed:?}");
    assert!(changed.iter().any(|bytes| *bytes > 4096 + still.iter().max().unwrap()), "{changed:?}");
    wait_for("the epoch's files to be applied", || sum(Host::A, PLACE) == sum(Host::B, PLACE));
    assert_ne!(sum(Host::A, PLACE), sum(Host::A, path), "the declared directory itself is left alone");
}
