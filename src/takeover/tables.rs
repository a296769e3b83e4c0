//! Tables of nf_tables, described message by message; see [`netfilter`](super::netfilter) for why by hand.
//!
//! A transaction is all or nothing, and what passes meanwhile meets the rules from before it or those from after it.

use std::time::Duration;

use super::netfilter::{Attributes, Batch, Socket};

const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `NFNL_SUBSYS_NFTABLES`, as a batch names it.
const NF_TABLES: u16 = 10;

const NEW_TABLE: u16 = SUBSYSTEM;
const DEL_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const NEW_SET: u16 = SUBSYSTEM | 9;
const NEW_ELEMENT: u16 = SUBSYSTEM | 0x0c;
const DEL_ELEMENT: u16 = SUBSYSTEM | 0x0e;

/// Families: what is routed, and what passes a device.
pub(super) const INET: u8 = 1;
pub(super) const NETDEV: u8 = 5;

/// Hooks of routed packets.
pub(super) const PREROUTING: u32 = 0;
pub(super) const OUTPUT: u32 = 3;
pub(super) const POSTROUTING: u32 = 4;
/// Of a device.
const INGRESS: u32 = 0;

/// Of a set whose elements end by themselves.
const TIMED: u32 = 0x10;
/// A type of keys, as `nft` numbers them.
const MARK: u32 = 19;

/// Sends a transaction, and says why the kernel refused it.
pub(super) fn transact(socket: &Socket, describe: impl FnOnce(&mut Batch)) -> nix::Result<()> {
    let mut batch = Batch::default();
    batch.add(BATCH_BEGIN, 0, (0, NF_TABLES), |_| {});
    describe(&mut batch);
    batch.add(BATCH_END, 0, (0, NF_TABLES), |_| {});
    socket.ask(&batch)?.map_err(|(_, errno)| errno)
}

/// A table of ours.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) family: u8,
    pub(super) name: String,
}

impl Table {
    fn add(&self, batch: &mut Batch, kind: u16, flags: i32, fill: impl FnOnce(&mut Attributes<'_>)) {
        batch.add(kind, flags | libc::NLM_F_ACK, (self.family, 0), |attributes| {
            attributes.text(1, &self.name);
            fill(attributes);
        });
    }

    /// Removes it, whether it is there or not.
    pub(super) fn clear(&self, batch: &mut Batch) {
        self.add(batch, NEW_TABLE, libc::NLM_F_CREATE, |_| {});
        self.add(batch, DEL_TABLE, 0, |_| {});
    }

    /// Makes it anew, empty.
    pub(super) fn make(&self, batch: &mut Batch) {
        self.clear(batch);
        self.add(batch, NEW_TABLE, libc::NLM_F_CREATE, |_| {});
    }

    /// `id` is another for each set of a transaction. Keys are of no type, but have a length.
    pub(super) fn set(&self, batch: &mut Batch, name: &str, id: u32, key_length: u32) {
        self.set_of(batch, (name, id), (0, key_length), 0);
    }

    /// A set whose elements can have an end. Its keys are marks of four bytes, which `nft` can show.
    pub(super) fn timed_set(&self, batch: &mut Batch, name: &str, id: u32) {
        self.set_of(batch, (name, id), (MARK, 4), TIMED);
    }

    fn set_of(
        &self,
        batch: &mut Batch,
        (name, id): (&str, u32),
        (key_type, key_length): (u32, u32),
        flags: u32,
    ) {
        self.add(batch, NEW_SET, libc::NLM_F_CREATE, |attributes| {
            attributes.text(2, name);
            attributes.number(3, flags);
            attributes.number(4, key_type);
            attributes.number(5, key_length);
            attributes.number(10, id);
        });
    }

    /// A chain of routed packets.
    pub(super) fn chain(&self, batch: &mut Batch, name: &str, hook: u32, priority: i32) {
        self.chain_at(batch, name, (hook, priority), None);
    }

    /// A chain of what comes out of a device, before all else on this host sees it.
    pub(super) fn ingress(&self, batch: &mut Batch, name: &str, device: &str, priority: i32) {
        self.chain_at(batch, name, (INGRESS, priority), Some(device));
    }

    fn chain_at(&self, batch: &mut Batch, name: &str, (hook, priority): (u32, i32), device: Option<&str>) {
        self.add(batch, NEW_CHAIN, libc::NLM_F_CREATE, |attributes| {
            attributes.text(3, name);
            attributes.nest(4, |at| {
                at.number(1, hook);
                at.bytes(2, &priority.to_be_bytes());
                if let Some(device) = device {
                    at.text(3, device);
                }
            });
            attributes.text(7, "filter");
        });
    }

    pub(super) fn rule(&self, batch: &mut Batch, chain: &str, expressions: impl FnOnce(&mut Attributes<'_>)) {
        self.add(batch, NEW_RULE, libc::NLM_F_CREATE | libc::NLM_F_APPEND, |attributes| {
            attributes.text(2, chain);
            attributes.nest(4, expressions);
        });
    }

    pub(super) fn put(&self, batch: &mut Batch, set: &str, keys: &[Vec<u8>]) {
        self.elements(batch, (NEW_ELEMENT, libc::NLM_F_CREATE), set, keys, None);
    }

    /// Elements that end by themselves after this time, of which the kernel counts whole milliseconds. No less than one of its
    /// ticks: it takes nothing for "without an end".
    pub(super) fn put_for(&self, batch: &mut Batch, set: &str, keys: &[Vec<u8>], time: Duration) {
        self.elements(batch, (NEW_ELEMENT, libc::NLM_F_CREATE), set, keys, Some(time));
    }

    /// ENOENT, for the whole transaction, if one of them is not there or has ended.
    pub(super) fn take(&self, batch: &mut Batch, set: &str, keys: &[Vec<u8>]) {
        self.elements(batch, (DEL_ELEMENT, 0), set, keys, None);
    }

    /// Takes whatever is there.
    pub(super) fn empty(&self, batch: &mut Batch, set: &str) {
        self.add(batch, DEL_ELEMENT, 0, |attributes| attributes.text(2, set));
    }

    fn elements(
        &self,
        batch: &mut Batch,
        (kind, flags): (u16, i32),
        set: &str,
        keys: &[Vec<u8>],
        time: Option<Duration>,
    ) {
        if keys.is_empty() {
            return;
        }
        self.add(batch, kind, flags, |attributes| {
            attributes.text(2, set);
            attributes.nest(3, |list| {
                for key in keys {
                    list.nest(1, |element| {
                        element.nest(1, |data| data.bytes(1, key));
                        if let Some(time) = time {
                            element.bytes(4, &(time.as_millis() as u64).to_be_bytes());
                        }
                    });
                }
            });
        });
    }
}

// Expressions. A value goes through the first 16 bytes of the registers.
const REGISTER: u32 = 1;
/// The register of verdicts.
const VERDICT: u32 = 0;
pub(super) const META_IIF: u32 = 4;
pub(super) const META_PROTOCOL: u32 = 15;
pub(super) const META_TRANSPORT: u32 = 16;
pub(super) const LINK_HEADER: u32 = 0;
pub(super) const NETWORK_HEADER: u32 = 1;
pub(super) const TRANSPORT_HEADER: u32 = 2;

pub(super) fn expression(list: &mut Attributes<'_>, name: &str, data: impl FnOnce(&mut Attributes<'_>)) {
    list.nest(1, |element| {
        element.text(1, name);
        element.nest(2, data);
    });
}

pub(super) fn meta(list: &mut Attributes<'_>, key: u32) {
    expression(list, "meta", |data| {
        data.number(1, REGISTER);
        data.number(2, key);
    });
}

/// So many bytes from this one of the header on.
pub(super) fn payload(list: &mut Attributes<'_>, header: u32, (offset, length): (u32, u32)) {
    expression(list, "payload", |data| {
        data.number(1, REGISTER);
        data.number(2, header);
        data.number(3, offset);
        data.number(4, length);
    });
}

/// A value of ours.
pub(super) fn constant(list: &mut Attributes<'_>, value: &[u8]) {
    expression(list, "immediate", |data| {
        data.number(1, REGISTER);
        data.nest(2, |of| of.bytes(1, value));
    });
}

pub(super) fn is_in(list: &mut Attributes<'_>, set: &str) {
    expression(list, "lookup", |data| {
        data.text(1, set);
        data.number(2, REGISTER);
    });
}

pub(super) fn is_not_in(list: &mut Attributes<'_>, set: &str) {
    expression(list, "lookup", |data| {
        data.text(1, set);
        data.number(2, REGISTER);
        data.number(5, 1);
    });
}

/// How a byte is compared.
pub(super) const EQUAL: u32 = 0;
pub(super) const AT_MOST: u32 = 3;
pub(super) const AT_LEAST: u32 = 5;

pub(super) fn compare(list: &mut Attributes<'_>, how: u32, byte: u8) {
    expression(list, "cmp", |data| {
        data.number(1, REGISTER);
        data.number(2, how);
        data.nest(3, |value| value.bytes(1, &[byte]));
    });
}

pub(super) fn drop_it(list: &mut Attributes<'_>) {
    rule_that(list, 0);
}

pub(super) fn accept(list: &mut Attributes<'_>) {
    rule_that(list, 1);
}

fn rule_that(list: &mut Attributes<'_>, code: u32) {
    expression(list, "immediate", |data| {
        data.number(1, VERDICT);
        data.nest(2, |value| value.nest(2, |verdict| verdict.number(1, code)));
    });
}
