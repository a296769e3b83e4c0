//! The control socket: HTTP/1.1 with JSON on a Unix socket that only root can open.

use std::{convert::Infallible, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixListener;

use super::{
    Agent,
    api::{ApiError, ErrorBody, ErrorCode},
};
use crate::model::Name;

/// Most bytes of a request's body.
const BODY_BYTES_MAX: usize = 1 << 20;

/// Opens the control socket, mode 0600, in place of one that a dead agent left behind.
pub(super) fn listen(path: &Path) -> std::io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(std::io::Error::new(
            std::io::ErrorKind::AddrInUse,
            format!(
                "an agent already answers on {}; stop it first, or give this one another run_dir",
                path.display()
            ),
        ));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves the control socket until the process ends.
pub(super) async fn serve(listener: UnixListener, agent: Arc<Agent>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the control socket could not accept a connection");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let agent = Arc::clone(&agent);
        tokio::spawn(async move {
            let service = service_fn(|request| answer(Arc::clone(&agent), request));
            // A client that goes away in the middle is its own business.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(agent: Arc<Agent>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, body) = match route(&agent, request).await {
        Ok(body) => (StatusCode::OK, body),
        Err(error) => {
            let status =
                StatusCode::from_u16(error.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let body = ErrorBody { code: error.code, error: error.message };
            (status, serde_json::to_vec(&body).unwrap_or_default())
        }
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
    Ok(response)
}

async fn route(agent: &Arc<Agent>, request: Request<Incoming>) -> Result<Vec<u8>, ApiError> {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let get = method == Method::GET;
    let post = method == Method::POST;
    match parts.as_slice() {
        ["v1", "status"] if get => json(&agent.status().await),
        ["v1", "peers"] if get => json(&agent.peers()),
        ["v1", "peers", name] if method == Method::DELETE => json(&agent.forget_peer(name).await?),
        ["v1", "pair", "listen"] if post => json(&agent.pair_listen()?),
        ["v1", "pair", "join"] if post => json(&agent.pair_join(body(request).await?).await?),
        ["v1", "run"] if post => json(&agent.run(body(request).await?).await?),
        ["v1", "doctor"] if post => json(&agent.compare_with_peer(body(request).await?).await?),
        ["v1", "wrap"] if post => json(&agent.wrap(&body(request).await?)?),
        ["v1", "protect"] if post => json(&agent.protect(body(request).await?).await?),
        ["v1", "workloads", name] if get => json(&agent.workload_status(&parse(name)?).await?),
        ["v1", "workloads", name, "history"] if get => json(&agent.history(&parse(name)?).await?),
        ["v1", "workloads", name, "unprotect"] if post => {
            let name = parse(name)?;
            json(&agent.unprotect(&name, body(request).await?).await?)
        }
        ["v1", "workloads", name, "failover"] if post => {
            let name = parse(name)?;
            json(&agent.failover(&name, body(request).await?).await?)
        }
        ["v1", "workloads", name, "verify"] if post => json(&agent.verify(&parse(name)?).await?),
        ["v1", "workloads", name, "fence"] if post => json(&agent.fence(&parse(name)?).await?),
        ["v1", "workloads", name, "rejoin"] if post => json(&agent.rejoin(&parse(name)?).await?),
        ["v1", "workloads", name, "unfence"] if post => json(&agent.unfence(&parse(name)?).await?),
        ["v1", "workloads", name, "commit"] if post => {
            json(&agent.set_commit(&parse(name)?, body(request).await?).await?)
        }
        ["v1", "workloads", name, "pause"] if post => json(&agent.pause(&parse(name)?).await?),
        ["v1", "workloads", name, "resume"] if post => json(&agent.resume_protection(&parse(name)?).await?),
        ["v1", "workloads", name, "remove"] if post => {
            agent.remove(&parse(name)?).await?;
            json(&serde_json::json!({}))
        }
        ["v1", "workloads", name, "handoff"] if post => {
            let name = parse(name)?;
            json(&agent.handoff(&name, body(request).await?).await?)
        }
        ["v1", "workloads", name, "drill"] if post => {
            let name = parse(name)?;
            json(&agent.drill(&name, body(request).await?).await?)
        }
        ["v1", "workloads", name, "drill", "end"] if post => {
            agent.end_drill(&parse(name)?).await?;
            json(&serde_json::json!({}))
        }
        _ => Err(ApiError::not_found(format!("the control API has no {method} {path}"))),
    }
}

fn parse(name: &str) -> Result<Name, ApiError> {
    name.parse().map_err(ApiError::invalid)
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(value).map_err(ApiError::failed)
}

/// The request's JSON body; none is read as `{}`.
async fn body<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T, ApiError> {
    let bytes = Limited::new(request.into_body(), BODY_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| {
            ApiError::new(ErrorCode::Invalid, format!("the request's body cannot be read: {error}"))
        })?
        .to_bytes();
    let bytes: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
    serde_json::from_slice(bytes).map_err(|error| ApiError::invalid(format!("the request's body: {error}")))
}
