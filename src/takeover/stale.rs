//! Connections whose other end knows more than the restored workload. They cannot go on, and by themselves would hang:
//!
//! - It has had bytes that the epoch has not sent yet, and what acknowledges those the kernel drops. Such a connection is reset,
//!   at both ends, with the first word of its other end.
//! - It was told that bytes had come which the epoch does not have. It will not send those again, but that cannot be told at
//!   once from bytes that were lost on the way, which it will: it has some seconds for that.
//!
//! The first word is what the other end sends anyway, or its answer to a [`probe`](super::nudge::probe). What the workload sends
//! meanwhile is heard too, so that what is acknowledged of that is told from what it never sent here; where not all of it was
//! heard, none is reset. Where output was held from the epoch's freeze on, there are none such, and it is not listened for.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{
    nudge::{self, Voice},
    sys,
    tcp::{self, ACK, Segment},
};
use crate::{criu::images::connections::TcpConnection, workload::network::Door};

/// For so long it is listened for first words.
const PATIENCE: Duration = Duration::from_secs(60);
/// So long may a client take to send again what it was not told had come: more than its kernel waits after a takeover.
const GAP_PATIENCE: Duration = Duration::from_secs(5);
/// All headers fit, with their options.
const HEADERS_BYTES: usize = 256;

/// Waits for the first words of connections; made before the gate opens, so that none is missed.
pub struct Watch {
    /// Each hears what passes one of the workload's devices.
    ears: Vec<Voice>,
    awaited: HashMap<(SocketAddr, SocketAddr), Awaited>,
}

/// A connection whose other end has not said a word yet, or has left a gap before it.
struct Awaited {
    connection: TcpConnection,
    gap: Option<Gap>,
}

/// Bytes are missing.
#[derive(Clone, Copy)]
struct Gap {
    since: Instant,
    /// Which ear heard of it.
    ear: usize,
    acknowledged: u32,
}

/// What a word tells of a connection.
#[derive(Debug, PartialEq, Eq)]
enum Finding {
    GoesOn,
    KnowsMore,
    Lacks,
}

/// Of the first word from the other end, or a later one.
fn judge(connection: &TcpConnection, word: &Segment) -> Finding {
    if later(connection.sent, word.acknowledged) != connection.sent {
        Finding::KnowsMore
    } else if later(connection.receive_next, word.sequence) == connection.receive_next {
        Finding::GoesOn
    } else {
        Finding::Lacks
    }
}

impl Watch {
    /// Begins to listen. `None`: there is nothing to hear.
    pub fn begin(doors: &[Door], connections: &[TcpConnection]) -> io::Result<Option<Self>> {
        if doors.is_empty() || connections.is_empty() {
            return Ok(None);
        }
        let ears =
            doors.iter().map(|door| Voice::hearing(door, sys::ALL_PROTOCOLS)).collect::<io::Result<_>>()?;
        let awaited = connections.iter().map(|connection| {
            let key = (connection.remote, connection.local);
            (key, Awaited { connection: connection.clone(), gap: None })
        });
        Ok(Some(Self { ears, awaited: awaited.collect() }))
    }

    /// Listens until all have said one, or for a minute; blocks. Returns how many connections were reset.
    pub fn run(mut self) -> io::Result<usize> {
        let until = Instant::now() + PATIENCE;
        let (mut buffer, mut reset) = ([0; HEADERS_BYTES], 0);
        while !self.awaited.is_empty() && Instant::now() < until {
            for at in 0..self.ears.len() {
                let wait = Duration::from_millis(if self.ears.len() == 1 { 200 } else { 20 });
                let length = match sys::receive_frame(self.ears[at].socket(), &mut buffer, wait) {
                    // Told once: the gate was still closed when it began to listen.
                    Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => continue,
                    received => received?,
                };
                let heard = length.and_then(|length| segment(&buffer[..length.min(HEADERS_BYTES)]));
                reset += heard.map_or(Ok(0), |heard| self.hear(at, &heard))?;
            }
            reset += self.end_gaps()?;
        }
        Ok(reset)
    }

    /// Takes note of what was said by one of the devices; how many connections it ended.
    fn hear(&mut self, ear: usize, heard: &Segment) -> io::Result<usize> {
        if let Some(Awaited { connection, .. }) = self.awaited.get_mut(&(heard.to, heard.from)) {
            connection.sent = later(connection.sent, heard.end());
            return Ok(0);
        }
        let key = (heard.from, heard.to);
        let Some(awaited) = self.awaited.get_mut(&key) else { return Ok(0) };
        match judge(&awaited.connection, heard) {
            Finding::GoesOn => {
                self.awaited.remove(&key);
                Ok(0)
            }
            Finding::KnowsMore => self.end(key, ear, heard.acknowledged),
            Finding::Lacks => {
                let since = awaited.gap.map_or_else(Instant::now, |gap| gap.since);
                awaited.gap = Some(Gap { since, ear, acknowledged: heard.acknowledged });
                Ok(0)
            }
        }
    }

    /// Ends those whose missing bytes did not come in time.
    fn end_gaps(&mut self) -> io::Result<usize> {
        let overdue = |(key, awaited): (&(SocketAddr, SocketAddr), &Awaited)| {
            let gap = awaited.gap.filter(|gap| gap.since.elapsed() > GAP_PATIENCE)?;
            Some((*key, gap))
        };
        let overdue: Vec<_> = self.awaited.iter().filter_map(overdue).collect();
        overdue.into_iter().map(|(key, gap)| self.end(key, gap.ear, gap.acknowledged)).sum()
    }

    /// Ends a connection at both ends; `acknowledged`: what its other end expects next.
    fn end(&mut self, key: (SocketAddr, SocketAddr), ear: usize, acknowledged: u32) -> io::Result<usize> {
        let Some(Awaited { mut connection, .. }) = self.awaited.remove(&key) else { return Ok(0) };
        let ear = &self.ears[ear];
        if sys::lost_frames(ear.socket())? > 0 {
            // What was sent is not known any more, of this and of all others.
            return Err(io::Error::other("there was more traffic than could be followed"));
        }
        // The workload's end first; then that word again, which no connection takes: its kernel says so.
        nudge::reset(ear, &connection)?;
        connection.unacknowledged = acknowledged;
        nudge::tell(ear, &connection)?;
        Ok(1)
    }
}

/// The later of two places in a stream, whose numbers wrap.
fn later(one: u32, other: u32) -> u32 {
    if (other.wrapping_sub(one) as i32) > 0 { other } else { one }
}

/// What the frame says, if it is of TCP, acknowledges something, and is not one of ours.
fn segment(frame: &[u8]) -> Option<Segment> {
    let segment = Segment::read(tcp::packet(frame)?)?;
    (segment.has(ACK) && frame[6..12] != nudge::HOST_MAC).then_some(segment)
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
            let heard = segment(&frame).unwrap();
            assert_eq!((heard.from, heard.to), (connection.remote, connection.local));
            assert_eq!((heard.end(), heard.acknowledged), (77, 5));
            for length in 0..frame.len() {
                assert_eq!(segment(&frame[..length]), None, "{length}");
            }
            // Ten bytes, of which a part was heard.
            let length = if frame[12] == 8 { 16 } else { 18 };
            frame[length + 1] += 10;
            assert_eq!(segment(&frame).unwrap().end(), 87);
        }
        assert_eq!(segment(&[0xff; 60]), None);
    }

    #[test]
    fn a_word_tells_what_its_connection_lacks() {
        let connection = connection("10.0.0.5:6379", "10.0.0.9:40000", 9);
        let frame = nudge::frame([2; 6], &connection).unwrap();
        let word = |sequence, acknowledged| Segment {
            sequence,
            acknowledged,
            ..Segment::read(tcp::packet(&frame).unwrap()).unwrap()
        };
        assert_eq!(judge(&connection, &word(77, 9)), Finding::GoesOn);
        assert_eq!(judge(&connection, &word(70, 5)), Finding::GoesOn);
        assert_eq!(judge(&connection, &word(77, 10)), Finding::KnowsMore);
        assert_eq!(judge(&connection, &word(80, 10)), Finding::KnowsMore);
        assert_eq!(judge(&connection, &word(78, 9)), Finding::Lacks);
    }

    #[test]
    fn places_in_a_stream_wrap() {
        assert_eq!(later(100, 101), 101);
        assert_eq!(later(101, 100), 101);
        assert_eq!(later(u32::MAX, 3), 3);
        assert_eq!(later(3, u32::MAX), 3);
    }
}
