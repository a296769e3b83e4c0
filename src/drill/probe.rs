//! The probe: a command that runs beside the restored workload, in its namespaces and cgroup, for a limited time. What it sees
//! of files is what the workload sees: of a container those of the container.

use std::{
    io::{self, Read},
    os::{
        fd::OwnedFd,
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

/// Most bytes of a probe's output that are kept: the first ones.
pub const SHOWN_BYTES_MAX: usize = 64 << 10;
/// How often the probe's end and the drill's are looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// How long the output's end is waited for after the probe's: something that it started may have it open.
const OUTPUT_PATIENCE: Duration = Duration::from_millis(500);

/// How a probe ended and what it said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProbeResult {
    /// As given.
    pub command: String,
    /// Its exit status; none if it did not come to its end.
    pub exit: Option<i32>,
    /// It was ended because its time was up.
    pub timed_out: bool,
    /// Milliseconds.
    pub took_ms: f64,
    /// Standard output and error, as they came.
    pub output: String,
    /// There was more of it.
    pub cut: bool,
}

impl ProbeResult {
    /// Whether it is content.
    pub fn is_content(&self) -> bool {
        self.exit == Some(0)
    }

    /// For a sentence that begins with "the probe".
    pub fn ending(&self) -> String {
        match self.exit {
            _ if self.timed_out => format!("was ended after {:.1} s", self.took_ms / 1e3),
            Some(code) => format!("ended with exit status {code}"),
            None => "was killed".to_owned(),
        }
    }
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It could not be started, or its end not be waited for.
    #[error("the probe could not be run: {0}")]
    Run(#[from] io::Error),
    /// The drill ended under it.
    #[error("the drill ended before the probe did")]
    Interrupted,
}

/// Where and as what probes run.
#[derive(Debug)]
pub struct Prober {
    /// This executable.
    pub program: PathBuf,
    /// A pidfd of the place's init.
    pub init: OwnedFd,
    /// The cgroup of the restored tree.
    pub cgroup: PathBuf,
    /// The probe's environment beside `PATH` and `HOME`.
    pub env: Vec<(&'static str, String)>,
}

#[derive(Default)]
struct Heard {
    bytes: Vec<u8>,
    cut: bool,
    over: bool,
}

impl Prober {
    /// Runs one; `interrupted` is asked now and then whether to give up.
    pub fn run(
        self,
        command: &str,
        limit: Duration,
        interrupted: impl Fn() -> bool,
    ) -> Result<ProbeResult, ProbeError> {
        let (reader, writer) = io::pipe()?;
        let began = Instant::now();
        let mut child = Command::new(&self.program)
            .args(["enter", "probe"])
            .arg(&self.cgroup)
            .arg(command)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/root")
            .envs(self.env)
            .current_dir("/")
            .stdin(Stdio::from(self.init))
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .process_group(0)
            .spawn()?;
        let heard = listen(reader);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if interrupted() {
                end(&mut child);
                return Err(ProbeError::Interrupted);
            }
            if began.elapsed() >= limit {
                end(&mut child);
                break None;
            }
            std::thread::sleep(LOOK_INTERVAL);
        };
        let took_ms = began.elapsed().as_secs_f64() * 1e3;
        let until = Instant::now() + OUTPUT_PATIENCE;
        while !lock(&heard).over && Instant::now() < until {
            std::thread::sleep(LOOK_INTERVAL);
        }
        let heard = lock(&heard);
        Ok(ProbeResult {
            command: command.to_owned(),
            // Of one that a signal has ended a shell says the same.
            exit: status.and_then(|status| status.code().or_else(|| Some(128 + status.signal()?))),
            timed_out: status.is_none(),
            took_ms,
            output: String::from_utf8_lossy(&heard.bytes).into_owned(),
            cut: heard.cut,
        })
    }
}

/// Ends it, and what it has started in its process group.
fn end(child: &mut Child) {
    // Gone already: nothing to end.
    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    let _ = child.wait();
}

fn lock(heard: &Mutex<Heard>) -> std::sync::MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes everything in, lest the probe wait for its reader, and keeps the beginning. Ends with the last process that can write.
fn listen(mut reader: io::PipeReader) -> Arc<Mutex<Heard>> {
    let heard = Arc::new(Mutex::new(Heard::default()));
    let hearing = Arc::clone(&heard);
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(length @ 1..) = reader.read(&mut piece) {
            let mut heard = lock(&hearing);
            let room = SHOWN_BYTES_MAX - heard.bytes.len();
            heard.cut |= length > room;
            heard.bytes.extend_from_slice(&piece[..length.min(room)]);
        }
        lock(&hearing).over = true;
    });
    heard
}
