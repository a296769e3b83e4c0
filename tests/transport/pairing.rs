//! Two hosts come to trust each other by a code, and by nothing else.

use std::time::Duration;

use standin::transport::{
    Channel,
    pairing::{JoinError, ListenError, PAIRING_VALID_FOR, PairingCode, TRIES_MAX},
};

use crate::{Host, pair, soon};

fn other_code() -> PairingCode {
    "0000-0000-0000-0000".parse().unwrap()
}

#[tokio::test]
async fn a_code_makes_two_hosts_trust_each_other() {
    let (l, j) = (Host::new(), Host::new());
    let (joined, listened) = pair(&l, &j).await;
    assert_eq!(joined, l.as_peer("l"));
    assert_eq!(listened, j.as_peer("j"));
    for (from, to, name, own) in [(&l, &j, "j", "l"), (&j, &l, "l", "j")] {
        let dialed = soon(from.endpoint.connect(&name.parse().unwrap(), Channel::Lease)).await.unwrap();
        let accepted = soon(to.endpoint.accept()).await.unwrap();
        assert_eq!((dialed.peer().as_str(), accepted.peer().as_str()), (name, own));
        assert_eq!((dialed.channel(), accepted.channel()), (Channel::Lease, Channel::Lease));
    }
    // The lists are on disk.
    let l = l.restart().await;
    assert_eq!(l.endpoint.peers().list(), [j.as_peer("j")]);
}

#[tokio::test]
async fn pairing_again_renews_the_address() {
    let (l, j) = (Host::new(), Host::new());
    pair(&l, &j).await;
    pair(&l, &j).await;
    assert_eq!(l.endpoint.peers().list().len(), 1);
    assert_eq!(j.endpoint.peers().list().len(), 1);
}

#[tokio::test]
async fn a_wrong_code_is_refused_and_the_right_one_still_works() {
    let (l, j) = (Host::new(), Host::new());
    let window = l.endpoint.open_pairing(l.card("l"), PAIRING_VALID_FOR).unwrap();
    let refused = soon(j.endpoint.join(l.addr(), &other_code(), j.card("j"))).await.unwrap_err();
    assert!(matches!(refused, JoinError::WrongCode { tries_left: 4 }), "{refused}");
    assert!(l.endpoint.peers().list().is_empty() && j.endpoint.peers().list().is_empty());
    let code = window.code().clone();
    soon(j.endpoint.join(l.addr(), &code, j.card("j"))).await.unwrap();
    soon(window.wait()).await.unwrap();
}

#[tokio::test]
async fn a_code_works_once() {
    let (l, j, late) = (Host::new(), Host::new(), Host::new());
    let window = l.endpoint.open_pairing(l.card("l"), PAIRING_VALID_FOR).unwrap();
    let code = window.code().clone();
    soon(j.endpoint.join(l.addr(), &code, j.card("j"))).await.unwrap();
    soon(window.wait()).await.unwrap();
    for host in [&late, &j] {
        let refused = soon(host.endpoint.join(l.addr(), &code, host.card("late"))).await.unwrap_err();
        assert!(matches!(refused, JoinError::Spent(_)), "{refused}");
    }
    assert_eq!(l.endpoint.peers().list().len(), 1);
}

#[tokio::test]
async fn of_two_hosts_that_race_with_one_code_one_wins() {
    let (l, j, k) = (Host::new(), Host::new(), Host::new());
    let window = l.endpoint.open_pairing(l.card("l"), PAIRING_VALID_FOR).unwrap();
    let code = window.code().clone();
    let (first, second) = soon(async {
        tokio::join!(
            j.endpoint.join(l.addr(), &code, j.card("j")),
            k.endpoint.join(l.addr(), &code, k.card("k"))
        )
    })
    .await;
    assert_eq!(u8::from(first.is_ok()) + u8::from(second.is_ok()), 1, "{first:?} {second:?}");
    soon(window.wait()).await.unwrap();
    assert_eq!(l.endpoint.peers().list().len(), 1);
}

#[tokio::test]
async fn too_many_wrong_tries_close_the_window() {
    let (l, j) = (Host::new(), Host::new());
    let window = l.endpoint.open_pairing(l.card("l"), PAIRING_VALID_FOR).unwrap();
    let code = window.code().clone();
    for left in (0..TRIES_MAX).rev() {
        let refused = soon(j.endpoint.join(l.addr(), &other_code(), j.card("j"))).await.unwrap_err();
        assert!(matches!(refused, JoinError::WrongCode { tries_left } if tries_left == left), "{refused}");
    }
    let refused = soon(j.endpoint.join(l.addr(), &code, j.card("j"))).await.unwrap_err();
    assert!(matches!(refused, JoinError::Spent(_)), "{refused}");
    assert!(matches!(soon(window.wait()).await, Err(ListenError::TooManyTries)));
    assert!(l.endpoint.peers().list().is_empty());
}

#[tokio::test]
async fn an_expired_code_is_refused() {
    let (l, j) = (Host::new(), Host::new());
    let window = l.endpoint.open_pairing(l.card("l"), Duration::from_millis(50)).unwrap();
    let code = window.code().clone();
    assert!(matches!(soon(window.wait()).await, Err(ListenError::Expired)));
    let refused = soon(j.endpoint.join(l.addr(), &code, j.card("j"))).await.unwrap_err();
    assert!(matches!(refused, JoinError::Spent(_)), "{refused}");
}

#[tokio::test]
async fn without_an_open_window_nobody_joins() {
    let (l, j) = (Host::new(), Host::new());
    let refused = soon(j.endpoint.join(l.addr(), &other_code(), j.card("j"))).await.unwrap_err();
    assert!(matches!(refused, JoinError::NotOpen(_)), "{refused}");
    // A peer, too, is told that there is none.
    l.endpoint.peers().add(j.as_peer("j")).unwrap();
    let refused = soon(j.endpoint.join(l.addr(), &other_code(), j.card("j"))).await.unwrap_err();
    assert!(matches!(refused, JoinError::NotOpen(_)), "{refused}");
}

#[tokio::test]
async fn a_dropped_listener_closes_its_window_and_no_other() {
    let (l, j) = (Host::new(), Host::new());
    let window = l.endpoint.open_pairing(l.card("l"), PAIRING_VALID_FOR).unwrap();
    assert!(matches!(l.endpoint.open_pairing(l.card("l"), PAIRING_VALID_FOR), Err(ListenError::AlreadyOpen)));
    let code = window.code().clone();
    drop(window);
    let refused = soon(j.endpoint.join(l.addr(), &code, j.card("j"))).await.unwrap_err();
    assert!(matches!(refused, JoinError::Spent(_)), "{refused}");
    pair(&l, &j).await;
}

#[tokio::test]
async fn nobody_at_the_address_is_unreachable() {
    let j = Host::new();
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let addr = silent.local_addr().unwrap();
    let refused = soon(j.endpoint.join(addr, &other_code(), j.card("j"))).await.unwrap_err();
    assert!(matches!(refused, JoinError::Unreachable(_)), "{refused}");
}

#[tokio::test]
async fn a_host_does_not_pair_with_itself_or_its_namesake() {
    let (l, j) = (Host::new(), Host::new());
    let window = l.endpoint.open_pairing(l.card("same"), PAIRING_VALID_FOR).unwrap();
    let code = window.code().clone();
    let refused = soon(l.endpoint.join(l.addr(), &code, l.card("l"))).await.unwrap_err();
    assert!(matches!(refused, JoinError::Itself(_)), "{refused}");
    let refused = soon(j.endpoint.join(l.addr(), &code, j.card("same"))).await.unwrap_err();
    assert!(matches!(refused, JoinError::Refused { .. }), "{refused}");
    assert!(matches!(soon(window.wait()).await, Err(ListenError::SameName(_))));
}

#[tokio::test]
async fn a_name_in_use_is_refused_on_either_side_and_neither_trusts() {
    for taken_at_listener in [true, false] {
        let (l, j, other) = (Host::new(), Host::new(), Host::new());
        let (side, name) = if taken_at_listener { (&l, "j") } else { (&j, "l") };
        side.endpoint.peers().add(other.as_peer(name)).unwrap();
        let window = l.endpoint.open_pairing(l.card("l"), PAIRING_VALID_FOR).unwrap();
        let code = window.code().clone();
        let refused = soon(j.endpoint.join(l.addr(), &code, j.card("j"))).await.unwrap_err();
        let listened = soon(window.wait()).await.unwrap_err();
        for text in [refused.to_string(), listened.to_string()] {
            assert!(text.contains(&format!("standin pair --forget {name}")), "{text}");
        }
        assert!(l.endpoint.peers().by_fingerprint(&j.endpoint.fingerprint()).is_none());
        assert!(j.endpoint.peers().by_fingerprint(&l.endpoint.fingerprint()).is_none());
    }
}
