//! A program's memory, as pages by address.

use std::collections::BTreeMap;

use standin::{
    extents,
    model::{Extent, PAGE_SIZE, Space},
};

use super::record::Piece;

const PAGE: usize = PAGE_SIZE as usize;

/// Pages by address space and address.
#[derive(Default)]
pub(crate) struct Memory {
    pages: BTreeMap<(Space, u64), Vec<u8>>,
}

impl Memory {
    /// The pages.
    pub(crate) fn pages(&self) -> &BTreeMap<(Space, u64), Vec<u8>> {
        &self.pages
    }

    /// Takes pages in; those that differ from what was here (zeroes, if nothing was), piece by piece.
    pub(crate) fn differing(&mut self, space: Space, extents: &[Extent], data: &[u8]) -> Option<Piece> {
        let starts = extents.iter().flat_map(|e| (0..e.pages).map(|i| e.start + i * PAGE_SIZE));
        let mut piece = Piece { space, extents: Vec::new(), data: Vec::new() };
        for (start, page) in starts.zip(data.chunks_exact(PAGE)) {
            let held = self.pages.get(&(space, start)).map_or(&[0; PAGE][..], Vec::as_slice);
            if held != page {
                self.pages.insert((space, start), page.to_vec());
                extents::push(&mut piece.extents, start, start + PAGE_SIZE);
                piece.data.extend_from_slice(page);
            }
        }
        (!piece.data.is_empty()).then_some(piece)
    }
}
