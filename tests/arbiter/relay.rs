//! A way to etcd on which bytes can be held up.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

pub(crate) struct Relay {
    addr: SocketAddr,
    held: watch::Sender<bool>,
    /// Bytes that came from clients so far.
    come: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

impl Relay {
    pub(crate) async fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (held, hold) = watch::channel(false);
        let (count, come) = watch::channel(0);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                tokio::spawn(carry(from_client, to_server, hold.clone(), Some(count.clone())));
                tokio::spawn(carry(from_server, to_client, hold.clone(), None));
            }
        });
        Self { addr, held, come, task }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// From now on nothing arrives; what was sent does when it is let go, also if its sender is gone.
    pub(crate) fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    pub(crate) fn come(&self) -> usize {
        *self.come.borrow()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut hold: watch::Receiver<bool>,
    count: Option<watch::Sender<usize>>,
) {
    let mut bytes = vec![0; 16 << 10];
    while let Ok(len @ 1..) = from.read(&mut bytes).await {
        if let Some(count) = &count {
            count.send_modify(|come| *come += len);
        }
        if hold.wait_for(|held| !held).await.is_err() || to.write_all(&bytes[..len]).await.is_err() {
            return;
        }
    }
}
