//! What this host needs to protect a workload, each prerequisite tried for real.
//!
//! | file | owns |
//! |---|---|
//! | `host` | user, capabilities, architecture, kernel release, clocks |
//! | `kernel` | the features of memory tracking, and which tracker follows from them |
//! | `criu` | CRIU, its version, a dump and restore of a process that holds a TCP connection |
//! | `network` | iproute2, a veth pair, the lease that the kernel keeps, nftables, the agent's port |
//! | `firewall` | others' rules in the packet filter |
//! | `space` | cgroups, directories and their room |
//! | `engines` | the engines whose containers can be protected |
//! | `render` | the report for people |
//! | [`peer`] | this host compared with a paired one |
//!
//! Invariant: nothing is left behind, however the doctor ends. What it makes lies in namespaces that end with
//! it, in files without a name, or (one cgroup directory) is made and removed while signals wait.

mod criu;
mod engines;
mod firewall;
mod host;
mod kernel;
mod network;
pub mod peer;
mod render;
mod space;

use std::{borrow::Cow, collections::BTreeSet, panic::resume_unwind, path::Path};

use serde::{Deserialize, Serialize};

pub use self::render::render;
use crate::{capture::Tracking, config::Config};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Worth knowing, and nothing to be done.
    Note,
    /// Protection works, with a drawback.
    Warn,
    /// Nothing can be protected until this is remedied.
    Fail,
}

/// What a check is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// The machine, and what the doctor may do on it.
    Host,
    /// The processor.
    Cpu,
    /// Memory tracking.
    Kernel,
    /// CRIU.
    Criu,
    /// Sandboxes' networks and the agent's own port.
    Network,
    /// Cgroups, directories, room.
    Space,
    /// Engines of containers.
    Engines,
    /// What a workload uses of its host.
    Workloads,
}

/// One prerequisite.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Its name, in kebab-case, the same in every version.
    pub id: Cow<'static, str>,
    /// What it is about.
    pub group: Group,
    /// How it came out.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do; none if all is well.
    pub remedy: Option<String>,
}

impl Check {
    fn ok(group: Group, id: impl Into<Cow<'static, str>>, found: impl Into<String>) -> Self {
        Self { id: id.into(), group, state: State::Ok, found: found.into(), remedy: None }
    }

    fn note(group: Group, id: impl Into<Cow<'static, str>>, found: impl Into<String>) -> Self {
        Self { state: State::Note, ..Self::ok(group, id, found) }
    }

    fn warn(
        group: Group,
        id: impl Into<Cow<'static, str>>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { id: id.into(), group, state: State::Warn, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn fail(
        group: Group,
        id: impl Into<Cow<'static, str>>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { state: State::Fail, ..Self::warn(group, id, found, remedy) }
    }
}

/// What was found on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether a workload can be protected: no check has failed.
    pub ok: bool,
    /// The dirty tracker that is used here.
    pub tracker: Option<Tracking>,
    /// The version of the CRIU that was found, too old or not.
    pub criu_version: Option<String>,
    /// The prerequisites, those of a group together.
    pub checks: Vec<Check>,
}

impl Report {
    fn new(tracker: Option<Tracking>, criu_version: Option<String>, checks: Vec<Check>) -> Self {
        let ok = checks.iter().all(|check| check.state != State::Fail);
        Self { ok, tracker, criu_version, checks }
    }

    /// The ids of the checks that came out so.
    pub fn ids(&self, state: State) -> Vec<&str> {
        ids(&self.checks, state)
    }
}

/// The ids of those that came out so, each once.
fn ids(checks: &[Check], state: State) -> Vec<&str> {
    let mut seen = BTreeSet::new();
    let ids = checks.iter().filter(|check| check.state == state).map(|check| check.id.as_ref());
    ids.filter(|id| seen.insert(*id)).collect()
}

/// Examines the host for an agent with these settings. `launcher` is our own program.
pub fn examine(config: &Config, launcher: &Path) -> Report {
    // First, while there is one thread: signals are held back for the thread that asks for it alone.
    let cgroup = space::cgroup();
    let ((criu_checks, criu_version), (kernel_checks, tracker), network) = std::thread::scope(|scope| {
        // The trial takes longer than all the rest. These two change namespaces, so have threads of their own.
        let trial = scope.spawn(|| criu::check(config.criu.as_deref(), launcher));
        let network = scope.spawn(|| network::check(config));
        let kernel = kernel::check(launcher);

        (
            trial.join().unwrap_or_else(|panic| resume_unwind(panic)),
            kernel,
            network.join().unwrap_or_else(|panic| resume_unwind(panic)),
        )
    });
    let mut checks = host::check();
    checks.extend(kernel_checks);
    checks.extend(criu_checks);
    checks.extend(network);
    checks.extend(firewall::check());
    checks.push(cgroup);
    checks.extend(space::directories(config));
    checks.extend(engines::check());
    Report::new(tracker, criu_version, checks)
}

/// Bytes as people read them.
fn human_bytes(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes < 1024 * MIB {
        return format!("{} MiB", bytes / MIB);
    }
    format!("{:.1} GiB", bytes as f64 / (1024 * MIB) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failure_makes_the_host_unfit() {
        let (fine, drawback) =
            (Check::ok(Group::Host, "a", "fine"), Check::warn(Group::Host, "b", "so so", "do b"));
        let report = Report::new(None, None, vec![fine.clone(), drawback.clone()]);
        assert!(report.ok && report.ids(State::Warn) == ["b"]);
        let report =
            Report::new(None, None, vec![fine, drawback, Check::fail(Group::Criu, "c", "no", "do c")]);
        assert!(!report.ok && report.ids(State::Fail) == ["c"]);
    }

    #[test]
    fn the_report_has_the_documented_shape() {
        let checks = vec![Check::warn(Group::Space, "work-dir", "on disk", "use tmpfs")];
        let report = Report::new(Some(Tracking::WriteProtect), Some("4.2.1".to_owned()), checks);
        let expected = serde_json::json!({
            "ok": true, "tracker": "write-protect", "criu_version": "4.2.1",
            "checks": [{"id": "work-dir", "group": "space", "state": "warn", "found": "on disk", "remedy": "use tmpfs"}],
        });
        assert_eq!(serde_json::to_value(&report).unwrap(), expected);
    }
}
