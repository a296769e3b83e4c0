//! Which CRIU is used, how it is started, and its version.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Where a CRIU is looked for, in this order. The search path is not consulted: what runs as root
/// inside a workload's namespaces must not depend on somebody's environment.
pub const PLACES: [&str; 4] =
    ["/opt/standin/criu/bin/criu", "/usr/local/sbin/criu", "/usr/sbin/criu", "/usr/bin/criu"];

/// The oldest CRIU whose page server and options are known to fit.
pub const VERSION_MIN: Version = Version(4, 0, 0);

/// How long a program may take to say its version: one that hangs is none that we could use.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);
const VERSION_POLL: Duration = Duration::from_millis(2);

/// CRIU's version: major, minor, sublevel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u32, pub u32, pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl Version {
    /// Reads the `Version: 4.2.1` line of `criu --version`; a missing sublevel is 0.
    pub fn parse(output: &str) -> Option<Self> {
        let text = output.lines().find_map(|line| line.strip_prefix("Version:"))?.trim();
        let mut parts = text.split(['.', '-', ' ']).map_while(|part| part.parse::<u32>().ok());
        Some(Self(parts.next()?, parts.next()?, parts.next().unwrap_or(0)))
    }
}

/// Why no CRIU can be used.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// There is none.
    #[error(
        "no CRIU at {}: run scripts/setup, which puts one under /opt/standin, or `apt install criu`",
        looked.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    Missing {
        /// Paths looked at.
        looked: Vec<PathBuf>,
    },
    /// It does not start.
    #[error("{path} --version failed: {why}. Reinstall it: scripts/setup, or `apt install criu`", path = .path.display())]
    Broken {
        /// The CRIU tried.
        path: PathBuf,
        /// What happened.
        why: String,
    },
    /// It is too old.
    #[error(
        "{path} is CRIU {found}, and {VERSION_MIN} is the oldest that serves: run scripts/setup for a newer one",
        path = .path.display()
    )]
    TooOld {
        /// The CRIU tried.
        path: PathBuf,
        /// Its version.
        found: Version,
    },
}

/// A CRIU that can be started.
#[derive(Clone, Debug)]
pub struct Install {
    /// The path by which it was found.
    pub path: PathBuf,
    /// Its version.
    pub version: Version,
    /// Our own program, whose hidden verb `enter` starts CRIU inside namespaces.
    launcher: PathBuf,
    command: Vec<PathBuf>,
}

impl Install {
    /// Finds CRIU at `explicit`, or at the first of [`PLACES`] that exists, and asks its version.
    pub fn find(explicit: Option<&Path>) -> Result<Self, InstallError> {
        let looked: Vec<PathBuf> = match explicit {
            Some(path) => vec![path.to_owned()],
            None => PLACES.iter().map(PathBuf::from).collect(),
        };
        let Some(path) = looked.iter().find(|path| path.is_file()).cloned() else {
            return Err(InstallError::Missing { looked });
        };
        let command = direct_command(&path);
        let version = ask_version(&path, &command)?;
        if version < VERSION_MIN {
            return Err(InstallError::TooOld { path, found: version });
        }
        Ok(Self { path, version, launcher: "/proc/self/exe".into(), command })
    }

    /// Uses `launcher` for the `enter` verb in place of the running program (which in a test is the
    /// test itself).
    #[must_use]
    pub fn with_launcher(mut self, launcher: PathBuf) -> Self {
        self.launcher = launcher;
        self
    }

    pub(super) fn launcher(&self) -> &Path {
        &self.launcher
    }

    /// Program and leading arguments with which this CRIU is executed.
    pub fn command(&self) -> &[PathBuf] {
        &self.command
    }
}

/// A private CRIU (`PREFIX/bin/criu` is a shell wrapper, `PREFIX/root` its unpacked packages) is
/// started through its own dynamic linker without the wrapper: the preload library would otherwise
/// be loaded into the shell, and a start would cost another program.
fn direct_command(path: &Path) -> Vec<PathBuf> {
    let private = path.parent().and_then(Path::parent).and_then(|prefix| {
        let libraries = prefix.join("root/usr/lib/x86_64-linux-gnu");
        let linker = libraries.join("ld-linux-x86-64.so.2");
        let binary = prefix.join("root/usr/sbin/criu");
        (linker.is_file() && binary.is_file())
            .then(|| vec![linker, "--library-path".into(), libraries, binary])
    });
    private.unwrap_or_else(|| vec![path.to_owned()])
}

fn ask_version(path: &Path, command: &[PathBuf]) -> Result<Version, InstallError> {
    let broken = |why: String| InstallError::Broken { path: path.to_owned(), why };
    let mut asked = Command::new(&command[0])
        .args(&command[1..])
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| broken(error.to_string()))?;
    let deadline = Instant::now() + VERSION_TIMEOUT;
    // The answer fits into the pipes.
    while asked.try_wait().map_err(|error| broken(error.to_string()))?.is_none() {
        if Instant::now() > deadline {
            let _ = asked.kill();
            let _ = asked.wait();
            return Err(broken(format!("it did not say its version within {} s", VERSION_TIMEOUT.as_secs())));
        }
        std::thread::sleep(VERSION_POLL);
    }
    let output = asked.wait_with_output().map_err(|error| broken(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Version::parse(&text).ok_or_else(|| {
        let said = String::from_utf8_lossy(&output.stderr);
        broken(format!("{}, and it said {:?}", output.status, said.lines().next().unwrap_or(&text)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_criu_prints_them() {
        assert_eq!(Version::parse("Version: 4.2.1\nGitID: 0\n"), Some(Version(4, 2, 1)));
        assert_eq!(Version::parse("Version: 4.2\n"), Some(Version(4, 2, 0)));
        assert_eq!(Version::parse("Version: 4.1-rc1\n"), Some(Version(4, 1, 0)));
        assert_eq!(Version::parse("criu: command not found"), None);
        assert!(Version(3, 17, 1) < VERSION_MIN && Version(4, 2, 1) > VERSION_MIN);
    }

    #[test]
    fn a_missing_criu_is_reported_with_the_remedy() {
        let error = Install::find(Some(Path::new("/nonexistent/criu"))).unwrap_err();
        assert!(error.to_string().contains("scripts/setup"), "{error}");
    }
}
