//! Unpacks a batch that came from the network. Everything is checked before any of it is handed on.

use super::{
    ADDRESS_END, BATCH_PAGES_MAX, BATCH_RUNS_MAX, BatchHead, DIGEST_LEN, Form, PATCH_LEN_MAX, Packing,
    PageRun, digest_of, packing::Unpacker, patch,
};
use crate::model::{PAGE_SIZE, Space};

const PAGE: usize = PAGE_SIZE as usize;

/// What a run of a batch holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// The pages, one after the other.
    Bytes(&'a [u8]),
    /// So many pages of zeroes.
    Zero {
        /// Their number.
        pages: u32,
    },
}

/// Why a batch is refused. The peer is faulty or hostile: drop the epoch and ask for all memory.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Too many runs.
    #[error("a batch of {0} runs was received; at most {BATCH_RUNS_MAX} are allowed")]
    Runs(usize),
    /// Too many pages with content.
    #[error("a batch of more than {BATCH_PAGES_MAX} pages with content was received")]
    Pages,
    /// A run that cannot be.
    #[error("a run of {pages} pages at {start:#x} was received, which is empty, not aligned or above 2^47")]
    Run {
        /// Its address.
        start: u64,
        /// Its number of pages.
        pages: u32,
    },
    /// The body's length is wrong.
    #[error("a body of {got} bytes was received for content that takes {wanted}")]
    Length {
        /// Bytes received, or unpacked.
        got: usize,
        /// Bytes that the content needs.
        wanted: usize,
    },
    /// The body cannot be unpacked.
    #[error("a body of {bytes} bytes was received that is no {packing:?} of the content announced")]
    Packing {
        /// As what it came.
        packing: Packing,
        /// Its length.
        bytes: usize,
    },
    /// Patches of zero pages, longer than patches are, or that are none.
    #[error("a batch of patches was received that are none")]
    Patches,
    /// The patches do not make the pages that they should.
    #[error(
        "patches of {pages} pages of {space:?} from {start:#x} on do not give the pages that were sent: what is held \
         here is not what the primary takes it for, and the whole memory is needed"
    )]
    Base {
        /// Of which address space.
        space: Space,
        /// The first page's address.
        start: u64,
        /// Number of pages.
        pages: usize,
    },
}

/// Decodes batches. Keep one for an epoch: its buffers are kept.
#[derive(Default)]
pub struct Decoder {
    unpacker: Unpacker,
    pages: Vec<u8>,
    patches: Vec<u8>,
}

/// A batch, decoded and checked.
#[derive(Clone, Copy, Debug)]
pub struct Decoded<'a> {
    runs: &'a [PageRun],
    pages: &'a [u8],
}

impl<'a> Decoded<'a> {
    /// Its runs: address of the first page, and content. Overlapping runs are allowed, the later one counts.
    pub fn runs(self) -> impl Iterator<Item = (u64, Content<'a>)> {
        let mut rest = self.pages;
        self.runs.iter().map(move |run| {
            if run.zero {
                return (run.start, Content::Zero { pages: run.pages });
            }
            let (bytes, behind) = rest.split_at(run.pages as usize * PAGE);
            rest = behind;
            (run.start, Content::Bytes(bytes))
        })
    }
}

impl Decoder {
    /// A decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Checks a batch wholly and makes its pages. `base` is asked for the pages that patches are for, as they are
    /// after the batches before this one: it fills the bytes with the pages from the address on.
    pub fn decode<'a, E: From<DecodeError>>(
        &'a mut self,
        head: &'a BatchHead,
        body: &'a [u8],
        mut base: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Decoded<'a>, E> {
        let wanted = check(&head.runs)?;
        let runs = &head.runs;
        let Form::Patches { len, digest } = head.form else {
            if head.packing == Packing::Raw && body.len() == wanted {
                return Ok(Decoded { runs, pages: body });
            }
            let pages = sized(&mut self.pages, wanted);
            self.unpacker.unpack(head.packing, body, pages)?;
            return Ok(Decoded { runs, pages });
        };
        let len = len as usize;
        if runs.iter().any(|run| run.zero) || len > wanted / PAGE * PATCH_LEN_MAX {
            return Err(DecodeError::Patches.into());
        }
        let patches = sized(&mut self.patches, len);
        self.unpacker.unpack(head.packing, body, patches)?;
        let pages = sized(&mut self.pages, wanted);
        let mut done = 0;
        for run in runs {
            let end = done + run.pages as usize * PAGE;
            base(run.start, &mut pages[done..end])?;
            done = end;
        }
        resolve(head, patches, pages, digest)?;
        Ok(Decoded { runs, pages })
    }
}

/// The first so many bytes of a buffer that is made long enough.
fn sized(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}

/// Makes the new pages of the old ones.
fn resolve(
    head: &BatchHead,
    mut patches: &[u8],
    pages: &mut [u8],
    digest: [u8; DIGEST_LEN],
) -> Result<(), DecodeError> {
    for page in pages.as_chunks_mut().0 {
        patch::apply(&mut patches, page).ok_or(DecodeError::Patches)?;
    }
    if !patches.is_empty() {
        return Err(DecodeError::Patches);
    }
    if digest_of(blake3::Hasher::new().update(pages)) == digest {
        return Ok(());
    }
    let start = head.runs.first().map_or(0, |run| run.start);
    Err(DecodeError::Base { space: head.space, start, pages: pages.len() / PAGE })
}

/// Checks the runs; gives the bytes that their pages take.
fn check(runs: &[PageRun]) -> Result<usize, DecodeError> {
    if runs.len() > BATCH_RUNS_MAX {
        return Err(DecodeError::Runs(runs.len()));
    }
    let mut pages = 0;
    for run in runs {
        let PageRun { start, pages: count, zero } = *run;
        let room = ADDRESS_END.saturating_sub(start) / PAGE_SIZE;
        if count == 0 || start % PAGE_SIZE != 0 || u64::from(count) > room {
            return Err(DecodeError::Run { start, pages: count });
        }
        if !zero {
            pages += u64::from(count);
        }
    }
    if pages > BATCH_PAGES_MAX as u64 { Err(DecodeError::Pages) } else { Ok(pages as usize * PAGE) }
}
