//! What a container that runs must be like to be adopted, beside what its engine says.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    super::{
        inner_pid,
        keeper::{ProcessId, Stat},
        spec::{
            Cidr, ContainerSpec, ContainerTree, ContainerTreeKind, Engine, ImageId, Lent, MountRule, Way,
        },
    },
    docker::Docker,
    engine::{self, Found, Lendable, Named, Network, PidOne, TreeAt, Trees},
    error::{ContainerError, engine_error, unfit},
    has_own, sharing, wrap,
};
use crate::model::Name;

/// A container that is to be adopted.
pub struct Candidate {
    pub(super) spec: ContainerSpec,
    pub(super) init: ProcessId,
    /// The workload's root and its pid inside.
    pub(super) root: (ProcessId, u32),
    pub(super) pid_one: PidOne,
    pub(super) trees: Vec<TreeAt>,
    /// What it mounts read-only.
    lendable: Vec<Lendable>,
    /// Its network is the engine's, in a namespace of its own.
    pub(super) engine_net: bool,
}

impl Candidate {
    /// Finds it, and whether it can be protected.
    pub fn find(
        name: &Name,
        named: &Named,
        ips: &[Cidr],
        rules: &[MountRule],
    ) -> Result<Self, ContainerError> {
        let id = named.container();
        let Found { engine, pid, pid_one, trees, lendable, network } =
            engine::find(named).map_err(engine_error(id))?;
        let trees = replicated(trees, rules).map_err(|reason| unfit(id, &reason))?;
        if let PidOne::Init(wrap) = &pid_one {
            let wrapped_as = wrap.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if wrapped_as != name.as_str() {
                let reason = format!("it was wrapped as {wrapped_as}; protect it under that name");
                return Err(unfit(id, &reason));
            }
        }
        if matches!(pid_one, PidOne::Init(_)) && !starts_as(pid, wrap::INIT) {
            return Err(unfit(id, &format!("its pid 1 is not {}: start it without --init", wrap::INIT)));
        }
        if !ips.is_empty() && network == Network::Host {
            return Err(unfit(id, "it is in the host's network, where --ip has no place; leave that out"));
        }
        let init = ProcessId::of(pid).map_err(|_| unfit(id, "it has just ended"))?;
        if has_own("user", pid) {
            let reason = "it has a user namespace, in which CRIU could not restore it; start it without one";
            return Err(unfit(id, reason));
        }
        if let Some((number, what)) = stream_outside(pid) {
            let stream = ["input", "output", "error"][usize::from(number)];
            let reason = format!(
                "its standard {stream} is {what}, which the standby has not; start it with a pipe or /dev/null"
            );
            return Err(unfit(id, &reason));
        }
        let (root, way) = match pid_one {
            PidOne::Init(_) => {
                let root = root_of(init);
                let root = root.ok_or_else(|| unfit(id, "no command runs below its init; see its output"))?;
                (root, Way::Inside)
            }
            PidOne::Application(_) => ((init, 1), Way::Whole),
        };
        let shared = trees.iter().find_map(|(tree, at)| Some((tree, shared_with_others(at, pid)?)));
        if let Some((tree, shared)) = shared {
            let mount = tree.kind == ContainerTreeKind::Mount;
            let or = if mount {
                format!("; or leave it out: {}", leaving_out(&tree.inside))
            } else {
                String::new()
            };
            return Err(unfit(id, &format!("{shared}{or}")));
        }
        let (trees, places) = trees.into_iter().unzip();
        let left = rules.iter().filter(|rule| rule.is_left()).cloned().collect();
        let engine_net = ips.is_empty() && network == Network::Own;
        let spec = ContainerSpec {
            name: name.clone(),
            engine,
            ips: ips.to_vec(),
            trees,
            left,
            lent: Vec::new(),
            way,
        };
        Ok(Self { spec, init, root, pid_one, trees: places, lendable, engine_net })
    }

    /// The image that its engine makes it from, if that is a daemon's.
    pub fn image(&self) -> Option<ImageId> {
        match &self.spec.engine {
            Engine::Oci { .. } => None,
            Engine::Docker { daemon, config, .. } => Docker::image_of(*daemon, config),
        }
    }

    /// What it mounts read-only of this host.
    pub fn lendable(&self) -> &[Lendable] {
        &self.lendable
    }

    /// Of that, the standby has these copies.
    pub fn lend(&mut self, lent: Vec<Lent>) {
        self.spec.lent = lent;
    }

    /// How it will be dumped and restored.
    pub fn way(&self) -> Way {
        self.spec.way
    }
}

/// Leaves out what the operator says is not replicated.
fn replicated(trees: Trees, rules: &[MountRule]) -> Result<Vec<(ContainerTree, TreeAt)>, String> {
    let mounts = trees.iter().filter(|(tree, _)| tree.kind == ContainerTreeKind::Mount);
    let mounts: Vec<PathBuf> = mounts.map(|(tree, _)| tree.inside.clone()).collect();
    for (at, rule) in rules.iter().enumerate() {
        if !mounts.contains(&rule.inside) {
            let names: Vec<_> = mounts.iter().map(|inside| inside.display().to_string()).collect();
            let names = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
            return Err(format!(
                "{} is no mount that it writes to; those are: {names}",
                rule.inside.display()
            ));
        }
        if rules[..at].iter().any(|other| other.inside == rule.inside) {
            return Err(format!("--mount names {} twice", rule.inside.display()));
        }
    }
    let is_left = |inside: &Path| rules.iter().any(|rule| rule.inside == inside && rule.is_left());
    let kept = trees.into_iter().filter(|(tree, _)| !is_left(&tree.inside));
    kept.map(|(tree, at)| match at {
        Ok(at) => Ok((tree, at)),
        Err(reason) => Err(format!("{reason}; or leave it out: {}", leaving_out(&tree.inside))),
    })
    .collect()
}

/// What an operator types for a mount that cannot be replicated.
fn leaving_out(inside: &Path) -> String {
    let inside = inside.display();
    format!(
        "--mount {inside}=shared if it is the same storage on both hosts, --mount {inside}=ignore if each has its own"
    )
}

/// The init's first child that leads a session: what it started. Others came to be its children when theirs had ended.
fn root_of(init: ProcessId) -> Option<(ProcessId, u32)> {
    let entries = fs::read_dir("/proc").ok()?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let children = pids.filter_map(|pid| {
        let stat = Stat::read(pid).ok()?;
        let is_root = stat.parent == init.pid && stat.session == pid && !matches!(stat.state, 'Z' | 'X');
        is_root.then_some(ProcessId { pid, started: stat.started })
    });
    let inside = children.filter_map(|id| Some((id, inner_pid(id.pid)?)));
    inside.min_by_key(|(id, inside)| (id.started, *inside))
}

/// Whether a process was started as this program.
fn starts_as(pid: u32, program: &str) -> bool {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    arguments.split(|byte| *byte == 0).next() == Some(program.as_bytes())
}

/// Which of a process's standard streams (0, 1, 2) are pipes, and what CRIU calls them.
pub(super) fn streams_of(pid: u32) -> Vec<(u8, String)> {
    let stream = |number: u8| {
        let link = fs::read_link(format!("/proc/{pid}/fd/{number}")).ok()?.to_str()?.to_owned();
        link.starts_with("pipe:[").then_some((number, link))
    };
    (0..3).filter_map(stream).collect()
}

/// Why a directory of its cannot be replicated, if others have it mounted too. Readers stay behind as well.
fn shared_with_others(at: &TreeAt, init: u32) -> Option<String> {
    let TreeAt::Plain(dir) = at else { return None };
    let other = sharing::other_user(dir, init);
    if let Err(error) = &other {
        tracing::warn!(%error, dir = %dir.display(), "whether others have it mounted is not known");
    }
    let pid = other.ok().flatten()?;
    let program = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!(
        "its directory {} is mounted by another container too, of process {pid} ({}), which does not move with it; \
         stop that one, or give each a directory of its own",
        dir.display(),
        program.trim()
    ))
}

/// The name of one of its standard streams if it is neither a pipe nor a file of its own: CRIU cannot name that.
fn stream_outside(pid: u32) -> Option<(u8, String)> {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?;
    (0..3).find_map(|number| {
        let link = fs::read_link(format!("/proc/{pid}/fd/{number}")).ok()?.to_str()?.to_owned();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim();
        let is_inside = mounts.lines().any(|line| line.split(' ').next() == Some(mount));
        (!link.starts_with("pipe:[") && !is_inside).then_some((number, link))
    })
}
