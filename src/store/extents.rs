//! Arithmetic on page extents, pure: sets as ascending lists, and a map from pages to where their
//! newest content lies.

use std::collections::BTreeMap;

use crate::model::{Extent, PAGE_SIZE};

/// No address of a page map lies at or above this (five-level paging ends user space at 2^56).
pub const ADDRESS_END: u64 = 1 << 56;

/// Whether the run is aligned, not empty and ends within the address space.
pub(super) fn is_valid(extent: Extent) -> bool {
    extent.start.is_multiple_of(PAGE_SIZE)
        && extent.pages > 0
        && extent
            .pages
            .checked_mul(PAGE_SIZE)
            .and_then(|bytes| extent.start.checked_add(bytes))
            .is_some_and(|end| end <= ADDRESS_END)
}

/// Whether the list is ascending, without overlap, and each run is valid.
pub(super) fn is_ascending(extents: &[Extent]) -> bool {
    extents.iter().all(|extent| is_valid(*extent)) && extents.is_sorted_by(|a, b| a.end() <= b.start)
}

/// Number of pages in the list.
pub(super) fn pages(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.pages).sum()
}

/// Whether all pages of `wanted` are in the ascending list.
pub(super) fn covers(extents: &[Extent], wanted: Extent) -> bool {
    let first = extents.partition_point(|extent| extent.end() <= wanted.start);
    let mut from = wanted.start;
    for extent in &extents[first..] {
        if from >= wanted.end() || extent.start > from {
            break;
        }
        from = extent.end();
    }
    from >= wanted.end()
}

/// A run in pieces of at most so many pages.
pub(super) fn parts(extent: Extent, pages_max: u64) -> impl Iterator<Item = Extent> {
    (0..extent.pages).step_by(pages_max as usize).map(move |from| Extent {
        start: extent.start + from * PAGE_SIZE,
        pages: pages_max.min(extent.pages - from),
    })
}

fn between(start: u64, end: u64) -> Extent {
    Extent { start, pages: (end - start) / PAGE_SIZE }
}

fn push(list: &mut Vec<Extent>, extent: Extent) {
    match list.last_mut() {
        Some(last) if last.end() == extent.start => last.pages += extent.pages,
        _ => list.push(extent),
    }
}

/// The pages of `a` that are not in `b`; both ascending, neighbours in the result are joined.
pub(super) fn subtract(a: &[Extent], b: &[Extent]) -> Vec<Extent> {
    let mut rest = Vec::new();
    let mut taken = b.iter().peekable();
    for extent in a {
        let mut from = extent.start;
        while let Some(cut) = taken.peek() {
            if cut.start >= extent.end() {
                break;
            }
            if cut.start > from {
                push(&mut rest, between(from, cut.start));
            }
            from = from.max(cut.end());
            if cut.end() > extent.end() {
                break; // it may cut the next one too
            }
            taken.next();
        }
        if from < extent.end() {
            push(&mut rest, between(from, extent.end()));
        }
    }
    rest
}

/// The pages that are in both; both ascending, neighbours in the result are joined.
pub fn intersect(a: &[Extent], b: &[Extent]) -> Vec<Extent> {
    let mut both = Vec::new();
    let (mut i, mut j) = (0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let (from, to) = (x.start.max(y.start), x.end().min(y.end()));
        if from < to {
            push(&mut both, between(from, to));
        }
        if x.end() <= y.end() {
            i += 1;
        } else {
            j += 1;
        }
    }
    both
}

/// Where the newest content of a run of pages lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Nowhere: the pages are zero.
    Zero,
    /// One after the other from this page number of the log (or of the flat file) on.
    At(u64),
}

impl Source {
    fn skip(self, pages: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::At(page) => Self::At(page + pages),
        }
    }
}

/// A run of pages and its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) extent: Extent,
    pub(super) source: Source,
}

impl Run {
    /// The part of the run within `[from, to)`; they must overlap.
    pub(super) fn clip(self, from: u64, to: u64) -> Self {
        let (start, end) = (self.extent.start.max(from), self.extent.end().min(to));
        let skipped = (start - self.extent.start) / PAGE_SIZE;
        Self { extent: between(start, end), source: self.source.skip(skipped) }
    }
}

/// Pages of one address space and their newest sources: a later insertion overrides an earlier one.
#[derive(Debug, Default)]
pub(super) struct RunMap {
    runs: BTreeMap<u64, Run>,
}

impl RunMap {
    /// Records that the pages' newest content is at `source`.
    pub(super) fn insert(&mut self, extent: Extent, source: Source) {
        self.cut(extent);
        let run = Run { extent, source };
        if let Some((_, before)) = self.runs.range_mut(..extent.start).next_back() {
            let follows =
                before.extent.end() == extent.start && before.source.skip(before.extent.pages) == source;
            if follows {
                before.extent.pages += extent.pages;
                return;
            }
        }
        self.runs.insert(extent.start, run);
    }

    fn cut(&mut self, hole: Extent) {
        let before = self.runs.range(..hole.start).next_back().map(|(_, run)| *run);
        if let Some(run) = before.filter(|run| run.extent.end() > hole.start) {
            self.runs.insert(run.extent.start, run.clip(run.extent.start, hole.start));
            if run.extent.end() > hole.end() {
                self.runs.insert(hole.end(), run.clip(hole.end(), run.extent.end()));
            }
        }
        let within: Vec<u64> = self.runs.range(hole.start..hole.end()).map(|(start, _)| *start).collect();
        for start in within {
            if let Some(run) = self.runs.remove(&start).filter(|run| run.extent.end() > hole.end()) {
                self.runs.insert(hole.end(), run.clip(hole.end(), run.extent.end()));
            }
        }
    }

    /// The runs that overlap the extent, cut to it, ascending.
    pub(super) fn overlapping(&self, extent: Extent) -> impl Iterator<Item = Run> {
        let before = self.runs.range(..extent.start).next_back().map(|(_, run)| run);
        let before = before.filter(|run| run.extent.end() > extent.start);
        let within = self.runs.range(extent.start..extent.end()).map(|(_, run)| run);
        before.into_iter().chain(within).map(move |run| run.clip(extent.start, extent.end()))
    }

    /// The pages recorded, ascending.
    pub(super) fn extents(&self) -> Vec<Extent> {
        let mut list = Vec::new();
        for run in self.runs.values() {
            push(&mut list, run.extent);
        }
        list
    }

    /// The runs, ascending, without the pages that are not in `kept`.
    pub(super) fn within(&self, kept: &[Extent]) -> Vec<Run> {
        let mut runs = Vec::new();
        let mut j = 0;
        for run in self.runs.values() {
            while kept.get(j).is_some_and(|keep| keep.end() <= run.extent.start) {
                j += 1;
            }
            for keep in kept[j..].iter().take_while(|keep| keep.start < run.extent.end()) {
                runs.push(run.clip(keep.start, keep.end()));
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set(extents: &[Extent]) -> BTreeSet<u64> {
        extents.iter().flat_map(|e| (0..e.pages).map(|i| e.start / PAGE_SIZE + i)).collect()
    }

    fn list(pages: &BTreeSet<u64>) -> Vec<Extent> {
        let mut list = Vec::new();
        for page in pages {
            push(&mut list, Extent { start: page * PAGE_SIZE, pages: 1 });
        }
        list
    }

    fn some_pages() -> impl Strategy<Value = BTreeSet<u64>> {
        proptest::collection::btree_set(0_u64..60, 0..40)
    }

    proptest! {
        #[test]
        fn set_arithmetic_is_page_exact(a in some_pages(), b in some_pages()) {
            let (x, y) = (list(&a), list(&b));
            prop_assert_eq!(set(&subtract(&x, &y)), &a - &b);
            prop_assert_eq!(set(&intersect(&x, &y)), &a & &b);
            prop_assert!(is_ascending(&subtract(&x, &y)));
            for (page, pages) in (0..60).flat_map(|page| [(page, 1), (page, 3)]) {
                let all = (page..page + pages).all(|page| a.contains(&page));
                prop_assert_eq!(covers(&x, Extent { start: page * PAGE_SIZE, pages }), all);
            }
        }

        #[test]
        fn a_later_page_overrides_an_earlier_one(
            writes in proptest::collection::vec((0_u64..40, 1_u64..9, any::<bool>()), 0..40),
            kept in some_pages(),
        ) {
            let mut map = RunMap::default();
            let mut model = BTreeMap::new();
            let mut log = 0;
            for (page, pages, zero) in writes {
                let source = if zero { Source::Zero } else { Source::At(log) };
                map.insert(Extent { start: page * PAGE_SIZE, pages }, source);
                for i in 0..pages {
                    model.insert(page + i, source.skip(i));
                }
                log += if zero { 0 } else { pages };
            }
            prop_assert_eq!(set(&map.extents()), model.keys().copied().collect::<BTreeSet<_>>());
            for (page, pages) in (0..48).flat_map(|page| [(page, 1), (page, 5)]) {
                let runs = map.overlapping(Extent { start: page * PAGE_SIZE, pages });
                let each = runs.flat_map(|run| {
                    (0..run.extent.pages).map(move |i| (run.extent.start / PAGE_SIZE + i, run.source.skip(i)))
                });
                let wanted = model.range(page..page + pages).map(|(page, source)| (*page, *source));
                prop_assert!(each.eq(wanted));
            }
            let mut found = BTreeMap::new();
            for run in map.within(&list(&kept)) {
                for i in 0..run.extent.pages {
                    found.insert(run.extent.start / PAGE_SIZE + i, run.source.skip(i));
                }
            }
            model.retain(|page, _| kept.contains(page));
            prop_assert_eq!(found, model);
        }
    }

    #[test]
    fn a_run_that_leaves_the_address_space_is_not_valid() {
        assert!(is_valid(Extent { start: ADDRESS_END - PAGE_SIZE, pages: 1 }));
        assert!(!is_valid(Extent { start: ADDRESS_END - PAGE_SIZE, pages: 2 }));
        assert!(!is_valid(Extent { start: 0, pages: u64::MAX }));
        assert!(!is_valid(Extent { start: 0, pages: 0 }));
        assert!(!is_valid(Extent { start: 17, pages: 1 }));
    }
}
