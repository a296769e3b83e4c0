//! What both ends agree on: the epochs, how a stream carries them, and TLS with the provider and cipher that the product uses.

use std::{
    fs,
    io::{Read, Write},
    path::Path as Dir,
    sync::Arc,
};

use bytes::Bytes;
use rustls::{
    CipherSuite, ClientConfig, RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
    version::TLS13,
};
use standin::{
    delta::{BatchHead, Form, Packing, PageRun},
    model::{Epoch, EpochId, Extent, Space, Term},
    wire::{
        epoch::{EpochReader, EpochWriter},
        frame::{HEADER_LEN, Header},
        message::{FrameHead, Manifest, SpaceMap},
    },
};

use crate::Result;

/// Batches of an epoch, of a MiB each: as long as a large epoch takes, and more than the caches hold.
const BATCHES: usize = 64;
const BATCH_LEN: usize = 1 << 20;
pub(crate) const ID: EpochId = EpochId { term: Term(1), epoch: Epoch(1) };

pub(crate) type Frames = Arc<[(FrameHead, Bytes)]>;

/// The frames of an epoch and their bodies.
pub(crate) fn epoch() -> Frames {
    let name = "bench".parse().expect("a name");
    let mut frames = vec![(FrameHead::Begin { name, id: ID, base: None }, Bytes::new())];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for number in 0..BATCHES as u64 {
        let runs = vec![PageRun { start: number << 20, pages: 256, zero: false }];
        let head = BatchHead { space: Space::Task(1), runs, form: Form::Pages, packing: Packing::Raw };
        let mut body = Vec::with_capacity(BATCH_LEN);
        while body.len() < BATCH_LEN {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            body.extend_from_slice(&random.to_le_bytes());
        }
        frames.push((FrameHead::Pages(head), body.into()));
    }
    let extents = vec![Extent { start: 0, pages: 256 * BATCHES as u64 }];
    let manifest = Manifest { spaces: vec![SpaceMap { space: Space::Task(1), extents }] };
    frames.push((FrameHead::Manifest(manifest), Bytes::new()));
    frames.into()
}

/// Writes an epoch to a stream and waits for the answer.
pub(crate) fn write_epoch(stream: &mut impl ReadWrite, frames: &Frames) -> Result<u64> {
    let mut writer = EpochWriter::new();
    for (head, body) in &**frames {
        stream.write_all(&writer.frame(head, body)?)?;
        stream.write_all(body)?;
    }
    stream.write_all(&writer.end()?)?;
    stream.flush()?;
    stream.read_exact(&mut [0])?;
    Ok(writer.bytes())
}

/// Reads epochs from a stream and answers them.
pub(crate) fn read_epochs(stream: &mut impl ReadWrite) -> Result<()> {
    loop {
        let mut reader = EpochReader::new();
        while !reader.is_whole() {
            let mut header = [0; HEADER_LEN];
            stream.read_exact(&mut header)?;
            let lens = Header::decode(&header)?;
            let (mut head, mut body) = (vec![0; lens.head_len], vec![0; lens.body_len]);
            stream.read_exact(&mut head)?;
            stream.read_exact(&mut body)?;
            reader.frame(&header, &head, &body)?;
        }
        stream.write_all(&[1])?;
        stream.flush()?;
    }
}

pub(crate) trait ReadWrite: Read + Write + Send {}
impl<T: Read + Write + Send> ReadWrite for T {}

fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// Makes a certificate, which the other end finds in the directory.
pub(crate) fn tls_server(dir: &Dir) -> Result<ServerConfig> {
    let made = rcgen::generate_simple_self_signed(["standin".to_owned()])?;
    fs::write(dir.join("certificate"), made.cert.der())?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    Ok(builder.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key.into())?)
}

pub(crate) fn tls_client(dir: &Dir) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(fs::read(dir.join("certificate"))?))?;
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}
