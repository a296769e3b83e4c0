//! Agents that die in the middle of a handoff, in each of its phases.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{
    cluster::Cluster,
    lab::{Host, work_cgroup},
};

/// How far a handoff has come, as files of its hosts show it.
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Epochs beforehand, until little enough is left.
    Rounds,
    /// The source is frozen for the last epoch.
    Frozen,
    /// That epoch is committed, and the source remembers that it asks the target to take over.
    Asking,
    /// The target remembers that it takes over.
    TakingOver,
    /// It was restored there.
    Restored,
    /// The source knows that it is the standby now.
    Over,
}

const PHASES: [Phase; 6] =
    [Phase::Rounds, Phase::Frozen, Phase::Asking, Phase::TakingOver, Phase::Restored, Phase::Over];

/// What can be seen of a cluster from outside at once, without a process of its own.
struct Watched {
    source: PathBuf,
    target: PathBuf,
    log: File,
}

impl Watched {
    fn of(cluster: &Cluster, source: Host, target: Host) -> Self {
        let root = |host| PathBuf::from(format!("/proc/{}/root", cluster.lab.pid(host)));
        let mut log = File::open(cluster.log(source)).expect("the agent has a log");
        log.seek(SeekFrom::End(0)).expect("it is a file");
        Self { source: root(source), target: root(target), log }
    }

    fn has_come_to(&mut self, phase: Phase) -> bool {
        let role = |root: &PathBuf| {
            let text = fs::read(root.join("var/lib/standin/workloads/redis/workload.json"));
            let record: Value = serde_json::from_slice(&text.unwrap_or_default()).unwrap_or_default();
            record["record"]["role"].clone()
        };
        match phase {
            Phase::Rounds => {
                let mut lines = String::new();
                self.log.read_to_string(&mut lines).expect("the log is text");
                lines.contains("a round")
            }
            Phase::Frozen => {
                let events = self.source.join(&work_cgroup("redis")[1..]).join("cgroup.events");
                fs::read_to_string(events).is_ok_and(|events| events.contains("frozen 1"))
            }
            Phase::Asking => role(&self.source)["Primary"]["handoff"] == true,
            Phase::TakingOver => role(&self.target)["Promoting"].is_object(),
            Phase::Restored => role(&self.target)["Primary"].is_object(),
            Phase::Over => role(&self.source) == "Standby",
        }
    }
}

/// The agent as this machine sees it.
fn agent(cluster: &Cluster, host: Host) -> Pid {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let wanted = namespace(&cluster.lab.pid(host).to_string());
    let pids =
        fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut agents = pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let is_agent = line.split(|byte| *byte == 0).nth(1) == Some(b"agent") && namespace(pid) == wanted;
        is_agent && line.starts_with(super::lab::STANDIN.as_bytes())
    });
    Pid::from_raw(agents.next().expect("the agent runs").parse().expect("a pid"))
}

/// Hands the redis off and kills agents as soon as the handoff has come to a phase.
fn kill_in(cluster: &mut Cluster, phase: Phase, victims: &[Host], source: Host, target: Host) {
    let pids: Vec<_> = victims.iter().map(|&host| agent(cluster, host)).collect();
    let mut watched = Watched::of(cluster, source, target);
    let mut order = cluster.lab.command(source, &[super::lab::STANDIN, "handoff", "redis"]);
    let mut order = order.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while !watched.has_come_to(phase) {
        assert!(Instant::now() < until, "the handoff does not come to {phase:?}");
    }
    for pid in pids {
        kill(pid, Signal::SIGKILL).expect("an agent runs until it is killed");
    }
    for &host in victims {
        cluster.reap_agent(host);
    }
    // Longer than a lease, and than a restore.
    cluster.assert_never_both(Duration::from_millis(1500), &format!("{phase:?}, {victims:?} killed"));
    for &host in victims {
        cluster.start_agent(host);
    }
    order.wait().expect("the order ends with its agent");
}

#[test]
fn whichever_agent_dies_in_a_handoff_one_copy_runs() {
    let mut cluster = Cluster::up("handoff-kill");
    cluster.protect_redis();
    let (mut source, mut target) = (Host::A, Host::B);
    let digest = cluster.digest();
    for phase in PHASES {
        for who in ["source", "target", "both"] {
            let victims = match who {
                "source" => vec![source],
                "target" => vec![target],
                _ => vec![source, target],
            };
            let counter = cluster.count();
            kill_in(&mut cluster, phase, &victims, source, target);
            let now = cluster.wait_until_well(&format!("{phase:?}, {who} killed"));
            counter.stop();
            println!("killed: {who:<6}  at: {phase:<10?}  {}", if now == source { "stays" } else { "moves" });
            assert_eq!(cluster.digest(), digest, "{phase:?}, {who} killed");
            assert_eq!(cluster.running_copies(Host::A) + cluster.running_copies(Host::B), 1);
            if now == target {
                std::mem::swap(&mut source, &mut target);
            }
        }
    }
}
