//! HTTP over a Unix socket, one request a connection: to the agent's control socket, and to an engine's.

use std::{
    error::Error,
    io,
    path::Path,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes, Frame, Incoming},
};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;

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

/// A body that is handed over piece by piece. `None` is its end; should the other side go without that, the request breaks
/// off and is not taken for whole.
pub(crate) struct Pieces(pub(crate) mpsc::Receiver<Option<Bytes>>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(context).map(|piece| match piece {
            Some(Some(bytes)) => Some(Ok(Frame::data(bytes))),
            Some(None) => None,
            None => Some(Err(io::ErrorKind::BrokenPipe.into())),
        })
    }
}

async fn exchange(
    socket: &Path,
    method: &Method,
    path: &str,
    body: Vec<u8>,
) -> io::Result<(StatusCode, Bytes)> {
    let response = open(socket, method, path, ("application/json", Full::new(Bytes::from(body)))).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    Ok((status, body.map_err(io::Error::other)?.to_bytes()))
}

/// Sends a request whose body has a type, and returns the answer as it begins.
pub(crate) async fn open<B>(
    socket: &Path,
    method: &Method,
    path: &str,
    (content_type, body): (&str, B),
) -> io::Result<Response<Incoming>>
where
    B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
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
        .header("content-type", content_type)
        .body(body)
        .map_err(io::Error::other)?;
    sender.send_request(request).await.map_err(io::Error::other)
}
