//! QUIC's settings for two hosts in one data centre, and the UDP socket.

use std::{io, net::SocketAddr, net::UdpSocket, sync::Arc, time::Duration};

use nix::sys::socket::{setsockopt, sockopt};
use quinn::{
    EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt,
    congestion::{ControllerFactory, CubicConfig},
    crypto::{CryptoError, HmacKey},
};
use quinn_proto::HashedConnectionIdGenerator;

use super::{Channel, Identity};

/// Data in flight on a bulk connection, in each direction and in all: 10 Gbit/s for 25 ms.
const BULK_WINDOW: u32 = 32 << 20;
/// Data in flight on a lease connection, and before it is known what a connection is for.
const SMALL_WINDOW: u32 = 1 << 20;
/// Buffers for datagrams: a few hundred heartbeats; the oldest are dropped first.
const DATAGRAM_BUFFER_LEN: usize = 32 << 10;
/// Streams that a peer may have open at once.
const STREAMS_MAX: u32 = 32;
/// A lease connection without a sign of life is given up. Leases are shorter and are watched by the agents;
/// this only clears the dead connection away.
const LEASE_IDLE_MS_MAX: u32 = 3_000;
/// The same for bulk, where a standby busy with its disk must not look dead.
const BULK_IDLE_MS_MAX: u32 = 10_000;
/// Congestion window of a new connection. RFC 6928's ten packets are for the open internet; between two
/// hosts of one network the first epoch may use what a switch port's buffer takes.
const INITIAL_CONGESTION_WINDOW: u64 = 256 << 10;
/// Largest UDP payload that is tried, for links with jumbo frames. quinn hands the kernel up to ten packets
/// in one call (`MAX_TRANSMIT_SEGMENTS`) and takes EMSGSIZE for a lost probe, so ten must fit in the 65,507
/// bytes that a UDP send may have: with larger packets whole batches vanish, and QUIC falls back to 1,200.
const UDP_PAYLOAD_MAX: u16 = 6_500;
/// Receive and send buffers of the UDP socket: at 10 Gbit/s, what arrives in 6 ms without this process
/// being scheduled. The kernel's default of 208 KiB is 0.2 ms, and what overflows counts as congestion.
const SOCKET_BUFFER_LEN: usize = 8 << 20;

/// Settings of the side that dials, which knows the channel.
pub(super) fn dialer(channel: Channel) -> TransportConfig {
    let mut config = common();
    match channel {
        Channel::Lease => {
            config
                .max_idle_timeout(Some(VarInt::from_u32(LEASE_IDLE_MS_MAX).into()))
                .keep_alive_interval(Some(Duration::from_millis(500)));
        }
        Channel::Bulk => {
            config
                .keep_alive_interval(Some(Duration::from_secs(1)))
                .stream_receive_window(VarInt::from_u32(SMALL_WINDOW))
                .send_window(BULK_WINDOW.into());
        }
    }
    config
}

/// Settings of the side that accepts, which learns the channel when the handshake is over; see [`fit`].
pub(super) fn acceptor() -> TransportConfig {
    let mut config = common();
    config.stream_receive_window(VarInt::from_u32(BULK_WINDOW));
    config
}

/// Fits an accepted connection to its channel.
pub(super) fn fit(connection: &quinn::Connection, channel: Channel) {
    if channel == Channel::Bulk {
        connection.set_receive_window(VarInt::from_u32(BULK_WINDOW));
    }
}

fn common() -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(UDP_PAYLOAD_MAX);
    let mut config = TransportConfig::default();
    config
        // The lesser of both ends' values counts, so this is the acceptor's and bulk's.
        .max_idle_timeout(Some(VarInt::from_u32(BULK_IDLE_MS_MAX).into()))
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(1))
        .receive_window(VarInt::from_u32(SMALL_WINDOW))
        .send_window(SMALL_WINDOW.into())
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER_LEN))
        .datagram_send_buffer_size(DATAGRAM_BUFFER_LEN)
        .mtu_discovery_config(Some(mtu))
        // The default of 333 ms makes the first retransmission of a lost handshake packet wait a second:
        // just when a link has healed, that is too long.
        .initial_rtt(Duration::from_millis(50))
        .congestion_controller_factory(congestion());
    config
}

/// CUBIC: it fills a data centre's link after a loss within milliseconds and is fair to the TCP beside it.
/// quinn's BBR is marked experimental; a fixed window would starve the workload's own clients.
fn congestion() -> Arc<dyn ControllerFactory + Send + Sync> {
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_CONGESTION_WINDOW);
    Arc::new(cubic)
}

/// Settings of the UDP port.
///
/// The keys come from the identity, so that they outlive a killed agent: the next one answers what the peer still sends
/// on connections of the dead one with a reset (RFC 9000, 10.3), and the peer dials anew at once. With quinn's random
/// keys it would talk to nobody until the connection is idle for too long, which costs the lease.
pub(super) fn endpoint(identity: &Identity) -> EndpointConfig {
    let reset_key = ResetKey(identity.derive_key("standin 2026 QUIC stateless reset"));
    let ids = identity.derive_key("standin 2026 QUIC connection ids");
    let id_key = ids.as_chunks::<8>().0[0];
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(u64::from_le_bytes(id_key))));
    config.max_udp_payload_size(UDP_PAYLOAD_MAX).expect("the constant is within QUIC's bounds");
    config
}

/// Makes the tokens by which a peer believes a reset.
struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        // Compares in constant time.
        if blake3::keyed_hash(&self.0, data) == *signature { Ok(()) } else { Err(CryptoError) }
    }
}

/// A bound UDP socket with buffers as large as the system permits.
pub(super) fn socket(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(addr)?;
    // The forced variants need CAP_NET_ADMIN; without it the sysctls rmem_max and wmem_max bound the others.
    if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_LEN).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER_LEN)?;
    }
    if setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_LEN).is_err() {
        setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER_LEN)?;
    }
    Ok(socket)
}
