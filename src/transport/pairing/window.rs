//! The pairing window: whether a stranger may come to the door, and whether what he says is right.
//!
//! ```text
//!            open                 right proof | TRIES_MAX wrong ones | expiry | the listener is dropped
//!   Closed ────────► Open ─────────────────────────────────────────────────────────────────────────► Spent
//!                     ▲                                                                                │
//!                     └──────────────────────────────────── open ──────────────────────────────────────┘
//! ```
//!
//! `Spent` is `Closed` with the memory that there was a code, so that who comes late is told why.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{Card, ListenError};
use crate::transport::Peer;

/// Wrong proofs that close a window.
pub const TRIES_MAX: u32 = 5;

/// How the listener's owner learns what came of it.
pub(super) type Outcome = Result<Peer, ListenError>;

/// The window of an endpoint.
#[derive(Debug, Default)]
pub(in crate::transport) struct Gate {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Closed,
    Open(Window),
    Spent,
}

/// An open window. Who takes it out of the gate owes its owner an outcome.
pub(super) struct Window {
    /// Derived from the code.
    pub(super) key: [u8; 32],
    /// How this host introduces itself.
    pub(super) me: Card,
    /// To the owner of the listener.
    pub(super) outcome: oneshot::Sender<Outcome>,
    expires: Instant,
    wrong_tries: u32,
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window").field("me", &self.me).field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// What the door says to a stranger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::transport) enum Strangers {
    /// A code is open: come in and prove it.
    Expected,
    /// There is no code.
    Unexpected,
    /// There was one.
    TooLate,
}

/// What a proof is worth.
pub(super) enum Judgement {
    /// It is right, and the window is closed.
    Right(Window),
    /// It is wrong.
    Wrong {
        /// Tries that remain.
        tries_left: u32,
    },
    /// The window closed before.
    Spent,
}

impl Gate {
    /// Opens the window; `None` if it is open already.
    pub(super) fn open(
        &self,
        key: [u8; 32],
        me: Card,
        valid_for: Duration,
    ) -> Option<(Instant, oneshot::Receiver<Outcome>)> {
        let mut state = self.lock();
        if let State::Open(_) = *state {
            return None;
        }
        let expires = Instant::now() + valid_for;
        let (outcome, receiver) = oneshot::channel();
        *state = State::Open(Window { key, me, outcome, expires, wrong_tries: 0 });
        Some((expires, receiver))
    }

    /// Whether strangers may come in.
    pub(in crate::transport) fn strangers(&self) -> Strangers {
        match *self.lock() {
            State::Closed => Strangers::Unexpected,
            State::Open(_) => Strangers::Expected,
            State::Spent => Strangers::TooLate,
        }
    }

    /// Judges a proof by the code's key. Counting and closing are one step, so that tries in parallel are no
    /// way around the limit.
    pub(super) fn judge(&self, is_right: impl FnOnce(&[u8; 32]) -> bool) -> Judgement {
        let mut state = self.lock();
        let State::Open(window) = &mut *state else { return Judgement::Spent };
        if is_right(&window.key) {
            return match std::mem::replace(&mut *state, State::Spent) {
                State::Open(window) => Judgement::Right(window),
                State::Closed | State::Spent => Judgement::Spent,
            };
        }
        window.wrong_tries += 1;
        let tries_left = TRIES_MAX - window.wrong_tries;
        if tries_left == 0 {
            end(&mut state, ListenError::TooManyTries);
        }
        Judgement::Wrong { tries_left }
    }

    /// Closes the window if nobody waits for its outcome. (Not simply the open one: that may be a later
    /// owner's, opened while an exchange of the earlier one was still going on.)
    pub(super) fn close_unowned(&self) {
        let mut state = self.lock();
        if let State::Open(window) = &*state
            && window.outcome.is_closed()
        {
            *state = State::Spent;
        }
    }

    /// The state as of now: a window past its time is not open.
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment, so a panic of another holder cannot have torn it.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Open(window) = &*state
            && Instant::now() >= window.expires
        {
            end(&mut state, ListenError::Expired);
        }
        state
    }
}

fn end(state: &mut State, why: ListenError) {
    if let State::Open(window) = std::mem::replace(state, State::Spent) {
        // The owner may have gone; then nobody wants to know.
        let _ = window.outcome.send(Err(why));
    }
}
