//! What the copy of a container writes to its standard streams.
//!
//! A container's engine has the other ends of those, and a process of ours beside the tree might have one of its pids: so a
//! thread of the agent's takes it in, for as long as anybody has one of the streams open.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::Path,
};

use super::super::home::LOG_BYTES_MAX;

/// For a standard stream by its number: input on which nothing comes, nor its end; or output, whose beginning is kept in the
/// file behind what is there.
pub(super) fn stream(number: u8, log: &Path) -> io::Result<OwnedFd> {
    let (read, write) = io::pipe()?;
    if number == 0 {
        // Whoever has it open can write to it too, so that it never ends.
        let path = format!("/proc/self/fd/{}", read.as_raw_fd());
        return Ok(OpenOptions::new().read(true).write(true).open(path)?.into());
    }
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(log)?;
    std::thread::spawn(move || keep(read, file));
    Ok(write.into())
}

/// Takes everything in, lest the tree wait for its reader.
fn keep(mut read: io::PipeReader, mut file: File) {
    let mut piece = vec![0; 64 << 10];
    while let Ok(length @ 1..) = read.read(&mut piece) {
        let has_room = file.metadata().is_ok_and(|found| found.len() + length as u64 <= LOG_BYTES_MAX);
        if has_room {
            // What a full disk refuses is lost.
            let _ = file.write_all(&piece[..length]);
        }
    }
}
