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
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = parse_ms)]
    max_downtime: u64,
    /// The standby it must go to (refused if it is another)
    #[arg(long, value_name = "PEER")]
    to: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn main(socket: &Path, args: &Args) -> Outcome {
    let path = format!("/v1/workloads/{}/handoff", args.name);
    let request = HandoffRequest { max_downtime_ms: args.max_downtime, to: args.to.clone() };
    let report: HandoffReport = client::post(socket, &path, &request)?;
    if args.json {
        return print_json(&report);
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
