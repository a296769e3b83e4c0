//! CRIU's page maps: which pages of an address space lie where in the file of pages beside them.
//!
//! An image file is two magic numbers and then messages, each behind its length (`images/pagemap.proto`,
//! `criu/include/magic.h`). The place of an entry in the file of pages is the sum of the lengths of all
//! entries before it that are PRESENT, lazy or not (`skip_pagemap_pages` in `criu/pagemap.c`).

use prost::Message;

use crate::model::{Extent, PAGE_SIZE};

const COMMON_MAGIC: u32 = 0x5456_4319;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
const PE_LAZY: u32 = 1 << 1;
const PE_PRESENT: u32 = 1 << 2;
/// A longer run becomes several entries: CRIU keeps some counts of pages in an `int`.
const ENTRY_PAGES_MAX: u64 = 1 << 18;
/// Longest message; real ones have some 20 bytes.
const MESSAGE_LEN_MAX: usize = 1 << 10;

#[derive(Clone, PartialEq, Message)]
struct Head {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    /// What CRIU up to 4.1 reads, and required in all versions.
    #[prost(uint32, required, tag = "2")]
    compat_nr_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    /// What CRIU reads from 4.2 on.
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

/// A run of pages in a page map; all are present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagemapEntry {
    /// Address of the first page.
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
    /// The pages may come later, through userfaultfd.
    pub lazy: bool,
}

/// A page map that CRIU could not read.
#[derive(Debug, thiserror::Error)]
#[error("a page map is damaged: {0}")]
pub struct PagemapError(&'static str);

/// Marks those of the `held` pages that are also in `lazy` (both ascending).
pub(super) fn entries(held: &[Extent], lazy: &[Extent]) -> Vec<PagemapEntry> {
    let mut entries = Vec::new();
    let mut add = |mut start: u64, end: u64, lazy: bool| {
        while start < end {
            let pages = ((end - start) / PAGE_SIZE).min(ENTRY_PAGES_MAX);
            entries.push(PagemapEntry { start, pages, lazy });
            start += pages * PAGE_SIZE;
        }
    };
    let mut next = 0;
    for extent in held {
        let mut from = extent.start;
        while let Some(range) = lazy.get(next).filter(|range| range.start < extent.end()) {
            if range.end() <= from {
                next += 1;
                continue;
            }
            let (begin, end) = (range.start.max(from), range.end().min(extent.end()));
            add(from, begin, false);
            add(begin, end, true);
            from = end;
            if range.end() >= extent.end() {
                break;
            }
        }
        add(from, extent.end(), false);
    }
    entries
}

/// The page map as CRIU reads it; the pages are in `pages-PAGES_ID.img`.
pub fn encode(pages_id: u32, entries: &[PagemapEntry]) -> Vec<u8> {
    let mut image = Vec::with_capacity(32 + entries.len() * 32);
    image.extend_from_slice(&COMMON_MAGIC.to_le_bytes());
    image.extend_from_slice(&PAGEMAP_MAGIC.to_le_bytes());
    put(&mut image, &Head { pages_id });
    for entry in entries {
        let flags = PE_PRESENT | if entry.lazy { PE_LAZY } else { 0 };
        put(
            &mut image,
            &Entry {
                vaddr: entry.start,
                compat_nr_pages: entry.pages as u32, // at most ENTRY_PAGES_MAX
                in_parent: None,
                flags: Some(flags),
                nr_pages: Some(entry.pages),
            },
        );
    }
    image
}

fn put(image: &mut Vec<u8>, message: &impl Message) {
    let bytes = message.encode_to_vec();
    image.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    image.extend_from_slice(&bytes);
}

/// Reads a page map without parent entries: the number of its file of pages, and its entries.
pub fn decode(image: &[u8]) -> Result<(u32, Vec<PagemapEntry>), PagemapError> {
    let mut rest = image;
    if number(&mut rest)? != COMMON_MAGIC || number(&mut rest)? != PAGEMAP_MAGIC {
        return Err(PagemapError("its magic numbers are not those of a page map"));
    }
    let head: Head = take(&mut rest)?;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let entry: Entry = take(&mut rest)?;
        let flags = entry.flags.unwrap_or(PE_PRESENT);
        if entry.in_parent == Some(true) || flags & PE_PRESENT == 0 {
            return Err(PagemapError("an entry's pages are not in it but in a parent image"));
        }
        let pages = entry.nr_pages.unwrap_or(u64::from(entry.compat_nr_pages));
        entries.push(PagemapEntry { start: entry.vaddr, pages, lazy: flags & PE_LAZY != 0 });
    }
    Ok((head.pages_id, entries))
}

fn number(rest: &mut &[u8]) -> Result<u32, PagemapError> {
    let (head, tail) = rest.split_first_chunk::<4>().ok_or(PagemapError("it ends in a number"))?;
    *rest = tail;
    Ok(u32::from_le_bytes(*head))
}

fn take<M: Message + Default>(rest: &mut &[u8]) -> Result<M, PagemapError> {
    let len = number(rest)? as usize;
    if len > MESSAGE_LEN_MAX {
        return Err(PagemapError("a message is too long"));
    }
    let (message, tail) = rest.split_at_checked(len).ok_or(PagemapError("it ends in a message"))?;
    *rest = tail;
    M::decode(message).map_err(|_| PagemapError("a message does not decode"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn runs(pages: impl IntoIterator<Item = u64>) -> Vec<Extent> {
        let mut list: Vec<Extent> = Vec::new();
        for page in pages {
            match list.last_mut() {
                Some(last) if last.end() == page * PAGE_SIZE => last.pages += 1,
                _ => list.push(Extent { start: page * PAGE_SIZE, pages: 1 }),
            }
        }
        list
    }

    proptest! {
        #[test]
        fn every_held_page_is_in_one_entry_and_lazy_if_it_may_be(
            held in proptest::collection::btree_set(0_u64..50, 0..40),
            lazy in proptest::collection::btree_set(0_u64..50, 0..40),
        ) {
            let entries = entries(&runs(held.iter().copied()), &runs(lazy.iter().copied()));
            let mut found = Vec::new();
            for entry in &entries {
                for page in entry.start / PAGE_SIZE..entry.start / PAGE_SIZE + entry.pages {
                    prop_assert_eq!(entry.lazy, lazy.contains(&page));
                    found.push(page);
                }
            }
            prop_assert_eq!(found, held.into_iter().collect::<Vec<_>>());
            let (id, read) = decode(&encode(7, &entries)).unwrap();
            prop_assert_eq!((id, read), (7, entries));
        }
    }

    #[test]
    fn a_long_run_is_split() {
        let held = [Extent { start: PAGE_SIZE, pages: ENTRY_PAGES_MAX * 2 + 5 }];
        let pages: Vec<u64> = entries(&held, &held).iter().map(|entry| entry.pages).collect();
        assert_eq!(pages, [ENTRY_PAGES_MAX, ENTRY_PAGES_MAX, 5]);
    }

    #[test]
    fn a_cut_page_map_is_refused() {
        let image = encode(1, &[PagemapEntry { start: 4096, pages: 3, lazy: true }]);
        for len in 0..image.len() {
            // The only shorter one that is whole is the one without entries.
            assert_eq!(decode(&image[..len]).is_ok(), len == encode(1, &[]).len(), "{len}");
        }
    }
}
