//! What is told of a process' mappings against what `/proc/PID/smaps` says.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use standin::memory::Vmas;

/// Mappings of all kinds, one that ends where the kernel's buffer of 32 KiB does, and then some thousands.
const PROGRAM: &str = r#"
import mmap, sys, time
kept = []
def add(flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, advice=None, prot=3, file=-1, size=8192):
    page = mmap.mmap(file, size, flags=flags, prot=prot)
    if advice is not None:
        page.madvise(advice)
    kept.append(page)
for advice in ("SEQUENTIAL", "RANDOM", "DONTFORK", "DONTDUMP", "HUGEPAGE", "NOHUGEPAGE", "MERGEABLE"):
    try:
        add(advice=getattr(mmap, "MADV_" + advice), size=1 << 21)
    except OSError:
        pass
add(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
program = open(sys.executable, "rb")
add(mmap.MAP_PRIVATE, prot=1, file=program.fileno())
add(mmap.MAP_SHARED, prot=1, file=program.fileno())
def count():
    return sum(1 for line in open("/proc/self/maps") if "[vsyscall]" not in line)
# Neighbours of different kinds do not become one mapping.
while len(kept) < int(sys.argv[1]) or int(sys.argv[2]) and count() < int(sys.argv[2]):
    add(prot=1 + 2 * (len(kept) % 2))
print("ready", flush=True)
time.sleep(600)
"#;
/// The flags that CRIU looks for.
const USED: [&str; 16] =
    ["gd", "pf", "lo", "io", "sr", "rr", "dc", "nr", "ht", "wf", "dd", "hg", "nh", "mg", "ss", "dp"];

struct Stopped(Child);

impl Stopped {
    fn start(mappings: usize, exactly: usize) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM, &mappings.to_string(), &exactly.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        let stopped = Self(child);
        kill(Pid::from_raw(stopped.pid()), Signal::SIGSTOP).unwrap();
        waitpid(Pid::from_raw(stopped.pid()), Some(WaitPidFlag::WUNTRACED)).unwrap();
        stopped
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Each mapping's line and the flags of it that CRIU looks for.
fn mappings(text: &str) -> Vec<(String, Vec<String>)> {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let mut flags: Vec<_> =
                flags.split_whitespace().filter(|flag| USED.contains(flag)).map(String::from).collect();
            flags.sort();
            found.last_mut().unwrap().1 = flags;
        } else if !line.starts_with(|c: char| c.is_ascii_uppercase()) {
            found.push((line.to_owned(), Vec::new()));
        }
    }
    found
}

fn compare(vmas: &Vmas, stopped: &Stopped) -> usize {
    let maps = fs::read(format!("/proc/{}/maps", stopped.pid())).unwrap();
    let told = mappings(std::str::from_utf8(&vmas.essence(stopped.pid(), &maps).unwrap()).unwrap());
    let said = mappings(&fs::read_to_string(format!("/proc/{}/smaps", stopped.pid())).unwrap());
    assert_eq!(told, said);
    for flag in ["dc", "dd", "sr", "rr"] {
        assert!(told.iter().any(|(_, flags)| flags.iter().any(|one| one == flag)), "{flag}");
    }
    told.len()
}

#[test]
fn what_is_told_of_mappings_is_what_smaps_says() {
    let vmas = Vmas::open().unwrap();
    assert!(compare(&vmas, &Stopped::start(20, 0)) > 30);
    assert!(compare(&vmas, &Stopped::start(5000, 0)) > 5000);
}

#[test]
fn a_list_of_any_length_ends() {
    let vmas = Vmas::open().unwrap();
    for exactly in 1363..=1368 {
        compare(&vmas, &Stopped::start(20, exactly));
    }
}

#[test]
fn a_process_that_is_gone_has_no_mappings() {
    let vmas = Vmas::open().unwrap();
    let mut child = Command::new("true").spawn().unwrap();
    let pid = child.id() as i32;
    child.wait().unwrap();
    assert!(vmas.essence(pid, b"7f00-7f01 rw-p 00000000 00:00 0\n").is_err());
}
