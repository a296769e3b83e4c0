//! A redis, dumped twice by a real CRIU, goes through the store and comes back: eagerly, and lazily with
//! CRIU's own page daemon. `STANDIN_CRIU` names another CRIU than the one that `scripts/setup` installs.

use std::{
    collections::BTreeMap,
    env, fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use standin::{
    criu::images::{Pagemap, Run, pages_file},
    model::{Extent, PAGE_SIZE, Space},
    restore::{self, Mode},
    store::{Durability, Store},
    wire::message::{Manifest, SpaceMap},
};

use crate::epochs::{id, open};

/// Pid 1 of the sandbox: pivots into a bind mount of the host's root, starts redis and reaps.
const INIT: &str = r#"
set -e
mount --make-rprivate /
mkdir "$1/root"; mount --bind / "$1/root"; cd "$1/root"
mount -t proc proc proc; mount --bind /dev dev; mount -t tmpfs tmpfs run
mkdir "$1/old"; pivot_root . ".$1/old"; cd /; umount -l "$1/old"
ip link set lo up
cd "$1"
exec </dev/null >/dev/null 2>&1 10<&- # CRIU finds no files that were opened outside; 10 is bash's own
setsid redis-server --save '' --port 6400 --dir "$1" --enable-debug-command local &
sleep infinity &
while :; do wait -n || true; done
"#;

fn criu_program() -> PathBuf {
    let criu = env::var_os("STANDIN_CRIU").unwrap_or_else(|| "/opt/standin/criu/bin/criu".into());
    let criu = PathBuf::from(criu);
    let missing = "is missing: run scripts/setup, or name one in STANDIN_CRIU";
    assert!(criu.exists(), "{} {missing}", criu.display());
    criu
}

/// Namespaces with a redis in them; all of it goes when this is dropped.
struct Sandbox {
    unshare: Child,
    init: String,
    dir: PathBuf,
}

impl Sandbox {
    fn start(dir: &Path) -> Self {
        let script = dir.join("init.sh");
        fs::write(&script, INIT).expect("a file");
        let unshare = Command::new("unshare")
            .args(["-m", "-p", "-n", "-u", "-i", "-f", "--kill-child", "bash"])
            .arg(&script)
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("unshare starts");
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let mut sandbox = Self { unshare, init: String::new(), dir: dir.to_owned() };
        wait_for("the sandbox's init", || {
            fs::read_to_string(&children).expect("unshare runs").trim().clone_into(&mut sandbox.init);
            !sandbox.init.is_empty()
        });
        wait_for("redis", || sandbox.redis_text(&["ping"]) == "PONG");
        sandbox
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init, "-m", "-n", "-p", "-u", "-i"]).arg(program).stdin(Stdio::null());
        command
    }

    fn run(&self, program: &str, args: &[&str]) -> Output {
        self.command(program.as_ref()).args(args).output().expect("nsenter runs")
    }

    fn redis_text(&self, args: &[&str]) -> String {
        let output = self.run("redis-cli", &[&["-p", "6400"], args].concat());
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn redis_pid(&self) -> String {
        let output = self.run("pidof", &["redis-server"]);
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Ends redis and waits until its pid is free.
    fn end_redis(&self) {
        self.run("kill", &["-9", &self.redis_pid()]);
        self.wait_until_gone();
    }

    fn wait_until_gone(&self) {
        wait_for("redis to be reaped", || self.redis_pid().is_empty());
    }

    fn criu(&self, verb: &str, images: &Path, args: &[&str]) {
        let log = self.dir.join(format!("{verb}.log"));
        let mut command = self.command(&criu_program());
        command.arg(verb).arg("-D").arg(images).arg("-W").arg(&self.dir).arg("-o").arg(&log).arg("-v4");
        command.args(["--tcp-established", "--network-lock", "skip", "--manage-cgroups=ignore"]).args(args);
        // The restored tree keeps these open, so they must be no pipes.
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("nsenter runs");
        if !status.success() {
            let log = fs::read_to_string(&log).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(25).collect();
            panic!("criu {verb}: {status}\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }

    fn dump(&self, name: &str, args: &[&str]) -> PathBuf {
        let images = self.dir.join(name);
        fs::DirBuilder::new().mode(0o700).create(&images).expect("a directory");
        self.criu("dump", &images, &[&["-t", &self.redis_pid()], args].concat());
        images
    }

    fn restore(&self, images: &Path, args: &[&str]) {
        // CRIU's own processes must not get the pids of the workload.
        self.run("sh", &["-c", "echo 30000 > /proc/sys/kernel/ns_last_pid"]);
        self.criu("restore", images, &[&["-d"], args].concat());
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // With it goes pid 1, and with that everything in the namespaces.
        self.unshare.kill().expect("it is ours");
        self.unshare.wait().expect("it is ours");
    }
}

fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < Duration::from_secs(20), "still waiting for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The page maps of a dump with CRIU's own files of pages.
struct Dump {
    dir: PathBuf,
    maps: Vec<(Space, Vec<Run>)>,
    pages: BTreeMap<(usize, u64), Vec<u8>>,
}

impl Dump {
    fn read(dir: &Path) -> Self {
        let mut maps = Vec::new();
        let mut pages = BTreeMap::new();
        for name in names_in(dir) {
            let Some(of) = name.strip_prefix("pagemap-").and_then(|name| name.strip_suffix(".img")) else {
                continue;
            };
            let space = match of.strip_prefix("shmem-") {
                Some(shmid) => Space::Shared(shmid.parse().expect("a shmid")),
                None => Space::Task(of.parse().expect("a pid")),
            };
            let map = Pagemap::decode(&name, &fs::read(dir.join(&name)).expect("a page map"))
                .expect("a page map of CRIU");
            let bytes = fs::read(dir.join(pages_file(map.pages_id))).expect("its pages");
            let mut rest = bytes.chunks_exact(PAGE_SIZE as usize);
            for run in &map.runs {
                for addr in (run.extent.start..run.extent.end()).step_by(PAGE_SIZE as usize) {
                    let page_bytes = rest.next().expect("as many pages as the map says").to_vec();
                    pages.insert((maps.len(), addr), page_bytes);
                }
            }
            assert!(rest.next().is_none());
            maps.push((space, map.runs));
        }
        Self { dir: dir.to_owned(), maps, pages }
    }

    fn manifest(&self) -> Manifest {
        let spaces = self.maps.iter().map(|(space, runs)| SpaceMap {
            space: *space,
            extents: runs.iter().map(|run| run.extent).collect(),
        });
        Manifest { spaces: spaces.collect() }
    }

    fn lazy_extents(&self, space: Space) -> Vec<Extent> {
        let runs = self.maps.iter().filter(|(of, _)| *of == space).flat_map(|(_, runs)| runs);
        runs.filter(|run| run.lazy).map(|run| run.extent).collect()
    }

    /// Commits what differs from `before`, or everything; returns how many pages that were.
    fn commit(&self, store: &Store, epoch: u64, before: Option<&Self>) -> usize {
        let base = before.and_then(|_| store.held());
        let mut staging = store.begin(id(epoch), base).expect("it begins");
        let mut changed = 0;
        for ((map, addr), bytes) in &self.pages {
            if before.and_then(|before| before.pages.get(&(*map, *addr))) == Some(bytes) {
                continue;
            }
            changed += 1;
            let space = self.maps[*map].0;
            if bytes.iter().all(|byte| *byte == 0) {
                staging.zero(space, *addr, 1).expect("room");
            } else {
                staging.pages(space, *addr, bytes).expect("room");
            }
        }
        let small = |name: &String| !name.starts_with("page") && !name.starts_with("stats");
        for name in names_in(&self.dir).iter().filter(|name| small(name)) {
            staging.image_file(name, &fs::read(self.dir.join(name)).expect("an image")).expect("room");
        }
        staging.manifest(self.manifest()).expect("a manifest");
        staging.commit().expect("it commits");
        changed
    }
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<String> = entries.filter_map(|name| name.into_string().ok()).collect();
    names.sort_unstable();
    names
}

/// For CRIU's page daemon: the pages of the eager directory under the page maps of the lazy one, whose
/// entries are marked lazy (the places in the file of pages are the same).
fn daemon_dir(eager: &Path, lazy: &Path, dir: PathBuf) -> PathBuf {
    fs::create_dir(&dir).expect("a directory");
    for name in names_in(eager) {
        let from = if name.starts_with("pagemap-") { lazy } else { eager };
        fs::hard_link(from.join(&name), dir.join(&name)).expect("a link");
    }
    dir
}

#[test]
fn a_redis_comes_back_from_the_store_eagerly_and_lazily() {
    let dir = tempfile::tempdir().expect("a directory");
    let sandbox = Sandbox::start(dir.path());
    let store = open(&dir.path().join("store"), Durability::Disk);

    sandbox.redis_text(&["debug", "populate", "20000", "key", "200"]);
    let first = Dump::read(&sandbox.dump("dump-1", &["--leave-running"]));
    let all = first.commit(&store, 1, None);
    for i in 0..50 {
        sandbox.redis_text(&["set", &format!("key:{}", i * 37), "changed"]);
    }
    let digest = sandbox.redis_text(&["debug", "digest"]);
    let pid: u32 = sandbox.redis_pid().parse().expect("a pid");
    let second = Dump::read(&sandbox.dump("dump-2", &[]));
    sandbox.wait_until_gone();
    let changed = second.commit(&store, 2, Some(&first));
    println!("{all} pages, {changed} of them changed");
    assert!(changed < all / 2);
    store.fold().expect("it folds");

    let view = store.freeze_for_restore().expect("two epochs are held");
    view.verify().expect("it is whole");
    let root = dir.path().join("ready");
    let begun = Instant::now();
    let eager = restore::materialise(&view, &root, Mode::Eager, |_| Vec::new()).expect("room");
    let eager_took = begun.elapsed();
    let begun = Instant::now();
    let lazy =
        restore::materialise(&view, &root, Mode::Lazy, |space| second.lazy_extents(space)).expect("room");
    println!(
        "eager in {eager_took:?}, lazy ({} of {} pages) in {:?}",
        lazy.lazy_pages,
        lazy.pages,
        begun.elapsed()
    );
    assert!(lazy.lazy_pages > lazy.pages / 2);
    for ready in [&eager, &lazy] {
        restore::preflight(&ready.dir, &[pid], |_| false).expect("nothing is missing");
    }

    sandbox.restore(&eager.dir, &[]);
    assert_eq!(sandbox.redis_text(&["debug", "digest"]), digest);
    assert_eq!(sandbox.redis_pid(), pid.to_string());
    sandbox.end_redis();

    let pages = daemon_dir(&eager.dir, &lazy.dir, dir.path().join("daemon"));
    let mut daemon = sandbox
        .command(&criu_program())
        .arg("lazy-pages")
        .arg("-D")
        .arg(&pages)
        .args(["-v4", "-o", "lazy-pages.log", "-W"])
        .arg(dir.path())
        .spawn()
        .expect("nsenter runs");
    wait_for("CRIU's page daemon", || dir.path().join("lazy-pages.socket").exists());
    sandbox.restore(&lazy.dir, &["--lazy-pages"]);
    assert_eq!(sandbox.redis_text(&["debug", "digest"]), digest);
    assert!(daemon.wait().expect("it ends when all pages are there").success());
    sandbox.end_redis();
    restore::discard_others(&root, Some(&lazy.dir)).expect("they can be removed");
    assert_eq!(names_in(&root), ["lazy-1-2"]);
}
