//! The runtimes' own checkpoints, and moves made of them as their users make them: checkpoint, copy, restore.
//!
//! What is best for them is done: images lie in memory, are copied by one `tar` through one TCP connection the moment they
//! are whole, and the target has everything else ready, waiting for the connection. The container is in the host's network,
//! whose dump would only cost time; its address is moved between the checkpoint and the restore, and announced.

use std::{
    fs::File,
    io::{Read, Seek},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use crate::{
    REDIS, ROOTFS, Result, Size,
    client::{Answers, Client},
    figures::{Epoch, Figures, Move},
    lab::{Host, Lab},
    populate,
    redis::VIP,
};

/// Where images are, and what `tar` copies.
const DIR: &str = "/dev/shm/move";
const PORT: u16 = 7500;
/// How long any one step may take.
const STEP_S: u64 = 120;
const SETTLE: Duration = Duration::from_millis(1500);

/// Sends what it reads to the target, which may not listen yet.
const SEND: &str = r"
import shutil, socket, sys, time
for attempt in range(500):
    try:
        connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
        break
    except OSError:
        time.sleep(0.01)
with connection.makefile('wb') as out:
    shutil.copyfileobj(sys.stdin.buffer, out, 1 << 20)
";

/// Writes what comes by one connection.
const RECEIVE: &str = r"
import shutil, socket, sys
listener = socket.create_server(('', int(sys.argv[1])))
connection, _ = listener.accept()
with connection.makefile('rb') as come:
    shutil.copyfileobj(come, sys.stdout.buffer, 1 << 20)
";

/// Makes an OCI container of a runtime's example: no terminal, in the host's network.
const CONFIGURE: &str = r#"
import json, sys
path, command = sys.argv[1] + "/config.json", sys.argv[2:]
config = json.load(open(path))
config["process"].update(terminal=False, args=command)
config["root"]["readonly"] = False
config["linux"].pop("resources", None)
config["linux"]["namespaces"] = [kind for kind in config["linux"]["namespaces"] if kind["type"] != "network"]
json.dump(config, open(path, "w"))
"#;

const PODMAN: &str = "podman --root /srv/containers --runroot /run/containers --runtime /usr/sbin/runc \
                      --storage-driver overlay --cgroup-manager cgroupfs --events-backend file";

/// What runc passes on to CRIU, and Docker has no flags for. Whoever knocks while the container stands still would make a
/// checkpoint fail.
const CRIU_OPTIONS: &str = "tcp-established\nfile-locks\nskip-in-flight";

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Theirs {
    Runc,
    /// Most of the memory ahead, the rest in the freeze.
    RuncPreDump,
    Crun,
    Docker,
    Podman,
}

impl Theirs {
    pub(crate) const ALL: [Self; 5] = [Self::Runc, Self::RuncPreDump, Self::Crun, Self::Docker, Self::Podman];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::RuncPreDump => "runc-pre-dump",
            Self::Crun => "crun",
            Self::Docker => "docker",
            Self::Podman => "podman",
        }
    }

    fn program(self) -> &'static str {
        match self {
            Self::Runc | Self::RuncPreDump => "runc",
            Self::Crun => "crun",
            Self::Docker => "docker",
            Self::Podman => PODMAN,
        }
    }

    /// What a host must have before there is a container.
    fn prepare(self) -> String {
        let program = self.program();
        let root = format!("mkdir -p {DIR} /srv/redis && {ROOTFS} /srv/redis/rootfs redis-server redis-cli");
        match self {
            Self::Runc | Self::RuncPreDump | Self::Crun => format!(
                "{root} && cd /srv/redis && {program} spec && python3 -c '{CONFIGURE}' /srv/redis {}",
                quoted(REDIS)
            ),
            Self::Docker => format!(
                "{root} && mkdir -p /var/lib/docker && \
                 {{ setsid dockerd --experimental --storage-driver overlay2 --exec-opt native.cgroupdriver=cgroupfs \
                    > /srv/daemon.log 2>&1 < /dev/null & }} ; \
                 for i in $(seq 300); do docker info > /dev/null 2>&1 && exit 0; sleep 0.1; done; exit 1"
            ),
            Self::Podman => root,
        }
    }

    /// The image is the same on both hosts.
    fn ship_image(self, lab: &Lab) -> Result<()> {
        let program = self.program();
        if !matches!(self, Self::Docker | Self::Podman) {
            return Ok(());
        }
        shell(lab, Host::A, &format!("tar -C /srv/redis/rootfs -c . | {program} import - lab"))?;
        let mut save = lab.command(Host::A, &["sh", "-c", &format!("{program} save lab")]);
        let mut save = save.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let saved = save.stdout.take().ok_or("no pipe")?;
        let mut load = lab.command(Host::B, &["sh", "-c", &format!("{program} load")]);
        let loaded = load.stdin(saved).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        if !save.wait()?.success() || !loaded.success() {
            return Err("the image could not be brought from one host to the other".into());
        }
        Ok(())
    }

    /// A host has no container any more.
    fn forget(self) -> String {
        match self {
            Self::Docker => "docker rm -f redis > /dev/null 2>&1; true".to_owned(),
            _ => self.clear(),
        }
    }

    /// What must be on the target before it can restore.
    fn create(self) -> String {
        match self {
            Self::Docker => {
                format!("docker create --name redis --network host lab {}", quoted(REDIS))
            }
            _ => "true".to_owned(),
        }
    }

    fn start(self) -> String {
        match self {
            Self::Runc | Self::RuncPreDump | Self::Crun => {
                format!("{} run -d --bundle /srv/redis redis < /dev/null > /dev/null 2>&1", self.program())
            }
            Self::Docker => format!("{} && docker start redis", self.create()),
            Self::Podman => {
                format!("{PODMAN} run -d --name redis --network host --pids-limit -1 lab {}", quoted(REDIS))
            }
        }
    }

    /// A checkpoint into `DIR`, after which the container runs on or has ended.
    fn checkpoint(self, runs_on: bool) -> String {
        let flag = if runs_on { "--leave-running" } else { "" };
        let flags = format!("{flag} --tcp-established --file-locks");
        match self {
            Self::Runc | Self::RuncPreDump | Self::Crun => {
                let parent = if self == Self::RuncPreDump { "--parent-path ../pre" } else { "" };
                let program = self.program();
                format!(
                    "{program} checkpoint {flags} {parent} --image-path {DIR}/images --work-path {DIR}/work redis"
                )
            }
            Self::Docker => format!("docker checkpoint create {flag} redis images"),
            Self::Podman => format!(
                "{PODMAN} container checkpoint --print-stats {flags} --compress none --export {DIR}/images.tar redis"
            ),
        }
    }

    /// What is done while the container still runs.
    fn ahead(self) -> Option<String> {
        (self == Self::RuncPreDump).then(|| {
            format!(
                "runc checkpoint --pre-dump --tcp-established --file-locks --image-path {DIR}/pre --work-path {DIR}/work \
                 redis"
            )
        })
    }

    /// A directory and what in it is to be copied.
    fn images(self) -> (String, &'static str) {
        match self {
            Self::Runc | Self::Crun => (DIR.to_owned(), "images"),
            Self::RuncPreDump => (DIR.to_owned(), "images pre"),
            Self::Docker => (
                "/var/lib/docker/containers/$(docker inspect -f '{{.Id}}' redis)/checkpoints".to_owned(),
                "images",
            ),
            Self::Podman => (DIR.to_owned(), "images.tar"),
        }
    }

    fn restore(self) -> String {
        match self {
            Self::Runc | Self::RuncPreDump | Self::Crun => format!(
                "{} restore -d --tcp-established --file-locks --bundle /srv/redis --image-path {DIR}/images \
                 --work-path {DIR}/work redis < /dev/null > /dev/null 2>&1",
                self.program()
            ),
            Self::Docker => "docker start --checkpoint images redis".to_owned(),
            Self::Podman => {
                format!("{PODMAN} container restore --tcp-established --file-locks --import {DIR}/images.tar")
            }
        }
    }

    /// Leaves a host as it is before a move to it.
    fn clear(self) -> String {
        let (dir, _) = self.images();
        let engine = match self {
            Self::Docker => "true".to_owned(),
            Self::Podman => format!("{PODMAN} rm -f redis"),
            _ => format!("{} delete --force redis", self.program()),
        };
        // What CRIU has locked of a network whose container has left stays locked.
        format!(
            "{engine} > /dev/null 2>&1; rm -rf {DIR} {dir}/images; mkdir -p {DIR}; \
             ip address del {VIP}/24 dev eth0 2> /dev/null; \
             for tool in iptables ip6tables; do $tool -F INPUT; $tool -F OUTPUT; done 2> /dev/null; true"
        )
    }
}

fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ")
}

fn shell(lab: &Lab, host: Host, script: &str) -> Result<String> {
    let output = lab.on(host, &["timeout", &STEP_S.to_string(), "sh", "-c", script]);
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let said = last_line(&said);
    // What runc and crun write is for machines.
    let said = said.split_once("msg=\"").map_or(said, |(_, said)| said.trim_end_matches('"'));
    let criu = lab.on(host, &["sh", "-c", &format!("grep -hs Error {DIR}/work/*.log | head -1")]);
    let verb = script.split_whitespace().next().unwrap_or_default();
    Err(format!("{verb}: {said} {}", String::from_utf8_lossy(&criu.stdout).trim()).trim().into())
}

fn last_line(said: &str) -> &str {
    said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it did not say why").trim()
}

/// All figures of one method.
pub(crate) fn measure(method: Theirs, size: Size, epochs: usize, moves: usize) -> Result<Figures> {
    let lab = Lab::up(&format!("bench-{}", method.name()));
    for host in [Host::A, Host::B] {
        // The engines look for CRIU in PATH, and the distribution's may be too old for this kernel.
        let criu =
            "[ ! -e /opt/standin/criu/bin/criu ] || ln -sf /opt/standin/criu/bin/criu /usr/local/sbin/criu";
        shell(&lab, host, criu)?;
        shell(&lab, host, &format!("mkdir -p /etc/criu && echo '{CRIU_OPTIONS}' > /etc/criu/runc.conf"))?;
        shell(&lab, host, &method.prepare())?;
    }
    method.ship_image(&lab)?;
    begin(&lab, method, size)?;
    let mut figures = Figures::default();
    for _ in 0..epochs {
        figures.epochs.push(epoch(&lab, method)?);
    }
    let mut at = (Host::A, Host::B);
    for round in 0..moves {
        if round > 0 && method == Theirs::Docker {
            // Its runc makes no checkpoint of a container that it has restored.
            begin(&lab, method, size)?;
        } else if round > 0 {
            at = (at.1, at.0);
        }
        match relocate(&lab, method, at) {
            Ok(moved) => figures.moves.push(moved),
            Err(error) => {
                figures.note = Some(format!("after {round} moves: {error}"));
                break;
            }
        }
    }
    Ok(figures)
}

/// A new container on A, and what B must have to restore it.
fn begin(lab: &Lab, method: Theirs, size: Size) -> Result<()> {
    for host in [Host::A, Host::B] {
        shell(lab, host, &method.clear())?;
        shell(lab, host, &method.forget())?;
    }
    shell(lab, Host::B, &method.create())?;
    shell(lab, Host::A, &format!("ip address add {VIP}/24 dev eth0; {}", method.start()))?;
    populate(lab, size)
}

fn client_of(lab: &Lab) -> Result<Client> {
    let netns = File::open(format!("/proc/{}/ns/net", lab.pid(Host::Client)))?;
    let client = Client::start(netns);
    std::thread::sleep(Duration::from_millis(300));
    Ok(client)
}

/// One checkpoint after which the container runs on.
fn epoch(lab: &Lab, method: Theirs) -> Result<Epoch> {
    let (dir, images) = method.images();
    shell(lab, Host::A, &format!("rm -rf {DIR} {dir}/images; mkdir -p {DIR} {dir}"))?;
    if let Some(ahead) = method.ahead() {
        let refused =
            |error| format!("`runc checkpoint --pre-dump`, which needs the kernel's soft-dirty: {error}");
        shell(lab, Host::A, &ahead).map_err(refused)?;
    }
    let client = client_of(lab)?;
    let began = Instant::now();
    let said = shell(lab, Host::A, &method.checkpoint(true));
    let wall_ms = began.elapsed().as_secs_f64() * 1e3;
    std::thread::sleep(Duration::from_millis(300));
    let answers = client.stop();
    let said = said?;
    let frozen_ms = match criu_frozen_ms(lab, method, &said)? {
        Some(ms) => ms,
        // The engine keeps what CRIU says to itself.
        None => answers.longest_gap_ms(began, Instant::now()),
    };
    let bytes = shell(lab, Host::A, &format!("cd {dir} && du -scb {images} | tail -1 | cut -f1"))?;
    Ok(Epoch { frozen_ms, wall_ms, bytes: bytes.trim().parse()? })
}

/// What CRIU says of the freeze, where the engine passes it on.
fn criu_frozen_ms(lab: &Lab, method: Theirs, said: &str) -> Result<Option<f64>> {
    match method {
        Theirs::Docker => Ok(None),
        Theirs::Podman => {
            let stats: serde_json::Value = serde_json::from_str(said)?;
            let criu = &stats["container_statistics"][0]["criu_statistics"];
            let us = criu["freezing_time"].as_f64().zip(criu["frozen_time"].as_f64());
            Ok(us.map(|(freezing, frozen)| (freezing + frozen) / 1e3))
        }
        Theirs::Runc | Theirs::RuncPreDump | Theirs::Crun => {
            let dir = format!("/proc/{}/root{DIR}/work", lab.pid(Host::A));
            let (freezing_us, frozen_us) = standin::criu::stats::frozen(dir.as_ref())?;
            Ok(Some((freezing_us + frozen_us) as f64 / 1e3))
        }
    }
}

/// Waits on the target for the images, and restores them. What it says goes to a file: a pipe would stay open as long as
/// anything that it has started.
fn target(lab: &Lab, method: Theirs, to: Host, said: &File) -> Result<Child> {
    let (dir, _) = method.images();
    let script = format!(
        "mkdir -p {dir}; python3 -c \"{RECEIVE}\" {PORT} | tar -x -C {dir} && ip address add {VIP}/24 dev eth0 && {} && \
         {{ arping -q -U -c 2 -I eth0 {VIP} > /dev/null 2>&1 & }}",
        method.restore()
    );
    let mut command = lab.command(to, &["timeout", &STEP_S.to_string(), "sh", "-c", &script]);
    command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said.try_clone()?);
    let child = command.spawn()?;
    std::thread::sleep(Duration::from_millis(200));
    Ok(child)
}

fn relocate(lab: &Lab, method: Theirs, (from, to): (Host, Host)) -> Result<Move> {
    shell(lab, to, &method.clear())?;
    let (dir, images) = method.images();
    shell(lab, from, &format!("rm -rf {DIR} {dir}/images; mkdir -p {DIR} {dir}"))?;
    let mut heard = tempfile::tempfile()?;
    let mut restoring = target(lab, method, to, &heard)?;
    let client = client_of(lab)?;
    let sent = || sent_bytes(lab, from);
    let sent_before = sent()?;
    let began = Instant::now();
    let ahead = method.ahead().map(|ahead| format!("{ahead} && ")).unwrap_or_default();
    let checkpoint = method.checkpoint(false);
    let script = format!(
        "{ahead} {checkpoint} > /dev/null && ip address del {VIP}/24 dev eth0 && tar -C {dir} -c {images} | \
         python3 -c \"{SEND}\" {} {PORT}",
        to.ipv4()
    );
    let checkpointed = shell(lab, from, &script);
    if checkpointed.is_err() {
        let _ = restoring.kill();
    }
    let restored = restoring.wait()?;
    let total_ms = began.elapsed().as_secs_f64() * 1e3;
    let bytes = sent()? - sent_before;
    std::thread::sleep(SETTLE);
    let ended = Instant::now();
    let answers: Answers = client.stop();
    checkpointed?;
    if !restored.success() {
        let mut said = String::new();
        heard.rewind()?;
        heard.read_to_string(&mut said)?;
        return Err(format!("the restore failed: {}", last_line(&said)).into());
    }
    if answers.rolled_back() > 0 {
        return Err("the client was told of increments that were forgotten".into());
    }
    Ok(Move { downtime_ms: answers.longest_gap_ms(began, ended), total_ms, command_ms: total_ms, bytes })
}

/// What a host has sent on the lab's network so far.
pub(crate) fn sent_bytes(lab: &Lab, host: Host) -> Result<u64> {
    Ok(shell(lab, host, "cat /sys/class/net/eth0/statistics/tx_bytes")?.trim().parse()?)
}
