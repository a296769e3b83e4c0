//! A link that is cut and healed under two hosts that go on living.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use standin::{
    ha::Message,
    model::Term,
    transport::{Channel, Peer, endpoint::ConnectError},
    wire::message::{Datagram, EpochAnswer},
};
use tokio::{
    net::UdpSocket,
    task::{AbortHandle, JoinSet},
};

use crate::{
    Host, SOON, bind,
    epoch::{ID, batch, begin, drain, manifest},
    paired, rebind, soon,
};

/// A relay to one target that can be made to swallow everything, or each so many'th packet. As behind a NAT, each socket
/// that dials has one of the relay's.
struct Link {
    addr: SocketAddr,
    up: Arc<AtomicBool>,
    relay: AbortHandle,
}

impl Link {
    async fn to(target: SocketAddr) -> Self {
        Self::losing(target, usize::MAX).await
    }

    async fn losing(target: SocketAddr, each: usize) -> Self {
        let near = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let (addr, up) = (near.local_addr().unwrap(), Arc::new(AtomicBool::new(true)));
        let is_up = up.clone();
        let relay = tokio::spawn(async move {
            let (mut buffer, mut fars, mut passed) = (vec![0; 65_536], HashMap::new(), 0);
            let mut backs = JoinSet::new();
            loop {
                // Errors are those of ICMP: what a link does not tell either.
                let Ok((len, from)) = near.recv_from(&mut buffer).await else { continue };
                if let Entry::Vacant(place) = fars.entry(from) {
                    let far = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                    place.insert(far.clone());
                    backs.spawn(relay_back(far, near.clone(), from, is_up.clone()));
                }
                passed += 1;
                if is_up.load(Ordering::Relaxed) && passed % each != 0 {
                    let _ = fars[&from].send_to(&buffer[..len], target).await;
                }
            }
        });
        Self { addr, up, relay: relay.abort_handle() }
    }

    fn set(&self, up: bool) {
        self.up.store(up, Ordering::Relaxed);
    }
}

async fn relay_back(far: Arc<UdpSocket>, near: Arc<UdpSocket>, dialer: SocketAddr, is_up: Arc<AtomicBool>) {
    let mut buffer = vec![0; 65_536];
    loop {
        if let Ok((len, _)) = far.recv_from(&mut buffer).await
            && is_up.load(Ordering::Relaxed)
        {
            let _ = near.send_to(&buffer[..len], dialer).await;
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.relay.abort();
    }
}

fn heartbeat(seq: u64) -> Datagram {
    let message = Message::Heartbeat { term: Term(1), seq, sent_at: Duration::ZERO };
    Datagram { name: "db".parse().unwrap(), message }
}

#[tokio::test]
async fn a_link_that_heals_is_used_at_once() {
    let (a, b) = paired();
    let link = Link::to(b.addr()).await;
    let mut through = b.as_peer("b");
    through.addr = link.addr;
    a.endpoint.peers().add(through).unwrap();
    let name = "b".parse().unwrap();
    let old = soon(a.endpoint.connect(&name, Channel::Lease)).await.unwrap();
    let old_accepted = soon(b.endpoint.accept()).await.unwrap();

    link.set(false);
    let cut = Instant::now();
    while cut.elapsed() < Duration::from_secs(2) {
        let lost = soon(a.endpoint.connect(&name, Channel::Lease)).await.unwrap_err();
        assert!(matches!(lost, ConnectError::Timeout { .. }), "{lost}");
        old.send_datagram(&heartbeat(0)).unwrap();
    }

    // A connection that was begun anew is there at once, whatever the old one makes of it.
    link.set(true);
    let healed = Instant::now();
    let new = soon(a.endpoint.connect(&name, Channel::Lease)).await.unwrap();
    assert!(healed.elapsed() < Duration::from_millis(500), "{:?}", healed.elapsed());
    let new_accepted = soon(b.endpoint.accept()).await.unwrap();
    new.send_datagram(&heartbeat(1)).unwrap();
    assert_eq!(soon(new_accepted.recv_datagram()).await.unwrap(), heartbeat(1));

    // Cut for good, both ends clear the dead connections away.
    link.set(false);
    let dead = [&old, &old_accepted, &new, &new_accepted];
    for connection in dead {
        soon(connection.closed()).await;
    }
    assert!(dead.iter().all(|connection| connection.is_closed()));
}

#[test]
fn a_peer_that_was_killed_and_is_back_is_noticed_at_once() {
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    // A life of its own, as a process has: when it ends, nothing in it says good-bye. What the library says all the same
    // is lost on the way.
    let (here, life) = (runtime(), runtime());
    let dir = tempfile::tempdir().unwrap();
    let a = here.block_on(async { Host::new() });
    let (endpoint, addr) = life.block_on(async {
        let endpoint = bind(dir.path(), (Ipv4Addr::LOCALHOST, 0).into());
        let addr = endpoint.local_addr().unwrap();
        (endpoint, addr)
    });
    endpoint.peers().add(a.as_peer("a")).unwrap();
    let link = here.block_on(Link::to(addr));
    let b = Peer { name: "b".parse().unwrap(), fingerprint: endpoint.fingerprint(), addr: link.addr };
    a.endpoint.peers().add(b.clone()).unwrap();
    let connect = |channel| here.block_on(soon(a.endpoint.connect(&b.name, channel))).unwrap();
    let (lease, bulk) = (connect(Channel::Lease), connect(Channel::Bulk));
    link.set(false);
    life.shutdown_background();
    drop(endpoint);

    here.block_on(async {
        let _back = rebind(dir.path(), addr).await;
        link.set(true);
        let back = Instant::now();
        lease.send_datagram(&heartbeat(1)).unwrap();
        soon(lease.closed()).await;
        assert!(back.elapsed() < Duration::from_millis(500), "{:?}", back.elapsed());
        // Bulk's next packet is a keep-alive.
        soon(bulk.closed()).await;
        assert!(back.elapsed() < Duration::from_secs(3), "{:?}", back.elapsed());
    });
}

#[tokio::test]
async fn an_epoch_arrives_whole_over_a_link_that_loses_packets() {
    let (a, b) = paired();
    let link = Link::losing(b.addr(), 100).await;
    let mut through = b.as_peer("b");
    through.addr = link.addr;
    a.endpoint.peers().add(through).unwrap();
    let from = soon(a.endpoint.connect(&"b".parse().unwrap(), Channel::Bulk)).await.unwrap();
    let to = soon(b.endpoint.accept()).await.unwrap();
    let send = async {
        let mut sender = from.send_epoch().await.unwrap();
        sender.frame(&begin(), Vec::new()).await.unwrap();
        for number in 0..16 {
            let (head, body) = batch(number);
            sender.frame(&head, body).await.unwrap();
        }
        sender.frame(&manifest(16), Vec::new()).await.unwrap();
        sender.finish(SOON).await.unwrap()
    };
    let receive = async {
        let mut epoch = to.accept_epoch().await.unwrap();
        assert_eq!(drain(&mut epoch).await.unwrap().len(), 18);
        epoch.answer(&EpochAnswer::Committed { id: ID, busy_us: 0 }).await.unwrap();
    };
    let (answer, ()) = soon(Box::pin(async { tokio::join!(send, receive) })).await;
    assert_eq!(answer, EpochAnswer::Committed { id: ID, busy_us: 0 });
}
