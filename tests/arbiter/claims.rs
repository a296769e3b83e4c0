//! Who gets the key of which term.

use std::time::Duration;

use tokio::time::sleep;

use crate::{Host, SOON, TTL, WORKLOAD, eventually, now, relay::Relay, server::Server};

#[tokio::test]
async fn one_of_two_has_the_key_and_the_other_gets_it_when_it_is_given_up() {
    let server = Server::start();
    let mut a = Host::new(server.settings(), "a", Some(1), 1);
    let before = now();
    let until = a.held().await;
    assert!(until > before && until <= now() + TTL * 49 / 50, "{until:?}");
    let mut b = Host::new(server.settings(), "b", Some(2), 1);
    b.refused_times(2).await;
    let condition = b.claimant.condition();
    let holder = condition.holder.unwrap();
    assert_eq!((&*holder.host, holder.term.0, condition.newest.0), ("a", 1, 1));
    assert!(condition.reachable && condition.last_error.is_none());
    // While it is held it is so without a gap.
    for _ in 0..6 {
        let next = a.report().await.unwrap();
        assert!(next > now());
    }
    a.want(None, 1);
    b.held().await;
    assert_eq!(server.top(), Some(2));
    // Terms that were overtaken are never given again, not even when the key is free.
    a.want(Some(1), 1);
    a.refused_times(2).await;
    b.want(None, 2);
    eventually("b has given it up", || server.key("holder").is_none()).await;
    assert_eq!(server.top(), Some(2), "b's record has that term: it stays given");
    a.refused_times(3).await;
    a.want(Some(3), 2);
    a.held().await;
}

#[tokio::test]
async fn a_term_belongs_to_the_host_that_got_it_first() {
    let server = Server::start();
    let mut a = Host::new(server.settings(), "a", Some(4), 4);
    a.held().await;
    a.want(None, 4);
    let mut b = Host::new(server.settings(), "b", Some(4), 3);
    b.refused_times(3).await;
    a.want(Some(4), 4);
    a.held().await;
}

#[tokio::test]
async fn what_a_dead_agent_held_ends_by_itself_and_not_before_its_time() {
    let server = Server::start();
    let mut a = Host::new(server.settings(), "a", Some(1), 1);
    let mut until = a.held().await;
    let mut b = Host::new(server.settings(), "b", Some(2), 1);
    while let Ok(Some(report)) = tokio::time::timeout(TTL, a.reports.recv()).await {
        if let standin::arbiter::Report::Held { until: next, .. } = report {
            until = next;
            break;
        }
    }
    drop(a.claimant);
    while let Some(report) = a.reports.recv().await {
        if let standin::arbiter::Report::Held { until: next, .. } = report {
            until = next;
        }
    }
    b.held().await;
    assert!(now() > until, "given {:?} too early", until.saturating_sub(now()));
}

#[tokio::test]
async fn a_term_that_was_not_begun_is_taken_back() {
    let server = Server::start();
    let mut a = Host::new(server.settings(), "a", Some(1), 1);
    a.held().await;
    a.want(None, 1);
    // A standby asks, is given the key, and hears the primary again.
    let mut b = Host::new(server.settings(), "b", Some(2), 1);
    b.held().await;
    assert_eq!(server.top(), Some(2));
    a.want(Some(1), 1);
    a.refused().await;
    b.want(None, 1);
    a.held().await;
    assert_eq!(server.top(), Some(1));
    // Once it is in the record, it stays.
    a.want(None, 1);
    b.want(Some(2), 1);
    b.held().await;
    b.claimant.want(standin::arbiter::Wanted {
        generation: b.generation,
        term: Some(standin::model::Term(2)),
        record: standin::model::Term(2),
    });
    b.held_times(2).await;
    b.want(None, 2);
    a.want(Some(1), 1);
    a.refused_times(3).await;
    assert_eq!(server.top(), Some(2));
}

#[tokio::test]
async fn the_first_term_of_all_is_taken_back_to_none() {
    let server = Server::start();
    let mut a = Host::new(server.settings(), "a", Some(2), 1);
    a.held().await;
    a.want(None, 1);
    eventually("both keys are gone", || server.key("holder").is_none() && server.top().is_none()).await;
}

#[tokio::test]
async fn an_earlier_life_is_cleared_only_where_nothing_is_wanted() {
    let server = Server::start();
    let mut a = Host::new(server.settings(), "a", Some(1), 1);
    a.held().await;
    a.want(None, 1);
    let mut b = Host::new(server.settings(), "b", Some(2), 1);
    b.held().await;
    drop(b);
    // The new life of a running primary waits: the guard counts on what the earlier one had.
    let mut b = Host::new(server.settings(), "b", Some(2), 2);
    b.refused().await;
    b.held().await;
    drop(b);
    // Another one knows nothing of that term and wants nothing: it takes the key away before it would end.
    let begun = now();
    let b = Host::new(server.settings(), "b", None, 1);
    eventually("the term is taken back", || server.top() == Some(1)).await;
    assert!(now().saturating_sub(begun) < TTL, "it took as long as waiting");
    assert!(server.key("holder").is_none());
    a.want(Some(1), 1);
    a.held().await;
    // And it does not touch what is another's.
    sleep(TTL).await;
    assert_eq!(server.top(), Some(1));
    a.held_times(2).await;
    drop(b);
}

#[tokio::test]
async fn what_comes_late_of_a_release_does_nothing_to_a_newer_claim() {
    let server = Server::start();
    let relay = Relay::to(server.port()).await;
    let settings = standin::arbiter::Settings { endpoints: vec![relay.url()], ..server.settings() };
    let mut early = Host::new(settings, "a", Some(1), 1);
    early.held().await;
    relay.hold(true);
    let come = relay.come();
    early.want(None, 0);
    eventually("the release is on its way", || relay.come() > come).await;
    drop(early);
    let mut late = Host::new(server.settings(), "a", Some(1), 1);
    late.held().await;
    relay.hold(false);
    late.held_times(8).await;
    assert_eq!(server.top(), Some(1));
}

#[tokio::test]
async fn what_is_wanted_changes_faster_than_etcd_answers() {
    let server = Server::start();
    let mut a = Host::new(server.settings(), "a", Some(1), 1);
    for step in 0..200_u64 {
        a.want((step % 3 != 0).then_some(1 + step % 2), 1);
        sleep(Duration::from_millis(step % 7)).await;
    }
    a.want(None, 1);
    let mut b = Host::new(server.settings(), "b", Some(2), 1);
    let begun = now();
    b.held().await;
    assert!(now().saturating_sub(begun) < SOON);
    b.want(None, 1);
    eventually("nothing of b is left", || server.top() != Some(2)).await;
    // A grant may come later than the end of what it was for: it ends by itself.
    eventually("no lease is left", || {
        let leases = server.post("/v3/lease/leases", &serde_json::json!({}));
        leases["leases"].as_array().is_none_or(Vec::is_empty)
    })
    .await;
}

#[tokio::test]
async fn a_workload_that_is_forgotten_begins_anew() {
    let server = Server::start();
    let etcd = standin::arbiter::Etcd::new(server.settings()).unwrap();
    let name = WORKLOAD.parse().unwrap();
    let mut a = Host::new(server.settings(), "a", Some(7), 7);
    a.held().await;
    let refused = etcd.forget(&name, "b").await.unwrap_err().to_string();
    assert!(refused.contains("a holds the workload's key"), "{refused}");
    a.want(None, 7);
    eventually("it is given up", || server.key("holder").is_none()).await;
    drop(a);
    etcd.forget(&name, "b").await.unwrap();
    let mut b = Host::new(server.settings(), "b", Some(1), 1);
    b.held().await;
}
