//! A running `criu swrk`: one dump or one restore, and what it says when it refuses.

use std::{
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::{fs::FileExt as _, net::UnixStream},
    },
    time::{Duration, Instant},
};

use super::{
    Install, Version,
    fork_server::ForkServer,
    gate::Gate,
    process::Process,
    rpc::{self, Answer, Kind, Options, Request, Silence},
    spawn::{self, Spawn, SpawnError, Started, slot},
};

/// CRIU's log of a dump, in the images directory.
pub const DUMP_LOG: &str = "dump.log";
/// CRIU's log of a restore, in the images directory.
pub const RESTORE_LOG: &str = "restore.log";

/// CRIU's log level 2: errors and warnings.
const LOG_LEVEL: i32 = 2;
/// Most of a log that is read for its errors.
const LOG_BYTES_MAX: u64 = 4 << 20;
/// Most error lines that are reported.
const REASON_LINES_MAX: usize = 5;
/// How long a CRIU that answered, or was told to give up, is waited for before it is left to a
/// thread that reaps it.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a question about version or features may take: kernel features are probed for it.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a dump or restore did not happen. After a failed dump the workload runs on.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// It could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// CRIU said no.
    #[error("CRIU refused to {what}: {reason}")]
    Refused {
        /// `dump` or `restore`.
        what: &'static str,
        /// The error lines of its log that say why.
        reason: String,
    },
    /// The caller refused at a stage; a dumped tree runs on.
    #[error("the {what} was called off at {stage}")]
    CalledOff {
        /// `dump` or `restore`.
        what: &'static str,
        /// CRIU's name of the stage.
        stage: String,
    },
    /// CRIU ended without an answer.
    #[error("CRIU ended in the middle of {what}: {reason}")]
    Died {
        /// What was being done.
        what: &'static str,
        /// The error lines of its log, or its standard error.
        reason: String,
    },
    /// Nothing was heard of CRIU; it was told to give up, and rolls back as soon as it can.
    #[error("CRIU said nothing for {} s in the middle of {what}; see {log} in the images directory", after.as_secs())]
    Silent {
        /// What was being done.
        what: &'static str,
        /// The time allowed.
        after: Duration,
        /// Its log.
        log: &'static str,
    },
    /// The RPC failed.
    #[error("talking to CRIU about {what} failed: {source}")]
    Rpc {
        /// What was being done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What to dump and what becomes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpOptions {
    /// Root of the tree, as CRIU sees pids.
    pub pid: u32,
    /// Whether the tree runs on (an epoch) or is killed at the end (a handoff).
    pub leave_running: bool,
    /// Path of the parent directory relative to the images directory (see [`super::parent`]).
    /// With it memory is tracked: CRIU writes holes for pages it believes unchanged.
    pub parent: Option<String>,
    /// Resources outside the tree that it may refer to, in CRIU's notation.
    pub external: Vec<String>,
    /// Root directory of a tree that is dumped with its mount namespace.
    pub root: Option<String>,
    /// Its network namespace is in the image as an empty one.
    pub empty_net: bool,
    /// Largest deleted file that is carried inside the image, bytes.
    pub ghost_bytes_max: u32,
    /// How long CRIU may be silent between two notifications.
    pub silence_max: Duration,
}

impl DumpOptions {
    /// An epoch of the tree under `pid`.
    pub fn new(pid: u32) -> Self {
        Self {
            pid,
            leave_running: true,
            parent: None,
            external: Vec::new(),
            root: None,
            empty_net: false,
            ghost_bytes_max: 64 << 20,
            silence_max: Duration::from_secs(60),
        }
    }
}

/// How to restore.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// Whether pages come from a server on `lazy-pages.socket` in the images directory.
    pub lazy: bool,
    /// Name of the images' directory within the one that CRIU was started with; `None` if it is that one.
    pub directory: Option<String>,
    /// Keys of the inherited descriptors, if other than those that CRIU was started with.
    pub inherit: Option<Vec<String>>,
    /// Resources outside the tree, in CRIU's notation.
    pub external: Vec<String>,
    /// How long CRIU may be silent between two notifications; an eager restore reads all pages.
    pub silence_max: Duration,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self {
            lazy: false,
            directory: None,
            inherit: None,
            external: Vec::new(),
            silence_max: Duration::from_secs(300),
        }
    }
}

/// Features of kernel and CRIU together, as CRIU reports them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Soft-dirty tracking (or a bridge that vouches for it).
    pub mem_track: bool,
    /// Restore with pages coming later.
    pub lazy_pages: bool,
}

/// A CRIU that waits for its one task. Dropping it closes its sockets, upon which it ends.
#[derive(Debug)]
pub struct Swrk {
    rpc: Option<OwnedFd>,
    process: Option<Process>,
    pages: Option<UnixStream>,
    gate: Option<Gate>,
    has_pages: bool,
    images: OwnedFd,
    stderr: File,
    inherit: Vec<String>,
    version: Version,
    /// The dump that it was asked for.
    begun: Option<DumpOptions>,
}

impl Swrk {
    /// Starts a CRIU; 10–20 ms, so do it ahead of the freeze.
    pub fn spawn(install: &Install, options: &Spawn<'_>) -> Result<Self, CriuError> {
        let inherit = options.inherit.iter().map(|(key, _)| key.clone()).collect();
        Self::with(install, options.images, inherit, || spawn::start(install, options))
    }

    /// Has one forked, for a dump to the directory `images`; a millisecond.
    pub fn fork(install: &Install, server: &ForkServer, images: BorrowedFd<'_>) -> Result<Self, CriuError> {
        Self::with(install, images, Vec::new(), || server.fork(images))
    }

    fn with(
        install: &Install,
        images: BorrowedFd<'_>,
        inherit: Vec<String>,
        start: impl FnOnce() -> Result<Started, SpawnError>,
    ) -> Result<Self, CriuError> {
        let images = images
            .try_clone_to_owned()
            .map_err(|source| SpawnError::Prepare { what: "keeping the images directory open", source })?;
        let Started { process, ends } = start()?;
        Ok(Self {
            rpc: Some(ends.rpc),
            process: Some(process),
            has_pages: ends.pages.is_some(),
            pages: ends.pages,
            gate: ends.gate,
            images,
            stderr: ends.stderr,
            inherit,
            version: install.version,
            begun: None,
        })
    }

    /// Our end of the page server's socket, for [`super::page_server::serve`] on another thread.
    pub fn take_page_server(&mut self) -> Option<UnixStream> {
        self.pages.take()
    }

    /// Our end of the bridge's socket. If it is not taken, the bridge of a dump asks the kernel for everything.
    pub fn take_gate(&mut self) -> Option<Gate> {
        self.gate.take()
    }

    /// Whether it still waits for its task.
    pub fn is_waiting(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| !process.has_ended())
    }

    /// Its processes in our pid namespace: the one that we started, and CRIU itself if that is its child. Of one that was
    /// forked: none.
    pub fn processes(&self) -> Vec<u32> {
        let Some(pid) = self.process.as_ref().and_then(Process::id) else { return Vec::new() };
        let children =
            std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        std::iter::once(pid).chain(children.split_whitespace().filter_map(|pid| pid.parse().ok())).collect()
    }

    /// The version of this CRIU.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Asks for a dump ahead of time: CRIU makes itself ready, two milliseconds, and waits before it has looked at the tree
    /// (cr_dump_tasks up to ACT_PRE_DUMP) until [`Self::dump`] is called with the same options.
    pub fn begin(&mut self, options: &DumpOptions) -> Result<(), CriuError> {
        let request = Request { opts: Some(self.dump_request(options)), ..Request::with_kind(Kind::Dump) };
        let sent = self.send(&request);
        sent.map_err(|silence| self.explain("dump", silence, options.silence_max, DUMP_LOG))?;
        self.begun = Some(options.clone());
        Ok(())
    }

    /// Dumps a tree. `notify` hears each stage (`pre-dump`, `network-lock`, `post-dump`, …) while
    /// CRIU waits; if it answers false, the dump fails and the tree runs on. At `post-dump` all is
    /// written and the tree still frozen: the last moment to call a handoff off.
    pub fn dump(
        mut self,
        options: &DumpOptions,
        notify: &mut dyn FnMut(&str) -> bool,
    ) -> Result<(), CriuError> {
        self.gate = None;
        match &self.begun {
            None => self.begin(options)?,
            Some(begun) if begun == options => {}
            Some(_) => {
                let source = io::Error::other("it was asked for another dump before");
                return Err(CriuError::Rpc { what: "dump", source });
            }
        }
        self.run("dump", Kind::Dump, options.silence_max, DUMP_LOG, notify)?;
        if !options.leave_running {
            self.end();
        }
        // Otherwise the tree runs, and nobody waits for CRIU's own end.
        Ok(())
    }

    fn dump_request(&self, options: &DumpOptions) -> Options {
        let mut wanted = common_options(DUMP_LOG, &options.external);
        wanted.pid = Some(options.pid as i32);
        wanted.leave_running = Some(options.leave_running);
        wanted.link_remap = Some(true);
        wanted.ghost_limit = Some(options.ghost_bytes_max);
        wanted.track_mem = Some(options.parent.is_some());
        // A client whose connection nobody has accepted yet is no reason to fail: it is not in the image, and should the
        // image be restored the client is told by a reset when it speaks.
        wanted.tcp_skip_in_flight = Some(true);
        wanted.parent_img.clone_from(&options.parent);
        wanted.root.clone_from(&options.root);
        // The restoring side must say so as well, and a runtime does.
        wanted.empty_ns = options.empty_net.then_some(nix::sched::CloneFlags::CLONE_NEWNET.bits() as u32);
        wanted.ext_unix_sk = options.root.is_some().then_some(true);
        wanted.ps = self.has_pages.then_some(rpc::PageServerInfo { fd: Some(slot::PAGES) });
        wanted
    }

    /// Restores the tree of the images directory and returns the pid of its root, as CRIU sees
    /// pids. `notify` hears the stages; answering false fails the restore and kills what was made.
    pub fn restore(
        mut self,
        options: &RestoreOptions,
        notify: &mut dyn FnMut(&str) -> bool,
    ) -> Result<u32, CriuError> {
        let mut wanted = common_options(RESTORE_LOG, &options.external);
        wanted.lazy_pages = Some(options.lazy);
        if let Some(name) = &options.directory {
            let path = format!("/proc/self/fd/{}/{name}", self.images.as_raw_fd());
            let opened = File::open(path).map_err(|source| CriuError::Rpc { what: "restore", source })?;
            self.images = opened.into();
            wanted.images_dir = Some(format!("/proc/self/fd/{}/{name}", slot::IMAGES));
        }
        let keys = options.inherit.clone().unwrap_or_else(|| std::mem::take(&mut self.inherit));
        wanted.inherit_fd = (slot::INHERIT..).zip(keys).map(|(fd, key)| rpc::InheritFd { key, fd }).collect();
        let request = Request { opts: Some(wanted), ..Request::with_kind(Kind::Restore) };
        let sent = self.send(&request);
        sent.map_err(|silence| self.explain("restore", silence, options.silence_max, RESTORE_LOG))?;
        let answer = self.run("restore", Kind::Restore, options.silence_max, RESTORE_LOG, notify)?;
        self.end();
        let pid = answer.restore.and_then(|restored| u32::try_from(restored.pid).ok());
        pid.ok_or_else(|| CriuError::Rpc {
            what: "restore",
            source: io::Error::other("it restored a tree and did not say its pid"),
        })
    }

    /// Asks the version over RPC.
    pub fn ask_version(mut self) -> Result<Version, CriuError> {
        let answer = self.question("version", &Request::with_kind(Kind::Version))?;
        let version = answer.version.unwrap_or_default();
        Ok(Version(
            version.major.max(0) as u32,
            version.minor.max(0) as u32,
            version.sublevel.unwrap_or(0).max(0) as u32,
        ))
    }

    /// Asks which features it finds in this kernel.
    pub fn ask_features(mut self) -> Result<Features, CriuError> {
        let asked = rpc::FeatureFlags { mem_track: Some(true), lazy_pages: Some(true), pidfd_store: None };
        let request = Request { features: Some(asked), ..Request::with_kind(Kind::FeatureCheck) };
        let features = self.question("features", &request)?.features.unwrap_or_default();
        Ok(Features {
            mem_track: features.mem_track.unwrap_or(false),
            lazy_pages: features.lazy_pages.unwrap_or(false),
        })
    }

    fn question(&mut self, what: &'static str, request: &Request) -> Result<Answer, CriuError> {
        let answer = self
            .send(request)
            .and_then(|()| self.receive(QUESTION_TIMEOUT))
            .map_err(|silence| self.explain(what, silence, QUESTION_TIMEOUT, DUMP_LOG))?;
        if answer.success {
            return Ok(answer);
        }
        Err(CriuError::Refused { what, reason: self.reason(&answer, DUMP_LOG) })
    }

    /// Hears what was asked for through to its end. After an error CRIU has ended, or is left to.
    fn run(
        &mut self,
        what: &'static str,
        kind: Kind,
        silence_max: Duration,
        log: &'static str,
        notify: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Answer, CriuError> {
        let mut called_off = None;
        let mut heard = self.receive(silence_max);
        loop {
            let answer = heard.map_err(|silence| self.explain(what, silence, silence_max, log))?;
            if answer.kind != Kind::Notify as i32 {
                if answer.success && answer.kind == kind as i32 {
                    return Ok(answer);
                }
                self.end();
                return Err(match called_off {
                    Some(stage) => CriuError::CalledOff { what, stage },
                    None => CriuError::Refused { what, reason: self.reason(&answer, log) },
                });
            }
            let script = answer.notify.and_then(|notify| notify.script).unwrap_or_default();
            let agreed = notify(&script);
            if !agreed {
                called_off.get_or_insert(script);
            }
            let go_on = Request { notify_success: Some(agreed), ..Request::with_kind(Kind::Notify) };
            heard = self.send(&go_on).and_then(|()| self.receive(silence_max));
        }
    }

    fn send(&self, request: &Request) -> Result<(), Silence> {
        self.rpc.as_ref().map_or(Err(Silence::Ended), |rpc| rpc::ask(rpc, request))
    }

    fn receive(&self, timeout: Duration) -> Result<Answer, Silence> {
        self.rpc.as_ref().map_or(Err(Silence::Ended), |rpc| rpc::answer(rpc, timeout))
    }

    fn explain(
        &mut self,
        what: &'static str,
        silence: Silence,
        after: Duration,
        log: &'static str,
    ) -> CriuError {
        self.end();
        match silence {
            Silence::Ended => CriuError::Died { what, reason: self.reason(&Answer::default(), log) },
            Silence::TimedOut => CriuError::Silent { what, after, log },
            Silence::Io(source) => CriuError::Rpc { what, source },
        }
    }

    /// Closes the sockets and waits a while for the end of the process, so that its log is whole.
    fn end(&mut self) {
        self.rpc = None;
        self.pages = None;
        let Some(mut process) = self.process.take() else { return };
        let until = Instant::now() + END_TIMEOUT;
        while Instant::now() < until {
            if process.has_ended() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        tracing::warn!(?process, "CRIU does not end; leaving it to do so");
    }

    /// Why it failed: its log's errors, else what it answered, else its standard error.
    fn reason(&self, answer: &Answer, log: &str) -> String {
        let from_log = read_log(self.images.as_fd(), log).map(|text| error_lines(&text)).unwrap_or_default();
        let mut said = vec![0; 4096];
        let length = self.stderr.read_at(&mut said, 0).unwrap_or(0);
        let said = String::from_utf8_lossy(&said[..length]);
        let sources = [
            from_log.as_str(),
            answer.message.as_deref().unwrap_or_default().trim(),
            said.trim_matches(['\0', '\n', ' ']),
        ];
        let first = sources.iter().find(|text| !text.is_empty()).map(|text| (*text).to_owned());
        first.unwrap_or_else(|| format!("it gave no reason (error number {})", answer.errno.unwrap_or(0)))
    }
}

fn common_options(log: &str, external: &[String]) -> Options {
    Options {
        // The descriptor of the RPC's own field is looked up under the peer's pid, which means
        // nothing inside another pid namespace (cr-service.c); the path field needs this -1.
        images_dir_fd: -1,
        images_dir: Some(format!("/proc/self/fd/{}", slot::IMAGES)),
        log_level: Some(LOG_LEVEL),
        log_file: Some(log.to_owned()),
        tcp_established: Some(true),
        file_locks: Some(true),
        shell_job: Some(true),
        notify_scripts: Some(true),
        manage_cgroups_mode: Some(rpc::CGROUPS_IGNORE),
        network_lock: Some(rpc::NETWORK_LOCK_SKIP),
        external: external.to_vec(),
        ..Options::default()
    }
}

impl Request {
    fn with_kind(kind: Kind) -> Self {
        Self { kind: kind as i32, ..Self::default() }
    }
}

fn read_log(images: BorrowedFd<'_>, name: &str) -> io::Result<String> {
    let file = File::open(format!("/proc/self/fd/{}/{name}", images.as_raw_fd()))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Errors that CRIU logs where nothing is wrong, or that say only that something else was.
const NOISE: [&str; 6] =
    ["rlim", "tables", "Dumping FAILED", "Restoring FAILED", "RPC client reported", "Can't keep kdat"];

/// The last error lines of a log without the noise, from first to last, without times and files.
pub fn error_lines(log: &str) -> String {
    let lines: Vec<&str> = log
        .lines()
        .filter_map(|line| line.split_once("Error (").map(|(_, rest)| rest))
        .filter_map(|rest| rest.split_once("): ").map(|(_, message)| message.trim()))
        .filter(|message| !NOISE.iter().any(|noise| message.contains(noise)))
        .collect();
    lines[lines.len().saturating_sub(REASON_LINES_MAX)..].join("; ")
}

#[cfg(test)]
mod tests {
    use super::error_lines;

    #[test]
    fn a_refusal_is_told_by_the_errors_and_without_the_noise() {
        let log = "\
(00.010) Warn  (criu/kerndat.c:1): something\n\
(00.020) Error (criu/util.c:2): Can't get rlimit 3: Operation not permitted\n\
(00.021) Error (criu/kerndat.c:9): iptables is missing\n\
(00.030) Error (criu/files-ext.c:98): Can't dump file 5 of that type [20600] (chr 10:229 /dev/fuse)\n\
(00.031) Error (criu/cr-dump.c:1): Dump files (pid: 44) failed with -1\n\
(00.032) Error (criu/cr-dump.c:2): Dumping FAILED.\n";
        assert_eq!(
            error_lines(log),
            "Can't dump file 5 of that type [20600] (chr 10:229 /dev/fuse); Dump files (pid: 44) failed with -1"
        );
        assert_eq!(error_lines(""), "");
    }
}
