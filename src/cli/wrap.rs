//! `standin wrap`: gives a container an init that can wait on the standby.

use std::path::{Path, PathBuf};

use super::{Outcome, client, print_json};
use crate::{
    agent::api::{WrapReply, WrapRequest},
    model::Name,
};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Name of the workload that the container will be
    name: Name,
    /// The bundle of an OCI runtime: its config.json is changed in place
    ///
    /// Without one, what an engine has to be told is printed.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn main(socket: &Path, args: Args) -> Outcome {
    let bundle = args.bundle.map(std::path::absolute).transpose().map_err(anyhow::Error::from)?;
    let request = WrapRequest { name: args.name, bundle };
    let reply: WrapReply = client::post(socket, "/v1/wrap", &request)?;
    if args.json {
        return print_json(&reply);
    }
    let WrapReply { name, dir, inside, init } = reply;
    if let Some(bundle) = request.bundle {
        println!("{} is wrapped: start its container, then", bundle.display());
        println!("  standin protect {name} --oci ID --to PEER");
        return Ok(());
    }
    let (dir, inside, init) = (dir.display(), inside.display(), init.display());
    println!("Docker, Podman: start it with its image's own entry point and command behind the init:");
    println!("  docker run --entrypoint {init} -v {dir}:{inside}:ro … IMAGE ENTRYPOINT… COMMAND…");
    println!("Compose:");
    println!("  entrypoint: [{init}, ENTRYPOINT…, COMMAND…]");
    println!("  volumes: [\"{dir}:{inside}:ro\"]");
    println!("OCI bundle: standin wrap {name} --bundle DIR changes its config.json; by hand:");
    println!("  put {init} in front of process.args, and {dir} as {inside}, read-only, into mounts");
    Ok(())
}
