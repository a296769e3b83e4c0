//! What is sent to a workload, as the standby keeps it: after a takeover the restored copy is given what came since its epoch,
//! and no client has to send it again, which its kernel would do when a timer ends.
//!
//! ```text
//!   primary: Tap ──► Quota ──► the standby's Log ──takeover──► replay
//! ```
//!
//! None of it is needed: what is missing, or comes twice, TCP knows how to mend. So nothing waits for it, the little that fits is
//! kept, and what the epoch may have already is not told apart from what it has not. Of other protocols nothing is kept, since
//! they do not notice what comes twice. Only where output waits for commits does a client send again what is replayed here:
//! nobody has told it that it came.

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{
    nudge::{self, Voice},
    sys,
    tcp::{self, FIN, RST, SYN, Segment},
};
use crate::{model::EpochId, workload::network::Door};

/// Of one connection between two freezes: what a client sends before it waits for an answer, mostly.
const STREAM_BYTES_MAX: usize = 32 << 10;
/// Of all together.
const EPOCH_BYTES_MAX: usize = 256 << 10;
/// What a standby keeps: of more than one epoch, since several may wait for their commit.
const LOG_BYTES_MAX: usize = 4 << 20;
/// A packet's share of that beside its bytes.
const PACKET_COST: usize = 64;
/// Waits in the kernel until it is read; what does not fit is not kept.
const SOCKET_BYTES: usize = 512 << 10;
const FRAME_BYTES_MAX: usize = tcp::ETHERNET + 0xffff;

/// Hears what is sent to a workload by one of its devices.
pub struct Tap {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Tap {
    /// Begins to listen.
    pub fn open(door: &Door) -> io::Result<Self> {
        let socket = sys::tcp_tap(door.index, SOCKET_BYTES)?;
        Ok(Self { socket, buffer: vec![0; FRAME_BYTES_MAX] })
    }

    /// The next IP packet that came; none if none waits.
    pub fn heard(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            let Some(length) = sys::receive_waiting(&self.socket, &mut self.buffer)? else { return Ok(None) };
            let frame = &self.buffer[..length];
            // What this host says itself it says again.
            let ours = frame.get(6..12) == Some(&nudge::HOST_MAC[..]);
            if !ours && tcp::packet(frame).is_some() {
                return Ok(Some(&self.buffer[tcp::ETHERNET..length]));
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What of it is told to the standby.
#[derive(Debug, Default)]
pub struct Quota {
    after: Option<EpochId>,
    bytes: usize,
    streams: HashMap<(SocketAddr, SocketAddr), usize>,
}

impl Quota {
    /// Whether a packet is kept that came after this epoch's freeze: one of a connection that says more than that something was
    /// received, while there is room.
    pub fn admits(&mut self, after: EpochId, packet: &[u8]) -> bool {
        if self.after != Some(after) {
            *self = Self { after: Some(after), ..Self::default() };
        }
        let Some(segment) = Segment::read(packet) else { return false };
        let cost = packet.len() + PACKET_COST;
        if (segment.data.1 == 0 && !segment.has(SYN | FIN | RST)) || self.bytes + cost > EPOCH_BYTES_MAX {
            return false;
        }
        let stream = self.streams.entry((segment.from, segment.to)).or_default();
        // The first one in any case: the rest follows by itself once its beginning was acknowledged.
        if *stream > 0 && *stream + cost > STREAM_BYTES_MAX {
            return false;
        }
        *stream += cost;
        self.bytes += cost;
        true
    }
}

/// A packet that was sent to a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Which of its devices it came by.
    pub door: u8,
    /// From its IP header on.
    pub packet: Vec<u8>,
}

/// What a standby keeps.
#[derive(Debug, Default)]
pub struct Log {
    packets: VecDeque<(EpochId, Input)>,
    bytes: usize,
}

impl Log {
    /// Keeps a packet that came after this epoch's freeze; the oldest ones go for it.
    pub fn add(&mut self, after: EpochId, input: Input) {
        self.bytes += input.packet.len() + PACKET_COST;
        self.packets.push_back((after, input));
        while self.bytes > LOG_BYTES_MAX {
            self.forget_first();
        }
    }

    /// An epoch is committed: what came before its freeze is in it.
    pub fn committed(&mut self, epoch: EpochId) {
        while self.packets.front().is_some_and(|(after, _)| *after < epoch) {
            self.forget_first();
        }
    }

    fn forget_first(&mut self) {
        if let Some((_, input)) = self.packets.pop_front() {
            self.bytes -= input.packet.len() + PACKET_COST;
        }
    }

    /// What came since this epoch's freeze; nothing stays.
    pub fn take_since(&mut self, epoch: EpochId) -> Vec<Input> {
        let kept = std::mem::take(self).packets;
        kept.into_iter().filter_map(|(after, input)| (after >= epoch).then_some(input)).collect()
    }
}

/// Gives a restored workload what was sent to it, once its gate is open. Returns how many packets that were.
pub fn replay(voices: &[Voice], inputs: &[Input]) -> io::Result<usize> {
    let mut given = 0;
    for input in inputs {
        // This host may have fewer devices for it than the other one had: the first one will do.
        let Some(voice) = voices.get(usize::from(input.door)).or(voices.first()) else { break };
        for piece in tcp::pieces(&input.packet).into_iter().flatten() {
            voice.pass(&piece)?;
        }
        given += 1;
    }
    Ok(given)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Epoch, Term},
        takeover::tcp::{ACK, tests::made},
    };

    fn id(epoch: u64) -> EpochId {
        EpochId { term: Term(1), epoch: Epoch(epoch) }
    }

    fn from(port: u16, flags: u8, bytes: usize) -> Vec<u8> {
        made(&format!("10.0.0.9:{port}"), "10.0.0.5:6379", flags, &vec![7; bytes])
    }

    #[test]
    fn what_says_nothing_is_not_kept() {
        let mut quota = Quota::default();
        assert!(!quota.admits(id(1), &from(1, ACK, 0)));
        for flags in [SYN, ACK | FIN, RST] {
            assert!(quota.admits(id(1), &from(1, flags, 0)));
        }
        assert!(quota.admits(id(1), &from(1, ACK, 1)));
        assert!(!quota.admits(id(1), &[0xff; 80]));
    }

    #[test]
    fn a_stream_leaves_room_for_others_and_each_freeze_begins_anew() {
        let mut quota = Quota::default();
        assert!(quota.admits(id(1), &from(1, ACK, 60_000)), "the first one always");
        assert!(!quota.admits(id(1), &from(1, ACK, 1)));
        let others = (2..1000).filter(|port| quota.admits(id(1), &from(*port, ACK, 10_000))).count();
        assert!((10..=EPOCH_BYTES_MAX / 10_000).contains(&others), "{others}");
        assert!(quota.admits(id(1), &from(1001, ACK, 10)), "there is room for a small one");
        assert!(quota.admits(id(2), &from(1, ACK, 1)));
    }

    #[test]
    fn a_standby_keeps_what_no_committed_epoch_has() {
        let mut log = Log::default();
        let input = |byte: u8| Input { door: 0, packet: vec![byte; 10] };
        for epoch in 1..=5 {
            log.add(id(epoch), input(epoch as u8));
        }
        log.committed(id(3));
        assert_eq!(log.packets.len(), 3, "what came after the freeze of 3 is not in it");
        assert_eq!(log.take_since(id(4)), [input(4), input(5)]);
        assert!(log.take_since(id(1)).is_empty());
        assert_eq!(log.bytes, 0);
    }

    #[test]
    fn a_standby_keeps_so_much_and_no_more() {
        let mut log = Log::default();
        for _ in 0..1000 {
            log.add(id(1), Input { door: 0, packet: vec![0; 0xffff] });
            assert!(log.bytes <= LOG_BYTES_MAX);
        }
        assert!(log.packets.len() > 50);
        log.committed(id(2));
        assert_eq!((log.packets.len(), log.bytes), (0, 0));
    }
}
