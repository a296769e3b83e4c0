//! What tracking costs, printed for people: `cargo test --test memory cost -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use standin::{
    extents,
    memory::{Memory, Pages, Tracker},
    model::Extent,
};

use crate::target::Target;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
#[ignore = "a measurement: needs 1 GiB and a quiet machine"]
fn cost_of_attach_scan_and_read() {
    let mut target = Target::start();
    let start: u64 = target.ask("anon a 262144").parse().unwrap();
    target.ask("fill a 1");

    let stops = (0..100).map(|_| Tracker::attach(target.pid()).unwrap().stopped()).collect();
    println!("attach: one thread stopped for {:?} (median of 100)", median(stops));

    let mut tracker = Tracker::attach(target.pid()).unwrap();
    let mut dirty = Vec::new();
    let first = Instant::now();
    tracker.take_dirty(&mut dirty).unwrap();
    println!("first pass over 1 GiB, all of it reported and protected: {:?}", first.elapsed());
    for (every, label) in [(0, "idle"), (1000, "0.1 % written"), (10, "10 % written")] {
        let times = (0..5)
            .map(|value| {
                if every > 0 {
                    target.ask(&format!("fill a {value} {every}"));
                }
                let begin = Instant::now();
                tracker.take_dirty(&mut dirty).unwrap();
                begin.elapsed()
            })
            .collect();
        println!("pass over 1 GiB, {label}: {:?}, {} pages", median(times), extents::pages(&dirty));
    }

    let mut pages = Pages::default();
    for count in [250u64, 2_500, 25_000] {
        let step = 262_144 / count;
        let scattered: Vec<_> =
            (0..count).map(|i| Extent { start: start + i * step * 4096, pages: 1 }).collect();
        let read = |pages: &mut Pages| {
            let begin = Instant::now();
            Memory::of(target.pid()).read(&scattered, pages).unwrap();
            begin.elapsed()
        };
        read(&mut pages);
        let time = median((0..9).map(|_| read(&mut pages)).collect());
        println!("read {count} scattered pages: {:.2} µs a page", time.as_secs_f64() * 1e6 / count as f64);
    }
    let whole = [Extent { start, pages: 262_144 }];
    let begin = Instant::now();
    Memory::of(target.pid())
        .read_in_parts::<standin::memory::ReadError>(&whole, 4096, &mut pages, |_| Ok(()))
        .unwrap();
    println!("read 1 GiB in parts of 16 MiB: {:?}", begin.elapsed());
}
