//! What agent and init say to each other: one JSON message a packet on a SOCK_SEQPACKET socket,
//! with descriptors beside it. Each request is answered by one reply.
//!
//! The socket lies in the workload's run directory (0700), so that an agent that was restarted finds it.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::{
        socket::{
            self, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
            recvmsg, sendmsg, sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{netlink::NetStep, sys};

/// The longest message; a command and its environment must fit.
pub(super) const MESSAGE_BYTES_MAX: usize = 128 * 1024;
const FDS_MAX: usize = 4;
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// The command that becomes the root of the workload's tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Program (looked up in PATH) and arguments.
    pub argv: Vec<String>,
    /// The whole environment, `KEY=VALUE`.
    pub env: Vec<String>,
    /// Working directory inside.
    pub cwd: PathBuf,
    /// Whose rights it has.
    pub user: User,
}

/// User and groups, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// Why a user was not found.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Nobody.
    #[error("there is no user {0} on this host; see `getent passwd`")]
    Unknown(String),
    /// The database.
    #[error("cannot look up user {name}: {source}")]
    Lookup {
        /// Who.
        name: String,
        /// Cause.
        source: Errno,
    },
}

impl User {
    /// The user of that name with all its groups, by this host's databases, which are those inside as well.
    pub fn named(name: &str) -> Result<Self, UserError> {
        let error = |source| UserError::Lookup { name: name.to_owned(), source };
        let found = nix::unistd::User::from_name(name).map_err(error)?;
        let user = found.ok_or_else(|| UserError::Unknown(name.to_owned()))?;
        let c_name = std::ffi::CString::new(name).map_err(|_| UserError::Unknown(name.to_owned()))?;
        let groups = nix::unistd::getgrouplist(&c_name, user.gid).map_err(error)?;
        let groups = groups.into_iter().map(nix::unistd::Gid::as_raw).collect();
        Ok(Self { uid: user.uid.as_raw(), gid: user.gid.as_raw(), groups })
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

/// The root of the workload's tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// Its pid inside.
    pub pid: u32,
    /// How it ended; `None` while it runs.
    pub exit: Option<Exit>,
}

/// To the init or guard process.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Hand out the guard's page and wake descriptor.
    Hello,
    /// Start the tree; beside it the write end of a pipe for the errno of a failed exec.
    Start(Command),
    /// Make a pipe that goes to the log, for descriptors of a restored tree.
    FreshStdio,
    /// Write what comes out of the pipe beside it to the log.
    KeepLog,
    /// How are root and pipes?
    Status,
    /// The restored tree's root, to be watched as a started one is.
    Track {
        /// Inside pid.
        pid: u32,
    },
    /// Let pids start above this one.
    RaiseLastPid {
        /// Inside pid.
        pid: u32,
    },
    /// What the guard sends to the network when it fires.
    OnFence {
        /// In this order.
        steps: Vec<NetStep>,
    },
    /// Change the host's network, unless the guard has fired.
    Apply {
        /// In this order.
        steps: Vec<NetStep>,
    },
    /// Out of FIRED: arm this deadline, thaw, and then change the network.
    Unfence {
        /// On CLOCK_BOOTTIME.
        deadline_ns: u64,
        /// In this order.
        steps: Vec<NetStep>,
    },
    /// Let the tree run for a share of its time only, until told otherwise or the asker's connection closes.
    Throttle {
        /// From 0, for which it stands, to 100, which ends it.
        run_percent: u8,
    },
    /// Leave, and the tree as it is (a bare tree's guard process only).
    Leave,
}

/// From it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// To `Hello`; beside it the two descriptors.
    Hello,
    /// To `Start`.
    Started {
        /// Inside pid.
        pid: u32,
    },
    /// To `FreshStdio`; beside it the write end.
    Stdio,
    /// To `Status`.
    Status {
        /// The last tree's root.
        root: Option<Root>,
        /// Inodes of the pipes that go to the log.
        log_pipes: Vec<u64>,
    },
    /// To the others.
    Done,
    /// The guard has fired.
    Fired,
    /// No, and why.
    Refused(String),
}

/// Why the init could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket.
    #[error("cannot {what} the workload's init at {path}: {source}; is it still running?")]
    Socket {
        /// Verb.
        what: &'static str,
        /// Socket.
        path: PathBuf,
        /// Cause.
        source: Errno,
    },
    /// It is gone.
    #[error("the workload's init at {0} closed the connection; it has died or is of another version")]
    Closed(PathBuf),
    /// Not understood.
    #[error("a message of the workload's init at {path} makes no sense: {reason}")]
    Message {
        /// Socket.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Too long.
    #[error("a request of {0} bytes does not fit in {MESSAGE_BYTES_MAX}; shorten command and environment")]
    TooLong(usize),
    /// The guard.
    #[error("refused because the guard has silenced the workload; unfence it first")]
    Fired,
    /// Its answer.
    #[error("the workload's init refused: {0}")]
    Refused(String),
}

/// Sends one message; `Errno::EMSGSIZE` if it is too long.
pub(super) fn send<T: Serialize>(fd: BorrowedFd<'_>, message: &T, fds: &[BorrowedFd<'_>]) -> nix::Result<()> {
    let bytes = serde_json::to_vec(message).map_err(|_| Errno::EINVAL)?;
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(Errno::EMSGSIZE);
    }
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<UnixAddr>(fd.as_raw_fd(), &[IoSlice::new(&bytes)], rights, flags, None).map(drop)
}

/// A message and the descriptors beside it; `None` when the other side has closed.
pub(super) fn recv<T: DeserializeOwned>(fd: BorrowedFd<'_>) -> nix::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    let mut space = cmsg_space!([i32; FDS_MAX]);
    let (length, truncated, fds) = {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(fd.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
        let mut fds = Vec::new();
        // ENOBUFS if there were more than FDS_MAX, which neither side ever sends.
        for cmsg in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = cmsg {
                fds.extend(raw.into_iter().map(sys::own));
            }
        }
        (message.bytes, message.flags.contains(MsgFlags::MSG_TRUNC), fds)
    };
    if length == 0 {
        return Ok(None);
    }
    if truncated {
        return Err(Errno::EMSGSIZE);
    }
    let message = serde_json::from_slice(&bytes[..length]).map_err(|_| Errno::EBADMSG)?;
    Ok(Some((message, fds)))
}

/// A listening socket at the path, in place of one that was left there.
pub(super) fn listen(path: &Path) -> nix::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)));
        }
        _ => {}
    }
    let fd = seqpacket(SockFlag::SOCK_NONBLOCK)?;
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&fd, socket::Backlog::new(8)?)?;
    Ok(fd)
}

/// Two ends of a connection.
pub(super) fn pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
}

/// A connection that waits at the listening socket; blocks never.
pub(super) fn accept(listener: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket::accept4(listener.as_raw_fd(), flags).map(sys::own)
}

fn seqpacket(flags: SockFlag) -> nix::Result<OwnedFd> {
    let fd = socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | flags, None)?;
    socket::setsockopt(&fd, sockopt::SndBuf, &(2 * MESSAGE_BYTES_MAX))?;
    Ok(fd)
}

/// The agent's end; calls from several threads take turns.
#[derive(Debug)]
pub(super) struct Client {
    path: PathBuf,
    fd: Mutex<OwnedFd>,
}

impl Client {
    pub(super) fn connect(path: &Path) -> Result<Self, ControlError> {
        let error = |source| ControlError::Socket { what: "connect to", path: path.to_owned(), source };
        let fd = seqpacket(SockFlag::empty()).map_err(error)?;
        let timeout = TimeVal::milliseconds(REPLY_TIMEOUT.as_millis() as i64);
        socket::setsockopt(&fd, sockopt::ReceiveTimeout, &timeout).map_err(error)?;
        socket::setsockopt(&fd, sockopt::SendTimeout, &timeout).map_err(error)?;
        socket::connect(fd.as_raw_fd(), &UnixAddr::new(path).map_err(error)?).map_err(error)?;
        Ok(Self { path: path.to_owned(), fd: Mutex::new(fd) })
    }

    /// Asks, and waits for the answer. A refusal is an error.
    pub(super) fn ask(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), ControlError> {
        use std::os::fd::AsFd;
        let error = |what| move |source| ControlError::Socket { what, path: self.path.clone(), source };
        // Poisoned: another caller panicked between its request and reply; the connection is out of step.
        let fd = self.fd.lock().map_err(|_| ControlError::Closed(self.path.clone()))?;
        match send(fd.as_fd(), request, fds) {
            Err(Errno::EMSGSIZE) => return Err(ControlError::TooLong(MESSAGE_BYTES_MAX + 1)),
            other => other.map_err(error("ask"))?,
        }
        let answer = loop {
            match recv(fd.as_fd()) {
                Err(Errno::EINTR) => {}
                // A late answer would be taken for that of the next request.
                Err(errno) => {
                    let _ = socket::shutdown(fd.as_raw_fd(), socket::Shutdown::Both);
                    return Err(error("hear from")(errno));
                }
                Ok(answer) => break answer,
            }
        };
        match answer.ok_or_else(|| ControlError::Closed(self.path.clone()))? {
            (Reply::Refused(reason), _) => Err(ControlError::Refused(reason)),
            (Reply::Fired, _) => Err(ControlError::Fired),
            answer => Ok(answer),
        }
    }

    /// For an answer of a kind that the request does not have.
    pub(super) fn nonsense(&self, reply: &Reply) -> ControlError {
        ControlError::Message { path: self.path.clone(), reason: format!("unexpected {reply:?}") }
    }
}
