use std::{fs, time::Duration};

use nix::unistd::{SysconfVar, sysconf};
use standin::workload::{
    control::ControlError,
    guard::{GuardState, boot_time_ns},
    sandbox::Sandbox,
    spec::Net,
};

use super::lab::{Netns, Place, await_true, start, unique};

/// Long enough for many turns of a throttled tree.
const TURNS: Duration = Duration::from_secs(1);

/// A workload that would run all the time.
fn spinning(test: impl FnOnce(&Place, Sandbox, u32) + Send) {
    let host = Netns::new();
    let place = Place::new(&unique("throttle"), Net::Own { ips: Vec::new() });
    host.run(|| {
        let sandbox = place.create();
        start(&sandbox, "while :; do :; done");
        let (pid, _) = sandbox.workload_pid().unwrap().expect("it runs");
        test(&place, sandbox, pid);
    });
}

/// Processor time of a process so far.
fn used(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat[stat.rfind(')').unwrap()..].split(' ').collect();
    let ticks: u64 = fields[12].parse::<u64>().unwrap() + fields[13].parse::<u64>().unwrap();
    let per_second = sysconf(SysconfVar::CLK_TCK).unwrap().unwrap() as u64;
    Duration::from_millis(ticks * 1000 / per_second)
}

fn used_within(pid: u32, time: Duration) -> Duration {
    let before = used(pid);
    std::thread::sleep(time);
    used(pid).saturating_sub(before)
}

/// Whether it was seen frozen, and not frozen, in the next while.
fn turns(sandbox: &Sandbox) -> (bool, bool) {
    let mut seen = (false, false);
    for _ in 0..300 {
        let frozen = sandbox.keeper().cgroup().is_frozen().unwrap();
        seen = (seen.0 || frozen, seen.1 || !frozen);
        std::thread::sleep(Duration::from_millis(1));
    }
    seen
}

#[test]
fn a_throttled_tree_runs_for_its_share_and_wholly_again_afterwards() {
    spinning(|_, sandbox, pid| {
        assert_eq!(turns(&sandbox), (false, true));
        sandbox.keeper().throttler().set(10).unwrap().unwrap();
        assert_eq!(turns(&sandbox), (true, true));
        let used = used_within(pid, TURNS);
        assert!(used > Duration::ZERO && used < TURNS / 3, "{used:?} of {TURNS:?}");
        sandbox.keeper().throttler().set(100).unwrap().unwrap();
        assert_eq!(turns(&sandbox), (false, true));
        sandbox.keeper().throttler().set(0).unwrap().unwrap();
        await_true("it to stand", || turns(&sandbox) == (true, false));
        let used = used_within(pid, TURNS);
        assert_eq!(used, Duration::ZERO, "it stands");
        sandbox.keeper().throttler().set(100).unwrap().unwrap();
        await_true("it to run", || turns(&sandbox) == (false, true));
        assert!(matches!(sandbox.keeper().throttler().set(101).unwrap(), Err(ControlError::Refused(_))));
    });
}

#[test]
fn a_throttle_ends_with_the_agent_that_asked_for_it() {
    spinning(|place, sandbox, _| {
        sandbox.keeper().throttler().set(0).unwrap().unwrap();
        assert!(turns(&sandbox).0);
        // As when the agent is killed: its connection closes, whatever was going on.
        drop(sandbox);
        let next = place.open();
        await_true("the throttle to end", || turns(&next) == (false, true));
    });
}

#[test]
fn a_throttle_never_thaws_what_the_guard_has_frozen() {
    spinning(|_, sandbox, _| {
        sandbox.keeper().throttler().set(50).unwrap().unwrap();
        let guard = sandbox.keeper().guard();
        guard.arm(boot_time_ns() + 50_000_000).unwrap();
        await_true("the guard to fire", || matches!(guard.state(), GuardState::Fired { .. }));
        await_true("the freeze", || turns(&sandbox) == (true, false));
        assert!(matches!(sandbox.keeper().throttler().set(50).unwrap(), Err(ControlError::Fired)));
        sandbox.keeper().throttler().set(100).unwrap().unwrap();
        assert_eq!(turns(&sandbox), (true, false));
    });
}
