//! An epoch: spawn-ahead, pre-copy, freeze, read, thaw, encode.
//!
//! Owns, for one workload on its primary: the trackers of its tasks, what the standby is known to hold
//! ([`delta::Known`](crate::delta::Known)), and the CRIU that waits for the next freeze.
//!
//! ```text
//!        ┌────────────── running ──────────────┐┌──────── frozen ─────────┐┌────── running ──────┐
//!  tasks ► scan + protect ► read ► encode ► …   ► CRIU seizes the tree     ► encode what was read
//!                     (pre-copy, if much)         first OPEN2: scan, read   ► small images
//!                                                 CLOSE: scan again, re-read ► manifest
//! ```
//!
//! Invariants:
//! - The list of pages comes from CRIU (its holes), the content from us. A page on the list that is neither known to
//!   the standby nor read fails the epoch ([`CaptureError::Unreadable`]).
//! - What a scan reports is marked stale in `Known` before anything else can fail; an epoch that fails leaves the
//!   pages it sent unknown. So the next one sends them again.
//! - A failed capture leaves the tree running: CRIU rolls back whenever we do not say yes.

mod blame;
mod engine;
mod frozen;
mod images;
pub mod pace;

pub use engine::{CaptureError, Captured, Capturer, Emit, Finish, Source};
pub use images::{NOTE, Note};
