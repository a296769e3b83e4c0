//! Who may run the workload: terms, leases, promotion, fencing, handoff. Pure: no IO, no clock, no
//! randomness.
//!
//! One [`Core`] for each workload on each host. The agent hands it what happened ([`Input`], with the time of
//! the host's boot-time clock, which does not stop in suspend) and does what it says ([`Action`]), in order.
//! Durable writes go out with a [`Ticket`]; what depends on one comes after [`Input::Persisted`].
//!
//! ```text
//!            the host that runs it                             the host that holds its image
//!
//!        ack granted / nobody may promote                            BecomeStandby
//!          ┌──────────────────────────┐                     ┌─► Standby ◄───────────────────┐
//!          ▼        lease ends        │                     │      │ silence > lease + drift, │
//!       Primary ────────────────► Fenced                    │      │ armed; or TakeOver       │ Abort: yields
//!          │  │                      │  newer term heard    │      ▼                          │ the term
//!          │  └──────────────┬───────┘                      │  Promoting ──── 3 failures ─► Stuck
//!  Handoff │                 ▼                              │      │  ▲                       │
//!   Ready  │             superseded ── newer term runs ─────┤      │  └──── RetryRestore ─────┘
//!          ▼             (Fenced)                           │      │ Restored, durable
//!       handing off ────────┬──── the peer runs it ─────────┘      ▼
//!        (Fenced)           │                                   Primary, alone until a standby is armed
//!                           └──── the peer yields the term ──► Primary, two terms on
//! ```
//!
//! A primary whose copy is gone when its agent starts is `Lost`: it asks and waits; it never starts the
//! workload.
//!
//! # Why no two copies run
//!
//! *A standby promotes only when the primary's copy is fenced.* A granted heartbeat lets the primary run
//! until `lease` after it **sent** it; the standby waits `lease + drift` after it **received** it, which is
//! later on any two clocks whose rates differ by less than the drift allowance. The primary's deadline is
//! kept by the guard, a process of its own, which begins `fence_margin` early; a hung agent changes nothing.
//! A standby that has just started counts as having granted a moment ago. From the decision on nothing of the
//! old term is granted; the new term is durable before anything is restored, and only then named to the peer.
//!
//! *A primary without a guard has no standby that could promote.* A standby is armed by an epoch that it
//! holds, committed in the current term and newer than its durable `disarmed_through`. The primary permits
//! the `End` frame of an epoch only when its record says `armed` durably and the guard has confirmed that its
//! deadline lies ahead (an agent may be paused between deciding and doing, so the guard's word counts). It
//! gives the guard up only after the standby has durably disarmed itself through the newest epoch that can be
//! under way: `armed` carries that number, so a restarted agent knows it.
//!
//! *A frozen copy runs on only with a fresh grant of its own term, or after the peer has durably given the
//! newer term up.* A grant counts only if this life of the agent sent that very heartbeat. `Unfence` is one
//! step of the guard with its new deadline.
//!
//! *A handoff ends with one copy.* Before `TakeOver` leaves, the record says `handoff`: from then on no grant
//! un-fences the source, not even after a restart. It ends when the peer says that it runs the new term (the
//! copy is destroyed), or that it has yielded it (durably, and disarmed: the source runs on without a lease
//! until the next commit).
//!
//! *A copy is destroyed only when a newer one has run.* Hearing a newer term fences at once, but the frozen
//! copy is kept until the peer is known to run: if the peer's restores fail, the workload comes back here.
//!
//! *Terms of the two hosts alternate.* Promotion adds one, keeping (or forcing) the workload adds two; so the
//! two never hold the same term as primary, the higher one wins wherever they meet, and
//! [`Input::ForceRunAlone`] cannot pick the term that an unreachable standby may be promoting under.
//!
//! # Who decides besides the two
//!
//! The [`Arbiter`] is agreed upon when a protection begins, and is the same on both hosts until it ends.
//!
//! *A store of keys* ([`Arbiter::Store`]): a key that ends by itself, beside the newest term that was ever given one. The
//! primary runs while the key of its term is its own *or* the standby grants. The standby promotes when it has got the key
//! for the next term *and* has granted nothing for a lease: then neither can be true of the primary any more. A key is given
//! only for a term that no newer one has followed, so that a primary that lost its key to a standby never gets it back, though
//! that standby may have ended since. So either host may be lost, or the link between them, and the other goes on; without the
//! store the primary goes on while the standby agrees, and nobody promotes.
//!
//! *A command* ([`Arbiter::Command`]): when the standby has heard nothing for a lease, it has the primary's host switched off,
//! and promotes when the command says so, whatever was heard meanwhile. The primary needs no lease: the loss of the standby
//! does not concern it. A command that lies gives two copies.
//!
//! *A person* ([`Arbiter::Operator`]): the standby never promotes by itself; [`Input::ForcePromote`] is a promise that the
//! primary's host is off.
//!
//! *An operator's fence* is part of the record: no grant, no key and no restart lets that copy run, and it asks for neither, so
//! that a standby which is armed takes over.
//!
//! # What the agent owes
//!
//! - Actions in order, each finished before the next; the guard answers as [`Action`] says.
//! - [`Core::claim`] is looked at whenever all actions are done.
//! - [`Core::accepts_epoch`] is asked at the commit point of every epoch.
//! - A workload unknown to an agent has no core: it answers `Withdraw` with `Withdrawn` and refuses the rest;
//!   an offer makes it write [`Record::standby`] first. `Yielded` is only ever said by a core.
//! - Epochs in flight are numbered from [`Core::first_epoch`] on.
//!
//! With two hosts and nobody else ([`Arbiter::Peer`]), the loss of the standby fences an armed primary until the standby is back
//! or an operator uses force: neither can know that the other is dead.

mod machine;
mod primary;
#[cfg(test)]
mod sim;
mod standby;
#[cfg(test)]
mod tests;
mod timing;
mod types;

pub use machine::Core;
pub use timing::{Timing, TimingError};
pub use types::{Action, Arbiter, Copy, Input, Message, Record, Role, Standing, Start, Ticket};
