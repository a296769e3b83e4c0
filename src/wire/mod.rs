//! Frames and messages between agents, pure.

pub mod message;
