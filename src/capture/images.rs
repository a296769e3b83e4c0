//! CRIU's small images of an epoch as frames, and the note that travels beside them.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::wire::message::FrameHead;

/// Name of the note among the images; CRIU reads only files that it knows.
pub const NOTE: &str = "epoch.json";

/// What the restoring host must know of an epoch and CRIU's images do not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Wall clock of the primary at the freeze, milliseconds since 1970.
    pub frozen_at_unix_ms: u64,
    /// The other ends of what the tree has open and are not part of the image: they are plugged anew on restore.
    pub outside: Vec<Outside>,
    /// Pid of the tree's root inside.
    pub root: u32,
    /// The tree's IPC namespace is part of the image.
    #[serde(default)]
    pub own_ipc: bool,
    /// What the tree sent from this freeze on was held: no connection's other end has had more than this epoch sent.
    #[serde(default)]
    pub output_held: bool,
}

/// What the tree has open and whose other end is not in it: a way to the workload's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outside {
    /// What CRIU calls it: `pipe:[INODE]`.
    pub key: String,
    /// In a container: which standard stream of its pid 1 it is.
    pub stream: Option<u8>,
}

impl Outside {
    /// A pipe to a sandbox's log, by its inode.
    pub fn pipe(inode: u64) -> Self {
        Self { key: format!("pipe:[{inode}]"), stream: None }
    }
}

impl Note {
    /// What CRIU must be given descriptors for when it restores.
    pub fn keys(&self) -> Vec<String> {
        self.outside.iter().map(|outside| outside.key.clone()).collect()
    }

    /// Reads the note of an image directory.
    pub fn read(dir: &Path) -> io::Result<Self> {
        serde_json::from_slice(&fs::read(dir.join(NOTE))?).map_err(io::Error::other)
    }
}

/// Most bytes of an image in one frame.
const PIECE_BYTES_MAX: usize = 1 << 20;

/// Hands out every image file of a directory, by name; logs, statistics and the parent link are not part of an image.
pub(super) fn emit<E: From<io::Error>>(
    dir: &Path,
    note: &Note,
    emit: &mut dyn FnMut(FrameHead, Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let mut names: Vec<String> = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Shared memory's page maps and the like are made by the standby from the manifest.
        let of_pages = name.starts_with("pagemap-") || name.starts_with("pages-");
        let is_image = Path::new(&name).extension().is_some_and(|extension| extension == "img");
        if entry.file_type()?.is_file() && is_image && !of_pages {
            names.push(name);
        }
    }
    names.sort_unstable();
    for name in names {
        let bytes = fs::read(dir.join(&name))?;
        let pieces: Vec<&[u8]> =
            if bytes.is_empty() { vec![&[]] } else { bytes.chunks(PIECE_BYTES_MAX).collect() };
        for (index, piece) in pieces.iter().enumerate() {
            let head = FrameHead::Image {
                name: name.clone(),
                offset: (index * PIECE_BYTES_MAX) as u64,
                more: index + 1 < pieces.len(),
            };
            emit(head, piece.to_vec())?;
        }
    }
    let note = serde_json::to_vec(note).map_err(io::Error::other)?;
    emit(FrameHead::Image { name: NOTE.to_owned(), offset: 0, more: false }, note)
}
