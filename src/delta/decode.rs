//! Unpacks a batch that came from the network. Everything is checked before any of it is handed on.

use lz4_flex::block;

use super::{ADDRESS_END, BATCH_PAGES_MAX, BATCH_RUNS_MAX, BatchHead, Packing, PageRun};
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
    #[error("a body of {got} bytes was received for pages that take {wanted}")]
    Length {
        /// Bytes received, or unpacked.
        got: usize,
        /// Bytes that the runs need.
        wanted: usize,
    },
    /// The body cannot be unpacked.
    #[error("a body of {0} bytes was received that is no LZ4 block of the pages announced")]
    Lz4(usize),
}

/// Checks a batch wholly, then hands each of its runs to `sink`: space, address of the first page, content.
/// Overlapping runs are allowed, the later one counts.
pub fn decode<E: From<DecodeError>>(
    head: &BatchHead,
    body: &[u8],
    mut sink: impl FnMut(Space, u64, Content<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let wanted = check(&head.runs)?;
    let mut unpacked = Vec::new();
    let mut rest = match head.packing {
        Packing::Raw if body.len() == wanted => body,
        Packing::Raw => return Err(DecodeError::Length { got: body.len(), wanted }.into()),
        Packing::Lz4 => {
            unpacked.resize(wanted, 0);
            unpack(body, &mut unpacked)?;
            &unpacked
        }
    };
    for run in &head.runs {
        let content = if run.zero {
            Content::Zero { pages: run.pages }
        } else {
            let (bytes, behind) = rest.split_at(run.pages as usize * PAGE);
            rest = behind;
            Content::Bytes(bytes)
        };
        sink(head.space, run.start, content)?;
    }
    Ok(())
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

/// Unpacks into exactly the bytes that are wanted.
fn unpack(body: &[u8], into: &mut [u8]) -> Result<(), DecodeError> {
    let wanted = into.len();
    // An LZ4 block is never longer than this; what is, is no honest packing of these pages.
    if body.len() > block::get_maximum_output_size(wanted) {
        return Err(DecodeError::Lz4(body.len()));
    }
    match block::decompress_into(body, into) {
        Ok(got) if got == wanted => Ok(()),
        Ok(got) => Err(DecodeError::Length { got, wanted }),
        Err(_) => Err(DecodeError::Lz4(body.len())),
    }
}
