//! The lab for tests: two hosts, a client and a switch made of namespaces by `scripts/lab`, which says what they are.
//!
//! Each [`Lab`] has a name of its own, so tests that run at the same time do not meet. It goes when it is dropped; should
//! this process die first, however it dies, the lab's watcher takes it down.

use std::ffi::OsStr;
use std::fmt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio, id};
use std::sync::atomic::{AtomicU32, Ordering};

const LAB_SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/lab");

/// The `standin` that cargo built for this test run; hosts see it at the same path.
pub(crate) const STANDIN: &str = env!("CARGO_BIN_EXE_standin");

/// How much of a test's hint goes into the lab's name, which may have 40 characters in all.
const HINT_CHARS_MAX: usize = 16;

/// The cgroup of a workload's processes on any host: the lab gives each host a hierarchy of version 2 at this place, whatever
/// the machine has.
pub(crate) fn work_cgroup(workload: &str) -> String {
    format!("/sys/fs/cgroup/standin/{workload}/work")
}

/// A machine of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    /// 10.77.0.1, fd77::1
    A,
    /// 10.77.0.2, fd77::2
    B,
    /// 10.77.0.9, fd77::9
    Client,
}

impl Host {
    pub(crate) const ALL: [Self; 3] = [Self::A, Self::B, Self::Client];

    pub(crate) fn ipv4(self) -> &'static str {
        match self {
            Self::A => "10.77.0.1",
            Self::B => "10.77.0.2",
            Self::Client => "10.77.0.9",
        }
    }

    pub(crate) fn ipv6(self) -> &'static str {
        match self {
            Self::A => "fd77::1",
            Self::B => "fd77::2",
            Self::Client => "fd77::9",
        }
    }
}

/// As `scripts/lab` spells it.
impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A => "A",
            Self::B => "B",
            Self::Client => "client",
        })
    }
}

/// A lab that is up for as long as this value lives.
pub(crate) struct Lab {
    name: String,
}

impl Lab {
    /// Makes a lab; `hint` (a few of a-z, 0-9, -) lets a person recognise it in a process list.
    ///
    /// # Panics
    /// If it cannot be made: nearly always because the test does not run as root.
    pub(crate) fn up(hint: &str) -> Self {
        Self::up_with(hint, id(), &[])
    }

    /// As [`Lab::up`], with what controllers of cgroups this machine has: they are with version 1 or with version 2.
    pub(crate) fn hybrid(hint: &str) -> Self {
        Self::up_with(hint, id(), &["--hybrid"])
    }

    /// For a lab that goes with the process `owner_pid`; `flags` of `scripts/lab up`.
    pub(crate) fn up_with(hint: &str, owner_pid: u32, flags: &[&str]) -> Self {
        static LABS: AtomicU32 = AtomicU32::new(0);
        assert!(
            nix::unistd::geteuid().is_root(),
            "the integration tests make namespaces and dump processes: run them as root"
        );
        let hint: String = hint.chars().take(HINT_CHARS_MAX).collect();
        let lab = Self { name: format!("{hint}-{}-{}", id(), LABS.fetch_add(1, Ordering::Relaxed)) };
        let programs = Path::new(STANDIN).parent().expect("an executable has a directory");
        let (owner_pid, programs) = (owner_pid.to_string(), programs.to_string_lossy());
        lab.verb(&[&["up", "--owner", &owner_pid, "--share", &programs], flags].concat());
        lab
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A command that will run `args` on `host`, for callers who set its stdin and outputs themselves.
    ///
    /// Killing the child that it spawns kills the command on the host too, though not what that has forked.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, host: Host, args: &[S]) -> Command {
        let mut command = self.script();
        command.arg("on").arg(host.to_string()).args(args);
        command
    }

    /// Runs `args` on `host` to its end, without stdin.
    pub(crate) fn on<S: AsRef<OsStr>>(&self, host: Host, args: &[S]) -> Output {
        self.command(host, args).stdin(Stdio::null()).output().expect("scripts/lab can be run")
    }

    /// Runs `args` on `host`, which must succeed; returns its stdout.
    pub(crate) fn ok<S: AsRef<OsStr> + fmt::Debug>(&self, host: Host, args: &[S]) -> String {
        let output = self.on(host, args);
        assert!(output.status.success(), "on host {host}, {args:?}: {}", describe(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Starts `args` on `host`, with neither stdin nor outputs; see [`Lab::command`].
    pub(crate) fn spawn<S: AsRef<OsStr>>(&self, host: Host, args: &[S]) -> Child {
        self.command(host, args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("scripts/lab can be run")
    }

    /// Cuts the power of `host`.
    pub(crate) fn kill(&self, host: Host) {
        self.verb(&["kill", &host.to_string()]);
    }

    /// Starts `host` again after [`Lab::kill`], with its disk.
    pub(crate) fn boot(&self, host: Host) {
        self.verb(&["boot", &host.to_string()]);
    }

    /// Cuts `host` off from everybody.
    pub(crate) fn cut(&self, host: Host) {
        self.verb(&["cut", &host.to_string()]);
    }

    /// Cuts `one` off from `other`; both still reach the third.
    pub(crate) fn cut_between(&self, one: Host, other: Host) {
        self.verb(&["cut", &format!("{one}-{other}")]);
    }

    /// Lets nothing pass from `one` to `other`, which `one` still hears.
    pub(crate) fn cut_one_way(&self, one: Host, other: Host) {
        self.verb(&["cut", &format!("{one}>{other}")]);
    }

    /// Whether `host` has power.
    pub(crate) fn is_up(&self, host: Host) -> bool {
        self.on(host, &["true"]).status.success()
    }

    /// Undoes all cuts.
    pub(crate) fn heal(&self) {
        self.verb(&["heal"]);
    }

    /// Pid of a host's init, as this machine sees it.
    pub(crate) fn pid(&self, host: Host) -> u32 {
        let file = format!("/run/standin-lab.{}/{host}/pid", self.name);
        let text = std::fs::read_to_string(&file).expect("the host is up");
        text.trim().parse().expect("a pid")
    }

    fn script(&self) -> Command {
        let mut command = Command::new(LAB_SCRIPT);
        command.args(["--name", &self.name]);
        command
    }

    fn verb(&self, args: &[&str]) {
        let output = self.script().args(args).stdin(Stdio::null()).output().expect("scripts/lab can be run");
        assert!(output.status.success(), "lab {}: {args:?}: {}", self.name, describe(&output));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let down = self.script().arg("down").stdin(Stdio::null()).output();
        // A test that fails already must not abort on a second panic.
        if !std::thread::panicking() {
            let output = down.expect("scripts/lab can be run");
            assert!(output.status.success(), "lab {}: down: {}", self.name, describe(&output));
        }
    }
}

/// How a command ended and what it said.
fn describe(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
