//! What is sent to a workload whose output waits, told to its standby as it comes; see [`crate::takeover::inputs`].
//!
//! One task a device of the workload, as long as its session. A failure costs nothing but a client's patience, so that none is
//! reported to anybody.

use std::{
    os::fd::AsFd,
    sync::{Arc, Weak},
    time::Duration,
};

use anyhow::Context;
use tokio::{sync::watch, task::JoinSet};

use super::{links::Link, output::readable, session::Permit, standby::Standby};
use crate::{
    model::Name,
    takeover::{
        hold::Hold,
        inputs::{Input, Quota, Tap},
    },
    transport::{EpochReceiver, EpochSender},
    wire::message::FrameHead,
    workload::network::Door,
};

/// Time between two attempts.
const RETRY: Duration = Duration::from_millis(500);
/// Packets that are looked at before others have their turn.
const TURN: usize = 64;
/// How long it rests then: what it does not take meanwhile may be dropped.
const REST: Duration = Duration::from_millis(1);

/// Tells what comes by one device.
struct Teller {
    name: Name,
    link: Link,
    hold: Arc<Hold>,
    permit: watch::Receiver<Permit>,
    door: (u8, Door),
}

/// Begins to tell, by each of these devices, what is sent to the workload; until it is dropped.
pub(super) fn tell(
    name: &Name,
    link: &Link,
    hold: &Arc<Hold>,
    permit: &watch::Receiver<Permit>,
    doors: &[Door],
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for (number, door) in (0..=u8::MAX).zip(doors) {
        let teller = Teller {
            name: name.clone(),
            link: link.clone(),
            hold: Arc::clone(hold),
            permit: permit.clone(),
            door: (number, *door),
        };
        tasks.spawn(teller.run());
    }
    tasks
}

impl Teller {
    async fn run(mut self) {
        while self.permit.wait_for(|permit| permit.owes_output).await.is_ok() {
            if let Err(error) = self.tell().await {
                tracing::debug!(name = %self.name, error = format!("{error:#}"), "telling what is sent to it");
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    /// As long as output waits.
    async fn tell(&mut self) -> anyhow::Result<()> {
        let mut tap = Tap::open(&self.door.1)?;
        let heard = readable(tap.as_fd().try_clone_to_owned()?)?;
        let mut stream = self.begin().await?;
        let mut quota = Quota::default();
        loop {
            tokio::select! {
                changed = self.permit.changed() => {
                    changed?;
                    if !self.permit.borrow().owes_output {
                        return Ok(());
                    }
                }
                ready = heard.readable() => {
                    let mut ready = ready?;
                    if self.turn(&mut tap, &mut quota, &mut stream).await? {
                        ready.clear_ready();
                    } else {
                        tokio::time::sleep(REST).await;
                    }
                }
            }
        }
    }

    async fn begin(&self) -> anyhow::Result<EpochSender> {
        let bulk = self.link.bulk().context("no connection stands")?;
        let mut stream = bulk.send_epoch().await?;
        stream.hurry();
        stream.frame(&FrameHead::Inputs { name: self.name.clone() }, Vec::new()).await?;
        Ok(stream)
    }

    /// Whether no more packets wait.
    async fn turn(&self, tap: &mut Tap, quota: &mut Quota, stream: &mut EpochSender) -> anyhow::Result<bool> {
        for _ in 0..TURN {
            let Some(packet) = tap.heard()? else { return Ok(true) };
            // Asked behind it: one that came before that freeze comes twice at most, and none is taken for older than it is.
            if let Some(after) = self.hold.frozen().filter(|after| quota.admits(*after, packet)) {
                stream.frame(&FrameHead::Input { after, door: self.door.0 }, packet.to_vec()).await?;
            }
        }
        Ok(false)
    }
}

/// Keeps what a primary tells, until it ends.
pub(super) async fn keep(standby: Weak<Standby>, receiver: &mut EpochReceiver) -> anyhow::Result<()> {
    while let Some((FrameHead::Input { after, door }, packet)) = receiver.next_frame().await? {
        let Some(standby) = standby.upgrade() else { break };
        standby.log_input(after, Input { door, packet });
    }
    Ok(())
}
