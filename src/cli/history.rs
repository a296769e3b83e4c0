//! `standin history`: what happened to a workload.

use std::path::Path;

use super::{Outcome, client, print_json};
use crate::{agent::api::History, model::Name, observe::utc};

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
