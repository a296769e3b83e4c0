//! Small files that only their owner may read, replaced or created as a whole: a crash leaves the old
//! content or the new one.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Why a private file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// The system refused.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Others may read or write it.
    #[error("{} is open to other users (mode {mode:04o}): check who had access, then `chmod {wanted} {}`", path.display(), path.display())]
    Open {
        /// The file or directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// The mode that it should have.
        wanted: &'static str,
    },
    /// Longer than any that this program writes.
    #[error("{} is longer than {max} bytes, which no release writes: restore it from a backup or remove it", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The limit.
        max: u64,
    },
}

fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PrivateFileError {
    move |source| PrivateFileError::Io { doing, path: path.to_owned(), source }
}

/// Makes sure of a directory that others cannot write to; a new one is closed to them altogether.
pub(super) fn make_dir(dir: &Path) -> Result<(), PrivateFileError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io("create directory", dir))?;
    let mode = fs::metadata(dir).map_err(io("look at", dir))?.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(PrivateFileError::Open { path: dir.to_owned(), mode, wanted: "700" });
    }
    Ok(())
}

/// Reads a file of at most `len_max` bytes; `None` if there is none.
pub(super) fn read(path: &Path, len_max: u64) -> Result<Option<Vec<u8>>, PrivateFileError> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(io("open", path))?,
    };
    let mode = file.metadata().map_err(io("look at", path))?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(PrivateFileError::Open { path: path.to_owned(), mode, wanted: "600" });
    }
    let mut bytes = Vec::new();
    file.take(len_max + 1).read_to_end(&mut bytes).map_err(io("read", path))?;
    if bytes.len() as u64 > len_max {
        return Err(PrivateFileError::TooLong { path: path.to_owned(), max: len_max });
    }
    Ok(Some(bytes))
}

/// Writes a file in place of whatever is there; durable when this returns.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), PrivateFileError> {
    let temp = write_beside(path, bytes)?;
    fs::rename(&temp, path).map_err(io("replace", path))?;
    sync_parent(path)
}

/// Writes a file unless there is one, in which case it returns false; durable when this returns.
pub(super) fn create(path: &Path, bytes: &[u8]) -> Result<bool, PrivateFileError> {
    let temp = write_beside(path, bytes)?;
    // A hard link fails if the name is taken, where a rename would overwrite what another process made.
    let linked = fs::hard_link(&temp, path);
    fs::remove_file(&temp).map_err(io("remove", &temp))?;
    match linked {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        linked => linked.map_err(io("create", path))?,
    }
    sync_parent(path)?;
    Ok(true)
}

fn write_beside(path: &Path, bytes: &[u8]) -> Result<PathBuf, PrivateFileError> {
    let mut suffix = [0; 8];
    getrandom::fill(&mut suffix)
        .map_err(|e| io("get random bytes for", path)(io::Error::other(e.to_string())))?;
    let temp = path.with_extension(format!("{:016x}.new", u64::from_le_bytes(suffix)));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temp)
        .map_err(io("create", &temp))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if let Err(e) = written {
        // What is reported is why the write failed; a left-over file does no harm.
        let _ = fs::remove_file(&temp);
        return Err(io("write", &temp)(e));
    }
    Ok(temp)
}

fn sync_parent(path: &Path) -> Result<(), PrivateFileError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("sync directory", dir))
}
