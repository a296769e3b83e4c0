//! An inventory as one bidirectional stream of a bulk connection: a question one way, hashes the other way.
//!
//! Invariants, as those of [`super::epoch`]: a sender dropped before [`InventorySender::finish`] resets the stream, so that a
//! part is never taken for the whole; what the receiver does not read is held back by flow control.

use std::time::Duration;

use bytes::Bytes;
use quinn::{ConnectionError, ReadError, RecvStream, SendStream, WriteError};
use tokio::time::timeout;

use super::{
    CloseCode, Connection, EpochReceiver, PeerName,
    stream::{self, Broken, RawFrame},
};
use crate::wire::{
    epoch::{EpochError, EpochWriter},
    inventory::{Ask, Held, InventoryError, InventoryReader, InventoryWriter},
    message::FrameHead,
};

/// The longest that the standby may take over a frame: what it reads for one is little, but its disk may be slow, and it makes
/// its files durable first.
const FRAME_WITHIN: Duration = Duration::from_secs(60);

/// Why an inventory was not received.
#[derive(Debug, thiserror::Error)]
pub enum RecvInventoryError {
    /// The connection is gone.
    #[error("the connection to {peer} is lost: {source}")]
    Lost {
        /// The peer.
        peer: PeerName,
        /// How.
        source: ConnectionError,
    },
    /// The question could not be sent.
    #[error("asking {peer}: {source}")]
    Write {
        /// The peer.
        peer: PeerName,
        /// How.
        source: WriteError,
    },
    /// The peer has none, or the connection broke.
    #[error("{peer} gives none, or broke off: {source}")]
    Read {
        /// The peer.
        peer: PeerName,
        /// How.
        source: ReadError,
    },
    /// The stream ended before the last frame.
    #[error("that of {0} ended in the middle")]
    Cut(PeerName),
    /// Bytes follow the last frame.
    #[error("that of {0} goes on behind its end")]
    Trailing(PeerName),
    /// The question breaks a rule of the protocol.
    #[error("it cannot be asked as it is: {0}")]
    Question(EpochError),
    /// The frames are none.
    #[error("that of {peer} is refused: {source}")]
    Refused {
        /// The peer.
        peer: PeerName,
        /// Why.
        source: InventoryError,
    },
    /// Nothing comes.
    #[error("{0} was silent for too long")]
    Silent(PeerName),
}

impl Connection {
    /// Asks what the peer holds.
    pub async fn ask_inventory(&self, ask: &Ask) -> Result<InventoryReceiver, RecvInventoryError> {
        let peer = self.peer().clone();
        let question = EpochWriter::new().frame(&FrameHead::Ask(ask.clone()), &[]);
        let question = question.map_err(RecvInventoryError::Question)?;
        let lost = |source| RecvInventoryError::Lost { peer: self.peer().clone(), source };
        let (mut send, recv) = self.open_bi().await.map_err(lost)?;
        let failed = |source| RecvInventoryError::Write { peer: self.peer().clone(), source };
        send.write_all(&question).await.map_err(failed)?;
        Ok(InventoryReceiver { peer, send, recv, reader: InventoryReader::new(ask) })
    }
}

/// Receives one inventory.
#[derive(Debug)]
pub struct InventoryReceiver {
    peer: PeerName,
    /// Of the question. It stays open: were it dropped, quinn would end it as if all had been said.
    send: SendStream,
    recv: RecvStream,
    reader: InventoryReader,
}

impl InventoryReceiver {
    /// The next frame, checked; `None` when the inventory is whole and its digest right.
    pub async fn next(&mut self) -> Result<Option<(Held, Vec<u8>)>, RecvInventoryError> {
        match timeout(FRAME_WITHIN, self.read()).await {
            Ok(frame) => frame,
            Err(_) => Err(RecvInventoryError::Silent(self.peer.clone())),
        }
    }

    /// Bytes received so far.
    pub fn bytes(&self) -> u64 {
        self.reader.bytes()
    }

    async fn read(&mut self) -> Result<Option<(Held, Vec<u8>)>, RecvInventoryError> {
        let frame = stream::read_frame(&mut self.recv).await;
        let RawFrame { header, head, body } = frame.map_err(|broken| self.broken(broken))?;
        let frame = self.reader.frame(&header, &head, &body);
        if let Some(held) = frame.map_err(|source| self.refused(source))? {
            return Ok(Some((held, body)));
        }
        let end = stream::read_end(&mut self.recv).await;
        end.map_err(|broken| self.broken(broken))?;
        Ok(None)
    }

    fn broken(&self, broken: Broken) -> RecvInventoryError {
        let peer = self.peer.clone();
        match broken {
            Broken::Read(source) => RecvInventoryError::Read { peer, source },
            Broken::Cut => RecvInventoryError::Cut(peer),
            Broken::Trailing => RecvInventoryError::Trailing(peer),
            Broken::Header(source) => self.refused(source.into()),
        }
    }

    fn refused(&self, source: InventoryError) -> RecvInventoryError {
        RecvInventoryError::Refused { peer: self.peer.clone(), source }
    }
}

/// Why an inventory was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendInventoryError {
    /// A frame of ours breaks a rule of the protocol.
    #[error("it cannot be sent as it is: {0}")]
    Rules(#[from] InventoryError),
    /// Writing failed.
    #[error("sending it broke off: {0}")]
    Write(#[from] WriteError),
}

impl EpochReceiver {
    /// Answers what was asked instead of an epoch being sent.
    pub fn into_inventory(self, ask: &Ask) -> InventorySender {
        InventorySender { stream: self, writer: InventoryWriter::new(ask) }
    }
}

/// Sends one inventory. Its stream is reset with it unless it came to its end.
#[derive(Debug)]
pub struct InventorySender {
    stream: EpochReceiver,
    writer: InventoryWriter,
}

impl InventorySender {
    /// Sends a frame; waits while the receiver is behind by a window.
    pub async fn frame(&mut self, held: Held, body: impl Into<Bytes>) -> Result<(), SendInventoryError> {
        let body = body.into();
        let prefix = self.writer.frame(held, &body)?;
        self.write(prefix.into()).await?;
        self.write(body).await
    }

    /// Sends the end.
    pub async fn finish(mut self) -> Result<(), SendInventoryError> {
        let end = self.writer.end()?;
        self.write(end.into()).await?;
        Ok(self.stream.end_answer()?)
    }

    async fn write(&mut self, bytes: Bytes) -> Result<(), SendInventoryError> {
        Ok(stream::write_wanted(self.stream.answer_stream(), bytes).await?)
    }
}

impl Drop for InventoryReceiver {
    fn drop(&mut self) {
        // Ours has nothing more to say. An error means that it is closed already.
        let _ = self.send.reset(CloseCode::Abandoned.into());
    }
}
