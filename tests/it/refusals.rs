//! Bad input: each refusal says what is wrong and what to do, by its exit code too, and leaves everything as it was.

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use serde_json::Value;

use super::{
    cluster::{Cluster, wait_for},
    lab::{Host, STANDIN},
    redis::inside,
};

/// Exit codes, as `standin --help` lists them.
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const REFUSED: i32 = 4;
const UNREACHABLE: i32 = 5;

/// Number of the `userfaultfd` system call.
const SYS_USERFAULTFD: u32 = if cfg!(target_arch = "x86_64") { 323 } else { 282 };
/// O_CLOEXEC | UFFD_USER_MODE_ONLY.
const UFFD_FLAGS: u32 = 0o2_000_001;
/// The same number on every architecture.
const SYS_IO_URING_SETUP: u32 = 425;

impl Cluster {
    /// Asserts that A refuses a command with an exit code and a message that has these words.
    fn refuses(&self, args: &[&str], code: i32, words: &[&str]) {
        let (was, text) = self.refused(Host::A, args);
        assert_eq!(was, code, "{args:?}: {text}");
        assert!(text.starts_with("standin: ") || text.starts_with("error: "), "{args:?}: {text}");
        for word in words {
            assert!(text.contains(word), "{args:?} should speak of {word:?}: {text}");
        }
    }

    /// Runs a command on A in a sandbox; returns its pid there.
    fn run_sandboxed(&self, name: &str, command: &[&str]) -> String {
        let mut args = vec!["run", name, "--json", "--"];
        args.extend(command);
        let reply: Value = serde_json::from_str(&self.standin(Host::A, &args)).expect("JSON");
        reply["pid"].to_string()
    }

    /// Starts a shell script on A as a session of its own; returns what it writes first.
    pub(crate) fn start_session(&self, script: &str) -> String {
        let script = format!("exec 3>&1 >/dev/null 2>&1; {script}");
        self.lab.ok(Host::A, &["setsid", "--fork", "sh", "-c", &script]).trim().to_owned()
    }

    /// Whether A still runs a workload unharmed and unprotected.
    fn assert_untouched(&self, name: &str, pid: &str) {
        let status = self.status(Host::A, name);
        assert_eq!(status["role"], "unprotected", "{status:#}");
        assert_eq!(status["pid"].to_string(), pid, "{status:#}");
        let state = self.lab.ok(Host::A, &["ps", "-o", "stat=", "-p", pid]);
        assert!(state.trim().starts_with(['S', 'R']), "it is in state {state}");
    }
}

#[test]
fn what_cannot_be_protected_is_refused_with_the_reason() {
    let cluster = Cluster::up("cannot");
    let sleeper = cluster.run_sandboxed("sleeper", &["sleep", "1000"]);
    let child = cluster.start_session("sleep 1000 3>&- & echo $! >&3; exec 3>&-; wait");
    let contained = cluster.start_session(
        "unshare --pid --fork setsid sleep 1000 3>&- & sleep 0.2; pgrep -nx sleep >&3; exec 3>&-; wait",
    );

    let of_pid = |pid: &str, code, words: &[&str]| {
        cluster.refuses(&["protect", "tree", "--pid", pid, "--to", "b"], code, words);
    };
    of_pid("4194304", NOT_FOUND, &["there is no process 4194304"]);
    of_pid("-1", USAGE, &["-1"]);
    of_pid(&child, REFUSED, &["not the leader", "setsid"]);
    of_pid(&contained, REFUSED, &["another pid namespace", "container"]);
    of_pid(&sleeper, REFUSED, &["belongs to the workload sleeper"]);
    assert_eq!(cluster.status(Host::A, "tree"), Value::Null, "nothing is left of the attempts");

    cluster.refuses(&["protect", "nobody", "--to", "b"], NOT_FOUND, &["nobody", "standin run"]);
    cluster.refuses(
        &["protect", "sleeper", "--to", "c"],
        NOT_FOUND,
        &["not paired", "standin pair --listen"],
    );
    cluster.refuses(&["protect", "sleeper", "--to", "b", "--every", "1ms"], USAGE, &["--every"]);
    cluster.assert_untouched("sleeper", &sleeper);
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let cluster = Cluster::up("taken");
    let sleeper = cluster.run_sandboxed("sleeper", &["sleep", "1000"]);
    let session = cluster.start_session("echo $$ >&3; exec 3>&-; exec sleep 1000");
    let taken = ["the name sleeper is taken", "standin status sleeper"];
    cluster.refuses(&["run", "sleeper", "--", "sleep", "1"], REFUSED, &taken);
    cluster.refuses(&["protect", "sleeper", "--pid", &session, "--to", "b"], REFUSED, &taken);
    cluster.assert_untouched("sleeper", &sleeper);

    // Also if it is taken on the standby alone.
    cluster.standin(Host::B, &["run", "sleeper", "--", "sleep", "1000"]);
    cluster.refuses(&["protect", "sleeper", "--to", "b"], REFUSED, &["a workload named sleeper runs there"]);
    wait_for("the protection to be withdrawn", || {
        cluster.status(Host::A, "sleeper")["role"] == "unprotected"
    });
    cluster.assert_untouched("sleeper", &sleeper);
    assert_eq!(cluster.status(Host::B, "sleeper")["role"], "unprotected");

    cluster.standin(Host::B, &["remove", "sleeper"]);
    cluster.standin(Host::A, &["protect", "sleeper", "--to", "b"]);
    cluster.refuses(&["protect", "sleeper", "--to", "b"], REFUSED, &["protected already, with b"]);
    cluster.refuses(&["remove", "sleeper"], REFUSED, &["standin unprotect sleeper"]);
}

#[test]
fn an_address_that_clients_could_not_reach_is_refused() {
    let cluster = Cluster::up("address");
    cluster.standin(Host::A, &["run", "sleeper", "--ip", "10.77.0.100/24", "--", "sleep", "1000"]);
    let with = |vip: &str, words: &[&str]| {
        cluster.refuses(&["protect", "sleeper", "--to", "b", "--vip", vip], USAGE, words);
    };
    with("10.99.0.100/24@eth0", &["10.99.0.100/24", "none of the networks of eth0", "10.77.0."]);
    with("10.77.0.100/24@eth7", &["no device eth7", "eth0"]);
    with("10.77.0.101/24@eth0", &["10.77.0.101", "--ip 10.77.0.101/24"]);
    with("10.77.0.100/24", &["--vip"]);
    with("10.77.0.100/40@eth0", &["--vip"]);
    assert_eq!(cluster.status(Host::A, "sleeper")["role"], "unprotected");
}

#[test]
fn names_that_nobody_has_and_an_agent_that_is_not_there_are_told_apart() {
    let cluster = Cluster::up("unknown");
    for verb in ["handoff", "unprotect", "remove", "status", "history"] {
        cluster.refuses(&[verb, "nobody"], NOT_FOUND, &["no workload named nobody", "standin status"]);
    }
    cluster.refuses(&["handoff", "No Body"], USAGE, &["No Body"]);
    cluster.run_sandboxed("sleeper", &["sleep", "1000"]);
    cluster.refuses(&["handoff", "sleeper"], REFUSED, &["not protected", "standin protect sleeper"]);
    cluster.refuses(&["unprotect", "sleeper"], REFUSED, &["not protected"]);
    cluster.refuses(&["run", "broken", "--", "/no/such/program"], REFUSED, &["/no/such/program"]);
    assert_eq!(cluster.status(Host::A, "broken"), Value::Null);
    cluster.refuses(
        &["status", "--socket", "/run/nobody.sock"],
        UNREACHABLE,
        &["/run/nobody.sock", "standin agent"],
    );
}

#[test]
fn only_the_right_code_pairs_and_only_once() {
    let cluster = Cluster::strangers("pairing", &[]);
    cluster.run_sandboxed("sleeper", &["sleep", "1000"]);
    cluster.refuses(&["protect", "sleeper", "--to", "b"], NOT_FOUND, &["b is not paired"]);
    let join = |code: &str| cluster.refused(Host::B, &["pair", "10.77.0.1:7400", code]);
    let (code, text) = join("AAAA-AAAA-AAAA-AAAA-AAAA-AAAA");
    assert!(code == REFUSED || code == USAGE, "{text}");

    let right = cluster.pairing_code();
    cluster.refuses(&["pair", "--listen"], REFUSED, &["a pairing code is open"]);
    let (code, text) = join("that's no code");
    assert!(code == USAGE && text.contains("no pairing code"), "{code}: {text}");
    let last = if right.ends_with('8') { "0" } else { "8" };
    let wrong = format!("{}{last}", &right[..right.len() - 1]);
    let (code, text) = join(&wrong);
    assert!(code == REFUSED && text.contains("wrong pairing code"), "{code}: {text}");
    assert!(cluster.json(Host::B, &["pair", "--list"]).as_array().is_some_and(Vec::is_empty));

    cluster.standin(Host::B, &["pair", "10.77.0.1:7400", &right]);
    let (code, text) = join(&right);
    assert!(code == REFUSED && text.contains("standin pair --listen"), "{code}: {text}");
    let (code, text) = cluster.refused(Host::B, &["pair", "10.77.0.9:7400", &right]);
    assert!(code == REFUSED && text.contains("10.77.0.9:7400"), "{code}: {text}");
    let (code, text) = cluster.refused(Host::B, &["pair", "10.77.0.1", &right]);
    assert!(code == USAGE && text.contains("HOST:PORT"), "{code}: {text}");
    cluster.standin(Host::A, &["protect", "sleeper", "--to", "b"]);
}

/// A perl program in which SIGUSR1 makes a descriptor that CRIU cannot dump and SIGUSR2 closes it.
fn undumpable_on_demand() -> String {
    format!(
        "use POSIX; my $fd; $SIG{{USR1}} = sub {{ $fd = syscall({SYS_USERFAULTFD}, {UFFD_FLAGS}) }}; \
         $SIG{{USR2}} = sub {{ POSIX::close($fd) }}; while (1) {{ sleep 1000 }}"
    )
}

#[test]
fn a_process_that_criu_cannot_dump_runs_on_unprotected_and_the_reason_is_told() {
    let cluster = Cluster::up("undumpable");
    let uffd = format!("syscall({SYS_USERFAULTFD}, {UFFD_FLAGS}) >= 0 or die; sleep 1000 while 1");
    let params = "my $p = chr(0) x 120;";
    let uring = format!("{params} syscall({SYS_IO_URING_SETUP}, 8, $p) >= 0 or die; sleep 1000 while 1");
    for (name, program, reason) in [("uffd", &uffd, "userfaultfd"), ("uring", &uring, "io_uring")] {
        let pid = cluster.run_sandboxed(name, &["perl", "-e", program]);
        wait_for("it to open its descriptor", || {
            let fds = cluster.lab.ok(Host::A, &["ls", "-l", &format!("/proc/{pid}/fd")]);
            fds.contains(reason)
        });
        cluster.refuses(
            &["protect", name, "--to", "b"],
            REFUSED,
            &[
                "cannot be protected",
                "CRIU refused to dump",
                &format!("process {pid} has "),
                reason,
                "runs on",
            ],
        );
        wait_for("the protection to be withdrawn", || cluster.status(Host::A, name)["role"] == "unprotected");
        cluster.assert_untouched(name, &pid);
        wait_for("the standby to forget it", || cluster.status(Host::B, name).is_null());
    }
}

/// Without a sandbox it would be the host's.
#[test]
fn system_v_shared_memory_of_a_tree_that_nobody_sandboxed_is_refused() {
    let cluster = Cluster::up("bare-ipc");
    let attach = "import ctypes, time; libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p; \
                  id = libc.shmget(0, 4096, 0o1600); libc.shmat(id, None, 0); libc.shmctl(id, 0, None); time.sleep(1000)";
    let pid =
        cluster.start_session(&format!("cd /; echo $$ >&3; exec 3>&- </dev/null python3 -c '{attach}'"));
    wait_for("it to attach", || {
        cluster.lab.ok(Host::A, &["cat", &format!("/proc/{pid}/maps")]).contains("SYSV")
    });
    cluster.refuses(
        &["protect", "attached", "--pid", &pid, "--to", "b"],
        REFUSED,
        &["System V shared memory", "standin run", "runs on"],
    );
    assert!(cluster.lab.on(Host::A, &["kill", "-0", &pid]).status.success());
}

#[test]
fn protection_pauses_while_criu_refuses_and_goes_on_by_itself() {
    let cluster = Cluster::up("pauses");
    let pid = cluster.run_sandboxed("moody", &["perl", "-e", &undumpable_on_demand()]);
    cluster.standin(Host::A, &["protect", "moody", "--to", "b", "--every", "50ms"]);
    cluster.wait_state_of("moody", Host::B, "standby", "ready");
    cluster.lab.ok(Host::A, &["kill", "-USR1", &pid]);
    wait_for("the reason to be told", || {
        let status = cluster.status(Host::A, "moody");
        status["state"] == "lagging"
            && status["error"].as_str().is_some_and(|error| error.contains("userfaultfd"))
    });
    // The epoch of before is what the standby keeps, and the workload runs on.
    let kept = cluster.status(Host::A, "moody")["epoch"].clone();
    assert!(kept.is_object(), "{kept}");
    let failures = |host| cluster.json(host, &["history", "moody"])["events"].as_array().map_or(0, Vec::len);
    assert!(failures(Host::A) > 0);
    let standby = cluster.status(Host::B, "moody");
    assert_eq!((&standby["role"], &standby["epoch"]), (&"standby".into(), &kept), "{standby:#}");
    let status = cluster.status(Host::A, "moody");
    assert_eq!((&status["role"], status["pid"].to_string()), (&"primary".into(), pid.clone()), "{status:#}");

    cluster.lab.ok(Host::A, &["kill", "-USR2", &pid]);
    cluster.wait_state_of("moody", Host::A, "primary", "protected");
    let status = cluster.status(Host::A, "moody");
    assert!(status["epoch"]["epoch"].as_u64() > kept["epoch"].as_u64(), "{status:#}");
    assert!(status["error"].is_null(), "{status:#}");
    assert_eq!(status["pid"].to_string(), pid);
}

#[test]
fn a_standby_without_room_refuses_early_and_the_primary_is_told() {
    let cluster = Cluster::up("no-room");
    cluster.run_redis();
    let shm = |size: &str| {
        let script =
            format!("mount -o remount,size={size} /dev/shm && df --output=used -k /dev/shm | tail -1");
        cluster.lab.ok(Host::B, &["sh", "-c", &script]).trim().parse::<u64>().expect("a number")
    };
    let before_kib = shm("3m");
    cluster.refuses(
        &["protect", "redis", "--to", "b"],
        REFUSED,
        &["the standby refuses", "no room for the image", "bytes are needed", "runs on as before"],
    );
    wait_for("the protection to be withdrawn", || cluster.status(Host::A, "redis")["role"] == "unprotected");
    assert_eq!(cluster.running_copies(Host::A), 1);
    wait_for("the standby to forget it", || cluster.status(Host::B, "redis").is_null());
    let after_kib = shm("50%");
    assert!(after_kib <= before_kib + 64, "{before_kib} KiB were used, {after_kib} are");
    cluster.protect();
    cluster.wait_state(Host::A, "primary", "protected");
}

#[test]
fn settings_that_make_no_sense_are_refused_before_anything_starts() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("agent.toml");
    let state = dir.path().join("state");
    let refuses = |text: &str, flags: &[&str], words: &[&str]| {
        std::fs::write(&file, text).expect("a file");
        let mut command = Command::new(STANDIN);
        command.args(["agent", "--config"]).arg(&file).args(flags);
        command.arg("--state-dir").arg(&state);
        let output = command.output().expect("standin can be run");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(USAGE), "{text:?} {flags:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{text:?} {flags:?} should speak of {word:?}: {said}");
        }
        assert!(!state.exists(), "nothing was made");
    };
    refuses("lease_ms = 900\nleese_ms = 900\n", &[], &["leese_ms", "line 2", "standin agent --help"]);
    refuses("lease_ms = \"long\"\n", &[], &["lease_ms"]);
    refuses("heartbeat_ms = 200\nlease_ms = 300\n", &[], &["two heartbeats", "lease longer"]);
    refuses("lease_ms = 900\n", &["--heartbeat-ms", "500"], &["two heartbeats"]);
    refuses("name = \"Not A Name\"\n", &[], &["Not A Name", "a-z"]);
    refuses("run_dir = \"here\"\n", &[], &["run_dir", "absolute"]);
    refuses("", &["--no-such-flag"], &["--no-such-flag"]);
}

/// One request as `curl --unix-socket` sends it; status and body of the answer.
fn curl(socket: &PathBuf, method: &str, path: &str, body: &str) -> (u16, Value) {
    let mut stream = UnixStream::connect(socket).expect("the control socket");
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n\
         Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).expect("the request is taken");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, serde_json::from_str(body).expect("JSON"))
}

#[test]
fn the_control_socket_is_roots_alone_and_speaks_plain_http() {
    let cluster = Cluster::up("socket");
    let socket = PathBuf::from(format!("/proc/{}/root/run/standin/control.sock", cluster.lab.pid(Host::A)));
    let mode = socket.metadata().expect("the control socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let (status, body) = curl(&socket, "GET", "/v1/status", "");
    assert_eq!((status, &body["name"]), (200, &"a".into()), "{body:#}");
    let (status, body) = curl(&socket, "GET", "/v1/peers", "");
    assert_eq!((status, &body[0]["name"]), (200, &"b".into()), "{body:#}");
    let run = r#"{"name": "sleeper", "command": ["sleep", "1000"]}"#;
    let (status, body) = curl(&socket, "POST", "/v1/run", run);
    assert!(status == 200 && body["pid"].is_i64(), "{status}: {body:#}");

    for (method, path, request, expected, code) in [
        ("GET", "/v1/workloads/nobody", "", 404, "not-found"),
        ("GET", "/v1/nothing", "", 404, "not-found"),
        ("POST", "/v1/run", run, 409, "refused"),
        ("POST", "/v1/run", r#"{"name": "x", "command": ["true"], "colour": 1}"#, 400, "invalid"),
        ("POST", "/v1/run", r#"{"name": "../x", "command": ["true"]}"#, 400, "invalid"),
        ("POST", "/v1/protect", "no JSON", 400, "invalid"),
    ] {
        let (status, body) = curl(&socket, method, path, request);
        assert_eq!((status, &body["code"]), (expected, &code.into()), "{method} {path}: {body:#}");
        assert!(body["error"].as_str().is_some_and(|error| !error.is_empty()), "{body:#}");
    }
}

/// Port of the bare tree's server.
const PORT: u16 = 7070;

/// What the counting server of a host answers the client, once it does.
fn counted(cluster: &Cluster, host: Host) -> u64 {
    let client = inside(cluster.client_network(), move || {
        let mut reply = String::new();
        wait_until_reached(host).read_to_string(&mut reply).expect("a reply");
        reply.trim().parse().expect("a number")
    });
    client.join().expect("the server answers")
}

fn wait_until_reached(host: Host) -> TcpStream {
    let address = format!("{}:{PORT}", host.ipv4()).parse().expect("an address");
    let mut stream = None;
    for _ in 0..200 {
        stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok();
        if stream.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    stream.expect("the server can be reached")
}

#[test]
fn a_tree_that_nobody_sandboxed_outlives_its_host() {
    let cluster = Cluster::up("bare");
    let server = format!(
        "use IO::Socket::INET; \
         my $s = IO::Socket::INET->new(LocalPort => {PORT}, Listen => 5, ReuseAddr => 1) or die; \
         if (!fork) {{ sleep 1000 while 1 }} \
         my $n = 0; while (my $c = $s->accept) {{ $n++; print $c \"$n\\n\"; close $c }}"
    );
    let script = format!("cd /; echo $$ >&3; exec 3>&- </dev/null perl -e '{server}'");
    let pid = cluster.start_session(&script);
    assert_eq!(counted(&cluster, Host::A), 1);
    cluster.standin(Host::A, &["protect", "server", "--pid", &pid, "--to", "b", "--every", "50ms"]);
    assert_eq!(cluster.status(Host::A, "server")["pid"].to_string(), pid);
    assert_eq!(counted(&cluster, Host::A), 2);
    assert_eq!(counted(&cluster, Host::A), 3);
    let epoch = || cluster.status(Host::A, "server")["epoch"]["epoch"].as_u64();
    let now = epoch();
    wait_for("an epoch that has seen it", || epoch() > now.map(|now| now + 1));

    cluster.lab.kill(Host::A);
    cluster.wait_state_of("server", Host::B, "primary", "alone");
    assert_eq!(counted(&cluster, Host::B), 4, "it goes on where it was, in B's network");
}

#[test]
fn an_address_that_somebody_else_has_is_not_taken() {
    let cluster = Cluster::up("duplicate");
    cluster.standin(
        Host::A,
        &["run", "app", "--ip", "10.77.0.150/24", "--ip", "fd77::150/64", "--", "/bin/sleep", "1000"],
    );
    for vip in ["10.77.0.150/24", "fd77::150/64"] {
        let with_device = format!("{vip}@eth0");
        let protect = ["protect", "app", "--to", "b", "--vip", &with_device];
        cluster.lab.ok(Host::Client, &["ip", "addr", "add", vip, "dev", "eth0", "nodad"]);
        let (code, said) = cluster.refused(Host::A, &protect);
        assert!(code == 4 && said.contains("is in use by") && said.contains(vip), "{said}");
        cluster.lab.ok(Host::Client, &["ip", "addr", "del", vip, "dev", "eth0"]);
        assert_eq!(cluster.status(Host::A, "app")["role"], "unprotected");
        cluster.standin(Host::A, &protect);
        cluster.wait_state_of("app", Host::A, "primary", "protected");
        cluster.standin(Host::A, &["unprotect", "app"]);
    }
}
