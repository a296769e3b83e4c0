//! The addresses that follow a workload: on the host that runs it, this host answers for them.
//!
//! A sandbox has the address inside; the host routes it there while the gate is open and answers ARP and
//! neighbour solicitations in its place (a proxy entry on the device). A workload in the host's own network
//! has it as an address of the device. An address with a hardware address of its own has a device for itself, a macvlan of the
//! named one, up where it is answered for.

use nix::{errno::Errno, net::if_::if_nametoindex};

use super::announce::Announcer;
use crate::model::Name;
use crate::workload::{
    control::ControlError,
    keeper::Keeper,
    netlink::{NetError, NetStep, RouteSocket},
    network::{Gate, NetworkError, enable_forwarding, shared_device, sysctl},
    spec::{Net, Vip},
};

/// Why addresses could not be made ready, brought up or announced.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// The device.
    #[error("there is no device {device} for the address {vip}: {errno}; see `ip link`")]
    NoDevice {
        /// Its name.
        device: String,
        /// The address.
        vip: String,
        /// Cause.
        errno: Errno,
    },
    /// A kernel setting.
    #[error(transparent)]
    Setting(#[from] NetworkError),
    /// The keeper.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// rtnetlink.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The packet socket.
    #[error("cannot send on device {device}: {source}")]
    Send {
        /// Its name.
        device: String,
        /// Cause.
        source: std::io::Error,
    },
}

/// A workload's addresses on this host, with everything resolved and opened that a takeover has no time for.
#[derive(Debug)]
pub struct Addresses {
    up: Vec<NetStep>,
    down: Vec<NetStep>,
    announcers: Vec<Announcer>,
    route: RouteSocket,
    has_own_mac: bool,
}

impl Addresses {
    /// Makes ready: looks devices up, lets the host pass packets on, opens sockets. Nothing is answered yet.
    pub fn prepare(name: &Name, net: &Net, vips: &[Vip]) -> Result<Self, AddressError> {
        let (mut up, mut down, mut announcers) = (Vec::new(), Vec::new(), Vec::new());
        for (number, vip) in (0..=u8::MAX).zip(vips) {
            let (mut device, addr, mut cidr) = (vip.device.clone(), vip.cidr.addr, vip.cidr);
            let mut index = if_nametoindex(device.as_str()).map_err(|errno| AddressError::NoDevice {
                device: device.clone(),
                vip: vip.cidr.to_string(),
                errno,
            })?;
            if vip.own_mac {
                (device, index) = shared_device(name, number, &device)?;
                up.push(NetStep::LinkUp { index });
                // The way to its network is the other device's.
                cidr.prefix = if addr.is_ipv4() { 32 } else { 128 };
            }
            match net {
                Net::Own { .. } => {
                    prepare_proxy(&device, addr.is_ipv6())?;
                    up.push(NetStep::AddProxy { index, addr });
                    down.push(NetStep::DelProxy { index, addr });
                }
                Net::Host => {
                    up.push(NetStep::AddAddress { index, cidr });
                    down.push(NetStep::DelAddress { index, cidr });
                }
            }
            if vip.own_mac {
                down.push(NetStep::LinkDown { index });
            }
            let send = |source| AddressError::Send { device: device.clone(), source };
            announcers.push(Announcer::open(vip, index).map_err(send)?);
        }
        let has_own_mac = vips.iter().any(|vip| vip.own_mac);
        Ok(Self { up, down, announcers, route: RouteSocket::open()?, has_own_mac })
    }

    /// What the guard is to do when it fires: close the gate, take the addresses down. To be set before
    /// [`Self::up`], and again after the guard's process was made anew.
    pub fn guard(&self, keeper: &Keeper, gate: Option<&Gate>) -> Result<(), ControlError> {
        let mut steps = gate.map(Gate::close_steps).unwrap_or_default();
        steps.extend(&self.down);
        keeper.on_fence(&steps)
    }

    /// This host answers for the addresses. Refused once the guard has fired.
    pub fn up(&self, keeper: &Keeper) -> Result<(), ControlError> {
        keeper.apply(&self.up)
    }

    /// What [`Self::up`] applies, for an unfence.
    pub fn up_steps(&self) -> &[NetStep] {
        &self.up
    }

    /// It no longer does. Needs nobody, and may be repeated.
    pub fn down(&self) -> Result<(), NetError> {
        self.route.apply(&self.down)
    }

    /// Whether switches have to be told again and again where a hardware address is: what the workload sends does not have it.
    pub fn need_repetition(&self) -> bool {
        self.has_own_mac
    }

    /// Tells the networks where the addresses are now; to be called at each time of
    /// [`SCHEDULE`](super::announce::SCHEDULE) after the gate has opened. All are tried; the first failure is returned.
    pub fn announce(&self) -> Result<(), AddressError> {
        let mut first = Ok(());
        for announcer in &self.announcers {
            let sent = announcer
                .send()
                .map_err(|source| AddressError::Send { device: announcer.device().to_owned(), source });
            first = first.and(sent);
        }
        first
    }
}

/// An ARP answer for a proxy entry comes only from a forwarding device, and by default up to 0.8 s late.
fn prepare_proxy(device: &str, is_v6: bool) -> Result<(), NetworkError> {
    enable_forwarding(device, is_v6)?;
    if is_v6 {
        sysctl(&format!("ipv6/conf/{device}/proxy_ndp"), "1")?;
        sysctl(&format!("ipv6/neigh/{device}/proxy_delay"), "0")
    } else {
        sysctl(&format!("ipv4/neigh/{device}/proxy_delay"), "0")
    }
}
