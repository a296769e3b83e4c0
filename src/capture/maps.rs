//! Copies of the tasks' lists of mappings, so that CRIU need not have the kernel make them in the freeze.
//!
//! Of `/proc/PID/smaps` CRIU uses the lines of the mappings and their flags (parse_smaps in proc_parse.c), but the kernel
//! walks every page to make it: 10–20 ms a GB. So it is read just before the freeze and the bridge gives CRIU the copy;
//! in the freeze it is read again, on another processor and while CRIU goes on, and compared.
//!
//! Invariant: an epoch whose copy differs from the truth of the freeze fails before CRIU is answered; it is frozen again
//! without copies, and for a while no copies are made of a tree that changes its mappings so often.

use std::{fs, io, path::Path};

/// Epochs without copies after the first difference; twice as many after each further one.
const PAUSE_MIN: u32 = 16;
/// The most.
const PAUSE_MAX: u32 = 4096;

/// The copies of one freeze.
#[derive(Debug)]
pub(super) struct Copies {
    /// Host pid and what was copied.
    taken: Vec<(i32, String)>,
}

impl Copies {
    /// Copies the lists of tasks (host pid, pid inside) to where the bridge looks for them.
    pub(super) fn take(tasks: impl Iterator<Item = (i32, u32)>, dir: &Path) -> io::Result<Self> {
        let mut taken = Vec::new();
        for (host, inside) in tasks {
            let text = match fs::read_to_string(format!("/proc/{host}/smaps")) {
                Ok(text) => essence(&text),
                // It has ended, or its names are no text: CRIU looks for itself.
                Err(_) => continue,
            };
            fs::write(dir.join(format!("smaps-{inside}")), &text)?;
            taken.push((host, text));
        }
        Ok(Self { taken })
    }

    /// Whether the copies are what the kernel says now, of a tree that is frozen.
    pub(super) fn are_true(&self) -> bool {
        self.taken.iter().all(|(host, copied)| {
            fs::read_to_string(format!("/proc/{host}/smaps")).is_ok_and(|text| essence(&text) == *copied)
        })
    }
}

/// The lines that CRIU uses.
fn essence(smaps: &str) -> String {
    let mut essence = String::with_capacity(smaps.len() / 8);
    for line in smaps.lines() {
        // A mapping begins with its address in lower-case hex, each of its properties with a capital.
        if line.starts_with("VmFlags:") || !line.starts_with(|c: char| c.is_ascii_uppercase()) {
            essence.push_str(line);
            essence.push('\n');
        }
    }
    essence
}

/// When copies are worth a try.
#[derive(Debug, Default)]
pub(super) struct Trust {
    pause: u32,
    left: u32,
}

impl Trust {
    /// Whether to use copies in the epoch that begins.
    pub(super) fn begin_epoch(&mut self) -> bool {
        let use_copies = self.left == 0;
        self.left = self.left.saturating_sub(1);
        use_copies
    }

    /// A freeze with copies failed.
    pub(super) fn disappointed(&mut self) {
        self.pause = (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        self.left = self.pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_and_their_flags_are_kept_and_nothing_else() {
        let smaps = "7f00-7f01 rw-p 00000000 00:00 0 [heap]\nSize:  4 kB\nRss:  4 kB\nVmFlags: rd wr mr\n\
                     ffffffffff600000-ffffffffff601000 --xp 0 00:00 0 [vsyscall]\nVmFlags: ex\n";
        let kept = "7f00-7f01 rw-p 00000000 00:00 0 [heap]\nVmFlags: rd wr mr\n\
                    ffffffffff600000-ffffffffff601000 --xp 0 00:00 0 [vsyscall]\nVmFlags: ex\n";
        assert_eq!(essence(smaps), kept);
    }

    #[test]
    fn a_tree_that_changes_often_is_copied_ever_more_rarely() {
        let mut trust = Trust::default();
        let mut copied = 0;
        for _ in 0..1000 {
            if trust.begin_epoch() {
                copied += 1;
                trust.disappointed();
            }
        }
        assert!((4..10).contains(&copied), "{copied}");
    }

    #[test]
    fn a_copy_is_true_until_a_mapping_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        // The program must have been executed and have come to rest.
        std::thread::sleep(std::time::Duration::from_millis(100));
        let copies = Copies::take([(pid, 7)].into_iter(), dir.path()).unwrap();
        assert!(copies.are_true());
        let text = fs::read_to_string(dir.path().join("smaps-7")).unwrap();
        assert!(text.contains("VmFlags:") && !text.contains("Rss:"), "{text}");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!copies.are_true());
    }
}
