//! Images on their way from one daemon to another: the engine's own archive, out of the one and into the other.
//!
//! An image is known by its digest and sent without any name, so that no name of the standby's comes to mean something else;
//! afterwards it gets the primary's name where the standby's daemon has none of that.

use std::{io, path::PathBuf, time::Duration};

use http_body_util::{BodyExt as _, Collected, Empty, Limited};
use hyper::{
    Method, Response,
    body::{Bytes, Incoming},
};
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

use super::{
    super::spec::{Daemon, ImageId},
    docker::{Docker, text, unfit},
    engine::EngineError,
};
use crate::unix_http::{self, Pieces};

/// Pieces between the network and the daemon.
const PIECES_MAX: usize = 8;
/// How long a daemon may take over the next piece.
const PIECE_LIMIT: Duration = Duration::from_secs(60);
/// How long it may unpack an image that it has whole.
pub const UNPACK_LIMIT: Duration = Duration::from_secs(600);
/// The longest answer that is taken.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Whether a daemon has an image. Blocks.
pub fn has_image(image: &ImageId) -> Result<bool, EngineError> {
    Ok(inspect(image, &image.id)?.is_some())
}

/// How many bytes its files have, without names and padding. Blocks.
pub fn image_bytes(image: &ImageId) -> Result<u64, EngineError> {
    let found = inspect(image, &image.id)?.unwrap_or_default();
    match found["Size"].as_u64() {
        Some(bytes) => Ok(bytes),
        None => unfit(format!("{} does not tell the size of image {}", image.daemon.program(), image.name)),
    }
}

/// Where a daemon keeps its images. Blocks.
pub fn images_dir(daemon: Daemon) -> Result<PathBuf, EngineError> {
    let info = Docker::of(daemon).get("/info")?.unwrap_or_default();
    Ok(text(&info["DockerRootDir"]).into())
}

fn inspect(image: &ImageId, name: &str) -> Result<Option<Value>, EngineError> {
    Docker::of(image.daemon).get(&format!("/images/{name}/json"))
}

/// An image on its way out of a daemon.
pub struct Export {
    docker: Docker,
    path: String,
    body: Incoming,
}

impl Export {
    /// Has the daemon begin.
    pub async fn begin(image: &ImageId) -> Result<Self, EngineError> {
        let docker = Docker::of(image.daemon);
        let path = format!("/images/{}/get", image.id);
        let empty = ("application/json", Empty::<Bytes>::new());
        let response = unix_http::open(docker.socket(), &Method::GET, &path, empty).await;
        let response = response.map_err(|source| lost(&docker, source))?;
        if response.status().is_success() {
            return Ok(Self { docker, path, body: response.into_body() });
        }
        let said = whole(&docker, response).await?;
        Err(docker.failed(&path, &serde_json::from_slice(&said).unwrap_or_default()))
    }

    /// The next bytes of the archive; `None` when it has ended well.
    pub async fn next(&mut self) -> Result<Option<Bytes>, EngineError> {
        loop {
            let Ok(frame) = timeout(PIECE_LIMIT, self.body.frame()).await else {
                let verb = format!("{} {}", self.docker.program(), self.path);
                return Err(EngineError::Slow { verb, limit_s: PIECE_LIMIT.as_secs() });
            };
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|error| lost(&self.docker, io::Error::other(error)))?;
            if let Ok(bytes) = frame.into_data()
                && !bytes.is_empty()
            {
                return Ok(Some(bytes));
            }
        }
    }
}

/// An image on its way into a daemon. Dropped before its end, the daemon drops what it has of it.
pub struct Load {
    image: ImageId,
    pieces: mpsc::Sender<Option<Bytes>>,
    answer: JoinHandle<Result<Bytes, EngineError>>,
}

impl Load {
    /// Has the daemon begin.
    pub fn begin(image: &ImageId) -> Self {
        let (pieces, body) = mpsc::channel(PIECES_MAX);
        let docker = Docker::of(image.daemon);
        let answer = tokio::spawn(async move {
            let body = ("application/x-tar", Pieces(body));
            let response =
                unix_http::open(docker.socket(), &Method::POST, "/images/load?quiet=1", body).await;
            let response = response.map_err(|source| lost(&docker, source))?;
            let status = response.status();
            let said = whole(&docker, response).await?;
            let refused = || docker.failed("load", &serde_json::from_slice(&said).unwrap_or_default());
            if status.is_success() { Ok(said) } else { Err(refused()) }
        });
        Self { image: image.clone(), pieces, answer }
    }

    /// Hands over the next bytes of the archive. An error: the daemon wants no more.
    pub async fn piece(&mut self, bytes: Bytes) -> Result<(), EngineError> {
        match timeout(PIECE_LIMIT, self.pieces.send(Some(bytes))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => {
                self.said().await?;
                unfit(format!("{} load ended before the archive did", self.image.daemon.program()))
            }
            Err(_) => Err(self.slow(PIECE_LIMIT)),
        }
    }

    /// The archive is whole: waits until the daemon has the image, and sees that it is the one.
    pub async fn finish(mut self) -> Result<(), EngineError> {
        // A daemon that does not listen any more says why.
        let _ = self.pieces.send(None).await;
        let said = self.said().await?;
        // It answers with success, and may then tell of an error.
        let said = String::from_utf8_lossy(&said).into_owned();
        let errors = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if let Some(error) = errors.into_iter().find(|line| line["error"].is_string()) {
            let verb = format!("{} load", self.image.daemon.program());
            return Err(EngineError::Failed { verb, said: text(&error["error"]).to_owned() });
        }
        let image = self.image.clone();
        let settled = tokio::task::spawn_blocking(move || settle(&image, &said)).await;
        settled.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    async fn said(&mut self) -> Result<Bytes, EngineError> {
        match timeout(UNPACK_LIMIT, &mut self.answer).await {
            Ok(Ok(said)) => said,
            Ok(Err(error)) => Err(EngineError::Unfit(format!("the load ended: {error}"))),
            Err(_) => Err(self.slow(UNPACK_LIMIT)),
        }
    }

    fn slow(&self, limit: Duration) -> EngineError {
        let verb = format!("{} load", self.image.daemon.program());
        EngineError::Slow { verb, limit_s: limit.as_secs() }
    }
}

/// Whether what was loaded is the image that was wanted; it gets its name, if that is free.
fn settle(image: &ImageId, said: &str) -> Result<(), EngineError> {
    let program = image.daemon.program();
    if inspect(image, &image.id)?.is_none() {
        let what = said.lines().last().unwrap_or_default().trim();
        return unfit(format!(
            "after `{program} load` there is no image {} ({what}): the two daemons name the same image differently; give both \
             the same storage driver (`{program} info`)",
            image.id
        ));
    }
    let Some((repo, tag)) = name_and_tag(&image.name) else { return Ok(()) };
    if inspect(image, &image.name)?.is_some() {
        return Ok(());
    }
    let path = format!("/images/{}/tag?repo={repo}&tag={tag}", image.id);
    Docker::of(image.daemon).post(&path, &Value::Null).map(drop)
}

/// What an image is called, unless it is by a digest.
fn name_and_tag(name: &str) -> Option<(&str, &str)> {
    let is_digest = |text: &str| text.len() >= 12 && text.bytes().all(|b| b.is_ascii_hexdigit());
    if name.contains('@') || name.contains('+') || name.starts_with("sha256:") || is_digest(name) {
        return None;
    }
    match name.rsplit_once(':') {
        // A colon before a slash is that of a registry's port.
        Some((repo, tag)) if !tag.contains('/') => Some((repo, tag)),
        _ => Some((name, "latest")),
    }
}

fn lost(docker: &Docker, source: io::Error) -> EngineError {
    EngineError::Daemon { daemon: docker.program(), socket: docker.socket().to_owned(), source }
}

async fn whole(docker: &Docker, response: Response<Incoming>) -> Result<Bytes, EngineError> {
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    body.map(Collected::to_bytes).map_err(|error| lost(docker, io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_called_as_it_was_unless_by_a_digest() {
        assert_eq!(name_and_tag("lab"), Some(("lab", "latest")));
        assert_eq!(name_and_tag("redis:7"), Some(("redis", "7")));
        assert_eq!(name_and_tag("host:5000/app/db"), Some(("host:5000/app/db", "latest")));
        assert_eq!(name_and_tag("host:5000/app/db:1.2"), Some(("host:5000/app/db", "1.2")));
        for digest in ["redis@sha256:00", "sha256:0011", "0123456789ab"] {
            assert_eq!(name_and_tag(digest), None);
        }
    }
}
