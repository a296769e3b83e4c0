//! What a standby is sent before it can be one: whole or not at all, and refused with a reason.

use std::time::Duration;

use standin::{
    transport::{
        Channel, SupplyReceiver,
        supply::{RecvSupplyError, SendSupplyError},
    },
    wire::{
        message::FrameHead,
        supply::{Size, Supply, SupplyAnswer, SupplyRequest},
    },
    workload::spec::{Daemon, ImageId},
};

use crate::{Ends, ends, soon};

const WITHIN: Duration = Duration::from_secs(10);
const SIZE: Size = Size { stream_bytes: 64 << 20, room_bytes: 64 << 20 };

fn image() -> Supply {
    Supply::Image(ImageId { daemon: Daemon::Docker, id: "0".repeat(64), name: "db".into() })
}

fn ship() -> SupplyRequest {
    SupplyRequest::Ship { name: "db".parse().unwrap(), supply: image(), size: SIZE }
}

async fn accept(ends: &Ends) -> SupplyReceiver {
    let mut receiver = soon(ends.to.accept_supply()).await.unwrap();
    assert_eq!(receiver.request().await.unwrap(), ship());
    receiver
}

async fn both<A, B>(one: impl Future<Output = A>, other: impl Future<Output = B>) -> (A, B) {
    Box::pin(soon(async { tokio::join!(one, other) })).await
}

async fn drain(receiver: &mut SupplyReceiver) -> Result<usize, RecvSupplyError> {
    let mut bytes = 0;
    while let Some((_, body)) = receiver.next_frame().await? {
        bytes += body.len();
    }
    Ok(bytes)
}

#[tokio::test]
async fn a_question_is_answered_and_a_supply_arrives_whole() {
    let ends = ends(Channel::Supply).await;
    let ask = SupplyRequest::Ask { name: "db".parse().unwrap(), image: None, files: vec!["/etc/db".into()] };
    let lacks = SupplyAnswer::Lacks { image: false, files: vec![0] };
    let answer = async {
        let mut receiver = ends.to.accept_supply().await.unwrap();
        assert_eq!(receiver.request().await.unwrap(), ask);
        receiver.answer(&lacks).await.unwrap();
    };
    let (answered, ()) = both(ends.from.ask_supply(&ask, WITHIN), answer).await;
    assert_eq!(answered.unwrap(), lacks);

    let send = async {
        let mut sender = ends.from.send_supply(&ship(), WITHIN).await.unwrap().unwrap();
        for _ in 0..16 {
            sender.frame(&FrameHead::Piece, vec![3; 1 << 20]).await.unwrap();
        }
        sender.finish(WITHIN).await
    };
    let receive = async {
        let mut receiver = accept(&ends).await;
        receiver.ready(&image(), SIZE).await.unwrap();
        assert_eq!(drain(&mut receiver).await.unwrap(), 16 << 20);
        receiver.answer(&SupplyAnswer::Done).await.unwrap();
    };
    both(send, receive).await.0.unwrap();

    let held = async { accept(&ends).await.answer(&SupplyAnswer::Held).await.unwrap() };
    let offer = ship();
    let (sender, ()) = both(ends.from.send_supply(&offer, WITHIN), held).await;
    assert!(sender.unwrap().is_none());
}

#[tokio::test]
async fn a_sender_that_gives_up_is_never_taken_for_whole() {
    let ends = ends(Channel::Supply).await;
    let send = async {
        let mut sender = ends.from.send_supply(&ship(), WITHIN).await.unwrap().unwrap();
        sender.frame(&FrameHead::Piece, vec![3; 1000]).await.unwrap();
    };
    let receive = async {
        let mut receiver = accept(&ends).await;
        receiver.ready(&image(), SIZE).await.unwrap();
        drain(&mut receiver).await
    };
    let ((), received) = both(send, receive).await;
    assert!(matches!(received, Err(RecvSupplyError::Message { .. })), "{received:?}");
}

#[tokio::test]
async fn a_refusal_reaches_the_sender_before_and_in_the_middle() {
    let ends = ends(Channel::Supply).await;
    let refusal = |reason: &str| SupplyAnswer::Refused { reason: reason.into() };
    let refuse = async { accept(&ends).await.answer(&refusal("no room")).await.unwrap() };
    let offer = ship();
    let (sender, ()) = both(ends.from.send_supply(&offer, WITHIN), refuse).await;
    assert!(matches!(sender, Err(SendSupplyError::Refused { reason, .. }) if reason == "no room"));

    let send = async {
        let mut sender = ends.from.send_supply(&ship(), WITHIN).await.unwrap().unwrap();
        loop {
            if let Err(error) = sender.frame(&FrameHead::Piece, vec![3; 1 << 20]).await {
                return error;
            }
        }
    };
    let receive = async {
        let mut receiver = accept(&ends).await;
        receiver.ready(&image(), SIZE).await.unwrap();
        receiver.next_frame().await.unwrap();
        receiver.answer(&refusal("the disk is full")).await.unwrap();
    };
    let (error, ()) = both(send, receive).await;
    assert!(matches!(&error, SendSupplyError::Refused { reason, .. } if reason.contains("full")), "{error}");
}

#[tokio::test]
async fn a_receiver_that_goes_without_a_word_is_an_error() {
    let ends = ends(Channel::Supply).await;
    let send = async {
        // The reset may overtake what was said before it.
        match ends.from.send_supply(&ship(), WITHIN).await {
            Ok(sender) => sender.unwrap().finish(WITHIN).await,
            Err(error) => Err(error),
        }
    };
    let receive = async {
        let mut receiver = accept(&ends).await;
        receiver.ready(&image(), SIZE).await.unwrap();
    };
    let (sent, ()) = both(send, receive).await;
    assert!(sent.is_err());
}
