//! What changed within a page, pure: run-length coding of its XOR with an older version of it (QEMU calls it XBZRLE).
//!
//! ```text
//!  patch := ( gap  len  bytes[len] )*  [gap]
//! ```
//!
//! `gap` bytes are as they were, the `len` (at least 1, written less one) that follow are the new ones; a patch ends where
//! the page does. Both numbers take one byte below 128 and two else, low bits first. The new bytes stand there themselves
//! and not their XOR, so that a patch applied twice does no harm.

use crate::model::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;
/// Most bytes of a patch; a page that needs more is sent whole.
pub const PATCH_LEN_MAX: usize = PAGE / 4 * 3;
/// So many equal bytes end a run of new ones: a run costs two or three bytes of its own.
const WORD: usize = 8;
/// Compared at once while nothing differs.
const BLOCK: usize = 64;

/// A page, as bytes.
pub(super) type Page = [u8; PAGE];

fn differing_bits(old: &Page, new: &Page, at: usize) -> u64 {
    let word = |page: &Page| {
        u64::from_le_bytes(*page[at..].first_chunk().expect("the caller stays within the page"))
    };
    word(old) ^ word(new)
}

/// The first byte from `at` on that differs, or the page's end.
fn next_difference(old: &Page, new: &Page, mut at: usize) -> usize {
    while at + WORD <= PAGE {
        if at.is_multiple_of(BLOCK) && old[at..at + BLOCK] == new[at..at + BLOCK] {
            at += BLOCK;
            continue;
        }
        // Up to the next multiple of a word, so that whole blocks are met again.
        let differing = differing_bits(old, new, at);
        if differing != 0 {
            return at + differing.trailing_zeros() as usize / 8;
        }
        at = (at + WORD) & !(WORD - 1);
    }
    (at..PAGE).find(|at| old[*at] != new[*at]).unwrap_or(PAGE)
}

/// The end of a run of new bytes that begins at `start`: behind it a word's length of bytes are equal, or the page ends.
fn end_of_run(old: &Page, new: &Page, start: usize) -> usize {
    let mut end = start + 1;
    while end + WORD <= PAGE {
        let differing = differing_bits(old, new, end);
        if differing == 0 {
            return end;
        }
        end += WORD - differing.leading_zeros() as usize / 8;
    }
    (end..PAGE).rfind(|at| old[*at] != new[*at]).map_or(end, |last| last + 1)
}

fn push_number(into: &mut Vec<u8>, number: usize) {
    if number < 128 {
        into.push(number as u8);
    } else {
        into.extend([number as u8 | 128, (number >> 7) as u8]);
    }
}

/// Appends what makes `new` of `old`; false, with nothing appended, if that takes more than `len_max` bytes.
pub(super) fn append(into: &mut Vec<u8>, old: &Page, new: &Page, len_max: usize) -> bool {
    let began = into.len();
    let mut done = 0;
    while done < PAGE {
        let start = next_difference(old, new, done);
        push_number(into, start - done);
        if start == PAGE {
            break;
        }
        let end = end_of_run(old, new, start);
        // Looked at before the copy: a page that is all new is not copied in vain.
        if into.len() - began + end - start > len_max {
            into.truncate(began);
            return false;
        }
        push_number(into, end - start - 1);
        into.extend_from_slice(&new[start..end]);
        done = end;
    }
    let fits = into.len() - began <= len_max;
    if !fits {
        into.truncate(began);
    }
    fits
}

fn take_number(patches: &mut &[u8]) -> Option<usize> {
    let (first, rest) = patches.split_first()?;
    *patches = rest;
    if *first < 128 {
        return Some(usize::from(*first));
    }
    let (second, rest) = patches.split_first()?;
    *patches = rest;
    Some(usize::from(first & 127) | usize::from(*second) << 7)
}

/// Applies the patch at the beginning of `patches`, and takes it off; `None` if there is none.
pub(super) fn apply(patches: &mut &[u8], page: &mut Page) -> Option<()> {
    let mut done = 0;
    while done < PAGE {
        done += take_number(patches)?;
        if done >= PAGE {
            return (done == PAGE).then_some(());
        }
        let run = page.get_mut(done..done + take_number(patches)? + 1)?;
        let (bytes, rest) = patches.split_at_checked(run.len())?;
        run.copy_from_slice(bytes);
        done += run.len();
        *patches = rest;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page() -> impl Strategy<Value = Box<Page>> {
        any::<u64>().prop_map(|seed| {
            let mut page = Box::new([0; PAGE]);
            blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut page[..]);
            page
        })
    }

    proptest! {
        #[test]
        fn a_patch_makes_the_new_page_of_the_old_one(
            old in page(),
            writes in proptest::collection::vec((0..PAGE, 1usize..40, any::<u8>()), 0..60),
            len_max in 0..=PATCH_LEN_MAX,
        ) {
            let mut new = old.clone();
            for (at, len, value) in writes {
                new[at..(at + len).min(PAGE)].fill(value);
            }
            let mut patches = vec![7];
            let fits = append(&mut patches, &old, &new, len_max);
            if !fits {
                prop_assert_eq!(patches, [7]);
                return Ok(());
            }
            prop_assert!(patches.len() - 1 <= len_max);
            // Followed by another, which is left alone; and applied twice.
            patches.push(9);
            let mut made = old.clone();
            for _ in 0..2 {
                let mut rest = &patches[1..];
                prop_assert_eq!(apply(&mut rest, &mut made), Some(()));
                prop_assert_eq!(rest, [9]);
                prop_assert!(made == new);
            }
        }

        #[test]
        fn hostile_bytes_are_refused_or_applied(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut page = [0; PAGE];
            let mut rest = &bytes[..];
            while !rest.is_empty() && apply(&mut rest, &mut page).is_some() {}
        }
    }

    #[test]
    fn a_page_that_is_all_new_has_no_patch() {
        let (old, new) = ([1; PAGE], [2; PAGE]);
        assert!(!append(&mut Vec::new(), &old, &new, PATCH_LEN_MAX));
    }

    #[test]
    fn the_last_bytes_of_a_page_count() {
        for at in PAGE - 20..PAGE {
            let (old, mut new) = ([0; PAGE], [0; PAGE]);
            new[at] = 5;
            let mut patch = Vec::new();
            assert!(append(&mut patch, &old, &new, PATCH_LEN_MAX));
            let mut made = old;
            apply(&mut &patch[..], &mut made).unwrap();
            assert!(made == new);
        }
    }
}
