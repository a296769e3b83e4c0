//! A program of the operator's, run once: its time limited, its output capped, and ended with all that it started if it hangs
//! or is not wanted any more.

use std::{
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::io::AsyncReadExt as _;

/// What is kept of each of its two outputs.
const OUTPUT_BYTES_MAX: u64 = 4096;
/// How long its output is waited for when it has ended.
const OUTPUT_WAIT: Duration = Duration::from_millis(200);

/// How it is run.
pub(super) struct Run<'a> {
    pub(super) program: &'a Path,
    pub(super) arguments: &'a [&'a str],
    /// In its environment, beside the agent's.
    pub(super) environment: &'a [(&'static str, String)],
    pub(super) timeout: Duration,
}

/// The processes of a program that has not ended; they end with this.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// Runs it. What it said, or why it did not do. Dropped before it has ended, it ends the program.
pub(super) async fn run(run: Run<'_>) -> Result<String, String> {
    let mut program = Command::new(run.program);
    program
        .args(run.arguments)
        .envs(run.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = tokio::process::Command::from(program)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("it cannot be started: {error}"))?;
    let mut group = Group(child.id().map(|pid| Pid::from_raw(pid as i32)));
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let reader = tokio::spawn(async move { [said(stdout).await, said(stderr).await].concat() });
    let ended = tokio::time::timeout(run.timeout, child.wait()).await;
    if ended.is_ok() {
        // Its number may be another's from now on.
        group.0 = None;
    }
    drop(group);
    // Something that it left behind may hold its output open.
    let output = tokio::time::timeout(OUTPUT_WAIT, reader).await;
    let output = output.ok().and_then(Result::ok).unwrap_or_default();
    let said = String::from_utf8_lossy(&output).trim().replace('\n', " | ");
    match ended {
        Err(_) => Err(format!("it did not end within {} ms", run.timeout.as_millis())),
        Ok(Err(error)) => Err(format!("it cannot be waited for: {error}")),
        Ok(Ok(status)) if status.success() => Ok(said),
        Ok(Ok(status)) => Err(format!("{status}: {said}")),
    }
}

/// The begin of what a stream says, until its end. What cannot be read is not worth a failure: the exit code decides.
async fn said(stream: Option<impl tokio::io::AsyncRead + Unpin>) -> Vec<u8> {
    let mut said = Vec::new();
    if let Some(mut stream) = stream {
        let _ = (&mut stream).take(OUTPUT_BYTES_MAX).read_to_end(&mut said).await;
        // A pipe that nobody empties would hang a program that says more.
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
    said
}
