//! A run: the program of one seed, its epochs, and its restore.

use std::{
    fmt, io, thread,
    time::{Duration, Instant},
};

use standin::{
    capture::{CaptureError, Captured, Finish, Tracking},
    memory::AttachError,
    restore::{self, Mode},
};

use crate::{
    host::{Primary, await_true},
    plain::Plain,
    random::Random,
};

/// What the program must have found right once more after its restore, how often.
const TICKS_AFTER_RESTORE: u64 = 40;
/// Of the time between two epochs.
const PAUSE_MS_MAX: usize = 80;

/// Without a tick something is wrong. Epochs go on meanwhile, since some of what the program does waits for one.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// How long a run lasts.
pub(crate) enum Length {
    Epochs(u64),
    For(Duration),
}

/// Of all runs.
#[derive(Default)]
pub(crate) struct Totals {
    pub(crate) pages: u64,
    epochs: u64,
    compared: u64,
    cut_off: u64,
    refused: u64,
    tasks_max: usize,
    restores: u64,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pages, epochs, compared, cut_off, refused, tasks_max, restores } = self;
        write!(
            f,
            "{pages} pages compared, 0 mismatches: {compared} of {epochs} epochs of at most {tasks_max} tasks; {cut_off} \
             more were cut off, {refused} refused; {restores} plain restores went on"
        )
    }
}

pub(crate) fn run(seed: u64, length: &Length, totals: &mut Totals) {
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let mut primary = Primary::start(&format!("root {seed}"), Tracking::WriteProtect);
    let began = Instant::now();
    let (mut epochs, mut ticks, mut ticked) = (0, 0, began);
    loop {
        epochs += 1;
        let last = match length {
            Length::Epochs(count) => epochs >= *count,
            Length::For(time) => began.elapsed() >= *time,
        };
        if last && one_epoch(&mut primary, &mut random, true, totals) {
            break;
        }
        if !last {
            one_epoch(&mut primary, &mut random, false, totals);
        }
        thread::sleep(Duration::from_millis(random.below(PAUSE_MS_MAX) as u64));
        let now = primary.home.ticks();
        if now > ticks {
            (ticks, ticked) = (now, Instant::now());
        }
        assert!(ticked.elapsed() < SILENCE_MAX, "no tick since {ticks}: {}", primary.home.log());
    }
    go_on(&primary);
    totals.restores += 1;
    println!("{totals}");
}

/// One epoch of some kind; whether there was one.
fn one_epoch(primary: &mut Primary, random: &mut Random, kill: bool, totals: &mut Totals) -> bool {
    if !kill && random.one_in(8) {
        cut_off(primary, random.below(40));
        totals.cut_off += 1;
        return false;
    }
    let done = if !kill && random.one_in(4) {
        primary.attempt(Finish::Continue).map(|Captured { figures, .. }| assert!(figures.frozen_us > 0))
    } else {
        primary.try_true_epoch(kill).map(|truth| {
            totals.pages += truth.count();
            totals.compared += 1;
            totals.tasks_max = totals.tasks_max.max(truth.spaces().0);
        })
    };
    let captured = done.is_ok();
    match done {
        Ok(()) => totals.epochs += 1,
        // While two processes share their memory, and while one waits for the exec of its vfork's child.
        Err(CaptureError::Holds { reason, .. }) if reason.contains("shares its memory") => {
            totals.refused += 1;
        }
        // And while it changes its guard regions.
        Err(CaptureError::Attach(AttachError::NotStopping { .. }) | CaptureError::Guards(_)) => {
            totals.refused += 1;
        }
        // The program may have ended because of what it found.
        Err(error) => panic!("an epoch failed: {error}; {}", log_end(primary)),
    }
    assert!(totals.refused < 10 + totals.epochs, "most epochs are refused: {totals}");
    captured
}

/// What became of the program, and what it has said last.
fn log_end(primary: &Primary) -> String {
    const LINES: usize = 20;
    let root = primary.home.sandbox.workload_pid();
    let status = match &root {
        Ok(Some((host, _))) => std::fs::read_to_string(format!("/proc/{host}/status")).unwrap_or_default(),
        _ => String::new(),
    };
    let told = |line: &&str| line.starts_with("State:") || line.starts_with("TracerPid:");
    let log = primary.home.log();
    let mut end: Vec<_> = log.lines().rev().take(LINES).collect();
    end.extend(status.lines().filter(told));
    end.reverse();
    format!("its root is {root:?}\n{}", end.join("\n"))
}

/// An epoch whose link breaks.
fn cut_off(primary: &mut Primary, frames: usize) {
    let head = primary.next_head();
    let mut sent = 0;
    let captured = primary.capturer.capture(head, Finish::Continue, &mut |_, _| {
        sent += 1;
        if sent > frames { Err(io::Error::other("the link is gone")) } else { Ok(()) }
    });
    primary.capturer.failed();
    match captured {
        Ok(_)
        | Err(
            CaptureError::Io(_)
            | CaptureError::Holds { .. }
            | CaptureError::Attach(_)
            | CaptureError::Guards(_),
        ) => {}
        Err(error) => panic!("an epoch that was cut off failed otherwise: {error}"),
    }
}

/// The program goes on from the flat image, restored without anything of ours.
fn go_on(primary: &Primary) {
    await_true("the program's end", || !primary.home.sandbox.is_occupied().unwrap());
    let counted = primary.home.ticks();
    let view = primary.store.freeze_for_restore().unwrap();
    let ready = primary.ram.path().join("ready");
    let ready = restore::materialise(&view, &ready, Mode::Eager, |_| Vec::new()).unwrap();
    let plain = Plain::restore(&ready.dir);
    await_true("the restored program to go on", || plain.ticks() > counted + TICKS_AFTER_RESTORE);
}
