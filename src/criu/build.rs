//! Build script: compiles `bridge/*.c`, the library that is preloaded into the criu process.
//!
//! It is built freestanding (no C library, no start-up code), so that one build works beside every
//! C library a criu may be linked with, its own private one included.

use std::{env, path::PathBuf, process::Command};

const DIRECTORY: &str = "src/criu/bridge";
const SOURCES: [&str; 4] = ["bridge.c", "fork.c", "lists.c", "scan.c"];

fn main() {
    println!("cargo::rerun-if-changed={DIRECTORY}");
    println!("cargo::rerun-if-env-changed=CC");
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bridge.so");
    let run = Command::new(&compiler)
        .args(["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-nostdlib"])
        .args(["-ffreestanding", "-fno-stack-protector", "-fvisibility=hidden", "-o"])
        .arg(&out)
        .args(SOURCES.map(|source| format!("{DIRECTORY}/{source}")))
        .status();
    let said = match run {
        Ok(status) if status.success() => return,
        Ok(status) => format!("it ended with {status}"),
        Err(error) => format!("it could not be started: {error}"),
    };
    panic!(
        "compiling {DIRECTORY} with the C compiler {} failed: {said}. \
         Install one (`apt install gcc`, `dnf install gcc`) or name it in CC.",
        compiler.display()
    );
}
