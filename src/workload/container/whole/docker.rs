//! Docker's containers, whole: its daemon restores them from a checkpoint that is put before it, into a container that it has
//! created ahead.
//!
//! It has no way to be told anything of CRIU but runc's settings for all containers, `/etc/criu/runc.conf`, and is slow: it
//! packs the images and unpacks them. So what is not in the images the container is made to bind, in a place where it never
//! shows ([`mounts::HIDDEN`]). Its network the daemon makes only then.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    super::{
        docker::{Docker, LABEL, Recipe, check_addresses, create_of, text, unfit},
        engine::{Bundle, EngineError, Local, Prepared, Restore, TreeAt, Trees, behind_link},
        wrap,
    },
    mounts,
};
use crate::{
    criu::Install,
    model::Name,
    workload::spec::{ContainerTree, ContainerTreeKind},
};

/// runc's settings for CRIU, where it is told of none else.
const SETTINGS: &str = "/etc/criu/runc.conf";
/// Where the daemon says which process it is.
const PID_FILES: [&str; 2] = ["/run/docker.pid", "/var/run/docker.pid"];
/// Where a container sees the daemon's own init; in many, `/sbin` is a link to `/usr/sbin`.
const OWN_INIT: [&str; 2] = ["/sbin/docker-init", "/usr/sbin/docker-init"];
/// Where the daemon looks for that beside its PATH.
const OWN_INIT_PLACES: [&str; 4] =
    ["/usr/local/libexec/docker", "/usr/libexec/docker", "/usr/local/lib/docker", "/usr/lib/docker"];
/// What the daemon calls the images.
const CHECKPOINT: &str = "standin";
/// Says of a container that was made here for which workload.
const OF_WORKLOAD: &str = "org.standin.workload";

impl Docker {
    /// Whether the daemon can restore containers, and why not. Returns its directory.
    pub(in super::super) fn can_restore(&self) -> Result<PathBuf, EngineError> {
        let info = self.get("/info")?.unwrap_or_default();
        if info["ExperimentalBuild"] != true {
            return unfit(
                "the daemon restores none: put \"experimental\": true into /etc/docker/daemon.json and restart it".into(),
            );
        }
        if info["CgroupVersion"] != "2" || info["CgroupDriver"] != "cgroupfs" {
            return unfit(
                "the daemon must use cgroup v2, itself: --exec-opt native.cgroupdriver=cgroupfs".into(),
            );
        }
        let settings = fs::read_to_string(SETTINGS).unwrap_or_default();
        if !settings.lines().any(|line| line.trim() == "tcp-established") {
            return unfit(format!("connections would be lost: echo tcp-established >> {SETTINGS}"));
        }
        if let Err(reason) = criu_of_daemon() {
            return unfit(format!(
                "{reason}; put a link to a newer one into its PATH, such as /usr/local/sbin/criu"
            ));
        }
        Ok(text(&info["DockerRootDir"]).into())
    }

    /// Whether a container that runs, and whose pid 1 is not our init, can be dumped and restored whole.
    pub(in super::super) fn check_whole(&self, found: &Value) -> Result<Bundle, EngineError> {
        let refused = |reason: &str| {
            unfit(format!(
                "its pid 1 is not {}, and it cannot be protected whole either: {reason}. `standin wrap NAME` says how to \
                 start it with our init",
                wrap::INIT
            ))
        };
        let data = match self.can_restore() {
            Err(EngineError::Unfit(reason)) => return refused(&reason),
            other => other?,
        };
        let host = &found["HostConfig"];
        if !matches!(text(&host["RestartPolicy"]["Name"]), "" | "no") {
            let mend = "docker update --restart no";
            return refused(&format!("the daemon would start it anew, as a second copy ({mend} ends that)"));
        }
        if text(&host["Runtime"]) != "runc" {
            return refused("its runtime is not runc");
        }
        if text(&host["IpcMode"]) != "private" {
            return refused("its /dev/shm is not its own (--ipc private)");
        }
        if has_own_init(found)
            && let Err(EngineError::Unfit(reason)) = self.check_own_init()
        {
            return refused(&reason);
        }
        let id = text(&found["Id"]).to_owned();
        let root = text(&found["GraphDriver"]["Data"]["MergedDir"]).into();
        Ok(Bundle { dir: data.join("containers").join(&id), root, leaf: id })
    }

    /// Whether CRIU can show the daemon's own init in a container that is restored.
    fn check_own_init(&self) -> Result<(), EngineError> {
        let info = self.get("/info")?.unwrap_or_default();
        let path = path_of_daemon().unwrap_or_default();
        let places = path.split(':').chain(OWN_INIT_PLACES);
        // An absolute path is what it is, whatever it is joined to.
        let init =
            places.map(|dir| Path::new(dir).join(text(&info["InitBinary"]))).find(|init| init.is_file());
        let Some(init) = init else { return unfit("the daemon's own init (--init) is not found".into()) };
        match behind_link(&init) {
            None => Ok(()),
            Some(program) => unfit(format!(
                "the daemon's own init (--init), {}, is a link, which would be shown in place of the program: put \
                 \"init-path\": \"{}\" into /etc/docker/daemon.json and restart the daemon",
                init.display(),
                program.display()
            )),
        }
    }

    /// Creates the container that will be restored. One that was created before has the files of the last epoch.
    pub(in super::super) fn prepare_whole(
        &self,
        (workload, name): (&Name, &str),
        trees: &[ContainerTree],
        config: &str,
        local: &Prepared<'_>,
    ) -> Result<(Bundle, Vec<TreeAt>), EngineError> {
        let data = self.can_restore()?;
        let recipe = recipe_of(config)?;
        if recipe.create["HostConfig"]["Init"] == true {
            self.check_own_init()?;
        }
        self.check_image(&recipe)?;
        for network in &recipe.networks {
            self.provide_network(network)?;
        }
        let digest = blake3::hash(config.as_bytes()).to_hex().to_string();
        if !self.is_created((workload, name), &recipe, &digest, local.fresh)? {
            let mut body = recipe.create.clone();
            if !body["Labels"].is_object() {
                body["Labels"] = serde_json::json!({});
            }
            body["Labels"][OF_WORKLOAD] = workload.as_str().into();
            body["HostConfig"]["CgroupParent"] = local.cgroup.display().to_string().into();
            if !body["HostConfig"]["Binds"].is_array() {
                body["HostConfig"]["Binds"] = serde_json::json!([]);
            }
            let binds = body["HostConfig"]["Binds"].as_array_mut().into_iter();
            binds.for_each(|binds| binds.extend(hidden_binds(trees, local).map(Value::from)));
            let none = Path::new("/");
            let (data_dir, bundle, left) = (local.data_dir, local.bundle, local.left);
            let there = Local { wrap: none, data_dir, bundle, fresh: true, left };
            self.create(name, body, &recipe, &digest, (trees, &there))?;
        }
        let found = self.inspect(name)?.ok_or_else(|| self.unknown(name))?;
        let layers = &found["GraphDriver"]["Data"];
        let parts = ["LowerDir", "UpperDir", "WorkDir"].map(|part| text(&layers[part]));
        mounts::mount_overlay(local.merged, parts)
            .map_err(|source| EngineError::Config { path: local.merged.to_owned(), source })?;
        let here = self.trees_of_whole(&found)?;
        let place = |tree: &ContainerTree| {
            let (_, at) = here.iter().find(|(other, _)| other == tree)?;
            Some(match at.as_ref().ok()? {
                TreeAt::Overlay { upper, .. } => {
                    TreeAt::Overlay { upper: upper.clone(), merged: local.merged.to_owned() }
                }
                other => other.clone(),
            })
        };
        let places: Option<Vec<TreeAt>> = trees.iter().map(place).collect();
        let places =
            places.ok_or_else(|| EngineError::Unfit("it has other mounts than it should".to_owned()))?;
        let (id, root) = (text(&found["Id"]).to_owned(), text(&layers["MergedDir"]).into());
        Ok((Bundle { dir: data.join("containers").join(&id), root, leaf: id }, places))
    }

    /// Its replicated files, and where they are on this host. /dev is among them: of what is in memory nothing is in the image.
    pub(in super::super) fn trees_of_whole(&self, found: &Value) -> Result<Trees, EngineError> {
        let mut trees = self.trees(found)?;
        let dev = ContainerTree { inside: "/dev".into(), kind: ContainerTreeKind::Memory };
        trees.push((dev, Ok(TreeAt::Memory)));
        Ok(trees)
    }

    /// Whether there is one that is to be kept; others of the workload go.
    fn is_created(
        &self,
        (workload, name): (&Name, &str),
        recipe: &Recipe,
        digest: &str,
        fresh: bool,
    ) -> Result<bool, EngineError> {
        let Some(found) = self.inspect(name)? else { return Ok(false) };
        let labels = &found["Config"]["Labels"];
        let is_ours = labels[OF_WORKLOAD] == workload.as_str();
        // What was started here has ended when it went to the other host. Its host name tells it from any other.
        let is_the_first =
            found["State"]["Status"] == "exited" && is_alike(&create_of(&found), &recipe.create);
        if !is_ours && !is_the_first {
            return unfit(format!(
                "another container named {name} is on the standby, which is not this workload's; remove or rename it there"
            ));
        }
        if is_ours && !fresh && labels[LABEL] == digest {
            return self.kill(name).map(|()| true);
        }
        self.remove(name).map(|()| false)
    }

    /// Has the daemon start it from CRIU's images; returns its pid 1.
    pub(in super::super) fn restore_whole(
        &self,
        name: &str,
        config: &str,
        restore: &Restore<'_>,
    ) -> Result<u32, EngineError> {
        let recipe = recipe_of(config)?;
        let checkpoint = restore.bundle.dir.join("checkpoints").join(CHECKPOINT);
        let failed = |source| EngineError::Config { path: checkpoint.clone(), source };
        let _ = fs::remove_dir_all(&checkpoint);
        let copied = copy_images(restore.images, &checkpoint).map_err(failed);
        let path = format!("/containers/{name}/start?checkpoint={CHECKPOINT}");
        let started = copied.and_then(|()| self.post(&path, &Value::Null));
        // They hold the workload's memory.
        fs::remove_dir_all(&checkpoint).map_err(failed)?;
        started?;
        let found = self.inspect(name)?.ok_or_else(|| self.unknown(name))?;
        check_addresses(&found, &recipe)?;
        match found["State"]["Pid"].as_u64() {
            Some(pid) if pid > 0 => Ok(pid as u32),
            _ => unfit("it has ended at once; see `docker logs`".into()),
        }
    }

    /// See [`super::super::engine::restored`].
    pub(in super::super) fn restored_whole(
        &self,
        name: &str,
        dir: &Path,
    ) -> Result<Option<u32>, EngineError> {
        let Some(found) = self.inspect(name)? else { return Ok(None) };
        let is_ours = dir.file_name().and_then(|id| id.to_str()) == found["Id"].as_str();
        let pid = found["State"]["Pid"].as_u64().unwrap_or(0) as u32;
        Ok((is_ours && found["State"]["Running"] == true && pid > 0).then_some(pid))
    }

    /// See [`super::super::engine::end_whole`].
    pub(in super::super) fn end_whole(
        &self,
        name: &str,
        dir: &Path,
        forgotten: bool,
    ) -> Result<(), EngineError> {
        let Some(found) = self.inspect(name)? else { return Ok(()) };
        if dir.file_name().and_then(|id| id.to_str()) != found["Id"].as_str() {
            return Ok(());
        }
        if forgotten { self.remove(name) } else { self.kill(name) }
    }
}

/// Whether a container was created like another, whether or not it was said that it has the daemon's own init.
fn is_alike(created: &Value, other: &Value) -> bool {
    let without_init = |of: &Value| {
        let mut of = of.clone();
        of["HostConfig"].as_object_mut().map(|host| host.remove("Init"));
        of
    };
    without_init(created) == without_init(other)
}

/// Whether the daemon has its own init (`--init`) as pid 1 of a container that runs.
pub(in super::super) fn has_own_init(found: &Value) -> bool {
    let pid = found["State"]["Pid"].as_u64().unwrap_or(0) as u32;
    mounts::Mounts::of(pid).is_ok_and(|mounts| {
        mounts.external().any(|inside| OWN_INIT.iter().any(|own| inside == Path::new(own)))
    })
}

fn recipe_of(config: &str) -> Result<Recipe, EngineError> {
    serde_json::from_str(config)
        .map_err(|error| EngineError::Unfit(format!("what it is made from is not understood: {error}")))
}

/// What it binds beside its own mounts; see [`mounts::HIDDEN`].
fn hidden_binds<'a>(
    trees: &'a [ContainerTree],
    local: &'a Prepared<'_>,
) -> impl Iterator<Item = String> + 'a {
    let memory = trees.iter().enumerate().filter(|(_, tree)| super::is_memory(tree));
    let memory =
        memory.map(|(number, tree)| (local.memory.join(number.to_string()), mounts::hidden(&tree.inside)));
    let all = memory.chain([(local.nothing.to_owned(), mounts::hidden(mounts::NOTHING.as_ref()))]);
    all.map(|(here, inside)| format!("{}:{}", here.display(), inside.display()))
}

/// The options of a container's file system in memory.
pub(super) fn options_of(config: &str, inside: &Path) -> Vec<String> {
    let recipe = recipe_of(config).map(|recipe| recipe.create).unwrap_or_default();
    let host = &recipe["HostConfig"];
    let given = host["Tmpfs"][inside.display().to_string()].as_str().map(str::to_owned);
    let options = given.unwrap_or_else(|| match inside.to_str() {
        Some("/dev") => "nosuid,strictatime,mode=755,size=65536k".to_owned(),
        Some("/dev/shm") => {
            format!("nosuid,nodev,noexec,mode=1777,size={}", host["ShmSize"].as_u64().unwrap_or(64 << 20))
        }
        _ => String::new(),
    });
    // As the daemon adds them.
    let always = ["noexec", "nosuid", "nodev"].map(str::to_owned);
    let always = always.into_iter().filter(|_| inside != Path::new("/dev"));
    options.split(',').map(str::to_owned).chain(always).collect()
}

fn copy_images(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

/// The CRIU that runc finds when the daemon starts it.
fn criu_of_daemon() -> Result<Install, String> {
    let path = path_of_daemon()?;
    let found = path.split(':').map(|dir| Path::new(dir).join("criu")).find(|criu| criu.is_file());
    let found = found.ok_or("the daemon finds no CRIU")?;
    Install::find(Some(&found)).map_err(|error| format!("what the daemon finds does not serve: {error}"))
}

/// Where the daemon looks for programs.
fn path_of_daemon() -> Result<String, String> {
    let pid = PID_FILES.iter().find_map(|path| fs::read_to_string(path).ok());
    let pid = pid.ok_or("the daemon's process is not known")?;
    let environ = fs::read(format!("/proc/{}/environ", pid.trim())).map_err(|error| error.to_string())?;
    let path = environ.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"PATH="));
    Ok(String::from_utf8_lossy(path.unwrap_or(b"/usr/sbin:/usr/bin:/sbin:/bin")).into_owned())
}
