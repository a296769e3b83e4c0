//! Frames and messages between agents, pure: bytes in, checked values out. No sockets, no clock.
//!
//! Owns the encoding (bincode is used nowhere else), the version of the protocol and every limit on what
//! another host may say:
//!
//! - [`message`]: the types.
//! - [`codec`]: messages and datagrams to bytes and back.
//! - [`frame`]: header, head and body of an epoch's frames.
//! - [`epoch`]: the order of an epoch's frames and its digest, for both directions.
//! - [`check`]: what a decoded value must obey beyond its type.
//! - [`examine`]: what two hosts tell of themselves before they are relied on.
//! - [`supply`]: what a standby is sent before it can be one.
//! - [`inventory`]: what a standby says it holds, by hashes.
//! - [`pairing`]: what two hosts say before they trust each other.
//!
//! Invariants:
//! - A length is compared with a named limit before anything of that length is allocated or read.
//! - Bytes left over behind a value are an error.
//! - What passes a decoder here has passed its [`check`]; a frame that an encoder returns would pass it too.

pub mod check;
pub mod codec;
pub mod epoch;
pub mod examine;
pub mod frame;
pub mod inventory;
pub mod message;
pub mod pairing;
pub mod supply;
