//! Integration tests: one binary, so that it links once and `cargo test NAME` finds everything.

mod cluster;
mod committed;
mod container_faults;
mod container_keeps;
mod containers;
mod deciding;
mod docker;
mod doctor;
mod drill;
mod etcd;
mod failover;
mod faults;
mod handoff;
mod hooks;
mod lab;
mod lab_itself;
mod pace;
mod paths;
mod postgres;
mod redis;
mod refusals;
mod rejoin;
mod restoring;
mod shipping;
mod turns;
mod whole;
