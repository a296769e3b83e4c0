//! Dirty tracking and reads against real programs: every page of the target is compared with a replica that
//! was built from nothing but the tracker's passes and reads. Needs root and kernel 6.7 or newer.

mod attach;
mod replica;
mod target;
mod tracking;
mod tree;
mod vmas;
