//! Both hosts' facts to checks, pure.

use std::{cmp::Ordering, time::Duration};

use super::{ClockSample, Id, Needs, Pair, PeerReport, cpu};
use crate::{
    doctor::{Check, Group, State, human_bytes},
    wire::examine::{FileFacts, HostFacts, RegularFile, VipFacts},
    workload::spec::Vip,
};

/// Most lines about the files of one workload.
const FILE_LINES_MAX: usize = 20;
/// A workload sees its wall clock jump by what the two differ.
const WALL_OFFSET_MAX: Duration = Duration::from_millis(500);
/// What NTP may slew a clock by (adjtimex(2)): more is no clock that is kept.
const RATE_PPM_ENOUGH: f64 = 500.0;
/// Headers in front of QUIC's payload: IP and UDP.
const HEADERS_V4: u32 = 28;
const HEADERS_V6: u32 = 48;
/// How near to the largest packet QUIC's search comes (`minimum_change` of quinn's MtuDiscoveryConfig), and some.
const MTU_STEP: u32 = 40;

/// Compares the two.
pub fn compare(pair: &Pair) -> PeerReport {
    let mut checks = settings(pair);
    checks.extend(clock(pair));
    checks.extend(cpu::compare(&pair.here.cpu, &pair.there.cpu, &pair.peer));
    checks.extend(software(pair));
    checks.push(mtu(pair));
    checks.extend(addresses(pair));
    checks.push(memory(pair));
    for needs in &pair.workloads {
        checks.extend(workload(needs, &pair.peer));
    }
    let ok = checks.iter().all(|check| check.state != State::Fail);
    let workloads = pair.workloads.iter().map(|needs| needs.footprint.name.clone()).collect();
    PeerReport { ok, peer: pair.peer.clone(), workloads, checks }
}

fn settings(Pair { peer, here, there, .. }: &Pair) -> Vec<Check> {
    // The setting as it is shown, which shows all of it.
    let same = |id, what: &str, setting: &dyn Fn(&HostFacts) -> String, remedy: &str| {
        let (here, there) = (setting(here), setting(there));
        if here == there {
            return Check::ok(Group::Host, id, format!("{what} {here}"));
        }
        Check::fail(Group::Host, id, format!("{what} {here} here, {there} on {peer}"), remedy)
    };
    let lease = |host: &HostFacts| {
        let ms = |time: Duration| time.as_micros() as f64 / 1e3;
        format!(
            "{} ms, renewed every {} ms, {} ms of it kept by the guard, {} ms allowed for clocks that drift",
            ms(host.lease),
            ms(host.heartbeat),
            ms(host.fence_margin),
            ms(host.drift)
        )
    };
    vec![
        same(
            "release",
            "standin",
            &|host| host.release.clone(),
            "install the same release of standin on both hosts, and restart the agents",
        ),
        same(
            "arbiter",
            "who decides is",
            &|host| host.arbiter.to_string(),
            "set `arbiter` and `on_standby_loss` alike on both hosts, and restart the agents",
        ),
        same(
            "lease",
            "a lease lasts",
            &lease,
            "set lease_ms, heartbeat_ms and fence_margin_ms alike on both hosts, and restart the agents: a standby whose lease \
             is the shorter one takes over before the primary is silent",
        ),
    ]
}

fn clock(Pair { peer, here, clocks: [first, second], .. }: &Pair) -> Vec<Check> {
    let seconds = |duration: Duration| duration.as_secs_f64();
    let away = |there: Duration, here: Duration| seconds(there) - seconds(here);
    let wall = away(second.there.wall, second.here.wall);
    let boot = away(second.there.boot, second.here.boot);
    let sure = seconds(second.error);
    let wall_check = if wall.abs() - sure > seconds(WALL_OFFSET_MAX) {
        let found = format!("the wall clock of {peer} is {} than this one", apart(wall));
        let remedy = "keep both by NTP (chrony): a workload that is moved sees its clock jump by that";
        Check::warn(Group::Host, "wall-clock-offset", found, remedy)
    } else {
        let found = format!("{:.1} ms apart, to ±{:.1} ms", wall.abs() * 1e3, sure * 1e3);
        Check::ok(Group::Host, "wall-clock-offset", found)
    };
    let monotonic = if boot < -1.0 - sure {
        let found = format!(
            "{peer} was booted {:.0} s after this host, and CLOCK_MONOTONIC counts from there: it goes back for what \
             moves there",
            -boot
        );
        let remedy = "see that the workload bears it: one that waits for an instant which it has noted waits that much longer";
        vec![Check::warn(Group::Host, "monotonic-clock", found, remedy)]
    } else {
        Vec::new()
    };
    let allowed_ppm = seconds(here.drift) / seconds(here.lease) * 1e6;
    let mut checks = vec![wall_check, rate(peer, first, second, allowed_ppm)];
    checks.extend(monotonic);
    checks
}

fn apart(seconds: f64) -> String {
    let size = seconds.abs();
    let text = if size < 10.0 { format!("{:.0} ms", size * 1e3) } else { format!("{size:.0} s") };
    format!("{text} {}", if seconds > 0.0 { "later" } else { "earlier" })
}

/// By how much the clocks of leases run apart.
fn rate(peer: &str, first: &ClockSample, second: &ClockSample, allowed_ppm: f64) -> Check {
    let id = "clock-rate";
    let took = |end: Duration, begin: Duration| end.saturating_sub(begin).as_secs_f64();
    let here = took(second.here.boot, first.here.boot);
    if here <= 0.0 {
        return Check::warn(Group::Host, id, "it was not measured", "try again");
    }
    let ppm = (took(second.there.boot, first.there.boot) / here - 1.0) * 1e6;
    let error_ppm = (first.error + second.error).as_secs_f64() / here * 1e6;
    let sure = ppm.abs() - error_ppm;
    let found = format!("the clock of {peer} runs {ppm:+.0} ppm of this one's, to ±{error_ppm:.0}");
    if sure > allowed_ppm {
        let found = format!("{found}; leases allow for {allowed_ppm:.0}");
        let remedy =
            "see why (`dmesg | grep -i clocksource`, the hypervisor's clock): until then no lease is safe";
        return Check::fail(Group::Host, id, found, remedy);
    }
    if sure > RATE_PPM_ENOUGH {
        return Check::warn(
            Group::Host,
            id,
            found,
            "see whether NTP runs on both, and which clock source they have",
        );
    }
    Check::ok(Group::Host, id, found)
}

fn software(Pair { peer, here, there, .. }: &Pair) -> Vec<Check> {
    let numbers = |release: &str| -> Vec<u32> {
        release.split(['.', '-', '+']).map_while(|part| part.parse().ok()).take(2).collect()
    };
    let (ours, theirs) = (numbers(&here.kernel), numbers(&there.kernel));
    let both = format!("{} here, {} on {peer}", here.kernel, there.kernel);
    let kernel = match theirs.cmp(&ours) {
        Ordering::Less => {
            let remedy =
                "boot the same kernel on both: an older one may lack what a process has open or has set";
            Check::warn(Group::Kernel, "kernel-release", both, remedy)
        }
        Ordering::Equal => Check::ok(Group::Kernel, "kernel-release", here.kernel.clone()),
        Ordering::Greater => Check::note(Group::Kernel, "kernel-release", both),
    };
    let tracker = match (&here.tracker, &there.tracker) {
        (_, None) => Check::fail(
            Group::Kernel,
            "dirty-tracker",
            format!(
                "{peer} cannot tell which pages were written: what it has taken over it could not protect"
            ),
            format!("see `standin doctor` on {peer}"),
        ),
        (Some(ours), Some(theirs)) if ours == theirs => {
            Check::ok(Group::Kernel, "dirty-tracker", ours.clone())
        }
        (ours, Some(theirs)) => Check::warn(
            Group::Kernel,
            "dirty-tracker",
            format!("{} here, {theirs} on {peer}", ours.as_deref().unwrap_or("none")),
            "boot the same kernel on both: freezes are not of the same length there",
        ),
    };
    let version = |(major, minor, sub): (u32, u32, u32)| format!("{major}.{minor}.{sub}");
    let both = format!("{} here, {} on {peer}", version(here.criu), version(there.criu));
    let criu = match ((here.criu.0, here.criu.1), (there.criu.0, there.criu.1)) {
        (ours, theirs) if theirs < ours => Check::fail(
            Group::Criu,
            "criu",
            format!("{both}: an older one need not understand the images of a newer one"),
            format!("install CRIU {} on {peer}: scripts/setup", version(here.criu)),
        ),
        (ours, theirs) if ours < theirs => Check::warn(
            Group::Criu,
            "criu",
            format!("{both}: what moves there may not come back"),
            "install the same CRIU on both: scripts/setup",
        ),
        _ => Check::ok(Group::Criu, "criu", version(here.criu)),
    };
    vec![kernel, tracker, criu]
}

fn mtu(Pair { peer, here, there, payload, payload_max, is_v6, .. }: &Pair) -> Check {
    let id = "mtu";
    let (Some(ours), Some(theirs)) = (here.mtu, there.mtu) else {
        let found = "the largest packet of a route is not known";
        return Check::warn(Group::Network, id, found, "see `ip route get` on both hosts");
    };
    if ours != theirs {
        let found = format!("{ours} bytes here, {theirs} on {peer}");
        let remedy = "set the same MTU on both devices: what is larger than the other's is lost";
        return Check::warn(Group::Network, id, found, remedy);
    }
    let headers = if *is_v6 { HEADERS_V6 } else { HEADERS_V4 };
    let Some(payload) = payload else {
        let found = format!(
            "{ours} bytes on both hosts; what arrives is not known, as no connection for epochs stands"
        );
        return Check::warn(Group::Network, id, found, "try again: see `standin status` for the connection");
    };
    let carried = u32::from(*payload) + headers;
    let expected = ours.min(u32::from(*payload_max) + headers);
    if carried + MTU_STEP < expected {
        let found =
            format!("{ours} bytes on both hosts, but no packet of more than {carried} was seen to arrive");
        let remedy = "see what is between them (a tunnel, a switch without jumbo frames): `ping -M do -s SIZE`; lower both \
                      devices' MTU to what it carries";
        return Check::warn(Group::Network, id, found, remedy);
    }
    Check::ok(Group::Network, id, format!("{ours} bytes on both hosts, and packets of {carried} arrive"))
}

fn addresses(Pair { peer, here, there, workloads, .. }: &Pair) -> Vec<Check> {
    let vips = workloads.iter().flat_map(|needs| &needs.footprint.vips);
    let facts = here.vips.iter().zip(&there.vips);
    let judge = |(vip, (ours, theirs)): (&Vip, (&VipFacts, &VipFacts))| {
        let named = vip.to_string();
        if let Some(trouble) = &theirs.trouble {
            let remedy = format!("make the device and its network on {peer} as they are here");
            return Check::fail(Group::Network, "address", format!("{named} on {peer}: {trouble}"), remedy);
        }
        match (ours.mtu, theirs.mtu) {
            (Some(ours), Some(theirs)) if theirs < ours => Check::warn(
                Group::Network,
                "address",
                format!("{named}: packets of {ours} bytes here, of {theirs} on {peer}"),
                "set the same MTU on both: connections go on with the packets that they have agreed upon",
            ),
            _ => Check::ok(Group::Network, "address", format!("{named} can be served by {peer}")),
        }
    };
    vips.zip(facts).map(judge).collect()
}

/// What the standby needs: the image, and the restored memory beside it until its last page is there.
fn memory(Pair { peer, there, workloads, .. }: &Pair) -> Check {
    let id = "memory";
    let all: u64 = workloads.iter().map(|needs| needs.footprint.resident_bytes).sum();
    let missing: u64 = workloads
        .iter()
        .filter(|needs| !needs.footprint.held)
        .map(|needs| needs.footprint.resident_bytes)
        .sum();
    let free = format!(
        "{} could be had on {peer}, and {} for its images",
        human_bytes(there.memory_available),
        human_bytes(there.store_free)
    );
    let found = format!("{} run here; {free}", human_bytes(all));
    if there.store_free < missing {
        let remedy = format!(
            "make room on {peer}: free memory, enlarge the tmpfs (`mount -o remount,size=…`), or set `store`"
        );
        return Check::fail(Group::Space, id, format!("{found}: the images have no room"), remedy);
    }
    if there.memory_available < all {
        let remedy =
            format!("free memory on {peer}, or add some: what is restored there is killed for want of it");
        return Check::fail(Group::Space, id, format!("{found}: too little to run them"), remedy);
    }
    let images = if there.store_in_memory { missing } else { 0 };
    if there.memory_available < all + images + all / 4 {
        let remedy = format!("free memory on {peer}: while a takeover brings pages, it holds them twice");
        return Check::warn(Group::Space, id, format!("{found}: little"), remedy);
    }
    Check::ok(Group::Space, id, found)
}

fn workload(needs: &Needs, peer: &str) -> Vec<Check> {
    let footprint = &needs.footprint;
    let name = &footprint.name;
    let mut checks = Vec::new();
    if footprint.container {
        let found =
            format!("{name} has its container's files and users: `standin protect` compares its image");
        checks.push(Check::note(Group::Workloads, "files", found));
        return checks;
    }
    let different: Vec<Check> = footprint
        .files
        .iter()
        .zip(&needs.files)
        .filter_map(|(used, there)| file(name.as_str(), used, there, peer))
        .collect();
    let failed = different.iter().any(|check| check.state == State::Fail);
    if !failed {
        let found = format!("{} files that {name} uses are on {peer}", footprint.files.len());
        checks.push(Check::ok(Group::Workloads, "files", found));
    }
    let left_off = different.len().saturating_sub(FILE_LINES_MAX);
    let (mut worst, others): (Vec<_>, Vec<_>) =
        different.into_iter().partition(|check| check.state == State::Fail);
    worst.extend(others);
    checks.extend(worst.into_iter().take(FILE_LINES_MAX));
    if left_off > 0 {
        let found = format!("{left_off} more files of {name} differ");
        checks.push(Check::warn(Group::Workloads, "files", found, "mend those above first, then ask again"));
    }
    if footprint.more_files {
        let found = format!("{name} uses more files than are compared");
        checks.push(Check::warn(
            Group::Workloads,
            "files",
            found,
            "compare the others by the packages they are from",
        ));
    }
    checks.extend(footprint.deleted.iter().take(FILE_LINES_MAX).map(|path| {
        let found = format!("{name} maps {path} as it was before it was replaced or removed here");
        let remedy = format!("start {name} anew: CRIU takes along such a file only if it is small");
        Check::warn(Group::Workloads, "deleted-file", found, remedy)
    }));
    checks.extend(ids(name.as_str(), "user", &needs.users, peer));
    checks.extend(ids(name.as_str(), "group", &needs.groups, peer));
    checks
}

/// What CRIU looks at when it opens a file again: that it is there, its size, its mode, its build-id.
fn file(name: &str, used: &super::UsedFile, there: &FileFacts, peer: &str) -> Option<Check> {
    let path = String::from_utf8_lossy(&used.path);
    let fail = |what: &str, remedy: String| {
        Some(Check::fail(Group::Workloads, "files", format!("{name} uses {path}, which {what}"), remedy))
    };
    let warn = |what: &str, remedy: String| {
        Some(Check::warn(Group::Workloads, "files", format!("{name} uses {path}, {what}"), remedy))
    };
    let FileFacts::Regular(ours) = &used.here else {
        return warn("which cannot be read here", "see that the agent runs as root of the host".to_owned());
    };
    let same_package =
        format!("install the same version of its package on both hosts, then start {name} anew");
    let theirs = match there {
        FileFacts::Missing => {
            let remedy = format!(
                "install it on {peer}, in the same version, or have it replicated: `standin run --path DIR`"
            );
            return fail(&format!("is missing on {peer}"), remedy);
        }
        FileFacts::NotAFile => return fail(&format!("is no file on {peer}"), same_package),
        FileFacts::Unreadable(reason) => {
            return fail(&format!("cannot be read on {peer}: {reason}"), format!("see to it on {peer}"));
        }
        FileFacts::Regular(theirs) => theirs,
    };
    let kept = format!(
        "see that it does not change, or have it replicated: `standin run --path DIR` for what {name} writes"
    );
    match difference(ours, theirs) {
        Some(what) if used.mapped => fail(&format!("is {what} on {peer}"), same_package),
        Some(what) => fail(&format!("it has open and which is {what} on {peer}"), kept),
        None if ours.mode != theirs.mode => fail(
            &format!("has mode {:o} here and {:o} on {peer}", ours.mode, theirs.mode),
            format!("`chmod {:o} {path}` on {peer}", ours.mode),
        ),
        None if (ours.uid, ours.gid) != (theirs.uid, theirs.gid) => warn(
            &format!(
                "whose owner is {}:{} here and {}:{} on {peer}",
                ours.uid, ours.gid, theirs.uid, theirs.gid
            ),
            format!("`chown {}:{} {path}` on {peer}", ours.uid, ours.gid),
        ),
        None if used.mapped
            && ours.build_id.is_empty()
            && ours.digest.is_none() | theirs.digest.is_none() =>
        {
            warn(
                "which was compared by its size alone: it has no build-id and is too large, or not for all to read",
                "compare it by hand (`sha256sum`)".to_owned(),
            )
        }
        None => None,
    }
}

fn difference(ours: &RegularFile, theirs: &RegularFile) -> Option<&'static str> {
    if ours.build_id != theirs.build_id {
        return Some("another build (its build-id differs)");
    }
    if ours.size != theirs.size {
        return Some("of another size");
    }
    let digests = ours.digest.zip(theirs.digest);
    digests.is_some_and(|(ours, theirs)| ours != theirs).then_some("of other content")
}

fn ids(name: &str, kind: &str, ids: &[Id], peer: &str) -> Vec<Check> {
    let id = if kind == "user" { "users" } else { "groups" };
    let judge = |Id { number, here, there }: &Id| {
        let here = here.as_ref()?;
        if there.as_ref() == Some(here) {
            return None;
        }
        let what = match there {
            None => format!("{name} runs as {kind} {number}, {here} here, and {peer} has no such {kind}"),
            Some(there) => format!("{name} runs as {kind} {number}: {here} here, {there} on {peer}"),
        };
        let remedy = format!(
            "give {here} the number {number} on {peer}: it is restored by number, and looks its name up by itself"
        );
        Some(Check::warn(Group::Workloads, id, what, remedy))
    };
    ids.iter().filter_map(judge).collect()
}

#[cfg(test)]
mod tests;
