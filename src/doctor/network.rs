//! Sandboxes' networks, tried in a network namespace of the doctor's own, and the agent's port and this host's bridges.

use std::{
    io::{self, ErrorKind},
    net::{SocketAddr, UdpSocket},
    os::unix::net::UnixStream,
    process::{Command, Stdio},
};

use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
};

use super::{Check, Group};
use crate::{
    config::Config,
    takeover::lease::{self, Hook},
    workload::network::{SEE_BRIDGED, enable_forwarding, unseen_bridges},
};

/// The ends of the pair that is tried.
const DEVICES: [&str; 2] = ["sd-doctor0", "sd-doctor1"];
const TABLE: &str = "standin_doctor";

/// Moves the calling thread into a network namespace of its own, behind the check of the port.
pub(super) fn check(config: &Config) -> Vec<Check> {
    let here = [port(config), bridges()];
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
        let found = format!("a network namespace cannot be made: {errno}");
        let remedy = "run it as root of the host (CAP_SYS_ADMIN), with CONFIG_NET_NS in the kernel";
        let no_namespace = Check::fail(Group::Network, "network-namespace", found, remedy);
        return std::iter::once(no_namespace).chain(here).collect();
    }
    let mut checks = vec![Check::ok(Group::Network, "network-namespace", "works")];
    checks.extend(devices());
    checks.push(nft());
    checks.extend(here);
    checks
}

fn devices() -> Vec<Check> {
    let version = match run("ip", &["-V"]) {
        Ok(version) => version,
        Err(reason) => {
            let remedy = "`apt install iproute2`: the agent makes the sandboxes' networks with it";
            return vec![Check::fail(Group::Network, "iproute2", reason, remedy)];
        }
    };
    let mut checks = vec![Check::ok(Group::Network, "iproute2", version)];
    let add = ["link", "add", DEVICES[0], "type", "veth", "peer", "name", DEVICES[1]];
    if let Err(reason) = run("ip", &add) {
        let remedy = "sandboxes hang on a veth pair: grant CAP_NET_ADMIN, and `modprobe veth`";
        checks.push(Check::fail(Group::Network, "veth", reason, remedy));
        return checks;
    }
    checks.push(Check::ok(Group::Network, "veth", "a pair can be made"));
    checks.push(kernel_lease());
    checks.push(match enable_forwarding(DEVICES[0], false) {
        Ok(()) => Check::ok(Group::Network, "forwarding", "can be switched on for a device"),
        Err(error) => {
            let remedy =
                "mount /proc/sys writable for the agent: sandboxes reach the network through the host";
            Check::fail(Group::Network, "forwarding", error.to_string(), remedy)
        }
    });
    checks
}

/// On one of the devices.
fn kernel_lease() -> Check {
    const ID: &str = "kernel-lease";
    let found = if_nametoindex(DEVICES[0]).map_err(|errno| errno.to_string());
    match found.and_then(|index| lease::probe(index).map_err(|error| error.to_string())) {
        Ok(Hook::Device) => Check::ok(Group::Network, ID, "kept by nf_tables at a workload's devices"),
        Ok(Hook::Prerouting) => {
            let found = "kept by nf_tables where packets are routed, not where a bridge passes them on";
            let remedy = "for workloads behind bridges use a kernel with CONFIG_NF_TABLES_NETDEV and \
                          CONFIG_NETFILTER_INGRESS; for all others this does";
            Check::warn(Group::Network, ID, found, remedy)
        }
        Err(reason) => {
            let remedy = "use a kernel with CONFIG_NF_TABLES, so that a workload falls silent in time even if nothing else on \
                          its host runs any more; without it the guard process alone sees to that";
            Check::warn(Group::Network, ID, reason, remedy)
        }
    }
}

/// The program; nothing that the agent does needs it.
fn nft() -> Check {
    match run("nft", &["add", "table", "inet", TABLE]) {
        Ok(_) => Check::ok(Group::Network, "nftables", "a table can be made"),
        Err(reason) => {
            let remedy = "`apt install nftables`, with CONFIG_NF_TABLES in the kernel, if you filter or fence \
                          with it; protection works without it";
            Check::warn(Group::Network, "nftables", reason, remedy)
        }
    }
}

/// Whether what they pass from port to port can be held.
fn bridges() -> Check {
    const ID: &str = "bridges";
    match unseen_bridges(None) {
        Ok(unseen) if unseen.is_empty() => Check::ok(
            Group::Network,
            ID,
            "the packet filter sees what they pass from port to port, or there are none",
        ),
        Ok(unseen) => {
            let found = format!(
                "the packet filter does not see what these pass from port to port: {}",
                unseen.join(", ")
            );
            let remedy = format!("for `--commit output` of a container on one of them: {SEE_BRIDGED}");
            Check::warn(Group::Network, ID, found, remedy)
        }
        Err(error) => {
            let remedy =
                "containers on bridges cannot have `--commit output`; see `ip -d link show type bridge`";
            Check::warn(Group::Network, ID, error.to_string(), remedy)
        }
    }
}

fn port(config: &Config) -> Check {
    const ID: &str = "udp-port";
    let listen = config.listen;
    match UdpSocket::bind(listen) {
        Ok(_) => Check::ok(Group::Network, ID, format!("{listen} is free")),
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if UnixStream::connect(config.control_socket()).is_ok() {
                return Check::ok(Group::Network, ID, format!("{listen} is in use, and an agent runs"));
            }
            let found =
                format!("{listen} is in use, and no agent answers on {}", config.control_socket().display());
            let remedy = format!(
                "see who has it with `ss -ulpn 'sport = :{}'`, or set `listen` to another",
                listen.port()
            );
            Check::fail(Group::Network, ID, found, remedy)
        }
        Err(error) => Check::fail(
            Group::Network,
            ID,
            cannot_bind(listen, &error),
            "set `listen` to an address of this host",
        ),
    }
}

fn cannot_bind(listen: SocketAddr, error: &io::Error) -> String {
    format!("{listen} cannot be bound: {error}")
}

/// Runs a program to its end; what it says first, on standard output if all went well.
fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|error| match error.kind() {
        ErrorKind::NotFound => format!("there is no `{program}` in PATH"),
        _ => format!("`{program}` cannot be run: {error}"),
    })?;
    let said = if output.status.success() { &output.stdout } else { &output.stderr };
    let said = String::from_utf8_lossy(said);
    let said = said.lines().next().unwrap_or_default().trim();
    if output.status.success() {
        return Ok(said.to_owned());
    }
    Err(format!("`{program} {}`: {said} ({})", args.join(" "), output.status))
}
