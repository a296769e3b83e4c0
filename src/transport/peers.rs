//! The hosts that this one trusts: a short list in memory, the same list on disk.
//!
//! One process owns the file at a time: the agent, or, while none runs, the command that edits the list. A
//! change is on disk before it counts.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{
    identity::Fingerprint,
    private_file::{self, PrivateFileError},
};
pub use crate::wire::pairing::{PeerName, PeerNameError};

/// The list's file in its directory.
const FILE_NAME: &str = "peers.json";
/// Most bytes of that file.
const FILE_LEN_MAX: u64 = 256 * 1024;
/// Most peers of a host.
pub const PEERS_MAX: usize = 64;

/// A trusted host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The name it gave when it was paired.
    pub name: PeerName,
    /// What it proves on each connection.
    pub fingerprint: Fingerprint,
    /// Where its agent listens.
    pub addr: SocketAddr,
}

/// Why the list of peers could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum PeersError {
    /// The file could not be read or written.
    #[error("the list of peers: {0}")]
    File(#[from] PrivateFileError),
    /// The file has another content.
    #[error("{} is no list of peers ({reason}): restore it from a backup, or remove it and pair again", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The name belongs to another host.
    #[error(
        "a peer named {name} with another identity is paired already: if it was set up anew, \
         `standin pair --forget {name}` here and pair again; if it is another host, give one of them another name"
    )]
    NameTaken {
        /// The name.
        name: PeerName,
    },
    /// The host has another name here.
    #[error(
        "this host is paired already under the name {old}: `standin pair --forget {old}` here, then pair again"
    )]
    Renamed {
        /// The name in the list.
        old: PeerName,
    },
    /// The list is full.
    #[error("{PEERS_MAX} peers are the most: remove one with `standin pair --forget NAME`")]
    TooMany,
    /// There is no such peer.
    #[error("no peer is named {name}: `standin pair --list` shows those that are")]
    Unknown {
        /// The name.
        name: PeerName,
    },
}

/// The content of the file.
#[derive(Default, Serialize, Deserialize)]
struct Stored {
    peers: Vec<Peer>,
}

/// The trusted hosts.
#[derive(Debug)]
pub struct Peers {
    path: PathBuf,
    list: Mutex<Vec<Peer>>,
}

impl Peers {
    /// Loads the list in `dir`; a directory without one has no peers.
    pub fn load(dir: &Path) -> Result<Self, PeersError> {
        private_file::make_dir(dir)?;
        let path = dir.join(FILE_NAME);
        let malformed = |reason: String| PeersError::Malformed { path: path.clone(), reason };
        let stored: Stored = match private_file::read(&path, FILE_LEN_MAX)? {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string()))?,
            None => Stored::default(),
        };
        let mut list = Vec::new();
        for peer in stored.peers {
            let old = admit(&list, &peer).map_err(|e| malformed(e.to_string()))?;
            if old.is_some() {
                return Err(malformed(format!("{} is listed twice", peer.name)));
            }
            list.push(peer);
        }
        Ok(Self { path, list: Mutex::new(list) })
    }

    /// All of them.
    pub fn list(&self) -> Vec<Peer> {
        self.lock().clone()
    }

    /// The peer of that name.
    pub fn by_name(&self, name: &PeerName) -> Option<Peer> {
        self.lock().iter().find(|peer| peer.name == *name).cloned()
    }

    /// The peer that proves that certificate.
    pub fn by_fingerprint(&self, fingerprint: &Fingerprint) -> Option<Peer> {
        self.lock().iter().find(|peer| peer.fingerprint == *fingerprint).cloned()
    }

    /// Whether [`Peers::add`] would take it.
    pub fn check(&self, peer: &Peer) -> Result<(), PeersError> {
        admit(&self.lock(), peer).map(|_| ())
    }

    /// Trusts a host from now on; one that is listed with the same name and identity gets the new address.
    pub fn add(&self, peer: Peer) -> Result<(), PeersError> {
        let mut list = self.lock();
        let mut changed = list.clone();
        match admit(&list, &peer)? {
            Some(at) => changed[at] = peer,
            None => changed.push(peer),
        }
        self.store(&changed)?;
        *list = changed;
        Ok(())
    }

    /// Trusts a host no longer: no new connection is made or accepted. The owner of its open connections
    /// closes them.
    pub fn remove(&self, name: &PeerName) -> Result<Peer, PeersError> {
        let mut list = self.lock();
        let mut changed = list.clone();
        let at = changed.iter().position(|peer| peer.name == *name);
        let removed = changed.remove(at.ok_or_else(|| PeersError::Unknown { name: name.clone() })?);
        self.store(&changed)?;
        *list = changed;
        Ok(removed)
    }

    fn store(&self, list: &[Peer]) -> Result<(), PeersError> {
        let stored = Stored { peers: list.to_vec() };
        let bytes = serde_json::to_vec_pretty(&stored)
            .map_err(|e| PeersError::Malformed { path: self.path.clone(), reason: e.to_string() })?;
        Ok(private_file::replace(&self.path, &bytes)?)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Peer>> {
        // The list is only ever replaced whole, so a panic of another holder cannot have torn it.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a peer goes in the list: in the place of its older self, or (`None`) behind the others.
fn admit(list: &[Peer], peer: &Peer) -> Result<Option<usize>, PeersError> {
    for (at, other) in list.iter().enumerate() {
        match (other.name == peer.name, other.fingerprint == peer.fingerprint) {
            (true, true) => return Ok(Some(at)),
            (true, false) => return Err(PeersError::NameTaken { name: peer.name.clone() }),
            (false, true) => return Err(PeersError::Renamed { old: other.name.clone() }),
            (false, false) => {}
        }
    }
    if list.len() >= PEERS_MAX { Err(PeersError::TooMany) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, seed: u8) -> Peer {
        let fingerprint = Fingerprint::of(&vec![seed].into());
        Peer { name: name.parse().unwrap(), fingerprint, addr: "192.0.2.1:7700".parse().unwrap() }
    }

    #[test]
    fn the_list_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let peers = Peers::load(dir.path()).unwrap();
        peers.add(peer("a.example", 1)).unwrap();
        peers.add(peer("b", 2)).unwrap();
        peers.remove(&"a.example".parse().unwrap()).unwrap();
        let moved = Peer { addr: "[2001:db8::1]:7700".parse().unwrap(), ..peer("b", 2) };
        peers.add(moved.clone()).unwrap();
        let again = Peers::load(dir.path()).unwrap();
        assert_eq!(again.list(), std::slice::from_ref(&moved));
        assert_eq!(again.by_fingerprint(&moved.fingerprint), Some(moved));
    }

    #[test]
    fn a_name_or_identity_in_use_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let peers = Peers::load(dir.path()).unwrap();
        peers.add(peer("a", 1)).unwrap();
        let taken = peers.add(peer("a", 2)).unwrap_err();
        assert!(matches!(taken, PeersError::NameTaken { .. }));
        assert!(taken.to_string().contains("standin pair --forget a"));
        assert!(matches!(peers.add(peer("b", 1)), Err(PeersError::Renamed { .. })));
        assert!(matches!(peers.remove(&"b".parse().unwrap()), Err(PeersError::Unknown { .. })));
        for n in 1..PEERS_MAX {
            peers.add(peer(&format!("n{n}"), 10 + n as u8)).unwrap();
        }
        assert!(matches!(peers.add(peer("last", 200)), Err(PeersError::TooMany)));
    }

    #[test]
    fn a_damaged_list_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Peers::load(dir.path()).unwrap().add(peer("a", 1)).unwrap();
        let path = dir.path().join(FILE_NAME);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"a\"", "\"../a\"")).unwrap();
        assert!(matches!(Peers::load(dir.path()), Err(PeersError::Malformed { .. })));
    }
}
