//! The hidden verb `standin enter …`: what must happen in a process of its own, single-threaded,
//! between the agent and a program it starts.
//!
//! - `enter swrk`: receives a plan and descriptors over standard input, enters cgroups and
//!   namespaces, and becomes `criu swrk`.
//! - `enter page`: serves the pages of a lazy restore; see [`super::lazy`].
//! - `enter room ROOT [PROGRAM …]`: makes namespaces with a reaping init, which starts the program
//!   if there is one, and waits. The room ends when its standard input does, so it cannot outlive
//!   whoever asked for it. [`super::probe`] dumps and restores in such a room.
//! - `enter echo FILE`: a process that talks to itself over a TCP connection on loopback and counts
//!   in FILE how often it was heard; what the probe dumps.
//!
//! - `enter probe CGROUP COMMAND`: enters the cgroup and the namespaces of the process whose pidfd is standard input, and
//!   becomes `sh -c COMMAND`.
//! - `enter idle`: does nothing until its standard input ends; what the probe tries things on.
//!
//! A failure is reported over the control socket or standard error, and ends the process.

use std::{
    convert::Infallible,
    ffi::{CString, OsString},
    fs::{self, File},
    io::{self, IoSliceMut, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt as _, fs::FileExt as _, process::CommandExt as _},
    },
    path::Path,
    process::{Command, Stdio, exit},
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::{Signal, kill},
        socket::{MsgFlags, UnixAddr, recv, recvmsg, send},
        wait::{WaitStatus, waitpid},
    },
    unistd::{Pid, chdir, dup2_stdin, execve, pivot_root, setsid},
};

use super::{
    spawn::{INHERIT_MAX, Plan, slot},
    sys,
};

/// How long `enter` may take to become CRIU: an execution and a few joins, milliseconds unless the
/// machine is starved.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest plan or failure text.
const CONTROL_BYTES_MAX: usize = 64 << 10;
/// Descriptors beside the plan that are not inherited ones: rpc, images, pages, library, kerndat, gate, init, ipc.
const FIXED_FDS_MAX: usize = 8;
/// Memory that a CRIU that dumps asks for in advance; what it uses of the heap in a dump of a few processes.
const HEAP_BYTES: usize = 1 << 20;
/// How often the process of the probe speaks.
const ECHO_INTERVAL: Duration = Duration::from_millis(2);

/// Runs a hidden verb and ends the process; `args` are those behind `enter`.
pub fn main(args: &[OsString]) -> ! {
    let words: Vec<&str> = args.iter().take(1).filter_map(|word| word.to_str()).collect();
    let result = match (words.as_slice(), &args[args.len().min(1)..]) {
        (["swrk"], []) => swrk(),
        (["room"], [root, program @ ..]) => room(Path::new(root), program),
        (["idle"], []) => {
            io::copy(&mut io::stdin(), &mut io::sink()).map_err(failed("waiting")).map(|_| exit(0))
        }
        (["probe"], [cgroup, command]) => probe(Path::new(cgroup), command),
        (["page"], []) => super::lazy::page().map_err(failed("serving pages")),
        (["echo"], [file]) => echo(Path::new(file)).map_err(|e| format!("talking over loopback: {e}")),
        _ => Err("this verb is for standin's own use".to_owned()),
    };
    let Err(message) = result;
    eprintln!("standin enter: {message}");
    exit(1)
}

fn failed<E: std::fmt::Display>(what: &str) -> impl FnOnce(E) -> String + use<'_, E> {
    move |error| format!("{what}: {error}")
}

// ---- swrk ----

fn swrk() -> Result<Infallible, String> {
    // The control socket moves off standard input and closes when CRIU is executed.
    let control = io::stdin().as_fd().try_clone_to_owned().map_err(failed("keeping the control socket"))?;
    let null = File::open("/dev/null").map_err(failed("opening /dev/null"))?;
    dup2_stdin(&null).map_err(failed("replacing standard input"))?;
    let Err(message) = become_criu(&control);
    // If this cannot be sent, the agent is gone and there is nobody to tell.
    let _ = send(control.as_raw_fd(), message.as_bytes(), MsgFlags::MSG_NOSIGNAL);
    Err(message)
}

/// Waits for `enter` to execute its program (the socket then ends: an empty text) or to say why not.
pub(super) fn hear(control: BorrowedFd<'_>, timeout: Duration) -> io::Result<String> {
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    loop {
        match poll(&mut [PollFd::new(control, PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut text = vec![0; CONTROL_BYTES_MAX];
    let length = match recv(control.as_raw_fd(), &mut text, MsgFlags::empty()) {
        Err(Errno::ECONNRESET) => 0,
        other => other?,
    };
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
}

fn receive(control: &OwnedFd) -> Result<(Plan, Vec<OwnedFd>), String> {
    let mut text = vec![0; CONTROL_BYTES_MAX];
    let mut space = nix::cmsg_space!([RawFd; FIXED_FDS_MAX + INHERIT_MAX]);
    let (length, fds) = {
        let mut slices = [IoSliceMut::new(&mut text)];
        let message = recvmsg::<UnixAddr>(
            control.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .map_err(failed("receiving the plan"))?;
        (message.bytes, sys::descriptors(&message).map_err(failed("reading the descriptors"))?)
    };
    let plan = serde_json::from_slice(&text[..length]).map_err(failed("reading the plan"))?;
    Ok((plan, fds))
}

fn become_criu(control: &OwnedFd) -> Result<Infallible, String> {
    let (plan, fds) = receive(control)?;
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(|| "a descriptor of the plan is missing".to_owned());
    let mut place = |slot: i32| sys::dup_to(&next()?, slot).map_err(failed("placing a descriptor"));
    place(slot::RPC)?;
    place(slot::IMAGES)?;
    if plan.pages {
        place(slot::PAGES)?;
    }
    if plan.bridge {
        place(slot::LIBRARY)?;
        place(slot::KERNDAT)?;
    }
    if plan.gate {
        place(slot::GATE)?;
    }
    let init = plan.init.then(&mut next).transpose()?;
    let ipc = plan.ipc.then(&mut next).transpose()?;
    for number in 0..plan.inherit {
        sys::dup_to(&next()?, slot::INHERIT + number as i32).map_err(failed("placing a descriptor"))?;
    }

    sys::close_on_exec(3, slot::RPC).map_err(failed("closing what is not CRIU's"))?;
    if let (Some(init), true) = (&init, plan.bridge) {
        sys::dup_to(init, slot::INIT).map_err(failed("placing a descriptor"))?;
    }
    for cgroup in &plan.cgroups {
        fs::write(cgroup.join("cgroup.procs"), "0")
            .map_err(|error| format!("entering cgroup {}: {error}", cgroup.display()))?;
    }
    // Opened through the host's proc, since a container's own may be read-only; which namespace is
    // meant is decided by who writes (pid_ns_ctl_handler in kernel/pid_namespace.c).
    let last_pid = plan
        .pids_above
        .map(|pid| {
            let path = "/proc/sys/kernel/ns_last_pid";
            let file = File::options().write(true).open(path).map_err(|e| format!("opening {path}: {e}"))?;
            Ok::<_, String>((file, pid))
        })
        .transpose()?;
    if let Some(init) = init {
        join(&init, ipc.as_ref(), &plan)?;
        raise_pids(last_pid.as_ref())?;
        // Only a child is in the pid namespace that was joined.
        pass_on_to_child("becoming a process of the pid namespace")?;
    } else {
        raise_pids(last_pid.as_ref())?;
    }
    if plan.pages {
        // A dump: a workload will be frozen for as long as it takes. One that is forked hurries when it begins.
        sys::hurry();
    }
    execute(&plan)
}

/// The mount namespace is left to the bridge, if there is one: it joins when CRIU is loaded, from our files.
fn join(init: &OwnedFd, ipc: Option<&OwnedFd>, plan: &Plan) -> Result<(), String> {
    let mut spaces = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS;
    spaces.set(CloneFlags::CLONE_NEWNS, !plan.bridge);
    spaces.set(CloneFlags::CLONE_NEWCGROUP, plan.cgroup_namespace);
    if let Some(ipc) = ipc {
        setns(ipc, CloneFlags::CLONE_NEWIPC).map_err(failed("joining the workload's IPC namespace"))?;
    }
    setns(init, spaces).map_err(failed("joining the workload's namespaces"))
}

/// Makes the next pid of the namespace higher than any of the workload's, so that CRIU's own
/// processes do not sit on one that is to be restored ("Unable to create a thread: -17").
fn raise_pids(last_pid: Option<&(File, u32)>) -> Result<(), String> {
    let Some((file, pid)) = last_pid else { return Ok(()) };
    match sys::fork().map_err(failed("forking"))? {
        None => {
            let mut file = file;
            let done = file.write_all(pid.to_string().as_bytes());
            exit(i32::from(done.is_err()))
        }
        Some(child) => match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            other => Err(format!("raising the namespace's last pid to {pid}: {other:?}")),
        },
    }
}

/// Returns in a child; the parent waits for it and ends as it does.
fn pass_on_to_child(what: &str) -> Result<(), String> {
    let Some(child) = sys::fork().map_err(failed(what))? else { return Ok(()) };
    // What the child ends by closing must not stay open here.
    sys::close_from(3);
    loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => exit(code),
            Err(Errno::EINTR) => {}
            _ => exit(1),
        }
    }
}

fn execute(plan: &Plan) -> Result<Infallible, String> {
    let rpc = slot::RPC.to_string();
    let words = ["--no-default-config", "swrk", rpc.as_str()];
    let argv: Vec<CString> = plan
        .command
        .iter()
        .map(|word| word.as_os_str().as_bytes())
        .chain(words.iter().map(|word| word.as_bytes()))
        .map(CString::new)
        .collect::<Result<_, _>>()
        .map_err(failed("the path of CRIU"))?;
    // CRIU runs tar, ip and iptables for some images; it needs no more of an environment. Plugins it would load from its root,
    // the workload's: there are none in its directory of images.
    let mut environment = vec![c"PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
    let plugins = format!("CRIU_LIBS_DIR=/proc/self/fd/{}", slot::IMAGES);
    environment.push(CString::new(plugins).map_err(failed("the environment of CRIU"))?);
    if plan.bridge && plan.init {
        let text = format!("STANDIN_MOUNTS={}", slot::INIT);
        environment.push(CString::new(text).map_err(failed("the environment of CRIU"))?);
    }
    if plan.bridge {
        for text in [
            format!("LD_PRELOAD=/proc/self/fd/{}", slot::LIBRARY),
            format!("STANDIN_KERNDAT=/proc/self/fd/{}", slot::KERNDAT),
        ] {
            environment.push(CString::new(text).map_err(failed("the environment of CRIU"))?);
        }
    }
    if plan.forks {
        let text = format!("STANDIN_FORK={}", slot::RPC);
        environment.push(CString::new(text).map_err(failed("the environment of CRIU"))?);
    }
    if plan.gate || plan.forks {
        for text in [
            format!("STANDIN_LISTS=/proc/self/fd/{}", slot::IMAGES),
            format!("STANDIN_GATE={}", slot::GATE),
            format!("STANDIN_PAGES={}", slot::PAGES),
            // Nothing that can be done before the freeze shall be left for it: finding functions, asking for memory.
            "LD_BIND_NOW=1".to_owned(),
            format!("MALLOC_TOP_PAD_={HEAP_BYTES}"),
        ] {
            environment.push(CString::new(text).map_err(failed("the environment of CRIU"))?);
        }
    }
    let Err(error) = execve(&argv[0], &argv, &environment);
    Err(format!("executing {}: {error}", plan.command[0].display()))
}

// ---- probe ----

fn probe(cgroup: &Path, command: &OsString) -> Result<Infallible, String> {
    let init = io::stdin().as_fd().try_clone_to_owned().map_err(failed("keeping the place's init"))?;
    let null = File::open("/dev/null").map_err(failed("opening /dev/null"))?;
    dup2_stdin(&null).map_err(failed("replacing standard input"))?;
    fs::write(cgroup.join("cgroup.procs"), "0").map_err(failed("entering the place's cgroup"))?;
    let spaces = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNS;
    setns(&init, spaces).map_err(failed("joining the place's namespaces"))?;
    pass_on_to_child("becoming a process of the pid namespace")?;
    Err(format!(
        "executing /bin/sh, which runs a probe and must be there inside: {}",
        Command::new("/bin/sh").arg("-c").arg(command).exec()
    ))
}

// ---- room ----

fn room(root: &Path, program: &[OsString]) -> Result<Infallible, String> {
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC,
    )
    .map_err(failed("making namespaces"))?;
    let Some(init) = sys::fork().map_err(failed("forking"))? else {
        sys::die_with_parent().map_err(failed("binding the init to its maker"))?;
        return room_init(root, program);
    };
    // Whoever asked holds the other ends. Nothing is ever written to ours. If it has died meanwhile, the init must not stay:
    // it may be too early for it to be bound to us.
    let mut stdout = io::stdout();
    let ended =
        writeln!(stdout, "{init}").and_then(|()| stdout.flush()).and_then(|()| io::stdin().read(&mut [0]));
    // A pid namespace ends with its init, and all in it. Failing means it is gone already.
    let _ = kill(init, Signal::SIGKILL);
    let _ = waitpid(init, None);
    exit(i32::from(ended.is_err()))
}

fn room_init(root: &Path, program: &[OsString]) -> Result<Infallible, String> {
    private_root(root)?;
    sys::loopback_up().map_err(failed("bringing the loopback device up"))?;
    if let [name, arguments @ ..] = program {
        start_program(name, arguments)?;
    }
    loop {
        // Without a child there is nobody to wait for until a restore brings one.
        if waitpid(None::<Pid>, None) == Err(Errno::ECHILD) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A mount namespace of its own that was pivoted into: CRIU's restore stumbles in one that is a
/// bare copy of the host's.
fn private_root(root: &Path) -> Result<(), String> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(failed("making mounts private"))?;
    mount(Some("/"), root, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .map_err(failed("binding the root"))?;
    chdir(root).map_err(failed("entering the root"))?;
    mount(Some("proc"), "proc", Some("proc"), MsFlags::empty(), none).map_err(failed("mounting proc"))?;
    // With both names the same the old root is stacked on the new one, and goes next.
    pivot_root(".", ".").map_err(failed("pivoting into the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("letting the old root go"))?;
    chdir("/").map_err(failed("entering the new root"))
}

/// Starts the program as the leader of a session inside, with descriptors opened inside: CRIU
/// can name neither a session nor a mount that it does not see.
fn start_program(name: &OsString, arguments: &[OsString]) -> Result<(), String> {
    if sys::fork().map_err(failed("forking"))?.is_some() {
        return Ok(());
    }
    setsid().map_err(failed("starting a session"))?;
    sys::close_on_exec(3, RawFd::MAX).map_err(failed("closing what is not the program's"))?;
    let error = Command::new(name)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .exec();
    Err(format!("executing {}: {error}", name.display()))
}

// ---- echo ----

fn echo(file: &Path) -> io::Result<Infallible> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;
    let file = File::options().create(true).truncate(true).write(true).open(file)?;
    let mut count: u64 = 0;
    loop {
        near.write_all(&(count + 1).to_le_bytes())?;
        let mut heard = [0; 8];
        far.read_exact(&mut heard)?;
        // After a restore this holds only if memory and the connection are of the same moment.
        if u64::from_le_bytes(heard) != count + 1 {
            return Err(io::Error::other(format!("heard {heard:?} after {count}")));
        }
        count += 1;
        file.write_all_at(&heard, 0)?;
        std::thread::sleep(ECHO_INTERVAL);
    }
}
