//! The lease connection: who gets one, requests, datagrams, and coming back after a restart.

use std::time::{Duration, Instant};

use standin::{
    ha::Message,
    model::{Epoch, EpochId, Term},
    transport::{Channel, connection::RequestError, endpoint::ConnectError, pairing::PAIRING_VALID_FOR},
    wire::message::{Datagram, Reply, Request},
};

use crate::{Host, paired, soon};

fn inquiry() -> Request {
    Request::Tell { name: "db".parse().unwrap(), message: Message::Inquire { term: Term(3) } }
}

fn heartbeat(seq: u64) -> Datagram {
    let message = Message::Heartbeat { term: Term(3), seq, sent_at: Duration::from_nanos(1) };
    Datagram { name: "db".parse().unwrap(), message }
}

#[tokio::test]
async fn a_host_that_is_no_peer_gets_no_connection() {
    let (a, b) = (Host::new(), Host::new());
    a.endpoint.peers().add(b.as_peer("b")).unwrap();
    let name = "b".parse().unwrap();
    for channel in [Channel::Lease, Channel::Bulk] {
        let refused = soon(a.endpoint.connect(&name, channel)).await.unwrap_err();
        assert!(matches!(refused, ConnectError::NotTrusted { .. }), "{refused}");
    }
    // Nor while a pairing code is open, which lets strangers through the handshake.
    let window = b.endpoint.open_pairing(b.card("b"), PAIRING_VALID_FOR).unwrap();
    let refused = soon(a.endpoint.connect(&name, Channel::Lease)).await.unwrap_err();
    assert!(matches!(refused, ConnectError::NotTrusted { .. }), "{refused}");
    drop(window);
    let refused = soon(a.endpoint.connect(&name, Channel::Lease)).await.unwrap_err();
    assert!(matches!(refused, ConnectError::NotTrusted { .. }), "{refused}");
    tokio::time::timeout(Duration::from_millis(100), b.endpoint.accept()).await.unwrap_err();
}

#[tokio::test]
async fn a_host_in_a_peers_place_is_found_out() {
    let (a, b) = paired();
    let impostor = Host::new();
    impostor.endpoint.peers().add(a.as_peer("a")).unwrap();
    let mut claimed = b.as_peer("b");
    claimed.addr = impostor.addr();
    a.endpoint.peers().add(claimed).unwrap();
    let refused = soon(a.endpoint.connect(&"b".parse().unwrap(), Channel::Lease)).await.unwrap_err();
    assert!(matches!(refused, ConnectError::WrongIdentity { .. }), "{refused}");
}

#[tokio::test]
async fn a_removed_peer_does_not_come_back() {
    let (a, b) = paired();
    let name = "b".parse().unwrap();
    soon(a.endpoint.connect(&name, Channel::Lease)).await.unwrap();
    b.endpoint.peers().remove(&"a".parse().unwrap()).unwrap();
    let refused = soon(a.endpoint.connect(&name, Channel::Lease)).await.unwrap_err();
    assert!(matches!(refused, ConnectError::NotTrusted { .. }), "{refused}");
}

#[tokio::test]
async fn requests_are_answered_in_both_directions() {
    let (a, b) = paired();
    let dialed = soon(a.endpoint.connect(&"b".parse().unwrap(), Channel::Lease)).await.unwrap();
    let accepted = soon(b.endpoint.accept()).await.unwrap();
    let held = Some(EpochId { term: Term(3), epoch: Epoch(4) });
    let known = Reply::Accepted { held };
    for (asks, answers) in [(&dialed, &accepted), (&accepted, &dialed)] {
        let request = inquiry();
        let (reply, ()) = soon(async {
            tokio::join!(asks.request(&request, Duration::from_secs(5)), async {
                let (request, responder) = answers.accept_request().await.unwrap();
                assert_eq!(request, inquiry());
                responder.reply(&known).await.unwrap();
            })
        })
        .await;
        assert_eq!(reply.unwrap(), known);
    }
}

#[tokio::test]
async fn a_request_without_a_reply_fails_in_time() {
    let (a, b) = paired();
    let dialed = soon(a.endpoint.connect(&"b".parse().unwrap(), Channel::Lease)).await.unwrap();
    let accepted = soon(b.endpoint.accept()).await.unwrap();
    let late = soon(dialed.request(&inquiry(), Duration::from_millis(100))).await.unwrap_err();
    assert!(matches!(late, RequestError::Timeout { .. }), "{late}");
    // The stale request is served first; its answer goes nowhere. The next is dropped unanswered.
    let (_, responder) = soon(accepted.accept_request()).await.unwrap();
    let _ = responder.reply(&Reply::Done).await;
    let request = inquiry();
    let (reply, ()) = soon(async {
        tokio::join!(dialed.request(&request, Duration::from_secs(5)), async {
            drop(accepted.accept_request().await.unwrap());
        })
    })
    .await;
    assert!(matches!(reply, Err(RequestError::Broken { .. })), "{reply:?}");
}

#[tokio::test]
async fn datagrams_go_both_ways() {
    let (a, b) = paired();
    let dialed = soon(a.endpoint.connect(&"b".parse().unwrap(), Channel::Lease)).await.unwrap();
    let accepted = soon(b.endpoint.accept()).await.unwrap();
    for seq in 0..100 {
        let (from, to) = if seq % 2 == 0 { (&dialed, &accepted) } else { (&accepted, &dialed) };
        from.send_datagram(&heartbeat(seq)).unwrap();
        assert_eq!(soon(to.recv_datagram()).await.unwrap(), heartbeat(seq));
    }
}

#[tokio::test]
async fn a_peer_that_was_restarted_is_reached_again() {
    let (a, b) = paired();
    let name = "b".parse().unwrap();
    let first = soon(a.endpoint.connect(&name, Channel::Lease)).await.unwrap();
    let b = b.restart().await;
    soon(first.closed()).await;
    assert!(first.is_closed());
    assert!(first.send_datagram(&heartbeat(1)).is_err());
    let again = soon(a.endpoint.connect(&name, Channel::Lease)).await.unwrap();
    let accepted = soon(b.endpoint.accept()).await.unwrap();
    again.send_datagram(&heartbeat(2)).unwrap();
    assert_eq!(soon(accepted.recv_datagram()).await.unwrap(), heartbeat(2));
}

#[tokio::test]
async fn a_peer_that_is_away_is_given_up_in_time_and_found_when_it_is_back() {
    let (a, b) = paired();
    let name = "b".parse().unwrap();
    let addr = b.addr();
    let Host { dir, endpoint } = b;
    endpoint.close().await;
    drop(endpoint);
    let begun = Instant::now();
    let lost = soon(a.endpoint.connect(&name, Channel::Lease)).await.unwrap_err();
    assert!(matches!(lost, ConnectError::Timeout { .. }), "{lost}");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let _back = crate::rebind(dir.path(), addr).await;
    soon(a.endpoint.connect(&name, Channel::Lease)).await.unwrap();
}

#[tokio::test]
async fn a_name_without_a_peer_is_refused() {
    let a = Host::new();
    let unknown = soon(a.endpoint.connect(&"nobody".parse().unwrap(), Channel::Bulk)).await.unwrap_err();
    assert!(matches!(unknown, ConnectError::Unknown(_)), "{unknown}");
}
