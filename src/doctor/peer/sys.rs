//! What only the processor and the kernel can say.

use std::{
    arch::x86_64::{__cpuid, __cpuid_count, __get_cpuid_max},
    net::UdpSocket,
    os::fd::AsRawFd,
};

use crate::wire::examine::CpuLeaf;

/// XGETBV may be executed: the kernel keeps more of the state than the FPU's.
const OSXSAVE: u32 = 1 << 27;

/// What CPUID answers, nothing if the processor does not know that question.
pub(super) fn cpuid(leaf: u32, subleaf: u32) -> Option<CpuLeaf> {
    let (highest, _) = __get_cpuid_max(leaf & 0x8000_0000);
    (leaf <= highest).then(|| {
        let found = __cpuid_count(leaf, subleaf);
        CpuLeaf { leaf, subleaf, registers: [found.eax, found.ebx, found.ecx, found.edx] }
    })
}

/// XCR0, or 0 where there is none.
pub(super) fn state_parts() -> u64 {
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: with OSXSAVE set the instruction is there and permitted to everybody; it only writes these two registers.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// IP_MTU or IPV6_MTU of a connected socket.
pub(super) fn socket_mtu(socket: &impl AsRawFd, is_v6: bool) -> Option<u32> {
    let (level, name) =
        if is_v6 { (libc::IPPROTO_IPV6, libc::IPV6_MTU) } else { (libc::IPPROTO_IP, libc::IP_MTU) };
    let mut mtu: libc::c_int = 0;
    let mut len = size_of_val(&mtu) as libc::socklen_t;
    // SAFETY: the pointers are to a whole integer and to its size.
    let answer =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut mtu).cast(), &raw mut len) };
    if answer < 0 { None } else { u32::try_from(mtu).ok() }
}

/// Largest packet that a device takes (netdevice(7)).
pub(super) fn device_mtu(device: &str) -> Option<u32> {
    let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("[::1]:0")).ok()?;
    // SAFETY: all bits zero are an `ifreq`: it holds integers and arrays of them, the unions too.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero behind the name.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().zip(device.as_bytes().get(..device.len().min(room))?) {
        *to = *from as libc::c_char;
    }
    // SAFETY: the pointer is to a whole `ifreq`, and SIOCGIFMTU fills in the member that is read.
    let mtu = unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) < 0 {
            return None;
        }
        request.ifr_ifru.ifru_mtu
    };
    u32::try_from(mtu).ok()
}
