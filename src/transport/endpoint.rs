//! The agent's UDP port: dials peers, and lets in whom it may.
//!
//! ```text
//!   Incoming ─► handshake (≤ 2 s) ─┬─ lease | bulk | supply, a peer ► welcome ──► accept()
//!                                  ├─ pairing, a code is open ─► pairing
//!                                  └─ anything else ──► closed, nothing read or written
//! ```
//!
//! In TLS 1.3 the dialer believes the handshake over before the acceptor has looked at its certificate. So
//! the acceptor sends one *welcome* byte when it has, and [`Endpoint::connect`] waits for it: what it returns
//! is a connection that the peer has accepted.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use quinn::{
    ClientConfig, ConnectionError, Incoming, ServerConfig, TokioRuntime, TransportConfig, TransportErrorCode,
};
use quinn_proto::{ConnectionIdGenerator, RandomConnectionIdGenerator};
use tokio::{
    runtime::Handle,
    sync::{Mutex, mpsc},
    task::{AbortHandle, JoinSet},
    time::timeout,
};

use super::{
    Channel, CloseCode, Connection, Fingerprint, Identity, PAIRING_ALPN, Peer, PeerName, Peers,
    lane::Lane,
    pairing::{self, window::Gate},
    socket::{Ids, Sockets},
    tls::{self, TlsError},
    tuning,
};

/// The longest that [`Endpoint::connect`] takes. The caller tries again; after a cut, the first attempt that
/// begins when the link is back succeeds.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest that an accepted handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// Handshakes and pairings going on at once; more are refused.
const HANDSHAKES_MAX: usize = 64;
/// From this many on, a dialer must show that it can be reached at the address it claims.
const HANDSHAKES_BEFORE_RETRY: usize = 8;
/// Accepted connections that wait for [`Endpoint::accept`]; more are closed.
const ACCEPTED_MAX: usize = 16;
/// The longest that [`Endpoint::close`] waits for the peers to hear of it.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// Length of a connection's first id, which its dialer chooses.
const FIRST_ID_LEN: usize = 20;
/// The name that QUIC's API wants; it is not sent, and certificates are not judged by it.
pub(super) const SERVER_NAME: &str = "standin";

/// Why the port could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// No socket.
    #[error(
        "cannot open UDP port {addr}: {source}; is another agent running, or the address not of this host?"
    )]
    Socket {
        /// The address.
        addr: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The identity does not serve.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name is not in the list.
    #[error("no peer is named {0}: `standin pair --list` shows those that are")]
    Unknown(PeerName),
    /// Nobody answers.
    #[error(
        "{peer} did not answer at {addr} within {} ms: is its agent running, and UDP let through?",
        CONNECT_TIMEOUT.as_millis()
    )]
    Timeout {
        /// The peer.
        peer: PeerName,
        /// Its address.
        addr: SocketAddr,
    },
    /// Somebody else answers.
    #[error(
        "the host at {addr} is not the {peer} that was paired (another identity): if it was set up anew, \
         `standin pair --forget {peer}` and pair again; if not, find out who answers there"
    )]
    WrongIdentity {
        /// The peer.
        peer: PeerName,
        /// Its address.
        addr: SocketAddr,
    },
    /// The peer does not know us.
    #[error("{peer} at {addr} does not trust this host: pair the two again (`standin pair`)")]
    NotTrusted {
        /// The peer.
        peer: PeerName,
        /// Its address.
        addr: SocketAddr,
    },
    /// QUIC will not dial that.
    #[error("cannot dial {peer} at {addr}: {source}")]
    Dial {
        /// The peer.
        peer: PeerName,
        /// Its address.
        addr: SocketAddr,
        /// Why.
        source: quinn::ConnectError,
    },
    /// It broke.
    #[error("the connection to {peer} at {addr} broke while it was made: {source}")]
    Broken {
        /// The peer.
        peer: PeerName,
        /// Its address.
        addr: SocketAddr,
        /// How.
        source: ConnectionError,
    },
    /// The identity does not serve.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// The UDP port. Dropped, it accepts no more; connections live on until they are dropped.
#[derive(Debug)]
pub struct Endpoint {
    /// Of leases and pairings; see [`Sockets`] for the other two.
    pub(super) socket: quinn::Endpoint,
    bulk: quinn::Endpoint,
    bulk_dialing: quinn::Endpoint,
    pub(super) host: Arc<Host>,
    accepted: Mutex<mpsc::Receiver<Connection>>,
    acceptors: [AbortHandle; 2],
}

/// What the tasks of an endpoint share.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) identity: Identity,
    pub(super) peers: Arc<Peers>,
    pub(super) gate: Arc<Gate>,
    bulk_thread: Handle,
}

impl Host {
    fn connection(&self, connection: quinn::Connection, peer: PeerName, channel: Channel) -> Connection {
        let thread = match channel {
            Channel::Lease => Handle::current(),
            Channel::Bulk | Channel::Supply => self.bulk_thread.clone(),
        };
        Connection::new(connection, peer, channel, thread)
    }
}

impl Endpoint {
    /// Opens the port and begins to accept. Needs a tokio runtime.
    pub fn bind(addr: SocketAddr, identity: Identity, peers: Arc<Peers>) -> Result<Self, BindError> {
        let gate = Arc::new(Gate::default());
        let tls = tls::server(&identity, peers.clone(), gate.clone())?;
        let mut config = ServerConfig::with_crypto(Arc::new(tls));
        config.transport_config(Arc::new(tuning::acceptor())).max_incoming(HANDSHAKES_MAX);
        let error = |source| BindError::Socket { addr, source };
        let udp = Sockets::bind(addr).map_err(error)?;
        let lane = Lane::start().map_err(error)?;
        let open = |channel, config, udp, runtime: Arc<dyn quinn::Runtime>| {
            quinn::Endpoint::new(tuning::endpoint(&identity, channel), config, udp, runtime).map_err(error)
        };
        let lease = open(Channel::Lease, Some(config.clone()), udp.lease, Arc::new(TokioRuntime))?;
        let bulk = open(Channel::Bulk, Some(config), udp.bulk, lane.clone())?;
        let bulk_dialing = open(Channel::Bulk, None, udp.bulk_dialing, lane.clone())?;
        let host = Arc::new(Host { identity, peers, gate, bulk_thread: lane.handle().clone() });
        let (sender, accepted) = mpsc::channel(ACCEPTED_MAX);
        let acceptors = [&lease, &bulk].map(|socket| {
            tokio::spawn(accept_all(socket.clone(), host.clone(), sender.clone())).abort_handle()
        });
        Ok(Self { socket: lease, bulk, bulk_dialing, host, accepted: Mutex::new(accepted), acceptors })
    }

    /// The address that the port is bound to.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// What peers know this host by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.host.identity.fingerprint()
    }

    /// Whom this host trusts.
    pub fn peers(&self) -> &Peers {
        &self.host.peers
    }

    /// Dials a peer; at most [`CONNECT_TIMEOUT`].
    pub async fn connect(&self, name: &PeerName, channel: Channel) -> Result<Connection, ConnectError> {
        let peer = self.host.peers.by_name(name).ok_or_else(|| ConnectError::Unknown(name.clone()))?;
        let mut config =
            self.client_config(Some(peer.fingerprint), channel.alpn(), tuning::dialer(channel))?;
        config.initial_dst_cid_provider(Arc::new(move || {
            Ids::new(RandomConnectionIdGenerator::new(FIRST_ID_LEN), channel).generate_cid()
        }));
        let socket = match channel {
            Channel::Lease => &self.socket,
            Channel::Bulk | Channel::Supply => &self.bulk_dialing,
        };
        let dialed = socket
            .connect_with(config, peer.addr, SERVER_NAME)
            .map_err(|source| ConnectError::Dial { peer: peer.name.clone(), addr: peer.addr, source })?;
        let welcomed = async {
            let connection = dialed.await?;
            let mut welcome = connection.accept_uni().await?;
            // Whatever the stream says or fails to say: if the peer refuses us, it closes the connection.
            let _ = welcome.read(&mut [0]).await;
            connection.close_reason().map_or(Ok(connection), Err)
        };
        match timeout(CONNECT_TIMEOUT, welcomed).await {
            Ok(Ok(connection)) => Ok(self.host.connection(connection, peer.name, channel)),
            Ok(Err(source)) => Err(not_connected(&peer, source)),
            Err(_) => Err(ConnectError::Timeout { peer: peer.name, addr: peer.addr }),
        }
    }

    /// Waits for the next connection that a peer has made. A peer that dials a channel again has lost the
    /// earlier connection; the caller drops that. `None` when the endpoint is closed.
    pub async fn accept(&self) -> Option<Connection> {
        self.accepted.lock().await.recv().await
    }

    /// Closes all connections and the port, and gives the peers a moment to hear of it.
    pub async fn close(&self) {
        self.acceptors.iter().for_each(AbortHandle::abort);
        let sockets = [&self.socket, &self.bulk, &self.bulk_dialing];
        for socket in sockets {
            socket.close(CloseCode::Done.into(), b"the agent stops");
        }
        let idle = async {
            for socket in sockets {
                socket.wait_idle().await;
            }
        };
        // Who does not hear of it finds out by silence.
        let _ = timeout(CLOSE_TIMEOUT, idle).await;
    }

    pub(super) fn client_config(
        &self,
        expected: Option<Fingerprint>,
        alpn: &[u8],
        transport: TransportConfig,
    ) -> Result<ClientConfig, TlsError> {
        let tls = tls::client(&self.host.identity, expected, alpn)?;
        let mut config = ClientConfig::new(Arc::new(tls));
        config.transport_config(Arc::new(transport));
        Ok(config)
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.acceptors.iter().for_each(AbortHandle::abort);
        // Without this quinn would go on to answer handshakes while a connection lives.
        self.socket.set_server_config(None);
        self.bulk.set_server_config(None);
    }
}

fn not_connected(peer: &Peer, source: ConnectionError) -> ConnectError {
    let (peer, addr) = (peer.name.clone(), peer.addr);
    match &source {
        ConnectionError::TransportError(e) if e.code == TransportErrorCode::crypto(tls::ALERT_NOT_PAIRED) => {
            ConnectError::WrongIdentity { peer, addr }
        }
        source
            if refused_as(source, tls::ALERT_NOT_PAIRED, CloseCode::NotPaired)
                || refused_as(source, tls::ALERT_SPENT, CloseCode::NotPaired) =>
        {
            ConnectError::NotTrusted { peer, addr }
        }
        ConnectionError::TimedOut => ConnectError::Timeout { peer, addr },
        _ => ConnectError::Broken { peer, addr, source },
    }
}

/// Whether the other end refused our certificate, in the handshake or right after it.
pub(super) fn refused_as(error: &ConnectionError, alert: u8, code: CloseCode) -> bool {
    match error {
        ConnectionError::ConnectionClosed(close) => close.error_code == TransportErrorCode::crypto(alert),
        ConnectionError::ApplicationClosed(close) => close.error_code == code.into(),
        _ => false,
    }
}

async fn accept_all(socket: quinn::Endpoint, host: Arc<Host>, accepted: mpsc::Sender<Connection>) {
    let mut handshakes = JoinSet::new();
    while let Some(incoming) = socket.accept().await {
        while handshakes.try_join_next().is_some() {}
        if handshakes.len() >= HANDSHAKES_MAX {
            incoming.refuse();
        } else if handshakes.len() >= HANDSHAKES_BEFORE_RETRY && incoming.may_retry() {
            // Fails only where `may_retry` is false.
            let _ = incoming.retry();
        } else {
            handshakes.spawn(admit(incoming, host.clone(), accepted.clone()));
        }
    }
}

async fn admit(incoming: Incoming, host: Arc<Host>, accepted: mpsc::Sender<Connection>) {
    let addr = incoming.remote_address();
    let connection = match timeout(HANDSHAKE_TIMEOUT, incoming).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(e)) => return tracing::debug!(%addr, "handshake refused: {e}"),
        Err(_) => return tracing::debug!(%addr, "handshake took too long"),
    };
    let alpn = tls::alpn_of(&connection).unwrap_or_default();
    let Some(fingerprint) = tls::fingerprint_of(&connection) else {
        return connection.close(CloseCode::NotPaired.into(), b"no certificate");
    };
    if alpn == PAIRING_ALPN {
        return pairing::listener::serve(connection, fingerprint, &host).await;
    }
    // A stranger gets this far while a pairing code is open, a peer that was removed during its handshake too.
    let (Some(channel), Some(peer)) = (Channel::from_alpn(&alpn), host.peers.by_fingerprint(&fingerprint))
    else {
        tracing::debug!(%addr, %fingerprint, "closed: not a peer");
        return connection.close(CloseCode::NotPaired.into(), b"not paired");
    };
    let Ok(place) = accepted.try_reserve() else {
        return connection.close(CloseCode::Busy.into(), b"too many connections");
    };
    tuning::fit(&connection, channel);
    let welcomed = async {
        let mut welcome = connection.open_uni().await?;
        welcome.write_all(&[1]).await?;
        Ok::<_, quinn::WriteError>(())
    };
    if let Ok(Ok(())) = timeout(HANDSHAKE_TIMEOUT, welcomed).await {
        place.send(host.connection(connection, peer.name, channel));
    } else {
        tracing::debug!(%addr, "lost before it was welcomed");
    }
}
