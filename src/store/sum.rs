//! The checksum that is kept of every page that is not known to be zero.

use crate::model::PAGE_SIZE;

/// Bytes kept of a page's BLAKE3 hash: it finds damage, it does not stand for the content.
pub(super) const SUM_LEN: usize = 16;

/// Checksum of a page. All zero (a hole in the file of sums) says that the page must be zero.
pub(super) type Sum = [u8; SUM_LEN];

pub(super) const ZERO_PAGE: Sum = [0; SUM_LEN];

/// Checksums of the pages that lie one after the other in `bytes`.
pub(super) fn of_pages(bytes: &[u8]) -> impl Iterator<Item = Sum> {
    bytes.chunks_exact(PAGE_SIZE as usize).map(|page| {
        let mut sum = ZERO_PAGE;
        sum.copy_from_slice(&blake3::hash(page).as_bytes()[..SUM_LEN]);
        sum
    })
}

/// Whether the page is the one that `sum` was taken of.
pub(super) fn matches(page: &[u8], sum: Sum) -> bool {
    if sum == ZERO_PAGE { page.iter().all(|byte| *byte == 0) } else { of_pages(page).next() == Some(sum) }
}
