//! One queue of the kernel (`nfnetlink_queue`) in which packets wait for our verdict.
//!
//! A queue is its owner's socket: when that is closed, the kernel drops what waits, and what comes later, because the rules
//! that lead here have no bypass.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use nix::errno::Errno;

use crate::takeover::netfilter::{Batch, Messages, Socket};

/// Packets that may wait; more are dropped, and counted. With segmentation offload one holds up to 64 KiB. Far more than those at
/// which a workload is stopped, since that takes its time on a busy host.
const PACKETS_MAX: u32 = 65_536;
/// For the kernel's messages about as many packets.
const RECEIVE_BYTES: usize = 128 << 20;
/// Of each packet the kernel copies so much: it is only counted.
const COPY_BYTES: u32 = 20;

const SUBSYSTEM: u16 = 3 << 8;
const PACKET: u16 = SUBSYSTEM;
const CONFIG: u16 = SUBSYSTEM | 2;
const VERDICT_BATCH: u16 = SUBSYSTEM | 3;
const ACCEPT: u32 = 1;

mod attribute {
    pub(super) const CFG_COMMAND: u16 = 1;
    pub(super) const CFG_PARAMS: u16 = 2;
    pub(super) const CFG_PACKETS_MAX: u16 = 3;
    pub(super) const CFG_MASK: u16 = 4;
    pub(super) const CFG_FLAGS: u16 = 5;
    pub(super) const PACKET_HEADER: u16 = 1;
    pub(super) const VERDICT_HEADER: u16 = 2;
    pub(super) const PAYLOAD: u16 = 10;
    pub(super) const LENGTH: u16 = 13;
}

/// A packet's number in its queue; they grow, and wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PacketId(u32);

impl PacketId {
    pub(super) fn is_behind(self, other: Self) -> bool {
        (self.0.wrapping_sub(other.0) as i32) > 0
    }
}

/// A queue and what is known to wait in it.
#[derive(Debug)]
pub(super) struct Queue {
    socket: Socket,
    number: u16,
    waiting: VecDeque<(PacketId, u32)>,
    bytes: u64,
    buffer: Vec<u8>,
}

impl Queue {
    /// Takes the first queue from `first` on that nobody has.
    pub(super) fn bind(first: u16) -> nix::Result<Self> {
        let mut number = first;
        loop {
            // A socket that was refused is not used again.
            let socket = Socket::open()?;
            match configure(&socket, number)? {
                Ok(()) => {
                    let (waiting, buffer) = (VecDeque::new(), vec![0; 1 << 16]);
                    return Ok(Self { socket, number, waiting, bytes: 0, buffer });
                }
                // Somebody else's.
                Err((_, Errno::EBUSY | Errno::EPERM)) if number < first.saturating_add(1000) => number += 1,
                Err((_, errno)) => return Err(errno),
            }
        }
    }

    pub(super) fn number(&self) -> u16 {
        self.number
    }

    /// Packets and bytes that wait, as last looked.
    pub(super) fn waiting(&self) -> (u64, u64) {
        (self.waiting.len() as u64, self.bytes)
    }

    /// Looks what has come; the newest packet that waits.
    pub(super) fn look(&mut self) -> nix::Result<Option<PacketId>> {
        loop {
            match self.socket.receive(&mut self.buffer) {
                Ok(Some(length)) => {
                    for message in Messages(&self.buffer[..length]).filter(|message| message.kind == PACKET) {
                        let Some((id, bytes)) = packet(&message.attributes().collect::<Vec<_>>()) else {
                            continue;
                        };
                        self.waiting.push_back((id, bytes));
                        self.bytes += u64::from(bytes);
                    }
                }
                // Messages were lost; their packets were dropped with them, and the kernel counts those.
                Err(Errno::ENOBUFS) => {}
                Ok(None) => return Ok(self.waiting.back().map(|(id, _)| *id)),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Lets all packets pass up to this one, in their order.
    pub(super) fn release(&mut self, through: PacketId) -> nix::Result<()> {
        let mut batch = Batch::default();
        batch.add(VERDICT_BATCH, 0, (0, self.number), |attributes| {
            let verdict = [ACCEPT.to_be_bytes(), through.0.to_be_bytes()].concat();
            attributes.bytes(attribute::VERDICT_HEADER, &verdict);
        });
        self.send(&batch)?;
        while let Some(&(id, bytes)) = self.waiting.front() {
            if id.is_behind(through) {
                break;
            }
            self.waiting.pop_front();
            self.bytes -= u64::from(bytes);
        }
        Ok(())
    }

    /// That none of them waits any more, as after a link was set down, is no error; [`Self::look`] passes that answer over.
    fn send(&self, batch: &Batch) -> nix::Result<()> {
        loop {
            match self.socket.send(batch) {
                Err(Errno::EINTR) => {}
                other => return other,
            }
        }
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn configure(socket: &Socket, number: u16) -> nix::Result<Result<(), (u32, Errno)>> {
    const BIND: u8 = 1;
    const COPY_PACKET: u8 = 2;
    const SEGMENTS_TOGETHER: u32 = 4;
    socket.widen(RECEIVE_BYTES)?;
    let mut bind = Batch::default();
    bind.add(CONFIG, libc::NLM_F_ACK, (0, number), |attributes| {
        attributes.bytes(attribute::CFG_COMMAND, &[BIND, 0, 0, 0]);
    });
    if let Err(refused) = socket.ask(&bind)? {
        return Ok(Err(refused));
    }
    let mut rest = Batch::default();
    rest.add(CONFIG, libc::NLM_F_ACK, (0, number), |attributes| {
        let mut params = COPY_BYTES.to_be_bytes().to_vec();
        params.push(COPY_PACKET);
        attributes.bytes(attribute::CFG_PARAMS, &params);
        attributes.number(attribute::CFG_PACKETS_MAX, PACKETS_MAX);
        attributes.number(attribute::CFG_MASK, SEGMENTS_TOGETHER);
        attributes.number(attribute::CFG_FLAGS, SEGMENTS_TOGETHER);
    });
    socket.ask(&rest)
}

/// Number and length of a packet.
fn packet(attributes: &[(u16, &[u8])]) -> Option<(PacketId, u32)> {
    let find = |kind: u16| attributes.iter().find(|(found, _)| *found == kind).map(|(_, value)| *value);
    let id = u32::from_be_bytes(find(attribute::PACKET_HEADER)?.get(..4)?.try_into().ok()?);
    // The length is told only of what was not copied whole.
    let told = find(attribute::LENGTH).and_then(|value| Some(u32::from_be_bytes(value.try_into().ok()?)));
    let bytes = told.or_else(|| Some(find(attribute::PAYLOAD)?.len() as u32)).unwrap_or(0);
    Some((PacketId(id), bytes))
}

/// What the kernel says of a queue; nobody waits for its reader or its owner for that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// Packets that wait.
    pub(super) waiting: u64,
    /// Packets that were dropped because it was full, or its owner did not read.
    pub(super) dropped: u64,
}

/// What it says of these queues, together.
pub(super) fn told(numbers: &[u16]) -> io::Result<Told> {
    let text = std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue")?;
    let all = numbers.iter().map(|number| told_in(&text, *number));
    Ok(all.fold(Told::default(), |sum, one| Told {
        waiting: sum.waiting + one.waiting,
        dropped: sum.dropped + one.dropped,
    }))
}

/// Fields: number, owner, waiting, copy mode, copied, dropped (full), dropped (not read), sequence, 1.
fn told_in(text: &str, number: u16) -> Told {
    let lines = text.lines().map(|line| line.split_ascii_whitespace().map(str::parse).collect::<Vec<_>>());
    let of = |fields: &Vec<Result<u64, _>>| match fields.as_slice() {
        [Ok(found), _, Ok(waiting), _, _, Ok(full), Ok(unread), ..] if *found == u64::from(number) => {
            Some(Told { waiting: *waiting, dropped: full + unread })
        }
        _ => None,
    };
    lines.map(|fields| of(&fields)).find_map(|found| found).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_wrap() {
        assert!(PacketId(1).is_behind(PacketId(u32::MAX)));
        assert!(!PacketId(u32::MAX).is_behind(PacketId(1)));
        assert!(!PacketId(5).is_behind(PacketId(5)));
    }

    #[test]
    fn what_the_kernel_tells_is_of_that_queue() {
        let text = "    7  12345     3 2    20     4     5       12  1\n    8  1 0 2 20 0 9 3 1\n";
        assert_eq!(told_in(text, 7), Told { waiting: 3, dropped: 9 });
        assert_eq!(told_in(text, 8), Told { waiting: 0, dropped: 9 });
        assert_eq!(told_in(text, 9), Told::default());
        assert_eq!(told_in("nonsense", 9), Told::default());
    }
}
