//! The files of a workload on this host: of a sandbox its declared paths, shown in their place, and its POSIX shared memory
//! and semaphores, which are files as well; of a container its root, what it mounts and its file systems in memory. What is
//! in memory there is kept where images are, in RAM mostly.
//!
//! ```text
//!   the declared directory ──seed, at the first `run`──► paths/0 ◄──apply, while this host is the standby── epochs
//!   a container's tmpfs ◄──fill, before a restore── shm/NAME/2 ◄──apply──┘
//! ```
//!
//! Invariants: what a declared directory held before is copied, never changed, and shows again when the workload's
//! files are gone; files that a workload has left here are never overwritten by a copy of it; a copy that did not come
//! to its end is made anew.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

use super::durable::Place;
use crate::{
    config::Config,
    delta::KEY_LEN,
    files::{self, InUse, Phase, Receiver, Scanner, Source, Target},
    model::Name,
    store::FileChanges,
    wire::{check::TREES_MAX, inventory::Held, message::FileRecord},
    workload::{
        container::{Container, ContainerError, TreeAt, whole::Whole},
        spec::{ContainerSpec, ContainerTreeKind, PlaceSpec, SandboxSpec, Way},
    },
};

/// Where the files of a sandbox's /dev/shm are, or those of a container's file systems in memory.
pub(super) fn shm_of(config: &Config, name: &Name) -> PathBuf {
    config.store_dir.join("shm").join(name.as_str())
}

/// Nothing of an earlier workload of that name is there.
pub(super) fn clear_shm(config: &Config, name: &Name) -> io::Result<()> {
    match fs::remove_dir_all(shm_of(config, name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// All that is replicated of a sandbox: the declared paths, then /dev/shm, in the same place on either side.
pub(super) fn of_sandbox(config: &Config, place: &Place, spec: &SandboxSpec) -> Vec<PathBuf> {
    of(place, spec).into_iter().chain([shm_of(config, &spec.name)]).collect()
}

/// A container with its files.
pub(super) trait Filed {
    fn spec(&self) -> &ContainerSpec;
    /// Where its trees are.
    fn places(&self) -> &[TreeAt];
    /// One of them that is in memory, by its number.
    fn memory(&self, number: usize) -> Result<OwnedFd, ContainerError>;
}

impl Filed for Container {
    fn spec(&self) -> &ContainerSpec {
        self.spec()
    }

    fn places(&self) -> &[TreeAt] {
        self.trees()
    }

    fn memory(&self, number: usize) -> Result<OwnedFd, ContainerError> {
        self.memory_at(&self.spec().trees[number].inside)
    }
}

impl Filed for Whole {
    fn spec(&self) -> &ContainerSpec {
        self.spec()
    }

    fn places(&self) -> &[TreeAt] {
        self.trees()
    }

    fn memory(&self, number: usize) -> Result<OwnedFd, ContainerError> {
        self.memory(number)
    }
}

/// What is replicated of a container that runs here, and descriptors by which a part of it is named: they must stay open.
pub(super) fn of_container(container: &dyn Filed) -> anyhow::Result<(Vec<Source>, Vec<OwnedFd>)> {
    let mut held = Vec::new();
    let source = |(number, at): (usize, &TreeAt)| {
        Ok(match at {
            TreeAt::Plain(path) => Source::plain(path),
            TreeAt::Overlay { upper, merged } => Source::overlay(upper, merged),
            TreeAt::Memory => {
                let memory = container.memory(number)?;
                let source = Source::plain(path_of(&memory));
                held.push(memory);
                source
            }
        })
    };
    let sources = container.places().iter().enumerate().map(source).collect::<anyhow::Result<_>>()?;
    Ok((sources, held))
}

/// By which this process reaches what is open.
fn path_of(open: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()))
}

/// Where a standby has what is replicated, in the order of the records.
fn of_standby(config: &Config, place: &Place, spec: &PlaceSpec) -> io::Result<Vec<Target>> {
    let spec = match spec {
        PlaceSpec::Sandbox(spec) => {
            return Ok(of_sandbox(config, place, spec).into_iter().map(Target::plain).collect());
        }
        PlaceSpec::Container(spec) => spec,
    };
    let trees_of = if spec.way == Way::Whole { Whole::trees_of } else { Container::trees_of };
    let places = trees_of(&config.sandboxes_dir(), &spec.name).map_err(io::Error::other)?;
    let target = |(number, at)| match at {
        TreeAt::Plain(path) => Target::plain(path),
        TreeAt::Overlay { upper, merged } => Target::overlay(upper, merged),
        TreeAt::Memory => Target::plain(kept_of(config, &spec.name, number)),
    };
    Ok(places.into_iter().enumerate().map(target).collect())
}

/// Where a standby has one of a container's file systems in memory.
pub(super) fn kept_of(config: &Config, name: &Name, number: usize) -> PathBuf {
    shm_of(config, name).join(number.to_string())
}

/// Before a restore: a container's file systems in memory are what the epoch has of them.
pub(super) fn fill(config: &Config, container: &dyn Filed) -> anyhow::Result<()> {
    let spec = container.spec();
    for (number, tree) in spec.trees.iter().enumerate() {
        if tree.kind == ContainerTreeKind::Memory {
            let memory = container.memory(number)?;
            copy(&kept_of(config, &spec.name, number), &path_of(&memory))?;
        }
    }
    Ok(())
}

/// Whether a workload has files of its own, of which it may have changed some since an epoch.
pub(super) fn has_files(config: &Config, spec: &PlaceSpec) -> bool {
    let has_shm =
        || fs::read_dir(shm_of(config, spec.name())).is_ok_and(|mut entries| entries.next().is_some());
    match spec {
        PlaceSpec::Sandbox(spec) => !spec.paths.is_empty() || has_shm(),
        PlaceSpec::Container(spec) => !spec.trees.is_empty(),
    }
}

/// Where the files of each declared path are, in their order.
fn of(place: &Place, spec: &SandboxSpec) -> Vec<PathBuf> {
    (0..spec.paths.len()).map(|tree| place.data().join(tree.to_string())).collect()
}

/// Brings the standby's copy to an epoch; the records may be those of an epoch that was applied before.
pub(super) fn apply(config: &Config, place: &Place, changes: &FileChanges<'_>) -> io::Result<()> {
    let targets = of_standby(config, place, &place.read()?.spec.place)?;
    for target in &targets {
        DirBuilder::new().recursive(true).mode(0o700).create(target.path())?;
    }
    if changes.full {
        // These are a workload's files from now on.
        targets.iter().try_for_each(|target| unmark(target.path()))?;
    }
    let mut receiver = Receiver::open(&targets).map_err(io::Error::other)?;
    changes.for_each(|record, body| receiver.apply(record, body).map_err(io::Error::other))?;
    receiver.finish().map_err(io::Error::other)
}

/// Tells hashes of the files that are here: of a standby's copies, or what a workload has left.
pub(super) fn hashes(
    config: &Config,
    place: &Place,
    key: &[u8; KEY_LEN],
    tell: &mut dyn FnMut(Held, Vec<u8>) -> bool,
) -> io::Result<()> {
    for (tree, target) in targets(config, place)?.iter().enumerate() {
        let tree = tree as u32;
        let goes_on = files::hashes(target, key, &mut |path, first, sums| {
            tell(Held::File { tree, path: path.to_vec(), first }, sums)
        })?;
        if !goes_on {
            break;
        }
    }
    Ok(())
}

/// Where a standby has what is replicated.
pub(super) fn targets(config: &Config, place: &Place) -> io::Result<Vec<Target>> {
    of_standby(config, place, &place.read()?.spec.place)
}

/// Whether the blocks are there that a record wants kept.
pub(super) fn has_blocks(targets: &[Target], record: &FileRecord) -> io::Result<bool> {
    let FileRecord::Keep { tree, path, runs, digest } = record else { return Ok(true) };
    targets.get(*tree as usize).map_or(Ok(false), |target| files::has_blocks(target, path, runs, digest))
}

/// Declared paths of which no workload has left files here, to be seeded once their sandbox is there.
pub(super) struct Seeds {
    /// From, to.
    copies: Vec<(PathBuf, PathBuf)>,
}

impl Seeds {
    /// Finds them, and remembers on disk that they are not seeded yet. Before the sandbox makes its directories.
    pub(super) fn find(place: &Place, spec: &SandboxSpec) -> io::Result<Self> {
        let mut copies = Vec::new();
        for (path, tree) in spec.paths.iter().zip(of(place, spec)).take(TREES_MAX) {
            let mark = mark_of(&tree);
            if !tree.exists() {
                DirBuilder::new().recursive(true).mode(0o700).create(place.data())?;
                File::create(&mark)?;
            }
            if mark.exists() {
                copies.push((path.clone(), tree));
            }
        }
        Ok(Self { copies })
    }

    /// Copies what the declared directories hold on this host.
    pub(super) fn sow(&self) -> io::Result<()> {
        self.copies.iter().try_for_each(|(path, tree)| copy(path, tree))
    }

    /// The workload runs: these are its files.
    pub(super) fn keep(self) -> io::Result<()> {
        self.copies.iter().try_for_each(|(_, tree)| unmark(tree))
    }
}

/// Makes a tree what a directory is; what was there before goes.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut receiver = Receiver::open(&[Target::plain(to)]).map_err(io::Error::other)?;
    let mut applied = Ok(());
    Scanner::untracked(vec![Source::plain(from)])
        .scan(Phase::Frozen, &InUse::default(), &mut |record, body| {
            if applied.is_ok() {
                applied = receiver.apply(&record, body);
            }
        })
        .map_err(io::Error::other)?;
    applied.and_then(|()| receiver.finish()).map_err(io::Error::other)
}

/// Beside a tree: it is not, or not wholly, seeded.
fn mark_of(tree: &Path) -> PathBuf {
    tree.with_extension("unseeded")
}

fn unmark(tree: &Path) -> io::Result<()> {
    match fs::remove_file(mark_of(tree)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::spec::Net;

    #[test]
    fn files_of_a_workload_are_seeded_once_and_kept() {
        let dir = tempfile::TempDir::new().expect("a directory");
        let declared = dir.path().join("declared");
        fs::create_dir(&declared).expect("made");
        fs::write(declared.join("file"), "before").expect("written");
        let name = "web".parse().expect("a name");
        let place = Place::of(dir.path(), &name);
        let spec =
            SandboxSpec { name, net: Net::Host, paths: vec![declared.clone()], hostname: "web".into() };
        let tree = of(&place, &spec).remove(0);

        // Twice without a workload that came to run: seeded anew.
        for content in ["before", "changed"] {
            fs::write(declared.join("file"), content).expect("written");
            let seeds = Seeds::find(&place, &spec).expect("found");
            DirBuilder::new().recursive(true).create(&tree).expect("as the sandbox does");
            fs::write(tree.join("left"), "by a copy that was cut off").expect("written");
            seeds.sow().expect("copied");
            assert_eq!(fs::read_to_string(tree.join("file")).expect("there"), content);
            assert!(!tree.join("left").exists());
            if content == "changed" {
                seeds.keep().expect("kept");
            }
        }

        fs::write(tree.join("file"), "the workload's").expect("written");
        let seeds = Seeds::find(&place, &spec).expect("found");
        seeds.sow().expect("nothing to copy");
        assert_eq!(fs::read_to_string(tree.join("file")).expect("there"), "the workload's");
        assert_eq!(fs::read_to_string(declared.join("file")).expect("there"), "changed");
    }
}
