//! The network of a sandbox, or of a container that has none of its engine: a veth pair, routed, without a bridge.
//!
//! ```text
//!  inside                       host
//!  eth0  ADDR/32 ───── veth ─── sd-…  169.254.1.1/32, fe80::1   ── forwarding ──► the host's devices
//!  default via 169.254.1.1      route ADDR/32 dev sd-…  (while the gate is open)
//! ```
//!
//! Inside, every address is added as a single one (/32, /128), whatever its prefix: its network is reached
//! through the host, like everything else. Hardware addresses and the gateway are the same on both hosts,
//! so that nothing inside can tell them apart.
//!
//! The *gate* is the host's end of the pair: down, it is closed, and no packet passes in either direction. The
//! kernel drops the device's routes and IPv6 addresses with that, so opening puts them back.
//!
//! An *isolated* network has the same devices and addresses inside and no host's end, hence no gate: nothing leaves it.
//! Which ones is looked up where the workload would be taken over: that of a sandbox, a container's, the host's.

mod shared;

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns, unshare},
};

pub use self::shared::{remove_shared_devices, shared_device};
use super::{
    netlink::{GATEWAY_V6, NetError, NetStep, RouteSocket},
    spec::Cidr,
};
use crate::model::Name;

/// The address by which a sandbox reaches its host over IPv4.
pub(crate) const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The other end of an isolated network.
const NOWHERE: &str = "nowhere";
const LOOPBACK: &str = "lo";

/// Why a sandbox has no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The `ip` command.
    #[error(
        "`ip -batch` failed for device {device}: {reason}; is iproute2 installed, and the address unused?"
    )]
    Ip {
        /// The host's end.
        device: String,
        /// What it wrote.
        reason: String,
    },
    /// A file below /proc/sys/net.
    #[error("cannot set {path}: {source}; is /proc/sys writable here?")]
    Sysctl {
        /// File.
        path: String,
        /// Cause.
        source: io::Error,
    },
    /// A new one.
    #[error("cannot make a network namespace at {path}: {source}")]
    Namespace {
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The namespace.
    #[error("cannot enter the sandbox's network namespace: {0}")]
    Enter(#[source] Errno),
    /// The device.
    #[error("device {device} is missing: {errno}; destroy the sandbox and make it anew")]
    Missing {
        /// The host's end.
        device: String,
        /// Cause.
        errno: Errno,
    },
    /// rtnetlink.
    #[error(transparent)]
    Net(#[from] NetError),
}

/// The host's end of a workload's veth pair. 48 bits of hash: two names never get the same in practice, and if
/// they did, making the second one would fail.
pub fn host_device(name: &Name) -> String {
    let hash = blake3::hash(name.as_str().as_bytes()).to_hex();
    format!("sd-{}", &hash[..12])
}

/// A locally administered hardware address for one end of the pair.
fn mac(name: &Name, end: &str) -> String {
    let hash = blake3::hash(format!("{end}/{name}").as_bytes());
    let b = hash.as_bytes();
    format!("02:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", b[0], b[1], b[2], b[3], b[4])
}

fn delete(device: &str) -> Result<(), NetworkError> {
    match if_nametoindex(device) {
        Ok(index) => Ok(RouteSocket::open()?.apply(&[NetStep::DelLink { index }])?),
        Err(_) => Ok(()),
    }
}

/// Runs a closure in another network namespace, on a thread of its own. Processes that it spawns are in the namespace too.
pub fn within<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T, Errno> {
    within_namespaces(netns, CloneFlags::CLONE_NEWNET, work)
}

/// Runs a closure in namespaces of the process behind a pidfd, or in the one behind its file, on a thread of its own:
/// `setns` changes just that.
pub(crate) fn within_namespaces<T: Send>(
    of: BorrowedFd<'_>,
    which: CloneFlags,
    work: impl FnOnce() -> T + Send,
) -> Result<T, Errno> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| setns(of, which).map(|()| work()));
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Makes a namespace that lives for as long as it is mounted at the path, a file that is made. Its loopback device is up.
pub(super) fn make_namespace(at: &Path) -> Result<(), NetworkError> {
    let error = |source| NetworkError::Namespace { path: at.to_owned(), source };
    let make = || {
        fs::write(at, "").map_err(error)?;
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| error(errno.into()))?;
        let (from, none) = (Some("/proc/thread-self/ns/net"), None::<&str>);
        mount(from, at, none, MsFlags::MS_BIND, none).map_err(|errno| error(errno.into()))?;
        ip("lo", "link set lo up\n")
    };
    // A thread of its own: it stays in that namespace until it ends.
    std::thread::scope(|scope| scope.spawn(make).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Makes the pair between here and a namespace, gate closed. `inside` is a pid in it, or the path where it is mounted.
pub(super) fn create(
    name: &Name,
    inside: &str,
    netns: BorrowedFd<'_>,
    ips: &[Cidr],
) -> Result<(), NetworkError> {
    let device = host_device(name);
    let (host_mac, inner_mac) = (mac(name, "host"), mac(name, "inside"));
    let batch = format!(
        "link add {device} address {host_mac} type veth peer name eth0 address {inner_mac} netns {inside}\n\
         addr add {GATEWAY_V4}/32 dev {device} scope link\n"
    );
    ip(&device, &batch)?;
    let has_v6 = ips.iter().any(|cidr| cidr.addr.is_ipv6());
    enable_forwarding(&device, has_v6)?;
    if has_v6 {
        sysctl(&format!("ipv6/conf/{device}/accept_ra"), "0")?;
    }
    within(netns, || create_inside(&device, ips, has_v6)).map_err(NetworkError::Enter)?
}

/// A device, as it looks from inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    name: String,
    mac: Option<String>,
    mtu: Option<u64>,
    /// Those by which others reach it.
    pub addresses: Vec<Cidr>,
}

/// The devices with addresses that the process behind a pidfd sees.
pub fn devices(of: BorrowedFd<'_>) -> Result<Vec<Device>, NetworkError> {
    let links = within(of, || shown(&["-j", "addr", "show"])).map_err(NetworkError::Enter)??;
    Ok(links.iter().filter_map(Device::parse).filter(|device| !device.addresses.is_empty()).collect())
}

impl Device {
    /// The loopback device with more addresses: they alone, since all of a network on that device would be the namespace's own.
    pub fn loopback(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let alone = |addr: IpAddr| Cidr { addr, prefix: if addr.is_ipv4() { 32 } else { 128 } };
        let addresses = addresses.into_iter().map(alone).collect();
        Self { name: LOOPBACK.to_owned(), mac: None, mtu: None, addresses }
    }

    fn parse(link: &serde_json::Value) -> Option<Self> {
        let entries = link["addr_info"].as_array().into_iter().flatten();
        let addresses = entries.filter(|entry| entry["scope"] == "global").filter_map(|entry| {
            let (addr, prefix) = (entry["local"].as_str()?.parse().ok()?, entry["prefixlen"].as_u64()?);
            Some(Cidr { addr, prefix: prefix.try_into().ok()? })
        });
        Some(Self {
            name: link["ifname"].as_str()?.to_owned(),
            mac: link["address"].as_str().filter(|mac| parse_mac(mac).is_some()).map(str::to_owned),
            mtu: link["mtu"].as_u64(),
            addresses: addresses.collect(),
        })
    }

    /// What makes one that leads nowhere, as `ip` reads it: the other end of a pair is in the same namespace, without an
    /// address.
    fn lines(&self, number: usize) -> Vec<String> {
        let name = &self.name;
        let mut lines = Vec::new();
        if name != LOOPBACK {
            let mac = self.mac.as_ref().map(|mac| format!(" address {mac}")).unwrap_or_default();
            let mtu = self.mtu.map(|mtu| format!(" mtu {mtu}")).unwrap_or_default();
            let peer = if number == 0 { NOWHERE.to_owned() } else { format!("{NOWHERE}{number}") };
            lines.push(format!("link add {name}{mac}{mtu} type veth peer name {peer}{mtu}"));
            lines.push(format!("link set {peer} arp off"));
            lines.extend([peer.as_str(), name].map(|device| format!("link set {device} up")));
        }
        lines.extend(self.addresses.iter().map(|cidr| {
            let nodad = if cidr.addr.is_ipv6() { " nodad" } else { "" };
            format!("addr add {cidr} dev {name}{nodad}")
        }));
        lines
    }
}

/// Gives a namespace devices that look the same from inside as others do, and lead nowhere.
pub(super) fn create_isolated(netns: BorrowedFd<'_>, devices: &[Device]) -> Result<(), NetworkError> {
    let mut lines = vec![format!("link set {LOOPBACK} up")];
    lines.extend(devices.iter().enumerate().flat_map(|(number, device)| device.lines(number)));
    // Whoever has a connection has a way to its other end.
    for (all, is_it) in [("0.0.0.0/0", IpAddr::is_ipv4 as fn(&IpAddr) -> bool), ("::/0", IpAddr::is_ipv6)] {
        let has_it = |device: &&Device| device.addresses.iter().any(|cidr| is_it(&cidr.addr));
        let first = devices.iter().filter(|device| device.name != LOOPBACK).find(has_it);
        lines.extend(first.map(|device| format!("route add {all} dev {}", device.name)));
    }
    lines.push(String::new());
    let make = || {
        avoid_pacing();
        ip(NOWHERE, &lines.join("\n"))
    };
    within(netns, make).map_err(NetworkError::Enter)?
}

fn create_inside(device: &str, ips: &[Cidr], has_v6: bool) -> Result<(), NetworkError> {
    if has_v6 {
        for (key, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("autoconf", "0")] {
            sysctl(&format!("ipv6/conf/eth0/{key}"), value)?;
        }
    }
    avoid_pacing();
    let mut lines = vec!["link set lo up".to_owned(), "link set eth0 up".to_owned()];
    lines.extend(ips.iter().map(|cidr| match cidr.addr {
        IpAddr::V4(v4) => format!("addr add {v4}/32 dev eth0"),
        IpAddr::V6(v6) => format!("addr add {v6}/128 dev eth0 nodad"),
    }));
    if ips.iter().any(|cidr| cidr.addr.is_ipv4()) {
        lines.push(format!("route add {GATEWAY_V4} dev eth0 scope link"));
        lines.push(format!("route add default via {GATEWAY_V4} dev eth0 onlink"));
    }
    if has_v6 {
        lines.push(format!("route add default via {GATEWAY_V6} dev eth0"));
    }
    lines.push(String::new());
    ip(device, &lines.join("\n"))
}

/// While CRIU looks at a connection, whatever its kernel sends counts as sent and is not (`criu/bridge/lists.c`). A congestion
/// control that paces by timers of its own sends at any time: most of a busy stream would be lost so, and sent again late.
fn avoid_pacing() {
    const KEY: &str = "ipv4/tcp_congestion_control";
    if sysctl_value(KEY).is_some_and(|control| control.starts_with("bbr")) {
        // A namespace may choose only what the host allows to all; reno is always there.
        let _ = sysctl(KEY, "cubic").or_else(|_| sysctl(KEY, "reno"));
    }
}

/// Lets the host pass packets on that arrive on the device.
///
/// For IPv6 only the host-wide switch counts, and it ends the acceptance of router advertisements: devices
/// that have their routes from those are told to accept them all the same.
pub fn enable_forwarding(device: &str, has_v6: bool) -> Result<(), NetworkError> {
    sysctl(&format!("ipv4/conf/{device}/forwarding"), "1")?;
    if !has_v6 || sysctl_value("ipv6/conf/all/forwarding").as_deref() == Some("1") {
        return Ok(());
    }
    for entry in fs::read_dir("/proc/sys/net/ipv6/conf").into_iter().flatten().flatten() {
        let key = format!("ipv6/conf/{}/accept_ra", entry.file_name().to_string_lossy());
        if sysctl_value(&key).as_deref() == Some("1") {
            sysctl(&key, "2")?;
        }
    }
    sysctl("ipv6/conf/all/forwarding", "1")
}

/// A veth device whose other end is in its maker's namespace.
struct VethPair {
    inside: u32,
    outside: u32,
    /// Of the end inside.
    mac: Option<[u8; 6]>,
    addresses: Vec<IpAddr>,
}

/// Those of the calling thread's namespace.
fn veth_pairs() -> Result<Vec<VethPair>, NetworkError> {
    let pair = |link: &serde_json::Value| {
        let is_veth = link["linkinfo"]["info_kind"] == "veth" && link["link_netnsid"].is_u64();
        let addresses = link["addr_info"].as_array().into_iter().flatten();
        let addresses = addresses.filter(|entry| entry["scope"] == "global");
        is_veth.then(|| {
            Some(VethPair {
                inside: link["ifindex"].as_u64()? as u32,
                outside: link["link_index"].as_u64()? as u32,
                mac: link["address"].as_str().and_then(parse_mac),
                addresses: addresses.filter_map(|entry| entry["local"].as_str()?.parse().ok()).collect(),
            })
        })?
    };
    Ok(shown(&["-d", "-j", "addr", "show"])?.iter().filter_map(pair).collect())
}

/// What `ip` shows, as JSON, in the calling thread's namespace.
fn shown(arguments: &[&str]) -> Result<Vec<serde_json::Value>, NetworkError> {
    let error = |reason: String| NetworkError::Ip { device: "of the container".to_owned(), reason };
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|source| error(source.to_string()))?;
    serde_json::from_slice(&output.stdout).map_err(|source| error(source.to_string()))
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// The bridges that these devices are ports of; `None` for one that is no port.
fn bridges_of(devices: &[u32]) -> Result<Vec<Option<u32>>, NetworkError> {
    let links = shown(&["-j", "link", "show"])?;
    let master = |index: &u32| {
        let link = links.iter().find(|link| link["ifindex"].as_u64() == Some(u64::from(*index)))?;
        if_nametoindex(link["master"].as_str()?).ok()
    };
    Ok(devices.iter().map(master).collect())
}

/// What has this host's packet filter see what bridges pass from port to port.
pub const SEE_BRIDGED: &str = "`modprobe br_netfilter; sysctl -w net.bridge.bridge-nf-call-iptables=1 \
                               net.bridge.bridge-nf-call-ip6tables=1`";

/// The names of those bridges, of all if `None`, that pass packets from port to port without this host's packet filter.
pub fn unseen_bridges(bridges: Option<&[u32]>) -> Result<Vec<String>, NetworkError> {
    let loaded = |family| sysctl_value(&format!("bridge/bridge-nf-call-{family}"));
    let calls = [("nf_call_iptables", loaded("iptables")), ("nf_call_ip6tables", loaded("ip6tables"))];
    if bridges.is_some_and(<[u32]>::is_empty)
        || calls.iter().all(|(_, for_all)| for_all.as_deref() == Some("1"))
    {
        return Ok(Vec::new());
    }
    let is_asked = |link: &serde_json::Value| {
        let index = link["ifindex"].as_u64().unwrap_or(0);
        bridges.is_none_or(|bridges| bridges.iter().any(|bridge| u64::from(*bridge) == index))
    };
    let is_seen = |link: &serde_json::Value| {
        let own = |option: &str| link["linkinfo"]["info_data"][option].as_u64() == Some(1);
        calls.iter().all(|(option, for_all)| match for_all.as_deref() {
            // Without the module a bridge's own option does nothing.
            None => false,
            Some(value) => value == "1" || own(option),
        })
    };
    let links = shown(&["-d", "-j", "link", "show", "type", "bridge"])?;
    let unseen = links.iter().filter(|link| is_asked(link) && !is_seen(link));
    Ok(unseen.filter_map(|link| link["ifname"].as_str().map(str::to_owned)).collect())
}

fn sysctl_value(key: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new("/proc/sys/net").join(key)).ok()?;
    Some(text.trim().to_owned())
}

/// Sets a value below /proc/sys/net of the calling thread's network namespace.
pub fn sysctl(key: &str, value: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/net/{key}");
    fs::write(&path, value).map_err(|source| NetworkError::Sysctl { path, source })
}

fn ip(device: &str, batch: &str) -> Result<(), NetworkError> {
    let error = |reason: String| NetworkError::Ip { device: device.to_owned(), reason };
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| error(source.to_string()))?;
    let written = io::Write::write_all(&mut child.stdin.take().expect("piped"), batch.as_bytes());
    let output = child.wait_with_output().map_err(|source| error(source.to_string()))?;
    if output.status.success() && written.is_ok() {
        return Ok(());
    }
    Err(error(String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ")))
}

/// Removes the pair; none is no error.
pub(super) fn remove(name: &Name) -> Result<(), NetworkError> {
    delete(&host_device(name))
}

/// The gate of a workload, seen from both of its sides: that of our pair, or those that an engine has made.
#[derive(Debug)]
pub struct Gate {
    /// The host's ends.
    outside: Vec<u32>,
    /// What this host routes to them.
    ips: Vec<IpAddr>,
    /// The other ends, and a socket in their namespace.
    inside: (RouteSocket, Vec<u32>),
    doors: Vec<Door>,
    /// Those of the host's ends that lead to the workload alone, and the addresses there.
    alone: (Vec<u32>, Vec<IpAddr>),
    /// What of it is behind bridges.
    behind: Behind,
}

/// A way for frames from this host to a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Door {
    /// The host's end.
    pub index: u32,
    /// The hardware address inside.
    pub mac: [u8; 6],
    /// That of the host's end, if what is inside has it for its gateway.
    pub gateway: Option<[u8; 6]>,
}

/// By what packets of a workload are known whose devices are ports of bridges.
#[derive(Clone, Debug, Default)]
pub struct Behind {
    /// The bridges.
    pub bridges: Vec<u32>,
    /// Hardware addresses inside.
    pub macs: Vec<[u8; 6]>,
    /// Addresses inside.
    pub addresses: Vec<IpAddr>,
}

impl Gate {
    /// `netns` is the sandbox's.
    pub(super) fn of(name: &Name, ips: &[Cidr], netns: BorrowedFd<'_>) -> Result<Self, NetworkError> {
        let missing = |device: String, errno| NetworkError::Missing { device, errno };
        let device = host_device(name);
        let index = if_nametoindex(device.as_str()).map_err(|errno| missing(device, errno))?;
        let inside = within(netns, || Ok((RouteSocket::open()?, if_nametoindex("eth0"))));
        let (socket, inner) = inside.map_err(NetworkError::Enter)?.map_err(NetworkError::Net)?;
        let inner = inner.map_err(|errno| missing("eth0".to_owned(), errno))?;
        let ips: Vec<_> = ips.iter().map(|cidr| cidr.addr).collect();
        let alone = (vec![index], ips.clone());
        let (inside_mac, gateway) = (parse_mac(&mac(name, "inside")), parse_mac(&mac(name, "host")));
        let doors = inside_mac.into_iter().map(|mac| Door { index, mac, gateway }).collect();
        let inside = (socket, vec![inner]);
        Ok(Self { outside: vec![index], ips, inside, doors, alone, behind: Behind::default() })
    }

    /// That of a container whose engine has made its devices: all veth pairs that end on this host. `None` if it has none.
    pub(super) fn of_engine(netns: BorrowedFd<'_>) -> Result<Option<Self>, NetworkError> {
        let found = within(netns, || Ok::<_, NetworkError>((RouteSocket::open()?, veth_pairs()?)));
        let (socket, pairs) = found.map_err(NetworkError::Enter)??;
        if pairs.is_empty() {
            return Ok(None);
        }
        let inside = pairs.iter().map(|pair| pair.inside).collect();
        let outside: Vec<_> = pairs.iter().map(|pair| pair.outside).collect();
        let door = |pair: &VethPair| Some(Door { index: pair.outside, mac: pair.mac?, gateway: None });
        let doors = pairs.iter().filter_map(door).collect();
        let (mut alone, mut behind) = ((Vec::new(), Vec::new()), Behind::default());
        for (pair, bridge) in pairs.into_iter().zip(bridges_of(&outside)?) {
            let Some(bridge) = bridge else {
                alone.0.push(pair.outside);
                alone.1.extend(pair.addresses);
                continue;
            };
            let no_mac = || NetworkError::Ip {
                device: "of the container".to_owned(),
                reason: "one that is a bridge's port has no hardware address".to_owned(),
            };
            behind.bridges.push(bridge);
            behind.macs.push(pair.mac.ok_or_else(no_mac)?);
            behind.addresses.extend(pair.addresses);
        }
        // Two networks may share a bridge.
        behind.bridges.sort_unstable();
        behind.bridges.dedup();
        Ok(Some(Self { outside, ips: Vec::new(), inside: (socket, inside), doors, alone, behind }))
    }

    /// The host's ends of all devices that lead to the workload, whether bridges have them or not.
    pub fn ports(&self) -> &[u32] {
        &self.outside
    }

    /// The host's ends of devices that lead to the workload alone.
    pub fn devices(&self) -> &[u32] {
        &self.alone.0
    }

    /// By which frames get inside.
    pub fn doors(&self) -> &[Door] {
        &self.doors
    }

    /// What of it is behind bridges.
    pub fn behind(&self) -> &Behind {
        &self.behind
    }

    /// The addresses that it has behind those.
    pub fn ips(&self) -> &[IpAddr] {
        &self.alone.1
    }

    /// Waits until packets pass after the gate was opened; false if they do not within the limit.
    pub fn await_running(&self, limit: Duration) -> Result<bool, NetError> {
        let until = Instant::now() + limit;
        let (socket, devices) = &self.inside;
        for device in devices {
            while !socket.is_running(*device)? {
                if Instant::now() >= until {
                    return Ok(false);
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        }
        Ok(true)
    }

    /// Link up, then what the kernel had dropped with the link.
    pub fn open_steps(&self) -> Vec<NetStep> {
        let mut steps: Vec<_> = self.outside.iter().map(|index| NetStep::LinkUp { index: *index }).collect();
        let Some(&index) = self.outside.first() else { return steps };
        if self.ips.iter().any(IpAddr::is_ipv6) {
            let cidr = Cidr { addr: GATEWAY_V6.into(), prefix: 64 };
            steps.push(NetStep::AddAddress { index, cidr });
        }
        steps.extend(self.ips.iter().map(|addr| NetStep::AddRoute { index, addr: *addr }));
        steps
    }

    /// Lets none pass from now on.
    pub(super) fn close(&self) -> Result<(), NetworkError> {
        Ok(RouteSocket::open()?.apply(&self.close_steps())?)
    }

    /// Link down.
    pub fn close_steps(&self) -> Vec<NetStep> {
        self.outside.iter().map(|index| NetStep::LinkDown { index: *index }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_isolated_device_looks_as_its_model() {
        let link = serde_json::json!({
            "ifname": "eth0", "mtu": 9000, "address": "02:00:00:00:00:05",
            "addr_info": [
                { "local": "10.0.0.5", "prefixlen": 24, "scope": "global" },
                { "local": "fd00::5", "prefixlen": 64, "scope": "global" },
                { "local": "fe80::5", "prefixlen": 64, "scope": "link" },
            ],
        });
        let device = Device::parse(&link).unwrap();
        assert_eq!(
            device.lines(1),
            [
                "link add eth0 address 02:00:00:00:00:05 mtu 9000 type veth peer name nowhere1 mtu 9000",
                "link set nowhere1 arp off",
                "link set nowhere1 up",
                "link set eth0 up",
                "addr add 10.0.0.5/24 dev eth0",
                "addr add fd00::5/64 dev eth0 nodad",
            ]
        );
        let loopback = Device::loopback(["10.0.0.9".parse().unwrap()]);
        assert_eq!(loopback.lines(0), ["addr add 10.0.0.9/32 dev lo"]);
    }

    #[test]
    fn device_names_fit_and_differ_for_long_names() {
        let a: Name = format!("{}-a", "x".repeat(38)).parse().unwrap();
        let b: Name = format!("{}-b", "x".repeat(38)).parse().unwrap();
        assert!(host_device(&a).len() < 16);
        assert_ne!(host_device(&a), host_device(&b));
        assert_ne!(mac(&a, "host"), mac(&a, "inside"));
    }
}
