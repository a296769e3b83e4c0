//! What this kernel and this CRIU can do together, found out by doing it.
//!
//! `criu check` is not enough: CRIU 4.1 passes it on kernel 6.18 and cannot dump a TCP socket
//! there. So [`round_trip`] dumps and restores a real process that holds an established TCP
//! connection, in namespaces of its own that vanish with it.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::{
    Install,
    bridge::{Bridge, BridgeError},
    spawn::{Place, Spawn},
    swrk::{CriuError, DumpOptions, RestoreOptions, Swrk},
    sys,
};

/// How long a room may take to come up, and its process to be heard.
const ROOM_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the process is looked at meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);
/// How much further it must count to be believed alive.
const COUNTS: u64 = 5;
/// A room's program comes right behind its init.
const PROGRAM_PID: u32 = 2;
/// CRIU's own processes start far above it.
const PIDS_ABOVE: u32 = 1000;

/// What this kernel offers, and lets us use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The PAGEMAP_SCAN ioctl (Linux 6.7).
    pub pagemap_scan: bool,
    /// userfaultfd with asynchronous write protection, of untouched memory too (Linux 6.7).
    pub uffd_wp_async: bool,
    /// The same for what an unprivileged task may open: UFFD_USER_MODE_ONLY.
    pub uffd_user_mode_only: bool,
    /// Attaching to another process with ptrace.
    pub ptrace: bool,
    /// Taking a descriptor of another process (Linux 5.6).
    pub pidfd_getfd: bool,
    /// Soft-dirty page tracking, which CRIU's own incremental dumps use.
    pub soft_dirty: bool,
}

impl Kernel {
    /// Tries each. `launcher`, our own program, makes a process to try things on.
    pub fn probe(launcher: &Path) -> io::Result<Self> {
        let mut idle = Command::new(launcher)
            .args(["enter", "idle"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pid = nix::unistd::Pid::from_raw(idle.id() as i32);
        let (ptrace, pidfd_getfd) = (sys::can_trace(pid), sys::can_take_descriptor(pid));
        // It ends with its standard input.
        drop(idle.stdin.take());
        idle.wait()?;
        Ok(Self {
            pagemap_scan: sys::has_pagemap_scan()?,
            uffd_wp_async: sys::has_uffd_wp_async(false),
            uffd_user_mode_only: sys::has_uffd_wp_async(true),
            ptrace,
            pidfd_getfd,
            soft_dirty: sys::has_soft_dirty()?,
        })
    }
}

/// Durations of a dump and restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundTrip {
    /// Dump of a small process with a TCP connection, spawning of CRIU not included.
    pub dump: Duration,
    /// Its restore, likewise.
    pub restore: Duration,
}

/// Why a process could not be dumped and restored.
#[derive(Debug, thiserror::Error)]
pub enum RoundTripError {
    /// Namespaces, directories, our own processes.
    #[error("{what} for the trial failed: {source}")]
    Prepare {
        /// What was being done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The bridge.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// CRIU said no. Usually its version does not fit the kernel.
    #[error("{source}. If this CRIU is older than the kernel, run scripts/setup for a newer one")]
    Criu {
        /// What CRIU said.
        #[from]
        source: CriuError,
    },
    /// It was restored and does not go on.
    #[error(
        "the process was {after} and is not heard over its TCP connection: this CRIU does not work with this kernel, run scripts/setup for a newer one"
    )]
    Mute {
        /// Started, or restored.
        after: &'static str,
    },
}

/// Namespaces of their own with a reaping init, and a program in them. They end when this is dropped.
#[derive(Debug)]
pub struct Room {
    holder: Child,
    init: u32,
    pidfd: OwnedFd,
}

impl Room {
    /// Makes a room whose root, a view of the host's, is mounted at the directory `root` (in the
    /// room's own mount namespace). The program becomes pid 2, leader of a session.
    pub fn start(install: &Install, root: &Path, program: &[PathBuf]) -> io::Result<Self> {
        let mut holder = Command::new(install.launcher())
            .args(["enter", "room"])
            .arg(root)
            .args(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let stdout = holder.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        BufReader::new(stdout).read_line(&mut line)?;
        let Ok(init) = line.trim().parse::<u32>() else {
            let output = holder.wait_with_output()?;
            return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        };
        let pidfd = sys::pidfd_open(init)?;
        let room = Self { holder, init, pidfd };
        room.wait_for_root()?;
        Ok(room)
    }

    /// The init's pid, as the caller sees pids.
    pub fn init(&self) -> u32 {
        self.init
    }

    /// The place for a CRIU.
    pub fn place(&self) -> Place<'_> {
        Place::Inside { init: self.pidfd.as_fd(), cgroup: false, ipc: Some(self.pidfd.as_fd()) }
    }

    /// Waits until a pid inside is free again: the kill that ends a dump is over before the init
    /// has reaped the dead.
    fn wait_for_end(&self, pid: u32) -> io::Result<()> {
        let entry = PathBuf::from(format!("/proc/{}/root/proc/{pid}", self.init));
        let until = Instant::now() + ROOM_TIMEOUT;
        while entry.exists() {
            if Instant::now() > until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        Ok(())
    }

    /// The init is named before it has a root of its own; a proc that is of its namespace is the
    /// last thing it mounts.
    fn wait_for_root(&self) -> io::Result<()> {
        let until = Instant::now() + ROOM_TIMEOUT;
        let own = PathBuf::from(format!("/proc/{}/root/proc/self", self.init));
        while Instant::now() < until {
            // Our own pid has no name there, so the link has no target, while the host's proc
            // resolves it.
            match fs::read_link(&own) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                _ => std::thread::sleep(LOOK_INTERVAL),
            }
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the room did not come up"))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        // It kills its init, which takes the room's processes and mounts along.
        let _ = self.holder.wait();
    }
}

/// Dumps a process that holds an established TCP connection, and restores it, below the directory
/// `scratch`, which must be empty and is the caller's to remove.
pub fn round_trip(install: &Install, scratch: &Path) -> Result<RoundTrip, RoundTripError> {
    let prepare = |what| move |source| RoundTripError::Prepare { what, source };
    let directory = |name: &str| {
        let path = scratch.join(name);
        fs::create_dir(&path).map(|()| path).map_err(prepare("making a directory"))
    };
    let (root, images) = (directory("root")?, directory("images")?);
    let bridge = Bridge::new(scratch, install.version)?;
    let counter = scratch.join("counter");
    let program = fs::read_link(install.launcher()).unwrap_or_else(|_| install.launcher().to_owned());
    let program = [program, "enter".into(), "echo".into(), counter.clone()];
    let room = Room::start(install, &root, &program).map_err(prepare("making namespaces"))?;
    hear(&counter, 0).ok_or(RoundTripError::Mute { after: "started" })?;

    let images = File::open(&images).map_err(prepare("opening the images directory"))?;
    let start = |pids_above| {
        let bridge = Some(&bridge);
        let options = Spawn { place: room.place(), bridge, pids_above, ..Spawn::new(images.as_fd()) };
        Swrk::spawn(install, &options)
    };
    let criu = start(None)?;
    let began = Instant::now();
    let options = DumpOptions { leave_running: false, ..DumpOptions::new(PROGRAM_PID) };
    criu.dump(&options, &mut |_| true)?;
    let dump = began.elapsed();
    let counted = read_counter(&counter).unwrap_or(0);

    room.wait_for_end(PROGRAM_PID).map_err(prepare("waiting for the end of the dumped process"))?;

    let criu = start(Some(PIDS_ABOVE))?;
    let began = Instant::now();
    criu.restore(&RestoreOptions::default(), &mut |_| true)?;
    let restore = began.elapsed();
    hear(&counter, counted).ok_or(RoundTripError::Mute { after: "restored" })?;
    Ok(RoundTrip { dump, restore })
}

fn read_counter(file: &Path) -> Option<u64> {
    Some(u64::from_le_bytes(fs::read(file).ok()?.try_into().ok()?))
}

/// Waits until the process has counted on from `from`.
fn hear(file: &Path, from: u64) -> Option<u64> {
    let until = Instant::now() + ROOM_TIMEOUT;
    while Instant::now() < until {
        match read_counter(file) {
            Some(count) if count >= from + COUNTS => return Some(count),
            _ => std::thread::sleep(LOOK_INTERVAL),
        }
    }
    None
}
