//! A client that hears numbers from a workload, and notes of each when the kernel took it in, and from whom.

use std::{
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use nix::{
    sys::{
        socket::{
            AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType,
            recvmsg, setsockopt, socket, sockopt,
        },
        time::{TimeSpec, TimeVal},
    },
    time::{ClockId, clock_gettime},
};
use standin::workload::guard::boot_time_ns;

pub(crate) const PORT: u16 = 4000;
const PATIENCE: Duration = Duration::from_secs(30);

/// What says numbers all the time, some 400 in a second. In bash, which waits without a new process.
pub(crate) fn talk_script(to: &str) -> String {
    format!(
        "bash -c 'exec 3>/dev/udp/{to}/{PORT} 4<> <(:); i=0; while :; do echo $((i++)) >&3; read -t 0.002 -u 4; done'"
    )
}

/// A number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heard {
    /// On the guard's clock.
    pub(crate) at_ns: u64,
    pub(crate) number: u64,
    /// The hardware address of the last hop.
    pub(crate) from: [u8; 6],
}

/// Hears what a workload says.
pub(crate) struct Ear {
    heard: Arc<Mutex<Vec<Heard>>>,
    ends: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    /// Without one the workload would be told so, and lose a number.
    _listener: UdpSocket,
}

impl Ear {
    /// In the calling thread's network namespace.
    pub(crate) fn here() -> Self {
        let listener = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
        let kind = (AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC);
        let socket = socket(kind.0, kind.1, kind.2, SockProtocol::EthIp).unwrap();
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000)).unwrap();
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true).unwrap();
        let (heard, ends) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (to, until) = (Arc::clone(&heard), Arc::clone(&ends));
        let thread = std::thread::spawn(move || {
            while !until.load(SeqCst) {
                // The others wait for the lock, not this for a packet with it.
                if let Some(number) = hear(&socket) {
                    to.lock().unwrap().push(number);
                }
            }
        });
        Self { heard, ends, thread: Some(thread), _listener: listener }
    }

    pub(crate) fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap().clone()
    }

    pub(crate) fn await_next(&self) {
        let before = self.heard().len();
        let until = Instant::now() + PATIENCE;
        while self.heard().len() <= before + 3 {
            assert!(Instant::now() < until, "waited {PATIENCE:?} for the workload to be heard");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Forgets what was said while neighbours did not know each other: too much of that waits, and some is dropped.
    pub(crate) fn settle(&self) {
        self.await_next();
        std::thread::sleep(Duration::from_millis(200));
        self.heard.lock().unwrap().clear();
    }

    /// None was dropped between the first and the last, in whatever order they came: those that wait for a neighbour's address
    /// are overtaken.
    #[track_caller]
    pub(crate) fn assert_whole(&self) {
        let heard = self.heard();
        let mut numbers: Vec<_> = heard.iter().map(|it| it.number).collect();
        numbers.sort_unstable();
        let gap = numbers.windows(2).find(|pair| pair[1] != pair[0] + 1);
        assert!(numbers.len() > 50 && gap.is_none(), "{} heard, {gap:?}", numbers.len());
        assert!(heard.iter().all(|it| it.from == heard[0].from), "heard from two hosts");
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.ends.store(true, SeqCst);
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// The next packet, if it is a number.
fn hear(socket: &OwnedFd) -> Option<Heard> {
    const HEADERS: usize = 20 + 8;
    let (mut bytes, mut space) = ([0; 128], nix::cmsg_space!(TimeSpec));
    let mut slices = [std::io::IoSliceMut::new(&mut bytes)];
    let (length, stamp, from) = {
        let flags = MsgFlags::empty();
        let message = recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags).ok()?;
        let stamp = message.cmsgs().unwrap().find_map(|of| match of {
            ControlMessageOwned::ScmTimestampns(at) => Some(at),
            _ => None,
        });
        (message.bytes, stamp.unwrap(), message.address?.addr()?)
    };
    let is_udp = bytes[0] == 0x45 && bytes[9] == 17 && bytes[22..24] == PORT.to_be_bytes();
    let text = bytes.get(HEADERS..length).filter(|_| is_udp)?;
    let ns = |time: TimeSpec| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64;
    let ago = ns(clock_gettime(ClockId::CLOCK_REALTIME).unwrap()).saturating_sub(ns(stamp));
    let number = std::str::from_utf8(text).unwrap().trim().parse().unwrap();
    Some(Heard { at_ns: boot_time_ns() - ago, number, from })
}
