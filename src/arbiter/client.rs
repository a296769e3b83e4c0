//! Requests to etcd's JSON gateway: one connection, the next member when one fails, a token where authentication is enabled.

use std::{error::Error, io, sync::Arc};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, body::Bytes, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use rustls::{AlertDescription, CertificateError};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};

use super::settings::{Endpoint, Inner};

/// The longest answer that is taken: two small keys, and room for what an operator may have put there.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// gRPC's codes that etcd answers with.
mod code {
    pub(super) const DEADLINE_EXCEEDED: i64 = 4;
    pub(super) const NOT_FOUND: i64 = 5;
    pub(super) const PERMISSION_DENIED: i64 = 7;
    pub(super) const UNAVAILABLE: i64 = 14;
    pub(super) const UNAUTHENTICATED: i64 = 16;
}

/// Why etcd did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// This member did not answer, or is no etcd.
    #[error("etcd at {endpoint} cannot be asked: {reason}")]
    Unreachable {
        /// Which.
        endpoint: String,
        /// With what to do.
        reason: String,
    },
    /// It answered with an error.
    #[error("etcd at {endpoint} refuses: {message}{remedy}")]
    Refused {
        /// Which.
        endpoint: String,
        /// gRPC's.
        code: i64,
        /// Its words.
        message: String,
        /// What to do, if that is known.
        remedy: String,
    },
    /// A key holds what nobody here wrote.
    #[error(
        "{key} in etcd is not as Standin writes it ({reason}): see `etcdctl get {key}`; once no host runs the workload, `etcdctl del {key}`"
    )]
    Foreign {
        /// Which.
        key: String,
        /// Of the parser.
        reason: String,
    },
    /// Others wrote in between, again and again.
    #[error("{0} in etcd is written by others all the time: are there two hosts with one name?")]
    Contended(String),
    /// The answer came when it was worth nothing any more.
    #[error(
        "etcd answers too slowly: the key had ended before it was known to be there; look at its disk and load, or use a longer TTL"
    )]
    Slow,
    /// Forgetting a workload that somebody holds.
    #[error("{host} holds the workload's key in etcd: withdraw it there first")]
    Held {
        /// Who.
        host: String,
    },
}

impl EtcdError {
    /// Another member may well do it.
    fn is_of_member(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused { code, .. } => matches!(*code, code::UNAVAILABLE | code::DEADLINE_EXCEEDED),
            _ => false,
        }
    }

    /// No member could be asked, as opposed to: one said no.
    pub(super) fn is_unreachable(&self) -> bool {
        self.is_of_member()
    }

    fn is_of_token(&self) -> bool {
        matches!(self, Self::Refused { code, message, .. }
            if *code == code::UNAUTHENTICATED || message.contains("auth: revision in header is old")
                || message.contains("revision of auth store is old"))
    }

    /// What was named is not there (any more).
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: code::NOT_FOUND, .. })
    }

    /// What was to be made is there.
    pub(super) fn is_already_there(&self) -> bool {
        matches!(self, Self::Refused { message, .. } if message.contains("lease already exists"))
    }
}

pub(super) struct Client {
    etcd: Arc<Inner>,
    /// Whose turn it is.
    at: usize,
    /// To that member. Taken while a request is under way: one that breaks off takes its connection with it.
    connection: Option<Connection>,
    token: Option<String>,
}

/// Ends with its value.
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    task: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Client {
    pub(super) fn new(etcd: Arc<Inner>) -> Self {
        Self { etcd, at: 0, connection: None, token: None }
    }

    /// The member that was asked last.
    pub(super) fn endpoint(&self) -> &str {
        &self.etcd.endpoints[self.at].url
    }

    /// Posts a request, to each member at most once (and once more where an old connection had gone). What was done may have
    /// been done more than once.
    pub(super) async fn call(&mut self, path: &str, body: &Value) -> Result<Value, EtcdError> {
        let body = Bytes::from(body.to_string());
        let mut members = self.etcd.endpoints.len();
        loop {
            let used = self.connection.is_some();
            let answer = match self.call_member(path, &body).await {
                Err((e, _)) if e.is_of_token() && self.token.take().is_some() => {
                    self.call_member(path, &body).await
                }
                answer => answer,
            };
            let (error, late) = match answer {
                Ok(value) => return Ok(value),
                Err((e, late)) if e.is_of_member() => (e, late),
                Err((e, _)) => return Err(e),
            };
            self.connection = None;
            if used && !late {
                continue;
            }
            self.at = (self.at + 1) % self.etcd.endpoints.len();
            members -= 1;
            if members == 0 {
                return Err(error);
            }
        }
    }

    /// The error comes with whether it was the time that was over.
    async fn call_member(&mut self, path: &str, body: &Bytes) -> Result<Value, (EtcdError, bool)> {
        let etcd = self.etcd.clone();
        let limit = etcd.request_timeout;
        if let Ok(answer) = timeout(limit, self.call_with_token(path, body)).await {
            return answer.map_err(|e| (e, false));
        }
        let reason = format!("no answer within {limit:?}; is it up, and nothing in the way?");
        Err((self.unreachable(reason), true))
    }

    async fn call_with_token(&mut self, path: &str, body: &Bytes) -> Result<Value, EtcdError> {
        let etcd = self.etcd.clone();
        if let (Some(login), None) = (&etcd.login, &self.token) {
            let who = json!({ "name": login.user, "password": login.password });
            let answer = self.post("/v3/auth/authenticate", Bytes::from(who.to_string())).await?;
            self.token = answer["token"].as_str().map(str::to_owned);
        }
        self.post(path, body.clone()).await
    }

    async fn post(&mut self, path: &str, body: Bytes) -> Result<Value, EtcdError> {
        let etcd = self.etcd.clone();
        let endpoint = &etcd.endpoints[self.at];
        let open = self.connection.take();
        let mut connection = if let Some(open) = open { open } else { self.connect(endpoint).await? };
        let mut request = Request::post(path)
            .header("host", format!("{}:{}", endpoint.host, endpoint.port))
            .header("content-type", "application/json");
        if let Some(token) = &self.token {
            request = request.header("authorization", token);
        }
        let request = request.body(Full::new(body)).map_err(|e| self.unreachable(e.to_string()))?;
        let response = connection.sender.send_request(request).await.map_err(|e| self.broken(&e))?;
        let bytes = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let bytes = bytes.map_err(|e| self.broken(e.as_ref()))?.to_bytes();
        let Ok(answer) = serde_json::from_slice::<Value>(&bytes) else {
            let start = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).trim().to_owned();
            return Err(self.unreachable(format!(
                "it answers {start:?} instead of JSON; name etcd's client URL, with https if it has a --cert-file, \
                 and let it run with --enable-grpc-gateway"
            )));
        };
        self.connection = Some(connection);
        self.understand(answer)
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<Connection, EtcdError> {
        let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port))
            .await
            .map_err(|e| self.unreachable(format!("{e}; is it up, and does it listen there?")))?;
        // A request is one small write that should leave at once.
        stream.set_nodelay(true).map_err(|e| self.unreachable(e.to_string()))?;
        match (&endpoint.tls_name, &self.etcd.tls) {
            (Some(name), Some(tls)) => {
                let connector = tokio_rustls::TlsConnector::from(tls.clone());
                let stream = connector.connect(name.clone(), stream).await.map_err(|e| self.broken(&e))?;
                self.handshake(stream).await
            }
            _ => self.handshake(stream).await,
        }
    }

    async fn handshake<S>(&self, stream: S) -> Result<Connection, EtcdError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(&e))?;
        let task = tokio::spawn(async move {
            // Its error is that of the request, too.
            let _ = connection.await;
        });
        Ok(Connection { sender, task })
    }

    fn unreachable(&self, reason: String) -> EtcdError {
        EtcdError::Unreachable { endpoint: self.endpoint().to_owned(), reason }
    }

    /// Takes an answer's envelope off; that of a stream has another one.
    fn understand(&self, mut answer: Value) -> Result<Value, EtcdError> {
        if !answer["error"].is_null() {
            let inner = &answer["error"];
            let text = [&answer["message"], &inner["message"], inner];
            let message = text.iter().find_map(|text| text.as_str()).unwrap_or("no reason given").to_owned();
            let code = answer["code"].as_i64().or(inner["grpc_code"].as_i64()).unwrap_or_default();
            let remedy = self.remedy(code, &message);
            return Err(EtcdError::Refused { endpoint: self.endpoint().to_owned(), code, message, remedy });
        }
        let result = answer["result"].take();
        Ok(if result.is_null() { answer } else { result })
    }

    fn remedy(&self, code: i64, message: &str) -> String {
        let settings = &self.etcd.settings;
        let user = settings.user.as_deref().unwrap_or("nobody");
        let file =
            settings.password_file.as_deref().map(|path| path.display().to_string()).unwrap_or_default();
        let says = |what: &str| message.contains(what);
        if says("authentication failed") {
            format!(
                "; check `user` ({user}) and the password in {file}: `etcdctl user passwd {user}` sets a new one"
            )
        } else if says("authentication is not enabled") {
            format!("; run `etcdctl auth enable` there, or take `user` ({user}) out of the configuration")
        } else if says("user name is empty") {
            "; its authentication is enabled: set `user` and `password_file`".to_owned()
        } else if code == code::PERMISSION_DENIED || says("permission denied") {
            let prefix = &self.etcd.prefix;
            format!(
                "; user {user} needs `etcdctl role grant-permission ROLE --prefix=true readwrite {prefix}/`"
            )
        } else if says("database space exceeded") {
            "; see `etcdctl endpoint status` and `etcdctl alarm list`: compact and defragment it".to_owned()
        } else {
            String::new()
        }
    }

    fn broken(&self, error: &(dyn Error + 'static)) -> EtcdError {
        let settings = &self.etcd.settings;
        let path = |path: &Option<std::path::PathBuf>| {
            path.as_deref().map_or_else(|| "not set".to_owned(), |path| path.display().to_string())
        };
        let Some(tls) = tls_error(error) else {
            let mut reason = error.to_string();
            let mut inner = error.source();
            while let Some(e) = inner {
                reason = format!("{reason}: {e}");
                inner = e.source();
            }
            // etcd closes a connection without a word that is plain where it should be encrypted.
            let remedy = if self.etcd.endpoints[self.at].tls_name.is_some() {
                "see its log"
            } else {
                "see its log, and name it with https if it has a --cert-file"
            };
            return self.unreachable(format!("{reason}; {remedy}"));
        };
        let remedy = match tls {
            rustls::Error::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadSignature,
            ) => format!(
                "`ca` ({}) did not sign its certificate: set it to the one that did",
                path(&settings.ca)
            ),
            rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            ) => "its certificate is for other names: name it by one of them, or have one made for this one"
                .to_owned(),
            rustls::Error::AlertReceived(
                AlertDescription::BadCertificate
                | AlertDescription::CertificateRequired
                | AlertDescription::UnknownCA
                | AlertDescription::CertificateUnknown
                | AlertDescription::CertificateExpired
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::DecryptError,
            ) => format!(
                "it wants a certificate that its --trusted-ca-file signed: set `cert` ({}) and `key` ({}) to such a pair",
                path(&settings.cert),
                path(&settings.key)
            ),
            rustls::Error::InvalidMessage(_) => {
                "it does not speak TLS there: does it run with --cert-file?".to_owned()
            }
            _ => "see `openssl s_client -connect` on it".to_owned(),
        };
        self.unreachable(format!("{tls}; {remedy}"))
    }
}

/// What TLS had to say, however deep it lies.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        // An io::Error hides the one that it was made of: its `source` is already that one's.
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}
