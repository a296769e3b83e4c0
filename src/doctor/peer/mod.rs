//! This host compared with a paired one, before the pair is relied on: `standin doctor --peer`.
//!
//! | file | owns |
//! |---|---|
//! | `facts` | what a host answers about itself |
//! | `cpu`, `sys` | its processor |
//! | `file` | a file that a workload uses, as a host has it |
//! | `survey` | what the workloads that run here use |
//! | `compare` | pure: both hosts' facts to checks |
//!
//! The agents exchange the facts ([`crate::wire::examine`]); nothing here speaks to the network.
//!
//! Invariant: what would break a restore there is a failure; what may cost something is a warning; each with its remedy.

mod compare;
mod cpu;
mod facts;
mod file;
mod survey;
mod sys;

use std::{fmt::Write as _, time::Duration};

use serde::{Deserialize, Serialize};

pub use self::{
    compare::compare,
    facts::{Known, answer, clocks},
    survey::{Footprint, UsedFile, Workload, survey},
};
use super::{
    Check, State, ids,
    render::{besides, lines, paint},
};
use crate::{
    model::Name,
    wire::examine::{ClockFacts, FileFacts, HostFacts},
};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Whether the peer can take over what runs here: no check has failed.
    pub ok: bool,
    /// The peer.
    pub peer: String,
    /// The workloads whose needs were compared.
    pub workloads: Vec<Name>,
    /// The checks, those of a group together.
    pub checks: Vec<Check>,
}

impl PeerReport {
    /// The ids of the checks that came out so.
    pub fn ids(&self, state: State) -> Vec<&str> {
        ids(&self.checks, state)
    }
}

/// All that two hosts have said.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The peer's name.
    pub peer: String,
    /// This host.
    pub here: HostFacts,
    /// The peer.
    pub there: HostFacts,
    /// Their clocks, twice.
    pub clocks: [ClockSample; 2],
    /// The largest UDP payload that was seen to arrive; none without a connection.
    pub payload: Option<u16>,
    /// The largest that is tried.
    pub payload_max: u16,
    /// Whether they speak by IPv6.
    pub is_v6: bool,
    /// What runs here.
    pub workloads: Vec<Needs>,
}

/// Both hosts' clocks at one instant, or nearly.
#[derive(Clone, Copy, Debug)]
pub struct ClockSample {
    /// Here.
    pub here: ClockFacts,
    /// There.
    pub there: ClockFacts,
    /// How far apart the two readings may be.
    pub error: Duration,
}

/// What a workload uses, and what the peer has of it.
#[derive(Clone, Debug)]
pub struct Needs {
    /// What it uses.
    pub footprint: Footprint,
    /// What the peer has at the paths of its files, in their order.
    pub files: Vec<FileFacts>,
    /// Its users: number, name here, name there.
    pub users: Vec<Id>,
    /// Its groups.
    pub groups: Vec<Id>,
}

/// A user or a group on two hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id {
    /// Its number.
    pub number: u32,
    /// Its name here.
    pub here: Option<String>,
    /// Its name there.
    pub there: Option<String>,
}

/// The report as text, in colour or not.
pub fn render(report: &PeerReport, colour: bool) -> String {
    let mut out = lines(&report.checks, colour);
    let besides = besides(&report.ids(State::Warn));
    let what = match report.workloads.as_slice() {
        [] => "what is started here".to_owned(),
        names => names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    let verdict = if report.ok {
        paint(&format!("{} can take over {what}", report.peer), "32", colour)
    } else {
        paint(&format!("{} cannot take over {what}", report.peer), "31", colour)
    };
    let _ = writeln!(out, "\n{verdict}{besides}");
    out
}
