//! The ways to lose a page, each with a program that does just that: without the rule against it, its test fails.

use std::{
    fs::{self, File},
    os::{fd::AsFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use standin::capture::{CaptureError, Note, Tracking};

use crate::{
    device::{self, Device},
    host::{Primary, await_true},
    stages::before_freeze,
    sys::{self, Mapping},
    workload::{self, DIR, ROLE},
};

const PAGES: usize = 64;
/// Enough that a mapping's pages are listed by us and not by CRIU, and that they are sent before the freeze.
const MANY_PAGES: usize = 2048;
/// How the role begins that reads from a device; its path follows.
const DIRECT: &str = "direct ";
/// In a directory of the program: makes it do what it waits to do.
const GO: &str = "go";
/// The pid, inside, of a child that ends and comes again; far above those that come by themselves.
const CHILD: i32 = 20_000;

/// A store through the one mapping leaves no trace in the other, which is the one that CRIU looks at. So CRIU sends all of
/// it, and nothing that the standby holds of it counts.
#[test]
fn shared_memory_that_is_written_through_another_mapping_is_not_lost() {
    shared_memory_is_not_lost("alias");
}

#[test]
fn shared_memory_that_is_written_by_another_process_is_not_lost() {
    shared_memory_is_not_lost("alias-process");
}

#[test]
fn system_v_shared_memory_is_not_lost() {
    shared_memory_is_not_lost("system-v");
}

/// CRIU does not see that such an object is used, and would leave it out of the image.
#[test]
fn a_system_v_object_that_comes_right_before_the_freeze_fails_the_epoch_once() {
    let mut primary = Primary::start("semaphore", Tracking::WriteProtect);
    primary.true_epoch(false);
    let dir = primary.home.dir.path().to_owned();
    primary.capturer.on_stages(before_freeze(move || {
        fs::write(dir.join(GO), "").unwrap();
        await_true("the semaphore", || fs::read_to_string(dir.join("log")).unwrap().contains("changed"));
    }));
    let failed = primary.try_true_epoch(false).map(drop);
    assert!(matches!(failed, Err(CaptureError::Ipc)), "{failed:?}");
    primary.true_epoch(false);
    let view = primary.store.view().unwrap();
    assert!(Note::read(&view.criu_dir()).unwrap().own_ipc);
    let images = fs::read_dir(view.criu_dir()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(images.into_iter().any(|name| name.to_string_lossy().starts_with("ipcns-sem-")));
}

fn shared_memory_is_not_lost(role: &str) {
    let mut primary = Primary::start(role, Tracking::WriteProtect);
    for _ in 0..4 {
        let truth = primary.true_epoch(false);
        assert_eq!(truth.spaces().1, 1);
        let ticks = primary.home.ticks();
        primary.home.await_ticks(ticks);
    }
}

/// A read past the page cache takes hold of its pages, and the data comes later: behind a pass over the running program,
/// which protects the pages without holding the device up.
#[test]
fn what_a_device_writes_behind_a_pass_is_not_lost() {
    let device = Device::mount();
    let role = format!("{DIRECT}{}", device.path().display());
    let mut primary = Primary::start(&role, Tracking::WriteProtect);
    primary.true_epoch(false);
    fs::write(primary.home.dir.path().join(GO), "").unwrap();
    await_true("the read", || device.is_reading());
    // The data comes behind all passes but those of the freeze.
    let (answer, log) = (device.answerer(), primary.home.dir.path().join("log"));
    primary.capturer.on_stages(before_freeze(move || {
        let has_come = || fs::read_to_string(&log).unwrap().contains("changed");
        if !has_come() {
            answer.send(()).unwrap();
            await_true("the data", has_come);
        }
    }));
    primary.true_epoch(false);
    primary.true_epoch(false);
}

/// CRIU runs code of its own in each thread while our first pass is over.
#[test]
fn pages_that_criu_touches_in_the_freeze_are_those_of_the_freeze() {
    let mut primary = Primary::start("rest", Tracking::WriteProtect);
    (0..4).for_each(|_| drop(primary.true_epoch(false)));
}

/// Nothing that is known of a process is true of the next one with its pid.
#[test]
fn a_process_that_takes_anothers_pid_before_the_freeze_is_read_whole() {
    changed_before_the_freeze("reborn");
}

#[test]
fn a_process_that_executes_a_program_before_the_freeze_is_read_whole() {
    changed_before_the_freeze("executing");
}

#[test]
fn a_process_that_is_born_before_the_freeze_is_read_whole() {
    changed_before_the_freeze("bearing");
}

/// The tree was looked at, and has another process when it is frozen.
fn changed_before_the_freeze(role: &str) {
    let mut primary = Primary::start(role, Tracking::WriteProtect);
    primary.true_epoch(false);
    primary.true_epoch(false);
    let (go, log) = (primary.home.dir.path().join(GO), primary.home.dir.path().join("log"));
    let truth = primary.compared(false, &mut || {
        fs::write(&go, "").unwrap();
        await_true("the change", || fs::read_to_string(&log).unwrap().contains("changed"));
    });
    let truth = truth.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(truth.spaces().0, 2);
    primary.true_epoch(false);
}

#[test]
fn processes_that_share_their_memory_are_refused_and_the_reason_is_named() {
    is_refused("sharing", "shares its memory");
}

/// A guard region's page is in no image, whoever lists the mapping's pages.
#[test]
fn guard_regions_are_left_out_and_what_comes_in_their_place_is_not_lost() {
    let mut primary = Primary::start("guarded", Tracking::WriteProtect);
    if primary.home.log().contains("no guard regions") {
        println!("{}", primary.home.log());
        return;
    }
    epochs_between_changes(&mut primary);
}

#[test]
fn pages_that_the_program_may_not_read_are_not_lost() {
    epochs_between_changes(&mut Primary::start("unreadable", Tracking::WriteProtect));
}

fn epochs_between_changes(primary: &mut Primary) {
    for _ in 0..8 {
        assert!(primary.true_epoch(false).count() > MANY_PAGES as u64);
        let ticks = primary.home.ticks();
        primary.home.await_ticks(ticks);
    }
}

#[test]
fn an_io_uring_is_refused_and_named() {
    // Where nobody may have one, there is nothing to refuse.
    if fs::read_to_string("/proc/sys/kernel/io_uring_disabled").is_ok_and(|text| text.trim() != "2") {
        is_refused("ring", "an io_uring");
    }
}

/// The program goes on all the same.
fn is_refused(role: &str, reason: &str) {
    let mut primary = Primary::start(role, Tracking::WriteProtect);
    let error = primary.failing(&mut |_, _| Ok(()));
    assert!(matches!(error, CaptureError::Holds { .. }), "{error}");
    assert!(error.to_string().contains(reason), "{error}");
}

/// The programs.
pub(crate) fn run(role: &str) {
    if let Some(device) = role.strip_prefix(DIRECT) {
        return direct(Path::new(device));
    }
    match role {
        "alias" => alias(),
        "alias-process" => alias_of_another(),
        "guarded" => guarded(),
        "unreadable" => unreadable(),
        "ring" => {
            let _ring = sys::io_uring();
            rest();
        }
        "rest" => rest(),
        "reborn" => change(|| {
            child_of_pid(2);
            || {
                sys::kill_and_reap(CHILD);
                child_of_pid(3);
            }
        }),
        "bearing" => change(|| || child_of_pid(3)),
        "executing" => change(|| {
            child_that_executes();
            || await_true("the other program", || fs::exists(in_dir("executed")).unwrap())
        }),
        "executed" => executed(),
        "sharing" => {
            sys::share_memory();
            rest();
        }
        "system-v" => {
            count_in(&Mapping::system_v(PAGES));
        }
        "semaphore" => change(|| sys::make_semaphore),
        _ => {}
    }
}

fn in_dir(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(DIR).expect("a directory")).join(name)
}

/// A memory file that is mapped twice, and written through the mapping of which CRIU does not read.
fn alias() {
    let file = File::from(memfd_create(c"alias", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len((PAGES * 4096) as u64).unwrap();
    let [first, second] = [(); 2].map(|()| Mapping::of_file(file.as_fd(), PAGES, true));
    (0..PAGES).for_each(|page| first.write(page, 0, 1));
    count_in(if first.start() > second.start() { &first } else { &second });
}

/// Memory that the child writes; CRIU reads that of the process with the lowest pid.
fn alias_of_another() {
    let memory = Mapping::shared(PAGES);
    (0..PAGES).for_each(|page| memory.write(page, 0, 1));
    if sys::fork().is_none() {
        count_in(&memory);
    }
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}

fn count_in(memory: &Mapping) {
    for tick in 1_u64.. {
        (0..PAGES).for_each(|page| memory.write(page, 1, tick));
        println!("tick {tick}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// When told to, it writes much, so that this is sent before the freeze, and then reads from a device.
fn direct(device: &Path) {
    let (much, memory) = (Mapping::private(MANY_PAGES), Mapping::private(device::PAGES));
    (0..device::PAGES).for_each(|page| memory.write(page, 0, 1));
    change(|| {
        || {
            (0..MANY_PAGES).for_each(|page| much.write(page, 0, 1));
            memory.read_from(&device::open(device), 0);
            assert!(
                (0..device::PAGES)
                    .all(|page| memory.read(page, 7) == u64::from_ne_bytes([device::CONTENT; 8]))
            );
        }
    });
}

/// Large and small memory with guard regions that come and go, over pages that were written.
fn guarded() {
    const REGION: usize = 8;
    let memory = [Mapping::private(MANY_PAGES), Mapping::private(PAGES)];
    for tick in 1_usize.. {
        for mapping in &memory {
            let regions = mapping.pages() / REGION;
            let (gone, new) = (tick % regions * REGION, (tick + 1) % regions * REGION);
            if !mapping.unguard(gone, REGION) {
                println!("tick 1 of a kernel with no guard regions");
                return rest();
            }
            for page in (0..mapping.pages()).filter(|page| *page / REGION != new / REGION) {
                mapping.write(page, page % 512, tick as u64 ^ page as u64);
            }
            assert!(mapping.guard(new, REGION));
        }
        println!("tick {tick}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Large and small memory that is written and may not be read after that, or be touched at all.
fn unreadable() {
    let memory = [MANY_PAGES, MANY_PAGES, PAGES, PAGES].map(Mapping::private);
    for tick in 1_u64.. {
        for (mapping, access) in memory.iter().zip([libc::PROT_NONE, libc::PROT_WRITE].into_iter().cycle()) {
            mapping.protect_all(libc::PROT_READ | libc::PROT_WRITE);
            (0..mapping.pages()).for_each(|page| mapping.write(page, page % 512, tick));
            mapping.protect_all(access);
        }
        println!("tick {tick}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn rest() {
    for _ in 0..3 {
        thread::spawn(|| {
            loop {
                thread::sleep(Duration::from_secs(1));
            }
        });
    }
    for tick in 1_u64.. {
        println!("tick {tick}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Prepares something, and does it when told to.
fn change<F: FnOnce()>(prepare: impl FnOnce() -> F) {
    let then = prepare();
    println!("tick 1");
    await_file(&in_dir(GO));
    then();
    println!("changed");
    rest();
}

fn await_file(path: &Path) {
    while !path.exists() {
        thread::sleep(Duration::from_millis(1));
    }
}

/// A child with our pid, whose pages hold this at an address that is the same in each of them.
fn child_of_pid(value: u64) {
    let memory = Mapping::private_at(0x1234_5678_0000, PAGES);
    if sys::fork_as(CHILD).is_none() {
        (0..PAGES).for_each(|page| memory.write(page, page, value));
        fs::write(in_dir(&format!("wrote-{value}")), "").unwrap();
        loop {
            thread::sleep(Duration::from_secs(1));
        }
    }
    await_file(&in_dir(&format!("wrote-{value}")));
}

/// What it has at the address is known when it executes a program that has something else there.
fn child_that_executes() {
    let memory = Mapping::private_at(0x1234_5678_0000, PAGES);
    (0..PAGES).for_each(|page| memory.write(page, page, 8));
    if sys::fork().is_some() {
        return;
    }
    await_file(&in_dir(GO));
    let error = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", workload::NAME, "--nocapture"])
        .env(ROLE, "executed")
        .exec();
    panic!("exec: {error}");
}

fn executed() {
    let memory = Mapping::private_at(0x1234_5678_0000, PAGES);
    (0..PAGES).for_each(|page| memory.write(page, page, 9));
    fs::write(in_dir("executed"), "").unwrap();
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}
