//! The *guard*: silences a workload when its agent no longer says in time that it may speak.
//!
//! It is a deadline in a page that the agent and the workload's init (or, for a bare tree, its guard process)
//! both map, on the clock CLOCK_BOOTTIME, which also counts the time of a suspend. The agent moves the deadline
//! on with each lease renewal; a hung, stopped or dead agent does not, and then the init *fires*.
//!
//! ```text
//!              arm                  deadline passed
//! DISARMED ──────────► ARMED(ns) ────────────────────► FIRING ──────────► FIRED
//!     ▲                │  ▲  │ extend: later ns          tree frozen,       │
//!     └────────────────┘  └──┘                           network steps      │
//!          disarm         ▲                                                 │
//!                         └──────── unfence (through the init) ─────────────┘
//! ```
//!
//! State and deadline are one atomic word, so there is one order of what agent and init do to it:
//!
//! - The init fires by exchanging *the deadline that it saw pass* for FIRING. If the agent extended it in
//!   between, the exchange fails and the init looks again. If the init was first, the agent's exchange
//!   fails and `extend` says [`GuardError::Fired`]: nobody believes in a lease that the guard has ended.
//! - The decision (FIRING) comes before the deeds, so an extension can never slip in between them. The deeds
//!   are, in this order: 1 into the tree's `cgroup.freeze`, the network steps (link down), FIRED. The freeze
//!   comes first because it is the one that stops the workload; what its tasks still send until the link is
//!   down was sent before the fence was complete, which is the instant FIRED is stored.
//! - Out of FIRED leads only `unfence`, which the init itself carries out: it arms the new deadline before it
//!   thaws and opens, and as it is also the one that fires, no thaw can overtake a firing.
//! - Nor do the deeds need the init to be in time for what leaves the workload: the kernel's own filter has the same deadline from
//!   the agent where it can ([`lease`](crate::takeover::lease)), and drops what is sent after it.
//! - `extend` makes no system call. The init sleeps until the deadline that it knows; it reads the word again
//!   when it wakes. Only shortening a deadline (arm, fence) must wake it, by an eventfd.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering::SeqCst},
    time::{Duration, Instant},
};

use memmap2::MmapRaw;
use nix::{
    sys::memfd::{MFdFlags, memfd_create},
    time::{ClockId, clock_gettime},
};

use super::sys;

const PAGE_BYTES: usize = 4096;
const DISARMED: u64 = 0;
const FIRED: u64 = u64::MAX;
const FIRING: u64 = u64::MAX - 1;
/// The largest word that is a deadline; 500 years of uptime.
const DEADLINE_MAX: u64 = u64::MAX / 2;

/// Nanoseconds of CLOCK_BOOTTIME: the clock of all deadlines.
pub fn boot_time_ns() -> u64 {
    // The clock exists on every kernel since 2.6.39; there is nothing sensible to do without it.
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME exists");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// What the guard is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardState {
    /// Nothing is watched.
    Disarmed,
    /// The workload is silenced at this time unless it is moved on.
    Armed {
        /// On CLOCK_BOOTTIME.
        deadline_ns: u64,
    },
    /// Decided, not yet done.
    Firing,
    /// The tree has been told to freeze (each task stops as it next leaves the kernel; see
    /// [`Cgroup::is_frozen`](super::cgroup::Cgroup::is_frozen)) and its network is down.
    Fired {
        /// When it was done, on CLOCK_BOOTTIME.
        at_ns: u64,
    },
}

/// Why the guard did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// It has ended the lease.
    #[error("the guard has silenced the workload (its lease ran out); it runs again only after an unfence")]
    Fired,
    /// Nothing to extend.
    #[error("the guard is not armed; arm it before the lease is extended")]
    Disarmed,
    /// Not a time.
    #[error("{0} ns is no time on CLOCK_BOOTTIME")]
    NoDeadline(u64),
    /// The init does not react.
    #[error("the guard did not silence the workload within {} ms; freeze it and close its gate directly", .0.as_millis())]
    Unresponsive(Duration),
    /// The shared page.
    #[error("cannot map the page shared with the guard: {0}")]
    Map(#[source] io::Error),
    /// The eventfd.
    #[error("cannot wake the guard: {0}")]
    Wake(#[source] nix::errno::Errno),
}

/// The shared page.
#[derive(Debug)]
pub(super) struct Page {
    map: MmapRaw,
}

impl Page {
    /// A new page, and the descriptor by which others map it.
    pub(super) fn create() -> io::Result<(Self, OwnedFd)> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"standin-guard", flags)?);
        file.set_len(PAGE_BYTES as u64)?;
        let page = Self::map(&file)?;
        Ok((page, file.into()))
    }

    fn map(file: &File) -> io::Result<Self> {
        // A page that is not there would be a SIGBUS on first touch.
        if file.metadata()?.len() != PAGE_BYTES as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the guard's memfd is not one page"));
        }
        Ok(Self { map: memmap2::MmapOptions::new().len(PAGE_BYTES).map_raw(file.as_raw_fd())? })
    }

    fn word(&self) -> &AtomicU64 {
        sys::shared_word(&self.map, 0)
    }

    fn fired_at(&self) -> &AtomicU64 {
        sys::shared_word(&self.map, 1)
    }

    pub(super) fn state(&self) -> GuardState {
        match self.word().load(SeqCst) {
            DISARMED => GuardState::Disarmed,
            FIRING => GuardState::Firing,
            FIRED => GuardState::Fired { at_ns: self.fired_at().load(SeqCst) },
            deadline_ns => GuardState::Armed { deadline_ns },
        }
    }

    /// The init decides to fire because this deadline has passed; false if it has been moved meanwhile.
    pub(super) fn begin_firing(&self, deadline_ns: u64) -> bool {
        self.word().compare_exchange(deadline_ns, FIRING, SeqCst, SeqCst).is_ok()
    }

    /// The init has frozen and closed.
    pub(super) fn end_firing(&self) {
        self.fired_at().store(boot_time_ns(), SeqCst);
        self.word().store(FIRED, SeqCst);
    }

    /// The init leaves FIRED; false if that is not the state.
    pub(super) fn rearm(&self, deadline_ns: u64) -> bool {
        self.word().compare_exchange(FIRED, deadline_ns, SeqCst, SeqCst).is_ok()
    }

    /// Exchanges the word unless the guard has fired; `next` sees the present word and may refuse.
    fn change(&self, next: impl Fn(u64) -> Result<u64, GuardError>) -> Result<(), GuardError> {
        let mut seen = self.word().load(SeqCst);
        loop {
            if seen >= FIRING {
                return Err(GuardError::Fired);
            }
            match self.word().compare_exchange(seen, next(seen)?, SeqCst, SeqCst) {
                Ok(_) => return Ok(()),
                Err(now) => seen = now,
            }
        }
    }
}

/// The agent's side.
#[derive(Debug)]
pub struct Guard {
    page: Page,
    wake: OwnedFd,
}

impl Guard {
    /// From the descriptors that the init hands out.
    pub(super) fn from_fds(page: OwnedFd, wake: OwnedFd) -> Result<Self, GuardError> {
        Ok(Self { page: Page::map(&File::from(page)).map_err(GuardError::Map)?, wake })
    }

    /// What it is doing.
    pub fn state(&self) -> GuardState {
        self.page.state()
    }

    /// Whether the guard has ended the lease, even if freezing is still under way.
    pub fn fired(&self) -> bool {
        matches!(self.state(), GuardState::Firing | GuardState::Fired { .. })
    }

    /// Whether the workload may be heard. A guard that is stopped has not fired, however long ago its deadline was.
    pub fn permits(&self) -> bool {
        match self.state() {
            GuardState::Disarmed => true,
            GuardState::Armed { deadline_ns } => boot_time_ns() < deadline_ns,
            GuardState::Firing | GuardState::Fired { .. } => false,
        }
    }

    /// Sets the deadline, earlier or later than it was.
    pub fn arm(&self, deadline_ns: u64) -> Result<(), GuardError> {
        let deadline_ns = check(deadline_ns)?;
        self.page.change(|_| Ok(deadline_ns))?;
        self.wake()
    }

    /// Moves the deadline of an armed guard on; an earlier one than it has changes nothing. No system call.
    pub fn extend(&self, deadline_ns: u64) -> Result<(), GuardError> {
        let deadline_ns = check(deadline_ns)?;
        self.page.change(|seen| match seen {
            DISARMED => Err(GuardError::Disarmed),
            _ => Ok(seen.max(deadline_ns)),
        })
    }

    /// Ends the watch: the workload may run without a lease.
    pub fn disarm(&self) -> Result<(), GuardError> {
        self.page.change(|_| Ok(DISARMED))
    }

    /// Fires now and waits until the fence is complete. Having fired before is success.
    pub fn fence_now(&self, limit: Duration) -> Result<(), GuardError> {
        const LONG_PAST_NS: u64 = 1;
        match self.page.change(|_| Ok(LONG_PAST_NS)) {
            Ok(()) | Err(GuardError::Fired) => self.wake()?,
            Err(error) => return Err(error),
        }
        let until = Instant::now() + limit;
        while !matches!(self.state(), GuardState::Fired { .. }) {
            if Instant::now() >= until {
                return Err(GuardError::Unresponsive(limit));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    fn wake(&self) -> Result<(), GuardError> {
        match nix::unistd::write(self.wake.as_fd(), &1u64.to_ne_bytes()) {
            // EAGAIN: the counter is full, so it wakes anyway.
            Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(GuardError::Wake(errno)),
        }
    }
}

pub(super) fn check(deadline_ns: u64) -> Result<u64, GuardError> {
    if (1..=DEADLINE_MAX).contains(&deadline_ns) {
        Ok(deadline_ns)
    } else {
        Err(GuardError::NoDeadline(deadline_ns))
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    fn pair() -> (Page, Guard) {
        let (page, fd) = Page::create().unwrap();
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
        (page, Guard::from_fds(fd, wake.into()).unwrap())
    }

    #[test]
    fn an_extended_deadline_cannot_be_fired() {
        let (init, guard) = pair();
        guard.arm(100).unwrap();
        guard.extend(200).unwrap();
        assert!(!init.begin_firing(100));
        assert_eq!(guard.state(), GuardState::Armed { deadline_ns: 200 });
        guard.extend(150).unwrap();
        assert_eq!(guard.state(), GuardState::Armed { deadline_ns: 200 });
    }

    #[test]
    fn a_fired_guard_can_neither_be_extended_nor_disarmed() {
        let (init, guard) = pair();
        guard.arm(100).unwrap();
        assert!(init.begin_firing(100));
        assert!(guard.fired());
        assert!(matches!(guard.extend(300), Err(GuardError::Fired)));
        assert!(matches!(guard.disarm(), Err(GuardError::Fired)));
        assert!(!init.rearm(300), "not before the fence is complete");
        init.end_firing();
        assert!(matches!(guard.arm(300), Err(GuardError::Fired)));
        assert!(init.rearm(300));
        assert_eq!(guard.state(), GuardState::Armed { deadline_ns: 300 });
    }

    #[test]
    fn words_that_are_states_are_no_deadlines() {
        let (_init, guard) = pair();
        for word in [DISARMED, FIRING, FIRED, DEADLINE_MAX + 1] {
            assert!(matches!(guard.arm(word), Err(GuardError::NoDeadline(_))));
        }
        assert!(matches!(guard.extend(5), Err(GuardError::Disarmed)));
    }

    /// Agent and init race for the same word: for each deadline exactly one of them wins.
    #[test]
    fn exactly_one_of_extend_and_fire_wins() {
        for _ in 0..500 {
            let (init, guard) = pair();
            guard.arm(100).unwrap();
            let (extended, fired) = std::thread::scope(|scope| {
                let agent = scope.spawn(|| guard.extend(200).is_ok());
                let fired = init.begin_firing(100);
                (agent.join().unwrap(), fired)
            });
            assert_ne!(extended, fired);
            assert_eq!(guard.fired(), fired);
        }
    }
}
