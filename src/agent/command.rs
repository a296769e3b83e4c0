//! The fence command: what makes sure that a peer's host is off before its workloads are run here.
//!
//! Invariants: a host is not switched off twice for two of its workloads; nobody is told that it is off before the command has
//! said so.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::program;
use crate::model::Name;

/// How long it rests before it is tried again.
const REST: Duration = Duration::from_millis(500);

/// What the operator says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceCommand {
    /// The program: it gets the peer's name as its argument, and ends with 0 when that host is off.
    pub program: PathBuf,
    /// How long it may take.
    pub timeout: Duration,
    /// How often it is tried again.
    pub retries: u32,
}

/// When a peer's host was last switched off.
type Fenced = Arc<tokio::sync::Mutex<Option<Instant>>>;

/// Has peers' hosts switched off, each once.
#[derive(Debug, Default)]
pub(super) struct Fencer(Mutex<BTreeMap<String, Fenced>>);

impl Fencer {
    /// Has `peer` switched off for `workload`; `heard`: when the peer spoke last. Returns what people may want to know, of
    /// success and of failure.
    pub(super) async fn fence(
        &self,
        command: &FenceCommand,
        peer: &str,
        workload: &Name,
        heard: Option<Instant>,
    ) -> Result<String, String> {
        let fenced = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(all.entry(peer.to_owned()).or_default())
        };
        let mut fenced = fenced.lock().await;
        if let Some(at) = *fenced
            && heard.is_none_or(|heard| heard < at)
        {
            return Ok(format!(
                "{peer} was switched off {} s ago, and was not heard since",
                at.elapsed().as_secs()
            ));
        }
        let mut last = String::new();
        for attempt in 1..=command.retries + 1 {
            let began = Instant::now();
            match run(command, peer, workload).await {
                Ok(output) => {
                    *fenced = Some(Instant::now());
                    let took = began.elapsed().as_millis();
                    return Ok(format!(
                        "{peer} is off, says {} (after {took} ms): {output}",
                        command.program.display()
                    ));
                }
                Err(reason) => {
                    tracing::warn!(peer, attempt, reason, "the fence command failed");
                    last = reason;
                }
            }
            tokio::time::sleep(REST).await;
        }
        Err(format!(
            "{} did not switch {peer} off in {} tries: {last}. Nobody promotes meanwhile; switch it off by hand, then \
             `standin failover {workload} --force`",
            command.program.display(),
            command.retries + 1
        ))
    }
}

/// Runs it once. Its output, or why it did not do.
async fn run(command: &FenceCommand, peer: &str, workload: &Name) -> Result<String, String> {
    let environment = [("STANDIN_PEER", peer.to_owned()), ("STANDIN_WORKLOAD", workload.to_string())];
    program::run(program::Run {
        program: &command.program,
        arguments: &[peer],
        environment: &environment,
        timeout: command.timeout,
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn command(dir: &tempfile::TempDir, script: &str) -> FenceCommand {
        let program = dir.path().join("fence");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        FenceCommand { program, timeout: Duration::from_millis(500), retries: 1 }
    }

    async fn fence(
        fencer: &Fencer,
        command: &FenceCommand,
        heard: Option<Instant>,
    ) -> Result<String, String> {
        fencer.fence(command, "a", &"redis".parse().unwrap(), heard).await
    }

    #[tokio::test]
    async fn a_peer_is_switched_off_once_unless_it_was_heard_since() {
        let dir = tempfile::tempdir().unwrap();
        let ran = dir.path().join("ran");
        let command = command(&dir, &format!("echo off $1 $STANDIN_WORKLOAD; echo >> {}", ran.display()));
        let fencer = Fencer::default();
        let before = Instant::now();
        let (one, other) =
            tokio::join!(fence(&fencer, &command, Some(before)), fence(&fencer, &command, None));
        assert!(one.unwrap().contains("off a redis"));
        assert!(other.unwrap().contains("was switched off"));
        fence(&fencer, &command, Some(Instant::now())).await.unwrap();
        assert_eq!(std::fs::read_to_string(&ran).unwrap().lines().count(), 2);
    }

    #[tokio::test]
    async fn a_command_that_fails_or_hangs_says_so_and_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let ran = dir.path().join("ran");
        let fails = command(&dir, &format!("echo >> {}; echo no power; exit 7", ran.display()));
        let reason = fence(&Fencer::default(), &fails, None).await.unwrap_err();
        assert!(
            reason.contains("no power") && reason.contains('7') && reason.contains("failover redis"),
            "{reason}"
        );
        assert_eq!(std::fs::read_to_string(&ran).unwrap().lines().count(), 2);
        let hangs = command(&dir, "sleep 100 & sleep 100");
        let reason = fence(&Fencer::default(), &hangs, None).await.unwrap_err();
        assert!(reason.contains("500 ms"), "{reason}");
        let gone = FenceCommand { program: "/no/such/file".into(), ..hangs };
        assert!(fence(&Fencer::default(), &gone, None).await.unwrap_err().contains("cannot be started"));
    }
}
