//! The system calls that `nix` does not cover: `statx` with mount points, file handles, extended attributes of any
//! kind of file, clones.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::{XATTR_LEN_MAX, state::FileId};

/// Everything that tells whether a file is another one, or was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) dev: u64,
    pub(super) ino: u64,
    pub(super) mode: u32,
    pub(super) nlink: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) rdev: u64,
    pub(super) mtime: (i64, u32),
    pub(super) ctime: (i64, u32),
    /// Something is mounted here; never of a directory that was opened already: what it shows is what is meant.
    pub(super) mount_root: bool,
}

impl Stat {
    pub(super) fn format(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    pub(super) fn id(&self) -> FileId {
        (self.dev, self.ino)
    }

    /// As far as its number tells: file systems give it to another one when the file is gone.
    pub(super) fn is_same_file(&self, other: &Self) -> bool {
        (self.id(), self.format()) == (other.id(), other.format())
    }
}

/// The status of `name` in `dir` (of `dir` itself if it is empty); never of what a symbolic link points to.
pub(super) fn stat_at(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Stat> {
    let mut buf = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT | libc::AT_EMPTY_PATH;
    // SAFETY: `name` is a C string, `buf` has the size the call expects and was zeroed, so that it is
    // initialised whatever the call fills in.
    let stx = unsafe {
        if libc::statx(dir.as_raw_fd(), name.as_ptr(), flags, libc::STATX_BASIC_STATS, buf.as_mut_ptr()) < 0 {
            return Err(io::Error::last_os_error());
        }
        buf.assume_init()
    };
    Ok(Stat {
        dev: libc::makedev(stx.stx_dev_major, stx.stx_dev_minor),
        ino: stx.stx_ino,
        mode: u32::from(stx.stx_mode),
        nlink: stx.stx_nlink,
        uid: stx.stx_uid,
        gid: stx.stx_gid,
        size: stx.stx_size,
        rdev: libc::makedev(stx.stx_rdev_major, stx.stx_rdev_minor),
        mtime: (stx.stx_mtime.tv_sec, stx.stx_mtime.tv_nsec),
        ctime: (stx.stx_ctime.tv_sec, stx.stx_ctime.tv_nsec),
        mount_root: !name.is_empty() && stx.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0,
    })
}

/// Which mount a descriptor was opened through, as `mountinfo` numbers it.
pub(super) fn mount_id(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut buf = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string; `buf` as in `stat_at`.
    let stx = unsafe {
        let mask = libc::STATX_MNT_ID;
        if libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, buf.as_mut_ptr()) < 0 {
            return Err(io::Error::last_os_error());
        }
        buf.assume_init()
    };
    let known = stx.stx_mask & libc::STATX_MNT_ID != 0;
    if known { Ok(stx.stx_mnt_id) } else { Err(io::Error::from_raw_os_error(libc::ENOSYS)) }
}

/// Longest file handle that is kept: those of the file systems that report events have 8 to 20 bytes.
const HANDLE_LEN_MAX: usize = 24;

/// What a file system calls one of its files, whatever names that has; never another one's later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Handle {
    kind: u8,
    len: u8,
    bytes: [u8; HANDLE_LEN_MAX],
}

impl Handle {
    /// `None`: of a kind that is not kept.
    pub(super) fn new(kind: i32, handle: &[u8]) -> Option<Self> {
        let mut bytes = [0; HANDLE_LEN_MAX];
        bytes.get_mut(..handle.len())?.copy_from_slice(handle);
        Some(Self { kind: u8::try_from(kind).ok()?, len: handle.len() as u8, bytes })
    }
}

#[repr(C)]
struct HandleBuf {
    head: libc::file_handle,
    bytes: [u8; HANDLE_LEN_MAX],
}

/// The handle of what a descriptor stands for; `EOVERFLOW` if it is of a kind that is not kept.
pub(super) fn handle_of(fd: BorrowedFd<'_>) -> io::Result<Handle> {
    // SAFETY: zeros are a valid value of its integers.
    let mut buf: HandleBuf = unsafe { MaybeUninit::zeroed().assume_init() };
    buf.head.handle_bytes = HANDLE_LEN_MAX as u32;
    let mut mount = 0;
    // SAFETY: the path is an empty C string, and the kernel writes no more handle bytes than `handle_bytes` says there
    // is room for behind the head.
    let rc = unsafe {
        let head = (&raw mut buf).cast::<libc::file_handle>();
        libc::name_to_handle_at(fd.as_raw_fd(), c"".as_ptr(), head, &raw mut mount, libc::AT_EMPTY_PATH)
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    let handle = buf.bytes.get(..buf.head.handle_bytes as usize);
    let handle = handle.and_then(|bytes| Handle::new(buf.head.handle_type, bytes));
    handle.ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// An `O_PATH` descriptor reaches the attributes of links and devices only by its name in /proc.
fn proc_path(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
}

/// The names of a file's extended attributes; none where the file system has none.
pub(super) fn list_xattrs(fd: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let path = proc_path(fd);
    let mut buf = vec![0_u8; XATTR_LEN_MAX];
    // SAFETY: `path` is a C string and the kernel writes at most `buf.len()` bytes into `buf`.
    let len = unsafe { libc::listxattr(path.as_ptr(), buf.as_mut_ptr().cast(), buf.len()) };
    if len < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::EOPNOTSUPP) { Ok(Vec::new()) } else { Err(error) };
    }
    buf.truncate(len as usize);
    let names = buf.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    Ok(names.filter_map(|name| CString::new(name).ok()).collect())
}

/// One attribute's value; `None` if it is gone.
pub(super) fn get_xattr(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let path = proc_path(fd);
    let mut buf = vec![0_u8; XATTR_LEN_MAX];
    // SAFETY: both names are C strings and the kernel writes at most `buf.len()` bytes into `buf`.
    let len = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), buf.as_mut_ptr().cast(), buf.len()) };
    if len < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ENODATA) { Ok(None) } else { Err(error) };
    }
    buf.truncate(len as usize);
    Ok(Some(buf))
}

/// Sets an attribute.
pub(super) fn set_xattr(fd: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    let path = proc_path(fd);
    // SAFETY: both names are C strings; `value` is read for its length only.
    let rc = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Removes an attribute.
pub(super) fn remove_xattr(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let path = proc_path(fd);
    // SAFETY: both are C strings.
    let rc = unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the permission bits of what an `O_PATH` descriptor stands for (not a symbolic link).
pub(super) fn chmod(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    let path = proc_path(fd);
    // SAFETY: `path` is a C string.
    let rc = unsafe { libc::chmod(path.as_ptr(), mode) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the mtime, seconds and nanoseconds, of what an `O_PATH` descriptor stands for, a symbolic link
/// included.
pub(super) fn set_mtime(fd: BorrowedFd<'_>, mtime: (i64, u32)) -> io::Result<()> {
    let atime = libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT };
    let times = [atime, libc::timespec { tv_sec: mtime.0, tv_nsec: i64::from(mtime.1) }];
    // SAFETY: the path is an empty C string and `times` holds the two values that the call reads.
    let rc = unsafe { libc::utimensat(fd.as_raw_fd(), c"".as_ptr(), times.as_ptr(), libc::AT_EMPTY_PATH) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes an empty file share the blocks of another one on the same file system, whose dirty pages, those of shared
/// mappings too, are written first.
pub(super) fn clone(to: &File, from: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the call takes two descriptors.
    let rc = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
struct FsXattr {
    xflags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801c_581f as libc::Ioctl;
const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401c_5820 as libc::Ioctl;
/// Of linux/fs.h: btrfs writes the file's blocks in place; it clones to such a file from no other, and conversely.
const FS_NOCOW_FL: libc::c_int = 0x0080_0000;

/// Prepares a new file for being a clone of another: it takes over what must be the same, and is charged to no project
/// (a quota that XFS lets the files of a directory inherit), which is the workload's.
pub(super) fn set_clonable(to: &File, from: &File) -> io::Result<()> {
    // SAFETY: zeros are a valid value of its integers.
    let mut attributes: FsXattr = unsafe { MaybeUninit::zeroed().assume_init() };
    let (mut own, mut other): (libc::c_int, libc::c_int) = (0, 0);
    // SAFETY: the calls read or write a value of the type that they expect.
    unsafe {
        if libc::ioctl(to.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) == 0 && attributes.project != 0
        {
            attributes.project = 0;
            if libc::ioctl(to.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const attributes) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        let known = libc::ioctl(to.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut own) == 0
            && libc::ioctl(from.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut other) == 0;
        if known && (own ^ other) & FS_NOCOW_FL != 0 {
            own ^= FS_NOCOW_FL;
            if libc::ioctl(to.as_raw_fd(), libc::FS_IOC_SETFLAGS, &raw const own) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// `struct fiemap` of linux/fiemap.h, without room for extents: they are counted.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b_u32 as libc::Ioctl;

/// In how many pieces a file lies on its device.
pub(super) fn extents_of(file: &File) -> io::Result<u32> {
    let mut map =
        Fiemap { start: 0, length: u64::MAX, flags: 0, mapped_extents: 0, extent_count: 0, reserved: 0 };
    // SAFETY: the kernel writes the head alone, as there is room for no extents.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(map.mapped_extents) }
}

/// Writes the dirty pages of a file to its device, and waits for that; says nothing of its metadata.
pub(super) fn write_back(file: &File) -> io::Result<()> {
    let flags =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call takes no pointer.
    let rc = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
