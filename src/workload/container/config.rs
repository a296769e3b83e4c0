//! What an OCI container is made of: its bundle's `config.json`, as far as it matters.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read as _},
    path::{Component, Path, PathBuf},
};

use serde_json::Value;

use super::{
    super::spec::{ContainerTree, ContainerTreeKind},
    engine::{EngineError, Lendable, TreeAt, Trees, Unreplicated, a_file, behind_link, not_here, own_place},
    wrap,
};

/// The longest one that is read.
const CONFIG_BYTES_MAX: u64 = 256 << 10;
/// Most mounts of a container.
const MOUNTS_MAX: usize = 256;

/// See the module.
#[derive(Debug)]
pub(super) struct Config(Value);

/// What a mount is to us.
#[derive(Debug, PartialEq, Eq)]
enum MountKind {
    /// A directory of the host.
    Bind { source: PathBuf, writable: bool },
    /// Memory of its own, which the runtime does not fill.
    Memory,
    /// The kernel's, or made by the runtime.
    Other,
}

impl Config {
    pub(super) fn read(bundle: &Path) -> Result<(Self, String), EngineError> {
        let path = bundle.join("config.json");
        let error = |source| EngineError::Config { path: path.clone(), source };
        let mut text = String::new();
        let file = File::open(&path).map_err(error)?;
        file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text).map_err(error)?;
        if text.len() as u64 > CONFIG_BYTES_MAX {
            return Err(error(io::Error::other(format!("it is longer than {CONFIG_BYTES_MAX} bytes"))));
        }
        Ok((Self::parse(&text).map_err(|source| error(source.into()))?, text))
    }

    pub(super) fn parse(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text).map(Self)
    }

    pub(super) fn value(&self) -> &Value {
        &self.0
    }

    /// Whether a container made of this can be protected.
    pub(super) fn check(&self) -> Result<(), EngineError> {
        let unfit = |reason: String| Err(EngineError::Unfit(reason));
        if self.0["process"]["terminal"] == true {
            return unfit(
                "it has a terminal (process.terminal), which belongs to whoever started it and cannot move; \
                 start it without one"
                    .to_owned(),
            );
        }
        let namespaces: BTreeSet<&str> =
            self.namespaces().filter_map(|space| space["type"].as_str()).collect();
        if namespaces.contains("user") {
            return unfit(
                "it has a user namespace, in which CRIU could not restore it; start it without one"
                    .to_owned(),
            );
        }
        if let Some(missing) =
            ["pid", "mount", "ipc", "uts"].into_iter().find(|kind| !namespaces.contains(kind))
        {
            return unfit(format!("it shares the host's {missing} namespace; give it one of its own"));
        }
        let shared = self.namespaces().find(|space| space["path"].is_string() && space["type"] != "network");
        if let Some(shared) = shared {
            return unfit(format!(
                "it joins another's {} namespace, which does not move with it",
                shared["type"]
            ));
        }
        if self.mounts().len() > MOUNTS_MAX {
            return unfit(format!("it has more than {MOUNTS_MAX} mounts"));
        }
        Ok(())
    }

    /// The host's directory of the init, if the container is wrapped.
    pub(super) fn wrap(&self) -> Option<PathBuf> {
        let is_ours = self.0["process"]["args"][0] == wrap::INIT;
        let mount = self.mounts().iter().find(|mount| mount["destination"] == wrap::INSIDE);
        mount.and_then(|mount| mount["source"].as_str()).filter(|_| is_ours).map(PathBuf::from)
    }

    /// Has the init in front of the command, and shows its directory; what is wrapped already is brought up to date.
    pub(super) fn wrap_with(&mut self, dir: &Path) -> Result<(), EngineError> {
        let unfit = |what: &str| EngineError::Unfit(format!("its config.json has no {what}"));
        let arguments = self.0["process"]["args"].as_array_mut().ok_or_else(|| unfit("process.args"))?;
        if arguments.first().is_none_or(|first| first != wrap::INIT) {
            arguments.insert(0, wrap::INIT.into());
        }
        if !self.0["mounts"].is_array() {
            self.0["mounts"] = Value::Array(Vec::new());
        }
        let mounts = self.0["mounts"].as_array_mut().ok_or_else(|| unfit("mounts"))?;
        mounts.retain(|mount| mount["destination"] != wrap::INSIDE);
        mounts.push(serde_json::json!({
            "destination": wrap::INSIDE,
            "type": "bind",
            "source": dir,
            "options": ["bind", "ro", "nosuid", "nodev"],
        }));
        Ok(())
    }

    /// The same of one that is dumped whole: to its runtime /dev is a file system in memory as any other.
    pub(super) fn trees_of_whole(&self, bundle: &Path) -> Trees {
        let mut trees = self.trees(bundle);
        let dev = self.mounts().iter().filter(|mount| mount["type"] == "tmpfs");
        trees.extend(dev.filter(|mount| mount["destination"] == "/dev").map(|_| {
            (ContainerTree { inside: "/dev".into(), kind: ContainerTreeKind::Memory }, Ok(TreeAt::Memory))
        }));
        trees
    }

    /// Its replicated files, in the order of their records, and where they are on this host.
    pub(super) fn trees(&self, bundle: &Path) -> Trees {
        let root = ContainerTree { inside: "/".into(), kind: ContainerTreeKind::Root };
        let mut trees = vec![(root, Ok(TreeAt::Plain(self.root(bundle))))];
        for mount in self.mounts() {
            let Some(inside) = mount["destination"].as_str().map(PathBuf::from) else { continue };
            if inside == Path::new(wrap::INSIDE) {
                continue;
            }
            let mounted = |kind| ContainerTree { inside: inside.clone(), kind };
            match kind_of(mount, bundle) {
                // What it cannot write is the operator's to keep equal; what it can is its own.
                MountKind::Bind { source, writable: true } if source.is_dir() => {
                    trees.push((mounted(ContainerTreeKind::Mount), Ok(TreeAt::Plain(source))));
                }
                MountKind::Bind { source, writable: true } if source.is_file() => {
                    trees.push((mounted(ContainerTreeKind::Mount), Err(a_file(&source, &inside))));
                }
                MountKind::Memory => trees.push((mounted(ContainerTreeKind::Memory), Ok(TreeAt::Memory))),
                MountKind::Bind { .. } | MountKind::Other => {}
            }
        }
        trees
    }

    /// What it mounts read-only of this host.
    pub(super) fn lendable(&self, bundle: &Path) -> Vec<Lendable> {
        let lendable = |mount: &Value| {
            let inside = PathBuf::from(mount["destination"].as_str()?);
            match (kind_of(mount, bundle), kind_of(mount, Path::new("/"))) {
                (
                    MountKind::Bind { source, writable: false },
                    MountKind::Bind { source: wanted, writable: false },
                ) if inside != Path::new(wrap::INSIDE) => Some(Lendable { inside, source, wanted }),
                _ => None,
            }
        };
        self.mounts().iter().filter_map(lendable).collect()
    }

    /// The same container on this host: its own files at these places, in the order of [`Self::trees`].
    pub(super) fn localise(
        &mut self,
        (trees, places): (&[ContainerTree], &[TreeAt]),
        left: Unreplicated<'_>,
        data_dir: &Path,
    ) -> Result<(), EngineError> {
        for (tree, place) in trees.iter().zip(places) {
            let TreeAt::Plain(path) = place else { continue };
            match tree.kind {
                ContainerTreeKind::Root => self.0["root"]["path"] = path_value(path),
                ContainerTreeKind::Mount => {
                    let mounts = self.0["mounts"].as_array_mut();
                    let mount = mounts.and_then(|mounts| {
                        mounts.iter_mut().find(|m| m["destination"] == path_value(&tree.inside))
                    });
                    let mount = mount.ok_or_else(|| {
                        EngineError::Unfit(format!(
                            "its config.json mounts nothing as {}",
                            tree.inside.display()
                        ))
                    })?;
                    mount["source"] = path_value(path);
                }
                ContainerTreeKind::Memory => {}
            }
        }
        for mount in self.0["mounts"].as_array_mut().into_iter().flatten() {
            let MountKind::Bind { source, .. } = kind_of(mount, Path::new("/")) else { continue };
            let inside = PathBuf::from(mount["destination"].as_str().unwrap_or_default());
            if inside == Path::new(wrap::INSIDE) || trees.iter().any(|tree| tree.inside == inside) {
                continue;
            }
            let other = own_place(left, &inside, &source, data_dir)?.or_else(|| behind_link(&source));
            if let Some(other) = other {
                mount["source"] = path_value(&other);
            } else if !source.exists() {
                // What is shared, and what it only reads, is the operator's to have on both hosts.
                return Err(not_here(&source, &inside));
            }
        }
        Ok(())
    }

    /// Whether its sockets are in a network namespace of its own.
    pub(super) fn has_own_net(&self) -> bool {
        self.namespaces().any(|space| space["type"] == "network")
    }

    pub(super) fn root(&self, bundle: &Path) -> PathBuf {
        bundle.join(self.0["root"]["path"].as_str().unwrap_or("rootfs"))
    }

    /// The network namespace that it joins, if that has a name.
    pub(super) fn netns(&self) -> Option<PathBuf> {
        let own = self.namespaces().find(|space| space["type"] == "network")?;
        own["path"].as_str().map(PathBuf::from)
    }

    /// What it is not to see, over which its runtime mounts something empty.
    pub(super) fn masked(&self) -> impl Iterator<Item = &str> {
        self.0["linux"]["maskedPaths"].as_array().into_iter().flatten().filter_map(Value::as_str)
    }

    /// Whether it says what is mounted there.
    pub(super) fn tells_of(&self, inside: &Path) -> bool {
        let is_mounted = self.mounts().iter().any(|mount| mount["destination"] == path_value(inside));
        is_mounted || self.masked().any(|masked| Path::new(masked) == inside)
    }

    /// The options of its mount on `inside`.
    pub(super) fn options_of(&self, inside: &Path) -> impl Iterator<Item = &str> {
        let mount = self.mounts().iter().find(|mount| mount["destination"] == path_value(inside));
        let options = mount.and_then(|mount| mount["options"].as_array());
        options.into_iter().flatten().filter_map(Value::as_str)
    }

    /// The same container, to be restored by its runtime: its network namespace is there, its cgroup below one of ours.
    pub(super) fn restore_with(&mut self, netns: Option<&Path>, cgroup: &Path) {
        if let Some(netns) = netns {
            let spaces = self.0["linux"]["namespaces"].as_array_mut().into_iter().flatten();
            for space in spaces.filter(|space| space["type"] == "network") {
                space["path"] = path_value(netns);
            }
        }
        self.0["linux"]["cgroupsPath"] = path_value(cgroup);
    }

    fn namespaces(&self) -> impl Iterator<Item = &Value> {
        self.0["linux"]["namespaces"].as_array().into_iter().flatten()
    }

    fn mounts(&self) -> &[Value] {
        self.0["mounts"].as_array().map_or(&[], Vec::as_slice)
    }
}

fn path_value(path: &Path) -> Value {
    Value::String(path.display().to_string())
}

fn kind_of(mount: &Value, bundle: &Path) -> MountKind {
    let options = || mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str);
    if mount["type"] == "bind" || options().any(|option| option == "bind" || option == "rbind") {
        let source = bundle.join(mount["source"].as_str().unwrap_or_default());
        return MountKind::Bind { source, writable: !options().any(|option| option == "ro") };
    }
    // The runtime makes devices in /dev itself.
    let inside = Path::new(mount["destination"].as_str().unwrap_or_default());
    let is_plain = inside.is_absolute() && !inside.components().any(|part| part == Component::ParentDir);
    if mount["type"] == "tmpfs" && is_plain && inside != Path::new("/dev") {
        return MountKind::Memory;
    }
    MountKind::Other
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config(serde_json::json!({
            "process": { "terminal": false, "args": ["redis-server", "--port", "6379"] },
            "root": { "path": "rootfs" },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
                { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid"] },
                { "destination": "/data", "type": "bind", "source": "data", "options": ["rbind", "rw"] },
                { "destination": "/etc/conf", "type": "bind", "source": "/", "options": ["bind", "ro"] },
            ],
            "linux": { "namespaces": [
                { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }, { "type": "network" },
            ] },
        }))
    }

    #[test]
    fn a_config_is_wrapped_once() {
        let mut config = config();
        assert!(config.wrap().is_none());
        for _ in 0..2 {
            config.wrap_with(Path::new("/var/lib/standin/wrap/web")).unwrap();
        }
        assert_eq!(config.wrap().unwrap(), Path::new("/var/lib/standin/wrap/web"));
        assert_eq!(
            config.0["process"]["args"],
            serde_json::json!([wrap::INIT, "redis-server", "--port", "6379"])
        );
        assert_eq!(config.mounts().len(), 6);
    }

    #[test]
    fn what_a_container_writes_is_replicated_and_made_local() {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::create_dir(bundle.path().join("data")).unwrap();
        let mut config = config();
        let trees = config.trees(bundle.path());
        let inside: Vec<_> = trees.iter().map(|(tree, _)| tree.inside.to_str().unwrap()).collect();
        assert_eq!(inside, ["/", "/dev/shm", "/data"]);
        assert_eq!(trees[2].1, Ok(TreeAt::Plain(bundle.path().join("data"))));

        let (trees, _): (Vec<_>, Vec<_>) = trees.into_iter().unzip();
        let places: Vec<_> = (0..3).map(|number| TreeAt::Plain(format!("/here/{number}").into())).collect();
        config.localise((&trees, &places), Unreplicated::default(), Path::new("/here")).unwrap();
        let again = config.trees(Path::new("/elsewhere"));
        assert_eq!(again[0].1, Ok(TreeAt::Plain("/here/0".into())));
    }

    #[test]
    fn what_cannot_move_is_refused() {
        assert!(config().check().is_ok());
        let mut terminal = config();
        terminal.0["process"]["terminal"] = true.into();
        assert!(terminal.check().unwrap_err().to_string().contains("terminal"));
        let mut user = config();
        user.0["linux"]["namespaces"].as_array_mut().unwrap().push(serde_json::json!({ "type": "user" }));
        assert!(user.check().unwrap_err().to_string().contains("user namespace"));
        let mut host = config();
        host.0["linux"]["namespaces"].as_array_mut().unwrap().remove(0);
        assert!(host.check().unwrap_err().to_string().contains("pid namespace"));
    }
}
