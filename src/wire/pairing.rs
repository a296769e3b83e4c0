//! What two hosts say to each other before they trust each other. The exchange itself, with its drawing, is
//! in [`crate::transport::pairing`].

use std::{fmt, net::SocketAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    check::{self, Illegal},
    codec::Message,
};

/// A host's name among its peers: 1 to 64 characters of `a-z`, `0-9`, `-` and `.`, beginning with a letter
/// or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerName(String);

/// Why a text is no peer name.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no peer name: use 1 to 64 characters of a-z, 0-9, '-' and '.', beginning with a letter or digit"
)]
pub struct PeerNameError(String);

impl PeerName {
    /// The most characters of a name (`HOST_NAME_MAX`).
    pub const LEN_MAX: usize = 64;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PeerName {
    type Error = PeerNameError;

    fn try_from(text: String) -> Result<Self, PeerNameError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
        let fits = (1..=Self::LEN_MAX).contains(&text.len());
        if fits && !text.starts_with(['-', '.']) && text.bytes().all(allowed) {
            Ok(Self(text))
        } else {
            Err(PeerNameError(text))
        }
    }
}

impl FromStr for PeerName {
    type Err = PeerNameError;

    fn from_str(text: &str) -> Result<Self, PeerNameError> {
        Self::try_from(text.to_owned())
    }
}

impl From<PeerName> for String {
    fn from(name: PeerName) -> Self {
        name.0
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a host introduces itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// Its name.
    pub name: PeerName,
    /// Where its agent listens. With the unspecified address (`0.0.0.0`, `::`) the other side takes the one
    /// that it sees.
    pub addr: SocketAddr,
}

/// A message of the host that was given the code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromJoiner {
    /// First: a fresh nonce.
    Hello {
        /// Never used before.
        nonce: [u8; 32],
    },
    /// To a challenge: I know the code, and this is who I am.
    Proof {
        /// Keyed with the code, over both identities and nonces.
        mac: [u8; 32],
        /// The joiner.
        card: Card,
    },
    /// To the listener's proof: I can store you.
    Agreed,
    /// To the listener's proof: I cannot.
    Declined {
        /// Why, for people.
        reason: String,
    },
}

/// A message of the host that made the code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromListener {
    /// To a hello: a fresh nonce.
    Challenge {
        /// Never used before.
        nonce: [u8; 32],
    },
    /// To a proof: it is right, here is mine.
    Proof {
        /// Keyed with the code, over both identities and nonces.
        mac: [u8; 32],
        /// The listener.
        card: Card,
    },
    /// To a proof: the code is wrong.
    WrongCode {
        /// How many tries remain.
        tries_left: u32,
    },
    /// To a proof: the code was used, has expired or was tried wrongly too often.
    Spent,
    /// To `Agreed`: the joiner is stored.
    Stored,
    /// To a right proof or `Agreed`: it cannot be stored.
    Failed {
        /// Why, for people.
        reason: String,
    },
}

impl Message for FromJoiner {
    const WHAT: &'static str = "pairing message";

    fn check(&mut self) -> Result<(), Illegal> {
        match self {
            Self::Declined { reason } => check::make_printable(reason),
            Self::Proof { card, .. } => check_card(card)?,
            Self::Hello { .. } | Self::Agreed => {}
        }
        Ok(())
    }
}

impl Message for FromListener {
    const WHAT: &'static str = "pairing message";

    fn check(&mut self) -> Result<(), Illegal> {
        match self {
            Self::Failed { reason } => check::make_printable(reason),
            Self::Proof { card, .. } => check_card(card)?,
            Self::Challenge { .. } | Self::WrongCode { .. } | Self::Spent | Self::Stored => {}
        }
        Ok(())
    }
}

fn check_card(card: &Card) -> Result<(), Illegal> {
    check::require(card.addr.port() != 0, || format!("{} is no address to reach an agent at", card.addr))
}
