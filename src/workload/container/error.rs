//! What can go wrong with a container.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    super::{bare::BareError, keeper::KeeperError, network::NetworkError},
    engine::EngineError,
};
use crate::model::Name;

/// Why something could not be done to a container.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// Its engine.
    #[error("container {id}: {source}")]
    Engine {
        /// Which.
        id: String,
        /// Cause.
        source: EngineError,
    },
    /// It does not fit.
    #[error("container {id} cannot be protected: {reason}")]
    Unfit {
        /// Which.
        id: String,
        /// What is wrong.
        reason: String,
    },
    /// A name that is in use.
    #[error("the name {0} is that of another workload's place; choose another, or unprotect that one first")]
    Taken(Name),
    /// It is none of ours.
    #[error("no container is protected as {0}")]
    Unknown(Name),
    /// Its guard process or cgroup.
    #[error("container {name}: {source}")]
    Keeper {
        /// Workload.
        name: Name,
        /// Cause.
        source: KeeperError,
    },
    /// Its network.
    #[error("container {name}: {source}")]
    Network {
        /// Workload.
        name: Name,
        /// Cause.
        source: NetworkError,
    },
    /// Its processes.
    #[error("container {name}: {source}")]
    Tree {
        /// Workload.
        name: Name,
        /// Cause.
        source: BareError,
    },
    /// A file.
    #[error("container {name}: cannot {what} {path}: {source}")]
    File {
        /// Workload.
        name: Name,
        /// Verb.
        what: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

pub(super) fn unfit(id: &str, reason: &str) -> ContainerError {
    ContainerError::Unfit { id: id.to_owned(), reason: reason.to_owned() }
}

pub(super) fn engine_error(id: &str) -> impl Fn(EngineError) -> ContainerError + use<'_> {
    move |source| ContainerError::Engine { id: id.to_owned(), source }
}

pub(super) fn keeper_error(name: &Name) -> impl Fn(KeeperError) -> ContainerError + use<'_> {
    move |source| ContainerError::Keeper { name: name.clone(), source }
}

pub(super) fn network_error(name: &Name) -> impl Fn(NetworkError) -> ContainerError + use<'_> {
    move |source| ContainerError::Network { name: name.clone(), source }
}

pub(super) fn file_error(
    name: &Name,
    what: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> ContainerError + use<> {
    let (name, path) = (name.clone(), path.to_owned());
    move |source| ContainerError::File { name, what, path, source }
}
