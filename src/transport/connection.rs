//! One channel to one peer: requests with replies, and datagrams. Either end may ask.

use std::{net::SocketAddr, time::Duration};

use quinn::{ConnectionError, RecvStream, SendDatagramError, SendStream};
use tokio::{
    runtime::Handle,
    time::{error::Elapsed, timeout},
};

use super::{
    Channel, CloseCode, PeerName,
    stream::{self, MessageError},
    tuning,
};
use crate::wire::{
    codec::{self, CodecError},
    message::{Datagram, Reply, Request},
};

/// The longest that a peer may take to send a request whose stream it has opened.
const REQUEST_ARRIVES_WITHIN: Duration = Duration::from_secs(5);

/// A connection to a peer whose identity is proven. Clones are the same connection; it closes with the last.
#[derive(Clone, Debug)]
pub struct Connection {
    inner: quinn::Connection,
    peer: PeerName,
    channel: Channel,
    thread: Handle,
}

/// Why a request has no reply. Whether the peer acted on it is then unknown.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// No stream could be opened.
    #[error("the connection to {peer} is lost ({source}): it is made anew as soon as the peer answers")]
    Lost {
        /// The peer.
        peer: PeerName,
        /// How.
        source: ConnectionError,
    },
    /// The exchange broke.
    #[error("request to {peer}: {source}")]
    Broken {
        /// The peer.
        peer: PeerName,
        /// Where.
        source: MessageError,
    },
    /// No reply in time.
    #[error("{peer} did not answer within {} ms: see whether its agent is busy or its host stalled", within.as_millis())]
    Timeout {
        /// The peer.
        peer: PeerName,
        /// The time it had.
        within: Duration,
    },
}

/// Why a datagram was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum DatagramError {
    /// It has no encoding.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The connection does not take it.
    #[error("datagram to {peer}: {source}")]
    Send {
        /// The peer.
        peer: PeerName,
        /// Why.
        source: SendDatagramError,
    },
    /// The connection is gone.
    #[error("the connection to {peer} is lost ({source}): it is made anew as soon as the peer answers")]
    Lost {
        /// The peer.
        peer: PeerName,
        /// How.
        source: ConnectionError,
    },
}

impl Connection {
    pub(super) fn new(inner: quinn::Connection, peer: PeerName, channel: Channel, thread: Handle) -> Self {
        Self { inner, peer, channel, thread }
    }

    /// The other end.
    pub fn peer(&self) -> &PeerName {
        &self.peer
    }

    /// What the connection is for.
    pub fn channel(&self) -> Channel {
        self.channel
    }

    /// Where QUIC drives it. What sends or takes epochs belongs there too: it is much work, and nothing else waits for it.
    pub fn thread(&self) -> &Handle {
        &self.thread
    }

    /// The address that the peer is seen at.
    pub fn remote_addr(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// Current estimate of the round-trip time.
    pub fn rtt(&self) -> Duration {
        self.inner.rtt()
    }

    /// Packets received on it so far: one that stays the same is a connection on which nothing arrives.
    pub fn received(&self) -> u64 {
        self.inner.stats().udp_rx.datagrams
    }

    /// The largest UDP payload that is known to arrive at the peer.
    pub fn payload_max(&self) -> u16 {
        self.inner.stats().path.current_mtu
    }

    /// Tells the peer that the connection is over.
    pub fn close(&self) {
        self.inner.close(CloseCode::Done.into(), b"closed");
    }

    /// Whether it is over.
    pub fn is_closed(&self) -> bool {
        self.inner.close_reason().is_some()
    }

    /// Waits until it is over.
    pub async fn closed(&self) -> ConnectionError {
        self.inner.closed().await
    }

    /// Asks the peer and waits for its reply.
    pub async fn request(&self, request: &Request, within: Duration) -> Result<Reply, RequestError> {
        let exchange = async {
            let peer = || self.peer.clone();
            let (mut send, mut recv) =
                self.open_bi().await.map_err(|source| RequestError::Lost { peer: peer(), source })?;
            let broken = |source| RequestError::Broken { peer: peer(), source };
            stream::write_last(&mut send, request).await.map_err(broken)?;
            stream::read_last(&mut recv).await.map_err(broken)
        };
        let late = |_: Elapsed| RequestError::Timeout { peer: self.peer.clone(), within };
        timeout(within, exchange).await.map_err(late)?
    }

    /// Waits for the peer's next request; `Err` only when the connection is over. What the peer garbles is
    /// logged and its stream reset. A request is lost if this is dropped while it waits, so it is called from
    /// a task of its own.
    pub async fn accept_request(&self) -> Result<(Request, Responder), ConnectionError> {
        loop {
            let (send, mut recv) = self.accept_bi().await?;
            let responder = Responder { send, answered: false };
            match timeout(REQUEST_ARRIVES_WITHIN, stream::read_last(&mut recv)).await {
                Ok(Ok(request)) => return Ok((request, responder)),
                Ok(Err(e)) => tracing::warn!(peer = %self.peer, "request refused: {e}"),
                Err(_) => tracing::warn!(peer = %self.peer, "a request did not arrive whole in time"),
            }
        }
    }

    /// Sends a datagram, which may be lost. When they pile up, the oldest are dropped.
    pub fn send_datagram(&self, datagram: &Datagram) -> Result<(), DatagramError> {
        let bytes = codec::encode_datagram(datagram)?;
        self.inner
            .send_datagram(bytes.into())
            .map_err(|source| DatagramError::Send { peer: self.peer.clone(), source })
    }

    /// Waits for the next datagram. What is no datagram of ours is logged and skipped.
    pub async fn recv_datagram(&self) -> Result<Datagram, DatagramError> {
        loop {
            let lost = |source| DatagramError::Lost { peer: self.peer.clone(), source };
            let bytes = self.inner.read_datagram().await.map_err(lost)?;
            match codec::decode_datagram(&bytes) {
                Ok(datagram) => return Ok(datagram),
                Err(e) => tracing::warn!(peer = %self.peer, "datagram refused: {e}"),
            }
        }
    }

    /// Fits what an epoch may have on its way to the way's length.
    pub(super) fn fit_send_window(&self) {
        self.inner.set_send_window(tuning::send_window(self.inner.rtt()));
    }

    pub(super) async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        self.inner.open_bi().await
    }

    pub(super) async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        self.inner.accept_bi().await
    }
}

/// The right to answer one request. Dropped without an answer, it tells the peer that there is none.
#[derive(Debug)]
pub struct Responder {
    send: SendStream,
    answered: bool,
}

impl Responder {
    /// Sends the reply.
    pub async fn reply(mut self, reply: &Reply) -> Result<(), MessageError> {
        stream::write_last(&mut self.send, reply).await?;
        self.answered = true;
        Ok(())
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.answered {
            // quinn would end the stream as if all had been said. An error means that it is closed already.
            let _ = self.send.reset(CloseCode::Abandoned.into());
        }
    }
}
