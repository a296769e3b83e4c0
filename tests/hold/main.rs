//! Held packets, in the kernel's own packet filter.

mod net;

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
};

use net::{Net, WORKLOAD};
use standin::{
    model::{Epoch, EpochId, Name, Term},
    takeover::hold::{Hold, HoldError, Marks},
};

fn name() -> Name {
    "db".parse().unwrap()
}

fn epoch(number: u64) -> EpochId {
    EpochId { term: Term(3), epoch: Epoch(number) }
}

fn hold(net: &Net, holds_output: bool) -> Hold {
    Hold::make(&name(), net.marks.clone(), None, holds_output).unwrap()
}

fn marks(device: u32, address: &str) -> Marks {
    Marks { devices: vec![device], addresses: vec![address.parse().unwrap()], ..Marks::default() }
}

fn output_waits_for_its_epoch(bridged: bool) {
    let net = Net::new(bridged);
    let hold = hold(&net, false);
    for v in [0, 1] {
        let (mut workload, mut client) = net.pair(v);
        workload.send(1);
        client.hears(&[1]);
        hold.hold_output().unwrap();
        workload.send(2);
        workload.send(3);
        client.hears_nothing();
        hold.mark(epoch(1)).unwrap();
        workload.send(4);
        hold.mark(epoch(2)).unwrap();
        workload.send(5);
        client.hears_nothing();
        // Perhaps with what IPv6 says by itself.
        assert!(hold.held().packets >= 4, "{:?}", hold.held());
        hold.release(epoch(1)).unwrap();
        client.hears(&[2, 3]);
        hold.release(epoch(2)).unwrap();
        client.hears(&[4]);
        // The next epoch covers one that failed.
        hold.mark(epoch(3)).unwrap();
        workload.send(6);
        hold.mark(epoch(4)).unwrap();
        hold.release(epoch(4)).unwrap();
        client.hears(&[5, 6]);
        workload.send(7);
        client.hears_nothing();
        hold.open().unwrap();
        workload.send(8);
        client.hears(&[7, 8]);
        assert_eq!((hold.held().packets, hold.held().bytes, hold.held().dropped), (0, 0, 0));
    }
    Hold::remove(&name()).unwrap();
}

#[test]
fn output_of_a_routed_workload_waits_for_its_epoch() {
    output_waits_for_its_epoch(false);
}

#[test]
fn output_of_a_bridged_workload_waits_for_its_epoch() {
    output_waits_for_its_epoch(true);
}

fn input_waits_and_none_is_lost(bridged: bool) {
    let net = Net::new(bridged);
    let hold = hold(&net, false);
    for v in [0, 1] {
        let (mut workload, mut client) = net.pair(v);
        for _ in 0..3 {
            hold.hold_input().unwrap();
            client.send(1);
            client.send(2);
            workload.hears_nothing();
            workload.send(9);
            client.hears(&[9]);
            hold.pass_input().unwrap();
            workload.hears(&[1, 2]);
            client.send(3);
            workload.hears(&[3]);
        }
    }
    Hold::remove(&name()).unwrap();
}

#[test]
fn input_of_a_routed_workload_waits_and_none_is_lost() {
    input_waits_and_none_is_lost(false);
}

#[test]
fn input_of_a_bridged_workload_waits_and_none_is_lost() {
    input_waits_and_none_is_lost(true);
}

#[test]
fn what_the_host_itself_sends_waits_too() {
    let net = Net::new(false);
    let hold = hold(&net, false);
    let server = net.in_workload(|| std::net::UdpSocket::bind((WORKLOAD[0], 0)).unwrap());
    server.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
    let client = std::net::UdpSocket::bind("10.9.0.1:0").unwrap();
    hold.hold_input().unwrap();
    client.send_to(b"x", server.local_addr().unwrap()).unwrap();
    assert!(server.recv(&mut [0; 4]).is_err());
    hold.pass_input().unwrap();
    assert_eq!(server.recv(&mut [0; 4]).unwrap(), 1);
    Hold::remove(&name()).unwrap();
}

/// Fail closed: the end of who holds lets nothing out, and who comes next holds from the first moment on.
#[test]
fn the_end_of_the_holder_lets_nothing_out() {
    let net = Net::new(false);
    let (mut workload, mut client) = net.pair(0);
    let first = hold(&net, true);
    workload.send(1);
    client.hears_nothing();
    drop(first);
    workload.send(2);
    client.hears_nothing();
    let second = hold(&net, true);
    workload.send(3);
    client.hears_nothing();
    second.mark(epoch(1)).unwrap();
    second.release(epoch(1)).unwrap();
    client.hears(&[3]);
    drop(second);
    Hold::remove(&name()).unwrap();
    workload.send(4);
    client.hears(&[4]);
    // Once more: nothing is there.
    Hold::remove(&name()).unwrap();
}

/// What the guard does when the lease ends: nothing that waited leaves afterwards, whatever the holder says.
#[test]
fn a_link_that_is_set_down_drops_what_waits() {
    let net = Net::new(false);
    let (mut workload, mut client) = net.pair(0);
    let hold = hold(&net, true);
    workload.send(1);
    hold.mark(epoch(1)).unwrap();
    net.link("down");
    hold.release(epoch(1)).unwrap();
    client.hears_nothing();
    net.link("up");
    hold.open().unwrap();
    client.hears_nothing();
    Hold::remove(&name()).unwrap();
}

#[test]
fn others_are_not_disturbed() {
    let net = Net::new(false);
    let hold = Hold::make(&name(), marks(9999, "10.1.2.3"), None, true).unwrap();
    hold.hold_input().unwrap();
    let other: Name = "other".parse().unwrap();
    let beside = Hold::make(&other, marks(9998, "10.1.2.4"), None, true).unwrap();
    let (mut workload, mut client) = net.pair(0);
    workload.send(1);
    client.hears(&[1]);
    client.send(2);
    workload.hears(&[2]);
    drop((hold, beside));
    Hold::remove(&name()).unwrap();
    Hold::remove(&other).unwrap();
}

#[test]
fn a_workload_without_a_device_cannot_have_its_output_held() {
    let net = Net::new(false);
    let marks = || Marks { addresses: vec![WORKLOAD[0].parse().unwrap()], ..Marks::default() };
    assert!(matches!(Hold::make(&name(), marks(), None, true), Err(HoldError::NoDevice)));
    let hold = Hold::make(&name(), marks(), None, false).unwrap();
    assert!(matches!(hold.hold_output(), Err(HoldError::NoDevice)));
    let (mut workload, mut client) = net.pair(0);
    hold.hold_input().unwrap();
    client.send(1);
    workload.hears_nothing();
    hold.pass_input().unwrap();
    workload.hears(&[1]);
    Hold::remove(&name()).unwrap();
}

/// Segments that the kernel has not cut yet wait whole, and arrive as they were sent.
#[test]
fn a_stream_through_many_epochs_arrives_whole() {
    const BYTES: usize = 32 << 20;
    let net = Net::new(false);
    let hold = hold(&net, true);
    let listener = net.in_workload(|| TcpListener::bind((WORKLOAD[0], 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let pattern: Vec<u8> = (0..BYTES).map(|i| ((i / 7) ^ (i >> 13)) as u8).collect();
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| listener.accept().unwrap().0.write_all(&pattern).unwrap());
        let receiving = scope.spawn(|| {
            let mut got = Vec::new();
            let mut stream = net.in_client(|| TcpStream::connect(address).unwrap());
            stream.read_to_end(&mut got).unwrap();
            got
        });
        for number in 1.. {
            hold.hold_input().unwrap();
            hold.mark(epoch(number)).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(2));
            hold.pass_input().unwrap();
            hold.release(epoch(number)).unwrap();
            if receiving.is_finished() {
                break;
            }
        }
        sending.join().unwrap();
        assert!(receiving.join().unwrap() == pattern);
    });
    assert_eq!(hold.held().dropped, 0);
    Hold::remove(&name()).unwrap();
}
