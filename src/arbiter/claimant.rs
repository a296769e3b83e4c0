//! The task that holds what it is told to hold.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};

use super::{
    Condition, Report, Wanted,
    client::EtcdError,
    etcd::{Holder, Seen, Store, Taken},
    settings::Inner,
};
use crate::{
    model::{Name, Term},
    workload::guard::boot_time_ns,
};

/// How often a round looks again because somebody wrote in between.
const LOOKS_MAX: u32 = 5;
/// How many claims wait to be given up while etcd cannot be reached. What is dropped ends by itself there, and what it left of
/// its term is cleared when nothing is wanted.
const LEFTOVERS_MAX: usize = 8;

/// What tells one claim from all others: its etcd lease and the nonce in what it writes.
struct Claim {
    lease: i64,
    nonce: String,
    /// When the grant of the lease was first asked for, on the boot-time clock.
    asked_at: Duration,
}

/// What a round found.
enum Found {
    Held {
        until: Duration,
    },
    /// Somebody else's key, or a newer term.
    No,
    Nothing,
}

pub(super) struct Task<F> {
    pub(super) etcd: Arc<Inner>,
    pub(super) store: Store,
    pub(super) workload: Name,
    pub(super) host: String,
    pub(super) wanted: watch::Receiver<Wanted>,
    pub(super) report: F,
    pub(super) condition: watch::Sender<Condition>,
    pub(super) state: State,
}

/// Claims of this task. Each is written down here before etcd hears of it: a round may be broken off at any await.
#[derive(Default)]
pub(super) struct State {
    claim: Option<Claim>,
    leftovers: VecDeque<Claim>,
}

impl State {
    fn give_up(&mut self) {
        self.leftovers.extend(self.claim.take());
        if self.leftovers.len() > LEFTOVERS_MAX {
            self.leftovers.pop_front();
        }
    }
}

impl<F: Fn(Report) + Send> Task<F> {
    /// Until nobody can want anything any more.
    pub(super) async fn run(mut self) {
        loop {
            let wanted = *self.wanted.borrow_and_update();
            self.state.give_up();
            self.condition.send_modify(|condition| condition.wanted = wanted.term);
            if !self.serve(wanted).await {
                return;
            }
        }
    }

    /// Rounds until something else is wanted; false: nothing will be.
    async fn serve(&mut self, wanted: Wanted) -> bool {
        let (ttl, mut changes) = (self.etcd.ttl, self.wanted.clone());
        loop {
            let begun = Instant::now();
            let found = tokio::select! {
                biased;
                changed = changes.wait_for(|now| now.generation != wanted.generation) => return changed.is_ok(),
                found = timeout(ttl / 2, self.round(wanted.term)) => found,
            };
            let found = found.unwrap_or_else(|_| {
                Err(EtcdError::Unreachable {
                    endpoint: self.store.endpoint().to_owned(),
                    reason: format!("no answer within {:?}; is it up, and nothing in the way?", ttl / 2),
                })
            });
            self.tell(wanted, &found);
            let pause = match &found {
                Err(_) => ttl / 8,
                Ok(Found::Nothing) => ttl,
                Ok(Found::Held { .. } | Found::No) => ttl / 4,
            };
            let next = begun + pause;
            let next = if found.is_err() { next.max(Instant::now() + ttl / 16) } else { next };
            tokio::select! {
                biased;
                changed = changes.wait_for(|now| now.generation != wanted.generation) => return changed.is_ok(),
                () = sleep_until(next) => {}
            }
        }
    }

    fn tell(&self, wanted: Wanted, found: &Result<Found, EtcdError>) {
        self.condition.send_modify(|condition| {
            self.store.endpoint().clone_into(&mut condition.endpoint);
            condition.reachable = !matches!(found, Err(e) if e.is_unreachable());
            condition.held_until = match found {
                Ok(Found::Held { until }) => Some(*until),
                // What was given lasts until it ends, whatever was heard since.
                Err(_) => condition.held_until,
                Ok(_) => None,
            };
            match found {
                Ok(_) if condition.failing => {
                    tracing::info!(workload = %self.workload, endpoint = condition.endpoint, "etcd answers again");
                }
                Err(e) if !condition.failing => {
                    tracing::warn!(workload = %self.workload, "the arbiter fails: {e}");
                }
                _ => {}
            }
            condition.failing = found.is_err();
            if let Err(e) = found {
                condition.last_error = Some(e.to_string());
            }
        });
        let (generation, Some(term)) = (wanted.generation, wanted.term) else { return };
        (self.report)(match *found {
            Ok(Found::Held { until }) => Report::Held { generation, term, until },
            _ => Report::Refused { generation, term },
        });
    }

    async fn round(&mut self, wanted: Option<Term>) -> Result<Found, EtcdError> {
        self.release_leftovers().await?;
        match wanted {
            Some(term) => self.hold(term).await,
            None => self.clear_earlier_lives().await.map(|()| Found::Nothing),
        }
    }

    async fn hold(&mut self, term: Term) -> Result<Found, EtcdError> {
        for _ in 0..LOOKS_MAX {
            let extended = self.extend().await?;
            let seen = self.look().await?;
            // Only what the leader of now has extended is extended.
            if extended.is_some_and(|(_, raft_term)| raft_term != seen.raft_term) {
                continue;
            }
            let ours = self.state.claim.as_ref().map(|claim| &*claim.nonce);
            let until = match (&seen.holder, extended) {
                (Some(holder), Some((sent, _))) if Some(&*holder.value.nonce) == ours => self.until(sent),
                (Some(_), _) => return Ok(Found::No),
                (None, _) if self.is_overtaken(term, &seen) => return Ok(Found::No),
                (None, extended) => match self.take(term, extended.map(|(sent, _)| sent), &seen).await? {
                    Some(sent) => self.until(sent),
                    None => continue,
                },
            };
            return if until > boot_time() { Ok(Found::Held { until }) } else { Err(EtcdError::Slow) };
        }
        Err(EtcdError::Contended(self.store.holder_key().to_owned()))
    }

    /// Extends the claim's lease, if there is one: when that was asked for, and the raft term of who said so.
    async fn extend(&mut self) -> Result<Option<(Duration, u64)>, EtcdError> {
        let Some(claim) = &self.state.claim else { return Ok(None) };
        let sent = boot_time();
        let Some(raft_term) = self.store.keep_alive(claim.lease).await? else {
            // Its time was over, or its grant never arrived.
            self.state.give_up();
            self.release_leftovers().await?;
            return Ok(None);
        };
        Ok(Some((sent, raft_term)))
    }

    fn is_overtaken(&self, term: Term, seen: &Seen) -> bool {
        let top = seen.top();
        top.term > term || top.term == term && top.by != self.host
    }

    /// Takes the key: since when its lease lasts, or nothing if somebody was faster.
    async fn take(
        &mut self,
        term: Term,
        extended: Option<Duration>,
        seen: &Seen,
    ) -> Result<Option<Duration>, EtcdError> {
        if self.state.claim.is_none() {
            self.state.claim =
                Some(Claim { lease: random_lease(), nonce: random_nonce(), asked_at: boot_time() });
            let lease = self.state.claim.as_ref().expect("it was just put there").lease;
            self.store.grant(lease).await?;
        }
        let claim = self.state.claim.as_ref().expect("one was made");
        let holder = Holder { host: self.host.clone(), term, nonce: claim.nonce.clone() };
        match self.store.take(&holder, claim.lease, seen).await? {
            Taken::Yes => {
                let sent = extended.unwrap_or(claim.asked_at);
                self.condition.send_modify(|condition| {
                    condition.holder = Some(holder);
                    condition.newest = term;
                });
                Ok(Some(sent))
            }
            Taken::Raced => Ok(None),
            Taken::LeaseGone => {
                self.state.give_up();
                self.release_leftovers().await?;
                Ok(None)
            }
        }
    }

    /// A fiftieth less than what was asked for: etcd's clock may be that much faster.
    fn until(&self, sent: Duration) -> Duration {
        sent + self.etcd.ttl * 49 / 50
    }

    async fn look(&mut self) -> Result<Seen, EtcdError> {
        let seen = self.store.read().await?;
        self.condition.send_modify(|condition| {
            condition.holder = seen.holder.as_ref().map(|found| found.value.clone());
            condition.newest = seen.top().term;
        });
        Ok(seen)
    }

    /// Gives up what this task claimed before, the oldest first.
    async fn release_leftovers(&mut self) -> Result<(), EtcdError> {
        while let Some(claim) = self.state.leftovers.front() {
            let (lease, nonce) = (claim.lease, claim.nonce.clone());
            // First: nothing that is still on its way can write after this.
            self.store.revoke(lease).await?;
            self.clear(|holder| holder.nonce == nonce, |by, n| !by.is_empty() && n == nonce).await?;
            self.state.leftovers.pop_front();
        }
        Ok(())
    }

    /// What an earlier life of this host's agent left, which does not know its claims any more.
    async fn clear_earlier_lives(&mut self) -> Result<(), EtcdError> {
        let host = self.host.clone();
        self.clear(|holder| holder.host == host, |by, _| by == host).await
    }

    /// Takes away a key of whom `is_holder` says so, and a term above this host's own of whom `is_top` says so.
    async fn clear(
        &mut self,
        is_holder: impl Fn(&Holder) -> bool,
        is_top: impl Fn(&str, &str) -> bool,
    ) -> Result<(), EtcdError> {
        for _ in 0..LOOKS_MAX {
            let seen = self.look().await?;
            let top = seen.top();
            if let Some(found) = seen.holder.as_ref().filter(|found| is_holder(&found.value)) {
                if found.lease == 0 {
                    self.store.delete_holder(&seen).await?;
                } else {
                    self.store.revoke(found.lease).await?;
                }
            } else if is_top(&top.by, &top.nonce)
                && top.term > self.wanted.borrow().record
                && top.can_be_taken_back()
            {
                self.store.take_back(&seen).await?;
            } else {
                return Ok(());
            }
        }
        Err(EtcdError::Contended(self.store.holder_key().to_owned()))
    }
}

/// Removes both keys, unless another host holds one.
pub(super) async fn forget(store: &mut Store, host: &str) -> Result<(), EtcdError> {
    for _ in 0..LOOKS_MAX {
        let seen = store.read().await?;
        match &seen.holder {
            Some(holder) if holder.value.host != host => {
                return Err(EtcdError::Held { host: holder.value.host.clone() });
            }
            Some(holder) if holder.lease != 0 => store.revoke(holder.lease).await?,
            _ => {
                if store.delete_all(&seen).await? {
                    return Ok(());
                }
            }
        }
    }
    Err(EtcdError::Contended(store.holder_key().to_owned()))
}

fn boot_time() -> Duration {
    Duration::from_nanos(boot_time_ns())
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // The kernel's generator is ready long before an agent starts.
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

/// Positive; 0 would let etcd choose, and its choice could be lost with its answer.
fn random_lease() -> i64 {
    (i64::from_le_bytes(random()) & i64::MAX).max(1)
}

fn random_nonce() -> String {
    data_encoding::HEXLOWER.encode(&random::<16>())
}
