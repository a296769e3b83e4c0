//! The `standin` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<std::ffi::OsString> = std::env::args_os().skip(1).collect();
    // Before anything else can start a thread: these become other processes, that unshare, fork and execute.
    match args.first().and_then(|verb| verb.to_str()) {
        Some("init" | "guard") => standin::workload::init::main(),
        Some("enter") => standin::criu::enter::main(&args[1..]),
        _ => standin::cli::main(),
    }
}
