//! Messages to nfnetlink (`nf_tables` and `nfnetlink_queue`), made by hand: an `nft` process takes milliseconds, and neither it
//! nor `iptables` can do all of this on every kernel.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::{
    errno::Errno,
    sys::socket::{
        self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, setsockopt, sockopt,
    },
};

/// `struct nlmsghdr` and `struct nfgenmsg`.
const HEADER: usize = 16;
const GENERIC: usize = 4;
/// Of an attribute's type: it holds attributes.
const NESTED: u16 = libc::NLA_F_NESTED as u16;

/// Messages, one behind the other.
#[derive(Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    count: u32,
}

/// The attributes of a message, or those in one of them.
pub(super) struct Attributes<'a>(&'a mut Vec<u8>);

impl Batch {
    /// `family` and `resource` are those of `struct nfgenmsg`.
    pub(super) fn add(
        &mut self,
        kind: u16,
        flags: i32,
        (family, resource): (u8, u16),
        fill: impl FnOnce(&mut Attributes<'_>),
    ) {
        self.count += 1;
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&((flags | libc::NLM_F_REQUEST) as u16).to_ne_bytes());
        self.bytes.extend_from_slice(&self.count.to_ne_bytes());
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        fill(&mut Attributes(&mut self.bytes));
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }
}

impl Attributes<'_> {
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.0.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// With the zero behind it.
    pub(super) fn text(&mut self, kind: u16, value: &str) {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat());
    }

    /// In network order, as all numbers of nfnetlink are.
    pub(super) fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        fill(&mut Attributes(self.0));
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }
}

/// A socket to nfnetlink, of the network namespace in which it was opened.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    pub(super) fn open() -> nix::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkNetFilter;
        let fd = socket::socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        socket::bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { fd })
    }

    /// For so many bytes of messages that wait to be read, whatever the system's limit.
    pub(super) fn widen(&self, bytes: usize) -> nix::Result<()> {
        setsockopt(&self.fd, sockopt::RcvBufForce, &bytes)
    }

    pub(super) fn send(&self, batch: &Batch) -> nix::Result<()> {
        let kernel = NetlinkAddr::new(0, 0);
        socket::sendto(self.fd.as_raw_fd(), &batch.bytes, &kernel, MsgFlags::empty()).map(drop)
    }

    /// What waits; `None` if nothing does.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> nix::Result<Option<usize>> {
        loop {
            match socket::recv(self.fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => return Ok(Some(length)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Sends, and reads the answers, which are there when `send` returns: the first refusal, and of which message it is.
    /// At least one of the messages asks for an acknowledgement.
    pub(super) fn ask(&self, batch: &Batch) -> nix::Result<Result<(), (u32, Errno)>> {
        self.send(batch)?;
        let (mut buffer, mut answered, mut first) = ([0; 8192], false, Ok(()));
        while let Some(length) = self.receive(&mut buffer)? {
            for message in Messages(&buffer[..length]) {
                if i32::from(message.kind) != libc::NLMSG_ERROR {
                    continue;
                }
                answered = true;
                let code = message.body.get(..4).and_then(|code| code.try_into().ok());
                let errno = -code.map_or(-libc::EBADMSG, i32::from_ne_bytes);
                if errno != 0 && first.is_ok() {
                    first = Err((message.sequence, Errno::from_raw(errno)));
                }
            }
        }
        if answered { Ok(first) } else { Err(Errno::ENOMSG) }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A message as it was received.
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    sequence: u32,
    /// Behind `struct nlmsghdr`.
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// Its attributes: their types without flags, and what they hold.
    pub(super) fn attributes(&self) -> AttributesOf<'a> {
        AttributesOf(self.body.get(GENERIC..).unwrap_or_default())
    }
}

/// The messages in what was received.
pub(super) struct Messages<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let word = |at: usize| Some(u32::from_ne_bytes(self.0.get(at..at + 4)?.try_into().ok()?));
        let (length, kind, sequence) = (word(0)? as usize, word(4)? as u16, word(8)?);
        let body = self.0.get(HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, sequence, body })
    }
}

/// See [`Message::attributes`].
pub(super) struct AttributesOf<'a>(&'a [u8]);

impl<'a> Iterator for AttributesOf<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<(u16, &'a [u8])> {
        let half = |at: usize| Some(u16::from_ne_bytes(self.0.get(at..at + 2)?.try_into().ok()?));
        let (length, kind) = (usize::from(half(0)?), half(2)?);
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !NESTED, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let mut batch = Batch::default();
        batch.add(0x0a03, libc::NLM_F_ACK, (2, 7), |attributes| {
            attributes.text(1, "abc");
            attributes.nest(4, |inner| inner.number(2, 9));
        });
        batch.add(0x0a06, 0, (0, 0), |_| {});
        let kinds: Vec<_> = Messages(&batch.bytes).map(|message| (message.kind, message.sequence)).collect();
        assert_eq!(kinds, [(0x0a03, 1), (0x0a06, 2)]);
        let first = Messages(&batch.bytes).next().unwrap();
        let attributes: Vec<_> = first.attributes().collect();
        assert_eq!(attributes[0], (1, &b"abc\0"[..]));
        assert_eq!(AttributesOf(attributes[1].1).collect::<Vec<_>>(), [(2, &9u32.to_be_bytes()[..])]);
    }

    #[test]
    fn a_lie_about_a_length_ends_the_reading() {
        let mut batch = Batch::default();
        batch.add(1, 0, (0, 0), |attributes| attributes.number(1, 1));
        let mut bytes = batch.bytes;
        bytes[0] = 200;
        assert_eq!(Messages(&bytes).count(), 0);
        bytes[0] = 3;
        assert_eq!(Messages(&bytes).count(), 0);
        assert_eq!(AttributesOf(&[3, 0, 1, 0]).count(), 0);
        assert_eq!(AttributesOf(&[9, 0, 1, 0, 0]).count(), 0);
    }
}
