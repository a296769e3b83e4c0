//! The command line: one file a verb, each thin: parse, ask the agent's control socket, print.
//!
//! Exit codes: 0 done, 1 tried and failed, 2 wrong usage, 3 no such workload, peer or process,
//! 4 refused in this state, 5 the agent or the peer cannot be reached.

mod agent;
mod client;
mod doctor;
mod drill;
mod handoff;
mod history;
mod orders;
mod pair;
mod protect;
mod rejoin;
mod run;
mod status;
mod wrap;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::{agent::api::ErrorCode, config::DEFAULT_RUN_DIR, observe::in_full};

/// Keeps a running workload alive through the loss of its host.
///
/// The agent on the primary takes incremental checkpoints and ships them to the agent on the standby,
/// which restores the newest one when the primary is gone.
#[derive(Parser)]
#[command(name = "standin", version, propagate_version = true, after_help = EXIT_CODES)]
struct Cli {
    /// The agent's control socket
    #[arg(long, global = true, value_name = "FILE", env = "STANDIN_SOCKET",
          default_value_os_t = PathBuf::from(DEFAULT_RUN_DIR).join("control.sock"))]
    socket: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 tried and failed; 2 wrong usage; 3 no such workload, peer or process; \
4 refused in this state; 5 the agent or the peer cannot be reached.";

#[derive(Subcommand)]
enum Verb {
    /// Check that this host can protect a workload, or that a peer can take over what runs here, and say what to do where not
    Doctor(doctor::Args),
    /// Run the daemon, one a host, both roles
    Agent(agent::Args),
    /// Make two agents trust each other: `--listen` here, then `HOST:PORT CODE` there
    Pair(pair::Args),
    /// Start a command in a sandbox of its own, so that it can be protected
    Run(run::Args),
    /// Make a container ready to be protected, before it is started
    Wrap(wrap::Args),
    /// Start continuous protection of a workload
    Protect(protect::Args),
    /// End protection; the workload runs on
    Unprotect(protect::UnprotectArgs),
    /// End an unprotected workload and take its sandbox down
    Remove(run::RemoveArgs),
    /// Move a workload to its standby, on purpose
    Handoff(handoff::Args),
    /// Run a workload on its standby, although its primary does not hand it over
    Failover(orders::FailoverArgs),
    /// Compare the warm image on this standby with what was received
    Verify(orders::OrderArgs),
    /// Freeze and silence this host's copy of a workload until `unfence`
    Fence(orders::OrderArgs),
    /// Let a copy run again that was fenced by `fence`
    Unfence(orders::OrderArgs),
    /// Change when what a workload sends leaves: at once, or when the standby has what it depends on
    Commit(orders::CommitArgs),
    /// Drop an old copy here and become the standby of the host that runs the workload
    Rejoin(rejoin::Args),
    /// Pause the protection of a workload: it runs on, no epochs are taken, nobody takes over
    Pause(orders::OrderArgs),
    /// Go on with a protection that was paused
    Resume(orders::OrderArgs),
    /// Restore the newest epoch on trial, isolated, without touching production (on the standby)
    Drill(drill::Args),
    /// Show this agent's workloads
    Status(status::Args),
    /// Show what happened to a workload
    History(history::Args),
}

/// A command that was not done: what to print, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    fn new(code: ErrorCode, message: impl std::fmt::Display) -> Self {
        Self { code: code.exit_code(), message: message.to_string() }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(ErrorCode::Failed, in_full(&error))
    }
}

type Outcome = Result<(), Failure>;

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.verb {
        Verb::Doctor(args) => doctor::main(&cli.socket, args),
        Verb::Agent(args) => agent::main(args),
        Verb::Pair(args) => pair::main(&cli.socket, &args),
        Verb::Run(args) => run::main(&cli.socket, args),
        Verb::Wrap(args) => wrap::main(&cli.socket, args),
        Verb::Protect(args) => protect::main(&cli.socket, args),
        Verb::Unprotect(args) => protect::unprotect(&cli.socket, &args),
        Verb::Remove(args) => run::remove(&cli.socket, &args),
        Verb::Handoff(args) => handoff::main(&cli.socket, &args),
        Verb::Failover(args) => orders::failover(&cli.socket, &args),
        Verb::Verify(args) => orders::verify(&cli.socket, &args),
        Verb::Fence(args) => orders::fence(&cli.socket, &args),
        Verb::Unfence(args) => orders::unfence(&cli.socket, &args),
        Verb::Commit(args) => orders::commit(&cli.socket, &args),
        Verb::Rejoin(args) => rejoin::main(&cli.socket, &args),
        Verb::Pause(args) => orders::pause(&cli.socket, &args),
        Verb::Resume(args) => orders::resume(&cli.socket, &args),
        Verb::Drill(args) => drill::main(&cli.socket, &args),
        Verb::Status(args) => status::main(&cli.socket, &args),
        Verb::History(args) => history::main(&cli.socket, &args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("standin: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
}

/// Prints a value as one JSON document.
fn print_json<T: serde::Serialize>(value: &T) -> Outcome {
    let text = serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?;
    println!("{text}");
    Ok(())
}

/// A duration as people write it: `200ms`, `1.5s`, `250` (milliseconds).
fn parse_ms(text: &str) -> Result<u64, String> {
    let error = || format!("{text:?} is no duration: write it like 200ms, 1.5s or 250 (milliseconds)");
    let (number, factor) = match text.strip_suffix("ms") {
        Some(number) => (number, 1.0),
        None => text.strip_suffix('s').map_or((text, 1.0), |number| (number, 1000.0)),
    };
    let value: f64 = number.trim().parse().map_err(|_| error())?;
    let ms = value * factor;
    if !(1.0..=86_400_000.0).contains(&ms) {
        return Err(format!("{text:?} is out of range: use 1ms to 24h"));
    }
    Ok(ms as u64)
}

/// Bytes as people read them.
fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_are_read_as_people_write_them() {
        assert_eq!(parse_ms("200ms"), Ok(200));
        assert_eq!(parse_ms("1.5s"), Ok(1500));
        assert_eq!(parse_ms("250"), Ok(250));
        assert!(parse_ms("soon").is_err());
        assert!(parse_ms("0").is_err());
    }
}
