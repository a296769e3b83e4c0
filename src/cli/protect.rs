//! `standin protect` and `standin unprotect`.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use super::{Failure, Outcome, client, human_bytes, parse_ms, print_json};
use crate::{
    agent::api::{
        AgentStatus, DockerContainer, ErrorCode, OciContainer, ProtectRequest, Role, ShipmentStatus, Source,
        UnprotectRequest, WorkloadStatus,
    },
    model::Name,
    workload::spec::{Cidr, Commit, Daemon, MountRule, PaceMode, PaceSpec, Runtime, Vip},
};

/// How often people are told how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(300);

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
    /// Protect the container that an OCI runtime knows by this id: from inside if it was wrapped as NAME, or else whole
    #[arg(long, value_name = "ID", conflicts_with_all = ["pid", "run"])]
    oci: Option<String>,
    /// With --oci: runc or crun [default: the one that knows the id]
    #[arg(long, requires = "oci")]
    runtime: Option<Runtime>,
    /// With --oci: the runtime's directory of containers, its own --root
    #[arg(long, value_name = "DIR", requires = "oci")]
    root: Option<PathBuf>,
    /// Protect the container that Docker knows by this name or id: from inside if it was wrapped as NAME, or else whole
    #[arg(long, value_name = "CONTAINER", conflicts_with_all = ["pid", "run", "oci"])]
    docker: Option<String>,
    /// Protect the container that Podman's service knows by this name or id, and that was wrapped as NAME
    #[arg(long, value_name = "CONTAINER", conflicts_with_all = ["pid", "run", "oci", "docker"])]
    podman: Option<String>,
    /// Of a container without a network: address on a device that standin makes inside; may be given several times
    #[arg(long = "ip", value_name = "CIDR", conflicts_with_all = ["pid", "run"])]
    ips: Vec<Cidr>,
    /// Of a container: what becomes of a directory of the host or a volume that it writes to. `replicate`: it goes with
    /// every epoch (the default); `shared`: it is the same storage on both hosts; `ignore`: each host has its own
    #[arg(long = "mount", value_name = "DESTINATION=MODE", conflicts_with_all = ["pid", "run"])]
    mounts: Vec<MountRule>,
    /// Of a container: send the standby first what it lacks of its image and of what it mounts read-only, where that is
    /// otherwise refused. Nothing that is there is changed
    #[arg(long, conflicts_with_all = ["pid", "run"])]
    ship_image: bool,
    /// The standby: a paired peer
    #[arg(long, value_name = "PEER")]
    to: String,
    #[command(flatten)]
    pace: Pace,
    /// When what it sends leaves. `async`: at once; a takeover may lose what clients were told since its last epoch.
    /// `output`: when the standby has what it depends on; nothing that a client was told is ever lost
    #[arg(long, value_name = "MODE", default_value_t)]
    commit: Commit,
    /// Address that clients use and that follows the workload, and the host's device for it; with `+mac` behind the device it has a
    /// hardware address of its own, which follows it too (a macvlan)
    #[arg(long = "vip", value_name = "CIDR@DEV[+mac]")]
    vips: Vec<Vip>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// When epochs start: one of the three.
#[derive(clap::Args)]
struct Pace {
    /// Interval between two epochs [default: 200ms]
    #[arg(long, value_name = "TIME", value_parser = parse_ms)]
    every: Option<u64>,
    /// Instead: as few epochs as keep what the standby holds no older than this
    #[arg(long, value_name = "TIME", value_parser = parse_ms, conflicts_with = "every")]
    lag: Option<u64>,
    /// Instead: one epoch after the other without a pause
    #[arg(long, conflicts_with_all = ["every", "lag"])]
    continuous: bool,
    /// Most of its time that the workload may be frozen for; epochs get rarer to keep it [default: 25, with
    /// `--commit output` 50, and up to 80 as far as it sleeps in between]
    #[arg(long, value_name = "PERCENT")]
    max_frozen: Option<u8>,
}

impl Pace {
    fn spec(&self) -> PaceSpec {
        let default = PaceSpec::default();
        let mode = match (self.every, self.lag) {
            (Some(ms), _) => PaceMode::EveryMs(ms),
            (None, Some(ms)) => PaceMode::LagMs(ms),
            (None, None) if self.continuous => PaceMode::Continuous,
            (None, None) => default.mode,
        };
        PaceSpec { mode, frozen_percent_max: self.max_frozen }
    }
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
    let pace = args.pace.spec();
    let (name, to, vips, json) = (args.name.clone(), args.to.clone(), args.vips.clone(), args.json);
    let (ship_image, commit) = (args.ship_image, args.commit);
    let source = source(args)?;
    let request = ProtectRequest { name, source, to, pace, vips, commit, ship_image };
    let protect = || client::post(socket, "/v1/protect", &request);
    let status: WorkloadStatus =
        if ship_image && !json { with_progress(socket, &request.name, protect)? } else { protect()? };
    if json {
        return print_json(&status);
    }
    println!(
        "{} is protected: standby {}, epochs: {}; watch it with: standin status {} --watch",
        status.name,
        status.peer.as_deref().unwrap_or("?"),
        status.pace.wanted.mode,
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

/// Says on the standard error what is on its way to the standby, as long as `work` takes.
fn with_progress<T>(socket: &Path, name: &Name, work: impl FnOnce() -> T) -> T {
    let (done, finished) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let terminal = std::io::stderr().is_terminal();
            let mut told = String::new();
            while finished.recv_timeout(PROGRESS_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let status = client::get::<AgentStatus>(socket, "/v1/status");
                let shipments = status.map(|status| status.shipments).unwrap_or_default();
                let Some(shipment) = shipments.into_iter().find(|shipment| shipment.name == *name) else {
                    continue;
                };
                // A log needs no more than a line for each thing.
                if terminal {
                    eprint!("\r\x1b[K{}", progress(&shipment));
                } else if shipment.what != told {
                    eprintln!("{}", progress(&shipment));
                }
                told = shipment.what;
            }
            if terminal && !told.is_empty() {
                eprintln!();
            }
        });
        let result = work();
        drop(done);
        result
    })
}

/// One line for people.
pub(super) fn progress(shipment: &ShipmentStatus) -> String {
    let ShipmentStatus { what, to, sent_bytes, total_bytes, .. } = shipment;
    format!("sending {what} to {to}: {} of about {}", human_bytes(*sent_bytes), human_bytes(*total_bytes))
}

/// What is to be protected.
fn source(args: Args) -> Result<Source, Failure> {
    let Args { name, pid, run, oci, runtime, root, docker, podman, ips, mounts, to, .. } = args;
    if let Some(pid) = pid {
        return Ok(Source::Pid(pid));
    }
    if let Some(id) = oci {
        return Ok(Source::Oci(OciContainer { id, runtime, state: root, ips, mounts }));
    }
    let docker = docker.map(|container| (Daemon::Docker, container));
    if let Some((daemon, container)) = docker.or_else(|| podman.map(|container| (Daemon::Podman, container)))
    {
        return Ok(Source::Docker(DockerContainer { daemon, container, ips, mounts }));
    }
    match run {
        Some(run) if run != name => Err(Failure::new(
            ErrorCode::Invalid,
            format!(
                "a sandbox is protected under its own name: standin protect {run} --to {to}, or start it as {name}"
            ),
        )),
        _ => Ok(Source::Run(name)),
    }
}
