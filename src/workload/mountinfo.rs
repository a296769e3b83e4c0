//! What is mounted in a mount namespace, as `/proc/PID/mountinfo` tells it.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::cgroup::unescape;

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) id: u64,
    /// What it is mounted on.
    pub(super) parent: u64,
    /// `major:minor` of its file system.
    pub(super) device: String,
    /// What of that it shows.
    pub(super) root: PathBuf,
    pub(super) point: PathBuf,
    /// Its own options, separated by commas.
    pub(super) options: String,
    /// The file system's type.
    pub(super) kind: String,
    /// The file system's options, blanks and the like still written in octal.
    pub(super) super_options: String,
}

impl Mount {
    pub(super) fn parse(line: &str) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let (id, parent) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let device = fields.next()?.to_owned();
        let (root, point) = (unescape(fields.next()?), unescape(fields.next()?));
        let options = fields.next()?.to_owned();
        let mut fields = file_system.split(' ');
        let kind = fields.next()?.to_owned();
        let super_options = fields.nth(1)?.to_owned();
        Some(Self { id, parent, device, root, point, options, kind, super_options })
    }

    /// Those that a process (a pid, or `self`) sees.
    pub(super) fn all_of(process: &str) -> io::Result<Vec<Self>> {
        let text = fs::read_to_string(format!("/proc/{process}/mountinfo"))?;
        Ok(text.lines().filter_map(Self::parse).collect())
    }

    /// Whether it shows a directory of a file system, or something below.
    pub(super) fn shows(&self, device: &str, dir: &Path) -> bool {
        self.device == device && self.root.starts_with(dir)
    }

    /// Whether it has an option that is but a word.
    pub(super) fn has(&self, option: &str) -> bool {
        self.options.split(',').any(|other| other == option)
    }

    /// The value of an option of its file system, as it is written there.
    pub(super) fn super_option(&self, key: &str) -> Option<&str> {
        self.super_options.split(',').find_map(|option| option.strip_prefix(key)?.strip_prefix('='))
    }
}

/// The mounts of a namespace that can be reached from its root, that one first and each behind what it is mounted on.
pub(super) fn reachable(mounts: &[Mount]) -> Vec<&Mount> {
    let mut on: HashMap<u64, Vec<&Mount>> = HashMap::new();
    for mount in mounts {
        on.entry(mount.parent).or_default().push(mount);
    }
    let Some(root) = mounts.iter().find(|mount| mount.point == Path::new("/")) else { return Vec::new() };
    let mut found = vec![root];
    let mut at = 0;
    while at < found.len() {
        let this = found[at];
        let children = on.get(&this.id).map_or(&[][..], Vec::as_slice);
        // What is mounted on the whole of it hides it, with all that is mounted in it.
        if let Some(cover) = children.iter().find(|child| child.point == this.point) {
            found[at] = cover;
        } else {
            found.extend(children);
            at += 1;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(id: u64, parent: u64, point: &str) -> String {
        format!("{id} {parent} 0:{id} / {point} rw,nosuid shared:1 - tmpfs none rw,size=64k")
    }

    #[test]
    fn a_mount_shows_a_directory_and_what_is_below_it() {
        let line = "80 71 0:74 /plain/srv\\040x/data /data rw,relatime shared:1 - tmpfs tmpfs rw,mode=755";
        let mount = Mount::parse(line).unwrap();
        assert_eq!((mount.id, mount.parent, mount.point.as_path()), (80, 71, Path::new("/data")));
        assert!(mount.shows("0:74", Path::new("/plain/srv x")));
        assert!(mount.shows("0:74", Path::new("/plain/srv x/data")));
        assert!(!mount.shows("0:75", Path::new("/plain/srv x")));
        assert!(!mount.shows("0:74", Path::new("/plain/srv x/data/more")));
        assert!(!mount.shows("0:74", Path::new("/plain/srv")), "names are compared whole");
        assert!(mount.has("relatime") && !mount.has("rela"));
        assert_eq!((mount.super_option("mode"), mount.super_option("mod")), (Some("755"), None));
    }

    #[test]
    fn what_is_hidden_is_not_reached() {
        let lines = [
            mount(1, 0, "/"),
            mount(5, 4, "/a/b/c"),
            mount(2, 1, "/a"),
            mount(3, 2, "/a/hidden"),
            mount(4, 2, "/a"),
        ];
        let mounts: Vec<Mount> = lines.iter().map(|line| Mount::parse(line).unwrap()).collect();
        let ids: Vec<u64> = reachable(&mounts).iter().map(|mount| mount.id).collect();
        assert_eq!(ids, [1, 4, 5]);
        assert!(reachable(&[]).is_empty());
    }
}
