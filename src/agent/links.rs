//! Connections to peers: one task a peer keeps a lease and a bulk connection dialled for as long as a workload needs them.
//!
//! Each agent dials and sends on its own connections; what comes in on them and on accepted ones is treated alike.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

use super::Agent;
use crate::transport::{Channel, Connection, PeerName, endpoint::ConnectError};

/// Time between two attempts to reach a peer.
const REDIAL_INTERVAL: Duration = Duration::from_millis(100);
/// A lease connection on which nothing arrived in two such intervals is dialled anew, and the bulk connection with it.
const STALE_INTERVAL: Duration = Duration::from_millis(500);

/// The two connections to a peer.
#[derive(Clone)]
struct Ways {
    lease: Connection,
    bulk: Connection,
}

/// The way to one peer.
#[derive(Clone)]
pub(super) struct Link {
    ways: watch::Receiver<Option<Ways>>,
}

impl Link {
    /// The lease connection, if it stands.
    pub(super) fn lease(&self) -> Option<Connection> {
        self.ways.borrow().as_ref().map(|ways| ways.lease.clone()).filter(|lease| !lease.is_closed())
    }

    /// The bulk connection, if it stands.
    pub(super) fn bulk(&self) -> Option<Connection> {
        self.ways.borrow().as_ref().map(|ways| ways.bulk.clone()).filter(|bulk| !bulk.is_closed())
    }

    /// Waits until both stand.
    pub(super) async fn up(&mut self) {
        // The dialling task, and with it the sender, lives as long as the agent.
        let _ = self.ways.wait_for(Option::is_some).await;
    }
}

/// All links.
#[derive(Default)]
pub(super) struct Links {
    links: Mutex<HashMap<PeerName, Link>>,
}

impl Links {
    /// The link to a peer, dialled from now on.
    pub(super) fn to(&self, agent: &Arc<Agent>, peer: &PeerName) -> Link {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.get(peer) {
            return link.clone();
        }
        let (publish, ways) = watch::channel(None);
        tokio::spawn(keep(Arc::clone(agent), peer.clone(), publish));
        let link = Link { ways };
        links.insert(peer.clone(), link.clone());
        link
    }
}

/// Keeps both connections dialled. They live and die together: what ends the one (a host that was cut off or started
/// again) has ended the other too, and QUIC would take many seconds to notice on a connection that only waits.
async fn keep(agent: Arc<Agent>, peer: PeerName, publish: watch::Sender<Option<Ways>>) {
    let mut reported = false;
    loop {
        match dial(&agent, &peer).await {
            Ok(ways) => {
                tracing::info!(%peer, "connected");
                reported = false;
                let served =
                    tokio::spawn(super::inbound::serve_lease(Arc::clone(&agent), ways.lease.clone()));
                publish.send_replace(Some(ways.clone()));
                tokio::select! {
                    () = until_dead(&ways.lease) => {}
                    _ = ways.bulk.closed() => {}
                }
                publish.send_replace(None);
                served.abort();
                ways.lease.close();
                ways.bulk.close();
                tracing::info!(%peer, "disconnected");
            }
            Err(error) if !reported => {
                tracing::warn!(%peer, %error, "the peer cannot be reached");
                reported = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(REDIAL_INTERVAL).await;
    }
}

async fn dial(agent: &Agent, peer: &PeerName) -> Result<Ways, ConnectError> {
    let lease = agent.endpoint.connect(peer, Channel::Lease).await?;
    let bulk = agent.endpoint.connect(peer, Channel::Bulk).await?;
    Ok(Ways { lease, bulk })
}

/// Waits until a connection is closed, or silent for so long that a new one is the better bet: after a cut, QUIC's
/// back-off can be longer than the cut was. A lease connection that lives is never silent: it is kept alive.
async fn until_dead(connection: &Connection) {
    let mut ticks = tokio::time::interval(STALE_INTERVAL);
    let (mut seen, mut silent) = (0, 0);
    loop {
        tokio::select! {
            _ = connection.closed() => return,
            _ = ticks.tick() => {}
        }
        let received = connection.received();
        silent = if received == seen { silent + 1 } else { 0 };
        seen = received;
        if silent > 2 {
            return;
        }
    }
}
