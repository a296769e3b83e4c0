//! The receiving side of CRIU's page-server protocol (page-xfer.c).
//!
//! ```text
//!   CRIU ── OPEN2(space) ─► us ── 1 byte: has it a parent? ─► CRIU      for each task, shared object
//!   CRIU ── ADD_F(PARENT, extent) ─► us                                 a hole: the image needs this
//!   CRIU ── ADD_F(PRESENT, extent), then the pages ─► us
//!   CRIU ── FORCE_CLOSE ─► us ── i32: 0 or not ─► CRIU                  the tree is still frozen
//! ```
//!
//! A record is 24 bytes up to CRIU 4.1 (the number of pages a u32) and 32 from 4.2 on (a u64 behind
//! padding); with the wrong size both sides wait for ever, so the version decides.
//!
//! If the handler fails, the socket is closed: CRIU's next write fails, it ends the dump and lets
//! the tree run on. If the handler's `close` fails, CRIU is told so, to the same effect.

use std::{
    io::{self, BufReader, Read, Write},
    os::unix::net::UnixStream,
};

use super::Version;
use crate::model::{Extent, PAGE_SIZE, Space};

/// Most bytes handed to [`Handler::pages`] at once.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;

/// Records are read in blocks of this size; page content that is larger goes past the buffer.
const BUFFER_BYTES: usize = 256 << 10;
/// Top of the address space of a task (4 levels of page tables use 47 bits, 5 levels 56).
const ADDRESS_MAX: u64 = 1 << 56;
/// Most spaces of one dump: pids are below 2^22, and shared objects are far fewer.
const OPENS_MAX: u64 = 1 << 22;

/// What is done with what CRIU sends. The tree is frozen at every call.
pub trait Handler {
    /// Pages of `space` are next. Answers whether CRIU may send holes for pages it believes
    /// unchanged: false has all of it sent, which is right for shared memory.
    fn opened(&mut self, space: Space) -> io::Result<bool>;

    /// The image must hold these pages, and CRIU does not send them.
    fn hole(&mut self, space: Space, extent: Extent) -> io::Result<()>;

    /// Pages with their content, at most [`CHUNK_BYTES_MAX`] of it; a larger extent comes in
    /// pieces. `lazy` says whether they may be restored lazily.
    fn pages(&mut self, space: Space, extent: Extent, lazy: bool, bytes: &[u8]) -> io::Result<()>;

    /// That was all: the last moment in which the tree is surely frozen. An error fails the dump.
    fn close(&mut self) -> io::Result<()>;
}

/// What came through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Spaces opened.
    pub spaces: u64,
    /// Pages that came as holes.
    pub hole_pages: u64,
    /// Pages that came with content.
    pub content_pages: u64,
}

/// Why the pages of a dump did not come through.
#[derive(Debug, thiserror::Error)]
pub enum PageServerError {
    /// CRIU closed the socket before the end; its own error says why.
    #[error("CRIU closed the page server's socket before the end of the dump")]
    Ended,
    /// The socket failed.
    #[error("reading from CRIU's page socket failed: {0}")]
    Io(#[source] io::Error),
    /// Something that CRIU of this version does not send.
    #[error(
        "CRIU {version} sent {what}: Standin does not know this version's page protocol, use CRIU 4.0 to 4.2"
    )]
    Protocol {
        /// Its version.
        version: Version,
        /// What came.
        what: String,
    },
    /// The handler failed.
    #[error("taking in the pages of {space:?} failed: {source}")]
    Handler {
        /// Of which space; none at the close.
        space: Option<Space>,
        /// Why.
        source: io::Error,
    },
}

mod command {
    pub(super) const OPEN2: u16 = 4;
    pub(super) const PARENT: u16 = 5;
    pub(super) const ADD_F: u16 = 6;
    pub(super) const CLOSE: u16 = 0x1023;
    pub(super) const FORCE_CLOSE: u16 = 0x1024;
}

mod flag {
    pub(super) const PARENT: u16 = 1;
    pub(super) const LAZY: u16 = 2;
    pub(super) const PRESENT: u16 = 4;
}

/// `page_server_iov`, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    command: u16,
    flags: u16,
    pages: u64,
    start: u64,
    target: u64,
}

const RECORD_BYTES_MAX: usize = 32;

fn record_bytes(version: Version) -> usize {
    if version < Version(4, 2, 0) { 24 } else { RECORD_BYTES_MAX }
}

impl Record {
    /// Reads 24 or 32 bytes in the byte order of x86-64.
    fn decode(bytes: &[u8]) -> Self {
        let half = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 4)) << 32;
        let head = half(0);
        let (pages, rest) =
            if bytes.len() == RECORD_BYTES_MAX { (word(8), 16) } else { (u64::from(half(4)), 8) };
        Self {
            command: head as u16,
            flags: (head >> 16) as u16,
            pages,
            start: word(rest),
            target: word(rest + 8),
        }
    }

    /// `encode_pm`: the low byte is the type.
    fn space(&self) -> Option<Space> {
        let id = self.target >> 8;
        match self.target & 0xff {
            1 => u32::try_from(id).ok().map(Space::Task),
            2 => Some(Space::Shared(id)),
            _ => None,
        }
    }

    /// The run of pages, if it is one that can exist.
    fn extent(&self) -> Option<Extent> {
        let end = self.pages.checked_mul(PAGE_SIZE)?.checked_add(self.start)?;
        let fits = self.pages > 0 && self.start.is_multiple_of(PAGE_SIZE) && end <= ADDRESS_MAX;
        fits.then_some(Extent { start: self.start, pages: self.pages })
    }
}

/// Serves one dump by a CRIU of `version` until it closes; blocks. CRIU's own timeouts bound it:
/// whatever ends the dump, closes the socket.
pub fn serve(
    socket: &UnixStream,
    version: Version,
    handler: &mut dyn Handler,
) -> Result<Summary, PageServerError> {
    let mut session = Session {
        reader: BufReader::with_capacity(BUFFER_BYTES, socket),
        writer: socket,
        version,
        handler,
        buffer: Vec::new(),
        current: None,
        summary: Summary::default(),
    };
    let result = session.run();
    if result.is_err() {
        // Shut down, since others may hold the descriptor too. It may be closed by CRIU already.
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }
    result.map(|()| session.summary)
}

struct Session<'a> {
    reader: BufReader<&'a UnixStream>,
    writer: &'a UnixStream,
    version: Version,
    handler: &'a mut dyn Handler,
    buffer: Vec<u8>,
    current: Option<Space>,
    summary: Summary,
}

impl Session<'_> {
    fn run(&mut self) -> Result<(), PageServerError> {
        let length = record_bytes(self.version);
        let mut bytes = [0; RECORD_BYTES_MAX];
        loop {
            self.reader.read_exact(&mut bytes[..length]).map_err(ended)?;
            let record = Record::decode(&bytes[..length]);
            match record.command {
                command::OPEN2 => self.open(&record)?,
                command::ADD_F => self.add(&record)?,
                // Asked in place of OPEN2 by a pre-dump; the answer is a whole int.
                command::PARENT => {
                    let has_parent = self.ask_handler(&record)?;
                    self.answer(&i32::from(has_parent).to_le_bytes())?;
                }
                command::CLOSE | command::FORCE_CLOSE => return self.close(),
                _ => return Err(self.protocol(format!("{record:?}"))),
            }
        }
    }

    fn open(&mut self, record: &Record) -> Result<(), PageServerError> {
        let has_parent = self.ask_handler(record)?;
        self.answer(&[u8::from(has_parent)])
    }

    fn ask_handler(&mut self, record: &Record) -> Result<bool, PageServerError> {
        let space = record.space().ok_or_else(|| self.protocol(format!("{record:?}")))?;
        self.summary.spaces += 1;
        if self.summary.spaces > OPENS_MAX {
            return Err(self.protocol(format!("more than {OPENS_MAX} address spaces")));
        }
        self.current = Some(space);
        self.handler.opened(space).map_err(|source| PageServerError::Handler { space: Some(space), source })
    }

    fn add(&mut self, record: &Record) -> Result<(), PageServerError> {
        let known = record.space().filter(|space| self.current == Some(*space));
        let (Some(space), Some(extent)) = (known, record.extent()) else {
            return Err(self.protocol(format!("{record:?}")));
        };
        let failed = |source| PageServerError::Handler { space: Some(space), source };
        match record.flags {
            flag::PARENT => {
                self.summary.hole_pages += extent.pages;
                self.handler.hole(space, extent).map_err(failed)
            }
            flags if flags & flag::PRESENT != 0 && flags & !(flag::PRESENT | flag::LAZY) == 0 => {
                self.summary.content_pages += extent.pages;
                self.content(space, extent, flags & flag::LAZY != 0)
            }
            _ => Err(self.protocol(format!("{record:?}"))),
        }
    }

    fn content(&mut self, space: Space, extent: Extent, lazy: bool) -> Result<(), PageServerError> {
        let mut start = extent.start;
        while start < extent.end() {
            let length = (extent.end() - start).min(CHUNK_BYTES_MAX as u64);
            self.buffer.resize(length as usize, 0);
            self.reader.read_exact(&mut self.buffer).map_err(ended)?;
            let piece = Extent { start, pages: length / PAGE_SIZE };
            self.handler
                .pages(space, piece, lazy, &self.buffer)
                .map_err(|source| PageServerError::Handler { space: Some(space), source })?;
            start += length;
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), PageServerError> {
        let result = self.handler.close();
        let status: i32 = if result.is_ok() { 0 } else { -1 };
        self.answer(&status.to_le_bytes())?;
        result.map_err(|source| PageServerError::Handler { space: None, source })
    }

    fn answer(&mut self, bytes: &[u8]) -> Result<(), PageServerError> {
        self.writer.write_all(bytes).map_err(ended)
    }

    fn protocol(&self, what: String) -> PageServerError {
        PageServerError::Protocol { version: self.version, what }
    }
}

fn ended(error: io::Error) -> PageServerError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            PageServerError::Ended
        }
        _ => PageServerError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: Version = Version(4, 2, 1);
    const OLD: Version = Version(4, 1, 1);

    #[derive(Default)]
    struct Recorder {
        said: Vec<String>,
        bytes: usize,
        close_fails: bool,
    }

    impl Handler for Recorder {
        fn opened(&mut self, space: Space) -> io::Result<bool> {
            self.said.push(format!("open {space:?}"));
            Ok(matches!(space, Space::Task(_)))
        }
        fn hole(&mut self, _: Space, extent: Extent) -> io::Result<()> {
            self.said.push(format!("hole {:#x}+{}", extent.start, extent.pages));
            Ok(())
        }
        fn pages(&mut self, _: Space, extent: Extent, lazy: bool, bytes: &[u8]) -> io::Result<()> {
            assert!(bytes.len() <= CHUNK_BYTES_MAX && bytes.len() as u64 == extent.bytes());
            self.said.push(format!("pages {:#x}+{} {lazy}", extent.start, extent.pages));
            self.bytes += bytes.len();
            Ok(())
        }
        fn close(&mut self) -> io::Result<()> {
            if self.close_fails { Err(io::Error::other("no")) } else { Ok(()) }
        }
    }

    fn record(version: Version, command: u16, flags: u16, pages: u64, start: u64, target: u64) -> Vec<u8> {
        let head = u32::from(command) | u32::from(flags) << 16;
        let mut bytes = head.to_le_bytes().to_vec();
        if version < Version(4, 2, 0) {
            bytes.extend((pages as u32).to_le_bytes());
        } else {
            bytes.extend([0xee; 4]);
            bytes.extend(pages.to_le_bytes());
        }
        bytes.extend(start.to_le_bytes());
        bytes.extend(target.to_le_bytes());
        bytes
    }

    fn play(version: Version, input: &[u8], handler: &mut Recorder) -> (Result<Summary, String>, Vec<u8>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || {
            // The server may stop reading early, as it should on nonsense.
            let _ = theirs.write_all(&input);
            theirs.shutdown(std::net::Shutdown::Write).ok();
            let mut answers = Vec::new();
            theirs.read_to_end(&mut answers).ok();
            answers
        });
        let result = serve(&ours, version, handler).map_err(|error| error.to_string());
        drop(ours);
        (result, writer.join().unwrap())
    }

    #[test]
    fn both_record_sizes_are_understood() {
        for version in [OLD, NEW] {
            let mut input = record(version, command::OPEN2, 0, 0, 0, 7 << 8 | 1);
            input.extend(record(version, command::ADD_F, 1, 3, 0x1000, 7 << 8 | 1));
            input.extend(record(version, command::ADD_F, 6, 300, 0x10_0000, 7 << 8 | 1));
            input.extend(vec![5; 300 * 4096]);
            input.extend(record(version, command::OPEN2, 0, 0, 0, 9 << 8 | 2));
            input.extend(record(version, command::FORCE_CLOSE, 0, 0, 0, 0));
            let mut recorder = Recorder::default();
            let (result, answers) = play(version, &input, &mut recorder);
            assert_eq!(result.unwrap(), Summary { spaces: 2, hole_pages: 3, content_pages: 300 });
            assert_eq!(answers, [1, 0, 0, 0, 0, 0]);
            assert_eq!(recorder.bytes, 300 * 4096);
            let chunks = ["pages 0x100000+256 true", "pages 0x200000+44 true"];
            assert_eq!(recorder.said[1..4], ["hole 0x1000+3", chunks[0], chunks[1]]);
        }
    }

    #[test]
    fn nonsense_is_refused_before_it_is_used() {
        let open = record(NEW, command::OPEN2, 0, 0, 0, 7 << 8 | 1);
        let task = 7 << 8 | 1;
        for bad in [
            record(NEW, command::ADD_F, 4, u64::MAX, 0, task),
            record(NEW, command::ADD_F, 4, 1 << 50, 0x1000, task),
            record(NEW, command::ADD_F, 4, 0, 0x1000, task),
            record(NEW, command::ADD_F, 4, 1, 0x1001, task),
            record(NEW, command::ADD_F, 2, 1, 0x1000, task),
            record(NEW, command::ADD_F, 4, 1, 0x1000, 8 << 8 | 1),
            record(NEW, 77, 0, 0, 0, task),
            record(NEW, command::OPEN2, 0, 0, 0, 7 << 8 | 9),
        ] {
            let (result, _) = play(NEW, &[open.clone(), bad].concat(), &mut Recorder::default());
            assert!(result.unwrap_err().contains("4.2.1 sent"));
        }
    }

    #[test]
    fn a_failed_close_and_an_early_end_are_errors() {
        let mut recorder = Recorder { close_fails: true, ..Recorder::default() };
        let (result, answers) = play(NEW, &record(NEW, command::FORCE_CLOSE, 0, 0, 0, 0), &mut recorder);
        assert!(result.is_err());
        assert_eq!(answers, (-1i32).to_le_bytes());
        let (result, _) = play(NEW, &[0; 31], &mut Recorder::default());
        assert!(result.unwrap_err().contains("before the end"));
    }
}
