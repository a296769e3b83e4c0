//! QUIC's settings for two hosts in one data centre, and the UDP socket.

use std::{io, net::UdpSocket, sync::Arc, time::Duration};

use nix::sys::socket::{setsockopt, sockopt};
use quinn::{
    EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt,
    congestion::{ControllerFactory, CubicConfig},
    crypto::{CryptoError, HmacKey},
};
use quinn_proto::HashedConnectionIdGenerator;

use super::{Channel, Identity, congestion::Considerate, socket::Ids};

/// Most data in flight on a bulk connection, in each direction and in all: 10 Gbit/s for 25 ms.
const BULK_WINDOW: u32 = 32 << 20;
/// Least that a sender of epochs may have unacknowledged; see [`send_window`].
const SEND_WINDOW_MIN: u64 = 4 << 20;
/// What a link may carry: 10 Gbit/s.
const LINK_BYTES_PER_S: u64 = 1_250_000_000;
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
/// Largest UDP payload that is tried on bulk: an Ethernet frame of 9000 bytes less the headers of IPv6 and UDP. Each packet
/// costs the same, so 8,952 are worth more than 6,500 (0.91 against 0.81 GB/s) and 1,472 much less (0.53). That a batch
/// of them stays within what one send may carry is the doing of `socket::Batched`.
pub const UDP_PAYLOAD_MAX: u16 = 8_952;
/// Reads of up to 64 KB that one call to the kernel may do, of quinn's 32. So few stay in the second-level cache until quinn
/// has copied them: 1.17 against 1.09 GB/s, and no difference at 1,472 bytes.
pub(super) const RECV_BATCH: usize = 4;
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
        Channel::Bulk | Channel::Supply => {
            config
                .keep_alive_interval(Some(Duration::from_secs(1)))
                .stream_receive_window(VarInt::from_u32(SMALL_WINDOW))
                .send_window(SEND_WINDOW_MIN);
        }
    }
    config
}

/// What may be unacknowledged on a bulk connection with that round trip: what a link of 10 Gbit/s holds, and no more. A
/// sender hashes and queues as far ahead as it may; what it queues within 4 MiB is still in the caches when it is encrypted
/// (1.36 GB/s, against 1.20 with 32 MiB), and does not pile up in the receiver's socket.
pub(super) fn send_window(rtt: Duration) -> u64 {
    let held = u128::from(LINK_BYTES_PER_S) * rtt.as_nanos() / 1_000_000_000;
    u64::try_from(held).unwrap_or(u64::MAX).clamp(SEND_WINDOW_MIN, BULK_WINDOW.into())
}

/// Settings of the side that accepts, which learns the channel when the handshake is over; see [`fit`].
pub(super) fn acceptor() -> TransportConfig {
    let mut config = common();
    config.stream_receive_window(VarInt::from_u32(BULK_WINDOW));
    config
}

/// Fits an accepted connection to its channel.
pub(super) fn fit(connection: &quinn::Connection, channel: Channel) {
    if channel != Channel::Lease {
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
/// quinn's BBR is marked experimental; a fixed window would starve the workload's own clients. [`Considerate`] has it yield
/// to its own queues.
fn congestion() -> Arc<dyn ControllerFactory + Send + Sync> {
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_CONGESTION_WINDOW);
    Arc::new(Considerate::new(cubic, INITIAL_CONGESTION_WINDOW))
}

/// Settings of a channel's sockets.
///
/// The keys come from the identity, so that they outlive a killed agent: the next one answers what the peer still sends
/// on connections of the dead one with a reset (RFC 9000, 10.3), and the peer dials anew at once. With quinn's random
/// keys it would talk to nobody until the connection is idle for too long, which costs the lease.
pub(super) fn endpoint(identity: &Identity, channel: Channel) -> EndpointConfig {
    let reset_key = ResetKey(identity.derive_key("standin 2026 QUIC stateless reset"));
    let ids = identity.derive_key("standin 2026 QUIC connection ids");
    let id_key = ids.as_chunks::<8>().0[0];
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    let id_key = u64::from_le_bytes(id_key);
    config.cid_generator(move || Box::new(Ids::new(HashedConnectionIdGenerator::from_key(id_key), channel)));
    if channel == Channel::Bulk {
        config.max_udp_payload_size(UDP_PAYLOAD_MAX).expect("the constant is within QUIC's bounds");
    }
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

/// Gives a socket buffers as large as the system permits.
pub(super) fn buffers(socket: &UdpSocket) -> io::Result<()> {
    let len = SOCKET_BUFFER_LEN;
    // The forced variants need CAP_NET_ADMIN; without it the sysctls rmem_max and wmem_max bound the others.
    if setsockopt(socket, sockopt::RcvBufForce, &len).is_err() {
        setsockopt(socket, sockopt::RcvBuf, &len)?;
    }
    if setsockopt(socket, sockopt::SndBufForce, &len).is_err() {
        setsockopt(socket, sockopt::SndBuf, &len)?;
    }
    Ok(())
}
