//! What the tests share: the CRIU, a room with a workload in it, ways to look at it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{fd::AsFd as _, unix::fs::FileExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use standin::{
    criu::{
        Install,
        bridge::Bridge,
        images::{self, Pagemap},
        page_server::{self, Handler, Summary},
        parent,
        probe::Room,
        spawn::Spawn,
        swrk::{CriuError, DumpOptions, RestoreOptions, Swrk},
    },
    model::{Extent, PAGE_SIZE, Space},
};

/// The CRIU under test, with the built `standin` as the launcher.
pub(crate) fn install() -> Install {
    let explicit = std::env::var_os("STANDIN_TEST_CRIU").map(PathBuf::from);
    let install = Install::find(explicit.as_deref()).expect("a CRIU; set STANDIN_TEST_CRIU to its path");
    install.with_launcher(Path::new(env!("CARGO_BIN_EXE_standin")).to_owned())
}

/// A workload in a room, and directories for its images.
pub(crate) struct Workload {
    pub(crate) install: Install,
    pub(crate) bridge: Bridge,
    pub(crate) room: Room,
    pub(crate) directory: tempfile::TempDir,
}

pub(crate) const ROOT_PID: u32 = 2;

impl Workload {
    /// Starts `script` under `sh -c` in a new room, its directory as `$D`.
    pub(crate) fn start(script: &str) -> Self {
        let install = install();
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir(&root).unwrap();
        let script = format!("cd {}; {script}", directory.path().display());
        let room = Room::start(&install, &root, &["/bin/sh".into(), "-c".into(), script.into()]).unwrap();
        let bridge = Bridge::new(directory.path(), install.version).unwrap();
        Self { install, bridge, room, directory }
    }

    /// A redis with 20 MB and a child that sleeps.
    pub(crate) fn redis() -> Self {
        let workload =
            Self::start("sleep 1000 & exec redis-server --save '' --port 6400 --enable-debug-command local");
        workload.wait_for("PONG", &["ping"]);
        workload.redis_cli(&["debug", "populate", "20000", "k", "1000"]);
        workload
    }

    pub(crate) fn redis_cli(&self, words: &[&str]) -> String {
        let init = self.room.init().to_string();
        let run = Command::new("nsenter")
            .args(["-t", &init, "-n", "redis-cli", "-p", "6400"])
            .args(words)
            .output()
            .unwrap();
        String::from_utf8_lossy(&run.stdout).trim().to_owned()
    }

    pub(crate) fn wait_for(&self, answer: &str, words: &[&str]) {
        wait_until("redis answers", || self.redis_cli(words) == answer);
    }

    /// Whether redis still runs and takes writes.
    pub(crate) fn assert_running(&self) {
        let before: u64 = self.redis_cli(&["incr", "alive"]).parse().expect("a running redis");
        assert_eq!(self.redis_cli(&["incr", "alive"]), (before + 1).to_string());
    }

    pub(crate) fn images(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) fn spawn(&self, images: &Path, track: bool, page_server: bool, pids: Option<u32>) -> Swrk {
        let images = File::open(images).unwrap();
        let options = Spawn {
            place: self.room.place(),
            bridge: Some(&self.bridge),
            track,
            page_server,
            pids_above: pids,
            ..Spawn::new(images.as_fd())
        };
        Swrk::spawn(&self.install, &options).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Dumps to `images` through a page server; tracked, CRIU believes that nothing changed.
    pub(crate) fn dump(
        &self,
        images: &Path,
        tracked: bool,
        leave_running: bool,
        handler: &mut (dyn Handler + Send),
        notify: &mut dyn FnMut(&str) -> bool,
    ) -> (Result<(), CriuError>, Result<Summary, page_server::PageServerError>) {
        parent::create(&self.directory.path().join(parent::DIRECTORY)).unwrap();
        let mut criu = self.spawn(images, tracked, true, None);
        let socket = criu.take_page_server().unwrap();
        let version = criu.version();
        let options = DumpOptions {
            leave_running,
            parent: tracked.then(|| format!("../{}", parent::DIRECTORY)),
            ..DumpOptions::new(ROOT_PID)
        };
        std::thread::scope(|scope| {
            let server = scope.spawn(move || page_server::serve(&socket, version, handler));
            let dumped = criu.dump(&options, notify);
            (dumped, server.join().unwrap())
        })
    }

    pub(crate) fn restore(&self, images: &Path, lazy: bool) -> Result<u32, CriuError> {
        let criu = self.spawn(images, false, false, Some(5000));
        criu.restore(&RestoreOptions { lazy, ..RestoreOptions::default() }, &mut |_| true)
    }

    /// The pid outside of a pid inside.
    pub(crate) fn outside(&self, inside: u32) -> Option<u32> {
        let space = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let wanted = space(self.room.init())?;
        fs::read_dir("/proc").unwrap().find_map(|entry| {
            let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
            let last: u32 = pids.split_whitespace().next_back()?.parse().ok()?;
            (last == inside && space(pid)? == wanted).then_some(pid)
        })
    }
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < until, "{what}: did not happen within 20 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Takes all pages in: those sent, and those of holes out of the frozen tasks' memory.
pub(crate) struct Collector<'a> {
    pub(crate) workload: &'a Workload,
    pub(crate) tracked: bool,
    pub(crate) pages: BTreeMap<Space, BTreeMap<u64, Vec<u8>>>,
    pub(crate) holes: BTreeMap<Space, BTreeSet<u64>>,
}

impl<'a> Collector<'a> {
    pub(crate) fn new(workload: &'a Workload, tracked: bool) -> Self {
        Self { workload, tracked, pages: BTreeMap::new(), holes: BTreeMap::new() }
    }

    /// Writes the flat image: a page map and a file of pages for each space.
    pub(crate) fn write_flat(&self, directory: &Path) {
        for (number, (space, pages)) in self.pages.iter().enumerate() {
            let mut runs: Vec<Extent> = Vec::new();
            for start in pages.keys().copied() {
                match runs.last_mut() {
                    Some(run) if run.end() == start => run.pages += 1,
                    _ => runs.push(Extent { start, pages: 1 }),
                }
            }
            let lazy = match space {
                Space::Task(pid) => lazy_parts(directory, *pid),
                Space::Shared(_) => Vec::new(),
            };
            let pages_id = number as u32 + 1;
            let map = Pagemap { pages_id, runs: images::mark_lazy(&runs, &lazy) };
            fs::write(directory.join(images::pagemap_file(*space)), map.encode()).unwrap();
            let content: Vec<u8> = pages.values().flatten().copied().collect();
            fs::write(directory.join(images::pages_file(pages_id)), content).unwrap();
        }
        let _ = fs::remove_file(directory.join("parent"));
    }
}

fn lazy_parts(directory: &Path, pid: u32) -> Vec<Extent> {
    let read = |name: &str| images::read(directory, name).unwrap();
    let tasks = images::pstree(&read(images::PSTREE_FILE)).unwrap();
    let task = tasks.iter().find(|task| task.pid == pid).unwrap();
    let stack = |thread: &u32| {
        let name = images::core_file(*thread);
        images::stack_pointer(&name, &read(&name)).unwrap().unwrap()
    };
    let stacks: Vec<u64> = task.threads.iter().map(stack).collect();
    let name = images::mm_file(pid);
    images::lazy_extents(&images::mappings(&name, &read(&name)).unwrap(), &stacks)
}

impl Handler for Collector<'_> {
    fn opened(&mut self, space: Space) -> io::Result<bool> {
        self.pages.entry(space).or_default();
        Ok(self.tracked && matches!(space, Space::Task(_)))
    }

    fn hole(&mut self, space: Space, extent: Extent) -> io::Result<()> {
        let Space::Task(pid) = space else { return Err(io::Error::other("a hole in shared memory")) };
        let outside = self.workload.outside(pid).ok_or(io::ErrorKind::NotFound)?;
        let memory = File::open(format!("/proc/{outside}/mem"))?;
        for start in (extent.start..extent.end()).step_by(PAGE_SIZE as usize) {
            let mut page = vec![0; PAGE_SIZE as usize];
            memory.read_exact_at(&mut page, start)?;
            self.pages.entry(space).or_default().insert(start, page);
            self.holes.entry(space).or_default().insert(start);
        }
        Ok(())
    }

    fn pages(&mut self, space: Space, extent: Extent, _: bool, bytes: &[u8]) -> io::Result<()> {
        for (start, page) in
            (extent.start..).step_by(PAGE_SIZE as usize).zip(bytes.chunks(PAGE_SIZE as usize))
        {
            self.pages.entry(space).or_default().insert(start, page.to_vec());
        }
        Ok(())
    }

    fn close(&mut self) -> io::Result<()> {
        Ok(())
    }
}
