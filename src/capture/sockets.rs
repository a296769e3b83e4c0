//! Which protocols the sockets of a frozen tree have, so that the bridge need not ask the kernel for those of others
//! (`bridge/lists.c`).
//!
//! CRIU looks up only sockets that are among the descriptors of the tree's tasks, or mapped by them, or on their way
//! between two of them. So a protocol that none of those has may be left out of what it is told; in doubt all are asked
//! for.
//!
//! CRIU asks so early that it would wait for the answer. It is told ahead, as soon as the tree stands, which protocols were
//! found in freezes before; if this one has others after all, the epoch fails, and the next ones tell nothing ahead.

use std::{ffi::CString, fs, io, os::unix::ffi::OsStrExt as _, path::Path};

use nix::libc;

use super::sys;
use crate::memory::Task;

/// The bridge's bits.
mod bit {
    pub(super) const UNIX: u32 = 1;
    pub(super) const TCP: u32 = 2;
    /// Of IPv4, other than TCP.
    pub(super) const INET: u32 = 4;
    pub(super) const TCP6: u32 = 8;
    pub(super) const INET6: u32 = 16;
    pub(super) const PACKET: u32 = 32;
    pub(super) const NETLINK: u32 = 64;
    pub(super) const ALL: u32 = 127;
}

/// Descriptors of a tree that are looked at: a look costs 2 µs, and all that it can spare is half a millisecond.
const DESCRIPTORS_MAX: usize = 128;

/// For so many epochs nothing is told ahead once it was wrong.
const DOUBTED_EPOCHS: u32 = 100;

/// Up to so many descriptors something is told ahead, and then all are looked at, however many they are by now.
const DESCRIPTORS_AHEAD_MAX: usize = DESCRIPTORS_MAX / 2;

/// What a look has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// The bridge's bits of the protocols.
    pub(super) protocols: u32,
    /// Descriptors that were looked at.
    descriptors: usize,
}

/// What is told ahead of a freeze.
#[derive(Debug, Default)]
pub(super) struct Likely {
    /// Of all freezes in which it could be said; none before the first.
    found: Option<u32>,
    /// The last freeze's answer was that it may be any.
    was_any: bool,
    /// The last freeze had too many descriptors for it.
    many: bool,
    /// Epochs that will tell nothing ahead.
    doubted: u32,
}

impl Likely {
    /// What to tell, if anything.
    pub(super) fn told(&self) -> Option<u32> {
        if self.was_any {
            return Some(bit::ALL);
        }
        self.found.filter(|_| self.doubted == 0 && !self.many)
    }

    /// Takes what a freeze had; whether what was told of it holds.
    pub(super) fn learn(&mut self, told: Option<u32>, Found { protocols: has, descriptors }: Found) -> bool {
        self.many = descriptors > DESCRIPTORS_AHEAD_MAX;
        let holds = told.is_none_or(|told| has & !told == 0);
        self.doubted = if holds { self.doubted.saturating_sub(1) } else { DOUBTED_EPOCHS };
        self.was_any = has == bit::ALL;
        if !self.was_any {
            self.found = Some(self.found.unwrap_or_default() | has);
        }
        holds
    }
}

/// The protocols of a tree that stands still.
pub(super) fn protocols_of(tasks: &[Task], told_ahead: bool) -> Found {
    let descriptors_max = if told_ahead { usize::MAX } else { DESCRIPTORS_MAX };
    let mut left = descriptors_max;
    let mut living = tasks.iter().filter(|task| !task.zombie);
    let bits = living.try_fold(0, |bits, task| match protocols_of_task(task.pid, &mut left) {
        Ok(its) => Ok(bits | its),
        // It was killed before it could be stopped, and is ending.
        Err(error) if is_gone(&error) => Ok(bits),
        Err(error) => Err(error),
    });
    // What cannot be looked at may be anything.
    Found { protocols: bits.unwrap_or(bit::ALL), descriptors: descriptors_max - left }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

fn protocols_of_task(pid: i32, left: &mut usize) -> io::Result<u32> {
    let mut bits = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        if *left == 0 {
            return Ok(bit::ALL);
        }
        *left -= 1;
        let path = entry?.path();
        if fs::read_link(&path)?.as_os_str().as_bytes().starts_with(b"socket:") {
            let link = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
            let its = bits_of(&sys::socket_protocol(&link)?);
            if its == bit::UNIX && carries_descriptors(&path) {
                return Ok(bit::ALL);
            }
            bits |= its;
        }
    }
    Ok(bits)
}

/// The lists in which a socket may be of which the kernel says this name. It is the name of when the socket was made: one
/// of IPv6 may since have been made one of IPv4 (IPV6_ADDRFORM).
fn bits_of(protocol: &str) -> u32 {
    match protocol {
        "UNIX" | "UNIX-STREAM" => bit::UNIX,
        "TCP" => bit::TCP,
        "TCPv6" => bit::TCP | bit::TCP6,
        "UDP" | "UDP-Lite" | "RAW" => bit::INET,
        "UDPv6" | "UDPLITEv6" | "RAWv6" => bit::INET | bit::INET6,
        "PACKET" => bit::PACKET,
        "NETLINK" => bit::NETLINK,
        _ => bit::ALL,
    }
}

/// Whether descriptors wait in a Unix socket to be received: CRIU dumps those too, and they may be any.
fn carries_descriptors(link: &Path) -> bool {
    let Some((task, number)) = link.parent().and_then(Path::parent).zip(link.file_name()) else {
        return true;
    };
    // Since Linux 5.13 (unix_show_fdinfo); a kernel that does not tell may have some.
    let told = fs::read_to_string(task.join("fdinfo").join(number)).unwrap_or_default();
    told.lines().find_map(|line| line.strip_prefix("scm_fds:")).is_none_or(|count| count.trim() != "0")
}

/// Whether a list of mappings has one of a socket, which may have no descriptor any more.
pub(super) fn has_mapped(maps: &[u8]) -> bool {
    maps.windows(b"socket:".len()).any(|window| window == b"socket:")
}

/// What to say if one is mapped.
pub(super) const ANY: Found = Found { protocols: bit::ALL, descriptors: 0 };

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, UdpSocket},
        os::{
            fd::AsRawFd,
            unix::net::{UnixDatagram, UnixListener, UnixStream},
        },
    };

    use super::*;

    fn protocol(socket: &impl AsRawFd) -> u32 {
        let path = CString::new(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        bits_of(&sys::socket_protocol(&path).unwrap())
    }

    #[test]
    fn this_kernel_names_the_protocols_of_its_sockets_as_expected() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        for socket in [listener.as_raw_fd(), stream.as_raw_fd(), listener.accept().unwrap().0.as_raw_fd()] {
            assert_eq!(protocol(&socket), bit::TCP);
        }
        assert_eq!(protocol(&UdpSocket::bind("127.0.0.1:0").unwrap()), bit::INET);
        if let Ok(listener) = TcpListener::bind("[::1]:0") {
            assert_eq!(protocol(&listener), bit::TCP | bit::TCP6);
            assert_eq!(protocol(&UdpSocket::bind("[::1]:0").unwrap()), bit::INET | bit::INET6);
        }
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(protocol(&UnixListener::bind(dir.path().join("socket")).unwrap()), bit::UNIX);
        assert_eq!(protocol(&UnixStream::pair().unwrap().0), bit::UNIX);
        assert_eq!(protocol(&UnixDatagram::unbound().unwrap()), bit::UNIX);
    }

    #[test]
    fn a_descriptor_on_its_way_is_noticed() {
        use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

        let (from, to) = UnixStream::pair().unwrap();
        let carries = |socket: &UnixStream| {
            carries_descriptors(Path::new(&format!("/proc/self/fd/{}", socket.as_raw_fd())))
        };
        assert!(!carries(&from) && !carries(&to));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sent = [listener.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&sent)];
        let (socket, flags) = (from.as_raw_fd(), MsgFlags::empty());
        sendmsg::<UnixAddr>(socket, &[io::IoSlice::new(b"x")], &rights, flags, None).unwrap();
        assert!(carries(&to));
    }

    #[test]
    fn what_is_told_ahead_is_what_was_found_before() {
        let few = |protocols| Found { protocols, descriptors: 9 };
        let mut likely = Likely::default();
        assert_eq!(likely.told(), None);
        assert!(likely.learn(None, few(bit::TCP)));
        assert_eq!(likely.told(), Some(bit::TCP));
        // None any more is right too.
        assert!(likely.learn(Some(bit::TCP), few(0)));
        assert!(!likely.learn(Some(bit::TCP), few(bit::TCP | bit::UNIX)));
        for _ in 0..DOUBTED_EPOCHS {
            assert_eq!(likely.told(), None);
            assert!(likely.learn(None, few(bit::UNIX)));
        }
        assert_eq!(likely.told(), Some(bit::TCP | bit::UNIX));
        // Where it may be any, that is told for as long as it is so, and not kept.
        assert!(!likely.learn(likely.told(), ANY));
        assert_eq!(likely.told(), Some(bit::ALL));
        assert!(likely.learn(Some(bit::ALL), few(bit::TCP)));
        assert_eq!(likely.told(), None);
    }

    #[test]
    fn a_tree_that_has_sometimes_too_many_descriptors_fails_no_epoch() {
        let mut likely = Likely::default();
        for descriptors in [9, DESCRIPTORS_MAX, 9, 2 * DESCRIPTORS_AHEAD_MAX + 9, DESCRIPTORS_AHEAD_MAX, 9] {
            let told = likely.told();
            let given_up = told.is_none() && descriptors >= DESCRIPTORS_MAX;
            let protocols = if given_up { bit::ALL } else { bit::TCP };
            assert!(likely.learn(told, Found { protocols, descriptors }), "{descriptors}");
        }
        assert_eq!(likely.told(), Some(bit::TCP));
    }

    #[test]
    fn what_has_another_name_may_be_anything() {
        for name in ["MPTCP", "", "VSOCK", "tcp"] {
            assert_eq!(bits_of(name), bit::ALL);
        }
        assert!(has_mapped(b"7f00-7f01 rw-s 00000000 00:08 1234    socket:[1234]\n"));
        assert!(!has_mapped(b"7f00-7f01 rw-s 00000000 00:08 1234    /srv/file\n"));
    }
}
