//! The lab does what the other tests rely on.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::lab::{Host, Lab, STANDIN};

const POLL: Duration = Duration::from_millis(20);

/// Far longer than anything here takes, for a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(20);

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        sleep(POLL);
    }
}

/// Starts a few pings in a row, of which one must be answered: just after a cut, the kernel may still hold the failed
/// search for a neighbour's address against the first.
fn ping(lab: &Lab, from: Host, address: &str) -> Child {
    let once = format!("ping -n -q -c1 -W1 {address}");
    lab.spawn(from, &["sh", "-c", &format!("{once} || {once} || {once}")])
}

fn is_answered(mut ping: Child) -> bool {
    ping.wait().expect("our child can be waited for").success()
}

fn reaches(lab: &Lab, from: Host, address: &str) -> bool {
    is_answered(ping(lab, from, address))
}

const ALL_PAIRS: [(Host, Host); 3] = [(Host::A, Host::B), (Host::A, Host::Client), (Host::B, Host::Client)];

/// The pairs of hosts between which a ping passes both ways; a pair with only one way open fails the test.
fn connected(lab: &Lab) -> Vec<(Host, Host)> {
    // All at once: each that fails takes its whole time.
    ALL_PAIRS
        .map(|(one, other)| (one, other, ping(lab, one, other.ipv4()), ping(lab, other, one.ipv4())))
        .into_iter()
        .filter_map(|(one, other, there, back)| {
            let (there, back) = (is_answered(there), is_answered(back));
            assert_eq!(there, back, "only one way is open between {one} and {other}");
            there.then_some((one, other))
        })
        .collect()
}

/// What a lab of that name has left on this machine.
#[derive(Debug, Default, PartialEq)]
struct Remains {
    paths: Vec<PathBuf>,
    mounts: Vec<String>,
    processes: Vec<String>,
}

impl Remains {
    fn of(lab_name: &str, network_namespaces: &BTreeSet<PathBuf>) -> Self {
        let directory_name = format!("standin-lab.{lab_name}");
        let hierarchies =
            fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
        let paths = ["/run", "/tmp", "/sys/fs/cgroup"].map(PathBuf::from).into_iter().chain(hierarchies);
        let paths = paths.map(|parent| parent.join(&directory_name)).filter(|path| path.exists()).collect();
        let mounts = fs::read_to_string("/proc/self/mountinfo")
            .expect("mountinfo can be read")
            .lines()
            .filter(|line| line.contains(lab_name))
            .map(String::from)
            .collect();
        let processes = processes()
            // A zombie has no command line any more; whoever adopted it reaps it when it likes.
            .filter(|process| !command_line(process).is_empty())
            .filter(|process| {
                let in_cgroup = fs::read_to_string(process.join("cgroup"))
                    .is_ok_and(|text| text.contains(&directory_name));
                let in_network = fs::read_link(process.join("ns/net"))
                    .is_ok_and(|namespace| network_namespaces.contains(&namespace));
                let is_lab_script = command_line(process).contains(&format!("--name {lab_name} "));
                in_cgroup || in_network || is_lab_script
            })
            .map(|process| format!("{} {}", process.display(), command_line(&process)))
            .collect();
        Self { paths, mounts, processes }
    }

    fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

fn processes() -> impl Iterator<Item = PathBuf> {
    fs::read_dir("/proc").expect("proc is mounted").flatten().map(|entry| entry.path()).filter(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().bytes().all(|b| b.is_ascii_digit()))
    })
}

fn command_line(process: &Path) -> String {
    let bytes = fs::read(process.join("cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

fn network_namespaces(lab: &Lab) -> BTreeSet<PathBuf> {
    Host::ALL.iter().map(|&host| lab.ok(host, &["readlink", "/proc/self/ns/net"]).trim().into()).collect()
}

#[test]
fn two_labs_stand_side_by_side() {
    let (one, other) = (Lab::up("side"), Lab::up("side"));
    assert_ne!(one.name(), other.name());
    for lab in [&one, &other] {
        assert_eq!(connected(lab), ALL_PAIRS);
        for host in Host::ALL {
            assert!(reaches(lab, Host::Client, host.ipv6()), "{host} answers over IPv6");
        }
    }
    one.kill(Host::B);
    assert!(!reaches(&one, Host::A, Host::B.ipv4()));
    assert!(reaches(&other, Host::A, Host::B.ipv4()), "a kill in one lab is felt in the other");

    let namespaces = network_namespaces(&other);
    let name = other.name().to_owned();
    drop(other);
    let remains = Remains::of(&name, &namespaces);
    assert!(remains.is_nothing(), "down leaves {remains:?}");
    assert!(reaches(&one, Host::Client, Host::A.ipv4()), "taking one lab down harmed the other");
}

#[test]
fn a_command_on_a_host_runs_as_if_it_were_a_machine() {
    let lab = Lab::up("on");
    assert_eq!(lab.on(Host::A, &["sh", "-c", "exit 7"]).status.code(), Some(7));
    let mut cat = lab.command(Host::B, &["cat"]);
    let output = cat.stdin(fs::File::open(file!()).expect("tests run in the package's directory")).output();
    assert_eq!(output.expect("cat runs").stdout, fs::read(file!()).expect("this file can be read"));

    assert_eq!(lab.ok(Host::A, &["cat", "/proc/1/comm"]).trim(), "sleep");
    assert_eq!(lab.ok(Host::A, &["hostname"]).trim(), "A");
    assert_eq!(lab.ok(Host::A, &["pwd"]).trim(), "/");
    let cgroups = lab.ok(Host::A, &["cat", "/proc/self/cgroup"]);
    assert!(cgroups.lines().any(|line| line == "0::/init"), "{cgroups}");
    lab.ok(Host::A, &["mkdir", "/sys/fs/cgroup/workload"]);
    assert!(!lab.on(Host::B, &["test", "-e", "/sys/fs/cgroup/workload"]).status.success());
    lab.ok(Host::A, &["test", "-x", STANDIN]);
    // The environment and the descriptors of the test stay outside.
    assert!(!lab.ok(Host::A, &["env"]).contains("CARGO"));
    lab.ok(Host::A, &["sh", "-c", "for fd in $(seq 3 99); do test ! -e /proc/$$/fd/$fd || exit 1; done"]);
}

#[test]
fn an_orphan_is_reaped() {
    let lab = Lab::up("orphan");
    lab.ok(Host::A, &["sh", "-c", "(sleep 0.05 &)"]);
    eventually("only pid 1 and ps are left", || {
        lab.ok(Host::A, &["ps", "-e", "-o", "pid="]).lines().count() == 2
    });
}

#[test]
fn killing_the_caller_kills_the_command() {
    let lab = Lab::up("caller");
    let mut child = lab.spawn(Host::A, &["sleep", "12345"]);
    let is_running = || lab.on(Host::A, &["pgrep", "-fx", "sleep 12345"]).status.success();
    eventually("it runs", is_running);
    child.kill().expect("our child can be killed");
    child.wait().expect("our child can be waited for");
    eventually("it is gone", || !is_running());
}

#[test]
fn a_cut_between_two_leaves_the_third_connected_to_both() {
    let lab = Lab::up("cut-pair");
    lab.cut_between(Host::A, Host::B);
    assert_eq!(connected(&lab), [(Host::A, Host::Client), (Host::B, Host::Client)]);
    lab.heal();
    assert_eq!(connected(&lab), ALL_PAIRS);
}

#[test]
fn a_cut_one_way_lets_pass_what_goes_the_other_way() {
    let lab = Lab::up("cut-way");
    let says = |from: Host, to: Host| {
        // Datagrams to a port that nobody has.
        let unheard = || lab.ok(to, &["awk", "/^Udp:/ { n = $3 } END { print n }", "/proc/net/snmp"]);
        let before = unheard();
        lab.ok(from, &["bash", "-c", &format!("echo hello > /dev/udp/{}/9", to.ipv4())]);
        sleep(Duration::from_millis(50));
        unheard() != before
    };
    assert!(says(Host::A, Host::B) && says(Host::B, Host::A));
    lab.cut_one_way(Host::A, Host::B);
    assert!(!says(Host::A, Host::B), "what A sends does not reach B");
    assert!(says(Host::B, Host::A), "what B sends reaches A");
    assert!(reaches(&lab, Host::A, Host::Client.ipv4()) && reaches(&lab, Host::B, Host::Client.ipv4()));
    lab.heal();
    assert_eq!(connected(&lab), ALL_PAIRS);
}

#[test]
fn a_cut_host_reaches_nobody_until_it_is_healed() {
    let lab = Lab::up("cut-host");
    lab.cut(Host::A);
    assert_eq!(connected(&lab), [(Host::B, Host::Client)]);
    lab.ok(Host::A, &["sh", "-c", "ip link set eth0 down && ip link set eth0 up"]);
    lab.kill(Host::A);
    lab.boot(Host::A);
    assert_eq!(connected(&lab), [(Host::B, Host::Client)], "a cut is in the network: no reboot undoes it");
    lab.heal();
    assert_eq!(connected(&lab), ALL_PAIRS);
}

#[test]
fn a_killed_host_keeps_its_disk_and_nothing_else() {
    let lab = Lab::up("power");
    let files = ["/root/kept", "/var/lib/standin/kept", "/run/lost", "/tmp/lost", "/dev/shm/lost"];
    for file in files {
        lab.ok(Host::A, &["sh", "-c", &format!("echo {file} > {file}")]);
        assert!(!lab.on(Host::B, &["test", "-e", file]).status.success(), "B sees A's {file}");
        assert!(!Path::new(file).exists(), "the machine sees A's {file}");
    }
    lab.ok(Host::A, &["sh", "-c", "setsid sleep 12345 </dev/null >/dev/null 2>&1 &"]);
    let mut foreground = lab.spawn(Host::A, &["sleep", "12345"]);

    lab.kill(Host::A);
    assert!(!foreground.wait().expect("our child can be waited for").success());
    assert!(!lab.on(Host::A, &["true"]).status.success(), "nothing runs on a host that is off");
    assert!(!reaches(&lab, Host::Client, Host::A.ipv4()));
    assert!(reaches(&lab, Host::Client, Host::B.ipv4()));

    lab.boot(Host::A);
    assert_eq!(connected(&lab), ALL_PAIRS);
    for file in files {
        assert_eq!(lab.on(Host::A, &["test", "-e", file]).status.success(), file.ends_with("kept"), "{file}");
    }
    assert!(!lab.on(Host::A, &["pgrep", "-f", "12345"]).status.success(), "a process outlived the power cut");
}

#[test]
fn a_killed_owner_leaves_nothing_behind() {
    let mut owner = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().expect("sleep can be run");
    // It has all that a lab can have.
    let lab = Lab::up_with("owner", owner.id(), &["--hybrid"]);
    let namespaces = network_namespaces(&lab);
    let leave = "for dir in /sys/fs/cgroup /sys/fs/cgroup/*/; do mkdir $dir/w; done; \
                 setsid sleep 12345 </dev/null >/dev/null 2>&1 &";
    lab.ok(Host::A, &["sh", "-c", leave]);
    lab.kill(Host::B);
    assert!(!Remains::of(lab.name(), &namespaces).is_nothing(), "the test can see a lab that is up");

    // Not reaped before the lab is gone: a zombie is dead too.
    owner.kill().expect("our child can be killed");
    eventually("the lab is gone", || Remains::of(lab.name(), &namespaces).is_nothing());
    owner.wait().expect("our child can be waited for");
}

#[test]
fn a_service_on_a_host_answers_the_client() {
    let lab = Lab::up("redis");
    let mut redis = lab.spawn(Host::A, &["redis-server", "--save", "", "--protected-mode", "no"]);
    let ask = |args: &str| {
        let args = format!("redis-cli -h {} {args}", Host::A.ipv4());
        String::from_utf8_lossy(&lab.on(Host::Client, &["sh", "-c", &args]).stdout).trim().to_owned()
    };
    eventually("redis is up", || ask("PING") == "PONG");
    assert_eq!(ask("INCR n"), "1");
    assert_eq!(ask("INCR n"), "2");
    redis.kill().expect("our child can be killed");
    redis.wait().expect("our child can be waited for");
}
