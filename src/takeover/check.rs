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
    announce::{ARP_REQUEST, Mac, PROTOCOL_ARP, arp, arp_sender},
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

/// Checks device and network. With `probe` it also asks the network (ARP, so IPv4 alone) for that long
/// whether somebody else has the address: only sensible while no host of ours has it up.
pub fn check_vip(vip: &Vip, probe: Option<Duration>) -> Result<(), VipError> {
    let probe_error = |source| VipError::Probe { device: vip.device.clone(), source };
    let all: Vec<InterfaceAddress> = getifaddrs().map_err(|errno| probe_error(errno.into()))?.collect();
    check_among(vip, &all)?;
    let (Some(limit), IpAddr::V4(v4)) = (probe, vip.cidr.addr) else { return Ok(()) };
    match ask(&vip.device, v4, limit).map_err(probe_error)? {
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

/// An ARP probe (RFC 5227: sender address 0.0.0.0, so that nobody's table changes).
fn ask(device: &str, addr: Ipv4Addr, limit: Duration) -> io::Result<Option<Mac>> {
    let index = if_nametoindex(device)?;
    let socket = sys::packet_socket(index, PROTOCOL_ARP)?;
    let Some(mac) = sys::ethernet_address(&socket)? else { return Ok(None) };
    let request = arp(ARP_REQUEST, mac, [0; 4], [0; 6], addr.octets());
    sys::send_frame(&socket, index, &request)?;
    let until = Instant::now() + limit;
    let mut frame = [0; 128];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let Some(length) = sys::receive_frame(&socket, &mut frame, left)? else { return Ok(None) };
        match arp_sender(&frame[..length], addr.octets()) {
            Some(owner) if owner != mac => return Ok(Some(owner)),
            _ => {}
        }
    }
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
