//! Whether an address can be brought up on a device, asked long before it is.

use std::{
    fmt::Write,
    io,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use nix::{
    ifaddrs::{InterfaceAddress, getifaddrs},
    net::if_::{InterfaceFlags, if_nametoindex},
};

use super::{
    announce::{
        ARP_REQUEST, Mac, PROTOCOL_ARP, PROTOCOL_IPV6, arp, arp_sender, neighbour_claim, neighbour_probe,
        solicited_node,
    },
    sys,
};
use crate::workload::spec::{Cidr, Vip};

/// Why an address would not work.
#[derive(Debug, thiserror::Error)]
pub enum VipError {
    /// No such device.
    #[error("there is no device {device} for the address {cidr}; this host has: {have}")]
    NoDevice {
        /// Its name.
        device: String,
        /// The address.
        cidr: Cidr,
        /// Those there are.
        have: String,
    },
    /// It is down.
    #[error("the device {device} for the address {cidr} is down; `ip link set {device} up`")]
    Down {
        /// Its name.
        device: String,
        /// The address.
        cidr: Cidr,
    },
    /// Another network.
    #[error(
        "the address {cidr} is on none of the networks of {device}: {networks}; clients there would not find it"
    )]
    ForeignNetwork {
        /// Device.
        device: String,
        /// The address.
        cidr: Cidr,
        /// Those it is on.
        networks: String,
    },
    /// In use.
    #[error("the address {cidr} is in use by {owner} on the network of {device}; choose another, or free it")]
    InUse {
        /// Device.
        device: String,
        /// The address.
        cidr: Cidr,
        /// Hardware address.
        owner: String,
    },
    /// Could not find out.
    #[error("cannot examine the device {device}: {source}")]
    Probe {
        /// Device.
        device: String,
        /// Cause.
        source: io::Error,
    },
}

/// Checks device and network. With `probe` it also asks the network (by ARP, or as RFC 4862 does) for that long whether
/// somebody else has the address: only sensible while no host of ours has it up.
pub fn check_vip(vip: &Vip, probe: Option<Duration>) -> Result<(), VipError> {
    let probe_error = |source| VipError::Probe { device: vip.device.clone(), source };
    let all: Vec<InterfaceAddress> = getifaddrs().map_err(|errno| probe_error(errno.into()))?.collect();
    check_among(vip, &all)?;
    let Some(limit) = probe else { return Ok(()) };
    match ask(vip, own_v4(vip, &all), limit).map_err(probe_error)? {
        None => Ok(()),
        Some(mac) => Err(VipError::InUse {
            device: vip.device.clone(),
            cidr: vip.cidr,
            owner: mac.map(|byte| format!("{byte:02x}")).join(":"),
        }),
    }
}

fn check_among(vip: &Vip, all: &[InterfaceAddress]) -> Result<(), VipError> {
    let (device, cidr) = (vip.device.clone(), vip.cidr);
    let mine: Vec<_> = all.iter().filter(|entry| entry.interface_name == device).collect();
    let Some(any) = mine.first() else {
        let mut have: Vec<_> = all.iter().map(|entry| entry.interface_name.as_str()).collect();
        have.sort_unstable();
        have.dedup();
        return Err(VipError::NoDevice { device, cidr, have: have.join(", ") });
    };
    if !any.flags.contains(InterfaceFlags::IFF_UP) {
        return Err(VipError::Down { device, cidr });
    }
    let networks: Vec<Cidr> = mine.iter().filter_map(|entry| network(entry)).collect();
    if networks.iter().any(|network| contains(*network, cidr.addr)) {
        return Ok(());
    }
    let mut text = String::new();
    for network in networks {
        let _ = write!(text, "{}{network}", if text.is_empty() { "" } else { ", " });
    }
    if text.is_empty() {
        text.push_str("it has no address");
    }
    Err(VipError::ForeignNetwork { device, cidr, networks: text })
}

fn network(entry: &InterfaceAddress) -> Option<Cidr> {
    let (address, mask) = (entry.address.as_ref()?, entry.netmask.as_ref()?);
    if let (Some(v4), Some(mask)) = (address.as_sockaddr_in(), mask.as_sockaddr_in()) {
        return Some(Cidr { addr: v4.ip().into(), prefix: mask.ip().to_bits().count_ones() as u8 });
    }
    let (v6, mask) = (address.as_sockaddr_in6()?, mask.as_sockaddr_in6()?);
    Some(Cidr { addr: v6.ip().into(), prefix: mask.ip().to_bits().count_ones() as u8 })
}

fn contains(network: Cidr, addr: IpAddr) -> bool {
    let bits = |addr| match addr {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 32),
        IpAddr::V6(v6) => (v6.to_bits(), 128),
    };
    let ((a, length), (b, other)) = (bits(network.addr), bits(addr));
    length == other && (network.prefix == 0 || (a ^ b) >> (128 - u32::from(network.prefix)) == 0)
}

/// Probes that are sent: one may be lost.
const PROBES: u32 = 2;

/// Another address of the device in the network of an IPv4 one: a question from the address itself would announce it.
fn own_v4(vip: &Vip, all: &[InterfaceAddress]) -> Ipv4Addr {
    let mine = all.iter().filter(|entry| entry.interface_name == vip.device);
    let near = mine.filter(|entry| network(entry).is_some_and(|network| contains(network, vip.cidr.addr)));
    let mut own = near.filter_map(|entry| Some(entry.address.as_ref()?.as_sockaddr_in()?.ip()));
    own.find(|own| IpAddr::V4(*own) != vip.cidr.addr).unwrap_or(Ipv4Addr::UNSPECIFIED)
}

/// Asks who has an address: by a neighbour solicitation from the unspecified address, so that nobody's table changes, or by
/// ARP. An ARP probe would come from 0.0.0.0 (RFC 5227), but to that Linux does not answer for what it is a proxy of
/// (arp_process), as our hosts are for sandboxes: so the device's own address asks, of which neighbours learn nothing new.
fn ask(vip: &Vip, own: Ipv4Addr, limit: Duration) -> io::Result<Option<Mac>> {
    let addr = vip.cidr.addr;
    let index = if_nametoindex(vip.device.as_str())?;
    let protocol = if addr.is_ipv4() { PROTOCOL_ARP } else { PROTOCOL_IPV6 };
    let socket = sys::packet_socket(index, protocol)?;
    let Some(mac) = sys::ethernet_address(&socket)? else { return Ok(None) };
    let request = match addr {
        IpAddr::V4(v4) => arp(ARP_REQUEST, mac, own.octets(), [0; 6], v4.octets()),
        IpAddr::V6(v6) => {
            // Another one who is about to take it asks the group, and nobody else.
            sys::hear_group(&socket, index, solicited_node(v6).1)?;
            neighbour_probe(mac, v6)
        }
    };
    let mut frame = [0; 128];
    for _ in 0..PROBES {
        sys::send_frame(&socket, index, &request)?;
        let until = Instant::now() + limit / PROBES;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // Also where frames never cease to come.
                break;
            }
            let Some(length) = sys::receive_frame(&socket, &mut frame, left)? else { break };
            let claim = match addr {
                IpAddr::V4(v4) => arp_sender(&frame[..length], v4.octets()),
                IpAddr::V6(v6) => neighbour_claim(&frame[..length], v6),
            };
            if let Some(owner) = claim.filter(|owner| *owner != mac) {
                return Ok(Some(owner));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_belongs_to_its_network_only() {
        let on = |network: &str, addr: &str| contains(network.parse().unwrap(), addr.parse().unwrap());
        assert!(on("10.0.0.9/24", "10.0.0.200"));
        assert!(!on("10.0.0.9/24", "10.0.1.1"));
        assert!(!on("10.0.0.9/32", "10.0.0.8"));
        assert!(on("0.0.0.0/0", "10.0.0.8"));
        assert!(on("fd00::1/64", "fd00::5"));
        assert!(!on("fd00::1/64", "fd00:0:0:1::5"));
        assert!(!on("::/0", "10.0.0.8"));
    }
}
