//! QUIC between two agents: who the other one is, and the channels that join them.
//!
//! ```text
//!   agent A                                                      agent B
//!   Endpoint ── standin-lease/4 ─── requests, heartbeat datagrams ─── Endpoint     one UDP port each
//!       │    ── standin-bulk/4 ──── one stream an epoch, or question ──── │
//!       │    ── standin-supply/1 ── one stream a thing ────────────────── │
//!       └─   ── standin-pair/1 ──── only while a code is open ────────── ─┘
//! ```
//!
//! - [`identity`]: the host's key and certificate, and fingerprints.
//! - [`peers`]: whom this host trusts, on disk.
//! - [`endpoint`]: the UDP port; connects and accepts.
//! - [`connection`]: requests, replies and datagrams of a channel.
//! - [`epoch`]: an epoch as a stream.
//! - [`inventory`]: what a standby holds, as a stream.
//! - [`supply`]: an image or a directory as a stream.
//! - [`pairing`]: how two hosts come to trust each other by a code that a person types.
//!
//! Invariants:
//! - Both ends prove a key whose certificate the other has pinned; names and validity dates in it mean
//!   nothing. TLS 1.3 only, no resumption, no early data: each connection is proven anew.
//! - No byte of ours reaches a host that is not a peer, except pairing's challenge while a code is open.
//! - Memory is bounded by QUIC's flow control: what is not read is not received.
//! - A big epoch does not cost the lease: each channel has sockets (`socket`) and threads (`lane`) of its own, those of leases
//!   run first (`sys`), and bulk keeps the queues on the link short (`congestion`).
//! - The side that sends epochs dials: its transport configuration (congestion control, windows) is the one
//!   made for bulk.

mod congestion;
mod lane;
mod private_file;
mod socket;
mod stream;
mod sys;
mod tls;
mod tuning;

pub mod connection;
pub mod endpoint;
pub mod epoch;
pub mod identity;
pub mod inventory;
pub mod pairing;
pub mod peers;
pub mod supply;

pub use connection::{Connection, Responder};
pub use endpoint::Endpoint;
pub use epoch::{EpochReceiver, EpochSender};
pub use identity::{Fingerprint, Identity};
pub use inventory::{InventoryReceiver, InventorySender};
pub use lane::{block_in_place, prompt_runtime};
pub use peers::{Peer, PeerName, Peers};
pub use private_file::PrivateFileError;
pub use stream::MessageError;
pub use supply::{SupplyReceiver, SupplySender};
pub use tls::TlsError;
pub use tuning::UDP_PAYLOAD_MAX;

/// What a connection is for; agreed in the TLS handshake (ALPN), so both ends know it before the first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// Requests and heartbeats: little data that must not wait behind much.
    Lease,
    /// Epochs.
    Bulk,
    /// What a container needs and its standby lacks, before it is protected: as much as epochs, but one that is slow to take
    /// it holds up no epoch.
    Supply,
}

impl Channel {
    const ALL: [Self; 3] = [Self::Lease, Self::Bulk, Self::Supply];

    /// The channel's name in the handshake.
    fn alpn(self) -> &'static [u8] {
        match self {
            Self::Lease => b"standin-lease/4",
            Self::Bulk => b"standin-bulk/4",
            Self::Supply => b"standin-supply/1",
        }
    }

    fn from_alpn(alpn: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|channel| channel.alpn() == alpn)
    }
}

/// Pairing's name in the handshake.
const PAIRING_ALPN: &[u8] = b"standin-pair/1";

/// Why a connection or stream was closed, as the number that QUIC carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CloseCode {
    /// All said.
    Done = 0,
    /// The certificate is no peer's.
    NotPaired = 1,
    /// No pairing code is open.
    NotOpen = 2,
    /// The pairing code is used up.
    Spent = 3,
    /// More connections than this end takes.
    Busy = 4,
    /// The sender gave up in the middle.
    Abandoned = 5,
}

impl From<CloseCode> for quinn::VarInt {
    fn from(code: CloseCode) -> Self {
        Self::from_u32(code as u32)
    }
}
