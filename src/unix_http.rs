//! HTTP over a Unix socket, one request a connection: to the agent's control socket, and to an engine's.

use std::{io, path::Path, time::Duration};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;

/// How long a listener may take to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// The longest answer that is taken.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Sends a request with a JSON body, and waits for the answer: as long as it takes, or up to the limit. Blocking; on a thread
/// of its own, so that it does not matter whether the caller's belongs to a runtime.
pub(crate) fn call(
    socket: &Path,
    method: &Method,
    path: &str,
    body: Vec<u8>,
    limit: Option<Duration>,
) -> io::Result<(StatusCode, Bytes)> {
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let exchange = exchange(socket, method, path, body);
            match limit {
                Some(limit) => tokio::time::timeout(limit, exchange).await?,
                None => exchange.await,
            }
        })
    };
    std::thread::scope(|scope| {
        scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

async fn exchange(
    socket: &Path,
    method: &Method,
    path: &str,
    body: Vec<u8>,
) -> io::Result<(StatusCode, Bytes)> {
    let connect = tokio::net::UnixStream::connect(socket);
    let stream = tokio::time::timeout(CONNECT_LIMIT, connect)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it does not accept connections"))??;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "localhost")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(io::Error::other)?;
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    Ok((status, body.map_err(io::Error::other)?.to_bytes()))
}
