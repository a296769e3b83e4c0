//! The machine, and what this process may do on it.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use nix::time::{ClockId, clock_getres};

use super::{Check, Group};

/// Capabilities that nothing works without, by their bit (include/uapi/linux/capability.h). CAP_SYS_ADMIN
/// includes CAP_CHECKPOINT_RESTORE (`checkpoint_restore_ns_capable`), which older kernels do not have.
const NEEDED: [(u32, &str); 11] = [
    (0, "CAP_CHOWN"),
    (1, "CAP_DAC_OVERRIDE"),
    (3, "CAP_FOWNER"),
    (5, "CAP_KILL"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    (12, "CAP_NET_ADMIN"),
    (13, "CAP_NET_RAW"),
    (18, "CAP_SYS_CHROOT"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
];
const CAP_SYS_RESOURCE: u32 = 24;
/// The first kernel with PAGEMAP_SCAN and UFFD_FEATURE_WP_ASYNC.
const KERNEL_MIN: (u32, u32) = (6, 7);
/// A clock source that is slow or coarse; leases are read off the clock all the time.
const POOR_CLOCK_SOURCES: [&str; 5] = ["acpi_pm", "hpet", "jiffies", "pit", "refined-jiffies"];
/// A timer must be able to hit a deadline that lies milliseconds ahead.
const CLOCK_RESOLUTION_MAX: Duration = Duration::from_micros(100);
/// 2024-01-01: a wall clock before that was never set.
const WALL_CLOCK_MIN: Duration = Duration::from_secs(1_704_067_200);

pub(super) fn check() -> Vec<Check> {
    let mut checks = vec![root()];
    checks.extend(capabilities());
    checks.extend([architecture(), release(), clock(), wall_clock()]);
    checks
}

fn root() -> Check {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return Check::ok(Group::Host, "root", "uid 0");
    }
    Check::fail(Group::Host, "root", format!("uid {uid}"), "run it, and the agent, as root")
}

fn capabilities() -> Vec<Check> {
    let Some(effective) = fs::read_to_string("/proc/self/status").ok().as_deref().and_then(effective) else {
        let remedy = "mount proc: `mount -t proc proc /proc`";
        return vec![Check::fail(Group::Host, "capabilities", "unknown: no /proc/self/status", remedy)];
    };
    let has = |bit: u32| effective >> bit & 1 == 1;
    let missing: Vec<&str> = NEEDED.iter().filter(|(bit, _)| !has(*bit)).map(|(_, name)| *name).collect();
    let needed = if missing.is_empty() {
        Check::ok(Group::Host, "capabilities", "CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_NET_ADMIN and the others")
    } else {
        let remedy = "run as root of the host, or have the container or service manager grant them";
        Check::fail(Group::Host, "capabilities", format!("missing: {}", missing.join(", ")), remedy)
    };
    let resource = if has(CAP_SYS_RESOURCE) {
        Check::ok(Group::Host, "cap-sys-resource", "there")
    } else {
        let found = "missing: other users' limits are read from /proc for CRIU, and cannot be raised";
        let remedy = "grant CAP_SYS_RESOURCE if a restore complains of limits; nothing else needs it";
        Check::warn(Group::Host, "cap-sys-resource", found, remedy)
    };
    vec![needed, resource]
}

fn effective(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(value.trim(), 16).ok()
}

fn architecture() -> Check {
    let found = std::env::consts::ARCH;
    if found == "x86_64" {
        return Check::ok(Group::Host, "architecture", found);
    }
    Check::fail(Group::Host, "architecture", found, "use an x86-64 host: tracking is written for it alone")
}

fn release() -> Check {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let text = text.trim();
    match kernel_version(text) {
        Some(version) if version >= KERNEL_MIN => Check::ok(Group::Host, "kernel-release", text),
        _ => Check::warn(
            Group::Host,
            "kernel-release",
            format!("{text:?}; PAGEMAP_SCAN came with {}.{}", KERNEL_MIN.0, KERNEL_MIN.1),
            "see below what this kernel has; if a feature is missing, install a newer one",
        ),
    }
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-', '+']).map_while(|part| part.parse().ok());
    Some((parts.next()?, parts.next()?))
}

/// CLOCK_BOOTTIME carries all deadlines.
fn clock() -> Check {
    let source = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let source = source.as_deref().map_or("unknown", str::trim);
    let resolution = clock_getres(ClockId::CLOCK_BOOTTIME).map(Duration::from);
    let id = "clock";
    match resolution {
        Err(errno) => Check::fail(
            Group::Host,
            id,
            format!("CLOCK_BOOTTIME cannot be read: {errno}"),
            "leases need it: use a kernel that has it",
        ),
        Ok(resolution) if resolution > CLOCK_RESOLUTION_MAX => Check::warn(
            Group::Host,
            id,
            format!("source {source}, resolution {resolution:?}"),
            "boot with `highres=on`, and use leases of a second or more",
        ),
        Ok(_) if POOR_CLOCK_SOURCES.contains(&source) => Check::warn(
            Group::Host,
            id,
            format!("source {source}, which is slow to read"),
            "see why the kernel refused tsc or the hypervisor's clock (`dmesg | grep -i clocksource`)",
        ),
        Ok(resolution) => Check::ok(Group::Host, id, format!("source {source}, resolution {resolution:?}")),
    }
}

fn wall_clock() -> Check {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    if now >= WALL_CLOCK_MIN {
        return Check::ok(Group::Host, "wall-clock", "set");
    }
    let found = format!("{} s after 1970: never set", now.as_secs());
    Check::warn(
        Group::Host,
        "wall-clock",
        found,
        "set it (chrony, `date -s`): a workload's history is dated by it",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_as_the_kernel_writes_them() {
        assert_eq!(effective("CapPrm:\t0\nCapEff:\t000001fffeffffff\nCapBnd:\t0\n"), Some(0x1ff_feff_ffff));
        assert_eq!(effective("Name:\tx\n"), None);
        assert_eq!(0x1ff_feff_ffff_u64 >> CAP_SYS_RESOURCE & 1, 0);
    }

    #[test]
    fn releases_are_read_as_distributions_write_them() {
        assert_eq!(kernel_version("6.12.9-amd64"), Some((6, 12)));
        assert_eq!(kernel_version("6.7+deb13-amd64"), Some((6, 7)));
        assert!(kernel_version("6.1.0-25-amd64").unwrap() < KERNEL_MIN);
        assert_eq!(kernel_version("six"), None);
    }
}
