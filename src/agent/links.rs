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
use crate::transport::{Channel, Connection, PeerName};

/// Time between two attempts to reach a peer.
const REDIAL_INTERVAL: Duration = Duration::from_millis(100);
/// A lease connection on which nothing arrived for so long is dialled anew.
const STALE_AFTER: Duration = Duration::from_secs(1);

/// The way to one peer.
#[derive(Clone)]
pub(super) struct Link {
    lease: watch::Receiver<Option<Connection>>,
    bulk: watch::Receiver<Option<Connection>>,
}

impl Link {
    /// The lease connection, if it stands.
    pub(super) fn lease(&self) -> Option<Connection> {
        self.lease.borrow().clone().filter(|connection| !connection.is_closed())
    }

    /// The bulk connection, if it stands.
    pub(super) fn bulk(&self) -> Option<Connection> {
        self.bulk.borrow().clone().filter(|connection| !connection.is_closed())
    }

    /// Waits until both stand.
    pub(super) async fn up(&mut self) {
        loop {
            if self.lease().is_some() && self.bulk().is_some() {
                return;
            }
            // The dialling task lives as long as the agent.
            let _ = tokio::time::timeout(REDIAL_INTERVAL, async {
                tokio::select! { _ = self.lease.changed() => {}, _ = self.bulk.changed() => {} }
            })
            .await;
        }
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
        let (lease_tx, lease) = watch::channel(None);
        let (bulk_tx, bulk) = watch::channel(None);
        tokio::spawn(keep(Arc::clone(agent), peer.clone(), Channel::Lease, lease_tx));
        tokio::spawn(keep(Arc::clone(agent), peer.clone(), Channel::Bulk, bulk_tx));
        let link = Link { lease, bulk };
        links.insert(peer.clone(), link.clone());
        link
    }
}

/// Keeps one connection dialled.
async fn keep(
    agent: Arc<Agent>,
    peer: PeerName,
    channel: Channel,
    publish: watch::Sender<Option<Connection>>,
) {
    let mut reported = false;
    loop {
        match agent.endpoint.connect(&peer, channel).await {
            Ok(connection) => {
                if channel == Channel::Lease {
                    tracing::info!(%peer, "connected");
                }
                reported = false;
                publish.send_replace(Some(connection.clone()));
                if channel == Channel::Lease {
                    let served =
                        tokio::spawn(super::inbound::serve_lease(Arc::clone(&agent), connection.clone()));
                    until_dead(&connection).await;
                    served.abort();
                } else {
                    connection.closed().await;
                }
                connection.close();
                publish.send_replace(None);
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

/// Waits until a connection is closed, or silent for so long that a new one is the better bet: after a cut, QUIC's
/// back-off can be longer than the cut was.
async fn until_dead(connection: &Connection) {
    let mut ticks = tokio::time::interval(STALE_AFTER);
    let mut seen = 0;
    let mut silent = 0;
    loop {
        tokio::select! {
            _ = connection.closed() => return,
            _ = ticks.tick() => {}
        }
        let received = connection.received();
        silent = if received == seen { silent + 1 } else { 0 };
        seen = received;
        if silent >= 2 {
            return;
        }
    }
}
