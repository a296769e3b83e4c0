//! A device that takes its time: a file whose reads go past the page cache (FUSE, with this process as its server) and are
//! answered when the test says so. The kernel takes hold of the reader's pages when the read begins, and the answer is
//! copied to them without the page tables, as a disk's controller does.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// What the mount table says is mounted.
const SOURCE: &str = "standin-test";
/// What every read gives.
pub(crate) const CONTENT: u8 = 0xd1;
/// Of the file.
pub(crate) const PAGES: usize = 16;

/// Most bytes of a request without data (FUSE_MIN_READ_BUFFER).
const REQUEST_BYTES: usize = 8192;
/// `struct fuse_in_header`.
const HEAD_BYTES: usize = 40;
/// Operations (linux/fuse.h). A mount whose root is a file needs no more.
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// The mounted file; unmounted when dropped.
pub(crate) struct Device {
    path: PathBuf,
    reading: Arc<AtomicBool>,
    go: Sender<()>,
    _dir: tempfile::TempDir,
}

impl Device {
    pub(crate) fn mount() -> Self {
        clear_dead();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device");
        File::create(&path).unwrap();
        let wire =
            File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=100644,user_id=0,group_id=0,allow_other", wire.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some(SOURCE), &path, Some("fuse"), flags, Some(options.as_str())).unwrap();
        let (go, answer) = channel();
        let reading = Arc::new(AtomicBool::new(false));
        let server = Server { wire, reading: reading.clone(), answer };
        thread::spawn(move || server.serve());
        Self { path, reading, go, _dir: dir }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a read is held up.
    pub(crate) fn is_reading(&self) -> bool {
        self.reading.load(SeqCst)
    }

    /// Answers one read, when told.
    pub(crate) fn answerer(&self) -> Sender<()> {
        self.go.clone()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

/// Takes away what a test has left that was killed: nobody serves it any more.
fn clear_dead() {
    for line in fs::read_to_string("/proc/self/mounts").unwrap().lines() {
        let [source, path, "fuse", ..] = line.split(' ').collect::<Vec<_>>()[..] else { continue };
        let is_dead = |error: &std::io::Error| error.raw_os_error() == Some(libc::ENOTCONN);
        if source == SOURCE && fs::metadata(path).is_err_and(|error| is_dead(&error)) {
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
    }
}

/// Reads the file as a program does that bypasses the page cache.
pub(crate) fn open(path: &Path) -> File {
    fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

struct Server {
    wire: File,
    reading: Arc<AtomicBool>,
    answer: Receiver<()>,
}

impl Server {
    /// Until it is unmounted everywhere.
    fn serve(mut self) {
        let mut request = vec![0; REQUEST_BYTES * 2];
        while let Ok(got) = self.wire.read(&mut request) {
            assert!(got >= HEAD_BYTES);
            let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
            let unique = &request[8..16];
            let body = match word(4) {
                FORGET | BATCH_FORGET | INTERRUPT => continue,
                INIT => Ok(init()),
                GETATTR => Ok(attributes()),
                // Its own number, and FOPEN_DIRECT_IO.
                OPEN => Ok(words(&[0, 0, 1, 0])),
                READ => {
                    self.reading.store(true, SeqCst);
                    // A test that has ended lets nobody wait.
                    let _ = self.answer.recv();
                    let offset = word(HEAD_BYTES + 8) as usize;
                    let size = word(HEAD_BYTES + 16) as usize;
                    Ok(vec![CONTENT; size.min((PAGES * 4096).saturating_sub(offset))])
                }
                RELEASE | FLUSH => Ok(Vec::new()),
                _ => Err(libc::ENOSYS),
            };
            let error = body.as_ref().err().map_or(0, |error| -error);
            let body = body.unwrap_or_default();
            let mut reply = words(&[16 + body.len() as u32, error as u32]);
            reply.extend_from_slice(unique);
            reply.extend_from_slice(&body);
            // Whoever asked may have gone.
            let _ = self.wire.write(&reply);
        }
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `struct fuse_init_out` of version 7.31: without read-ahead and any feature, writes of a page at most.
fn init() -> Vec<u8> {
    let mut out = words(&[7, 31, 0, 0, 0, 4096, 1]);
    out.resize(64, 0);
    out
}

/// `struct fuse_attr_out`: a file for everybody.
fn attributes() -> Vec<u8> {
    let size = PAGES as u32 * 4096;
    let (times, blocks) = ([0; 6 + 3], size / 512);
    let mut out = words(&[0, 0, 0, 0, 1, 0, size, 0, blocks, 0]);
    out.extend(words(&times));
    // Mode, links, owner, group, device, size of a block, flags.
    out.extend(words(&[libc::S_IFREG | 0o644, 1, 0, 0, 0, 4096, 0]));
    assert_eq!(out.len(), 104);
    out
}
