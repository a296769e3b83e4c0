//! Epochs of a tree that never rests.

use std::{fs::File, os::fd::AsFd, path::Path, thread, time::Duration};

use standin::{
    capture::{CaptureError, Captured, Finish, Note, Tracking},
    criu::{
        images,
        spawn::{Place, Spawn},
        swrk::{RestoreOptions, Swrk},
    },
    memory::AttachError,
    restore::{self, Mode},
};

use crate::{
    host::{Home, Primary, await_true, install},
    truth::Truth,
};

const EPOCHS: u64 = 20;

impl Primary {
    /// An epoch into the store.
    pub(crate) fn epoch(&mut self, finish: Finish<'_>) -> Captured {
        self.attempt(finish).unwrap_or_else(|error| panic!("the epoch after {:?}: {error}", self.base))
    }

    /// An epoch into the store, compared with the frozen tree page by page.
    pub(crate) fn true_epoch(&mut self, kill: bool) -> Truth {
        let first = self.try_true_epoch(kill);
        let epoch = match first {
            // A program may change them in that very moment, and the next epoch expects it; or wait for a vfork's child,
            // which on a busy machine takes its time to execute another program.
            Err(CaptureError::Guards(_) | CaptureError::Attach(AttachError::NotStopping { .. })) => {
                self.try_true_epoch(kill)
            }
            first => first,
        };
        epoch.unwrap_or_else(|error| panic!("the epoch after {:?}: {error}", self.base))
    }
}

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

/// Restores a directory into a sandbox that waits; plain, with all pages at once.
fn restore(home: &Home, dir: &Path) {
    let note = Note::read(dir).unwrap();
    let tasks = images::pstree(&images::read(dir, "pstree.img").unwrap()).unwrap();
    let highest = tasks.iter().flat_map(|task| &task.threads).copied().max().unwrap();
    let stdio: Vec<_> = note.outside.iter().map(|_| home.sandbox.fresh_stdio().unwrap()).collect();
    let inherit = note.keys().into_iter().zip(&stdio).map(|(key, fd)| (key, fd.as_fd())).collect();
    let init = home.sandbox.keeper().pidfd().unwrap();
    let opened = File::open(dir).unwrap();
    let spawn = Spawn {
        place: Place::Inside { init: init.as_fd(), cgroup: false, ipc: Some(init.as_fd()) },
        cgroups: vec![home.sandbox.keeper().cgroup().work()],
        pids_above: Some(highest),
        inherit,
        ..Spawn::new(opened.as_fd())
    };
    let criu = Swrk::spawn(&install(), &spawn).unwrap();
    let root = criu.restore(&RestoreOptions::default(), &mut |_| true).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(root, note.root);
    home.sandbox.track(root).unwrap();
}
