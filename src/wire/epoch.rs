//! The frames of one epoch as a whole: their order and their digest. The same rules bind who writes and who
//! reads.
//!
//! ```text
//!            Begin             Pages | File | Image(last)
//!   Start ──────────► Open ◄──────────────────────┐
//!                      │ └────────────────────────┘
//!                      │ Image(more) ──► InImage ──► (only the next piece of that image) ──► Open
//!                      │ Manifest
//!                      ▼
//!                    Listed ──End (digest right)──► Ended
//! ```
//!
//! Instead of `Begin` an [`Ask`](FrameHead::Ask) may come, which is all then: see [`super::inventory`]; or
//! [`Inputs`](FrameHead::Inputs), which packets follow without an end.
//!
//! Invariants:
//! - Nobody learns that an epoch is whole before `Ended`: an epoch that was cut off anywhere never
//!   gets there.
//! - The digest covers every byte before the last frame, headers included.
//! - After an error the reader stays failed: no later frame is taken.

use std::collections::HashSet;

use super::{
    frame::{self, FrameError, HEADER_LEN, Header, Kind},
    message::FrameHead,
};

/// Most images in an epoch.
pub const IMAGES_MAX: usize = 1 << 17;

/// Why a sequence of frames is no epoch.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// A frame is malformed.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame came where its kind may not be.
    #[error("a {0:?} frame is out of order")]
    Order(Kind),
    /// Pieces of an image do not follow each other.
    #[error("image {name}: expected a piece at offset {expected}, got one at {offset}")]
    ImageGap {
        /// The image.
        name: String,
        /// Where the next piece had to begin.
        expected: u64,
        /// Where it began.
        offset: u64,
    },
    /// An image came twice.
    #[error("image {0} came twice in one epoch")]
    ImageTwice(String),
    /// Too many images.
    #[error("more than {IMAGES_MAX} images in one epoch")]
    ImagesTooMany,
    /// The bytes are not those that were sent.
    #[error("the digest of the epoch does not match its bytes; it is dropped, and sent again in full")]
    Digest,
    /// A frame after an error.
    #[error("an earlier frame of the epoch was refused already")]
    Failed,
}

/// Where in an epoch a sequence of frames is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    Start,
    Open,
    InImage {
        name: String,
        next: u64,
    },
    Listed,
    Ended,
    /// It is no epoch, but a question; nothing follows it.
    Asked,
    /// It is no epoch, but packets.
    Inputs,
    Failed,
}

/// The rule of order, for both directions.
#[derive(Debug)]
struct Order {
    stage: Stage,
    images: HashSet<String>,
}

impl Order {
    fn new() -> Self {
        Self { stage: Stage::Start, images: HashSet::new() }
    }

    fn admit(&mut self, head: &FrameHead, body_len: usize) -> Result<(), EpochError> {
        let stage = std::mem::replace(&mut self.stage, Stage::Failed);
        self.stage = match (stage, head) {
            (Stage::Start, FrameHead::Begin { .. })
            | (Stage::Open, FrameHead::Pages(_) | FrameHead::File(_)) => Stage::Open,
            (Stage::Open, FrameHead::Image { name, offset, more }) => {
                if self.images.len() == IMAGES_MAX {
                    return Err(EpochError::ImagesTooMany);
                }
                if !self.images.insert(name.clone()) {
                    return Err(EpochError::ImageTwice(name.clone()));
                }
                after_piece(name, 0, *offset, *more, body_len)?
            }
            (Stage::InImage { name: open, next }, FrameHead::Image { name, offset, more })
                if open == *name =>
            {
                after_piece(name, next, *offset, *more, body_len)?
            }
            (Stage::Open, FrameHead::Manifest(_)) => Stage::Listed,
            (Stage::Listed, FrameHead::End { .. }) => Stage::Ended,
            (Stage::Start, FrameHead::Ask(_)) => Stage::Asked,
            (Stage::Start, FrameHead::Inputs { .. }) | (Stage::Inputs, FrameHead::Input { .. }) => {
                Stage::Inputs
            }
            (Stage::Failed, _) => return Err(EpochError::Failed),
            (_, head) => return Err(EpochError::Order(Kind::of(head))),
        };
        Ok(())
    }
}

fn after_piece(
    name: &str,
    expected: u64,
    offset: u64,
    more: bool,
    body_len: usize,
) -> Result<Stage, EpochError> {
    if offset != expected {
        return Err(EpochError::ImageGap { name: name.to_owned(), expected, offset });
    }
    Ok(if more {
        Stage::InImage { name: name.to_owned(), next: offset + body_len as u64 }
    } else {
        Stage::Open
    })
}

/// Turns frames into bytes, and keeps their digest.
#[derive(Debug)]
pub struct EpochWriter {
    order: Order,
    digest: blake3::Hasher,
    bytes: u64,
}

impl Default for EpochWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl EpochWriter {
    /// A writer that expects `Begin`.
    pub fn new() -> Self {
        Self { order: Order::new(), digest: blake3::Hasher::new(), bytes: 0 }
    }

    /// The bytes to send before `body` for this frame. `End` is made by [`EpochWriter::end`] alone.
    pub fn frame(&mut self, head: &FrameHead, body: &[u8]) -> Result<Vec<u8>, EpochError> {
        if let FrameHead::End { .. } = head {
            return Err(EpochError::Order(Kind::End));
        }
        let prefix = frame::encode_frame(head, body.len())?;
        self.order.admit(head, body.len())?;
        self.digest.update(&prefix);
        self.digest.update(body);
        self.bytes += (prefix.len() + body.len()) as u64;
        Ok(prefix)
    }

    /// The bytes of the last frame.
    pub fn end(&mut self) -> Result<Vec<u8>, EpochError> {
        let head = FrameHead::End { digest: *self.digest.finalize().as_bytes() };
        let bytes = frame::encode_frame(&head, 0)?;
        self.order.admit(&head, 0)?;
        self.bytes += bytes.len() as u64;
        Ok(bytes)
    }

    /// Bytes of all frames so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Checks frames as they come, and keeps their digest.
#[derive(Debug)]
pub struct EpochReader {
    order: Order,
    digest: blake3::Hasher,
    bytes: u64,
}

impl Default for EpochReader {
    fn default() -> Self {
        Self::new()
    }
}

impl EpochReader {
    /// A reader that expects `Begin`.
    pub fn new() -> Self {
        Self { order: Order::new(), digest: blake3::Hasher::new(), bytes: 0 }
    }

    /// Takes one frame, whose header [`Header::decode`] has let through; `None` for a right `End`.
    pub fn frame(
        &mut self,
        header: &[u8; HEADER_LEN],
        head: &[u8],
        body: &[u8],
    ) -> Result<Option<FrameHead>, EpochError> {
        let taken = self.take(header, head, body);
        if taken.is_err() {
            self.order.stage = Stage::Failed;
        }
        taken
    }

    fn take(
        &mut self,
        header: &[u8; HEADER_LEN],
        head: &[u8],
        body: &[u8],
    ) -> Result<Option<FrameHead>, EpochError> {
        let value = frame::decode_head(&Header::decode(header)?, head, body.len())?;
        self.order.admit(&value, body.len())?;
        self.bytes += (HEADER_LEN + head.len() + body.len()) as u64;
        if let FrameHead::End { digest } = value {
            // `blake3::Hash` compares in constant time; nothing here needs that, it is only the type at hand.
            return if self.digest.finalize() == digest { Ok(None) } else { Err(EpochError::Digest) };
        }
        self.digest.update(header);
        self.digest.update(head);
        self.digest.update(body);
        Ok(Some(value))
    }

    /// Whether the epoch came to its end, whole.
    pub fn is_whole(&self) -> bool {
        self.order.stage == Stage::Ended
    }

    /// Bytes of all frames so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests;
