//! Containers of a daemon with Docker's API: dockerd, and Podman's service.
//!
//! What a container is made from is what the daemon says of it when it is inspected, turned round: the same fields create the
//! same container elsewhere. Its image must be there, by the same digest; so must what it mounts read-only. Its networks are
//! made if they are bridges and missing; its address and hardware address are the same.
//!
//! Its files are its writable layer (the upper directory of an overlay), its volumes and the directories that it mounts
//! writable, and its file systems in memory.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    super::spec::{ContainerTree, ContainerTreeKind, Daemon, Engine, ImageId},
    engine::{
        EngineError, Found, Lendable, Local, Made, Network, PidOne, Survey, TreeAt, Trees, a_file,
        behind_link, check_is_ours, is_ours, not_here, own_place,
    },
    whole::{HIDDEN, has_own_init},
    wrap,
};
use crate::{model::Name, unix_http};

/// How long a request may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// Says of a container that was made here from what.
pub(super) const LABEL: &str = "org.standin.spec";
/// Drivers whose writable layer is an overlay's upper directory.
const OVERLAY_DRIVERS: [&str; 2] = ["overlay2", "overlay"];

/// What a container is made from.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Recipe {
    /// What people call its image, which is known by its digest.
    image_name: String,
    /// The body of the request that creates it.
    pub(super) create: Value,
    /// Its networks, each with what makes it where it is missing.
    pub(super) networks: Vec<NetworkRecipe>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NetworkRecipe {
    name: String,
    /// `None`: the daemon's own.
    create: Option<Value>,
    /// How the container is in it.
    endpoint: Value,
    /// The address that it has in it.
    address: String,
}

/// A daemon.
#[derive(Debug)]
pub(super) struct Docker {
    daemon: Daemon,
    socket: PathBuf,
}

impl Docker {
    pub(super) fn of(daemon: Daemon) -> Self {
        let socket = match daemon {
            Daemon::Docker => "/run/docker.sock",
            Daemon::Podman => "/run/podman/podman.sock",
        };
        Self { daemon, socket: socket.into() }
    }

    /// See [`super::engine::survey`].
    pub(super) fn survey(&self) -> Survey {
        let engine = self.daemon.program();
        let info = match self.get("/info") {
            Ok(info) => info.unwrap_or_default(),
            Err(_) if !self.socket.exists() => {
                let found = format!("no daemon at {}", self.socket.display());
                return Survey { engine, found, trouble: None, whole: None };
            }
            Err(error) => {
                let trouble = Some("start its daemon, or remove its socket".to_owned());
                return Survey { engine, found: error.to_string(), trouble, whole: None };
            }
        };
        let driver = text(&info["Driver"]);
        let found = format!("{engine} {}, storage driver {driver}", text(&info["ServerVersion"]));
        let fits = OVERLAY_DRIVERS.contains(&driver);
        let trouble =
            (!fits).then(|| "its containers cannot be protected: use overlay2 as storage driver".to_owned());
        let whole = match self.daemon {
            Daemon::Docker => self.can_restore().map(drop).map_err(|error| error.to_string()),
            Daemon::Podman => Err("its containers have to be wrapped".to_owned()),
        };
        Survey { engine, found, trouble, whole: Some(whole) }
    }

    /// A container that runs and can be protected.
    pub(super) fn find_container(&self, id: &str) -> Result<Found, EngineError> {
        let found = self.inspect(id)?.ok_or_else(|| self.unknown(id))?;
        let program = self.daemon.program();
        let state = &found["State"];
        if state["Paused"] == true {
            return unfit(format!("it is paused; `{program} unpause {id}` first"));
        }
        if state["Running"] != true {
            return unfit(format!("it is {}, not running; start it first", text(&state["Status"])));
        }
        check(&found)?;
        let (pid_one, trees) = match (wrap_of(&found), self.daemon) {
            (Ok(wrap), _) => (PidOne::Init(wrap), self.trees(&found)?),
            (Err(_), Daemon::Docker) => {
                (PidOne::Application(self.check_whole(&found)?), self.trees_of_whole(&found)?)
            }
            (Err(reason), Daemon::Podman) => return Err(reason),
        };
        let networks = self.networks(&found)?;
        let name = text(&found["Name"]).trim_start_matches('/').to_owned();
        let (image_name, mut create) = (text(&found["Config"]["Image"]).to_owned(), create_of(&found));
        if matches!(pid_one, PidOne::Application(_)) && has_own_init(&found) {
            // It may be so because of a setting of this daemon alone.
            create["HostConfig"]["Init"] = true.into();
        }
        let recipe = Recipe { image_name, create, networks };
        let config = serde_json::to_string(&recipe).map_err(|error| EngineError::Unfit(error.to_string()))?;
        Ok(Found {
            engine: Engine::Docker { daemon: self.daemon, name, config },
            pid: state["Pid"].as_u64().unwrap_or(0) as u32,
            pid_one,
            trees,
            lendable: lendable(&found),
            network: if network_mode(&found) == "host" { Network::Host } else { Network::Own },
        })
    }

    /// See [`super::engine::make`].
    pub(super) fn make(
        &self,
        workload: &Name,
        trees: &[ContainerTree],
        name: &str,
        config: &str,
        local: &Local<'_>,
    ) -> Result<Made, EngineError> {
        let recipe: Recipe = serde_json::from_str(config).map_err(|error| {
            EngineError::Unfit(format!("what it is made from is not understood: {error}"))
        })?;
        self.check_image(&recipe)?;
        for network in &recipe.networks {
            self.provide_network(network)?;
        }
        let digest = blake3::hash(config.as_bytes()).to_hex().to_string();
        let mut is_there = false;
        if let Some(found) = self.inspect(name)? {
            check_is_ours(workload, name, wrap_of(&found).ok().as_deref())?;
            is_there = !local.fresh && found["Config"]["Labels"][LABEL] == digest.as_str();
            if is_there {
                self.kill(name)?;
            } else {
                self.remove(name)?;
            }
        }
        if !is_there {
            self.create(name, recipe.create.clone(), &recipe, &digest, (trees, local))?;
        }
        self.post(&format!("/containers/{name}/start"), &Value::Null)?;
        let found = self.inspect(name)?.ok_or_else(|| self.unknown(name))?;
        check_addresses(&found, &recipe)?;
        let here = self.trees(&found)?;
        let place = |tree: &ContainerTree| {
            here.iter().find(|(other, _)| other == tree).and_then(|(_, at)| at.clone().ok())
        };
        let places: Option<Vec<TreeAt>> = trees.iter().map(place).collect();
        let places =
            places.ok_or_else(|| EngineError::Unfit("it has other mounts than it should".to_owned()))?;
        Ok(Made { pid: found["State"]["Pid"].as_u64().unwrap_or(0) as u32, trees: places, output: None })
    }

    /// `body`: the recipe's, perhaps with changes.
    pub(super) fn create(
        &self,
        name: &str,
        mut body: Value,
        recipe: &Recipe,
        digest: &str,
        (trees, local): (&[ContainerTree], &Local<'_>),
    ) -> Result<(), EngineError> {
        if !body["Labels"].is_object() {
            body["Labels"] = json!({});
        }
        body["Labels"][LABEL] = digest.into();
        localise(&mut body["HostConfig"], trees, local)?;
        if let Some(first) = recipe.networks.first() {
            body["NetworkingConfig"] = json!({ "EndpointsConfig": { first.name.as_str(): first.endpoint } });
            // Where it belongs for daemons before API 1.44; later ones take it from the endpoint, and here too.
            body["MacAddress"] = first.endpoint["MacAddress"].clone();
        }
        self.post(&format!("/containers/create?name={name}"), &body)?;
        for network in recipe.networks.iter().skip(1) {
            let body = json!({ "Container": name, "EndpointConfig": network.endpoint });
            self.post(&format!("/networks/{}/connect", network.name), &body)?;
        }
        Ok(())
    }

    /// Whether there is one, and it is the workload's.
    pub(super) fn is_ours(&self, workload: &Name, name: &str) -> Result<bool, EngineError> {
        let found = self.inspect(name)?;
        Ok(found.is_some_and(|found| is_ours(workload, wrap_of(&found).ok().as_deref())))
    }

    /// Ends a container, and leaves it there with its files; one that does not run is fine. The workload in it is dead already.
    pub(super) fn kill(&self, name: &str) -> Result<(), EngineError> {
        let Some(found) = self.inspect(name)? else { return Ok(()) };
        if found["State"]["Running"] != true {
            return Ok(());
        }
        if found["State"]["Paused"] == true {
            // No daemon kills what it has paused.
            self.post(&format!("/containers/{name}/unpause"), &Value::Null)?;
        }
        self.post(&format!("/containers/{name}/kill"), &Value::Null)?;
        self.post(&format!("/containers/{name}/wait?condition=not-running"), &Value::Null).map(drop)
    }

    /// Removes a container with its files, but for its volumes; that there is none is fine.
    pub(super) fn remove(&self, name: &str) -> Result<(), EngineError> {
        let path = format!("/containers/{name}?force=true");
        let (status, said) = self.ask(&Method::DELETE, &path, &Value::Null)?;
        match status {
            StatusCode::NOT_FOUND => Ok(()),
            status if status.is_success() => Ok(()),
            _ => Err(self.failed(&path, &said)),
        }
    }

    pub(super) fn inspect(&self, id: &str) -> Result<Option<Value>, EngineError> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        if id.is_empty() || !id.chars().all(is_plain) {
            return unfit(format!("{id:?} is no container's name"));
        }
        self.get(&format!("/containers/{id}/json"))
    }

    /// The image of a container that is made from this.
    pub(super) fn image_of(daemon: Daemon, config: &str) -> Option<ImageId> {
        let recipe: Recipe = serde_json::from_str(config).ok()?;
        Some(ImageId { daemon, id: text(&recipe.create["Image"]).to_owned(), name: recipe.image_name })
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn program(&self) -> &'static str {
        self.daemon.program()
    }

    pub(super) fn check_image(&self, recipe: &Recipe) -> Result<(), EngineError> {
        let id = text(&recipe.create["Image"]);
        if self.get(&format!("/images/{id}/json"))?.is_some() {
            return Ok(());
        }
        let (name, program) = (&recipe.image_name, self.daemon.program());
        unfit(format!(
            "the standby has no image {name} of the same digest ({id}); have it sent: standin protect … --ship-image; or on \
             the primary: {program} save {name} | ssh STANDBY {program} load"
        ))
    }

    /// Its networks, and what makes them.
    fn networks(&self, found: &Value) -> Result<Vec<NetworkRecipe>, EngineError> {
        let mode = network_mode(found);
        if matches!(mode, "host" | "none") {
            return Ok(Vec::new());
        }
        let mut networks = Vec::new();
        for (name, endpoint) in found["NetworkSettings"]["Networks"].as_object().into_iter().flatten() {
            let definition = self.get(&format!("/networks/{name}"))?.unwrap_or_default();
            let driver = text(&definition["Driver"]);
            if driver != "bridge" {
                return unfit(format!(
                    "its network {name} is a {driver}, not a bridge: it would be heard twice while the standby waits"
                ));
            }
            // The daemon's own bridge gives no address that is asked for.
            let is_default = matches!(name.as_str(), "bridge" | "podman");
            let address = text(&endpoint["IPAddress"]).to_owned();
            let mut wanted = json!({ "MacAddress": endpoint["MacAddress"], "Aliases": endpoint["Aliases"] });
            if !is_default {
                wanted["IPAMConfig"] = json!({ "IPv4Address": address });
                if !text(&endpoint["GlobalIPv6Address"]).is_empty() {
                    wanted["IPAMConfig"]["IPv6Address"] = endpoint["GlobalIPv6Address"].clone();
                }
            }
            let create = (!is_default).then(|| {
                json!({
                    "Name": name, "CheckDuplicate": true, "Driver": driver, "IPAM": definition["IPAM"],
                    "Internal": definition["Internal"], "EnableIPv6": definition["EnableIPv6"],
                    "Options": definition["Options"], "Labels": definition["Labels"],
                })
            });
            networks.push(NetworkRecipe { name: name.clone(), create, endpoint: wanted, address });
        }
        Ok(networks)
    }

    pub(super) fn provide_network(&self, network: &NetworkRecipe) -> Result<(), EngineError> {
        match (&network.create, self.get(&format!("/networks/{}", network.name))?) {
            (_, Some(_)) => Ok(()),
            (Some(create), None) => self.post("/networks/create", create).map(drop),
            (None, None) => unfit(format!("the standby's daemon has no network {}", network.name)),
        }
    }

    /// Its replicated files, in the order of their records, and where they are on this host.
    pub(super) fn trees(&self, found: &Value) -> Result<Trees, EngineError> {
        let (driver, data) = (text(&found["GraphDriver"]["Name"]), &found["GraphDriver"]["Data"]);
        let (upper, merged) = (text(&data["UpperDir"]), text(&data["MergedDir"]));
        if !OVERLAY_DRIVERS.contains(&driver) || upper.is_empty() || merged.is_empty() {
            return unfit(format!(
                "the daemon keeps its files with the storage driver {driver}, whose changes cannot be told; use overlay2"
            ));
        }
        let root = ContainerTree { inside: "/".into(), kind: ContainerTreeKind::Root };
        let mut trees = vec![(root, Ok(TreeAt::Overlay { upper: upper.into(), merged: merged.into() }))];
        for mount in found["Mounts"].as_array().into_iter().flatten() {
            let inside = PathBuf::from(text(&mount["Destination"]));
            if inside == Path::new(wrap::INSIDE) || inside.starts_with(HIDDEN) || mount["RW"] != true {
                continue;
            }
            match text(&mount["Type"]) {
                "volume" if text(&mount["Driver"]) == "local" => {
                    let at = match self.check_alone(text(&mount["Name"]), found) {
                        Ok(()) => Ok(TreeAt::Plain(text(&mount["Source"]).into())),
                        Err(EngineError::Unfit(reason)) => Err(reason),
                        Err(error) => return Err(error),
                    };
                    trees.push((ContainerTree { inside, kind: ContainerTreeKind::Mount }, at));
                }
                "bind" => {
                    let source = PathBuf::from(text(&mount["Source"]));
                    let at = if source.is_file() {
                        Err(a_file(&source, &inside))
                    } else if source.is_dir() {
                        Ok(TreeAt::Plain(source))
                    } else {
                        // Sockets and devices are the host's.
                        continue;
                    };
                    trees.push((ContainerTree { inside, kind: ContainerTreeKind::Mount }, at));
                }
                "tmpfs" => {
                    let tree = ContainerTree { inside, kind: ContainerTreeKind::Memory };
                    trees.push((tree, Ok(TreeAt::Memory)));
                }
                // Volumes of other drivers are on a network: the same on both hosts.
                _ => {}
            }
        }
        let tmpfs =
            found["HostConfig"]["Tmpfs"].as_object().into_iter().flatten().map(|(path, _)| path.as_str());
        for inside in tmpfs.chain(["/dev/shm"]).map(PathBuf::from) {
            if !trees.iter().any(|(tree, _)| tree.inside == inside) {
                trees.push((ContainerTree { inside, kind: ContainerTreeKind::Memory }, Ok(TreeAt::Memory)));
            }
        }
        Ok(trees)
    }

    /// A volume that others write to would be of two instants.
    fn check_alone(&self, volume: &str, found: &Value) -> Result<(), EngineError> {
        let filter = format!("%7B%22volume%22%3A%5B%22{volume}%22%5D%7D");
        let users = self.get(&format!("/containers/json?filters={filter}"))?.unwrap_or_default();
        let other = users.as_array().into_iter().flatten().find(|user| user["Id"] != found["Id"]);
        match other {
            None => Ok(()),
            Some(other) => unfit(format!(
                "its volume {volume} is mounted by {} too, which does not move with it; stop that one, or give it a \
                 volume of its own",
                text(&other["Names"][0]).trim_start_matches('/')
            )),
        }
    }

    pub(super) fn get(&self, path: &str) -> Result<Option<Value>, EngineError> {
        let (status, said) = self.ask(&Method::GET, path, &Value::Null)?;
        match status {
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => Ok(Some(said)),
            _ => Err(self.failed(path, &said)),
        }
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Value, EngineError> {
        let (status, said) = self.ask(&Method::POST, path, body)?;
        // Already as it should be.
        if status.is_success() || status == StatusCode::NOT_MODIFIED {
            Ok(said)
        } else {
            Err(self.failed(path, &said))
        }
    }

    fn ask(&self, method: &Method, path: &str, body: &Value) -> Result<(StatusCode, Value), EngineError> {
        let bytes = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let error = |source: io::Error| EngineError::Daemon {
            daemon: self.daemon.program(),
            socket: self.socket.clone(),
            source,
        };
        let (status, said) =
            unix_http::call(&self.socket, method, path, bytes, Some(REQUEST_LIMIT)).map_err(error)?;
        Ok((status, serde_json::from_slice(&said).unwrap_or_default()))
    }

    pub(super) fn unknown(&self, id: &str) -> EngineError {
        EngineError::Unknown {
            engine: self.daemon.program(),
            id: id.to_owned(),
            hint: String::new(),
            list: "ps --all",
        }
    }

    pub(super) fn failed(&self, path: &str, said: &Value) -> EngineError {
        let said = text(&said["message"]);
        let said = if said.is_empty() { "it did not say why" } else { said };
        EngineError::Failed { verb: format!("{} {path}", self.daemon.program()), said: said.to_owned() }
    }
}

pub(super) fn unfit<T>(reason: String) -> Result<T, EngineError> {
    Err(EngineError::Unfit(reason))
}

/// What creates another one like it, but for its networks.
pub(super) fn create_of(found: &Value) -> Value {
    let mut create = found["Config"].clone();
    create["HostConfig"] = found["HostConfig"].clone();
    create["Image"] = found["Image"].clone();
    if let Some(binds) = create["HostConfig"]["Binds"].as_array_mut() {
        binds.retain(|bind| !text(bind).contains(&format!(":{HIDDEN}/")));
    }
    create
}

pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn network_mode(found: &Value) -> &str {
    text(&found["HostConfig"]["NetworkMode"])
}

/// Whether a container like this can be protected from inside.
fn check(found: &Value) -> Result<(), EngineError> {
    if found["Config"]["Tty"] == true {
        return unfit(
            "it has a terminal (-t), which belongs to whoever started it and cannot move; start it without one".into(),
        );
    }
    let host = &found["HostConfig"];
    for (key, what) in
        [("PidMode", "pid"), ("IpcMode", "ipc"), ("UTSMode", "uts"), ("NetworkMode", "network")]
    {
        let mode = text(&host[key]);
        if mode.starts_with("container:") || mode == "host" && key != "NetworkMode" {
            return unfit(format!("its {what} namespace is another's ({mode}); give it one of its own"));
        }
    }
    if host["AutoRemove"] == true {
        return unfit(
            "it was started with --rm: its files would go whenever it ends; start it without".into(),
        );
    }
    Ok(())
}

/// The host's directory of the init, if the container is wrapped.
fn wrap_of(found: &Value) -> Result<PathBuf, EngineError> {
    let mounts = found["Mounts"].as_array().into_iter().flatten();
    let mount = mounts.into_iter().find(|mount| mount["Destination"] == wrap::INSIDE);
    match mount.filter(|_| found["Path"] == wrap::INIT) {
        Some(mount) => Ok(text(&mount["Source"]).into()),
        None => {
            unfit(format!("its pid 1 is not {}; `standin wrap NAME` says how to start it so", wrap::INIT))
        }
    }
}

/// What it mounts read-only of this host.
fn lendable(found: &Value) -> Vec<Lendable> {
    let is_read_only = |inside: &str| {
        let mut mounts = found["Mounts"].as_array().into_iter().flatten();
        mounts.any(|m| m["Type"] == "bind" && m["RW"] != true && m["Destination"] == inside)
    };
    let host = &found["HostConfig"];
    let binds = host["Binds"].as_array().into_iter().flatten().filter_map(|bind| {
        let mut parts = text(bind).splitn(3, ':');
        Some((parts.next()?, parts.next()?))
    });
    let mounts = host["Mounts"].as_array().into_iter().flatten().filter(|mount| mount["Type"] == "bind");
    let mounts = mounts.map(|mount| (text(&mount["Source"]), text(&mount["Target"])));
    let of_host = binds.chain(mounts).filter(|(source, inside)| {
        let ours = Path::new(inside) == Path::new(wrap::INSIDE) || Path::new(inside).starts_with(HIDDEN);
        source.starts_with('/') && !ours && is_read_only(inside)
    });
    of_host
        .map(|(source, inside)| Lendable {
            inside: inside.into(),
            source: source.into(),
            wanted: source.into(),
        })
        .collect()
}

/// The sources of what it mounts, as they are on this host.
fn localise(host: &mut Value, trees: &[ContainerTree], local: &Local<'_>) -> Result<(), EngineError> {
    let place = |inside: &str| {
        if Path::new(inside) == Path::new(wrap::INSIDE) {
            return Some(local.wrap.to_owned());
        }
        let number = trees.iter().position(|tree| tree.inside == Path::new(inside))?;
        Some(local.data_dir.join(number.to_string()))
    };
    let provide = |inside: &str, source: &str| -> Result<Option<String>, EngineError> {
        let source = Path::new(source);
        if let Some(own) = own_place(local.left, Path::new(inside), source, local.data_dir)? {
            return Ok(Some(own.display().to_string()));
        }
        match place(inside) {
            Some(path) => {
                let made = std::fs::create_dir_all(&path);
                made.map_err(|source| EngineError::Config { path: path.clone(), source })?;
                Ok(Some(path.display().to_string()))
            }
            None if source.exists() => Ok(behind_link(source).map(|path| path.display().to_string())),
            None => Err(not_here(source, Path::new(inside))),
        }
    };
    for bind in host["Binds"].as_array_mut().into_iter().flatten() {
        let mut parts = text(bind).splitn(3, ':').map(str::to_owned).collect::<Vec<_>>();
        // What does not begin with a slash is a volume's name.
        if let [source, inside, ..] = parts.as_slice()
            && source.starts_with('/')
            && let Some(path) = provide(inside, source)?
        {
            parts[0] = path;
            *bind = parts.join(":").into();
        }
    }
    for mount in host["Mounts"].as_array_mut().into_iter().flatten().filter(|mount| mount["Type"] == "bind") {
        if let Some(path) = provide(text(&mount["Target"]), text(&mount["Source"]))? {
            mount["Source"] = path.into();
        }
    }
    Ok(())
}

/// Connections are restored with the addresses that they had.
pub(super) fn check_addresses(found: &Value, recipe: &Recipe) -> Result<(), EngineError> {
    for network in &recipe.networks {
        let (wanted, got) =
            (&network.address, text(&found["NetworkSettings"]["Networks"][&network.name]["IPAddress"]));
        if wanted != got {
            return unfit(format!(
                "it has the address {wanted} in the network {0}, and on the standby {got}: {0} does not give the same \
                 address to the same container; make one that does (docker network create --subnet …)",
                network.name
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::engine::Unreplicated, *};

    #[test]
    fn binds_are_made_local_and_volumes_left() {
        let dir = tempfile::tempdir().unwrap();
        let (wrap, data_dir) = (dir.path().join("wrap/web"), dir.path().join("paths"));
        let local = Local {
            wrap: &wrap,
            data_dir: &data_dir,
            bundle: dir.path(),
            fresh: true,
            left: Unreplicated::default(),
        };
        let tree = |inside: &str| ContainerTree { inside: inside.into(), kind: ContainerTreeKind::Mount };
        let trees = [tree("/"), tree("/data"), tree("/srv")];
        let mut host = json!({
            "Binds": ["/elsewhere/wrap/web:/.standin:ro", "volume:/data", "/srv/web:/srv:rw,z", "/etc:/conf:ro"],
            "Mounts": [{ "Type": "bind", "Source": "/nowhere", "Target": "/srv" }],
        });
        localise(&mut host, &trees, &local).unwrap();
        let paths = data_dir.display();
        assert_eq!(
            host["Binds"],
            json!([
                format!("{}:/.standin:ro", wrap.display()),
                "volume:/data",
                format!("{paths}/2:/srv:rw,z"),
                "/etc:/conf:ro"
            ])
        );
        assert_eq!(host["Mounts"][0]["Source"], format!("{paths}/2"));
        let mut missing = json!({ "Binds": ["/no/such/file:/conf:ro"] });
        assert!(localise(&mut missing, &trees, &local).unwrap_err().to_string().contains("both hosts"));
    }

    #[test]
    fn what_cannot_move_is_refused() {
        let found = json!({ "Config": { "Tty": false }, "HostConfig": { "NetworkMode": "host", "IpcMode": "private" } });
        assert!(check(&found).is_ok());
        for (part, key, value, word) in [
            ("Config", "Tty", json!(true), "terminal"),
            ("HostConfig", "PidMode", json!("host"), "pid namespace"),
            ("HostConfig", "NetworkMode", json!("container:x"), "network namespace"),
            ("HostConfig", "AutoRemove", json!(true), "--rm"),
        ] {
            let mut other = found.clone();
            other[part][key] = value;
            assert!(check(&other).unwrap_err().to_string().contains(word), "{word}");
        }
    }
}
