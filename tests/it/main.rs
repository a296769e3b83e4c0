//! Integration tests: one binary, so that it links once and `cargo test NAME` finds everything.

mod lab;
mod lab_itself;
