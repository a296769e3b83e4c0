//! Page deltas, pure: what of the pages read must be sent, and in which form.
//!
//! Owns what the standby is known to hold ([`Known`]), the packing of pages into batches ([`Encoder`]) and
//! the checked unpacking on the other side ([`decode`]).
//!
//! ```text
//!  pass ─► Known::mark_stale ─► stamp ─► read ─► Encoder::encode ─► batches
//!                                                      │
//!            Known::missing(manifest) must be empty ◄──┘  before the epoch may end
//! ```

use serde::{Deserialize, Serialize};

use crate::model::Space;

mod decode;
mod encode;
mod known;

pub use decode::{Content, DecodeError, decode};
pub use encode::{EncodeStats, Encoder};
pub use known::{Known, ReadStamp};

/// A run of pages in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// Byte address of the first page.
    pub start: u64,
    /// Number of pages.
    pub pages: u32,
    /// All pages of the run are zero and have no bytes in the body.
    pub zero: bool,
}

/// How the bytes of a batch's non-zero pages are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Packing {
    /// The pages one after the other.
    Raw,
    /// One LZ4 block of the pages one after the other; unpacked length is 4096 × non-zero pages.
    Lz4,
}

/// Changed pages of one address space; the body (packed bytes) travels beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchHead {
    /// Which address space the pages belong to.
    pub space: Space,
    /// The pages, in the order of the body, at most [`BATCH_PAGES_MAX`] in sum of non-zero ones.
    pub runs: Vec<PageRun>,
    /// Form of the body.
    pub packing: Packing,
}

/// Most non-zero pages in a batch (1 MiB unpacked).
pub const BATCH_PAGES_MAX: usize = 256;
/// Most runs in a batch (a run of zero pages costs no body, so this needs a bound of its own).
pub const BATCH_RUNS_MAX: usize = 4096;
/// First address that no page may have, in a task or in a shared object (47 bits, as CRIU's images assume).
pub const ADDRESS_END: u64 = 1 << 47;

#[cfg(test)]
mod tests;
