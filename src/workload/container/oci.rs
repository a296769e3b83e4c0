//! Containers of an OCI runtime that is used directly: runc, crun.
//!
//! The runtime is asked through its command line, whose verbs the specification names. What a container is made of stands in
//! its bundle's `config.json`; the one on the standby is made from the same, with the paths of that host.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::Value;

use super::{
    super::spec::{ContainerTree, ContainerTreeKind, Runtime},
    wrap,
};

/// Where a runtime is looked for: what runs as root must not depend on somebody's environment.
const PLACES: [&str; 4] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];
/// How long a verb may take.
const VERB_LIMIT: Duration = Duration::from_secs(30);
const VERB_POLL: Duration = Duration::from_millis(2);
/// The longest `config.json` that is read.
pub(super) const CONFIG_BYTES_MAX: u64 = 256 << 10;
/// Most of what a verb may say.
const SAID_BYTES_MAX: u64 = 64 << 10;
/// Most mounts of a container.
const MOUNTS_MAX: usize = 256;

/// Why a runtime did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// It is not installed.
    #[error("there is no {0} in {places}; install it: apt install {0}", places = PLACES.join(", "))]
    Missing(Runtime),
    /// It could not be executed.
    #[error("cannot run {program}: {source}")]
    Run {
        /// Its program.
        program: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// It said no.
    #[error("`{verb}` failed: {said}")]
    Failed {
        /// What was asked.
        verb: String,
        /// Its words.
        said: String,
    },
    /// It does not end.
    #[error("`{0}` did not end within {limit} s", limit = VERB_LIMIT.as_secs())]
    Slow(String),
    /// No such container.
    #[error("{runtime} knows no container {id}{hint}; see `{runtime} list`")]
    Unknown {
        /// Which runtime.
        runtime: Runtime,
        /// The container.
        id: String,
        /// The directory that was looked in.
        hint: String,
    },
    /// The bundle.
    #[error("cannot read {path}: {source}")]
    Config {
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// What it asks for is not supported.
    #[error("{0}")]
    Unfit(String),
}

/// What `state` says.
#[derive(Debug, Deserialize)]
pub(super) struct State {
    pub(super) status: String,
    #[serde(default)]
    pub(super) pid: u32,
    pub(super) bundle: PathBuf,
}

/// A runtime and its directory of containers.
#[derive(Debug)]
pub(super) struct Oci {
    runtime: Runtime,
    program: PathBuf,
    state: Option<PathBuf>,
}

impl Oci {
    pub(super) fn find(runtime: Runtime, state: Option<&Path>) -> Result<Self, OciError> {
        let program = PLACES.iter().map(|place| Path::new(place).join(runtime.program()));
        let program = program.into_iter().find(|program| program.is_file());
        let program = program.ok_or(OciError::Missing(runtime))?;
        Ok(Self { runtime, program, state: state.map(Path::to_owned) })
    }

    /// How the container is; `None` if the runtime knows none of that id.
    pub(super) fn state(&self, id: &str) -> Result<Option<State>, OciError> {
        match self.ask(&["state", id]) {
            Ok(said) => serde_json::from_str(&said)
                .map(Some)
                .map_err(|error| self.failed("state", id, &format!("its answer makes no sense: {error}"))),
            Err(OciError::Failed { said, .. }) if is_unknown(&said) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn unknown(&self, id: &str) -> OciError {
        let hint = self.state.as_ref().map(|dir| format!(" in {}", dir.display())).unwrap_or_default();
        OciError::Unknown { runtime: self.runtime, id: id.to_owned(), hint }
    }

    /// Creates and starts a container from a bundle; returns its pid 1. What it writes goes to `output`.
    pub(super) fn run(&self, id: &str, bundle: &Path, output: &OwnedFd) -> Result<u32, OciError> {
        let bundle_text = bundle.display().to_string();
        let mut command = self.command(&["run", "--detach", "--bundle", &bundle_text, id]);
        let copy = || output.try_clone().map_err(|source| self.run_error(source));
        // The container's standard error is its own, so the runtime's words have to go to a file.
        let log = bundle.join("runtime.log");
        let _ = std::fs::remove_file(&log);
        command.stdin(Stdio::null()).stdout(copy()?).stderr(copy()?);
        let status = self.wait(&mut command, &format!("{} run {id}", self.runtime))?;
        if !status {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            return Err(self.failed("run", id, &last_words(&said)));
        }
        let state = self.state(id)?.ok_or_else(|| self.unknown(id))?;
        Ok(state.pid)
    }

    /// Kills a container and has the runtime forget it; one that is not there is fine.
    pub(super) fn delete(&self, id: &str) -> Result<(), OciError> {
        match self.ask(&["delete", "--force", id]) {
            Err(OciError::Failed { said, .. }) if is_unknown(&said) => Ok(()),
            other => other.map(drop),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(state) = &self.state {
            command.arg("--root").arg(state);
        }
        if let ["run", "--detach", "--bundle", bundle, ..] = arguments {
            command.arg("--log").arg(Path::new(bundle).join("runtime.log"));
        }
        command.args(arguments).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    /// Runs a verb and returns what it prints.
    fn ask(&self, arguments: &[&str]) -> Result<String, OciError> {
        let verb = format!("{} {}", self.runtime, arguments.join(" "));
        let mut command = self.command(arguments);
        let mut out = tempfile()?;
        let copy = |file: &File| file.try_clone().map_err(|source| self.run_error(source));
        let mut err = tempfile()?;
        command.stdin(Stdio::null()).stdout(copy(&out)?).stderr(copy(&err)?);
        if self.wait(&mut command, &verb)? {
            return read_back(&mut out).map_err(|source| self.run_error(source));
        }
        let said = read_back(&mut err).map_err(|source| self.run_error(source))?;
        Err(OciError::Failed { verb, said: last_words(&said) })
    }

    /// Whether it ended well.
    fn wait(&self, command: &mut Command, verb: &str) -> Result<bool, OciError> {
        let mut child = command.spawn().map_err(|source| self.run_error(source))?;
        let until = Instant::now() + VERB_LIMIT;
        loop {
            if let Some(status) = child.try_wait().map_err(|source| self.run_error(source))? {
                return Ok(status.success());
            }
            if Instant::now() > until {
                let _ = child.kill();
                let _ = child.wait();
                return Err(OciError::Slow(verb.to_owned()));
            }
            std::thread::sleep(VERB_POLL);
        }
    }

    fn run_error(&self, source: io::Error) -> OciError {
        OciError::Run { program: self.program.clone(), source }
    }

    fn failed(&self, verb: &str, id: &str, said: &str) -> OciError {
        OciError::Failed { verb: format!("{} {verb} {id}", self.runtime), said: said.to_owned() }
    }
}

/// An unnamed file: a pipe could fill up.
fn tempfile() -> Result<File, OciError> {
    nix::sys::memfd::memfd_create(c"standin-oci", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map(File::from)
        .map_err(|errno| OciError::Run { program: "memfd_create".into(), source: errno.into() })
}

fn read_back(file: &mut File) -> io::Result<String> {
    io::Seek::rewind(file)?;
    let mut text = String::new();
    file.take(SAID_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

fn is_unknown(said: &str) -> bool {
    said.contains("does not exist") || said.contains("No such file or directory")
}

/// The last line that a runtime wrote: of several, the first are its libraries'.
fn last_words(said: &str) -> String {
    let line = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it did not say why");
    line.trim().to_owned()
}

/// A bundle's `config.json`, as far as it matters.
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
    pub(super) fn read(bundle: &Path) -> Result<(Self, String), OciError> {
        let path = bundle.join("config.json");
        let error = |source| OciError::Config { path: path.clone(), source };
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

    /// Whether a container made of this can be protected from inside.
    pub(super) fn check(&self) -> Result<(), OciError> {
        let unfit = |reason: String| Err(OciError::Unfit(reason));
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
    pub(super) fn wrap(&self) -> Result<PathBuf, OciError> {
        let is_ours = self.0["process"]["args"][0] == wrap::INIT;
        let mount = self.mounts().iter().find(|mount| mount["destination"] == wrap::INSIDE);
        match mount.and_then(|mount| mount["source"].as_str()).filter(|_| is_ours) {
            Some(source) => Ok(source.into()),
            None => Err(OciError::Unfit(format!(
                "its pid 1 is not {}; stop it, `standin wrap NAME --bundle DIR`, and start it again",
                wrap::INIT
            ))),
        }
    }

    /// Has the init in front of the command, and shows its directory; what is wrapped already is brought up to date.
    pub(super) fn wrap_with(&mut self, dir: &Path) -> Result<(), OciError> {
        let unfit = |what: &str| OciError::Unfit(format!("its config.json has no {what}"));
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

    /// Its replicated files, in the order of their records, and where they are on this host.
    pub(super) fn trees(&self, bundle: &Path) -> Result<Vec<(ContainerTree, PathBuf)>, OciError> {
        let root = ContainerTree { inside: "/".into(), kind: ContainerTreeKind::Root };
        let mut trees = vec![(root, self.root(bundle))];
        for mount in self.mounts() {
            let Some(inside) = mount["destination"].as_str().map(PathBuf::from) else { continue };
            if inside == Path::new(wrap::INSIDE) {
                continue;
            }
            match kind_of(mount, bundle) {
                MountKind::Bind { source, writable } if source.is_dir() => {
                    // What it cannot write is the operator's to keep equal; what it can is its own.
                    if writable {
                        trees.push((ContainerTree { inside, kind: ContainerTreeKind::Mount }, source));
                    }
                }
                MountKind::Bind { source, writable: true } if source.is_file() => {
                    return Err(OciError::Unfit(format!(
                        "the file {} is mounted writable as {}; mount the directory that it is in, or mount it \
                         read-only",
                        source.display(),
                        inside.display()
                    )));
                }
                MountKind::Memory => {
                    let from = inside.clone();
                    trees.push((ContainerTree { inside, kind: ContainerTreeKind::Memory }, from));
                }
                MountKind::Bind { .. } | MountKind::Other => {}
            }
        }
        Ok(trees)
    }

    /// The same container on this host: its own files at these places, in the order of [`Self::trees`].
    pub(super) fn localise(
        &mut self,
        trees: &[(ContainerTree, PathBuf)],
        wrap: &Path,
    ) -> Result<(), OciError> {
        for (tree, path) in trees {
            match tree.kind {
                ContainerTreeKind::Root => self.0["root"]["path"] = path_value(path),
                ContainerTreeKind::Mount => {
                    let mounts = self.0["mounts"].as_array_mut();
                    let mount = mounts.and_then(|mounts| {
                        mounts.iter_mut().find(|m| m["destination"] == path_value(&tree.inside))
                    });
                    let mount = mount.ok_or_else(|| {
                        OciError::Unfit(format!(
                            "its config.json mounts nothing as {}",
                            tree.inside.display()
                        ))
                    })?;
                    mount["source"] = path_value(path);
                }
                ContainerTreeKind::Memory => {}
            }
        }
        // What is the operator's to keep equal must be there.
        for mount in self.mounts().iter().filter(|mount| mount["destination"] != wrap::INSIDE) {
            let MountKind::Bind { source, .. } = kind_of(mount, Path::new("/")) else { continue };
            let is_ours = trees.iter().any(|(tree, _)| mount["destination"] == path_value(&tree.inside));
            if !is_ours && !source.exists() {
                return Err(OciError::Unfit(format!(
                    "{} is not there, which the container shows read-only as {}; put it on both hosts",
                    source.display(),
                    mount["destination"].as_str().unwrap_or("?")
                )));
            }
        }
        self.wrap_with(wrap)
    }

    /// Whether its sockets are in a network namespace of its own.
    pub(super) fn has_own_net(&self) -> bool {
        self.namespaces().any(|space| space["type"] == "network")
    }

    fn root(&self, bundle: &Path) -> PathBuf {
        bundle.join(self.0["root"]["path"].as_str().unwrap_or("rootfs"))
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
        assert!(config.wrap().is_err());
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
        let trees = config.trees(bundle.path()).unwrap();
        let inside: Vec<_> = trees.iter().map(|(tree, _)| tree.inside.to_str().unwrap()).collect();
        assert_eq!(inside, ["/", "/dev/shm", "/data"]);
        assert_eq!(trees[2].1, bundle.path().join("data"));

        let local: Vec<_> = trees
            .into_iter()
            .map(|(tree, _)| (tree.clone(), Path::new("/here").join(&tree.inside)))
            .collect();
        config.localise(&local, Path::new("/wraps/web")).unwrap();
        let again = config.trees(Path::new("/elsewhere")).unwrap();
        assert_eq!(again[0].1, Path::new("/"));
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
