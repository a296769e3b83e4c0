//! The daemon, one a host, both roles: control socket, peers, and one owner for each workload.
//!
//! | file | owns |
//! |---|---|
//! | [`api`], `http`, `calls` | the control API: its shapes, its socket, its answers |
//! | `owner`, `mailbox`, `roles`, `fencing`, `handoff`, `orders`, `rejoin`, `ending`, `telling` | one task a workload: executes what [`crate::ha`] decides |
//! | `command`, `hooks`, `program` | the fence command; commands for a change of roles; how both are run |
//! | `examining` | this host and a peer's compared, for the doctor |
//! | `verifying` | the warm image, compared again with what was received |
//! | `session`, `progress`, `flight`, `output`, `throttle` | the primary's epochs: capture, ship, commit; packets that wait for them; slowing down |
//! | `receiving`, `standby` | the standby's: receive, commit; fold, restore |
//! | `inputs` | what is sent to a workload whose output waits, told to its standby |
//! | `inventory` | what a standby holds, by hashes, where the primary does not know |
//! | `drill` | a restore on trial, isolated, beside all that |
//! | `home` | the workload's place and addresses |
//! | `trees` | the files of its declared paths |
//! | `supply`, `arrival` | what a container needs and its standby lacks: sent, taken in |
//! | `watchdog` | the device that resets this host if a guard is not in order |
//! | `links`, `inbound` | connections to and from peers |
//! | `durable` | what survives restarts and power cuts |
//!
//! Invariants: only a workload's owner changes what it is here; the agent's end never ends a workload; at start,
//! everything is found again from the durable record and from what runs.

pub mod api;
mod arrival;
mod calls;
mod command;
mod drill;
mod durable;
mod ending;
mod examining;
mod fencing;
mod flight;
mod handoff;
mod home;
mod hooks;
mod http;
mod inbound;
mod inputs;
mod inventory;
mod links;
mod mailbox;
mod orders;
mod output;
mod owner;
mod program;
mod progress;
mod promotion;
mod receiving;
mod rejoin;
mod roles;
mod session;
mod standby;
mod supply;
mod telling;
mod throttle;
mod trees;
mod verifying;
mod watchdog;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, mpsc, oneshot},
};

use self::{
    api::ApiError,
    command::Fencer,
    durable::Durable,
    home::Home,
    links::Links,
    mailbox::{Msg, Offer, QUEUE_MAX},
    owner::Owner,
    standby::lock,
    supply::Shipment,
    watchdog::Watchdog,
};
use crate::{
    arbiter,
    config::Config,
    criu::{Install, bridge::Bridge, probe::Kernel, spawn::Spawn, swrk::Swrk},
    ha::{Message, Standing},
    memory::Vmas,
    model::{Name, Term},
    observe::in_full,
    transport::{Endpoint, Identity, PeerName, Peers, block_in_place},
    wire::message::Reply,
    workload::spec::WorkloadSpec,
};

pub use self::{command::FenceCommand, hooks::HookCommands, watchdog::WatchdogSettings};

/// How long a stopping agent waits for its peers' word.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// One host's agent.
pub struct Agent {
    pub(crate) config: Config,
    pub(crate) endpoint: Endpoint,
    pub(crate) install: Install,
    /// This executable, for inits and CRIU's launcher.
    pub(crate) program: PathBuf,
    pub(crate) kernel: Kernel,
    /// What lists mappings for CRIU, where the kernel permits it.
    pub(crate) vmas: Option<Arc<Vmas>>,
    links: Links,
    fencer: Fencer,
    /// Resets this host, if the settings name one.
    watchdog: Option<Watchdog>,
    /// Where keys are, if etcd decides.
    etcd: Option<arbiter::Etcd>,
    owners: Mutex<BTreeMap<Name, mpsc::Sender<Msg>>>,
    /// What is on its way to standbys, of workloads that are not known yet.
    shipments: Mutex<BTreeMap<Name, Shipment>>,
    /// Places for what arrives from primaries.
    arrivals: Semaphore,
    /// Peers' questions about this host that are answered at once.
    examining: Semaphore,
}

/// Runs the agent until it is told to stop (SIGTERM, SIGINT). Workloads run on.
pub async fn main(config: Config) -> anyhow::Result<()> {
    // Before anything is made: an agent that cannot work leaves no trace.
    let etcd = config.arbiter.etcd().cloned().map(arbiter::Etcd::new).transpose()?;
    let install = Install::find(config.criu.as_deref())?;
    let watchdog = config.watchdog.clone().map(Watchdog::start).transpose();
    let watchdog =
        watchdog.context("`watchdog` names a device that is not there: load its driver (see `wdctl`)")?;
    for dir in [&config.state_dir, &config.run_dir, &config.store_dir, &config.work_dir] {
        private_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let listener = http::listen(&config.control_socket())
        .with_context(|| format!("cannot open the control socket {}", config.control_socket().display()))?;
    let identity = Identity::load_or_create(&config.state_dir)?;
    let peers = Arc::new(Peers::load(&config.state_dir)?);
    let endpoint = Endpoint::bind(config.listen, identity, peers)?;
    let program = std::env::current_exe().context("cannot find this executable")?;
    tracing::info!(name = config.name, listen = %config.listen, criu = %install.version, "the agent starts");
    warm_criu(&config, &install);
    arrival::sweep(&config).context("cannot remove what had not arrived whole")?;
    if let Err(error) = drill::sweep(&config) {
        // It is isolated, and harms nobody; what runs here for real is not to wait for it.
        tracing::error!(
            error = in_full(&error),
            "a drill was cut off, and what it left cannot be taken away"
        );
    }
    let kernel = Kernel::probe(&program).context("cannot try what this kernel offers")?;
    let vmas = Vmas::open().inspect_err(|error| {
        tracing::info!(%error, "freezes take longer the more memory a workload has; see `standin doctor`");
    });
    let agent = Arc::new(Agent {
        config,
        endpoint,
        install,
        program,
        kernel,
        vmas: vmas.ok().map(Arc::new),
        links: Links::default(),
        fencer: Fencer::default(),
        watchdog,
        etcd,
        owners: Mutex::new(BTreeMap::new()),
        shipments: Mutex::new(BTreeMap::new()),
        arrivals: Semaphore::new(arrival::ARRIVALS_MAX),
        examining: Semaphore::new(examining::EXAMINED_AT_ONCE),
    });
    agent.resume()?;
    tokio::spawn(http::serve(listener, Arc::clone(&agent)));
    tokio::spawn(inbound::serve(Arc::clone(&agent)));
    notify_systemd("READY=1");
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    notify_systemd("STOPPING=1");
    agent.stop().await;
    if let Some(watchdog) = &agent.watchdog {
        block_in_place(|| watchdog.end());
    }
    let _ = fs::remove_file(agent.config.control_socket());
    Ok(())
}

impl Agent {
    pub(crate) fn sandboxes_dir(&self) -> PathBuf {
        self.config.sandboxes_dir()
    }

    /// The directories that wrapped containers have their init from.
    pub(crate) fn wraps(&self) -> PathBuf {
        self.config.state_dir.join("wrap")
    }

    /// Takes up every workload that is on disk.
    fn resume(self: &Arc<Self>) -> anyhow::Result<()> {
        for name in durable::Place::all(&self.config.state_dir)? {
            let place = durable::Place::of(&self.config.state_dir, &name);
            let durable = place.read().with_context(|| format!("the record of the workload {name}"))?;
            let home = Home::open(self, &durable.spec.place, durable.bare)
                .inspect_err(|error| tracing::info!(%name, %error, "the workload has no place here"))
                .ok();
            self.own(durable, home);
        }
        Ok(())
    }

    /// Gives a workload an owner.
    fn own(self: &Arc<Self>, durable: Durable, home: Option<Home>) -> mpsc::Sender<Msg> {
        let name = durable.spec.place.name().clone();
        let (sender, inbox) = mpsc::channel(QUEUE_MAX);
        let owner = Owner::new(Arc::clone(self), durable, home, (sender.clone(), inbox));
        self.owners().insert(name, sender.clone());
        tokio::spawn(owner.run());
        sender
    }

    fn owners(&self) -> std::sync::MutexGuard<'_, BTreeMap<Name, mpsc::Sender<Msg>>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_owner(&self, name: &Name) {
        self.owners().remove(name);
    }

    fn owner(&self, name: &Name) -> Result<mpsc::Sender<Msg>, ApiError> {
        let owner = self.owners().get(name).cloned();
        owner.ok_or_else(|| {
            let was = durable::Place::of(&self.config.state_dir, name).history().exists();
            if lock(&self.shipments).contains_key(name) {
                return ApiError::not_found(format!(
                    "what {name} needs is on its way to its standby; see `standin status`"
                ));
            }
            let was = if was {
                format!(", and what became of it: `standin history {name}`")
            } else {
                String::new()
            };
            ApiError::not_found(format!("no workload named {name} here; see `standin status`{was}"))
        })
    }

    /// The owner of a workload about which a peer speaks.
    fn owner_for(&self, name: &Name, _peer: &PeerName) -> Option<mpsc::Sender<Msg>> {
        self.owners().get(name).cloned()
    }

    /// What to say of a workload that is not known here.
    #[expect(clippy::unused_self, reason = "the agent speaks")]
    fn unknown(&self, name: &Name, message: Message) -> Reply {
        tracing::debug!(%name, ?message, "a peer speaks of a workload that is not known here");
        match message {
            Message::Withdraw { term } => Reply::Said(Message::Withdrawn { term }),
            Message::Inquire { .. } => {
                Reply::Said(Message::Known { term: Term(0), standing: Standing::Forgotten, held: None })
            }
            _ => Reply::Done,
        }
    }

    /// A peer asks this host to be its standby.
    async fn offered(self: &Arc<Self>, peer: &PeerName, spec: WorkloadSpec, term: Term, bytes: u64) -> Reply {
        // An owner that is just ending, after the end of an earlier protection, is not asked again once it has.
        const ATTEMPTS: usize = 50;
        const PAUSE: Duration = Duration::from_millis(20);
        let name = spec.place.name().clone();
        for _ in 0..ATTEMPTS {
            let known = self.owners().get(&name).cloned();
            let owner = known.unwrap_or_else(|| self.own(Durable::of(spec.clone()), None));
            let (answer, answered) = oneshot::channel();
            let (peer, spec) = (peer.to_string(), spec.clone());
            let offer = Msg::Offer(Box::new(Offer { peer, spec, term, bytes, answer }));
            if owner.send(offer).await.is_ok()
                && let Ok(reply) = answered.await
            {
                return reply;
            }
            tokio::time::sleep(PAUSE).await;
        }
        Reply::Refused { term: Term(0), reason: format!("{name} has just been removed there; try again") }
    }

    async fn stop(&self) {
        let owners: Vec<_> = self.owners().values().cloned().collect();
        let stopping = owners.into_iter().map(|owner| async move {
            let (answer, answered) = oneshot::channel();
            if owner.send(Msg::Stop { answer }).await.is_ok() {
                let _ = answered.await;
            }
        });
        let all = async {
            for task in stopping.map(tokio::spawn).collect::<Vec<_>>() {
                let _ = task.await;
            }
        };
        if tokio::time::timeout(STOP_TIMEOUT, all).await.is_err() {
            tracing::warn!(
                "a peer did not answer: it takes over if the workload's lease runs out before the agent is back"
            );
        }
        drill::await_none(&self.config, STOP_TIMEOUT).await;
        self.endpoint.close().await;
    }
}

/// The first CRIU of a boot spends some 60 ms on finding out what the kernel can do: here, and not in a takeover.
fn warm_criu(config: &Config, install: &Install) {
    let features =
        Bridge::new(&config.work_dir, install.version).map_err(anyhow::Error::from).and_then(|bridge| {
            let images = fs::File::open(&config.work_dir)?;
            let spawn = Spawn { bridge: Some(&bridge), ..Spawn::new(std::os::fd::AsFd::as_fd(&images)) };
            Ok(Swrk::spawn(install, &spawn)?.ask_features()?)
        });
    match features {
        Ok(features) => tracing::debug!(?features, "CRIU"),
        Err(error) => tracing::warn!(%error, "CRIU does not say what it can do; see `standin doctor`"),
    }
}

fn private_dir(dir: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Tells systemd, if it started us (sd_notify(3)).
fn notify_systemd(state: &str) {
    use std::os::{linux::net::SocketAddrExt, unix::net::SocketAddr};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let Ok(socket) = std::os::unix::net::UnixDatagram::unbound() else { return };
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
    let sent = match bytes.strip_prefix(b"@") {
        Some(name) => <SocketAddr as SocketAddrExt>::from_abstract_name(name)
            .and_then(|address| socket.send_to_addr(state.as_bytes(), &address)),
        None => socket.send_to(state.as_bytes(), &path),
    };
    if let Err(error) = sent {
        tracing::debug!(%error, "telling systemd");
    }
}
