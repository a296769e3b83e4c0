//! Debian's etcd, started for one test: on loopback, its data in a temporary directory.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use data_encoding::BASE64;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    PKCS_ECDSA_P256_SHA256,
};
use serde_json::{Value, json};
use standin::arbiter::Settings;
use tempfile::TempDir;

use crate::SOON;

/// One member. Killed when dropped.
pub(crate) struct Server {
    child: Option<Child>,
    arguments: Vec<String>,
    pub(crate) url: String,
    dir: TempDir,
}

impl Server {
    pub(crate) fn start() -> Self {
        let mut servers = Self::cluster(1);
        servers.remove(0)
    }

    pub(crate) fn cluster(size: usize) -> Vec<Self> {
        let ports: Vec<_> = (0..size).map(|_| (free_port(), free_port())).collect();
        let of_peers = |port: u16| format!("http://127.0.0.1:{port}");
        let all: Vec<_> = ports.iter().enumerate().map(|(n, p)| format!("m{n}={}", of_peers(p.1))).collect();
        let mut servers: Vec<_> = ports
            .iter()
            .enumerate()
            .map(|(n, p)| {
                let url = format!("http://127.0.0.1:{}", p.0);
                let more =
                    ["--name", &format!("m{n}"), "--initial-cluster", &all.join(",")].map(str::to_owned);
                Self::new(url, &of_peers(p.1), more.to_vec())
            })
            .collect();
        servers.iter_mut().for_each(Self::spawn);
        for server in &servers {
            server.wait();
        }
        servers
    }

    /// Encrypted, and only for clients with a certificate of the same CA.
    pub(crate) fn with_tls(pki: &Pki) -> Self {
        let url = format!("https://127.0.0.1:{}", free_port());
        let path = |name: &str| pki.path(name).to_str().unwrap().to_owned();
        let (cert, key, ca) = (path("server.pem"), path("server.key"), path("ca.pem"));
        let more = ["--cert-file", &cert, "--key-file", &key, "--trusted-ca-file", &ca, "--client-cert-auth"];
        let peer = format!("http://127.0.0.1:{}", free_port());
        let cluster = format!("default={peer}");
        let more = more.into_iter().chain(["--initial-cluster", &cluster]).map(str::to_owned);
        let mut server = Self::new(url, &peer, more.collect());
        server.spawn();
        server
    }

    fn new(url: String, peer: &str, more: Vec<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data").to_str().unwrap().to_owned();
        let named = [
            ("--data-dir", &*data),
            ("--listen-client-urls", &url),
            ("--advertise-client-urls", &url),
            ("--listen-peer-urls", peer),
            ("--initial-advertise-peer-urls", peer),
        ];
        let arguments = named.into_iter().flat_map(|(name, value)| [name.to_owned(), value.to_owned()]);
        let arguments = arguments.chain(more).collect();
        Self { child: None, arguments, url, dir }
    }

    fn spawn(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        // Ends with the test program however that ends.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "etcd"])
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("setpriv starts etcd: run scripts/setup");
        self.child = Some(child);
    }

    /// Until it serves what needs a leader.
    fn wait(&self) {
        let begun = Instant::now();
        while self.try_post("/v3/kv/range", &json!({ "key": "AA==" })).is_none() {
            assert!(begun.elapsed() < SOON, "etcd does not start: {}", self.log());
            sleep(Duration::from_millis(50));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub(crate) fn start_again(&mut self) {
        self.spawn();
        self.wait();
    }

    /// Who waits must be able to log in.
    pub(crate) fn start_with_auth_again(&mut self) {
        self.spawn();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().unwrap().id();
        kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings { endpoints: vec![self.url.clone()], ttl: crate::TTL, ..Settings::default() }
    }

    pub(crate) fn port(&self) -> u16 {
        self.url.rsplit(':').next().unwrap().parse().unwrap()
    }

    /// Without any of what is tested.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Value {
        self.try_post(path, body).unwrap_or_else(|| panic!("no answer to {path}: {}", self.log()))
    }

    fn try_post(&self, path: &str, body: &Value) -> Option<Value> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port())).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        let body = body.to_string();
        write!(stream, "POST {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let value: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
        value["error"].is_null().then_some(value)
    }

    /// The value of a workload's key.
    pub(crate) fn key(&self, last: &str) -> Option<Value> {
        let key = BASE64.encode(format!("/standin/{}/{last}", crate::WORKLOAD).as_bytes());
        let answer = self.post("/v3/kv/range", &json!({ "key": key }));
        let value = answer["kvs"][0]["value"].as_str()?;
        Some(serde_json::from_slice(&BASE64.decode(value.as_bytes()).unwrap()).unwrap())
    }

    pub(crate) fn top(&self) -> Option<u64> {
        self.key("term")?["term"].as_u64()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// A CA with certificates for a server and a client, as files.
pub(crate) struct Pki {
    dir: TempDir,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, label: &str, der: &[u8]| {
            let lines = BASE64.encode(der);
            let lines = lines.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap());
            let text = lines.collect::<Vec<_>>().join("\n");
            fs::write(
                dir.path().join(name),
                format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n"),
            )
            .unwrap();
        };
        let key = || KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = key();
        write("ca.pem", "CERTIFICATE", params.self_signed(&ca).unwrap().der());
        let issuer = Issuer::new(params, ca);
        for name in ["server", "client"] {
            let key = key();
            let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
            // etcd's gateway is a client of etcd, with the server's certificate.
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            let cert = params.signed_by(&key, &issuer).unwrap();
            write(&format!("{name}.pem"), "CERTIFICATE", cert.der());
            write(&format!("{name}.key"), "PRIVATE KEY", key.serialized_der());
        }
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }
}
