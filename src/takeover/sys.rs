//! Packet sockets: frames as they are on the wire.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::announce::Mac;

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
    let address = link_address(index, protocol);
    // SAFETY: the pointer is to a whole sockaddr_ll, whose size is given.
    let answer =
        unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
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
    match nix::sys::socket::recv(socket.as_raw_fd(), buffer, nix::sys::socket::MsgFlags::empty()) {
        Ok(length) => Ok(Some(length)),
        // A frame that another reader took, or that was dropped; not a sign of silence.
        Err(nix::errno::Errno::EAGAIN) => Ok(Some(0)),
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
    // SAFETY: the pointer is to a whole packet_mreq, whose size is given.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            (&raw const request).cast(),
            size_of_val(&request) as u32,
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
