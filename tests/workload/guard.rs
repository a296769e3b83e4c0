use std::{fs, time::Duration};

use standin::{
    takeover::{
        address::Addresses,
        gate::{self, GateError},
    },
    workload::{
        control::ControlError,
        guard::{GuardError, GuardState, boot_time_ns},
        netlink::RouteSocket,
        sandbox::Sandbox,
        spec::Net,
    },
};

use super::lab::{Lan, Netns, Place, SECOND, await_true, start, unique};

const MS: u64 = 1_000_000;
const VIP: &str = "10.77.0.50";

fn own() -> Net {
    Net::Own { ips: vec![format!("{VIP}/24").parse().unwrap()] }
}

/// The workload appends to a file: does it run?
fn counting(place: &Place, sandbox: &Sandbox) -> impl Fn() -> u64 + use<> {
    let file = place.dir.path().join("count");
    start(sandbox, &format!("while true; do printf . >> {}; done", file.display()));
    await_true("the first byte", || file.exists());
    move || fs::metadata(&file).unwrap().len()
}

fn frozen(sandbox: &Sandbox) -> bool {
    sandbox.keeper().cgroup().is_frozen().unwrap()
}

/// A host and a client on one network; the workload's address answers.
fn on_a_lan(test: impl FnOnce(&Place, &Sandbox, &Addresses, &Netns) + Send) {
    let mut lan = Lan::new();
    let (host, client) = (lan.plug(&["10.77.0.1/24"]), lan.plug(&["10.77.0.9/24"]));
    let place = Place::new(&unique("guard"), own());
    host.run(|| {
        let sandbox = place.create();
        let vips = [format!("{VIP}/24@lan0").parse().unwrap()];
        let addresses = Addresses::prepare(&place.spec.name, &place.spec.net, &vips).unwrap();
        addresses.guard(sandbox.keeper(), sandbox.gate()).unwrap();
        addresses.up(sandbox.keeper()).unwrap();
        gate::open(sandbox.keeper(), sandbox.gate()).unwrap();
        assert!(client.pings(VIP));
        test(&place, &sandbox, &addresses, &client);
    });
}

#[test]
fn a_guard_that_is_not_extended_silences_the_workload() {
    on_a_lan(|place, sandbox, _, client| {
        let count = counting(place, sandbox);
        let guard = sandbox.keeper().guard();
        let deadline = boot_time_ns() + 150 * MS;
        guard.arm(deadline).unwrap();
        await_true("the guard to fire", || matches!(guard.state(), GuardState::Fired { .. }));
        let GuardState::Fired { at_ns } = guard.state() else { panic!("{:?}", guard.state()) };
        assert!(at_ns >= deadline, "never early");
        println!("fired {} us after the deadline", (at_ns - deadline) / 1000);
        assert!(!client.pings(VIP));
        await_true("the freeze", || frozen(sandbox));
        let before = count();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(count(), before);
        // Nothing opens it again by accident.
        assert!(matches!(guard.extend(boot_time_ns() + 1000 * MS), Err(GuardError::Fired)));
        assert!(matches!(
            gate::open(sandbox.keeper(), sandbox.gate()),
            Err(GateError::Control(ControlError::Fired))
        ));
        assert!(!client.pings(VIP));
    });
}

#[test]
fn a_guard_closes_the_gate_even_if_nobody_told_it_to() {
    let host = Netns::new();
    let place = Place::new(&unique("guard"), own());
    host.run(|| {
        let sandbox = place.create();
        gate::open(sandbox.keeper(), sandbox.gate()).unwrap();
        assert!(host.pings(VIP));
        place.open().keeper().guard().fence_now(SECOND).unwrap();
        assert!(!host.pings(VIP));
    });
}

#[test]
fn a_guard_that_is_extended_does_not_fire() {
    on_a_lan(|place, sandbox, _, client| {
        let count = counting(place, sandbox);
        let guard = sandbox.keeper().guard();
        guard.arm(boot_time_ns() + 500 * MS).unwrap();
        for _ in 0..40 {
            std::thread::sleep(Duration::from_millis(25));
            guard.extend(boot_time_ns() + 500 * MS).unwrap();
        }
        assert!(client.pings(VIP));
        guard.disarm().unwrap();
        std::thread::sleep(Duration::from_millis(600));
        assert!(!guard.fired() && !frozen(sandbox));
        let before = count();
        await_true("the count", || count() > before);
    });
}

#[test]
fn an_unfenced_workload_runs_and_answers_until_the_new_deadline() {
    on_a_lan(|place, sandbox, addresses, client| {
        let count = counting(place, sandbox);
        let keeper = sandbox.keeper();
        keeper.guard().fence_now(SECOND).unwrap();
        keeper.guard().fence_now(SECOND).unwrap();
        assert!(!client.pings(VIP));
        let before = count();
        let steps = addresses.up_steps();
        assert!(gate::unfence(sandbox.keeper(), sandbox.gate(), 1, steps).is_err(), "a deadline in the past");
        gate::unfence(sandbox.keeper(), sandbox.gate(), boot_time_ns() + 3000 * MS, steps).unwrap();
        // The client has asked in vain, and would ask again only after a second.
        addresses.announce().unwrap();
        assert!(client.pings(VIP));
        await_true("the count", || count() > before);
        assert!(
            gate::unfence(sandbox.keeper(), sandbox.gate(), boot_time_ns() + 3000 * MS, steps).is_err(),
            "not fenced"
        );
        await_true("the guard to fire again", || keeper.guard().fired());
        assert!(!client.pings(VIP));
    });
}

#[test]
fn the_guard_holds_when_the_agent_is_replaced() {
    on_a_lan(|place, sandbox, _, client| {
        sandbox.keeper().guard().arm(boot_time_ns() + 700 * MS).unwrap();
        let next = place.open();
        assert!(matches!(next.keeper().guard().state(), GuardState::Armed { .. }));
        next.keeper().guard().extend(boot_time_ns() + 900 * MS).unwrap();
        await_true("the guard to fire", || sandbox.keeper().guard().fired());
        assert!(!client.pings(VIP));
    });
}

#[test]
fn a_gate_can_be_closed_without_the_init() {
    on_a_lan(|_, sandbox, addresses, client| {
        let init = nix::unistd::Pid::from_raw(sandbox.keeper().pid() as i32);
        let route = RouteSocket::open().unwrap();
        nix::sys::signal::kill(init, nix::sys::signal::Signal::SIGSTOP).unwrap();
        let error = sandbox.keeper().guard().fence_now(Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, GuardError::Unresponsive(_)));
        gate::close(sandbox.gate().unwrap(), &route).unwrap();
        addresses.down().unwrap();
        assert!(!client.pings(VIP));
        nix::sys::signal::kill(init, nix::sys::signal::Signal::SIGCONT).unwrap();
        await_true("the late guard", || matches!(sandbox.keeper().guard().state(), GuardState::Fired { .. }));
    });
}
