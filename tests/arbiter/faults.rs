//! etcd killed, stopped, cut off, and a member of three lost.

use nix::sys::signal::Signal;
use standin::arbiter::{Report, Settings};

use crate::{
    Host, TTL, now,
    relay::Relay,
    server::{Server, free_port},
};

#[tokio::test]
async fn a_running_holder_has_its_key_again_after_etcd_was_killed() {
    let mut server = Server::start();
    let mut a = Host::new(server.settings(), "a", Some(1), 1);
    a.held().await;
    server.kill();
    a.refused().await;
    let condition = a.claimant.condition();
    assert!(!condition.reachable, "{condition:?}");
    assert!(condition.last_error.as_deref().unwrap().contains("is it up"), "{condition:?}");
    server.start_again();
    a.held().await;
    assert!(a.claimant.condition().reachable);
    // Away for longer than the key lasts, too, and beside one who wants the next term.
    server.kill();
    let mut b = Host::new(server.settings(), "b", Some(2), 1);
    b.refused().await;
    b.want(None, 1);
    tokio::time::sleep(TTL * 2).await;
    server.start_again();
    a.held().await;
    assert_eq!(server.top(), Some(1));
}

#[tokio::test]
async fn nothing_is_believed_while_etcd_is_stopped() {
    let server = Server::start();
    let mut a = Host::new(server.settings(), "a", Some(1), 1);
    a.held().await;
    server.signal(Signal::SIGSTOP);
    let stopped = now();
    let mut b = Host::new(server.settings(), "b", Some(2), 1);
    let asked = now();
    b.refused().await;
    assert!(now().saturating_sub(asked) < TTL, "an asker must hear no in time");
    tokio::time::sleep(TTL * 2).await;
    let mut last = stopped;
    let mut refusals = 0;
    while let Ok(report) = a.reports.try_recv() {
        match report {
            Report::Held { until, .. } => last = last.max(until),
            Report::Refused { .. } => refusals += 1,
        }
    }
    assert!(
        last <= stopped + TTL * 49 / 50,
        "believed for {:?} after the stop",
        last.saturating_sub(stopped)
    );
    assert!(refusals >= 2, "{refusals}");
    // Nobody is left who would extend it.
    drop(a);
    server.signal(Signal::SIGCONT);
    b.held().await;
    assert!(now() > last);
}

#[tokio::test]
async fn a_holder_that_is_cut_off_stops_believing_before_another_is_given_the_key() {
    let server = Server::start();
    let relay = Relay::to(server.port()).await;
    let settings = Settings { endpoints: vec![relay.url()], ..server.settings() };
    let mut a = Host::new(settings, "a", Some(1), 1);
    a.held().await;
    let mut b = Host::new(server.settings(), "b", Some(2), 1);
    for round in 0..3 {
        let mut last = a.held().await;
        relay.hold(true);
        b.held().await;
        let given = now();
        while let Ok(report) = a.reports.try_recv() {
            if let Report::Held { until, .. } = report {
                last = last.max(until);
            }
        }
        assert!(given > last, "round {round}: {:?} too early", last.saturating_sub(given));
        // What was held up arrives now, and changes nothing.
        relay.hold(false);
        a.refused_times(4).await;
        b.held_times(1).await;
        // The standby takes nothing over after all.
        b.want(None, 1);
        a.held().await;
        b.want(Some(2), 1);
    }
}

#[tokio::test]
async fn one_member_of_three_may_be_lost() {
    let mut servers = Server::cluster(3);
    let endpoints: Vec<_> = servers.iter().map(|server| server.url.clone()).collect();
    let settings = Settings { endpoints, ttl: TTL * 2, ..servers[0].settings() };
    let mut a = Host::new(settings.clone(), "a", Some(1), 1);
    a.held().await;
    assert_eq!(a.claimant.condition().endpoint, servers[0].url);
    servers[0].kill();
    // At most an election later.
    a.held().await;
    let mut other = a.held().await;
    let until = now() + TTL * 3;
    while now() < until {
        if let Some(next) = a.report().await {
            other = next;
        }
    }
    assert!(other > now(), "it has lost the key");
    assert_ne!(a.claimant.condition().endpoint, servers[0].url);
    let mut b = Host::new(settings.clone(), "b", Some(2), 1);
    b.refused_times(2).await;
    // Without a majority nobody is given anything.
    servers[1].kill();
    b.refused_times(2).await;
    a.refused().await;
    servers[0].start_again();
    a.held().await;
    a.want(None, 1);
    b.held().await;
}

#[tokio::test]
async fn a_member_that_hangs_is_passed_over() {
    let server = Server::start();
    let relay = Relay::to(server.port()).await;
    relay.hold(true);
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let endpoints = vec![nobody, relay.url(), server.url.clone()];
    let mut a = Host::new(Settings { endpoints, ..server.settings() }, "a", Some(1), 1);
    a.held().await;
    assert_eq!(a.claimant.condition().endpoint, server.url);
    a.held_times(4).await;
}
