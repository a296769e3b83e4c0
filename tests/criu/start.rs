//! Where CRIU runs and what it is given.

use std::{
    fs::{self, File},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::Instant,
};

use standin::criu::{
    images::{self, Pagemap},
    spawn::{Place, Spawn},
    swrk::{DumpOptions, RestoreOptions, Swrk},
};

use crate::common::{ROOT_PID, Workload, install, wait_until};

#[test]
fn version_and_features_are_answered() {
    let install = install();
    let scratch = tempfile::tempdir().unwrap();
    let images = File::open(scratch.path()).unwrap();
    let start = |options: &Spawn<'_>| Swrk::spawn(&install, options).unwrap();
    let began = Instant::now();
    let criu = start(&Spawn::new(images.as_fd()));
    eprintln!("started in {:?}", began.elapsed());
    assert_eq!(criu.ask_version().unwrap(), install.version);
    let features = start(&Spawn::new(images.as_fd())).ask_features().unwrap();
    assert!(features.lazy_pages, "{features:?}");
    // The bridge vouches for tracking, also on kernels without soft-dirty.
    let bridge = standin::criu::bridge::Bridge::new(scratch.path(), install.version).unwrap();
    let bridged = Spawn { bridge: Some(&bridge), track: true, ..Spawn::new(images.as_fd()) };
    assert!(start(&bridged).ask_features().unwrap().mem_track);
    // Its answers were cached in the directory given, and nowhere else.
    let began = Instant::now();
    start(&bridged).ask_features().unwrap();
    eprintln!("features again, cached: {:?}", began.elapsed());
    let cached = fs::read_dir(scratch.path()).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        path.is_dir() && path.join("criu.kdat").is_file()
    });
    assert!(cached, "no cache of kernel features in {}", scratch.path().display());
}

#[test]
fn a_tree_of_another_user_is_dumped_without_cap_sys_resource() {
    let workload = Workload::start(
        "chmod 777 . && exec setpriv --reuid 65534 --regid 65534 --clear-groups \
         redis-server --save '' --port 6400 --enable-debug-command local",
    );
    workload.wait_for("PONG", &["ping"]);
    let images = workload.images("1");
    let criu = workload.spawn(&images, false, false, None);
    criu.dump(&DumpOptions::new(ROOT_PID), &mut |_| true).unwrap_or_else(|error| panic!("{error}"));
    workload.assert_running();
}

/// A cgroup that goes with its processes.
struct Cgroup(PathBuf);

impl Cgroup {
    fn make() -> Option<Self> {
        let top = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
        let top = top.into_iter().find(|path| path.join("cgroup.procs").exists())?;
        let path = top.join(format!("standin-test-criu-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        Some(Self(path))
    }

    fn has(&self, pid: u32) -> bool {
        fs::read_to_string(self.0.join("cgroup.procs")).unwrap().lines().any(|line| line == pid.to_string())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn restored_processes_are_born_in_the_cgroup_given_and_above_no_pid_of_theirs() {
    let cgroup = Cgroup::make().expect("cgroup v2, writable");
    {
        let workload = Workload::redis();
        let images = workload.images("1");
        let criu = workload.spawn(&images, false, false, None);
        let options = DumpOptions { leave_running: false, ..DumpOptions::new(ROOT_PID) };
        criu.dump(&options, &mut |_| true).unwrap_or_else(|error| panic!("{error}"));
        wait_until("the tree is gone", || workload.outside(ROOT_PID).is_none());
        let directory = File::open(&images).unwrap();
        let options = Spawn {
            place: workload.room.place(),
            cgroups: vec![cgroup.0.clone()],
            pids_above: Some(20_000),
            ..Spawn::new(directory.as_fd())
        };
        let criu = Swrk::spawn(&workload.install, &options).unwrap();
        criu.restore(&RestoreOptions::default(), &mut |_| true).unwrap_or_else(|error| panic!("{error}"));
        workload.assert_running();
        let root = workload.outside(ROOT_PID).unwrap();
        assert!(cgroup.has(root) && cgroup.has(workload.outside(3).unwrap()));
        let last: u32 = {
            let run = std::process::Command::new("nsenter")
                .args(["-t", &workload.room.init().to_string(), "-p", "-m", "cat"])
                .arg("/proc/sys/kernel/ns_last_pid")
                .output()
                .unwrap();
            String::from_utf8(run.stdout).unwrap().trim().parse().unwrap()
        };
        assert!(last > 20_000, "{last}");
        // What was born in it ends with the room.
    }
    wait_until("the cgroup is empty", || {
        fs::read_to_string(cgroup.0.join("cgroup.procs")).unwrap().is_empty()
    });
}

/// CRIU's own images, not ours, are read and written as it does.
#[test]
fn real_images_are_read_and_come_back_the_same() {
    let workload = Workload::redis();
    let directory = workload.images("1");
    let criu = workload.spawn(&directory, false, false, None);
    criu.dump(&DumpOptions::new(ROOT_PID), &mut |_| true).unwrap_or_else(|error| panic!("{error}"));
    let read = |name: &str| images::read(&directory, name).unwrap();
    // Without tracking there is no time in it; that it is read at all shows where its entry begins.
    images::inventory_uptime(&read("inventory.img")).unwrap();
    let tasks = images::pstree(&read(images::PSTREE_FILE)).unwrap();
    assert_eq!(tasks.iter().map(|task| (task.pid, task.parent)).collect::<Vec<_>>(), [(2, 0), (3, 2)]);
    assert!(tasks[0].threads.len() > 3 && tasks[1].threads == [3]);
    for task in tasks {
        let name = images::pagemap_file(standin::model::Space::Task(task.pid));
        let bytes = read(&name);
        let map = Pagemap::decode(&name, &bytes).unwrap();
        // CRIU 4.2 leaves the 32-bit number of pages 0; ours has both, for 4.1 too.
        assert_eq!(Pagemap::decode(&name, &map.encode()).unwrap(), map);
        let pages: u64 = map.runs.iter().map(|run| run.extent.bytes()).sum();
        let file = directory.join(images::pages_file(map.pages_id));
        assert_eq!(fs::metadata(file).unwrap().len(), pages);

        // Our marks are CRIU's, but for stack pages, which it means to leave out.
        let stacks: Vec<u64> = task
            .threads
            .iter()
            .map(|thread| {
                let name = images::core_file(*thread);
                images::stack_pointer(&name, &read(&name)).unwrap().unwrap()
            })
            .collect();
        let mm = images::mm_file(task.pid);
        let vmas = images::mappings(&mm, &read(&mm)).unwrap();
        let present: Vec<_> = map.runs.iter().map(|run| run.extent).collect();
        let ours = images::mark_lazy(&present, &images::lazy_extents(&vmas, &stacks));
        let lazy = |runs: &[images::Run]| {
            let lazy = runs.iter().filter(|run| run.lazy).map(|run| run.extent);
            lazy.flat_map(|e| (e.start..e.end()).step_by(4096)).collect::<std::collections::BTreeSet<_>>()
        };
        let (theirs, ours) = (lazy(&map.runs), lazy(&ours));
        assert!(ours.is_subset(&theirs));
        assert!(theirs.difference(&ours).all(|page| stacks.iter().any(|sp| sp & !4095 == *page)));
    }
}

#[test]
fn a_dump_in_our_own_namespaces_works_too() {
    let install = install();
    let scratch = tempfile::tempdir().unwrap();
    let images = File::open(scratch.path()).unwrap();
    let mut child = std::process::Command::new("setsid")
        .args(["sleep", "1000"])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_until("it sleeps", || {
        fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap().trim() == "sleep"
    });
    let options = Spawn { place: Place::Here, ..Spawn::new(images.as_fd()) };
    let result = Swrk::spawn(&install, &options).unwrap().dump(&DumpOptions::new(child.id()), &mut |_| true);
    let running = matches!(child.try_wait(), Ok(None));
    child.kill().unwrap();
    child.wait().unwrap();
    result.unwrap_or_else(|error| panic!("{error}"));
    assert!(running);
}
