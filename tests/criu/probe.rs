//! What the doctor asks.

use std::path::Path;

use standin::criu::probe::{Kernel, round_trip};

use crate::common::install;

#[test]
fn a_process_with_a_tcp_connection_goes_round() {
    let scratch = tempfile::tempdir().unwrap();
    let trip = round_trip(&install(), scratch.path()).unwrap_or_else(|error| panic!("{error}"));
    eprintln!("{trip:?}");
}

#[test]
fn the_kernel_is_probed() {
    let kernel = Kernel::probe(Path::new(env!("CARGO_BIN_EXE_standin"))).unwrap();
    eprintln!("{kernel:?}");
    assert!(kernel.ptrace && kernel.pidfd_getfd);
}
