//! CRIU dumps a tree out of one sandbox and restores it into another. What the options are for:
//!
//! - It runs inside all namespaces of the sandbox, so none of them is dumped; `--manage-cgroups ignore`, and the
//!   restoring process enters the workload's cgroup first.
//! - `--network-lock skip`: the closed gate is the lock.
//! - The pipe to the log has its reader outside of the tree. The dump takes it as any pipe; the restore
//!   is given another one in its place (`--inherit-fd`).

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::fd::OwnedFd,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use standin::{
    takeover::{address::Addresses, gate},
    workload::{
        netlink::RouteSocket,
        sandbox::Sandbox,
        spec::{Net, Vip},
    },
};

use super::lab::{Lan, Netns, Place, await_true, shell, unique};

const VIP: &str = "10.77.0.50";

/// Runs CRIU inside; `script` may use $CRIU and descriptor 9, the write end of the log's pipe.
fn criu_inside(sandbox: &Sandbox, script: &str, pipe: Option<OwnedFd>, log: &Path) {
    let criu = std::env::var("STANDIN_CRIU").unwrap_or("/opt/standin/criu/bin/criu".to_owned());
    let status = Command::new("sh")
        .args(["-c", &format!("set -e; exec 9>&0 </dev/null; {script}")])
        .env("CRIU", criu)
        .env("IN", format!("nsenter --target {} -m -n -p -u -i --", sandbox.keeper().pid()))
        .env("WORK", sandbox.keeper().cgroup().work())
        .stdin(pipe.map_or(Stdio::null(), Stdio::from))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let errors: Vec<_> = text.lines().filter(|line| line.contains("Error")).collect();
    assert!(status.success(), "{errors:#?}");
}

fn incr(connection: &mut TcpStream) -> String {
    connection.write_all(b"INCR counter\r\n").unwrap();
    let mut answer = [0; 16];
    let length = connection.read(&mut answer).unwrap();
    String::from_utf8_lossy(&answer[..length]).trim().to_owned()
}

fn place(host: &Netns, name: &str, path: &Path) -> (Place, Sandbox, Addresses) {
    let vip: Vip = format!("{VIP}/24@lan0").parse().unwrap();
    let mut place = Place::new(&unique(name), Net::Own { ips: vec![vip.cidr] });
    place.spec.paths = vec![path.to_owned()];
    host.run(|| {
        let sandbox = place.create();
        let addresses = Addresses::prepare(&place.spec.name, &place.spec.net, &[vip]).unwrap();
        (place, sandbox, addresses)
    })
}

#[test]
fn a_connection_outlives_the_move_from_one_sandbox_to_another() {
    let mut lan = Lan::new();
    let (a, b) = (lan.plug(&["10.77.0.1/24"]), lan.plug(&["10.77.0.2/24"]));
    let client = lan.plug(&["10.77.0.9/24"]);
    let shared = tempfile::tempdir().unwrap();
    let path = shared.path().join("redis");
    let (on_a, first, first_addresses) = place(&a, "criu-a", &path);
    let (on_b, second, second_addresses) = place(&b, "criu-b", &path);
    first_addresses.up(first.keeper()).unwrap();
    gate::open(first.keeper(), first.gate()).unwrap();
    let script = format!(
        "exec redis-server --save '' --appendonly yes --port 6400 --bind {VIP} --protected-mode no --dir {}",
        path.display()
    );
    let root = first.start(&shell(&script)).unwrap();
    on_a.await_log("Ready to accept connections");
    let mut connection = client.run(|| TcpStream::connect((VIP, 6400)).unwrap());
    connection.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(incr(&mut connection), ":1");

    // The old place is silent before anything in it ends.
    let pipes = first.log_pipes().unwrap();
    gate::close(first.gate().unwrap(), &a.run(|| RouteSocket::open().unwrap())).unwrap();
    first_addresses.down().unwrap();
    let images = tempfile::tempdir().unwrap();
    let (dir, pid) = (images.path().display(), root.pid);
    criu_inside(
        &first,
        &format!(
            "$IN $CRIU dump -t {pid} -D {dir} -o dump.log -v4 --tcp-established --network-lock skip --manage-cgroups=ignore"
        ),
        None,
        &images.path().join("dump.log"),
    );
    await_true("the old tree's end", || !first.is_occupied().unwrap());

    // What `files/` does with each epoch.
    let mut copy = Command::new("cp");
    copy.args(["-a", "data", &on_b.dir.path().display().to_string()]);
    assert!(copy.current_dir(on_a.dir.path()).status().unwrap().success());

    second.raise_last_pid(30_000).unwrap();
    second_addresses.up(second.keeper()).unwrap();
    let pipe = second.fresh_stdio().unwrap();
    criu_inside(
        &second,
        &format!(
            "echo 0 > $WORK/cgroup.procs; exec $IN $CRIU restore -d -D {dir} -o restore.log -v4 --tcp-established \
             --network-lock skip --manage-cgroups=ignore --inherit-fd 'fd[9]:pipe:[{}]'",
            pipes[0]
        ),
        Some(pipe),
        &images.path().join("restore.log"),
    );
    second.track(pid).unwrap();
    gate::open(second.keeper(), second.gate()).unwrap();
    second_addresses.announce().unwrap();
    assert_eq!(incr(&mut connection), ":2");

    let (outside, inside) = second.workload_pid().unwrap().unwrap();
    assert_eq!(inside, pid);
    assert_eq!(
        second.keeper().cgroup().pids().unwrap(),
        [outside],
        "in the workload's cgroup, and nobody else"
    );
    assert_eq!(second.log_pipes().unwrap().len(), 1);
    let incrs = |text: String| text.matches("counter").count();
    let total = || {
        let appended = std::fs::read_dir(on_b.dir.path().join("data/0/appendonlydir")).unwrap().flatten();
        appended.map(|file| incrs(std::fs::read_to_string(file.path()).unwrap_or_default())).sum::<usize>()
    };
    // While an earlier fsync is under way redis answers first and writes later.
    await_true("the restored descriptor to write to the standby's copy", || total() >= 2);
    assert_eq!(total(), 2);
    connection.write_all(b"SHUTDOWN\r\n").unwrap();
    on_b.await_log("bye bye");
    await_true("its end", || second.root().unwrap().is_some_and(|root| root.exit.is_some()));
    await_true("the pipe's end", || second.log_pipes().unwrap().is_empty());
}
