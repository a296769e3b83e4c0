//! What is protected, and how its place is made.
pub mod spec;
