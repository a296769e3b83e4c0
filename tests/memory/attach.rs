//! Injection leaves no trace.

use std::{fs, process::Command, thread, time::Duration};

use standin::memory::{AttachError, Tracker};

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
        // Each thread is once the one that is stopped: libtest runs the program beside the main thread.
        let mut target = Target::start();
        target.tell(&format!("sleep {kind} 400"));
        thread::sleep(Duration::from_millis(50));
        let before = descriptors(target.pid());
        let trackers: Vec<_> = (0..20).map(|_| Tracker::attach(target.pid()).unwrap()).collect();
        let (got, error, ms) = fields(&target.answer());
        assert_eq!((got, if got < 0 { error } else { 0 }), (result, errno), "{kind}");
        assert!((395..5000).contains(&ms), "{kind} lasted {ms} ms");
        assert_eq!(tracer(target.pid()), "TracerPid:\t0");
        drop(trackers);
        assert_eq!(descriptors(target.pid()) - before, 0);
    }
}
