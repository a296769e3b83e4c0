//! What this host answers when another one asks, or when it asks itself.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    time::{Duration, SystemTime},
};

use nix::unistd::{Gid, Group, Uid, User};

use super::{cpu, file, sys};
use crate::{
    capture::Tracking,
    config::{Config, StoreKind},
    criu::{Install, probe::Kernel},
    doctor::space,
    takeover::check::check_vip,
    wire::examine::{Answer, ClockFacts, HostFacts, Question, VipFacts},
    workload::{guard::boot_time_ns, spec::Vip},
};

/// What an agent knows of its host already.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    /// Its settings.
    pub config: &'a Config,
    /// Its CRIU.
    pub install: &'a Install,
    /// What its kernel offers.
    pub kernel: &'a Kernel,
}

/// Both clocks.
pub fn clocks() -> ClockFacts {
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    ClockFacts { wall, boot: Duration::from_nanos(boot_time_ns()) }
}

/// Answers a question of the host at `asker`; reads files and users, so it may block.
pub fn answer(known: Known<'_>, question: &Question, asker: SocketAddr) -> Answer {
    match question {
        Question::Clock => Answer::Clock(clocks()),
        Question::Host { vips } => Answer::Host(Box::new(host(known, vips, asker))),
        Question::Files(files) => Answer::Files(file::at_paths(files)),
        Question::Users { uids, gids } => {
            let user = |uid: &u32| User::from_uid(Uid::from_raw(*uid)).ok().flatten().map(|user| user.name);
            let group =
                |gid: &u32| Group::from_gid(Gid::from_raw(*gid)).ok().flatten().map(|group| group.name);
            Answer::Users { users: uids.iter().map(user).collect(), groups: gids.iter().map(group).collect() }
        }
    }
}

fn host(Known { config, install, kernel }: Known<'_>, vips: &[Vip], asker: SocketAddr) -> HostFacts {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    HostFacts {
        release: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
        criu: (install.version.0, install.version.1, install.version.2),
        tracker: Tracking::choose(kernel).ok().map(|tracking| tracking.name().to_owned()),
        arbiter: config.arbiter.kind(),
        heartbeat: config.timing.heartbeat,
        lease: config.timing.lease,
        fence_margin: config.timing.fence_margin,
        drift: config.timing.drift,
        cpu: cpu::facts(),
        memory_available: space::available_memory(&text("/proc/meminfo")).unwrap_or(0),
        store_free: space::free_bytes(space::existing(&config.store_dir)).unwrap_or(0),
        store_in_memory: config.store == StoreKind::Memory,
        mtu: route_mtu(asker),
        vips: vips.iter().map(vip).collect(),
    }
}

fn vip(vip: &Vip) -> VipFacts {
    VipFacts {
        trouble: check_vip(vip, None).err().map(|error| error.to_string()),
        mtu: sys::device_mtu(&vip.device),
    }
}

/// Largest packet that may go to a host without being cut up, as far as this host's routes know (ip(7)). Nothing is sent.
fn route_mtu(to: SocketAddr) -> Option<u32> {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(to).ok()?;
    sys::socket_mtu(&socket, to.is_ipv6())
}
