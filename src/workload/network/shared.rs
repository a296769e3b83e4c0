//! Devices of this host with a hardware address that is the same on every host: macvlans, each for an address that follows a
//! workload.

use nix::net::if_::{if_nameindex, if_nametoindex};

use super::{GATEWAY_V4, NetworkError, delete, ip, mac, shown, sysctl};
use crate::model::Name;

/// What the names of a workload's devices with a hardware address of their own begin with.
fn shared_prefix(name: &Name) -> String {
    let hash = blake3::hash(name.as_str().as_bytes()).to_hex();
    format!("sm-{}", &hash[..10])
}

/// A device of this host with a hardware address that is the same on every host, for an address that follows a workload: a macvlan
/// of the device that was named. Made unless it is there, down.
pub fn shared_device(name: &Name, number: u8, parent: &str) -> Result<(String, u32), NetworkError> {
    let device = format!("{}{number:02x}", shared_prefix(name));
    let wanted = mac(name, &format!("address {number} on {parent}"));
    let found = shown(&["-j", "link", "show", "type", "macvlan"])?;
    let found = found.iter().find(|link| link["ifname"] == device.as_str());
    let fits = found.is_some_and(|link| link["address"] == wanted.as_str() && link["link"] == parent);
    if !fits {
        if found.is_some() {
            delete(&device)?;
        }
        // With an address, which it does not tell of, it takes in what is from where another device leads (rp_filter 2).
        let batch = format!(
            "link add link {parent} name {device} address {wanted} type macvlan mode private\n\
             addr add {GATEWAY_V4}/32 dev {device} scope link\n"
        );
        ip(&device, &batch)?;
        for (key, value) in [
            ("ipv6/conf/{}/addr_gen_mode", "1"),
            ("ipv6/conf/{}/accept_ra", "0"),
            ("ipv4/conf/{}/rp_filter", "2"),
            ("ipv4/conf/{}/arp_ignore", "8"),
        ] {
            match sysctl(&key.replace("{}", &device), value) {
                // A kernel without IPv6.
                Err(_) if key.starts_with("ipv6") => {}
                set => set?,
            }
        }
    }
    let index = if_nametoindex(device.as_str());
    index.map(|index| (device.clone(), index)).map_err(|errno| NetworkError::Missing { device, errno })
}

/// Removes them all; none is no error.
pub fn remove_shared_devices(name: &Name) -> Result<(), NetworkError> {
    let prefix = shared_prefix(name);
    let devices = if_nameindex().map_err(|errno| NetworkError::Missing { device: prefix.clone(), errno })?;
    let names: Vec<_> = devices.iter().filter_map(|device| device.name().to_str().ok()).collect();
    names.into_iter().filter(|device| device.starts_with(&prefix)).try_for_each(delete)
}
