//! Is a history of concurrent operations on counters linearizable: could a single server have done them one after the
//! other, each at some instant between its request and its reply, and have answered as the clients were told?
//!
//! The search is Wing and Gong's with Lowe's memory of what was tried ("Testing for linearizability", 2017): it goes
//! through requests and replies by time. Whoever has asked and was not answered yet may be next; a reply can be passed only
//! once its operation was done. Where that is not so, the last choice is taken back. The same operations done with the
//! same value in the register are never tried twice, whatever their order was. Keys are independent of each other
//! (linearizability is local), so each is searched by itself.
//!
//! What a client never heard of may have been done at any time after it was asked for, or never. To be done at the very end,
//! when nobody looks any more, comes to the same as never, so that it is an operation whose reply comes last.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
};

/// How many different situations of one key are looked at before a history counts as too hard.
const SITUATIONS_MAX: usize = 500_000;
/// How many operations a complaint shows before the one that does not fit.
const SHOWN: usize = 6;

/// What a key holds before its first operation.
const START: i64 = 0;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// Answered by the value.
    Read,
    /// The value is this one from now on; the answer's value means nothing.
    Write(i64),
    /// One more; answered by the new value.
    Increment,
}

/// What a client heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) at: u64,
    pub(crate) value: i64,
}

/// One operation as its client saw it. Times are of one clock that all clients share, in any unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Operation {
    pub(crate) client: usize,
    pub(crate) key: String,
    pub(crate) call: Call,
    pub(crate) asked_at: u64,
    /// None if the client never heard: nobody knows whether it was done.
    pub(crate) reply: Option<Reply>,
}

impl Operation {
    /// What the register holds after it, if it can have been answered so when the register held `value`.
    fn done_on(&self, value: i64) -> Option<i64> {
        let after = match self.call {
            Call::Read => value,
            Call::Write(new) => return Some(new),
            Call::Increment => value.checked_add(1)?,
        };
        self.reply.is_none_or(|reply| reply.value == after).then_some(after)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {} {:?} {}, asked at {}", self.client, self.call, self.key, self.asked_at)?;
        match self.reply {
            Some(reply) => write!(f, ", told {} at {}", reply.value, reply.at),
            None => f.write_str(", never answered"),
        }
    }
}

/// Why a history is not taken.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// No order explains it.
    Illegal {
        /// Of the longest order that was found, its last operations.
        before: Vec<Operation>,
        /// What the key held after them.
        value: i64,
        /// What was answered next, and cannot have been.
        stuck: Operation,
    },
    /// The search was given up.
    TooHard { key: String },
    /// It was answered before it was asked.
    Backwards(Operation),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Illegal { before, value, stuck } => {
                writeln!(f, "no order of the operations explains: {stuck}")?;
                writeln!(f, "the longest that was found leaves {value}, and ends in:")?;
                before.iter().try_for_each(|operation| writeln!(f, "  {operation}"))
            }
            Self::TooHard { key } => write!(f, "{key}: no answer after {SITUATIONS_MAX} situations"),
            Self::Backwards(operation) => write!(f, "answered before it was asked: {operation}"),
        }
    }
}

/// Whether the history is linearizable, every key being [`START`] before it.
pub(crate) fn check(history: &[Operation]) -> Result<(), Refusal> {
    let mut keys: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    for operation in history {
        if operation.reply.is_some_and(|reply| reply.at < operation.asked_at) {
            return Err(Refusal::Backwards(operation.clone()));
        }
        // A read that nobody heard of explains nothing and changes nothing.
        if operation.call != Call::Read || operation.reply.is_some() {
            keys.entry(&operation.key).or_default().push(operation);
        }
    }
    keys.into_values().try_for_each(|operations| Search::new(operations).run())
}

/// A request or a reply, in the list of those that the search has not dealt with, which is in order of time.
#[derive(Clone, Copy)]
struct Event {
    operation: usize,
    is_reply: bool,
    before: usize,
    after: usize,
}

/// The search for an order of one key's operations.
struct Search<'a> {
    operations: Vec<&'a Operation>,
    /// Of these, `HEAD` is not an event: it begins the list and, being met again, ends it.
    events: Vec<Event>,
    /// For each operation its events; the second is missing if it was never answered.
    places: Vec<(usize, Option<usize>)>,
    /// What is done, in order, each with the value before it.
    order: Vec<(usize, i64)>,
    done: Done,
    value: i64,
    unanswered_replies: usize,
    tried: HashSet<(Done, i64)>,
    /// The longest order, and what could not be passed then.
    longest: Option<(Vec<usize>, i64, usize)>,
}

const HEAD: usize = 0;

impl<'a> Search<'a> {
    fn new(operations: Vec<&'a Operation>) -> Self {
        let mut times = Vec::new();
        for (index, operation) in operations.iter().enumerate() {
            times.push((operation.asked_at, false, index));
            times.extend(operation.reply.map(|reply| (reply.at, true, index)));
        }
        // At the same time, requests come first: where the clock cannot tell, the server gets the benefit.
        times.sort_unstable();
        let mut places = vec![(HEAD, None); operations.len()];
        let mut events =
            vec![Event { operation: usize::MAX, is_reply: false, before: times.len(), after: HEAD }];
        for (index, (_, is_reply, operation)) in times.iter().copied().enumerate() {
            let event = index + 1;
            events[index].after = event;
            events.push(Event { operation, is_reply, before: index, after: HEAD });
            if is_reply {
                places[operation].1 = Some(event);
            } else {
                places[operation].0 = event;
            }
        }
        let unanswered_replies = places.iter().filter(|(_, reply)| reply.is_some()).count();
        Self {
            done: Done::none_of(operations.len()),
            operations,
            events,
            places,
            order: Vec::new(),
            value: START,
            unanswered_replies,
            tried: HashSet::new(),
            longest: None,
        }
    }

    fn run(mut self) -> Result<(), Refusal> {
        let mut at = self.events[HEAD].after;
        // What was never answered needs no place: it was done at the end, or never.
        while self.unanswered_replies > 0 {
            if self.tried.len() > SITUATIONS_MAX {
                return Err(Refusal::TooHard { key: self.operations[0].key.clone() });
            }
            let Event { operation, is_reply, after, .. } = self.events[at];
            if !is_reply {
                at = if self.can_be_next(operation) { self.events[HEAD].after } else { after };
                continue;
            }
            // A reply whose operation is not done: none of those before it can be next.
            self.note_if_longest(operation);
            match self.take_back() {
                Some(next) => at = next,
                None => return Err(self.refusal()),
            }
        }
        Ok(())
    }

    /// Does it next, if it fits and this situation is a new one.
    fn can_be_next(&mut self, operation: usize) -> bool {
        let Some(after) = self.operations[operation].done_on(self.value) else { return false };
        self.done.flip(operation);
        if !self.tried.insert((self.done.clone(), after)) {
            self.done.flip(operation);
            return false;
        }
        self.order.push((operation, self.value));
        self.value = after;
        let (request, reply) = self.places[operation];
        self.unlink(request);
        if let Some(reply) = reply {
            self.unlink(reply);
            self.unanswered_replies -= 1;
        }
        true
    }

    /// Undoes the last choice; gives the event that is looked at instead.
    fn take_back(&mut self) -> Option<usize> {
        let (operation, before) = self.order.pop()?;
        self.value = before;
        self.done.flip(operation);
        let (request, reply) = self.places[operation];
        // In the reverse order, so that each finds its neighbours as it left them.
        if let Some(reply) = reply {
            self.link(reply);
            self.unanswered_replies += 1;
        }
        self.link(request);
        Some(self.events[request].after)
    }

    fn unlink(&mut self, event: usize) {
        let Event { before, after, .. } = self.events[event];
        self.events[before].after = after;
        self.events[after].before = before;
    }

    fn link(&mut self, event: usize) {
        let Event { before, after, .. } = self.events[event];
        self.events[before].after = event;
        self.events[after].before = event;
    }

    fn note_if_longest(&mut self, stuck: usize) {
        if self.longest.as_ref().is_none_or(|(order, ..)| self.order.len() > order.len()) {
            let order = self.order.iter().map(|(operation, _)| *operation).collect();
            self.longest = Some((order, self.value, stuck));
        }
    }

    fn refusal(self) -> Refusal {
        let (order, value, stuck) = self.longest.expect("it got stuck somewhere");
        let last = &order[order.len().saturating_sub(SHOWN)..];
        Refusal::Illegal {
            before: last.iter().map(|index| self.operations[*index].clone()).collect(),
            value,
            stuck: self.operations[stuck].clone(),
        }
    }
}

/// Which operations are done: a bit for each.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Done(Box<[u64]>);

impl Done {
    fn none_of(count: usize) -> Self {
        Self(vec![0; count.div_ceil(64)].into())
    }

    fn flip(&mut self, operation: usize) {
        self.0[operation / 64] ^= 1 << (operation % 64);
    }
}
