//! The store against real kills, a full file system and a real CRIU. Needs root (a mount namespace, CRIU).

mod criu;
mod epochs;
mod full;
mod kill;
mod ready;
