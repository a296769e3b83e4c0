//! Hosts, networks and sandboxes for the tests, each removed when it goes out of scope.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command as Process,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use standin::{
    model::Name,
    workload::{
        control::{Command, Root, User},
        network::within,
        sandbox::{Options, Sandbox},
        spec::{Net, SandboxSpec},
    },
};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_standin");
pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// A name that no other test has.
pub(crate) fn unique(prefix: &str) -> Name {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed)).parse().unwrap()
}

/// A network namespace; it ends with its last user.
pub(crate) struct Netns(pub(crate) OwnedFd);

impl Netns {
    pub(crate) fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            Self(File::open("/proc/thread-self/ns/net").unwrap().into())
        };
        let netns = std::thread::spawn(make).join().unwrap();
        netns.ip("link set lo up");
        netns
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(self.0.as_fd(), work).unwrap()
    }

    pub(crate) fn ip(&self, arguments: &str) {
        self.run(|| ip(arguments));
    }

    pub(crate) fn output(&self, command: &str) -> String {
        self.run(|| output(command))
    }

    pub(crate) fn pings(&self, addr: &str) -> bool {
        self.run(|| {
            let status = Process::new("ping").args(["-c1", "-W1", addr]).output().unwrap().status;
            status.success()
        })
    }
}

/// Runs `ip`, which must succeed.
pub(crate) fn ip(arguments: &str) {
    let out = Process::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(out.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&out.stderr));
}

/// What a command writes to its standard output.
pub(crate) fn output(command: &str) -> String {
    let mut words = command.split(' ');
    let out = Process::new(words.next().unwrap()).args(words).output().unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// A switch with namespaces plugged into it, whose device is `lan0`.
pub(crate) struct Lan {
    switch: Netns,
    ports: u32,
}

impl Lan {
    pub(crate) fn new() -> Self {
        let switch = Netns::new();
        switch.ip("link add br0 type bridge");
        switch.ip("link set br0 up");
        Self { switch, ports: 0 }
    }

    pub(crate) fn plug(&mut self, cidrs: &[&str]) -> Netns {
        let host = Netns::new();
        self.ports += 1;
        let port = format!("p{}", self.ports);
        self.switch.run(|| {
            // `ip` names a namespace by a process or a file; the descriptor is a file of this process.
            let file =
                format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&host.0));
            ip(&format!("link add {port} type veth peer name lan0 netns {file}"));
            ip(&format!("link set {port} master br0 up"));
        });
        for cidr in cidrs {
            let nodad = if cidr.contains(':') { " nodad" } else { "" };
            host.ip(&format!("addr add {cidr} dev lan0{nodad}"));
        }
        host.ip("link set lan0 up");
        host
    }
}

/// A host's directories and one sandbox on it.
pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) spec: SandboxSpec,
}

impl Place {
    pub(crate) fn new(name: &Name, net: Net) -> Self {
        let spec = SandboxSpec { name: name.clone(), net, paths: Vec::new(), hostname: "box".to_owned() };
        Self { dir: tempfile::tempdir().unwrap(), spec }
    }

    pub(crate) fn options(&self) -> Options {
        Options {
            program: PROGRAM.into(),
            run_dir: self.run_dir(),
            data_dir: self.dir.path().join("data"),
            shm_dir: self.dir.path().join("shm"),
            log: self.log(),
            log_bytes_max: 1 << 20,
            isolated: None,
        }
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    pub(crate) fn create(&self) -> Sandbox {
        Sandbox::create(&self.spec, &self.options()).unwrap()
    }

    pub(crate) fn open(&self) -> Sandbox {
        Sandbox::open(&self.run_dir(), &self.spec.name).unwrap()
    }

    /// Waits until the log contains the text.
    pub(crate) fn await_log(&self, text: &str) {
        await_true(&format!("{text:?} in the log"), || {
            std::fs::read_to_string(self.log()).is_ok_and(|log| log.contains(text))
        });
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Sandbox::destroy(&self.run_dir(), &self.spec.name);
    }
}

/// A shell command as the workload.
pub(crate) fn shell(script: &str) -> Command {
    Command {
        argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
        cwd: "/".into(),
        user: User::default(),
    }
}

pub(crate) fn start(sandbox: &Sandbox, script: &str) -> Root {
    sandbox.start(&shell(script)).unwrap()
}

pub(crate) fn await_true(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + 10 * SECOND;
    while !done() {
        assert!(Instant::now() < until, "waited 10 s for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The same path on the file system as a process sees it.
pub(crate) fn seen_by(pid: u32, path: &str) -> PathBuf {
    Path::new(&format!("/proc/{pid}/root")).join(path.trim_start_matches('/'))
}
