//! Sockets of every kind through power cuts, under output commit: none notices.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    net::{Shutdown, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    cluster::{Cluster, wait_for},
    committed::OUTLASTS,
    lab::Host,
    redis::{VIP, inside},
};

const WORKLOAD: &str = include_str!("sockets.py");

/// One connection to the workload.
struct Line(BufReader<TcpStream>);

impl Line {
    fn open(client: File) -> Self {
        let connect = || {
            let address = format!("{VIP}:7000").parse().expect("an address");
            let stream = TcpStream::connect_timeout(&address, OUTLASTS).expect("it is reached");
            stream.set_read_timeout(Some(OUTLASTS)).expect("a limit");
            stream
        };
        Self(BufReader::new(inside(client, connect).join().expect("it is reached")))
    }

    fn say(&mut self, order: &str) {
        self.0.get_mut().write_all(format!("{order}\n").as_bytes()).expect("the connection goes on");
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("the connection goes on");
        line.trim_end().to_owned()
    }

    fn ask(&mut self, order: &str) -> String {
        self.say(order);
        self.hear()
    }
}

/// Answers what the workload's own connection says; how many there were.
fn listen(client: File) -> Arc<AtomicU64> {
    let opened = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&opened);
    let listener = inside(client, || TcpListener::bind((Host::Client.ipv4(), 7100)).expect("it is free"));
    let listener = listener.join().expect("it is free");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            count.fetch_add(1, Ordering::SeqCst);
            let mut writer = stream.try_clone().expect("a descriptor");
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    writer.write_all(format!("{line}\n").as_bytes()).expect("it listens");
                }
            });
        }
    });
    opened
}

/// Reads what a half-closed connection still gives: each number once, in order. How many came.
fn drain(mut line: Line) -> Arc<AtomicU64> {
    let heard = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&heard);
    line.0.get_ref().shutdown(Shutdown::Write).expect("it is open");
    std::thread::spawn(move || {
        for number in 1_u64.. {
            assert_eq!(line.hear(), number.to_string());
            count.store(number, Ordering::SeqCst);
        }
    });
    heard
}

/// Datagrams may be lost; those that are answered are counted once each, and ever higher.
fn datagram(socket: &UdpSocket, before: u64) -> u64 {
    let mut buffer = [0; 100];
    for number in 0..100 {
        socket.send(format!("{number}").as_bytes()).expect("the network is there");
        if let Ok(length) = socket.recv(&mut buffer) {
            let said = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let count = said.split(' ').next().and_then(|count| count.parse().ok()).expect("a count");
            assert!(count > before, "{count} behind {before}");
            return count;
        }
    }
    panic!("no datagram is answered");
}

#[test]
fn sockets_of_every_kind_outlive_their_hosts() {
    let mut cluster = Cluster::up("sockets");
    let opened = listen(cluster.client_network());
    let program = ["/usr/bin/python3", "-c", WORKLOAD, Host::Client.ipv4()];
    let ip = format!("{VIP}/24");
    cluster.standin(Host::A, &[["run", "sockets", "--ip", &ip, "--"].as_slice(), &program].concat());
    let vip = format!("{VIP}/24@eth0");
    let protect = ["protect", "sockets", "--to", "b", "--commit", "output", "--vip", &vip];
    cluster.standin(Host::A, &protect);
    let client = || cluster.client_network();
    let (mut talks, mut corked, mut idle) =
        (Line::open(client()), Line::open(client()), Line::open(client()));
    assert_eq!(talks.ask("set"), "set");
    assert_eq!(idle.ask("echo once"), "once");
    let heard = drain(Line::open(client()));
    let datagrams = inside(client(), || {
        let socket = UdpSocket::bind((Host::Client.ipv4(), 0)).expect("a port");
        socket.connect((VIP, 7001)).expect("a route");
        socket.set_read_timeout(Some(Duration::from_millis(500))).expect("a limit");
        socket
    });
    let datagrams = datagrams.join().expect("a socket");
    let (mut here, mut there, mut round, mut counted) = (Host::A, Host::B, 0, 0);
    for _ in 0..2 {
        round += 1;
        assert_eq!(talks.ask("inner"), format!("{round} {round}"));
        assert_eq!(talks.ask("outward"), round.to_string());
        counted = datagram(&datagrams, counted);
        let mut short = Line::open(cluster.client_network());
        assert_eq!(short.ask("bye"), "");
        corked.say("cork first,");
        let before = heard.load(Ordering::SeqCst);
        wait_for("the half-closed one to be heard", || heard.load(Ordering::SeqCst) > before + 5);

        cluster.lab.kill(here);
        cluster.wait_state_of("sockets", there, "primary", "alone");

        round += 1;
        assert_eq!(talks.ask("inner"), format!("{round} {round}"));
        assert_eq!(talks.ask("outward"), round.to_string());
        assert_eq!(talks.ask("get"), "1 1 77");
        assert_eq!(corked.ask("uncork then"), "first,then");
        counted = datagram(&datagrams, counted);
        let before = heard.load(Ordering::SeqCst);
        wait_for("the half-closed one to go on", || heard.load(Ordering::SeqCst) > before + 5);
        assert_eq!(Line::open(cluster.client_network()).ask("echo new"), "new");

        cluster.lab.boot(here);
        cluster.start_agent(here);
        cluster.wait_state_of("sockets", there, "primary", "protected");
        (here, there) = (there, here);
    }
    assert_eq!(idle.ask("echo twice"), "twice");
    assert_eq!(opened.load(Ordering::SeqCst), 1, "the workload's own connection went on");
}
