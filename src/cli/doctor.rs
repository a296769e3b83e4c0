//! `standin doctor`: whether this host can protect a workload.

use std::{io::IsTerminal as _, path::Path};

use super::{Failure, Outcome, agent, print_json};
use crate::{
    agent::api::ErrorCode,
    doctor::{self, State},
};

// The agent's settings are a group of the same name.
#[derive(clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    agent: agent::Args,
}

pub(super) fn main(args: Args) -> Outcome {
    let config = agent::settle(args.agent).map_err(|error| Failure::new(ErrorCode::Invalid, error))?;
    let report = doctor::examine(&config, Path::new("/proc/self/exe"));
    if args.json {
        print_json(&report)?;
    } else {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        print!("{}", doctor::render(&report, colour));
    }
    if report.ok {
        return Ok(());
    }
    let failed = report.ids(State::Fail).join(", ");
    Err(Failure::new(ErrorCode::Failed, format!("a workload cannot be protected here: see {failed}")))
}
