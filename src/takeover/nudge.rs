//! What a restored workload waits for, it is told when its gate has opened, instead of a second later, when a timer ends:
//!
//! - where its gateway is: what it sent before waits for that;
//! - its TCP connections, what their other end said last: an acknowledgement of nothing new, upon which they send what they have.
//!
//! The frames are made here and go from the host's end of the workload's device to the end inside. They say nothing that
//! was not so before.

use std::{io, os::fd::OwnedFd};

use super::{
    announce::{ARP_REPLY, Mac, arp, neighbour_advertisement},
    sys,
    tcp::{self, ACK, ETHERTYPE_IPV4, ETHERTYPE_IPV6, RST},
};
use crate::{
    criu::images::connections::TcpConnection,
    workload::{
        netlink::GATEWAY_V6,
        network::{Door, GATEWAY_V4},
    },
};

/// Of frames that come from the host: nobody answers to it.
pub(super) const HOST_MAC: Mac = [2, 0, 0, 0, 0, 1];

/// A way to say something to a workload by one of its devices. To be made ahead of time: the kernel takes milliseconds for its
/// end, and a takeover has none.
#[derive(Debug)]
pub struct Voice {
    door: Door,
    socket: OwnedFd,
}

impl Voice {
    /// Makes one.
    pub fn open(door: &Door) -> io::Result<Self> {
        // It receives nothing.
        Self::hearing(door, 0)
    }

    /// One by which frames of a protocol, that pass the device, are heard too.
    pub(super) fn hearing(door: &Door, protocol: u16) -> io::Result<Self> {
        Ok(Self { door: *door, socket: sys::packet_socket(door.index, protocol)? })
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Says that an IP packet has come.
    pub(super) fn pass(&self, packet: &[u8]) -> io::Result<()> {
        self.send(&in_frame(self.door.mac, packet))
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        sys::send_frame(&self.socket, self.door.index, frame)
    }
}

/// Tells it all, by each of the devices.
pub fn nudge(voices: &[Voice], connections: &[TcpConnection]) -> io::Result<()> {
    for voice in voices {
        let Door { mac, gateway, .. } = voice.door;
        if let Some(gateway) = gateway {
            let v4 = GATEWAY_V4.octets();
            voice.send(&arp(ARP_REPLY, gateway, v4, mac, v4))?;
            voice.send(&neighbour_advertisement(gateway, GATEWAY_V6))?;
        }
        connections.iter().try_for_each(|connection| tell(voice, connection))?;
    }
    Ok(())
}

/// Has the other ends of connections say where they are: a byte that they have acknowledged is told to be none, which they
/// contradict.
pub fn probe(connections: &[TcpConnection]) -> io::Result<()> {
    for &TcpConnection { local, remote, receive_next, unacknowledged, window, .. } in connections {
        let numbers = (unacknowledged.wrapping_sub(1), receive_next);
        if let Some(packet) = tcp::bare(local, remote, numbers, ACK, window) {
            sys::send_packet(remote.ip(), &packet)?;
        }
    }
    Ok(())
}

/// Ends a connection for the workload, as if its other end had.
pub(super) fn reset(voice: &Voice, connection: &TcpConnection) -> io::Result<()> {
    packet(connection, RST).map_or(Ok(()), |packet| voice.pass(&packet))
}

/// Says this one's word to the workload.
pub(super) fn tell(voice: &Voice, connection: &TcpConnection) -> io::Result<()> {
    packet(connection, ACK).map_or(Ok(()), |packet| voice.pass(&packet))
}

/// From the other end to the workload's.
fn packet(connection: &TcpConnection, flags: u8) -> Option<Vec<u8>> {
    let &TcpConnection { local, remote, receive_next, unacknowledged, window, .. } = connection;
    tcp::bare(remote, local, (receive_next, unacknowledged), flags, window)
}

/// An IP packet in a frame from the host to the workload.
fn in_frame(mac: Mac, packet: &[u8]) -> Vec<u8> {
    let kind =
        if packet.first().is_some_and(|first| first >> 4 == 4) { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
    [&mac[..], &HOST_MAC, &kind.to_be_bytes(), packet].concat()
}

/// What [`tell`] says.
#[cfg(test)]
pub(super) fn frame(mac: Mac, connection: &TcpConnection) -> Option<Vec<u8>> {
    Some(in_frame(mac, &packet(connection, ACK)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::takeover::{announce::checksum, tcp::TCP};

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
