//! A process that receives and folds epochs is killed at random moments, again and again; and threads that
//! do it at the same time do not disturb each other.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use standin::{
    model::PAGE_SIZE,
    store::{Durability, Store, View},
};

use crate::epochs::{SPACE, START, id, manifest, open, page_of};

const PAGES: u64 = 512;
const ROOT: &str = "STANDIN_TEST_STORE_ROOT";

/// Whether the epoch writes the page; one in 40 epochs comes whole.
fn writes(epoch: u64, page: u64) -> bool {
    is_full(epoch) || (page.wrapping_mul(0x9E37_79B9) ^ epoch.wrapping_mul(0x85EB_CA6B)).is_multiple_of(5)
}

fn is_full(epoch: u64) -> bool {
    epoch % 40 == 1
}

fn receive(store: &Store, epoch: u64) {
    let base = if is_full(epoch) { None } else { store.held() };
    let mut staging = store.begin(id(epoch), base).expect("it begins");
    for page in (0..PAGES).filter(|page| writes(epoch, *page)) {
        staging.pages(SPACE, START + page * PAGE_SIZE, &page_of(page, epoch)).expect("room");
    }
    staging.image_file("inventory.img", &epoch.to_le_bytes()).expect("room");
    staging.manifest(manifest(PAGES)).expect("a manifest");
    staging.commit().expect("it commits");
}

/// The process that is killed: says on its standard output which epochs it has committed.
#[test]
#[ignore = "run by a_kill_at_any_moment_leaves_exactly_one_whole_epoch"]
fn receive_until_killed() {
    let root = env::var_os(ROOT).expect("run by the other test");
    let store = open(Path::new(&root), Durability::Memory);
    let mut epoch = store.held().map_or(0, |held| held.epoch.0);
    loop {
        epoch += 1;
        receive(&store, epoch);
        // Not println: it would be captured.
        writeln!(std::io::stdout(), "committed {epoch}").expect("the pipe is open");
        if epoch.is_multiple_of(3) {
            store.fold().expect("it folds");
        }
    }
}

fn assert_whole(store: &Store, epoch: u64) {
    assert_view(&store.view().expect("something is held"), epoch);
}

fn assert_view(view: &View, epoch: u64) {
    assert_eq!(view.id(), id(epoch));
    view.verify().expect("every page is what was received");
    let mut all = vec![0; (PAGES * PAGE_SIZE) as usize];
    view.read_pages(SPACE, START, &mut all).expect("all pages are held");
    for (page, bytes) in (0..).zip(all.chunks_exact(PAGE_SIZE as usize)) {
        let newest = (1..=epoch).rev().find(|epoch| writes(*epoch, page)).expect("the first writes all");
        assert!(bytes == page_of(page, newest), "page {page} of epoch {epoch}");
    }
    let image = std::fs::read(view.criu_dir().join("inventory.img")).expect("the small image");
    assert_eq!(image, epoch.to_le_bytes());
}

#[test]
fn a_kill_at_any_moment_leaves_exactly_one_whole_epoch() {
    let root = tempfile::tempdir_in("/dev/shm").expect("a directory in RAM");
    let mut before = 0;
    for round in 0..60_u64 {
        let mut child = Command::new(env::current_exe().expect("this program"))
            .args(["--ignored", "--exact", "kill::receive_until_killed", "--nocapture"])
            .env(ROOT, root.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the child starts");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let mut committed = None;
        let mut note = |line: &str| {
            // libtest writes its own words before the first line.
            let number = line.rsplit_once("committed ").and_then(|(_, number)| number.parse().ok());
            committed = number.or(committed);
            number.is_some()
        };
        // Once it works, any moment will do.
        while !note(&lines.next().expect("it commits").expect("text")) {}
        thread::sleep(Duration::from_micros(round * 7919 % 23_000));
        child.kill().expect("SIGKILL");
        child.wait().expect("it is gone");
        for line in lines.map_while(Result::ok) {
            note(&line);
        }
        let committed: u64 = committed.expect("at least one");
        let store = open(root.path(), Durability::Memory);
        let held = store.held().expect("at least one").epoch.0;
        assert!(held == committed || held == committed + 1, "{held} held, {committed} acknowledged");
        assert!(held > before);
        assert_whole(&store, held);
        before = held;
    }
    assert!(before > 200, "only {before} epochs were received");
}

#[test]
fn readers_see_whole_epochs_while_others_are_received_and_folded() {
    let root = tempfile::tempdir_in("/dev/shm").expect("a directory in RAM");
    let store = open(root.path(), Durability::Memory);
    receive(&store, 1);
    let done = AtomicBool::new(false);
    let (mut folded, mut read) = (0, 0);
    thread::scope(|scope| {
        let folding = scope.spawn(|| {
            let mut folded = 0;
            while !done.load(Ordering::Relaxed) {
                folded += store.fold().unwrap_or_default(); // in use by a reader, mostly
            }
            folded
        });
        let reading = scope.spawn(|| {
            let mut read = 0;
            while !done.load(Ordering::Relaxed) {
                let view = store.view().expect("something is held");
                assert_view(&view, view.id().epoch.0);
                read += 1;
                drop(view);
                thread::sleep(Duration::from_millis(1));
            }
            read
        });
        for epoch in 2..400 {
            while store.unfolded() > 20 {
                thread::sleep(Duration::from_millis(1));
            }
            receive(&store, epoch);
        }
        done.store(true, Ordering::Relaxed);
        folded = folding.join().expect("it folds");
        read = reading.join().expect("every view is one whole epoch");
    });
    assert!(folded > 100 && read > 10, "{folded} folded, {read} read");
    store.fold().expect("nobody reads any more");
    assert_whole(&store, 399);
}
