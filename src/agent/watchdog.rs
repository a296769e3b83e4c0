//! A hardware watchdog that resets this host if a workload's guard is not in order: what is left when neither the guard nor the
//! kernel's own lease can be trusted, because the kernel is what fails. Off unless `watchdog` names a device.
//!
//! ```text
//!            a guard is armed: open, set to T             no guard is armed, or the agent ends in order: 'V', close
//!   CLOSED ───────────────────────────────────► OPEN ─────────────────────────────────────────────────────────────► CLOSED
//!                                               │  ▲ pet, while each guard is in order
//!                                               └──┘
//!                          not petted for T: the device resets the host
//! ```
//!
//! A guard is *in order* if it is disarmed, if it has fired (the workload is frozen and its link down: nothing more is to be
//! done), or if the lease that it guards lasts for T at least. So:
//!
//! - When it was petted last, all leases had T left or more: the reset comes before any of them ends, and before another host may
//!   run a workload of this one. A device makes whole seconds; T is the largest that leaves four heartbeats of each lease for
//!   renewals. A lease for which there is none is refused with the settings, as is a device that makes more of T.
//! - A lease that is rightly not renewed resets nothing: petting pauses when less than T is left of it, the guard fires the fence
//!   margin before the lease's end, and petting goes on, or the device is closed, within that margin, of which the agent looks
//!   at least every quarter.
//! - An agent that is killed, or hangs as a whole, resets its host unless the next one is there within T; one that has ended in
//!   order does not. A thread of its own looks, which waits for nothing else of the agent.
//!
//! A device that does not close for good (no magic close, see Documentation/watchdog/watchdog-api.rst) is refused: the last
//! `unprotect` would reset the host. One that its driver was told never to stop (`nowayout`) cannot be told from others; it does.

mod sys;

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use super::api::WatchdogStatus;
use crate::{
    ha::Timing,
    model::Name,
    workload::guard::{Guard, GuardState, boot_time_ns},
};

/// A fence must be done in it, and be seen, several times over.
const MARGIN_LEAST: Duration = Duration::from_millis(100);
/// However long the margin is.
const LOOK_INTERVAL_MAX: Duration = Duration::from_millis(250);
/// Of a lease, for its renewals.
const HEARTBEATS: u32 = 4;

/// Which device, and its times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchdogSettings {
    /// The device.
    pub path: PathBuf,
    /// T.
    timeout_s: u32,
    fence_margin: Duration,
}

impl WatchdogSettings {
    /// Refuses leases that are too short for any device.
    pub fn of(path: PathBuf, timing: &Timing) -> Result<Self, String> {
        let (lease, fence_margin) = (timing.lease, timing.fence_margin);
        let renewals = timing.heartbeat * HEARTBEATS;
        let timeout_s = lease.saturating_sub(renewals).as_secs() as u32;
        if timeout_s == 0 {
            return Err(format!(
                "the watchdog {} cannot be used with a lease of {lease:?}: a device counts whole seconds, and one of them would \
                 not be over before the standby takes over; set lease_ms to {} or more on both hosts, or leave `watchdog` out",
                path.display(),
                (renewals + Duration::from_secs(1)).as_millis()
            ));
        }
        if fence_margin < MARGIN_LEAST {
            return Err(format!(
                "the watchdog {} cannot be used with a fence margin of {fence_margin:?}: the host would be reset for a fence that \
                 is merely slow; set fence_margin_ms to {} or more",
                path.display(),
                MARGIN_LEAST.as_millis()
            ));
        }
        Ok(Self { path, timeout_s, fence_margin })
    }

    fn look_interval(&self) -> Duration {
        (self.fence_margin / 4).min(LOOK_INTERVAL_MAX)
    }
}

/// What is to be done with the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Nothing,
    Open,
    Pet,
    Close,
}

/// What follows from the guards at a time.
fn decide(is_open: bool, guards: &[GuardState], now_ns: u64, settings: &WatchdogSettings) -> Deed {
    let is_armed = |guard: &GuardState| matches!(guard, GuardState::Armed { .. } | GuardState::Firing);
    let wanted = Duration::from_secs(settings.timeout_s.into()).as_nanos() as u64;
    let margin = settings.fence_margin.as_nanos() as u64;
    let in_order = |guard: &GuardState| match *guard {
        GuardState::Disarmed | GuardState::Fired { .. } => true,
        // The guard's deadline is that of the lease but for the margin.
        GuardState::Armed { deadline_ns } => deadline_ns + margin >= now_ns + wanted,
        GuardState::Firing => false,
    };
    let (needed, in_order) = (guards.iter().any(is_armed), guards.iter().all(in_order));
    match (is_open, needed, in_order) {
        (true, false, _) => Deed::Close,
        (true, true, true) => Deed::Pet,
        (false, true, true) => Deed::Open,
        (false, false, _) | (_, true, false) => Deed::Nothing,
    }
}

/// Why a device cannot be relied on.
#[derive(Debug, thiserror::Error)]
enum WatchdogError {
    #[error(
        "cannot {what} the watchdog {path}: {source}; is it one, and does nobody else have it (`wdctl`, `fuser`)?"
    )]
    Device { what: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "the watchdog {0} cannot be closed for good, so that the end of a protection would reset this host: use another device"
    )]
    NoClose(PathBuf),
    #[error(
        "the watchdog {path} makes {found} s of {wanted} s, and would reset this host only after the standby has taken over; see \
         `wdctl` for its shortest, and set lease_ms so much longer"
    )]
    TooLong { path: PathBuf, wanted: u32, found: u32 },
}

/// An open one. Dropped, it goes on to count.
struct Device {
    file: File,
    path: PathBuf,
}

impl Device {
    fn open(path: &Path, timeout_s: u32) -> Result<Self, WatchdogError> {
        let error = |what, source| WatchdogError::Device { what, path: path.to_owned(), source };
        // It counts from here on.
        let file = OpenOptions::new().write(true).open(path).map_err(|source| error("open", source))?;
        let mut device = Self { file, path: path.to_owned() };
        let fitting = device.check(timeout_s);
        if fitting.is_err() {
            // As well as it can be.
            let _ = device.stop();
        }
        fitting.map(|()| device)
    }

    fn check(&self, wanted: u32) -> Result<(), WatchdogError> {
        let path = || self.path.clone();
        let error = |what, source| WatchdogError::Device { what, path: path(), source };
        if !sys::has_magic_close(&self.file).map_err(|source| error("examine", source))? {
            return Err(WatchdogError::NoClose(path()));
        }
        let found = sys::timeout(&self.file, wanted).map_err(|source| error("set the timeout of", source))?;
        if found > wanted {
            return Err(WatchdogError::TooLong { path: path(), wanted, found });
        }
        Ok(())
    }

    fn pet(&mut self) -> io::Result<()> {
        self.file.write_all(b"\0")
    }

    /// The magic word: what is closed after it does not count any more.
    fn stop(&mut self) -> io::Result<()> {
        self.file.write_all(b"V")
    }
}

/// How it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    Closed,
    Open,
    Failed(String),
}

struct State {
    guards: BTreeMap<Name, Arc<Guard>>,
    condition: Condition,
    ends: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks after the device, on a thread of its own.
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    settings: WatchdogSettings,
}

impl Watchdog {
    /// A device that is not there is an error: who names one counts on it.
    pub(super) fn start(settings: WatchdogSettings) -> io::Result<Self> {
        std::fs::metadata(&settings.path)?;
        let state = State { guards: BTreeMap::new(), condition: Condition::Closed, ends: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let (of_thread, its) = (Arc::clone(&shared), settings.clone());
        let thread =
            std::thread::Builder::new().name("watchdog".into()).spawn(move || look(&of_thread, &its))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)), settings })
    }

    /// This workload's guard counts from now on, in place of the one that it had.
    pub(super) fn watch(&self, name: &Name, guard: Arc<Guard>) {
        self.shared.state().guards.insert(name.clone(), guard);
        self.shared.changed.notify_all();
    }

    /// The workload's place is taken down.
    pub(super) fn forget(&self, name: &Name) {
        self.shared.state().guards.remove(name);
        self.shared.changed.notify_all();
    }

    /// The agent ends in order: the guards do without it.
    pub(super) fn end(&self) {
        self.shared.state().ends = true;
        self.shared.changed.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        thread.map(JoinHandle::join);
    }

    pub(super) fn status(&self) -> WatchdogStatus {
        let condition = self.shared.state().condition.clone();
        WatchdogStatus {
            device: self.settings.path.clone(),
            timeout_s: self.settings.timeout_s,
            open: condition == Condition::Open,
            error: match condition {
                Condition::Failed(error) => Some(error),
                Condition::Open | Condition::Closed => None,
            },
        }
    }
}

/// The thread.
fn look(shared: &Shared, settings: &WatchdogSettings) {
    let mut device: Option<Device> = None;
    let mut state = shared.state();
    loop {
        let guards: Vec<_> = state.guards.values().map(|guard| guard.state()).collect();
        let deed = match decide(device.is_some(), &guards, boot_time_ns(), settings) {
            _ if state.ends && device.is_some() => Deed::Close,
            _ if state.ends => return,
            // It would be the same again.
            _ if matches!(state.condition, Condition::Failed(_)) => Deed::Nothing,
            deed => deed,
        };
        // Devices may be slow; whoever arms a guard does not wait for them.
        drop(state);
        let done = act(deed, &mut device, settings);
        state = shared.state();
        match done {
            Ok(()) if device.is_some() => state.condition = Condition::Open,
            Ok(()) if state.condition == Condition::Open => state.condition = Condition::Closed,
            Ok(()) => {}
            Err(error) => {
                tracing::error!(%error, "no watchdog; guards and leases are kept as without one");
                state.condition = Condition::Failed(error.to_string());
            }
        }
        if !state.ends {
            let waited = shared.changed.wait_timeout(state, settings.look_interval());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn act(deed: Deed, device: &mut Option<Device>, settings: &WatchdogSettings) -> Result<(), WatchdogError> {
    let error = |what, source| WatchdogError::Device { what, path: settings.path.clone(), source };
    match (deed, device.as_mut()) {
        (Deed::Open, _) => *device = Some(Device::open(&settings.path, settings.timeout_s)?),
        (Deed::Pet, Some(open)) => open.pet().map_err(|source| error("pet", source))?,
        (Deed::Close, Some(open)) => {
            let stopped = open.stop();
            *device = None;
            stopped.map_err(|source| error("close", source))?;
        }
        (Deed::Nothing | Deed::Pet | Deed::Close, _) => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn timing(lease_ms: u64) -> Timing {
        Timing::for_lease(Duration::from_millis(50), Duration::from_millis(lease_ms))
    }

    fn settings(lease_ms: u64) -> WatchdogSettings {
        WatchdogSettings::of("/dev/watchdog".into(), &timing(lease_ms)).unwrap()
    }

    fn armed(ms: u64) -> GuardState {
        GuardState::Armed { deadline_ns: ms * MS }
    }

    #[test]
    fn a_lease_too_short_for_a_device_is_refused_with_the_one_that_would_do() {
        let refused = WatchdogSettings::of("/dev/watchdog".into(), &timing(300)).unwrap_err();
        assert!(refused.contains("lease_ms to 1200"), "{refused}");
        assert_eq!(settings(1200).timeout_s, 1);
        assert_eq!(settings(5000).timeout_s, 4);
        let tight = Timing { fence_margin: Duration::from_millis(20), ..timing(3000) };
        let refused = WatchdogSettings::of("/dev/watchdog".into(), &tight).unwrap_err();
        assert!(refused.contains("fence_margin_ms"), "{refused}");
    }

    #[test]
    fn it_is_open_exactly_while_a_guard_is_armed() {
        let (settings, fired) = (settings(5000), GuardState::Fired { at_ns: 1 });
        for idle in [&[][..], &[GuardState::Disarmed], &[fired, GuardState::Disarmed]] {
            assert_eq!(decide(false, idle, 0, &settings), Deed::Nothing);
            assert_eq!(decide(true, idle, 0, &settings), Deed::Close);
        }
        assert_eq!(decide(false, &[GuardState::Disarmed, armed(4000)], 0, &settings), Deed::Open);
        assert_eq!(decide(true, &[fired, armed(4000)], 0, &settings), Deed::Pet);
    }

    #[test]
    fn one_guard_that_is_not_in_order_is_enough_not_to_pet() {
        let settings = settings(5000);
        for late in [armed(1), armed(3000), GuardState::Firing] {
            for is_open in [false, true] {
                assert_eq!(decide(is_open, &[armed(9000), late], 0, &settings), Deed::Nothing, "{late:?}");
            }
        }
    }

    /// However renewals come and stop: the reset comes before the lease ends, unless the guard has fired.
    #[test]
    fn the_reset_comes_before_the_lease_ends_and_never_for_a_guard_that_fires_in_time() {
        for lease_ms in [1200, 2000, 5000, 7777] {
            let settings = settings(lease_ms);
            let (margin, step) =
                (settings.fence_margin.as_millis() as u64, settings.look_interval().as_millis() as u64);
            let timeout = u64::from(settings.timeout_s) * 1000;
            for last_renewal in 0..60 {
                for fires in [false, true] {
                    // The last heartbeat that was answered, and what follows from it.
                    let renewed = 10_000 + last_renewal * 7;
                    let lease_end = renewed + lease_ms;
                    let (mut petted, mut now, mut closed) = (0, 10_000, false);
                    while now < lease_end + 1000 && !closed {
                        let heard = if now < renewed { now / 50 * 50 } else { renewed };
                        let deadline = heard + lease_ms - margin;
                        // A guard takes some of the margin.
                        let state = if fires && now >= deadline + margin / 4 {
                            GuardState::Fired { at_ns: now * MS }
                        } else {
                            armed(deadline)
                        };
                        match decide(petted != 0, &[state], now * MS, &settings) {
                            Deed::Open | Deed::Pet => petted = now,
                            Deed::Close => closed = true,
                            Deed::Nothing => {}
                        }
                        assert!(closed || !fires || now < petted + timeout, "reset for nothing at {now}");
                        now += step;
                    }
                    assert_eq!(closed, fires);
                    assert!(petted + timeout <= lease_end, "{petted} + {timeout} > {lease_end}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_watchdog_is_refused_with_the_reason() {
        let settings = WatchdogSettings { path: "/dev/null".into(), ..settings(5000) };
        let watchdog = Watchdog::start(settings.clone()).unwrap();
        assert!(!watchdog.status().open && watchdog.status().error.is_none());
        let mut device = None;
        let refused = act(Deed::Open, &mut device, &settings).unwrap_err().to_string();
        assert!(refused.contains("/dev/null") && device.is_none(), "{refused}");
        watchdog.end();
        let nowhere = WatchdogSettings { path: "/nowhere/watchdog".into(), ..settings };
        assert!(Watchdog::start(nowhere).is_err());
    }
}
