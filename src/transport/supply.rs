//! A supply as one bidirectional stream of its channel: a question, an answer, and if that is so agreed frames and a last
//! answer. What they say is in [`crate::wire::supply`].
//!
//! Invariants, as those of [`super::epoch`]: a sender dropped before [`SupplySender::finish`] resets the stream, so that what
//! arrived is never taken for whole; the receiver may answer early, and the sender's next frame returns that answer; what the
//! receiver does not read is held back by flow control.

use std::time::Duration;

use bytes::Bytes;
use quinn::{ConnectionError, RecvStream, SendStream, WriteError};
use tokio::time::timeout;

use super::{
    CloseCode, Connection, PeerName,
    stream::{self, Broken, MessageError, RawFrame},
};
use crate::wire::{
    message::FrameHead,
    supply::{Size, Supply, SupplyAnswer, SupplyError, SupplyReader, SupplyRequest, SupplyWriter},
};

/// The longest that a peer may take over a message that is due, or over a frame once it has begun to send them: its disk may
/// be slow, but it does not hold a place for ever.
const FRAME_WITHIN: Duration = Duration::from_secs(60);
/// How long the answer of a receiver that has stopped reading may take.
const EARLY_ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Why something could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendSupplyError {
    /// The connection is gone.
    #[error(
        "the connection to {peer} is lost ({source}); nothing of it is kept there: try again when it is back"
    )]
    Lost {
        /// The peer.
        peer: PeerName,
        /// How.
        source: ConnectionError,
    },
    /// A frame of ours breaks a rule of the protocol.
    #[error("it cannot be sent as it is: {0}")]
    Supply(#[from] SupplyError),
    /// Writing failed.
    #[error("sending to {peer} broke off ({source}); nothing of it is kept there: try again")]
    Write {
        /// The peer.
        peer: PeerName,
        /// How.
        source: WriteError,
    },
    /// The answer is none.
    #[error("{peer} broke off ({source}); nothing of it is kept there: try again")]
    Answer {
        /// The peer.
        peer: PeerName,
        /// How.
        source: MessageError,
    },
    /// No answer in time.
    #[error("{peer} did not answer within {} s: see whether its disk or its engine is slow", within.as_secs())]
    Timeout {
        /// The peer.
        peer: PeerName,
        /// The time it had.
        within: Duration,
    },
    /// The peer said no.
    #[error("{peer} refuses: {reason}")]
    Refused {
        /// The peer.
        peer: PeerName,
        /// Its words.
        reason: String,
    },
    /// An answer to something else.
    #[error("{0} gave an answer that does not belong there; run the same release on both hosts")]
    Unexpected(PeerName),
}

/// Why something could not be received.
#[derive(Debug, thiserror::Error)]
pub enum RecvSupplyError {
    /// A message, or the stream.
    #[error("from {peer}: {source}")]
    Message {
        /// The peer.
        peer: PeerName,
        /// How.
        source: MessageError,
    },
    /// The frames are none.
    #[error("what {peer} sends is refused: {source}")]
    Supply {
        /// The peer.
        peer: PeerName,
        /// Why.
        source: SupplyError,
    },
    /// It sends nothing more.
    #[error("{0} has sent nothing for a minute")]
    Silent(PeerName),
}

impl Connection {
    /// Asks something that is answered at once.
    pub async fn ask_supply(
        &self,
        request: &SupplyRequest,
        within: Duration,
    ) -> Result<SupplyAnswer, SendSupplyError> {
        let mut sender = self.open_supply(request, None).await?;
        sender.read_answer(within).await
    }

    /// Offers something. `None`: the peer has it already.
    pub async fn send_supply(
        &self,
        request: &SupplyRequest,
        within: Duration,
    ) -> Result<Option<SupplySender>, SendSupplyError> {
        let writer = match request {
            SupplyRequest::Ship { supply, size, .. } => Some(SupplyWriter::new(supply, *size)),
            SupplyRequest::Ask { .. } => None,
        };
        let mut sender = self.open_supply(request, writer).await?;
        match sender.read_answer(within).await? {
            SupplyAnswer::Ready => Ok(Some(sender)),
            SupplyAnswer::Held => Ok(None),
            _ => Err(SendSupplyError::Unexpected(self.peer().clone())),
        }
    }

    async fn open_supply(
        &self,
        request: &SupplyRequest,
        writer: Option<SupplyWriter>,
    ) -> Result<SupplySender, SendSupplyError> {
        self.fit_send_window();
        let lost = |source| SendSupplyError::Lost { peer: self.peer().clone(), source };
        let (mut send, recv) = self.open_bi().await.map_err(lost)?;
        let answer = |source| SendSupplyError::Answer { peer: self.peer().clone(), source };
        stream::write(&mut send, request).await.map_err(answer)?;
        Ok(SupplySender { peer: self.peer().clone(), send, recv, writer, ended: false })
    }

    /// Waits for the peer's next question or offer.
    pub async fn accept_supply(&self) -> Result<SupplyReceiver, ConnectionError> {
        let (send, recv) = self.accept_bi().await?;
        Ok(SupplyReceiver { peer: self.peer().clone(), send, recv, reader: None, answered: false })
    }
}

/// Sends one thing.
#[derive(Debug)]
pub struct SupplySender {
    peer: PeerName,
    send: SendStream,
    recv: RecvStream,
    writer: Option<SupplyWriter>,
    ended: bool,
}

impl SupplySender {
    /// Sends a frame; waits while the receiver is behind by a window. Returns the bytes that it takes.
    pub async fn frame(&mut self, head: &FrameHead, body: impl Into<Bytes>) -> Result<u64, SendSupplyError> {
        let body = body.into();
        let prefix = self.writer()?.frame(head, &body)?;
        let len = (prefix.len() + body.len()) as u64;
        self.write(prefix.into()).await?;
        self.write(body).await?;
        Ok(len)
    }

    /// Sends the end and waits until all of it is in its place.
    pub async fn finish(mut self, within: Duration) -> Result<(), SendSupplyError> {
        let end = self.writer()?.end()?;
        self.write(end.into()).await?;
        let ended = self.send.finish().map_err(|_| WriteError::ClosedStream);
        ended.map_err(|source| SendSupplyError::Write { peer: self.peer.clone(), source })?;
        self.ended = true;
        match self.read_answer(within).await? {
            SupplyAnswer::Done => Ok(()),
            _ => Err(SendSupplyError::Unexpected(self.peer.clone())),
        }
    }

    fn writer(&mut self) -> Result<&mut SupplyWriter, SendSupplyError> {
        self.writer.as_mut().ok_or_else(|| SendSupplyError::Unexpected(self.peer.clone()))
    }

    async fn write(&mut self, bytes: Bytes) -> Result<(), SendSupplyError> {
        match stream::write_wanted(&mut self.send, bytes).await {
            Err(WriteError::Stopped(_)) => match self.read_answer(EARLY_ANSWER_WITHIN).await {
                Ok(_) => Err(SendSupplyError::Unexpected(self.peer.clone())),
                Err(error) => Err(error),
            },
            written => written.map_err(|source| SendSupplyError::Write { peer: self.peer.clone(), source }),
        }
    }

    /// A refusal is an error.
    async fn read_answer(&mut self, within: Duration) -> Result<SupplyAnswer, SendSupplyError> {
        let peer = self.peer.clone();
        match timeout(within, stream::read(&mut self.recv)).await {
            Ok(Ok(SupplyAnswer::Refused { reason })) => Err(SendSupplyError::Refused { peer, reason }),
            Ok(answer) => answer.map_err(|source| SendSupplyError::Answer { peer, source }),
            Err(_) => Err(SendSupplyError::Timeout { peer, within }),
        }
    }
}

impl Drop for SupplySender {
    fn drop(&mut self) {
        if !self.ended {
            // quinn would end the stream as if all had been said. An error means that it is closed already.
            let _ = self.send.reset(CloseCode::Abandoned.into());
        }
    }
}

/// Receives one thing. Dropped without a last answer, it tells the sender that there is none.
#[derive(Debug)]
pub struct SupplyReceiver {
    peer: PeerName,
    send: SendStream,
    recv: RecvStream,
    reader: Option<SupplyReader>,
    answered: bool,
}

impl SupplyReceiver {
    /// The sender.
    pub fn peer(&self) -> &PeerName {
        &self.peer
    }

    /// What the peer wants: to be read first.
    pub async fn request(&mut self) -> Result<SupplyRequest, RecvSupplyError> {
        let read = timeout(FRAME_WITHIN, stream::read(&mut self.recv)).await;
        let read = read.map_err(|_| RecvSupplyError::Silent(self.peer.clone()))?;
        read.map_err(|source| self.broken(source))
    }

    /// Has the frames of a thing come.
    pub async fn ready(&mut self, supply: &Supply, size: Size) -> Result<(), RecvSupplyError> {
        self.reader = Some(SupplyReader::new(supply, size));
        let sent = stream::write(&mut self.send, &SupplyAnswer::Ready).await;
        sent.map_err(|source| self.broken(source))
    }

    /// The next frame, checked; `None` when all is there and the digest right. After an error, or if the call is dropped
    /// half-way, it is lost.
    pub async fn next_frame(&mut self) -> Result<Option<(FrameHead, Vec<u8>)>, RecvSupplyError> {
        match timeout(FRAME_WITHIN, self.read_frame()).await {
            Ok(frame) => frame,
            Err(_) => Err(RecvSupplyError::Silent(self.peer.clone())),
        }
    }

    async fn read_frame(&mut self) -> Result<Option<(FrameHead, Vec<u8>)>, RecvSupplyError> {
        let frame = stream::read_frame(&mut self.recv).await;
        let RawFrame { header, head, body } = frame.map_err(|broken| self.no_frame(broken))?;
        let Some(reader) = &mut self.reader else { return Err(self.broken(MessageError::Unexpected)) };
        let frame = reader.frame(&header, &head, &body);
        if let Some(head) = frame.map_err(|source| self.refused(source))? {
            return Ok(Some((head, body)));
        }
        let end = stream::read_end(&mut self.recv).await;
        end.map_err(|broken| self.no_frame(broken))?;
        Ok(None)
    }

    /// The last answer; before the end of the frames: that nothing more of them is wanted.
    pub async fn answer(mut self, answer: &SupplyAnswer) -> Result<(), RecvSupplyError> {
        let sent = stream::write_last(&mut self.send, answer).await;
        sent.map_err(|source| self.broken(source))?;
        self.answered = true;
        Ok(())
        // The stream's reading half stops the sender when it is dropped before its end.
    }

    fn no_frame(&self, broken: Broken) -> RecvSupplyError {
        match broken {
            Broken::Read(source) => self.broken(source.into()),
            Broken::Cut => self.broken(MessageError::Cut),
            Broken::Trailing => self.broken(MessageError::Trailing),
            Broken::Header(source) => self.refused(source.into()),
        }
    }

    fn broken(&self, source: MessageError) -> RecvSupplyError {
        RecvSupplyError::Message { peer: self.peer.clone(), source }
    }

    fn refused(&self, source: SupplyError) -> RecvSupplyError {
        RecvSupplyError::Supply { peer: self.peer.clone(), source }
    }
}

impl Drop for SupplyReceiver {
    fn drop(&mut self) {
        if !self.answered {
            // As for the sender: without this, the sender would read an empty answer.
            let _ = self.send.reset(CloseCode::Abandoned.into());
        }
    }
}
