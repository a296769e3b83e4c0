//! The bridge: the library that is preloaded into CRIU (see `bridge/bridge.c`), and its cache directory.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

use super::Version;

/// The library, compiled by the build script.
const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bridge.so"));

/// Why the bridge cannot be laid.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// No memory file.
    #[error("holding the preload library in a sealed memory file failed: {0}")]
    Library(#[source] io::Error),
    /// No cache directory.
    #[error("making the kernel feature cache {path} failed: {source}. Give the agent a writable state directory", path = .path.display())]
    Cache {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The preload library in a sealed memory file, and the directory of CRIU's kernel feature cache.
/// Both are handed to CRIU as descriptors, so they need not be visible in its mount namespace.
#[derive(Debug)]
pub struct Bridge {
    library: File,
    kerndat: File,
}

impl Bridge {
    /// Lays the bridge for a CRIU of `version`; the cache goes to a directory below `state`, named
    /// after the boot and the version, since what it says holds for these alone.
    pub fn new(state: &Path, version: Version) -> Result<Self, BridgeError> {
        let library = sealed_library().map_err(BridgeError::Library)?;
        let path = state.join(cache_name(version).map_err(BridgeError::Library)?);
        let cache = |source| BridgeError::Cache { path: path.clone(), source };
        std::fs::create_dir_all(&path).map_err(cache)?;
        let kerndat = File::open(&path).map_err(cache)?;
        Ok(Self { library, kerndat })
    }

    pub(super) fn library(&self) -> BorrowedFd<'_> {
        self.library.as_fd()
    }

    pub(super) fn kerndat(&self) -> BorrowedFd<'_> {
        self.kerndat.as_fd()
    }
}

fn cache_name(version: Version) -> io::Result<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(format!("kerndat-{version}-{}", boot.trim()))
}

fn sealed_library() -> io::Result<File> {
    let fd = memfd_create(c"standin-bridge", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(LIBRARY)?;
    let seals =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}
