//! Connections whose other end knows more than the restored workload: it has had bytes that the epoch has not sent yet. They
//! cannot go on, and by themselves would hang: the kernel drops what acknowledges bytes that were never sent. They are reset, at
//! both ends, as soon as their other end says the first word.
//!
//! That word is its answer to the probe that CRIU's restore sends, or what it sends anyway; it comes before anything that it says of
//! what the workload sends from now on. Where output waits for its commit, there are none such.

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

/// A first word of a connection's other end.
#[derive(Debug, PartialEq, Eq)]
struct Word {
    remote: SocketAddr,
    local: SocketAddr,
    acknowledged: u32,
}

/// Hears what goes to the workload by one of its devices.
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
        let (mut buffer, mut reset) = (vec![0; 1 << 16], 0);
        while !self.awaited.is_empty() && Instant::now() < until {
            for at in 0..self.ears.len() {
                let wait = Duration::from_millis(if self.ears.len() == 1 { 200 } else { 20 });
                let ear = &self.ears[at];
                let length = match sys::receive_frame(&ear.socket, &mut buffer, wait) {
                    // Told once: the gate was still closed when it began to listen.
                    Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => continue,
                    received => received?,
                };
                let Some(length) = length else { continue };
                let frame = &buffer[..length];
                let Some(word) = first_word(frame) else { continue };
                let Some(connection) = self.awaited.remove(&(word.remote, word.local)) else { continue };
                if !is_stale(&connection, word.acknowledged) {
                    continue;
                }
                // The workload's end first; then that word again, which no connection takes: its kernel says so.
                nudge::reset(&ear.door, &ear.socket, &connection)?;
                sys::send_frame(&ear.socket, ear.door.index, frame)?;
                reset += 1;
            }
        }
        Ok(reset)
    }
}

/// Whether bytes are acknowledged that were not sent by the freeze. Numbers wrap.
fn is_stale(connection: &TcpConnection, acknowledged: u32) -> bool {
    (acknowledged.wrapping_sub(connection.sent) as i32) > 0
}

/// What the frame says, if it is of TCP and acknowledges something, and is not one of ours.
fn first_word(frame: &[u8]) -> Option<Word> {
    const TCP: u8 = 6;
    if frame.get(6..12)? == nudge::HOST_MAC {
        return None;
    }
    let packet = frame.get(ETHERNET..)?;
    let (from, to, segment): (IpAddr, IpAddr, _) = match (frame.get(12..ETHERNET)?, packet.first()? >> 4) {
        ([0x08, 0x00], 4) if packet.get(9) == Some(&TCP) => {
            let header = usize::from(packet[0] & 15) * 4;
            let address =
                |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
            (address(12)?.into(), address(16)?.into(), packet.get(header..)?)
        }
        ([0x86, 0xdd], 6) if packet.get(6) == Some(&TCP) => {
            let address =
                |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
            (address(8)?.into(), address(24)?.into(), packet.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*segment.get(at)?, *segment.get(at + 1)?]));
    let has_ack = segment.get(13)? & 0x10 != 0;
    let acknowledged = u32::from_be_bytes(segment.get(8..12)?.try_into().ok()?);
    has_ack.then_some(Word {
        remote: SocketAddr::new(from, port(0)?),
        local: SocketAddr::new(to, port(2)?),
        acknowledged,
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
    fn words_are_read_from_frames() {
        for (local, remote) in [("10.0.0.5:6379", "10.0.0.9:40000"), ("[fd00::5]:1", "[fd00::9]:2")] {
            let connection = connection(local, remote, 9);
            let mut frame = nudge::frame([2; 6], &connection).unwrap();
            assert_eq!(first_word(&frame), None, "that is what we say");
            frame[6] = 6;
            let word = Word { remote: connection.remote, local: connection.local, acknowledged: 5 };
            assert_eq!(first_word(&frame), Some(word));
            for length in 0..frame.len() - 7 {
                assert_eq!(first_word(&frame[..length]), None, "{length}");
            }
        }
        assert_eq!(first_word(&[0xff; 60]), None);
    }

    #[test]
    fn what_acknowledges_more_than_was_sent_is_stale() {
        let at = |sent| connection("10.0.0.5:1", "10.0.0.9:2", sent);
        assert!(!is_stale(&at(100), 100));
        assert!(is_stale(&at(100), 101));
        assert!(is_stale(&at(u32::MAX), 3));
        assert!(!is_stale(&at(3), u32::MAX));
    }
}
