//! The processes that serve the pages of one restore, so that the agent's end changes nothing for the restored tree.
//!
//! ```text
//!   agent ──plan, listener, description of the pages, locked mark──► pager ──fork, again if it is killed──► server
//!         ──HOLD, while CRIU waits at post-restore────────────────────────────────────────────────────────►
//!         ◄──HELD: the tasks may run───────────────────────────────────────────────────────────────────────
//!         ◄──what was served, or why not (standard output)──────────────────────────────────────────────────
//! ```
//!
//! Each of the two answers has a way of its own: they are awaited by different threads.

use std::{
    convert::Infallible,
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
        unix::{
            fs::MetadataExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio, exit},
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
        socket::{ControlMessage, MsgFlags, UnixAddr, recvmsg, sendmsg},
        wait::{WaitStatus, waitpid},
    },
    unistd::{dup2_stdin, dup2_stdout},
};
use serde::{Deserialize, Serialize};

use super::{
    super::{Install, sys},
    LazyError, LazyServer, LazySummary, OpenFiles, PageFiles,
    journal::Entry,
    listen,
    sys::is_over,
};
use crate::model::{Extent, Space};

/// To the pager: see that all userfaultfds which CRIU has sent are held twice; its answer is the same.
const HOLD: u8 = b'h';
/// How long it may take to answer; then the restore is called off, and made without it.
const HOLD_TIMEOUT: Duration = Duration::from_secs(5);
/// So many servers of one restore may be killed: more of them die of what they serve.
const SERVERS_MAX: u32 = 8;
/// How often a server that has failed looks for the end of the tasks.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Longest plan.
const PLAN_BYTES_MAX: usize = 16 << 10;

#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    directory: PathBuf,
    mark: PathBuf,
}

type Outcome = Result<LazySummary, String>;

/// A file that says that a lazy restore is under way, locked by whoever serves it.
#[derive(Debug)]
pub struct Mark {
    path: PathBuf,
    file: File,
}

/// Locks a file for as long as any process has this opening of it.
fn lock(file: &File, wait: bool) -> nix::Result<()> {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, if wait { FcntlArg::F_OFD_SETLKW(&whole) } else { FcntlArg::F_OFD_SETLK(&whole) }).map(drop)
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

impl Mark {
    /// Makes the file anew. It need not survive the host: neither does the tree.
    pub fn make(path: &Path, text: &[u8]) -> io::Result<Self> {
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(text)?;
        lock(&file, false)?;
        fs::rename(&new, path)?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Whether somebody still serves the restore of which the file at `path` speaks.
    pub fn is_served(path: &Path) -> bool {
        open(path).is_ok_and(|file| lock(&file, false).is_err())
    }

    /// Blocks until nobody serves that restore any more; whether every page has come.
    pub fn wait(path: &Path) -> bool {
        let Ok(file) = open(path) else { return true };
        // Should it fail, the restore counts as one that did not end.
        lock(&file, true).is_ok() && !path.exists()
    }

    /// Removes the file, unless another one is there by now.
    fn remove(&self) -> io::Result<()> {
        let ours = self.file.metadata()?;
        match fs::metadata(&self.path) {
            // A server that was killed then had removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            there => {
                let there = there?;
                let same = (ours.dev(), ours.ino()) == (there.dev(), there.ino());
                if same { fs::remove_file(&self.path) } else { Ok(()) }
            }
        }
    }
}

/// The agent's side of a process that serves pages.
#[derive(Debug)]
pub struct Pager {
    child: Child,
    control: UnixStream,
    outcome: ChildStdout,
}

impl Pager {
    /// Listens in the directory of the images to be restored, and has a process of its own serve their lazy pages.
    /// From then on that process alone has the mark, and removes it behind the last page.
    pub fn start(
        install: &Install,
        directory: &Path,
        mark: Mark,
        pages: &PageFiles,
    ) -> Result<Self, LazyError> {
        let listener = listen(directory)?;
        let plan = Plan { directory: directory.to_owned(), mark: mark.path };
        Self::spawn(install, &plan, &listener, &mark.file, pages)
            .map_err(|error| LazyError::Pager(error.to_string()))
    }

    fn spawn(
        install: &Install,
        plan: &Plan,
        listener: &UnixListener,
        mark: &File,
        pages: &PageFiles,
    ) -> io::Result<Self> {
        let (control, theirs) = UnixStream::pair()?;
        let mut described = File::from(memfd_create(c"standin-pages", MFdFlags::MFD_CLOEXEC)?);
        described.write_all(&pages.encode())?;
        let mut child = Command::new(install.launcher())
            .args(["enter", "page"])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let outcome = child.stdout.take().ok_or_else(|| io::Error::other("a pager without an output"))?;
        let fds = [listener.as_raw_fd(), described.as_raw_fd(), mark.as_raw_fd()];
        let plan = serde_json::to_vec(plan)?;
        let rights = [ControlMessage::ScmRights(&fds)];
        let socket = control.as_raw_fd();
        sendmsg::<UnixAddr>(socket, &[io::IoSlice::new(&plan)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(Self { child, control, outcome })
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// A handle for whoever asks CRIU for the restore.
    pub fn handle(&self) -> io::Result<PagerHandle> {
        Ok(PagerHandle(self.control.try_clone()?))
    }

    /// Blocks until each task has all its pages. After an error tasks that run wait for missing pages, and must be
    /// killed.
    pub fn wait(mut self) -> Result<LazySummary, LazyError> {
        let mut said = Vec::new();
        let heard = self.outcome.read_to_end(&mut said);
        // One that has failed ends when the tasks are gone.
        std::thread::spawn(move || self.child.wait());
        heard.map_err(|error| LazyError::Pager(error.to_string()))?;
        match serde_json::from_slice::<Outcome>(&said) {
            Ok(outcome) => outcome.map_err(LazyError::Pager),
            Err(_) => Err(LazyError::Pager("it ended early. The workload must be ended".into())),
        }
    }
}

/// See [`Pager::handle`].
#[derive(Debug)]
pub struct PagerHandle(UnixStream);

impl PagerHandle {
    /// Returns when every userfaultfd that CRIU has sent is in two processes. To be called while CRIU waits with the
    /// tasks restored and not running yet (`post-restore`): from then on no single death can take one away.
    pub fn hold(&self) -> io::Result<()> {
        self.0.set_read_timeout(Some(HOLD_TIMEOUT))?;
        let mut socket = &self.0;
        socket.write_all(&[HOLD])?;
        let mut answer = [0];
        socket.read_exact(&mut answer)?;
        if answer == [HOLD] { Ok(()) } else { Err(io::Error::other("the pager has failed")) }
    }

    /// Tells it that no CRIU will come; one to which a CRIU has connected goes on until that ends.
    pub fn stop(&self) {
        // One that has ended needs not be told.
        let _ = self.0.shutdown(std::net::Shutdown::Write);
    }
}

/// What a process on which a restored tree depends does first: it is not ended with the agent's terminal or service,
/// nor for memory, and may have as many descriptors as there are tasks.
pub(super) fn endure() -> io::Result<()> {
    nix::unistd::setsid()?;
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        super::super::sys::ignore(signal)?;
    }
    // Refused without CAP_SYS_RESOURCE; it is small, and thus the last to be chosen anyway.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}

/// The process itself: the verb `enter page`, with the agent at its standard input and output. It prepares all, and forks
/// the server, so that another one finds all as the first did.
pub(in super::super) fn page() -> Result<Infallible, io::Error> {
    endure()?;
    let agent = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut duty = match receive(&agent).map_err(|error| error.to_string()).and_then(Duty::new) {
        Ok(duty) => duty,
        Err(failure) => return report(&Err(failure)).map(|()| exit(1)),
    };
    for _ in 0..SERVERS_MAX {
        let Some(server) = sys::fork_with_descriptors()? else { duty.fulfil(agent) };
        match waitpid(server, None)? {
            WaitStatus::Exited(_, code) => exit(code),
            // It is not known what it heard of CRIU; the restore fails, and nothing has run.
            _ if !duty.server.is_held() => exit(1),
            ended => eprintln!("standin enter page: the server was ended ({ended:?}), another goes on"),
        }
    }
    let entries = duty.server.journal.take_over()?;
    let uffds: Vec<OwnedFd> = entries.iter().filter_map(Entry::uffd).map(sys::own).collect();
    let reported = report(&Err(format!("{SERVERS_MAX} servers of its pages were killed")));
    reported.and_then(|()| duty.let_wait(&uffds.iter().collect::<Vec<_>>()))
}

/// An agent that is gone needs no answer: the mark says what became of the restore.
fn report(outcome: &Outcome) -> io::Result<()> {
    let mut output = io::stdout();
    let _ = output.write_all(&serde_json::to_vec(outcome)?).and_then(|()| output.flush());
    Ok(())
}

fn receive(agent: &UnixStream) -> io::Result<(Plan, [OwnedFd; 3])> {
    let mut text = vec![0; PLAN_BYTES_MAX];
    let mut space = nix::cmsg_space!([RawFd; 3]);
    let mut slices = [io::IoSliceMut::new(&mut text)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(agent.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let length = message.bytes;
    let fds = sys::descriptors(&message)?;
    let fds = fds.try_into().map_err(|_| io::Error::other("a plan without its descriptors"))?;
    Ok((serde_json::from_slice(&text[..length])?, fds))
}

/// All that serving one restore needs.
struct Duty {
    server: LazyServer,
    files: OpenFiles,
    hot: Vec<(Space, Extent)>,
    mark: Mark,
}

impl Duty {
    fn new((plan, [listener, described, mark]): (Plan, [OwnedFd; 3])) -> Result<Self, String> {
        let text = |error: io::Error| error.to_string();
        let mut described = File::from(described);
        let mut bytes = Vec::new();
        described.rewind().and_then(|()| described.read_to_end(&mut bytes)).map_err(text)?;
        let pages = PageFiles::decode(&bytes).ok_or("the description of the pages is damaged")?;
        let hot = pages.hot().to_vec();
        let server = LazyServer::with(UnixListener::from(listener), &plan.directory);
        Ok(Self {
            server: server.map_err(|error| error.to_string())?,
            files: pages.open().map_err(text)?,
            hot,
            mark: Mark { path: plan.mark, file: File::from(mark) },
        })
    }

    /// Serves, and ends the process.
    fn fulfil(mut self, agent: UnixStream) -> ! {
        // To unwind would close userfaultfds.
        std::panic::set_hook(Box::new(|_| std::process::abort()));
        // The way back may still be owed, if another server was ended when it had heard the question.
        if self.server.is_held() {
            answer(&agent);
        }
        let caller = self.server.caller();
        let (mut listening, speaking) = (agent.try_clone(), agent);
        std::thread::spawn(move || {
            let mut word = [0];
            while listening.as_mut().is_ok_and(|agent| agent.read(&mut word).is_ok_and(|length| length == 1)) {
                caller.hold();
            }
            // It has stopped us, or is gone.
            caller.stop();
        });
        // The tasks stay to the end: another server would need them.
        let (served, tasks) = self.server.serve_tasks(&self.files, &self.hot, &mut || answer(&speaking));
        let text = |error: io::Error| error.to_string();
        // Whoever finds no mark believes that every page is there.
        let removed = |summary| self.mark.remove().map(|()| summary).map_err(text);
        let outcome = served.map_err(|error| error.to_string()).and_then(removed);
        let reported = report(&outcome);
        if outcome.is_err() && self.server.is_held() {
            let uffds: Vec<&OwnedFd> = tasks.iter().map(|task| &task.uffd).collect();
            // Should it fail, they are let go with this process, and the agent kills the tree.
            let _ = self.let_wait(&uffds);
        }
        exit(i32::from(outcome.is_err() || reported.is_err()))
    }

    /// Nobody serves any more: whoever touches a missing page waits, until all are gone.
    fn let_wait(self, uffds: &[&OwnedFd]) -> io::Result<Infallible> {
        // The agent hears the end of what was said, and finds the mark without its lock.
        drop(self.mark);
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        while !uffds.iter().all(|uffd| is_over(uffd)) {
            std::thread::sleep(LOOK_INTERVAL);
        }
        exit(1)
    }
}

/// Says that what CRIU has sent is held. An agent that is gone has nobody who waits for it.
fn answer(mut agent: &UnixStream) {
    let _ = agent.write_all(&[HOLD]);
}
