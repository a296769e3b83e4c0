//! What a standby holds, told by hashes: how one whose image the primary knows nothing of (an older term's, one of before the
//! primary's agent was started, one that a disk kept) or whose files are still there is brought up to date without a full copy.
//!
//! ```text
//!   primary                                              standby
//!     offer ──────────────────────────────────────────►   accepted: holds epoch e, or none
//!     ask, with a key ────────────────────────────────►   reads its image and its files again
//!     ◄─────────── hash of each page, of each block of files
//!     an epoch upon e: what has another hash, the blocks
//!     of files that are to be kept ────────────────────►  staged, committed as any other
//! ```
//!
//! Invariants: what the standby tells is what it reads at that moment, not what it noted when a page came, so a damaged page is
//! sent anew; the epoch has `e` for its base, which the standby checks before it stages anything, and no image of that name
//! ever changes; blocks of files, which no name stands for, it reads once more when it is told to keep them; an epoch that the
//! standby refuses for what it lacks is followed by one of everything, without asking again.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Agent, links::Link, standby::Standby};
use crate::{
    capture::Told,
    delta::{KEY_LEN, OfferError, Offered},
    files::{HeldFiles, OutOfOrder},
    model::{EpochId, Name, PAGE_SIZE},
    transport::{EpochReceiver, inventory::RecvInventoryError},
    wire::inventory::{Ask, BLOCKS_MAX, Held, PAGES_MAX, Room},
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
    Pages(#[from] OfferError),
    #[error(transparent)]
    Files(#[from] OutOfOrder),
    #[error("it is of epoch {0}, and not of the one that was accepted")]
    Other(EpochId),
}

/// What a primary wants to be told.
pub(super) struct Wanted {
    /// The epoch that the standby said it holds.
    pub(super) held: Option<EpochId>,
    pub(super) resident_bytes: u64,
    pub(super) files: bool,
}

/// The primary's side.
pub(super) async fn ask(link: &Link, name: &Name, wanted: &Wanted) -> Result<Told, AskError> {
    let bulk = link.bulk().ok_or(AskError::NoConnection)?;
    let mut key = [0; KEY_LEN];
    getrandom::fill(&mut key).map_err(AskError::Random)?;
    let pages_max = (wanted.resident_bytes / PAGE_SIZE * 2 + PAGES_MORE).min(PAGES_MAX);
    let blocks_max = if wanted.files { BLOCKS_MAX } else { 0 };
    let mut receiver = bulk.ask_inventory(&Ask { name: name.clone(), key, pages_max, blocks_max }).await?;
    let (mut pages, mut files, mut of) = (Offered::new(key, pages_max), HeldFiles::new(key), None);
    while let Some((part, sums)) = receiver.next().await? {
        match part {
            Held::Epoch(id) if wanted.held != Some(id) => return Err(AskError::Other(id)),
            Held::Epoch(id) => of = Some(id),
            Held::Pages { space, start } => pages.add(space, start, &sums)?,
            Held::File { tree, path, first } => files.add(tree, path, first, &sums)?,
        }
    }
    Ok(Told { pages: of.map(|_| pages), files, bytes: receiver.bytes() })
}

/// The standby's side.
pub(super) async fn answer(
    agent: &Arc<Agent>,
    standby: Arc<Standby>,
    receiver: EpochReceiver,
    ask: Ask,
) -> anyhow::Result<()> {
    let mut sender = receiver.into_inventory(&ask);
    let (frames_tx, mut frames) = mpsc::channel::<(Held, Vec<u8>)>(FRAMES_MAX);
    let agent = Arc::clone(agent);
    let reading = tokio::task::spawn_blocking(move || {
        // What is more than was asked for is told as if it were not here.
        let mut room = Room::new(&ask);
        standby.inventory(&agent, &ask, &mut |held, sums| {
            room.take(&held, sums.len()) && frames_tx.blocking_send((held, sums)).is_ok()
        })
    });
    while let Some((held, sums)) = frames.recv().await {
        sender.frame(held, sums).await?;
    }
    reading.await??;
    sender.finish().await?;
    Ok(())
}
