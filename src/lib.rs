//! Standin: continuous-checkpoint failover for running Linux workloads.

pub mod agent;
pub mod capture;
pub mod cli;
pub mod config;
pub mod criu;
pub mod delta;
pub mod doctor;
pub mod extents;
pub mod files;
pub mod ha;
pub mod memory;
pub mod model;
pub mod observe;
pub mod restore;
pub mod store;
pub mod takeover;
pub mod transport;
pub mod wire;
pub mod workload;
