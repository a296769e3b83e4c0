//! Packet sockets: frames as they are on the wire.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, sendto, setsockopt,
        socket, sockopt,
    },
};

use super::{announce::Mac, tcp};

/// For [`packet_socket`]: it hears everything.
pub(super) const ALL_PROTOCOLS: u16 = 0x0003;

/// A socket on one device that hears the given protocol, or nothing if that is 0.
pub(super) fn packet_socket(index: u32, protocol: u16) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // Protocol 0 until it is bound: otherwise it would hear all devices in between.
    // SAFETY: takes no pointer; a non-negative answer is a new descriptor, owned by nobody else.
    let socket = unsafe {
        match libc::socket(libc::AF_PACKET, kind, 0) {
            -1 => return Err(io::Error::last_os_error()),
            fd => OwnedFd::from_raw_fd(fd),
        }
    };
    bind(&socket, index, protocol)?;
    Ok(socket)
}

fn bind(socket: &OwnedFd, index: u32, protocol: u16) -> io::Result<()> {
    let address = link_address(index, protocol);
    // SAFETY: the pointer is to a whole sockaddr_ll, whose size is given.
    let answer =
        unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn link_address(index: u32, protocol: u16) -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    }
}

/// A socket that hears the segments of TCP that leave by one device, as far as so many bytes may wait for its reader.
pub(super) fn tcp_tap(index: u32, bytes: usize) -> io::Result<OwnedFd> {
    let socket = packet_socket(index, 0)?;
    setsockopt(&socket, sockopt::RcvBuf, &bytes)?;
    let statement = |code: u32, if_so: u8, if_not: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt: if_so,
        jf: if_not,
        k,
    };
    let byte = |at: u32| statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, at);
    let is = |value: u32, if_so, if_not| {
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, if_so, if_not, value)
    };
    let answer = |bytes: u32| statement(libc::BPF_RET | libc::BPF_K, 0, 0, bytes);
    let program = [
        byte((libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32),
        is(u32::from(libc::PACKET_OUTGOING), 0, 7),
        statement(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, 0, 12),
        is(u32::from(tcp::ETHERTYPE_IPV4), 0, 2),
        byte(14 + 9),
        is(u32::from(tcp::TCP), 4, 3),
        is(u32::from(tcp::ETHERTYPE_IPV6), 0, 2),
        byte(14 + 6),
        is(u32::from(tcp::TCP), 1, 0),
        answer(0),
        answer(u32::MAX),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: that is what the option takes, and in it is a pointer to as many statements as it says.
    unsafe { set_option(&socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter) }?;
    bind(&socket, index, ALL_PROTOCOLS)?;
    Ok(socket)
}

/// A frame that waits; none if there is none, or the device was just set down.
pub(super) fn receive_waiting(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Ok(length) => return Ok(Some(length)),
            Err(Errno::EAGAIN | Errno::ENETDOWN) => return Ok(None),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The hardware address of the bound device; `None` if it is none of Ethernet's.
pub(super) fn ethernet_address(socket: &OwnedFd) -> io::Result<Option<Mac>> {
    let mut address = link_address(0, 0);
    let mut length = size_of_val(&address) as u32;
    // SAFETY: the pointers are to a whole sockaddr_ll and to its size.
    let answer = unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut length) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    let is_ethernet = address.sll_hatype == libc::ARPHRD_ETHER && address.sll_halen == 6;
    Ok(is_ethernet.then(|| std::array::from_fn(|i| address.sll_addr[i])))
}

/// Sends one whole frame.
pub(super) fn send_frame(socket: &OwnedFd, index: u32, frame: &[u8]) -> io::Result<()> {
    let address = link_address(index, 0);
    // SAFETY: the pointers are to the frame and to a whole sockaddr_ll, whose sizes are given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends one whole IP packet, whoever it says that it is from, the way that this host's routes say.
pub(super) fn send_packet(to: IpAddr, packet: &[u8]) -> io::Result<()> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty())?;
    Ok(())
}

/// Waits for a frame; `None` when the time is up.
pub(super) fn receive_frame(
    socket: &OwnedFd,
    buffer: &mut [u8],
    limit: Duration,
) -> io::Result<Option<usize>> {
    let timeout = PollTimeout::try_from(limit.as_millis()).unwrap_or(PollTimeout::MAX);
    if poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
        return Ok(None);
    }
    match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
        Ok(length) => Ok(Some(length)),
        // A frame that another reader took, or that was dropped; not a sign of silence.
        Err(Errno::EAGAIN) => Ok(Some(0)),
        Err(errno) => Err(errno.into()),
    }
}

/// Has the device take in what is sent to a group, for as long as the socket is open (packet(7)).
pub(super) fn hear_group(socket: &OwnedFd, index: u32, group: Mac) -> io::Result<()> {
    let mut request = libc::packet_mreq {
        mr_ifindex: index as i32,
        mr_type: libc::PACKET_MR_MULTICAST as u16,
        mr_alen: group.len() as u16,
        mr_address: [0; 8],
    };
    request.mr_address[..group.len()].copy_from_slice(&group);
    // SAFETY: that is what the option takes.
    unsafe { set_option(socket, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &request) }
}

/// # Safety
///
/// The option takes a value of that type, whatever pointers are in it.
unsafe fn set_option<T>(socket: &OwnedFd, level: i32, option: i32, value: &T) -> io::Result<()> {
    // SAFETY: the pointer is to a whole value, whose size is given; the rest is the caller's promise.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as u32,
        )
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How many frames this socket has lost since it was asked last, because nobody read them in time.
pub(super) fn lost_frames(socket: &OwnedFd) -> io::Result<u32> {
    let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of_val(&statistics) as u32;
    // SAFETY: the pointers are to a whole tpacket_stats and to its size.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(statistics.tp_drops) }
}
