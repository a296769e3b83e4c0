//! Sets of pages as sorted runs, pure.
//!
//! Invariant of every *normal* list: ascending, no overlap, no two runs that touch, no empty run.
//! Everything here but [`normalize`] takes normal lists and gives normal lists.

use crate::model::{Extent, PAGE_SIZE};

/// Sorts and merges a list in place, so that it is normal.
pub fn normalize(extents: &mut Vec<Extent>) {
    extents.retain(|extent| extent.pages > 0);
    if !extents.is_sorted_by_key(|extent| extent.start) {
        extents.sort_unstable_by_key(|extent| extent.start);
    }
    extents.dedup_by(|next, kept| {
        let touches = next.start <= kept.end();
        if touches {
            kept.pages = (next.end().max(kept.end()) - kept.start) / PAGE_SIZE;
        }
        touches
    });
}

/// Appends `start..end` to a list, merging it into the last run if it continues that.
pub fn push(extents: &mut Vec<Extent>, start: u64, end: u64) {
    if start >= end {
        return;
    }
    match extents.last_mut() {
        Some(last) if last.end() == start => last.pages += (end - start) / PAGE_SIZE,
        _ => extents.push(Extent { start, pages: (end - start) / PAGE_SIZE }),
    }
}

/// The pages in both lists.
pub fn intersect(a: &[Extent], b: &[Extent]) -> Vec<Extent> {
    let mut both = Vec::new();
    let (mut i, mut j) = (0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        push(&mut both, x.start.max(y.start), x.end().min(y.end()));
        if x.end() <= y.end() {
            i += 1;
        } else {
            j += 1;
        }
    }
    both
}

/// The pages of `a` that are not in `b`.
pub fn subtract(a: &[Extent], b: &[Extent]) -> Vec<Extent> {
    let mut left = Vec::new();
    let mut j = 0;
    for x in a {
        let mut from = x.start;
        while let Some(y) = b.get(j) {
            if y.start >= x.end() {
                break;
            }
            push(&mut left, from, y.start);
            from = from.max(y.end());
            if y.end() > x.end() {
                break;
            }
            j += 1;
        }
        push(&mut left, from, x.end());
    }
    left
}

/// Number of pages in a list.
pub fn pages(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.pages).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set(extents: &[Extent]) -> BTreeSet<u64> {
        extents.iter().flat_map(|e| (0..e.pages).map(|i| e.start + i * PAGE_SIZE)).collect()
    }

    fn is_normal(extents: &[Extent]) -> bool {
        extents.iter().all(|e| e.pages > 0) && extents.windows(2).all(|w| w[0].end() < w[1].start)
    }

    fn list() -> impl Strategy<Value = Vec<Extent>> {
        let extent = (0u64..80, 0u64..9).prop_map(|(at, pages)| Extent { start: at * PAGE_SIZE, pages });
        proptest::collection::vec(extent, 0..12)
    }

    proptest! {
        #[test]
        fn lists_behave_like_sets(a in list(), b in list()) {
            let (mut x, mut y) = (a.clone(), b.clone());
            normalize(&mut x);
            normalize(&mut y);
            prop_assert!(is_normal(&x) && is_normal(&y));
            prop_assert_eq!(set(&x), set(&a));
            let both = intersect(&x, &y);
            let left = subtract(&x, &y);
            prop_assert!(is_normal(&both) && is_normal(&left));
            prop_assert_eq!(set(&both), set(&a).intersection(&set(&b)).copied().collect());
            prop_assert_eq!(set(&left), set(&a).difference(&set(&b)).copied().collect());
            prop_assert_eq!(pages(&both) + pages(&left), pages(&x));
        }
    }
}
