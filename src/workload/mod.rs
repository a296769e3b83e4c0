//! What is protected, and how its place is made.
//!
//! - A [`sandbox`] is a place made by us: namespaces held by a tiny [`init`], the same on both hosts; on the
//!   standby it waits, empty and silent.
//! - A [`bare`] tree was started by somebody else in the host's namespaces; a guard process watches over it.
//!
//! Both have a [`keeper`]: the process that outlives the agent, carries the [`guard`] and is the only one
//! that opens the workload's network, so that a fence and an opening cannot overtake each other.
//! The tree's processes are in a [`cgroup`] of their own.

pub mod bare;
pub mod cgroup;
pub mod control;
pub mod guard;
pub mod init;
pub mod keeper;
pub mod netlink;
pub mod network;
pub mod sandbox;
pub mod spec;
mod sys;
