//! Standin: continuous-checkpoint failover for running Linux workloads.

pub mod criu;
pub mod delta;
pub mod files;
pub mod ha;
pub mod memory;
pub mod model;
pub mod store;
pub mod takeover;
pub mod transport;
pub mod wire;
pub mod workload;
