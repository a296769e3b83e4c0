//! How manifests and indexes lie on the disk: fixed-size little-endian records behind a magic number,
//! with a BLAKE3 digest at the end, so that a damaged file is seen before it is believed.

use std::path::Path;

use super::{
    disk::{self, IoFault},
    extents::{self, Run, Source},
    sum::{SUM_LEN, Sum},
};
use crate::model::{Epoch, EpochId, Extent, Space, Term};
use crate::wire::message::{Manifest, SpaceMap};

/// Largest manifest or index that is read back (16 Mi extents, or 64 Mi changed pages).
const RECORD_BYTES_MAX: u64 = 1 << 30;
/// Most address spaces of an image: Linux has no more pids than 4 Mi, workloads have far fewer.
pub(super) const SPACES_MAX: usize = 1 << 16;
/// Most extents of all address spaces of an image.
pub(super) const EXTENTS_MAX: usize = 1 << 24;

const MANIFEST_MAGIC: [u8; 8] = *b"STDNMAN1";
const INDEX_MAGIC: [u8; 8] = *b"STDNIDX1";
const DIGEST_LEN: usize = 32;
/// Stands for [`Source::Zero`] where a page number of the log would be.
const ZERO: u64 = u64::MAX;

/// Why a file of the store cannot be believed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RecordError {
    #[error(transparent)]
    Io(#[from] IoFault),
    #[error("its {0} is not what was written")]
    Damaged(&'static str),
}

/// What the index of an epoch says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) id: EpochId,
    pub(super) base: EpochId,
    /// Runs of each space, ascending.
    pub(super) spaces: Vec<(Space, Vec<Run>)>,
    /// One for each page of the log.
    pub(super) sums: Vec<Sum>,
}

struct Writer(Vec<u8>);

impl Writer {
    fn new(magic: [u8; 8]) -> Self {
        Self(magic.to_vec())
    }

    fn number(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn id(&mut self, id: EpochId) {
        self.number(id.term.0);
        self.number(id.epoch.0);
    }

    fn space(&mut self, space: Space) {
        let (kind, id) = match space {
            Space::Task(pid) => (0, u64::from(pid)),
            Space::Shared(id) => (1, id),
        };
        self.number(kind);
        self.number(id);
    }

    fn seal(mut self) -> Vec<u8> {
        let digest = blake3::hash(&self.0);
        self.0.extend_from_slice(digest.as_bytes());
        self.0
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn open(bytes: &'a [u8], magic: [u8; 8]) -> Result<Self, RecordError> {
        let (body, digest) = bytes
            .len()
            .checked_sub(DIGEST_LEN)
            .and_then(|at| bytes.split_at_checked(at))
            .ok_or(RecordError::Damaged("length"))?;
        if blake3::hash(body).as_bytes() != digest {
            return Err(RecordError::Damaged("digest"));
        }
        body.strip_prefix(&magic).map(Self).ok_or(RecordError::Damaged("magic number"))
    }

    fn number(&mut self) -> Result<u64, RecordError> {
        let (head, rest) = self.0.split_first_chunk::<8>().ok_or(RecordError::Damaged("length"))?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*head))
    }

    /// A number of things of `len` bytes each that follow.
    fn count(&mut self, len: usize) -> Result<usize, RecordError> {
        let count = self.number()?;
        let fits = count.checked_mul(len as u64).is_some_and(|bytes| bytes <= self.0.len() as u64);
        if fits { Ok(count as usize) } else { Err(RecordError::Damaged("count")) }
    }

    fn id(&mut self) -> Result<EpochId, RecordError> {
        Ok(EpochId { term: Term(self.number()?), epoch: Epoch(self.number()?) })
    }

    fn space(&mut self) -> Result<Space, RecordError> {
        match (self.number()?, self.number()?) {
            (0, pid) => u32::try_from(pid).map(Space::Task).map_err(|_| RecordError::Damaged("pid")),
            (1, id) => Ok(Space::Shared(id)),
            _ => Err(RecordError::Damaged("space")),
        }
    }

    fn extent(&mut self) -> Result<Extent, RecordError> {
        let extent = Extent { start: self.number()?, pages: self.number()? };
        if extents::is_valid(extent) { Ok(extent) } else { Err(RecordError::Damaged("extent")) }
    }
}

pub(super) fn write_manifest(manifest: &Manifest) -> Vec<u8> {
    let mut out = Writer::new(MANIFEST_MAGIC);
    out.number(manifest.spaces.len() as u64);
    for map in &manifest.spaces {
        out.space(map.space);
        out.number(map.extents.len() as u64);
        for extent in &map.extents {
            out.number(extent.start);
            out.number(extent.pages);
        }
    }
    out.seal()
}

pub(super) fn read_manifest(path: &Path) -> Result<Manifest, RecordError> {
    parse_manifest(&disk::read_capped(path, RECORD_BYTES_MAX)?)
}

fn parse_manifest(bytes: &[u8]) -> Result<Manifest, RecordError> {
    let mut from = Reader::open(bytes, MANIFEST_MAGIC)?;
    let mut spaces = Vec::new();
    for _ in 0..from.count(24)? {
        let space = from.space()?;
        let count = from.count(16)?;
        let extents = (0..count).map(|_| from.extent()).collect::<Result<Vec<_>, _>>()?;
        spaces.push(SpaceMap { space, extents });
    }
    Ok(Manifest { spaces })
}

pub(super) fn write_index(index: &Index) -> Vec<u8> {
    let mut out = Writer::new(INDEX_MAGIC);
    out.id(index.id);
    out.id(index.base);
    out.number(index.spaces.len() as u64);
    for (space, runs) in &index.spaces {
        out.space(*space);
        out.number(runs.len() as u64);
        for run in runs {
            out.number(run.extent.start);
            out.number(run.extent.pages);
            out.number(match run.source {
                Source::Zero => ZERO,
                Source::At(page) => page,
            });
        }
    }
    out.number(index.sums.len() as u64);
    for sum in &index.sums {
        out.0.extend_from_slice(sum);
    }
    out.seal()
}

pub(super) fn read_index(path: &Path) -> Result<Index, RecordError> {
    parse_index(&disk::read_capped(path, RECORD_BYTES_MAX)?)
}

fn parse_index(bytes: &[u8]) -> Result<Index, RecordError> {
    let mut from = Reader::open(bytes, INDEX_MAGIC)?;
    let (id, base) = (from.id()?, from.id()?);
    let mut spaces = Vec::new();
    for _ in 0..from.count(24)? {
        let space = from.space()?;
        let count = from.count(24)?;
        let mut runs = Vec::with_capacity(count);
        for _ in 0..count {
            let extent = from.extent()?;
            let page = from.number()?;
            let source = if page == ZERO { Source::Zero } else { Source::At(page) };
            runs.push(Run { extent, source });
        }
        spaces.push((space, runs));
    }
    let count = from.count(SUM_LEN)?;
    let (sums, _) = from.0[..count * SUM_LEN].as_chunks::<SUM_LEN>();
    let sums = sums.to_vec();
    let behind_log = |run: &Run| match run.source {
        Source::Zero => false,
        Source::At(page) => page.checked_add(run.extent.pages).is_none_or(|end| end > sums.len() as u64),
    };
    if spaces.iter().any(|(_, runs)| runs.iter().any(behind_log)) {
        return Err(RecordError::Damaged("page number"));
    }
    Ok(Index { id, base, spaces, sums })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PAGE_SIZE;

    fn index() -> Index {
        let id = |epoch| EpochId { term: Term(2), epoch: Epoch(epoch) };
        let run = |page, pages, source| Run { extent: Extent { start: page * PAGE_SIZE, pages }, source };
        Index {
            id: id(8),
            base: id(7),
            spaces: vec![
                (Space::Task(2), vec![run(1, 2, Source::At(1)), run(9, 1000, Source::Zero)]),
                (Space::Shared(77), vec![run(0, 1, Source::At(0))]),
            ],
            sums: vec![[1; SUM_LEN], [2; SUM_LEN], [3; SUM_LEN]],
        }
    }

    #[test]
    fn an_index_reads_back_and_every_damaged_byte_is_noticed() {
        let bytes = write_index(&index());
        assert_eq!(parse_index(&bytes).unwrap(), index());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert!(parse_index(&damaged).is_err(), "byte {at}");
            assert!(parse_index(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn an_index_never_points_behind_its_log() {
        let mut index = index();
        index.sums.pop();
        assert!(parse_index(&write_index(&index)).is_err());
    }

    #[test]
    fn a_manifest_reads_back() {
        let spaces = index().spaces.into_iter().map(|(space, runs)| SpaceMap {
            space,
            extents: runs.into_iter().map(|run| run.extent).collect(),
        });
        let manifest = Manifest { spaces: spaces.collect() };
        assert_eq!(parse_manifest(&write_manifest(&manifest)).unwrap(), manifest);
    }
}
