//! The threads: those of bulk, and those of everything else, which come first.
//!
//! Hashing, encrypting and copying an epoch keeps a CPU busy for as long as it lasts. Were that done by the threads that
//! renew leases, or were those merely equal to it, a lease would wait for the scheduler's next tick (4 ms and more).

use std::{fmt, io, net::UdpSocket, pin::Pin, sync::Arc, thread, time::Instant};

use quinn::{AsyncTimer, AsyncUdpSocket, TokioRuntime};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::oneshot,
    task,
};

use super::{socket::Batched, sys};

/// The runtime for an agent: what its tasks do must be short, and runs before what others on the host do. Bulk has a
/// thread of its own; see [`Connection::thread`](super::Connection::thread).
///
/// A heartbeat's round trip while bulk has both of two CPUs busy, 99th percentile: 4.4 ms if all threads are equal, 3.4 ms if
/// these have a nice value of -10 and have slices of 0.1 ms, 0.4 ms like this.
pub fn prompt_runtime() -> io::Result<Runtime> {
    // Called by workers alone, not by the threads of `spawn_blocking`.
    Builder::new_multi_thread()
        .thread_name("standin")
        .enable_all()
        .on_thread_unpark(sys::before_others)
        .build()
}

/// [`tokio::task::block_in_place`] for a task on [`prompt_runtime`]: what takes long runs among all others.
pub fn block_in_place<T>(work: impl FnOnce() -> T) -> T {
    task::block_in_place(|| {
        // Should the thread be a worker again, its next wake-up sees to the rest.
        sys::among_others();
        work()
    })
}

/// A thread on which bulk connections are driven. It ends with the last of them.
///
/// One thread: two took a fifth more CPU for each byte (veth, 2 CPUs: 0.91 GB/s with two, 1.09 with one), for locks and
/// wake-ups between them. It sends or receives 10 Gbit/s.
pub(super) struct Lane {
    handle: Handle,
    /// Dropped with the lane, which ends the thread.
    _stop: oneshot::Sender<()>,
}

impl Lane {
    pub(super) fn start() -> io::Result<Arc<Self>> {
        let runtime = Builder::new_current_thread().thread_name("standin-blocking").enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        thread::Builder::new().name("standin-bulk".to_owned()).spawn(move || {
            // Ends by the sender's drop, never by a message.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        })?;
        Ok(Arc::new(Self { handle, _stop: stop }))
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").finish_non_exhaustive()
    }
}

impl quinn::Runtime for Lane {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _entered = self.handle.enter();
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.handle.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _entered = self.handle.enter();
        Ok(Arc::new(Batched::new(TokioRuntime.wrap_udp_socket(socket)?)))
    }
}
