//! Pure: which pages a workload has written lately, so that they are the first to come when it is restored.
//!
//! Kept in memory alone: an agent that starts anew knows what is not folded yet, and learns the rest with the epochs that
//! come. It is an order and no more: every page comes.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    extents,
    model::{EpochId, Extent, Space},
};

/// Epochs that are remembered.
const EPOCHS_MAX: usize = 32;
/// Runs of pages that are remembered (1.5 MB): beyond them the oldest epochs are forgotten.
const RUNS_MAX: usize = 1 << 16;

/// The pages that each of the newest epochs brought.
#[derive(Debug, Default)]
pub struct Recency {
    /// Newest last.
    epochs: VecDeque<(EpochId, Vec<(Space, Extent)>)>,
}

impl Recency {
    /// Remembers an epoch; one that is known already, or older than one that is, changes nothing.
    pub fn note(&mut self, id: EpochId, mut runs: Vec<(Space, Extent)>) {
        if self.epochs.back().is_some_and(|(newest, _)| *newest >= id) {
            return;
        }
        runs.truncate(RUNS_MAX);
        self.epochs.push_back((id, runs));
        let mut runs: usize = self.epochs.iter().map(|(_, runs)| runs.len()).sum();
        while self.epochs.len() > EPOCHS_MAX || runs > RUNS_MAX {
            runs -= self.epochs.pop_front().map_or(0, |(_, runs)| runs.len());
        }
    }

    /// Every page that is remembered, once: the newest epoch's first, each epoch's by space and address.
    pub fn order(&self) -> Vec<(Space, Extent)> {
        let mut seen: BTreeMap<Space, Vec<Extent>> = BTreeMap::new();
        let mut order = Vec::new();
        for (_, runs) in self.epochs.iter().rev() {
            let mut fresh: BTreeMap<Space, Vec<Extent>> = BTreeMap::new();
            for (space, extent) in runs {
                fresh.entry(*space).or_default().push(*extent);
            }
            for (space, mut extents) in fresh {
                extents::normalize(&mut extents);
                let seen = seen.entry(space).or_default();
                order.extend(extents::subtract(&extents, seen).into_iter().map(|extent| (space, extent)));
                seen.extend(extents);
                extents::normalize(seen);
            }
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Epoch, Term};

    const SPACE: Space = Space::Task(7);

    fn id(epoch: u64) -> EpochId {
        EpochId { term: Term(1), epoch: Epoch(epoch) }
    }

    fn run(page: u64, pages: u64) -> (Space, Extent) {
        (SPACE, Extent { start: page << 12, pages })
    }

    #[test]
    fn what_was_written_last_comes_first_and_once() {
        let mut recency = Recency::default();
        recency.note(id(1), vec![run(1, 4), run(9, 1)]);
        recency.note(id(3), vec![run(8, 1), run(2, 1)]);
        recency.note(id(2), vec![run(20, 1)]);
        recency.note(id(3), vec![run(30, 1)]);
        assert_eq!(recency.order(), [run(2, 1), run(8, 1), run(1, 1), run(3, 2), run(9, 1)]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut recency = Recency::default();
        for epoch in 1..=100 {
            recency.note(id(epoch), vec![run(epoch * 2, 1)]);
        }
        assert_eq!(recency.order().len(), EPOCHS_MAX);
        let many = |count: usize| (0..count as u64).map(|page| run(page * 2, 1)).collect::<Vec<_>>();
        recency.note(id(101), many(RUNS_MAX));
        assert_eq!(recency.order().len(), RUNS_MAX);
        recency.note(id(102), many(RUNS_MAX + 9));
        assert_eq!(recency.order().len(), RUNS_MAX);
    }
}
