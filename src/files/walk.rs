//! Which entries are looked at: all of a tree, or those that something happened to.

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};

use super::{
    DEPTH_MAX,
    look::{Look, open_handle},
    scan::{ScanError, full, open_in},
    state::{Key, Node, child_of, depth_of, is_at_or_below, parent_of, path_of, split},
    sys::{self, Stat},
};

/// What may have happened to an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Doubt {
    /// It was changed.
    #[default]
    Changed,
    /// Its name may stand for something else: what is below it as well.
    Renamed,
}

/// The entries that something happened to.
pub(super) type Doubts = BTreeMap<Key, Doubt>;

type Visit<'v, 'a> = &'v mut dyn FnMut(&mut Look<'a>, &Key, Stat) -> Result<bool, ScanError>;

impl<'a> Look<'a> {
    /// Looks at everything.
    pub(super) fn at_all(&mut self) -> Result<(), ScanError> {
        let sent = self.view.sent;
        self.stats.walked += 1;
        let mut expected = sent.iter().map(|(key, _)| key).peekable();
        let mut visit = |look: &mut Self, key: &Key, stat| {
            while let Some(gone) = expected.next_if(|expected| *expected < key) {
                look.gone(gone);
            }
            expected.next_if(|expected| *expected == key);
            look.found(key, stat)
        };
        let root = Key::from(&b""[..]);
        let stat = sys::stat_at(self.view.root, c"").map_err(self.failed("stat", &root))?;
        visit(self, &root, stat)?;
        self.below(self.view.root, &root, &mut visit)?;
        for gone in expected {
            self.gone(gone);
        }
        Ok(())
    }

    /// Visits what is below a directory, in order; what is below that, only where the visit says so.
    fn below(&mut self, dir: BorrowedFd<'_>, key: &Key, visit: Visit<'_, 'a>) -> Result<(), ScanError> {
        if depth_of(key) > DEPTH_MAX {
            return Err(ScanError::TooDeep { path: full(self.view.base, &path_of(key)) });
        }
        for name in names_of(dir).map_err(self.failed("list", key))? {
            let child = child_of(key, name.as_bytes());
            let stat = match sys::stat_at(dir, &name) {
                Ok(stat) => stat,
                Err(error) if self.raced(&error) => continue,
                Err(error) => return Err(self.failed("stat", &child)(error)),
            };
            if is_hidden(&stat) || !visit(self, &child, stat)? || !is_entered(&stat) {
                continue;
            }
            if let Some(fd) = self.directory(open_directory(dir, &name), &child)? {
                self.below(fd.as_fd(), &child, visit)?;
            }
        }
        Ok(())
    }

    /// `None`: it was replaced meanwhile.
    fn directory(&mut self, opened: io::Result<OwnedFd>, key: &Key) -> Result<Option<OwnedFd>, ScanError> {
        match opened {
            Ok(fd) => Ok(Some(fd)),
            Err(error) if self.raced(&error) => {
                self.again.insert(key.clone());
                Ok(None)
            }
            Err(error) => Err(self.failed("open", key)(error)),
        }
    }

    /// Looks at what something happened to, and at what that leads to: the other names of a file, all that is below a
    /// directory that is new.
    pub(super) fn at(&mut self, mut todo: Doubts) -> Result<(), ScanError> {
        let mut now = Now::default();
        while let Some((key, doubt)) = todo.pop_first() {
            if now.entries.contains_key(&key) || !self.has_parent(&key, &now) {
                continue;
            }
            let stat = self.stat_of(&key, &mut now)?.filter(|stat| !is_hidden(stat));
            let known = self.view.sent.get(&key);
            let is_new = |stat: &Stat| {
                known.is_none_or(|node| !stat.is_same_file(&node.stat) || !is_entered(&node.stat))
            };
            let entered = stat.as_ref().filter(|stat| is_entered(stat));
            let walked = entered.is_some_and(|stat| doubt == Doubt::Renamed || is_new(stat));
            now.entries.insert(key.clone(), stat);
            if walked {
                self.note_below(&key, &mut now)?;
            }
            if walked || entered.is_none() && known.is_some_and(Node::is_directory) {
                for (gone, _) in self.view.sent.below(&key) {
                    now.entries.entry(gone.clone()).or_insert(None);
                }
            }
            self.add_names(&key, walked || entered.is_none(), &now, &mut todo);
        }
        self.take(now)
    }

    /// Whether the directory that it would be in is one of the tree's.
    fn has_parent(&self, key: &[u8], now: &Now) -> bool {
        let parent = parent_of(key);
        match now.entries.get(parent) {
            _ if key.is_empty() => true,
            Some(stat) => stat.as_ref().is_some_and(is_entered),
            None => self.view.sent.get(parent).is_some_and(|node| is_entered(&node.stat)),
        }
    }

    /// `None`: it is not there.
    fn stat_of(&mut self, key: &Key, now: &mut Now) -> Result<Option<Stat>, ScanError> {
        let root = self.view.root;
        let (parent, name) = split(key);
        if now.open.as_ref().is_none_or(|(open, _)| **open != *parent) {
            let path = if parent.is_empty() { b".".to_vec() } else { path_of(parent) };
            match open_handle(root, &path, false) {
                Ok(dir) => now.open = Some((parent.into(), dir)),
                Err(error) if is_not_there(&error) => return Ok(None),
                Err(error) => return Err(self.failed("open", parent)(error)),
            }
        }
        let Some((_, dir)) = &now.open else { return Ok(None) };
        let name = CString::new(name).map_err(io::Error::from).map_err(self.failed("stat", key))?;
        match sys::stat_at(dir.as_fd(), &name) {
            Ok(stat) => Ok(Some(stat)),
            Err(error) if is_not_there(&error) => Ok(None),
            Err(error) => Err(self.failed("stat", key)(error)),
        }
    }

    /// Notes all that is below a directory.
    fn note_below(&mut self, key: &Key, now: &mut Now) -> Result<(), ScanError> {
        let path = if key.is_empty() { b".".to_vec() } else { path_of(key) };
        let opened = open_in(self.view.root, &path, OFlag::O_RDONLY | OFlag::O_DIRECTORY);
        let Some(dir) = self.directory(opened, key)? else { return Ok(()) };
        self.below(dir.as_fd(), key, &mut |_, key, stat| {
            now.entries.insert(key.clone(), Some(stat));
            Ok(true)
        })
    }

    /// Names of one file are looked at together, as which one is the first decides what the others are.
    fn add_names(&self, key: &Key, with_below: bool, now: &Now, todo: &mut Doubts) {
        let sent = self.view.sent;
        let mut add = |key: &Key, stat: Option<&Stat>| {
            let before = sent.get(key).filter(|node| !node.is_directory()).map(|node| node.stat.id());
            let after = stat.filter(|stat| stat.format() != libc::S_IFDIR).map(Stat::id);
            for id in [before, after.filter(|after| before != Some(*after))].into_iter().flatten() {
                for name in sent.names(id).filter(|name| *name != key && !now.entries.contains_key(*name)) {
                    todo.entry(name.clone()).or_default();
                }
            }
        };
        if with_below {
            now.entries
                .range::<Key, _>(key.clone()..)
                .take_while(|(below, _)| is_at_or_below(below, key))
                .for_each(|(below, stat)| add(below, stat.as_ref()));
        } else {
            add(key, now.entries.get(key).and_then(Option::as_ref));
        }
    }

    /// Takes over what was noted, in the order of the walk.
    fn take(&mut self, now: Now) -> Result<(), ScanError> {
        let mut dropped: Option<Key> = None;
        for (key, stat) in now.entries {
            let inside = dropped.as_ref().is_some_and(|dropped| is_at_or_below(&key, dropped));
            match stat.filter(|_| !inside) {
                Some(stat) if self.found(&key, stat)? => {}
                Some(_) => {
                    // Also what was not looked at.
                    self.view.sent.below(&key).for_each(|(below, _)| self.gone(below));
                    dropped = Some(key);
                }
                None => self.gone(&key),
            }
        }
        Ok(())
    }
}

/// What is there now, as far as it was looked at.
#[derive(Default)]
struct Now {
    /// `None`: nothing.
    entries: BTreeMap<Key, Option<Stat>>,
    /// The directory looked into last: changes come together.
    open: Option<(Key, OwnedFd)>,
}

/// A directory of the tree, not of what is mounted in it.
fn is_entered(stat: &Stat) -> bool {
    stat.format() == libc::S_IFDIR && !stat.mount_root
}

/// Behind a mount that is no directory.
fn is_hidden(stat: &Stat) -> bool {
    stat.mount_root && stat.format() != libc::S_IFDIR
}

fn is_not_there(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP))
}

fn open_directory(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(dir, name, flags, Mode::empty())?)
}

/// Appends a name to the path of its directory; where that ends.
pub(super) fn push_name(path: &mut Vec<u8>, name: &CStr) -> usize {
    let end = path.len();
    if end > 0 {
        path.push(b'/');
    }
    path.extend_from_slice(name.to_bytes());
    end
}

/// The names in a directory, sorted.
pub(super) fn names_of(dir: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    // By way of /proc, which opens it anew: reading moves the position.
    let mut names = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()))? {
        names.push(CString::new(entry?.file_name().into_vec())?);
    }
    names.sort_unstable();
    Ok(names)
}
