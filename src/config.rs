//! The agent's settings: a TOML file and flags, merged into one validated value.
//!
//! A flag wins over the file, the file over the default. Nothing else in the crate reads either.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    delta::REFERENCE_BYTES_MAX,
    ha::{Timing, TimingError},
};

/// Where the agent looks for its file when none is named.
pub const DEFAULT_FILE: &str = "/etc/standin/agent.toml";
/// Where the agent's control socket is unless `run_dir` says otherwise.
pub const DEFAULT_RUN_DIR: &str = "/run/standin";
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
            drill_every: self.drill_every.or(other.drill_every),
            drill_probe: self.drill_probe.or(other.drill_probe),
            log: self.log.or(other.log),
        }
    }

    /// Fills in the defaults and checks the whole.
    pub fn validate(self) -> Result<Config, ConfigError> {
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
        ] {
            if !path.is_absolute() {
                return Err(ConfigError::Relative { key, path: path.clone() });
            }
        }
        let lease = Duration::from_millis(self.lease_ms.unwrap_or(300));
        let timing = Timing {
            heartbeat: Duration::from_millis(self.heartbeat_ms.unwrap_or(50)),
            lease,
            fence_margin: self.fence_margin_ms.map_or(lease / 6, Duration::from_millis),
            ..Timing::default()
        };
        timing.validate()?;
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
            log: self.log.unwrap_or_else(|| "info".into()),
        })
    }
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
    fn a_relative_directory_is_refused() {
        let settings = Settings { state_dir: Some("state".into()), ..Settings::default() };
        assert!(matches!(settings.validate(), Err(ConfigError::Relative { key: "state_dir", .. })));
    }
}
