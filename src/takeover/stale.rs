//! Connections whose other end knows more than the restored workload: it has had bytes that the epoch has not sent yet. They
//! cannot go on, and by themselves would hang: the kernel drops what acknowledges bytes that were never sent. They are reset, at
//! both ends, as soon as their other end says the first word.
//!
//! That word is its answer to a probe, or what it sends anyway. What the workload sends meanwhile is heard too, so that what is
//! acknowledged of that is told from what it never sent here; where not all of it was heard, none is reset. Where output was held
//! from the epoch's freeze on, there are none such, and it is not listened for.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use super::{nudge, sys};
use crate::{criu::images::connections::TcpConnection, workload::network::Door};

/// For so long it is listened for first words; what says none is idle, and is told with its first one by the workload's kernel.
const PATIENCE: Duration = Duration::from_secs(60);
const ALL_PROTOCOLS: u16 = 0x0003;
const ETHERNET: usize = 14;
/// All headers fit, with their options.
const HEADERS_BYTES: usize = 256;

/// What a segment says of its stream.
#[derive(Debug, PartialEq, Eq)]
struct Segment {
    from: SocketAddr,
    to: SocketAddr,
    /// The byte behind its last one.
    end: u32,
    acknowledged: u32,
}

/// Hears what passes one of the workload's devices.
struct Ear {
    door: Door,
    socket: std::os::fd::OwnedFd,
}

/// Waits for the first words of connections; made before the gate opens, so that none is missed.
pub struct Watch {
    ears: Vec<Ear>,
    awaited: HashMap<(SocketAddr, SocketAddr), TcpConnection>,
}

impl Watch {
    /// Begins to listen. `None`: there is nothing to hear.
    pub fn begin(doors: &[Door], connections: &[TcpConnection]) -> io::Result<Option<Self>> {
        if doors.is_empty() || connections.is_empty() {
            return Ok(None);
        }
        let ear =
            |door: &Door| Ok(Ear { door: *door, socket: sys::packet_socket(door.index, ALL_PROTOCOLS)? });
        let ears = doors.iter().map(ear).collect::<io::Result<Vec<_>>>()?;
        let key = |connection: &TcpConnection| (connection.remote, connection.local);
        let awaited = connections.iter().map(|connection| (key(connection), connection.clone())).collect();
        Ok(Some(Self { ears, awaited }))
    }

    /// Listens until all have said one, or for a minute; blocks. Returns how many connections were reset.
    pub fn run(mut self) -> io::Result<usize> {
        let until = Instant::now() + PATIENCE;
        let (mut buffer, mut reset) = ([0; HEADERS_BYTES], 0);
        while !self.awaited.is_empty() && Instant::now() < until {
            for at in 0..self.ears.len() {
                let wait = Duration::from_millis(if self.ears.len() == 1 { 200 } else { 20 });
                let ear = &self.ears[at];
                let length = match sys::receive_frame(&ear.socket, &mut buffer, wait) {
                    // Told once: the gate was still closed when it began to listen.
                    Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => continue,
                    received => received?,
                };
                let Some(segment) = length.and_then(|length| segment(&buffer[..length.min(HEADERS_BYTES)]))
                else {
                    continue;
                };
                if let Some(connection) = self.awaited.get_mut(&(segment.to, segment.from)) {
                    connection.sent = later(connection.sent, segment.end);
                    continue;
                }
                let Some(mut connection) = self.awaited.remove(&(segment.from, segment.to)) else { continue };
                if later(connection.sent, segment.acknowledged) == connection.sent {
                    continue;
                }
                if sys::lost_frames(&ear.socket)? > 0 {
                    // What the workload has sent is not known any more, of this and of all others.
                    return Err(io::Error::other("there was more traffic than could be followed"));
                }
                // The workload's end first; then that word again, which no connection takes: its kernel says so.
                nudge::reset(&ear.door, &ear.socket, &connection)?;
                connection.unacknowledged = segment.acknowledged;
                nudge::tell(&ear.door, &ear.socket, &connection)?;
                reset += 1;
            }
        }
        Ok(reset)
    }
}

/// The later of two places in a stream, whose numbers wrap.
fn later(one: u32, other: u32) -> u32 {
    if (other.wrapping_sub(one) as i32) > 0 { other } else { one }
}

/// What the frame says, if it is of TCP, acknowledges something, and is not one of ours.
fn segment(frame: &[u8]) -> Option<Segment> {
    const TCP: u8 = 6;
    if frame.get(6..12)? == nudge::HOST_MAC {
        return None;
    }
    let packet = frame.get(ETHERNET..)?;
    let half = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    // The header's length, and that of what is behind it.
    let (from, to, header, bytes): (IpAddr, IpAddr, _, _) =
        match (frame.get(12..ETHERNET)?, packet.first()? >> 4) {
            ([0x08, 0x00], 4) if packet.get(9) == Some(&TCP) => {
                let header = usize::from(packet[0] & 15) * 4;
                let address =
                    |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
                (address(12)?.into(), address(16)?.into(), header, usize::from(half(2)?).checked_sub(header)?)
            }
            ([0x86, 0xdd], 6) if packet.get(6) == Some(&TCP) => {
                let address =
                    |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
                (address(8)?.into(), address(24)?.into(), 40, usize::from(half(4)?))
            }
            _ => return None,
        };
    let tcp = packet.get(header..header + 20)?;
    let word = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
    let port = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
    let data = bytes.saturating_sub(usize::from(tcp[12] >> 4) * 4) as u32;
    let (ends, acknowledges) = (u32::from(tcp[13] & 1), tcp[13] & 0x10 != 0);
    acknowledges.then_some(Segment {
        from: SocketAddr::new(from, port(0)),
        to: SocketAddr::new(to, port(2)),
        end: word(4).wrapping_add(data + ends),
        acknowledged: word(8),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(local: &str, remote: &str, sent: u32) -> TcpConnection {
        TcpConnection {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
            receive_next: 77,
            unacknowledged: 5,
            sent,
            window: 500,
        }
    }

    #[test]
    fn segments_are_read_from_frames() {
        for (local, remote) in [("10.0.0.5:6379", "10.0.0.9:40000"), ("[fd00::5]:1", "[fd00::9]:2")] {
            let connection = connection(local, remote, 9);
            let mut frame = nudge::frame([2; 6], &connection).unwrap();
            assert_eq!(segment(&frame), None, "that is what we say");
            frame[6] = 6;
            let wanted = Segment { from: connection.remote, to: connection.local, end: 77, acknowledged: 5 };
            assert_eq!(segment(&frame), Some(wanted));
            for length in 0..frame.len() {
                assert_eq!(segment(&frame[..length]), None, "{length}");
            }
            // Ten bytes, of which a part was heard.
            let length = if frame[12] == 8 { 16 } else { 18 };
            frame[length + 1] += 10;
            assert_eq!(segment(&frame).unwrap().end, 87);
        }
        assert_eq!(segment(&[0xff; 60]), None);
    }

    #[test]
    fn places_in_a_stream_wrap() {
        assert_eq!(later(100, 101), 101);
        assert_eq!(later(101, 100), 101);
        assert_eq!(later(u32::MAX, 3), 3);
        assert_eq!(later(3, u32::MAX), 3);
    }
}
