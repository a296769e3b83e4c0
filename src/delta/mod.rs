//! Page deltas, pure: what of the pages read must be sent, and in which form.
//!
//! Owns what the standby is known to hold ([`Known`]), the packing of pages into batches ([`Encoder`]) and
//! the checked unpacking on the other side ([`Decoder`]).
//!
//! ```text
//!  pass ─► Known::mark_stale ─► stamp ─► read ─► Encoder::encode ─► batches
//!                                                      │
//!            Known::missing(manifest) must be empty ◄──┘  before the epoch may end
//!
//!  page ─► zero? ─► as the standby holds it? ─► close to what it holds? ─► else
//!           a run    nothing                     a patch                    whole
//!                                                   └─► batches of patches, batches of pages: raw, LZ4 or zstd
//! ```
//!
//! A standby whose image this primary knows nothing of is asked for the hash of each page ([`Offered`]): what it holds already
//! is not sent.
//!
//! A patch is made against the content that the standby holds, or will hold when it has come to this point of the
//! stream: what was sent last of the page, in this epoch or an earlier one. The standby makes whole pages of patches
//! when it stages them. Invariants:
//! - A batch of patches carries the digest of the pages that must come of it. If they do not, what the standby holds is
//!   not what the primary thinks: the epoch is refused and all memory is sent again.
//! - An epoch without a base has no patches, so that the way out of any such trouble does not depend on them.
//!
//! The encoder reads one clock, the CPU time of its thread, to price its own work.

use serde::{Deserialize, Serialize};

use crate::model::Space;

mod choose;
mod decode;
mod encode;
mod known;
mod offered;
mod packing;
mod patch;
mod reference;

pub use choose::LinkRate;
pub use decode::{Content, DecodeError, Decoded, Decoder};
pub use encode::{EncodeStats, Encoder};
pub use known::{Known, REFERENCE_BYTES_MAX, ReadStamp};
pub use offered::{KEY_LEN, OfferError, Offered, SUM_LEN, ZEROS, hash_of, sums_of};
pub use patch::PATCH_LEN_MAX;

/// A run of pages in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// Byte address of the first page.
    pub start: u64,
    /// Number of pages.
    pub pages: u32,
    /// All pages of the run are zero and have no bytes in the body; not in a batch of patches.
    pub zero: bool,
}

/// What a batch's body holds for each of its non-zero pages, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Form {
    /// The page.
    Pages,
    /// What makes it of the page that the standby holds.
    Patches {
        /// Bytes of all patches.
        len: u32,
        /// The first bytes of the BLAKE3 of the pages that come of it, one after the other.
        digest: [u8; DIGEST_LEN],
    },
}

/// How the body of a batch is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Packing {
    /// As it is.
    Raw,
    /// One LZ4 block.
    Lz4,
    /// One zstd frame.
    Zstd,
}

/// Changed pages of one address space; the body (packed bytes) travels beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchHead {
    /// Which address space the pages belong to.
    pub space: Space,
    /// The pages, in the order of the body, at most [`BATCH_PAGES_MAX`] in sum of non-zero ones.
    pub runs: Vec<PageRun>,
    /// What the body is of.
    pub form: Form,
    /// Form of the body.
    pub packing: Packing,
}

/// Most non-zero pages in a batch (1 MiB unpacked).
pub const BATCH_PAGES_MAX: usize = 256;
/// Most runs in a batch (a run of zero pages costs no body, so this needs a bound of its own).
pub const BATCH_RUNS_MAX: usize = 4096;
/// First address that no page may have, in a task or in a shared object (47 bits, as CRIU's images assume).
pub const ADDRESS_END: u64 = 1 << 47;
/// Bytes of a batch's digest: it finds a mistake, it proves nothing to a stranger.
pub const DIGEST_LEN: usize = 16;

/// The digest of pages that come of patches.
fn digest_of(hasher: &blake3::Hasher) -> [u8; DIGEST_LEN] {
    *hasher.finalize().as_bytes().first_chunk().expect("a BLAKE3 hash has 32 bytes")
}

#[cfg(test)]
mod tests;
