//! How two hosts come to trust each other: one shows a code, a person types it on the other.
//!
//! ```text
//!   joiner                                             listener (window open: 10 minutes, 5 wrong tries)
//!     TLS, any certificate ◄──────────────────────────►  TLS, any certificate
//!     Hello { nonce }  ───────────────────────────────►
//!                      ◄─────────────────────────────── Challenge { nonce }
//!     Proof { MAC("joiner"), card } ──────────────────►  right: the window closes for good
//!                      ◄─────────────────────────────── Proof { MAC("listener"), card }  (else WrongCode)
//!     Agreed ─────────────────────────────────────────►  stores the joiner
//!     stores the listener ◄─────────────────────────── Stored
//! ```
//!
//! A MAC is keyed with the code and covers the role, both certificates as this side saw them and both nonces.
//! A man in the middle shows each side another certificate, so the MAC that he gets from one is wrong for the
//! other; and trying out codes offline means 2^80 guesses for a code that is dead in ten minutes.
//!
//! Invariants:
//! - The listener says nothing that depends on the code before the joiner has proven it.
//! - A code works once. Five wrong proofs close it.
//! - If the exchange breaks between the two stores, one host trusts another that does not trust it: useless,
//!   harmless, and mended by pairing again.

pub mod code;
pub mod joiner;
pub mod listener;
pub(super) mod window;

pub use code::{CodeError, PairingCode};
pub use joiner::JoinError;
pub use listener::{ListenError, PAIRING_VALID_FOR, PairingListener};
pub use window::TRIES_MAX;

pub use crate::wire::pairing::Card;

use std::net::{IpAddr, SocketAddr};

use blake3::Hash;

use super::Fingerprint;

/// What both sides of an exchange know, and prove to know together with the code.
struct Transcript {
    joiner: Fingerprint,
    listener: Fingerprint,
    joiner_nonce: [u8; 32],
    listener_nonce: [u8; 32],
}

impl Transcript {
    fn joiner_mac(&self, key: &[u8; 32]) -> Hash {
        self.mac(key, *b"joiner  ")
    }

    fn listener_mac(&self, key: &[u8; 32]) -> Hash {
        self.mac(key, *b"listener")
    }

    /// All parts have a fixed length, so no two transcripts give the same input. `Hash` compares in constant
    /// time.
    fn mac(&self, key: &[u8; 32], role: [u8; 8]) -> Hash {
        blake3::Hasher::new_keyed(key)
            .update(&role)
            .update(self.joiner.as_bytes())
            .update(self.listener.as_bytes())
            .update(&self.joiner_nonce)
            .update(&self.listener_nonce)
            .finalize()
    }
}

/// The address to reach the owner of a card at, when `seen` is where it was met.
fn reachable(card: &Card, seen: IpAddr) -> SocketAddr {
    let ip = if card.addr.ip().is_unspecified() { seen.to_canonical() } else { card.addr.ip() };
    SocketAddr::new(ip, card.addr.port())
}
