//! TLS 1.3 with pinned certificates on both sides.
//!
//! A certificate is accepted for its fingerprint alone; that the other end holds its key is proven by the
//! handshake's signature, which rustls' own code verifies.

use std::sync::Arc;

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError, CipherSuite, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::TLS13,
};

use super::{
    Channel, Fingerprint, Identity, PAIRING_ALPN, Peers,
    pairing::window::{Gate, Strangers},
};

/// TLS alert for a certificate that is no peer's (`access_denied`).
pub(super) const ALERT_NOT_PAIRED: u8 = 49;
/// TLS alert for a stranger who comes when the last pairing code is used up (`certificate_expired`).
pub(super) const ALERT_SPENT: u8 = 45;

/// Refuses a certificate with [`ALERT_NOT_PAIRED`].
const NOT_PAIRED: Error = Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
/// Refuses a certificate with [`ALERT_SPENT`].
const SPENT: Error = Error::InvalidCertificate(CertificateError::Expired);

/// Why an identity is of no use to TLS.
#[derive(Debug, thiserror::Error)]
#[error("TLS cannot work with this host's identity ({0}): remove its file and pair again with every peer")]
pub struct TlsError(String);

fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    // AES-128 first: epochs are encrypted on both hosts' CPUs, beside the workload, and it takes a tenth less
    // of them than AES-256, the library's first choice.
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// The accepting side.
pub(super) fn server(
    identity: &Identity,
    peers: Arc<Peers>,
    gate: Arc<Gate>,
) -> Result<QuicServerConfig, TlsError> {
    let provider = provider();
    let verifier = Arc::new(KnownClients { peers, gate, provider: provider.clone() });
    let error = |e: Error| TlsError(e.to_string());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(error)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate()], identity.key())
        .map_err(error)?;
    config.alpn_protocols =
        Channel::ALL.map(Channel::alpn).into_iter().chain([PAIRING_ALPN]).map(Into::into).collect();
    // A resumed session would not show its certificate again; a removed peer must not come back that way.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.try_into().map_err(|e: quinn::crypto::rustls::NoInitialCipherSuite| TlsError(e.to_string()))
}

/// The dialing side. Without an `expected` fingerprint any certificate goes: only for pairing, where the code
/// proves who is there.
pub(super) fn client(
    identity: &Identity,
    expected: Option<Fingerprint>,
    alpn: &[u8],
) -> Result<QuicClientConfig, TlsError> {
    let provider = provider();
    let verifier = Arc::new(PinnedServer { expected, provider: provider.clone() });
    let error = |e: Error| TlsError(e.to_string());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(error)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![identity.certificate()], identity.key())
        .map_err(error)?;
    config.alpn_protocols = vec![alpn.into()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    config.try_into().map_err(|e: quinn::crypto::rustls::NoInitialCipherSuite| TlsError(e.to_string()))
}

/// The certificate that the other end proved in the handshake.
pub(super) fn fingerprint_of(connection: &quinn::Connection) -> Option<Fingerprint> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().map(Fingerprint::of)
}

/// The protocol that was agreed in the handshake.
pub(super) fn alpn_of(connection: &quinn::Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

#[derive(Debug)]
struct PinnedServer {
    expected: Option<Fingerprint>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.expected {
            Some(expected) if expected != Fingerprint::of(end_entity) => Err(NOT_PAIRED),
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::ServerDoesNotSupportTls12Or13.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct KnownClients {
    peers: Arc<Peers>,
    gate: Arc<Gate>,
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for KnownClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if self.peers.by_fingerprint(&Fingerprint::of(end_entity)).is_some() {
            return Ok(ClientCertVerified::assertion());
        }
        // rustls does not tell which protocol was asked for; the endpoint closes a stranger's connection
        // right after the handshake unless it is for pairing.
        match self.gate.strangers() {
            Strangers::Expected => Ok(ClientCertVerified::assertion()),
            Strangers::TooLate => Err(SPENT),
            Strangers::Unexpected => Err(NOT_PAIRED),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
