//! The same container under Standin's protection from inside, in a network of its own, and moved by `standin handoff`.

use std::time::{Duration, Instant};

use standin::model::EpochFigures;

use crate::{
    REDIS, Result, Size,
    client::Client,
    cluster::{Cluster, wait_for},
    containers::Oci,
    docker::{DOCKER, Daemon, Docker, PODMAN},
    figures::{Epoch, Figures, Move},
    lab::Host,
    populate,
    redis::VIP,
    theirs::sent_bytes,
};

const EPOCHS_PATIENCE: Duration = Duration::from_secs(60);
const SETTLE: Duration = Duration::from_millis(500);
/// As `handoff` has it where nothing is said: but a loaded machine is no reason to have no figure.
const DOWNTIME_MAX: &str = "10s";

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ours {
    Runc,
    Crun,
    Docker,
    Podman,
}

/// Whoever runs the container; its lab goes with it.
enum Engine {
    Oci(Oci),
    Docker(Docker),
}

impl Engine {
    fn cluster(&self) -> &Cluster {
        match self {
            Self::Oci(oci) => &oci.cluster,
            Self::Docker(docker) => &docker.cluster,
        }
    }
}

impl Ours {
    pub(crate) const ALL: [Self; 4] = [Self::Runc, Self::Crun, Self::Docker, Self::Podman];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Runc => "standin-runc",
            Self::Crun => "standin-crun",
            Self::Docker => "standin-docker",
            Self::Podman => "standin-podman",
        }
    }

    /// A redis that runs in a container of the engine, wrapped, not yet protected; and what `protect` is told of it.
    fn start(self) -> (Engine, Vec<String>) {
        let cluster = Cluster::with(&format!("bench-{}", self.name()), &["--log", "warn"]);
        let vip = ["--vip".to_owned(), format!("{VIP}/24@eth0")];
        let of_daemon = |cluster, daemon: &'static Daemon, flag: &str| {
            let docker = Docker::up_in(cluster, daemon);
            docker.ship_image();
            docker.run(&["--network", "app", "-p", "6379:6379"], REDIS);
            (Engine::Docker(docker), [&[flag.to_owned(), "redis".to_owned()], vip.as_slice()].concat())
        };
        let of_runtime = |cluster, runtime| {
            let oci = Oci::prepare_in(cluster, runtime, "redis", &["redis-server", "redis-cli"], REDIS);
            oci.start(true);
            let flags = ["--oci", "redis", "--ip"].map(str::to_owned);
            (Engine::Oci(oci), [flags.as_slice(), &[format!("{VIP}/24")], &vip].concat())
        };
        match self {
            Self::Runc => of_runtime(cluster, "runc"),
            Self::Crun => of_runtime(cluster, "crun"),
            Self::Docker => of_daemon(cluster, &DOCKER, "--docker"),
            Self::Podman => of_daemon(cluster, &PODMAN, "--podman"),
        }
    }
}

/// All figures of one engine's container.
pub(crate) fn measure(method: Ours, size: Size, epochs: usize, moves: usize) -> Result<Figures> {
    let (engine, flags) = method.start();
    let cluster = engine.cluster();
    let protect = || {
        let fixed = ["protect", "redis", "--to", "b", "--every", "200ms"];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        cluster.standin(Host::A, &[fixed.as_slice(), &flags].concat());
        cluster.wait_state(Host::A, "primary", "protected");
    };
    // It has an address on the lab's network from here on only.
    protect();
    populate(&cluster.lab, size)?;
    // The standby has nothing of it yet, as on the first day.
    cluster.standin(Host::A, &["unprotect", "redis"]);
    wait_for("the standby to forget it", || cluster.status(Host::B, "redis").is_null());
    let before = sent_bytes(&cluster.lab, Host::A)?;
    let began = Instant::now();
    protect();
    let first = (began.elapsed().as_secs_f64() * 1e3, sent_bytes(&cluster.lab, Host::A)? - before);
    cluster.wait_state(Host::B, "standby", "ready");

    let client = Client::start(cluster.client_network());
    let epochs = await_epochs(cluster, epochs)?;
    drop(client.stop());
    let mut figures = Figures { epochs, first: Some(first), ..Figures::default() };
    let mut at = (Host::A, Host::B);
    for _ in 0..moves {
        figures.moves.push(relocate(cluster, at)?);
        at = (at.1, at.0);
    }
    Ok(figures)
}

/// The next epochs, of a container that does little.
fn await_epochs(cluster: &Cluster, count: usize) -> Result<Vec<Epoch>> {
    let known = || -> Result<Vec<EpochFigures>> {
        let mut history = cluster.json(Host::A, &["history", "redis"]);
        Ok(serde_json::from_value(history["epochs"].take())?)
    };
    // The first ones after a full epoch find cold caches.
    std::thread::sleep(SETTLE);
    let newest = known()?.last().map(|epoch| epoch.id).ok_or("no epoch is known")?;
    let until = Instant::now() + EPOCHS_PATIENCE;
    loop {
        let mut epochs = known()?;
        epochs.retain(|epoch| epoch.id > newest && !epoch.full);
        if epochs.len() >= count {
            let figure = |epoch: &EpochFigures| Epoch {
                frozen_ms: epoch.frozen_us as f64 / 1e3,
                wall_ms: (epoch.capture_us + epoch.ship_us) as f64 / 1e3,
                bytes: epoch.shipped_bytes,
            };
            return Ok(epochs.iter().take(count).map(figure).collect());
        }
        if Instant::now() > until {
            return Err(format!("only {} of {count} epochs came", epochs.len()).into());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn relocate(cluster: &Cluster, (from, to): (Host, Host)) -> Result<Move> {
    cluster.wait_state(from, "primary", "protected");
    cluster.wait_state(to, "standby", "ready");
    let client = Client::start(cluster.client_network());
    std::thread::sleep(SETTLE);
    let before = sent_bytes(&cluster.lab, from)?;
    let began = Instant::now();
    let report = cluster.json(from, &["handoff", "redis", "--max-downtime", DOWNTIME_MAX]);
    let command_ms = began.elapsed().as_secs_f64() * 1e3;
    let total_ms = report["total_ms"].as_f64().ok_or("a handoff without a total")?;
    let bytes = sent_bytes(&cluster.lab, from)? - before;
    std::thread::sleep(SETTLE);
    let ended = Instant::now();
    let answers = client.stop();
    if answers.rolled_back() > 0 {
        return Err("the client was told of increments that were forgotten".into());
    }
    Ok(Move { downtime_ms: answers.longest_gap_ms(began, ended), total_ms, command_ms, bytes })
}
