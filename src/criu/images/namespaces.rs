//! Which namespaces the tasks of an image are in.
//!
//! CRIU restores trees whose tasks are all in the root's namespaces; only those of network and mounts may differ, where the
//! root has some of its own. When it dumps it refuses a task in any other, but one in CRIU's own: of such an image it says only
//! when it is restored that it cannot be (seen with 4.2.1). A program that `docker exec` left in a container that was restored
//! before is such a task: the container has a time namespace since, which those that enter it do not join.

use std::path::Path;

use prost::Message;

use super::{COMMON_MAGIC, Entries, INVENTORY_MAGIC, ImageError, PSTREE_FILE, damaged, pstree, read};

const IDS_MAGIC: u32 = 0x5443_2030;

/// Numbers of namespaces; the same number is the same namespace, within one image.
#[derive(Clone, PartialEq, Message)]
struct Ids {
    #[prost(uint32, optional, tag = "5")]
    pid: Option<u32>,
    #[prost(uint32, optional, tag = "6")]
    net: Option<u32>,
    #[prost(uint32, optional, tag = "7")]
    ipc: Option<u32>,
    #[prost(uint32, optional, tag = "8")]
    uts: Option<u32>,
    #[prost(uint32, optional, tag = "9")]
    mnt: Option<u32>,
    #[prost(uint32, optional, tag = "10")]
    user: Option<u32>,
    #[prost(uint32, optional, tag = "12")]
    time: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct Inventory {
    #[prost(message, optional, tag = "3")]
    criu: Option<Ids>,
}

/// Why an image cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// A task is in another one than the root.
    #[error(
        "process {pid} (inside) is in another {kind} namespace than the workload itself, so that it could not be restored \
         with it: something has entered from outside and stayed (docker exec, nsenter); end it"
    )]
    Other {
        /// Its pid inside.
        pid: u32,
        /// Of what kind.
        kind: &'static str,
    },
    /// The images do not tell.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// Refuses images that were dumped and cannot be restored.
pub fn check(directory: &Path) -> Result<(), NamespaceError> {
    let tasks = pstree(&read(directory, PSTREE_FILE)?)?;
    let pids: Vec<u32> = tasks.into_iter().map(|task| task.pid).collect();
    check_tasks(directory, &pids)
}

/// The same, of these tasks, the root first.
fn check_tasks(directory: &Path, pids: &[u32]) -> Result<(), NamespaceError> {
    let criu = of_criu(&read(directory, "inventory.img")?)?;
    let mut root = None;
    for &pid in pids {
        let name = format!("ids-{pid}.img");
        let ids = match read(directory, &name) {
            // A zombie is nowhere.
            Err(ImageError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => continue,
            bytes => Entries::open(&name, &bytes?, IDS_MAGIC)?.first::<Ids>()?,
        };
        let root = root.get_or_insert_with(|| ids.clone());
        if let Some(kind) = differs(&ids, root, &criu) {
            return Err(NamespaceError::Other { pid, kind });
        }
    }
    Ok(())
}

/// The namespaces of the CRIU that dumped.
fn of_criu(bytes: &[u8]) -> Result<Ids, ImageError> {
    let name = "inventory.img";
    let magics = [INVENTORY_MAGIC.to_le_bytes(), COMMON_MAGIC.to_le_bytes()];
    let rest = magics.iter().find_map(|magic| bytes.strip_prefix(magic));
    let rest = rest.ok_or_else(|| damaged(name, "it begins with another magic"))?;
    let criu = Entries { name, rest }.first::<Inventory>()?.criu;
    criu.ok_or_else(|| damaged(name, "it does not say in which namespaces CRIU was"))
}

/// In which of the namespaces that must be the same these two are not.
fn differs(ids: &Ids, root: &Ids, criu: &Ids) -> Option<&'static str> {
    let all = [
        ("pid", ids.pid == root.pid),
        ("ipc", ids.ipc == root.ipc),
        ("uts", ids.uts == root.uts),
        ("user", ids.user == root.user),
        ("time", ids.time == root.time),
        // These may be nested if the root's is not CRIU's, and none is CRIU's then.
        ("network", ids.net == root.net || root.net != criu.net && ids.net != criu.net),
        ("mount", ids.mnt == root.mnt || root.mnt != criu.mnt && ids.mnt != criu.mnt),
    ];
    all.into_iter().find_map(|(kind, fits)| (!fits).then_some(kind))
}

#[cfg(test)]
mod tests {
    use super::{super::push_entry, *};

    fn ids(base: u32) -> Ids {
        let id = |kind: u32| Some(base + kind);
        Ids { pid: id(1), net: id(2), ipc: id(3), uts: id(4), mnt: id(5), user: Some(6), time: id(7) }
    }

    fn checked(tasks: &[Ids]) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, magics: &[u32], entry: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes: Vec<u8> = magics.iter().flat_map(|magic| magic.to_le_bytes()).collect();
            entry(&mut bytes);
            std::fs::write(dir.path().join(name), bytes).unwrap();
        };
        write("inventory.img", &[INVENTORY_MAGIC], &|out| push_entry(out, &Inventory { criu: Some(ids(0)) }));
        for (at, ids) in tasks.iter().enumerate() {
            write(&format!("ids-{}.img", at + 1), &[COMMON_MAGIC, IDS_MAGIC], &|out| push_entry(out, ids));
        }
        // One more than there are: a zombie.
        let pids: Vec<u32> = (1..=tasks.len() as u32 + 1).collect();
        check_tasks(dir.path(), &pids).map_err(|error| error.to_string())
    }

    #[test]
    fn tasks_must_be_in_the_roots_namespaces() {
        let own = ids(10);
        assert_eq!(checked(&[own.clone(), own.clone()]), Ok(()));
        // In CRIU's own everything, as a tree of the host is.
        assert_eq!(checked(&[ids(0), ids(0)]), Ok(()));
        let entered = Ids { time: ids(0).time, ..own.clone() };
        let refused = checked(&[own.clone(), own.clone(), entered]).unwrap_err();
        assert!(refused.contains("process 3 (inside)") && refused.contains("time namespace"), "{refused}");
        for (nested, fits) in [(ids(20).net, true), (ids(0).net, false)] {
            let other = Ids { net: nested, ..own.clone() };
            assert_eq!(checked(&[own.clone(), other]).is_ok(), fits);
        }
        // The root is in CRIU's, and so must be all.
        assert!(checked(&[ids(0), Ids { mnt: Some(77), ..ids(0) }]).is_err());
    }
}
