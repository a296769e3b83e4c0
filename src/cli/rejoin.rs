//! `standin rejoin`: the old copy here makes way for the one that runs on the other host.

use std::path::Path;

use super::{Outcome, client, orders};
use crate::{
    agent::api::{Role, WorkloadStatus},
    model::Name,
};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Name of the workload
    name: Name,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn main(socket: &Path, args: &Args) -> Outcome {
    let path = format!("/v1/workloads/{}", args.name);
    if !args.yes {
        confirm(&client::get(socket, &path)?)?;
    }
    let status: WorkloadStatus = client::post(socket, &format!("{path}/rejoin"), &serde_json::json!({}))?;
    let peer = status.peer.as_deref().unwrap_or("the other host");
    let text = format!("this host is the standby of {peer} for {}, under term {}", status.name, status.term);
    orders::told(&status, args.json, &text)
}

fn confirm(status: &WorkloadStatus) -> Outcome {
    let (name, peer) = (&status.name, status.peer.as_deref().unwrap_or("the other host"));
    if status.role != Role::Fenced {
        // Nothing is lost, or the agent says what is wrong.
        return Ok(());
    }
    eprintln!(
        "Rejoin of {name}\n\n  \
         What is here:       a copy that is {}, of term {}. It is thrown away with all that {peer} does not have of it.\n  \
         Who runs it then:   {peer}, which is asked first; if it does not run it, nothing is dropped.\n",
        status.state, status.term
    );
    orders::ask_for_name(name)
}
