//! Gratuitous ARP and unsolicited neighbour advertisements: "this address is at this hardware address now".
//!
//! An ARP announcement is sent as a request and as a reply, because some neighbours heed only one of them.

use std::{io, net::IpAddr, net::Ipv6Addr, os::fd::OwnedFd, time::Duration};

use super::{sys, tcp::ETHERTYPE_IPV6};
use crate::workload::spec::Vip;

/// Times after the takeover at which to announce: the first ones may be lost while a switch learns.
pub const SCHEDULE: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(8),
    Duration::from_secs(20),
];

/// So often after that, where a switch would forget: sooner than the five minutes that most keep what they have heard.
pub const REFRESH: Duration = Duration::from_secs(60);

/// When an address is to be announced for the so-and-so-many-eth time; never more often than in the schedule, unless `for_ever`.
pub fn due(round: usize, for_ever: bool) -> Option<Duration> {
    let last = SCHEDULE[SCHEDULE.len() - 1];
    let later = |rounds: usize| last + REFRESH * u32::try_from(rounds).unwrap_or(u32::MAX);
    SCHEDULE.get(round).copied().or_else(|| for_ever.then(|| later(round + 1 - SCHEDULE.len())))
}

pub(super) type Mac = [u8; 6];
pub(super) const BROADCAST: Mac = [0xff; 6];
const ALL_NODES: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ETHERTYPE_ARP: u16 = 0x0806;
/// Next header, and types of its messages (RFC 4861 4.3, 4.4).
const ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
pub(super) const ARP_REQUEST: u16 = 1;
pub(super) const ARP_REPLY: u16 = 2;

/// The announcements of one address, ready to be sent.
#[derive(Debug)]
pub(super) struct Announcer {
    device: String,
    index: u32,
    socket: OwnedFd,
    frames: Vec<Vec<u8>>,
}

impl Announcer {
    /// A device without hardware addresses (a tunnel, loopback) needs no announcements and gets none.
    pub(super) fn open(vip: &Vip, index: u32) -> io::Result<Self> {
        // Protocol 0: it receives nothing.
        let socket = sys::packet_socket(index, 0)?;
        let frames = match (sys::ethernet_address(&socket)?, vip.cidr.addr) {
            (None, _) => Vec::new(),
            (Some(mac), IpAddr::V4(v4)) => [ARP_REQUEST, ARP_REPLY]
                .into_iter()
                .map(|operation| arp(operation, mac, v4.octets(), BROADCAST, v4.octets()))
                .collect(),
            (Some(mac), IpAddr::V6(v6)) => vec![neighbour_advertisement(mac, v6)],
        };
        Ok(Self { device: vip.device.clone(), index, socket, frames })
    }

    pub(super) fn device(&self) -> &str {
        &self.device
    }

    pub(super) fn send(&self) -> io::Result<()> {
        self.frames.iter().try_for_each(|frame| sys::send_frame(&self.socket, self.index, frame))
    }
}

/// An Ethernet frame with an ARP packet, to everybody.
pub(super) fn arp(operation: u16, mac: Mac, sender: [u8; 4], target_mac: Mac, target: [u8; 4]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend_from_slice(&BROADCAST);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ETHERTYPE_ARP.to_be_bytes());
    // Ethernet, IPv4, and the lengths of their addresses.
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&sender);
    frame.extend_from_slice(&target_mac);
    frame.extend_from_slice(&target);
    frame
}

/// An Ethernet frame with an unsolicited neighbour advertisement (RFC 4861 4.4), to all nodes.
pub(super) fn neighbour_advertisement(mac: Mac, addr: Ipv6Addr) -> Vec<u8> {
    const OVERRIDE: u8 = 0x20;
    let all_nodes: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut icmp = vec![ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    icmp.extend_from_slice(&addr.octets());
    // Option: target link-layer address, one unit of 8 bytes.
    icmp.extend_from_slice(&[2, 1]);
    icmp.extend_from_slice(&mac);
    icmpv6((ALL_NODES, mac), (addr, all_nodes), icmp)
}

/// The group that whoever has an address listens to (RFC 4291 2.7.1), and its hardware address.
pub(super) fn solicited_node(addr: Ipv6Addr) -> (Ipv6Addr, Mac) {
    let [.., a, b, c] = addr.octets();
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from(b) << 8 | u16::from(c));
    (group, [0x33, 0x33, 0xff, a, b, c])
}

/// An Ethernet frame that asks whether somebody has an address (RFC 4862 5.4.2): from nobody, so that no table changes, and
/// without the asker's hardware address.
pub(super) fn neighbour_probe(mac: Mac, addr: Ipv6Addr) -> Vec<u8> {
    let (group, group_mac) = solicited_node(addr);
    let mut icmp = vec![SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend_from_slice(&addr.octets());
    icmpv6((group_mac, mac), (Ipv6Addr::UNSPECIFIED, group), icmp)
}

/// Who has an address, or is about to take it, if the frame says so (RFC 4862 5.4.3 and 5.4.4).
pub(super) fn neighbour_claim(frame: &[u8], wanted: Ipv6Addr) -> Option<Mac> {
    let sender: Mac = frame.get(6..12)?.try_into().ok()?;
    let is_ipv6 = frame.get(12..14)? == ETHERTYPE_IPV6.to_be_bytes();
    // Next header and hop limit: a router would have lowered the latter.
    if !is_ipv6 || frame.get(20..22)? != [ICMPV6, 255] || frame.get(62..78)? != wanted.octets() {
        return None;
    }
    match frame[54] {
        ADVERTISEMENT => {
            let option = frame.get(78..86).filter(|option| option[..2] == [2, 1]);
            Some(option.and_then(|option| option[2..].try_into().ok()).unwrap_or(sender))
        }
        SOLICITATION if frame[22..38] == Ipv6Addr::UNSPECIFIED.octets() => Some(sender),
        _ => None,
    }
}

/// An Ethernet frame with an ICMPv6 message, whose checksum is filled in.
fn icmpv6((to_mac, from_mac): (Mac, Mac), (from, to): (Ipv6Addr, Ipv6Addr), mut icmp: Vec<u8>) -> Vec<u8> {
    let mut pseudo = [from.octets(), to.octets()].concat();
    pseudo.extend_from_slice(&(icmp.len() as u32).to_be_bytes());
    pseudo.extend_from_slice(&[0, 0, 0, ICMPV6]);
    pseudo.extend_from_slice(&icmp);
    icmp[2..4].copy_from_slice(&checksum(&pseudo).to_be_bytes());

    let mut frame = Vec::with_capacity(54 + icmp.len());
    frame.extend_from_slice(&to_mac);
    frame.extend_from_slice(&from_mac);
    frame.extend_from_slice(&ETHERTYPE_IPV6.to_be_bytes());
    frame.extend_from_slice(&[0x60, 0, 0, 0]);
    frame.extend_from_slice(&(icmp.len() as u16).to_be_bytes());
    // Hop limit 255, or it is taken for a forgery from another network.
    frame.extend_from_slice(&[ICMPV6, 255]);
    frame.extend_from_slice(&from.octets());
    frame.extend_from_slice(&to.octets());
    frame.extend_from_slice(&icmp);
    frame
}

/// The Internet checksum (RFC 1071), of less than 128 KiB.
pub(super) fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(word(pair))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// The sender of an ARP packet for this address, if the frame is one.
pub(super) fn arp_sender(frame: &[u8], wanted: [u8; 4]) -> Option<Mac> {
    let is_arp = frame.len() >= 42 && frame[12..14] == ETHERTYPE_ARP.to_be_bytes();
    let speaks_for_it = is_arp && frame[28..32] == wanted;
    speaks_for_it.then(|| frame[22..28].try_into().ok()).flatten()
}

/// The protocol of a socket that hears ARP.
pub(super) const PROTOCOL_ARP: u16 = ETHERTYPE_ARP;
/// The protocol of one that hears IPv6.
pub(super) const PROTOCOL_IPV6: u16 = ETHERTYPE_IPV6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advertisement_with_its_checksum_sums_to_zero() {
        let addr: Ipv6Addr = "fd00::5".parse().unwrap();
        let frame = neighbour_advertisement([2, 0, 0, 0, 0, 9], addr);
        let icmp = &frame[54..];
        let mut pseudo = frame[22..54].to_vec();
        pseudo.extend_from_slice(&(icmp.len() as u32).to_be_bytes());
        pseudo.extend_from_slice(&[0, 0, 0, 58]);
        pseudo.extend_from_slice(icmp);
        assert_eq!(checksum(&pseudo), 0);
        assert_eq!(frame.len(), 14 + 40 + 32);
    }

    #[test]
    fn a_claim_of_an_address_is_told_from_others() {
        let (addr, other): (Ipv6Addr, Ipv6Addr) = ("fd00::5".parse().unwrap(), "fd00::6".parse().unwrap());
        let mac = [2, 0, 0, 0, 0, 9];
        let answer = neighbour_advertisement(mac, addr);
        assert_eq!(neighbour_claim(&answer, addr), Some(mac));
        assert_eq!(neighbour_claim(&answer, other), None);
        assert_eq!(neighbour_claim(&answer[..77], addr), None);
        // Without the option it is the sender's.
        assert_eq!(neighbour_claim(&answer[..78], addr), Some(mac));
        let probe = neighbour_probe(mac, addr);
        assert_eq!(neighbour_claim(&probe, addr), Some(mac));
        assert_eq!(probe[..6], [0x33, 0x33, 0xff, 0, 0, 5]);
        assert_eq!(probe[38..54], "ff02::1:ff00:5".parse::<Ipv6Addr>().unwrap().octets());
        // From somebody: he wants to talk to whoever has it.
        let mut question = probe.clone();
        question[37] = 1;
        assert_eq!(neighbour_claim(&question, addr), None);
        let mut routed = answer;
        routed[21] = 64;
        assert_eq!(neighbour_claim(&routed, addr), None);
    }

    #[test]
    fn an_arp_answer_is_told_from_others() {
        let frame = arp(ARP_REPLY, [2, 0, 0, 0, 0, 9], [10, 0, 0, 5], BROADCAST, [10, 0, 0, 5]);
        assert_eq!(frame.len(), 42);
        assert_eq!(arp_sender(&frame, [10, 0, 0, 5]), Some([2, 0, 0, 0, 0, 9]));
        assert_eq!(arp_sender(&frame, [10, 0, 0, 6]), None);
        assert_eq!(arp_sender(&frame[..41], [10, 0, 0, 5]), None);
    }
}
