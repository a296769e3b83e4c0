//! A host that comes back, or an agent that was started anew: what is there already is not sent again.

use std::time::Duration;

use serde_json::Value;

use super::{
    cluster::Cluster,
    lab::Host,
    paths::{REDIS_FILES, digests, rewrite_log},
};

/// The epochs of the agent's life at a host that looked at all memory, oldest first.
fn full_epochs(cluster: &Cluster, host: Host) -> Vec<Value> {
    let history = cluster.json(host, &["history", "redis"]);
    let epochs = history["epochs"].as_array().expect("epochs").clone();
    epochs.into_iter().filter(|epoch| epoch["full"] == true).collect()
}

fn bytes(epoch: &Value, key: &str) -> u64 {
    epoch["resync"][key].as_u64().unwrap_or_else(|| panic!("{key} of {epoch:#}"))
}

/// The one full epoch at a host was a resync that took far less than a full copy did.
fn assert_resynced(cluster: &Cluster, host: Host, copied: &Value) {
    let all = full_epochs(cluster, host);
    let [epoch] = all.as_slice() else { panic!("{all:#?}") };
    let (resync, full) = (bytes(epoch, "resync_bytes"), bytes(epoch, "full_bytes"));
    let (copy, memory) =
        (copied["shipped_bytes"].as_u64().unwrap(), epoch["resident_bytes"].as_u64().unwrap());
    println!(
        "resync {resync} bytes, of a full copy {full} (the first one took {copy}, packed); memory {memory} bytes"
    );
    assert!(resync < copy / 4, "{resync} bytes where a full copy took {copy}");
    assert!(resync < full / 8, "{resync} bytes where a full copy has {full}");
    assert!(full <= memory + resync, "{full} bytes of {memory}");
    assert_eq!(cluster.history(host).iter().filter(|kind| *kind == "resynced").count(), 1);
}

/// Keys that do not pack well, so that a full copy is one.
fn fill(cluster: &Cluster) {
    let script = "local s = 12345; for i = 1, 3000 do local t = {}; for j = 1, 500 do \
                  s = (s * 1103515245 + 12345) % 2147483648; t[j] = string.format('%08x', s) end; \
                  redis.call('SET', 'x' .. i, table.concat(t)) end; return 'OK'";
    assert_eq!(
        cluster.lab.ok(Host::Client, &["redis-cli", "-h", super::redis::VIP, "EVAL", script, "0"]).trim(),
        "OK"
    );
}

/// Waits until the standby holds all that was written so far.
fn settle(cluster: &Cluster) {
    std::thread::sleep(Duration::from_secs(1));
    for host in [Host::A, Host::B] {
        assert!(cluster.status(host, "redis")["error"].is_null(), "{:#}", cluster.status(host, "redis"));
    }
}

#[test]
fn an_agent_that_was_started_anew_sends_what_its_standby_lacks() {
    let mut cluster = Cluster::up("rejoin-agent");
    cluster.protect_redis();
    fill(&cluster);
    let copied = full_epochs(&cluster, Host::A).remove(0);
    assert!(copied["resync"].is_null());
    cluster.end_agent(Host::A, "TERM");
    cluster.ask_redis(&["SET", "while", "away"]);
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "primary", "protected");
    // The first copy was of a smaller memory.
    let all = full_epochs(&cluster, Host::A);
    let (resync, full) = (bytes(&all[0], "resync_bytes"), bytes(&all[0], "full_bytes"));
    println!("resync {resync} bytes, of a full copy {full}");
    assert!(all.len() == 1 && resync < full / 8, "{all:#?}");
    let digest = cluster.digest();
    settle(&cluster);
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.digest(), digest);
    assert_eq!(cluster.ask_redis(&["GET", "while"]), "away");
    cluster.assert_first_try(Host::B);
}

#[test]
fn a_host_that_returns_with_an_old_image_is_sent_what_has_changed_since() {
    let mut cluster = Cluster::with("rejoin-disk", &["--store", "disk"]);
    cluster.protect_redis();
    fill(&cluster);
    settle(&cluster);
    let digest = cluster.digest();
    settle(&cluster);
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    cluster.lab.boot(Host::A);
    cluster.start_agent(Host::A);
    // It was never a standby: it has no image, and gets a copy.
    cluster.wait_state(Host::B, "primary", "protected");
    let copied = full_epochs(&cluster, Host::B).remove(0);
    assert!(copied["resync"].is_null(), "{copied:#}");
    assert_eq!(cluster.digest(), digest);
    settle(&cluster);

    // B has that from which it took over.
    cluster.lab.kill(Host::B);
    cluster.wait_state(Host::A, "primary", "alone");
    assert_eq!(cluster.digest(), digest);
    cluster.ask_redis(&["SET", "while", "away"]);
    let digest = cluster.ask_redis(&["DEBUG", "DIGEST"]);
    cluster.lab.boot(Host::B);
    cluster.start_agent(Host::B);
    cluster.wait_state(Host::A, "primary", "protected");
    assert_eq!(cluster.status(Host::B, "redis")["role"], "standby");
    assert_eq!(cluster.running_copies(Host::B), 0, "the old copy is never revived");
    assert_resynced(&cluster, Host::A, &copied);
    settle(&cluster);

    // What it holds now is as good as a copy.
    cluster.standin(Host::B, &["verify", "redis"]);
    cluster.assert_first_try(Host::A);
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.ask_redis(&["DEBUG", "DIGEST"]), digest);
    assert_eq!(cluster.ask_redis(&["GET", "while"]), "away");
    cluster.assert_first_try(Host::B);
}

#[test]
fn only_a_copy_that_runs_elsewhere_makes_way() {
    const REFUSED: i32 = 4;
    let cluster = Cluster::with("rejoin-verb", &["--on-standby-loss", "continue"]);
    cluster.protect_redis();
    settle(&cluster);
    let rejoin = ["rejoin", "redis", "--yes"];
    let (code, said) = cluster.refused(Host::A, &rejoin);
    assert!(code == REFUSED && said.contains("runs here"), "{said}");
    assert_eq!(cluster.json(Host::B, &rejoin)["role"], "standby", "which it is already");

    // Frozen, and the standby does not run it: these are the only processes of it.
    cluster.standin(Host::A, &["fence", "redis"]);
    let (_, said) = cluster.refused(Host::A, &["rejoin", "redis"]);
    assert!(said.contains("add --yes"), "{said}");
    let (code, said) = cluster.refused(Host::A, &rejoin);
    assert!(
        code == REFUSED && said.contains("is its standby") && said.contains("nothing of redis was dropped"),
        "{said}"
    );
    cluster.lab.cut_between(Host::A, Host::B);
    let (code, said) = cluster.refused(Host::A, &rejoin);
    assert!(code == REFUSED && said.contains("nothing of redis was dropped"), "{said}");
    assert_eq!(cluster.status(Host::A, "redis")["role"], "fenced");

    cluster.standin(Host::B, &["failover", "redis", "--force", "--yes"]);
    cluster.wait_state(Host::B, "primary", "alone");
    cluster.lab.heal();
    let status = cluster.json(Host::A, &rejoin);
    assert!(status["role"] == "standby" && status["term"] == 2, "{status:#}");
    cluster.wait_state(Host::B, "primary", "protected");
    assert_eq!(cluster.running_copies(Host::A), 0);
}

/// B runs a redis with 32 MiB of files, since the host A has lost its power.
fn with_files(hint: &str) -> Cluster {
    let cluster = Cluster::up(hint);
    let fill = "mkdir /srv/redis && head -c 32M /dev/urandom > /srv/redis/big";
    cluster.lab.ok(Host::A, &["sh", "-c", fill]);
    cluster.run_redis_with(&["--path", "/srv/redis"], &["--appendonly", "yes", "--dir", "/srv/redis"]);
    rewrite_log(&cluster, Host::A);
    cluster.protect();
    cluster.wait_state(Host::A, "primary", "protected");
    settle(&cluster);
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    cluster
}

#[test]
fn blocks_that_change_after_they_were_told_are_noticed_and_everything_is_sent() {
    let mut cluster = with_files("rejoin-wrong");
    cluster.lab.boot(Host::A);
    // Somebody writes into the copy all the time: what it tells is not so any more when it is counted on.
    let write = format!(
        "i=0; while :; do i=$((i+1)); echo $i | dd of={REDIS_FILES}/big bs=65536 seek=$((i%512)) conv=notrunc status=none; done"
    );
    let mut writer = cluster.lab.spawn(Host::A, &["sh", "-c", &write]);
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::B, "primary", "protected");
    writer.kill().expect("it runs");
    writer.wait().expect("it can be waited for");
    let history = cluster.json(Host::B, &["history", "redis"]);
    let failed =
        history["events"].as_array().expect("events").iter().filter(|event| event["kind"] == "epoch-failed");
    let details: Vec<_> = failed.map(|event| event["detail"].as_str().expect("a text")).collect();
    assert!(details.iter().any(|detail| detail.contains("is not here any more")), "{details:?}");
    let copied = full_epochs(&cluster, Host::B).remove(0);
    assert!(copied["resync"].is_null() && copied["shipped_bytes"].as_u64() > Some(32 << 20), "{copied:#}");
}

#[test]
fn files_that_a_crashed_host_still_has_are_not_sent_again() {
    const FILES: u64 = 32 << 20;
    let mut cluster = with_files("rejoin-files");
    let sum = |cluster: &Cluster, host| cluster.lab.ok(host, &["md5sum", &format!("{REDIS_FILES}/big")]);
    let before = sum(&cluster, Host::B);
    let pid = cluster.status(Host::B, "redis")["pid"].to_string();
    let write =
        format!("dd if=/dev/urandom of=/proc/{pid}/root/srv/redis/big bs=4096 count=1 seek=999 conv=notrunc");
    cluster.lab.ok(Host::B, &["sh", "-c", &write]);
    cluster.ask_redis(&["SET", "while", "away"]);
    // What the power cut has left of A's files may be a mix of times: on its disk it is in no order.
    cluster.lab.boot(Host::A);
    cluster.lab.ok(
        Host::A,
        &["sh", "-c", &format!("cd {REDIS_FILES} && echo torn >> big && echo x > stray && rm -r app*")],
    );
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "standby", "ready");
    cluster.wait_state(Host::B, "primary", "protected");
    let copied = full_epochs(&cluster, Host::B).remove(0);
    let (resync, full) = (bytes(&copied, "resync_bytes"), bytes(&copied, "full_bytes"));
    println!("resync {resync} bytes of memory and files, of a full copy {full}");
    assert!(resync + FILES - (1 << 20) < full, "{copied:#}");

    cluster.json(Host::B, &["handoff", "redis"]);
    cluster.wait_state(Host::A, "primary", "protected");
    let (memory, files) = digests(&cluster, Host::A);
    assert_eq!(memory, files);
    assert_eq!(cluster.ask_redis(&["GET", "while"]), "away");
    assert_ne!(sum(&cluster, Host::A), before);
    assert_eq!(sum(&cluster, Host::A), sum(&cluster, Host::B));
    let stray = cluster.lab.on(Host::A, &["test", "-e", &format!("{REDIS_FILES}/stray")]);
    assert!(!stray.status.success(), "what the epoch does not have is gone");
    cluster.assert_first_try(Host::A);
}

#[test]
fn a_standby_killed_while_it_is_brought_up_to_date_keeps_a_whole_epoch() {
    let mut cluster = Cluster::with("rejoin-kill", &["--store", "disk", "--lease-ms", "4000"]);
    cluster.protect_redis();
    fill(&cluster);
    let counter = cluster.count();
    for round in 0..4 {
        cluster.end_agent(Host::A, "TERM");
        cluster.start_agent(Host::A);
        // In the middle of what it tells, or of what it is sent.
        std::thread::sleep(Duration::from_millis(15 + 40 * round));
        cluster.end_agent(Host::B, "KILL");
        cluster.start_agent(Host::B);
        cluster.wait_state(Host::A, "primary", "protected");
        assert!(cluster.status(Host::B, "redis")["epoch"].is_object());
        assert_eq!(cluster.status(Host::A, "redis")["term"], 1);
    }
    counter.stop();
    let digest = cluster.digest();
    settle(&cluster);
    cluster.standin(Host::B, &["verify", "redis"]);
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.digest(), digest);
    cluster.assert_first_try(Host::B);
}
