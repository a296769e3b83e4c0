//! What a container needs and its standby lacks is sent there, before it is protected: the primary's side. The other one is
//! [`super::arrival`].
//!
//! ```text
//!   find the container ─► what is missing there? ─► its image, its read-only mounts, one after the other ─► adopt, protect
//! ```
//!
//! Nothing is adopted, and no workload known, before all of it is there: if anything fails, nothing has to be undone here.
//! Whoever asked may go away: then it breaks off, as when the connection does.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::mpsc, task::JoinSet};

use super::{
    Agent,
    api::{ApiError, ErrorCode, ProtectRequest, ShipmentStatus},
    standby::lock,
};
use crate::{
    files::{InUse, Phase, ScanError, Scanner, Source},
    model::Name,
    transport::{Channel, Connection, PeerName, endpoint::ConnectError, supply::SendSupplyError},
    wire::{
        frame::{self, BODY_LEN_MAX, FrameError},
        message::{FileKind, FileRecord, FrameHead},
        supply::{END_LEN_MAX, ENTRY_BYTES, Size, Supply, SupplyAnswer, SupplyRequest},
    },
    workload::{
        container::{Candidate, EngineError, Lendable, Named, supply},
        spec::{Cidr, ImageId, LENT_FILE, Lent, MountRule},
    },
};

/// How long the standby may take to look what it has.
const ASK_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to put in its place what it has whole.
const SETTLE_LIMIT: Duration = Duration::from_secs(supply::UNPACK_LIMIT.as_secs() + 60);
/// An engine's archive is longer than the files in it, and is unpacked beside itself.
const ARCHIVE_FACTOR: u64 = 2;
/// So much longer than that it may be for all the names in it.
const ARCHIVE_NAMES_BYTES: u64 = 1 << 30;
/// Frames between the disk and the network.
const FRAMES_MAX: usize = 8;

/// Why something did not get there.
#[derive(Debug, thiserror::Error)]
enum ShipError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{what}: {source}")]
    Send { what: String, source: SendSupplyError },
    #[error("{what}: {source}")]
    Engine { what: String, source: EngineError },
    #[error("{what} cannot be read: {source}")]
    Read { what: String, source: io::Error },
    #[error("{what}: {source}; it must not change while it is sent: try again")]
    Scan { what: String, source: ScanError },
    #[error("{what}: {source}")]
    Frame { what: String, source: FrameError },
    #[error("{what} is neither a file nor a directory: the standby must have its own")]
    Kind { what: String },
    #[error("{what}: the work for it ended early")]
    Gone { what: String },
}

impl From<ShipError> for ApiError {
    fn from(error: ShipError) -> Self {
        let code = match &error {
            ShipError::Connect(ConnectError::Unknown(_)) => ErrorCode::NotFound,
            ShipError::Connect(_) => ErrorCode::Unreachable,
            ShipError::Send { source, .. } => match source {
                SendSupplyError::Refused { .. } => ErrorCode::Refused,
                _ => ErrorCode::Unreachable,
            },
            _ => ErrorCode::Refused,
        };
        Self::new(code, format!("nothing is protected: {error}"))
    }
}

/// What was sent, for people.
#[derive(Debug, Default)]
pub(super) struct Shipped {
    pub(super) lent: Vec<Lent>,
    pub(super) what: Vec<String>,
}

/// What is on its way of a workload that is to be protected.
#[derive(Debug)]
pub(super) struct Shipment {
    to: String,
    what: String,
    sent_bytes: Arc<AtomicU64>,
    total_bytes: u64,
}

impl Shipment {
    fn status(&self, name: &Name) -> ShipmentStatus {
        ShipmentStatus {
            name: name.clone(),
            to: self.to.clone(),
            what: self.what.clone(),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes,
        }
    }
}

/// One container's things on their way.
struct Shipping {
    agent: Arc<Agent>,
    name: Name,
    connection: Connection,
    shipped: Shipped,
}

/// Holds the name until all is there, or nothing.
struct Reserved {
    agent: Arc<Agent>,
    name: Name,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        lock(&self.agent.shipments).remove(&self.name);
    }
}

impl Agent {
    /// What is on its way to standbys.
    pub(super) fn shipments(&self) -> Vec<ShipmentStatus> {
        lock(&self.shipments).iter().map(|(name, shipment)| shipment.status(name)).collect()
    }

    /// Sends what the standby lacks.
    pub(super) async fn ship(
        self: &Arc<Self>,
        request: &ProtectRequest,
        named: &Named,
        (ips, mounts): (&[Cidr], &[MountRule]),
    ) -> Result<Shipped, ApiError> {
        request.pace.check().map_err(ApiError::invalid)?;
        let peer: PeerName = request.to.parse().map_err(ApiError::invalid)?;
        let _reserved = self.reserve(&request.name, &request.to)?;
        let (name, named, ips, mounts) = (request.name.clone(), named.clone(), ips.to_vec(), mounts.to_vec());
        let find = move || Candidate::find(&name, &named, &ips, &mounts);
        let found = tokio::task::spawn_blocking(find).await.map_err(ApiError::failed)?;
        let found = found.map_err(ApiError::refused)?;
        let connection = self.endpoint.connect(&peer, Channel::Supply).await.map_err(ShipError::from)?;
        let (image, files) = (found.image(), found.lendable().to_vec());
        let shipped = Shipped::default();
        let shipping = Shipping { agent: Arc::clone(self), name: request.name.clone(), connection, shipped };
        // Where QUIC is driven; it ends with this.
        let mut task = JoinSet::new();
        let thread = shipping.connection.thread().clone();
        task.spawn_on(shipping.run(image, files), &thread);
        match task.join_next().await {
            Some(Ok(done)) => Ok(done?),
            _ => Err(ApiError::failed("the task that sends it has ended")),
        }
    }

    /// Nobody else takes a name that is free as long as this is held.
    fn reserve(self: &Arc<Self>, name: &Name, to: &str) -> Result<Reserved, ApiError> {
        self.check_free(name)?;
        let mut shipments = lock(&self.shipments);
        let what = "nothing yet".to_owned();
        let shipment = Shipment { to: to.to_owned(), what, sent_bytes: Arc::default(), total_bytes: 0 };
        if shipments.contains_key(name) {
            return Err(ApiError::refused(format!("another `standin protect {name}` has just begun")));
        }
        shipments.insert(name.clone(), shipment);
        Ok(Reserved { agent: Arc::clone(self), name: name.clone() })
    }
}

impl Shipping {
    async fn run(mut self, image: Option<ImageId>, files: Vec<Lendable>) -> Result<Shipped, ShipError> {
        let ask = SupplyRequest::Ask {
            name: self.name.clone(),
            image: image.clone(),
            files: files.iter().map(|lendable| lendable.wanted.clone()).collect(),
        };
        let what = || "what the container needs".to_owned();
        let answer = self.connection.ask_supply(&ask, ASK_LIMIT).await;
        let answer = answer.map_err(|source| ShipError::Send { what: what(), source })?;
        let SupplyAnswer::Lacks { image: lacks_image, files: lacks } = answer else {
            let source = SendSupplyError::Unexpected(self.connection.peer().clone());
            return Err(ShipError::Send { what: what(), source });
        };
        if let Some(image) = image.filter(|_| lacks_image) {
            self.ship_image(image).await?;
        }
        // Numbers that were not asked for are nothing.
        for lendable in lacks.into_iter().filter_map(|number| files.get(number as usize)) {
            self.ship_files(lendable).await?;
        }
        self.connection.close();
        Ok(self.shipped)
    }

    async fn ship_image(&mut self, image: ImageId) -> Result<(), ShipError> {
        let what = format!("image {}", image.name);
        let failed = |source| ShipError::Engine { what: what.clone(), source };
        let asked = image.clone();
        let bytes = tokio::task::spawn_blocking(move || supply::image_bytes(&asked)).await;
        let bytes = bytes.map_err(|_| ShipError::Gone { what: what.clone() })?.map_err(failed)?;
        let room_bytes = bytes.saturating_mul(ARCHIVE_FACTOR);
        let size = Size { stream_bytes: room_bytes.saturating_add(ARCHIVE_NAMES_BYTES), room_bytes };
        let progress = self.begin(&what, bytes);
        let sent = |source| ShipError::Send { what: what.clone(), source };
        let supply = Supply::Image(image.clone());
        let ship = SupplyRequest::Ship { name: self.name.clone(), supply, size };
        let sender = self.connection.send_supply(&ship, ASK_LIMIT).await.map_err(sent)?;
        let Some(mut sender) = sender else { return Ok(()) };
        let mut export = supply::Export::begin(&image).await.map_err(failed)?;
        while let Some(mut bytes) = export.next().await.map_err(failed)? {
            while !bytes.is_empty() {
                let piece = bytes.split_to(bytes.len().min(BODY_LEN_MAX));
                let len = sender.frame(&FrameHead::Piece, piece).await.map_err(sent)?;
                progress.fetch_add(len, Ordering::Relaxed);
            }
        }
        sender.finish(SETTLE_LIMIT).await.map_err(sent)?;
        self.done(&what, &progress);
        Ok(())
    }

    async fn ship_files(&mut self, lendable: &Lendable) -> Result<(), ShipError> {
        let what = lendable.source.display().to_string();
        let (work_dir, source) = (self.agent.config.work_dir.clone(), lendable.source.clone());
        let looked = tokio::task::spawn_blocking(move || look(&work_dir, &source)).await;
        let (alone, digest, size) = looked.map_err(|_| ShipError::Gone { what: what.clone() })??;
        let dir = alone.as_ref().map_or_else(|| lendable.source.clone(), |alone| alone.dir.clone());
        let lent = Lent { inside: lendable.inside.clone(), digest, is_file: alone.is_some() };
        let progress = self.begin(&what, size.stream_bytes);
        let sent = |source| ShipError::Send { what: what.clone(), source };
        let supply = Supply::Files(lent.clone());
        let ship = SupplyRequest::Ship { name: self.name.clone(), supply, size };
        let sender = self.connection.send_supply(&ship, ASK_LIMIT).await.map_err(sent)?;
        if let Some(mut sender) = sender {
            let (frames_tx, mut frames) = mpsc::channel::<(FrameHead, Vec<u8>)>(FRAMES_MAX);
            let reading = tokio::task::spawn_blocking(move || read_files(&dir, &frames_tx));
            while let Some((head, body)) = frames.recv().await {
                let len = sender.frame(&head, body).await.map_err(sent)?;
                progress.fetch_add(len, Ordering::Relaxed);
            }
            let read = reading.await.map_err(|_| ShipError::Gone { what: what.clone() })?;
            read.map_err(|source| ShipError::Scan { what: what.clone(), source })?;
            sender.finish(SETTLE_LIMIT).await.map_err(sent)?;
            self.done(&what, &progress);
        }
        self.shipped.lent.push(lent);
        Ok(())
    }

    /// Says in `status` what is on its way.
    fn begin(&self, what: &str, total_bytes: u64) -> Arc<AtomicU64> {
        let sent_bytes = Arc::new(AtomicU64::new(0));
        let to = self.connection.peer().to_string();
        let shipment =
            Shipment { to, what: what.to_owned(), sent_bytes: Arc::clone(&sent_bytes), total_bytes };
        // The name is reserved as long as this runs.
        if let Some(reserved) = lock(&self.agent.shipments).get_mut(&self.name) {
            *reserved = shipment;
        }
        sent_bytes
    }

    fn done(&mut self, what: &str, sent_bytes: &AtomicU64) {
        let bytes = sent_bytes.load(Ordering::Relaxed);
        tracing::info!(name = %self.name, what, bytes, "sent to the standby");
        self.shipped.what.push(format!("{what}, {bytes} bytes, to {}", self.connection.peer()));
    }
}

/// A single file in a directory of its own, as trees are what can be sent.
struct Alone {
    dir: PathBuf,
}

impl Alone {
    fn copy(work_dir: &Path, file: &Path, metadata: &fs::Metadata) -> io::Result<Self> {
        static COPIES: AtomicU64 = AtomicU64::new(0);
        let number = COPIES.fetch_add(1, Ordering::Relaxed);
        let dir = work_dir.join(format!("supply-{}-{number}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&dir)?;
        let alone = Self { dir };
        let copy = alone.dir.join(LENT_FILE);
        fs::copy(file, &copy)?;
        std::os::unix::fs::chown(&copy, Some(metadata.uid()), Some(metadata.gid()))?;
        fs::set_permissions(&copy, metadata.permissions())?;
        let modified = fs::FileTimes::new().set_modified(metadata.modified()?);
        fs::File::open(&copy)?.set_times(modified)?;
        // So that the same file has the same digest the next time.
        fs::File::open(&alone.dir)?.set_times(modified)?;
        Ok(alone)
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            tracing::warn!(%error, path = %self.dir.display(), "a copy of a file stays");
        }
    }
}

/// The digest of a file or directory, and how much it is; of a file with its copy.
fn look(work_dir: &Path, source: &Path) -> Result<(Option<Alone>, String, Size), ShipError> {
    let what = || source.display().to_string();
    let read = |source| ShipError::Read { what: what(), source };
    let metadata = fs::metadata(source).map_err(read)?;
    if metadata.is_file() {
        let alone = Alone::copy(work_dir, source, &metadata).map_err(read)?;
        let (digest, size) = measure(&alone.dir, &what())?;
        Ok((Some(alone), digest, size))
    } else if metadata.is_dir() {
        let (digest, size) = measure(source, &what())?;
        Ok((None, digest, size))
    } else {
        Err(ShipError::Kind { what: what() })
    }
}

fn measure(dir: &Path, what: &str) -> Result<(String, Size), ShipError> {
    let mut scanner = Scanner::untracked(vec![Source::plain(dir)]);
    let mut size = Size { stream_bytes: END_LEN_MAX, room_bytes: 0 };
    let mut refused = None;
    let mut count = |record: FileRecord, body: &[u8]| {
        if let FileRecord::Entry { meta, .. } = &record {
            size.room_bytes += ENTRY_BYTES;
            if let FileKind::Regular { size: len } = meta.kind {
                size.room_bytes = size.room_bytes.saturating_add(len);
            }
        }
        match frame::encode_frame(&FrameHead::File(record), body.len()) {
            Ok(prefix) => size.stream_bytes += (prefix.len() + body.len()) as u64,
            Err(error) => refused = Some(error),
        }
    };
    let scanned = scanner.scan(Phase::Frozen, &InUse::default(), &mut count);
    scanned.map_err(|source| ShipError::Scan { what: what.to_owned(), source })?;
    if let Some(source) = refused {
        return Err(ShipError::Frame { what: what.to_owned(), source });
    }
    let digest = scanner.digest().ok_or_else(|| ShipError::Gone { what: what.to_owned() })?;
    Ok((blake3::Hash::from(digest).to_hex().to_string(), size))
}

fn read_files(dir: &Path, frames: &mpsc::Sender<(FrameHead, Vec<u8>)>) -> Result<(), ScanError> {
    let mut scanner = Scanner::untracked(vec![Source::plain(dir)]);
    let mut send = |record, body: &[u8]| {
        // Whoever takes them has given up: the rest is read for nothing.
        let _ = frames.blocking_send((FrameHead::File(record), body.to_vec()));
    };
    scanner.scan(Phase::Frozen, &InUse::default(), &mut send).map(drop)
}
