//! What a commit and a fold cost. Prints figures; run with `--ignored --nocapture`, best in release.

use std::time::Instant;

use standin::{
    model::PAGE_SIZE,
    store::{Durability, Store},
};

use crate::epochs::{SPACE, START, disk_usage, id, manifest, open, page_of};

const RESIDENT_PAGES: u64 = 65_536; // 256 MiB

fn full(store: &Store) {
    let begun = Instant::now();
    let mut staging = store.begin(id(1), None).expect("it begins");
    for first in (0..RESIDENT_PAGES).step_by(256) {
        let run: Vec<u8> = (first..first + 256).flat_map(|page| page_of(page, 1)).collect();
        staging.pages(SPACE, START + first * PAGE_SIZE, &run).expect("room");
    }
    staging.image_file("inventory.img", b"1").expect("room");
    staging.manifest(manifest(RESIDENT_PAGES)).expect("a manifest");
    let staged = Instant::now();
    staging.commit().expect("it commits");
    println!(
        "full epoch of {RESIDENT_PAGES} pages: staged in {:?}, committed in {:?}, {} bytes used",
        staged - begun,
        staged.elapsed(),
        disk_usage(store.dir())
    );
}

fn measure(durability: Durability, root: &std::path::Path) {
    println!("{durability:?}");
    let root = tempfile::tempdir_in(root).expect("a directory");
    let store = open(root.path(), durability);
    full(&store);
    let mut epoch = 1;
    for changed in [250, 2_500, 25_000] {
        for _ in 0..3 {
            epoch += 1;
            // Scattered: no two of them are neighbours in the map's order of arrival.
            let pages: Vec<Vec<u8>> = (0..changed).map(|page| page_of(page, epoch)).collect();
            let begun = Instant::now();
            let mut staging = store.begin(id(epoch), store.held()).expect("it begins");
            for (page, bytes) in (0..).zip(&pages) {
                let place = page * (RESIDENT_PAGES / changed);
                staging.pages(SPACE, START + place * PAGE_SIZE, bytes).expect("room");
            }
            for image in 0..30 {
                staging.image_file(&format!("core-{image}.img"), &[7; 2000]).expect("room");
            }
            staging.manifest(manifest(RESIDENT_PAGES)).expect("a manifest");
            let staged = Instant::now();
            staging.commit().expect("it commits");
            let committed = Instant::now();
            let waiting = disk_usage(store.dir());
            let fold = Instant::now();
            store.fold().expect("it folds");
            println!(
                "{changed} pages: staged in {:?}, committed in {:?}, folded in {:?}, {waiting} bytes used before and {} after",
                staged - begun,
                committed - staged,
                fold.elapsed(),
                disk_usage(store.dir())
            );
        }
    }
    let begun = Instant::now();
    store.view().expect("something is held").verify().expect("it is whole");
    println!("verified in {:?}", begun.elapsed());
}

#[test]
#[ignore = "prints figures"]
fn what_commit_and_fold_cost() {
    measure(Durability::Memory, "/dev/shm".as_ref());
    measure(Durability::Disk, &std::env::temp_dir());
}
