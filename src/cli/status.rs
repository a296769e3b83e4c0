//! `standin status`: this agent's workloads.

use std::{io::IsTerminal, path::Path, time::Duration};

use super::{Outcome, client, human_bytes, print_json};
use crate::{
    agent::api::{
        AgentStatus, EtcdStatus, HookState, HookStatus, KernelLease, PaceStatus, Role, WatchdogStatus,
        WorkloadStatus,
    },
    capture::pace::StretchedBy,
    drill::Last,
    model::Name,
    observe::utc,
    takeover::{hold::Held, lease::Hook},
    workload::spec::{Commit, Way},
};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Only this workload
    name: Option<Name>,
    /// Show it anew every second until interrupted
    #[arg(long)]
    watch: bool,
    /// Print JSON (with --watch: one document a line)
    #[arg(long)]
    json: bool,
}

pub(super) fn main(socket: &Path, args: &Args) -> Outcome {
    loop {
        show(socket, args)?;
        if !args.watch {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(1));
        if !args.json && std::io::stdout().is_terminal() {
            print!("\x1b[2J\x1b[H");
        }
    }
}

fn show(socket: &Path, args: &Args) -> Outcome {
    if let Some(name) = &args.name {
        let status: WorkloadStatus = client::get(socket, &format!("/v1/workloads/{name}"))?;
        return match (args.json, args.watch) {
            (true, false) => print_json(&status),
            (true, true) => print_line(&status),
            (false, _) => {
                print_workload(&status);
                Ok(())
            }
        };
    }
    let status: AgentStatus = client::get(socket, "/v1/status")?;
    match (args.json, args.watch) {
        (true, false) => return print_json(&status),
        (true, true) => return print_line(&status),
        (false, _) => {}
    }
    println!("agent {} ({}) on {}", status.name, status.version, status.listen);
    if let Some(watchdog) = &status.watchdog {
        println!("watchdog {}: {}", watchdog.device.display(), watchdog_line(watchdog));
    }
    if status.workloads.is_empty() {
        println!("no workloads; start one with: standin run NAME -- CMD");
    }
    for shipment in &status.shipments {
        println!("{}  {}", shipment.name, super::protect::progress(shipment));
    }
    for workload in &status.workloads {
        println!();
        print_workload(workload);
    }
    Ok(())
}

fn print_line<T: serde::Serialize>(value: &T) -> Outcome {
    println!("{}", serde_json::to_string(value).map_err(anyhow::Error::from)?);
    Ok(())
}

fn print_pace(pace: &PaceStatus) {
    let of_late = pace.interval_ms.map_or_else(String::new, |ms| format!(", one every {ms:.0} ms of late"));
    let why = match pace.stretched_by {
        StretchedBy::None => "",
        StretchedBy::Link => "; stretched: the link is slower than the workload writes",
        StretchedBy::Standby => "; stretched: the standby is slower than the workload writes",
        StretchedBy::Freeze => "; stretched: it would be frozen for too much of its time",
        StretchedBy::Capture => "; stretched: capturing takes longer",
    };
    println!("  pace      {}{of_late}{why}", pace.wanted.mode);
}

fn print_workload(status: &WorkloadStatus) {
    let role = match status.role {
        Role::Unprotected => "unprotected",
        Role::Primary => "primary",
        Role::Standby => "standby",
        Role::Fenced => "fenced",
    };
    println!("{}  {role}, {}  term {}", status.name, status.state, status.term);
    if let Some(peer) = &status.peer {
        let reached = if status.peer_connected { "connected" } else { "NOT REACHED" };
        println!("  peer      {peer} ({reached})");
    }
    if let Some(container) = &status.container {
        let kills = container.oom_kills;
        let kills = (kills > 0).then(|| format!("; killed for want of memory: {kills} of its processes"));
        println!("  container {} of {}{}", container.id, container.engine, kills.unwrap_or_default());
        if !container.mounts.is_empty() {
            let mounts: Vec<String> = container.mounts.iter().map(ToString::to_string).collect();
            println!("  mounts    {}", mounts.join(", "));
        }
        match container.way {
            Way::Inside => println!("  way       inside"),
            Way::Whole => {
                println!(
                    "  way       whole: slower than inside, for which `standin wrap` prepares a container"
                );
            }
        }
    }
    if let Some(pid) = status.pid {
        println!("  pid       {pid}");
    }
    if let Some(epoch) = status.epoch {
        let lag = status.lag_ms.map_or_else(|| "unknown".into(), |ms| format!("{ms} ms"));
        println!("  epoch     {epoch}, lag {lag}");
        print_pace(&status.pace);
    }
    if let Some(held) = status.held.filter(|_| status.commit == Commit::Output) {
        println!("  output    {}", held_line(&held));
    }
    if let Some(age) = status.lease_age_ms {
        println!("  lease     renewed {age} ms ago");
    }
    if let Some(lease) = &status.kernel_lease {
        println!("  fence     {}", fence_line(lease));
    }
    if status.peer.is_some() {
        println!(
            "  decides   {}{}",
            status.arbiter,
            status.etcd.as_ref().map_or_else(String::new, etcd_line)
        );
    }
    for vip in &status.vips {
        let mac = if vip.own_mac { ", with a hardware address of its own" } else { "" };
        println!("  address   {} on {}{mac}", vip.cidr, vip.device);
    }
    if let Some(last) = &status.last {
        println!(
            "  last      frozen {:.1} ms, dirty {}, shipped {}, memory {}",
            last.frozen_us as f64 / 1000.0,
            human_bytes(last.dirty_bytes),
            human_bytes(last.shipped_bytes),
            human_bytes(last.resident_bytes)
        );
    }
    if let Some(summary) = &status.summary {
        println!(
            "  {} epochs frozen p50 {:.1} ms, p99 {:.1} ms; freeze to commit p50 {:.1} ms",
            summary.epochs, summary.frozen_ms_p50, summary.frozen_ms_p99, summary.commit_ms_p50
        );
    }
    if let Some(drill) = &status.last_drill {
        println!("  drill     {}", drill_line(drill));
    }
    if let Some(hook) = &status.hook {
        println!("  hook      {}", hook_line(hook));
    }
    if let Some(error) = &status.error {
        println!("  error     {error}");
    }
}

/// What waits for its commit.
fn held_line(held: &Held) -> String {
    let waits =
        if held.output { "waits for its commit" } else { "leaves at once until the standby has an epoch" };
    let bytes = human_bytes(held.bytes);
    let dropped = if held.dropped > 0 { format!("; {} dropped", held.dropped) } else { String::new() };
    format!("{waits}, of late {:.1} ms; {} packets, {bytes} now{dropped}", held.delay_ms, held.packets)
}

/// What resets this host.
fn watchdog_line(watchdog: &WatchdogStatus) -> String {
    let after = watchdog.timeout_s;
    match &watchdog.error {
        Some(error) => format!("NOT USED: {error}"),
        None if watchdog.open => format!("open, resets this host {after} s after the last sign of order"),
        None => format!("closed until a workload here has a lease; {after} s then"),
    }
}

/// Who silences it when its lease ends.
fn fence_line(lease: &KernelLease) -> String {
    match lease {
        KernelLease::At(Hook::Device) => "the guard, and the kernel at its devices".to_owned(),
        KernelLease::At(Hook::Prerouting) => "the guard, and the kernel where it is routed".to_owned(),
        KernelLease::Idle => "none: no other host may take it over now".to_owned(),
        KernelLease::Absent(reason) => format!("the guard alone: {reason}"),
    }
}

/// The hook that was run last.
fn hook_line(hook: &HookStatus) -> String {
    let state = match hook.state {
        HookState::Running => "runs",
        HookState::Done => "done",
        HookState::Retrying => "FAILED, is tried again",
        HookState::Failed => "FAILED",
        HookState::CutOff => "ended early, as the role has changed",
    };
    let error = hook.error.as_ref().map_or_else(String::new, |error| format!(": {error}"));
    let (event, term) = (hook.event.word(), hook.term);
    format!("on_{event} (term {term}, {}) {state}; try {}{error}", hook.cause, hook.attempts)
}

/// How etcd stands to it.
fn etcd_line(etcd: &EtcdStatus) -> String {
    let holder = etcd.holder.as_ref().map_or_else(|| "nobody".to_owned(), Clone::clone);
    let reached = if etcd.reachable { "" } else { " (NOT REACHED)" };
    let trouble = etcd.error.as_ref().map_or_else(String::new, |error| format!("; {error}"));
    format!(" at {}{reached}: {holder} has the key{trouble}", etcd.endpoint)
}

/// What the last drill found.
fn drill_line(drill: &Last) -> String {
    let mut line = format!("{} {}", utc(drill.at_unix_ms), drill.outcome.word());
    if let Some(epoch) = drill.epoch {
        line = format!("{line}, epoch {epoch}");
    }
    if let (Some(rto), Some(rpo)) = (drill.rto_ms, drill.rpo_ms) {
        line = format!("{line}, RTO {rto:.0} ms, RPO {rpo} ms");
    }
    if let Some(exit) = drill.probe_exit {
        line = format!("{line}, probe {exit}");
    }
    if let Some(reason) = &drill.reason {
        line = format!("{line}: {reason}");
    }
    if drill.kept {
        line = format!("{line} (kept)");
    }
    line
}
