//! What a standby holds, asked of it by a primary that knows nothing of its image: hashes, and no content.
//!
//! ```text
//!   primary                                 standby
//!     Ask (a key, how much at most) ───────►           one stream of the bulk connection, as an epoch is
//!     ◄──── Held: which epoch, then its pages          of each page one hash under that key
//!     ◄──── Held: files                                of each block of 64 KiB one hash
//!     ◄───────────────────────────────── End           an InventoryWriter's frames to an InventoryReader
//! ```
//!
//! One that is no standby ends the stream without an answer: then all is sent, as without asking.
//!
//! Invariants, for both directions: pages come behind their epoch, which comes once; no more comes than was asked for; nothing
//! follows `End`, whose digest is that of all bytes before it.

use serde::{Deserialize, Serialize};

use super::{
    check::{self, Illegal, require},
    frame::{self, FrameError, HEADER_LEN, Header, Kind},
    message::FrameHead,
};
use crate::{
    delta::{KEY_LEN, SUM_LEN},
    model::{EpochId, Name, Space},
};

/// Most hashes in a frame (1 MiB).
pub const SUMS_MAX: usize = 1 << 16;
/// Most pages that may be asked about: those of 256 GiB.
pub const PAGES_MAX: u64 = 1 << 26;
/// Most blocks of files that may be asked about: those of 256 GiB.
pub const BLOCKS_MAX: u64 = 1 << 22;

/// The first frame of the stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Workload.
    pub name: Name,
    /// Of the hashes; drawn anew each time.
    pub key: [u8; KEY_LEN],
    /// Of so many pages at most.
    pub pages_max: u64,
    /// Of so many blocks of files at most, the files' paths counted in.
    pub blocks_max: u64,
}

/// A frame of the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Held {
    /// Of which epoch the pages are that follow.
    Epoch(EpochId),
    /// Pages one after the other; the body has a hash of each ([`crate::delta::sums_of`]).
    Pages {
        /// Whose.
        space: Space,
        /// Address of the first.
        start: u64,
    },
    /// Blocks of a file one after the other; the body has a hash of each. Of no epoch: what is there at that moment.
    File {
        /// Which of the replicated trees.
        tree: u32,
        /// Where in it.
        path: Vec<u8>,
        /// The number of the first block.
        first: u64,
    },
}

/// What hashes of a file are counted as, its path included.
pub fn blocks_of(path: &[u8], sums_len: usize) -> u64 {
    ((sums_len + path.len()) / SUM_LEN + 1) as u64
}

pub(super) fn check_ask(ask: &Ask) -> Result<(), Illegal> {
    let fits = (1..=PAGES_MAX).contains(&ask.pages_max);
    require(fits, || format!("hashes of {} pages, 1 to {PAGES_MAX} expected", ask.pages_max))?;
    let fits = ask.blocks_max <= BLOCKS_MAX;
    require(fits, || format!("hashes of {} blocks, at most {BLOCKS_MAX} expected", ask.blocks_max))
}

pub(super) fn check_held(held: &Held, body_len: usize) -> Result<(), Illegal> {
    match held {
        Held::Epoch(id) => {
            let fits = id.term.0 > 0 && id.epoch.0 > 0 && body_len == 0;
            require(fits, || format!("epoch {id}, with {body_len} bytes"))
        }
        Held::Pages { space, start } => {
            let sums = body_len / SUM_LEN;
            let fits = body_len.is_multiple_of(SUM_LEN) && (1..=SUMS_MAX).contains(&sums);
            require(fits, || format!("{body_len} bytes of hashes"))?;
            check::space(*space)?;
            check::run(*start, sums as u64).map(drop)
        }
        Held::File { tree, path, first } => {
            let sums = body_len / SUM_LEN;
            let fits = body_len.is_multiple_of(SUM_LEN) && (1..=SUMS_MAX).contains(&sums);
            require(fits, || format!("{body_len} bytes of hashes"))?;
            let fits = (*tree as usize) < check::TREES_MAX && *first <= BLOCKS_MAX;
            require(fits, || format!("blocks from number {first} on, in tree {tree}"))?;
            check::path_below_root(path)
        }
    }
}

/// What may still come of what was asked for.
#[derive(Debug)]
pub struct Room {
    pages: u64,
    blocks: u64,
}

impl Room {
    /// For the answer to this.
    pub fn new(ask: &Ask) -> Self {
        Self { pages: ask.pages_max, blocks: ask.blocks_max }
    }

    /// Whether this fits too. Once something did not, nothing of its kind does: what follows would leave a gap.
    pub fn take(&mut self, held: &Held, body_len: usize) -> bool {
        let (left, wanted) = match held {
            Held::Epoch(_) => return true,
            Held::Pages { .. } => (&mut self.pages, (body_len / SUM_LEN) as u64),
            Held::File { path, .. } => (&mut self.blocks, blocks_of(path, body_len)),
        };
        let rest = left.checked_sub(wanted);
        *left = rest.unwrap_or(0);
        rest.is_some()
    }
}

/// Why an inventory is refused.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// A frame is wrong in itself.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame in the wrong place.
    #[error("a {0:?} frame does not belong there")]
    Order(Kind),
    /// More than was asked for.
    #[error("hashes of more pages, or more of files, than were asked for")]
    TooMany,
    /// The bytes are not those that were sent.
    #[error("the digest does not match the bytes")]
    Digest,
}

/// The rules, for both directions.
#[derive(Debug)]
struct Rules {
    /// The epoch has come.
    begun: bool,
    room: Room,
    ended: bool,
    digest: blake3::Hasher,
}

impl Rules {
    fn new(ask: &Ask) -> Self {
        Self { begun: false, room: Room::new(ask), ended: false, digest: blake3::Hasher::new() }
    }

    fn admit(&mut self, head: &FrameHead, body_len: usize) -> Result<(), InventoryError> {
        let order = Err(InventoryError::Order(Kind::of(head)));
        match head {
            _ if self.ended => return order,
            FrameHead::Held(Held::Epoch(_)) if !self.begun => self.begun = true,
            FrameHead::Held(Held::Epoch(_)) => return order,
            FrameHead::Held(Held::Pages { .. }) if !self.begun => return order,
            FrameHead::Held(held) if !self.room.take(held, body_len) => return Err(InventoryError::TooMany),
            FrameHead::Held(_) => {}
            FrameHead::End { .. } => self.ended = true,
            _ => return order,
        }
        Ok(())
    }
}

/// Turns frames into bytes.
#[derive(Debug)]
pub struct InventoryWriter(Rules);

impl InventoryWriter {
    /// For the answer to this.
    pub fn new(ask: &Ask) -> Self {
        Self(Rules::new(ask))
    }

    /// The bytes to send before `body` for this frame.
    pub fn frame(&mut self, held: Held, body: &[u8]) -> Result<Vec<u8>, InventoryError> {
        let head = FrameHead::Held(held);
        let prefix = frame::encode_frame(&head, body.len())?;
        self.0.admit(&head, body.len())?;
        self.0.digest.update(&prefix).update(body);
        Ok(prefix)
    }

    /// The bytes of the last frame.
    pub fn end(&mut self) -> Result<Vec<u8>, InventoryError> {
        let head = FrameHead::End { digest: *self.0.digest.finalize().as_bytes() };
        self.0.admit(&head, 0)?;
        Ok(frame::encode_frame(&head, 0)?)
    }
}

/// Checks frames as they come.
#[derive(Debug)]
pub struct InventoryReader {
    rules: Rules,
    bytes: u64,
}

impl InventoryReader {
    /// For the answer to this.
    pub fn new(ask: &Ask) -> Self {
        Self { rules: Rules::new(ask), bytes: 0 }
    }

    /// Takes one frame, whose header [`Header::decode`] has let through; `None` for a right `End`.
    pub fn frame(
        &mut self,
        header: &[u8; HEADER_LEN],
        head: &[u8],
        body: &[u8],
    ) -> Result<Option<Held>, InventoryError> {
        let value = frame::decode_head(&Header::decode(header)?, head, body.len())?;
        self.rules.admit(&value, body.len())?;
        self.bytes += (HEADER_LEN + head.len() + body.len()) as u64;
        let held = match value {
            FrameHead::End { digest } if self.rules.digest.finalize() == digest => return Ok(None),
            FrameHead::End { .. } => return Err(InventoryError::Digest),
            FrameHead::Held(held) => held,
            head => return Err(InventoryError::Order(Kind::of(&head))),
        };
        self.rules.digest.update(header).update(head).update(body);
        Ok(Some(held))
    }

    /// Bytes of all frames so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests;
