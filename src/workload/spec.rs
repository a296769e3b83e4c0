//! The description of a workload, the same on both hosts.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{ha::Arbiter, model::Name};

/// An address with its prefix length, as in `10.0.0.5/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    /// The address itself, host bits included.
    pub addr: IpAddr,
    /// Prefix length, at most 32 or 128.
    pub prefix: u8,
}

/// Why a text is no address with a prefix.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no address with prefix length: write it like 10.0.0.5/24 or fd00::5/64")]
pub struct CidrError(String);

impl std::str::FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let error = || CidrError(text.to_owned());
        let (addr, prefix) = text.split_once('/').ok_or_else(error)?;
        let addr: IpAddr = addr.parse().map_err(|_| error())?;
        let prefix: u8 = prefix.parse().map_err(|_| error())?;
        let prefix_max = if addr.is_ipv4() { 32 } else { 128 };
        if prefix > prefix_max {
            return Err(error());
        }
        Ok(Self { addr, prefix })
    }
}

impl TryFrom<String> for Cidr {
    type Error = CidrError;

    fn try_from(text: String) -> Result<Self, CidrError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.addr, self.prefix)
    }
}

/// An address that clients use, and the host device on whose network it is announced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vip {
    /// The address; for a sandbox it is also an address inside it.
    pub cidr: Cidr,
    /// The host's device, e.g. `eth0`. The same name is used on both hosts.
    pub device: String,
    /// It has a hardware address of its own there, which follows it too: no neighbour has to learn another one.
    #[serde(default)]
    pub own_mac: bool,
}

/// What is behind the device's name if the address has a hardware address of its own.
const OWN_MAC: &str = "+mac";

impl std::fmt::Display for Vip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}{}", self.cidr, self.device, if self.own_mac { OWN_MAC } else { "" })
    }
}

impl std::str::FromStr for Vip {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let (cidr, device) = text.split_once('@').ok_or_else(|| CidrError(text.to_owned()))?;
        let (device, own_mac) = device.strip_suffix(OWN_MAC).map_or((device, false), |device| (device, true));
        let fits = (1..16).contains(&device.len())
            && !device.contains(|c: char| c == '/' || c.is_whitespace())
            && device != "."
            && device != "..";
        if !fits {
            return Err(CidrError(text.to_owned()));
        }
        Ok(Self { cidr: cidr.parse()?, device: device.to_owned(), own_mac })
    }
}

/// Which network the workload's sockets are in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Net {
    /// A network namespace of its own, joined to the host by a veth pair.
    Own {
        /// Addresses on the device inside.
        ips: Vec<Cidr>,
    },
    /// The host's network namespace (a tree that was started without a sandbox), or one that is reached through addresses
    /// of the host (a container's with published ports).
    Host,
}

/// A sandbox: the namespaces and the place in which a workload runs, identical on both hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// The workload's name.
    pub name: Name,
    /// Its network.
    pub net: Net,
    /// Directories whose files belong to the workload and are replicated with each epoch. What it sees there is a copy
    /// that is its own: of what the directory held when it first ran.
    pub paths: Vec<PathBuf>,
    /// Host name inside (its own uts namespace); the workload's name unless said otherwise.
    pub hostname: String,
}

/// An OCI runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Runtime {
    /// runc.
    Runc,
    /// crun.
    Crun,
}

impl Runtime {
    /// The name of its program.
    pub fn program(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
        }
    }
}

impl std::str::FromStr for Runtime {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "runc" => Ok(Self::Runc),
            "crun" => Ok(Self::Crun),
            _ => Err(format!("{text:?} is no runtime that standin knows: runc or crun")),
        }
    }
}

impl std::fmt::Display for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.program())
    }
}

/// Who runs a container, and how the same one is made on the standby.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// An OCI runtime, used directly.
    Oci {
        /// Which.
        runtime: Runtime,
        /// The runtime's directory of containers (its `--root`), the same on both hosts; `None`: its default.
        state: Option<PathBuf>,
        /// The container's id.
        id: String,
        /// Its `config.json`, as the operator wrote it.
        config: String,
    },
    /// A daemon with Docker's API.
    Docker {
        /// Which.
        daemon: Daemon,
        /// The container's name.
        name: String,
        /// What it is made from: see [`super::container`].
        config: String,
    },
}

/// A daemon that speaks Docker's API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Daemon {
    /// dockerd.
    Docker,
    /// `podman system service`.
    Podman,
}

impl Daemon {
    /// The name of its command.
    pub fn program(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Podman => "podman",
        }
    }
}

/// An image, as its daemon knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageId {
    /// Whose daemon.
    pub daemon: Daemon,
    /// Its digest, with or without `sha256:` before it.
    pub id: String,
    /// What people call it.
    pub name: String,
}

impl Engine {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Oci { runtime, .. } => runtime.program(),
            Self::Docker { daemon, .. } => daemon.program(),
        }
    }

    /// What the engine calls the container.
    pub fn container(&self) -> &str {
        match self {
            Self::Oci { id, .. } => id,
            Self::Docker { name, .. } => name,
        }
    }
}

/// A part of a container's file system whose files belong to the workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerTree {
    /// Where it is inside.
    pub inside: PathBuf,
    /// What it is.
    pub kind: ContainerTreeKind,
}

/// What is replicated of a container's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContainerTreeKind {
    /// The root file system.
    Root,
    /// A directory of the host, shown inside.
    Mount,
    /// A tmpfs of its own.
    Memory,
}

/// How a container is dumped and restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// From inside: its pid 1 is our init, which waits on the standby.
    #[default]
    Inside,
    /// Whole, with its namespaces: its pid 1 is the application, and its runtime restores it.
    Whole,
}

/// What becomes of what a container writes to a directory of the host or a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountMode {
    /// It goes with every epoch; what is not named otherwise does.
    Replicate,
    /// It is the same storage on both hosts. What is there after a takeover may be newer than the memory.
    Shared,
    /// Each host has its own.
    Ignore,
}

/// A mount of a container, and what becomes of its files: `DESTINATION=replicate|shared|ignore`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRule {
    /// Where it is inside.
    pub inside: PathBuf,
    /// What becomes of its files.
    pub mode: MountMode,
}

impl MountRule {
    /// Whether it is not replicated.
    pub fn is_left(&self) -> bool {
        self.mode != MountMode::Replicate
    }
}

impl std::fmt::Display for MountRule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mode = match self.mode {
            MountMode::Replicate => "replicate",
            MountMode::Shared => "shared",
            MountMode::Ignore => "ignore",
        };
        write!(f, "{}={mode}", self.inside.display())
    }
}

impl std::str::FromStr for MountRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || format!("{text} is not DESTINATION=replicate|shared|ignore, as in /srv/nfs=shared");
        let (inside, mode) = text.rsplit_once('=').ok_or_else(wanted)?;
        let mode = match mode {
            "replicate" => MountMode::Replicate,
            "shared" => MountMode::Shared,
            "ignore" => MountMode::Ignore,
            _ => return Err(wanted()),
        };
        let inside = PathBuf::from(inside);
        if inside.is_absolute() { Ok(Self { inside, mode }) } else { Err(wanted()) }
    }
}

/// What a container mounts read-only, and a standby that had it not was sent a copy of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lent {
    /// Where it is mounted inside.
    pub inside: PathBuf,
    /// What is in it: the digest of its files, 64 hexadecimal digits.
    pub digest: String,
    /// It is a single file, and no directory.
    pub is_file: bool,
}

/// The directory of such copies, beside a container's other files.
const LENT_DIR: &str = "lent";
/// What a single file is called in its copy.
pub const LENT_FILE: &str = "file";

impl Lent {
    /// The copies of what is mounted there, each named by its digest, among a container's files in `data_dir`.
    pub fn copies(&self, data_dir: &Path) -> PathBuf {
        let hash = blake3::hash(self.inside.as_os_str().as_encoded_bytes()).to_hex();
        data_dir.join(LENT_DIR).join(&hash[..32])
    }

    /// The copy's directory.
    pub fn dir(&self, data_dir: &Path) -> PathBuf {
        self.copies(data_dir).join(&self.digest)
    }

    /// What is to be mounted.
    pub fn source(&self, data_dir: &Path) -> PathBuf {
        let dir = self.dir(data_dir);
        if self.is_file { dir.join(LENT_FILE) } else { dir }
    }
}

/// A container: the engine's, the same on both hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// The workload's name.
    pub name: Name,
    /// Whose it is.
    pub engine: Engine,
    /// Addresses on a device that standin makes inside; none: its network is the engine's or the host's.
    pub ips: Vec<Cidr>,
    /// Its replicated files, in the order of their records.
    pub trees: Vec<ContainerTree>,
    /// What it mounts writable and is not replicated.
    #[serde(default)]
    pub left: Vec<MountRule>,
    /// What it mounts read-only, and this host has copies of where it is not itself.
    #[serde(default)]
    pub lent: Vec<Lent>,
    /// How it is dumped and restored.
    #[serde(default)]
    pub way: Way,
}

impl ContainerSpec {
    /// What becomes of each of its mounts that it may write to.
    pub fn mounts(&self) -> Vec<MountRule> {
        let replicated = self.trees.iter().filter(|tree| tree.kind == ContainerTreeKind::Mount);
        let replicated =
            replicated.map(|tree| MountRule { inside: tree.inside.clone(), mode: MountMode::Replicate });
        replicated.chain(self.left.iter().cloned()).collect()
    }
}

/// Where a workload runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlaceSpec {
    /// In a place made by us.
    Sandbox(SandboxSpec),
    /// In one made by an engine.
    Container(ContainerSpec),
}

impl PlaceSpec {
    /// The workload's name.
    pub fn name(&self) -> &Name {
        match self {
            Self::Sandbox(spec) => &spec.name,
            Self::Container(spec) => &spec.name,
        }
    }

    /// Whether it is a container that its runtime restores.
    pub fn is_whole(&self) -> bool {
        matches!(self, Self::Container(spec) if spec.way == Way::Whole)
    }

    /// How its sockets are reached.
    pub fn net(&self) -> Net {
        match self {
            Self::Sandbox(spec) => spec.net.clone(),
            Self::Container(spec) if spec.ips.is_empty() => Net::Host,
            Self::Container(spec) => Net::Own { ips: spec.ips.clone() },
        }
    }
}

/// A protected workload as both agents know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadSpec {
    /// Its place.
    pub place: PlaceSpec,
    /// Addresses that follow the workload.
    pub vips: Vec<Vip>,
    /// When its epochs start.
    #[serde(default)]
    pub pace: PaceSpec,
    /// Who decides that the standby runs it.
    #[serde(default)]
    pub arbiter: Arbiter,
    /// When what it sends leaves.
    #[serde(default)]
    pub commit: Commit,
}

/// When what a workload sends leaves its host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Commit {
    /// At once. A takeover may lose what clients were told since the epoch that it restores.
    #[default]
    Async,
    /// When the standby has committed the epoch that it depends on. No client is ever told what a takeover could lose.
    Output,
}

impl std::str::FromStr for Commit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "async" => Ok(Self::Async),
            "output" => Ok(Self::Output),
            _ => Err(format!("{text:?} is neither async nor output")),
        }
    }
}

impl std::fmt::Display for Commit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Async => "async",
            Self::Output => "output",
        })
    }
}

/// What the operator wants of the pace of epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PaceSpec {
    /// When the next one starts.
    pub mode: PaceMode,
    /// Most of its time that the workload may be frozen for, in percent; epochs get rarer to keep it. None: what its mode of
    /// commit has ([`Self::within`]).
    pub frozen_percent_max: Option<u8>,
}

/// When the next epoch starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PaceMode {
    /// So many milliseconds after the last one.
    EveryMs(u64),
    /// So that what the standby holds is at most so many milliseconds old, with as few epochs as that needs.
    LagMs(u64),
    /// As soon as the last one is captured.
    Continuous,
}

/// The shortest time that may be asked for, milliseconds.
pub const PACE_MS_MIN: u64 = 10;
/// The longest.
pub const PACE_MS_MAX: u64 = 3_600_000;
/// The most that a workload may be frozen for: with more it would hardly run.
pub const FROZEN_PERCENT_MAX: u8 = 90;
/// For so much of its time a workload may be frozen unless said otherwise.
pub const FROZEN_PERCENT: u8 = 25;
/// The same where its clients wait for epochs: what it loses, they gain.
pub const FROZEN_PERCENT_OF_OUTPUT: u8 = 50;
/// And of one that sleeps meanwhile, as one does that waits for its clients: it loses nothing.
pub const FROZEN_PERCENT_ASLEEP: u8 = 80;

impl Default for PaceSpec {
    fn default() -> Self {
        Self { mode: PaceMode::EveryMs(200), frozen_percent_max: None }
    }
}

/// Why a pace cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PaceSpecError {
    /// Too short or too long.
    #[error("an interval or a lag of {0} ms cannot be kept: --every and --lag take 10ms to 1h")]
    Time(u64),
    /// Too much or nothing.
    #[error(
        "a workload cannot be frozen for {0} % of its time: --max-frozen takes 1 to {FROZEN_PERCENT_MAX}"
    )]
    Frozen(u8),
}

impl PaceSpec {
    /// Whether it can be kept.
    pub fn check(&self) -> Result<(), PaceSpecError> {
        match self.mode {
            PaceMode::EveryMs(ms) | PaceMode::LagMs(ms) if !(PACE_MS_MIN..=PACE_MS_MAX).contains(&ms) => {
                Err(PaceSpecError::Time(ms))
            }
            _ => match self.frozen_percent_max {
                Some(percent) if !(1..=FROZEN_PERCENT_MAX).contains(&percent) => {
                    Err(PaceSpecError::Frozen(percent))
                }
                _ => Ok(()),
            },
        }
    }

    /// What is meant where it says nothing.
    #[must_use]
    pub fn within(self, commit: Commit) -> Self {
        let usual = match commit {
            Commit::Async => FROZEN_PERCENT,
            Commit::Output => FROZEN_PERCENT_OF_OUTPUT,
        };
        Self { frozen_percent_max: self.frozen_percent_max.or(Some(usual)), ..self }
    }
}

/// As the commands print it.
impl std::fmt::Display for PaceMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::EveryMs(ms) => write!(f, "every {ms} ms"),
            Self::LagMs(ms) => write!(f, "lag at most {ms} ms"),
            Self::Continuous => f.write_str("continuous"),
        }
    }
}
