//! Two agents' endpoints on loopback: real UDP, real TLS, real files.

mod channel;
mod epoch;
mod hostile;
mod inventory;
mod link;
mod pairing;
mod supply;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use standin::transport::{
    Channel, Connection, Endpoint, Identity, Peer, Peers,
    pairing::{Card, PAIRING_VALID_FOR},
};
use tempfile::TempDir;

/// Longer than anything on loopback takes, on a busy machine too.
const SOON: Duration = Duration::from_secs(20);

/// A host: its state directory and its endpoint.
struct Host {
    dir: TempDir,
    endpoint: Arc<Endpoint>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = bind(dir.path(), (Ipv4Addr::LOCALHOST, 0).into());
        Self { dir, endpoint }
    }

    fn addr(&self) -> SocketAddr {
        self.endpoint.local_addr().unwrap()
    }

    fn as_peer(&self, name: &str) -> Peer {
        Peer { name: name.parse().unwrap(), fingerprint: self.endpoint.fingerprint(), addr: self.addr() }
    }

    fn card(&self, name: &str) -> Card {
        let addr = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), self.addr().port());
        Card { name: name.parse().unwrap(), addr }
    }

    /// The same host after its agent was restarted, on the same port.
    async fn restart(self) -> Self {
        let addr = self.addr();
        self.endpoint.close().await;
        let Self { dir, endpoint } = self;
        drop(endpoint);
        let endpoint = rebind(dir.path(), addr).await;
        Self { dir, endpoint }
    }
}

fn bind(dir: &Path, addr: SocketAddr) -> Arc<Endpoint> {
    try_bind(dir, addr).unwrap()
}

fn try_bind(dir: &Path, addr: SocketAddr) -> Result<Arc<Endpoint>, standin::transport::endpoint::BindError> {
    let identity = Identity::load_or_create(dir).unwrap();
    let peers = Arc::new(Peers::load(dir).unwrap());
    Endpoint::bind(addr, identity, peers).map(Arc::new)
}

/// Binds a port that an endpoint of this process is just giving up (a restarted process has no such wait).
async fn rebind(dir: &Path, addr: SocketAddr) -> Arc<Endpoint> {
    for _ in 0..200 {
        if let Ok(endpoint) = try_bind(dir, addr) {
            return endpoint;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("port {addr} stays in use");
}

/// Two hosts, `a` and `b`, that trust each other.
fn paired() -> (Host, Host) {
    let (a, b) = (Host::new(), Host::new());
    a.endpoint.peers().add(b.as_peer("b")).unwrap();
    b.endpoint.peers().add(a.as_peer("a")).unwrap();
    (a, b)
}

/// The two ends of a connection.
struct Ends {
    from: Connection,
    to: Connection,
    _hosts: (Host, Host),
}

async fn ends(channel: Channel) -> Ends {
    let (a, b) = paired();
    let from = soon(a.endpoint.connect(&"b".parse().unwrap(), channel)).await.unwrap();
    let to = soon(b.endpoint.accept()).await.unwrap();
    assert_eq!(to.channel(), channel);
    Ends { from, to, _hosts: (a, b) }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("takes too long")
}

/// Pairs `joiner` with `listener` by a code.
async fn pair(listener: &Host, joiner: &Host) -> (Peer, Peer) {
    let window = listener.endpoint.open_pairing(listener.card("l"), PAIRING_VALID_FOR).unwrap();
    let code = window.code().to_string().parse().unwrap();
    let (joined, listened) = soon(async {
        tokio::join!(joiner.endpoint.join(listener.addr(), &code, joiner.card("j")), window.wait())
    })
    .await;
    (joined.unwrap(), listened.unwrap())
}
