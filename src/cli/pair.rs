//! `standin pair`: mutual trust between two agents.

use std::path::Path;

use super::{Failure, Outcome, client, print_json};
use crate::agent::api::{ErrorCode, PairCode, PairJoinRequest, PeerInfo};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Show a one-time code for the other host to use
    #[arg(long, conflicts_with_all = ["addr", "code", "list", "forget"])]
    listen: bool,
    /// List the paired peers
    #[arg(long, conflicts_with_all = ["addr", "code", "forget"])]
    list: bool,
    /// Forget a peer
    #[arg(long, value_name = "PEER", conflicts_with_all = ["addr", "code"])]
    forget: Option<String>,
    /// The other agent
    #[arg(value_name = "HOST:PORT", requires = "code")]
    addr: Option<String>,
    /// The code that it showed
    code: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn main(socket: &Path, args: &Args) -> Outcome {
    if args.listen {
        let code: PairCode = client::post(socket, "/v1/pair/listen", &serde_json::json!({}))?;
        if args.json {
            return print_json(&code);
        }
        println!("On the other host, within {} minutes:\n", code.valid_s / 60);
        println!("    standin pair {}:{} {}\n", this_host(), code.port, code.code);
        return Ok(());
    }
    if args.list {
        let peers: Vec<PeerInfo> = client::get(socket, "/v1/peers")?;
        if args.json {
            return print_json(&peers);
        }
        if peers.is_empty() {
            println!("no peers; pair with `standin pair --listen` on one host, then as it says on the other");
        }
        for peer in peers {
            println!("{:<20} {:<24} {}", peer.name, peer.addr, peer.fingerprint);
        }
        return Ok(());
    }
    if let Some(peer) = &args.forget {
        let _: serde_json::Value = client::delete(socket, &format!("/v1/peers/{peer}"))?;
        return Ok(());
    }
    let (Some(addr), Some(code)) = (&args.addr, &args.code) else {
        let usage =
            "say `standin pair --listen` on one host, then `standin pair HOST:PORT CODE` on the other";
        return Err(Failure::new(ErrorCode::Invalid, usage));
    };
    let request = PairJoinRequest { addr: addr.clone(), code: code.clone() };
    let peer: PeerInfo = client::post(socket, "/v1/pair/join", &request)?;
    if args.json {
        return print_json(&peer);
    }
    println!("paired with {} at {} (fingerprint {})", peer.name, peer.addr, peer.fingerprint);
    Ok(())
}

fn this_host() -> String {
    nix::unistd::gethostname().map_or_else(|_| "THIS-HOST".into(), |name| name.to_string_lossy().into_owned())
}
