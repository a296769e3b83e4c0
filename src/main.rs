//! The `standin` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Before anything else can start a thread: these two become processes that unshare and fork.
    match std::env::args_os().nth(1) {
        Some(verb) if verb == "init" || verb == "guard" => standin::workload::init::main(),
        _ => ExitCode::SUCCESS,
    }
}
