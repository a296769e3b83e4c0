//! What the control socket asks of the agent, and how it is answered: most goes to a workload's owner.

use std::{fs, net::ToSocketAddrs, sync::Arc, time::Duration};

use tokio::sync::oneshot;

use super::{
    Agent,
    api::{
        AgentStatus, ApiError, CommitRequest, DockerContainer, ErrorCode, FailoverRequest, HandoffReport,
        HandoffRequest, History, OciContainer, PairCode, PairJoinRequest, PeerInfo, ProtectRequest, Role,
        RunReply, RunRequest, Source, UnprotectRequest, VerifyReport, WorkloadStatus, WrapReply, WrapRequest,
    },
    durable::{self, Durable},
    home::Home,
    mailbox::Msg,
    standby::lock,
    supply::Shipped,
    trees,
    watchdog::Watchdog,
};
use crate::{
    ha::Arbiter,
    model::Name,
    observe::{HistoryLog, in_full},
    takeover::check::{VipError, check_vip},
    transport::{
        PeerName,
        pairing::{Card, PairingCode},
    },
    workload::{
        container::{self, Named, wrap},
        control::{Command, User},
        spec::{Cidr, Commit, MountRule, Net, PaceSpec, PlaceSpec, SandboxSpec, Vip, WorkloadSpec},
    },
};

/// How long a pairing code can be used.
const PAIRING_VALID: Duration = Duration::from_secs(600);
/// How long the standby may take to agree that protection is paused.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long others may take to say that an address is theirs.
const PROBE_LIMIT: Duration = Duration::from_millis(600);

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

    pub(super) async fn status(&self) -> AgentStatus {
        let names: Vec<Name> = self.owners().keys().cloned().collect();
        let mut workloads = Vec::new();
        for name in names {
            workloads.extend(self.workload_status(&name).await);
        }
        AgentStatus {
            name: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            listen: self.config.listen.to_string(),
            watchdog: self.watchdog.as_ref().map(Watchdog::status),
            workloads,
            shipments: self.shipments(),
        }
    }

    pub(super) async fn workload_status(&self, name: &Name) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Status { answer }).await
    }

    pub(super) async fn history(&self, name: &Name) -> Result<History, ApiError> {
        let place = durable::Place::of(&self.config.state_dir, name);
        if !self.owners().contains_key(name) && place.history().exists() {
            // Of one that has ended, or is another host's by now.
            let log = HistoryLog::open(&place.history());
            return Ok(History { events: log.events(), epochs: log.epochs() });
        }
        self.ask(name, |answer| Msg::History { answer }).await
    }

    pub(super) async fn unprotect(
        &self,
        name: &Name,
        request: UnprotectRequest,
    ) -> Result<WorkloadStatus, ApiError> {
        let wait = self.ask(name, |answer| Msg::Unprotect { request, answer });
        tokio::time::timeout(Duration::from_secs(10), wait).await.map_err(|_| {
            ApiError::unreachable(format!(
                "the standby does not answer, so it may still take over: see that it is down for good, then `standin unprotect {name} --force`"
            ))
        })??
    }

    pub(super) async fn failover(
        &self,
        name: &Name,
        request: FailoverRequest,
    ) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Failover { request, answer }).await?
    }

    pub(super) async fn verify(&self, name: &Name) -> Result<VerifyReport, ApiError> {
        self.ask(name, |answer| Msg::Verify { answer }).await?
    }

    pub(super) async fn fence(&self, name: &Name) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Fence { answer }).await?
    }

    pub(super) async fn rejoin(&self, name: &Name) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Rejoin { answer }).await?
    }

    pub(super) async fn unfence(&self, name: &Name) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Unfence { answer }).await?
    }

    /// The standby must agree first: until then it may take over.
    pub(super) async fn pause(&self, name: &Name) -> Result<WorkloadStatus, ApiError> {
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

    pub(super) async fn set_commit(
        &self,
        name: &Name,
        request: CommitRequest,
    ) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Commit { mode: request.mode, answer }).await?
    }

    pub(super) async fn resume_protection(&self, name: &Name) -> Result<WorkloadStatus, ApiError> {
        self.ask(name, |answer| Msg::Resume { answer }).await?
    }

    pub(super) async fn remove(&self, name: &Name) -> Result<(), ApiError> {
        self.ask(name, |answer| Msg::Remove { answer }).await?
    }

    pub(super) async fn handoff(
        &self,
        name: &Name,
        request: HandoffRequest,
    ) -> Result<HandoffReport, ApiError> {
        self.ask(name, |answer| Msg::Handoff { request, answer }).await?
    }

    pub(super) async fn drill(
        &self,
        name: &Name,
        request: crate::drill::Request,
    ) -> Result<crate::drill::Report, ApiError> {
        self.ask(name, |answer| Msg::Drill { request, answer }).await?
    }

    pub(super) async fn end_drill(&self, name: &Name) -> Result<(), ApiError> {
        self.ask(name, |answer| Msg::EndDrill { answer }).await?
    }

    pub(super) async fn run(self: &Arc<Self>, request: RunRequest) -> Result<RunReply, ApiError> {
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
        let durable = Durable::of(unprotected(spec));
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
        home.started().map_err(|error| failed(&in_full(&error)))?;
        home.open_up().map_err(|error| failed(&in_full(&error)))?;
        let root = home.root().map_err(|error| failed(&in_full(&error)))?;
        root.map(|root| root.host as i32).ok_or_else(|| {
            ApiError::refused(format!(
                "{:?} ended at once; its output is in the workload's log",
                request.command
            ))
        })
    }

    pub(super) async fn protect(
        self: &Arc<Self>,
        request: ProtectRequest,
    ) -> Result<WorkloadStatus, ApiError> {
        let name = request.name.clone();
        let mut shipped = Vec::new();
        if request.ship_image && !matches!(request.source, Source::Oci(_) | Source::Docker(_)) {
            return Err(ApiError::invalid("--ship-image is for containers: a sandbox has no image"));
        }
        self.check_unclaimed(&request).await?;
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
                let spec = unprotected(place);
                self.own(Durable { bare: true, ..Durable::of(spec) }, Some(home));
            }
        }
        self.ask(&name, |answer| Msg::Protect { request: Box::new(request), shipped, answer }).await?
    }

    /// An address that somebody else has is not taken: two would answer for it. One of a workload that is protected already is
    /// its own.
    async fn check_unclaimed(&self, request: &ProtectRequest) -> Result<(), ApiError> {
        let known = self.workload_status(&request.name).await;
        if known.is_ok_and(|status| status.role != Role::Unprotected) {
            return Ok(());
        }
        let ask = |vip: &Vip| {
            let vip = vip.clone();
            tokio::task::spawn_blocking(move || check_vip(&vip, Some(PROBE_LIMIT)))
        };
        for asked in request.vips.iter().map(ask).collect::<Vec<_>>() {
            // What else there is to say of an address its owner says.
            if let Ok(Err(error @ VipError::InUse { .. })) = asked.await {
                return Err(ApiError::refused(error));
            }
        }
        Ok(())
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
        let spec = unprotected(place);
        self.own(Durable::of(spec), Some(home));
        Ok(what)
    }

    pub(super) fn check_free(&self, name: &Name) -> Result<(), ApiError> {
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
    pub(super) fn wrap(&self, request: &WrapRequest) -> Result<WrapReply, ApiError> {
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

    pub(super) fn peers(&self) -> Vec<PeerInfo> {
        self.endpoint.peers().list().iter().map(peer_info).collect()
    }

    pub(super) async fn forget_peer(&self, name: &str) -> Result<serde_json::Value, ApiError> {
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

    pub(super) fn pair_listen(&self) -> Result<PairCode, ApiError> {
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

    pub(super) async fn pair_join(&self, request: PairJoinRequest) -> Result<PeerInfo, ApiError> {
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

/// What protection adds is not said yet.
fn unprotected(place: PlaceSpec) -> WorkloadSpec {
    WorkloadSpec {
        place,
        vips: Vec::new(),
        pace: PaceSpec::default(),
        arbiter: Arbiter::default(),
        commit: Commit::default(),
    }
}
