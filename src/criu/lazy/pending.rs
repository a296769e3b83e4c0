//! Pure: which pages of a task are still to come, where the task has them now, and where the image
//! does. They differ once the task has moved a mapping (mremap).

use std::collections::BTreeMap;

use crate::model::Extent;

/// A run of pages that is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Awaited {
    /// Address in the task.
    pub(super) start: u64,
    /// Address behind the last byte in the task.
    pub(super) end: u64,
    /// Address in the image.
    pub(super) image: u64,
}

/// The runs of one task, apart from each other, by their address in the task.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending(BTreeMap<u64, (u64, u64)>);

impl Pending {
    /// Runs at their addresses in the image. Adjacent ones stay apart, so that none spans two
    /// mappings or two runs of the page map.
    pub(super) fn new(runs: &[Extent]) -> Self {
        Self(runs.iter().map(|run| (run.start, (run.end(), run.start))).collect())
    }

    /// What is awaited first from `address` on, to the end of its run.
    pub(super) fn next(&self, address: u64) -> Option<Awaited> {
        let behind = || {
            let (start, (end, image)) = self.0.range(address..).next()?;
            Some(Awaited { start: *start, end: *end, image: *image })
        };
        self.at(address).or_else(behind)
    }

    /// The parts of a run that are still awaited where it says, from the same place in the image.
    pub(super) fn still(&self, run: Awaited) -> Vec<Awaited> {
        let mut parts = Vec::new();
        let mut from = run.start;
        while let Some(next) = self.next(from).filter(|next| next.start < run.end) {
            let part = Awaited { end: next.end.min(run.end), ..next };
            if part.image.wrapping_sub(part.start) == run.image.wrapping_sub(run.start) {
                parts.push(part);
            }
            from = part.end;
        }
        parts
    }

    /// What is awaited from `address` to the end of its run.
    pub(super) fn at(&self, address: u64) -> Option<Awaited> {
        let (start, (end, image)) = self.0.range(..=address).next_back()?;
        (address < *end).then(|| Awaited { start: address, end: *end, image: image + (address - start) })
    }

    /// Cuts the run around `address` in two there.
    fn cut(&mut self, address: u64) {
        let Some(tail) = self.at(address) else { return };
        if self.0.contains_key(&address) {
            return;
        }
        if let Some((_, (end, _))) = self.0.range_mut(..address).next_back() {
            *end = address;
        }
        self.0.insert(address, (tail.end, tail.image));
    }

    fn take(&mut self, start: u64, end: u64) -> Vec<Awaited> {
        if start >= end {
            return Vec::new();
        }
        self.cut(start);
        self.cut(end);
        let keys: Vec<u64> = self.0.range(start..end).map(|(key, _)| *key).collect();
        let taken = keys.iter().filter_map(|key| {
            let (end, image) = self.0.remove(key)?;
            Some(Awaited { start: *key, end, image })
        });
        taken.collect()
    }

    /// Nothing of `start..end` is awaited any more.
    pub(super) fn remove(&mut self, start: u64, end: u64) {
        self.take(start, end);
    }

    /// The task has moved `length` bytes from `from` to `to`.
    pub(super) fn remap(&mut self, from: u64, to: u64, length: u64) {
        let moved = self.take(from, from.saturating_add(length));
        self.remove(to, to.saturating_add(length));
        for run in moved {
            self.0.insert(run.start - from + to, (run.end - from + to, run.image));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;

    fn flat(pending: &Pending) -> BTreeMap<u64, u64> {
        let runs = pending.0.iter();
        runs.flat_map(|(start, (end, image))| {
            assert!(start < end, "an empty run");
            (*start..*end).step_by(4096).map(move |page| (page, image + page - start))
        })
        .collect()
    }

    proptest! {
        /// Against a map that has one entry for each page.
        #[test]
        fn every_page_is_awaited_where_it_is(
            runs in prop::collection::vec((1u64..4, 1u64..6), 1..8),
            steps in prop::collection::vec((any::<bool>(), 0u64..40, 0u64..40, 1u64..12), 0..12),
        ) {
            let mut at = 0;
            let mut extents = Vec::new();
            for (gap, pages) in runs {
                at += gap - 1;
                extents.push(Extent { start: at * PAGE, pages });
                at += pages;
            }
            let mut pending = Pending::new(&extents);
            let mut model = flat(&pending);
            for (is_remap, from, to, pages) in steps {
                let (from, to) = (from * PAGE, (to + 40) * PAGE);
                let inside = |page: &u64| *page >= from && *page < from + pages * PAGE;
                let moved: Vec<(u64, u64)> = model.iter().filter(|(p, _)| inside(p)).map(|(p, i)| (*p, *i)).collect();
                model.retain(|page, _| !inside(page));
                if is_remap {
                    model.retain(|page, _| *page < to || *page >= to + pages * PAGE);
                    model.extend(moved.iter().map(|(page, image)| (page - from + to, *image)));
                    pending.remap(from, to, pages * PAGE);
                } else {
                    pending.remove(from, from + pages * PAGE);
                }
                prop_assert_eq!(&flat(&pending), &model);
                for page in 0..90 {
                    let found = pending.at(page * PAGE).map(|run| run.image);
                    prop_assert_eq!(found, model.get(&(page * PAGE)).copied());
                    let next = pending.next(page * PAGE).map(|run| run.start);
                    prop_assert_eq!(next, model.range(page * PAGE..).next().map(|(page, _)| *page));
                }
                let run = Awaited { start: from, end: from + pages * PAGE, image: to };
                let still: Vec<u64> = pending.still(run).iter()
                    .flat_map(|part| (part.start..part.end).step_by(4096)).collect();
                let wanted = model.range(from..run.end).filter(|(page, image)| **image == *page - from + to);
                prop_assert_eq!(still, wanted.map(|(page, _)| *page).collect::<Vec<_>>());
            }
        }
    }
}
