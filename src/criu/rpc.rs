//! The part of CRIU's RPC messages that we speak (images/rpc.proto of CRIU 4.x; field numbers are
//! theirs), and the exchange of one message over the seqpacket.

use std::{
    io,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv, send},
};
use prost::Message;
use std::os::fd::AsRawFd as _;

/// Largest answer believed; real ones are under 1 KiB.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// `criu_req_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Kind {
    Empty = 0,
    Dump = 1,
    Restore = 2,
    Notify = 6,
    FeatureCheck = 9,
    Version = 10,
}

/// `criu_cg_mode.IGNORE`: the place of a workload owns its cgroups, not CRIU.
pub(super) const CGROUPS_IGNORE: i32 = 0;
/// `criu_network_lock_method.SKIP`: the output gate holds the network, not CRIU.
pub(super) const NETWORK_LOCK_SKIP: i32 = 3;

#[derive(Clone, PartialEq, Message)]
pub(super) struct PageServerInfo {
    #[prost(int32, optional, tag = "4")]
    pub(super) fd: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct InheritFd {
    #[prost(string, required, tag = "1")]
    pub(super) key: String,
    #[prost(int32, required, tag = "2")]
    pub(super) fd: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Options {
    #[prost(int32, required, tag = "1", default = "-1")]
    pub(super) images_dir_fd: i32,
    #[prost(int32, optional, tag = "2")]
    pub(super) pid: Option<i32>,
    #[prost(bool, optional, tag = "3")]
    pub(super) leave_running: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub(super) ext_unix_sk: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    pub(super) tcp_established: Option<bool>,
    #[prost(bool, optional, tag = "7")]
    pub(super) shell_job: Option<bool>,
    #[prost(bool, optional, tag = "8")]
    pub(super) file_locks: Option<bool>,
    #[prost(int32, optional, tag = "9")]
    pub(super) log_level: Option<i32>,
    #[prost(string, optional, tag = "10")]
    pub(super) log_file: Option<String>,
    #[prost(message, optional, tag = "11")]
    pub(super) ps: Option<PageServerInfo>,
    #[prost(bool, optional, tag = "12")]
    pub(super) notify_scripts: Option<bool>,
    #[prost(string, optional, tag = "13")]
    pub(super) root: Option<String>,
    #[prost(string, optional, tag = "14")]
    pub(super) parent_img: Option<String>,
    #[prost(bool, optional, tag = "15")]
    pub(super) track_mem: Option<bool>,
    #[prost(bool, optional, tag = "18")]
    pub(super) link_remap: Option<bool>,
    #[prost(message, repeated, tag = "27")]
    pub(super) inherit_fd: Vec<InheritFd>,
    #[prost(int32, optional, tag = "34")]
    pub(super) manage_cgroups_mode: Option<i32>,
    #[prost(uint32, optional, tag = "35")]
    pub(super) ghost_limit: Option<u32>,
    #[prost(string, repeated, tag = "37")]
    pub(super) external: Vec<String>,
    #[prost(uint32, optional, tag = "38")]
    pub(super) empty_ns: Option<u32>,
    #[prost(uint32, optional, tag = "45")]
    pub(super) timeout: Option<u32>,
    #[prost(bool, optional, tag = "46")]
    pub(super) tcp_skip_in_flight: Option<bool>,
    #[prost(bool, optional, tag = "48")]
    pub(super) lazy_pages: Option<bool>,
    #[prost(int32, optional, tag = "64")]
    pub(super) network_lock: Option<i32>,
    #[prost(string, optional, tag = "68")]
    pub(super) images_dir: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct RestoreAnswer {
    #[prost(int32, required, tag = "1")]
    pub(super) pid: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Notify {
    #[prost(string, optional, tag = "1")]
    pub(super) script: Option<String>,
    #[prost(int32, optional, tag = "2")]
    pub(super) pid: Option<i32>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct FeatureFlags {
    #[prost(bool, optional, tag = "1")]
    pub(super) mem_track: Option<bool>,
    #[prost(bool, optional, tag = "2")]
    pub(super) lazy_pages: Option<bool>,
    #[prost(bool, optional, tag = "3")]
    pub(super) pidfd_store: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Request {
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub(super) kind: i32,
    #[prost(message, optional, tag = "2")]
    pub(super) opts: Option<Options>,
    #[prost(bool, optional, tag = "3")]
    pub(super) notify_success: Option<bool>,
    #[prost(message, optional, tag = "5")]
    pub(super) features: Option<FeatureFlags>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct VersionAnswer {
    #[prost(int32, required, tag = "1")]
    pub(super) major: i32,
    #[prost(int32, required, tag = "2")]
    pub(super) minor: i32,
    #[prost(int32, optional, tag = "4")]
    pub(super) sublevel: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Answer {
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub(super) kind: i32,
    #[prost(bool, required, tag = "2")]
    pub(super) success: bool,
    #[prost(message, optional, tag = "4")]
    pub(super) restore: Option<RestoreAnswer>,
    #[prost(message, optional, tag = "5")]
    pub(super) notify: Option<Notify>,
    #[prost(int32, optional, tag = "7")]
    pub(super) errno: Option<i32>,
    #[prost(message, optional, tag = "8")]
    pub(super) features: Option<FeatureFlags>,
    #[prost(string, optional, tag = "9")]
    pub(super) message: Option<String>,
    #[prost(message, optional, tag = "10")]
    pub(super) version: Option<VersionAnswer>,
}

/// What came instead of an answer.
#[derive(Debug)]
pub(super) enum Silence {
    /// The other side is gone.
    Ended,
    /// Nothing within the time allowed.
    TimedOut,
    /// The socket failed or the message was not one.
    Io(io::Error),
}

pub(super) fn ask(socket: &impl AsFd, request: &Request) -> Result<(), Silence> {
    let bytes = request.encode_to_vec();
    match send(socket.as_fd().as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL) {
        Ok(_) => Ok(()),
        Err(Errno::EPIPE | Errno::ECONNRESET) => Err(Silence::Ended),
        Err(error) => Err(Silence::Io(error.into())),
    }
}

pub(super) fn answer(socket: &impl AsFd, timeout: Duration) -> Result<Answer, Silence> {
    wait_readable(socket, timeout)?;
    let mut buffer = vec![0; ANSWER_BYTES_MAX];
    let length = match recv(socket.as_fd().as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
        Ok(0) | Err(Errno::ECONNRESET) => return Err(Silence::Ended),
        Ok(length) => length,
        Err(error) => return Err(Silence::Io(error.into())),
    };
    let Some(bytes) = buffer.get(..length) else {
        return Err(Silence::Io(io::Error::other(format!("an answer of {length} bytes"))));
    };
    Answer::decode(bytes).map_err(|error| Silence::Io(io::Error::other(error)))
}

fn wait_readable(socket: &impl AsFd, timeout: Duration) -> Result<(), Silence> {
    let until = Instant::now() + timeout;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) => return Err(Silence::TimedOut),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(Silence::Io(error.into())),
        }
    }
}
