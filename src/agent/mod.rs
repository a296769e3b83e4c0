//! The daemon, one a host, both roles: control socket, peers, and one owner for each workload.
//!
//! | file | owns |
//! |---|---|
//! | [`api`], `http` | the control API: its shapes, its socket |
//! | `owner`, `roles`, `fencing`, `handoff`, `orders`, `ending`, `telling` | one task a workload: executes what [`crate::ha`] decides |
//! | `command` | the fence command |
//! | `verifying` | the warm image, compared again with what was received |
//! | `session`, `flight`, `throttle` | the primary's epochs: capture, ship, commit; slowing down for a handoff |
//! | `standby` | the standby's: receive, commit, fold, restore |
//! | `drill` | a restore on trial, isolated, beside all that |
//! | `home` | the workload's place and addresses |
//! | `trees` | the files of its declared paths |
//! | `supply`, `arrival` | what a container needs and its standby lacks: sent, taken in |
//! | `links`, `inbound` | connections to and from peers |
//! | `durable` | what survives restarts and power cuts |
//!
//! Invariants: only a workload's owner changes what it is here; the agent's end never ends a workload; at start,
//! everything is found again from the durable record and from what runs.

pub mod api;
mod arrival;
mod command;
mod drill;
mod durable;
mod ending;
mod fencing;
mod flight;
mod handoff;
mod home;
mod http;
mod inbound;
mod links;
mod orders;
mod owner;
mod promotion;
mod roles;
mod session;
mod standby;
mod supply;
mod telling;
mod throttle;
mod trees;
mod verifying;

use std::{
    collections::BTreeMap,
    fs,
    net::ToSocketAddrs,
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
    api::{
        AgentStatus, ApiError, DockerContainer, ErrorCode, FailoverRequest, HandoffReport, HandoffRequest,
        History, OciContainer, PairCode, PairJoinRequest, PeerInfo, ProtectRequest, RunReply, RunRequest,
        Source, UnprotectRequest, VerifyReport, WorkloadStatus, WrapReply, WrapRequest,
    },
    command::Fencer,
    durable::Durable,
    home::Home,
    links::Links,
    owner::{Msg, Offer, Owner, QUEUE_MAX},
    standby::lock,
    supply::{Shipment, Shipped},
};
use crate::{
    arbiter,
    config::Config,
    criu::{Install, bridge::Bridge, probe::Kernel, spawn::Spawn, swrk::Swrk},
    ha::{Arbiter, Message, Standing},
    memory::Vmas,
    model::{Name, Term},
    observe::{HistoryLog, in_full},
    transport::{
        Endpoint, Identity, PeerName, Peers,
        pairing::{Card, PairingCode},
    },
    wire::message::Reply,
    workload::{
        container::{self, Named, wrap},
        control::{Command, User},
        spec::{Cidr, MountRule, Net, PaceSpec, PlaceSpec, SandboxSpec, WorkloadSpec},
    },
};

pub use self::command::FenceCommand;

/// How long a pairing code can be used.
const PAIRING_VALID: Duration = Duration::from_secs(600);
/// How long the standby may take to agree that protection is paused.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);
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
    /// Where keys are, if etcd decides.
    etcd: Option<arbiter::Etcd>,
    owners: Mutex<BTreeMap<Name, mpsc::Sender<Msg>>>,
    /// What is on its way to standbys, of workloads that are not known yet.
    shipments: Mutex<BTreeMap<Name, Shipment>>,
    /// Places for what arrives from primaries.
    arrivals: Semaphore,
}

/// Runs the agent until it is told to stop (SIGTERM, SIGINT). Workloads run on.
pub async fn main(config: Config) -> anyhow::Result<()> {
    // Before anything is made: an agent that cannot work leaves no trace.
    let etcd = config.arbiter.etcd().cloned().map(arbiter::Etcd::new).transpose()?;
    let install = Install::find(config.criu.as_deref())?;
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
        etcd,
        owners: Mutex::new(BTreeMap::new()),
        shipments: Mutex::new(BTreeMap::new()),
        arrivals: Semaphore::new(arrival::ARRIVALS_MAX),
    });
    agent.resume()?;
    tokio::spawn(http::serve(listener, Arc::clone(&agent)));
    tokio::spawn(inbound::serve(Arc::clone(&agent)));
    notify_systemd("READY=1");
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    notify_systemd("STOPPING=1");
    agent.stop().await;
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
        let name = spec.place.name().clone();
        let known = self.owners().get(&name).cloned();
        let owner = known.unwrap_or_else(|| self.own(Durable::of(spec.clone()), None));
        let (answer, answered) = oneshot::channel();
        let offer = Msg::Offer(Box::new(Offer { peer: peer.to_string(), spec, term, bytes, answer }));
        if owner.send(offer).await.is_ok()
            && let Ok(reply) = answered.await
        {
            return reply;
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

/// What the control socket asks for.
impl Agent {
    async fn ask<T>(
        &self,
        name: &Name,
        message: impl FnOnce(oneshot::Sender<T>) -> Msg,
    ) -> Result<T, ApiError> {
        let (answer, answered) = oneshot::channel();
        let gone = || ApiError::failed(format!("the workload {name} has just been removed"));
        self.owner(name)?.send(message(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())
    }

    async fn status(&self) -> AgentStatus {
        let names: Vec<Name> = self.owners().keys().cloned().collect();
        let mut workloads = Vec::new();
        for name in names {
            workloads.extend(self.workload_status(&name).await);
        }
        AgentStatus {
            name: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            listen: self.config.listen.to_string(),
            workloads,
            shipments: self.shipments(),
        }
    }

    async fn workload_status(&self, name: &Name) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Status { answer }).await
    }

    async fn history(&self, name: &Name) -> Result<History, ApiError> {
        let place = durable::Place::of(&self.config.state_dir, name);
        if !self.owners().contains_key(name) && place.history().exists() {
            // Of one that has ended, or is another host's by now.
            let log = HistoryLog::open(&place.history());
            return Ok(History { events: log.events(), epochs: log.epochs() });
        }
        self.ask(name, |answer| Msg::History { answer }).await
    }

    async fn unprotect(&self, name: &Name, request: UnprotectRequest) -> Result<WorkloadStatus, ApiError> {
        let wait = self.ask(name, |answer| Msg::Unprotect { request, answer });
        tokio::time::timeout(Duration::from_secs(10), wait).await.map_err(|_| {
            ApiError::unreachable(format!(
                "the standby does not answer, so it may still take over: see that it is down for good, then `standin unprotect {name} --force`"
            ))
        })??
    }

    async fn failover(&self, name: &Name, request: FailoverRequest) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Failover { request, answer }).await?
    }

    async fn verify(&self, name: &Name) -> Result<VerifyReport, ApiError> {
        self.ask(name, |answer| Msg::Verify { answer }).await?
    }

    async fn fence(&self, name: &Name) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Fence { answer }).await?
    }

    async fn unfence(&self, name: &Name) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Unfence { answer }).await?
    }

    /// The standby must agree first: until then it may take over.
    async fn pause(&self, name: &Name) -> Result<WorkloadStatus, ApiError> {
        let wait = self.ask(name, |answer| Msg::Pause { answer });
        if let Ok(paused) = tokio::time::timeout(PAUSE_TIMEOUT, wait).await {
            return paused?;
        }
        // It goes on.
        let _ = self.resume_protection(name).await;
        Err(ApiError::unreachable(format!(
            "the standby does not answer, so that it may still take over: {name} is not paused. Try again when it is back"
        )))
    }

    async fn resume_protection(&self, name: &Name) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Resume { answer }).await?
    }

    async fn remove(&self, name: &Name) -> Result<(), ApiError> {
        self.ask(name, |answer| Msg::Remove { answer }).await?
    }

    async fn handoff(&self, name: &Name, request: HandoffRequest) -> Result<HandoffReport, ApiError> {
        self.ask(name, |answer| Msg::Handoff { request, answer }).await?
    }

    async fn drill(
        &self,
        name: &Name,
        request: crate::drill::Request,
    ) -> Result<crate::drill::Report, ApiError> {
        self.ask(name, |answer| Msg::Drill { request, answer }).await?
    }

    async fn end_drill(&self, name: &Name) -> Result<(), ApiError> {
        self.ask(name, |answer| Msg::EndDrill { answer }).await?
    }

    async fn run(self: &Arc<Self>, request: RunRequest) -> Result<RunReply, ApiError> {
        let name = request.name.clone();
        if self.owners().contains_key(&name) {
            return Err(ApiError::refused(format!("the name {name} is taken; see `standin status {name}`")));
        }
        let agent = Arc::clone(self);
        let started =
            tokio::task::spawn_blocking(move || agent.start(&request)).await.map_err(ApiError::failed)??;
        let (durable, home, reply) = started;
        self.own(durable, Some(home));
        Ok(reply)
    }

    /// Makes a sandbox and starts the command in it; blocks.
    fn start(&self, request: &RunRequest) -> Result<(Durable, Home, RunReply), ApiError> {
        let name = request.name.clone();
        let spec = SandboxSpec {
            name: name.clone(),
            net: Net::Own { ips: request.ips.clone() },
            paths: request.paths.clone(),
            hostname: name.to_string(),
        };
        let user = user_named(request.user.as_deref())?;
        let place = durable::Place::of(&self.config.state_dir, &name);
        let unseeded =
            |error| ApiError::failed(format!("the files of {name} cannot be copied to its place: {error}"));
        trees::clear_shm(&self.config, &name).map_err(unseeded)?;
        let seeds = trees::Seeds::find(&place, &spec).map_err(unseeded)?;
        let spec = PlaceSpec::Sandbox(spec);
        let home = Home::create(self, &spec, true).map_err(|error| ApiError::refused(in_full(&error)))?;
        let seeded = seeds.sow().map_err(unseeded);
        let started = seeded.and_then(|()| self.start_in(&home, request, user));
        let started = started.and_then(|pid| seeds.keep().map(|()| pid).map_err(unseeded));
        let pid = started.inspect_err(|_| {
            // The first error is the one to report.
            let _ = Home::destroy(self, &name);
        })?;
        let durable = Durable::of(WorkloadSpec {
            place: spec,
            vips: Vec::new(),
            pace: PaceSpec::default(),
            arbiter: Arbiter::default(),
        });
        place.write(&durable).map_err(ApiError::failed)?;
        Ok((durable, home, RunReply { name, pid, log: place.log() }))
    }

    #[expect(clippy::unused_self, reason = "a step of start")]
    fn start_in(&self, home: &Home, request: &RunRequest, user: User) -> Result<i32, ApiError> {
        let failed = |error: &dyn std::fmt::Display| ApiError::refused(error);
        let sandbox = home.sandbox().ok_or_else(|| ApiError::failed("the place is no sandbox"))?;
        let mut env: Vec<String> =
            request.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let defaults = [
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", "/root"),
            ("TERM", "dumb"),
        ];
        for (variable, value) in defaults {
            if !request.env.iter().any(|(name, _)| name == variable) {
                env.push(format!("{variable}={value}"));
            }
        }
        let command = Command { argv: request.command.clone(), env, cwd: request.cwd.clone(), user };
        sandbox.start(&command).map_err(|error| failed(&error))?;
        home.open_up().map_err(|error| failed(&in_full(&error)))?;
        let root = home.root().map_err(|error| failed(&in_full(&error)))?;
        root.map(|root| root.host as i32).ok_or_else(|| {
            ApiError::refused(format!(
                "{:?} ended at once; its output is in the workload's log",
                request.command
            ))
        })
    }

    async fn protect(self: &Arc<Self>, request: ProtectRequest) -> Result<WorkloadStatus, ApiError> {
        let name = request.name.clone();
        let mut shipped = Vec::new();
        if request.ship_image && !matches!(request.source, Source::Oci(_) | Source::Docker(_)) {
            return Err(ApiError::invalid("--ship-image is for containers: a sandbox has no image"));
        }
        match &request.source {
            Source::Run(run) => {
                self.owner(run).map_err(|_| {
                    ApiError::not_found(format!(
                        "no sandbox named {run} here: start it with `standin run {run} -- CMD`"
                    ))
                })?;
            }
            Source::Oci(OciContainer { id, runtime, state, ips, mounts }) => {
                let (runtime, state) = (*runtime, state.clone());
                let named = Named::Oci { runtime, state, id: id.clone() };
                shipped = self.adopt_container(&request, named, (ips.clone(), mounts.clone())).await?;
            }
            Source::Docker(DockerContainer { daemon, container, ips, mounts }) => {
                let named = Named::Docker { daemon: *daemon, container: container.clone() };
                shipped = self.adopt_container(&request, named, (ips.clone(), mounts.clone())).await?;
            }
            Source::Pid(pid) => {
                self.check_free(&name)?;
                let pid = u32::try_from(*pid).map_err(|_| ApiError::invalid(format!("{pid} is no pid")))?;
                self.check_pid(pid).await?;
                let agent = Arc::clone(self);
                let adopting = name.clone();
                let home = tokio::task::spawn_blocking(move || Home::adopt(&agent, &adopting, pid))
                    .await
                    .map_err(ApiError::failed)?
                    .map_err(|error| ApiError::new(ErrorCode::Refused, in_full(&error)))?;
                let hostname = nix::unistd::gethostname()
                    .map_or_else(|_| name.to_string(), |name| name.to_string_lossy().into_owned());
                let sandbox = SandboxSpec { name: name.clone(), net: Net::Host, paths: Vec::new(), hostname };
                let place = PlaceSpec::Sandbox(sandbox);
                let spec =
                    WorkloadSpec { place, vips: Vec::new(), pace: request.pace, arbiter: Arbiter::default() };
                self.own(Durable { bare: true, ..Durable::of(spec) }, Some(home));
            }
        }
        self.ask(&name, |answer| Msg::Protect { request: Box::new(request), shipped, answer }).await?
    }

    async fn adopt_container(
        self: &Arc<Self>,
        request: &ProtectRequest,
        named: Named,
        (ips, mounts): (Vec<Cidr>, Vec<MountRule>),
    ) -> Result<Vec<String>, ApiError> {
        self.check_free(&request.name)?;
        self.check_container(named.container()).await?;
        let Shipped { lent, what } = if request.ship_image {
            let shipped = self.ship(request, &named, (&ips, &mounts)).await?;
            self.check_free(&request.name)?;
            shipped
        } else {
            Shipped::default()
        };
        let (agent, name) = (Arc::clone(self), request.name.clone());
        let adopt = move || Home::adopt_container(&agent, &name, &named, (&ips, &mounts), lent);
        let home = tokio::task::spawn_blocking(adopt)
            .await
            .map_err(ApiError::failed)?
            .map_err(|error| ApiError::new(ErrorCode::Refused, in_full(&error)))?;
        let adopted = home.container_spec().ok_or_else(|| ApiError::failed("the place is no container"))?;
        let place = PlaceSpec::Container(adopted.clone());
        let spec = WorkloadSpec { place, vips: Vec::new(), pace: request.pace, arbiter: Arbiter::default() };
        self.own(Durable::of(spec), Some(home));
        Ok(what)
    }

    fn check_free(&self, name: &Name) -> Result<(), ApiError> {
        if self.owners().contains_key(name) {
            return Err(ApiError::refused(format!("the name {name} is taken; see `standin status {name}`")));
        }
        if lock(&self.shipments).contains_key(name) {
            let reason =
                format!("what {name} needs is on its way to its standby already; see `standin status`");
            return Err(ApiError::refused(reason));
        }
        Ok(())
    }

    /// Nor can a container be.
    async fn check_container(&self, id: &str) -> Result<(), ApiError> {
        let workloads = self.status().await.workloads;
        match workloads
            .into_iter()
            .find(|workload| workload.container.as_ref().is_some_and(|container| container.id == id))
        {
            Some(workload) => Err(ApiError::refused(format!(
                "container {id} is protected already, as {0}; see `standin status {0}`",
                workload.name
            ))),
            None => Ok(()),
        }
    }

    /// Makes a container's directory for the init ready, and wraps a bundle with it.
    fn wrap(&self, request: &WrapRequest) -> Result<WrapReply, ApiError> {
        let dir = wrap::provide(&self.wraps(), &request.name).map_err(|error| {
            ApiError::failed(format!(
                "cannot make {}: {error}",
                self.wraps().join(request.name.as_str()).display()
            ))
        })?;
        if let Some(bundle) = &request.bundle {
            container::wrap_bundle(bundle, &dir).map_err(ApiError::refused)?;
        }
        Ok(WrapReply {
            name: request.name.clone(),
            dir,
            inside: wrap::INSIDE.into(),
            init: wrap::INIT.into(),
        })
    }

    /// Another workload's process cannot be protected under a second name.
    async fn check_pid(&self, pid: u32) -> Result<(), ApiError> {
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))
            .map_err(|_| ApiError::not_found(format!("there is no process {pid} here")))?;
        for workload in self.status().await.workloads {
            if cgroup.contains(&format!("/standin/{}/", workload.name)) {
                return Err(ApiError::refused(format!(
                    "process {pid} belongs to the workload {}",
                    workload.name
                )));
            }
        }
        Ok(())
    }

    fn peers(&self) -> Vec<PeerInfo> {
        self.endpoint.peers().list().iter().map(peer_info).collect()
    }

    async fn forget_peer(&self, name: &str) -> Result<serde_json::Value, ApiError> {
        let used =
            self.status().await.workloads.into_iter().find(|workload| workload.peer.as_deref() == Some(name));
        if let Some(workload) = used {
            return Err(ApiError::refused(format!(
                "{name} is the peer of {}: standin unprotect it first",
                workload.name
            )));
        }
        let name: PeerName = name.parse().map_err(ApiError::invalid)?;
        self.endpoint.peers().remove(&name).map_err(ApiError::not_found)?;
        Ok(serde_json::json!({}))
    }

    fn pair_listen(&self) -> Result<PairCode, ApiError> {
        let listener = self.endpoint.open_pairing(self.card()?, PAIRING_VALID).map_err(ApiError::refused)?;
        let code = listener.code().to_string();
        tokio::spawn(async move {
            match listener.wait().await {
                Ok(peer) => tracing::info!(peer = %peer.name, "paired"),
                Err(error) => tracing::warn!(%error, "pairing"),
            }
        });
        Ok(PairCode { code, port: self.config.listen.port(), valid_s: PAIRING_VALID.as_secs() })
    }

    async fn pair_join(&self, request: PairJoinRequest) -> Result<PeerInfo, ApiError> {
        let code: PairingCode = request.code.parse().map_err(ApiError::invalid)?;
        let text = request.addr.clone();
        let resolved = tokio::task::spawn_blocking(move || text.to_socket_addrs().map(|mut all| all.next()))
            .await
            .map_err(ApiError::failed)?;
        let addr = resolved
            .ok()
            .flatten()
            .ok_or_else(|| ApiError::invalid(format!("{:?} is no HOST:PORT that resolves", request.addr)))?;
        let peer = self.endpoint.join(addr, &code, self.card()?).await.map_err(ApiError::refused)?;
        Ok(peer_info(&peer))
    }

    fn card(&self) -> Result<Card, ApiError> {
        let name = self.config.name.parse().map_err(ApiError::failed)?;
        Ok(Card { name, addr: self.config.listen })
    }
}

fn peer_info(peer: &crate::transport::Peer) -> PeerInfo {
    PeerInfo {
        name: peer.name.to_string(),
        addr: peer.addr.to_string(),
        fingerprint: peer.fingerprint.to_string(),
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

/// User and groups of a name, as `id` would show them.
fn user_named(name: Option<&str>) -> Result<User, ApiError> {
    let Some(name) = name else { return Ok(User::default()) };
    let user = nix::unistd::User::from_name(name)
        .map_err(ApiError::failed)?
        .ok_or_else(|| ApiError::invalid(format!("there is no user named {name}")))?;
    let text = std::ffi::CString::new(name).map_err(ApiError::invalid)?;
    let groups = nix::unistd::getgrouplist(&text, user.gid).map_err(ApiError::failed)?;
    Ok(User {
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
        groups: groups.iter().map(|gid| gid.as_raw()).collect(),
    })
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
