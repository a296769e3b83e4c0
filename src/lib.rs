//! Standin: continuous-checkpoint failover for running Linux workloads.
//!
//! A primary takes an incremental checkpoint of a workload every *epoch* and ships the delta to a standby, which keeps one
//! flat *warm image* and restores it when the primary's *lease* runs out, under a new *term*.
//!
//! ```text
//!  workload ──► capture ──► delta ──► wire ──► transport ─ ─QUIC─ ─► store ──► restore ──► workload
//!  (frozen for    CRIU +      patches,  frames   bulk streams +        flat warm   lazy, from RAM
//!   ~ms)          uffd-wp     LZ4, zstd + term   lease connection      image
//!                                ▲                                        │
//!                                └────────── ack(term, epoch) ────────────┘
//!  ha/ (no IO): terms, leases, promote, fence, handoff.   agent/ executes what ha/ decides.
//! ```
//!
//! # Map
//!
//! | module | owns |
//! |---|---|
//! | [`cli`] | one file a verb; thin: parse, call the agent's control socket, print |
//! | [`config`] | flags and TOML into one validated value |
//! | [`model`] | the words that all share: names, terms, epochs, pages, an epoch's figures |
//! | [`ha`] | pure: terms, leases, roles, decisions; simulated |
//! | [`agent`] | the daemon: one task owns each workload; control socket; durable record |
//! | [`arbiter`] | keys in etcd: claims a term there for a workload, and says until when it has it |
//! | [`workload`] | the place of a workload: sandbox with its init and guard, container of an engine (with our init, or whole), bare tree, cgroup, network |
//! | [`criu`] | CRIU as a part: start, RPC, page server, preload bridge, lazy pages, images, probe |
//! | [`memory`] | dirty tracking (userfaultfd write protection), batched reads of other processes, flags of their mappings |
//! | [`capture`] | an epoch: spawn-ahead, pre-copy, freeze, read, thaw; the pace of epochs and how a handoff converges |
//! | [`delta`] | pure: what the standby is known to hold, zero and unchanged pages, patches of pages, packing by the link's rate |
//! | [`files`] | replicated directory trees, consistent with the epoch |
//! | [`wire`] | pure: frames, messages, limits (bincode only here) |
//! | [`transport`] | QUIC: identities, pairing, lease and bulk connections |
//! | [`store`] | the warm image: staging, atomic commit, fold, recovery |
//! | [`restore`] | from the image to what CRIU restores |
//! | [`drill`] | what a drill is asked for and finds: its probe, its report as text, JSON and a page |
//! | [`takeover`] | actuators on the host's network: gate, the lease that the kernel keeps, held packets, what clients have sent, addresses, announcements |
//! | [`doctor`] | every prerequisite, tried, with its remedy; two paired hosts compared |
//! | [`observe`] | history and figures for people |
//! | [`extents`] | sets of pages as sorted runs |
//! | `unix_http` | requests to the control socket and to engines |
//!
//! # Architecture invariants
//!
//! - **One runs.** Only [`ha`] decides who may run a workload; only its owner in [`agent`] acts on it; the guard in
//!   [`workload`] enforces the lease without the agent, and the kernel ([`takeover::lease`]) without either.
//! - **Only whole epochs.** [`store`] makes an epoch visible by one rename, after the whole was verified.
//! - **No dirty page is lost.** Which mappings an image must have comes from CRIU, which pages those have from CRIU or the
//!   frozen tree's page map, the content from [`memory`]; [`delta`] remembers what the standby holds and forgets it at the
//!   first doubt.
//! - **The workload outlives us.** Nothing in [`capture`] ends a workload but the confirmed handoff.
//! - **Nobody else.** Lengths from the network are capped in [`wire`]; both ends prove a pinned identity in [`transport`].
//! - Data flows one way, in the order of the drawing; [`ha`], [`delta`] and [`wire`] do no IO.

pub mod agent;
pub mod arbiter;
pub mod capture;
pub mod cli;
pub mod config;
pub mod criu;
pub mod delta;
pub mod doctor;
pub mod drill;
pub mod extents;
pub mod files;
pub mod ha;
pub mod memory;
pub mod model;
pub mod observe;
pub mod restore;
pub mod store;
pub mod takeover;
pub mod transport;
mod unix_http;
pub mod wire;
pub mod workload;
