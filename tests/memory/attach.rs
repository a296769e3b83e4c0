//! Injection leaves no trace.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use standin::memory::{AttachError, Tracker, take_back};

use crate::target::{Target, await_state};

fn fields(answer: &str) -> (i64, i32, u64) {
    let mut words = answer.split(' ').map(|word| word.parse::<i64>().unwrap());
    (words.next().unwrap(), words.next().unwrap() as i32, words.next().unwrap() as u64)
}

fn tracer(pid: i32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find(|line| line.starts_with("TracerPid")).unwrap().to_owned()
}

fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Signals that wait to be delivered to the process.
fn pending(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().any(|line| line.contains("Pnd:") && !line.ends_with("0000000000000000"))
}

fn settle(pid: i32) {
    while pending(pid) {
        thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn an_interrupted_syscall_restarts() {
    for (kind, result, errno) in [
        ("nanosleep", 0, 0),
        ("poll", 0, 0),
        ("ppoll", 0, 0),
        ("epoll", 0, 0),
        ("futex", -1, libc::ETIMEDOUT),
        ("spin", 0, 0),
    ] {
        let mut target = Target::start();
        let before = descriptors(target.pid());
        target.tell(&format!("sleep {kind} 400"));
        thread::sleep(Duration::from_millis(50));
        let trackers: Vec<_> = (0..20).map(|_| Tracker::attach(target.pid()).unwrap()).collect();
        let (got, error, ms) = fields(&target.answer());
        assert_eq!((got, if got < 0 { error } else { 0 }), (result, errno), "{kind}");
        assert!((395..5000).contains(&ms), "{kind} lasted {ms} ms");
        assert_eq!(tracer(target.pid()), "TracerPid:\t0");
        drop(trackers);
        assert_eq!(descriptors(target.pid()), before);
    }
}

#[test]
fn a_signal_during_injection_is_delivered() {
    let mut target = Target::start();
    let pid = target.pid();
    let sent = thread::scope(|scope| {
        let attaching = scope.spawn(move || (0..150).for_each(|_| drop(Tracker::attach(pid).unwrap())));
        let mut sent = 0u32;
        while !attaching.is_finished() {
            target.signal(libc::SIGUSR1);
            sent += 1;
            settle(pid);
        }
        sent
    });
    assert!(sent > 50, "only {sent} signals were sent");
    assert_eq!(target.ask("signals"), sent.to_string());
}

#[test]
fn a_signal_during_injection_interrupts_the_call_as_ever() {
    // pause() must not be begun again after the handler has run: it would wait for ever.
    for kind in ["pause", "nanosleep", "ppoll"] {
        for round in 0..30 {
            let mut target = Target::start();
            target.tell(&format!("sleep {kind} 20000"));
            await_state(target.pid(), |states| states == "S");
            thread::sleep(Duration::from_millis(2));
            thread::scope(|scope| {
                let pid = target.pid();
                scope.spawn(move || Tracker::attach(pid).unwrap());
                thread::sleep(Duration::from_micros(round * 10));
                target.signal(libc::SIGUSR1);
            });
            let (got, error, _) = fields(&target.answer());
            assert_eq!((got, error), (-1, libc::EINTR), "{kind}");
        }
    }
}

#[test]
fn a_stopped_process_stays_stopped() {
    let mut target = Target::start();
    target.ask("writers 2");
    for _ in 0..20 {
        target.freeze();
        let mut tracker = Tracker::attach(target.pid()).unwrap();
        await_state(target.pid(), |states| states == "TTT");
        tracker.take_dirty(&mut Vec::new()).unwrap();
        target.thaw();
        assert_eq!(target.ask("signals"), "0");
    }
}

#[test]
fn a_stop_during_injection_stands() {
    let mut target = Target::start();
    for round in 0..60 {
        thread::scope(|scope| {
            let pid = target.pid();
            scope.spawn(move || Tracker::attach(pid).unwrap());
            thread::sleep(Duration::from_micros(round * 8));
            target.signal(libc::SIGSTOP);
        });
        await_state(target.pid(), |states| states == "T");
        thread::sleep(Duration::from_millis(1));
        await_state(target.pid(), |states| states == "T");
        target.thaw();
        assert_eq!(target.ask("signals"), "0");
    }
}

#[test]
fn the_target_runs_on_after_a_failed_attach() {
    // No descriptor is free: the injected call itself fails.
    let mut target = Target::start();
    assert_eq!(target.ask("limit"), "0");
    let error = Tracker::attach(target.pid()).unwrap_err();
    assert!(matches!(error, AttachError::DescriptorLimit(_)), "{error}");
    assert_eq!(target.ask("signals"), "0");

    // The main thread waits for a vfork child and cannot be stopped.
    let mut target = Target::start();
    target.tell("vfork 600");
    await_state(target.pid(), |states| states == "D");
    let error = Tracker::attach(target.pid()).unwrap_err();
    assert!(matches!(error, AttachError::NotStopping { state: 'D', .. }), "{error}");
    assert_eq!(tracer(target.pid()), "TracerPid:\t0");
    target.answer();
    assert_eq!(target.ask("signals"), "0");
    Tracker::attach(target.pid()).unwrap();

    // The same, but another thread can be stopped instead.
    target.ask("writers 1");
    target.tell("vfork 600");
    await_state(target.pid(), |states| states.starts_with('D'));
    Tracker::attach(target.pid()).unwrap();
    target.answer();
    assert_eq!(target.ask("signals"), "0");
}

#[test]
fn a_process_that_executes_programs_meanwhile_is_not_harmed() {
    // Each executes the next.
    const CHAIN: &str = r#"[ "$1" -eq 0 ] && exit 7; exec /bin/sh -c "$0" "$0" $(($1 - 1))"#;
    for _ in 0..4 {
        let mut chain = Command::new("/bin/sh").args(["-c", CHAIN, CHAIN, "400"]).spawn().unwrap();
        let mut attached = 0;
        let status = loop {
            match Tracker::attach(chain.id() as i32) {
                Ok(_) => attached += 1,
                Err(AttachError::Gone(_)) => {}
                Err(error) => panic!("{error}"),
            }
            if let Some(status) = chain.try_wait().unwrap() {
                break status;
            }
        };
        assert_eq!(status.code(), Some(7), "{status} after {attached} attaches");
        assert!(attached > 50, "{attached}");
    }
}

#[test]
fn a_traced_process_names_its_tracer() {
    let mut target = Target::start();
    let mut strace = Command::new("strace")
        .args(["-qq", "-o", "/dev/null", "-p", &target.pid().to_string()])
        .spawn()
        .unwrap();
    while tracer(target.pid()) == "TracerPid:\t0" {
        thread::sleep(Duration::from_millis(1));
    }
    let error = Tracker::attach(target.pid()).unwrap_err();
    let named = matches!(&error, AttachError::Traced { tracer, tracer_pid, .. }
        if tracer == "strace" && *tracer_pid == strace.id() as i32);
    strace.kill().unwrap();
    strace.wait().unwrap();
    assert!(named, "{error}");
    assert_eq!(target.ask("signals"), "0");
}

#[test]
fn a_kernel_thread_and_an_absent_process_are_refused() {
    assert!(matches!(Tracker::attach(2), Err(AttachError::KernelThread(2))));
    assert!(matches!(Tracker::attach(i32::MAX), Err(AttachError::Gone(_))));
}

#[test]
fn a_target_that_dies_during_injection_is_an_error_only() {
    for round in 0..60 {
        let target = Target::start();
        thread::scope(|scope| {
            let pid = target.pid();
            scope.spawn(move || {
                if let Err(error) = Tracker::attach(pid) {
                    assert!(matches!(error, AttachError::Gone(_)), "{error:?}");
                }
            });
            thread::sleep(Duration::from_micros(round * 10));
            target.signal(libc::SIGKILL);
        });
    }
}

#[test]
fn a_32_bit_process_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("pause32");
    let source = directory.path().join("pause32.s");
    // pause() of i386, for ever.
    fs::write(&source, ".code32\n.globl _start\n_start: mov $29, %eax\n int $0x80\n jmp _start\n").unwrap();
    let mut gcc = Command::new("gcc");
    gcc.args(["-m32", "-nostdlib", "-static", "-o"]).arg(&program).arg(&source);
    assert!(gcc.status().unwrap().success());
    let Ok(mut child) = Command::new(&program).spawn() else {
        println!("this kernel runs no 32-bit programs");
        return;
    };
    await_state(child.id() as i32, |states| states == "S");
    let refused = Tracker::attach(child.id() as i32);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(refused, Err(AttachError::Compat(_))), "{refused:?}");
}

/// Whom to attach to.
const ATTACHES: &str = "STANDIN_MEMORY_ATTACHES";

/// What the next one runs and kills.
#[test]
fn the_program_that_attaches() {
    let Ok(pid) = std::env::var(ATTACHES) else { return };
    let pid = pid.parse().unwrap();
    loop {
        // That of the one before may not have let go yet.
        drop(Tracker::attach(pid));
    }
}

/// At whatever instant: it would go on with the registers of the injected call.
#[test]
fn a_target_outlives_whoever_is_killed_while_it_attaches() {
    let mut target = Target::start();
    for round in 0..60 {
        let mut attaching = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "attach::the_program_that_attaches", "--nocapture"])
            .env(ATTACHES, target.pid().to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_micros(25_000 + 137 * round));
        attaching.kill().unwrap();
        attaching.wait().unwrap();
        assert_eq!(target.ask("signals"), "0", "round {round}");
    }
    Tracker::attach(target.pid()).unwrap();
}

/// CRIU would not dump it, for as long as it lives.
#[test]
fn a_child_that_was_forked_in_the_middle_of_an_attach_gives_back_what_it_inherited() {
    let has_one = |pid: i32| {
        let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        links
            .flatten()
            .filter_map(|link| fs::read_link(link.path()).ok())
            .any(|to| to.ends_with("anon_inode:[userfaultfd]"))
    };
    let mut inherited = 0;
    for _ in 0..50 {
        let mut target = Target::start();
        target.tell("forks 150");
        let pid = target.pid();
        let (children, trackers) = thread::scope(|scope| {
            let children = scope.spawn(|| target.answer());
            let mut trackers = Vec::new();
            while !children.is_finished() {
                trackers.push(Tracker::attach(pid).unwrap());
            }
            (children.join().unwrap(), trackers)
        });
        let children: Vec<i32> = children.split(' ').map(|pid| pid.parse().unwrap()).collect();
        for child in children {
            await_state(child, |states| states == "S");
            let before = descriptors(child);
            let taken = take_back(&trackers, child).unwrap();
            assert!(!has_one(child), "process {child}: {taken} closed");
            assert_eq!(descriptors(child), before - taken);
            inherited += taken;
        }
        if inherited > 3 {
            break;
        }
    }
    assert!(inherited > 0, "no child was forked in the middle");
}
