//! `standin rejoin`: an old copy makes way for the one that runs on the other host.
//!
//! A host that hears of a newer term does so by itself ([`crate::ha`]); this asks at once, says why not if not, and drops
//! nothing of its own accord: the core does, when it has heard that the peer runs the workload under a newer term.

use std::time::{Duration, Instant};

use super::{
    api::{ApiError, WorkloadStatus},
    mailbox::Answer,
    orders::Order,
    owner::Owner,
};
use crate::{
    ha::{Message, Standing},
    model::Term,
};

/// How long the peer may take to say how it stands, and this host to become its standby.
const WITHIN: Duration = Duration::from_secs(10);
/// So often it is asked.
const ASK_INTERVAL: Duration = Duration::from_millis(300);

/// An order under way.
pub(super) struct Rejoin {
    pub(super) answer: Answer<WorkloadStatus>,
    since: Instant,
    asked: Option<Instant>,
    /// How the peer stands, under which term.
    heard: Option<(Term, Standing)>,
}

impl Owner {
    pub(super) fn rejoin(&mut self, answer: Answer<WorkloadStatus>) {
        let name = &self.name;
        let refusal = match self.standing() {
            None if self.home.is_some() => Some(format!(
                "{name} runs here, unprotected: if the other host has the copy that counts, `standin remove {name}`"
            )),
            None => Some(format!("{name} is not known here: it comes when it is protected on its host")),
            Some(Standing::Primary | Standing::Promoting) => {
                Some(format!("{name} runs here: it is no old copy"))
            }
            _ if self.order.is_some() => Some("another order is under way; try again".to_owned()),
            _ => None,
        };
        if let Some(refusal) = refusal {
            let _ = answer.send(Err(ApiError::refused(refusal)));
            return;
        }
        self.order = Some(Order::Rejoin(Rejoin { answer, since: Instant::now(), asked: None, heard: None }));
        self.look_at_order();
    }

    /// What the peer says while it is asked.
    pub(super) fn heard_for_rejoin(&mut self, message: &Message) {
        if let (Some(Order::Rejoin(rejoin)), Message::Known { term, standing, .. }) =
            (&mut self.order, message)
        {
            rejoin.heard = Some((*term, *standing));
        }
    }

    /// Asks the peer, until what it says decides.
    pub(super) fn look_at_rejoin(&mut self) {
        let (standing, own) = (self.standing(), self.term());
        let Some(Order::Rejoin(rejoin)) = &mut self.order else { return };
        if standing == Some(Standing::Standby) {
            return self.answer_order(Ok(()));
        }
        let refusal = refusal(rejoin.heard, own).or_else(|| {
            (rejoin.since.elapsed() > WITHIN).then_some(match rejoin.heard {
                None => "does not say that it runs it: see that its agent is up and reached",
                Some(_) => "runs it, but this host did not become its standby in time: see `standin status` on both hosts",
            })
        });
        let asks = rejoin.asked.is_none_or(|asked| asked.elapsed() > ASK_INTERVAL);
        if asks {
            rejoin.asked = Some(Instant::now());
        }
        if let Some(why) = refusal {
            let peer = self.durable.peer.as_deref().unwrap_or("the other host");
            let text = format!("nothing of {} was dropped: {peer} {why}", self.name);
            return self.answer_order(Err(ApiError::refused(text)));
        }
        if asks {
            self.tell(Message::Inquire { term: own });
        }
    }
}

/// Why what the peer says forbids it; none if it runs the workload, or nothing is decided yet.
fn refusal(heard: Option<(Term, Standing)>, own: Term) -> Option<&'static str> {
    match heard? {
        (term, Standing::Primary) if term > own => None,
        (_, Standing::Promoting) => None,
        (_, Standing::Primary) => Some(
            "runs it under a term that is not newer than this host's: end the protection there (`standin unprotect --force`), \
             remove it here, and protect it anew",
        ),
        (_, Standing::Standby) => Some(
            "does not run it but is its standby: what is here may be the only copy. `standin failover` there runs it",
        ),
        (_, Standing::Forgotten) => Some("does not know it: what is here may be the only copy"),
        _ => Some(
            "does not run it either: what is here may be the only copy. See `standin status` on both hosts",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_makes_way_only_for_one_that_runs_under_a_newer_term() {
        let own = Term(3);
        assert_eq!(refusal(None, own), None, "not heard yet");
        for standing in [
            Standing::Primary,
            Standing::Standby,
            Standing::Promoting,
            Standing::Fenced,
            Standing::Lost,
            Standing::Stuck,
            Standing::Forgotten,
        ] {
            for term in [0, 2, 3, 4] {
                let fits = standing == Standing::Promoting || (standing == Standing::Primary && term > own.0);
                assert_eq!(refusal(Some((Term(term), standing)), own).is_none(), fits, "{standing:?} {term}");
            }
        }
    }
}
