//! `standin protect` and `standin unprotect`.

use std::path::Path;

use super::{Failure, Outcome, client, parse_ms, print_json};
use crate::{
    agent::api::{ErrorCode, ProtectRequest, Role, Source, UnprotectRequest, WorkloadStatus},
    model::Name,
    workload::spec::Vip,
};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Name of the workload
    name: Name,
    /// Protect the tree of processes below this one
    #[arg(long, conflicts_with = "run")]
    pid: Option<i32>,
    /// Protect what `standin run` started under this name [default: NAME]
    #[arg(long, value_name = "NAME")]
    run: Option<Name>,
    /// The standby: a paired peer
    #[arg(long, value_name = "PEER")]
    to: String,
    /// Interval between two epochs
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = parse_ms)]
    every: u64,
    /// Address that clients use and that follows the workload, and the host's device for it
    #[arg(long = "vip", value_name = "CIDR@DEV")]
    vips: Vec<Vip>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(super) struct UnprotectArgs {
    /// Name of the workload
    name: Name,
    /// The standby cannot be reached and is known to be down: run on without its word
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn main(socket: &Path, args: Args) -> Outcome {
    let source = match (args.pid, args.run) {
        (Some(pid), _) => Source::Pid(pid),
        (None, Some(run)) if run != args.name => {
            let message = format!(
                "a sandbox is protected under its own name: standin protect {run} --to {}, or start it as {}",
                args.to, args.name
            );
            return Err(Failure::new(ErrorCode::Invalid, message));
        }
        (None, _) => Source::Run(args.name.clone()),
    };
    let request =
        ProtectRequest { name: args.name, source, to: args.to, every_ms: args.every, vips: args.vips };
    let status: WorkloadStatus = client::post(socket, "/v1/protect", &request)?;
    if args.json {
        return print_json(&status);
    }
    println!(
        "{} is protected: standby {}, an epoch every {} ms; watch it with: standin status {} --watch",
        status.name,
        status.peer.as_deref().unwrap_or("?"),
        status.every_ms,
        status.name
    );
    Ok(())
}

pub(super) fn unprotect(socket: &Path, args: &UnprotectArgs) -> Outcome {
    let path = format!("/v1/workloads/{}/unprotect", args.name);
    let status: WorkloadStatus = client::post(socket, &path, &UnprotectRequest { force: args.force })?;
    if args.json {
        return print_json(&status);
    }
    if status.role == Role::Unprotected {
        println!("{} runs on, unprotected", status.name);
    } else {
        let peer = status.peer.as_deref().unwrap_or("its standby");
        println!("{} runs on alone; it is protected again when {peer} is back", status.name);
    }
    Ok(())
}
