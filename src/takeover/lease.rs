//! The lease as the kernel keeps it: nothing that a workload sends leaves unless an element is in a set of nf_tables, and the
//! element ends by itself. With each renewal the agent puts it in again, to end with the [guard](crate::workload::guard)'s deadline.
//! So the workload falls silent in time even if nothing on its host runs any more but the kernel: neither the agent nor what
//! keeps the guard.
//!
//! ```text
//! table netdev standin-lease-sd-…                        one to a workload; gone with it
//!   set lease     1 ► ends in 248 ms                     what the guard says:  armed     ends with its deadline
//!   chain eth…    ingress of the host's end of each                            disarmed  has no end
//!                 device: 1 not in @lease ► drop                               fired     is not there
//! ```
//!
//! Ingress of a device sees all that comes out of the workload: ARP, and what a bridge passes from port to port. A kernel
//! without that hook has the rule in `inet` prerouting instead, behind the [queues](super::hold): what is routed then.
//!
//! # How late it can be
//!
//! A time is sent to the kernel, not a deadline: of a message that is delayed on its way the element ends too late. Therefore:
//!
//! - A renewal takes the element out and puts it in again in one transaction, which fails if it has ended. A message that was
//!   delayed beyond the end of the lease that it renews changes nothing, by the kernel.
//! - Of each time an allowance is taken off, 2 ms at first, and the clock is looked at again when the kernel has answered. If
//!   more than the allowance has passed, it is done again with twice as much; then, whether the guard has fired meanwhile. So an
//!   element that was put in by an agent that came to look never outlives the deadline (the kernel rounds down, to its ticks).
//! - Only an agent that is stopped between looking at the clock and sending, goes on before the old element has ended, and is
//!   stopped again before it looks the second time, leaves an element that ends late: by as much as it was delayed, which is
//!   less than a lease. The guard is not late then.
//! - The kernel counts ticks, which stand still while the host is suspended; the guard's clock does not, and fires first thing
//!   on the host's return.
//!
//! The table is made when the guard is armed for the first time, before the other host is told that it may ever take over, and
//! stays until the workload's place is taken down; while the guard is disarmed the element has no end.
//!
//! A table that cannot be made or renewed never harms the workload: it is taken away, the guard alone is the fence, and
//! `status` says so. One that somebody has removed (`nft flush ruleset`) is made anew with the next renewal.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::{errno::Errno, net::if_::if_indextoname};
use serde::{Deserialize, Serialize};

use super::{
    hold::{AFTER_QUEUES, Marks},
    netfilter::{Attributes, Batch, Socket},
    tables::{
        INET, LINK_HEADER, META_IIF, NETDEV, PREROUTING, Table, constant, drop_it, is_in, is_not_in, meta,
        payload, transact,
    },
};
use crate::{
    model::Name,
    workload::{
        guard::{Guard, GuardState, boot_time_ns},
        network::host_device,
    },
};

/// What may pass between looking at the clock and the kernel's answer.
const ALLOWANCE_NS: u64 = 2_000_000;
/// Two ticks of the slowest kernels. One of less than a tick would have no end.
const LEAST_NS: u64 = 20_000_000;
/// Before everything else on a device.
const FIRST: i32 = -500;

const SET: &str = "lease";
/// What is in it, or not.
const LEASE: [u8; 4] = 1u32.to_ne_bytes();

/// Where the kernel looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hook {
    /// At the devices that lead to the workload: all that it sends.
    Device,
    /// Where this host takes in what it routes; what a bridge passes on is not seen.
    Prerouting,
}

/// Why the kernel keeps no lease.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LeaseError {
    /// Nothing to be known by.
    #[error("the workload uses the host's own network: nothing tells its packets from others'")]
    NoDevice,
    /// The kernel.
    #[error("the packet filter of this kernel refuses it ({0}); see `standin doctor`")]
    Absent(Errno),
    /// Later.
    #[error("the packet filter did not take a renewal ({0}); see `nft list ruleset` and `dmesg`")]
    Lost(Errno),
}

/// How long the element is to be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Term {
    Endless,
    For(Duration),
}

/// The table of one workload.
#[derive(Debug)]
struct Rules {
    socket: Socket,
    table: Table,
    hook: Hook,
    marks: Marks,
}

impl Rules {
    /// Makes the table anew where this kernel can have it.
    fn make(name: &str, marks: &Marks, term: Option<Term>) -> Result<Self, LeaseError> {
        let mut refused = LeaseError::NoDevice;
        for hook in [Hook::Device, Hook::Prerouting] {
            match Self::make_at(hook, name, marks, term) {
                Ok(rules) => return Ok(rules),
                // The first reason counts.
                Err(error) if matches!(refused, LeaseError::NoDevice) => refused = error,
                Err(_) => {}
            }
        }
        Err(refused)
    }

    fn make_at(hook: Hook, name: &str, marks: &Marks, term: Option<Term>) -> Result<Self, LeaseError> {
        let is_known = match hook {
            Hook::Device => !marks.ports.is_empty(),
            Hook::Prerouting => marks.has_device(),
        };
        if !is_known {
            return Err(LeaseError::NoDevice);
        }
        let family = match hook {
            Hook::Device => NETDEV,
            Hook::Prerouting => INET,
        };
        let table = Table { family, name: name.to_owned() };
        let socket = Socket::open().map_err(LeaseError::Absent)?;
        let rules = Self { socket, table, hook, marks: marks.clone() };
        rules.anew(term).map_err(LeaseError::Absent)?;
        Ok(rules)
    }

    fn anew(&self, term: Option<Term>) -> nix::Result<()> {
        let devices: nix::Result<Vec<_>> =
            self.marks.ports.iter().map(|index| if_indextoname(*index)).collect();
        let devices: Vec<_> = devices?.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        transact(&self.socket, |batch| {
            self.table.make(batch);
            self.table.timed_set(batch, SET, 1);
            match self.hook {
                Hook::Device => {
                    for device in &devices {
                        self.table.ingress(batch, device, device, FIRST);
                        self.table.rule(batch, device, drop_without_lease);
                    }
                }
                Hook::Prerouting => self.describe_prerouting(batch),
            }
            if let Some(term) = term {
                self.put(batch, term);
            }
        })
    }

    fn describe_prerouting(&self, batch: &mut Batch) {
        let Marks { devices, bridges, macs, .. } = &self.marks;
        let indexes = |of: &[u32]| of.iter().map(|index| index.to_ne_bytes().to_vec()).collect::<Vec<_>>();
        let macs: Vec<_> = macs.iter().map(|mac| mac.to_vec()).collect();
        let sets = [("devices", 4, indexes(devices)), ("bridges", 4, indexes(bridges)), ("macs", 6, macs)];
        for ((name, key_length, keys), id) in sets.into_iter().zip(2..) {
            self.table.set(batch, name, id, key_length);
            self.table.put(batch, name, &keys);
        }
        self.table.chain(batch, "prerouting", PREROUTING, AFTER_QUEUES);
        self.table.rule(batch, "prerouting", |list| {
            meta(list, META_IIF);
            is_in(list, "devices");
            drop_without_lease(list);
        });
        self.table.rule(batch, "prerouting", |list| {
            meta(list, META_IIF);
            is_in(list, "bridges");
            payload(list, LINK_HEADER, (6, 6));
            is_in(list, "macs");
            drop_without_lease(list);
        });
    }

    fn put(&self, batch: &mut Batch, term: Term) {
        let keys = [LEASE.to_vec()];
        match term {
            Term::Endless => self.table.put(batch, SET, &keys),
            Term::For(time) => self.table.put_for(batch, SET, &keys, time),
        }
    }

    /// ENOENT: it is not in, or has ended.
    fn renew(&self, term: Term) -> nix::Result<()> {
        transact(&self.socket, |batch| {
            self.table.take(batch, SET, &[LEASE.to_vec()]);
            self.put(batch, term);
        })
    }

    /// Whatever was in.
    fn begin(&self, term: Term) -> nix::Result<()> {
        let begun = transact(&self.socket, |batch| {
            self.table.empty(batch, SET);
            self.put(batch, term);
        });
        // Somebody has removed the table.
        if begun == Err(Errno::ENOENT) { self.anew(Some(term)) } else { begun }
    }

    fn end(&self) -> nix::Result<()> {
        let ended = transact(&self.socket, |batch| self.table.empty(batch, SET));
        if ended == Err(Errno::ENOENT) { self.anew(None) } else { ended }
    }
}

fn drop_without_lease(list: &mut Attributes<'_>) {
    constant(list, &LEASE);
    is_not_in(list, SET);
    drop_it(list);
}

/// The lease of one workload.
#[derive(Debug)]
pub struct Lease {
    name: Name,
    marks: Marks,
    /// Where to look; the best that this kernel has, unless this is said.
    only: Option<Hook>,
    guard: Arc<Guard>,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    /// No lease was ever needed: there is no table.
    Unmade,
    /// The element was put in, and may have ended.
    In(Rules),
    Out(Rules),
    /// There is no table any more.
    Lost(LeaseError),
}

fn table(name: &Name) -> String {
    format!("standin-lease-{}", host_device(name))
}

impl Lease {
    /// Has the kernel do what the guard says from now on, in place of what a former agent has left: what leaves meanwhile leaves
    /// by the one or the other. While the guard is disarmed nothing is made; that takes milliseconds, which a takeover has not.
    pub fn new(name: &Name, marks: &Marks, guard: Arc<Guard>) -> Result<Self, LeaseError> {
        Self::at(None, name, marks, guard)
    }

    /// The same at this place, whatever else this kernel has.
    pub fn at(
        only: impl Into<Option<Hook>>,
        name: &Name,
        marks: &Marks,
        guard: Arc<Guard>,
    ) -> Result<Self, LeaseError> {
        if marks.ports.is_empty() && !marks.has_device() {
            return Err(LeaseError::NoDevice);
        }
        let state = Mutex::new(State::Unmade);
        let lease = Self { name: name.clone(), marks: marks.clone(), only: only.into(), guard, state };
        if lease.guard.state() == GuardState::Disarmed {
            // What it may have left could end.
            Self::remove(name)?;
        }
        lease.follow();
        Ok(lease)
    }

    /// Removes what there is of a workload by that name; nothing is fine.
    pub fn remove(name: &Name) -> Result<(), LeaseError> {
        let socket = Socket::open().map_err(LeaseError::Absent)?;
        let remove = |family| transact(&socket, |batch| Table { family, name: table(name) }.clear(batch));
        // A kernel may have the one family without the other.
        let (device, routed) = (remove(NETDEV), remove(INET));
        device.or(routed).map_err(LeaseError::Absent)
    }

    /// Where the kernel looks, if it has had to yet, or why it does not.
    pub fn hook(&self) -> Result<Option<Hook>, LeaseError> {
        match &*self.state() {
            State::Unmade => Ok(None),
            State::In(rules) | State::Out(rules) => Ok(Some(rules.hook)),
            State::Lost(error) => Err(error.clone()),
        }
    }

    /// Has the kernel do what the guard says; to be called after each change of it.
    pub fn follow(&self) {
        let mut state = self.state();
        let followed = match self.guard.state() {
            GuardState::Disarmed if matches!(*state, State::Unmade) => return,
            GuardState::Disarmed => self.put(&mut state, Term::Endless),
            GuardState::Armed { deadline_ns } => self.put_until(&mut state, deadline_ns),
            GuardState::Firing | GuardState::Fired { .. } => self.take(&mut state),
        };
        let followed = followed.and_then(|()| {
            // Meanwhile: whoever is last sees both.
            if self.guard.fired() { self.take(&mut state) } else { Ok(()) }
        });
        self.note(&mut state, followed);
    }

    /// Ahead of an unfence, while nothing can leave as the gate is closed: until this time. To be followed by
    /// [`Self::follow`], whatever comes of it.
    pub fn grant(&self, deadline_ns: u64) {
        let mut state = self.state();
        let granted = self.put_until(&mut state, deadline_ns);
        self.note(&mut state, granted);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put_until(&self, state: &mut State, deadline_ns: u64) -> Result<(), LeaseError> {
        let mut allowance_ns = ALLOWANCE_NS;
        loop {
            let began_ns = boot_time_ns();
            let time_ns = deadline_ns.saturating_sub(began_ns + allowance_ns);
            if time_ns < LEAST_NS {
                return self.take(state);
            }
            self.put(state, Term::For(Duration::from_nanos(time_ns)))?;
            if boot_time_ns() - began_ns <= allowance_ns {
                return Ok(());
            }
            allowance_ns *= 2;
        }
    }

    fn put(&self, state: &mut State, term: Term) -> Result<(), LeaseError> {
        let refused = |errno| LeaseError::Lost(errno);
        *state = match std::mem::replace(state, State::Unmade) {
            State::Unmade => State::In(self.make(Some(term))?),
            State::In(rules) => {
                match rules.renew(term) {
                    Err(Errno::ENOENT) => rules.begin(term).map_err(refused)?,
                    renewed => renewed.map_err(refused)?,
                }
                State::In(rules)
            }
            State::Out(rules) => {
                rules.begin(term).map_err(refused)?;
                State::In(rules)
            }
            lost @ State::Lost(_) => lost,
        };
        Ok(())
    }

    fn take(&self, state: &mut State) -> Result<(), LeaseError> {
        *state = match std::mem::replace(state, State::Unmade) {
            State::Unmade => State::Out(self.make(None)?),
            State::In(rules) => {
                rules.end().map_err(LeaseError::Lost)?;
                State::Out(rules)
            }
            other => other,
        };
        Ok(())
    }

    fn make(&self, term: Option<Term>) -> Result<Rules, LeaseError> {
        match self.only {
            Some(hook) => Rules::make_at(hook, &table(&self.name), &self.marks, term),
            None => Rules::make(&table(&self.name), &self.marks, term),
        }
    }

    /// What is not renewed would mute a workload whose lease is.
    fn note(&self, state: &mut State, done: Result<(), LeaseError>) {
        let Err(error) = done else { return };
        tracing::warn!(%error, name = %self.name, "the guard alone keeps the lease");
        if let Err(error) = Self::remove(&self.name) {
            let table = table(&self.name);
            tracing::debug!(%error, table, "nothing of the packet filter can be removed");
        }
        *state = State::Lost(error);
    }
}

/// Tries where this kernel would look, on a device of the calling thread's network namespace. The namespace is the caller's own,
/// and ends with what this makes.
pub fn probe(device: u32) -> Result<Hook, LeaseError> {
    let marks = Marks { ports: vec![device], devices: vec![device], ..Marks::default() };
    let term = Term::For(Duration::from_secs(1));
    let rules = Rules::make("standin-lease-doctor", &marks, Some(term))?;
    rules.renew(Term::Endless).map_err(LeaseError::Absent)?;
    Ok(rules.hook)
}
