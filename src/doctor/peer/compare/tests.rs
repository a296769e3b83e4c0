use std::collections::BTreeSet;

use super::*;
use crate::{
    doctor::peer::{Footprint, UsedFile},
    ha::{Arbiter, Timing},
    wire::examine::{ClockFacts, CpuFacts},
};

fn host() -> HostFacts {
    let timing = Timing::for_lease(Duration::from_millis(50), Duration::from_millis(300));
    HostFacts {
        release: "1.2.3".into(),
        kernel: "6.12.9-amd64".into(),
        criu: (4, 2, 1),
        tracker: Some("write protection".into()),
        arbiter: Arbiter::Peer,
        heartbeat: timing.heartbeat,
        lease: timing.lease,
        fence_margin: timing.fence_margin,
        drift: timing.drift,
        cpu: CpuFacts { vendor: "GenuineIntel".into(), model: "X".into(), ..CpuFacts::default() },
        memory_available: 8 << 30,
        store_free: 4 << 30,
        store_in_memory: true,
        mtu: Some(1500),
        vips: vec![VipFacts { trouble: None, mtu: Some(1500) }],
    }
}

fn regular() -> RegularFile {
    RegularFile { size: 100, mode: 0o755, uid: 0, gid: 0, build_id: vec![1; 20], digest: None }
}

fn sample(seconds: u64) -> ClockSample {
    let at = ClockFacts {
        wall: Duration::from_secs(2_000_000_000 + seconds),
        boot: Duration::from_secs(9000 + seconds),
    };
    ClockSample { here: at, there: at, error: Duration::from_micros(200) }
}

/// Two hosts that are alike, and a workload of 1 GiB that uses one library.
fn pair() -> Pair {
    let here = FileFacts::Regular(regular());
    let footprint = Footprint {
        name: "db".parse().unwrap(),
        container: false,
        files: vec![UsedFile { path: b"/usr/lib/libdb.so".to_vec(), mapped: true, here: here.clone() }],
        deleted: BTreeSet::new(),
        more_files: false,
        uids: [105].into(),
        gids: [110].into(),
        resident_bytes: 1 << 30,
        vips: vec!["10.0.0.5/24@eth0".parse().unwrap()],
        held: false,
    };
    let id = |number, name: &str| Id { number, here: Some(name.into()), there: Some(name.into()) };
    let needs =
        Needs { footprint, files: vec![here], users: vec![id(105, "db")], groups: vec![id(110, "staff")] };
    Pair {
        peer: "b".into(),
        here: host(),
        there: host(),
        clocks: [sample(0), sample(2)],
        payload: Some(1472),
        payload_max: 8952,
        is_v6: false,
        workloads: vec![needs],
    }
}

/// What is not as it should be after a change of the pair, with what was found.
fn after(change: impl FnOnce(&mut Pair)) -> Vec<(String, State, String)> {
    let mut pair = pair();
    change(&mut pair);
    let report = compare(&pair);
    assert_eq!(report.ok, report.ids(State::Fail).is_empty());
    let remarkable = report.checks.into_iter().filter(|check| check.state != State::Ok);
    remarkable
        .map(|check| {
            let wants_remedy = matches!(check.state, State::Warn | State::Fail);
            assert_eq!(check.remedy.is_some(), wants_remedy, "{check:?}");
            (check.id.into_owned(), check.state, check.found)
        })
        .collect()
}

/// The one thing that is not as it should be.
fn only(change: impl FnOnce(&mut Pair)) -> (String, State, String) {
    let found = after(change);
    assert_eq!(found.len(), 1, "{found:?}");
    found.into_iter().next().unwrap()
}

fn assert_only(id: &str, state: State, word: &str, change: impl FnOnce(&mut Pair)) {
    let found = only(change);
    assert!(found.0 == id && found.1 == state && found.2.contains(word), "{id} {word}: {found:?}");
}

fn file_there(pair: &mut Pair) -> &mut RegularFile {
    match &mut pair.workloads[0].files[0] {
        FileFacts::Regular(file) => file,
        other => panic!("{other:?}"),
    }
}

#[test]
fn two_hosts_that_are_alike_have_nothing_said_of_them() {
    assert_eq!(after(|_| {}), []);
}

#[test]
fn settings_that_make_a_takeover_unsafe_fail() {
    assert_only("release", State::Fail, "1.2.2 on b", |pair| pair.there.release = "1.2.2".into());
    assert_only("arbiter", State::Fail, "etcd on b", |pair| pair.there.arbiter = Arbiter::Store);
    assert_only("lease", State::Fail, "200 ms", |pair| pair.there.lease = Duration::from_millis(200));
}

#[test]
fn an_older_criu_there_fails_and_a_newer_one_is_only_a_risk() {
    assert_only("criu", State::Fail, "4.1.0 on b", |pair| pair.there.criu = (4, 1, 0));
    assert_only("criu", State::Warn, "not come back", |pair| pair.there.criu = (5, 0, 0));
    assert_eq!(after(|pair| pair.there.criu = (4, 2, 0)), []);
    assert_only("kernel-release", State::Warn, "6.7", |pair| pair.there.kernel = "6.7.1".into());
    assert_only("kernel-release", State::Note, "6.18", |pair| pair.there.kernel = "6.18.1".into());
    assert_only("dirty-tracker", State::Fail, "could not protect", |pair| pair.there.tracker = None);
}

#[test]
fn files_that_criu_would_refuse_fail_by_name() {
    let libdb = "/usr/lib/libdb.so";
    assert_only("files", State::Fail, libdb, |pair| pair.workloads[0].files = vec![FileFacts::Missing]);
    assert_only("files", State::Fail, "build-id", |pair| file_there(pair).build_id = vec![2; 20]);
    assert_only("files", State::Fail, "size", |pair| file_there(pair).size = 99);
    assert_only("files", State::Fail, "755 here and 700 on b", |pair| file_there(pair).mode = 0o700);
    assert_only("files", State::Warn, "owner", |pair| file_there(pair).uid = 5);
    // Without a build-id it is the content that counts.
    let plain = |digest| RegularFile { build_id: Vec::new(), digest, ..regular() };
    let with = |ours: RegularFile, theirs: RegularFile| {
        move |pair: &mut Pair| {
            pair.workloads[0].footprint.files[0].here = FileFacts::Regular(ours);
            pair.workloads[0].files = vec![FileFacts::Regular(theirs)];
        }
    };
    assert_only("files", State::Fail, "content", with(plain(Some([1; 32])), plain(Some([2; 32]))));
    assert_eq!(after(with(plain(Some([1; 32])), plain(Some([1; 32])))), []);
    assert_only("files", State::Warn, "size alone", with(plain(None), plain(None)));
}

#[test]
fn many_files_that_differ_do_not_drown_the_rest() {
    let found = after(|pair| {
        let needs = &mut pair.workloads[0];
        needs.footprint.files = vec![needs.footprint.files[0].clone(); 50];
        needs.files = vec![FileFacts::Missing; 50];
    });
    assert_eq!(found.len(), FILE_LINES_MAX + 1);
    assert!(found.last().unwrap().2.contains("30 more"), "{found:?}");
}

#[test]
fn users_that_are_others_there_are_a_risk() {
    assert_only("users", State::Warn, "user 105, db here", |pair| pair.workloads[0].users[0].there = None);
    let other = |pair: &mut Pair| pair.workloads[0].groups[0].there = Some("sys".into());
    assert_only("groups", State::Warn, "staff here, sys on b", other);
    // Nobody knows it here either.
    let nameless = |pair: &mut Pair| pair.workloads[0].users[0].here = None;
    assert_eq!(after(nameless), []);
}

#[test]
fn a_peer_without_room_fails_and_with_little_is_warned_of() {
    assert_only("memory", State::Fail, "no room", |pair| pair.there.store_free = 1 << 20);
    assert_only("memory", State::Fail, "too little", |pair| pair.there.memory_available = 1 << 29);
    assert_only("memory", State::Warn, "little", |pair| pair.there.memory_available = 2 << 30);
    // The image is there already.
    let held = |pair: &mut Pair| {
        pair.there.store_free = 1 << 20;
        pair.workloads[0].footprint.held = true;
    };
    assert_eq!(after(held), []);
}

#[test]
fn clocks_are_judged_by_what_is_sure() {
    let later = |pair: &mut Pair, by: Duration| pair.clocks[1].there.wall += by;
    assert_only("wall-clock-offset", State::Warn, "2000 ms later", |pair| {
        later(pair, Duration::from_secs(2));
    });
    assert_eq!(after(|pair| later(pair, Duration::from_millis(100))), []);
    // 3 % fast: more than a lease allows for.
    let fast = |pair: &mut Pair| pair.clocks[1].there.boot += Duration::from_millis(60);
    assert_only("clock-rate", State::Fail, "leases allow for 20000", fast);
    assert_only("clock-rate", State::Warn, "+2000 ppm", |pair| {
        pair.clocks[1].there.boot += Duration::from_millis(4);
    });
    // A slow answer makes nothing sure.
    let unsure = |pair: &mut Pair| {
        pair.clocks[1].there.boot += Duration::from_millis(60);
        pair.clocks[1].error = Duration::from_millis(100);
    };
    assert_eq!(after(unsure), []);
    let younger = |pair: &mut Pair| {
        for clocks in &mut pair.clocks {
            clocks.there.boot -= Duration::from_secs(5000);
        }
    };
    assert_only("monotonic-clock", State::Warn, "5000 s after", younger);
}

#[test]
fn what_the_network_does_not_carry_is_a_risk() {
    assert_only("mtu", State::Warn, "9000 on b", |pair| pair.there.mtu = Some(9000));
    assert_only("mtu", State::Warn, "1300", |pair| pair.payload = Some(1272));
    assert_only("mtu", State::Warn, "no connection", |pair| pair.payload = None);
    let jumbo = |payload| {
        move |pair: &mut Pair| {
            (pair.here.mtu, pair.there.mtu, pair.payload) = (Some(9000), Some(9000), Some(payload));
        }
    };
    assert_eq!(after(jumbo(8940)), []);
    assert_only("mtu", State::Warn, "1500", jumbo(1472));
    let no_device = |pair: &mut Pair| pair.there.vips[0].trouble = Some("there is no device eth0".into());
    assert_only("address", State::Fail, "no device eth0", no_device);
    assert_only("address", State::Warn, "1400 on b", |pair| pair.there.vips[0].mtu = Some(1400));
}
