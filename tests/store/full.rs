//! A file system without room, and how much room an image takes.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use standin::{
    model::{EpochId, PAGE_SIZE},
    store::{BeginError, CommitError, Durability, FoldError, StageError, Staging, Store},
};

use crate::epochs::{SPACE, START, disk_usage, id, manifest, open, page_of};

const MIB: u64 = 1 << 20;

/// Runs `test` in a thread of its own mount namespace, with a tmpfs of 16 MiB.
fn in_small_tmpfs(test: impl FnOnce(&Path) + Send + 'static) {
    let body = move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace (run as root)");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
        let dir = tempfile::tempdir().expect("a directory");
        mount(Some("small"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some("size=16m,mode=0700"))
            .expect("a tmpfs");
        test(dir.path());
        nix::mount::umount(dir.path()).expect("nothing holds it");
    };
    thread::spawn(body).join().expect("the test in its namespace");
}

/// Fills the file system but for so many bytes.
fn leave_free(dir: &Path, bytes: u64) {
    let ballast = File::create(dir.join("ballast")).expect("a file");
    let room = nix::sys::statvfs::statvfs(dir).expect("its room");
    let free = room.blocks_available() * room.fragment_size();
    for at in (0..free.saturating_sub(bytes)).step_by(PAGE_SIZE as usize) {
        ballast.write_all_at(&[1; PAGE_SIZE as usize], at).expect("room");
    }
}

fn free_all(dir: &Path) {
    fs::remove_file(dir.join("ballast")).expect("the ballast");
}

/// Stages an epoch that writes the first `written` of `pages` pages.
fn stage(store: &Store, epoch: u64, base: Option<EpochId>, written: u64, pages: u64) -> Staging {
    let mut staging = store.begin(id(epoch), base).expect("it begins");
    for page in 0..written {
        staging.pages(SPACE, START + page * PAGE_SIZE, &page_of(page, epoch)).expect("room");
    }
    staging.image_file("inventory.img", &epoch.to_le_bytes()).expect("room");
    staging.manifest(manifest(pages)).expect("a manifest");
    staging
}

fn assert_holds(store: &Store, epoch: u64, page: u64, written_in: u64) {
    let view = store.view().expect("something is held");
    assert_eq!(view.id(), id(epoch));
    view.verify().expect("it is whole");
    let mut bytes = [0; PAGE_SIZE as usize];
    view.read_page(SPACE, START + page * PAGE_SIZE, &mut bytes).expect("the page is held");
    assert!(bytes[..] == page_of(page, written_in));
}

#[test]
fn too_little_room_is_seen_before_it_does_harm() {
    in_small_tmpfs(|dir| {
        let store = open(&dir.join("root"), Durability::Memory);
        assert!(store.ensure_room(8 * MIB).is_ok());
        let error = store.ensure_room(32 * MIB).expect_err("the tmpfs has 16 MiB");
        assert!(error.to_string().contains("remount,size="), "{error}");
        stage(&store, 1, None, 1024, 1024).commit().expect("4 MiB fit");

        leave_free(dir, 3 * MIB);
        assert!(
            matches!(store.begin(id(2), None), Err(BeginError::Room { .. })),
            "a second 4 MiB do not fit"
        );
        let delta = stage(&store, 2, Some(id(1)), 1, 1024);
        delta.commit().expect("a small delta fits");
        assert_holds(&store, 2, 0, 2);

        // 2 MiB of pages that are new to the image fit once, in the log, but not a second time.
        let mut large = store.begin(id(3), store.held()).expect("it begins");
        for page in 1024..1024 + 512 {
            large.pages(SPACE, START + page * PAGE_SIZE, &page_of(page, 3)).expect("room");
        }
        large.image_file("inventory.img", b"3").expect("room");
        large.manifest(manifest(1024 + 512)).expect("a manifest");
        assert!(matches!(large.commit(), Err(CommitError::Room { .. })));
        assert_holds(&store, 2, 0, 2);

        let mut larger = store.begin(id(3), store.held()).expect("it begins");
        let failed =
            (0..2048).find_map(|page| larger.pages(SPACE, START + page * PAGE_SIZE, &page_of(page, 3)).err());
        assert!(matches!(failed, Some(StageError::Io(fault)) if fault.is_full()));
        drop(larger);
        assert_holds(&store, 2, 0, 2);

        free_all(dir);
        stage(&store, 3, Some(id(2)), 1536, 1536).commit().expect("there is room again");
        store.fold().expect("there is room again");
        assert_holds(&store, 3, 1535, 3);
    });
}

#[test]
fn a_fold_without_room_keeps_the_epoch_and_is_done_later() {
    in_small_tmpfs(|dir| {
        let root = dir.join("root");
        let store = open(&root, Durability::Memory);
        stage(&store, 1, None, 256, 256).commit().expect("it fits");
        stage(&store, 2, Some(id(1)), 1024, 1024).commit().expect("it fits");
        leave_free(dir, MIB);
        for _ in 0..3 {
            assert!(matches!(store.fold(), Err(FoldError::Io { source, .. }) if source.is_full()));
            assert_holds(&store, 2, 1023, 2);
        }
        drop(store);
        // The agent's next life finds it as it was.
        let store = open(&root, Durability::Memory);
        assert_eq!(store.unfolded(), 1);
        assert_holds(&store, 2, 1023, 2);
        let frozen = store.freeze_for_restore().expect("it can be restored without being folded");
        assert_eq!(frozen.id(), id(2));
        drop(frozen);

        free_all(dir);
        assert_eq!(store.fold().expect("there is room again"), 1);
        stage(&store, 3, Some(id(2)), 5, 1024).commit().expect("it fits");
        assert_holds(&store, 3, 4, 3);
        assert_holds(&store, 3, 5, 2);
    });
}

#[test]
fn an_image_takes_the_memory_of_its_pages() {
    let root = tempfile::tempdir_in("/dev/shm").expect("a directory in RAM");
    let store = open(root.path(), Durability::Memory);
    stage(&store, 1, None, 8192, 8192).commit().expect("32 MiB");
    for epoch in 2..60 {
        // The workload grows and shrinks; what it gives back must not stay here.
        let pages = 2048 + epoch % 7 * 1024;
        let mut staging = stage(&store, epoch, store.held(), 2048, pages);
        for page in 2048..pages {
            staging.pages(SPACE, START + page * PAGE_SIZE, &page_of(page, epoch)).expect("room");
        }
        staging.commit().expect("it commits");
        store.fold().expect("it folds");
        let (used, resident) = (disk_usage(store.dir()), pages * PAGE_SIZE);
        assert!(used < resident + resident / 64 + MIB / 4, "epoch {epoch}: {used} bytes for {resident}");
    }
}
