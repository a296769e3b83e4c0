//! The commands' side of the control socket.

use std::{path::Path, time::Duration};

use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, body::Bytes};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};

use super::Failure;
use crate::agent::api::{ErrorBody, ErrorCode};

/// Asks the agent and waits for its answer, as long as it takes.
pub(super) fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, Failure> {
    call(socket, Method::GET, path, &serde_json::Value::Null)
}

/// Tells the agent to do something.
pub(super) fn post<B: Serialize, T: DeserializeOwned>(
    socket: &Path,
    path: &str,
    body: &B,
) -> Result<T, Failure> {
    call(socket, Method::POST, path, body)
}

/// Tells the agent to forget something.
pub(super) fn delete<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, Failure> {
    call(socket, Method::DELETE, path, &serde_json::Value::Null)
}

fn call<B: Serialize, T: DeserializeOwned>(
    socket: &Path,
    method: Method,
    path: &str,
    body: &B,
) -> Result<T, Failure> {
    let bytes = if method == Method::POST {
        serde_json::to_vec(body).map_err(anyhow::Error::from)?
    } else {
        Vec::new()
    };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(anyhow::Error::from)?;
    let (status, answer) = runtime.block_on(exchange(socket, method, path, bytes))?;
    if status.is_success() {
        return serde_json::from_slice(&answer).map_err(|error| {
            Failure::new(
                ErrorCode::Failed,
                format!("the agent's answer cannot be read ({error}): is it another version?"),
            )
        });
    }
    Err(match serde_json::from_slice::<ErrorBody>(&answer) {
        Ok(body) => Failure::new(body.code, body.error),
        Err(_) => Failure::new(ErrorCode::Failed, format!("the agent answered {status}")),
    })
}

async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<(hyper::StatusCode, Bytes), Failure> {
    let unreachable = |error: &dyn std::fmt::Display| {
        Failure::new(
            ErrorCode::Unreachable,
            format!(
                "the agent cannot be reached on {}: {error}; start it with `standin agent`, or name its socket with --socket",
                socket.display()
            ),
        )
    };
    let connect = tokio::net::UnixStream::connect(socket);
    let stream = tokio::time::timeout(Duration::from_secs(5), connect)
        .await
        .map_err(|_| unreachable(&"it does not accept connections"))?
        .map_err(|error| unreachable(&error))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| unreachable(&error))?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "standin")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(anyhow::Error::from)?;
    let response = sender.send_request(request).await.map_err(|error| unreachable(&error))?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|error| unreachable(&error))?.to_bytes();
    Ok((status, body))
}
