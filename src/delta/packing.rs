//! The bodies of batches, packed and unpacked.

use std::time::Duration;

use lz4_flex::block;
use nix::time::ClockId;
use zstd::bulk;

use super::{
    DecodeError, Packing,
    choose::{Chooser, TRIAL_BYTES},
};

/// zstd's fastest ordinary level. The negative ones save less than LZ4 in more time, and 3 saves hardly more than 1 in
/// twice the time (measured on pages of redis, PostgreSQL and Python).
const ZSTD_LEVEL: i32 = 1;
/// Nothing is tried on fewer bytes, and nothing learned of them: what a call costs by itself is most of their time.
const LEARN_BYTES_MIN: usize = 4096;

/// Packs bodies of one kind, and learns what that is worth.
#[derive(Default)]
pub(super) struct Packer {
    chooser: Chooser,
    zstd: Option<bulk::Compressor<'static>>,
    /// Kept, so that it is faulted in once.
    scratch: Vec<u8>,
}

impl Packer {
    /// Nanoseconds that packing and shipping a byte take.
    pub(super) fn ns_per_byte(&self, rate: u64) -> f64 {
        self.chooser.ns_per_byte(rate)
    }

    /// Packs a body in the way that is best for a link of this rate; never into more bytes than it has.
    pub(super) fn pack(&mut self, bytes: &[u8], rate: u64) -> (Packing, Vec<u8>) {
        if bytes.is_empty() {
            return (Packing::Raw, Vec::new());
        }
        let learns = bytes.len() >= LEARN_BYTES_MIN;
        if let Some(packing) = self.chooser.trial(rate).filter(|_| learns) {
            let sample = &bytes[..bytes.len().min(TRIAL_BYTES)];
            let (packed, took) = self.timed(packing, sample);
            let len = packed.map_or(sample.len(), <[u8]>::len);
            self.chooser.tried(packing, sample.len(), len, took);
        }
        let packing = self.chooser.choose(bytes.len(), rate);
        let (packed, took) = self.timed(packing, bytes);
        let len = packed.map_or(bytes.len(), <[u8]>::len);
        let result =
            packed.map_or_else(|| (Packing::Raw, bytes.to_vec()), |packed| (packing, packed.to_vec()));
        if learns {
            self.chooser.learn(packing, bytes.len(), len, took);
        }
        result
    }

    fn timed(&mut self, packing: Packing, bytes: &[u8]) -> (Option<&[u8]>, Duration) {
        let began = thread_time();
        let packed = self.packed(packing, bytes);
        (packed, thread_time().saturating_sub(began))
    }

    /// None if it would not get shorter.
    fn packed(&mut self, packing: Packing, bytes: &[u8]) -> Option<&[u8]> {
        let room =
            block::get_maximum_output_size(bytes.len()).max(zstd::zstd_safe::compress_bound(bytes.len()));
        if self.scratch.len() < room {
            self.scratch.resize(room, 0);
        }
        let len = match packing {
            Packing::Raw => return None,
            Packing::Lz4 => block::compress_into(bytes, &mut self.scratch).ok()?,
            Packing::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(bulk::Compressor::new(ZSTD_LEVEL).ok()?),
                };
                zstd.compress_to_buffer(bytes, &mut self.scratch[..]).ok()?
            }
        };
        (len < bytes.len()).then(|| &self.scratch[..len])
    }
}

/// CPU time of this thread: what the machine does beside it costs a body nothing.
fn thread_time() -> Duration {
    ClockId::CLOCK_THREAD_CPUTIME_ID.now().map_or(Duration::ZERO, Duration::from)
}

/// Unpacks bodies.
#[derive(Default)]
pub(super) struct Unpacker {
    zstd: Option<bulk::Decompressor<'static>>,
}

impl Unpacker {
    /// Unpacks into exactly the bytes that are wanted.
    pub(super) fn unpack(
        &mut self,
        packing: Packing,
        body: &[u8],
        into: &mut [u8],
    ) -> Result<(), DecodeError> {
        let wanted = into.len();
        let unpacked = match packing {
            // No honest packing is longer than what it is of.
            _ if body.len() > wanted => return Err(DecodeError::Length { got: body.len(), wanted }),
            Packing::Raw if body.len() == wanted => {
                into.copy_from_slice(body);
                Some(wanted)
            }
            Packing::Raw => return Err(DecodeError::Length { got: body.len(), wanted }),
            Packing::Lz4 => block::decompress_into(body, into).ok(),
            Packing::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = bulk::Decompressor::new().ok();
                }
                self.zstd.as_mut().and_then(|zstd| zstd.decompress_to_buffer(body, into).ok())
            }
        };
        match unpacked {
            Some(got) if got == wanted => Ok(()),
            Some(got) => Err(DecodeError::Length { got, wanted }),
            None => Err(DecodeError::Packing { packing, bytes: body.len() }),
        }
    }
}
