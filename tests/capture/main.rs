//! The capture engine against the truth: a real tree in a real sandbox, epochs through the library, no agents. Every
//! page of the store is compared with what the frozen tree itself held. Needs root and a CRIU.

mod answers;
mod clones;
mod device;
mod epochs;
mod failures;
mod host;
mod load;
mod stages;
mod sys;
mod traps;
mod truth;
mod workload;
