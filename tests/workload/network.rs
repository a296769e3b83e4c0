use std::time::Duration;

use standin::{
    takeover::{
        address::Addresses,
        announce::SCHEDULE,
        check::{VipError, check_vip},
        gate,
    },
    workload::{
        guard::boot_time_ns,
        netlink::RouteSocket,
        network::host_device,
        sandbox::Sandbox,
        spec::{Net, Vip},
    },
};

use super::lab::{Lan, Netns, Place, await_true, ip, output, start, unique};

const V4: &str = "10.77.0.50";
const V6: &str = "fd00::50";

fn vips() -> Vec<Vip> {
    [V4, V6].map(|ip| format!("{ip}/{}@lan0", if ip == V4 { 24 } else { 64 }).parse().unwrap()).to_vec()
}

fn own() -> Net {
    Net::Own { ips: vips().iter().map(|vip| vip.cidr).collect() }
}

/// The hardware address that the client has for an address.
fn neighbour(client: &Netns, addr: &str) -> Option<String> {
    let text = client.output(&format!("ip neigh show {addr}"));
    text.split_whitespace().skip_while(|word| *word != "lladdr").nth(1).map(str::to_owned)
}

fn hardware_address(host: &Netns) -> String {
    let text = host.output("ip -o link show lan0");
    text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap().to_owned()
}

fn up(place: &Place) -> (Sandbox, Addresses) {
    let sandbox = place.create();
    let addresses = Addresses::prepare(&place.spec.name, &place.spec.net, &vips()).unwrap();
    addresses.guard(sandbox.keeper(), sandbox.gate()).unwrap();
    (sandbox, addresses)
}

#[test]
fn an_address_follows_the_workload_to_the_other_host() {
    let mut lan = Lan::new();
    let a = lan.plug(&["10.77.0.1/24", "fd00::1/64"]);
    let b = lan.plug(&["10.77.0.2/24", "fd00::2/64"]);
    let client = lan.plug(&["10.77.0.9/24", "fd00::9/64"]);
    // The same workload on two hosts; here one kernel carries both, so their cgroups need two names.
    let (on_a, on_b) = (Place::new(&unique("vip-a"), own()), Place::new(&unique("vip-b"), own()));
    let (first, first_addresses) = a.run(|| up(&on_a));
    let (second, second_addresses) = b.run(|| up(&on_b));
    // Warm on both: nobody answers.
    assert!(!client.pings(V4) && !client.pings(V6));
    a.run(|| first_addresses.up(first.keeper()).unwrap());
    gate::open(first.keeper(), first.gate()).unwrap();
    assert!(client.pings(V4), "{}", a.output("ip route"));
    assert!(client.pings(V6), "{}", a.output("ip -6 route"));
    assert_eq!(neighbour(&client, V4), Some(hardware_address(&a)));
    // Who would take it too is told whose it is, although the host itself has neither.
    for vip in vips() {
        let error = b.run(|| check_vip(&vip, Some(Duration::from_secs(1)))).unwrap_err();
        assert!(matches!(&error, VipError::InUse { owner, .. } if *owner == hardware_address(&a)), "{error}");
    }
    // The workload reaches others, too.
    start(
        &first,
        "ping -c1 -W1 10.77.0.9 >/dev/null && ping -c1 -W1 fd00::9 >/dev/null && echo reached; sleep 1000",
    );
    on_a.await_log("reached");

    first.keeper().guard().fence_now(Duration::from_secs(1)).unwrap();
    assert!(!client.pings(V4));
    b.run(|| second_addresses.up(second.keeper()).unwrap());
    gate::open(second.keeper(), second.gate()).unwrap();
    assert_eq!(neighbour(&client, V4), Some(hardware_address(&a)), "not yet told");
    assert_eq!(SCHEDULE[0], Duration::ZERO);
    second_addresses.announce().unwrap();
    await_true("the client's table", || neighbour(&client, V4) == Some(hardware_address(&b)));
    await_true("the client's IPv6 table", || neighbour(&client, V6) == Some(hardware_address(&b)));
    assert!(client.pings(V4) && client.pings(V6));
    second_addresses.down().unwrap();
    second_addresses.down().unwrap();
}

#[test]
fn a_gate_can_be_closed_and_opened_again_and_again() {
    let mut lan = Lan::new();
    let (host, client) =
        (lan.plug(&["10.77.0.1/24", "fd00::1/64"]), lan.plug(&["10.77.0.9/24", "fd00::9/64"]));
    let place = Place::new(&unique("gate"), own());
    let (sandbox, addresses) = host.run(|| up(&place));
    let route = host.run(|| RouteSocket::open().unwrap());
    addresses.up(sandbox.keeper()).unwrap();
    for _ in 0..3 {
        gate::open(sandbox.keeper(), sandbox.gate()).unwrap();
        gate::open(sandbox.keeper(), sandbox.gate()).unwrap();
        // The client has asked in vain while the gate was closed, and would ask again only after a second.
        addresses.announce().unwrap();
        assert!(client.pings(V4) && client.pings(V6));
        gate::close(sandbox.gate().unwrap(), &route).unwrap();
        gate::close(sandbox.gate().unwrap(), &route).unwrap();
        assert!(!client.pings(V4) && !client.pings(V6));
    }
}

/// Not a promise of speed: the figures are for the reader.
#[test]
fn the_actuators_of_a_takeover_are_measured() {
    let mut lan = Lan::new();
    let host = lan.plug(&["10.77.0.1/24", "fd00::1/64"]);
    let place = Place::new(&unique("time"), own());
    let begin = std::time::Instant::now();
    let (sandbox, addresses) = host.run(|| up(&place));
    println!("create and prepare: {:?}", begin.elapsed());
    let route = host.run(|| RouteSocket::open().unwrap());
    start(&sandbox, "sleep 1000");
    let timed = |what: &str, work: &dyn Fn()| {
        let mut times: Vec<_> = (0..20)
            .map(|_| {
                let begin = std::time::Instant::now();
                work();
                begin.elapsed()
            })
            .collect();
        times.sort_unstable();
        println!("{what}: median {:?}, most {:?}", times[10], times[19]);
    };
    timed("address up", &|| addresses.up(sandbox.keeper()).unwrap());
    timed("gate open (open already)", &|| gate::open(sandbox.keeper(), sandbox.gate()).unwrap());
    timed("announce", &|| addresses.announce().unwrap());
    timed("gate close + open", &|| {
        gate::close(sandbox.gate().unwrap(), &route).unwrap();
        gate::open(sandbox.keeper(), sandbox.gate()).unwrap();
    });
    timed("freeze + thaw", &|| {
        sandbox.keeper().cgroup().freeze(Duration::from_secs(1)).unwrap();
        sandbox.keeper().cgroup().thaw(Duration::from_secs(1)).unwrap();
    });
    let guard = sandbox.keeper().guard();
    guard.arm(boot_time_ns() + 60_000_000_000).unwrap();
    timed("extend", &|| guard.extend(boot_time_ns() + 60_000_000_000).unwrap());
    timed("address up + down", &|| {
        addresses.up(sandbox.keeper()).unwrap();
        addresses.down().unwrap();
    });
}

#[test]
fn an_address_that_cannot_work_is_refused_with_the_reason() {
    let mut lan = Lan::new();
    let (host, other) =
        (lan.plug(&["10.77.0.1/24", "fd00::1/64"]), lan.plug(&["10.77.0.60/24", "fd00::60/64"]));
    let check = |vip: &str, probe| host.run(|| check_vip(&vip.parse().unwrap(), probe));
    let probe = Some(Duration::from_millis(300));
    check("10.77.0.50/24@lan0", None).unwrap();
    check("10.77.0.50/24@lan0", probe).unwrap();
    check("fd00::50/64@lan0", probe).unwrap();
    let error = check("10.77.0.60/24@lan0", probe).unwrap_err();
    assert!(matches!(&error, VipError::InUse { owner, .. } if *owner == hardware_address(&other)), "{error}");
    let error = check("fd00::60/64@lan0", probe).unwrap_err();
    assert!(matches!(&error, VipError::InUse { owner, .. } if *owner == hardware_address(&other)), "{error}");
    let error = check("10.99.0.1/24@lan0", None).unwrap_err();
    assert!(error.to_string().contains("10.77.0.1/24"), "{error}");
    assert!(matches!(check("10.77.0.50/24@eth9", None), Err(VipError::NoDevice { .. })));
    host.ip("link set lan0 down");
    assert!(matches!(check("10.77.0.50/24@lan0", None), Err(VipError::Down { .. })));
}

#[test]
fn a_sandbox_whose_network_cannot_be_made_leaves_nothing() {
    let host = Netns::new();
    let place = Place::new(&unique("half"), own());
    host.run(|| {
        ip(&format!("link add {} type bridge", host_device(&place.spec.name)));
        let error = Sandbox::create(&place.spec, &place.options()).unwrap_err().to_string();
        assert!(error.contains("ip -batch"), "{error}");
        assert!(!output("ip link").contains("sd-"));
    });
    assert!(!place.run_dir().join(place.spec.name.as_str()).exists());
}
