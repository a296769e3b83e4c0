//! What a runtime must be told and given so that it restores a container whole, and what it must be able to.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use super::{
    super::{
        super::{cgroup, spec::ContainerTree},
        config::Config,
        engine::{Bundle, EngineError, Prepared, TreeAt},
        oci::{Oci, State, places_of, write_bundle},
        wrap,
    },
    mounts::{Mounts, is_plain},
};
use crate::{model::Name, workload::spec::Runtime};

/// Where the settings for CRIU are in a bundle.
const SETTINGS: &str = "criu.conf";

/// Whether a runtime can restore a container, with its cgroups like those of process `like`, and why not.
pub(in super::super) fn can_restore(oci: &Oci, like: u32) -> Result<(), EngineError> {
    if !cgroup::v1_of_process(like).map_err(|error| EngineError::Unfit(error.to_string()))?.is_empty() {
        let reason = "this host has cgroup v1, whose cgroups CRIU would restore elsewhere; use v2 alone";
        return Err(EngineError::Unfit(reason.to_owned()));
    }
    let (runtime, said) = oci.say(&["--version"])?;
    if runtime == Runtime::Crun && !said.contains("+CRIU") {
        return Err(EngineError::Unfit(
            "this crun was built without CRIU; use one that `crun --version` says +CRIU of, or runc"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Whether a container that runs, and whose pid 1 is not our init, can be dumped and restored whole.
pub(in super::super) fn check(oci: &Oci, config: &Config, state: &State) -> Result<Bundle, EngineError> {
    let unfit = |reason: &str| {
        Err(EngineError::Unfit(format!(
            "its pid 1 is not {}, and it cannot be protected whole either: {reason}. Stop it, `standin wrap NAME --bundle \
             {}`, and start it again",
            wrap::INIT,
            state.bundle.display()
        )))
    };
    match can_restore(oci, state.pid) {
        Err(EngineError::Unfit(reason)) => return unfit(&reason),
        other => other?,
    }
    let mounts = match Mounts::of(state.pid) {
        Ok(mounts) => mounts,
        Err(source) => return unfit(&format!("its mounts cannot be read: {source}")),
    };
    if let Some(strange) = mounts.external().find(|inside| !config.tells_of(inside) || !is_plain(inside)) {
        return unfit(&format!("its config.json does not tell of its mount {}", strange.display()));
    }
    // Nobody asks for the leaf of one that was not restored by us.
    Ok(Bundle { dir: state.bundle.clone(), root: config.root(&state.bundle), leaf: String::new() })
}

/// Makes the bundle from which a container will be restored.
pub(in super::super) fn prepare(
    oci: &Oci,
    trees: &[ContainerTree],
    (name, id): (&Name, &str),
    config: &str,
    local: &Prepared<'_>,
) -> Result<(Bundle, Vec<TreeAt>), EngineError> {
    can_restore(oci, std::process::id())?;
    let mut config =
        Config::parse(config).map_err(|error| EngineError::Unfit(format!("its config.json: {error}")))?;
    config.check()?;
    delete_ours(oci, name, id, local.bundle)?;
    let places = places_of(trees, local.data_dir)?;
    config.localise((trees, &places), local.left, local.data_dir)?;
    let settings = local.bundle.join(SETTINGS);
    config.restore_with(local.netns, &local.cgroup.join(id));
    write_bundle(local.bundle, &config)?;
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&settings)
        .and_then(|mut file: File| file.write_all(settings_of(trees, &config, local).as_bytes()));
    written.map_err(|source| EngineError::Config { path: settings, source })?;
    let root = config.root(local.bundle);
    Ok((Bundle { dir: local.bundle.to_owned(), root, leaf: id.to_owned() }, places))
}

/// Ends what a runtime has of the container from before; one that is not of this bundle is in the way.
fn delete_ours(oci: &Oci, name: &Name, id: &str, bundle: &Path) -> Result<(), EngineError> {
    match oci.state(id)? {
        None => Ok(()),
        Some(state) if state.bundle == bundle => oci.delete(id),
        Some(_) => Err(EngineError::Unfit(format!(
            "another container named {id} is on the standby, which is not that of {name}; remove or rename it there"
        ))),
    }
}

/// What CRIU is told beside what the runtime tells it. The runtime names what the container binds; file systems in memory,
/// which CRIU would pack and unpack, are ours to name, and so is what shows nothing.
fn settings_of(trees: &[ContainerTree], config: &Config, local: &Prepared<'_>) -> String {
    let mut lines: Vec<String> =
        ["tcp-established", "file-locks", "ext-unix-sk", "link-remap", "network-lock skip"]
            .map(str::to_owned)
            .to_vec();
    let memory = trees.iter().enumerate().filter(|(_, tree)| super::is_memory(tree));
    lines.extend(memory.map(|(number, tree)| {
        external(&tree.inside.display().to_string(), &local.memory.join(number.to_string()))
    }));
    lines.extend(config.masked().map(|masked| {
        // It is the kernel's, and so of the same kind here.
        let nothing = if Path::new(masked).is_dir() { local.nothing } else { Path::new("/dev/null") };
        external(masked, nothing)
    }));
    lines.push(String::new());
    lines.join("\n")
}

fn external(inside: &str, here: &Path) -> String {
    format!("external mnt[{inside}]:{}", here.display())
}

/// A directory in which CRIU has the name by which runtimes look for it, and is told of our settings: not every runtime has a
/// way to do that.
pub(in super::super) fn criu_dir(bundle: &Path, criu: &Path) -> Result<PathBuf, EngineError> {
    let dir = bundle.join("bin");
    let script = dir.join("criu");
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    let text =
        format!("#!/bin/sh\nexec {} --config {} \"$@\"\n", quoted(criu), quoted(&bundle.join(SETTINGS)));
    let made = fs::create_dir_all(&dir)
        .and_then(|()| fs::write(&script, text))
        .and_then(|()| fs::set_permissions(&script, fs::Permissions::from_mode(0o700)));
    made.map_err(|source| EngineError::Config { path: script, source })?;
    Ok(dir)
}
