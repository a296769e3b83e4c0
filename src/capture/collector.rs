//! The page server's side of a freeze: CRIU's list of pages, and those that it sends itself, for the reader on another
//! thread ([`super::frozen`]).

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvError, Sender, TryRecvError, channel},
    },
    time::{Duration, Instant},
};

use crate::{
    criu::{gate::Gate, page_server},
    extents,
    model::{Extent, Space},
    wire::message::{Manifest, SpaceMap},
};

/// How long a thread stays awake for what comes at once; between two steps of CRIU at the end of a dump lie 0.3 ms.
pub(super) const AWAKE_MAX: Duration = Duration::from_millis(1);

/// Pages that CRIU sent itself.
pub(super) struct Sent {
    pub(super) space: Space,
    pub(super) extents: Vec<Extent>,
    pub(super) data: Vec<u8>,
}

/// From the page server's thread to the reader's.
pub(super) enum Order {
    /// All tasks stand.
    Begin,
    /// CRIU has come to the first task's memory.
    Opened,
    /// CRIU has left the task of this pid inside.
    Left(u32),
    Finish {
        manifest: Manifest,
        sent: Vec<Sent>,
        closed: Instant,
    },
}

/// Begins the reader's work; dropped without that, there was no freeze.
pub(super) struct Starter {
    orders: Sender<Order>,
    gate: Option<Arc<Gate>>,
    /// The bridge has said that all tasks stand.
    begun: Arc<AtomicBool>,
}

impl Starter {
    /// All tasks stand, as CRIU says; the bridge mostly has said so before.
    pub(super) fn begin(self) {
        // A reader that has ended says so at the close.
        let _ = self.orders.send(Order::Begin);
        if let Some(gate) = self.gate.filter(|_| !self.begun.load(Ordering::Acquire)) {
            gate.listen_no_more();
        }
    }
}

/// The page server's side: collects CRIU's list and the pages that it sends itself.
pub(super) struct Collector {
    orders: Sender<Order>,
    verdict: Receiver<bool>,
    opened: bool,
    listed: BTreeMap<Space, Vec<Extent>>,
    sent: Vec<Sent>,
}

/// The reader's ends.
pub(super) struct Ends {
    pub(super) orders: Receiver<Order>,
    /// For what the bridge says.
    pub(super) own_orders: Option<Sender<Order>>,
    pub(super) begun: Arc<AtomicBool>,
    pub(super) verdict: Sender<bool>,
}

/// Makes what begins, the two sides, and the way between them.
pub(super) fn channels(gate: Option<Arc<Gate>>) -> (Starter, Collector, Ends) {
    let (orders, ordered) = channel();
    let (verdict, judged) = channel();
    let begun = Arc::new(AtomicBool::new(false));
    let own_orders = gate.is_some().then(|| orders.clone());
    let starter = Starter { orders: orders.clone(), gate, begun: Arc::clone(&begun) };
    let collector =
        Collector { orders, verdict: judged, opened: false, listed: BTreeMap::new(), sent: Vec::new() };
    (starter, collector, Ends { orders: ordered, own_orders, begun, verdict })
}

impl page_server::Handler for Collector {
    /// Tasks have a parent (CRIU sends holes, we the pages); shared memory has none, because a store through another
    /// mapping leaves no trace in the one that is looked at. CRIU up to 4.2 sends all of it in any case (do_dump_one_shmem
    /// in shmem.c); should one send holes, the epoch fails: the reader trusts nothing that is known of it.
    fn opened(&mut self, space: Space) -> io::Result<bool> {
        if !self.opened {
            self.opened = true;
            // A reader that has ended says so at the close.
            let _ = self.orders.send(Order::Opened);
        }
        self.listed.entry(space).or_default();
        Ok(matches!(space, Space::Task(_)))
    }

    fn hole(&mut self, space: Space, extent: Extent) -> io::Result<()> {
        self.listed.entry(space).or_default().push(extent);
        Ok(())
    }

    fn pages(&mut self, space: Space, extent: Extent, _lazy: bool, data: &[u8]) -> io::Result<()> {
        self.listed.entry(space).or_default().push(extent);
        match self.sent.last_mut() {
            Some(piece)
                if piece.space == space
                    && piece.extents.last().is_some_and(|last| last.end() == extent.start) =>
            {
                extents::push(&mut piece.extents, extent.start, extent.end());
                piece.data.extend_from_slice(data);
            }
            _ => self.sent.push(Sent { space, extents: vec![extent], data: data.to_vec() }),
        }
        Ok(())
    }

    fn close(&mut self) -> io::Result<()> {
        if !self.opened {
            // It gave up before the tree stood, as when that has just ended: the reader waits for CRIU, and CRIU for this.
            return Err(io::Error::other("CRIU has come to no memory"));
        }
        let closed = Instant::now();
        let spaces = std::mem::take(&mut self.listed)
            .into_iter()
            .map(|(space, mut extents)| {
                extents::normalize(&mut extents);
                SpaceMap { space, extents }
            })
            .collect();
        let order =
            Order::Finish { manifest: Manifest { spaces }, sent: std::mem::take(&mut self.sent), closed };
        let read = self.orders.send(order).is_ok() && receive_soon(&self.verdict).unwrap_or(false);
        if read { Ok(()) } else { Err(io::Error::other("the frozen memory could not be read")) }
    }
}

/// Receives what is expected at once, mostly: a thread that sleeps until then takes 50 µs to wake.
pub(super) fn receive_soon<T>(from: &Receiver<T>) -> Result<T, RecvError> {
    let until = Instant::now() + AWAKE_MAX;
    while Instant::now() < until {
        match from.try_recv() {
            Ok(received) => return Ok(received),
            Err(TryRecvError::Disconnected) => return Err(RecvError),
            Err(TryRecvError::Empty) => std::thread::yield_now(),
        }
    }
    from.recv()
}
