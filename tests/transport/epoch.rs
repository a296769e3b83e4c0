//! Epochs on the bulk connection: whole or not at all.

use std::time::Duration;

use standin::{
    delta::{BatchHead, Form, Packing, PageRun},
    model::{Epoch, EpochId, Extent, Space, Term},
    transport::{
        Channel, EpochReceiver,
        epoch::{RecvEpochError, SendEpochError},
    },
    wire::message::{EpochAnswer, FrameHead, Manifest, SpaceMap},
};

use crate::{ends, soon};

pub(crate) const ID: EpochId = EpochId { term: Term(1), epoch: Epoch(1) };
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

pub(crate) fn begin() -> FrameHead {
    FrameHead::Begin { name: "db".parse().unwrap(), id: ID, base: None }
}

pub(crate) fn batch(number: u64) -> (FrameHead, Vec<u8>) {
    let runs = vec![PageRun { start: number << 20, pages: 256, zero: false }];
    let head = BatchHead { space: Space::Task(1), runs, form: Form::Pages, packing: Packing::Raw };
    (FrameHead::Pages(head), vec![number as u8; 1 << 20])
}

pub(crate) fn manifest(batches: u64) -> FrameHead {
    let extents = vec![Extent { start: 0, pages: 256 * batches }];
    FrameHead::Manifest(Manifest { spaces: vec![SpaceMap { space: Space::Task(1), extents }] })
}

pub(crate) async fn drain(epoch: &mut EpochReceiver) -> Result<Vec<(FrameHead, Vec<u8>)>, RecvEpochError> {
    let mut frames = Vec::new();
    while let Some(frame) = epoch.next_frame().await? {
        frames.push(frame);
    }
    Ok(frames)
}

#[tokio::test]
async fn epochs_of_64_mib_arrive_whole_on_one_connection() {
    let bulk = ends(Channel::Bulk).await;
    for _ in 0..3 {
        let send = async {
            let mut epoch = bulk.from.send_epoch().await.unwrap();
            epoch.frame(&begin(), Vec::new()).await.unwrap();
            for number in 0..64 {
                let (head, body) = batch(number);
                epoch.frame(&head, body).await.unwrap();
            }
            epoch.frame(&manifest(64), Vec::new()).await.unwrap();
            epoch.finish(ANSWER_WITHIN).await.unwrap()
        };
        let receive = async {
            let mut epoch = bulk.to.accept_epoch().await.unwrap();
            let frames = drain(&mut epoch).await.unwrap();
            assert!(epoch.is_whole());
            assert_eq!(frames.len(), 66);
            assert_eq!(frames[0].0, begin());
            for number in 0..64 {
                assert!(frames[number as usize + 1] == batch(number));
            }
            epoch.answer(&EpochAnswer::Committed { id: ID, busy_us: 1 }).await.unwrap();
        };
        let (answer, ()) = soon(Box::pin(async { tokio::join!(send, receive) })).await;
        assert_eq!(answer, EpochAnswer::Committed { id: ID, busy_us: 1 });
    }
}

#[tokio::test]
async fn an_epoch_that_its_sender_gives_up_never_ends_well() {
    let bulk = ends(Channel::Bulk).await;
    let mut sender = bulk.from.send_epoch().await.unwrap();
    sender.frame(&begin(), Vec::new()).await.unwrap();
    sender.frame(&manifest(0), Vec::new()).await.unwrap_err();
    // A refused frame spoils the epoch for good, though nothing of it was sent.
    let spoiled = sender.frame(&manifest(1), Vec::new()).await.unwrap_err();
    assert!(matches!(spoiled, SendEpochError::Abandoned { .. }), "{spoiled}");

    let mut sender = bulk.from.send_epoch().await.unwrap();
    sender.frame(&begin(), Vec::new()).await.unwrap();
    sender.frame(&manifest(1), Vec::new()).await.unwrap();
    let mut first = soon(bulk.to.accept_epoch()).await.unwrap();
    let mut second = soon(bulk.to.accept_epoch()).await.unwrap();
    soon(second.next_frame()).await.unwrap();
    drop(sender);
    let cut = soon(drain(&mut second)).await.unwrap_err();
    assert!(matches!(cut, RecvEpochError::Read { .. }), "{cut}");
    assert!(!second.is_whole());
    // The first one's sender is still there, and silent.
    tokio::time::timeout(Duration::from_millis(100), drain(&mut first)).await.unwrap_err();
}

#[tokio::test]
async fn an_early_answer_stops_the_sender() {
    let bulk = ends(Channel::Bulk).await;
    let need_full = EpochAnswer::NeedFull { held: None, reason: "no base".into() };
    let send = async {
        let mut epoch = bulk.from.send_epoch().await.unwrap();
        epoch.frame(&begin(), Vec::new()).await.unwrap();
        for number in 0.. {
            let (head, body) = batch(number % 256);
            if let Err(e) = epoch.frame(&head, body).await {
                return e;
            }
        }
        unreachable!()
    };
    let receive = async {
        let mut epoch = bulk.to.accept_epoch().await.unwrap();
        epoch.next_frame().await.unwrap();
        epoch.answer(&need_full).await.unwrap();
    };
    let (stopped, ()) = soon(Box::pin(async { tokio::join!(send, receive) })).await;
    let SendEpochError::Answered { answer, .. } = stopped else { panic!("{stopped}") };
    assert_eq!(*answer, need_full);
}

#[tokio::test]
async fn a_receiver_that_does_not_read_holds_the_sender_back() {
    let bulk = ends(Channel::Bulk).await;
    let mut sender = bulk.from.send_epoch().await.unwrap();
    sender.frame(&begin(), Vec::new()).await.unwrap();
    let receiver = soon(bulk.to.accept_epoch()).await.unwrap();
    let flood = async {
        for number in 0..1024 {
            let (head, body) = batch(number);
            sender.frame(&head, body).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(2), flood).await.unwrap_err();
    // What the receiver's window and the sender's buffer hold, and no more.
    assert!(sender.bytes() < 80 << 20, "{}", sender.bytes());
    // A frame that was dropped half-way spoils the epoch.
    assert!(matches!(sender.frame(&manifest(1), Vec::new()).await, Err(SendEpochError::Abandoned { .. })));
    drop(receiver);
}

#[tokio::test]
async fn without_an_answer_the_sender_does_not_believe_in_a_commit() {
    let bulk = ends(Channel::Bulk).await;
    let send = async {
        let mut epoch = bulk.from.send_epoch().await.unwrap();
        epoch.frame(&begin(), Vec::new()).await.unwrap();
        epoch.frame(&manifest(1), Vec::new()).await.unwrap();
        epoch.finish(ANSWER_WITHIN).await
    };
    let receive = async {
        let mut epoch = bulk.to.accept_epoch().await.unwrap();
        drain(&mut epoch).await.unwrap();
    };
    let (answer, ()) = soon(Box::pin(async { tokio::join!(send, receive) })).await;
    assert!(matches!(answer, Err(SendEpochError::Answer { .. })), "{answer:?}");
    let mut epoch = bulk.from.send_epoch().await.unwrap();
    epoch.frame(&begin(), Vec::new()).await.unwrap();
    epoch.frame(&manifest(1), Vec::new()).await.unwrap();
    let late = soon(epoch.finish(Duration::from_millis(100))).await;
    assert!(matches!(late, Err(SendEpochError::Timeout { .. })), "{late:?}");
}
