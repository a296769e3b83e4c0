//! The agent's settings: a TOML file and flags, merged into one validated value.
//!
//! A flag wins over the file, the file over the default. Nothing else in the crate reads either.

mod hooks;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    agent::{FenceCommand, HookCommands, WatchdogSettings},
    arbiter,
    delta::REFERENCE_BYTES_MAX,
    ha::{self, Timing, TimingError},
};

pub use self::hooks::HookFailure;

/// Where the agent looks for its file when none is named.
pub const DEFAULT_FILE: &str = "/etc/standin/agent.toml";
/// Where the agent's control socket is unless `run_dir` says otherwise.
pub const DEFAULT_RUN_DIR: &str = "/run/standin";
/// How long a key in etcd lasts: longer than an election there.
const ETCD_TTL: Duration = Duration::from_secs(5);
/// UDP port of the agent.
pub const DEFAULT_PORT: u16 = 7400;

/// Where the warm image is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum StoreKind {
    /// In RAM (tmpfs): survives the agent, not the host.
    #[default]
    Memory,
    /// On disk, synced: survives a reboot of the standby too.
    Disk,
}

/// Who decides that a standby runs a workload, as it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ArbiterKind {
    /// The standby, when its lease to the primary has ended; a primary that gets no lease falls silent.
    #[default]
    Peer,
    /// A command that makes sure that the primary's host is off.
    FenceCommand,
    /// The two hosts and an etcd: either host may be lost, or the link between them, and the other goes on.
    Etcd,
}

/// What a primary does whose standby is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum StandbyLoss {
    /// It falls silent: the standby may have taken over.
    #[default]
    Fence,
    /// It goes on; no standby ever takes over by itself.
    Continue,
}

/// Who decides, with what that needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArbiterConfig {
    /// The standby.
    Peer,
    /// An operator.
    Operator,
    /// A command.
    Command(FenceCommand),
    /// Keys in etcd.
    Etcd(Box<arbiter::Settings>),
}

impl ArbiterConfig {
    /// Its kind, on which both hosts must agree.
    pub fn kind(&self) -> ha::Arbiter {
        match self {
            Self::Peer => ha::Arbiter::Peer,
            Self::Operator => ha::Arbiter::Operator,
            Self::Command(_) => ha::Arbiter::Command,
            Self::Etcd(_) => ha::Arbiter::Store,
        }
    }

    /// The command, if that decides.
    pub fn command(&self) -> Option<&FenceCommand> {
        match self {
            Self::Command(command) => Some(command),
            Self::Peer | Self::Operator | Self::Etcd(_) => None,
        }
    }

    /// How etcd is reached, if that decides.
    pub fn etcd(&self) -> Option<&arbiter::Settings> {
        match self {
            Self::Etcd(settings) => Some(settings),
            Self::Peer | Self::Operator | Self::Command(_) => None,
        }
    }
}

/// The settings as written, in the file or as flags; every one is optional.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// This host's name, as its peers will call it [default: the host name]
    #[arg(long)]
    pub name: Option<String>,
    /// Address and UDP port on which peers reach this agent [default: 0.0.0.0:7400]
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// Durable state: identity, peers, terms [default: /var/lib/standin]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Control socket and sandboxes [default: /run/standin]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Where warm images are kept: in RAM or on disk [default: memory]
    #[arg(long, value_enum)]
    pub store: Option<StoreKind>,
    /// Directory of the store [default: /dev/shm/standin/store, or STATE_DIR/store with --store disk]
    #[arg(long, value_name = "DIR")]
    pub store_dir: Option<PathBuf>,
    /// Scratch space in RAM (tmpfs) for CRIU's small images [default: /dev/shm/standin/work]
    #[arg(long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Memory for each protected workload's copies of pages as the standby holds them, in MiB; 0: pages are sent whole
    /// [default: 256]
    #[arg(long, value_name = "MIB")]
    pub reference_mb: Option<u32>,
    /// The CRIU to use [default: /opt/standin/criu if there, else the distribution's]
    #[arg(long, value_name = "FILE")]
    pub criu: Option<PathBuf>,
    /// Time between two lease renewals, in milliseconds [default: 50]
    #[arg(long, value_name = "MS")]
    pub heartbeat_ms: Option<u64>,
    /// How long a lease lasts, in milliseconds; the standby takes over when it has run out [default: 300]
    #[arg(long, value_name = "MS")]
    pub lease_ms: Option<u64>,
    /// Time kept free before the lease ends for freezing and silencing the workload [default: lease / 6]
    #[arg(long, value_name = "MS")]
    pub fence_margin_ms: Option<u64>,
    /// A hardware watchdog that resets this host if the guard of a workload does not fire in time; needs a lease of more than a
    /// second [default: none]
    #[arg(long, value_name = "DEVICE")]
    pub watchdog: Option<PathBuf>,
    /// Who decides that this host, as a standby, runs a workload; both hosts must say the same [default: peer]
    #[arg(long, value_enum)]
    pub arbiter: Option<ArbiterKind>,
    /// With `--arbiter peer`: what a primary does that has lost its standby. `continue` means that no standby ever takes over by
    /// itself: only `standin failover` does it [default: fence]
    #[arg(long, value_enum)]
    pub on_standby_loss: Option<StandbyLoss>,
    /// With `--arbiter fence-command`: the program that switches a peer's host off; it gets the peer's name, and ends with 0 when
    /// that host is off for sure
    #[arg(long, value_name = "FILE")]
    pub fence_command: Option<PathBuf>,
    /// How long the fence command may take, in milliseconds [default: 30000]
    #[arg(long, value_name = "MS")]
    pub fence_timeout_ms: Option<u64>,
    /// How often the fence command is tried again when it fails [default: 2]
    #[arg(long, value_name = "N")]
    pub fence_retries: Option<u32>,
    /// With `--arbiter etcd`: its members, as https://HOST:2379 (http only on this host); may be given several times
    #[arg(long = "etcd-endpoint", value_name = "URL")]
    pub etcd_endpoints: Option<Vec<String>>,
    /// How long a key lasts that is not renewed, in seconds, 2 or more: a standby takes over no earlier [default: 5]
    #[arg(long, value_name = "S")]
    pub etcd_ttl_s: Option<u64>,
    /// What the keys' names begin with, for hosts that share an etcd with others [default: /standin]
    #[arg(long, value_name = "TEXT")]
    pub etcd_prefix: Option<String>,
    /// The authority that signed the members' certificates, PEM
    #[arg(long, value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// This host's certificate for etcd, PEM
    #[arg(long, value_name = "FILE")]
    pub etcd_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE")]
    pub etcd_key: Option<PathBuf>,
    /// The user to log in to etcd as
    #[arg(long, value_name = "NAME")]
    pub etcd_user: Option<String>,
    /// A file with that user's password
    #[arg(long, value_name = "FILE")]
    pub etcd_password_file: Option<PathBuf>,
    /// A program that is run when a workload is heard from this host, for addresses of a cloud, BGP, DNS [default: none]
    #[arg(long, value_name = "FILE")]
    pub on_promote: Option<PathBuf>,
    /// A program that is run when it is not any more: fenced, handed off, replaced [default: none]
    #[arg(long, value_name = "FILE")]
    pub on_demote: Option<PathBuf>,
    /// How long each of them may take, in milliseconds [default: 30000]
    #[arg(long, value_name = "MS")]
    pub hook_timeout_ms: Option<u64>,
    /// What follows when one fails [default: retry]
    #[arg(long, value_enum)]
    pub hook_failure: Option<HookFailure>,
    /// Hold a drill of each workload whose standby this host is so often, as `12h`, `7d`, `30m` [default: never]
    #[arg(long, value_name = "TIME")]
    pub drill_every: Option<String>,
    /// The probe of those drills, for `sh -c`; STANDIN_WORKLOAD tells it of which workload it is [default: none]
    #[arg(long, value_name = "CMD")]
    pub drill_probe: Option<String>,
    /// What is logged: error, warn, info, debug, or a tracing filter [default: info]
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
}

/// The agent's settings, whole and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This host's name.
    pub name: String,
    /// Where peers reach it.
    pub listen: SocketAddr,
    /// Durable state.
    pub state_dir: PathBuf,
    /// Runtime files.
    pub run_dir: PathBuf,
    /// Kind of store.
    pub store: StoreKind,
    /// Directory of the store.
    pub store_dir: PathBuf,
    /// Scratch space in RAM.
    pub work_dir: PathBuf,
    /// Most memory for each workload's copies of pages.
    pub reference_bytes: u64,
    /// A CRIU named by the operator.
    pub criu: Option<PathBuf>,
    /// Heartbeat, lease and margin.
    pub timing: Timing,
    /// What resets this host.
    pub watchdog: Option<WatchdogSettings>,
    /// Who decides that a standby runs a workload.
    pub arbiter: ArbiterConfig,
    /// What is run when a workload's role changes.
    pub hooks: HookCommands,
    /// Time between two drills of a workload.
    pub drill_every: Option<Duration>,
    /// The probe of those drills.
    pub drill_probe: Option<String>,
    /// Log filter.
    pub log: String,
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the settings in {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be (unknown keys included).
    #[error(
        "the settings in {path} are not usable: {message}(the keys are listed by `standin agent --help`)"
    )]
    Parse {
        /// Which file.
        path: PathBuf,
        /// The parser's message, with line and column.
        message: String,
    },
    /// Heartbeat, lease and margin do not go together.
    #[error(transparent)]
    Timing(#[from] TimingError),
    /// The host's name cannot serve.
    #[error("{0:?} cannot be this host's name: use 1 to 63 characters of a-z, 0-9, '-' and '.'; set `name`")]
    Name(String),
    /// The watchdog would not fire in time.
    #[error("{0}")]
    Watchdog(String),
    /// Who decides cannot do so safely.
    #[error("{0}")]
    Arbiter(String),
    /// A hook cannot be run.
    #[error("{0}")]
    Hook(String),
    /// Not a time between drills.
    #[error(
        "`drill_every` cannot be {0:?}: write a number with its unit, as 30m, 12h or 7d; 10s at least, 365d at most"
    )]
    DrillEvery(String),
    /// A directory is not absolute.
    #[error("`{key}` must be an absolute path, not {path}")]
    Relative {
        /// Which key.
        key: &'static str,
        /// What it says.
        path: PathBuf,
    },
}

impl Settings {
    /// Reads a settings file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text)
            .map_err(|error| ConfigError::Parse { path: path.to_owned(), message: error.to_string() })
    }

    /// These settings, completed by `other` where nothing is said here.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            name: self.name.or(other.name),
            listen: self.listen.or(other.listen),
            state_dir: self.state_dir.or(other.state_dir),
            run_dir: self.run_dir.or(other.run_dir),
            store: self.store.or(other.store),
            store_dir: self.store_dir.or(other.store_dir),
            work_dir: self.work_dir.or(other.work_dir),
            reference_mb: self.reference_mb.or(other.reference_mb),
            criu: self.criu.or(other.criu),
            heartbeat_ms: self.heartbeat_ms.or(other.heartbeat_ms),
            lease_ms: self.lease_ms.or(other.lease_ms),
            fence_margin_ms: self.fence_margin_ms.or(other.fence_margin_ms),
            watchdog: self.watchdog.or(other.watchdog),
            arbiter: self.arbiter.or(other.arbiter),
            on_standby_loss: self.on_standby_loss.or(other.on_standby_loss),
            fence_command: self.fence_command.or(other.fence_command),
            fence_timeout_ms: self.fence_timeout_ms.or(other.fence_timeout_ms),
            fence_retries: self.fence_retries.or(other.fence_retries),
            etcd_endpoints: self.etcd_endpoints.or(other.etcd_endpoints),
            etcd_ttl_s: self.etcd_ttl_s.or(other.etcd_ttl_s),
            etcd_prefix: self.etcd_prefix.or(other.etcd_prefix),
            etcd_ca: self.etcd_ca.or(other.etcd_ca),
            etcd_cert: self.etcd_cert.or(other.etcd_cert),
            etcd_key: self.etcd_key.or(other.etcd_key),
            etcd_user: self.etcd_user.or(other.etcd_user),
            etcd_password_file: self.etcd_password_file.or(other.etcd_password_file),
            on_promote: self.on_promote.or(other.on_promote),
            on_demote: self.on_demote.or(other.on_demote),
            hook_timeout_ms: self.hook_timeout_ms.or(other.hook_timeout_ms),
            hook_failure: self.hook_failure.or(other.hook_failure),
            drill_every: self.drill_every.or(other.drill_every),
            drill_probe: self.drill_probe.or(other.drill_probe),
            log: self.log.or(other.log),
        }
    }

    /// Fills in the defaults and checks the whole.
    pub fn validate(self) -> Result<Config, ConfigError> {
        let (arbiter, hooks) = (self.arbiter()?, self.hooks()?);
        let name = self.name.unwrap_or_else(host_name);
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
        if !(1..=63).contains(&name.len()) || !name.bytes().all(allowed) || name.starts_with(['-', '.']) {
            return Err(ConfigError::Name(name));
        }
        let state_dir = self.state_dir.unwrap_or_else(|| "/var/lib/standin".into());
        let store = self.store.unwrap_or_default();
        let store_dir = self.store_dir.unwrap_or_else(|| match store {
            StoreKind::Memory => "/dev/shm/standin/store".into(),
            StoreKind::Disk => state_dir.join("store"),
        });
        let run_dir = self.run_dir.unwrap_or_else(|| DEFAULT_RUN_DIR.into());
        let work_dir = self.work_dir.unwrap_or_else(|| "/dev/shm/standin/work".into());
        for (key, path) in [
            ("state_dir", &state_dir),
            ("store_dir", &store_dir),
            ("run_dir", &run_dir),
            ("work_dir", &work_dir),
        ]
        .into_iter()
        .chain(self.watchdog.as_ref().map(|path| ("watchdog", path)))
        {
            if !path.is_absolute() {
                return Err(ConfigError::Relative { key, path: path.clone() });
            }
        }
        let lease = Duration::from_millis(self.lease_ms.unwrap_or(300));
        let timing = Timing::for_lease(Duration::from_millis(self.heartbeat_ms.unwrap_or(50)), lease);
        let fence_margin = self.fence_margin_ms.map_or(timing.fence_margin, Duration::from_millis);
        let timing = Timing { fence_margin, ..timing };
        timing.validate()?;
        let watchdog = self.watchdog.map(|path| WatchdogSettings::of(path, &timing)).transpose();
        let watchdog = watchdog.map_err(ConfigError::Watchdog)?;
        let drill_every = self.drill_every.as_deref().map(drill_interval).transpose()?;
        Ok(Config {
            drill_every,
            drill_probe: self.drill_probe,
            name,
            listen: self.listen.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT))),
            state_dir,
            run_dir,
            store,
            store_dir,
            work_dir,
            reference_bytes: self.reference_mb.map_or(REFERENCE_BYTES_MAX, |mb| u64::from(mb) << 20),
            criu: self.criu,
            timing,
            watchdog,
            arbiter,
            hooks,
            log: self.log.unwrap_or_else(|| "info".into()),
        })
    }
}

impl Settings {
    /// What is said of etcd, if anything is.
    fn etcd(&self) -> Option<arbiter::Settings> {
        let default = arbiter::Settings { ttl: ETCD_TTL, ..arbiter::Settings::default() };
        let settings = arbiter::Settings {
            endpoints: self.etcd_endpoints.clone().unwrap_or_default(),
            ttl: self.etcd_ttl_s.map_or(default.ttl, Duration::from_secs),
            prefix: self.etcd_prefix.clone().unwrap_or_else(|| default.prefix.clone()),
            ca: self.etcd_ca.clone(),
            cert: self.etcd_cert.clone(),
            key: self.etcd_key.clone(),
            user: self.etcd_user.clone(),
            password_file: self.etcd_password_file.clone(),
            request_timeout: None,
        };
        (settings != default).then_some(settings)
    }

    /// Who decides; refuses what would be unsafe, or means nothing.
    fn arbiter(&self) -> Result<ArbiterConfig, ConfigError> {
        let refused = |why: &str| Err(ConfigError::Arbiter(why.to_owned()));
        let kind = self.arbiter.unwrap_or_default();
        let of_command =
            self.fence_command.is_some() || self.fence_timeout_ms.is_some() || self.fence_retries.is_some();
        if kind != ArbiterKind::FenceCommand && of_command {
            return refused("a fence command is set, but does not decide: set arbiter = \"fence-command\"");
        }
        let etcd = self.etcd();
        if kind != ArbiterKind::Etcd && etcd.is_some() {
            return refused("an etcd is set, but does not decide: set arbiter = \"etcd\"");
        }
        match (kind, self.on_standby_loss) {
            (ArbiterKind::Peer, None | Some(StandbyLoss::Fence)) => Ok(ArbiterConfig::Peer),
            (ArbiterKind::Peer, Some(StandbyLoss::Continue)) => Ok(ArbiterConfig::Operator),
            (ArbiterKind::FenceCommand | ArbiterKind::Etcd, Some(_)) => refused(
                "on_standby_loss is for arbiter = \"peer\": with any other a primary goes on when its standby is lost, so \
                 leave it out",
            ),
            (ArbiterKind::Etcd, None) => Ok(ArbiterConfig::Etcd(Box::new(etcd.unwrap_or_default()))),
            (ArbiterKind::FenceCommand, None) => {
                let Some(program) = self.fence_command.clone() else {
                    return refused(
                        "arbiter is \"fence-command\", but fence_command is not set: name the program",
                    );
                };
                if !program.is_absolute() {
                    return Err(ConfigError::Relative { key: "fence_command", path: program });
                }
                if !is_program(&program) {
                    return refused(&format!(
                        "the fence command {} is not there, or not executable: a standby could never take over",
                        program.display()
                    ));
                }
                let timeout = Duration::from_millis(self.fence_timeout_ms.unwrap_or(30_000));
                if timeout.is_zero() || timeout > Timing::TIME_MAX {
                    return refused("fence_timeout_ms must be more than 0 and no more than an hour");
                }
                let retries = self.fence_retries.unwrap_or(2).min(100);
                Ok(ArbiterConfig::Command(FenceCommand { program, timeout, retries }))
            }
        }
    }
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

impl Config {
    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.run_dir.join("control.sock")
    }

    /// Where workloads' run directories are.
    pub fn sandboxes_dir(&self) -> PathBuf {
        self.run_dir.join("sandboxes")
    }
}

/// A time between drills: a number and its unit.
fn drill_interval(text: &str) -> Result<Duration, ConfigError> {
    const SECONDS: std::ops::RangeInclusive<u64> = 10..=365 * 86_400;
    let (number, unit) = text.split_at(text.len() - text.chars().next_back().map_or(0, char::len_utf8));
    let factor = match unit {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        "d" => Some(86_400),
        _ => None,
    };
    let seconds =
        number.parse::<u64>().ok().zip(factor).and_then(|(number, factor)| number.checked_mul(factor));
    match seconds.filter(|seconds| SECONDS.contains(seconds)) {
        Some(seconds) => Ok(Duration::from_secs(seconds)),
        None => Err(ConfigError::DrillEvery(text.to_owned())),
    }
}

fn host_name() -> String {
    let name = nix::unistd::gethostname().map(|name| name.to_string_lossy().to_lowercase());
    name.ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "localhost".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_named() {
        let error = toml::from_str::<Settings>("leese_ms = 3").unwrap_err().to_string();
        assert!(error.contains("leese_ms"), "{error}");
    }

    #[test]
    fn a_lease_shorter_than_two_heartbeats_is_refused() {
        let settings = Settings { heartbeat_ms: Some(200), lease_ms: Some(300), ..Settings::default() };
        let error = settings.validate().unwrap_err().to_string();
        assert!(error.contains("lease"), "{error}");
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let flags = Settings { lease_ms: Some(900), ..Settings::default() };
        let file: Settings = toml::from_str("lease_ms = 500\nheartbeat_ms = 20").unwrap();
        let config = flags.or(file).validate().unwrap();
        assert_eq!(config.timing.lease, Duration::from_millis(900));
        assert_eq!(config.timing.heartbeat, Duration::from_millis(20));
    }

    #[test]
    fn who_decides_is_whole_or_refused() {
        let arbiter = |text: &str| {
            let settings: Settings = toml::from_str(text).unwrap();
            settings.validate().map(|config| config.arbiter).map_err(|error| error.to_string())
        };
        assert_eq!(arbiter(""), Ok(ArbiterConfig::Peer));
        assert_eq!(arbiter("on_standby_loss = \"continue\""), Ok(ArbiterConfig::Operator));
        let program = std::env::current_exe().unwrap();
        let with = |more: &str| format!("arbiter = \"fence-command\"\n{more}");
        let command = arbiter(&with(&format!("fence_command = {program:?}\nfence_retries = 0"))).unwrap();
        assert_eq!(
            command.command().map(|command| (command.timeout.as_secs(), command.retries)),
            Some((30, 0))
        );
        for (text, word) in [
            ("fence_retries = 1".to_owned(), "does not decide"),
            (with(""), "not set"),
            (with("fence_command = \"fence\""), "absolute"),
            (with("fence_command = \"/proc/version\""), "not executable"),
            (with(&format!("fence_command = {program:?}\non_standby_loss = \"fence\"")), "leave it out"),
            (with(&format!("fence_command = {program:?}\nfence_timeout_ms = 0")), "fence_timeout_ms"),
        ] {
            let refused = arbiter(&text).unwrap_err();
            assert!(refused.contains(word), "{refused}");
        }
    }

    #[test]
    fn a_time_between_drills_has_a_unit_and_limits() {
        let every = |text: &str| {
            Settings { drill_every: Some(text.into()), ..Settings::default() }
                .validate()
                .map(|config| config.drill_every)
        };
        assert_eq!(every("12h").unwrap(), Some(Duration::from_secs(43_200)));
        assert_eq!(every("7d").unwrap(), Some(Duration::from_secs(604_800)));
        for wrong in
            ["", "12", "h", "1s", "400d", "-3h", "1.5h", "12 Stunden", "99999999999999999999d", "3\u{b5}"]
        {
            assert!(matches!(every(wrong), Err(ConfigError::DrillEvery(_))), "{wrong}");
        }
    }

    #[test]
    fn the_drift_allowance_grows_with_the_lease() {
        let config = Settings { lease_ms: Some(3000), ..Settings::default() }.validate().unwrap();
        assert_eq!(config.timing.drift, Duration::from_millis(60));
    }

    #[test]
    fn a_relative_directory_is_refused() {
        let settings = Settings { state_dir: Some("state".into()), ..Settings::default() };
        assert!(matches!(settings.validate(), Err(ConfigError::Relative { key: "state_dir", .. })));
    }
}
