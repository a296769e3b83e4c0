//! This host compared with a paired one: what both agents say of their hosts is gathered here and judged by
//! [`crate::doctor::peer`].

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};

use super::{
    Agent,
    api::{ApiError, DoctorRequest, Role, WorkloadStatus},
    durable,
    links::Link,
};
use crate::{
    doctor::peer::{self, ClockSample, Footprint, Id, Known, Needs, Pair, PeerReport, Workload},
    model::Name,
    transport::{Channel, Connection, PeerName, UDP_PAYLOAD_MAX},
    wire::{
        check::ADDRESSES_MAX,
        examine::{Answer, FILES_MAX, FileFacts, FileQuestion, HostFacts, IDS_MAX, PATHS_LEN_MAX, Question},
        message::{Reply, Request},
    },
    workload::spec::Vip,
};

/// Questions of peers, other than of the clock, that are answered at once: each may read files.
pub(super) const EXAMINED_AT_ONCE: usize = 2;
/// How long the peer may take to be reached.
const REACH_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to answer: it may have files to read.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Time between the two readings of the clocks: what the readings are off by is then a small part of it.
const CLOCK_INTERVAL: Duration = Duration::from_secs(2);
/// Of so many readings the quickest counts.
const CLOCK_READINGS: usize = 8;
/// How long QUIC may take to find the largest packet.
const MTU_LIMIT: Duration = Duration::from_secs(5);
const MTU_LOOK_INTERVAL: Duration = Duration::from_millis(100);

impl Agent {
    /// Answers a peer.
    pub(super) async fn examined(self: &Arc<Self>, question: Question, asker: SocketAddr) -> Answer {
        if question == Question::Clock {
            return Answer::Clock(peer::clocks());
        }
        // It is never closed.
        let _turn = self.examining.acquire().await;
        self.ask_here(question, asker).await
    }

    async fn ask_here(self: &Arc<Self>, question: Question, asker: SocketAddr) -> Answer {
        let agent = Arc::clone(self);
        let answered =
            tokio::task::spawn_blocking(move || peer::answer(agent.known(), &question, asker)).await;
        answered.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    fn known(&self) -> Known<'_> {
        Known { config: &self.config, install: &self.install, kernel: &self.kernel }
    }

    /// Compares this host with a peer.
    pub(super) async fn compare_with_peer(
        self: &Arc<Self>,
        request: DoctorRequest,
    ) -> Result<PeerReport, ApiError> {
        let name: PeerName = request.peer.parse().map_err(ApiError::invalid)?;
        let known = self.endpoint.peers().by_name(&name).ok_or_else(|| {
            ApiError::not_found(format!(
                "no peer is named {name}: `standin pair --list` shows those that are"
            ))
        })?;
        let workloads = self.examinable(&request, &name).await?;
        let link = self.reach(&name).await?;
        let lease = link.lease().ok_or_else(|| lost(&name))?;
        let asked = Asked { lease: &lease };

        let first = asked.clocks().await?;
        let began = Instant::now();
        let mut needs = Vec::new();
        for workload in workloads {
            needs.push(self.needs(&asked, workload).await?);
        }
        let vips: Vec<Vip> = needs.iter().flat_map(|needs| needs.footprint.vips.clone()).collect();
        let here = self.host_here(vips.clone(), known.addr).await;
        let there = asked.host(vips).await?;
        let payload = payload(&link, &here, known.addr).await;
        sleep(CLOCK_INTERVAL.saturating_sub(began.elapsed())).await;
        let second = asked.clocks().await?;
        Ok(peer::compare(&Pair {
            peer: name.to_string(),
            here,
            there,
            clocks: [first, second],
            payload,
            payload_max: UDP_PAYLOAD_MAX,
            is_v6: known.addr.is_ipv6(),
            workloads: needs,
        }))
    }

    async fn reach(self: &Arc<Self>, name: &PeerName) -> Result<Link, ApiError> {
        let mut link = self.links.to(self, name);
        if timeout(REACH_LIMIT, link.up()).await.is_ok() {
            return Ok(link);
        }
        // Why is what the operator wants to know.
        match self.endpoint.connect(name, Channel::Lease).await {
            Ok(_) => Err(lost(name)),
            Err(error) => Err(ApiError::unreachable(error)),
        }
    }

    /// The workloads whose needs are compared: what runs here, and has no other standby.
    async fn examinable(&self, request: &DoctorRequest, peer: &PeerName) -> Result<Vec<Workload>, ApiError> {
        let runs_here = |status: &WorkloadStatus| {
            let pid = status.pid.filter(|_| matches!(status.role, Role::Unprotected | Role::Primary));
            pid.and_then(|pid| self.workload(status, pid, peer))
        };
        if let Some(name) = &request.workload {
            let status = self.workload_status(name).await?;
            return runs_here(&status).map(|workload| vec![workload]).ok_or_else(|| {
                let elsewhere = status.peer.as_deref().unwrap_or("the other host");
                ApiError::refused(format!("{name} does not run here: ask on {elsewhere}"))
            });
        }
        let all = self.status().await.workloads;
        let ours =
            all.iter().filter(|status| status.peer.as_deref().is_none_or(|other| other == peer.to_string()));
        Ok(ours.filter_map(runs_here).collect())
    }

    fn workload(&self, status: &WorkloadStatus, root: i32, peer: &PeerName) -> Option<Workload> {
        let place = durable::Place::of(&self.config.state_dir, &status.name).read().ok()?.spec.place;
        let held = status.epoch.is_some() && status.peer.as_deref() == Some(&peer.to_string());
        Some(Workload { name: status.name.clone(), place, root, vips: status.vips.clone(), held })
    }

    /// What a workload uses, here and there.
    async fn needs(self: &Arc<Self>, asked: &Asked<'_>, workload: Workload) -> Result<Needs, ApiError> {
        let name = workload.name.clone();
        let footprint = tokio::task::spawn_blocking(move || peer::survey(&workload))
            .await
            .map_err(ApiError::failed)?
            .map_err(|error| ApiError::failed(format!("what {name} uses cannot be found out: {error}")))?;
        let files = asked.files(&footprint).await?;
        let (users, groups) = self.ids(asked, &name, &footprint).await?;
        Ok(Needs { footprint, files, users, groups })
    }

    async fn ids(
        self: &Arc<Self>,
        asked: &Asked<'_>,
        name: &Name,
        footprint: &Footprint,
    ) -> Result<(Vec<Id>, Vec<Id>), ApiError> {
        let numbers = |ids: &BTreeSet<u32>| ids.iter().copied().take(IDS_MAX).collect::<Vec<_>>();
        let (uids, gids) = (numbers(&footprint.uids), numbers(&footprint.gids));
        let question = Question::Users { uids: uids.clone(), gids: gids.clone() };
        let here = self.ask_here(question.clone(), asked.lease.remote_addr()).await;
        let there = asked.ask(question).await?;
        let (Answer::Users { users, groups }, Answer::Users { users: users_there, groups: groups_there }) =
            (here, there)
        else {
            return Err(asked.garbled(&format!("about the users of {name}")));
        };
        if users_there.len() != uids.len() || groups_there.len() != gids.len() {
            return Err(asked.garbled(&format!("about the users of {name}")));
        }
        let join = |numbers: Vec<u32>, here: Vec<Option<String>>, there: Vec<Option<String>>| {
            let names = here.into_iter().zip(there);
            numbers.into_iter().zip(names).map(|(number, (here, there))| Id { number, here, there }).collect()
        };
        Ok((join(uids, users, users_there), join(gids, groups, groups_there)))
    }

    async fn host_here(self: &Arc<Self>, vips: Vec<Vip>, peer: SocketAddr) -> HostFacts {
        match self.ask_here(Question::Host { vips }, peer).await {
            Answer::Host(host) => *host,
            // An answer is of its question's kind: see `doctor::peer::answer`.
            _ => unreachable!("another answer than was asked for"),
        }
    }
}

fn lost(name: &PeerName) -> ApiError {
    ApiError::unreachable(format!("the connection to {name} has just been lost: try again"))
}

/// The largest UDP payload that has arrived, looked at until it is what the routes allow or QUIC has had its time.
/// `None` without a connection for epochs.
async fn payload(link: &Link, here: &HostFacts, peer: SocketAddr) -> Option<u16> {
    let headers = if peer.is_ipv6() { 48 } else { 28 };
    let expected = here.mtu.map_or(UDP_PAYLOAD_MAX, |mtu| {
        u16::try_from(mtu.saturating_sub(headers)).unwrap_or(u16::MAX).min(UDP_PAYLOAD_MAX)
    });
    // QUIC's search ends a little below the largest.
    let enough = expected - expected.min(20);
    let until = Instant::now() + MTU_LIMIT;
    loop {
        let payload = link.bulk().map(|bulk| bulk.payload_max());
        if payload.is_some_and(|payload| payload >= enough) || Instant::now() >= until {
            return payload;
        }
        sleep(MTU_LOOK_INTERVAL).await;
    }
}

/// The peer, as it is asked.
struct Asked<'a> {
    lease: &'a Connection,
}

impl Asked<'_> {
    async fn ask(&self, question: Question) -> Result<Answer, ApiError> {
        match self.lease.request(&Request::Examine(question), ANSWER_LIMIT).await {
            Ok(Reply::Examined(answer)) => Ok(answer),
            Ok(_) => Err(self.garbled("to another question")),
            Err(error) => Err(ApiError::unreachable(format!(
                "{error}. An agent of an older release does not answer this: is it the same on both hosts?"
            ))),
        }
    }

    fn garbled(&self, what: &str) -> ApiError {
        ApiError::failed(format!(
            "{} gave an answer {what} that does not fit: run the same release on both hosts",
            self.lease.peer()
        ))
    }

    /// Both hosts' clocks: as of the question that was answered quickest.
    async fn clocks(&self) -> Result<ClockSample, ApiError> {
        let mut best: Option<ClockSample> = None;
        for _ in 0..CLOCK_READINGS {
            let before = peer::clocks();
            let answer = self.ask(Question::Clock).await?;
            let after = peer::clocks();
            let Answer::Clock(there) = answer else { return Err(self.garbled("about its clock")) };
            let half = after.boot.saturating_sub(before.boot) / 2;
            let mut here = before;
            here.boot += half;
            here.wall += half;
            if best.as_ref().is_none_or(|best| half < best.error) {
                best = Some(ClockSample { here, there, error: half });
            }
        }
        best.ok_or_else(|| self.garbled("about its clock"))
    }

    /// What the peer is, asked in as many pieces as its addresses need.
    async fn host(&self, vips: Vec<Vip>) -> Result<HostFacts, ApiError> {
        let mut all: Option<HostFacts> = None;
        let mut pieces: Vec<&[Vip]> = vips.chunks(ADDRESSES_MAX).collect();
        if pieces.is_empty() {
            pieces.push(&[]);
        }
        for vips in pieces {
            let Answer::Host(host) = self.ask(Question::Host { vips: vips.to_vec() }).await? else {
                return Err(self.garbled("about its host"));
            };
            if host.vips.len() != vips.len() {
                return Err(self.garbled("about its addresses"));
            }
            match &mut all {
                None => all = Some(*host),
                Some(all) => all.vips.extend(host.vips),
            }
        }
        all.ok_or_else(|| self.garbled("about its host"))
    }

    /// What the peer has of the files that a workload uses.
    async fn files(&self, footprint: &Footprint) -> Result<Vec<FileFacts>, ApiError> {
        let mut answers = Vec::new();
        let mut question = Vec::new();
        let mut len = 0;
        for used in &footprint.files {
            if question.len() == FILES_MAX || len + used.path.len() > PATHS_LEN_MAX {
                answers.extend(self.some_files(std::mem::take(&mut question)).await?);
                len = 0;
            }
            len += used.path.len();
            let digest = matches!(&used.here, FileFacts::Regular(file) if file.digest.is_some());
            question.push(FileQuestion { path: used.path.clone(), digest });
        }
        if !question.is_empty() {
            answers.extend(self.some_files(question).await?);
        }
        Ok(answers)
    }

    async fn some_files(&self, files: Vec<FileQuestion>) -> Result<Vec<FileFacts>, ApiError> {
        let count = files.len();
        match self.ask(Question::Files(files)).await? {
            Answer::Files(facts) if facts.len() == count => Ok(facts),
            _ => Err(self.garbled("about files")),
        }
    }
}
