//! A dialer that speaks TLS and QUIC rightly and everything else wrongly.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use quinn::{
    ClientConfig, Endpoint, ServerConfig, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::{
    DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    sign::{CertifiedKey, SingleCertAndKey},
};
use standin::{
    transport::{Channel, endpoint::ConnectError, epoch::RecvEpochError, pairing::PAIRING_VALID_FOR},
    wire::{epoch::EpochWriter, frame::HEADER_LEN, message::EpochAnswer},
};

use crate::{
    Host,
    epoch::{begin, drain, manifest},
    paired, soon,
};

#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// What a host shows and signs with, read from its file.
struct Stolen {
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl Stolen {
    /// Shows the certificate and signs with the key, whether or not the two belong together.
    fn resolver(self) -> Arc<SingleCertAndKey> {
        let key = rustls::crypto::ring::sign::any_supported_type(&self.key.into()).unwrap();
        Arc::new(CertifiedKey::new(vec![self.certificate], key).into())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn steal(dir: &Path) -> Stolen {
    let text = std::fs::read_to_string(dir.join("identity.json")).unwrap();
    let stored: serde_json::Value = serde_json::from_str(&text).unwrap();
    let bytes = |field: &str| -> Vec<u8> {
        let digits = stored[field].as_str().unwrap();
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    };
    Stolen { certificate: bytes("certificate").into(), key: bytes("private_key").into() }
}

async fn dial(stolen: Option<Stolen>, alpn: &[u8], to: SocketAddr) -> Result<quinn::Connection, String> {
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible));
    let mut config = match stolen {
        Some(stolen) => config.with_client_cert_resolver(stolen.resolver()),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = if alpn.is_empty() { vec![] } else { vec![alpn.to_vec()] };
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
    soon(endpoint.connect_with(config, to, "x").unwrap()).await.map_err(|e| e.to_string())
}

/// Asserts that the other end closes without a byte of its own.
async fn assert_gets_nothing(connection: Result<quinn::Connection, String>) {
    let Ok(connection) = connection else { return };
    soon(async {
        // A stranger may send until it is found out; it gets nothing for it.
        if let Ok((mut send, mut recv)) = connection.open_bi().await {
            let _ = send.write_all(b"let me in").await;
            assert!(recv.read(&mut [0]).await.is_err());
        }
        assert!(connection.accept_uni().await.is_err());
        assert!(connection.read_datagram().await.is_err());
    })
    .await;
}

#[tokio::test]
async fn a_stranger_gets_no_byte_on_any_channel() {
    let (b, stranger) = (Host::new(), Host::new());
    for window_open in [false, true] {
        let window = window_open.then(|| b.endpoint.open_pairing(b.card("b"), PAIRING_VALID_FOR).unwrap());
        for alpn in [&b"standin-lease/4"[..], b"standin-bulk/4", b"h3", b""] {
            let stolen = steal(stranger.dir.path());
            assert_gets_nothing(dial(Some(stolen), alpn, b.addr()).await).await;
            assert_gets_nothing(dial(None, alpn, b.addr()).await).await;
        }
        drop(window);
    }
    tokio::time::timeout(Duration::from_millis(100), b.endpoint.accept()).await.unwrap_err();
}

#[tokio::test]
async fn a_peers_certificate_without_its_key_is_worth_nothing() {
    let (a, b) = paired();
    let key = steal(Host::new().dir.path()).key;
    // As a dialer.
    let mask = Stolen { key: key.clone_key(), ..steal(a.dir.path()) };
    assert_gets_nothing(dial(Some(mask), b"standin-lease/4", b.addr()).await).await;
    tokio::time::timeout(Duration::from_millis(100), b.endpoint.accept()).await.unwrap_err();
    // In the peer's place.
    let mask = Stolen { key, ..steal(b.dir.path()) };
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(mask.resolver());
    config.alpn_protocols = vec![b"standin-lease/4".to_vec()];
    let config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(config).unwrap()));
    let server = Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
    let mut claimed = b.as_peer("b");
    claimed.addr = server.local_addr().unwrap();
    a.endpoint.peers().add(claimed).unwrap();
    let name = "b".parse().unwrap();
    let (connected, served) = soon(async {
        tokio::join!(a.endpoint.connect(&name, Channel::Lease), async {
            server.accept().await.unwrap().await
        })
    })
    .await;
    assert!(matches!(connected, Err(ConnectError::Broken { .. })), "{connected:?}");
    assert!(served.is_err());
}

#[tokio::test]
async fn garbage_on_the_lease_channel_is_skipped() {
    let (a, b) = paired();
    let raw = dial(Some(steal(a.dir.path())), b"standin-lease/4", b.addr()).await.unwrap();
    let accepted = soon(b.endpoint.accept()).await.unwrap();
    let serve = tokio::spawn(async move {
        // Both end with the connection, having found nothing to hand out.
        let (datagram, request) = tokio::join!(accepted.recv_datagram(), accepted.accept_request());
        assert!(datagram.is_err() && request.is_err(), "{datagram:?} {request:?}");
    });
    for garbage in [&b""[..], &[0xff; 64], &[0, 0, 0, 0], &[3, 0, 0, 0, 9, 9, 9]] {
        raw.send_datagram(garbage.to_vec().into()).unwrap();
        let (mut send, mut recv) = raw.open_bi().await.unwrap();
        send.write_all(garbage).await.unwrap();
        send.finish().unwrap();
        assert!(soon(recv.read(&mut [0])).await.is_err(), "{garbage:?}");
    }
    raw.close(VarInt::from_u32(0), b"");
    soon(serve).await.unwrap();
}

/// The bytes of a small, right epoch.
fn epoch_bytes() -> Vec<u8> {
    let mut writer = EpochWriter::new();
    let mut bytes = writer.frame(&begin(), &[]).unwrap();
    bytes.extend(writer.frame(&manifest(1), &[]).unwrap());
    bytes.extend(writer.end().unwrap());
    bytes
}

#[tokio::test]
async fn a_damaged_or_cut_epoch_is_refused() {
    let (a, b) = paired();
    let raw = dial(Some(steal(a.dir.path())), b"standin-bulk/4", b.addr()).await.unwrap();
    let accepted = soon(b.endpoint.accept()).await.unwrap();
    assert_eq!(accepted.channel(), Channel::Bulk);
    let right = epoch_bytes();
    let mut longer = right.clone();
    longer.push(0);
    let mut hostile_len = right.clone();
    hostile_len[1..HEADER_LEN].fill(0xff);
    let cut = |len: usize| right[..right.len() - len].to_vec();
    let mut cases = vec![longer, hostile_len, cut(1), cut(right.len()), cut(right.len() - 4)];
    for at in 0..right.len() {
        let mut flipped = right.clone();
        flipped[at] ^= 0x10;
        cases.push(flipped);
    }
    for bytes in &cases {
        let (mut send, _recv) = raw.open_bi().await.unwrap();
        // The receiver may stop the stream before all of it is written.
        let _ = send.write_all(bytes).await;
        let _ = send.finish();
        let mut epoch = soon(accepted.accept_epoch()).await.unwrap();
        let refused = soon(drain(&mut epoch)).await;
        assert!(refused.is_err(), "{bytes:?}");
    }
    let (mut send, mut recv) = raw.open_bi().await.unwrap();
    send.write_all(&right).await.unwrap();
    send.finish().unwrap();
    let mut epoch = soon(accepted.accept_epoch()).await.unwrap();
    soon(drain(&mut epoch)).await.unwrap();
    epoch.answer(&EpochAnswer::Committed { id: crate::epoch::ID, busy_us: 1 }).await.unwrap();
    assert!(!soon(recv.read_to_end(1024)).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_connection_that_dies_in_an_epoch_is_an_error() {
    let (a, b) = paired();
    let raw = dial(Some(steal(a.dir.path())), b"standin-bulk/4", b.addr()).await.unwrap();
    let accepted = soon(b.endpoint.accept()).await.unwrap();
    let (mut send, _recv) = raw.open_bi().await.unwrap();
    send.write_all(&epoch_bytes()[..20]).await.unwrap();
    let mut epoch = soon(accepted.accept_epoch()).await.unwrap();
    raw.close(VarInt::from_u32(0), b"");
    let lost = soon(drain(&mut epoch)).await.unwrap_err();
    assert!(matches!(lost, RecvEpochError::Read { .. }), "{lost}");
}
