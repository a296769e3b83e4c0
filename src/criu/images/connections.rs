//! The TCP connections of an image.
//!
//! What a connection has sent and was not acknowledged CRIU restores as sent. The kernel sends it again when its timer ends, which
//! without a measured round trip is a second later. So little of it is restored as not yet sent: then it leaves with the first
//! acknowledgement that comes.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use prost::Message;

use super::{COMMON_MAGIC, Entries, ImageError, damaged, read};

const FILES_MAGIC: u32 = 0x5630_3138;
const TCP_STREAM_MAGIC: u32 = 0x5146_5506;

/// As much leaves at once: ten segments of the least length. Of more a part would be left, and the kernel refuses
/// acknowledgements of what it does not think sent.
const UNSENT_BYTES_MAX: u32 = 5_000;

/// `TCP_ESTABLISHED` and `TCP_CLOSE_WAIT`: no end of its own was sent.
const OPEN_STATES: [u32; 2] = [1, 8];
/// `TCPI_OPT_WSCALE`.
const SCALED: u32 = 4;

#[derive(Clone, PartialEq, Message)]
struct FileEntry {
    #[prost(message, optional, tag = "4")]
    inet: Option<InetSocket>,
}

#[derive(Clone, PartialEq, Message)]
struct InetSocket {
    #[prost(uint32, required, tag = "2")]
    ino: u32,
    #[prost(uint32, required, tag = "3")]
    family: u32,
    #[prost(uint32, required, tag = "5")]
    protocol: u32,
    #[prost(uint32, required, tag = "6")]
    state: u32,
    #[prost(uint32, required, tag = "7")]
    local_port: u32,
    #[prost(uint32, required, tag = "8")]
    remote_port: u32,
    #[prost(uint32, repeated, packed = "false", tag = "11")]
    local: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "12")]
    remote: Vec<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct Stream {
    #[prost(uint32, required, tag = "2")]
    received: u32,
    #[prost(uint32, required, tag = "3")]
    sending_bytes: u32,
    #[prost(uint32, required, tag = "4")]
    sending: u32,
    #[prost(uint32, required, tag = "5")]
    options: u32,
    #[prost(uint32, required, tag = "6")]
    window_scale: u32,
    #[prost(uint32, optional, tag = "12")]
    unsent_bytes: Option<u32>,
    #[prost(uint32, optional, tag = "14")]
    window: Option<u32>,
}

/// A connection, as it stood in the freeze.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpConnection {
    /// The workload's end.
    pub local: SocketAddr,
    /// The other.
    pub remote: SocketAddr,
    /// The next byte that the workload awaits.
    pub receive_next: u32,
    /// The first byte of its own that was not acknowledged.
    pub unacknowledged: u32,
    /// The byte behind the last one that it had given to the kernel.
    pub sent: u32,
    /// What the other end said of its window, as it is in a header.
    pub window: u16,
}

/// The open connections of an image; one that cannot be read is left out.
pub fn tcp_connections(directory: &Path) -> Result<Vec<TcpConnection>, ImageError> {
    let name = "files.img";
    let bytes = read(directory, name)?;
    let mut entries = Entries::open(name, &bytes, FILES_MAGIC)?;
    let mut found = Vec::new();
    while let Some(entry) = entries.next::<FileEntry>()? {
        let Some(socket) = entry.inet.filter(is_open_tcp) else { continue };
        let name = format!("tcp-stream-{:x}.img", socket.ino);
        let stream = read(directory, &name)
            .and_then(|bytes| Entries::open(&name, &bytes, TCP_STREAM_MAGIC)?.first::<Stream>());
        let (Ok(stream), Some(local), Some(remote)) =
            (stream, address(&socket.local, socket.local_port), address(&socket.remote, socket.remote_port))
        else {
            continue;
        };
        let scale = if stream.options & SCALED == 0 { 0 } else { stream.window_scale.min(14) };
        found.push(TcpConnection {
            local,
            remote,
            receive_next: stream.received,
            unacknowledged: stream.sending.wrapping_sub(stream.sending_bytes),
            sent: stream.sending,
            window: (stream.window.unwrap_or(0) >> scale).min(u32::from(u16::MAX)) as u16,
        });
    }
    Ok(found)
}

fn is_open_tcp(socket: &InetSocket) -> bool {
    socket.protocol == libc::IPPROTO_TCP as u32 && OPEN_STATES.contains(&socket.state)
}

/// Addresses are in network order, as words of this host. One that IPv6 maps is IPv4's.
fn address(words: &[u32], port: u32) -> Option<SocketAddr> {
    let octets: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let ip = match *octets {
        [a, b, c, d] => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
        _ => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?)).to_canonical(),
    };
    Some(SocketAddr::new(ip, port.try_into().ok()?))
}

/// Whether the file is that of a connection.
pub fn is_stream(name: &str) -> bool {
    name.starts_with("tcp-stream-")
}

/// The image of a connection, so that what was not acknowledged is restored as not sent. `None`: as it is.
pub fn unsent(name: &str, image: &[u8]) -> Result<Option<Vec<u8>>, ImageError> {
    const HEAD: usize = 8;
    let stream: Stream = Entries::open(name, image, TCP_STREAM_MAGIC)?.first()?;
    let unsent = stream.unsent_bytes.unwrap_or(0);
    if stream.sending_bytes <= unsent || stream.sending_bytes > UNSENT_BYTES_MAX {
        return Ok(None);
    }
    debug_assert_eq!(image[..4], COMMON_MAGIC.to_le_bytes());
    let cut = |at: usize| image.get(at..).ok_or_else(|| damaged(name, "it ends within an entry"));
    let length = cut(HEAD)?.first_chunk().map(|length| u32::from_le_bytes(*length));
    let length = length.ok_or_else(|| damaged(name, "it has no entry"))? as usize;
    // Of a field that is there twice the last one counts.
    let mut field = Vec::new();
    prost::encoding::uint32::encode(12, &stream.sending_bytes, &mut field);
    let (entry, data) = (cut(HEAD + 4)?, cut(HEAD + 4 + length)?);
    let mut out = image[..HEAD].to_vec();
    out.extend(((length + field.len()) as u32).to_le_bytes());
    out.extend_from_slice(&entry[..length]);
    out.extend(field);
    out.extend_from_slice(data);
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use super::{super::push_entry, *};

    fn stream(sending_bytes: u32, unsent_bytes: Option<u32>) -> Stream {
        Stream {
            received: 7_000,
            sending_bytes,
            sending: 3,
            options: SCALED,
            window_scale: 7,
            unsent_bytes,
            window: Some(64_000),
        }
    }

    fn image<M: Message>(magic: u32, entries: &[M], data: &[u8]) -> Vec<u8> {
        let mut bytes = [COMMON_MAGIC.to_le_bytes(), magic.to_le_bytes()].concat();
        for entry in entries {
            push_entry(&mut bytes, entry);
        }
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn what_was_sent_is_to_be_sent() {
        let bytes = image(TCP_STREAM_MAGIC, &[stream(5, None)], b"queue");
        let changed = unsent("tcp-stream-1.img", &bytes).unwrap().unwrap();
        let mut entries = Entries::open("tcp-stream-1.img", &changed, TCP_STREAM_MAGIC).unwrap();
        assert_eq!(entries.first::<Stream>().unwrap(), stream(5, Some(5)));
        assert_eq!(entries.rest, b"queue");
        for (sending, before) in [(0, None), (5, Some(5)), (UNSENT_BYTES_MAX + 1, None)] {
            let bytes = image(TCP_STREAM_MAGIC, &[stream(sending, before)], b"");
            assert_eq!(unsent("tcp-stream-1.img", &bytes).unwrap(), None);
        }
        assert!(unsent("tcp-stream-1.img", &bytes[..20]).is_err());
        assert!(unsent("tcp-stream-1.img", b"").is_err());
    }

    #[test]
    fn connections_are_found_with_their_places_in_the_stream() {
        let dir = tempfile::tempdir().unwrap();
        let socket = |state, family: libc::c_int, words: &[u32]| FileEntry {
            inet: Some(InetSocket {
                ino: 0x1f,
                family: family as u32,
                protocol: 6,
                state,
                local_port: 6379,
                remote_port: 40_000,
                local: words.to_vec(),
                remote: words.to_vec(),
            }),
        };
        let v4 = u32::from_ne_bytes([10, 0, 0, 5]);
        let mapped = [0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), v4];
        let files = image(
            FILES_MAGIC,
            &[
                socket(1, libc::AF_INET, &[v4]),
                socket(10, libc::AF_INET, &[v4]),
                FileEntry { inet: None },
                socket(8, libc::AF_INET6, &mapped),
            ],
            b"",
        );
        std::fs::write(dir.path().join("files.img"), files).unwrap();
        assert_eq!(tcp_connections(dir.path()).unwrap(), []);
        let bytes = image(TCP_STREAM_MAGIC, &[stream(5, None)], b"queue");
        std::fs::write(dir.path().join("tcp-stream-1f.img"), bytes).unwrap();
        let found = tcp_connections(dir.path()).unwrap();
        let wanted = TcpConnection {
            local: "10.0.0.5:6379".parse().unwrap(),
            remote: "10.0.0.5:40000".parse().unwrap(),
            receive_next: 7_000,
            unacknowledged: u32::MAX - 1,
            sent: 3,
            window: 500,
        };
        assert_eq!(found, [wanted.clone(), wanted]);
    }
}
