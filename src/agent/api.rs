//! The shapes that the control API speaks: HTTP with JSON bodies on the control socket.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | [`AgentStatus`] |
//! | `GET /v1/workloads/NAME` | | [`WorkloadStatus`] |
//! | `GET /v1/workloads/NAME/history` | | [`History`] |
//! | `POST /v1/run` | [`RunRequest`] | [`RunReply`] |
//! | `POST /v1/wrap` | [`WrapRequest`] | [`WrapReply`] |
//! | `POST /v1/protect` | [`ProtectRequest`] | [`WorkloadStatus`] |
//! | `POST /v1/doctor` | [`DoctorRequest`] | [`PeerReport`](crate::doctor::peer::PeerReport) |
//! | `POST /v1/workloads/NAME/unprotect` | [`UnprotectRequest`] | [`WorkloadStatus`] |
//! | `POST /v1/workloads/NAME/failover` | [`FailoverRequest`] | [`WorkloadStatus`] |
//! | `POST /v1/workloads/NAME/fence`, `/unfence`, `/rejoin`, `/pause`, `/resume` | | [`WorkloadStatus`] |
//! | `POST /v1/workloads/NAME/verify` | | [`VerifyReport`] |
//! | `POST /v1/workloads/NAME/remove` | | `{}` |
//! | `POST /v1/workloads/NAME/handoff` | [`HandoffRequest`] | [`HandoffReport`] |
//! | `POST /v1/workloads/NAME/commit` | [`CommitRequest`] | [`WorkloadStatus`] |
//! | `POST /v1/workloads/NAME/drill` | [`drill::Request`](crate::drill::Request) | [`drill::Report`](crate::drill::Report), when it is done |
//! | `POST /v1/workloads/NAME/drill/end` | | `{}` |
//! | `GET /v1/peers` | | list of [`PeerInfo`] |
//! | `DELETE /v1/peers/NAME` | | `{}` |
//! | `POST /v1/pair/listen` | | [`PairCode`] |
//! | `POST /v1/pair/join` | [`PairJoinRequest`] | [`PeerInfo`] |
//!
//! An error is answered with a 4xx or 5xx status and an [`ErrorBody`].

mod error;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    capture::pace::StretchedBy,
    drill::Last,
    ha::Arbiter,
    model::{EpochFigures, EpochId, Name, Term},
    takeover::{hold::Held, lease::Hook},
    workload::spec::{Cidr, Commit, Daemon, MountRule, PaceSpec, Runtime, Vip, Way},
};

pub use error::{ApiError, ErrorBody, ErrorCode};

/// Start a command in a sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Name of the workload.
    pub name: Name,
    /// Addresses inside the sandbox.
    #[serde(default)]
    pub ips: Vec<Cidr>,
    /// Directories replicated with each epoch.
    #[serde(default)]
    pub paths: Vec<PathBuf>,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment, all of it.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory.
    #[serde(default = "root_dir")]
    pub cwd: PathBuf,
    /// User to run as.
    #[serde(default)]
    pub user: Option<String>,
}

fn root_dir() -> PathBuf {
    "/".into()
}

/// A started workload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunReply {
    /// Its name.
    pub name: Name,
    /// Pid of its first process on this host.
    pub pid: i32,
    /// Where its output goes.
    pub log: PathBuf,
}

/// Make a container's init ready, before the container is started.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrapRequest {
    /// Name of the workload that the container will be.
    pub name: Name,
    /// A bundle whose `config.json` is to be changed.
    #[serde(default)]
    pub bundle: Option<PathBuf>,
}

/// What a wrapped container needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WrapReply {
    /// Name of the workload.
    pub name: Name,
    /// The host's directory with the init, to be mounted read-only.
    pub dir: PathBuf,
    /// Where.
    pub inside: PathBuf,
    /// The init: the container's entry point, in front of its command.
    pub init: PathBuf,
}

/// Compare this host with a paired one.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DoctorRequest {
    /// The peer.
    pub peer: String,
    /// Only this workload's needs; of all that run here and have no other standby, unless said.
    #[serde(default)]
    pub workload: Option<Name>,
}

/// A container of an OCI runtime.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OciContainer {
    /// Its id.
    pub id: String,
    /// Whose; the first that knows it, unless said.
    #[serde(default)]
    pub runtime: Option<Runtime>,
    /// The runtime's directory of containers, if it is not its default one.
    #[serde(default)]
    pub state: Option<PathBuf>,
    /// Addresses that standin gives it, on a device of its own.
    #[serde(default)]
    pub ips: Vec<Cidr>,
    /// What becomes of what it mounts writable; replicated, unless said otherwise.
    #[serde(default)]
    pub mounts: Vec<MountRule>,
}

/// A container of a daemon with Docker's API.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DockerContainer {
    /// Which daemon.
    pub daemon: Daemon,
    /// The container's name or id.
    pub container: String,
    /// Addresses that standin gives it, on a device of its own; for one that has no network.
    #[serde(default)]
    pub ips: Vec<Cidr>,
    /// What becomes of what it mounts writable; replicated, unless said otherwise.
    #[serde(default)]
    pub mounts: Vec<MountRule>,
}

/// What is to be protected.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The sandbox that `run` made.
    Run(Name),
    /// The tree of processes below this one.
    Pid(i32),
    /// A container of an OCI runtime.
    Oci(OciContainer),
    /// A container of a daemon with Docker's API.
    Docker(DockerContainer),
}

/// Start continuous protection.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectRequest {
    /// Name of the workload.
    pub name: Name,
    /// What it is.
    pub source: Source,
    /// The standby: a paired peer's name.
    pub to: String,
    /// When epochs start.
    #[serde(default)]
    pub pace: PaceSpec,
    /// Addresses that follow it.
    #[serde(default)]
    pub vips: Vec<Vip>,
    /// When what it sends leaves.
    #[serde(default)]
    pub commit: Commit,
    /// Of a container: send the standby what it lacks of its image and of what it mounts read-only.
    #[serde(default)]
    pub ship_image: bool,
}

/// Changes when what a workload sends leaves.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommitRequest {
    /// From now on.
    pub mode: Commit,
}

/// Something on its way to a standby, for a workload that is protected when it is there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShipmentStatus {
    /// Name of the workload.
    pub name: Name,
    /// The standby.
    pub to: String,
    /// What.
    pub what: String,
    /// Bytes handed to the network.
    pub sent_bytes: u64,
    /// About how many there are.
    pub total_bytes: u64,
}

/// End protection; the workload runs on.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UnprotectRequest {
    /// The standby cannot be reached and is known to be down: run on without its word.
    pub force: bool,
}

/// The warm image is what was received.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Name.
    pub name: Name,
    /// The newest epoch when it began.
    pub epoch: EpochId,
    /// Memory that was compared.
    pub bytes: u64,
    /// How long it took.
    pub took_ms: f64,
}

/// Run the workload on this standby now.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FailoverRequest {
    /// The primary's host is known to be off.
    pub force: bool,
}

/// Move the workload to its standby on purpose.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoffRequest {
    /// Longest time that clients may be without it; the final freeze waits until the rest fits.
    #[serde(default = "default_max_downtime_ms")]
    pub max_downtime_ms: u64,
    /// The workload may be slowed down if it does not fit otherwise.
    #[serde(default)]
    pub throttle: bool,
    /// The standby it must be; for certainty only, there is one.
    #[serde(default)]
    pub to: Option<String>,
}

/// Default of `--max-downtime`, milliseconds.
pub const fn default_max_downtime_ms() -> u64 {
    200
}

/// A handoff that was done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HandoffReport {
    /// Name of the workload.
    pub name: Name,
    /// Where it runs now.
    pub to: String,
    /// The new term.
    pub term: Term,
    /// The epoch that was restored there.
    pub epoch: EpochId,
    /// Pre-copy epochs before the final freeze.
    pub rounds: u32,
    /// Share of its time for which the workload ran at last before that, in percent; 100: it was not slowed down.
    pub run_percent: u8,
    /// From the final freeze to the target's word that it runs, milliseconds: what clients may have noticed.
    pub downtime_ms: f64,
    /// From the request to the source's end, milliseconds.
    pub total_ms: f64,
    /// Of the downtime: time that the target needed to restore, milliseconds.
    pub restore_ms: f64,
}

/// What a workload is to this agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Runs here and is not protected.
    Unprotected,
    /// Runs here.
    Primary,
    /// Its image is kept here.
    Standby,
    /// A copy is here that may not run.
    Fenced,
}

/// One workload as `status` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkloadStatus {
    /// Name.
    pub name: Name,
    /// Role on this host.
    pub role: Role,
    /// The role's state in one or two words: `protected`, `paused` (by its engine: no epochs meanwhile), `unguarded` (by
    /// `standin pause`), `syncing`, `alone`, `ready`, `fenced` (by an operator), `frozen` (without a lease), …
    pub state: String,
    /// Term.
    pub term: Term,
    /// The other host.
    pub peer: Option<String>,
    /// Whether the peer is reached.
    pub peer_connected: bool,
    /// Newest committed epoch.
    pub epoch: Option<EpochId>,
    /// Age of the newest committed epoch, milliseconds.
    pub lag_ms: Option<u64>,
    /// Time since the lease was last renewed, milliseconds.
    pub lease_age_ms: Option<u64>,
    /// Who decides that the standby runs it.
    #[serde(default)]
    pub arbiter: Arbiter,
    /// How etcd stands to it, if that decides.
    #[serde(default)]
    pub etcd: Option<EtcdStatus>,
    /// Who silences it here when its lease ends, beside its guard.
    #[serde(default)]
    pub kernel_lease: Option<KernelLease>,
    /// When what it sends leaves.
    #[serde(default)]
    pub commit: Commit,
    /// What waits of what it has sent, where it runs.
    #[serde(default)]
    pub held: Option<Held>,
    /// When epochs start.
    pub pace: PaceStatus,
    /// Whose container it is, if it is one.
    pub container: Option<ContainerStatus>,
    /// Pid of the workload's first process on this host, if it runs here.
    pub pid: Option<i32>,
    /// Addresses that follow it.
    pub vips: Vec<Vip>,
    /// The newest epoch's figures (primary).
    pub last: Option<EpochFigures>,
    /// Over the epochs remembered (primary).
    pub summary: Option<Summary>,
    /// What the last drill on this host found.
    #[serde(default)]
    pub last_drill: Option<Last>,
    /// The hook that was run last on this host.
    #[serde(default)]
    pub hook: Option<HookStatus>,
    /// What went wrong last, if it still matters.
    pub error: Option<String>,
}

/// Whether the kernel keeps the lease too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelLease {
    /// It does, looking there.
    At(Hook),
    /// It will when there is one: until then no other host may run the workload.
    Idle,
    /// The guard alone does, for this reason.
    Absent(String),
}

/// A container as its engine knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// The engine.
    pub engine: String,
    /// The engine's name of it.
    pub id: String,
    /// How it is dumped and restored; whole is slower.
    pub way: Way,
    /// What becomes of what it mounts writable.
    #[serde(default)]
    pub mounts: Vec<MountRule>,
    /// Processes of it that the kernel has killed for want of memory since it came to this host or the agent was started.
    #[serde(default)]
    pub oom_kills: u64,
}

/// A command for a change of roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HookEvent {
    /// `on_promote`: the workload is heard from this host.
    Promote,
    /// `on_demote`: it is not any more.
    Demote,
}

impl HookEvent {
    /// As programs are told, and as its setting ends.
    pub fn word(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Demote => "demote",
        }
    }
}

/// How a hook stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HookState {
    /// It runs.
    Running,
    /// It ended with 0.
    Done,
    /// It did not, and is tried again.
    Retrying,
    /// It did not, and is not tried again.
    Failed,
    /// The role changed before it had ended: it was ended.
    CutOff,
}

/// A hook that was run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookStatus {
    /// Which.
    pub event: HookEvent,
    /// The term in which the role changed.
    pub term: Term,
    /// Why it changed.
    pub cause: String,
    /// How it stands.
    pub state: HookState,
    /// How often it was tried.
    pub attempts: u32,
    /// Why it failed last.
    pub error: Option<String>,
}

/// How etcd stands to a workload, as this host sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EtcdStatus {
    /// The member that was asked last.
    pub endpoint: String,
    /// Whether one answered at the last look.
    pub reachable: bool,
    /// What is wrong, and what to do.
    pub error: Option<String>,
    /// The host that had the key when it was last seen.
    pub holder: Option<String>,
    /// How long this host has the key for, milliseconds.
    pub held_for_ms: Option<u64>,
}

/// When epochs start, as wanted and as it is.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct PaceStatus {
    /// What the operator wants.
    #[serde(flatten)]
    pub wanted: PaceSpec,
    /// Time from the begin of one to that of the next, of late (primary).
    pub interval_ms: Option<f64>,
    /// What makes it longer than wanted (primary).
    pub stretched_by: StretchedBy,
}

/// Figures over the epochs remembered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How many epochs.
    pub epochs: u64,
    /// Median of the frozen time, milliseconds.
    pub frozen_ms_p50: f64,
    /// 99th percentile of the frozen time, milliseconds.
    pub frozen_ms_p99: f64,
    /// Median of freeze-to-commit, milliseconds.
    pub commit_ms_p50: f64,
    /// Sum of dirty bytes.
    pub dirty_bytes: u64,
    /// Sum of shipped bytes.
    pub shipped_bytes: u64,
}

/// The agent and all its workloads.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentStatus {
    /// This host's name.
    pub name: String,
    /// Version of the agent.
    pub version: String,
    /// Where peers reach it.
    pub listen: String,
    /// What resets this host, if the settings name it.
    #[serde(default)]
    pub watchdog: Option<WatchdogStatus>,
    /// All workloads.
    pub workloads: Vec<WorkloadStatus>,
    /// What is on its way to standbys.
    #[serde(default)]
    pub shipments: Vec<ShipmentStatus>,
}

/// A watchdog device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogStatus {
    /// Its path.
    pub device: PathBuf,
    /// So long after it was petted last it resets the host, seconds.
    pub timeout_s: u32,
    /// Whether it counts: a workload here has a lease.
    pub open: bool,
    /// Why it cannot be used.
    pub error: Option<String>,
}

/// Something that happened to a workload, kept across restarts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Wall clock, milliseconds since 1970.
    pub at_unix_ms: u64,
    /// Term at that time.
    pub term: Term,
    /// What: `protected`, `promoted`, `fenced`, `handed-off`, …
    pub kind: String,
    /// Cause and circumstances, for people.
    pub detail: String,
    /// Durations of its phases by name, milliseconds.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub phases_ms: std::collections::BTreeMap<String, f64>,
    /// The epoch that it concerns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<EpochId>,
}

/// What `history` answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct History {
    /// Role changes and faults, oldest first.
    pub events: Vec<Event>,
    /// The epochs remembered (primary), oldest first.
    pub epochs: Vec<EpochFigures>,
}

/// A paired peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerInfo {
    /// Its name.
    pub name: String,
    /// Its address.
    pub addr: String,
    /// Fingerprint of its certificate.
    pub fingerprint: String,
}

/// A one-time code.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PairCode {
    /// To be typed at the other host.
    pub code: String,
    /// Port on which this agent listens.
    pub port: u16,
    /// Seconds for which it can be used.
    pub valid_s: u64,
}

/// Pair with an agent that shows a code.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairJoinRequest {
    /// The other agent: `HOST:PORT`.
    pub addr: String,
    /// The code that it shows.
    pub code: String,
}
