//! Sandboxes, guards, bare trees and the network of a takeover, for real: needs root.

mod bare;
mod criu;
mod ear;
mod guard;
mod lab;
mod lease;
mod network;
mod sandbox;
mod throttle;
