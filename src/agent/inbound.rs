//! What peers say to us: requests and datagrams on lease connections, epochs on bulk connections.

use std::sync::Arc;

use super::{Agent, arrival, mailbox::Msg, receiving};
use crate::{
    transport::{Channel, Connection},
    wire::message::{Reply, Request},
};

/// Accepts connections until the endpoint closes.
pub(super) async fn serve(agent: Arc<Agent>) {
    while let Some(connection) = agent.endpoint.accept().await {
        let agent = Arc::clone(&agent);
        tokio::spawn(async move {
            match connection.channel() {
                Channel::Lease => serve_lease(agent, connection).await,
                Channel::Bulk => serve_bulk(agent, connection).await,
                Channel::Supply => arrival::serve(agent, connection).await,
            }
        });
    }
}

/// Serves a lease connection until it ends.
pub(super) async fn serve_lease(agent: Arc<Agent>, connection: Connection) {
    let datagrams = async {
        while let Ok(datagram) = connection.recv_datagram().await {
            if let Some(owner) = agent.owner_for(&datagram.name, connection.peer()) {
                let via = connection.clone();
                // A queue that is full loses a heartbeat, as a network would.
                let _ = owner.try_send(Msg::Lease { message: datagram.message, via });
            }
        }
    };
    let requests = async {
        while let Ok((request, responder)) = connection.accept_request().await {
            let agent = Arc::clone(&agent);
            let connection = connection.clone();
            tokio::spawn(async move {
                let reply = answer(&agent, &connection, request).await;
                if let Err(error) = responder.reply(&reply).await {
                    tracing::debug!(%error, peer = %connection.peer(), "a reply did not reach the peer");
                }
            });
        }
    };
    tokio::join!(datagrams, requests);
}

async fn answer(agent: &Arc<Agent>, connection: &Connection, request: Request) -> Reply {
    let peer = connection.peer();
    match request {
        Request::Offer { spec, term, resident_bytes } => {
            agent.offered(peer, *spec, term, resident_bytes).await
        }
        Request::Tell { name, message } => {
            let Some(owner) = agent.owner_for(&name, peer) else {
                return agent.unknown(&name, message);
            };
            let message = Msg::Lease { message, via: connection.clone() };
            if owner.send(message).await.is_err() {
                tracing::debug!(%name, "the workload's task has ended");
            }
            Reply::Done
        }
        Request::Examine(question) => {
            Reply::Examined(agent.examined(question, connection.remote_addr()).await)
        }
    }
}

async fn serve_bulk(agent: Arc<Agent>, connection: Connection) {
    while let Ok(receiver) = connection.accept_epoch().await {
        let agent = Arc::clone(&agent);
        connection.thread().spawn(async move {
            if let Err(error) = Box::pin(receiving::receive(&agent, receiver)).await {
                tracing::debug!(%error, "an epoch did not arrive");
            }
        });
    }
}
