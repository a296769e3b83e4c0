//! The kernel's part in tracking memory.

use std::{fs, path::Path};

use super::{Check, Group, State};
use crate::{
    capture::Tracking,
    criu::probe::Kernel,
    memory::{Vmas, VmasError},
};

const NEWER: &str = "boot a kernel of 6.7 or newer with CONFIG_USERFAULTFD and CONFIG_PROC_PAGE_MONITOR";
const MAPPINGS: &str = "boot a kernel of 6.1 or newer with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF, not locked \
                        down to confidentiality, and give the agent CAP_BPF and CAP_PERFMON";
/// Nobody may attach to anybody, and no privilege helps (Documentation/admin-guide/LSM/Yama.rst).
const YAMA_NO_ATTACH: &str = "3";

pub(super) fn check(launcher: &Path) -> (Vec<Check>, Option<Tracking>) {
    match Kernel::probe(launcher) {
        Ok(kernel) => {
            let yama = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
            let (mut checks, tracker) = judge(&kernel, yama.as_deref());
            checks.push(mappings(Vmas::open()));
            (checks, tracker)
        }
        Err(error) => {
            let found = format!("cannot be tried: {error}");
            let remedy = "see that /proc is mounted and processes can be started, and run it as root";
            (vec![Check::fail(Group::Kernel, "dirty-tracker", found, remedy)], None)
        }
    }
}

fn judge(kernel: &Kernel, yama: Option<&str>) -> (Vec<Check>, Option<Tracking>) {
    let feature = |id, has: bool, remedy: &str| {
        if has {
            Check::ok(Group::Kernel, id, "works")
        } else {
            Check::fail(Group::Kernel, id, "does not work", remedy)
        }
    };
    let attach = if yama.map(str::trim) == Some(YAMA_NO_ATTACH) {
        "set kernel.yama.ptrace_scope to 2 or less in /etc/sysctl.d and reboot: 3 cannot be left otherwise"
    } else {
        "let root attach: CAP_SYS_PTRACE, and no seccomp filter or security module that forbids ptrace"
    };
    // The tracker opens each userfaultfd with UFFD_USER_MODE_ONLY, inside the task that it tracks.
    let tracker = Tracking::choose(kernel);
    let soft_dirty = match (kernel.soft_dirty, &tracker) {
        (true, Ok(Tracking::SoftDirty)) => "there",
        (true, _) => "there, and not needed",
        (false, Ok(_)) => "absent, and not needed",
        (false, Err(_)) => "absent",
    };
    // What only the better tracker needs is no failure where the other serves.
    let feature = |id, works, remedy| match feature(id, works, remedy) {
        check if check.state == State::Fail && tracker.is_ok() => {
            Check::warn(Group::Kernel, id, check.found, remedy)
        }
        check => check,
    };
    let mut checks = vec![
        feature("pagemap-scan", kernel.pagemap_scan, NEWER),
        feature("userfaultfd-wp-async", kernel.uffd_wp_async, NEWER),
        feature("ptrace", kernel.ptrace, attach),
        feature("pidfd-getfd", kernel.pidfd_getfd, attach),
        Check::ok(Group::Kernel, "soft-dirty", soft_dirty),
    ];
    checks.push(match &tracker {
        Ok(tracker) => Check::ok(Group::Kernel, "dirty-tracker", tracker.name()),
        Err(error) => {
            Check::fail(Group::Kernel, "dirty-tracker", error.to_string(), "remedy what failed above")
        }
    });
    let tracker = tracker.ok();
    (checks, tracker)
}

/// Without it all works, and each freeze takes longer.
fn mappings(opened: Result<Vmas, VmasError>) -> Check {
    match opened {
        Ok(_) => Check::ok(Group::Kernel, "bpf-mappings", "works"),
        Err(error) => {
            let found = format!("{error}; each freeze takes about 20 ms longer for each GiB of memory");
            Check::warn(Group::Kernel, "bpf-mappings", found, MAPPINGS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Kernel = Kernel {
        pagemap_scan: true,
        uffd_wp_async: true,
        uffd_user_mode_only: true,
        ptrace: true,
        pidfd_getfd: true,
        soft_dirty: true,
    };

    #[test]
    fn soft_dirty_is_not_missed() {
        let (checks, tracker) = judge(&Kernel { soft_dirty: false, ..ALL }, None);
        assert_eq!(tracker, Some(Tracking::WriteProtect));
        assert!(checks.iter().all(|check| check.state == State::Ok));
    }

    #[test]
    fn without_write_protection_nothing_is_promised() {
        let kernel = Kernel { pagemap_scan: false, uffd_wp_async: false, uffd_user_mode_only: false, ..ALL };
        let (checks, tracker) = judge(&kernel, None);
        assert_eq!(tracker, Some(Tracking::SoftDirty));
        assert!(checks.iter().all(|check| check.state != State::Fail));
        let (checks, tracker) = judge(&Kernel { soft_dirty: false, ..kernel }, None);
        assert_eq!(tracker, None);
        let failed: Vec<_> =
            checks.iter().filter(|c| c.state == State::Fail).map(|c| c.id.as_ref()).collect();
        assert_eq!(failed, ["pagemap-scan", "userfaultfd-wp-async", "dirty-tracker"]);
    }

    #[test]
    fn yama_is_named_when_it_forbids_tracing() {
        let (checks, _) = judge(&Kernel { ptrace: false, pidfd_getfd: false, ..ALL }, Some("3\n"));
        let ptrace = checks.iter().find(|check| check.id == "ptrace").unwrap();
        assert!(ptrace.remedy.as_ref().unwrap().contains("ptrace_scope"), "{ptrace:?}");
    }
}
