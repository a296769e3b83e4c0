//! A standby's memory, as pages by address.

use std::collections::BTreeMap;

use standin::{
    delta::{BatchHead, Content, DecodeError, Decoder},
    extents,
    model::{Extent, PAGE_SIZE, Space},
};

use super::record::Piece;

const PAGE: usize = PAGE_SIZE as usize;

/// Pages by address space and address.
#[derive(Default)]
pub(crate) struct Memory {
    pages: BTreeMap<(Space, u64), Vec<u8>>,
    decoder: Decoder,
}

impl Memory {
    /// Applies a batch.
    pub(crate) fn apply(&mut self, head: &BatchHead, body: &[u8]) -> Result<(), DecodeError> {
        let pages = &mut self.pages;
        let decoded = self.decoder.decode(head, body, |start, buf| {
            for (i, page) in buf.chunks_mut(PAGE).enumerate() {
                let at = (head.space, start + i as u64 * PAGE_SIZE);
                page.copy_from_slice(&pages[&at]);
            }
            Ok::<_, DecodeError>(())
        })?;
        for (start, content) in decoded.runs() {
            let list: Vec<&[u8]> = match content {
                Content::Bytes(bytes) => bytes.chunks(PAGE).collect(),
                Content::Zero { pages } => vec![&[0; PAGE]; pages as usize],
            };
            for (i, page) in list.into_iter().enumerate() {
                let at = (head.space, start + i as u64 * PAGE_SIZE);
                match self.pages.get_mut(&at) {
                    Some(held) => held.copy_from_slice(page),
                    None => drop(self.pages.insert(at, page.to_vec())),
                }
            }
        }
        Ok(())
    }

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
