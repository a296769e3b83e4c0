//! The words that every module shares, each defined once: workload names, terms and epochs,
//! pages and address spaces, and the figures of an epoch.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Bytes of a page; the only page size that the tracker and CRIU's images speak of on x86-64.
pub const PAGE_SIZE: u64 = 4096;

/// The fencing token: grows by one with each promotion, starts at 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Term(pub u64);

/// One checkpoint of a workload, numbered from 1 within a term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// An epoch of a term; orders by term first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EpochId {
    /// The term in which the epoch was captured.
    pub term: Term,
    /// Its number within the term.
    pub epoch: Epoch,
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for EpochId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.epoch)
    }
}

/// A workload's name: 1 to 40 characters of `a-z`, `0-9` and `-`, beginning with a letter or digit.
///
/// It becomes part of file, cgroup and device names on both hosts, so nothing else is let in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why a text is no workload name.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no workload name: use 1 to 40 characters of a-z, 0-9 and '-', beginning with a letter or digit"
)]
pub struct NameError(String);

impl Name {
    /// The most characters a name may have.
    pub const LEN_MAX: usize = 40;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of its drill's place. No workload can have it, for the dot; nor is it ever read back or sent.
    #[must_use]
    pub fn of_drill(&self) -> Self {
        Self(format!("{}.drill", self.0))
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::try_from(text.to_owned())
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let fits = (1..=Self::LEN_MAX).contains(&text.len());
        if fits && !text.starts_with('-') && text.bytes().all(allowed) {
            Ok(Self(text))
        } else {
            Err(NameError(text))
        }
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a page's address is relative to: CRIU keeps one page map for each of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Space {
    /// The private memory of a task, by its pid in the workload's pid namespace.
    Task(u32),
    /// A shared memory object, by CRIU's shmid; addresses are offsets in the object.
    Shared(u64),
}

/// A run of pages: `start` is a byte address, a multiple of [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// Address of the first byte.
    pub start: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
}

impl fmt::Display for Resync {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resync_bytes, full_bytes } = self;
        write!(f, "{resync_bytes} bytes for what the standby lacked, instead of {full_bytes} for all")
    }
}

impl Extent {
    /// Address of the first byte behind the run.
    pub fn end(&self) -> u64 {
        self.start + self.pages * PAGE_SIZE
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }
}

/// What an epoch cost, as the primary saw it. All times are of one monotonic clock.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EpochFigures {
    /// Which epoch.
    pub id: EpochId,
    /// From the first task stopped to the last task running again.
    pub frozen_us: u64,
    /// From the start of capture (pre-copy included) to the thaw, but for the time for which it waited to be wanted.
    pub capture_us: u64,
    /// From the thaw to the standby's acknowledgement of the commit.
    pub ship_us: u64,
    /// Pages written since the last epoch × page size.
    pub dirty_bytes: u64,
    /// Bytes handed to QUIC for the epoch.
    pub shipped_bytes: u64,
    /// Memory that the image holds: all pages of all address spaces.
    pub resident_bytes: u64,
    /// Wall clock at the freeze, milliseconds since 1970 (for people and history; decides nothing).
    pub frozen_at_unix_ms: u64,
    /// Whether the whole memory was looked at: it was sent, or compared with what the standby says it holds.
    pub full: bool,
    /// What was compared so.
    #[serde(default)]
    pub resync: Option<Resync>,
    /// Whether what the workload sends after the freeze waits for a later epoch's commit.
    #[serde(default)]
    pub output_held: bool,
}

/// What it took to bring a standby up to date that held an image of which the primary knew nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resync {
    /// Bytes both ways: the standby's hashes and the epoch.
    pub resync_bytes: u64,
    /// Bytes that would have been sent without them: those of the epoch, and what was found to be there already.
    pub full_bytes: u64,
}
