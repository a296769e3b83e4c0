//! The side that shows the code.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::{RecvStream, SendStream};
use tokio::{sync::oneshot, time};

use super::{
    Card, PairingCode, Transcript, reachable,
    window::{Gate, Judgement, Outcome, Strangers, Window},
};
use crate::{
    transport::{
        CloseCode, Endpoint, Fingerprint, Peer, PeerName,
        endpoint::Host,
        peers::PeersError,
        stream::{self, MessageError},
    },
    wire::pairing::{FromJoiner, FromListener},
};

/// How long a code is valid unless its maker says otherwise.
pub const PAIRING_VALID_FOR: Duration = Duration::from_secs(600);
/// The longest that one exchange may take; the person has typed the code before it begins.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the listener waits for the joiner to close, which it does on reading the last message.
const LINGER: Duration = Duration::from_secs(1);

/// Why no pairing came about on the side that showed the code.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// One code at a time.
    #[error("a pairing code is open on this host already: use that one, or wait until it has expired")]
    AlreadyOpen,
    /// No randomness.
    #[error("cannot make a pairing code: {0}")]
    Random(getrandom::Error),
    /// Nobody came.
    #[error("the pairing code has expired unused: make a new one")]
    Expired,
    /// Somebody guessed.
    #[error(
        "the pairing code was tried wrongly {} times and is closed: make a new one, and find out who tries \
         if it was not a slip",
        super::TRIES_MAX
    )]
    TooManyTries,
    /// The joiner knows the code but cannot be stored here.
    #[error("{peer} cannot become a peer: {source}")]
    Clash {
        /// The joiner.
        peer: PeerName,
        /// Why not.
        source: PeersError,
    },
    /// Two hosts of one name.
    #[error("the other host calls itself {0} like this one: give one of them another name and pair again")]
    SameName(PeerName),
    /// The joiner cannot store this host.
    #[error("{peer} refused the pairing: {reason}")]
    Declined {
        /// The joiner.
        peer: PeerName,
        /// In its words.
        reason: String,
    },
    /// The exchange broke behind the right code.
    #[error("the pairing with {peer} broke off: {source}; make a new code")]
    Broken {
        /// The joiner.
        peer: PeerName,
        /// How.
        source: MessageError,
    },
    /// The exchange stalled behind the right code, or the endpoint went away.
    #[error("the pairing was not completed in time: make a new code")]
    Stalled,
}

/// An open pairing window; dropped, it closes.
#[derive(Debug)]
pub struct PairingListener {
    code: PairingCode,
    expires: Instant,
    outcome: oneshot::Receiver<Outcome>,
    gate: Arc<Gate>,
}

impl PairingListener {
    /// The code to show.
    pub fn code(&self) -> &PairingCode {
        &self.code
    }

    /// Waits until a host has joined and is stored, or the code is of no use any more.
    pub async fn wait(mut self) -> Result<Peer, ListenError> {
        let outcome = tokio::select! {
            outcome = &mut self.outcome => outcome,
            () = time::sleep_until(self.expires.into()) => {
                // Ends a window that is past its time; one that a joiner has just taken gets its outcome still.
                self.gate.strangers();
                (&mut self.outcome).await
            }
        };
        outcome.unwrap_or(Err(ListenError::Stalled))
    }
}

impl Drop for PairingListener {
    fn drop(&mut self) {
        self.outcome.close();
        self.gate.close_unowned();
    }
}

impl Endpoint {
    /// Opens the pairing window of this port for one host that brings the code.
    pub fn open_pairing(&self, me: Card, valid_for: Duration) -> Result<PairingListener, ListenError> {
        let code = PairingCode::generate().map_err(ListenError::Random)?;
        let gate = self.host.gate.clone();
        let (expires, outcome) = gate.open(code.key(), me, valid_for).ok_or(ListenError::AlreadyOpen)?;
        Ok(PairingListener { code, expires, outcome, gate })
    }
}

/// Serves a connection that asked for pairing.
pub(in crate::transport) async fn serve(connection: quinn::Connection, joiner: Fingerprint, host: &Host) {
    let refusal = match host.gate.strangers() {
        Strangers::Expected => None,
        Strangers::Unexpected => Some((CloseCode::NotOpen, "no pairing is open")),
        Strangers::TooLate => Some((CloseCode::Spent, "the pairing code is used up")),
    };
    if let Some((code, reason)) = refusal {
        return connection.close(code.into(), reason.as_bytes());
    }
    let addr = connection.remote_address();
    match time::timeout(EXCHANGE_TIMEOUT, exchange(&connection, joiner, host)).await {
        Ok(Ok(())) => {
            // Closing now could overtake the last message.
            let _ = time::timeout(LINGER, connection.closed()).await;
        }
        Ok(Err(e)) => tracing::info!(%addr, "pairing attempt broke off: {e}"),
        Err(_) => tracing::info!(%addr, "pairing attempt took too long"),
    }
    connection.close(CloseCode::Done.into(), b"");
}

async fn exchange(
    connection: &quinn::Connection,
    joiner: Fingerprint,
    host: &Host,
) -> Result<(), MessageError> {
    let (mut send, mut recv) = connection.accept_bi().await.map_err(quinn::ReadError::from)?;
    let FromJoiner::Hello { nonce: joiner_nonce } = stream::read(&mut recv).await? else {
        return Err(MessageError::Unexpected);
    };
    let mut nonce = [0; 32];
    if let Err(e) = getrandom::fill(&mut nonce) {
        let reason = format!("no randomness: {e}");
        return stream::write_last(&mut send, &FromListener::Failed { reason }).await;
    }
    stream::write(&mut send, &FromListener::Challenge { nonce }).await?;
    let FromJoiner::Proof { mac, card } = stream::read(&mut recv).await? else {
        return Err(MessageError::Unexpected);
    };
    let listener = host.identity.fingerprint();
    let transcript = Transcript { joiner, listener, joiner_nonce, listener_nonce: nonce };
    let window = match host.gate.judge(|key| transcript.joiner_mac(key) == mac) {
        Judgement::Right(window) => window,
        Judgement::Wrong { tries_left } => {
            tracing::warn!(addr = %connection.remote_address(), tries_left, "wrong pairing code");
            return stream::write_last(&mut send, &FromListener::WrongCode { tries_left }).await;
        }
        Judgement::Spent => return stream::write_last(&mut send, &FromListener::Spent).await,
    };
    let addr = reachable(&card, connection.remote_address().ip());
    let peer = Peer { name: card.name, fingerprint: joiner, addr };
    let mac = transcript.listener_mac(&window.key).into();
    let Window { me, outcome, .. } = window;
    let settled = settle(host, &me, mac, &peer, &mut send, &mut recv).await;
    // If nobody waits any more, the peer is stored or not all the same.
    let _ = outcome.send(settled.map(|()| peer));
    Ok(())
}

/// The part behind the right code.
async fn settle(
    host: &Host,
    me: &Card,
    mac: [u8; 32],
    peer: &Peer,
    send: &mut SendStream,
    recv: &mut RecvStream,
) -> Result<(), ListenError> {
    let broken = |source| ListenError::Broken { peer: peer.name.clone(), source };
    let clash = |source| ListenError::Clash { peer: peer.name.clone(), source };
    let fits = if me.name == peer.name {
        Err(ListenError::SameName(me.name.clone()))
    } else {
        host.peers.check(peer).map_err(clash)
    };
    if let Err(refusal) = fits {
        let reason = refusal.to_string();
        stream::write_last(send, &FromListener::Failed { reason }).await.map_err(broken)?;
        return Err(refusal);
    }
    stream::write(send, &FromListener::Proof { mac, card: me.clone() }).await.map_err(broken)?;
    match stream::read(recv).await.map_err(broken)? {
        FromJoiner::Agreed => {}
        FromJoiner::Declined { reason } => {
            return Err(ListenError::Declined { peer: peer.name.clone(), reason });
        }
        FromJoiner::Hello { .. } | FromJoiner::Proof { .. } => return Err(broken(MessageError::Unexpected)),
    }
    if let Err(source) = host.peers.add(peer.clone()) {
        let reason = source.to_string();
        stream::write_last(send, &FromListener::Failed { reason }).await.map_err(broken)?;
        return Err(clash(source));
    }
    // Stored is stored, whether or not the joiner hears of it.
    if let Err(e) = stream::write_last(send, &FromListener::Stored).await {
        tracing::warn!(peer = %peer.name, "the joiner may not know that the pairing is done: {e}");
    }
    Ok(())
}
