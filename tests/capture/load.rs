//! A workload that writes its memory faster than it is read.

use std::fs;

use standin::{
    capture::{Finish, Tracking},
    wire::message::FrameHead,
};

use crate::{
    host::Primary,
    workload::{HOT_PAGES, IDLE_PAGES},
};

const MIB: u64 = 1 << 20;
const HOT_BYTES: u64 = HOT_PAGES as u64 * 4096;
const IDLE_BYTES: u64 = IDLE_PAGES as u64 * 4096;
/// Pre-copy rounds and the freeze's two passes.
const READS_MAX: u64 = 6;
/// For copies of pages; there are more pages than that.
const REFERENCE_BYTES: u64 = 16 * MIB;

#[test]
fn memory_that_is_written_faster_than_it_is_read_still_gets_its_epoch() {
    let mut primary = Primary::start("hot", Tracking::WriteProtect);
    primary.capturer.limit_references(REFERENCE_BYTES);
    for epoch in 1..=4 {
        let full = epoch == 1;
        let head = primary.next_head();
        let FrameHead::Begin { id, .. } = head else { unreachable!() };
        let before = peak_anew();
        let mut sent_bytes = 0;
        let captured = primary.capturer.capture(head, Finish::Continue, &mut |head, _| {
            if let FrameHead::Pages(batch) = head {
                sent_bytes += batch.runs.iter().map(|run| u64::from(run.pages) * 4096).sum::<u64>();
            }
            Ok(())
        });
        let figures = captured.unwrap().figures;
        let held_bytes = status("VmHWM:") - before;
        primary.capturer.committed();
        primary.base = Some(id);
        println!(
            "epoch {epoch}: sent {} MiB, held {} MiB, frozen {} ms, captured in {} ms",
            sent_bytes / MIB,
            held_bytes / MIB,
            figures.frozen_us / 1000,
            figures.capture_us / 1000
        );
        let rest = if full { IDLE_BYTES } else { 0 };
        assert!(sent_bytes <= rest + READS_MAX * HOT_BYTES + 8 * MIB);
        // What was read in the freeze, once; the idle memory of the full epoch in small parts before; the copies.
        assert!(held_bytes <= HOT_BYTES + 32 * MIB + REFERENCE_BYTES, "{held_bytes} bytes held");
        assert!(figures.resident_bytes >= IDLE_BYTES + HOT_BYTES);
    }
}

/// Begins to look for the peak of this process' memory; returns what it has now.
fn peak_anew() -> u64 {
    fs::write("/proc/self/clear_refs", "5").unwrap();
    status("VmRSS:")
}

fn status(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    value.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
