//! One frame of an epoch: a header of fixed size, a head (bincode), a body (raw bytes).
//!
//! ```text
//!  0        1              5              9
//!  ┌────────┬──────────────┬──────────────┬───────────────┬───────────────┐
//!  │ver|kind│ head_len u32 │ body_len u32 │ head …        │ body …        │   integers little-endian
//!  └────────┴──────────────┴──────────────┴───────────────┴───────────────┘
//! ```
//!
//! The kind is in the header so that the head's limit is known before the head is read: only a manifest may
//! be large.

use super::{
    check::{self, Illegal},
    codec::{self, CodecError},
    message::FrameHead,
};

/// Version of the frames, in the upper half of the first byte.
pub const VERSION: u8 = 4;
/// Bytes of a header.
pub const HEADER_LEN: usize = 9;
/// Most bytes of a body. Longer files travel in pieces.
pub const BODY_LEN_MAX: usize = 4 << 20;
/// Most bytes of a manifest's head: about 400,000 runs of pages.
pub const MANIFEST_LEN_MAX: usize = 4 << 20;
/// Most bytes of another frame's head (a file with its extended attributes, a batch of 4,096 runs).
pub const HEAD_LEN_MAX: usize = 160 * 1024;
/// Most bytes of an IP packet, which may have been put together from several.
pub const PACKET_LEN_MAX: usize = 0xffff;
/// Most bytes of the heads that hold a name and numbers.
pub const SMALL_HEAD_LEN_MAX: usize = 256;

/// What a frame is, as its header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`FrameHead::Begin`].
    Begin = 1,
    /// [`FrameHead::Pages`].
    Pages = 2,
    /// [`FrameHead::Image`].
    Image = 3,
    /// [`FrameHead::File`].
    File = 4,
    /// [`FrameHead::Manifest`].
    Manifest = 5,
    /// [`FrameHead::End`].
    End = 6,
    /// [`FrameHead::Piece`].
    Piece = 7,
    /// [`FrameHead::Ask`].
    Ask = 8,
    /// [`FrameHead::Held`].
    Held = 9,
    /// [`FrameHead::Inputs`].
    Inputs = 10,
    /// [`FrameHead::Input`].
    Input = 11,
}

impl Kind {
    /// The kind of a head.
    pub fn of(head: &FrameHead) -> Self {
        match head {
            FrameHead::Begin { .. } => Self::Begin,
            FrameHead::Pages(_) => Self::Pages,
            FrameHead::Image { .. } => Self::Image,
            FrameHead::File(_) => Self::File,
            FrameHead::Manifest(_) => Self::Manifest,
            FrameHead::End { .. } => Self::End,
            FrameHead::Piece => Self::Piece,
            FrameHead::Ask(_) => Self::Ask,
            FrameHead::Held(_) => Self::Held,
            FrameHead::Inputs { .. } => Self::Inputs,
            FrameHead::Input { .. } => Self::Input,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        let of_epochs = [Self::Begin, Self::Pages, Self::Image, Self::File, Self::Manifest, Self::End];
        let others = [Self::Piece, Self::Ask, Self::Held, Self::Inputs, Self::Input];
        of_epochs.into_iter().chain(others).find(|kind| *kind as u8 == number)
    }

    /// Most bytes of its head.
    pub fn head_len_max(self) -> usize {
        match self {
            Self::Begin | Self::Image | Self::End | Self::Piece | Self::Ask | Self::Inputs | Self::Input => {
                SMALL_HEAD_LEN_MAX
            }
            Self::Pages | Self::File | Self::Held => HEAD_LEN_MAX,
            Self::Manifest => MANIFEST_LEN_MAX,
        }
    }

    /// Most bytes of its body.
    pub fn body_len_max(self) -> usize {
        match self {
            Self::Pages | Self::Image | Self::File | Self::Piece | Self::Held => BODY_LEN_MAX,
            Self::Input => PACKET_LEN_MAX,
            Self::Begin | Self::Manifest | Self::End | Self::Ask | Self::Inputs => 0,
        }
    }
}

/// Why bytes are no frame, or a head and body cannot become one.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The header's first byte is unknown.
    #[error(
        "a frame begins with byte {0:#04x}, which this release does not know; run the same one on both hosts"
    )]
    Unknown(u8),
    /// A length is over the limit of the frame's kind.
    #[error("a {kind:?} frame with a {part} of {len} bytes is over the limit of {max}")]
    TooLong {
        /// The frame's kind.
        kind: Kind,
        /// Head or body.
        part: &'static str,
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The head is not what the header announced.
    #[error("the head of a {0:?} frame is of another kind")]
    Mismatch(Kind),
    /// The parts are not as long as the header announced.
    #[error("the parts of a {0:?} frame are not as long as its header says")]
    Length(Kind),
    /// The head has no encoding, or its bytes are none.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The frame breaks a rule.
    #[error("refused a {kind:?} frame: {source}")]
    Illegal {
        /// The frame's kind.
        kind: Kind,
        /// The rule.
        source: Illegal,
    },
}

/// A header that was read and found within the limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Bytes of the head.
    pub head_len: usize,
    /// Bytes of the body.
    pub body_len: usize,
}

impl Header {
    /// Reads a header; its lengths may be allocated if this returns `Ok`.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let [first, h0, h1, h2, h3, b0, b1, b2, b3] = *bytes;
        let kind = Kind::from_number(first & 0x0f).filter(|_| first >> 4 == VERSION);
        let header = Self {
            kind: kind.ok_or(FrameError::Unknown(first))?,
            head_len: u32::from_le_bytes([h0, h1, h2, h3]) as usize,
            body_len: u32::from_le_bytes([b0, b1, b2, b3]) as usize,
        };
        header.check()?;
        Ok(header)
    }

    /// The bytes of the header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = VERSION << 4 | self.kind as u8;
        bytes[1..5].copy_from_slice(&(self.head_len as u32).to_le_bytes());
        bytes[5..].copy_from_slice(&(self.body_len as u32).to_le_bytes());
        bytes
    }

    fn check(&self) -> Result<(), FrameError> {
        let kind = self.kind;
        for (part, len, max) in
            [("head", self.head_len, kind.head_len_max()), ("body", self.body_len, kind.body_len_max())]
        {
            if len > max {
                return Err(FrameError::TooLong { kind, part, len, max });
            }
        }
        Ok(())
    }
}

/// Encodes header and head of a frame whose body has `body_len` bytes; the body follows as it is.
pub fn encode_frame(head: &FrameHead, body_len: usize) -> Result<Vec<u8>, FrameError> {
    let kind = Kind::of(head);
    check::frame(head, body_len).map_err(|source| FrameError::Illegal { kind, source })?;
    let mut bytes = vec![0; HEADER_LEN];
    codec::append(&mut bytes, "frame head", head)?;
    let header = Header { kind, head_len: bytes.len() - HEADER_LEN, body_len };
    header.check()?;
    bytes[..HEADER_LEN].copy_from_slice(&header.encode());
    Ok(bytes)
}

/// Decodes a frame's head, and checks it together with the length of its body.
pub fn decode_head(header: &Header, head: &[u8], body_len: usize) -> Result<FrameHead, FrameError> {
    let kind = header.kind;
    if head.len() != header.head_len || body_len != header.body_len {
        return Err(FrameError::Length(kind));
    }
    // bincode writes the variant first, as one byte when it is small. Looking at it before decoding keeps a
    // head of one kind from being decoded under the larger limit of another.
    if head.first() != Some(&(kind as u8 - 1)) {
        return Err(FrameError::Mismatch(kind));
    }
    let value: FrameHead = match kind {
        Kind::Manifest => codec::decode::<_, MANIFEST_LEN_MAX>("manifest", head)?,
        Kind::Pages | Kind::File | Kind::Held => codec::decode::<_, HEAD_LEN_MAX>("frame head", head)?,
        Kind::Begin | Kind::Image | Kind::End | Kind::Piece | Kind::Ask | Kind::Inputs | Kind::Input => {
            codec::decode::<_, SMALL_HEAD_LEN_MAX>("frame head", head)?
        }
    };
    if Kind::of(&value) != kind {
        return Err(FrameError::Mismatch(kind));
    }
    check::frame(&value, body_len).map_err(|source| FrameError::Illegal { kind, source })?;
    Ok(value)
}
