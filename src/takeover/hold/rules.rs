//! Our table in the host's packet filter: which packets wait in which queue.
//!
//! ```text
//! table inet standin-sd-…
//!   prerouting, output   neighbour discovery ► passes
//!   prerouting   iif @devices               ► output     a device of its own leads to the workload
//!                iif @bridges, mac @macs    ► output     its device is a port of an engine's bridge
//!                daddr @v4, @v6             ► input      by what clients reach it
//!   output       daddr @v4, @v6             ► input      clients on this host
//!   postrouting  daddr @inner4, @inner6     ► input      what an engine has translated
//! ```
//!
//! Nothing is in the sets (but in `bridges`) while nothing is held. Packets wait before connection tracking where that can be,
//! so that two of a new connection that wait together meet as they would have; and input before it is routed: what
//! was held for a workload that has moved meanwhile is sent after it.
//!
//! What a bridge passes from port to port is seen here where `br_netfilter` shows it: in the family of bridges, kernels that
//! were built without `nft_queue` cannot hold it.
//!
//! The table is one to a workload. It stays when its maker ends: then its queues are nobody's, and what would wait is dropped.

use std::net::IpAddr;

use nix::errno::Errno;

use crate::takeover::{
    netfilter::{Attributes, Batch, Socket},
    tables::{
        AT_LEAST, AT_MOST, EQUAL, INET, LINK_HEADER, META_IIF, META_PROTOCOL, META_TRANSPORT, NETWORK_HEADER,
        OUTPUT, POSTROUTING, PREROUTING, TRANSPORT_HEADER, Table, accept, compare, expression, is_in, meta,
        payload, transact,
    },
};

/// Before everything else, connection tracking included.
pub(in crate::takeover) const FIRST: i32 = -500;
/// For what is to see packets again that have waited.
pub(in crate::takeover) const AFTER_QUEUES: i32 = FIRST + 1;
/// Behind the engines' own rules.
const LAST: i32 = 300;

/// What a packet is held by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the workload.
    Output,
    /// To it.
    Input,
}

/// By what a workload's packets are known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// The host's ends of all devices that lead to it, whether bridges have them or not.
    pub ports: Vec<u32>,
    /// The host's ends of devices that lead to it alone.
    pub devices: Vec<u32>,
    /// Bridges behind which it is.
    pub bridges: Vec<u32>,
    /// Its hardware addresses there.
    pub macs: Vec<[u8; 6]>,
    /// Addresses by which clients reach it.
    pub addresses: Vec<IpAddr>,
    /// Addresses that it has behind a bridge.
    pub inner: Vec<IpAddr>,
}

impl Marks {
    /// Whether what it sends can be told from what others send.
    pub fn has_device(&self) -> bool {
        !self.devices.is_empty() || (!self.bridges.is_empty() && !self.macs.is_empty())
    }
}

/// The table of one workload.
#[derive(Debug)]
pub(super) struct Rules {
    socket: Socket,
    table: Table,
    marks: Marks,
}

/// How a rule says to which queue.
#[derive(Clone, Copy)]
enum Verdict {
    /// nf_tables' own.
    Native,
    /// That of iptables, for kernels that were built without the other.
    Target,
}

const SETS: [(&str, u32); 7] =
    [("devices", 4), ("bridges", 4), ("macs", 6), ("v4", 4), ("v6", 16), ("inner4", 4), ("inner6", 16)];

impl Rules {
    /// Makes the table anew; with `held` it holds from the first moment on. `queues`: of output and of input.
    pub(super) fn make(
        table: String,
        marks: Marks,
        queues: (u16, u16),
        held: &[Direction],
    ) -> nix::Result<Self> {
        let rules = Self { socket: Socket::open()?, table: of(table), marks };
        match rules.commit(|batch| rules.describe(batch, queues, Verdict::Native, held)) {
            Err(Errno::ENOENT | Errno::EOPNOTSUPP) => {
                rules.commit(|batch| rules.describe(batch, queues, Verdict::Target, held))?;
            }
            other => other?,
        }
        Ok(rules)
    }

    /// Removes a workload's table; none is fine.
    pub(super) fn remove(table: &str) -> nix::Result<()> {
        transact(&Socket::open()?, |batch| of(table.to_owned()).clear(batch))
    }

    /// From now on they wait, or no longer do.
    pub(super) fn hold(&self, direction: Direction, holds: bool) -> nix::Result<()> {
        self.commit(|batch| self.fill(batch, direction, holds))
    }

    pub(super) fn marks(&self) -> &Marks {
        &self.marks
    }

    fn commit(&self, describe: impl FnOnce(&mut Batch)) -> nix::Result<()> {
        transact(&self.socket, describe)
    }

    fn fill(&self, batch: &mut Batch, direction: Direction, holds: bool) {
        let Marks { devices, macs, addresses, inner, .. } = &self.marks;
        match direction {
            Direction::Output => {
                self.elements(batch, "devices", &numbers(devices), holds);
                let macs: Vec<_> = macs.iter().map(|mac| mac.to_vec()).collect();
                self.elements(batch, "macs", &macs, holds);
            }
            Direction::Input => {
                for (set, addresses, is_v4) in [
                    ("v4", addresses, true),
                    ("v6", addresses, false),
                    ("inner4", inner, true),
                    ("inner6", inner, false),
                ] {
                    self.elements(batch, set, &octets(addresses, is_v4), holds);
                }
            }
        }
    }

    fn elements(&self, batch: &mut Batch, set: &str, keys: &[Vec<u8>], are_in: bool) {
        if are_in {
            self.table.put(batch, set, keys);
        } else {
            self.table.take(batch, set, keys);
        }
    }

    fn describe(&self, batch: &mut Batch, (output, input): (u16, u16), verdict: Verdict, held: &[Direction]) {
        let table = &self.table;
        table.make(batch);
        for (i, (name, key_length)) in SETS.into_iter().enumerate() {
            table.set(batch, name, i as u32 + 1, key_length);
        }
        self.elements(batch, "bridges", &numbers(&self.marks.bridges), true);
        for (name, hook, priority) in
            [("prerouting", PREROUTING, FIRST), ("output", OUTPUT, FIRST), ("postrouting", POSTROUTING, LAST)]
        {
            table.chain(batch, name, hook, priority);
        }
        for chain in ["prerouting", "output"] {
            table.rule(batch, chain, pass_neighbours);
        }
        table.rule(batch, "prerouting", |list| {
            meta(list, META_IIF);
            is_in(list, "devices");
            queue(list, output, verdict);
        });
        table.rule(batch, "prerouting", |list| {
            meta(list, META_IIF);
            is_in(list, "bridges");
            payload(list, LINK_HEADER, (6, 6));
            is_in(list, "macs");
            queue(list, output, verdict);
        });
        for (chain, sets) in
            [("prerouting", ["v4", "v6"]), ("output", ["v4", "v6"]), ("postrouting", ["inner4", "inner6"])]
        {
            for (set, (family, place)) in
                sets.into_iter().zip([(libc::AF_INET, (16, 4)), (libc::AF_INET6, (24, 16))])
            {
                table.rule(batch, chain, |list| {
                    by_protocol(list, family as u8);
                    payload(list, NETWORK_HEADER, place);
                    is_in(list, set);
                    queue(list, input, verdict);
                });
            }
        }
        for direction in held {
            self.fill(batch, *direction, true);
        }
    }
}

/// The table of that name.
fn of(name: String) -> Table {
    Table { family: INET, name }
}

fn numbers(indexes: &[u32]) -> Vec<Vec<u8>> {
    indexes.iter().map(|index| index.to_ne_bytes().to_vec()).collect()
}

/// Those of one family.
fn octets(addresses: &[IpAddr], is_v4: bool) -> Vec<Vec<u8>> {
    let octets = |address: &IpAddr| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    addresses.iter().filter(|address| address.is_ipv4() == is_v4).map(octets).collect()
}

fn by_protocol(list: &mut Attributes<'_>, family: u8) {
    meta(list, META_PROTOCOL);
    compare(list, EQUAL, family);
}

/// ICMPv6 that tells where an address is says nothing of the workload's state, and what waits for it would wait too (RFC 4861).
fn pass_neighbours(list: &mut Attributes<'_>) {
    const ICMPV6: u8 = 58;
    const ROUTER_SOLICITATION: u8 = 133;
    const REDIRECT: u8 = 137;
    meta(list, META_TRANSPORT);
    compare(list, EQUAL, ICMPV6);
    payload(list, TRANSPORT_HEADER, (0, 1));
    compare(list, AT_LEAST, ROUTER_SOLICITATION);
    compare(list, AT_MOST, REDIRECT);
    accept(list);
}

/// No bypass: without an owner of the queue the packet is dropped.
fn queue(list: &mut Attributes<'_>, number: u16, verdict: Verdict) {
    match verdict {
        Verdict::Native => expression(list, "queue", |data| {
            data.bytes(1, &number.to_be_bytes());
            data.bytes(2, &1u16.to_be_bytes());
        }),
        Verdict::Target => expression(list, "target", |data| {
            data.text(1, "NFQUEUE");
            data.number(2, 0);
            // `struct xt_NFQ_info`, as long as targets' data is.
            let mut info = [0; 8];
            info[..2].copy_from_slice(&number.to_ne_bytes());
            data.bytes(3, &info);
        }),
    }
}
