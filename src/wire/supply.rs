//! What a standby is sent before it can be one: the image that a container is made from, and what it mounts read-only.
//!
//! ```text
//!   primary                                    standby
//!     Ask ───────────────────────────────────►           one stream, as a request is
//!     ◄──────────────────────────────── Lacks
//!
//!     Ship, what and how much ───────────────►           one stream for each thing
//!     ◄──────────────────────── Ready or Held            (it has room; or it has it already)
//!     Piece… or File…, End ──────────────────►           a SupplyWriter's frames to a SupplyReader
//!     ◄───────────────────────────────── Done            verified, and in its place
//! ```
//!
//! Instead of any of its answers the standby may say `Refused`, also in the middle of the frames.
//!
//! Invariants, for both directions:
//! - An image is `Piece` frames alone, files are `File` frames of tree 0 alone; nothing follows `End`, whose digest is that of
//!   all bytes before it.
//! - No more bytes come than `Ship` has announced.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{
    check::{self, Illegal, require},
    codec::Message,
    frame::{self, FrameError, HEADER_LEN, Header, Kind},
    message::{FileRecord, FrameHead},
};
use crate::{
    model::Name,
    workload::spec::{ImageId, Lent},
};

/// Most things that are asked about at once.
pub const FILES_MAX: usize = check::TREES_MAX;
/// What a file is taken to need on a disk beside its content.
pub const ENTRY_BYTES: u64 = 4096;
/// Most characters of an image's id or name.
pub const IMAGE_NAME_LEN_MAX: usize = 512;

/// A thing that is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Supply {
    /// An image, as an archive of its engine's.
    Image(ImageId),
    /// What a container mounts read-only, as records of files.
    Files(Lent),
}

impl Supply {
    /// The frames that it is sent in.
    fn kind(&self) -> Kind {
        match self {
            Self::Image(_) => Kind::Piece,
            Self::Files(_) => Kind::File,
        }
    }
}

/// How much is sent, and what it will take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Most bytes of the frames.
    pub stream_bytes: u64,
    /// Bytes that the standby's disk needs for it; of files the sum of their sizes, holes included, and [`ENTRY_BYTES`] for
    /// each.
    pub room_bytes: u64,
}

/// What the primary asks, the first message of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SupplyRequest {
    /// What is missing there?
    Ask {
        /// Workload.
        name: Name,
        /// The image that its container is made from.
        image: Option<ImageId>,
        /// What it mounts read-only, as the primary's host calls it.
        files: Vec<PathBuf>,
    },
    /// Take this.
    Ship {
        /// Workload.
        name: Name,
        /// What.
        supply: Supply,
        /// How much.
        size: Size,
    },
}

/// What the standby answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SupplyAnswer {
    /// To `Ask`.
    Lacks {
        /// The image.
        image: bool,
        /// Which of the files, by their numbers.
        files: Vec<u32>,
    },
    /// To `Ship`: there is room, send it.
    Ready,
    /// To `Ship`: it is there already.
    Held,
    /// To all of the frames: verified, and in its place.
    Done,
    /// No, and why, for people. Nothing of it is left.
    Refused {
        /// What is wrong and what to do about it.
        reason: String,
    },
}

impl Message for SupplyRequest {
    const WHAT: &'static str = "supply request";

    fn check(&mut self) -> Result<(), Illegal> {
        match self {
            Self::Ask { image: asked, files, .. } => {
                require(files.len() <= FILES_MAX, || format!("more than {FILES_MAX} mounts"))?;
                files.iter().try_for_each(|path| check::plain_absolute(path))?;
                asked.as_ref().map_or(Ok(()), image)
            }
            Self::Ship { supply: Supply::Image(shipped), .. } => image(shipped),
            Self::Ship { supply: Supply::Files(lent), .. } => check::lent(lent),
        }
    }
}

impl Message for SupplyAnswer {
    const WHAT: &'static str = "supply answer";

    fn check(&mut self) -> Result<(), Illegal> {
        match self {
            Self::Lacks { files, .. } => {
                require(files.is_sorted_by(|a, b| a < b), || "numbers of mounts out of order".into())
            }
            Self::Refused { reason } => {
                check::make_printable(reason);
                Ok(())
            }
            Self::Ready | Self::Held | Self::Done => Ok(()),
        }
    }
}

/// Both become part of what a daemon is asked.
fn image(image: &ImageId) -> Result<(), Illegal> {
    let digits = image.id.strip_prefix("sha256:").unwrap_or(&image.id);
    let id_fits = digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    require(id_fits, || format!("{:?} is no image's id", image.id))?;
    let name_fits = (1..=IMAGE_NAME_LEN_MAX).contains(&image.name.len())
        && image.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/:@+".contains(&b));
    require(name_fits, || format!("{:?} is no image's name", image.name))
}

/// Why frames are no supply.
#[derive(Debug, thiserror::Error)]
pub enum SupplyError {
    /// A frame is wrong in itself.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame in the wrong place.
    #[error("a {0:?} frame does not belong there")]
    Order(Kind),
    /// More bytes than were announced.
    #[error("more than the {0} bytes that were announced")]
    TooLong(u64),
    /// The bytes are not those that were sent.
    #[error("the digest does not match the bytes")]
    Digest,
}

/// The rules, for both directions.
#[derive(Debug)]
struct Rules {
    kind: Kind,
    bytes_max: u64,
    bytes: u64,
    ended: bool,
    digest: blake3::Hasher,
}

impl Rules {
    fn new(supply: &Supply, size: Size) -> Self {
        let digest = blake3::Hasher::new();
        Self { kind: supply.kind(), bytes_max: size.stream_bytes, bytes: 0, ended: false, digest }
    }

    fn admit(&mut self, head: &FrameHead, len: usize) -> Result<(), SupplyError> {
        let kind = Kind::of(head);
        let tree = match head {
            FrameHead::File(
                FileRecord::Entry { tree, .. }
                | FileRecord::Data { tree, .. }
                | FileRecord::Remove { tree, .. },
            ) => *tree,
            // Of what is there already, of which nothing is.
            FrameHead::File(FileRecord::Keep { .. }) => return Err(SupplyError::Order(kind)),
            _ => 0,
        };
        if self.ended || tree != 0 || (kind != self.kind && kind != Kind::End) {
            return Err(SupplyError::Order(kind));
        }
        self.bytes += len as u64;
        if self.bytes > self.bytes_max {
            return Err(SupplyError::TooLong(self.bytes_max));
        }
        self.ended = kind == Kind::End;
        Ok(())
    }
}

/// Turns frames into bytes.
#[derive(Debug)]
pub struct SupplyWriter(Rules);

impl SupplyWriter {
    /// For frames of this thing.
    pub fn new(supply: &Supply, size: Size) -> Self {
        Self(Rules::new(supply, size))
    }

    /// The bytes to send before `body` for this frame. `End` is made by [`SupplyWriter::end`] alone.
    pub fn frame(&mut self, head: &FrameHead, body: &[u8]) -> Result<Vec<u8>, SupplyError> {
        if let FrameHead::End { .. } = head {
            return Err(SupplyError::Order(Kind::End));
        }
        let prefix = frame::encode_frame(head, body.len())?;
        self.0.admit(head, prefix.len() + body.len())?;
        self.0.digest.update(&prefix).update(body);
        Ok(prefix)
    }

    /// The bytes of the last frame.
    pub fn end(&mut self) -> Result<Vec<u8>, SupplyError> {
        let head = FrameHead::End { digest: *self.0.digest.finalize().as_bytes() };
        let bytes = frame::encode_frame(&head, 0)?;
        self.0.admit(&head, bytes.len())?;
        Ok(bytes)
    }
}

/// Checks frames as they come.
#[derive(Debug)]
pub struct SupplyReader(Rules);

impl SupplyReader {
    /// For frames of this thing.
    pub fn new(supply: &Supply, size: Size) -> Self {
        Self(Rules::new(supply, size))
    }

    /// Takes one frame, whose header [`Header::decode`] has let through; `None` for a right `End`.
    pub fn frame(
        &mut self,
        header: &[u8; HEADER_LEN],
        head: &[u8],
        body: &[u8],
    ) -> Result<Option<FrameHead>, SupplyError> {
        let value = frame::decode_head(&Header::decode(header)?, head, body.len())?;
        self.0.admit(&value, HEADER_LEN + head.len() + body.len())?;
        if let FrameHead::End { digest } = value {
            return if self.0.digest.finalize() == digest { Ok(None) } else { Err(SupplyError::Digest) };
        }
        self.0.digest.update(header).update(head).update(body);
        Ok(Some(value))
    }

    /// Bytes of all frames so far.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }
}

/// What [`SupplyWriter::end`] adds, at most.
pub const END_LEN_MAX: u64 = (HEADER_LEN + frame::SMALL_HEAD_LEN_MAX) as u64;

#[cfg(test)]
mod tests;
