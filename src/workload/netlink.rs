//! The few changes of links, addresses, routes and proxy entries that takeover and fencing need, as
//! rtnetlink messages made by hand: an `ip` process costs milliseconds, one of these some tens of microseconds,
//! and the guard must be able to send them when nothing can be executed any more.
//!
//! All steps of a call go to the kernel as one datagram; it works them off in order and answers each one.

use std::{
    net::{IpAddr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType},
};
use serde::{Deserialize, Serialize};

use super::spec::Cidr;

/// The most steps in one call.
pub const STEPS_MAX: usize = 256;

/// One change; devices are named by their index in the network namespace of the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetStep {
    /// Sets the device up.
    LinkUp {
        /// Device.
        index: u32,
    },
    /// Sets the device down. The kernel drops its routes and its IPv6 addresses with it.
    LinkDown {
        /// Device.
        index: u32,
    },
    /// Removes the device.
    DelLink {
        /// Device.
        index: u32,
    },
    /// Routes one address to the device.
    AddRoute {
        /// Device.
        index: u32,
        /// Destination.
        addr: IpAddr,
    },
    /// Adds an address, without duplicate address detection.
    AddAddress {
        /// Device.
        index: u32,
        /// Address.
        cidr: Cidr,
    },
    /// Removes an address.
    DelAddress {
        /// Device.
        index: u32,
        /// Address.
        cidr: Cidr,
    },
    /// Answers ARP or neighbour solicitations for an address that is routed elsewhere.
    AddProxy {
        /// Device.
        index: u32,
        /// Address.
        addr: IpAddr,
    },
    /// Ends that.
    DelProxy {
        /// Device.
        index: u32,
        /// Address.
        addr: IpAddr,
    },
}

impl NetStep {
    /// Whether the kernel's refusal means that there is nothing (more) to do.
    fn is_settled_by(self, errno: Errno) -> bool {
        match self {
            Self::LinkUp { .. } | Self::AddRoute { .. } | Self::AddAddress { .. } | Self::AddProxy { .. } => {
                errno == Errno::EEXIST
            }
            Self::LinkDown { .. }
            | Self::DelLink { .. }
            | Self::DelAddress { .. }
            | Self::DelProxy { .. } => {
                matches!(
                    errno,
                    Errno::ENODEV | Errno::ENOENT | Errno::ESRCH | Errno::EADDRNOTAVAIL | Errno::ENXIO
                )
            }
        }
    }
}

/// Why changes of the network were not made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The socket.
    #[error("cannot talk to the kernel's rtnetlink: {0}; does this process have CAP_NET_ADMIN?")]
    Socket(#[source] Errno),
    /// The kernel refused one step; the others were still tried.
    #[error(
        "the kernel refused the network change {step:?}: {errno}; does the device still exist and is it up?"
    )]
    Refused {
        /// Which.
        step: NetStep,
        /// Its answer.
        errno: Errno,
    },
    /// An answer that is none.
    #[error("rtnetlink gave no answer to {missing} of {asked} network changes")]
    NoAnswer {
        /// Unanswered.
        missing: usize,
        /// Sent.
        asked: usize,
    },
    /// Too much at once.
    #[error("{0} network changes at once; at most {STEPS_MAX} are allowed")]
    TooMany(usize),
}

/// A socket to the network namespace in which it was opened, whatever its user enters later.
#[derive(Debug)]
pub struct RouteSocket {
    fd: OwnedFd,
}

impl RouteSocket {
    /// Opens one in the calling thread's network namespace.
    pub fn open() -> Result<Self, NetError> {
        let fd = socket::socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )
        .map_err(NetError::Socket)?;
        socket::bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(NetError::Socket)?;
        Ok(Self { fd })
    }

    /// Makes the changes in order. Each one is tried even if an earlier one failed; the first failure is
    /// returned. A change that has been made already counts as made.
    pub fn apply(&self, steps: &[NetStep]) -> Result<(), NetError> {
        self.apply_encoded(steps, &encode(steps)?)
    }

    /// [`Self::apply`] with the bytes that [`encode`] gave for the same steps.
    pub(super) fn apply_encoded(&self, steps: &[NetStep], bytes: &[u8]) -> Result<(), NetError> {
        if steps.is_empty() {
            return Ok(());
        }
        let fd = self.fd.as_raw_fd();
        let kernel = NetlinkAddr::new(0, 0);
        socket::sendto(fd, bytes, &kernel, MsgFlags::empty()).map_err(NetError::Socket)?;
        let mut first = Ok(());
        let mut answered = 0;
        let mut buffer = [0u8; 4096];
        while answered < steps.len() {
            // The kernel handles the messages inside sendto: the answers are there, or they never will be.
            let length = match socket::recv(fd, &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => {
                    return Err(NetError::NoAnswer { missing: steps.len() - answered, asked: steps.len() });
                }
                Err(errno) => return Err(NetError::Socket(errno)),
            };
            for (seq, errno) in Answers(&buffer[..length]) {
                let Some(step) = (seq as usize).checked_sub(1).and_then(|i| steps.get(i)) else { continue };
                answered += 1;
                let errno = Errno::from_raw(errno);
                if errno != Errno::from_raw(0) && !step.is_settled_by(errno) && first.is_ok() {
                    first = Err(NetError::Refused { step: *step, errno });
                }
            }
        }
        first
    }
}

impl RouteSocket {
    /// Whether the device passes packets: up, with carrier, *and* the kernel's link watch has put its queue
    /// to work. After a carrier has come back the latter is done by a worker later (for some devices up to
    /// a second), and what the device should send until then is dropped. Since Linux 6.8 just asking makes
    /// the kernel catch up (`rtnl_getlink` calls `linkwatch_sync_dev`).
    pub fn is_running(&self, index: u32) -> Result<bool, NetError> {
        let mut out = Vec::with_capacity(32);
        message(&mut out, libc::RTM_GETLINK, libc::NLM_F_REQUEST, 0, &|out| link(out, index, 0));
        let (fd, kernel) = (self.fd.as_raw_fd(), NetlinkAddr::new(0, 0));
        socket::sendto(fd, &out, &kernel, MsgFlags::empty()).map_err(NetError::Socket)?;
        // Longer answers are cut off behind what is looked at: the flags in the `struct ifinfomsg`.
        let mut buffer = [0u8; HEADER + 16];
        let length = socket::recv(fd, &mut buffer, MsgFlags::MSG_DONTWAIT).map_err(NetError::Socket)?;
        let kind = u16::from_ne_bytes([buffer[4], buffer[5]]);
        if length < buffer.len() || kind != libc::RTM_NEWLINK {
            return Err(NetError::NoAnswer { missing: 1, asked: 1 });
        }
        let flags = u32::from_ne_bytes([buffer[24], buffer[25], buffer[26], buffer[27]]);
        Ok(flags & libc::IFF_RUNNING as u32 != 0)
    }
}

/// The (sequence number, errno) pairs in a datagram of NLMSG_ERROR messages.
struct Answers<'a>(&'a [u8]);

impl Iterator for Answers<'_> {
    type Item = (u32, i32);

    fn next(&mut self) -> Option<(u32, i32)> {
        loop {
            let word = |at: usize| Some(u32::from_ne_bytes(self.0.get(at..at + 4)?.try_into().ok()?));
            let (length, kind, seq) = (word(0)? as usize, word(4)? as u16, word(8)?);
            let code = word(HEADER);
            if length < HEADER || length > self.0.len() {
                return None;
            }
            self.0 = self.0.get(align(length)..).unwrap_or(&[]);
            if i32::from(kind) == libc::NLMSG_ERROR {
                return Some((seq, -(code? as i32)));
            }
        }
    }
}

const HEADER: usize = 16;

const fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// The steps as one datagram; step `i` has the sequence number `i + 1`.
pub(super) fn encode(steps: &[NetStep]) -> Result<Vec<u8>, NetError> {
    if steps.len() > STEPS_MAX {
        return Err(NetError::TooMany(steps.len()));
    }
    let mut out = Vec::with_capacity(steps.len() * 64);
    for (i, step) in steps.iter().enumerate() {
        encode_step(&mut out, *step, i as u32 + 1);
    }
    Ok(out)
}

/// One message: `struct nlmsghdr` and the body.
fn message(out: &mut Vec<u8>, kind: u16, flags: i32, seq: u32, body: &dyn Fn(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&(flags as u16).to_ne_bytes());
    out.extend_from_slice(&seq.to_ne_bytes());
    out.extend_from_slice(&0u32.to_ne_bytes());
    body(out);
    let length = (out.len() - start) as u32;
    out[start..start + 4].copy_from_slice(&length.to_ne_bytes());
}

fn encode_step(out: &mut Vec<u8>, step: NetStep, seq: u32) {
    let create = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    let mut message = |kind: u16, flags: i32, body: &dyn Fn(&mut Vec<u8>)| {
        message(out, kind, libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags, seq, body);
    };
    match step {
        NetStep::LinkUp { index } => {
            message(libc::RTM_NEWLINK, 0, &|out| link(out, index, libc::IFF_UP as u32));
        }
        NetStep::LinkDown { index } => message(libc::RTM_NEWLINK, 0, &|out| link(out, index, 0)),
        NetStep::DelLink { index } => message(libc::RTM_DELLINK, 0, &|out| link(out, index, 0)),
        NetStep::AddRoute { index, addr } => {
            message(libc::RTM_NEWROUTE, create, &|out| route(out, index, addr));
        }
        NetStep::AddAddress { index, cidr } => {
            message(libc::RTM_NEWADDR, create, &|out| address(out, index, cidr));
        }
        NetStep::DelAddress { index, cidr } => {
            message(libc::RTM_DELADDR, 0, &|out| address(out, index, cidr));
        }
        NetStep::AddProxy { index, addr } => {
            message(libc::RTM_NEWNEIGH, create, &|out| proxy(out, index, addr));
        }
        NetStep::DelProxy { index, addr } => message(libc::RTM_DELNEIGH, 0, &|out| proxy(out, index, addr)),
    }
}

/// `struct ifinfomsg`; only IFF_UP is changed.
fn link(out: &mut Vec<u8>, index: u32, flags: u32) {
    out.extend_from_slice(&[libc::AF_UNSPEC as u8, 0, 0, 0]);
    out.extend_from_slice(&index.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
}

/// `struct rtmsg`, RTA_DST, RTA_OIF: what `ip route replace ADDR dev DEV` sends.
fn route(out: &mut Vec<u8>, index: u32, addr: IpAddr) {
    // IPv6 knows no scopes of routes.
    let scope = if addr.is_ipv4() { libc::RT_SCOPE_LINK } else { libc::RT_SCOPE_UNIVERSE };
    let rtm =
        [family(addr), bits(addr), 0, 0, libc::RT_TABLE_MAIN, libc::RTPROT_STATIC, scope, libc::RTN_UNICAST];
    out.extend_from_slice(&rtm);
    out.extend_from_slice(&0u32.to_ne_bytes());
    attribute(out, libc::RTA_DST, &octets(addr));
    attribute(out, libc::RTA_OIF, &index.to_ne_bytes());
}

/// `struct ifaddrmsg`, IFA_LOCAL, IFA_ADDRESS; IPv6 without duplicate address detection: its second of
/// silence is what a takeover cannot afford, and that nobody else has the address is the term's promise.
fn address(out: &mut Vec<u8>, index: u32, cidr: Cidr) {
    const IFA_F_NODAD: u8 = 0x02;
    let scope = match cidr.addr {
        IpAddr::V4(v4) if v4.is_link_local() => libc::RT_SCOPE_LINK,
        _ => libc::RT_SCOPE_UNIVERSE,
    };
    let flags = if cidr.addr.is_ipv6() { IFA_F_NODAD } else { 0 };
    out.extend_from_slice(&[family(cidr.addr), cidr.prefix, flags, scope]);
    out.extend_from_slice(&index.to_ne_bytes());
    attribute(out, libc::IFA_LOCAL, &octets(cidr.addr));
    attribute(out, libc::IFA_ADDRESS, &octets(cidr.addr));
}

/// `struct ndmsg`, NDA_DST: what `ip neigh add proxy ADDR dev DEV` sends.
fn proxy(out: &mut Vec<u8>, index: u32, addr: IpAddr) {
    const NTF_PROXY: u8 = 0x08;
    out.extend_from_slice(&[family(addr), 0, 0, 0]);
    out.extend_from_slice(&index.to_ne_bytes());
    out.extend_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
    out.extend_from_slice(&[NTF_PROXY, 0]);
    attribute(out, libc::NDA_DST, &octets(addr));
}

fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(align(out.len()), 0);
}

fn family(addr: IpAddr) -> u8 {
    (if addr.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn bits(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { 32 } else { 128 }
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The address by which a sandbox reaches its host over IPv6.
pub(crate) const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_is_one_message_of_the_length_it_says() {
        let addr: IpAddr = "10.1.2.3".parse().unwrap();
        let cidr = Cidr { addr: "fd00::5".parse().unwrap(), prefix: 64 };
        let steps = [
            NetStep::LinkUp { index: 7 },
            NetStep::AddRoute { index: 7, addr },
            NetStep::AddAddress { index: 7, cidr },
            NetStep::DelProxy { index: 7, addr },
        ];
        let bytes = encode(&steps).unwrap();
        let (mut at, mut count) = (0, 0);
        while at < bytes.len() {
            let length = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
            count += 1;
            assert_eq!(u32::from_ne_bytes(bytes[at + 8..at + 12].try_into().unwrap()), count);
            at += length;
        }
        assert_eq!((at, count as usize), (bytes.len(), steps.len()));
    }

    #[test]
    fn answers_stop_at_a_lie_about_the_length() {
        let mut bytes = vec![0; 36];
        bytes[0..4].copy_from_slice(&36u32.to_ne_bytes());
        bytes[4..6].copy_from_slice(&(libc::NLMSG_ERROR as u16).to_ne_bytes());
        bytes[8..12].copy_from_slice(&3u32.to_ne_bytes());
        bytes[16..20].copy_from_slice(&(-libc::ENODEV).to_ne_bytes());
        assert_eq!(Answers(&bytes).collect::<Vec<_>>(), [(3, libc::ENODEV)]);
        bytes[0..4].copy_from_slice(&360u32.to_ne_bytes());
        assert_eq!(Answers(&bytes).count(), 0);
        assert_eq!(Answers(&bytes[..10]).count(), 0);
    }
}
