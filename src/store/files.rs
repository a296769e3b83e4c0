//! Changes of the replicated files: kept as a redo log with their epoch, applied when it is folded.
//!
//! What applying means is not the store's business: whoever opens it hands in [`ApplyFiles`].

use std::{
    fs::File,
    io::{self, BufReader, Read, Write},
    path::{Path, PathBuf},
};

use super::disk::Durability;
use crate::wire::message::FileRecord;

/// Applies an epoch's file records. It is called in the order of the epochs, and may be called again for
/// an epoch that was applied before (and for those behind it), as after a crash: so each record must
/// bring about what it says whatever is found in its place.
pub type ApplyFiles = Box<dyn Fn(&FileChanges<'_>) -> io::Result<()> + Send + Sync>;

/// Longest encoded record (its path, link target and attributes), and longest body of one.
const HEAD_LEN_MAX: usize = 4 << 20;
/// Longest body of a record.
pub const FILE_BODY_LEN_MAX: usize = 16 << 20;

/// The changes of files that belong to an epoch.
#[derive(Debug)]
pub struct FileChanges<'a> {
    /// Directory of the store that is meant for the trees; made, and otherwise left to the hook.
    pub tree: &'a Path,
    /// The epoch was sent whole: entries of the trees that no record names are gone.
    pub full: bool,
    /// What the changes must outlive once the hook has returned.
    pub durability: Durability,
    pub(super) log: PathBuf,
}

impl FileChanges<'_> {
    /// Calls `each` for every record, in the order in which they were staged, with its body.
    pub fn for_each(&self, mut each: impl FnMut(&FileRecord, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut log = BufReader::with_capacity(1 << 18, File::open(&self.log)?);
        let mut body = Vec::new();
        loop {
            let mut lens = [0; 8];
            match log.read(&mut lens[..1])? {
                0 => return Ok(()),
                _ => log.read_exact(&mut lens[1..])?,
            }
            let [head_len, body_len] = [0, 4]
                .map(|at| u32::from_le_bytes([lens[at], lens[at + 1], lens[at + 2], lens[at + 3]]) as usize);
            if head_len > HEAD_LEN_MAX || body_len > FILE_BODY_LEN_MAX {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a length in the log of file changes",
                ));
            }
            body.resize(head_len, 0);
            log.read_exact(&mut body)?;
            let record: FileRecord = serde_json::from_slice(&body)?;
            body.resize(body_len, 0);
            log.read_exact(&mut body)?;
            each(&record, &body)?;
        }
    }
}

/// Appends one record; `false` if it is too long.
pub(super) fn append(log: &mut impl Write, record: &FileRecord, body: &[u8]) -> io::Result<bool> {
    let head = serde_json::to_vec(record)?;
    if head.len() > HEAD_LEN_MAX || body.len() > FILE_BODY_LEN_MAX {
        return Ok(false);
    }
    log.write_all(&(head.len() as u32).to_le_bytes())?;
    log.write_all(&(body.len() as u32).to_le_bytes())?;
    log.write_all(&head)?;
    log.write_all(body)?;
    Ok(true)
}
