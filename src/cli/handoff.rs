//! `standin handoff`: move a workload to its standby on purpose.

use std::path::Path;

use super::{Outcome, client, parse_ms, print_json};
use crate::{
    agent::api::{HandoffReport, HandoffRequest},
    model::Name,
};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Name of the workload
    name: Name,
    /// Longest time that clients may be without it
    ///
    /// The workload runs on while its memory is sent, in rounds, until what is left takes no more than 200 ms or gets no
    /// less; it moves if that takes no longer than this, and stays where it is otherwise.
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = parse_ms)]
    max_downtime: u64,
    /// Slow the workload down if it writes faster than the link can send
    ///
    /// It then runs for a half of its time, a quarter and so on, down to 1 %, until what is left is little enough.
    #[arg(long)]
    throttle: bool,
    /// The standby it must go to (refused if it is another)
    #[arg(long, value_name = "PEER")]
    to: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn main(socket: &Path, args: &Args) -> Outcome {
    let path = format!("/v1/workloads/{}/handoff", args.name);
    let request =
        HandoffRequest { max_downtime_ms: args.max_downtime, throttle: args.throttle, to: args.to.clone() };
    let report: HandoffReport = client::post(socket, &path, &request)?;
    if args.json {
        return print_json(&report);
    }
    if report.run_percent < 100 {
        println!("{} was slowed down to {} % of its time for it", report.name, report.run_percent);
    }
    println!(
        "{} runs on {} now (term {}, epoch {}): down for {:.1} ms, of it {:.1} ms restoring; {:.1} ms in all, {} pre-copy rounds",
        report.name,
        report.to,
        report.term,
        report.epoch,
        report.downtime_ms,
        report.restore_ms,
        report.total_ms,
        report.rounds
    );
    Ok(())
}
