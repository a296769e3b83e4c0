//! `standin verify`, `failover`, `fence`, `unfence`, `pause`, `resume`: what an operator orders beside a handoff.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::Path,
};

use super::{Failure, Outcome, client, print_json};
use crate::{
    agent::api::{CommitRequest, ErrorCode, FailoverRequest, Role, VerifyReport, WorkloadStatus},
    model::Name,
    workload::spec::Commit,
};

#[derive(clap::Args)]
pub(super) struct FailoverArgs {
    /// Name of the workload
    name: Name,
    /// The primary's host is off: run the workload here although nothing says so
    ///
    /// If it is not, two copies run at once, both write, and one of them is thrown away when they meet.
    #[arg(long)]
    force: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(super) struct OrderArgs {
    /// Name of the workload
    name: Name,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(super) struct CommitArgs {
    /// Name of the workload
    name: Name,
    /// `async`: output leaves at once; `output`: when the standby has what it depends on
    mode: Commit,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn commit(socket: &Path, args: &CommitArgs) -> Outcome {
    let path = format!("/v1/workloads/{}/commit", args.name);
    let status: WorkloadStatus = client::post(socket, &path, &CommitRequest { mode: args.mode })?;
    let text = match args.mode {
        Commit::Async => format!("what {} sends leaves at once", status.name),
        Commit::Output => {
            format!("what {} sends waits until the standby has what it depends on", status.name)
        }
    };
    told(&status, args.json, &text)
}

pub(super) fn failover(socket: &Path, args: &FailoverArgs) -> Outcome {
    if args.force && !args.yes {
        confirm(&client::get(socket, &format!("/v1/workloads/{}", args.name))?)?;
    }
    let path = format!("/v1/workloads/{}/failover", args.name);
    let status: WorkloadStatus = client::post(socket, &path, &FailoverRequest { force: args.force })?;
    told(&status, args.json, &format!("{} runs here now, under term {}", status.name, status.term))
}

/// Says in one screen what may be lost, and asks.
fn confirm(status: &WorkloadStatus) -> Outcome {
    let (name, peer) = (&status.name, status.peer.as_deref().unwrap_or("the primary's host"));
    if status.role != Role::Standby {
        // The agent says what is wrong with that.
        return Ok(());
    }
    let age = status.lag_ms.map_or("of unknown age".to_owned(), |ms| format!("{:.1} s old", ms as f64 / 1e3));
    let epoch = status.epoch.map_or("none".to_owned(), |epoch| epoch.to_string());
    let answers = if status.peer_connected {
        format!(
            "{peer} ANSWERS at this moment: it is not off. `standin handoff {name}`, typed there, loses nothing."
        )
    } else {
        format!("{peer} does not answer. That may be the network: its copy may run, and be heard by others.")
    };
    eprintln!(
        "Failover of {name} by force\n\n  \
         What would run here:  epoch {epoch}, {age}. What clients were told since is lost.\n  \
         Who runs it now:      {answers}\n  \
         If {peer} runs it:    two copies are heard and write at once; when the hosts meet again, the copy there is\n  \
                               thrown away with all that it took in.\n  \
         Before you go on:     see that {peer} is off (power, console, hypervisor), and stays off or cut off.\n"
    );
    ask_for_name(name)
}

/// Nothing is done before a person has typed the workload's name.
pub(super) fn ask_for_name(name: &Name) -> Outcome {
    if !io::stdin().is_terminal() {
        return Err(Failure::new(ErrorCode::Invalid, "nobody can be asked here: add --yes"));
    }
    eprint!("Type the workload's name to go on: ");
    let _ = io::stderr().flush();
    let mut line = String::new();
    io::stdin().read_line(&mut line).map_err(anyhow::Error::from)?;
    if line.trim() == name.as_str() {
        return Ok(());
    }
    Err(Failure::new(ErrorCode::Refused, "nothing was done"))
}

pub(super) fn verify(socket: &Path, args: &OrderArgs) -> Outcome {
    let path = format!("/v1/workloads/{}/verify", args.name);
    let report: VerifyReport = client::post(socket, &path, &serde_json::json!({}))?;
    if args.json {
        return print_json(&report);
    }
    println!(
        "{}: epoch {} is what was received: {:.1} MiB compared in {:.0} ms",
        report.name,
        report.epoch,
        report.bytes as f64 / f64::from(1 << 20),
        report.took_ms
    );
    Ok(())
}

pub(super) fn fence(socket: &Path, args: &OrderArgs) -> Outcome {
    let status = order(socket, args, "fence")?;
    let text = format!(
        "{0} is frozen and silent here, and stays so until `standin unfence {0}`; a standby that holds it takes over",
        status.name
    );
    told(&status, args.json, &text)
}

pub(super) fn unfence(socket: &Path, args: &OrderArgs) -> Outcome {
    let status = order(socket, args, "unfence")?;
    let text = format!("{0} runs again as soon as nobody else does; see `standin status {0}`", status.name);
    told(&status, args.json, &text)
}

pub(super) fn pause(socket: &Path, args: &OrderArgs) -> Outcome {
    let status = order(socket, args, "pause")?;
    let text = format!(
        "{0} runs on without protection, and nobody takes over; `standin resume {0}` ends that",
        status.name
    );
    told(&status, args.json, &text)
}

pub(super) fn resume(socket: &Path, args: &OrderArgs) -> Outcome {
    let status = order(socket, args, "resume")?;
    told(&status, args.json, &format!("{} is being protected again", status.name))
}

fn order(socket: &Path, args: &OrderArgs, verb: &str) -> Result<WorkloadStatus, Failure> {
    client::post(socket, &format!("/v1/workloads/{}/{verb}", args.name), &serde_json::json!({}))
}

pub(super) fn told(status: &WorkloadStatus, json: bool, text: &str) -> Outcome {
    if json {
        return print_json(status);
    }
    println!("{text}");
    Ok(())
}
