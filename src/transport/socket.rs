//! The UDP sockets: on the agent's one port, lease and bulk have a socket each, so that no heartbeat queues behind an epoch.
//!
//! The kernel tells them apart by a bit of the connection id that every packet of QUIC carries (RFC 9000, 17.2 and 17.3). Ids
//! are chosen by the end that they lead to, but for the first one, which is the dialer's, so the bit is ours on all packets.
//! Whoever sets it otherwise reaches the same agent by its other socket, which takes all channels.

use std::{
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use nix::{
    libc::{
        BPF_A, BPF_ABS, BPF_ALU, BPF_AND, BPF_B, BPF_JA, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET,
        sock_filter, sock_fprog,
    },
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt},
};
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};

use super::{Channel, tuning};

/// Set in the first byte of the connection ids that lead to a socket for bulk.
const BULK_BIT: u8 = 1;
/// Most bytes that one UDP send may have.
const SEND_LEN_MAX: usize = 65_507;
/// Most bytes that the kernel hands over as one (GRO), rounded up.
const RECV_LEN_MAX: usize = 64 << 10;

/// An agent's sockets.
pub(super) struct Sockets {
    pub(super) lease: UdpSocket,
    pub(super) bulk: UdpSocket,
    /// For dialing bulk, on a port of its own. Packets with the same addresses and ports may be merged on their way in (GRO),
    /// before a socket is chosen for the first of them.
    pub(super) bulk_dialing: UdpSocket,
}

impl Sockets {
    pub(super) fn bind(addr: SocketAddr) -> io::Result<Self> {
        // Alone, so that a second agent on the port is found out; shared from then on, which takes both sides.
        let lease = UdpSocket::bind(addr)?;
        setsockopt(&lease, sockopt::ReusePort, &true)?;
        let bulk = bind_beside(lease.local_addr()?)?;
        choose_by_id(&lease)?;
        let bulk_dialing = UdpSocket::bind((addr.ip(), 0))?;
        for socket in [&lease, &bulk, &bulk_dialing] {
            tuning::buffers(socket)?;
        }
        Ok(Self { lease, bulk, bulk_dialing })
    }
}

fn bind_beside(addr: SocketAddr) -> io::Result<UdpSocket> {
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReusePort, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(addr))?;
    Ok(socket.into())
}

/// Has the kernel give a packet to the port's socket of that number, in the order in which they were bound.
fn choose_by_id(socket: &impl AsFd) -> io::Result<()> {
    const LONG_HEADER: u32 = 0x80;
    const ID_OF_LONG_HEADER: u32 = 6;
    const ID_OF_SHORT_HEADER: u32 = 1;
    let step =
        |code: u32, jump_if_not: u8, k: u32| sock_filter { code: code as u16, jt: 0, jf: jump_if_not, k };
    let mut steps = [
        step(BPF_LD | BPF_B | BPF_ABS, 0, 0),
        step(BPF_JMP | BPF_JSET | BPF_K, 2, LONG_HEADER),
        step(BPF_LD | BPF_B | BPF_ABS, 0, ID_OF_LONG_HEADER),
        step(BPF_JMP | BPF_JA, 0, 1),
        step(BPF_LD | BPF_B | BPF_ABS, 0, ID_OF_SHORT_HEADER),
        step(BPF_ALU | BPF_AND | BPF_K, 0, BULK_BIT.into()),
        step(BPF_RET | BPF_A, 0, 0),
    ];
    let program = sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    Ok(setsockopt(socket, sockopt::AttachReusePortCbpf, &program)?)
}
/// Connection ids that lead to a channel's socket.
pub(super) struct Ids<G> {
    ids: G,
    channel: Channel,
}

impl<G: ConnectionIdGenerator> Ids<G> {
    pub(super) fn new(ids: G, channel: Channel) -> Self {
        Self { ids, channel }
    }
}

impl<G: ConnectionIdGenerator> ConnectionIdGenerator for Ids<G> {
    fn generate_cid(&mut self) -> ConnectionId {
        loop {
            let id = self.ids.generate_cid();
            if (id[0] & BULK_BIT != 0) == (self.channel != Channel::Lease) {
                return id;
            }
        }
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        self.ids.validate(id)
    }

    fn cid_len(&self) -> usize {
        self.ids.cid_len()
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        self.ids.cid_lifetime()
    }
}

/// A socket for bulk.
#[derive(Debug)]
pub(super) struct Batched {
    socket: Arc<dyn AsyncUdpSocket>,
    /// The longest datagram so far. A new size is tried alone (as a probe) before it is sent in batches.
    longest: AtomicUsize,
}

impl Batched {
    pub(super) fn new(socket: Arc<dyn AsyncUdpSocket>) -> Self {
        Self { socket, longest: AtomicUsize::new(1) }
    }
}

impl AsyncUdpSocket for Batched {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let len = transmit.segment_size.unwrap_or(transmit.contents.len());
        self.longest.fetch_max(len, Ordering::Relaxed);
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let len = bufs.len().min(tuning::RECV_BATCH);
        self.socket.poll_recv(cx, &mut bufs[..len], meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// A batch that is longer than a send may be would be lost as a whole, and again with each retransmission: quinn sends
    /// up to ten datagrams at once, whatever their size, and takes EMSGSIZE for a lost probe.
    fn max_transmit_segments(&self) -> usize {
        let fit = SEND_LEN_MAX / self.longest.load(Ordering::Relaxed);
        self.socket.max_transmit_segments().min(fit).max(1)
    }

    /// For the size of quinn's buffers alone: so many datagrams of the longest size hold whatever comes at once. The kernel's
    /// own limit, 64, would make them 18 MB.
    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments().min(RECV_LEN_MAX.div_ceil(tuning::UDP_PAYLOAD_MAX.into()))
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use quinn_proto::RandomConnectionIdGenerator;

    use super::*;

    fn id(channel: Channel) -> ConnectionId {
        Ids::new(RandomConnectionIdGenerator::new(8), channel).generate_cid()
    }

    /// The beginning of a packet, with a long header (as in handshakes) or a short one.
    fn packet(channel: Channel, long: bool) -> Vec<u8> {
        let mut packet = if long { vec![0xc0, 0, 0, 0, 1, 8] } else { vec![0x40] };
        packet.extend_from_slice(&id(channel));
        packet
    }

    #[test]
    fn each_channels_packets_reach_its_socket() {
        for ip in ["127.0.0.1:0", "[::1]:0"] {
            let sockets = Sockets::bind(ip.parse().unwrap()).unwrap();
            let to = sockets.lease.local_addr().unwrap();
            assert_eq!(sockets.bulk.local_addr().unwrap(), to);
            let sender = UdpSocket::bind((to.ip(), 0)).unwrap();
            for _ in 0..20 {
                for (channel, socket) in [(Channel::Lease, &sockets.lease), (Channel::Bulk, &sockets.bulk)] {
                    for long in [true, false] {
                        let sent = packet(channel, long);
                        sender.send_to(&sent, to).unwrap();
                        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                        let mut received = [0; 64];
                        let len = socket.recv(&mut received).unwrap();
                        assert_eq!(received[..len], sent);
                    }
                }
            }
        }
    }

    #[test]
    fn a_port_that_another_agent_has_is_refused() {
        let first = Sockets::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = first.lease.local_addr().unwrap();
        assert_eq!(Sockets::bind(addr).err().unwrap().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        Sockets::bind(addr).unwrap();
    }
}
