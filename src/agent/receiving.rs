//! Epochs come in: staged as they arrive, committed by the workload's owner.
//!
//! ```text
//!  receive (a stream) ──► Received ──owner: accepts_epoch──► commit ──► ack
//! ```
//!
//! Invariant: commits go through the workload's owner one at a time, so that an epoch is never committed behind a promotion's
//! back.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::sync::{mpsc, oneshot};

use super::{
    Agent, inputs, inventory,
    mailbox::Msg,
    standby::{KeptFiles, Standby},
};
use crate::{
    capture::Note,
    model::{EpochId, Name, Term},
    observe::in_full,
    store::{BeginError, CommitError, StageError, Staging},
    transport::{EpochReceiver, PeerName},
    wire::message::{EpochAnswer, FileRecord, FrameHead},
};

/// Frames between the network and the store.
const FRAMES_MAX: usize = 8;

/// A whole epoch, verified, not committed.
pub(super) struct Received {
    staging: Staging,
    note: Note,
}

impl Received {
    pub(super) fn id(&self) -> EpochId {
        self.staging.id()
    }

    /// The atomic step; the answer to the primary if it fails.
    pub(super) fn commit(self) -> Result<Note, EpochAnswer> {
        match self.staging.commit() {
            Ok(_) => Ok(self.note),
            Err(error) => Err(commit_refusal(&error)),
        }
    }
}

fn commit_refusal(error: &CommitError) -> EpochAnswer {
    let reason = error.to_string();
    if error.needs_full() { EpochAnswer::NeedFull { held: None, reason } } else { refused(reason) }
}

fn stage_refusal(error: &StageError) -> EpochAnswer {
    let reason = error.to_string();
    if !error.needs_full() {
        return refused(reason);
    }
    // The primary tells its operator too; but it is here that an image or a memory may be damaged.
    tracing::error!(%error, "an epoch does not fit what is held");
    EpochAnswer::NeedFull { held: None, reason }
}

fn refused(reason: String) -> EpochAnswer {
    EpochAnswer::Refused { term: Term(0), reason }
}

/// Takes one epoch in and answers it.
pub(super) async fn receive(agent: &Arc<Agent>, mut receiver: EpochReceiver) -> anyhow::Result<()> {
    let (name, id, base) = match receiver.next_frame().await? {
        Some((FrameHead::Begin { name, id, base }, _)) => (name, id, base),
        Some((FrameHead::Ask(ask), _)) => {
            let (_, standby) = standby_of(agent, &ask.name, receiver.peer()).await?;
            return inventory::answer(agent, standby.context("no standby here now")?, receiver, ask).await;
        }
        Some((FrameHead::Inputs { name }, _)) => {
            let (_, standby) = standby_of(agent, &name, receiver.peer()).await?;
            let standby = Arc::downgrade(&standby.context("no standby here now")?);
            return inputs::keep(standby, &mut receiver).await;
        }
        _ => anyhow::bail!("an epoch that does not begin"),
    };
    let (owner, standby) = standby_of(agent, &name, receiver.peer()).await?;
    let Some(standby) = standby else {
        receiver.answer(&refused(format!("{name} has no standby here now"))).await?;
        return Ok(());
    };
    let mut waited = Duration::ZERO;
    let mut answer = match stage(agent, &standby, id, base, &mut receiver, &mut waited).await? {
        Ok(received) => {
            let (answer, answered) = oneshot::channel();
            let asked = Instant::now();
            owner.send(Msg::Received { received: Box::new(received), answer }).await?;
            let answer = answered.await?;
            waited += asked.elapsed();
            answer
        }
        Err(answer) => answer,
    };
    if let EpochAnswer::Committed { busy_us, .. } = &mut answer {
        *busy_us = waited.as_micros() as u64;
    }
    let answered = receiver.answer(&answer).await;
    if let EpochAnswer::Committed { id, .. } = answer {
        standby.follow(agent, &name, id);
    }
    Ok(answered?)
}

/// The owner of a workload of a peer's, and what it is the standby with, if it is one.
async fn standby_of(
    agent: &Agent,
    name: &Name,
    peer: &PeerName,
) -> anyhow::Result<(mpsc::Sender<Msg>, Option<Arc<Standby>>)> {
    let owner = agent.owner_for(name, peer).context("of an unknown workload")?;
    let (ask, standby) = oneshot::channel();
    owner.send(Msg::StandbyOf { peer: peer.to_string(), answer: ask }).await?;
    Ok((owner, standby.await?))
}

/// Feeds the frames to the store on a thread of its own; an epoch that ends early leaves nothing. Adds to `waited` how
/// long the network waited for the store.
async fn stage(
    agent: &Arc<Agent>,
    standby: &Arc<Standby>,
    id: EpochId,
    base: Option<EpochId>,
    receiver: &mut EpochReceiver,
    waited: &mut Duration,
) -> anyhow::Result<Result<Received, EpochAnswer>> {
    let (frames_tx, frames) = mpsc::channel::<(FrameHead, Vec<u8>)>(FRAMES_MAX);
    let (agent, warm) = (Arc::clone(agent), Arc::clone(standby));
    let staging = tokio::task::spawn_blocking(move || {
        warm.mend().map_err(refused)?;
        stage_frames(&agent, &warm, (id, base), frames)
    });
    let mut whole = Ok(());
    loop {
        match receiver.next_frame().await {
            // A store that refuses stops taking frames: its answer is the one that counts.
            Ok(Some(frame)) => {
                let handed = Instant::now();
                if frames_tx.send(frame).await.is_err() {
                    break;
                }
                *waited += handed.elapsed();
            }
            Ok(None) => break,
            Err(error) => {
                whole = Err(error);
                break;
            }
        }
    }
    drop(frames_tx);
    let ended = Instant::now();
    let staged = staging.await?;
    *waited += ended.elapsed();
    whole?;
    if staged.is_ok() && !receiver.is_whole() {
        anyhow::bail!("epoch {id} is not whole");
    }
    Ok(staged)
}

/// What is to be kept of a file must be there: once the epoch is committed, nothing is left to ask for.
fn check_kept(found: anyhow::Result<bool>, path: &[u8]) -> Result<(), EpochAnswer> {
    let path = String::from_utf8_lossy(path);
    match found {
        Ok(true) => Ok(()),
        Ok(false) => {
            let reason = format!("what is to be kept of the file {path:?} is not here any more");
            Err(EpochAnswer::NeedFull { held: None, reason })
        }
        Err(error) => Err(refused(format!("the file {path:?} cannot be read here: {}", in_full(&error)))),
    }
}

fn stage_frames(
    agent: &Agent,
    standby: &Standby,
    (id, base): (EpochId, Option<EpochId>),
    mut frames: mpsc::Receiver<(FrameHead, Vec<u8>)>,
) -> Result<Received, EpochAnswer> {
    let mut staging = standby.store.begin(id, base).map_err(|error| match error {
        error @ BeginError::NeedFull { held, .. } => {
            EpochAnswer::NeedFull { held, reason: error.to_string() }
        }
        error => refused(error.to_string()),
    })?;
    let (mut note, mut kept) = (None, None);
    while let Some((head, body)) = frames.blocking_recv() {
        if let FrameHead::Image { name, .. } = &head
            && name == crate::capture::NOTE
        {
            note = serde_json::from_slice(&body).ok();
        }
        if let FrameHead::File(record @ FileRecord::Keep { path, .. }) = &head {
            let found = match &mut kept {
                Some(kept) => Ok(kept),
                none => standby.kept_files(agent).map(|found| none.insert(found)),
            };
            check_kept(found.and_then(|kept: &mut KeptFiles| kept.has(record)), path)?;
        }
        staging.frame(head, &body).map_err(|error| stage_refusal(&error))?;
    }
    let note = note.ok_or_else(|| refused("the epoch has no note".into()))?;
    Ok(Received { staging, note })
}
