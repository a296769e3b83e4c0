//! What a drill's place is made after: the place that waits for a takeover, with copies of its files.
//!
//! | what waits | the drill's place |
//! |---|---|
//! | a sandbox | another one, its network isolated |
//! | the same in the host's network (`--pid`) | has an isolated one of its own, with the addresses of the host |
//! | a container | a sandbox with the mounts of that container and the addresses in its network; its engine knows nothing of it |

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd as _,
    path::PathBuf,
};

use anyhow::Context as _;
use nix::{sched::CloneFlags, unistd::gethostname};

use super::{
    super::{
        Agent, durable,
        home::{Home, LOG_BYTES_MAX},
        trees,
    },
    Dirs, output,
};
use crate::{
    capture::Note,
    config::Config,
    model::Name,
    restore::Site,
    workload::{
        container::{Container, TreeAt},
        init::{FilesCopy, Likeness},
        network::{self, Device, within_namespaces},
        sandbox,
        spec::{ContainerSpec, ContainerTree, Net, PlaceSpec, SandboxSpec, Vip},
    },
};

/// What waits.
pub(super) struct Model {
    pub(super) spec: PlaceSpec,
    /// Which the host has after a takeover.
    pub(super) vips: Vec<Vip>,
}

/// A directory that is copied.
pub(super) struct Copy {
    pub(super) from: PathBuf,
    pub(super) to: PathBuf,
    /// Its copy takes memory, and no disk.
    pub(super) is_in_memory: bool,
}

impl Copy {
    fn on_disk(from: PathBuf, to: PathBuf) -> Self {
        Self { from, to, is_in_memory: false }
    }

    fn in_memory(from: PathBuf, to: PathBuf) -> Self {
        Self { from, to, is_in_memory: true }
    }
}

/// A place that was made, and an address by which a probe in it reaches the workload.
pub(super) struct Made {
    pub(super) home: Home,
    pub(super) address: IpAddr,
}

impl Model {
    /// The files that the place must have of its own.
    pub(super) fn copies(&self, config: &Config, dirs: &Dirs) -> anyhow::Result<Vec<Copy>> {
        let name = self.spec.name();
        let (paths, shm) = (dirs.paths(), dirs.shm());
        let spec = match &self.spec {
            PlaceSpec::Sandbox(_) => {
                let data = durable::Place::of(&config.state_dir, name).data();
                let all = [Copy::on_disk(data, paths), Copy::in_memory(trees::shm_of(config, name), shm)];
                return Ok(all.into_iter().filter(|copy| copy.from.exists()).collect());
            }
            PlaceSpec::Container(spec) => spec,
        };
        let places = Container::trees_of(&config.sandboxes_dir(), &spec.name)?;
        let copy = |(number, at): (usize, TreeAt)| match at {
            TreeAt::Plain(from) | TreeAt::Overlay { upper: from, .. } => {
                Copy::on_disk(from, paths.join(number.to_string()))
            }
            TreeAt::Memory => {
                Copy::in_memory(trees::kept_of(config, name, number), shm.join(number.to_string()))
            }
        };
        Ok(places.into_iter().enumerate().map(copy).collect())
    }

    /// Makes the place; the copies are there.
    pub(super) fn make(&self, agent: &Agent, dirs: &Dirs) -> anyhow::Result<Made> {
        let waiting = Home::open(agent, &self.spec, false).context("what it is made after")?;
        let (pid, init) = waiting.init()?;
        let mut devices = network::devices(init.as_fd())?;
        if !has_own_network(pid)? {
            devices.insert(0, Device::loopback(self.vips.iter().map(|vip| vip.cidr.addr)));
        }
        let address = self.address(&devices);
        let (spec, container) = match &self.spec {
            PlaceSpec::Sandbox(spec) => (spec.clone(), None),
            PlaceSpec::Container(spec) => {
                let name = spec.name.clone();
                let hostname = within_namespaces(init.as_fd(), CloneFlags::CLONE_NEWUTS, gethostname)??;
                let hostname = hostname.to_string_lossy().into_owned();
                let like = self.like(agent, dirs, (spec, pid))?;
                (SandboxSpec { name, net: Net::Host, paths: Vec::new(), hostname }, Some(like))
            }
        };
        let name: Name = spec.name.of_drill();
        let spec = SandboxSpec { name, net: Net::Own { ips: Vec::new() }, ..spec };
        let options = sandbox::Options {
            program: agent.program.clone(),
            run_dir: dirs.run.clone(),
            data_dir: dirs.paths(),
            shm_dir: dirs.shm(),
            log: dirs.log(),
            log_bytes_max: LOG_BYTES_MAX,
            isolated: Some(sandbox::Isolated { devices, container }),
        };
        let home = Home::isolated(&spec, &options)?;
        anyhow::ensure!(waiting.waits(), "what it is made after has ended meanwhile; try again");
        Ok(Made { home, address })
    }

    /// What a CRIU that restores needs to know of the place.
    pub(super) fn site(&self, made: &Made, note: &Note, dirs: &Dirs) -> anyhow::Result<Site> {
        if matches!(self.spec, PlaceSpec::Sandbox(_)) {
            return made.home.site(note);
        }
        let keeper = made.home.keeper();
        let streams = note.outside.iter().map(|outside| outside.stream.unwrap_or(1));
        Ok(Site {
            init: keeper.pidfd()?,
            cgroups: vec![keeper.cgroup().work()],
            own_cgroup_namespace: false,
            stdio: streams.map(|stream| output::stream(stream, &dirs.log())).collect::<Result<_, _>>()?,
            own_ipc: note.own_ipc,
        })
    }

    /// The container's mounts, with copies of its files.
    fn like(
        &self,
        agent: &Agent,
        dirs: &Dirs,
        (spec, init): (&ContainerSpec, u32),
    ) -> anyhow::Result<Likeness> {
        let layers = dirs.layers();
        fs::create_dir(&layers).with_context(|| format!("making {}", layers.display()))?;
        let places = Container::trees_of(&agent.config.sandboxes_dir(), &spec.name)?;
        let copies = self.copies(&agent.config, dirs)?.into_iter();
        let copy = |((tree, at), copy): ((&ContainerTree, TreeAt), Copy)| {
            let is_layer = matches!(at, TreeAt::Overlay { .. });
            FilesCopy { inside: tree.inside.clone(), dir: copy.to, is_layer }
        };
        let copies = spec.trees.iter().zip(places).zip(copies).map(copy).collect();
        Ok(Likeness { init, copies, layers })
    }

    /// What clients use, or else what is always there.
    fn address(&self, devices: &[Device]) -> IpAddr {
        let own = match self.spec.net() {
            Net::Own { ips } => ips.first().map(|ip| ip.addr),
            Net::Host => None,
        };
        // In the host's network the first device is the loopback with the workload's own addresses.
        let first = devices.first().and_then(|device| device.addresses.first()).map(|cidr| cidr.addr);
        own.or(first).unwrap_or(Ipv4Addr::LOCALHOST.into())
    }
}

/// Whether its network namespace is another than ours.
fn has_own_network(pid: u32) -> anyhow::Result<bool> {
    let of = |who: &str| {
        let path = format!("/proc/{who}/ns/net");
        fs::read_link(&path).with_context(|| format!("reading {path}"))
    };
    Ok(of(&pid.to_string())? != of("self")?)
}
