//! Batches of pages as they come from the network, staged as whole pages: patches are resolved here, against what the
//! store holds with what was staged of this epoch laid over it. So an epoch's log never depends on its base, and folding
//! it twice does no harm.

use std::{ops::Range, sync::Arc};

use super::{
    Image, Inner, disk,
    extents::{self, Source},
    layer::Layer,
    staging::{Pages, StageError, Staging, extents_of},
    view,
};
use crate::{
    delta::{BatchHead, Content},
    model::{EpochId, Extent, PAGE_SIZE, Space},
    wire::message::Manifest,
};

/// What an epoch builds upon, as it is now. Taken for a batch at a time, so that layers that are folded meanwhile are not
/// kept. No view: when a later epoch is folded into the image, this staging is overtaken and never committed.
struct Base {
    manifest: Arc<Manifest>,
    image: Arc<Image>,
    /// Newest first.
    layers: Vec<Arc<Layer>>,
}

impl Inner {
    /// The base of an epoch, if it is what is held.
    fn base(&self, base: Option<EpochId>) -> Option<Base> {
        let state = self.state();
        let held = state.held().filter(|held| Some(held.id) == base)?;
        let layers = state.layers.iter().rev().map(|(layer, _)| Arc::clone(layer)).collect();
        Some(Base { manifest: held.manifest, image: Arc::clone(state.image.as_ref()?), layers })
    }
}

impl Base {
    /// Reads whole pages, which all must be held; none if the range is empty.
    fn read(&self, space: Space, range: Range<u64>, buf: &mut [u8]) -> Result<(), StageError> {
        let extent = Extent { start: range.start, pages: (range.end - range.start) / PAGE_SIZE };
        if extent.pages == 0 {
            return Ok(());
        }
        if !extents::covers(extents_of(&self.manifest, space), extent) {
            return Err(StageError::NotHeld { space, extent });
        }
        Ok(view::read(&self.image, &self.layers, space, extent, buf)?)
    }
}

impl Staging {
    /// Stages a batch. Its pages override what was staged of them before.
    pub fn batch(&mut self, head: &BatchHead, body: &[u8]) -> Result<(), StageError> {
        let mut decoder = std::mem::take(&mut self.decoder);
        let mut base = None;
        let decoded = decoder.decode(head, body, |start, buf| {
            let base = match &base {
                Some(base) => base,
                None => base.insert(self.inner.base(self.base).ok_or(StageError::NoBase)?),
            };
            self.read(base, head.space, start, buf)
        });
        let staged = decoded.and_then(|decoded| {
            decoded.runs().try_for_each(|(start, content)| match content {
                Content::Bytes(bytes) => self.pages(head.space, start, bytes),
                Content::Zero { pages } => self.zero(head.space, start, pages),
            })
        });
        self.decoder = decoder;
        staged
    }

    /// Reads whole pages as they are when what was staged so far is laid over the base.
    fn read(&self, base: &Base, space: Space, start: u64, buf: &mut [u8]) -> Result<(), StageError> {
        let extent = Extent { start, pages: buf.len() as u64 / PAGE_SIZE };
        let at = |addr: u64| (addr - start) as usize;
        let mut from = start;
        let staged = self.staged.get(&space).map(|staged| staged.overlapping(extent));
        for run in staged.into_iter().flatten() {
            base.read(space, from..run.extent.start, &mut buf[at(from)..at(run.extent.start)])?;
            self.read_staged(run.source, &mut buf[at(run.extent.start)..at(run.extent.end())])?;
            from = run.extent.end();
        }
        base.read(space, from..extent.end(), &mut buf[at(from)..])
    }

    fn read_staged(&self, source: Source, buf: &mut [u8]) -> Result<(), StageError> {
        match (source, &self.pages) {
            (Source::Zero, _) => buf.fill(0),
            (Source::At(page), Pages::Log { file, path, buffer, sums }) => {
                let written = sums.len() as u64 * PAGE_SIZE - buffer.len() as u64;
                let from = page * PAGE_SIZE;
                let (in_file, in_buffer) =
                    buf.split_at_mut(written.saturating_sub(from).min(buf.len() as u64) as usize);
                disk::read_at(file, path, in_file, from)?;
                let from = from.saturating_sub(written) as usize;
                in_buffer.copy_from_slice(&buffer[from..from + in_buffer.len()]);
            }
            (Source::At(_), Pages::Flat(_)) => unreachable!("an epoch that is staged flat has no base"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
