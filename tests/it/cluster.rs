//! Two paired agents in a lab, with a redis that they protect.

use std::{
    fs::File,
    path::PathBuf,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    lab::{Host, Lab, STANDIN, work_cgroup},
    redis::{Counter, Redis, VIP, inside},
};

/// How long a test waits for something that should take a fraction of it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Two agents that trust each other.
pub(crate) struct Cluster {
    pub(crate) lab: Lab,
    agents: Vec<(Host, Child)>,
    /// More flags for both agents.
    flags: Vec<&'static str>,
}

impl Cluster {
    /// A lab with an agent on each host, paired as `a` and `b`.
    pub(crate) fn up(hint: &str) -> Self {
        Self::with(hint, &[])
    }

    /// The same, with more flags for both agents.
    pub(crate) fn with(hint: &str, flags: &[&'static str]) -> Self {
        Self::strangers(hint, flags).paired()
    }

    /// The same on hosts that can limit what a cgroup takes.
    pub(crate) fn hybrid(hint: &str) -> Self {
        Self::start(Lab::hybrid(hint), &[]).paired()
    }

    fn paired(self) -> Self {
        let code = self.pairing_code();
        self.standin(Host::B, &["pair", "10.77.0.1:7400", &code]);
        self
    }

    /// A lab with an agent on each host that knows nothing of the other.
    pub(crate) fn strangers(hint: &str, flags: &[&'static str]) -> Self {
        Self::start(Lab::up(hint), flags)
    }

    fn start(lab: Lab, flags: &[&'static str]) -> Self {
        let mut cluster = Self { lab, agents: Vec::new(), flags: flags.to_vec() };
        cluster.start_agent(Host::A);
        cluster.start_agent(Host::B);
        cluster
    }

    /// A one-time code that A shows.
    pub(crate) fn pairing_code(&self) -> String {
        let code = self.json(Host::A, &["pair", "--listen"]);
        code["code"].as_str().expect("a code").to_owned()
    }

    /// Starts a host's agent and waits until it answers.
    pub(crate) fn start_agent(&mut self, host: Host) {
        self.start_agent_with(host, &[]);
    }

    /// The same, with more flags.
    pub(crate) fn start_agent_with(&mut self, host: Host, flags: &[&str]) {
        self.start_agent_by(host, &[], flags);
    }

    /// The same, through a command that is told what to run.
    pub(crate) fn start_agent_by(&mut self, host: Host, command: &[&str], flags: &[&str]) {
        let name = host.to_string().to_lowercase();
        let log = self.log(host);
        let log = File::options().create(true).append(true).open(log).expect("a log file");
        let mut args = [command, &[STANDIN, "agent", "--name", &name]].concat();
        if !self.flags.contains(&"--log") {
            args.extend(["--log", "info,standin=debug"]);
        }
        args.extend(&self.flags);
        args.extend(flags);
        let child = self
            .lab
            .command(host, &args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("scripts/lab can be run");
        self.agents.retain(|(other, _)| *other != host);
        self.agents.push((host, child));
        wait_for("the agent to answer", || self.lab.on(host, &[STANDIN, "status"]).status.success());
    }

    /// Where a host's agent logs.
    pub(crate) fn log(&self, host: Host) -> PathBuf {
        format!("/tmp/standin-it-{}-{}.log", self.lab.name(), host.to_string().to_lowercase()).into()
    }

    /// Pid of a host's agent as the host sees it.
    pub(crate) fn agent_pid(&self, host: Host) -> String {
        let pids = self.lab.ok(host, &["pgrep", "-o", "-f", "standin agent"]);
        pids.lines().next().expect("an agent runs").to_owned()
    }

    /// Ends a host's agent by a signal (`TERM`, `KILL`) and waits until it is gone.
    pub(crate) fn end_agent(&mut self, host: Host, signal: &str) {
        let pid = self.agent_pid(host);
        self.lab.ok(host, &["kill", &format!("-{signal}"), &pid]);
        self.reap_agent(host);
    }

    /// Waits for the end of an agent that was killed.
    pub(crate) fn reap_agent(&mut self, host: Host) {
        let position = self.agents.iter().position(|(other, _)| *other == host).expect("it was started");
        let (_, mut child) = self.agents.remove(position);
        // What started an agent that was stopped has stopped with it, and would not see its end.
        let starter = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(starter, nix::sys::signal::Signal::SIGCONT).expect("it is not waited for yet");
        child.wait().expect("the agent's end can be waited for");
    }

    /// Runs a command of `standin`, which must succeed.
    pub(crate) fn standin(&self, host: Host, args: &[&str]) -> String {
        let mut command = vec![STANDIN];
        command.extend(args);
        self.lab.ok(host, &command)
    }

    /// Runs a command of `standin` with `--json`, which must succeed.
    pub(crate) fn json(&self, host: Host, args: &[&str]) -> Value {
        let mut args = args.to_vec();
        args.push("--json");
        serde_json::from_str(&self.standin(host, &args)).expect("JSON")
    }

    /// Runs a command of `standin` that must fail; returns its exit code and what it says.
    pub(crate) fn refused(&self, host: Host, args: &[&str]) -> (i32, String) {
        let mut command = vec![STANDIN];
        command.extend(args);
        let output = self.lab.on(host, &command);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{args:?} was expected to fail");
        (output.status.code().unwrap_or(-1), text)
    }

    /// A workload's status, or null if the agent does not know it.
    pub(crate) fn status(&self, host: Host, name: &str) -> Value {
        let output = self.lab.on(host, &[STANDIN, "status", name, "--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
    }

    /// Waits until the redis has this role and state at a host.
    pub(crate) fn wait_state(&self, host: Host, role: &str, state: &str) {
        self.wait_state_of("redis", host, role, state);
    }

    /// The same for a workload that is no redis.
    pub(crate) fn wait_state_of(&self, name: &str, host: Host, role: &str, state: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status(host, name);
            if status["role"] == role && status["state"] == state {
                return;
            }
            assert!(Instant::now() < deadline, "{host} should become {role}, {state}; it is {status:#}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts a redis on A with some keys.
    pub(crate) fn run_redis(&self) {
        self.run_redis_with(&[], &[]);
    }

    /// The same, with more flags for `standin run` and for redis.
    pub(crate) fn run_redis_with(&self, flags: &[&str], redis_flags: &[&str]) {
        let ip = format!("{VIP}/24");
        let redis = ["redis-server", "--save", "", "--protected-mode", "no", "--enable-debug-command", "yes"];
        let mut args = vec!["run", "redis", "--ip", &ip];
        args.extend(flags);
        args.push("--");
        args.extend(redis);
        args.extend(redis_flags);
        self.standin(Host::A, &args);
        let cli = ["redis-cli", "-h", VIP, "debug", "populate", "20000", "key", "100"];
        wait_for("redis to answer", || self.lab.on(Host::A, &cli).stdout.starts_with(b"OK"));
    }

    /// Starts a redis on A and protects it, B being its standby, until B holds an epoch.
    pub(crate) fn protect_redis(&self) {
        self.run_redis();
        self.protect();
        self.wait_state(Host::A, "primary", "protected");
    }

    /// Protects the redis on A.
    pub(crate) fn protect(&self) {
        self.protect_with(&["--every", "100ms"]);
    }

    /// The same, with other flags.
    pub(crate) fn protect_with(&self, flags: &[&str]) {
        let vip = format!("{VIP}/24@eth0");
        self.standin(Host::A, &[["protect", "redis", "--to", "b", "--vip", &vip].as_slice(), flags].concat());
    }

    /// The client's network namespace.
    pub(crate) fn client_network(&self) -> File {
        let pid = self.lab.pid(Host::Client);
        File::open(format!("/proc/{pid}/ns/net")).expect("the client's network namespace")
    }

    /// Starts incrementing a counter from the client.
    pub(crate) fn count(&self) -> Counter {
        Counter::start(self.client_network())
    }

    /// One command from the client, repeated until redis answers.
    pub(crate) fn ask_redis(&self, words: &'static [&'static str]) -> String {
        let client = inside(self.client_network(), move || {
            let deadline = Instant::now() + PATIENCE;
            loop {
                let reply = Redis::connect(Duration::from_secs(2)).and_then(|mut redis| redis.call(words));
                match reply {
                    Ok(reply) => return reply,
                    Err(error) => assert!(Instant::now() < deadline, "redis does not answer: {error}"),
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        client.join().expect("redis answers the client")
    }

    /// redis' own digest of its keys, the counter left out.
    pub(crate) fn digest(&self) -> String {
        self.ask_redis(&["DEL", "counter"]);
        self.ask_redis(&["DEBUG", "DIGEST"])
    }

    /// Whether (1) or not (0) a host has a redis that is not frozen.
    pub(crate) fn running_copies(&self, host: Host) -> usize {
        // A CRIU that waits there for its order is no copy.
        let script = format!(
            "cd {} 2>/dev/null && grep -q 'frozen 0' cgroup.events && \
             for p in $(cat cgroup.procs); do cat /proc/$p/comm; done | grep -q redis && echo 1 || echo 0",
            work_cgroup("redis")
        );
        self.lab.ok(host, &["sh", "-c", &script]).trim().parse().expect("a number")
    }

    /// Looks for so long whether both hosts run the redis.
    pub(crate) fn assert_never_both(&self, during: Duration, after: &str) {
        // A host that is off has no copy that could be asked for.
        let runs = |host| self.lab.is_up(host) && self.running_copies(host) == 1;
        let until = Instant::now() + during;
        loop {
            // Before the other one was seen to run, and after it.
            let both = runs(Host::A) && runs(Host::B) && runs(Host::A);
            assert!(!both, "{after}: two copies run");
            if Instant::now() >= until {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until one host runs the redis and the other is its standby; returns the one.
    pub(crate) fn wait_until_well(&self, after: &str) -> Host {
        let is = |host: Host, role: &str, state: &str| {
            let status = self.status(host, "redis");
            status["role"] == role && status["state"] == state
        };
        let runs = |one, other| is(one, "primary", "protected") && is(other, "standby", "ready");
        wait_for(after, || runs(Host::A, Host::B) || runs(Host::B, Host::A));
        if is(Host::A, "primary", "protected") { Host::A } else { Host::B }
    }

    /// The kinds of event in a workload's history, oldest first.
    pub(crate) fn history(&self, host: Host) -> Vec<String> {
        let history = self.json(host, &["history", "redis"]);
        let events = history["events"].as_array().expect("events").clone();
        events.iter().map(|event| event["kind"].as_str().expect("a kind").to_owned()).collect()
    }

    /// Whoever restored here did so at once: nothing had to be tried again, which is right in the end but takes its time.
    pub(crate) fn assert_first_try(&self, host: Host) {
        let history = self.history(host);
        let again =
            ["restore-failed", "pages-failed"].into_iter().find(|kind| history.iter().any(|it| it == kind));
        assert_eq!(again, None, "at {host}: {history:?}");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            for host in [Host::A, Host::B] {
                // Logs are for the test that fails.
                let _ = std::fs::remove_file(self.log(host));
            }
        }
        for (_, child) in &mut self.agents {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until `test` holds.
pub(crate) fn wait_for(what: &str, mut test: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !test() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
