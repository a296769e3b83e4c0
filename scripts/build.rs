//! Build script: compiles the two parts of Standin that run where no library of ours can be: the bridge, which is preloaded
//! into the criu process, and the init of wrapped containers.
//!
//! Both are freestanding (no C library, no start-up code), so that one build works beside every C library a criu may be
//! linked with, its own private one included, and in every image.

use std::{env, path::PathBuf, process::Command};

const BRIDGE: &str = "src/criu/bridge";
const BRIDGE_SOURCES: [&str; 5] = ["bridge.c", "fork.c", "lists.c", "records.c", "scan.c"];
const INIT: &str = "src/workload/container/init.c";
const FREESTANDING: [&str; 6] =
    ["-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-stack-protector"];

fn main() {
    println!("cargo::rerun-if-changed={BRIDGE}");
    println!("cargo::rerun-if-changed={INIT}");
    println!("cargo::rerun-if-env-changed=CC");
    let sources = BRIDGE_SOURCES.map(|source| format!("{BRIDGE}/{source}"));
    compile("bridge.so", &["-fPIC", "-shared", "-nostdlib", "-fvisibility=hidden"], &sources);
    compile("init", &["-static", "-nostdlib", "-fno-pie", "-no-pie", "-s"], &[INIT.to_owned()]);
}

fn compile(name: &str, options: &[&str], sources: &[String]) {
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(name);
    let run =
        Command::new(&compiler).args(FREESTANDING).args(options).arg("-o").arg(&out).args(sources).status();
    let said = match run {
        Ok(status) if status.success() => return,
        Ok(status) => format!("it ended with {status}"),
        Err(error) => format!("it could not be started: {error}"),
    };
    panic!(
        "compiling {} with the C compiler {} failed: {said}. \
         Install one (`apt install gcc`, `dnf install gcc`) or name it in CC.",
        sources.join(" "),
        compiler.display()
    );
}
