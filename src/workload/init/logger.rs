//! The init's child that writes the workload's output to its log file.
//!
//! A process of its own, because writing may wait for a disk, and the guard may not. It is told of each pipe
//! by a packet on its socket, with the read end beside it, and tells the init the pipe's inode when the
//! last writer has gone. The init keeps a read end too, so if this child is killed, the workload's writes
//! wait (or, with the pipe not full, succeed) until the init has started another one.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::PathBuf,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{super::control, leave_stdio, older_log};

/// A file that begins anew when it is full; the one before is kept under another name.
struct Log {
    path: PathBuf,
    bytes_max: u64,
    file: Option<(File, u64)>,
}

impl Log {
    /// Writes, or loses the bytes if the disk refuses them: the workload must not wait for its log.
    fn write(&mut self, bytes: &[u8]) {
        if self.file.as_ref().is_some_and(|(_, length)| length + bytes.len() as u64 > self.bytes_max) {
            self.file = None;
            let _ = fs::rename(&self.path, older_log(&self.path));
        }
        if self.file.is_none() {
            let open = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path);
            self.file = open.and_then(|file| file.metadata().map(|meta| (file, meta.len()))).ok();
        }
        if let Some((file, length)) = &mut self.file {
            match file.write_all(bytes) {
                Ok(()) => *length += bytes.len() as u64,
                Err(_) => self.file = None,
            }
        }
    }
}

/// The inode of a pipe: what `pipe:[…]` names.
pub(super) fn inode(pipe: &OwnedFd) -> nix::Result<u64> {
    nix::sys::stat::fstat(pipe).map(|stat| stat.st_ino)
}

/// The child's whole life. `socket` is its only descriptor besides the standard ones.
pub(super) fn run(socket: &OwnedFd, path: PathBuf, bytes_max: u64) -> ! {
    let _ = leave_stdio();
    let mut log = Log { path, bytes_max, file: None };
    let mut pipes: Vec<File> = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    // Without the init, a guard that has left the tree, it goes on for what has its pipes.
    let mut alone = false;
    while !alone || !pipes.is_empty() {
        let mut fds: Vec<PollFd<'_>> =
            pipes.iter().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)).collect();
        fds.extend((!alone).then(|| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        let _ = poll(&mut fds, PollTimeout::NONE);
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let told = ready.get(pipes.len()).copied().unwrap_or(false);
        // Backwards, so that removing one does not move those still to come.
        for i in (0..pipes.len()).rev().filter(|i| ready[*i]) {
            match pipes[i].read(&mut buffer) {
                Ok(0) => {
                    let gone: OwnedFd = pipes.remove(i).into();
                    if let Ok(inode) = inode(&gone) {
                        let _ = control::send(socket.as_fd(), &inode, &[]);
                    }
                }
                Ok(length) => log.write(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => drop(pipes.remove(i)),
            }
        }
        if told {
            match control::recv::<()>(socket.as_fd()) {
                Ok(Some(((), fds))) => pipes.extend(fds.into_iter().map(File::from)),
                Ok(None) => alone = true,
                Err(_) => {}
            }
        }
    }
    std::process::exit(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_never_holds_more_than_twice_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Log { path: path.clone(), bytes_max: 100, file: None };
        for i in 0..50u8 {
            log.write(&[i; 30]);
        }
        let (new, old) = (fs::read(&path).unwrap(), fs::read(older_log(&path)).unwrap());
        assert!(new.len() <= 100 && old.len() <= 100);
        assert_eq!(new.last(), Some(&49));
    }
}
