//! Programs in a sandbox, and the pages that they write from epoch to epoch.

use std::{
    collections::BTreeSet,
    error::Error,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command as Process,
    time::{Duration, Instant},
};

use standin::{
    model::{Extent, PAGE_SIZE, Space},
    workload::control::{Command, User},
};

use super::{memory::Memory, sandbox::Home};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

const START_TIMEOUT: Duration = Duration::from_secs(60);
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pages that are read and compared at a time.
const PART_PAGES: u64 = 1024;
/// Between two epochs.
const EVERY: Duration = Duration::from_millis(200);

/// Pages of one address space, and their content, one after the other.
pub(crate) struct Piece {
    pub(crate) space: Space,
    pub(crate) extents: Vec<Extent>,
    pub(crate) data: Vec<u8>,
}

/// What a program's epochs consist of: the first is all of its memory, each other one the pages that differ from before.
pub(crate) struct Recording {
    pub(crate) source: &'static str,
    pub(crate) epochs: Vec<Vec<Piece>>,
}

impl Recording {
    /// Bytes of the pages of the epochs behind the first.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.epochs[1..].iter().flatten().map(|piece| piece.data.len() as u64).sum()
    }
}

/// What runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    Redis,
    Postgres,
    Python,
    Random,
}

pub(crate) const PROGRAMS: [Program; 4] =
    [Program::Redis, Program::Postgres, Program::Python, Program::Random];

/// 200,000 counters, and between two epochs 5,000 of them are incremented.
const REDIS_KEYS: u64 = 200_000;
const REDIS_INCREMENTS: usize = 5_000;

/// A heap of records that are changed, replaced and sorted into others.
const PYTHON: &str = "
import random, time
random.seed(7)
people = [{'id': i, 'name': 'user%d' % i, 'balance': i * 1.5, 'tags': ['a%d' % (i % 97)]} for i in range(25000)]
index = {person['name']: person for person in people}
print('ready', flush=True)
while True:
    for _ in range(300):
        person = people[random.randrange(len(people))]
        person['balance'] += random.random()
        person['tags'].append('t%d' % random.randrange(1000))
        if len(person['tags']) > 8:
            person['tags'] = person['tags'][-2:]
        index['user%d' % random.randrange(len(people))]['seen'] = time.time()
    time.sleep(0.01)
";

/// Pages are replaced by random bytes.
const RANDOM: &str = "
import mmap, os, random, time
memory = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = os.urandom(len(memory))
print('ready', flush=True)
while True:
    for _ in range(64):
        at = random.randrange(len(memory) // 4096) * 4096
        memory[at:at + 4096] = os.urandom(4096)
    time.sleep(0.005)
";

/// The server and its clients, in one tree.
const POSTGRES: &str = "
set -e
initdb -D DIR/data -A trust -N >/dev/null
mkdir DIR/socket
postgres -D DIR/data -c listen_addresses= -c unix_socket_directories=DIR/socket -c fsync=off &
until pg_isready -q -h DIR/socket; do sleep 0.1; done
pgbench -q -i -s 5 -h DIR/socket postgres >/dev/null 2>&1
echo ready
while :; do pgbench -n -c 4 -T 3600 -h DIR/socket postgres >/dev/null 2>&1; sleep 1; done
";

impl Program {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Postgres => "postgresql",
            Self::Python => "python",
            Self::Random => "random",
        }
    }

    fn command(self, dir: &Path) -> Result<Command> {
        let path = "/usr/sbin:/usr/bin:/sbin:/bin".to_owned();
        let mut env = vec![format!("PATH={path}")];
        let mut user = User::default();
        let argv = match self {
            Self::Redis => {
                let socket = dir.join("redis.sock").display().to_string();
                ["redis-server", "--port", "0", "--unixsocket", &socket, "--save", ""]
                    .map(str::to_owned)
                    .to_vec()
            }
            Self::Postgres => {
                user = User::named("postgres")?;
                env = vec![format!("PATH={}:{path}", postgres_programs()?.display())];
                let script = POSTGRES.replace("DIR", &dir.display().to_string());
                ["/bin/sh", "-c", &script].map(str::to_owned).to_vec()
            }
            Self::Python => ["/usr/bin/python3", "-c", PYTHON].map(str::to_owned).to_vec(),
            Self::Random => ["/usr/bin/python3", "-c", RANDOM].map(str::to_owned).to_vec(),
        };
        Ok(Command { argv, env, cwd: "/".into(), user })
    }
}

/// Where Debian keeps the server's programs, of the newest version that is installed.
fn postgres_programs() -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql")?;
    let found = versions.filter_map(|entry| Some(entry.ok()?.path().join("bin")));
    found.filter(|dir| dir.join("postgres").exists()).max().ok_or_else(|| "no PostgreSQL is installed".into())
}

/// A program in its sandbox.
struct Subject {
    /// Goes first.
    sandbox: Home,
    program: Program,
    dir: tempfile::TempDir,
    random: u64,
}

/// Runs a program and records its epochs.
pub(crate) fn record(program: Program, epochs: usize) -> Result<Recording> {
    let mut subject = Subject::start(program)?;
    let mut memory = Memory::default();
    let mut recording = Recording { source: program.name(), epochs: Vec::new() };
    for _ in 0..=epochs {
        std::thread::sleep(EVERY);
        subject.work()?;
        recording.epochs.push(subject.changed(&mut memory)?);
    }
    Ok(recording)
}

impl Subject {
    fn start(program: Program) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let sandbox = Home::create("delta", program.name(), dir.path())?;
        let subject = Self { sandbox, program, dir, random: 0x9e37_79b9_7f4a_7c15 };
        let own = subject.dir.path().join("own");
        fs::create_dir(&own)?;
        let run = |program: &str, args: &[&str]| Process::new(program).args(args).arg(&own).status();
        run("chmod", &["755", &subject.dir.path().display().to_string()])?;
        if program == Program::Postgres {
            run("chown", &["postgres"])?;
        }
        subject.sandbox.start(&program.command(&own)?)?;
        subject.await_ready()?;
        if program == Program::Redis {
            subject.fill()?;
        }
        Ok(subject)
    }

    fn await_ready(&self) -> Result<()> {
        let until = Instant::now() + START_TIMEOUT;
        let ready = if self.program == Program::Redis { "ready to accept" } else { "ready\n" };
        loop {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            if log.contains(ready) {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(format!("{} does not get ready; it said: {log}", self.program.name()).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The pages that differ from those in `memory`, which they then are in.
    ///
    /// Read from the frozen tree, and not captured with CRIU, which refuses the SysV segment that PostgreSQL makes to
    /// lock its directory.
    fn changed(&self, memory: &mut Memory) -> Result<Vec<Piece>> {
        let cgroup = self.sandbox.keeper().cgroup();
        cgroup.freeze(FREEZE_TIMEOUT)?;
        let changed = self.read_tree(memory);
        cgroup.thaw(FREEZE_TIMEOUT)?;
        changed
    }

    fn read_tree(&self, memory: &mut Memory) -> Result<Vec<Piece>> {
        let (root, _) = self.sandbox.workload_pid()?.ok_or("the program has ended")?;
        let (mut changed, mut shared) = (Vec::new(), BTreeSet::new());
        let mut pages = standin::memory::Pages::default();
        for task in standin::memory::tasks_of(root as i32)?.iter().filter(|task| !task.zombie) {
            for mapping in mappings(task.pid)? {
                // Shared memory is read once, whoever has mapped it.
                let space = match mapping.object {
                    Some(object) if shared.insert((object, mapping.extent.start)) => Space::Shared(object),
                    Some(_) => continue,
                    None => Space::Task(task.inner_pid),
                };
                let task_memory = standin::memory::Memory::of(task.pid);
                task_memory.read_in_parts(&[mapping.extent], PART_PAGES, &mut pages, |part| {
                    changed.extend(memory.differing(space, part.extents(), part.data()));
                    Ok::<_, standin::memory::ReadError>(())
                })?;
            }
        }
        Ok(changed)
    }

    /// What a client does between two epochs; the other programs work by themselves.
    fn work(&mut self) -> Result<()> {
        if self.program != Program::Redis {
            return Ok(());
        }
        let commands = (0..REDIS_INCREMENTS)
            .map(|_| {
                self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                format!("INCR counter:{}\r\n", (self.random >> 33) % REDIS_KEYS)
            })
            .collect::<Vec<_>>();
        self.redis(&commands)
    }

    fn fill(&self) -> Result<()> {
        let keys: Vec<u64> = (0..REDIS_KEYS).collect();
        for keys in keys.chunks(10_000) {
            self.redis(
                &keys.iter().map(|key| format!("SET counter:{key} {}\r\n", key * 77_773)).collect::<Vec<_>>(),
            )?;
        }
        Ok(())
    }

    /// On a connection of its own, since CRIU dumps none that leads out of the tree.
    fn redis(&self, commands: &[String]) -> Result<()> {
        let mut stream = BufReader::new(UnixStream::connect(self.dir.path().join("own/redis.sock"))?);
        for commands in commands.chunks(500) {
            stream.get_mut().write_all(commands.concat().as_bytes())?;
            for _ in commands {
                let mut line = String::new();
                stream.read_line(&mut line)?;
                if !line.starts_with([':', '+']) {
                    return Err(format!("redis says {line:?}").into());
                }
            }
        }
        // CRIU does not dump a socket whose other end is gone before the server has seen that.
        drop(stream);
        std::thread::sleep(Duration::from_millis(20));
        Ok(())
    }
}

/// A writable mapping: private, or of anonymous shared memory with this inode.
struct Mapped {
    extent: Extent,
    object: Option<u64>,
}

fn mappings(pid: i32) -> Result<Vec<Mapped>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut found = Vec::new();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [range, mode, _, _, inode, ref path @ ..] = fields[..] else { continue };
        let (start, end) = range.split_once('-').ok_or("a line of maps without a range")?;
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        let anonymous = ["/dev/zero", "/memfd:", "/SYSV"].iter().any(|name| path.concat().starts_with(name));
        let object = match mode {
            "rw-p" => None,
            "rw-s" if anonymous => Some(inode.parse()?),
            _ => continue,
        };
        found.push(Mapped { extent: Extent { start, pages: (end - start) / PAGE_SIZE }, object });
    }
    Ok(found)
}
