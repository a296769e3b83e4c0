//! `standin run` and `standin remove`: a command in a sandbox.

use std::path::{Path, PathBuf};

use super::{Outcome, client, print_json};
use crate::{
    agent::api::{RunReply, RunRequest},
    model::Name,
    workload::spec::Cidr,
};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Name of the workload
    name: Name,
    /// Address inside the sandbox, with prefix length; may be given several times
    #[arg(long = "ip", value_name = "CIDR")]
    ips: Vec<Cidr>,
    /// Directory whose files belong to the workload and go with it; may be given several times
    ///
    /// The workload gets a copy of it, which every epoch brings to the standby. The copy is made when the name first
    /// runs on this host: later runs find the files as they were left, and the directory itself is never changed.
    /// File systems that are mounted in it are not part of it.
    #[arg(long = "path", value_name = "DIR")]
    paths: Vec<PathBuf>,
    /// Run as this user
    #[arg(long)]
    user: Option<String>,
    /// Working directory [default: /]
    #[arg(long, value_name = "DIR", default_value = "/")]
    cwd: PathBuf,
    /// Set a variable in the command's environment (PATH, HOME and TERM are set anyway)
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    command: Vec<String>,
}

#[derive(clap::Args)]
pub(super) struct RemoveArgs {
    /// Name of the workload
    name: Name,
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is no NAME=VALUE")),
    }
}

pub(super) fn main(socket: &Path, args: Args) -> Outcome {
    let request = RunRequest {
        name: args.name,
        ips: args.ips,
        paths: args.paths,
        command: args.command,
        env: args.env,
        cwd: args.cwd,
        user: args.user,
    };
    let reply: RunReply = client::post(socket, "/v1/run", &request)?;
    if args.json {
        return print_json(&reply);
    }
    println!("{} runs as pid {}, its output is in {}", reply.name, reply.pid, reply.log.display());
    println!("protect it with: standin protect {} --to PEER", reply.name);
    Ok(())
}

pub(super) fn remove(socket: &Path, args: &RemoveArgs) -> Outcome {
    let path = format!("/v1/workloads/{}/remove", args.name);
    let _: serde_json::Value = client::post(socket, &path, &serde_json::json!({}))?;
    println!("{} is gone", args.name);
    Ok(())
}
