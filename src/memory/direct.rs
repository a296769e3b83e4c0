//! Reads that go past the page tables.

use std::fs;

/// Whether a process may have a device write to its memory: it has a file open with O_DIRECT.
///
/// Such a read takes hold of its pages when it begins, and the data comes later, when the pages may be write-protected
/// again, without a fault. A pass over the running process that falls in between reports the page; what is read of it
/// right after may be old, and no later pass reports it. True too if it cannot be told.
pub fn reads_directly(pid: i32) -> bool {
    let Ok(infos) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return true };
    infos.flatten().any(|info| {
        // One that was closed meanwhile is of no read that has begun before.
        fs::read_to_string(info.path()).is_ok_and(|text| is_direct(&text))
    })
}

fn is_direct(fdinfo: &str) -> bool {
    let flags = fdinfo.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_none_or(|flags| flags & libc::O_DIRECT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_is_found_in_octal() {
        assert!(is_direct("pos:\t0\nflags:\t02140000\nmnt_id:\t30\n"));
        assert!(!is_direct("pos:\t0\nflags:\t02100002\nmnt_id:\t30\n"));
        assert!(is_direct("no form that is known\n"));
    }
}
