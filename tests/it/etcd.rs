//! A real etcd on a third host decides, too: either host may be lost, or the link between them, and the other goes on.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;

use super::{
    cluster::{Cluster, wait_for},
    lab::{Host, Lab},
    redis::{longest_gap, rolled_back},
};

/// The time that a key lasts, and enough for it to be over and taken.
const TTL: Duration = Duration::from_secs(2);
const OVER: Duration = Duration::from_secs(5);

/// An authority, and what it signed for the third host's etcd.
const CERTIFICATES: &str = "set -e; cd \"$1\"
    new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=lab'
    openssl req -x509 $new -days 2 -keyout ca.key -out ca.pem
    openssl req $new -keyout etcd.key -out etcd.csr
    printf 'subjectAltName=IP:10.77.0.9\\nbasicConstraints=CA:FALSE\\n' > extensions
    openssl x509 -req -in etcd.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out etcd.pem";

/// Two agents that ask an etcd, which is not started yet: its certificates are in the directory.
pub(crate) fn cluster(hint: &str) -> (Cluster, TempDir) {
    cluster_with(hint, &[])
}

/// The same, with more flags.
pub(crate) fn cluster_with(hint: &str, more: &[&'static str]) -> (Cluster, TempDir) {
    // Where hosts see what this one has.
    let dir = TempDir::new_in("/var/tmp").unwrap();
    let made = Command::new("sh").args(["-c", CERTIFICATES, "sh"]).arg(dir.path()).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let ca: &'static str = dir.path().join("ca.pem").display().to_string().leak();
    let flags = [
        "--arbiter",
        "etcd",
        "--etcd-endpoint",
        "https://10.77.0.9:2379",
        "--etcd-ttl-s",
        "2",
        "--etcd-ca",
        ca,
    ];
    (Cluster::with(hint, &[&flags, more].concat()), dir)
}

/// The third host's etcd. It goes with the lab, or before.
pub(crate) struct Etcd(Option<Child>);

impl Etcd {
    pub(crate) fn start(lab: &Lab, dir: &Path) -> Self {
        let at = |name: &str| dir.join(name).display().to_string();
        let url = "https://10.77.0.9:2379";
        let pid = at("pid");
        let run = format!(
            "echo $$ > {pid}; exec etcd --data-dir {} --listen-client-urls {url} --advertise-client-urls {url} \
             --listen-peer-urls http://127.0.0.1:2380 --cert-file {} --key-file {} --log-level error",
            at("data"),
            at("etcd.pem"),
            at("etcd.key")
        );
        let mut command = lab.command(Host::Client, &["sh", "-c", &run]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let (ca, health) = (at("ca.pem"), format!("{url}/health"));
        wait_for("etcd", || {
            lab.on(Host::Client, &["curl", "-sf", "--cacert", &ca, &health]).status.success()
        });
        Self(Some(child))
    }

    pub(crate) fn kill(&mut self, lab: &Lab, dir: &Path) {
        lab.ok(Host::Client, &["sh", "-c", &format!("kill -9 $(cat {})", dir.join("pid").display())]);
        self.0.take().unwrap().wait().unwrap();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // By now the lab is gone, and its processes with it.
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn with_an_etcd_either_host_or_the_link_may_be_lost_and_the_workload_goes_on() {
    let (mut cluster, dir) = cluster("etcd");
    let mut etcd = Etcd::start(&cluster.lab, dir.path());
    cluster.protect_redis();
    let digest = cluster.digest();
    let status = cluster.status(Host::A, "redis");
    assert_eq!(status["arbiter"], "store");
    wait_for("the key", || cluster.status(Host::A, "redis")["etcd"]["held_for_ms"].is_u64());
    assert_eq!(cluster.status(Host::A, "redis")["etcd"]["holder"], "a");

    // The standby is lost.
    cluster.lab.kill(Host::B);
    let counter = cluster.count();
    std::thread::sleep(OVER);
    assert!(longest_gap(&counter.stop()) < Duration::from_secs(1), "the primary goes on");
    cluster.lab.boot(Host::B);
    cluster.start_agent(Host::B);
    cluster.wait_state(Host::B, "standby", "ready");
    cluster.wait_state(Host::A, "primary", "protected");

    // The link between the hosts.
    cluster.lab.cut_between(Host::A, Host::B);
    let counter = cluster.count();
    std::thread::sleep(OVER);
    assert!(longest_gap(&counter.stop()) < Duration::from_secs(1), "the primary goes on");
    assert_eq!(cluster.status(Host::B, "redis")["role"], "standby");
    cluster.lab.heal();
    cluster.wait_state(Host::A, "primary", "protected");

    // The etcd: the primary goes on while its standby agrees, and nobody promotes.
    etcd.kill(&cluster.lab, dir.path());
    let counter = cluster.count();
    std::thread::sleep(OVER);
    assert!(longest_gap(&counter.stop()) < Duration::from_secs(1), "the primary goes on");
    assert_eq!(cluster.status(Host::A, "redis")["etcd"]["reachable"], false);
    cluster.lab.kill(Host::A);
    std::thread::sleep(2 * TTL);
    assert_eq!(cluster.status(Host::B, "redis")["role"], "standby");
    let mut etcd = Etcd::start(&cluster.lab, dir.path());
    cluster.wait_state(Host::B, "primary", "alone");
    assert_eq!(cluster.digest(), digest);
    assert!(cluster.history(Host::B).contains(&"promoted".to_owned()));
    wait_for("the key", || cluster.status(Host::B, "redis")["etcd"]["holder"] == "b");

    // And back: by hand, and by losing the primary.
    cluster.lab.boot(Host::A);
    cluster.start_agent(Host::A);
    cluster.wait_state(Host::A, "standby", "ready");
    cluster.wait_state(Host::B, "primary", "protected");
    let counter = cluster.count();
    std::thread::sleep(Duration::from_millis(200));
    cluster.json(Host::B, &["handoff", "redis"]);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(rolled_back(&counter.stop()), 0);
    cluster.wait_state(Host::A, "primary", "protected");
    cluster.wait_state(Host::B, "standby", "ready");
    wait_for("the key", || cluster.status(Host::A, "redis")["etcd"]["holder"] == "a");
    let counter = cluster.count();
    cluster.lab.kill(Host::A);
    cluster.wait_state(Host::B, "primary", "alone");
    std::thread::sleep(Duration::from_millis(300));
    println!("the primary was lost: {:?} until the next reply", longest_gap(&counter.stop()));
    assert_eq!(cluster.digest(), digest);
    etcd.kill(&cluster.lab, dir.path());
}
