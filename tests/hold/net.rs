//! Three network namespaces: a workload's and a client's, and between them the host, which is the test's own.
//!
//! ```text
//!  workload  10.9.0.2 ── w0 (perhaps in the bridge br) ── host ── c0 ── 10.8.0.2  client
//! ```

use std::{
    fs::File,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsFd,
    process::{Command, Stdio},
    time::Duration,
};

use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
};
use standin::{takeover::hold::Marks, workload::network::within};

pub(crate) struct Net {
    pub(crate) host: File,
    workload: File,
    client: File,
    /// By what the workload's packets are known.
    pub(crate) marks: Marks,
}

pub(crate) const WORKLOAD: [&str; 2] = ["10.9.0.2", "fd09::2"];
pub(crate) const CLIENT: [&str; 2] = ["10.8.0.2", "fd08::2"];
/// Of everything that must arrive.
const ARRIVES: Duration = Duration::from_secs(10);
/// Of what must not.
const STAYS: Duration = Duration::from_millis(300);

fn namespace() -> File {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        File::open("/proc/thread-self/ns/net").unwrap()
    };
    std::thread::spawn(make).join().unwrap()
}

fn ip(netns: &File, batch: &str) {
    let run = || {
        let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), batch.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "ip -batch: {batch}");
    };
    within(netns.as_fd(), run).unwrap();
}

fn set(netns: &File, key: &str, value: &str) {
    within(netns.as_fd(), || std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap()).unwrap();
}

impl Net {
    /// The calling thread is on the host from now on. What is made goes with the namespaces, when nobody has them open.
    pub(crate) fn new(bridged: bool) -> Self {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let (host, workload, client) =
            (File::open("/proc/thread-self/ns/net").unwrap(), namespace(), namespace());
        let port = if bridged { "bridge0" } else { "w0" };
        let by_fd = |file: &File| {
            format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(file))
        };
        ip(
            &host,
            &format!(
                "link set lo up\nlink add w0 type veth peer name eth0 address 02:00:00:00:00:09 netns {}\nlink add c0 type veth peer name eth0 netns {}\n",
                by_fd(&workload),
                by_fd(&client)
            ),
        );
        if bridged {
            ip(&host, "link add bridge0 type bridge\nlink set w0 master bridge0\nlink set bridge0 up\n");
        }
        ip(
            &host,
            &format!(
                "addr add 10.9.0.1/24 dev {port}\naddr add fd09::1/64 dev {port} nodad\naddr add 10.8.0.1/24 dev c0\n\
                 addr add fd08::1/64 dev c0 nodad\nlink set w0 up\nlink set c0 up\n"
            ),
        );
        set(&host, "ipv4/ip_forward", "1");
        set(&host, "ipv6/conf/all/forwarding", "1");
        for (netns, net) in [(&workload, 9), (&client, 8)] {
            ip(
                netns,
                &format!(
                    "link set lo up\naddr add 10.{net}.0.2/24 dev eth0\naddr add fd0{net}::2/64 dev eth0 nodad\nlink set eth0 up\n\
                     route add default via 10.{net}.0.1\nroute add default via fd0{net}::1\n"
                ),
            );
        }
        let index = if_nametoindex(port).unwrap();
        let all: Vec<IpAddr> = WORKLOAD.iter().map(|address| address.parse().unwrap()).collect();
        let marks = if bridged {
            Marks { bridges: vec![index], macs: vec![[2, 0, 0, 0, 0, 9]], inner: all, ..Marks::default() }
        } else {
            Marks { devices: vec![index], addresses: all, ..Marks::default() }
        };
        let net = Self { host, workload, client, marks };
        for v in [0, 1] {
            net.settle(v);
        }
        net
    }

    /// Until the neighbours know each other.
    fn settle(&self, v: usize) {
        let (mut from, mut to) = self.pair(v);
        for _ in 0..100 {
            from.send(0);
            if to.hears_within(Duration::from_millis(100)).is_some() {
                while to.hears_within(Duration::from_millis(50)).is_some() {}
                return;
            }
        }
        panic!("the lab's network does not pass packets");
    }

    /// Sockets of the workload and of the client, over IPv4 (0) or IPv6 (1), that send to each other.
    pub(crate) fn pair(&self, v: usize) -> (Side, Side) {
        let bind = |netns: &File, ip: &str| {
            let address = SocketAddr::new(ip.parse::<IpAddr>().unwrap(), 0);
            within(netns.as_fd(), || UdpSocket::bind(address).unwrap()).unwrap()
        };
        let (workload, client) = (bind(&self.workload, WORKLOAD[v]), bind(&self.client, CLIENT[v]));
        workload.connect(client.local_addr().unwrap()).unwrap();
        client.connect(workload.local_addr().unwrap()).unwrap();
        (Side(workload), Side(client))
    }

    pub(crate) fn in_workload<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(self.workload.as_fd(), work).unwrap()
    }

    pub(crate) fn in_client<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(self.client.as_fd(), work).unwrap()
    }

    pub(crate) fn link(&self, state: &str) {
        ip(&self.host, &format!("link set w0 {state}\n"));
    }
}

/// One end of a conversation in numbers.
pub(crate) struct Side(UdpSocket);

impl Side {
    pub(crate) fn send(&mut self, number: u8) {
        self.0.send(&[number]).unwrap();
    }

    fn hears_within(&mut self, limit: Duration) -> Option<u8> {
        self.0.set_read_timeout(Some(limit)).unwrap();
        let mut buffer = [0; 16];
        self.0.recv(&mut buffer).ok().map(|_| buffer[0])
    }

    /// Exactly these, in this order.
    #[track_caller]
    pub(crate) fn hears(&mut self, wanted: &[u8]) {
        for number in wanted {
            assert_eq!(self.hears_within(ARRIVES), Some(*number));
        }
        self.hears_nothing();
    }

    #[track_caller]
    pub(crate) fn hears_nothing(&mut self) {
        assert_eq!(self.hears_within(STAYS), None);
    }
}
