//! Replicated file trees, consistent with the epoch: the directories that a workload declares with `--path`, and the
//! writable layer of a container (see [`Source::overlay`]).
//!
//! A [`Scanner`] on the primary compares the trees with what it sent last and emits the difference as
//! [`FileRecord`](crate::wire::message::FileRecord)s; a [`Receiver`] on the standby applies them to its copy.
//!
//! ```text
//!   running ── scan(Running) ──► records ─┐
//!   frozen  ── scan(Frozen)  ──► records ─┼─► one epoch ──► Receiver::apply … finish ──► the standby's copy
//!   thawed  ── settle() ───────► records ─┘
//!   the epoch was not committed ── reset() ──► the next scan sends everything
//! ```
//!
//! Where nothing is known of a copy that holds something, it is asked ([`hashes`], [`Scanner::offer`]): the blocks that are the
//! same there are kept and not sent.
//!
//! Invariants:
//! - What the scanner remembers is what the records emitted so far make of a copy. A scan of the running
//!   workload may thus see a torn state: the scan in the freeze, relative to it, puts it right. Only the
//!   latter's end is consistent.
//! - Where the file system has reflinks and that makes the freeze shorter, a big file is cloned in the freeze and read after
//!   it (`clone`, `later`). What is read is the clone; until then nothing is known of the copy's blocks.
//! - The records of an epoch, those of several scans, are a redo log: applied again, from the start, they give the same
//!   tree, though the directories hold the epoch's end by then.
//! - Neither side follows a symbolic link or leaves the tree. Mount points below a tree's root are sent as
//!   empty directories; what is mounted there is a tree of its own, or not replicated.
//! - Replicated are regular files with their holes (as zeros that need no space), directories, symbolic and
//!   hard links (within a tree), pipes and device nodes, with mode, owner, mtime and extended attributes.
//!   Sockets are not, nor are atime, ctime, inode flags, and the labels that belong to a host's policy
//!   (SELinux, IMA, EVM).
//!
//! A file counts as unchanged if nothing of its `stat` changed. Two kinds of write are invisible there and
//! handled by comparing content: stores through a writable shared mapping (the caller names the files that
//! are mapped so), and writes within the clock tick of the last ctime seen. A renamed file is sent anew.
//!
//! Where the kernel tells what changes (fanotify on the file system; not on an overlay as a whole), a scan looks at that
//! alone, and costs what changed and not what exists; it emits what a walk would have emitted. Else, and whenever it is
//! not certain what changed, it walks.
//!
//! ```text
//!   watch ──► what something happened to ─┐
//!                                         ├─ walk ──► look ──► what is not as it was sent ── diff ──► records
//!   else: every entry of the tree ────────┘                            state ◄── what the records make of the copy
//! ```

mod apply;
mod clone;
mod diff;
mod held;
mod later;
mod look;
mod make;
mod scan;
mod state;
mod sys;
mod tree;
mod walk;
mod watch;

pub use apply::{ApplyError, Receiver, VerifyError, verify};
pub use clone::Cloning;
pub use held::{Blocks, EachFile, HeldFiles, OutOfOrder, has_blocks, hashes};
pub use scan::{FilesStats, InUse, Phase, ScanError, Scanner};
pub use state::FileId;
pub use tree::{Source, Target};

/// Content is compared and sent in pieces of this many bytes.
pub const BLOCK_SIZE: usize = 64 * 1024;
/// Most that a freeze may hold in memory of what changed, until it can be sent.
pub const FROZEN_BYTES_MAX: u64 = 256 << 20;
/// The longest path within a tree.
pub const PATH_LEN_MAX: usize = 4095;
/// The deepest nesting of directories.
pub const DEPTH_MAX: usize = 256;
/// Extended attributes of one file.
pub const XATTRS_MAX: usize = 128;
/// The longest value of an extended attribute (the kernel's limit).
pub const XATTR_LEN_MAX: usize = 65_536;
