//! Which pages of a running process have been written, and what they hold.
//!
//! Owns: the userfaultfd of each tracked address space ([`Tracker`]), batched reads of another process'
//! memory ([`Memory`]), the list of a tree's tasks ([`tasks_of`]) and the flags of their mappings ([`Vmas`]). It decides
//! nothing about what is sent.
//!
//! ```text
//!  attach ──► Tracked ── take_dirty ──► Tracked        the same address space: pages written since
//!                │                                     the last pass, each protected again
//!                ├── Replaced: the process has executed a new program; attach again, all pages are new
//!                └── Gone: the process has exited
//! ```
//!
//! The order that makes it sound:
//! 1. A pass reports a page and write-protects it in one step of the kernel ([`Tracker::take_dirty`]).
//! 2. Only then is the page read ([`Memory::read`]). A write between the two is in what is read *and* is
//!    reported by the next pass; a write after the read is reported by the next pass.
//! 3. A pass' result is never dropped: its pages are protected and will not be reported again. The caller
//!    marks them stale in [`crate::delta::Known`] at once, before anything can fail.
//!
//! Two things are not seen, both by nature: stores through another mapping of shared memory (so
//! [`MappingKind::Shared`] memory is no part of this), and memory that is written through pages pinned
//! before the pass and finished after it (O_DIRECT reads in flight, RDMA). In a stopped tree no synchronous
//! system call is in flight; what was read of a running process that [`reads_directly`] must be read again
//! when it is stopped.

mod direct;
mod inject;
mod listing;
mod maps;
mod pagemap;
mod ptrace;
mod read;
mod sys;
mod tracker;
mod tree;
mod vmas;

pub use direct::reads_directly;
pub use inject::{AttachError, take_back};
pub use listing::Guards;
pub use maps::{Mapping, MappingKind, MapsError, TASK_END, map_file, parse as mappings_of};
pub use pagemap::pages_of;
pub use read::{Memory, Pages, ReadError};
pub use tracker::{Pass, TrackError, Tracker};
pub use tree::{
    TASKS_MAX, Task, TreeError, is_kernel_thread, pidfd_of, processor_time, resident_bytes, tasks_of,
};
pub use vmas::{Vmas, VmasError};
