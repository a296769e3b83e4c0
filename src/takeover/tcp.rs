//! TCP in IP packets, as far as it is read and made here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::announce::checksum;

pub(super) const ETHERNET: usize = 14;
pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;
pub(super) const TCP: u8 = 6;

pub(super) const FIN: u8 = 0x01;
pub(super) const SYN: u8 = 0x02;
pub(super) const RST: u8 = 0x04;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;

const MORE_FRAGMENTS: usize = 0x2000;
const FRAGMENT_OFFSET: usize = 0x1fff;
/// Of an IPv6 header, and of the shortest of the two others.
const IPV6: usize = 40;
const SHORTEST: usize = 20;
/// Every link lets so long a packet pass (IPv6 demands it).
const PIECE_BYTES: usize = 1280;

/// A segment whose headers were read; of what it carries less may be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) sequence: u32,
    pub(super) acknowledged: u32,
    pub(super) flags: u8,
    /// Where TCP's header is in the packet.
    pub(super) header: usize,
    /// Where what it carries is, and how long that is.
    pub(super) data: (usize, usize),
}

/// The IP packet in an Ethernet frame.
pub(super) fn packet(frame: &[u8]) -> Option<&[u8]> {
    let (kind, packet) = (frame.get(12..ETHERNET)?, frame.get(ETHERNET..)?);
    let version = packet.first()? >> 4;
    let fits = match u16::from_be_bytes([kind[0], kind[1]]) {
        ETHERTYPE_IPV4 => version == 4,
        ETHERTYPE_IPV6 => version == 6,
        _ => false,
    };
    fits.then_some(packet)
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

impl Segment {
    /// The segment in a packet. None in fragments, nor behind an IPv6 header's extensions.
    pub(super) fn read(packet: &[u8]) -> Option<Self> {
        let (from, to, header, length) = match packet.first()? >> 4 {
            4 if packet.get(9) == Some(&TCP) => {
                let header = usize::from(packet[0] & 15) * 4;
                let address =
                    |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
                let is_fragment = half(packet, 6)? & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0;
                let whole = !is_fragment && header >= SHORTEST;
                let length = half(packet, 2)?.checked_sub(header).filter(|_| whole)?;
                (IpAddr::from(address(12)?), IpAddr::from(address(16)?), header, length)
            }
            6 if packet.get(6) == Some(&TCP) => {
                let address =
                    |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
                (IpAddr::from(address(8)?), IpAddr::from(address(24)?), IPV6, half(packet, 4)?)
            }
            _ => return None,
        };
        let tcp = packet.get(header..header + SHORTEST)?;
        let options = usize::from(tcp[12] >> 4) * 4;
        if options < SHORTEST {
            return None;
        }
        let port = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        Some(Self {
            from: SocketAddr::new(from, port(0)),
            to: SocketAddr::new(to, port(2)),
            sequence: word(tcp, 4)?,
            acknowledged: word(tcp, 8)?,
            flags: tcp[13],
            header,
            data: (header + options, length.saturating_sub(options)),
        })
    }

    pub(super) fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// The number behind its last byte; an end of the stream counts as one.
    pub(super) fn end(&self) -> u32 {
        self.sequence.wrapping_add(self.data.1 as u32 + u32::from(self.has(FIN)))
    }
}

/// A segment that carries nothing, without options, in a packet; `numbers`: its own, and the one that it acknowledges. None if the
/// ends are of two families.
pub(super) fn bare(
    from: SocketAddr,
    to: SocketAddr,
    (sequence, acknowledged): (u32, u32),
    flags: u8,
    window: u16,
) -> Option<Vec<u8>> {
    let mut packet = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            // Version 4, five words; may not be fragmented; 64 hops.
            let head = [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, TCP, 0, 0];
            [&head[..], &from.octets(), &to.octets()].concat()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            [&[0x60, 0, 0, 0, 0, 0, TCP, 64], &from.octets()[..], &to.octets()].concat()
        }
        _ => return None,
    };
    let header = packet.len();
    packet.extend(from.port().to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    packet.extend(sequence.to_be_bytes());
    packet.extend(acknowledged.to_be_bytes());
    packet.extend([5 << 4, flags]);
    packet.extend(window.to_be_bytes());
    packet.extend([0; 4]);
    finish(&mut packet, header);
    Some(packet)
}

/// What a packet carries, in packets that any link takes, with their checksums: one that was heard may be longer, and may have
/// none, since both are left to devices. `None` if it was not heard whole.
pub(super) fn pieces(packet: &[u8]) -> Option<Vec<Vec<u8>>> {
    let segment = Segment::read(packet)?;
    let (start, length) = segment.data;
    let headers = packet.get(..start)?;
    // What comes with the first word of a connection is sent again when that is acknowledged.
    let carried = if segment.has(SYN) { &[][..] } else { packet.get(start..start + length)? };
    let room = PIECE_BYTES.saturating_sub(start).max(1);
    let mut chunks: Vec<&[u8]> = carried.chunks(room).collect();
    if chunks.is_empty() {
        chunks.push(&[]);
    }
    let last = chunks.len() - 1;
    let piece = |(at, chunk): (usize, &[u8])| {
        let mut made = [headers, chunk].concat();
        let tcp = segment.header;
        let sequence = segment.sequence.wrapping_add((at * room) as u32);
        made[tcp + 4..tcp + 8].copy_from_slice(&sequence.to_be_bytes());
        if at < last {
            made[tcp + 13] &= !(FIN | PSH);
        }
        finish(&mut made, tcp);
        made
    };
    Some(chunks.into_iter().enumerate().map(piece).collect())
}

/// Sets the lengths and checksums of a packet whose TCP header is at `tcp`.
fn finish(packet: &mut [u8], tcp: usize) {
    let length = (packet.len() - tcp) as u16;
    let pseudo = if packet[0] >> 4 == 4 {
        let total = packet.len() as u16;
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet[10..12].fill(0);
        let sum = checksum(&packet[..tcp]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        [&packet[12..20], &[0, TCP], &length.to_be_bytes()].concat()
    } else {
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        [&packet[8..IPV6], &[0, 0], &length.to_be_bytes(), &[0, 0, 0, TCP]].concat()
    };
    packet[tcp + 16..tcp + 18].fill(0);
    let sum = checksum(&[&pseudo, &packet[tcp..]].concat());
    packet[tcp + 16..tcp + 18].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A packet with a timestamp's worth of options, and checksums that are none.
    pub(in crate::takeover) fn made(from: &str, to: &str, flags: u8, data: &[u8]) -> Vec<u8> {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut tcp = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
        tcp.extend(0xffff_fff0u32.to_be_bytes());
        tcp.extend(77u32.to_be_bytes());
        tcp.extend([8 << 4, flags, 1, 0, 0xaa, 0xaa, 0, 0]);
        tcp.extend([1; 12]);
        tcp.extend(data);
        let length = tcp.len() as u16;
        let header = match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header = vec![0x45, 0];
                header.extend((length + 20).to_be_bytes());
                header.extend([0, 0, 0x40, 0, 64, TCP, 0xbb, 0xbb]);
                header.extend(from.octets());
                header.extend(to.octets());
                header
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut header = vec![0x60, 0, 0, 0];
                header.extend(length.to_be_bytes());
                header.extend([TCP, 64]);
                header.extend(from.octets());
                header.extend(to.octets());
                header
            }
            _ => panic!("of one family"),
        };
        [header, tcp].concat()
    }

    const ENDS: [(&str, &str); 2] = [("10.0.0.9:40000", "10.0.0.5:6379"), ("[fd00::9]:1", "[fd00::5]:2")];

    #[test]
    fn a_segment_is_read_if_its_headers_are_there() {
        for (from, to) in ENDS {
            let packet = made(from, to, ACK | FIN, b"hello");
            let segment = Segment::read(&packet).unwrap();
            assert_eq!((segment.from, segment.to), (from.parse().unwrap(), to.parse().unwrap()));
            assert_eq!((segment.sequence, segment.acknowledged), (0xffff_fff0, 77));
            assert_eq!(segment.end(), 0xffff_fff0u32.wrapping_add(6));
            assert_eq!(packet[segment.data.0..], *b"hello");
            for length in 0..segment.header + 20 {
                assert_eq!(Segment::read(&packet[..length]), None, "{length}");
            }
        }
        let mut fragment = made(ENDS[0].0, ENDS[0].1, ACK, b"hello");
        fragment[7] = 8;
        assert_eq!(Segment::read(&fragment), None);
        assert_eq!(Segment::read(&[0xff; 60]), None);
    }

    #[test]
    fn pieces_carry_what_the_packet_did_and_sum_to_zero() {
        let data: Vec<u8> = (0..5001u32).map(|at| at as u8).collect();
        for (from, to) in ENDS {
            let made = pieces(&made(from, to, ACK | PSH | FIN, &data)).unwrap();
            assert!(made.len() > 3);
            let (mut carried, mut next) = (Vec::<u8>::new(), 0xffff_fff0u32);
            for (at, piece) in made.iter().enumerate() {
                assert!(piece.len() <= PIECE_BYTES);
                let segment = Segment::read(piece).unwrap();
                assert_eq!(segment.sequence, next);
                assert_eq!(segment.has(FIN | PSH), at + 1 == made.len());
                assert_eq!(segment.data.1, piece.len() - segment.data.0);
                carried.extend(&piece[segment.data.0..]);
                next = segment.end();
                let tcp = &piece[segment.header..];
                let length = (tcp.len() as u16).to_be_bytes();
                let pseudo = if piece[0] >> 4 == 4 {
                    assert_eq!(checksum(&piece[..20]), 0);
                    [&piece[12..20], &[0, TCP], &length].concat()
                } else {
                    [&piece[8..40], &[0, 0], &length, &[0, 0, 0, TCP]].concat()
                };
                assert_eq!(checksum(&[&pseudo, tcp].concat()), 0);
            }
            assert_eq!(carried, data);
        }
    }

    #[test]
    fn pieces_are_made_of_whole_packets_only() {
        let packet = made(ENDS[0].0, ENDS[0].1, ACK, b"hello");
        for length in 0..packet.len() {
            assert_eq!(pieces(&packet[..length]), None, "{length}");
        }
        assert_eq!(pieces(&packet).unwrap().len(), 1);
        let first = pieces(&made(ENDS[1].0, ENDS[1].1, SYN, b"early")).unwrap();
        assert_eq!(Segment::read(&first[0]).unwrap().data.1, 0);
    }
}
