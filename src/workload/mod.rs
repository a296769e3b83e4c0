//! What is protected, and how its place is made.
//!
//! - A [`sandbox`] is a place made by us: namespaces held by a tiny [`init`], the same on both hosts; on the
//!   standby it waits, empty and silent.
//! - A [`container`] is made by an engine, on the standby as well, where it waits; a guard process watches over it. One of
//!   which nothing was prepared is [`whole`](container::whole): on the standby its runtime restores it.
//! - A [`bare`] tree was started by somebody else in the host's namespaces; a guard process watches over it.
//!
//! A drill of any of them has a sandbox, like what waits for a takeover, and isolated.
//!
//! All have a [`keeper`]: the process that outlives the agent, carries the [`guard`] and is the only one
//! that opens the workload's network, so that a fence and an opening cannot overtake each other.
//! The tree's processes are in a [`cgroup`] of their own.

pub mod bare;
pub mod cgroup;
pub mod container;
pub mod control;
mod devices;
pub mod guard;
pub mod init;
pub mod keeper;
mod mountinfo;
pub mod netlink;
pub mod network;
pub mod sandbox;
pub mod spec;
mod sys;

/// The pid of a process in its innermost pid namespace.
fn inner_pid(pid: u32) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_ascii_whitespace().next_back()?.parse().ok()
}
