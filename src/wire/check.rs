//! What a value must obey beyond its type, whoever sent it: both ends call these, the sender to find its
//! own mistakes before they cost an epoch, the receiver because it believes nothing.

use std::path::{Component, Path};

use super::{
    examine,
    frame::BODY_LEN_MAX,
    inventory,
    message::{Datagram, FileKind, FileMeta, FileRecord, FrameHead, Manifest, Request},
};
use crate::{
    delta::{BATCH_PAGES_MAX, BATCH_RUNS_MAX, BatchHead, Form, PATCH_LEN_MAX, Packing},
    files::BLOCK_SIZE,
    ha::Message,
    model::{PAGE_SIZE, Space},
    workload::spec::{ContainerSpec, Engine, Lent, Net, PlaceSpec, SandboxSpec, Vip, WorkloadSpec},
};

/// Addresses and offsets end below this: user space of x86-64 with four levels of page tables.
pub const ADDRESS_END: u64 = 1 << 47;
/// Most address spaces in a manifest.
pub const SPACES_MAX: usize = 16_384;
/// Most runs of pages in a manifest, all address spaces together.
pub const EXTENTS_MAX: usize = 1 << 19;
/// Largest pid that Linux hands out (`PID_MAX_LIMIT`).
pub const PID_MAX: u32 = 1 << 22;
/// Most characters of an image's name.
pub const IMAGE_NAME_LEN_MAX: usize = 80;
/// Most bytes of one image, all pieces together.
pub const IMAGE_LEN_MAX: u64 = 1 << 30;
/// Most bytes of a path in a replicated tree, and of a symbolic link's text (`PATH_MAX`).
pub const PATH_LEN_MAX: usize = 4096;
/// Most bytes between two slashes (`NAME_MAX`).
pub const PATH_PART_LEN_MAX: usize = 255;
/// Most replicated trees of a workload.
pub const TREES_MAX: usize = 64;
/// Most runs of blocks in a record of what is kept of a file.
pub const KEPT_RUNS_MAX: usize = 4096;
/// Most extended attributes of a file.
pub const XATTRS_MAX: usize = 128;
/// Most bytes of an extended attribute's value (`XATTR_SIZE_MAX`).
pub const XATTR_LEN_MAX: usize = 65_536;
/// Most addresses of a workload, inside or following it.
pub const ADDRESSES_MAX: usize = 64;
/// Most characters of a container's id.
pub const CONTAINER_ID_LEN_MAX: usize = 128;
/// Most bytes of what a container is made from.
pub const CONTAINER_CONFIG_LEN_MAX: usize = 256 << 10;
/// Digits of a BLAKE3 digest in hexadecimal.
const DIGEST_HEX_LEN: usize = 64;
/// Most bytes of a text for people.
pub const REASON_LEN_MAX: usize = 2048;

/// The rule that a value breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Illegal(String);

/// `Err` with a rule unless `holds`.
pub(super) fn require(holds: bool, rule: impl FnOnce() -> String) -> Result<(), Illegal> {
    if holds { Ok(()) } else { Err(Illegal(rule())) }
}

/// Makes a peer's text safe for a terminal and a log: no control characters, not too long.
pub fn make_printable(text: &mut String) {
    let mut end = text.len().min(REASON_LEN_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    if text.contains(char::is_control) {
        *text = text.replace(char::is_control, " ");
    }
}

/// A request on the lease connection.
pub(super) fn request(request: &mut Request) -> Result<(), Illegal> {
    match request {
        Request::Offer { spec, term, .. } => {
            require(term.0 > 0, || "terms begin at 1".into())?;
            workload(spec)
        }
        Request::Tell { message: Message::TakeOver { term, epoch }, .. } => {
            require(*term > epoch.term, || format!("term {term} does not follow that of epoch {epoch}"))
        }
        Request::Tell { .. } => Ok(()),
        Request::Examine(question) => examine::question(question),
    }
}

/// A datagram on the lease connection.
pub(super) fn datagram(datagram: &Datagram) -> Result<(), Illegal> {
    let fits = matches!(datagram.message, Message::Heartbeat { .. } | Message::Ack { .. });
    require(fits, || "a datagram that is neither a heartbeat nor its acknowledgement".into())
}

fn workload(spec: &WorkloadSpec) -> Result<(), Illegal> {
    match &spec.place {
        PlaceSpec::Sandbox(spec) => sandbox(spec)?,
        PlaceSpec::Container(spec) => container(spec)?,
    }
    let ips = match &spec.place.net() {
        Net::Own { ips } => ips.len(),
        Net::Host => 0,
    };
    require(ips <= ADDRESSES_MAX, || format!("more than {ADDRESSES_MAX} addresses"))?;
    vips(&spec.vips)?;
    spec.pace.check().map_err(|error| Illegal(error.to_string()))
}

pub(super) fn vips(vips: &[Vip]) -> Result<(), Illegal> {
    require(vips.len() <= ADDRESSES_MAX, || format!("more than {ADDRESSES_MAX} addresses"))?;
    vips.iter().try_for_each(|vip| {
        let device = &vip.device;
        require(is_device(device), || format!("{device:?} is no network device"))
    })
}

fn sandbox(spec: &SandboxSpec) -> Result<(), Illegal> {
    let host = &spec.hostname;
    let host_fits = (1..=64).contains(&host.len())
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    require(host_fits, || format!("{host:?} is no host name"))?;
    let paths = &spec.paths;
    // One tree more is /dev/shm.
    require(paths.len() < TREES_MAX, || format!("{} paths, at most {}", paths.len(), TREES_MAX - 1))?;
    for path in paths {
        require(is_plain_absolute(path), || format!("{} is no plain absolute path", path.display()))?;
    }
    Ok(())
}

fn container(spec: &ContainerSpec) -> Result<(), Illegal> {
    let (id, config) = match &spec.engine {
        Engine::Oci { id, config, .. } => (id, config),
        Engine::Docker { name, config, .. } => (name, config),
    };
    let id_fits = (1..=CONTAINER_ID_LEN_MAX).contains(&id.len())
        && !matches!(id.as_str(), "." | "..")
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+-.".contains(&b));
    require(id_fits, || format!("{id:?} is no container's id"))?;
    if let Engine::Oci { state: Some(state), .. } = &spec.engine {
        require(is_plain_absolute(state), || format!("{} is no plain absolute path", state.display()))?;
    }
    let fits = config.len() <= CONTAINER_CONFIG_LEN_MAX;
    require(fits, || format!("a container's config of more than {CONTAINER_CONFIG_LEN_MAX} bytes"))?;
    let trees = spec.trees.len() + spec.left.len();
    require(trees <= TREES_MAX, || format!("{trees} trees, at most {TREES_MAX}"))?;
    let left = spec.left.iter().map(|rule| &rule.inside);
    for inside in spec.trees.iter().map(|tree| &tree.inside).chain(left) {
        plain_absolute(inside)?;
    }
    require(spec.lent.len() <= TREES_MAX, || format!("more than {TREES_MAX} lent mounts"))?;
    spec.lent.iter().try_for_each(lent)
}

/// A copy of what a container mounts: its digest becomes a directory's name.
pub(super) fn lent(lent: &Lent) -> Result<(), Illegal> {
    plain_absolute(&lent.inside)?;
    let fits = lent.digest.len() == DIGEST_HEX_LEN
        && lent.digest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    require(fits, || format!("{:?} is no digest", lent.digest))
}

pub(super) fn plain_absolute(path: &Path) -> Result<(), Illegal> {
    require(is_plain_absolute(path), || format!("{} is no plain absolute path", path.display()))
}

/// Absolute, without `.`, `..`, doubled slashes or NUL.
fn is_plain_absolute(path: &Path) -> bool {
    let bytes = path.as_os_str().as_encoded_bytes();
    let rebuilt: std::path::PathBuf = path.components().collect();
    path.is_absolute()
        && bytes.len() < PATH_LEN_MAX
        && !bytes.contains(&0)
        && rebuilt.as_os_str() == path.as_os_str()
        && !path.components().any(|c| c == Component::ParentDir)
}

/// A name that the kernel would take for a device and no command would take for an option.
fn is_device(name: &str) -> bool {
    (1..16).contains(&name.len())
        && !matches!(name, "." | "..")
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-@".contains(&b))
}

/// A frame's head, and the length of the body that follows it.
pub(super) fn frame(head: &FrameHead, body_len: usize) -> Result<(), Illegal> {
    match head {
        FrameHead::Begin { id, base, .. } => {
            require(id.term.0 > 0 && id.epoch.0 > 0, || format!("epoch {id}: both count from 1"))?;
            require(base.is_none_or(|base| base < *id), || format!("epoch {id} is not after its base"))
        }
        FrameHead::Pages(batch) => pages(batch, body_len),
        FrameHead::Image { name, offset, more } => image(name, *offset, *more, body_len),
        FrameHead::File(record) => file(record, body_len),
        FrameHead::Manifest(list) => manifest(list),
        FrameHead::End { .. } | FrameHead::Inputs { .. } => Ok(()),
        FrameHead::Piece => require(body_len > 0, || "an empty piece".into()),
        FrameHead::Ask(ask) => inventory::check_ask(ask),
        FrameHead::Held(held) => inventory::check_held(held, body_len),
        FrameHead::Input { after, .. } => {
            require(after.term.0 > 0, || "terms begin at 1".into())?;
            require(body_len > 0, || "an empty packet".into())
        }
    }
}

pub(super) fn space(space: Space) -> Result<(), Illegal> {
    match space {
        Space::Task(pid) => require((1..PID_MAX).contains(&pid), || format!("{pid} is no pid")),
        Space::Shared(_) => Ok(()),
    }
}

pub(super) fn run(start: u64, pages: u64) -> Result<u64, Illegal> {
    require(start.is_multiple_of(PAGE_SIZE), || format!("{start:#x} is not the start of a page"))?;
    let end = pages.checked_mul(PAGE_SIZE).and_then(|len| start.checked_add(len));
    let end = end.filter(|end| pages > 0 && *end <= ADDRESS_END);
    end.ok_or_else(|| Illegal(format!("{pages} pages at {start:#x} are no run in user space")))
}

fn pages(batch: &BatchHead, body_len: usize) -> Result<(), Illegal> {
    space(batch.space)?;
    let runs = batch.runs.len();
    let fits = (1..=BATCH_RUNS_MAX).contains(&runs);
    require(fits, || format!("{runs} runs of pages in a batch, 1 to {BATCH_RUNS_MAX} expected"))?;
    let mut full_pages = 0;
    for part in &batch.runs {
        run(part.start, part.pages.into())?;
        if !part.zero {
            full_pages += u64::from(part.pages);
        }
    }
    let fits = full_pages <= BATCH_PAGES_MAX as u64;
    require(fits, || format!("{full_pages} pages in a batch, at most {BATCH_PAGES_MAX}"))?;
    let unpacked = match batch.form {
        Form::Pages => full_pages * PAGE_SIZE,
        Form::Patches { len, .. } => {
            let zero = batch.runs.iter().any(|part| part.zero);
            let fits = !zero && u64::from(len) <= full_pages * PATCH_LEN_MAX as u64;
            require(fits, || format!("patches of {len} bytes for {full_pages} pages, or of zero pages"))?;
            len.into()
        }
    };
    let len = body_len as u64;
    let fits = match batch.packing {
        Packing::Raw => len == unpacked,
        // What does not get shorter is sent as it is.
        Packing::Lz4 | Packing::Zstd => (1..unpacked).contains(&len),
    };
    require(fits, || format!("a body of {len} bytes for {full_pages} pages"))
}

fn image(name: &str, offset: u64, more: bool, body_len: usize) -> Result<(), Illegal> {
    let fits = (1..=IMAGE_NAME_LEN_MAX).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    require(fits, || format!("{name:?} is no image name"))?;
    let end = offset.checked_add(body_len as u64);
    require(end.is_some_and(|end| end <= IMAGE_LEN_MAX), || format!("image {name} is too long"))?;
    require(!more || body_len > 0, || format!("an empty piece of image {name} that is not the last"))
}

/// A relative path of plain parts; `Ok` for the empty one too.
fn path(path: &[u8]) -> Result<(), Illegal> {
    let part_fits = |part: &[u8]| {
        (1..=PATH_PART_LEN_MAX).contains(&part.len()) && part != b"." && part != b".." && !part.contains(&0)
    };
    let fits = path.len() < PATH_LEN_MAX && path.split(|b| *b == b'/').all(part_fits);
    require(path.is_empty() || fits, || format!("{:?} is no path in a tree", path.escape_ascii().to_string()))
}

pub(super) fn path_below_root(bytes: &[u8]) -> Result<(), Illegal> {
    require(!bytes.is_empty(), || "the root of a tree cannot be linked or written".into())?;
    path(bytes)
}

fn file(record: &FileRecord, body_len: usize) -> Result<(), Illegal> {
    let (tree, body_wanted) = match record {
        FileRecord::Entry { tree, path: at, meta } => {
            path(at)?;
            let root_fits = !at.is_empty() || meta.kind == FileKind::Directory;
            require(root_fits, || "the root of a tree is a directory".into())?;
            file_meta(meta)?;
            (*tree, false)
        }
        FileRecord::Data { tree, path, offset } => {
            path_below_root(path)?;
            let end = offset.checked_add(body_len as u64);
            let fits = end.is_some_and(|end| i64::try_from(end).is_ok());
            require(fits, || format!("data at offset {offset} of a file"))?;
            (*tree, true)
        }
        FileRecord::Keep { tree, path, runs, .. } => {
            path_below_root(path)?;
            let blocks_max = i64::MAX as u64 / BLOCK_SIZE as u64;
            let mut free_from = 0;
            for (first, count) in runs {
                let end = first.checked_add(*count).filter(|end| *count > 0 && *end <= blocks_max);
                let fits = *first >= free_from && end.is_some();
                require(fits, || format!("{count} blocks to keep from number {first} on"))?;
                free_from = end.unwrap_or(u64::MAX);
            }
            let fits = (1..=KEPT_RUNS_MAX).contains(&runs.len());
            require(fits, || format!("{} runs of blocks to keep", runs.len()))?;
            (*tree, false)
        }
        FileRecord::Remove { tree, path: at } => {
            path(at)?;
            (*tree, false)
        }
    };
    require((tree as usize) < TREES_MAX, || format!("tree {tree}, at most {TREES_MAX} of them"))?;
    let fits = (body_len > 0) == body_wanted && body_len <= BODY_LEN_MAX;
    require(fits, || format!("a file record with a body of {body_len} bytes"))
}

fn file_meta(meta: &FileMeta) -> Result<(), Illegal> {
    require(meta.mode & !0o7777 == 0, || format!("mode {:o} has more than permission bits", meta.mode))?;
    require(meta.mtime.1 < 1_000_000_000, || format!("{} nanoseconds", meta.mtime.1))?;
    require(meta.xattrs.len() <= XATTRS_MAX, || format!("more than {XATTRS_MAX} extended attributes"))?;
    for (name, value) in &meta.xattrs {
        let fits = (1..=PATH_PART_LEN_MAX).contains(&name.len())
            && !name.contains(&0)
            && value.len() <= XATTR_LEN_MAX;
        require(fits, || format!("extended attribute {:?}", name.escape_ascii().to_string()))?;
    }
    match &meta.kind {
        FileKind::Regular { size } => {
            require(i64::try_from(*size).is_ok(), || format!("a file of {size} bytes"))
        }
        FileKind::Symlink { target } => {
            let fits = (1..PATH_LEN_MAX).contains(&target.len()) && !target.contains(&0);
            require(fits, || "a symbolic link without a usable target".into())
        }
        FileKind::HardLink { to } => path_below_root(to),
        FileKind::Directory | FileKind::Fifo | FileKind::Device { .. } => Ok(()),
    }
}

fn manifest(list: &Manifest) -> Result<(), Illegal> {
    let spaces = list.spaces.len();
    require(spaces <= SPACES_MAX, || format!("{spaces} address spaces, at most {SPACES_MAX}"))?;
    let extents: usize = list.spaces.iter().map(|map| map.extents.len()).sum();
    require(extents <= EXTENTS_MAX, || format!("{extents} runs of pages, at most {EXTENTS_MAX}"))?;
    let ascending = list.spaces.is_sorted_by(|a, b| a.space < b.space);
    require(ascending, || "address spaces of a manifest are not in order".into())?;
    for map in &list.spaces {
        space(map.space)?;
        let mut free_from = 0;
        for extent in &map.extents {
            let end = run(extent.start, extent.pages)?;
            require(extent.start >= free_from, || {
                format!("the run at {:#x} of {:?} is not behind the one before it", extent.start, map.space)
            })?;
            free_from = end;
        }
    }
    Ok(())
}
