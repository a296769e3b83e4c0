//! Starts the workload's first process: the root of the tree that CRIU dumps.
//!
//! CRIU needs it to be a session leader inside, and its descriptors to be opened in its mount namespace
//! ("Can't lookup mount" otherwise); so nothing of the agent's or the init's is inherited.

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    io::Write,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, SigmaskHow, sigprocmask},
        stat::{Mode, umask},
    },
    unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid, setsid},
};

use super::{super::control::Command, OOM_SCORE, plug, sys};

const GROUPS_MAX: usize = 65_536;

/// The exec's arguments, made before the fork.
struct Program {
    argv: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    fn new(command: &Command) -> Result<Self, String> {
        let convert = |texts: &[String]| -> Result<Vec<CString>, String> {
            texts
                .iter()
                .map(|text| CString::new(text.as_str()).map_err(|_| format!("{text:?} contains a NUL")))
                .collect()
        };
        if command.argv.is_empty() {
            return Err("the command is empty".to_owned());
        }
        if command.user.groups.len() > GROUPS_MAX {
            return Err(format!("more than {GROUPS_MAX} groups"));
        }
        Ok(Self { argv: convert(&command.argv)?, env: convert(&command.env)? })
    }
}

/// Forks and execs. A failure after the fork is written to `failure` as the errno's number.
pub(super) fn start(
    command: &Command,
    output: BorrowedFd<'_>,
    failure: BorrowedFd<'_>,
    procs: &File,
    oom_score: &str,
) -> Result<Pid, String> {
    let program = Program::new(command)?;
    if let Some(child) = sys::fork().map_err(|errno| format!("cannot fork: {errno}"))? {
        return Ok(child);
    }
    // Higher than the init's, so it is not refused; where the init's could not be lowered, they are equal.
    let _ = std::fs::write(OOM_SCORE, oom_score.trim());
    let errno = become_workload(command, &program, output, failure, procs);
    let _ = nix::unistd::write(failure, &(errno as i32).to_ne_bytes());
    std::process::exit(127);
}

/// Returns only with an error.
fn become_workload(
    command: &Command,
    program: &Program,
    output: BorrowedFd<'_>,
    failure: BorrowedFd<'_>,
    procs: &File,
) -> Errno {
    let prepare = || -> Result<(), Errno> {
        let errno = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        setsid()?;
        let mut procs = procs;
        procs.write_all(b"0").map_err(errno)?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(errno)?;
        plug(null.as_fd(), output).map_err(errno)?;
        // `failure` is close-on-exec.
        sys::close_from(3, failure).map_err(errno)?;
        std::mem::forget(null);
        umask(Mode::from_bits_truncate(0o022));
        let groups: Vec<Gid> = command.user.groups.iter().copied().map(Gid::from_raw).collect();
        setgroups(&groups)?;
        let (uid, gid) = (Uid::from_raw(command.user.uid), Gid::from_raw(command.user.gid));
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        std::env::set_current_dir(Path::new(&command.cwd)).map_err(errno)?;
        sys::default_signals();
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
    };
    match prepare() {
        Err(errno) => errno,
        Ok(()) => exec(program),
    }
}

/// execvpe looks for the program in *this* process's PATH, which is the agent's; the workload's counts.
fn exec(program: &Program) -> Errno {
    let name = program.argv[0].to_bytes();
    let path = program.env.iter().find_map(|entry| entry.to_bytes().strip_prefix(b"PATH="));
    if name.contains(&b'/') {
        return sys::exec(&program.argv[0], &program.argv, &program.env);
    }
    let mut found = Errno::ENOENT;
    for dir in path.unwrap_or(b"/usr/local/bin:/usr/bin:/bin").split(|b| *b == b':') {
        let full = [dir, b"/", name].concat();
        let Ok(full) = CString::new(full) else { continue };
        match sys::exec(&full, &program.argv, &program.env) {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => found = Errno::EACCES,
            errno => return errno,
        }
    }
    found
}
