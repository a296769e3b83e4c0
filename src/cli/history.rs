//! `standin history`: what happened to a workload.

use std::path::Path;

use super::{Outcome, client, print_json};
use crate::{agent::api::History, model::Name};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Name of the workload
    name: Name,
    /// Print JSON, with the figures of each epoch remembered
    #[arg(long)]
    json: bool,
}

pub(super) fn main(socket: &Path, args: &Args) -> Outcome {
    let history: History = client::get(socket, &format!("/v1/workloads/{}/history", args.name))?;
    if args.json {
        return print_json(&history);
    }
    for event in &history.events {
        let epoch = event.epoch.map_or_else(String::new, |epoch| format!(" epoch {epoch}"));
        println!("{}  term {}{epoch}  {}: {}", utc(event.at_unix_ms), event.term, event.kind, event.detail);
        if !event.phases_ms.is_empty() {
            let phases: Vec<String> =
                event.phases_ms.iter().map(|(phase, ms)| format!("{phase} {ms:.1} ms")).collect();
            println!("{:26}{}", "", phases.join(", "));
        }
    }
    Ok(())
}

/// `2026-11-21 20:15:03.250Z`.
fn utc(unix_ms: u64) -> String {
    let (days, ms) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    let (year, month, day) = civil(days as i64);
    let (hour, minute, second) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:03}Z", ms % 1000)
}

/// Year, month and day of a day counted from 1970-01-01 (Gregorian; Hinnant's `civil_from_days`).
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn instants_are_written_in_utc() {
        assert_eq!(utc(0), "1970-01-01 00:00:00.000Z");
        assert_eq!(utc(951_782_400_123), "2000-02-29 00:00:00.123Z");
        assert_eq!(utc(1_795_305_303_250), "2026-11-21 23:55:03.250Z");
    }
}
