//! What a standby says it holds: whole, or not believed.

use standin::{
    delta::{KEY_LEN, SUM_LEN},
    model::{Epoch, EpochId, Space, Term},
    transport::{
        Channel, InventoryReceiver, InventorySender,
        inventory::{RecvInventoryError, SendInventoryError},
    },
    wire::{
        inventory::{Ask, Held, SUMS_MAX},
        message::FrameHead,
    },
};

use crate::{Ends, ends, soon};

const OF: Held = Held::Epoch(EpochId { term: Term(1), epoch: Epoch(4) });
const PAGES: Held = Held::Pages { space: Space::Task(2), start: 0x1000 };

fn question(pages_max: u64) -> Ask {
    Ask { name: "db".parse().unwrap(), key: [3; KEY_LEN], pages_max, blocks_max: 0 }
}

/// The question arrives as it was asked; both ends of the answer.
async fn asked(ends: &Ends, pages_max: u64) -> (InventoryReceiver, InventorySender) {
    let ask = question(pages_max);
    let answer = async {
        let mut stream = ends.to.accept_epoch().await.unwrap();
        let (head, body) = stream.next_frame().await.unwrap().unwrap();
        assert!(head == FrameHead::Ask(ask.clone()) && body.is_empty());
        stream.into_inventory(&ask)
    };
    let (receiver, sender) =
        Box::pin(soon(async { tokio::join!(ends.from.ask_inventory(&ask), answer) })).await;
    (receiver.unwrap(), sender)
}

async fn drain(mut receiver: InventoryReceiver) -> Result<usize, RecvInventoryError> {
    let mut hashes = 0;
    while let Some((_, sums)) = receiver.next().await? {
        hashes += sums.len() / SUM_LEN;
    }
    assert!(receiver.bytes() >= (hashes * SUM_LEN) as u64);
    Ok(hashes)
}

#[tokio::test]
async fn an_inventory_arrives_whole() {
    let ends = ends(Channel::Bulk).await;
    let (receiver, mut sender) = Box::pin(asked(&ends, 1 << 20)).await;
    let send = async {
        sender.frame(OF, Vec::new()).await?;
        // More than any window holds.
        for _ in 0..16 {
            sender.frame(PAGES, vec![7; SUMS_MAX * SUM_LEN]).await?;
        }
        sender.finish().await
    };
    let (received, sent) = Box::pin(soon(async { tokio::join!(drain(receiver), send) })).await;
    sent.unwrap();
    assert_eq!(received.unwrap(), 16 * SUMS_MAX);
}

#[tokio::test]
async fn one_that_breaks_off_or_has_no_beginning_is_none() {
    let ends = ends(Channel::Bulk).await;
    let (receiver, sender) = Box::pin(asked(&ends, 10)).await;
    drop(sender);
    assert!(matches!(soon(drain(receiver)).await, Err(RecvInventoryError::Read { .. })));
    let (receiver, mut sender) = Box::pin(asked(&ends, 10)).await;
    soon(sender.frame(OF, Vec::new())).await.unwrap();
    soon(sender.frame(PAGES, vec![7; SUM_LEN])).await.unwrap();
    drop(sender);
    assert!(matches!(soon(drain(receiver)).await, Err(RecvInventoryError::Read { .. })));
    let (_receiver, mut sender) = Box::pin(asked(&ends, 10)).await;
    assert!(matches!(soon(sender.frame(PAGES, vec![7; SUM_LEN])).await, Err(SendInventoryError::Rules(_))));
}

#[tokio::test]
async fn more_than_was_asked_for_is_not_taken() {
    let ends = ends(Channel::Bulk).await;
    let ask = question(10);
    // One that pretends to have been asked for more.
    let answer = async {
        let mut stream = ends.to.accept_epoch().await.unwrap();
        stream.next_frame().await.unwrap().unwrap();
        let mut sender = stream.into_inventory(&question(1 << 20));
        sender.frame(OF, Vec::new()).await.unwrap();
        sender.frame(PAGES, vec![7; 11 * SUM_LEN]).await.unwrap();
        // Its end may find nobody who reads.
        let _ = sender.finish().await;
    };
    let ask = async { drain(ends.from.ask_inventory(&ask).await.unwrap()).await };
    let (received, ()) = Box::pin(soon(async { tokio::join!(ask, answer) })).await;
    assert!(matches!(received, Err(RecvInventoryError::Refused { .. })));
}

#[tokio::test]
async fn a_receiver_that_has_gone_ends_the_sender() {
    let ends = ends(Channel::Bulk).await;
    let (receiver, mut sender) = Box::pin(asked(&ends, 1 << 26)).await;
    soon(sender.frame(OF, Vec::new())).await.unwrap();
    drop(receiver);
    let send = async {
        loop {
            if let Err(error) = sender.frame(PAGES, vec![7; SUMS_MAX * SUM_LEN]).await {
                break error;
            }
        }
    };
    assert!(matches!(soon(send).await, SendInventoryError::Write(_)));
}
