use std::{
    fs,
    process::{Child, Command, Stdio},
};

use standin::{
    model::Name,
    takeover::address::Addresses,
    workload::{
        bare::{BareError, BareTree},
        guard::{GuardState, boot_time_ns},
        sandbox::{Options, Sandbox},
        spec::Net,
    },
};

use super::lab::{Lan, PROGRAM, Place, SECOND, await_true, unique};

/// A tree that somebody else started: a session leader with a child.
struct Tree {
    child: Child,
    name: Name,
    dir: tempfile::TempDir,
}

impl Tree {
    fn new() -> Self {
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", "sleep 1000 & exec sleep 1001"]).stdin(Stdio::null());
        Self { child: command.spawn().unwrap(), name: unique("bare"), dir: tempfile::tempdir().unwrap() }
    }

    fn adopt(&self) -> Result<BareTree, BareError> {
        BareTree::adopt(&self.name, self.child.id(), PROGRAM.as_ref(), self.dir.path())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = BareTree::release(&self.name, self.dir.path());
        let _ = nix::sys::signal::killpg(
            nix::unistd::Pid::from_raw(self.child.id() as i32),
            nix::sys::signal::SIGKILL,
        );
        let _ = self.child.wait();
    }
}

fn cgroup(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap().lines().last().unwrap().to_owned()
}

#[test]
fn an_adopted_tree_is_guarded_and_given_back_running() {
    let tree = Tree::new();
    await_true("the session", || tree_size(tree.child.id()) == 2);
    let home = cgroup(tree.child.id());
    let adopted = tree.adopt().unwrap();
    assert_eq!(adopted.keeper().cgroup().pids().unwrap().len(), 2);
    assert!(matches!(tree.adopt(), Err(BareError::Exists(_) | BareError::Taken { .. })));
    let guard_pid = adopted.keeper().pid();
    drop(adopted);
    // A sandbox of that name would end the tree when it is destroyed.
    let mut place = Place::new(&tree.name, Net::Host);
    let options = Options { run_dir: tree.dir.path().into(), ..place.options() };
    assert!(Sandbox::create(&place.spec, &options).is_err());
    assert!(Sandbox::destroy(&options.run_dir, &tree.name).is_err());
    place.spec.name = unique("unused");

    let adopted = BareTree::open(&tree.name, tree.dir.path()).unwrap();
    assert_eq!((adopted.pid(), adopted.keeper().pid()), (tree.child.id(), guard_pid));
    adopted.keeper().guard().arm(boot_time_ns() + 50_000_000).unwrap();
    await_true("the freeze", || adopted.keeper().cgroup().is_frozen().unwrap());
    assert!(adopted.is_alive());

    let dir = adopted.keeper().cgroup().work();
    BareTree::release(&tree.name, tree.dir.path()).unwrap();
    BareTree::release(&tree.name, tree.dir.path()).unwrap();
    assert_eq!(cgroup(tree.child.id()), home);
    assert!(adopted.is_alive() && !dir.parent().unwrap().exists());
    await_true("the guard's end", || !adopted.keeper().is_alive());
    assert!(matches!(BareTree::open(&tree.name, tree.dir.path()), Err(BareError::Unknown(_))));
}

fn tree_size(root: u32) -> usize {
    let session = |pid: &str| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(')').next()?.split_whitespace().nth(3)?.parse().ok()
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter(|entry| session(&entry.file_name().to_string_lossy()) == Some(root)).count()
}

#[test]
fn what_cannot_be_protected_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let name = unique("bare");
    let adopt = |pid| BareTree::adopt(&name, pid, PROGRAM.as_ref(), dir.path()).unwrap_err();
    assert!(matches!(adopt(4_194_304), BareError::NoProcess(_)));
    let kthreadd = 2;
    assert!(matches!(adopt(kthreadd), BareError::KernelThread(_)));
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let error = adopt(child.id());
    assert!(matches!(error, BareError::NotSessionLeader { .. }), "{error}");
    assert!(error.to_string().contains("setsid"));
    child.kill().unwrap();
    await_true("its end to be noticed", || matches!(adopt(child.id()), BareError::NoProcess(_)));
    child.wait().unwrap();
    assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "nothing was made");
}

#[test]
fn a_fence_takes_the_host_address_away() {
    let mut lan = Lan::new();
    let (host, client) =
        (lan.plug(&["10.77.0.1/24", "fd00::1/64"]), lan.plug(&["10.77.0.9/24", "fd00::9/64"]));
    let tree = Tree::new();
    await_true("the session", || tree_size(tree.child.id()) == 2);
    host.run(|| {
        let adopted = tree.adopt().unwrap();
        let vips = ["10.77.0.50/24@lan0", "fd00::50/64@lan0"].map(|vip| vip.parse().unwrap());
        let addresses = Addresses::prepare(&"bare".parse().unwrap(), &Net::Host, &vips).unwrap();
        addresses.guard(adopted.keeper(), None).unwrap();
        addresses.up(adopted.keeper()).unwrap();
        assert!(client.pings("10.77.0.50") && client.pings("fd00::50"));
        adopted.keeper().guard().fence_now(SECOND).unwrap();
        assert!(matches!(adopted.keeper().guard().state(), GuardState::Fired { .. }));
        assert!(!client.pings("10.77.0.50") && !client.pings("fd00::50"));
        assert!(addresses.up(adopted.keeper()).is_err());
        addresses.down().unwrap();
    });
}
