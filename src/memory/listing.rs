//! Which pages a process has, kept up from pass to pass, pure.
//!
//! A list of all of them costs 2.7 ms a GiB, a list of those that are *not* present and protected a quarter of that: most
//! are, and of what is told nothing need be copied. So the listing is kept by what a pass reports.
//!
//! Invariant: a page that is present and protected is listed, if it is not the page of zeroes. It was protected by a pass,
//! which listed it; should it vanish, it is neither present nor protected any more, and the next pass reports that.

use crate::{extents, model::Extent};

/// The pages of the mappings that were [begun](Listing::begin), and some of others.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pages: Vec<Extent>,
}

/// Guard regions (MADV_GUARD_INSTALL) of an address space, as far as a pass looked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guards {
    /// Ranges in which there are no others.
    pub looked: Vec<Extent>,
    /// The regions within these.
    pub found: Vec<Extent>,
}

/// What a pass found in a range.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Not both present and protected, pages and places for them.
    pub(super) reported: Vec<Extent>,
    /// Of these, in swap: they exist, and may be protected.
    pub(super) swapped: Vec<Extent>,
    /// Of these, existing and not protected.
    pub(super) written: Vec<Extent>,
    /// Of these, guard regions.
    pub(super) guards: Vec<Extent>,
}

impl Listing {
    /// A mapping that is new has these pages.
    pub(super) fn begin(&mut self, mapping: Extent, pages: &[Extent]) {
        self.pages = extents::subtract(&self.pages, &[mapping]);
        self.add(pages);
    }

    /// Takes in what was found; what was protected is [added](Self::add) after it.
    pub(super) fn update(&mut self, found: &Found) {
        self.pages = extents::subtract(&self.pages, &found.reported);
        self.add(&found.swapped);
    }

    /// These pages exist.
    pub(super) fn add(&mut self, pages: &[Extent]) {
        if !pages.is_empty() {
            self.pages.extend_from_slice(pages);
            extents::normalize(&mut self.pages);
        }
    }

    /// Forgets what lies outside of the mappings.
    pub(super) fn keep(&mut self, mappings: &[Extent]) {
        self.pages = extents::intersect(&self.pages, mappings);
    }

    /// The pages in a range.
    pub(super) fn within(&self, range: Extent) -> Vec<Extent> {
        extents::intersect(&self.pages, &[range])
    }
}
