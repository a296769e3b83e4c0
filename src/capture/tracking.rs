//! Who tells which pages were written: chosen once by what the kernel offers, and what follows from it.
//!
//! | | write protection | soft-dirty |
//! |---|---|---|
//! | needs | Linux 6.7: PAGEMAP_SCAN, userfaultfd WP_ASYNC | CONFIG_MEM_SOFT_DIRTY |
//! | who looks | our trackers, at any time | CRIU (`track_mem`), in the freeze |
//! | CRIU's holes | every page of the image | pages unwritten since the last dump |
//! | pre-copy | yes | no: looking is resetting, and only CRIU does it |
//! | a failed epoch | the pages it sent are unknown | the bits are reset already: the next epoch is full |

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{criu::probe::Kernel, memory::Task, model::Space};

/// How written pages are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tracking {
    /// By a userfaultfd in each task, with asynchronous write protection; CRIU sees no page as written.
    WriteProtect,
    /// By CRIU itself, with the kernel's soft-dirty bits.
    SoftDirty,
}

/// Neither way is open.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this kernel cannot tell which pages were written: it has neither PAGEMAP_SCAN with userfaultfd's asynchronous \
     write protection (Linux 6.7, CONFIG_USERFAULTFD) nor soft-dirty bits (CONFIG_MEM_SOFT_DIRTY); use a kernel with one"
)]
pub struct NoTracking;

impl Tracking {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::WriteProtect => "userfaultfd write protection",
            Self::SoftDirty => "soft-dirty bits, by CRIU",
        }
    }

    /// The better of what a kernel offers.
    pub fn choose(kernel: &Kernel) -> Result<Self, NoTracking> {
        let protects = kernel.uffd_wp_async && kernel.uffd_user_mode_only;
        if kernel.pagemap_scan && protects && kernel.ptrace && kernel.pidfd_getfd {
            Ok(Self::WriteProtect)
        } else if kernel.soft_dirty {
            Ok(Self::SoftDirty)
        } else {
            Err(NoTracking)
        }
    }
}

/// The tasks of the last dump: with soft-dirty bits nothing else tells a task from a later one with its pid, whose
/// memory may read as unwritten because it was forked from a task that was looked at.
#[derive(Debug, Default)]
pub(super) struct Dumped {
    start_ticks: BTreeMap<Space, u64>,
}

impl Dumped {
    /// Takes note of the tasks of a dump, the only ones from now on. Returns the spaces whose task is the one of the dump
    /// before: of these alone is what is known of the others' memory true.
    pub(super) fn renew(&mut self, tasks: &[Task]) -> Vec<Space> {
        let now: BTreeMap<Space, u64> =
            tasks.iter().map(|task| (Space::Task(task.inner_pid), task.start_ticks)).collect();
        let same = |(space, ticks): &(&Space, &u64)| self.start_ticks.get(space) == Some(ticks);
        let kept = now.iter().filter(same).map(|(space, _)| *space).collect();
        self.start_ticks = now;
        kept
    }

    /// No dump counts any more.
    pub(super) fn clear(&mut self) {
        self.start_ticks.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(wp_async: bool, soft_dirty: bool) -> Kernel {
        Kernel {
            pagemap_scan: true,
            uffd_wp_async: wp_async,
            uffd_user_mode_only: true,
            ptrace: true,
            pidfd_getfd: true,
            soft_dirty,
        }
    }

    #[test]
    fn soft_dirty_serves_only_where_write_protection_does_not() {
        assert_eq!(Tracking::choose(&kernel(true, false)), Ok(Tracking::WriteProtect));
        assert_eq!(Tracking::choose(&kernel(true, true)), Ok(Tracking::WriteProtect));
        assert_eq!(Tracking::choose(&kernel(false, true)), Ok(Tracking::SoftDirty));
        assert_eq!(Tracking::choose(&kernel(false, false)), Err(NoTracking));
        let no_scan = Kernel { pagemap_scan: false, ..kernel(true, true) };
        assert_eq!(Tracking::choose(&no_scan), Ok(Tracking::SoftDirty));
    }

    #[test]
    fn a_task_with_a_pid_of_another_is_not_that_one() {
        let task = |inner_pid, start_ticks| Task {
            pid: 1000 + inner_pid as i32,
            inner_pid,
            parent: 1,
            threads: 1,
            start_ticks,
            zombie: false,
        };
        let mut dumped = Dumped::default();
        assert_eq!(dumped.renew(&[task(3, 10), task(4, 20)]), []);
        assert_eq!(dumped.renew(&[task(3, 10), task(4, 21)]), [Space::Task(3)]);
        // Gone in one dump, it is unknown in the next, even should it be the same.
        assert_eq!(dumped.renew(&[task(4, 21)]), [Space::Task(4)]);
        assert_eq!(dumped.renew(&[task(3, 10), task(4, 21)]), [Space::Task(4)]);
        dumped.clear();
        assert_eq!(dumped.renew(&[task(4, 21)]), []);
    }
}
