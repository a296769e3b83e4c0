//! The lease as the kernel keeps it, while nobody is left who could do anything.

use std::{os::fd::AsRawFd, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use standin::{
    model::{Epoch, EpochId, Term},
    takeover::{
        address::Addresses,
        gate,
        hold::{Hold, Marks},
        lease::{Hook, Lease},
    },
    workload::{
        guard::{GuardState, boot_time_ns},
        sandbox::Sandbox,
        spec::Net,
    },
};

use super::{
    ear::{Ear, talk_script},
    lab::{Lan, Netns, Place, SECOND, await_true, output, start, unique},
};

const MS: u64 = 1_000_000;
const VIP: &str = "10.77.0.50";
const CLIENT: &str = "10.77.0.9";
/// Between the clock of the guard and that of packets, and for the kernel's ticks.
const SLACK_NS: u64 = 12 * MS;

/// The workload says numbers all the time.
fn talk(sandbox: &Sandbox, to: &str) {
    start(sandbox, &format!("exec {}", talk_script(to)));
}

impl Ear {
    fn last_ns(&self) -> u64 {
        self.heard().last().expect("something was heard").at_ns
    }

    #[track_caller]
    fn hears_nothing(&self) {
        // What had left by now has arrived, and was read.
        std::thread::sleep(Duration::from_millis(100));
        let before = self.heard().len();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(self.heard().len(), before);
    }
}

fn ear(client: &Netns) -> Ear {
    client.run(Ear::here)
}

fn marks(sandbox: &Sandbox) -> Marks {
    let devices = sandbox.gate().unwrap().ports().to_vec();
    Marks { ports: devices.clone(), devices, ..Marks::default() }
}

fn signal(sandbox: &Sandbox, signal: Signal) {
    kill(Pid::from_raw(sandbox.keeper().pid() as i32), signal).unwrap();
}

fn tables() -> String {
    output("nft list tables")
}

struct Stage<'a> {
    place: &'a Place,
    sandbox: &'a Sandbox,
    addresses: &'a Addresses,
    ear: &'a Ear,
}

impl Stage<'_> {
    fn lease(&self, hook: Hook) -> Lease {
        let guard = self.sandbox.keeper().shared_guard();
        Lease::at(hook, &self.place.spec.name, &marks(self.sandbox), guard).unwrap()
    }

    fn arm(&self, lease: &Lease, ms: u64) -> u64 {
        let deadline = boot_time_ns() + ms * MS;
        self.sandbox.keeper().guard().arm(deadline).unwrap();
        lease.follow();
        deadline
    }
}

/// A workload that a client hears.
fn heard_by_a_client(test: impl FnOnce(&Stage<'_>) + Send) {
    let mut lan = Lan::new();
    let (host, client) = (lan.plug(&["10.77.0.1/24"]), lan.plug(&[&format!("{CLIENT}/24")]));
    let ear = ear(&client);
    let net = Net::Own { ips: vec![format!("{VIP}/24").parse().unwrap()] };
    let place = Place::new(&unique("lease"), net);
    host.run(|| {
        let sandbox = place.create();
        let vips = [format!("{VIP}/24@lan0").parse().unwrap()];
        let addresses = Addresses::prepare(&place.spec.name, &place.spec.net, &vips).unwrap();
        addresses.guard(sandbox.keeper(), sandbox.gate()).unwrap();
        addresses.up(sandbox.keeper()).unwrap();
        gate::open(sandbox.keeper(), sandbox.gate()).unwrap();
        talk(&sandbox, CLIENT);
        ear.settle();
        test(&Stage { place: &place, sandbox: &sandbox, addresses: &addresses, ear: &ear });
        Lease::remove(&place.spec.name).unwrap();
        assert_eq!(tables(), "");
        // Once more: nothing is there.
        Lease::remove(&place.spec.name).unwrap();
    });
}

fn falls_silent_in_time(hook: Hook) {
    heard_by_a_client(|stage| {
        let lease = stage.lease(hook);
        assert_eq!(lease.hook().unwrap(), None, "not needed yet");
        stage.arm(&lease, 300);
        std::thread::sleep(Duration::from_millis(100));
        let deadline = stage.arm(&lease, 500);
        assert_eq!(lease.hook().unwrap(), Some(hook));
        signal(stage.sandbox, Signal::SIGSTOP);
        std::thread::sleep(Duration::from_millis(700));
        let last = stage.ear.last_ns();
        println!(
            "{hook:?}: the last packet {} us before the deadline",
            (deadline as i64 - last as i64) / 1000
        );
        assert!(last <= deadline + SLACK_NS, "{} ns late", last - deadline);
        assert!(last + 100 * MS > deadline, "{} ns early", deadline - last);
        stage.ear.hears_nothing();
        assert!(!stage.sandbox.keeper().guard().fired(), "it is stopped");
        // Nor by an agent that comes to itself only now.
        lease.follow();
        stage.ear.hears_nothing();
        signal(stage.sandbox, Signal::SIGCONT);
        await_true("the late guard", || stage.sandbox.keeper().guard().fired());
        stage.ear.hears_nothing();
    });
}

#[test]
fn a_workload_whose_guard_is_stopped_and_whose_agent_is_gone_falls_silent_in_time() {
    falls_silent_in_time(Hook::Device);
}

#[test]
fn so_does_one_whose_kernel_cannot_look_at_devices() {
    falls_silent_in_time(Hook::Prerouting);
}

/// What a bridge passes from port to port is routed by nobody.
#[test]
fn so_does_one_behind_a_bridge() {
    let (host, client) = (Netns::new(), Netns::new());
    let ear = ear(&client);
    let net = Net::Own { ips: vec![format!("{VIP}/24").parse().unwrap()] };
    let place = Place::new(&unique("lease"), net);
    host.run(|| {
        let sandbox = place.create();
        let device = standin::workload::network::host_device(&place.spec.name);
        let file = format!("/proc/{}/fd/{}", std::process::id(), client.0.as_raw_fd());
        host.ip("link add br0 type bridge");
        host.ip("link set br0 up");
        host.ip(&format!("link add p0 type veth peer name lan0 netns {file}"));
        host.ip("link set p0 master br0 up");
        // The client has the gateway's address; the host has none on the bridge.
        client.ip("addr add 169.254.1.1/24 dev lan0");
        client.ip("link set lan0 up");
        host.ip(&format!("addr flush dev {device}"));
        host.ip(&format!("link set {device} master br0 up"));
        talk(&sandbox, "169.254.1.1");
        ear.await_next();
        let guard = sandbox.keeper().shared_guard();
        let lease = Lease::new(&place.spec.name, &marks(&sandbox), guard).unwrap();
        ear.await_next();
        let deadline = boot_time_ns() + 400 * MS;
        sandbox.keeper().guard().arm(deadline).unwrap();
        lease.follow();
        assert_eq!(lease.hook().unwrap(), Some(Hook::Device));
        signal(&sandbox, Signal::SIGSTOP);
        std::thread::sleep(Duration::from_millis(600));
        assert!(ear.last_ns() <= deadline + SLACK_NS && ear.last_ns() + 100 * MS > deadline);
        ear.hears_nothing();
        signal(&sandbox, Signal::SIGCONT);
        Lease::remove(&place.spec.name).unwrap();
    });
}

#[test]
fn a_lease_that_is_renewed_drops_nothing() {
    for hook in [Hook::Device, Hook::Prerouting] {
        heard_by_a_client(|stage| {
            let lease = stage.lease(hook);
            let guard = stage.sandbox.keeper().guard();
            stage.arm(&lease, 500);
            let mut costs = Vec::new();
            for _ in 0..100 {
                std::thread::sleep(Duration::from_millis(10));
                guard.extend(boot_time_ns() + 500 * MS).unwrap();
                let began = boot_time_ns();
                lease.follow();
                costs.push(boot_time_ns() - began);
            }
            // For as long as it likes.
            guard.disarm().unwrap();
            lease.follow();
            std::thread::sleep(Duration::from_millis(700));
            stage.ear.await_next();
            stage.ear.assert_whole();
            costs.sort_unstable();
            println!(
                "{hook:?}: a renewal takes {} us (p50), {} us (p99)",
                costs[50] / 1000,
                costs[99] / 1000
            );
        });
    }
}

/// The next agent finds the lease in force, or that there is none, and mutes nothing.
#[test]
fn an_agent_that_is_replaced_drops_nothing() {
    heard_by_a_client(|stage| {
        let first = stage.lease(Hook::Device);
        let deadline = stage.arm(&first, 20_000);
        drop(first);
        let mut costs = Vec::new();
        for _ in 0..8 {
            let began = boot_time_ns();
            drop(stage.lease(Hook::Device));
            costs.push((boot_time_ns() - began) / 1000);
            stage.ear.await_next();
        }
        println!("the table is made anew in {costs:?} us");
        let last = stage.lease(Hook::Device);
        stage.arm(&last, 300);
        stage.sandbox.keeper().guard().disarm().unwrap();
        last.follow();
        drop(stage.lease(Hook::Device));
        assert_eq!(tables(), "", "none is needed");
        std::thread::sleep(Duration::from_millis(500));
        stage.ear.await_next();
        stage.ear.assert_whole();
        assert!(boot_time_ns() < deadline);
        // One that finds the guard fired lets nothing out, whatever the link is.
        stage.sandbox.keeper().guard().fence_now(SECOND).unwrap();
        let _late = stage.lease(Hook::Device);
        stage.ear.hears_nothing();
    });
}

#[test]
fn an_unfenced_workload_is_heard_until_its_new_deadline() {
    heard_by_a_client(|stage| {
        let (keeper, lease) = (stage.sandbox.keeper(), stage.lease(Hook::Device));
        stage.arm(&lease, 5000);
        assert!(output("nft list ruleset").contains("elements"), "{}", output("nft list ruleset"));
        keeper.guard().fence_now(SECOND).unwrap();
        lease.follow();
        stage.ear.hears_nothing();
        let deadline = boot_time_ns() + 2000 * MS;
        lease.grant(deadline);
        stage.ear.hears_nothing();
        gate::unfence(keeper, stage.sandbox.gate(), deadline, stage.addresses.up_steps()).unwrap();
        lease.follow();
        stage.addresses.announce().unwrap();
        stage.ear.await_next();
        assert!(matches!(keeper.guard().state(), GuardState::Armed { .. }));
        signal(stage.sandbox, Signal::SIGSTOP);
        await_true("the deadline", || boot_time_ns() > deadline + 100 * MS);
        assert!(stage.ear.last_ns() <= deadline + SLACK_NS);
        stage.ear.hears_nothing();
        signal(stage.sandbox, Signal::SIGCONT);
        // A grant without an unfence comes to nothing.
        await_true("the late guard", || matches!(keeper.guard().state(), GuardState::Fired { .. }));
        lease.grant(boot_time_ns() + 5000 * MS);
        lease.follow();
        assert!(!output("nft list ruleset").contains("elements"));
    });
}

#[test]
fn a_table_that_somebody_removed_is_made_again_with_the_next_renewal() {
    heard_by_a_client(|stage| {
        let lease = stage.lease(Hook::Device);
        stage.arm(&lease, 400);
        output("nft flush ruleset");
        assert_eq!(tables(), "");
        let deadline = stage.arm(&lease, 600);
        assert!(tables().contains("netdev standin-lease-"), "{}", tables());
        signal(stage.sandbox, Signal::SIGSTOP);
        std::thread::sleep(Duration::from_millis(800));
        assert!(stage.ear.last_ns() <= deadline + SLACK_NS);
        stage.ear.hears_nothing();
        signal(stage.sandbox, Signal::SIGCONT);
    });
}

/// What waits has passed the device before the deadline; an agent that is back after it must not let it out.
#[test]
fn what_was_held_does_not_leave_after_the_deadline_though_the_guard_is_stopped() {
    heard_by_a_client(|stage| {
        let (name, lease) = (&stage.place.spec.name, stage.lease(Hook::Device));
        let guard = stage.sandbox.keeper().shared_guard();
        let hold = Hold::make(name, marks(stage.sandbox), Some(guard), true).unwrap();
        let epoch = |number| EpochId { term: Term(1), epoch: Epoch(number) };
        std::thread::sleep(Duration::from_millis(50));
        hold.mark(epoch(1)).unwrap();
        let before = stage.ear.heard().len();
        hold.release(epoch(1)).unwrap();
        await_true("what was held", || stage.ear.heard().len() > before);
        stage.arm(&lease, 200);
        signal(stage.sandbox, Signal::SIGSTOP);
        std::thread::sleep(Duration::from_millis(300));
        assert!(hold.held().packets > 0);
        hold.mark(epoch(2)).unwrap();
        hold.release(epoch(2)).unwrap();
        hold.open().unwrap();
        stage.ear.hears_nothing();
        signal(stage.sandbox, Signal::SIGCONT);
        drop(hold);
        Hold::remove(name).unwrap();
    });
}

#[test]
fn a_workload_without_a_device_has_no_lease_in_the_kernel() {
    heard_by_a_client(|stage| {
        let guard = stage.sandbox.keeper().shared_guard();
        let refused = Lease::new(&stage.place.spec.name, &Marks::default(), guard).unwrap_err();
        assert!(refused.to_string().contains("own network"), "{refused}");
    });
}
