//! Messages and frames on QUIC streams.

use bytes::Bytes;
use quinn::{ReadError, ReadExactError, RecvStream, SendStream, WriteError};

use crate::wire::{
    codec::{self, CodecError, Message, PREFIX_LEN},
    frame::{FrameError, HEADER_LEN, Header},
};

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// It has no encoding, or the bytes are none.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The stream or connection broke while writing.
    #[error("sending failed: {0}")]
    Write(#[from] WriteError),
    /// The stream or connection broke while reading.
    #[error("receiving failed: {0}")]
    Read(#[from] ReadError),
    /// The stream ended in the middle of the message, or before it.
    #[error("the other end closed the stream before its message was complete")]
    Cut,
    /// Bytes follow where none belong.
    #[error("the other end sent more than one message where one is due")]
    Trailing,
    /// A message that does not belong there.
    #[error("the other end sent another message than the one due; run the same release on both hosts")]
    Unexpected,
}

/// Why there is no frame.
pub(super) enum Broken {
    /// The stream or connection broke.
    Read(ReadError),
    /// The stream ended before or in the frame.
    Cut,
    /// Bytes follow the last one.
    Trailing,
    /// Its header is none.
    Header(FrameError),
}

/// A frame as it came: only its lengths were looked at.
pub(super) struct RawFrame {
    pub(super) header: [u8; HEADER_LEN],
    pub(super) head: Vec<u8>,
    pub(super) body: Vec<u8>,
}

/// Writes a message.
pub(super) async fn write<T: Message>(stream: &mut SendStream, message: &T) -> Result<(), MessageError> {
    let bytes = codec::encode_message(message)?;
    Ok(stream.write_all(&bytes).await?)
}

/// Writes a message and ends the stream.
pub(super) async fn write_last<T: Message>(stream: &mut SendStream, message: &T) -> Result<(), MessageError> {
    write(stream, message).await?;
    // Fails only on a stream that was ended before, which its owner does not do.
    stream.finish().map_err(|_| WriteError::ClosedStream)?;
    Ok(())
}

/// Reads a message.
pub(super) async fn read<T: Message>(stream: &mut RecvStream) -> Result<T, MessageError> {
    let mut prefix = [0; PREFIX_LEN];
    stream.read_exact(&mut prefix).await?;
    let mut bytes = vec![0; codec::message_len::<T>(prefix)?];
    stream.read_exact(&mut bytes).await?;
    Ok(codec::decode_message(&bytes)?)
}

/// Reads a message and the end of the stream.
pub(super) async fn read_last<T: Message>(stream: &mut RecvStream) -> Result<T, MessageError> {
    let message = read(stream).await?;
    match stream.read(&mut [0]).await? {
        None => Ok(message),
        Some(_) => Err(MessageError::Trailing),
    }
}

/// Writes bytes; ends when the peer wants no more of them.
pub(super) async fn write_wanted(stream: &mut SendStream, bytes: Bytes) -> Result<(), WriteError> {
    // quinn-proto 0.11 does not end a write that waits for the connection's window when the peer stops the
    // stream (`write_source` looks at the window first), so that is waited for beside it.
    let stopped = stream.stopped();
    tokio::select! {
        written = stream.write_chunk(bytes) => written,
        Ok(Some(code)) = stopped => Err(WriteError::Stopped(code)),
    }
}

/// Reads a frame.
pub(super) async fn read_frame(stream: &mut RecvStream) -> Result<RawFrame, Broken> {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).await?;
    let lens = Header::decode(&header).map_err(Broken::Header)?;
    let mut head = vec![0; lens.head_len];
    stream.read_exact(&mut head).await?;
    let mut body = vec![0; lens.body_len];
    stream.read_exact(&mut body).await?;
    Ok(RawFrame { header, head, body })
}

/// Reads the end of the stream.
pub(super) async fn read_end(stream: &mut RecvStream) -> Result<(), Broken> {
    match stream.read(&mut [0]).await.map_err(Broken::Read)? {
        None => Ok(()),
        Some(_) => Err(Broken::Trailing),
    }
}

impl From<ReadExactError> for MessageError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::FinishedEarly(_) => Self::Cut,
            ReadExactError::ReadError(error) => Self::Read(error),
        }
    }
}

impl From<ReadExactError> for Broken {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::FinishedEarly(_) => Self::Cut,
            ReadExactError::ReadError(error) => Self::Read(error),
        }
    }
}
