//! What a takeover does to the host's network, in this order ([`order`] keeps it):
//!
//! 1. The old host is silent: its [`gate`] is closed before anything on it is killed.
//! 2. Here the gate is closed (a sandbox is made that way) or the service's traffic is dropped, *before* the
//!    address comes up; else a retransmit meets no socket and the client gets RST.
//! 3. [`address`] up; restore; [`gate`] open.
//! 4. [`announce`], repeated; restored connections are [`nudge`]d, and those that cannot go on
//!    [ended](stale). The workload is given what [was sent to it](inputs) since its epoch.
//!
//! While another host could take over, what a workload sends leaves only as long as the kernel has a [lease] of it.
//!
//! What a workload sends, and what is sent to it while it is frozen, can be [held](hold).
//!
//! What lets a workload speak is done by its keeper, which refuses once its guard has fired; what silences
//! it is done here, and needs nobody. The packet filter is told by messages of our own (`netfilter`, `tables`).

pub mod address;
pub mod announce;
pub mod check;
pub mod gate;
pub mod hold;
pub mod inputs;
pub mod lease;
mod netfilter;
pub mod nudge;
pub mod order;
pub mod stale;
mod sys;
mod tables;
mod tcp;
