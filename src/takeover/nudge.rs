//! What a restored workload waits for, it is told when its gate has opened, instead of a second later, when a timer ends:
//!
//! - where its gateway is: what it sent before waits for that;
//! - its TCP connections, what their other end said last: an acknowledgement of nothing new, upon which they send what they have.
//!
//! The frames are made here and go from the host's end of the workload's device to the end inside. They say nothing that
//! was not so before.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
};

use super::{
    announce::{ARP_REPLY, Mac, arp, checksum, neighbour_advertisement},
    sys,
};
use crate::{
    criu::images::connections::TcpConnection,
    workload::{
        netlink::GATEWAY_V6,
        network::{Door, GATEWAY_V4},
    },
};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;
/// Of frames that come from the host: nobody answers to it.
pub(super) const HOST_MAC: Mac = [2, 0, 0, 0, 0, 1];

/// Tells it all, by each of the devices.
pub fn nudge(doors: &[Door], connections: &[TcpConnection]) -> io::Result<()> {
    for &Door { index, mac, gateway } in doors {
        // Protocol 0: it receives nothing.
        let socket = sys::packet_socket(index, 0)?;
        if let Some(gateway) = gateway {
            let v4 = GATEWAY_V4.octets();
            sys::send_frame(&socket, index, &arp(ARP_REPLY, gateway, v4, mac, v4))?;
            sys::send_frame(&socket, index, &neighbour_advertisement(gateway, GATEWAY_V6))?;
        }
        for frame in connections.iter().filter_map(|connection| frame(mac, connection)) {
            sys::send_frame(&socket, index, &frame)?;
        }
    }
    Ok(())
}

/// Ends a connection for the workload, as if its other end had.
pub(super) fn reset(door: &Door, socket: &OwnedFd, connection: &TcpConnection) -> io::Result<()> {
    let frame = frame_with(door.mac, connection, RST);
    frame.map_or(Ok(()), |frame| sys::send_frame(socket, door.index, &frame))
}

/// Says this one's word to the workload.
pub(super) fn tell(door: &Door, socket: &OwnedFd, connection: &TcpConnection) -> io::Result<()> {
    let frame = frame(door.mac, connection);
    frame.map_or(Ok(()), |frame| sys::send_frame(socket, door.index, &frame))
}

/// From the other end to the workload's.
pub(super) fn frame(mac: Mac, connection: &TcpConnection) -> Option<Vec<u8>> {
    frame_with(mac, connection, ACK)
}

fn frame_with(mac: Mac, connection: &TcpConnection, flags: u8) -> Option<Vec<u8>> {
    let (kind, packet) = match (connection.remote.ip(), connection.local.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (ETHERTYPE_IPV4, packet_v4(from, to, (connection, flags))),
        (IpAddr::V6(from), IpAddr::V6(to)) => (ETHERTYPE_IPV6, packet_v6(from, to, (connection, flags))),
        _ => return None,
    };
    Some([&mac[..], &HOST_MAC, &kind.to_be_bytes(), &packet].concat())
}

fn packet_v4(from: Ipv4Addr, to: Ipv4Addr, of: (&TcpConnection, u8)) -> Vec<u8> {
    let pseudo = [&from.octets()[..], &to.octets(), &[0, TCP, 0, 20]].concat();
    let segment = segment(of, &pseudo);
    let length = (20 + segment.len()) as u16;
    // Version 4, five words; may not be fragmented; 64 hops.
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, TCP, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [header, segment].concat()
}

fn packet_v6(from: Ipv6Addr, to: Ipv6Addr, of: (&TcpConnection, u8)) -> Vec<u8> {
    let pseudo = [&from.octets()[..], &to.octets(), &[0, 0, 0, 20, 0, 0, 0, TCP]].concat();
    let segment = segment(of, &pseudo);
    let mut header = vec![0x60, 0, 0, 0];
    header.extend((segment.len() as u16).to_be_bytes());
    header.extend([TCP, 64]);
    header.extend(from.octets());
    header.extend(to.octets());
    [header, segment].concat()
}

/// A TCP header without options.
fn segment((connection, flags): (&TcpConnection, u8), pseudo: &[u8]) -> Vec<u8> {
    let mut header = Vec::with_capacity(20);
    header.extend(connection.remote.port().to_be_bytes());
    header.extend(connection.local.port().to_be_bytes());
    header.extend(connection.receive_next.to_be_bytes());
    header.extend(connection.unacknowledged.to_be_bytes());
    header.extend([5 << 4, flags]);
    header.extend(connection.window.to_be_bytes());
    header.extend([0; 4]);
    let sum = checksum(&[pseudo, &header].concat());
    header[16..18].copy_from_slice(&sum.to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(local: &str, remote: &str) -> TcpConnection {
        TcpConnection {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
            receive_next: 0x0102_0304,
            unacknowledged: 0x0506_0708,
            sent: 0x0506_0708,
            window: 500,
        }
    }

    #[test]
    fn a_segment_with_its_checksum_sums_to_zero() {
        let v4 = frame([2, 0, 0, 0, 0, 9], &connection("10.0.0.5:6379", "10.0.0.9:40000")).unwrap();
        assert_eq!(v4.len(), 14 + 20 + 20);
        assert_eq!(checksum(&v4[14..34]), 0);
        assert_eq!(checksum(&[&v4[26..34], &[0, TCP, 0, 20], &v4[34..]].concat()), 0);
        assert_eq!(v4[34..46], [0x9c, 0x40, 0x18, 0xeb, 1, 2, 3, 4, 5, 6, 7, 8]);
        let v6 = frame([2, 0, 0, 0, 0, 9], &connection("[fd00::5]:6379", "[fd00::9]:40000")).unwrap();
        assert_eq!(v6.len(), 14 + 40 + 20);
        assert_eq!(checksum(&[&v6[22..54], &[0, 0, 0, 20, 0, 0, 0, TCP], &v6[54..]].concat()), 0);
    }

    #[test]
    fn a_connection_is_of_one_family() {
        assert_eq!(frame([0; 6], &connection("10.0.0.5:1", "[fd00::9]:2")), None);
    }
}
