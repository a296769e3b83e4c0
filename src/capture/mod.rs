//! An epoch: spawn-ahead, pre-copy, freeze, read, thaw, encode.
//!
//! Owns, for one workload on its primary: the trackers of its tasks, what the standby is known to hold
//! ([`delta::Known`](crate::delta::Known)), and the CRIU that waits for the next freeze.
//!
//! ```text
//!        ┌────────────── running ──────────────┐┌──────── frozen ─────────┐┌────── running ──────┐
//!  tasks ► scan + protect ► read ► encode ► …   ► CRIU seizes the tree     ► encode what was read
//!                     (pre-copy, if much)         its lists for CRIU,       ► small images
//!                                                 scan, read                ► manifest
//!                                                 CRIU has left a task: scan
//!                                                 again, re-read; CLOSE
//! ```
//!
//! Invariants:
//! - The list of pages comes from CRIU (its holes), the content from us. A page on the list that is neither known to
//!   the standby nor read fails the epoch loudly ([`CaptureError::Unreadable`]).
//! - What a scan reports is marked stale in `Known` before anything else can fail; an epoch that fails leaves the
//!   pages it sent unknown. So the next one sends them again.
//! - With soft-dirty bits ([`Tracking::SoftDirty`]) CRIU lists and sends what was written, and its holes are pages that
//!   were not; the next epoch after a failed one must be full ([`Capturer::needs_full`]).
//! - The replicated directories are those of the freeze: what is sent of them before is put right by what is read in it.
//! - System V objects are part of the image whenever there are any (`ipc.rs`).
//! - A failed capture leaves the tree running: CRIU rolls back whenever we do not say yes.

mod blame;
mod collector;
pub mod converge;
mod engine;
mod files;
mod frozen;
mod images;
mod ipc;
mod lists;
pub mod pace;
mod shared;
mod sockets;
mod sys;
mod tracking;

pub use engine::{CaptureError, Captured, Capturer, Emit, Finish, OnStages, Source, Stage, Told, Whole};
pub use files::FilesError;
pub use frozen::FreezeParts;
pub use images::{NOTE, Note, Outside};
pub use sys::share_heaps;
pub use tracking::{NoTracking, Tracking};
