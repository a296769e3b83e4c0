//! What a primary sends before its container is protected here: the standby's side. The other one is [`super::supply`].
//!
//! | what | comes | and is put |
//! |---|---|---|
//! | an image | into its daemon as it arrives | by the daemon, when it has the whole |
//! | files | into a directory of their own below `arriving` | by a rename, when their digest is right |
//!
//! Invariants: what is here already is never written to; nothing is put in its place that is not whole; what breaks off is
//! removed, by the next agent if this one ends; a peer fills no disk: it says what room it needs and gets no more, and some is
//! always left. Its consent this host has given by being paired.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::sys::statvfs::statvfs;
use tokio::sync::mpsc;

use super::{Agent, api::Role, durable};
use crate::{
    config::Config,
    files::{self, Receiver, Target},
    model::Name,
    transport::{Connection, PeerName, SupplyReceiver, supply::RecvSupplyError},
    wire::{
        message::{FileKind, FileRecord, FrameHead},
        supply::{ENTRY_BYTES, Size, Supply, SupplyAnswer, SupplyRequest},
    },
    workload::{
        container::{EngineError, supply},
        spec::{ImageId, LENT_FILE, Lent},
    },
};

/// Things that may arrive at once; more are refused.
pub(super) const ARRIVALS_MAX: usize = 4;
/// What is left free on a disk, whatever arrives.
const ROOM_LEFT_BYTES: u64 = 64 << 20;
/// How often the room is looked at.
const ROOM_CHECK_BYTES: u64 = 16 << 20;
/// Frames between the network and the disk.
const FRAMES_MAX: usize = 8;

/// Why something is not taken.
enum Stop {
    /// The peer is told.
    Refused(String),
    /// There is nobody to tell.
    Broken(RecvSupplyError),
}

impl From<RecvSupplyError> for Stop {
    fn from(error: RecvSupplyError) -> Self {
        Self::Broken(error)
    }
}

fn refused(error: impl std::fmt::Display) -> Stop {
    Stop::Refused(error.to_string())
}

/// Removes what an earlier agent had not put in its place.
pub(super) fn sweep(config: &Config) -> io::Result<()> {
    match fs::remove_dir_all(arriving(config)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn arriving(config: &Config) -> PathBuf {
    config.state_dir.join("arriving")
}

/// Serves a connection until it ends.
pub(super) async fn serve(agent: Arc<Agent>, connection: Connection) {
    while let Ok(receiver) = connection.accept_supply().await {
        let agent = Arc::clone(&agent);
        connection.thread().spawn(async move {
            let peer = receiver.peer().clone();
            if let Err(error) = receive(&agent, receiver).await {
                tracing::warn!(%peer, %error, "what the peer sends did not arrive; nothing of it is kept");
            }
        });
    }
}

async fn receive(agent: &Arc<Agent>, mut receiver: SupplyReceiver) -> Result<(), RecvSupplyError> {
    let request = receiver.request().await?;
    let peer = receiver.peer().clone();
    let taken = async {
        let Ok(_place) = agent.arrivals.try_acquire() else {
            return Err(refused("it is taking in as much as it can; try again in a while"));
        };
        match request {
            SupplyRequest::Ask { name, image, files } => {
                check_name(agent, &name, &peer).await?;
                lacks(image, files).await
            }
            SupplyRequest::Ship { name, supply, size } => {
                check_name(agent, &name, &peer).await?;
                tracing::info!(%peer, %name, ?supply, ?size, "arriving");
                match &supply {
                    Supply::Image(image) => take_image(image, &supply, size, &mut receiver).await,
                    Supply::Files(lent) => {
                        take_files(agent, (&name, lent), &supply, size, &mut receiver).await
                    }
                }
            }
        }
    };
    let answer = match taken.await {
        Ok(answer) => answer,
        Err(Stop::Refused(reason)) => {
            tracing::info!(%peer, reason, "refused");
            SupplyAnswer::Refused { reason }
        }
        Err(Stop::Broken(error)) => return Err(error),
    };
    receiver.answer(&answer).await
}

/// What is sent for a name must be for a workload that may come here.
async fn check_name(agent: &Agent, name: &Name, peer: &PeerName) -> Result<(), Stop> {
    match agent.workload_status(name).await {
        Ok(status) if status.role != Role::Standby || status.peer.as_deref() != Some(&peer.to_string()) => {
            Err(refused(format!("a workload named {name} is there, which is another one")))
        }
        _ => Ok(()),
    }
}

async fn lacks(image: Option<ImageId>, files: Vec<PathBuf>) -> Result<SupplyAnswer, Stop> {
    let look = move || {
        let image = image.as_ref().map(supply::has_image).transpose()?;
        let missing = files.iter().enumerate().filter(|(_, path)| !path.exists());
        let files = missing.map(|(number, _)| number as u32).collect();
        Ok(SupplyAnswer::Lacks { image: image == Some(false), files })
    };
    blocking(look).await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, Stop> {
    tokio::task::spawn_blocking(work).await.map_err(refused)?.map_err(refused)
}

async fn take_image(
    image: &ImageId,
    supply: &Supply,
    size: Size,
    receiver: &mut SupplyReceiver,
) -> Result<SupplyAnswer, Stop> {
    let asked = image.clone();
    let look = move || Ok((supply::has_image(&asked)?, supply::images_dir(asked.daemon)?));
    let (is_here, dir) = blocking(look).await?;
    if is_here {
        return Ok(SupplyAnswer::Held);
    }
    let mut room = Room::ensure(&dir, size.room_bytes)?;
    receiver.ready(supply, size).await?;
    let mut load = supply::Load::begin(image);
    while let Some((head, body)) = receiver.next_frame().await? {
        let FrameHead::Piece = head else { return Err(refused("no piece of an image")) };
        room.written(body.len() as u64)?;
        load.piece(body.into()).await.map_err(refused)?;
    }
    load.finish().await.map_err(refused)?;
    Ok(SupplyAnswer::Done)
}

async fn take_files(
    agent: &Agent,
    (name, lent): (&Name, &Lent),
    supply: &Supply,
    size: Size,
    receiver: &mut SupplyReceiver,
) -> Result<SupplyAnswer, Stop> {
    let place = durable::Place::of(&agent.config.state_dir, name);
    if lent.dir(&place.data()).exists() {
        return Ok(SupplyAnswer::Held);
    }
    let room = Room::ensure(&agent.config.state_dir, size.room_bytes)?;
    let staged = Staged::make(&arriving(&agent.config))
        .map_err(|error| refused(format!("a directory for it cannot be made: {error}")))?;
    receiver.ready(supply, size).await?;
    let (frames_tx, frames) = mpsc::channel::<Option<(FileRecord, Vec<u8>)>>(FRAMES_MAX);
    let (place, lent) = (place, lent.clone());
    let writing = tokio::task::spawn_blocking(move || {
        write(&staged, room, size, frames)
            .and_then(|whole| if whole { put(&staged, &place, &lent) } else { Ok(()) })
    });
    let mut broken = None;
    loop {
        let frame = match receiver.next_frame().await {
            Ok(Some((FrameHead::File(record), body))) => Some((record, body)),
            // The end; of others than files there are none.
            Ok(_) => None,
            Err(error) => {
                broken = Some(error);
                break;
            }
        };
        let ended = frame.is_none();
        // A disk that takes no more: its error is the one that counts.
        if frames_tx.send(frame).await.is_err() || ended {
            break;
        }
    }
    drop(frames_tx);
    let written = writing.await.map_err(refused)?;
    match broken {
        Some(error) => Err(Stop::Broken(error)),
        None => written.map(|()| SupplyAnswer::Done).map_err(Stop::Refused),
    }
}

/// Writes files as they come; whether they are whole.
fn write(
    staged: &Staged,
    mut room: Room,
    size: Size,
    mut frames: mpsc::Receiver<Option<(FileRecord, Vec<u8>)>>,
) -> Result<bool, String> {
    let mut receiver = Receiver::open(&[Target::plain(&staged.dir)]).map_err(|error| error.to_string())?;
    let mut promised = 0_u64;
    while let Some(frame) = frames.blocking_recv() {
        let Some((record, body)) = frame else {
            receiver.finish().map_err(|error| error.to_string())?;
            return Ok(true);
        };
        // By what files say they hold, as whoever reads them back (to see their digest) reads holes too.
        if let FileRecord::Entry { meta, .. } = &record {
            let len = if let FileKind::Regular { size } = meta.kind { size } else { 0 };
            promised = promised.saturating_add(len).saturating_add(ENTRY_BYTES);
            if promised > size.room_bytes {
                return Err("its files are larger than was announced".to_owned());
            }
        }
        room.written(body.len() as u64 + ENTRY_BYTES).map_err(|stop| match stop {
            Stop::Refused(reason) => reason,
            Stop::Broken(error) => error.to_string(),
        })?;
        receiver.apply(&record, &body).map_err(|error| error.to_string())?;
    }
    Ok(false)
}

/// Sees that the files are what they should be, and puts them in their place.
fn put(staged: &Staged, place: &durable::Place, lent: &Lent) -> Result<(), String> {
    let digest = blake3::Hash::from_hex(&lent.digest).map_err(|error| error.to_string())?;
    files::verify(vec![staged.dir.clone()], digest.as_bytes())
        .map_err(|_| "it has changed while it was sent: try again".to_owned())?;
    let file = staged.dir.join(LENT_FILE);
    if lent.is_file && !fs::symlink_metadata(file).is_ok_and(|found| found.is_file()) {
        return Err("it should be a file, and is none".to_owned());
    }
    let copies = lent.copies(&place.data());
    let rename = || {
        place.make()?;
        DirBuilder::new().recursive(true).mode(0o755).create(&copies)?;
        fs::rename(&staged.dir, lent.dir(&place.data()))?;
        fs::File::open(&copies)?.sync_all()
    };
    rename().map_err(|error| format!("it cannot be put into {}: {error}", copies.display()))
}

/// A new directory, which goes with this unless it was renamed.
struct Staged {
    dir: PathBuf,
}

impl Staged {
    fn make(arriving: &Path) -> io::Result<Self> {
        static ARRIVALS: AtomicU64 = AtomicU64::new(0);
        let dir = arriving.join(ARRIVALS.fetch_add(1, Ordering::Relaxed).to_string());
        DirBuilder::new().recursive(true).mode(0o700).create(arriving)?;
        DirBuilder::new().mode(0o700).create(&dir)?;
        Ok(Self { dir })
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, path = %self.dir.display(), "what broke off stays until the agent starts anew");
            }
            _ => {}
        }
    }
}

/// What is free where something is written to.
struct Room {
    dir: PathBuf,
    unseen_bytes: u64,
}

impl Room {
    fn ensure(dir: &Path, needed: u64) -> Result<Self, Stop> {
        let room = Self { dir: dir.to_owned(), unseen_bytes: 0 };
        room.check(needed)?;
        Ok(room)
    }

    /// Looks again from time to time.
    fn written(&mut self, bytes: u64) -> Result<(), Stop> {
        self.unseen_bytes += bytes;
        if self.unseen_bytes < ROOM_CHECK_BYTES {
            return Ok(());
        }
        self.unseen_bytes = 0;
        self.check(0)
    }

    fn check(&self, needed: u64) -> Result<(), Stop> {
        let dir = self.dir.display();
        let found = statvfs(&self.dir)
            .map_err(|error| refused(format!("the free space of {dir} is not known: {error}")))?;
        let free = found.blocks_available() * found.fragment_size();
        // A tmpfs without a limit reports no blocks at all.
        if found.blocks() == 0 || needed.saturating_add(ROOM_LEFT_BYTES) <= free {
            return Ok(());
        }
        Err(refused(format!(
            "no room in {dir}: {needed} bytes are needed, {ROOM_LEFT_BYTES} more are to stay free, and {free} are free; free \
             space there, then try again"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        files::{InUse, Phase, Scanner, Source},
        wire::message::FileMeta,
    };

    const PLENTY: Size = Size { stream_bytes: 1 << 20, room_bytes: 1 << 20 };

    /// Ends with `None` if it has an end.
    type Records = Vec<Option<(FileRecord, Vec<u8>)>>;

    /// What a primary sends of a directory, and its digest.
    fn records_of(dir: &Path) -> (Records, String) {
        let mut records = Vec::new();
        let mut scanner = Scanner::untracked(vec![Source::plain(dir)]);
        let mut emit = |record, body: &[u8]| records.push(Some((record, body.to_vec())));
        scanner.scan(Phase::Frozen, &InUse::default(), &mut emit).unwrap();
        records.push(None);
        (records, blake3::Hash::from(scanner.digest().unwrap()).to_hex().to_string())
    }

    fn arrive(dir: &Path, size: Size, records: Records) -> (Staged, Result<bool, String>) {
        let staged = Staged::make(&dir.join("arriving")).unwrap();
        let Ok(room) = Room::ensure(dir, 0) else { panic!("the test needs some room") };
        let (sender, frames) = mpsc::channel(records.len().max(1));
        for record in records {
            sender.try_send(record).unwrap();
        }
        drop(sender);
        let written = write(&staged, room, size, frames);
        (staged, written)
    }

    #[test]
    fn only_what_is_whole_and_right_gets_its_place_and_the_rest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir_all(source.join("sub")).unwrap();
        fs::write(source.join("sub/file"), vec![7; 100_000]).unwrap();
        let (records, digest) = records_of(&source);
        let place = durable::Place::of(dir.path(), &"db".parse().unwrap());
        let lent = Lent { inside: "/conf".into(), digest, is_file: false };

        let cut = records[..records.len() - 1].to_vec();
        let (staged, written) = arrive(dir.path(), PLENTY, cut);
        assert_eq!(written, Ok(false), "it has no end");
        drop(staged);
        let (staged, written) = arrive(dir.path(), PLENTY, records.clone());
        assert_eq!(written, Ok(true));
        let other = Lent { digest: "0".repeat(64), ..lent.clone() };
        assert!(put(&staged, &place, &other).unwrap_err().contains("try again"));
        let file = Lent { is_file: true, ..lent.clone() };
        assert!(put(&staged, &place, &file).is_err());
        assert!(!place.data().exists(), "nothing was made for what was refused");
        put(&staged, &place, &lent).unwrap();
        drop(staged);
        assert_eq!(fs::read(lent.source(&place.data()).join("sub/file")).unwrap(), vec![7; 100_000]);
        assert_eq!(fs::read_dir(dir.path().join("arriving")).unwrap().count(), 0);
    }

    #[test]
    fn a_peer_gets_no_more_than_it_announced_and_never_leaves_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let meta = |kind| FileMeta { kind, mode: 0o644, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() };
        let entry = |path: &str, kind| {
            Some((FileRecord::Entry { tree: 0, path: path.into(), meta: meta(kind) }, Vec::new()))
        };
        // A hole takes no space, but whoever reads it back has to go through it.
        let (_staged, hole) =
            arrive(dir.path(), PLENTY, vec![entry("hole", FileKind::Regular { size: 1 << 60 })]);
        assert!(hole.unwrap_err().contains("larger than was announced"));
        let many = (0..1000).map(|number| entry(&number.to_string(), FileKind::Fifo)).collect();
        assert!(arrive(dir.path(), PLENTY, many).1.unwrap_err().contains("larger than was announced"));

        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let target = outside.as_os_str().as_encoded_bytes().to_vec();
        let escape =
            vec![entry("link", FileKind::Symlink { target }), entry("link/file", FileKind::Fifo), None];
        assert!(arrive(dir.path(), PLENTY, escape).1.is_err());
        assert!(arrive(dir.path(), PLENTY, vec![entry("../file", FileKind::Fifo), None]).1.is_err());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn what_has_no_room_is_refused_before_it_comes() {
        let dir = tempfile::tempdir().unwrap();
        let Err(Stop::Refused(reason)) = Room::ensure(dir.path(), u64::MAX) else {
            panic!("there is no such room")
        };
        assert!(reason.contains("no room in") && reason.contains("free space"), "{reason}");
    }
}
