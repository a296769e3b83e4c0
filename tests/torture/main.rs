//! Never lose a page: a program that does to its memory whatever Linux lets it do, captured all the time; each page of each
//! epoch is compared with what the frozen program held, and in the end the flat image is restored with plain
//! `criu restore` and the program, which checks itself, must go on. Needs root and a CRIU.
//!
//! `cargo test --test torture` runs a few fixed seeds. A soak, with a seed of one's own or one after the other:
//!
//! ```sh
//! cargo test --test torture -- --seconds 3600 --seed 7
//! ```

mod arena;
#[path = "../capture/host.rs"]
mod host;
mod kernel;
mod plain;
mod random;
mod run;
mod shared;
mod sys;
#[path = "../capture/truth.rs"]
mod truth;
mod workload;

use std::time::{Duration, Instant};

use run::{Length, Totals};
use workload::broken;

/// Of a run that must pass before a change is taken.
const SEEDS: [u64; 4] = [1, 2, 3, 4];
const EPOCHS: u64 = 30;
const PAGES_MIN: u64 = 1_000_000;
/// A soak changes to the next seed after this, so that each is also restored.
const SOAK_SLICE: Duration = Duration::from_secs(60);

fn main() {
    workload::run_role();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| {
        let at = arguments.iter().position(|argument| argument == flag)?;
        let value = arguments.get(at + 1).and_then(|value| value.parse::<u64>().ok());
        Some(value.unwrap_or_else(|| panic!("{flag} wants a number")))
    };
    let (seconds, seed) = (value("--seconds"), value("--seed"));
    // As cargo passes on names of tests to all of them.
    let named = |argument: &String| !argument.starts_with('-') && !"torture".contains(argument.as_str());
    if seconds.is_none() && seed.is_none() && arguments.iter().any(named) {
        return;
    }
    let mut totals = Totals::default();
    if let Some(seconds) = seconds {
        let until = Instant::now() + Duration::from_secs(seconds);
        for seed in seed.unwrap_or(SEEDS[0]).. {
            let slice = until.saturating_duration_since(Instant::now()).min(SOAK_SLICE);
            if slice.is_zero() {
                break;
            }
            run::run(seed, &Length::For(slice), &mut totals);
        }
    } else {
        let seeds = seed.map_or(SEEDS.to_vec(), |seed| vec![seed]);
        for seed in &seeds {
            run::run(*seed, &Length::Epochs(EPOCHS), &mut totals);
        }
        assert!(seed.is_some() || totals.pages >= PAGES_MIN, "only {totals}");
    }
    println!("test result: ok. {totals}");
}
