//! CRIU's own figures of a dump: `stats-dump`, beside the images.

use std::{fs, io, path::Path};

use prost::Message;

/// `stats_entry` of stats.proto, the part that matters.
#[derive(Message)]
struct Stats {
    #[prost(message, optional, tag = "1")]
    dump: Option<DumpStats>,
}

/// `dump_stats_entry`.
#[derive(Message)]
struct DumpStats {
    /// From the first task stopped to the last task stopped, microseconds.
    #[prost(uint32, tag = "1")]
    freezing_time: u32,
    /// From there to the tree let go, microseconds.
    #[prost(uint32, tag = "2")]
    frozen_time: u32,
}

/// Two magic numbers, then the length of the message.
const HEADER_LEN: usize = 12;

/// Freezing and frozen time of the dump in `dir`, microseconds; their sum is the frozen time as Standin defines it.
pub fn frozen(dir: &Path) -> io::Result<(u64, u64)> {
    let bytes = fs::read(dir.join("stats-dump"))?;
    let message = bytes.get(HEADER_LEN..).unwrap_or_default();
    let stats = Stats::decode(message).map_err(io::Error::other)?;
    let dump = stats.dump.ok_or_else(|| io::Error::other("CRIU's stats-dump has no figures of a dump"))?;
    Ok((u64::from(dump.freezing_time), u64::from(dump.frozen_time)))
}
