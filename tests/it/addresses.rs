//! The addresses by which clients reach a workload, wherever it runs.

use super::{
    cluster::{Cluster, wait_for},
    lab::Host,
    redis::VIP,
};

const VIP_V6: &str = "fd77::100";

fn answers(cluster: &Cluster, addr: &str) -> bool {
    let ping = ["timeout", "1", "redis-cli", "-h", addr, "ping"];
    cluster.lab.on(Host::Client, &ping).stdout.starts_with(b"PONG")
}

/// What the client takes for the hardware address of another one.
fn neighbour(cluster: &Cluster, addr: &str) -> String {
    let shown = cluster.lab.ok(Host::Client, &["ip", "neigh", "show", addr, "dev", "eth0"]);
    let mac = shown.split_once("lladdr ").and_then(|(_, rest)| rest.split_whitespace().next());
    mac.unwrap_or_else(|| panic!("no hardware address: {shown:?}")).to_owned()
}

fn shared_devices(cluster: &Cluster, host: Host) -> usize {
    cluster.lab.ok(host, &["ip", "-o", "link", "show", "type", "macvlan"]).lines().count()
}

/// A client that never learns another hardware address reaches it all the same.
#[test]
fn an_address_with_a_hardware_address_of_its_own_takes_it_along() {
    let mut cluster = Cluster::up("own-mac");
    cluster.run_redis_with(&["--ip", &format!("{VIP_V6}/64")], &[]);
    let (v4, v6) = (format!("{VIP}/24@eth0+mac"), format!("{VIP_V6}/64@eth0+mac"));
    let protect = ["protect", "redis", "--to", "b", "--every", "100ms", "--vip", &v4, "--vip", &v6];
    cluster.standin(Host::A, &protect);
    for addr in [VIP, VIP_V6] {
        wait_for("redis to answer", || answers(&cluster, addr));
        let mac = neighbour(&cluster, addr);
        let others = cluster.lab.ok(Host::A, &["ip", "link", "show", "eth0"]);
        assert!(!others.contains(&mac), "{mac} is not that of the host");
        let pin = ["ip", "neigh", "replace", addr, "lladdr", &mac, "dev", "eth0", "nud", "permanent"];
        cluster.lab.ok(Host::Client, &pin);
    }
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    for addr in [VIP, VIP_V6] {
        wait_for("redis to answer from the other host", || answers(&cluster, addr));
    }
    cluster.lab.boot(Host::A);
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::B, "primary", "protected");
    cluster.standin(Host::B, &["handoff", "redis"]);
    for addr in [VIP, VIP_V6] {
        wait_for("redis to answer from where it was", || answers(&cluster, addr));
    }
    assert_eq!([Host::A, Host::B].map(|host| shared_devices(&cluster, host)), [2, 2]);
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.standin(Host::A, &["unprotect", "redis"]);
    wait_for("nothing to be left of them", || {
        [Host::A, Host::B].map(|host| shared_devices(&cluster, host)) == [0, 0]
    });
}
