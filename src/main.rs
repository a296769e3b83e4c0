//! The `standin` command.

use std::ffi::OsString;

fn main() {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if args.first().is_some_and(|verb| verb == "enter") {
        standin::criu::enter::main(&args[1..]);
    }
}
