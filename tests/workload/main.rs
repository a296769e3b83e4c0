//! Sandboxes, guards, bare trees and the network of a takeover, for real: needs root.

mod bare;
mod criu;
mod guard;
mod lab;
mod network;
mod sandbox;
mod throttle;
