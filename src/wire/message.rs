//! What two agents say to each other: requests on the lease connection, heartbeats in its datagrams,
//! and the heads of an epoch's frames on the bulk connection.

use serde::{Deserialize, Serialize};

use super::examine::{Answer, Question};
use super::inventory::{Ask, Held};
use crate::{
    delta::BatchHead,
    files::Blocks,
    ha::Message,
    model::{EpochId, Extent, Name, Space, Term},
    workload::spec::WorkloadSpec,
};

/// A datagram on the lease connection: a heartbeat or its acknowledgement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Workload.
    pub name: Name,
    /// [`Message::Heartbeat`] or [`Message::Ack`], no other.
    pub message: Message,
}

/// A request on a stream of the lease connection; each is answered by one [`Reply`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The primary asks the peer to be (or stay) its standby.
    Offer {
        /// The workload, whole.
        spec: Box<WorkloadSpec>,
        /// The primary's term.
        term: Term,
        /// Bytes of memory that the image will need at least.
        resident_bytes: u64,
    },
    /// The peer's core speaks to ours.
    Tell {
        /// Workload.
        name: Name,
        /// What it says.
        message: Message,
    },
    /// An operator compares the two hosts.
    Examine(Question),
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To `Offer`: accepted; the epoch that the store holds, if any.
    Accepted {
        /// Newest committed epoch.
        held: Option<EpochId>,
    },
    /// To `Tell`: heard. What the core has to say to it comes as a request of its own.
    Done,
    /// To `Tell`: an answer at once, from an agent that does not know the workload.
    Said(Message),
    /// No, and why, for people.
    Refused {
        /// The highest term the answering side knows (newer than the asker's if that is the reason).
        term: Term,
        /// What is wrong and what to do about it.
        reason: String,
    },
    /// To `Examine`: what was asked.
    Examined(Answer),
}

/// The head of one frame of an epoch; some are followed by a body of bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FrameHead {
    /// First frame.
    Begin {
        /// Workload.
        name: Name,
        /// Which epoch follows.
        id: EpochId,
        /// The epoch that the standby must hold for this delta to apply; `None`: all memory follows.
        base: Option<EpochId>,
    },
    /// Changed pages; the body is packed as the head says. A later frame overrides an earlier one.
    Pages(BatchHead),
    /// A piece of one of CRIU's small images; the body is the piece. The pieces of an image follow each
    /// other without a gap, with no other frame between them.
    Image {
        /// File name, no directory: `core-2.img`.
        name: String,
        /// Where the piece begins in the file.
        offset: u64,
        /// Whether another piece of this image follows.
        more: bool,
    },
    /// A change of the replicated files; the body depends on the record.
    File(FileRecord),
    /// The list of all pages that the image holds; pages not in it are dropped.
    Manifest(Manifest),
    /// Last frame.
    End {
        /// BLAKE3 of every byte of the epoch before this frame.
        digest: [u8; 32],
    },
    /// Not of an epoch, but of a supply: the next bytes of an engine's archive, the body. See [`super::supply`].
    Piece,
    /// Instead of an epoch: what does the standby hold? See [`super::inventory`].
    Ask(Ask),
    /// Of the answer to that.
    Held(Held),
    /// Instead of an epoch: what is sent to this workload follows, as it comes, and has no end.
    Inputs {
        /// Workload.
        name: Name,
    },
    /// One IP packet of that, the body.
    Input {
        /// It came after this epoch's freeze, and maybe before it.
        after: EpochId,
        /// Which of the workload's devices it came by.
        door: u8,
    },
}

/// Which pages an epoch's image holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// One entry for each address space.
    pub spaces: Vec<SpaceMap>,
}

/// The pages of one address space, ascending and without overlap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceMap {
    /// Which.
    pub space: Space,
    /// The pages.
    pub extents: Vec<Extent>,
}

/// One change of a replicated file tree. `tree` indexes [`crate::workload::spec::SandboxSpec::paths`];
/// `path` is relative to it, without `..`, empty for the tree's root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileRecord {
    /// The entry exists with these properties; content follows in `Data` records if it changed.
    Entry {
        /// Which tree.
        tree: u32,
        /// Where in it (bytes of a Unix path).
        path: Vec<u8>,
        /// What it is.
        meta: FileMeta,
    },
    /// Bytes of a regular file at an offset: the body.
    Data {
        /// Which tree.
        tree: u32,
        /// Where in it.
        path: Vec<u8>,
        /// Offset of the body in the file.
        offset: u64,
    },
    /// Of a tree that is sent whole, before the file's `Entry`: these blocks of what is there stay, all else of it goes.
    Keep {
        /// Which tree.
        tree: u32,
        /// Where in it.
        path: Vec<u8>,
        /// Blocks of [`crate::files::BLOCK_SIZE`], ascending.
        runs: Vec<Blocks>,
        /// BLAKE3 of their content, one after the other.
        digest: [u8; 32],
    },
    /// The entry, and everything below it, is gone; a tree's root stays, empty.
    Remove {
        /// Which tree.
        tree: u32,
        /// Where in it.
        path: Vec<u8>,
    },
}

/// Properties of a replicated file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMeta {
    /// Type of file.
    pub kind: FileKind,
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes, name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Type of a replicated file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// Regular file of this size; a hole where no `Data` was ever sent.
    Regular {
        /// Bytes.
        size: u64,
    },
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink {
        /// Its text.
        target: Vec<u8>,
    },
    /// Another name of a file that was sent earlier.
    HardLink {
        /// Path of the first name, relative to the same tree.
        to: Vec<u8>,
    },
    /// Named pipe.
    Fifo,
    /// Character or block device node, with its number.
    Device {
        /// Block device if true, else character device.
        block: bool,
        /// `st_rdev`.
        rdev: u64,
    },
}

/// The standby's answer to an epoch, one on each epoch's stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EpochAnswer {
    /// Held whole and verified; it would be restored if the primary vanished now.
    Committed {
        /// Which.
        id: EpochId,
        /// How long the standby kept the link waiting for it: its store behind the network, then the commit.
        /// Microseconds.
        busy_us: u64,
    },
    /// The delta does not apply: send the whole memory.
    NeedFull {
        /// What is held instead.
        held: Option<EpochId>,
        /// Why, for people.
        reason: String,
    },
    /// Refused: out of space, an older term, a lie.
    Refused {
        /// The highest term the standby knows.
        term: Term,
        /// What is wrong and what to do about it.
        reason: String,
    },
}
