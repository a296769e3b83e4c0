//! The host's own identity: an Ed25519 key and a certificate that it signed itself, made once and kept.
//!
//! Both are in one file, so that no crash can leave one without the other. Nothing in the certificate is
//! believed but that its key made it; peers pin its fingerprint.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use super::private_file::{self, PrivateFileError};

/// The identity's file in its directory.
const FILE_NAME: &str = "identity.json";
/// Most bytes of that file.
const FILE_LEN_MAX: u64 = 64 * 1024;

/// BLAKE3 of a certificate: what a peer is known by. Shown as eight groups of eight hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; 32]);

/// Why a text is no fingerprint.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no fingerprint: 64 hexadecimal digits, in groups if you like, as `standin pair --list` shows them"
)]
pub struct FingerprintError(String);

impl Fingerprint {
    /// Of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(*blake3::hash(certificate).as_bytes())
    }

    /// The bare bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, group) in self.0.chunks(4).enumerate() {
            if number > 0 {
                f.write_str("-")?;
            }
            f.write_str(&to_hex(group))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(text: &str) -> Result<Self, FingerprintError> {
        let digits = text.replace('-', "");
        let bytes = from_hex(&digits).and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| FingerprintError(text.to_owned()))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = FingerprintError;

    fn try_from(text: String) -> Result<Self, FingerprintError> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.to_string()
    }
}

/// The key and certificate that this host shows to its peers.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
    fingerprint: Fingerprint,
}

/// Why there is no identity to work with.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file could not be read or written.
    #[error("this host's identity: {0}")]
    File(#[from] PrivateFileError),
    /// The file has another content.
    #[error("{} is no identity ({reason}): restore it from a backup, or remove it and pair again with every peer", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No key could be made.
    #[error("cannot make a key and certificate for this host: {0}")]
    Generate(#[from] rcgen::Error),
}

/// The content of the file.
#[derive(Serialize, Deserialize)]
struct Stored {
    certificate: String,
    private_key: String,
}

impl Identity {
    /// Loads the identity in `dir`, or makes one there. Two processes that do so at once get the same one.
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        private_file::make_dir(dir)?;
        let path = dir.join(FILE_NAME);
        if let Some(bytes) = private_file::read(&path, FILE_LEN_MAX)? {
            return Self::parse(&bytes, &path);
        }
        let made = Self::generate()?;
        let stored = Stored {
            certificate: to_hex(&made.certificate),
            private_key: to_hex(made.key.secret_pkcs8_der()),
        };
        let malformed = |reason: String| IdentityError::Malformed { path: path.clone(), reason };
        let bytes = serde_json::to_vec_pretty(&stored).map_err(|e| malformed(e.to_string()))?;
        if private_file::create(&path, &bytes)? {
            return Ok(made);
        }
        let bytes = private_file::read(&path, FILE_LEN_MAX)?.ok_or_else(|| PrivateFileError::Io {
            doing: "open",
            path: path.clone(),
            source: io::ErrorKind::NotFound.into(),
        })?;
        Self::parse(&bytes, &path)
    }

    /// What peers know this host by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    pub(super) fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.clone_key())
    }

    /// A secret for one purpose that is the same as long as the identity is.
    pub(super) fn derive_key(&self, purpose: &str) -> [u8; 32] {
        blake3::derive_key(purpose, self.key.secret_pkcs8_der())
    }

    fn generate() -> Result<Self, IdentityError> {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
        let mut params = rcgen::CertificateParams::new(Vec::new())?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "standin");
        let certificate = params.self_signed(&key)?;
        Ok(Self::new(certificate.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der())))
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self, IdentityError> {
        let malformed =
            |reason: &str| IdentityError::Malformed { path: path.to_owned(), reason: reason.into() };
        // serde_json quotes what it stumbles over, which may be the key: say only where.
        let stored: Stored = serde_json::from_slice(bytes)
            .map_err(|e| malformed(&format!("line {}, column {}", e.line(), e.column())))?;
        let certificate = from_hex(&stored.certificate).ok_or_else(|| malformed("the certificate"))?;
        let key = from_hex(&stored.private_key).ok_or_else(|| malformed("the private key"))?;
        Ok(Self::new(certificate.into(), key.into()))
    }

    fn new(certificate: CertificateDer<'static>, key: PrivatePkcs8KeyDer<'static>) -> Self {
        let fingerprint = Fingerprint::of(&certificate);
        Self { certificate, key, fingerprint }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("fingerprint", &self.fingerprint).finish_non_exhaustive()
    }
}

fn to_hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_identity_is_made_once_and_is_private() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("identity");
        let made = Identity::load_or_create(&dir).unwrap();
        let loaded = Identity::load_or_create(&dir).unwrap();
        assert_eq!(made.fingerprint(), loaded.fingerprint());
        assert_eq!(made.key, loaded.key);
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join(FILE_NAME))), (0o700, 0o600));
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn an_identity_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Identity::load_or_create(dir.path()).unwrap();
        let path = dir.path().join(FILE_NAME);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let refused = Identity::load_or_create(dir.path()).unwrap_err();
        assert!(refused.to_string().contains("chmod 600"), "{refused}");
    }

    #[test]
    fn a_damaged_identity_is_refused_and_its_key_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(dir.path()).unwrap();
        let key = to_hex(identity.key.secret_pkcs8_der());
        assert!(!format!("{identity:?}").contains(&key));
        let path = dir.path().join(FILE_NAME);
        let damaged = std::fs::read_to_string(&path).unwrap().replace("\"private_key\":", "");
        std::fs::write(&path, damaged).unwrap();
        let refused = Identity::load_or_create(dir.path()).unwrap_err();
        assert!(!format!("{refused:?} {refused}").contains(&key));
    }

    #[test]
    fn processes_that_start_together_agree_on_the_identity() {
        let dir = tempfile::tempdir().unwrap();
        let made: Vec<_> = std::thread::scope(|scope| {
            let load = || Identity::load_or_create(dir.path()).unwrap().fingerprint();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(load)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(made.iter().all(|fingerprint| *fingerprint == made[0]));
    }

    #[test]
    fn fingerprints_read_back_as_shown() {
        let fingerprint = Fingerprint(*blake3::hash(b"x").as_bytes());
        assert_eq!(fingerprint.to_string().parse::<Fingerprint>().unwrap(), fingerprint);
        assert_eq!(fingerprint.to_string().len(), 71);
        assert!("12-34".parse::<Fingerprint>().is_err());
        assert!("zz".repeat(32).parse::<Fingerprint>().is_err());
    }
}
