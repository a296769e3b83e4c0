//! What an operator says about etcd, and that it can be so.

use std::{
    fmt, fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hyper::Uri;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName, pem::PemObject},
};

/// The shortest that etcd gives: with its own defaults it raises anything below to this.
pub const TTL_MIN: Duration = Duration::from_secs(2);
/// The longest: for so long nobody takes over after a host was lost.
pub const TTL_MAX: Duration = Duration::from_secs(300);
/// The shortest time that a request may be given.
pub const REQUEST_TIMEOUT_MIN: Duration = Duration::from_millis(100);
/// More members than any etcd should have.
pub const ENDPOINTS_MAX: usize = 9;
/// The longest file of certificates that is taken; a system's whole bundle is a fifth of it.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// How to reach etcd, as an operator says it. [`Etcd::new`] checks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Client URLs of its members, `https://HOST:PORT`; `http://` to loopback only. Tried in turn.
    pub endpoints: Vec<String>,
    /// How long a key stays that is not extended: whole seconds, from [`TTL_MIN`] to [`TTL_MAX`].
    pub ttl: Duration,
    /// What all keys begin with, without a slash at its end.
    pub prefix: String,
    /// PEM: who signs the members' certificates. Needed for `https`.
    pub ca: Option<PathBuf>,
    /// PEM: this host's certificate, if etcd wants one (`--client-cert-auth`).
    pub cert: Option<PathBuf>,
    /// PEM: the key of `cert`.
    pub key: Option<PathBuf>,
    /// Whom to be there, if etcd's authentication is enabled. (Its gateway knows nobody by the certificate alone.)
    pub user: Option<String>,
    /// Holds that user's password, in its first line.
    pub password_file: Option<PathBuf>,
    /// How long one member may take for one answer, connecting included: from [`REQUEST_TIMEOUT_MIN`] to a quarter of `ttl`,
    /// so that others are tried before a key ends. `None`: an eighth.
    pub request_timeout: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            ttl: Duration::from_secs(10),
            prefix: "/standin".to_owned(),
            ca: None,
            cert: None,
            key: None,
            user: None,
            password_file: None,
            request_timeout: None,
        }
    }
}

/// Why settings cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// None.
    #[error("no etcd endpoint is named: say endpoints = [\"https://HOST:2379\"]")]
    NoEndpoints,
    /// Too many.
    #[error("{0} etcd endpoints are named: name at most {ENDPOINTS_MAX}")]
    TooManyEndpoints(usize),
    /// Not a URL of a member.
    #[error(
        "etcd endpoint {0:?} is not of the form https://HOST:PORT: write it as etcd's --advertise-client-urls has it"
    )]
    Endpoint(String),
    /// Anybody on the way could say who holds the key.
    #[error(
        "etcd endpoint {0:?} is not encrypted, and not on this host: use https there, with etcd's --cert-file and --key-file"
    )]
    Plain(String),
    /// Nothing to check certificates by.
    #[error("etcd endpoint {0:?} needs `ca`: the file with the certificate that signed etcd's --cert-file")]
    NoCa(String),
    /// Out of bounds, or not whole.
    #[error("an etcd TTL of {ttl:?} cannot be: say whole seconds from {} to {} (etcd itself raises shorter ones)", TTL_MIN.as_secs(), TTL_MAX.as_secs())]
    Ttl {
        /// As given.
        ttl: Duration,
    },
    /// Out of bounds.
    #[error(
        "an etcd request timeout of {timeout:?} cannot be with a TTL of {ttl:?}: say {REQUEST_TIMEOUT_MIN:?} to a quarter of the TTL"
    )]
    RequestTimeout {
        /// As given.
        timeout: Duration,
        /// As given.
        ttl: Duration,
    },
    /// Not a prefix.
    #[error("{0:?} is no prefix for etcd's keys: use 1 to 200 visible ASCII characters, not ending in '/'")]
    Prefix(String),
    /// One of two that belong together.
    #[error("`{given}` is set for etcd and `{missing}` is not: set both or neither")]
    Alone {
        /// Is there.
        given: &'static str,
        /// Is not.
        missing: &'static str,
    },
    /// The file cannot be read.
    #[error("cannot read etcd's `{setting}` {}: {source}; check the path and who may read it", path.display())]
    Read {
        /// Which.
        setting: &'static str,
        /// Its value.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file does not hold that.
    #[error("etcd's `{setting}` {} does not serve: {reason}; look at it with `openssl {look} -noout -text -in {}`", path.display(), path.display())]
    Content {
        /// Which.
        setting: &'static str,
        /// Its value.
        path: PathBuf,
        /// In words.
        reason: String,
        /// What shows it.
        look: &'static str,
    },
    /// A password that others can read is none.
    #[error("etcd's `password_file` {} is open to other users: check who had access, then `chmod 600 {}`", path.display(), path.display())]
    Open {
        /// Its value.
        path: PathBuf,
    },
    /// An empty first line.
    #[error("etcd's `password_file` {} has no password in its first line: write it there", path.display())]
    NoPassword {
        /// Its value.
        path: PathBuf,
    },
}

/// Settings that were checked, with what their files held: cheap to clone, one for all claimants of a host.
#[derive(Clone)]
pub struct Etcd(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) ttl: Duration,
    pub(super) prefix: String,
    pub(super) request_timeout: Duration,
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) login: Option<Login>,
    /// For errors.
    pub(super) settings: Settings,
}

pub(super) struct Endpoint {
    /// As given.
    pub(super) url: String,
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls_name: Option<ServerName<'static>>,
}

pub(super) struct Login {
    pub(super) user: String,
    pub(super) password: String,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the password.
        f.debug_tuple("Etcd").field(&self.0.settings).finish()
    }
}

impl Etcd {
    /// Checks settings and reads their files. Reaches for nothing on the network.
    pub fn new(settings: Settings) -> Result<Self, SettingsError> {
        let ttl = settings.ttl;
        if ttl < TTL_MIN || ttl > TTL_MAX || ttl.subsec_nanos() != 0 {
            return Err(SettingsError::Ttl { ttl });
        }
        let request_timeout = settings.request_timeout.unwrap_or(ttl / 8);
        if request_timeout < REQUEST_TIMEOUT_MIN || request_timeout > ttl / 4 {
            return Err(SettingsError::RequestTimeout { timeout: request_timeout, ttl });
        }
        let prefix = settings.prefix.clone();
        if !(1..=200).contains(&prefix.len())
            || prefix.ends_with('/')
            || !prefix.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(SettingsError::Prefix(prefix));
        }
        let endpoints = endpoints(&settings)?;
        let tls = tls(&settings, &endpoints)?;
        let login = login(&settings)?;
        Ok(Self(Arc::new(Inner { endpoints, ttl, prefix, request_timeout, tls, login, settings })))
    }

    /// How long a key stays that is not extended.
    pub fn ttl(&self) -> Duration {
        self.0.ttl
    }
}

fn endpoints(settings: &Settings) -> Result<Vec<Endpoint>, SettingsError> {
    match settings.endpoints.len() {
        0 => Err(SettingsError::NoEndpoints),
        1..=ENDPOINTS_MAX => settings.endpoints.iter().map(|url| endpoint(url)).collect(),
        many => Err(SettingsError::TooManyEndpoints(many)),
    }
}

fn endpoint(url: &str) -> Result<Endpoint, SettingsError> {
    let wrong = || SettingsError::Endpoint(url.to_owned());
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let authority = uri.authority().ok_or_else(wrong)?;
    let named = authority.as_str().contains('@') || !matches!(uri.path(), "" | "/") || uri.query().is_some();
    let port = authority.port_u16().ok_or_else(wrong)?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    if named || host.is_empty() {
        return Err(wrong());
    }
    let tls_name = match uri.scheme_str() {
        Some("https") => Some(ServerName::try_from(host.clone()).map_err(|_: InvalidDnsNameError| wrong())?),
        Some("http") if is_loopback(&host) => None,
        Some("http") => return Err(SettingsError::Plain(url.to_owned())),
        _ => return Err(wrong()),
    };
    Ok(Endpoint { url: url.trim_end_matches('/').to_owned(), host, port, tls_name })
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn tls(settings: &Settings, endpoints: &[Endpoint]) -> Result<Option<Arc<ClientConfig>>, SettingsError> {
    both(("cert", settings.cert.is_some()), ("key", settings.key.is_some()))?;
    let Some(encrypted) = endpoints.iter().find(|endpoint| endpoint.tls_name.is_some()) else {
        return Ok(None);
    };
    let Some(ca) = &settings.ca else { return Err(SettingsError::NoCa(encrypted.url.clone())) };
    let content = |setting, path: &Path, look| {
        let path = path.to_owned();
        move |reason: String| SettingsError::Content { setting, path, reason, look }
    };
    let mut roots = RootCertStore::empty();
    for root in certificates("ca", ca)? {
        roots.add(root).map_err(|e| content("ca", ca, "x509")(e.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring has what TLS 1.3 needs")
        .with_root_certificates(roots);
    let mut config = match (&settings.cert, &settings.key) {
        (Some(cert), Some(key)) => {
            let chain = certificates("cert", cert)?;
            let secret = PrivateKeyDer::from_pem_slice(&read("key", key)?)
                .map_err(|e| content("key", key, "pkey")(e.to_string()))?;
            builder
                .with_client_auth_cert(chain, secret)
                .map_err(|e| content("key", key, "pkey")(format!("with {}: {e}", cert.display())))?
        }
        _ => builder.with_no_client_auth(),
    };
    // Without it etcd would have to guess from the first bytes.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Some(Arc::new(config)))
}

fn certificates(setting: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, SettingsError> {
    let bad = |reason| SettingsError::Content { setting, path: path.to_owned(), reason, look: "x509" };
    let all: Vec<_> = CertificateDer::pem_slice_iter(&read(setting, path)?)
        .collect::<Result<_, _>>()
        .map_err(|e| bad(e.to_string()))?;
    if all.is_empty() { Err(bad("there is no certificate in it".to_owned())) } else { Ok(all) }
}

fn login(settings: &Settings) -> Result<Option<Login>, SettingsError> {
    use std::os::unix::fs::MetadataExt;
    both(("user", settings.user.is_some()), ("password_file", settings.password_file.is_some()))?;
    let (Some(user), Some(path)) = (&settings.user, &settings.password_file) else { return Ok(None) };
    let text = read("password_file", path)?;
    let io = |source| SettingsError::Read { setting: "password_file", path: path.clone(), source };
    if fs::metadata(path).map_err(io)?.mode() & 0o077 != 0 {
        return Err(SettingsError::Open { path: path.clone() });
    }
    let text = String::from_utf8(text).map_err(|e| io(io::Error::other(e.utf8_error())))?;
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(Some(Login { user: user.clone(), password: line.to_owned() })),
        _ => Err(SettingsError::NoPassword { path: path.clone() }),
    }
}

fn both(first: (&'static str, bool), second: (&'static str, bool)) -> Result<(), SettingsError> {
    match (first.1, second.1) {
        (true, false) => Err(SettingsError::Alone { given: first.0, missing: second.0 }),
        (false, true) => Err(SettingsError::Alone { given: second.0, missing: first.0 }),
        _ => Ok(()),
    }
}

fn read(setting: &'static str, path: &Path) -> Result<Vec<u8>, SettingsError> {
    use io::Read;
    let error = |source| SettingsError::Read { setting, path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(error)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(error)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(error(io::Error::other(format!("it is longer than {FILE_BYTES_MAX} bytes"))));
    }
    Ok(bytes)
}
