//! What a workload that runs here uses of its host, and so must find at the other one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::OpenOptionsExt,
        },
    },
    path::{Path, PathBuf},
};

use super::file;
use crate::{
    memory::{self, TreeError},
    model::Name,
    wire::examine::{self, FileFacts},
    workload::spec::{PlaceSpec, Vip},
};

/// Most files of a workload that are compared.
const FILES_MAX: usize = 4096;
/// Most bytes that are read here for digests.
const DIGEST_BYTES_MAX: u64 = 1 << 30;
/// What lies there is the place's own, or comes with the epoch.
const OF_THE_PLACE: [&str; 3] = ["/dev", "/proc", "/sys"];
/// What the kernel appends to the path of a file that has no name any more.
const DELETED: &[u8] = b" (deleted)";
/// What the kernel calls memory that was never a file of the host.
const NAMED_MEMORY: [&[u8]; 3] = [b"/memfd:", b"/SYSV", b"/anon_hugepage"];

/// A workload that runs here.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Its name.
    pub name: Name,
    /// What it is.
    pub place: PlaceSpec,
    /// The pid of its first process.
    pub root: i32,
    /// Addresses that follow it.
    pub vips: Vec<Vip>,
    /// The peer holds an epoch of it.
    pub held: bool,
}

/// What it uses.
#[derive(Clone, Debug)]
pub struct Footprint {
    /// Its name.
    pub name: Name,
    /// Its files are its container's: they are not the host's.
    pub container: bool,
    /// Files of the host, by path.
    pub files: Vec<UsedFile>,
    /// Those that are gone here: mapped still, and replaced on the disk since.
    pub deleted: BTreeSet<String>,
    /// There are more than are compared.
    pub more_files: bool,
    /// Users that its processes run as.
    pub uids: BTreeSet<u32>,
    /// Groups that its processes are in.
    pub gids: BTreeSet<u32>,
    /// Memory that its image holds.
    pub resident_bytes: u64,
    /// Addresses that follow it.
    pub vips: Vec<Vip>,
    /// The peer holds an epoch of it.
    pub held: bool,
}

/// A file of the host that it uses.
#[derive(Clone, Debug)]
pub struct UsedFile {
    /// Where.
    pub path: Vec<u8>,
    /// Its memory is the file's; otherwise it has it open.
    pub mapped: bool,
    /// What it is here.
    pub here: FileFacts,
}

/// Finds out what a workload uses. A process that ends meanwhile is left out.
pub fn survey(workload: &Workload) -> Result<Footprint, TreeError> {
    let tasks = memory::tasks_of(workload.root)?;
    let replicated: &[PathBuf] = match &workload.place {
        PlaceSpec::Sandbox(spec) => &spec.paths,
        PlaceSpec::Container(_) => &[],
    };
    let mut footprint = Footprint {
        name: workload.name.clone(),
        container: matches!(workload.place, PlaceSpec::Container(_)),
        files: Vec::new(),
        deleted: BTreeSet::new(),
        more_files: false,
        uids: BTreeSet::new(),
        gids: BTreeSet::new(),
        resident_bytes: memory::resident_bytes(workload.root)?,
        vips: workload.vips.clone(),
        held: workload.held,
    };
    if footprint.container {
        // Nor are its users.
        return Ok(footprint);
    }
    let mut found: BTreeMap<Vec<u8>, UsedFile> = BTreeMap::new();
    let mut budget = DIGEST_BYTES_MAX;
    let mut take = |mut path: Vec<u8>, mapped: bool, link: &Path| {
        let lost = path.ends_with(DELETED);
        path.truncate(path.len() - if lost { DELETED.len() } else { 0 });
        if !is_of_the_host(&path, replicated) || found.contains_key(&path) {
            return;
        }
        if lost {
            // A file that is open without a name is the workload's own: CRIU takes it along.
            if mapped {
                footprint.deleted.insert(String::from_utf8_lossy(&path).into_owned());
            }
        } else if found.len() == FILES_MAX {
            footprint.more_files = true;
        } else {
            let here = match place_of(link) {
                Ok(place) => file::describe(&place, mapped, &mut budget),
                // It has ended, or closed it.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => return,
                Err(error) => FileFacts::Unreadable(error.to_string()),
            };
            found.insert(path.clone(), UsedFile { path, mapped, here });
        }
    };
    let alive = || tasks.iter().filter(|task| !task.zombie);
    // What is mapped first: of that more is compared.
    alive().for_each(|task| mapped_files(task.pid, &mut take));
    alive().for_each(|task| open_files(task.pid, &mut take));
    alive().for_each(|task| ids_of(task.pid, &mut footprint));
    footprint.files = found.into_values().filter(|file| file.here != FileFacts::NotAFile).collect();
    Ok(footprint)
}

fn is_of_the_host(path: &[u8], replicated: &[PathBuf]) -> bool {
    let at = Path::new(std::ffi::OsStr::from_bytes(path));
    examine::path(path).is_ok()
        && !NAMED_MEMORY.iter().any(|name| path.starts_with(name))
        && !OF_THE_PLACE.iter().any(|dir| at.starts_with(dir))
        && !replicated.iter().any(|tree| at.starts_with(tree))
}

/// The very file behind one of /proc's links, whatever lies at its path by now.
fn place_of(link: &Path) -> io::Result<OwnedFd> {
    Ok(File::options().read(true).custom_flags(libc::O_PATH).open(link)?.into())
}

fn mapped_files(pid: i32, take: &mut impl FnMut(Vec<u8>, bool, &Path)) {
    let Ok(text) = fs::read(format!("/proc/{pid}/maps")) else { return };
    for line in text.split(|byte| *byte == b'\n') {
        // `start-end perms offset dev inode  path`, the path last since it may hold anything.
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        let (Some(inode), Some(path)) = (fields.nth(4), fields.next()) else { continue };
        let path = path.trim_ascii_start();
        if inode != b"0"
            && path.starts_with(b"/")
            && let Some(link) = memory::map_file(pid, line)
        {
            take(path.to_owned(), true, &link);
        }
    }
}

fn open_files(pid: i32, take: &mut impl FnMut(Vec<u8>, bool, &Path)) {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return };
    for link in entries.flatten().map(|entry| entry.path()) {
        if let Ok(target) = fs::read_link(&link) {
            take(target.into_os_string().into_vec(), false, &link);
        }
    }
}

fn ids_of(pid: i32, footprint: &mut Footprint) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = |name: &str| -> Vec<u32> {
        let rest = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        rest.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect()
    };
    footprint.uids.extend(numbers("Uid:"));
    footprint.gids.extend(numbers("Gid:").into_iter().chain(numbers("Groups:")));
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Command, Stdio},
        time::{Duration, Instant},
    };

    use super::*;
    use crate::{
        wire::examine::RegularFile,
        workload::spec::{Net, SandboxSpec},
    };

    /// Longer than any program takes to be loaded.
    const PATIENCE: Duration = Duration::from_secs(30);

    #[test]
    fn what_a_process_maps_and_has_open_is_found_and_what_goes_with_it_is_not() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (data, config) = (dir.path().join("data"), dir.path().join("config"));
        fs::create_dir(&data).unwrap();
        fs::write(data.join("rows"), "rows").unwrap();
        fs::write(&config, "config").unwrap();
        let script =
            format!("exec 3< {} 4< {}; exec sleep 1000", config.display(), data.join("rows").display());
        let started = Instant::now();
        let mut child = Command::new("/bin/sh").args(["-c", &script]).stdin(Stdio::null()).spawn().unwrap();
        let (name, root): (Name, _) = ("db".parse().unwrap(), child.id() as i32);
        let sandbox = SandboxSpec {
            name: name.clone(),
            net: Net::Host,
            paths: vec![data.clone()],
            hostname: "db".into(),
        };
        let workload =
            Workload { name, place: PlaceSpec::Sandbox(sandbox), root, vips: Vec::new(), held: false };
        // Of a program that is only being loaded not everything is mapped yet.
        let found = loop {
            let found = survey(&workload).unwrap();
            let maps = |part: &str| {
                found.files.iter().any(|file| String::from_utf8_lossy(&file.path).contains(part))
            };
            if (maps("/sleep") && maps("libc")) || started.elapsed() > PATIENCE {
                break found;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        child.kill().unwrap();
        child.wait().unwrap();
        let mapped = |part: &str| {
            let text = |file: &UsedFile| String::from_utf8_lossy(&file.path).into_owned();
            found.files.iter().find(|file| text(file).contains(part)).map(|file| file.mapped)
        };
        assert_eq!(
            (mapped("/sleep"), mapped("libc"), mapped("/config")),
            (Some(true), Some(true), Some(false))
        );
        assert_eq!(mapped("/rows"), None);
        for file in
            found.files.iter().filter(|file| file.mapped && file.path.windows(4).any(|part| part == b"libc"))
        {
            let FileFacts::Regular(RegularFile { build_id, .. }) = &file.here else { panic!("{file:?}") };
            assert!(!build_id.is_empty(), "{file:?}");
        }
        assert!(found.uids.contains(&nix::unistd::getuid().as_raw()) && found.resident_bytes > 0);
    }
}
