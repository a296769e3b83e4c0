//! Real dumps and restores by a real CRIU. Needs root, a CRIU, redis-server and python3.

mod common;
mod dump;
mod probe;
mod restore;
mod start;
