//! Messages on QUIC streams.

use quinn::{ReadError, ReadExactError, RecvStream, SendStream, WriteError};

use crate::wire::codec::{self, CodecError, Message, PREFIX_LEN};

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
    read_exact(stream, &mut prefix).await?;
    let mut bytes = vec![0; codec::message_len::<T>(prefix)?];
    read_exact(stream, &mut bytes).await?;
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

async fn read_exact(stream: &mut RecvStream, bytes: &mut [u8]) -> Result<(), MessageError> {
    stream.read_exact(bytes).await.map_err(|e| match e {
        ReadExactError::FinishedEarly(_) => MessageError::Cut,
        ReadExactError::ReadError(e) => e.into(),
    })
}
