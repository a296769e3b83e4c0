//! An epoch as one bidirectional stream of a bulk connection: frames one way, one answer the other way.
//!
//! ```text
//!   sender                                        receiver
//!     Begin, Pages…, Image…, File…, Manifest ───►   next_frame() -> Some
//!     End, end of stream ───────────────────────►   next_frame() -> None: whole, verified
//!     finish() ◄───────────── EpochAnswer ────────  answer()
//! ```
//!
//! Invariants:
//! - A sender dropped before `finish` resets the stream: the receiver gets an error, never a short epoch.
//! - The receiver may answer early (the delta does not apply, the disk is full); the sender's next `frame`
//!   then returns that answer.
//! - What the receiver does not read is held back by flow control; neither end buffers more than a window.
//!   All streams of a connection share that window: an epoch that is not read holds up the others, so
//!   workloads that must not wait for each other have a bulk connection each.

use std::time::Duration;

use bytes::Bytes;
use quinn::{ConnectionError, ReadError, RecvStream, SendStream, WriteError};
use tokio::time::timeout;

use super::{
    CloseCode, Connection, PeerName,
    stream::{self, Broken, MessageError, RawFrame},
};
use crate::wire::{
    epoch::{EpochError, EpochReader, EpochWriter},
    message::{EpochAnswer, FrameHead},
};

/// How long the answer of a receiver that has stopped reading may take.
const EARLY_ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Why an epoch could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendEpochError {
    /// The connection is gone.
    #[error("the connection to {peer} is lost ({source}): the epoch is sent again when it is back")]
    Lost {
        /// The peer.
        peer: PeerName,
        /// How.
        source: ConnectionError,
    },
    /// A frame of ours breaks a rule of the protocol.
    #[error("the epoch cannot be sent as it is: {0}")]
    Epoch(#[from] EpochError),
    /// The peer answered before the epoch's end: not an error of the transport.
    #[error("{peer} answered before the epoch's end: {answer:?}")]
    Answered {
        /// The peer.
        peer: PeerName,
        /// Its answer.
        answer: Box<EpochAnswer>,
    },
    /// Writing failed.
    #[error("sending the epoch to {peer}: {source}")]
    Write {
        /// The peer.
        peer: PeerName,
        /// How.
        source: WriteError,
    },
    /// The answer is none.
    #[error("the answer of {peer} to the epoch: {source}")]
    Answer {
        /// The peer.
        peer: PeerName,
        /// How.
        source: MessageError,
    },
    /// No answer in time. Whether the epoch is committed is then unknown.
    #[error("{peer} did not say within {} ms what became of the epoch: see whether its disk is slow", within.as_millis())]
    Timeout {
        /// The peer.
        peer: PeerName,
        /// The time it had.
        within: Duration,
    },
    /// An earlier call failed or was dropped half-way.
    #[error("the epoch's stream to {peer} was abandoned by an earlier call: send the epoch anew")]
    Abandoned {
        /// The peer.
        peer: PeerName,
    },
}

/// Why an epoch could not be received.
#[derive(Debug, thiserror::Error)]
pub enum RecvEpochError {
    /// The sender gave up, or the connection did.
    #[error("the epoch from {peer} broke off ({source}): it is dropped, and the sender sends anew")]
    Read {
        /// The peer.
        peer: PeerName,
        /// How.
        source: ReadError,
    },
    /// The stream ended before the last frame.
    #[error("the epoch from {peer} ended in the middle: it is dropped")]
    Cut {
        /// The peer.
        peer: PeerName,
    },
    /// Bytes follow the last frame.
    #[error("the epoch from {peer} goes on behind its end: it is dropped")]
    Trailing {
        /// The peer.
        peer: PeerName,
    },
    /// The frames are no epoch.
    #[error("the epoch from {peer} is refused: {source}")]
    Epoch {
        /// The peer.
        peer: PeerName,
        /// Why.
        source: EpochError,
    },
    /// The answer could not be sent.
    #[error("answering the epoch from {peer}: {source}")]
    Answer {
        /// The peer.
        peer: PeerName,
        /// How.
        source: MessageError,
    },
}

impl Connection {
    /// Begins an epoch.
    pub async fn send_epoch(&self) -> Result<EpochSender, SendEpochError> {
        self.fit_send_window();
        let lost = |source| SendEpochError::Lost { peer: self.peer().clone(), source };
        let (send, recv) = self.open_bi().await.map_err(lost)?;
        let (peer, writer) = (self.peer().clone(), EpochWriter::new());
        Ok(EpochSender { peer, send, recv, writer, state: Sending::Ready })
    }

    /// Waits for the peer's next epoch.
    pub async fn accept_epoch(&self) -> Result<EpochReceiver, ConnectionError> {
        let (send, recv) = self.accept_bi().await?;
        let (peer, reader) = (self.peer().clone(), EpochReader::new());
        Ok(EpochReceiver { peer, send, recv, reader, answered: false })
    }
}

/// Where a sender is. Anything but `Ended` at its drop resets the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sending {
    /// Between two frames.
    Ready,
    /// In a frame; stays so if that call fails or is dropped.
    Busy,
    /// All is written.
    Ended,
}

/// Sends one epoch.
#[derive(Debug)]
pub struct EpochSender {
    peer: PeerName,
    send: SendStream,
    recv: RecvStream,
    writer: EpochWriter,
    state: Sending,
}

impl EpochSender {
    /// Sends a frame; waits while the receiver is behind by a window. `End` is sent by
    /// [`EpochSender::finish`] alone. After an error, or if the call is dropped half-way, the epoch is lost.
    pub async fn frame(&mut self, head: &FrameHead, body: impl Into<Bytes>) -> Result<(), SendEpochError> {
        self.begin_write()?;
        let body = body.into();
        let prefix = self.writer.frame(head, &body)?;
        self.write(prefix.into()).await?;
        self.write(body).await?;
        self.state = Sending::Ready;
        Ok(())
    }

    /// Sends the epoch's end and waits for the peer's answer.
    pub async fn finish(mut self, within: Duration) -> Result<EpochAnswer, SendEpochError> {
        self.begin_write()?;
        let end = self.writer.end()?;
        match self.write(end.into()).await {
            Err(SendEpochError::Answered { answer, .. }) => return Ok(*answer),
            written => written?,
        }
        let ended = self.send.finish().map_err(|_| WriteError::ClosedStream);
        ended.map_err(|source| SendEpochError::Write { peer: self.peer.clone(), source })?;
        self.state = Sending::Ended;
        self.read_answer(within).await
    }

    /// What this one sends goes before what others of its connection send.
    pub fn hurry(&self) {
        // Fails only on a stream that has ended, which has nothing to send.
        let _ = self.send.set_priority(1);
    }

    /// Bytes handed to QUIC so far.
    pub fn bytes(&self) -> u64 {
        self.writer.bytes()
    }

    fn begin_write(&mut self) -> Result<(), SendEpochError> {
        match std::mem::replace(&mut self.state, Sending::Busy) {
            Sending::Ready => Ok(()),
            Sending::Busy | Sending::Ended => Err(SendEpochError::Abandoned { peer: self.peer.clone() }),
        }
    }

    async fn write(&mut self, bytes: Bytes) -> Result<(), SendEpochError> {
        match stream::write_wanted(&mut self.send, bytes).await {
            Ok(()) => Ok(()),
            Err(WriteError::Stopped(_)) => {
                let answer = Box::new(self.read_answer(EARLY_ANSWER_WITHIN).await?);
                Err(SendEpochError::Answered { peer: self.peer.clone(), answer })
            }
            Err(source) => Err(SendEpochError::Write { peer: self.peer.clone(), source }),
        }
    }

    async fn read_answer(&mut self, within: Duration) -> Result<EpochAnswer, SendEpochError> {
        let peer = self.peer.clone();
        match timeout(within, stream::read_last(&mut self.recv)).await {
            Ok(answer) => answer.map_err(|source| SendEpochError::Answer { peer, source }),
            Err(_) => Err(SendEpochError::Timeout { peer, within }),
        }
    }
}

impl Drop for EpochSender {
    fn drop(&mut self) {
        if self.state != Sending::Ended {
            // quinn would end the stream as if all had been said. An error means that it is closed already.
            let _ = self.send.reset(CloseCode::Abandoned.into());
        }
    }
}

/// Receives one epoch. Dropped without an answer, it tells the sender that there is none.
#[derive(Debug)]
pub struct EpochReceiver {
    peer: PeerName,
    send: SendStream,
    recv: RecvStream,
    reader: EpochReader,
    answered: bool,
}

impl EpochReceiver {
    /// The next frame, checked; `None` when the epoch is whole and its digest right. After an error, or if
    /// the call is dropped half-way, the epoch is lost.
    pub async fn next_frame(&mut self) -> Result<Option<(FrameHead, Vec<u8>)>, RecvEpochError> {
        let frame = stream::read_frame(&mut self.recv).await;
        let RawFrame { header, head, body } = frame.map_err(|broken| self.broken(broken))?;
        let frame = self.reader.frame(&header, &head, &body);
        if let Some(head) = frame.map_err(|source| self.refused(source))? {
            return Ok(Some((head, body)));
        }
        let end = stream::read_end(&mut self.recv).await;
        end.map_err(|broken| self.broken(broken))?;
        Ok(None)
    }

    /// Whether [`EpochReceiver::next_frame`] has seen the end.
    pub fn is_whole(&self) -> bool {
        self.reader.is_whole()
    }

    /// Bytes received so far.
    pub fn bytes(&self) -> u64 {
        self.reader.bytes()
    }

    /// The sender.
    pub fn peer(&self) -> &PeerName {
        &self.peer
    }

    /// Tells the sender what became of the epoch; before its end, that nothing more of it is wanted.
    pub async fn answer(mut self, answer: &EpochAnswer) -> Result<(), RecvEpochError> {
        let sent = stream::write_last(&mut self.send, answer).await;
        sent.map_err(|source| RecvEpochError::Answer { peer: self.peer.clone(), source })?;
        self.answered = true;
        Ok(())
        // The stream's reading half stops the sender when it is dropped before its end.
    }

    /// The stream that the answer goes out on.
    pub(super) fn answer_stream(&mut self) -> &mut SendStream {
        &mut self.send
    }

    /// The answer was written to that stream.
    pub(super) fn end_answer(&mut self) -> Result<(), WriteError> {
        self.send.finish().map_err(|_| WriteError::ClosedStream)?;
        self.answered = true;
        Ok(())
    }

    fn broken(&self, broken: Broken) -> RecvEpochError {
        let peer = self.peer.clone();
        match broken {
            Broken::Read(source) => RecvEpochError::Read { peer, source },
            Broken::Cut => RecvEpochError::Cut { peer },
            Broken::Trailing => RecvEpochError::Trailing { peer },
            Broken::Header(source) => self.refused(source),
        }
    }

    fn refused(&self, source: impl Into<EpochError>) -> RecvEpochError {
        RecvEpochError::Epoch { peer: self.peer.clone(), source: source.into() }
    }
}

impl Drop for EpochReceiver {
    fn drop(&mut self) {
        if !self.answered {
            // As for the sender: without this, the sender would read an empty answer.
            let _ = self.send.reset(CloseCode::Abandoned.into());
        }
    }
}
