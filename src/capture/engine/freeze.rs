//! The freeze. CRIU dumps the tree and its memory is read meanwhile; what was read goes out after the thaw, or, if the
//! tree is handed off, while it is held.

use std::{
    collections::BTreeMap,
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Instant,
};

use super::{
    CaptureError, Capturer, Emit, Finish, Source, Stage,
    crius::{Crius, Spare},
    encode, processor_time,
};
use crate::{
    capture::{
        blame,
        collector::{self, Starter},
        files::Files,
        frozen::{self, FreezeParts, Frozen, Lent, Piece, Reader},
        images::{self, Note},
        lists::{Ahead, Lists},
    },
    criu::{gate::Gate, hurry, hurry_meanwhile, images::namespaces, page_server, stats, swrk::CriuError},
    delta::{Encoder, Known},
    extents,
    memory::ReadError,
    model::{EpochFigures, Extent, PAGE_SIZE, Space},
    observe::unix_ms,
    wire::message::{FrameHead, Manifest, SpaceMap},
};

/// How what a freeze has read goes out.
struct Outlet<'a, 'e> {
    encoder: &'a mut Encoder,
    /// Of CRIU's small images.
    dir: PathBuf,
    note: Note,
    figures: &'a mut EpochFigures,
    emit: &'a mut Emit<'e>,
}

impl Source {
    fn lists(&self, dir: &Path, gate: Arc<Gate>, ahead: Ahead) -> Lists<'_> {
        let (dir, from_host) = (dir.to_owned(), self.whole.is_some());
        Lists { dir, from_host, gate, ahead, vmas: self.vmas.as_deref() }
    }
}

impl Capturer {
    fn note(&self, frozen_at_unix_ms: u64) -> Note {
        Note {
            frozen_at_unix_ms,
            outside: self.source.outside.clone(),
            root: self.source.root_inside,
            own_ipc: self.crius.own_ipc(),
            output_held: self.output_held,
        }
    }

    /// What CRIU is told before it is looked at.
    fn told_ahead(&self, runs_on: bool) -> Ahead {
        // For an answer that is there soon a last freeze shall not fail.
        Ahead { guards: self.guards_doubted == 0, protocols: self.likely.told().filter(|_| runs_on) }
    }

    /// The freeze itself, and the encoding of what it read. Returns whether the tree was killed, and
    /// what took how long.
    pub(super) fn freeze(
        &mut self,
        began: Instant,
        pending: BTreeMap<Space, Vec<Extent>>,
        finish: &mut Finish<'_>,
        figures: &mut EpochFigures,
        emit: &mut Emit<'_>,
    ) -> Result<(bool, FreezeParts), CaptureError> {
        let Spare { mut swrk, dir, .. } = self.crius.take_spare().ok_or(CaptureError::NoMemory)?;
        let (socket, page_version) = (swrk.take_page_server().ok_or(CaptureError::NoMemory)?, swrk.version());
        let options = self.source.dump_options(matches!(*finish, Finish::Continue));
        figures.frozen_at_unix_ms = unix_ms();
        let (note, ahead) = (self.note(figures.frozen_at_unix_ms), self.told_ahead(options.leave_running));
        figures.output_held = note.output_held;
        // Clients wait for the next epoch too: while the tree stands, all but one of the processors have little to do.
        let forks = note.output_held && options.leave_running && has_processors();
        let meanwhile = forks.then(|| self.crius.clone());
        let processes = self.processes();
        let mut outlet = Outlet { encoder: &mut self.encoder, dir, note, figures, emit };
        let root = self.source.root;
        let gate = swrk.take_gate().map(Arc::new);
        let without_ipc = (self.source.init.is_some() && !self.crius.own_ipc()).then(|| self.root.as_fd());
        let lists = gate.clone().map(|gate| self.source.lists(&outlet.dir, gate, ahead));
        // They go to the reader and come back when it ends.
        let lent = Mutex::new(Lent {
            tracking: self.source.tracking,
            tasks: &mut self.tasks,
            dumped: &mut self.dumped,
            known: &mut self.known,
            shared: &mut self.shared,
            files: &mut self.files,
            likely: &mut self.likely,
        });
        let mut told = self.on_stages.as_mut();
        let mut refused = None;
        // What was read, and how it went out if that was before the thaw.
        let (mut taken, mut sent) = (None, None);
        let thawed = &mut self.thawed;
        let dumped = std::thread::scope(|scope| {
            let (starter, mut collector, ends) = collector::channels(gate.clone());
            let meanwhile = move || meanwhile.iter().for_each(Crius::spawn_beside);
            let reader = Reader { ends, root, pending, lists, without_ipc, meanwhile };
            let mut starter = Some(starter);
            let lent = &lent;
            let reading = scope.spawn(move || {
                hurry();
                reader.serve(&mut lent.lock().expect("no holder panics"))
            });
            scope.spawn(move || {
                hurry();
                // What goes wrong here CRIU reports too.
                let _ = page_server::serve(&socket, page_version, &mut collector);
            });
            // The reader ends before CRIU says `post-dump`, and whenever CRIU has ended.
            let mut reading = Some(reading);
            let mut read = || {
                if let Some(gate) = &gate {
                    gate.close();
                }
                reading.take().and_then(|reading| reading.join().expect("it does not panic"))
            };
            let mut notify = |stage: &str| match (stage, &mut *finish) {
                // The first stage at which the tree is frozen (cr_dump_tasks, behind collect_pstree).
                ("query-ext-files", _) => {
                    refused = told.as_mut().and_then(|told| told(Stage::Frozen).err());
                    starter.take().into_iter().for_each(Starter::begin);
                    refused.is_none()
                }
                ("post-dump", Finish::Final { hold, conclude }) => {
                    if !hold() {
                        return false;
                    }
                    starter = None;
                    let frozen = match read() {
                        Some(Ok(frozen)) => frozen,
                        failed => {
                            taken = failed;
                            return false;
                        }
                    };
                    let (agreed, went) =
                        outlet.send_last(&mut lent.lock().expect("no holder panics"), frozen, conclude);
                    sent = Some(went);
                    agreed
                }
                _ => true,
            };
            let hurried = hurry_meanwhile();
            let dumped = swrk.dump(&options, &mut notify);
            if options.leave_running || dumped.is_err() {
                // What cannot be let go now is told of at the next freeze.
                let _ = told.as_mut().map(|told| told(Stage::Running));
                *thawed = processor_time(&processes).map(|used| (Instant::now(), used));
            }
            drop(hurried);
            // Without a freeze the reader waits for nothing any more.
            drop(starter);
            taken = taken.take().or_else(read);
            dumped
        });
        if let Some(refused) = refused {
            return Err(refused.into());
        }
        let frozen = match taken {
            // Of a tree that stands nobody goes: CRIU had let it run.
            Some(Err(CaptureError::Read(ReadError::Gone(_)))) if dumped.is_err() => None,
            taken => taken.transpose()?,
        };
        match sent {
            // The handoff may have been called off after all was sent: then CRIU's refusal is ours.
            Some(sent) => return sent.map(|()| (dumped.is_ok(), FreezeParts::default())),
            None => dumped.map_err(|source| explained(source, root))?,
        }
        let stopping_us = outlet.note_times(began)?;
        let frozen = frozen.ok_or(CaptureError::NoMemory)?;
        let parts = FreezeParts { stopping_us, ..frozen.parts };
        outlet.send(&mut self.known, self.files.as_mut(), frozen)?;
        Ok((false, parts))
    }
}

/// More than one, that is.
fn has_processors() -> bool {
    std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1)
}

fn explained(source: CriuError, root: i32) -> CaptureError {
    match blame::explain(&source, root) {
        Some(reason) => CaptureError::Holds { source, reason },
        None => source.into(),
    }
}

impl Outlet<'_, '_> {
    /// Sends what is handed off, and asks what becomes of the tree: whether it is killed, and how the sending went.
    fn send_last(
        &mut self,
        lent: &mut Lent<'_>,
        frozen: Frozen,
        conclude: &mut dyn FnMut(&Manifest) -> bool,
    ) -> (bool, Result<(), CaptureError>) {
        let manifest = self.send(lent.known, lent.files.as_mut(), frozen);
        (manifest.as_ref().is_ok_and(conclude), manifest.map(drop))
    }

    /// Notes how long the tree stood and the epoch took since `began`; how long (in microseconds) it took to stop it.
    fn note_times(&mut self, began: Instant) -> Result<u64, CaptureError> {
        let (stopping_us, frozen_us) = stats::frozen(&self.dir)?;
        self.figures.frozen_us = stopping_us + frozen_us;
        self.figures.capture_us = began.elapsed().as_micros() as u64;
        Ok(stopping_us)
    }

    /// Emits what the freeze read, the small images and the manifest.
    fn send(
        &mut self,
        known: &mut Known,
        files: Option<&mut Files>,
        frozen: Frozen,
    ) -> Result<Manifest, CaptureError> {
        namespaces::check(&self.dir)?;
        let (figures, emit) = (&mut *self.figures, &mut *self.emit);
        figures.dirty_bytes += frozen.dirty_pages * PAGE_SIZE;
        let manifest = frozen.manifest;
        for piece in frozen.pieces {
            let listed = manifest.spaces.iter().find(|map| map.space == piece.space);
            let Some(listed) = listed else { continue };
            let Piece { space, extents, data, at } = piece.only(&listed.extents);
            encode(self.encoder, known, space, &extents, &data, at, emit)?;
        }
        for map in &manifest.spaces {
            let missing = known.missing(map.space, &map.extents);
            if let Some(&first) = missing.first() {
                return Err(frozen::unreadable(map.space, first, &missing));
            }
        }
        for (record, body) in frozen.files {
            emit(FrameHead::File(record), body)?;
        }
        files.map_or(Ok(()), |files| files.settle(emit))?;
        images::emit::<io::Error>(&self.dir, &self.note, &mut |head, body| emit(head, body))?;
        if let Some(resync) = &mut figures.resync {
            resync.full_bytes += known.offered_same_bytes();
        }
        known.retain(&manifest);
        let pages = |map: &SpaceMap| extents::pages(&map.extents);
        figures.resident_bytes = manifest.spaces.iter().map(|map| pages(map) * PAGE_SIZE).sum();
        emit(FrameHead::Manifest(manifest.clone()), Vec::new())?;
        Ok(manifest)
    }
}
