//! `standin drill`: restore the newest epoch on the standby, where nobody hears it.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::{Failure, client, parse_ms, print_json};
use crate::{
    agent::api::ErrorCode,
    drill::{
        Outcome, Report, Request,
        render::{Format, render},
    },
    model::Name,
};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Name of the workload; this host is its standby
    name: Name,
    /// A command for `sh -c`, run beside the restored workload (inside, if that is a container): the drill passes if its exit
    /// status is 0
    ///
    /// It has STANDIN_WORKLOAD, STANDIN_EPOCH and STANDIN_ADDRESS (the first --ip, a container's address, the first --vip, or
    /// 127.0.0.1) in its environment; see scripts/probe.
    #[arg(long, value_name = "CMD")]
    probe: Option<String>,
    /// How long the probe may take
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_ms)]
    timeout: u64,
    /// Which epoch; the standby holds the newest
    #[arg(long, default_value = "latest", value_parser = ["latest"])]
    epoch: String,
    /// Leave the restored workload there, to be looked at, until --end
    #[arg(long)]
    keep: bool,
    /// Write the report to a file: .html, .json or .txt
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// End a drill that is under way or was kept
    #[arg(long, conflicts_with_all = ["probe", "keep", "report"])]
    end: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn main(socket: &Path, args: &Args) -> super::Outcome {
    let path = format!("/v1/workloads/{}/drill", args.name);
    if args.end {
        let _: serde_json::Value = client::post(socket, &format!("{path}/end"), &serde_json::json!({}))?;
        println!("nothing is left of the drill of {}", args.name);
        return Ok(());
    }
    let to = args.report.as_deref().map(|file| Ok::<_, Failure>((file, format_of(file)?))).transpose()?;
    let request = Request { probe: args.probe.clone(), timeout_ms: Some(args.timeout), keep: args.keep };
    let report: Report = client::post(socket, &path, &request)?;
    if let Some((file, format)) = to {
        std::fs::write(file, render(&report, format))
            .with_context(|| format!("cannot write the report to {}", file.display()))?;
    }
    if args.json {
        print_json(&report)?;
    } else {
        print!("{}", render(&report, Format::Text));
    }
    if report.outcome == Outcome::Passed {
        return Ok(());
    }
    let message = format!("the drill of {} has not passed: {}", report.name, report.summary());
    Err(Failure::new(ErrorCode::Failed, message))
}

/// Before anything is done, since a drill costs something.
fn format_of(file: &Path) -> Result<Format, Failure> {
    let format = Format::of(file).map_err(|error| Failure::new(ErrorCode::Invalid, error))?;
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if dir.is_dir() {
        return Ok(format);
    }
    let message = format!("the report cannot be written: there is no directory {}", dir.display());
    Err(Failure::new(ErrorCode::Invalid, message))
}
