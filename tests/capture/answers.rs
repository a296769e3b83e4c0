//! What CRIU is told in the kernel's place is what the kernel would say: guard regions, and which sockets there are.

use std::{
    fs::{self, File},
    io,
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::AsFd,
        unix::fs::FileExt,
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    path::PathBuf,
    thread,
    time::Duration,
};

use standin::capture::{CaptureError, Finish, Tracking};

use crate::{
    host::{Primary, await_true},
    stages::before_freeze,
    sys::{self, Mapping},
    workload::DIR,
};

const PAGES: usize = 1024;
const ROUNDS: usize = 5;
/// In a directory of the program: makes it do what it waits to do.
const GO: &str = "go-";
/// Of `status` in CRIU's list of mappings (VMA_AREA_GUARD in criu/include/image.h).
const IS_GUARD: u64 = 1 << 16;

/// They come after the last look at the running tree, in memory that is tracked and in memory that is not; some go again.
#[test]
fn the_guard_regions_of_an_image_are_those_of_the_frozen_tree() {
    let mut primary = Primary::start("guard-answers", Tracking::WriteProtect);
    for round in 0..ROUNDS {
        let mut change = changing(&primary, round);
        primary.compared(false, &mut change).unwrap_or_else(|error| panic!("{error}"));
        if !has_guards(&primary) {
            return;
        }
        assert_imaged(&primary, round);
    }
}

/// What CRIU is told ahead of the freeze is not so in it; from then on it is told nothing ahead.
#[test]
fn guard_regions_that_come_right_before_the_freeze_fail_the_epoch_once() {
    let mut primary = Primary::start("guard-answers", Tracking::WriteProtect);
    primary.true_epoch(false);
    for round in 0..ROUNDS {
        let (mut change, mut changed) = (changing(&primary, round), false);
        primary.capturer.on_stages(before_freeze(move || {
            if !std::mem::replace(&mut changed, true) {
                change();
            }
        }));
        let captured = primary.try_true_epoch(false).map(drop);
        if !has_guards(&primary) {
            return;
        }
        match (round, captured) {
            (0, Err(CaptureError::Guards(_))) => {
                primary.true_epoch(false);
            }
            (0, other) => panic!("{other:?}"),
            (_, captured) => captured.unwrap_or_else(|error| panic!("{error}")),
        }
        assert_imaged(&primary, round);
    }
}

/// What CRIU is told ahead of the freeze is not so in it. A last freeze cannot be done again, so for that it is told nothing ahead.
#[test]
fn a_socket_of_another_protocol_right_before_the_freeze_fails_the_epoch_once() {
    for last in [false, true] {
        let mut primary = Primary::start("socket-answers", Tracking::WriteProtect);
        for _ in 0..3 {
            primary.epoch(Finish::Continue);
        }
        let (mut change, mut changed) = (changing(&primary, 0), false);
        primary.capturer.on_stages(before_freeze(move || {
            if !std::mem::replace(&mut changed, true) {
                change();
            }
        }));
        if last {
            primary.try_true_epoch(true).unwrap_or_else(|error| panic!("{error}"));
            continue;
        }
        let captured = primary.attempt(Finish::Continue).map(drop);
        assert!(matches!(captured, Err(CaptureError::Sockets)), "{captured:?}");
        for _ in 0..3 {
            primary.epoch(Finish::Continue);
        }
        primary.true_epoch(false);
    }
}

/// Has the program change what it waits to change.
fn changing(primary: &Primary, round: usize) -> impl FnMut() + Send + 'static {
    let dir = primary.home.dir.path().to_owned();
    move || {
        fs::write(dir.join(format!("{GO}{round}")), "").unwrap();
        let done = format!("round {round}");
        await_true("a change", || fs::read_to_string(dir.join("log")).unwrap().contains(&done));
    }
}

fn has_guards(primary: &Primary) -> bool {
    let has = !primary.home.log().contains("no guard regions");
    if !has {
        println!("this kernel has no guard regions");
    }
    has
}

fn assert_imaged(primary: &Primary, round: usize) {
    let (pid, inner) = primary.home.sandbox.workload_pid().unwrap().unwrap();
    let guards = guards_of(pid);
    assert!(guards.len() > 2 * round, "{guards:x?}");
    assert_eq!(imaged_guards(primary, inner), guards);
}

/// CRIU refuses a socket that it was not told of.
#[test]
fn sockets_of_any_protocol_are_dumped() {
    for kind in ["tcp", "tcp6", "udp", "udp6", "unix", "datagram", "netlink", "all"] {
        let mut primary = Primary::start(&format!("sockets-{kind}"), Tracking::WriteProtect);
        primary.true_epoch(false);
        for _ in 0..5 {
            primary.epoch(Finish::Continue);
        }
        primary.true_epoch(false);
    }
}

/// The programs.
pub(crate) fn run(role: &str) {
    match role {
        "guard-answers" => guarded(),
        "socket-answers" => with_sockets(),
        _ => {
            if let Some(kind) = role.strip_prefix("sockets-") {
                let _held = sockets(kind).unwrap();
                wait();
            }
        }
    }
}

fn guarded() {
    let (private, shared) = (Mapping::private(PAGES), Mapping::shared(PAGES));
    for page in 0..PAGES {
        private.write(page, 0, 1);
        // What a guard region hides is not there: the test reads shared memory through this mapping.
        if page >= PAGES / 2 {
            shared.write(page, 0, 1);
        }
    }
    println!("tick 1");
    for round in 0..ROUNDS {
        await_true("a word of the test", || fs::exists(dir().join(format!("{GO}{round}"))).unwrap());
        let at = 64 * round;
        let pages = [at, at + 4, at + 9];
        if !pages.into_iter().all(|page| private.guard(page, 2) && shared.guard(page, 1)) {
            println!("no guard regions");
        }
        if round > 0 {
            private.unguard(at - 64, 2);
            private.write(at - 64, 0, 2);
        }
        println!("round {round}");
    }
    wait();
}

fn with_sockets() {
    let _first = sockets("tcp").unwrap();
    println!("tick 1");
    await_true("a word of the test", || fs::exists(dir().join(format!("{GO}0"))).unwrap());
    let _second = sockets("udp").unwrap();
    println!("round 0");
    wait();
}

/// From the page map: start and end, neighbours as one.
fn guards_of(pid: u32) -> Vec<(u64, u64)> {
    const GUARD: u64 = 1 << 58;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let mut guards: Vec<(u64, u64)> = Vec::new();
    for line in fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines() {
        let (start, rest) = line.split_once('-').unwrap();
        let [start, end] =
            [start, rest.split_once(' ').unwrap().0].map(|n| u64::from_str_radix(n, 16).unwrap());
        let mut entries = vec![0; ((end - start) / 512) as usize];
        // There is none for the page above all mappings, [vsyscall].
        if pagemap.read_exact_at(&mut entries, start / 512).is_err() {
            continue;
        }
        for (address, entry) in (start..end).step_by(4096).zip(entries.chunks_exact(8)) {
            if u64::from_ne_bytes(entry.try_into().unwrap()) & GUARD == 0 {
                continue;
            }
            match guards.last_mut() {
                Some(last) if last.1 == address => last.1 += 4096,
                _ => guards.push((address, address + 4096)),
            }
        }
    }
    guards
}

fn dir() -> PathBuf {
    PathBuf::from(std::env::var_os(DIR).expect("a directory"))
}

fn wait() {
    for tick in 1_u64.. {
        println!("tick {tick}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn sockets(kind: &str) -> io::Result<Vec<Box<dyn AsFd>>> {
    let mut held: Vec<Box<dyn AsFd>> = Vec::new();
    let wanted = |name| kind == name || kind == "all";
    for (name, address) in [("tcp", "127.0.0.1:0"), ("tcp6", "[::1]:0")] {
        if wanted(name) {
            let listener = TcpListener::bind(address)?;
            held.push(Box::new(TcpStream::connect(listener.local_addr()?)?));
            held.push(Box::new(listener.accept()?.0));
            held.push(Box::new(listener));
        }
    }
    for (name, address) in [("udp", "127.0.0.1:0"), ("udp6", "[::1]:0")] {
        if wanted(name) {
            held.push(Box::new(UdpSocket::bind(address)?));
        }
    }
    if wanted("unix") {
        let (near, far) = UnixStream::pair()?;
        held.extend([Box::new(near) as Box<dyn AsFd>, Box::new(far)]);
        held.push(Box::new(UnixListener::bind(dir().join("socket"))?));
    }
    if wanted("datagram") {
        let (near, far) = UnixDatagram::pair()?;
        held.extend([Box::new(near) as Box<dyn AsFd>, Box::new(far)]);
    }
    if wanted("netlink") {
        held.push(Box::new(sys::netlink()));
    }
    Ok(held)
}

/// The guard regions of the newest image, neighbours as one.
fn imaged_guards(primary: &Primary, inner: u32) -> Vec<(u64, u64)> {
    let images = |n| primary.ram.path().join(format!("dump/dump-{n}/mm-{inner}.img"));
    let newest = (0..2).map(images).max_by_key(|path| fs::metadata(path).and_then(|m| m.modified()).ok());
    let newest = newest.unwrap();
    let told = newest.with_file_name(format!("guards-{inner}"));
    assert!(fs::metadata(told).is_ok(), "CRIU asked the kernel itself");
    let bytes = fs::read(newest).unwrap();
    // Two magic numbers and a length come first.
    let mut guards: Vec<(u64, u64)> = Vec::new();
    for mapping in fields(&bytes[12..]).into_iter().filter(|(number, ..)| *number == 14) {
        let values = fields(mapping.2);
        let value =
            |number| values.iter().find(|(other, ..)| *other == number).map_or(0, |(_, value, _)| *value);
        if value(7) & IS_GUARD == 0 {
            continue;
        }
        match guards.last_mut() {
            Some(last) if last.1 == value(1) => last.1 = value(2),
            _ => guards.push((value(1), value(2))),
        }
    }
    guards
}

/// The fields of a protobuf message: number, value of a number, bytes of a message.
fn fields(mut rest: &[u8]) -> Vec<(u64, u64, &[u8])> {
    fn number(rest: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = rest[0];
            *rest = &rest[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }
    let mut fields = Vec::new();
    while !rest.is_empty() {
        let key = number(&mut rest);
        let (value, bytes) = match key & 7 {
            0 => (number(&mut rest), &[][..]),
            2 => {
                let length = number(&mut rest) as usize;
                let (bytes, behind) = rest.split_at(length);
                rest = behind;
                (0, bytes)
            }
            other => panic!("a field of type {other}"),
        };
        fields.push((key >> 3, value, bytes));
    }
    fields
}
