use std::{fs, os::unix::fs::PermissionsExt};

use standin::workload::{
    bare::BareTree,
    control::{Exit, User},
    network::host_device,
    sandbox::{Sandbox, SandboxError},
    spec::Net,
};

use super::lab::{Netns, PROGRAM, Place, SECOND, await_true, output, seen_by, shell, start, unique};

fn own(ip: &str) -> Net {
    Net::Own { ips: vec![ip.parse().unwrap()] }
}

fn child_of(launcher_pid: u32) -> u32 {
    let text = fs::read_to_string(format!("/proc/{launcher_pid}/stat")).unwrap();
    text.rsplit(')').next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn nothing_is_left_of_a_destroyed_sandbox() {
    let host = Netns::new();
    let mut place = Place::new(&unique("gone"), own("10.88.0.2/24"));
    let mount_point = place.dir.path().join("made/by/us");
    place.spec.paths = vec![mount_point.clone()];
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    host.run(|| {
        let sandbox = place.create();
        let (pid, cgroup) = (sandbox.keeper().pid(), sandbox.keeper().cgroup().work());
        start(&sandbox, "sleep 1000 & sleep 1000 & wait");
        sandbox.keeper().cgroup().freeze(SECOND).unwrap();
        assert!(output("ip link").contains(&host_device(&place.spec.name)));
        drop(sandbox);
        for _ in 0..2 {
            Sandbox::destroy(&place.run_dir(), &place.spec.name).unwrap();
        }
        await_true("the init to be reaped", || !fs::exists(format!("/proc/{pid}")).unwrap());
        assert!(!cgroup.exists() && !cgroup.parent().unwrap().exists());
        assert!(!output("ip link").contains(&host_device(&place.spec.name)));
    });
    assert!(!place.run_dir().join(place.spec.name.as_str()).exists());
    assert!(!mount_point.exists() && !place.dir.path().join("made").exists());
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), mounts);
}

#[test]
fn a_workload_sees_only_its_own_namespaces() {
    let host = Netns::new();
    let mut place = Place::new(&unique("inside"), own("10.88.0.3/24"));
    let shown = place.dir.path().join("shown");
    place.spec.paths = vec![shown.clone()];
    host.run(|| {
        let sandbox = place.create();
        let root = start(
            &sandbox,
            &format!(
                "echo pid $$ sid $(ps -o sid= -p $$); hostname; ip -o -4 addr show dev eth0; ls /dev/shm | wc -l;
                 echo kept > {}/file; touch /dev/shm/x; cat /proc/self/cgroup; ls -l /proc/$$/fd; echo done; sleep 1000",
                shown.display()
            ),
        );
        place.await_log("done\n");
        let log = fs::read_to_string(place.log()).unwrap();
        assert!(log.contains(&format!("pid {0} sid", root.pid)), "{log}");
        assert!(log.contains("box\n") && log.contains("10.88.0.3/32") && log.contains("\n0\n"), "{log}");
        assert!(log.contains(&format!("0::/standin/{}/work", place.spec.name)), "{log}");
        assert!(!log.contains(" 3 -> "), "a descriptor too many: {log}");
        assert_eq!(fs::metadata(place.log()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_to_string(place.dir.path().join("data/0/file")).unwrap(), "kept\n");
        assert!(!shown.join("file").exists());

        let (pid, inner) = sandbox.workload_pid().unwrap().unwrap();
        // 1 is the init, 2 the logger.
        assert_eq!(inner, root.pid);
        assert_eq!(inner, 3);
        assert!(sandbox.keeper().cgroup().pids().unwrap().contains(&pid));
        assert!(!sandbox.keeper().cgroup().pids().unwrap().contains(&sandbox.keeper().pid()));
        assert!(seen_by(pid, "/dev/shm/x").exists() && !fs::exists("/dev/shm/x").unwrap());
        assert_ne!(child_of(sandbox.keeper().pid()), std::process::id(), "the init is no child of the agent");
        let pipe = fs::read_link(format!("/proc/{pid}/fd/1")).unwrap();
        let inodes = sandbox.log_pipes().unwrap();
        assert_eq!(inodes.iter().map(|i| format!("pipe:[{i}]")).collect::<Vec<_>>(), [pipe.to_str().unwrap()]);
    });
}

#[test]
fn the_end_of_the_root_is_reported_and_orphans_are_reaped() {
    let place = Place::new(&unique("ends"), Net::Host);
    let sandbox = place.create();
    assert_eq!(sandbox.root().unwrap(), None);
    start(&sandbox, "(sleep 0.1 & exec true); exit 7");
    await_true("the root's end", || sandbox.root().unwrap().unwrap().exit.is_some());
    assert_eq!(sandbox.root().unwrap().unwrap().exit, Some(Exit::Code(7)));
    await_true("the orphan's end", || sandbox.keeper().cgroup().pids().unwrap().is_empty());
    await_true("the pipe's end", || sandbox.log_pipes().unwrap().is_empty());
    start(&sandbox, "kill -9 $$");
    await_true("the second root's end", || sandbox.root().unwrap().unwrap().exit.is_some());
    assert_eq!(sandbox.root().unwrap().unwrap().exit, Some(Exit::Signal(9)));
}

#[test]
fn nothing_inside_can_end_the_init() {
    let place = Place::new(&unique("immune"), Net::Host);
    let sandbox = place.create();
    start(
        &sandbox,
        "kill -TERM 1; kill -KILL 1; kill -STOP 1; kill -KILL 2; sleep 0.2; echo still here; sleep 1000",
    );
    // The logger (2) was killed; its successor has what was written meanwhile.
    place.await_log("still here");
    assert!(sandbox.is_occupied().unwrap());
}

#[test]
fn a_sandbox_is_found_again_by_the_next_agent() {
    let place = Place::new(&unique("again"), Net::Host);
    let root = start(&place.create(), "echo first; sleep 1000");
    let sandbox = place.open();
    assert_eq!(sandbox.root().unwrap(), Some(root));
    // Adopting a tree of that name would end the sandbox's init when it is released.
    assert!(BareTree::release(&place.spec.name, &place.run_dir()).is_err());
    assert_eq!(sandbox.spec(), &place.spec);
    place.await_log("first");
    let error = Sandbox::create(&place.spec, &place.options()).unwrap_err();
    assert!(matches!(error, SandboxError::Exists(_)), "{error}");

    // Its init is killed: it is no longer there, and can be made anew.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(sandbox.keeper().pid() as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    await_true("the init's end", || !sandbox.keeper().is_alive());
    assert!(matches!(Sandbox::open(&place.run_dir(), &place.spec.name), Err(SandboxError::Keeper { .. })));
    assert_eq!(place.create().root().unwrap(), None);
}

#[test]
fn a_command_that_cannot_run_says_so() {
    let place = Place::new(&unique("wrong"), Net::Host);
    let sandbox = place.create();
    let mut command = shell("");
    command.argv = vec!["no-such-program".to_owned()];
    let error = sandbox.start(&command).unwrap_err().to_string();
    assert!(error.contains("no-such-program") && error.contains("No such file"), "{error}");
    command = shell("true");
    command.cwd = "/no/such/dir".into();
    assert!(matches!(sandbox.start(&command), Err(SandboxError::Exec { .. })));

    let mut options = place.options();
    options.program = "/no/such/standin".into();
    let other = Place::new(&unique("wrong"), Net::Host);
    let error = Sandbox::create(&other.spec, &options).unwrap_err().to_string();
    assert!(error.contains("/no/such/standin"), "{error}");
    assert!(matches!(Sandbox::open(&options.run_dir, &other.spec.name), Err(SandboxError::Unknown(_))));
}

#[test]
fn a_workload_may_be_another_user() {
    let place = Place::new(&unique("user"), Net::Host);
    let sandbox = place.create();
    let mut command = shell("id -u; id -g; id -G; sleep 1000");
    assert_eq!(User::named("root").unwrap().uid, 0);
    assert!(User::named("no-such-user").is_err());
    command.user = User { uid: 65534, gid: 65533, groups: vec![65532] };
    sandbox.start(&command).unwrap();
    place.await_log("65534\n65533\n65533 65532\n");
}

#[test]
fn pids_of_a_restored_tree_are_kept_free() {
    let place = Place::new(&unique("pids"), Net::Host);
    let sandbox = place.create();
    sandbox.raise_last_pid(20_000).unwrap();
    sandbox.raise_last_pid(100).unwrap();
    assert_eq!(start(&sandbox, "sleep 1000").pid, 20_001);
}

#[test]
fn descriptors_of_a_restored_tree_reach_the_log() {
    use std::io::Write;
    let place = Place::new(&unique("stdio"), Net::Host);
    let sandbox = place.create();
    let mut pipe = fs::File::from(sandbox.fresh_stdio().unwrap());
    writeln!(pipe, "from a new pipe").unwrap();
    place.await_log("from a new pipe");
    assert_eq!(sandbox.log_pipes().unwrap().len(), 1);
    drop(pipe);
    await_true("the pipe's end", || sandbox.log_pipes().unwrap().is_empty());
}

#[test]
fn a_verb_without_a_set_up_fails() {
    let out = std::process::Command::new(PROGRAM).arg("init").output().unwrap();
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stdout).contains("Failed"));
}
