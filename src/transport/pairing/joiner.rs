//! The side that is given the code.

use std::{net::SocketAddr, time::Duration};

use quinn::ConnectionError;
use tokio::time::timeout;

use super::{Card, PairingCode, Transcript, reachable};
use crate::{
    transport::{
        Channel, CloseCode, Endpoint, PAIRING_ALPN, Peer, PeerName,
        endpoint::{SERVER_NAME, refused_as},
        peers::PeersError,
        stream::{self, MessageError},
        tls::{self, TlsError},
        tuning,
    },
    wire::pairing::{FromJoiner, FromListener},
};

/// The longest that the listener may take to answer at all.
const REACH_TIMEOUT: Duration = Duration::from_secs(3);
/// The longest that the exchange may take then.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why no pairing came about on the side that was given the code.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nobody answers.
    #[error(
        "nobody answers at {0} (UDP): check the address and port, that `standin pair --listen` was run there, and firewalls"
    )]
    Unreachable(SocketAddr),
    /// QUIC will not dial that.
    #[error("cannot dial {addr}: {source}")]
    Dial {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: quinn::ConnectError,
    },
    /// There is no code.
    #[error("no pairing is open at {0}: run `standin pair --listen` there first")]
    NotOpen(SocketAddr),
    /// There was one.
    #[error(
        "the code at {0} was used, has expired or was tried wrongly too often: run `standin pair --listen` there again"
    )]
    Spent(SocketAddr),
    /// The code is another one.
    #[error("wrong pairing code ({tries_left} tries left): compare it with what the other host shows")]
    WrongCode {
        /// Tries that remain.
        tries_left: u32,
    },
    /// The other side does not know the code.
    #[error(
        "the host at {0} took the code but does not know it: something between the hosts answers in the \
         other's place; do not pair over this network"
    )]
    Impostor(SocketAddr),
    /// This very host.
    #[error("{0} is this host itself: give the other host's address")]
    Itself(SocketAddr),
    /// Two hosts of one name.
    #[error("the other host calls itself {0} like this one: give one of them another name and pair again")]
    SameName(PeerName),
    /// The listener cannot be stored here.
    #[error(transparent)]
    Clash(#[from] PeersError),
    /// The listener cannot store this host.
    #[error("the host at {addr} refused the pairing: {reason}")]
    Refused {
        /// The address.
        addr: SocketAddr,
        /// In its words.
        reason: String,
    },
    /// The exchange broke.
    #[error("the pairing with {addr} broke off ({source}): make a new code there and try again")]
    Broken {
        /// The address.
        addr: SocketAddr,
        /// How.
        source: MessageError,
    },
    /// The exchange stalled.
    #[error("the pairing with {0} was not completed in time: make a new code there and try again")]
    Stalled(SocketAddr),
    /// No randomness.
    #[error("cannot make a nonce: {0}")]
    Random(getrandom::Error),
    /// The identity does not serve.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl Endpoint {
    /// Pairs with the host that listens at `addr` and shows `code`; both trust each other when this returns.
    pub async fn join(&self, addr: SocketAddr, code: &PairingCode, me: Card) -> Result<Peer, JoinError> {
        let config = self.client_config(None, PAIRING_ALPN, tuning::dialer(Channel::Lease))?;
        let dialed = self
            .socket
            .connect_with(config, addr, SERVER_NAME)
            .map_err(|source| JoinError::Dial { addr, source })?;
        let connection = timeout(REACH_TIMEOUT, dialed)
            .await
            .map_err(|_| JoinError::Unreachable(addr))?
            .map_err(|source| not_joined(addr, source))?;
        let exchange = timeout(EXCHANGE_TIMEOUT, self.exchange(&connection, addr, code, me)).await;
        let joined = match exchange {
            Err(_) => Err(JoinError::Stalled(addr)),
            // A refusal closes the connection, and the exchange breaks somewhere: say the reason, not where.
            Ok(Err(JoinError::Broken { source, .. })) => Err(match connection.close_reason() {
                Some(reason) => not_joined(addr, reason),
                None => JoinError::Broken { addr, source },
            }),
            Ok(joined) => joined,
        };
        connection.close(CloseCode::Done.into(), b"");
        joined
    }

    async fn exchange(
        &self,
        connection: &quinn::Connection,
        addr: SocketAddr,
        code: &PairingCode,
        me: Card,
    ) -> Result<Peer, JoinError> {
        let broken = |source| JoinError::Broken { addr, source };
        let misplaced = || broken(MessageError::Unexpected);
        let joiner = self.fingerprint();
        let listener = tls::fingerprint_of(connection).ok_or_else(misplaced)?;
        if joiner == listener {
            return Err(JoinError::Itself(addr));
        }
        let (mut send, mut recv) =
            connection.open_bi().await.map_err(|e| broken(quinn::ReadError::from(e).into()))?;
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce).map_err(JoinError::Random)?;
        stream::write(&mut send, &FromJoiner::Hello { nonce }).await.map_err(broken)?;
        let listener_nonce = match stream::read(&mut recv).await.map_err(broken)? {
            FromListener::Challenge { nonce } => nonce,
            FromListener::Failed { reason } => return Err(JoinError::Refused { addr, reason }),
            _ => return Err(misplaced()),
        };
        let transcript = Transcript { joiner, listener, joiner_nonce: nonce, listener_nonce };
        let key = code.key();
        let own_name = me.name.clone();
        let proof = FromJoiner::Proof { mac: transcript.joiner_mac(&key).into(), card: me };
        stream::write(&mut send, &proof).await.map_err(broken)?;
        let card = match stream::read(&mut recv).await.map_err(broken)? {
            FromListener::Proof { mac, card } if transcript.listener_mac(&key) == mac => card,
            FromListener::Proof { .. } => return Err(JoinError::Impostor(addr)),
            FromListener::WrongCode { tries_left } => return Err(JoinError::WrongCode { tries_left }),
            FromListener::Spent => return Err(JoinError::Spent(addr)),
            FromListener::Failed { reason } => return Err(JoinError::Refused { addr, reason }),
            FromListener::Challenge { .. } | FromListener::Stored => return Err(misplaced()),
        };
        let at = reachable(&card, addr.ip());
        let peer = Peer { name: card.name, fingerprint: listener, addr: at };
        let fits = if peer.name == own_name {
            Err(JoinError::SameName(own_name))
        } else {
            self.host.peers.check(&peer).map_err(JoinError::from)
        };
        if let Err(refusal) = fits {
            let reason = refusal.to_string();
            stream::write_last(&mut send, &FromJoiner::Declined { reason }).await.map_err(broken)?;
            // Closing at once could overtake the message; the listener ends its side when it has it.
            let _ = recv.read(&mut [0]).await;
            return Err(refusal);
        }
        stream::write_last(&mut send, &FromJoiner::Agreed).await.map_err(broken)?;
        match stream::read_last(&mut recv).await.map_err(broken)? {
            FromListener::Stored => {}
            FromListener::Failed { reason } => return Err(JoinError::Refused { addr, reason }),
            _ => return Err(misplaced()),
        }
        self.host.peers.add(peer.clone())?;
        Ok(peer)
    }
}

fn not_joined(addr: SocketAddr, source: ConnectionError) -> JoinError {
    if refused_as(&source, tls::ALERT_SPENT, CloseCode::Spent) {
        JoinError::Spent(addr)
    } else if refused_as(&source, tls::ALERT_NOT_PAIRED, CloseCode::NotOpen) {
        JoinError::NotOpen(addr)
    } else if source == ConnectionError::TimedOut {
        JoinError::Unreachable(addr)
    } else {
        JoinError::Broken { addr, source: quinn::ReadError::from(source).into() }
    }
}
