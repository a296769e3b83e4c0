//! What is made ready for a restore, without a CRIU.

use std::fs;

use standin::{
    criu::images::{Pagemap, Run, pages_file},
    model::{Extent, PAGE_SIZE},
    restore::{self, Mode, Problem},
    store::Durability,
};

use crate::epochs::{SPACE, START, disk_usage, id, manifest, open, page_of};

#[test]
fn a_lazy_directory_costs_what_is_not_lazy() {
    const PAGES: u64 = 4096;
    let root = tempfile::tempdir_in("/dev/shm").expect("a directory in RAM");
    let store = open(&root.path().join("store"), Durability::Memory);
    let mut staging = store.begin(id(1), None).expect("it begins");
    for page in 0..PAGES {
        staging.pages(SPACE, START + page * PAGE_SIZE, &page_of(page, 1)).expect("room");
    }
    staging.zero(SPACE, START + 7 * PAGE_SIZE, 1).expect("room");
    for name in ["inventory.img", "pstree.img", "core-2.img", "mm-2.img"] {
        staging.image_file(name, name.as_bytes()).expect("room");
    }
    staging.manifest(manifest(PAGES)).expect("a manifest");
    staging.commit().expect("it commits");

    let view = store.view().expect("it is held");
    let ready_root = root.path().join("ready");
    let lazy = Extent { start: START + 10 * PAGE_SIZE, pages: PAGES }; // reaches beyond what is held
    let ready = restore::materialise(&view, &ready_root, Mode::Lazy, |_| vec![lazy]).expect("room");
    assert_eq!((ready.pages, ready.lazy_pages), (PAGES, PAGES - 10));
    assert_eq!(restore::ready_dir(&ready_root, id(1), Mode::Lazy), Some(ready.dir.clone()));
    let map = fs::read(ready.dir.join("pagemap-2.img")).expect("a page map");
    let map = Pagemap::decode("pagemap-2.img", &map).expect("whole");
    let run = |start, pages, lazy| Run { extent: Extent { start, pages }, lazy };
    assert_eq!(map.runs, [run(START, 10, false), run(lazy.start, PAGES - 10, true)]);
    let pages = ready.dir.join(pages_file(map.pages_id));
    assert_eq!(fs::metadata(&pages).expect("pages").len(), PAGES * PAGE_SIZE);
    assert_eq!(disk_usage(&pages), 9 * PAGE_SIZE, "one of the ten is zero");
    let content = fs::read(&pages).expect("pages");
    assert_eq!(content[9 * PAGE_SIZE as usize..10 * PAGE_SIZE as usize], page_of(9, 1));

    restore::preflight(&ready.dir, &[2], |_| false).expect("nothing is missing");
    fs::remove_file(ready.dir.join("core-2.img")).expect("it is there");
    fs::write(&pages, b"short").expect("it is there");
    let error = restore::preflight(&ready.dir, &[2, 3], |pid| pid == 3).expect_err("three things are wrong");
    assert!(error.problems.contains(&Problem::NoImage("core-2.img".to_owned())), "{error}");
    assert!(error.problems.contains(&Problem::PidTaken(3)), "{error}");
    assert!(
        error.problems.iter().any(|problem| matches!(problem, Problem::PagesLength { found: 5, .. })),
        "{error}"
    );

    let again = restore::materialise(&view, &ready_root, Mode::Lazy, |_| Vec::new()).expect("it is replaced");
    assert_eq!(again.lazy_pages, 0);
    restore::preflight(&again.dir, &[2], |_| false).expect("nothing is missing");
    view.verify().expect("the store was not touched");
    restore::discard_others(&ready_root, None).expect("they can be removed");
    assert_eq!(fs::read_dir(&ready_root).expect("a directory").count(), 0);
}
