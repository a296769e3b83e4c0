//! Certificates, passwords, and settings that cannot serve.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use serde_json::json;
use standin::arbiter::{Etcd, Settings};

use crate::{
    Host, TTL,
    server::{Pki, Server},
};

fn encrypted(pki: &Pki, server: &Server) -> Settings {
    Settings {
        ca: Some(pki.path("ca.pem")),
        cert: Some(pki.path("client.pem")),
        key: Some(pki.path("client.key")),
        ..server.settings()
    }
}

#[tokio::test]
async fn both_sides_prove_themselves_by_certificates() {
    let (pki, stranger) = (Pki::new(), Pki::new());
    let server = Server::with_tls(&pki);
    let good = encrypted(&pki, &server);
    let mut a = Host::new(good.clone(), "a", Some(1), 1);
    a.held().await;
    a.held_times(2).await;

    let ca = Settings { ca: Some(stranger.path("ca.pem")), ..good.clone() };
    let error = Host::new(ca, "b", Some(2), 1).error().await;
    assert!(error.contains("did not sign its certificate") && error.contains("ca.pem"), "{error}");

    let none = Settings { cert: None, key: None, ..good.clone() };
    let error = Host::new(none, "b", Some(2), 1).error().await;
    assert!(error.contains("set `cert` (not set)"), "{error}");

    let foreign = encrypted(&stranger, &server);
    let foreign = Settings { ca: good.ca.clone(), ..foreign };
    let error = Host::new(foreign, "b", Some(2), 1).error().await;
    assert!(error.contains("a certificate that its --trusted-ca-file signed"), "{error}");

    let name = Settings { endpoints: vec![server.url.replace("127.0.0.1", "localhost")], ..good.clone() };
    let error = Host::new(name, "b", Some(2), 1).error().await;
    assert!(error.contains("its certificate is for other names"), "{error}");

    let plain = Settings { endpoints: vec![server.url.replace("https", "http")], ..good };
    let error = Host::new(plain, "b", Some(2), 1).error().await;
    assert!(error.contains("with https if it has a --cert-file"), "{error}");
    a.held().await;
}

fn password(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

#[tokio::test]
async fn a_user_needs_the_right_password_and_permission() {
    let mut server = Server::start();
    let key = |text: &str| data_encoding::BASE64.encode(text.as_bytes());
    for (path, body) in [
        ("user/add", json!({ "name": "root", "password": "secret of root" })),
        ("user/add", json!({ "name": "standin", "password": "secret" })),
        ("user/add", json!({ "name": "other", "password": "secret" })),
        ("role/add", json!({ "name": "root" })),
        ("role/add", json!({ "name": "keys" })),
        // From '/standin/' to '/standin0'.
        (
            "role/grant",
            json!({ "name": "keys", "perm": { "permType": "READWRITE", "key": key("/standin/"), "range_end": key("/standin0") } }),
        ),
        ("user/grant", json!({ "user": "root", "role": "root" })),
        ("user/grant", json!({ "user": "standin", "role": "keys" })),
    ] {
        server.post(&format!("/v3/auth/{path}"), &body);
    }
    let dir = tempfile::tempdir().unwrap();
    let right = Some(password(&dir, "right", "secret\n"));
    let user =
        |name: &str, file| Settings { user: Some(name.to_owned()), password_file: file, ..server.settings() };
    let (good, wrong) =
        (user("standin", right.clone()), user("standin", Some(password(&dir, "wrong", "Secret"))));
    let (other, nobody) = (user("other", right), server.settings());

    let error = Host::new(good.clone(), "b", Some(2), 1).error().await;
    assert!(error.contains("etcdctl auth enable"), "{error}");
    server.post("/v3/auth/enable", &json!({}));
    let mut a = Host::new(good.clone(), "a", Some(1), 1);
    a.held().await;
    let error = Host::new(wrong, "b", Some(2), 1).error().await;
    assert!(error.contains("etcdctl user passwd standin") && error.contains("/wrong"), "{error}");
    let error = Host::new(other, "b", Some(2), 1).error().await;
    assert!(error.contains("readwrite /standin/"), "{error}");
    let error = Host::new(nobody, "b", Some(2), 1).error().await;
    assert!(error.contains("set `user` and `password_file`"), "{error}");
    a.held().await;
    // Its tokens are forgotten when etcd ends.
    server.kill();
    a.refused().await;
    server.start_with_auth_again();
    a.held().await;
    a.want(None, 1);
    let mut b = Host::new(good, "b", Some(2), 1);
    b.held().await;
}

#[test]
fn settings_that_cannot_serve_are_refused_with_the_reason() {
    let pki = Pki::new();
    let fine = Settings {
        endpoints: vec!["https://etcd1.example:2379".to_owned(), "https://[2001:db8::1]:2379/".to_owned()],
        ca: Some(pki.path("ca.pem")),
        cert: Some(pki.path("client.pem")),
        key: Some(pki.path("client.key")),
        ..Settings::default()
    };
    Etcd::new(fine.clone()).unwrap();
    let endpoint = |url: &str| Settings { endpoints: vec![url.to_owned()], ..fine.clone() };
    Etcd::new(endpoint("http://[::1]:2379")).unwrap();
    Etcd::new(endpoint("http://localhost:2379")).unwrap();
    let open = pki.path("open");
    fs::write(&open, "secret").unwrap();
    let file =
        |path: PathBuf| Settings { user: Some("u".to_owned()), password_file: Some(path), ..fine.clone() };
    let dir = tempfile::tempdir().unwrap();
    let long = Some(Duration::from_secs(9));
    for (settings, reason) in [
        (Settings::default(), "no etcd endpoint"),
        (endpoint("http://192.0.2.1:2379"), "not encrypted"),
        (endpoint("etcd1:2379"), "of the form https://HOST:PORT"),
        (endpoint("https://etcd1"), "of the form https://HOST:PORT"),
        (endpoint("https://user@etcd1:2379"), "of the form https://HOST:PORT"),
        (endpoint("https://etcd1:2379/v3"), "of the form https://HOST:PORT"),
        (Settings { endpoints: vec!["http://[::1]:1".to_owned(); 10], ..fine.clone() }, "at most 9"),
        (Settings { ttl: Duration::from_secs(1), ..fine.clone() }, "etcd itself raises"),
        (Settings { ttl: TTL + TTL / 4, ..fine.clone() }, "whole seconds"),
        (Settings { request_timeout: long, ..fine.clone() }, "a quarter of the TTL"),
        (Settings { prefix: "/standin/".to_owned(), ..fine.clone() }, "no prefix"),
        (Settings { ca: None, ..fine.clone() }, "needs `ca`"),
        (Settings { ca: Some(pki.dir().join("gone")), ..fine.clone() }, "cannot read etcd's `ca`"),
        (Settings { ca: Some(pki.path("client.key")), ..fine.clone() }, "no certificate in it"),
        (Settings { key: None, ..fine.clone() }, "`cert` is set for etcd and `key` is not"),
        (Settings { key: Some(pki.path("server.key")), ..fine.clone() }, "openssl pkey"),
        (Settings { user: Some("u".to_owned()), ..fine.clone() }, "`password_file` is not"),
        (file(open), "chmod 600"),
        (file(password(&dir, "empty", "\n")), "no password"),
        (file(dir.path().join("gone")), "cannot read etcd's `password_file`"),
    ] {
        let error = Etcd::new(settings).unwrap_err().to_string();
        assert!(error.contains(reason), "{error:?} has no {reason:?}");
    }
}
