//! What a standby holds, told by hashes: how one whose image the primary knows nothing of (an older term's, one of before the
//! primary's agent was started, one that a disk kept) is brought up to date without a full copy.
//!
//! ```text
//!   primary                                              standby
//!     offer ──────────────────────────────────────────►   accepted: holds epoch e
//!     ask, with a key ────────────────────────────────►   reads its image again
//!     ◄──────────────────────────── hash of each page
//!     an epoch upon e: pages of which the hash differs ►   staged, committed as any other
//! ```
//!
//! Invariants: what the standby tells is what it reads at that moment, not what it noted when a page came, so a damaged page is
//! sent anew; the epoch has `e` for its base, which the standby checks before it stages anything, and no image of that name
//! ever changes; an epoch that the standby refuses for what it lacks is followed by one of all memory, without asking again.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{links::Link, standby::Standby};
use crate::{
    delta::{KEY_LEN, OfferError, Offered},
    model::{EpochId, Name, PAGE_SIZE},
    transport::{EpochReceiver, inventory::RecvInventoryError},
    wire::inventory::{Ask, Held, PAGES_MAX},
};

/// Frames between the store and the network.
const FRAMES_MAX: usize = 4;
/// Pages that a standby may hold beyond twice those of the workload now; of more the hashes are not worth their memory.
const PAGES_MORE: u64 = 1 << 16;

/// Why nothing is known of what the standby holds: all is sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    #[error("no connection stands")]
    NoConnection,
    #[error("the kernel gives no random key: {0}")]
    Random(getrandom::Error),
    #[error(transparent)]
    Recv(#[from] RecvInventoryError),
    #[error(transparent)]
    Offer(#[from] OfferError),
    #[error("it is of epoch {0}, and not of the one that was accepted")]
    Other(EpochId),
}

/// The primary's side: what the standby holds of an epoch, and the bytes that came for it.
pub(super) async fn ask(
    link: &Link,
    name: &Name,
    held: EpochId,
    resident_bytes: u64,
) -> Result<(Offered, u64), AskError> {
    let bulk = link.bulk().ok_or(AskError::NoConnection)?;
    let mut key = [0; KEY_LEN];
    getrandom::fill(&mut key).map_err(AskError::Random)?;
    let pages_max = (resident_bytes / PAGE_SIZE * 2 + PAGES_MORE).min(PAGES_MAX);
    let mut receiver = bulk.ask_inventory(&Ask { name: name.clone(), key, pages_max }).await?;
    let mut offered = Offered::new(key, pages_max);
    while let Some((part, sums)) = receiver.next().await? {
        match part {
            Held::Epoch(id) if id != held => return Err(AskError::Other(id)),
            Held::Epoch(_) => {}
            Held::Pages { space, start } => offered.add(space, start, &sums)?,
        }
    }
    Ok((offered, receiver.bytes()))
}

/// The standby's side. One that holds nothing ends the stream.
pub(super) async fn answer(standby: Arc<Standby>, receiver: EpochReceiver, ask: Ask) -> anyhow::Result<()> {
    let mut sender = receiver.into_inventory(&ask);
    let (frames_tx, mut frames) = mpsc::channel::<(Held, Vec<u8>)>(FRAMES_MAX);
    let reading = tokio::task::spawn_blocking(move || {
        standby.inventory(&ask.key, &mut |held, sums| frames_tx.blocking_send((held, sums)).is_ok())
    });
    let mut full = false;
    while let Some((held, sums)) = frames.recv().await {
        if let Held::Pages { .. } = held {
            full |= (sums.len() / crate::delta::SUM_LEN) as u64 > sender.pages_left();
        }
        if full {
            // The rest is sent as if it were not here.
            break;
        }
        sender.frame(held, &sums).await?;
    }
    drop(frames);
    reading.await??;
    sender.finish().await?;
    Ok(())
}
