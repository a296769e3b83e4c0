//! The end that receives.

use std::{
    io,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path as Dir,
    sync::Arc,
    thread,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::{prctl, signal::Signal},
};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use standin::{
    ha::Message,
    transport::{Channel, Connection, EpochReceiver, prompt_runtime},
    wire::message::{Datagram, EpochAnswer},
};

use crate::{
    HEARTBEAT_LEN, QUIC_PORT, Result, SERVE_IP, TCP_PORT, TLS_PORT, bind,
    carried::{self, ID, ReadWrite},
    ip,
};

pub(crate) fn serve(dir: &Dir, own_net: bool) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let mut stdin = io::stdin().lines();
    if own_net {
        unshare(CloneFlags::CLONE_NEWNET)?;
        println!("net");
        stdin.next();
        ip("link set lo up")?;
        ip(&format!("addr add {SERVE_IP}/30 dev serve"))?;
        ip("link set serve up")?;
    }
    let tls = Arc::new(carried::tls_server(dir)?);
    for (port, tls) in [(TCP_PORT, None), (TLS_PORT, Some(tls))] {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let tls = tls.clone();
                thread::spawn(move || serve_tcp(stream, tls));
            }
        });
    }
    let runtime = prompt_runtime()?;
    let endpoint = runtime.block_on(async { bind(&dir.join("serve"), QUIC_PORT) })?;
    runtime.spawn(async move {
        while let Some(connection) = endpoint.accept().await {
            match connection.channel() {
                Channel::Lease => drop(tokio::spawn(answer_heartbeats(connection))),
                Channel::Bulk => drop(connection.thread().clone().spawn(async move {
                    while let Ok(receiver) = connection.accept_epoch().await {
                        take_epoch(receiver).await.expect("an epoch arrives whole");
                    }
                })),
                // Not measured.
                Channel::Supply => {}
            }
        }
    });
    println!("ready");
    // Until the parent ends.
    stdin.next();
    Ok(())
}

async fn answer_heartbeats(connection: Connection) {
    while let Ok(Datagram { name, message }) = connection.recv_datagram().await {
        if let Message::Heartbeat { term, seq, sent_at } = message {
            let message = Message::Ack { term, seq, sent_at, granted: true };
            // The peer may have closed it.
            let _ = connection.send_datagram(&Datagram { name, message });
        }
    }
}

async fn take_epoch(mut receiver: EpochReceiver) -> Result<()> {
    while receiver.next_frame().await?.is_some() {}
    Ok(receiver.answer(&EpochAnswer::Committed { id: ID, busy_us: 0 }).await?)
}

/// Serves a TCP connection: its first byte says what it is for.
fn serve_tcp(stream: TcpStream, tls: Option<Arc<ServerConfig>>) -> Result<()> {
    stream.set_nodelay(true)?;
    match tls {
        None => serve_stream(stream),
        Some(config) => serve_stream(StreamOwned::new(ServerConnection::new(config)?, stream)),
    }
}

fn serve_stream(mut stream: impl ReadWrite) -> Result<()> {
    let mut purpose = [0];
    stream.read_exact(&mut purpose)?;
    if purpose == *b"B" {
        return carried::read_epochs(&mut stream);
    }
    loop {
        let mut heartbeat = [0; HEARTBEAT_LEN];
        stream.read_exact(&mut heartbeat)?;
        stream.write_all(&heartbeat)?;
        stream.flush()?;
    }
}
