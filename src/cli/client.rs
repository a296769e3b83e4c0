//! The commands' side of the control socket.

use std::path::Path;

use hyper::Method;
use nix::sys::signal::{SigHandler, Signal, signal};
use serde::{Serialize, de::DeserializeOwned};

use super::Failure;
use crate::{
    agent::api::{ErrorBody, ErrorCode},
    unix_http,
};

/// Asks the agent and waits for its answer, as long as it takes.
pub(super) fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, Failure> {
    call(socket, &Method::GET, path, &serde_json::Value::Null)
}

/// Tells the agent to do something.
pub(super) fn post<B: Serialize, T: DeserializeOwned>(
    socket: &Path,
    path: &str,
    body: &B,
) -> Result<T, Failure> {
    call(socket, &Method::POST, path, body)
}

/// Tells the agent to forget something.
pub(super) fn delete<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, Failure> {
    call(socket, &Method::DELETE, path, &serde_json::Value::Null)
}

/// What becomes of a command that writes to nobody: an agent that is gone is an error to tell, but who reads with `head` what is
/// printed has read enough.
fn on_broken_pipe(what: SigHandler) {
    // SAFETY: no handler of ours, but one of the kernel's two actions.
    let _ = unsafe { signal(Signal::SIGPIPE, what) };
}

fn call<B: Serialize, T: DeserializeOwned>(
    socket: &Path,
    method: &Method,
    path: &str,
    body: &B,
) -> Result<T, Failure> {
    let bytes = if *method == Method::POST {
        serde_json::to_vec(body).map_err(anyhow::Error::from)?
    } else {
        Vec::new()
    };
    on_broken_pipe(SigHandler::SigIgn);
    let (status, answer) = unix_http::call(socket, method, path, bytes, None).map_err(|error| {
        Failure::new(
            ErrorCode::Unreachable,
            format!(
                "the agent cannot be reached on {}: {error}; start it with `standin agent`, or name its socket with --socket",
                socket.display()
            ),
        )
    })?;
    on_broken_pipe(SigHandler::SigDfl);
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
