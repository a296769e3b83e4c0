//! What a standby says it holds of an image that this primary knows nothing of: a hash of each page.
//!
//! ```text
//!   the standby's image ── sums_of(key) ──► wire ──► Offered::add ──► Known::offer ──► judge: the same? then not sent
//! ```
//!
//! The key is drawn anew by the primary each time: whoever chose the content of pages before cannot have chosen two that have
//! one hash. A standby that lies about what it holds spoils its own image and nothing else; of what is here it learns nothing.

use std::collections::HashMap;

use super::patch::Page;
use crate::{
    model::{PAGE_SIZE, Space},
    wire::check::SPACES_MAX,
};

/// Bytes of a page's hash: 128 bits of a keyed BLAKE3.
pub const SUM_LEN: usize = 16;
/// Bytes of a key.
pub const KEY_LEN: usize = 32;
/// The hash that stands for nothing but zeros, so that those need no hashing.
pub const ZEROS: [u8; SUM_LEN] = [0; SUM_LEN];

/// Why hashes are not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// Pages before those that came last, or on top of them.
    #[error("the hashes of pages of {0:?} are out of order")]
    Order(Space),
    /// No whole number of hashes.
    #[error("{0} bytes are no hashes of pages")]
    Length(usize),
    /// More than were asked for.
    #[error("hashes of more than {0} pages, which is all that was asked for")]
    TooMany(u64),
    /// More than any image has.
    #[error("hashes of pages in more than {SPACES_MAX} address spaces")]
    Spaces,
}

/// Appends the hash of each page of `pages` to `sums`.
///
/// # Panics
/// If those are not whole pages.
pub fn sums_of(key: &[u8; KEY_LEN], pages: &[u8], sums: &mut Vec<u8>) {
    let (pages, rest) = pages.as_chunks::<{ PAGE_SIZE as usize }>();
    assert!(rest.is_empty(), "whole pages");
    sums.extend(pages.iter().flat_map(|page| sum_of(key, page)));
}

fn sum_of(key: &[u8; KEY_LEN], page: &Page) -> [u8; SUM_LEN] {
    if super::known::is_zero(page) { ZEROS } else { hash_of(key, page) }
}

/// The hash of what is not all zeros.
pub fn hash_of(key: &[u8; KEY_LEN], bytes: &[u8]) -> [u8; SUM_LEN] {
    *blake3::keyed_hash(key, bytes).as_bytes().first_chunk().expect("a BLAKE3 hash has 32 bytes")
}

/// Hashes of what a standby holds: 16 bytes a page, and 16 for each run of pages.
#[derive(Debug)]
pub struct Offered {
    pub(super) key: [u8; KEY_LEN],
    spaces: HashMap<Space, Sums>,
    pages: u64,
    pages_max: u64,
}

#[derive(Debug, Default)]
struct Sums {
    /// Where a run starts, and which hash is its first; ascending in both.
    runs: Vec<(u64, usize)>,
    of_pages: Vec<[u8; SUM_LEN]>,
    end: u64,
}

impl Offered {
    /// For hashes of at most `pages_max` pages under this key.
    pub fn new(key: [u8; KEY_LEN], pages_max: u64) -> Self {
        Self { key, spaces: HashMap::new(), pages: 0, pages_max }
    }

    /// Takes the hashes of pages from the address `start` on, behind all that came of the space before.
    pub fn add(&mut self, space: Space, start: u64, sums: &[u8]) -> Result<(), OfferError> {
        let (sums, rest) = sums.as_chunks::<SUM_LEN>();
        if !rest.is_empty() || sums.is_empty() {
            return Err(OfferError::Length(sums.len() * SUM_LEN + rest.len()));
        }
        self.pages += sums.len() as u64;
        if self.pages > self.pages_max {
            return Err(OfferError::TooMany(self.pages_max));
        }
        if self.spaces.len() == SPACES_MAX && !self.spaces.contains_key(&space) {
            return Err(OfferError::Spaces);
        }
        let of = self.spaces.entry(space).or_default();
        if start < of.end || !start.is_multiple_of(PAGE_SIZE) {
            return Err(OfferError::Order(space));
        }
        if of.runs.is_empty() || of.end != start {
            of.runs.push((start, of.of_pages.len()));
        }
        of.of_pages.extend_from_slice(sums);
        of.end = start + sums.len() as u64 * PAGE_SIZE;
        Ok(())
    }

    /// Pages of which there is a hash.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The hash of a page; all zero for a page of zeros.
    pub(super) fn get(&self, space: Space, page: u64) -> Option<[u8; SUM_LEN]> {
        let of = self.spaces.get(&space)?;
        let next = of.runs.partition_point(|(start, _)| *start <= page);
        let (start, first) = *of.runs.get(next.checked_sub(1)?)?;
        let end = of.runs.get(next).map_or(of.of_pages.len(), |(_, first)| *first);
        let at = first + usize::try_from((page - start) / PAGE_SIZE).ok()?;
        of.of_pages[..end].get(at).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const SPACE: Space = Space::Task(1);

    proptest! {
        #[test]
        fn a_hash_is_found_where_it_was_put_and_nowhere_else(
            steps in prop::collection::vec((0..3u64, 1..5usize), 0..40)
        ) {
            let (mut offered, mut model, mut at) = (Offered::new([7; KEY_LEN], 1 << 20), BTreeMap::new(), 0);
            for (number, (gap, pages)) in steps.into_iter().enumerate() {
                at += gap;
                let sums: Vec<[u8; SUM_LEN]> = (0..pages).map(|page| [(number * 5 + page) as u8; SUM_LEN]).collect();
                offered.add(SPACE, at * PAGE_SIZE, sums.as_flattened()).unwrap();
                model.extend(sums.iter().enumerate().map(|(page, sum)| (at + page as u64, *sum)));
                at += pages as u64;
            }
            prop_assert_eq!(offered.pages(), model.len() as u64);
            for page in 0..at + 3 {
                prop_assert_eq!(offered.get(SPACE, page * PAGE_SIZE), model.get(&page).copied());
                prop_assert_eq!(offered.get(Space::Shared(1), page * PAGE_SIZE), None);
            }
        }
    }

    #[test]
    fn what_was_not_asked_for_or_makes_no_sense_is_refused() {
        let mut offered = Offered::new([7; KEY_LEN], 4);
        let sums = [1; 2 * SUM_LEN];
        assert_eq!(offered.add(SPACE, 8192, &sums), Ok(()));
        assert_eq!(offered.add(SPACE, 12288, &sums[..SUM_LEN]), Err(OfferError::Order(SPACE)));
        let mut offered = Offered::new([7; KEY_LEN], 4);
        assert_eq!(offered.add(SPACE, 0, &sums[..17]), Err(OfferError::Length(17)));
        assert_eq!(offered.add(SPACE, 0, &[]), Err(OfferError::Length(0)));
        assert_eq!(offered.add(SPACE, 1, &sums), Err(OfferError::Order(SPACE)));
        let mut offered = Offered::new([7; KEY_LEN], 4);
        assert_eq!(offered.add(SPACE, 0, &[1; 4 * SUM_LEN]), Ok(()));
        assert_eq!(offered.add(Space::Task(2), 0, &sums), Err(OfferError::TooMany(4)));
    }

    #[test]
    fn another_key_makes_other_hashes_but_of_zeros() {
        let pages = [[0; PAGE_SIZE as usize], [5; PAGE_SIZE as usize]].concat();
        let of = |key| {
            let mut sums = Vec::new();
            sums_of(&[key; KEY_LEN], &pages, &mut sums);
            sums
        };
        assert_eq!(of(1), of(1));
        assert_eq!(of(1)[..SUM_LEN], ZEROS);
        assert_ne!(of(1)[SUM_LEN..], of(2)[SUM_LEN..]);
    }
}
