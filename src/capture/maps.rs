//! The lists of the frozen tasks' mappings, so that CRIU need not have the kernel walk every page to make them.
//!
//! Of `/proc/PID/smaps` CRIU uses the lines of the mappings and their flags (parse_smaps in proc_parse.c). When it says
//! that the tree is frozen, and waits, both are written to the directory of its images, where the bridge looks for them
//! when CRIU opens `smaps`. They are made of the frozen tree, so there is nothing in them to go stale.

use std::{fs, io, path::Path};

use crate::memory::{Task, Vmas};

/// Writes the lists of all tasks of a frozen tree. Of a task that has none CRIU asks the kernel.
pub(super) fn write(vmas: &Vmas, tasks: &[Task], dir: &Path) -> io::Result<()> {
    for task in tasks.iter().filter(|task| !task.zombie) {
        match vmas.essence(task.pid) {
            Ok(essence) => fs::write(dir.join(format!("smaps-{}", task.inner_pid)), essence)?,
            Err(error) => {
                tracing::debug!(%error, pid = task.pid, "CRIU lists the mappings of this process itself");
            }
        }
    }
    Ok(())
}
