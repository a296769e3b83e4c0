//! What a container keeps over takeovers: the limits of its processes; and that nothing is left behind, however often it moves.

use std::{collections::BTreeMap, time::Duration};

use super::{
    cluster::{Cluster, wait_for},
    containers::Oci,
    docker::{DOCKER, Docker},
    lab::Host,
    redis::VIP,
};

/// It tries a system call that its profile forbids, and has a child with limits of its own.
pub(super) const LIMITED: &str = "umask 027
(ulimit -n 100; trap '' USR1; exec sleep 1000) &
while :; do mkdir /tmp/made 2>/dev/null && echo made > /tmp/tried || echo refused > /tmp/tried; sleep 0.05; done";

/// What a process may do, of `/proc/PID/status`.
const STATUS: &str =
    "^(Umask|Uid|Gid|Groups|SigBlk|SigIgn|SigCgt|Cap...|NoNewPrivs|Seccomp|Seccomp_filters|THP_enabled):";

/// Controllers, where each has a limit by cgroup v1 and v2, and the limit.
const CGROUP_LIMITS: [(&str, &str, &str, &str); 3] = [
    ("memory", "memory.limit_in_bytes", "memory.max", "67108864"),
    ("pids", "pids.max", "pids.max", "77"),
    ("cpu", "cpu.cfs_quota_us", "cpu.max", "90000"),
];

pub(super) const CONFIGURE: &str = "
process = config['process']
process['user'] = {'uid': 1000, 'gid': 1000, 'additionalGids': [10, 20], 'umask': 18}
process['noNewPrivileges'] = True
process['oomScoreAdj'] = 300
process['rlimits'] = [{'type': 'RLIMIT_' + name, 'soft': soft, 'hard': hard} for name, soft, hard in
                      [('NOFILE', 200, 500), ('CORE', 0, 0), ('STACK', 4 << 20, 8 << 20), ('FSIZE', 1 << 30, 1 << 30)]]
for kind in process['capabilities']:
    process['capabilities'][kind] = ['CAP_KILL', 'CAP_CHOWN'] if kind == 'bounding' else []
config['linux']['seccomp'] = {'defaultAction': 'SCMP_ACT_ALLOW', 'architectures': ['SCMP_ARCH_X86_64'],
                              'syscalls': [{'names': ['mkdir', 'mkdirat'], 'action': 'SCMP_ACT_ERRNO'}]}
config['linux']['resources'] = {'memory': {'limit': 64 << 20}, 'pids': {'limit': 77},
                                'cpu': {'quota': 90000, 'period': 100000}}
";

const LOOKS_MAX: usize = 100;

/// All that limits a process of a host, the same text for the same limits.
fn limits_of(cluster: &Cluster, host: Host, pid: &str) -> String {
    let script = format!(
        "grep -E '{STATUS}' /proc/{pid}/status; cat /proc/{pid}/limits /proc/{pid}/oom_score_adj; \
         ps -o ni=,cls=,rtprio= -p {pid}"
    );
    let mut text = cluster.lab.ok(host, &["sh", "-c", &script]);
    for (controller, v1, v2, _) in CGROUP_LIMITS {
        // By v2 the workload's own is below the container's.
        let script = format!(
            "dir=/sys/fs/cgroup/{controller}; file={v1}; path=$(sed -n 's/^[0-9]*:{controller}://p' /proc/{pid}/cgroup)
             if [ ! -d $dir ]; then
                 dir=/sys/fs/cgroup; file={v2}; path=$(sed -n 's/^0:://p' /proc/{pid}/cgroup); path=${{path%/standin}}
             fi
             read limit rest < $dir$path/$file; echo $path {controller} $limit"
        );
        text += &cluster.lab.ok(host, &["sh", "-c", &script]);
    }
    text
}

#[test]
fn a_containers_processes_may_do_after_a_takeover_what_they_might_before() {
    let cluster = Cluster::hybrid("limits");
    let oci = Oci::prepare_in(cluster, "runc", "limited", &[], &["sh", "-c", LIMITED]);
    oci.configure(CONFIGURE);
    oci.start(true);
    let limits = |oci: &Oci, host| {
        let root = oci.cluster.lab.ok(host, &["pgrep", "-f", "-o", "^sh -c umask"]).trim().to_owned();
        let child = oci.cluster.lab.ok(host, &["pgrep", "-f", "-P", &root, "^sleep 1000"]);
        [limits_of(&oci.cluster, host, &root), limits_of(&oci.cluster, host, child.trim())]
    };
    // Whoever looks while it is frozen sees signals blocked.
    let assert_kept = |oci: &Oci, host, before: &[String; 2]| {
        let mut now = limits(oci, host);
        for _ in 0..LOOKS_MAX {
            if now == *before {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
            now = limits(oci, host);
        }
        assert_eq!(now, *before, "on {host}");
    };
    wait_for("its child", || oci.cluster.lab.on(Host::A, &["pgrep", "-f", "^sleep 1000"]).status.success());
    let mut before = limits(&oci, Host::A);
    // A shell blocks signals for a moment when it makes a child.
    wait_for("it to wait for its child", || {
        let seen = std::mem::replace(&mut before, limits(&oci, Host::A));
        seen == before
    });
    oci.protect(&[]);
    for (controller, _, _, limit) in CGROUP_LIMITS {
        assert!(before[0].contains(&format!("/limited {controller} {limit}")), "{}", before[0]);
    }
    assert!(before[0].contains("Seccomp:\t2") && before[1].contains("100 "), "{before:?}");
    let executed = |oci: &Oci, host| oci.inside(host, &["cat", "/proc/self/status"]);
    let kept = |status: &str| {
        let lines = status.lines().filter(|line| line.starts_with("Cap") || line.starts_with("Secc"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let beside = kept(&executed(&oci, Host::A));

    oci.cluster.wait_state_of("limited", Host::B, "standby", "ready");
    oci.cluster.json(Host::A, &["handoff", "limited", "--max-downtime", "2s"]);
    assert_kept(&oci, Host::B, &before);
    oci.cluster.wait_state_of("limited", Host::B, "primary", "protected");
    oci.cluster.wait_state_of("limited", Host::A, "standby", "ready");
    oci.cluster.lab.kill(Host::B);
    oci.cluster.wait_state_of("limited", Host::A, "primary", "alone");
    assert_kept(&oci, Host::A, &before);
    assert_eq!(kept(&executed(&oci, Host::A)), beside);
    // And they hold.
    oci.inside(Host::A, &["rm", "-f", "/tmp/tried"]);
    wait_for("it to try", || oci.inside(Host::A, &["sh", "-c", "cat /tmp/tried || true"]) == "refused");
}

/// What a host has of everything that could grow, by name.
fn census(cluster: &Cluster, host: Host, name: &str) -> BTreeMap<String, usize> {
    let agent = cluster.agent_pid(host);
    let pid = "$(cat /run/standin/sandboxes/*/container.json | grep -o '\"pid\": *[0-9]*' | head -1 | grep -o '[0-9]*$')";
    let script = format!(
        "find /proc/{agent}/fd -type l -printf 'descriptor %l\\n'
         ls /proc/{agent}/task | sed 's/.*/threads/'
         sed 's/.*/mounts/' /proc/1/mountinfo
         sed 's/.*/mounts in the container/' /proc/{pid}/mountinfo
         find /sys/fs/cgroup -type d
         nft list ruleset | sed 's/packets.*//; s/^/nft /'
         nsenter -t {pid} -n nft list ruleset | sed 's/packets.*//; s/^/nft inside /'
         ip -o link | cut -d' ' -f2 | cut -d@ -f1 | sed 's/^/link /'
         ip -o -4 address | awk '{{ print \"address\", $4 }}'
         ip route | sed 's/^/route /'
         find /var/lib/standin /run/standin /dev/shm
         ps -e -o comm= | sed 's/^/process /'"
    );
    let text = cluster.lab.ok(host, &["sh", "-c", &format!("{{ {script}\n}} 2>/dev/null; true")]);
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        // What looks and asks is not meant.
        if ["process sh", "process ps", "process sed", "process find"].contains(&line) {
            continue;
        }
        // What is in the directory of an epoch under way depends on how far it is.
        if line.contains("/dump-") && line.rsplit_once("/dump-").is_some_and(|(_, rest)| rest.contains('/')) {
            continue;
        }
        let key = without_numbers(&line.replace(name, "NAME"));
        *counts.entry(key).or_default() += 1;
    }
    counts
}

/// Numbers are those of epochs, processes and the like, long ones hexadecimal: another number is no other thing.
fn without_numbers(line: &str) -> String {
    const HEX_DIGITS_MIN: usize = 7;
    let mut plain = String::new();
    let mut rest = line;
    while let Some(first) = rest.chars().next() {
        let hex = rest.chars().take_while(char::is_ascii_hexdigit).count();
        let digits = rest.chars().take_while(char::is_ascii_digit).count();
        let number = if hex >= HEX_DIGITS_MIN { hex } else { digits };
        if number == 0 {
            plain.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            plain.push('N');
            rest = &rest[number..];
        }
    }
    plain
}

/// What there is more of.
fn grown(before: &BTreeMap<String, usize>, now: &BTreeMap<String, usize>) -> Vec<String> {
    let more = now.iter().filter(|(key, count)| before.get(*key).is_none_or(|before| before < count));
    more.map(|(key, count)| format!("{key}: {:?}, now {count}", before.get(key))).collect()
}

/// It starts no processes, whose number would be another at every look.
const REDIS: [&str; 5] = ["redis-server", "--save", "", "--protected-mode", "no"];

/// The agents' threads that have nothing to do end after ten seconds: the census is one of a container that stands still.
const IDLE_THREADS_END: Duration = Duration::from_secs(11);
const ATTEMPTS_MAX: usize = 5;

/// There and back three times, after which there is nothing that was not there after the first. `pause`: has its engine stop
/// the container, or let it run on.
fn nothing_grows(cluster: &Cluster, name: &str, pause: &dyn Fn(bool)) {
    const HOSTS: [Host; 2] = [Host::A, Host::B];
    let round = || {
        for (from, to) in [(Host::A, Host::B), (Host::B, Host::A)] {
            cluster.wait_state_of(name, to, "standby", "ready");
            cluster.json(from, &["handoff", name, "--max-downtime", "2s"]);
            cluster.wait_state_of(name, to, "primary", "protected");
        }
        cluster.wait_state_of(name, Host::B, "standby", "ready");
    };
    let pause = |stop| {
        pause(stop);
        cluster.wait_state_of(name, Host::A, "primary", if stop { "paused" } else { "protected" });
    };
    round();
    pause(true);
    std::thread::sleep(IDLE_THREADS_END);
    let first = HOSTS.map(|host| census(cluster, host, name));
    assert!(first.iter().all(|first| first.len() > 50), "{first:#?}");
    pause(false);
    round();
    round();
    let mut more = Vec::new();
    for _ in 0..ATTEMPTS_MAX {
        pause(true);
        std::thread::sleep(IDLE_THREADS_END);
        let counted = HOSTS.into_iter().zip(&first);
        more = counted.map(|(host, first)| grown(first, &census(cluster, host, name))).collect();
        if more.iter().all(Vec::is_empty) {
            return;
        }
        // An epoch may be under way for as long as the container stands still.
        pause(false);
    }
    panic!("on A and on B there is more of: {more:#?}");
}

#[test]
fn nothing_grows_when_a_runc_container_goes_round_three_times() {
    let cluster = Cluster::up("grows-runc");
    let oci = Oci::prepare_in(cluster, "runc", "redis", &["redis-server"], &REDIS);
    oci.start(true);
    oci.protect(&["--ip", &format!("{VIP}/24"), "--vip", &format!("{VIP}/24@eth0")]);
    nothing_grows(&oci.cluster, "redis", &|stop| {
        let verb = if stop { "pause" } else { "resume" };
        oci.cluster.lab.ok(Host::A, &["runc", verb, "redis"]);
    });
}

#[test]
fn nothing_grows_when_a_docker_container_goes_round_three_times() {
    let docker = Docker::up("grows-docker", &DOCKER);
    docker.ship_image();
    let published = ["--network", "app", "-v", "data:/data", "-p", "6379:6379"];
    docker.run(&published, &REDIS);
    docker.protect(&["--vip", &format!("{VIP}/24@eth0")]);
    nothing_grows(&docker.cluster, "redis", &|stop| {
        docker.docker(Host::A, &[if stop { "pause" } else { "unpause" }, "redis"]);
    });
}
