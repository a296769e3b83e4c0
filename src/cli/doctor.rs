//! `standin doctor`: whether this host can protect a workload, and a peer take it over.

use std::{io::IsTerminal as _, path::Path};

use super::{Failure, Outcome, agent, client, print_json};
use crate::{
    agent::api::{DoctorRequest, ErrorCode},
    doctor::{self, State, peer::PeerReport},
    model::Name,
};

// The agent's settings are a group of the same name.
#[derive(clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// Compare this host with a paired one instead, by both agents: can what runs here be taken over there?
    #[arg(long, value_name = "PEER")]
    peer: Option<String>,
    /// With --peer: what this workload uses, and no other
    #[arg(long, value_name = "NAME", requires = "peer")]
    workload: Option<Name>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    agent: agent::Args,
}

pub(super) fn main(socket: &Path, args: Args) -> Outcome {
    if let Some(peer) = args.peer {
        return with_peer(socket, &DoctorRequest { peer, workload: args.workload }, args.json);
    }
    let config = agent::settle(args.agent).map_err(|error| Failure::new(ErrorCode::Invalid, error))?;
    let report = doctor::examine(&config, Path::new("/proc/self/exe"));
    if args.json {
        print_json(&report)?;
    } else {
        print!("{}", doctor::render(&report, colour()));
    }
    if report.ok {
        return Ok(());
    }
    let failed = report.ids(State::Fail).join(", ");
    Err(Failure::new(ErrorCode::Failed, format!("a workload cannot be protected here: see {failed}")))
}

fn with_peer(socket: &Path, request: &DoctorRequest, json: bool) -> Outcome {
    let report: PeerReport = client::post(socket, "/v1/doctor", request)?;
    if json {
        print_json(&report)?;
    } else {
        print!("{}", doctor::peer::render(&report, colour()));
    }
    if report.ok {
        return Ok(());
    }
    let failed = report.ids(State::Fail).join(", ");
    Err(Failure::new(ErrorCode::Failed, format!("{} cannot take over from here: see {failed}", report.peer)))
}

fn colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}
