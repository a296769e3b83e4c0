//! The mounts of a drill's place for a container: what the container that waits has, with files of its own.
//!
//! ```text
//!   /           a copy of the root directory, or the image's layers under a copy of the writable one
//!   /data       a copy, if it is replicated                  /proc, /sys, /dev/pts, /dev/mqueue   new ones
//!   /dev, /srv  any other directory: seen, and what is written to it kept apart (an overlay)
//!   /etc/hosts  any other file: a copy, or read-only          a socket    nothing
//! ```
//!
//! The engine made the mounts of the container that waits, as it would make them anywhere; they are looked at, and made
//! again one by one. Nothing that can be written is shared: neither with that container, nor with storage that both hosts
//! have. A socket that is seen through an overlay is not the one that somebody listens on.
//!
//! Copies are of the host's mounts and the rest is of the container's, two namespaces, and a mount can be copied only in the
//! one that it is in: hence the order of [`enter`].

mod sys;

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{
            ffi::OsStrExt as _,
            fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    unistd::{fchdir, pivot_root, sethostname},
};
use serde::{Deserialize, Serialize};

use super::{
    super::{
        cgroup::unescape,
        mountinfo::{Mount, reachable},
    },
    at,
};

const NONE: Option<&Path> = None;
/// Of these what is shown is the kernel's, and what lies on top of them hides a part of it.
const KERNELS: [&str; 13] = [
    "proc",
    "sysfs",
    "cgroup",
    "cgroup2",
    "securityfs",
    "debugfs",
    "tracefs",
    "bpf",
    "pstore",
    "efivarfs",
    "configfs",
    "fusectl",
    "nsfs",
];
/// Options of a devpts that make a new one the same.
const DEVPTS_OPTIONS: [&str; 3] = ["gid", "mode", "ptmxmode"];
/// The longest text of options that mount(2) takes.
const OPTIONS_BYTES_MAX: usize = 4095;
/// A writable file that is mounted by itself is copied while a place is made, which may take only so long.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// What is shown in the place of sockets.
const NOTHING: &str = "nothing";
/// The directory of the root's overlay among the layers.
const ROOT_LAYER: &str = "root";

/// A container whose mounts a place shall have.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Likeness {
    /// Its pid 1.
    pub init: u32,
    /// What is shown in the place of its files, that of its root among them.
    pub copies: Vec<FilesCopy>,
    /// An empty directory for what is written elsewhere, in the file system of the copies.
    pub layers: PathBuf,
}

/// A copy of a container's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesCopy {
    /// Where they are inside.
    pub inside: PathBuf,
    /// The copy.
    pub dir: PathBuf,
    /// It is one of the writable layer alone.
    pub is_layer: bool,
}

/// Makes the mounts, and leaves the host's behind.
pub(super) fn enter(hostname: &str, like: &Likeness) -> Result<(), String> {
    sethostname(hostname).map_err(at("set the host name"))?;
    let mounts = Mount::all_of(&like.init.to_string()).map_err(at("read the container's mounts"))?;
    let mounts = reachable(&mounts);
    let (root, rest) = mounts.split_first().ok_or("the container that waits has no mounts")?;
    let namespace = format!("/proc/{}/ns/mnt", like.init);
    let namespace = File::open(namespace).map_err(at("open the container's mount namespace"))?;

    make_private()?;
    let mut maker = Maker::begin(like, root)?;
    let layers = sys::clone_mount(None, &like.layers).map_err(at("take the layers"))?;
    setns(&namespace, CloneFlags::CLONE_NEWNS).map_err(at("enter the container's mount namespace"))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(at("copy the container's mount namespace"))?;
    make_private()?;
    // On top of the old root: neither hides anything from who has that for his root.
    let old_root = File::open("/").map_err(at("open the container's root"))?;
    for new in [layers.as_fd(), maker.root.as_fd()] {
        sys::attach(new, old_root.as_fd()).map_err(at("mount on the container's root"))?;
    }
    fchdir(&layers).map_err(at("enter the layers"))?;

    let kinds: HashMap<u64, &str> = mounts.iter().map(|mount| (mount.id, mount.kind.as_str())).collect();
    for mount in rest {
        let on = kinds.get(&mount.parent).copied().unwrap_or_default();
        maker.place(mount, on).map_err(|error| format!("cannot mount {}: {error}", mount.point.display()))?;
    }
    fchdir(&maker.root).map_err(at("enter the new root"))?;
    // As in a sandbox: the old root is then on top of the new one, here with the layers on top of it, and goes after those.
    pivot_root(".", ".").map_err(at("pivot into the new root"))?;
    for what in ["leave the layers", "leave the old root"] {
        umount2(".", MntFlags::MNT_DETACH).map_err(at(what))?;
    }
    Ok(())
}

fn make_private() -> Result<(), String> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).map_err(at("make mounts private"))
}

/// Makes mounts, the first ones in the host's namespace, the others in the container's with the layers' directory for its own.
struct Maker<'a> {
    /// The new root.
    root: OwnedFd,
    /// Copies of files, by where they are to be seen.
    copies: HashMap<&'a Path, OwnedFd>,
    /// Layers that were made.
    layers: usize,
}

impl<'a> Maker<'a> {
    fn begin(like: &'a Likeness, old_root: &Mount) -> Result<Self, String> {
        File::create(like.layers.join(NOTHING)).map_err(at("make an empty file"))?;
        let mut copies = HashMap::new();
        for copy in &like.copies {
            let shown = if copy.is_layer {
                image_under(&copy.dir, old_root, &like.layers.join(ROOT_LAYER))?
            } else {
                copy.dir.clone()
            };
            let taken = sys::clone_mount(None, &shown);
            let taken = taken.map_err(|error| format!("cannot take {}: {error}", shown.display()))?;
            copies.insert(copy.inside.as_path(), taken);
        }
        let root = copies.remove(Path::new("/")).ok_or("there is no copy of the container's root")?;
        sys::set_attributes(root.as_fd(), attributes(old_root)).map_err(at("set the root's attributes"))?;
        Ok(Self { root, copies, layers: 0 })
    }

    /// Makes one of the container's mounts again; `on` is the type of what it is mounted on.
    fn place(&mut self, mount: &Mount, on: &str) -> io::Result<()> {
        let mut wanted = attributes(mount);
        let is_whole = mount.root == Path::new("/");
        let options =
            DEVPTS_OPTIONS.iter().filter_map(|key| Some(((*key).into(), mount.super_option(key)?.into())));
        let made = match mount.kind.as_str() {
            _ if self.copies.contains_key(mount.point.as_path()) => {
                self.copies.remove(mount.point.as_path()).ok_or(io::ErrorKind::NotFound)?
            }
            kind @ ("proc" | "sysfs" | "mqueue") if is_whole => sys::new_mount(kind, &[])?,
            "devpts" if is_whole => sys::new_mount("devpts", &options.collect::<Vec<_>>())?,
            // A part of it that is read-only or hidden: of the new one, which is there by now.
            "proc" => sys::clone_mount(
                Some(self.root.as_fd()),
                &inside("/proc".as_ref()).join(inside(&mount.root)),
            )?,
            kind if KERNELS.contains(&kind) || KERNELS.contains(&on) => {
                wanted |= libc::MOUNT_ATTR_RDONLY;
                sys::clone_mount(None, &mount.point)?
            }
            _ => match fs::symlink_metadata(&mount.point) {
                // What it showed was removed, so that nothing leads there.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                found => self.other(mount, &found?)?,
            },
        };
        sys::set_attributes(made.as_fd(), wanted)?;
        sys::attach(made.as_fd(), self.target(&mount.point)?.as_fd())
    }

    /// What is not replicated, and not the kernel's.
    fn other(&mut self, mount: &Mount, found: &fs::Metadata) -> io::Result<OwnedFd> {
        let kind = found.file_type();
        if kind.is_dir() {
            return self.layer(&mount.point, found);
        }
        let is_read_only = mount.options.split(',').any(|option| option == "ro");
        if kind.is_file() && !is_read_only {
            return self.file(&mount.point, found);
        }
        let is_ear = kind.is_socket() || kind.is_fifo();
        sys::clone_mount(None, if is_ear { Path::new(NOTHING) } else { &mount.point })
    }

    /// A directory as it is, what is written to it apart.
    fn layer(&mut self, point: &Path, like: &fs::Metadata) -> io::Result<OwnedFd> {
        let dir = self.new_layer()?;
        let upper = dir.join("upper");
        fs::create_dir(&upper)?;
        make_like(&upper, like)?;
        let shown = overlay(&dir, &escaped(point), &upper, OsStr::new(""))?;
        sys::clone_mount(None, &shown)
    }

    fn file(&mut self, point: &Path, like: &fs::Metadata) -> io::Result<OwnedFd> {
        if like.len() > FILE_BYTES_MAX {
            let reason =
                format!("it is a file of more than {} MiB, which is not copied", FILE_BYTES_MAX >> 20);
            return Err(io::Error::other(reason));
        }
        let copy = self.new_layer()?.join("file");
        fs::copy(point, &copy)?;
        make_like(&copy, like)?;
        sys::clone_mount(None, &copy)
    }

    fn new_layer(&mut self) -> io::Result<PathBuf> {
        let dir = PathBuf::from(self.layers.to_string());
        self.layers += 1;
        fs::create_dir(&dir)?;
        Ok(dir)
    }

    /// Where something is to be mounted; links lead nowhere else than in the new root.
    fn target(&self, point: &Path) -> io::Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
        Ok(openat2(self.root.as_fd(), point, how)?)
    }
}

/// Mounts the layers of a container's image under a copy of its writable one; returns where. `root` is the container's.
fn image_under(upper: &Path, root: &Mount, dir: &Path) -> Result<PathBuf, String> {
    let layers = image_layers(root).ok_or_else(|| {
        format!(
            "cannot tell the layers of the container's image: its root is a {}, and no overlay",
            root.kind
        )
    })?;
    fs::create_dir(dir).map_err(at("make the root's directory"))?;
    // Engines name layers from there when there are many.
    std::env::set_current_dir(&layers.base).map_err(at("enter the image's layers"))?;
    let shown = overlay(dir, &layers.lower, upper, &layers.options);
    let back = std::env::set_current_dir("/").map_err(at("enter /"));
    let shown = shown.map_err(at("mount the container's image"))?;
    back.map(|()| shown)
}

/// Of an overlay what another one with the same lower layers needs.
#[derive(Debug, PartialEq, Eq)]
struct ImageLayers {
    /// From where relative paths lead.
    base: PathBuf,
    lower: OsString,
    options: OsString,
}

fn image_layers(root: &Mount) -> Option<ImageLayers> {
    let upper = unescape(root.super_option("upperdir")?);
    // Of Docker, Podman and containerd: BASE/LAYER/DIRECTORY.
    let base = upper.parent()?.parent()?.to_owned();
    let mut lower: Vec<OsString> =
        root.super_option("lowerdir").map(|lower| unescape(lower).into()).into_iter().collect();
    let (mut options, mut one_by_one) = (OsString::new(), Vec::new());
    for option in root.super_options.split(',') {
        if let Some(layer) = option.strip_prefix("lowerdir+=") {
            one_by_one.push(escaped(&unescape(layer)));
        } else if option == "userxattr"
            || ["redirect_dir=", "metacopy="].iter().any(|key| option.starts_with(key))
        {
            options.push(",");
            options.push(option);
        }
    }
    lower.extend(one_by_one);
    // A copy of a layer does not have the identity that an index wants.
    options.push(",index=off");
    (!lower.is_empty()).then(|| ImageLayers { base, lower: lower.join(OsStr::new(":")), options })
}

/// Mounts an overlay at a directory below `dir`, which is where its work goes too.
fn overlay(dir: &Path, lower: &OsStr, upper: &Path, options: &OsStr) -> io::Result<PathBuf> {
    let (work, shown) = (dir.join("work"), dir.join("shown"));
    fs::create_dir(&work)?;
    fs::create_dir(&shown)?;
    let mut text = OsString::from("lowerdir=");
    text.push(lower);
    for (key, path) in [("upperdir", upper), ("workdir", work.as_path())] {
        text.push(format!(",{key}="));
        text.push(escaped(path));
    }
    text.push(options);
    if text.len() > OPTIONS_BYTES_MAX {
        return Err(io::Error::other("an overlay of so many layers cannot be mounted"));
    }
    let mounted = mount(Some("overlay"), &shown, Some("overlay"), MsFlags::empty(), Some(text.as_os_str()));
    mounted.map_err(|errno| {
        io::Error::other(format!(
            "an overlay that keeps what is written in the agent's state directory: {errno}; is that on ext4, XFS or btrfs?"
        ))
    })?;
    Ok(shown)
}

/// A path as an option of an overlay.
fn escaped(path: &Path) -> OsString {
    let mut text = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        if b"\\,:".contains(byte) {
            text.push(b'\\');
        }
        text.push(*byte);
    }
    OsStr::from_bytes(&text).to_owned()
}

/// A path from a root on.
fn inside(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

fn make_like(path: &Path, like: &fs::Metadata) -> io::Result<()> {
    chown(path, Some(like.uid()), Some(like.gid()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(like.mode() & 0o7777))
}

/// What may be done with a mount, as it is of the container's.
fn attributes(mount: &Mount) -> u64 {
    let named = [
        ("ro", libc::MOUNT_ATTR_RDONLY),
        ("nosuid", libc::MOUNT_ATTR_NOSUID),
        ("nodev", libc::MOUNT_ATTR_NODEV),
        ("noexec", libc::MOUNT_ATTR_NOEXEC),
        ("nosymfollow", libc::MOUNT_ATTR_NOSYMFOLLOW),
    ];
    named.iter().filter(|(option, _)| mount.has(option)).map(|(_, attribute)| attribute).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(options: &str) -> Option<ImageLayers> {
        image_layers(&Mount::parse(&format!("9 1 0:9 / / rw - overlay overlay {options}")).unwrap())
    }

    #[test]
    fn the_layers_of_an_image_are_those_below_the_writable_one() {
        let found =
            layers("rw,lowerdir=l/A:l/B,upperdir=/docker/overlay2/x/diff,workdir=/docker/overlay2/x/work");
        let found = found.unwrap();
        assert_eq!(
            (found.base.as_path(), found.lower.to_str()),
            (Path::new("/docker/overlay2"), Some("l/A:l/B"))
        );
        assert_eq!(found.options, ",index=off");
        let found = layers("rw,lowerdir+=/a\\054b,lowerdir+=/c,upperdir=/s/7/fs,metacopy=on,redirect_dir=on")
            .unwrap();
        assert_eq!(found.lower, "/a\\,b:/c");
        assert_eq!(found.options, ",metacopy=on,redirect_dir=on,index=off");
        assert_eq!(layers("rw,size=64k"), None);
    }

    #[test]
    fn what_may_be_done_with_a_mount_is_kept() {
        let mount = Mount::parse("9 1 0:9 / /x ro,nosuid,relatime - tmpfs none rw").unwrap();
        assert_eq!(attributes(&mount), libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID);
    }
}
