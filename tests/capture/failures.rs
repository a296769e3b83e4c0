//! Epochs that fail: the tree runs on, and the next epoch is right.

use std::{fs, io, os::unix::fs::FileExt};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use standin::{
    capture::{CaptureError, Emit, Finish, Tracking},
    memory,
    model::{PAGE_SIZE, Space},
};

use crate::{
    host::{Primary, await_true},
    sys, workload,
};

impl Primary {
    /// Changes a byte of every page that the image holds.
    fn damage_image(&self) {
        self.store.fold().unwrap();
        let is_image = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with("image-");
        let image = fs::read_dir(self.store.dir()).unwrap().map(Result::unwrap).find(is_image).unwrap();
        self.store.view().unwrap().for_each_extent(|space, extent| {
            let Space::Task(pid) = space else { return };
            let name = format!("task-{pid}.{}", extent.start >> 40);
            let path = image.path().join("pages").join(name);
            let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
            for page in 0..extent.pages {
                let at = extent.start % (1 << 40) + page * PAGE_SIZE + 2048;
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            }
        });
    }

    /// An epoch whose frames go where the caller says; it fails.
    pub(crate) fn failing(&mut self, emit: &mut Emit<'_>) -> CaptureError {
        let head = self.next_head();
        let error = self.capturer.capture(head, Finish::Continue, emit).expect_err("the epoch fails");
        self.capturer.failed();
        let ticks = self.home.ticks();
        self.home.await_ticks(ticks);
        error
    }
}

#[test]
fn after_an_epoch_that_could_not_be_sent_the_next_is_right() {
    let mut primary = Primary::start("churn", Tracking::WriteProtect);
    // Before anything is held, too.
    for frames in [0, 1, 3] {
        fail_after(&mut primary, frames);
    }
    primary.true_epoch(false);
    for frames in [0, 1, 2, 4, 7, 12] {
        fail_after(&mut primary, frames);
        primary.true_epoch(false);
    }
    fail_after(&mut primary, 2);
    fail_after(&mut primary, 9);
    primary.true_epoch(false);
}

fn fail_after(primary: &mut Primary, frames: usize) {
    let mut sent = 0;
    let error = primary.failing(&mut |_, _| {
        sent += 1;
        if sent > frames { Err(io::Error::other("the link is gone")) } else { Ok(()) }
    });
    assert!(matches!(error, CaptureError::Io(_)), "{error}");
}

#[test]
fn after_a_page_server_that_failed_the_next_epoch_is_right() {
    let mut primary = Primary::start("churn", Tracking::WriteProtect);
    primary.true_epoch(false);
    for _ in 0..3 {
        primary.capturer.spawn_ahead().unwrap();
        let error = primary.failing(&mut |_, _| {
            sys::shut_streams();
            Ok(())
        });
        // CRIU lets the program run at once, which may change guard regions while we compare them.
        assert!(matches!(error, CaptureError::Criu(_) | CaptureError::Guards(_)), "{error}");
        primary.true_epoch(false);
    }
}

/// The CRIU that waits for the freeze, and the one that it was forked from.
#[test]
fn a_criu_that_is_killed_while_it_waits_costs_one_epoch_at_most() {
    let mut primary = Primary::start("churn", Tracking::WriteProtect);
    primary.true_epoch(false);
    for waits in [false, true, false] {
        if waits {
            primary.capturer.spawn_ahead().unwrap();
        }
        let killed = kill_waiting();
        assert!(killed > usize::from(waits), "{killed} processes were killed");
        if waits {
            let error = primary.failing(&mut |_, _| Ok(()));
            assert!(matches!(error, CaptureError::Criu(_)), "{error}");
        }
        primary.true_epoch(false);
    }
}

/// Kills all CRIUs below this process, which is how they are told from those of others; gives their number.
fn kill_waiting() -> usize {
    let words = |pid: i32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let is_criu = |pid: &i32| words(*pid).split(|byte| *byte == 0).any(|word| word == b"--no-default-config");
    let tasks = memory::tasks_of(std::process::id() as i32).unwrap();
    let found: Vec<i32> = tasks.iter().map(|task| task.pid).filter(is_criu).collect();
    for pid in &found {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).unwrap();
    }
    for pid in &found {
        await_true("its end", || words(*pid).is_empty());
    }
    found.len()
}

#[test]
fn a_standby_that_holds_other_pages_is_found_out_and_all_memory_mends_it() {
    let mut primary = Primary::start("churn", Tracking::WriteProtect);
    primary.true_epoch(false);
    primary.damage_image();
    // The first page that changed by little.
    let refused = (0..50).find_map(|_| {
        let ticks = primary.home.ticks();
        primary.home.await_ticks(ticks);
        primary.attempt(Finish::Continue).err()
    });
    let refused = refused.expect("a patch meets a damaged page").to_string();
    assert!(refused.contains("the whole memory is needed"), "{refused}");
    primary.base = None;
    primary.true_epoch(false);
    primary.true_epoch(false);
}

#[test]
fn a_tree_that_criu_refuses_runs_on_and_the_reason_is_named() {
    let mut primary = Primary::start("churn", Tracking::WriteProtect);
    primary.true_epoch(false);
    let mark = primary.home.dir.path().join(workload::REFUSED);
    // With io_uring, where the kernel lets nobody have one, there is nothing to refuse.
    let rings = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").is_ok_and(|text| text.trim() != "2");
    let kinds: &[&str] = if rings { &["userfaultfd", "io_uring"] } else { &["userfaultfd"] };
    for (before, kind) in kinds.iter().enumerate() {
        // Whole at once: the program looks for it all the time.
        let draft = mark.with_extension("draft");
        fs::write(&draft, kind).unwrap();
        fs::rename(&draft, &mark).unwrap();
        await_true("the descriptor", || primary.home.log().matches("refused true").count() > before);
        let error = primary.failing(&mut |_, _| Ok(())).to_string();
        assert!(error.contains(kind) && error.contains("which it must do without"), "{error}");
        println!("{error}");
        fs::remove_file(&mark).unwrap();
        let ticks = primary.home.ticks();
        primary.home.await_ticks(ticks + 8);
        primary.true_epoch(false);
    }
}

#[test]
fn a_handoff_that_is_called_off_leaves_the_tree_running() {
    let mut primary = Primary::start("churn", Tracking::WriteProtect);
    primary.true_epoch(false);
    let head = primary.next_head();
    let finish = Finish::Final { hold: &mut || false, conclude: &mut |_| unreachable!("nothing was held") };
    let captured = primary.capturer.capture(head, finish, &mut |_, _| Ok(()));
    assert!(matches!(captured, Err(CaptureError::Criu(_))), "{captured:?}");
    primary.capturer.failed();
    let ticks = primary.home.ticks();
    primary.home.await_ticks(ticks);
    primary.true_epoch(false);
}

/// This kernel may have no soft-dirty bits: then CRIU must say so, and not take every page for unwritten.
#[test]
fn soft_dirty_tracking_serves_or_says_why_not() {
    let has_bits = standin::criu::probe::Kernel::probe(crate::host::PROGRAM.as_ref()).unwrap().soft_dirty;
    let mut primary = Primary::start("churn", Tracking::SoftDirty);
    if has_bits {
        for _ in 0..5 {
            primary.true_epoch(false);
            primary.true_epoch(false);
            fail_after(&mut primary, 2);
            assert!(primary.capturer.needs_full());
            primary.base = None;
        }
        return;
    }
    let error = primary.failing(&mut |_, _| Ok(()));
    assert!(error.to_string().contains("track"), "{error}");
    println!("{error}");
    assert!(primary.capturer.needs_full());
    // A delta on what is not known any more is refused before anything is frozen.
    primary.base = Some(standin::model::EpochId::default());
    assert!(matches!(primary.failing(&mut |_, _| Ok(())), CaptureError::NeedsFull));
}
