//! CRIU, unmodified, as a part: finding it, running it, and everything it speaks.
//!
//! | file | owns |
//! |---|---|
//! | [`install`] | which CRIU is used, and its version |
//! | [`bridge`] | the preload library (`bridge/*.c`, compiled by the build script) and its cache directory |
//! | [`gate`] | the socket between the agent and that library, in a dump |
//! | [`spawn`], [`enter`] | starting `criu swrk`, here or inside a workload's namespaces |
//! | [`fork_server`] | a CRIU from which those that dump are forked |
//! | [`swrk`] | its RPC: dump, restore, version, features; what a refusal says |
//! | [`page_server`] | the receiving side of CRIU's page-server protocol |
//! | [`parent`] | the parent directory that makes CRIU write holes instead of pages |
//! | [`images`] | the image files that we must read or write |
//! | [`lazy`] | the server behind `criu restore --lazy-pages` |
//! | [`probe`] | what this kernel can do, and a dump and restore of a real process |
//!
//! ```text
//!            spawn (ahead of need)          dump                        answer
//!  agent ───────────────────────► waiting ──────► frozen ──notifies──► rolled back │ running on │ killed
//!                                    │               ▲                  (a notify failed, (leave_running)
//!                                    │ restore       │ page server      close failed, or
//!                                    ▼               ▼                  CRIU refused)
//!                                 tree runs       holes, pages, close
//! ```
//!
//! Invariants:
//! - One process for each dump or restore; it is consumed by it.
//! - A CRIU is never killed by us: its sockets are closed, whereupon it ends the dump by itself and
//!   lets the tree run on. (Killed, it would leave its parasite code running in frozen tasks.)
//! - Whatever CRIU or an image says of lengths is capped before it is used.

pub mod bridge;
pub mod enter;
pub mod fork_server;
pub mod gate;
pub mod images;
pub mod install;
pub mod lazy;
pub mod page_server;
pub mod parent;
pub mod probe;
mod process;
mod rpc;
pub mod spawn;
pub mod stats;
pub mod swrk;
mod sys;

pub use install::{Install, Version};
pub(crate) use sys::{Elsewhere, hurry, hurry_meanwhile, keep_off};
