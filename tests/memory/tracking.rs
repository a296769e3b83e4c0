//! What passes report.

use std::{fs::File, os::unix::fs::FileExt};

use standin::{
    extents,
    memory::{MappingKind, TrackError, Tracker},
    model::Extent,
};

use crate::{
    replica::{Replica, holds},
    target::{Target, await_state, signal_process},
};

const PAGE: u64 = 4096;

/// A target that is tracked and whose replica is complete.
fn followed(prepare: &[&str]) -> (Target, Tracker, Replica, Vec<u64>) {
    let mut target = Target::start();
    let answers = prepare.iter().map(|command| target.ask(command).parse().unwrap_or(0)).collect();
    let mut tracker = Tracker::attach(target.pid()).unwrap();
    let mut replica = Replica::default();
    frozen_pass(&target, &mut tracker, &mut replica);
    (target, tracker, replica, answers)
}

fn frozen_pass(target: &Target, tracker: &mut Tracker, replica: &mut Replica) -> Vec<Extent> {
    target.freeze();
    let dirty = replica.follow(tracker, true);
    replica.check(tracker);
    target.thaw();
    dirty
}

#[test]
fn a_dirty_page_is_never_lost_in_thousands_of_random_operations() {
    let (mut target, mut tracker, mut replica, _) = followed(&["writers 2"]);
    let mut reported = 0;
    for seed in 1..=80u64 {
        target.tell(&format!("soak {} 100", seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        // Passes race with the operations: these are pre-copy rounds.
        for _ in 0..seed % 4 {
            replica.follow(&mut tracker, false);
        }
        target.answer();
        reported += extents::pages(&frozen_pass(&target, &mut tracker, &mut replica));
    }
    assert!(replica.checked > 20_000, "only {} pages were compared", replica.checked);
    println!("{} pages compared, {reported} reported by the frozen passes", replica.checked);
}

#[test]
fn what_is_done_to_a_frozen_process_is_seen_by_the_second_pass() {
    let (target, mut tracker, mut replica, at) = followed(&["anon a 600", "fill a 7"]);
    target.freeze();
    replica.follow(&mut tracker, true);
    let mut touched = Vec::new();
    tracker.take_touched(&mut touched).unwrap();
    assert!(touched.is_empty(), "{touched:x?}");
    let memory = File::options().write(true).open(format!("/proc/{}/mem", target.pid())).unwrap();
    let pages = [at[0], at[0] + 77 * PAGE, at[0] + 599 * PAGE];
    for page in pages {
        memory.write_all_at(b"parasite", page).unwrap();
    }
    tracker.take_touched(&mut touched).unwrap();
    let expected: Vec<Extent> = pages.into_iter().map(|start| Extent { start, pages: 1 }).collect();
    assert_eq!(touched, expected);
    tracker.take_touched(&mut touched).unwrap();
    assert!(touched.is_empty(), "{touched:x?}");
}

#[test]
fn a_cow_page_dropped_from_a_private_file_mapping_is_seen() {
    let (mut target, mut tracker, mut replica, at) = followed(&["file f 8", "fill f 77", "signals"]);
    target.ask("drop f");
    let dirty = frozen_pass(&target, &mut tracker, &mut replica);
    assert!((0..8).all(|page| holds(&dirty, at[0] + page * PAGE)), "{dirty:x?}");
    target.ask("poke f 3 5");
    frozen_pass(&target, &mut tracker, &mut replica);
}

#[test]
fn pages_that_are_still_the_files_own_are_not_reported() {
    const PAGES: u64 = 400;
    let (mut target, mut tracker, mut replica, at) = followed(&["file f 400"]);
    // That maps them.
    let memory = File::open(format!("/proc/{}/mem", target.pid())).unwrap();
    memory.read_exact_at(&mut vec![0; (PAGES * PAGE) as usize], at[0]).unwrap();
    target.ask("poke f 3 5");
    let mapping = Extent { start: at[0], pages: PAGES };
    let dirty = extents::intersect(&frozen_pass(&target, &mut tracker, &mut replica), &[mapping]);
    assert_eq!(dirty, [Extent { start: at[0] + 3 * PAGE, pages: 1 }]);
    // They are protected all the same, and reported as soon as they are written.
    for page in [0, 4, 399] {
        target.ask(&format!("poke f {page} 6"));
        let dirty = extents::intersect(&frozen_pass(&target, &mut tracker, &mut replica), &[mapping]);
        assert_eq!(dirty, [Extent { start: at[0] + page * PAGE, pages: 1 }]);
    }
}

/// What DONTNEED left in the place of protected pages must go, or the kernel begins this madvise again for ever.
#[test]
fn a_guard_region_comes_in_the_place_of_protected_pages_of_a_file() {
    let (mut target, mut tracker, mut replica, _) = followed(&["file f 8", "fill f 77"]);
    target.tell("guard f 8");
    let answer = std::thread::scope(|scope| {
        let answer = scope.spawn(|| target.answer());
        for _ in 0..200 {
            replica.follow(&mut tracker, false);
            if answer.is_finished() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        if !answer.is_finished() {
            signal_process(tracker.pid(), libc::SIGKILL);
        }
        answer.join().expect("madvise returns")
    });
    println!("madvise: {answer}");
    frozen_pass(&target, &mut tracker, &mut replica);
}

#[test]
fn shared_memory_is_left_to_the_caller() {
    let (mut target, mut tracker, mut replica, at) = followed(&["shared s 16", "fill s 1"]);
    target.ask("fill s 2");
    let dirty = frozen_pass(&target, &mut tracker, &mut replica);
    assert!(!holds(&dirty, at[0]));
    let shared = |m: standin::memory::Mapping| m.kind == MappingKind::Shared && m.extent.start == at[0];
    assert!(tracker.mappings().any(shared));
}

#[test]
fn a_pass_reports_exactly_what_was_written() {
    let (mut target, mut tracker, mut replica, at) = followed(&["anon a 512", "fill a 1"]);
    target.ask("poke a 7 9");
    target.ask("receive a 100 3");
    let dirty = frozen_pass(&target, &mut tracker, &mut replica);
    let of_area: Vec<u64> = (0..512).filter(|page| holds(&dirty, at[0] + page * PAGE)).collect();
    assert_eq!(of_area, [7, 100]);
    frozen_pass(&target, &mut tracker, &mut replica);
    let idle = frozen_pass(&target, &mut tracker, &mut replica);
    assert!(extents::pages(&idle) < 64, "{idle:x?}");
}

#[test]
fn a_mapping_made_again_at_the_same_place_is_seen() {
    // The line in /proc/PID/maps stays the same to the letter, the registration is gone.
    let (mut target, mut tracker, mut replica, at) = followed(&["anon a 32", "fill a 1"]);
    for value in 2..5 {
        target.ask("remake a");
        target.ask(&format!("fill a {value} 2"));
        let dirty = frozen_pass(&target, &mut tracker, &mut replica);
        assert!((0..32).step_by(2).all(|page| holds(&dirty, at[0] + page * PAGE)));
        target.ask("poke a 5 1");
        assert!(holds(&frozen_pass(&target, &mut tracker, &mut replica), at[0] + 5 * PAGE));
    }
}

#[test]
fn a_mapping_that_grew_or_moved_is_followed() {
    let (mut target, mut tracker, mut replica, _) = followed(&["anon a 16", "fill a 1"]);
    for (value, command) in ["resize a 40", "move a", "resize a 60", "move a", "move a"].iter().enumerate() {
        let at: u64 = target.ask(command).parse().unwrap();
        // One that grew where it was is still registered, and none of its pages was written.
        frozen_pass(&target, &mut tracker, &mut replica);
        target.ask(&format!("fill a {}", 10 + value));
        let dirty = frozen_pass(&target, &mut tracker, &mut replica);
        assert!((0..16).all(|page| holds(&dirty, at + page * PAGE)), "{command}, then written: {dirty:x?}");
        let idle = frozen_pass(&target, &mut tracker, &mut replica);
        assert!(!(0..16).any(|page| holds(&idle, at + page * PAGE)), "{command}, then left alone: {idle:x?}");
    }
}

/// The kernel joins the two and takes both off the list of what is registered; the marks of the protection stay, and hold
/// nothing up.
#[test]
fn a_mapping_that_another_is_moved_up_to_is_followed() {
    // The second one has never been touched, so that it fits anywhere.
    let prepare = ["anon b 4", "shared s 1", "anon a 32", "shrink a 16", "fill a 1"];
    let (mut target, mut tracker, mut replica, at) = followed(&prepare);
    frozen_pass(&target, &mut tracker, &mut replica);
    target.ask("join a");
    target.ask("poke a 3 9");
    target.ask("poke a 5 9");
    let dirty = frozen_pass(&target, &mut tracker, &mut replica);
    assert!([3, 5].iter().all(|page| holds(&dirty, at[2] + page * PAGE)), "{dirty:x?}");
    target.ask("poke a 7 9");
    frozen_pass(&target, &mut tracker, &mut replica);
}

/// The same while a pass is about to register another mapping: between its look at what is registered and the
/// registration, which takes in what lost its own meanwhile, marks and all.
#[test]
fn a_mapping_that_another_is_moved_up_to_during_a_pass_is_followed() {
    const ROUNDS: u64 = 1500;
    let prepare = ["anon b 4", "shared s 1", "anon a 32", "shrink a 16", "fill a 1"];
    let (mut target, mut tracker, _, at) = followed(&prepare);
    let memory = File::open(format!("/proc/{}/mem", target.pid())).unwrap();
    let (mut dirty, mut seen, mut lost) = (Vec::new(), 0, Vec::new());
    for round in 0..ROUNDS {
        // All is registered, and protected.
        tracker.take_dirty(&mut dirty).unwrap();
        tracker.take_dirty(&mut dirty).unwrap();
        let page = at[2] + round % 16 * PAGE;
        let read = || {
            let mut word = [0; 8];
            memory.read_exact_at(&mut word, page).unwrap();
            u64::from_ne_bytes(word)
        };
        target.tell(&format!("rejoin a {} {} {}", round % 150 * 1000, round % 16, round + 1000));
        let mut known = 0;
        for _ in 0..8 {
            tracker.take_dirty(&mut dirty).unwrap();
            if holds(&dirty, page) {
                known = read();
            }
        }
        target.answer();
        tracker.take_dirty(&mut dirty).unwrap();
        if holds(&dirty, page) {
            known = read();
        }
        seen += u64::from(known == round + 1000);
        if known != read() {
            lost.push(round);
        }
        target.ask("unjoin a");
    }
    println!("{seen} of {ROUNDS} seen");
    assert!(lost.is_empty(), "{} of {ROUNDS} stores were not seen, of the rounds {lost:?}", lost.len());
}

/// A registration of what was listed splits what is there by now, and the kernel moves no mapping that is split.
#[test]
fn a_mapping_in_the_place_of_one_that_was_listed_can_be_moved() {
    for command in ["replace 30000", "replace-first 30000"] {
        let (mut target, mut tracker, mut replica, _) = followed(&[]);
        target.tell(command);
        let (refused, passes) = std::thread::scope(|scope| {
            let answer = scope.spawn(|| target.answer());
            let mut passes = 0;
            while !answer.is_finished() {
                tracker.register().unwrap();
                passes += 1;
            }
            (answer.join().unwrap(), passes)
        });
        assert!(passes > 50);
        assert_eq!(refused, "0", "{command}: moves that were refused, {passes} passes");
        frozen_pass(&target, &mut tracker, &mut replica);
    }
}

/// Else a database's snapshot process would come to have its memory twice, in copies that the kernel does not take for
/// written, and which it may drop when a later child says MADV_FREE.
#[test]
fn what_is_read_of_a_process_stays_shared_with_its_fork() {
    let (mut target, mut tracker, mut replica, at) = followed(&["anon a 700", "fill a 1"]);
    let child: i32 = target.ask("fork").parse().unwrap();
    await_state(child, |states| states.starts_with('S'));
    let mut of_child = Tracker::attach(child).unwrap();
    let mut second = Replica::default();
    for pid in [child, target.pid()] {
        signal_process(pid, libc::SIGSTOP);
        await_state(pid, |states| states == "T");
    }
    second.follow(&mut of_child, true);
    second.check(&of_child);
    replica.follow(&mut tracker, true);
    replica.check(&tracker);
    for pid in [child, target.pid()] {
        let sizes = sizes_of(pid, at[0]);
        let size = |name: &str| sizes.iter().find(|(of, _)| of == name).map(|(_, kib)| *kib);
        assert_eq!(size("Rss"), Some(2800), "process {pid}");
        assert_eq!(size("Shared_Dirty"), Some(2800), "process {pid}: {sizes:?}");
    }
    signal_process(child, libc::SIGKILL);
    target.thaw();
}

/// The fields of a mapping in `/proc/PID/smaps` that are in KiB.
fn sizes_of(pid: i32, start: u64) -> Vec<(String, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let is_it = |line: &str| line.starts_with(&format!("{start:x}-"));
    let lines = text.lines().skip_while(|line| !is_it(line)).skip(1);
    let fields = lines.map_while(|line| line.split_once(':'));
    fields
        .filter_map(|(name, kib)| Some((name.to_owned(), kib.trim().strip_suffix(" kB")?.parse().ok()?)))
        .collect()
}

#[test]
fn a_page_that_nobody_may_read_is_read() {
    let (mut target, mut tracker, mut replica, _) = followed(&["anon a 700", "fill a 1"]);
    // Not at all, and for writing alone.
    for (value, access) in [(2, 0), (3, libc::PROT_WRITE)] {
        target.ask(&format!("protect a {}", libc::PROT_READ | libc::PROT_WRITE));
        target.ask(&format!("fill a {value}"));
        target.ask(&format!("protect a {access}"));
        let dirty = frozen_pass(&target, &mut tracker, &mut replica);
        assert!(extents::pages(&dirty) >= 700);
    }
}

#[test]
fn a_guard_region_is_no_page() {
    let (mut target, mut tracker, mut replica, at) = followed(&["anon a 16", "fill a 1"]);
    if target.ask("guard a 8") != "0" {
        println!("this kernel has no MADV_GUARD_INSTALL");
        return;
    }
    target.ask("poke a 9 1");
    target.freeze();
    let dirty = replica.follow(&mut tracker, true);
    target.thaw();
    assert!(!holds(&dirty, at[0]) && holds(&dirty, at[0] + 9 * PAGE));
}

#[test]
fn an_exec_is_noticed() {
    let (mut target, mut tracker, mut replica, _) = followed(&["anon a 16"]);
    target.tell("exec");
    assert_eq!(target.answer(), format!("ready {}", target.pid()));
    let error = tracker.take_dirty(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, TrackError::Replaced(_)), "{error}");
    let mut tracker = Tracker::attach(target.pid()).unwrap();
    frozen_pass(&target, &mut tracker, &mut replica);
}

#[test]
fn an_exit_is_noticed() {
    let (target, mut tracker, _, _) = followed(&[]);
    target.signal(libc::SIGKILL);
    await_state(target.pid(), |states| states == "Z" || states.is_empty());
    let error = tracker.take_dirty(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, TrackError::Gone(_)), "{error}");
    assert!(Tracker::attach(target.pid()).is_err());
}

#[test]
fn a_forked_child_is_tracked_by_an_attach_of_its_own() {
    let (mut target, mut tracker, mut replica, _) = followed(&["anon a 64", "fill a 1"]);
    let child: i32 = target.ask("fork").parse().unwrap();
    target.ask("fill a 2");
    await_state(child, |states| states.starts_with('S'));
    let mut of_child = Tracker::attach(child).unwrap();
    let mut second = Replica::default();
    signal_process(child, libc::SIGSTOP);
    await_state(child, |states| states == "T");
    second.follow(&mut of_child, true);
    second.check(&of_child);
    frozen_pass(&target, &mut tracker, &mut replica);
    signal_process(child, libc::SIGKILL);
}

#[test]
fn a_second_tracker_reports_everything_every_time() {
    // Another userfaultfd holds the mappings: they cannot be registered, so each pass has all of them.
    let (target, mut tracker, mut replica, _) = followed(&["anon a 64", "fill a 1"]);
    let mut second = Tracker::attach(target.pid()).unwrap();
    let mut other = Replica::default();
    for _ in 0..2 {
        target.freeze();
        let mut all = Vec::new();
        let pass = second.take_dirty(&mut all).unwrap();
        assert!(pass.untracked > 5 && extents::pages(&all) > 64);
        other.follow(&mut second, true);
        other.check(&second);
        target.thaw();
    }
    drop(second);
    frozen_pass(&target, &mut tracker, &mut replica);
}

#[test]
fn more_runs_than_one_call_gives_are_all_seen() {
    let (mut target, mut tracker, mut replica, at) = followed(&["anon a 40000", "fill a 1"]);
    target.ask("fill a 2 2");
    let dirty = frozen_pass(&target, &mut tracker, &mut replica);
    assert!((0..40_000).step_by(2).all(|page| {
        let start = at[0] + page * PAGE;
        dirty.binary_search_by_key(&start, |extent| extent.start).is_ok()
    }));
    let mut populated = Vec::new();
    tracker.populated(&mut populated).unwrap();
    assert!(extents::subtract(&dirty, &populated).is_empty());
    assert!(holds(&populated, at[0] + PAGE));
}
