//! `standin doctor`, and the agent where CRIU does not serve.

use std::{
    fs,
    net::UdpSocket,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output, Stdio, id},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

/// Far above what it takes when other tests run beside it.
const END_LIMIT: Duration = Duration::from_secs(10);
/// In the environment of the doctor, and so of what it starts.
const MARK: &str = "STANDIN_TEST_DOCTOR";

/// A `standin` whose directories are in `home` and whose port is its own.
fn standin(verb: &str, home: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_standin"));
    command.arg(verb);
    for dir in ["state", "run", "store", "work"] {
        command.arg(format!("--{dir}-dir")).arg(home.path().join(dir));
    }
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    command.arg("--listen").arg(socket.local_addr().unwrap().to_string());
    command.stdin(Stdio::null());
    command
}

fn home() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn doctor(home: &TempDir, criu: Option<&Path>) -> (Output, Value) {
    let mut command = standin("doctor", home);
    command.arg("--json");
    let criu = criu.map(Path::to_owned).or_else(|| std::env::var_os("STANDIN_TEST_CRIU").map(Into::into));
    command.args(criu.iter().flat_map(|path| ["--criu".as_ref(), path.as_os_str()]));
    let output = command.output().unwrap();
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}{}", text(&output.stdout), text(&output.stderr)));
    (output, report)
}

fn check<'a>(report: &'a Value, id: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["id"] == id).unwrap_or_else(|| panic!("no {id} in {report:#}"))
}

/// A program that calls itself CRIU 3.17.1.
fn old_criu(home: &TempDir) -> std::path::PathBuf {
    let path = home.path().join("criu");
    fs::write(&path, "#!/bin/sh\necho 'Version: 3.17.1'\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_host_on_which_everything_works_is_found_fit() {
    let home = home();
    let (output, report) = doctor(&home, None);
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    assert_eq!(report["ok"], true);
    assert_eq!(report["tracker"], "write-protect");
    assert!(report["criu_version"].as_str().is_some_and(|version| version.starts_with(char::is_numeric)));
    assert_eq!(check(&report, "dump-and-restore")["state"], "ok");
    for check in report["checks"].as_array().unwrap() {
        let ok = check["state"] == "ok";
        assert_eq!(ok, check["remedy"].is_null(), "a remedy where one is needed, and there only: {check}");
    }
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0, "the doctor made a directory");
}

#[test]
fn the_report_for_people_has_no_colour_in_a_pipe() {
    let home = home();
    let output = standin("doctor", &home).output().unwrap();
    let said = text(&output.stdout);
    assert!(said.contains("can protect workloads") && said.contains("dump-and-restore"), "{said}");
    assert!(!said.contains('\x1b'), "{said}");
}

#[test]
fn a_missing_criu_fails_with_a_remedy() {
    let (output, report) = doctor(&home(), Some(Path::new("/nonexistent")));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((&report["ok"], &report["criu_version"]), (&Value::Bool(false), &Value::Null));
    let criu = check(&report, "criu");
    assert_eq!(criu["state"], "fail");
    assert!(criu["found"].as_str().unwrap().contains("/nonexistent"), "{criu}");
    assert!(criu["remedy"].as_str().unwrap().contains("scripts/setup"), "{criu}");
    // What else there is to say is said all the same.
    assert_eq!(report["tracker"], "write-protect");
    assert!(text(&output.stderr).contains("criu"), "{}", text(&output.stderr));
}

#[test]
fn a_criu_that_is_too_old_fails_and_is_named() {
    let home = home();
    let (output, report) = doctor(&home, Some(&old_criu(&home)));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(report["criu_version"], "3.17.1");
    let criu = check(&report, "criu");
    assert!(criu["found"].as_str().unwrap().contains("3.17.1"), "{criu}");
    assert!(criu["remedy"].as_str().unwrap().contains("4.0.0"), "{criu}");
}

#[test]
fn a_port_that_another_program_has_is_found() {
    let home = home();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_standin"))
        .args(["doctor", "--json", "--criu", "/nonexistent", "--listen"])
        .arg(socket.local_addr().unwrap().to_string())
        .arg("--run-dir")
        .arg(home.path())
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(check(&report, "udp-port")["state"], "fail", "{report:#}");
}

#[test]
fn settings_that_do_not_go_together_are_wrong_usage() {
    let output = standin("doctor", &home()).args(["--lease-ms", "60"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
}

#[test]
fn an_agent_does_not_start_without_a_usable_criu() {
    let home = home();
    for (criu, said) in [(old_criu(&home), "CRIU 3.17.1"), ("/nonexistent".into(), "no CRIU at /nonexistent")]
    {
        let output = standin("agent", &home).arg("--criu").arg(criu).output().unwrap();
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(said) && error.contains("scripts/setup"), "{error}");
        assert!(!home.path().join("run").exists(), "it left its directories behind");
    }
}

#[test]
fn nothing_stays_when_it_is_interrupted() {
    let home = home();
    for (number, delay_ms) in [10, 40, 80, 120, 180].into_iter().enumerate() {
        let mark = format!("{}-{number}", id());
        let mut doctor = standin("doctor", &home).env(MARK, &mark).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        let signal = if number % 2 == 0 { Signal::SIGKILL } else { Signal::SIGINT };
        kill(Pid::from_raw(doctor.id() as i32), signal).unwrap();
        doctor.wait().unwrap();
        let until = Instant::now() + END_LIMIT;
        while let Some(process) = marked(&mark) {
            assert!(Instant::now() < until, "still there: {process}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(" tmpfs standin "), "{mounts}");
}

/// A process that the doctor with this mark has started.
fn marked(mark: &str) -> Option<String> {
    let wanted = format!("{MARK}={mark}");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes.map(|entry| entry.path()).find_map(|path| {
        let environment = fs::read(path.join("environ")).ok()?;
        let found = environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes());
        found.then(|| text(&fs::read(path.join("cmdline")).unwrap_or_default()).replace('\0', " "))
    })
}
