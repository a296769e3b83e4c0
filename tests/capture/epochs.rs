//! Epochs of a tree that never rests.

use std::{thread, time::Duration};

use standin::{
    capture::{Finish, Tracking},
    restore::{self, Mode},
};

use crate::host::{Home, Primary, await_true, restore};

const EPOCHS: u64 = 20;

#[test]
fn a_dirty_page_is_never_lost() {
    let mut primary = Primary::start("churn", Tracking::WriteProtect);
    let (mut pages, mut tasks_max) = (0, 0);
    for epoch in 1..=EPOCHS {
        // Of every kind of epoch the next one must be right; some are followed at once.
        if epoch % 3 == 0 {
            let captured = primary.epoch(Finish::Continue);
            assert!(!captured.killed && !captured.figures.full && captured.figures.frozen_us > 0);
        }
        let truth = primary.true_epoch(epoch == EPOCHS);
        let (tasks, shared) = truth.spaces();
        assert_eq!(shared, 2, "anonymous shared memory and a memory file");
        tasks_max = tasks_max.max(tasks);
        pages += truth.count();
        if epoch < EPOCHS {
            thread::sleep(Duration::from_millis(37 * (epoch % 4)));
            let ticks = primary.home.ticks();
            primary.home.await_ticks(ticks);
        }
    }
    println!("{pages} pages compared in {EPOCHS} epochs of at most {tasks_max} tasks");
    assert!(pages > EPOCHS * 1000 && tasks_max > 2);

    // The last one was final.
    await_true("the tree's end", || !primary.home.sandbox.is_occupied().unwrap());
    let counted = primary.home.ticks();
    let view = primary.store.freeze_for_restore().unwrap();
    let ready =
        restore::materialise(&view, &primary.ram.path().join("ready"), Mode::Eager, |_| Vec::new()).unwrap();
    let second = Home::new();
    restore(&second, &ready.dir);
    second.await_ticks(counted + 100);
    assert!(second.sandbox.is_occupied().unwrap());
}
