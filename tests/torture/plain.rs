//! A restore by the `criu` program alone, in namespaces that `unshare` makes: nothing of Standin has a part in it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use standin::{capture::Note, criu::images};

use crate::host::{await_true, install, newest_tick};

/// Pid 1: a root of its own, since CRIU does not restore under a bare copy of the host's mounts, and then it waits.
const INIT: &str = r#"
set -e
mount --make-rprivate /
mount --rbind / "$1/root"; cd "$1/root"
pivot_root . .; umount -l .; cd /
mount -t proc proc /proc
echo "$2" >/proc/sys/kernel/ns_last_pid
exec <&- >&- 2>&-
touch "$1/ready"
while :; do wait -n || sleep 1; done
"#;

/// A restored tree; gone when dropped.
pub(crate) struct Plain {
    unshare: Child,
    dir: tempfile::TempDir,
}

impl Plain {
    /// Restores a directory of images.
    pub(crate) fn restore(images_dir: &Path) -> Self {
        let note = Note::read(images_dir).unwrap();
        let tasks = images::pstree(&images::read(images_dir, "pstree.img").unwrap()).unwrap();
        let highest = tasks.iter().flat_map(|task| &task.threads).max().unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        let unshare = Command::new("unshare")
            .args(["-m", "-p", "-u", "-i", "-f", "--kill-child", "bash", "-c", INIT, "init"])
            .arg(dir.path())
            .arg(highest.to_string())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let plain = Self { unshare, dir };
        await_true("the namespaces", || plain.dir.path().join("ready").exists());
        plain.criu(images_dir, &note.keys());
        plain
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn init(&self) -> String {
        let children = format!("/proc/{0}/task/{0}/children", self.unshare.id());
        fs::read_to_string(children).unwrap().trim().to_owned()
    }

    /// `criu restore`; the program's output, which was a pipe, is a file now.
    fn criu(&self, images_dir: &Path, keys: &[String]) {
        let log = self.path("criu.log");
        let inherited = keys.iter().map(|key| format!("--inherit-fd fd[0]:{key}"));
        let line = format!(
            "exec nsenter -t {} -m -p -u -i {} restore -D {} -o {} -v2 --restore-detached {} 0>>{}",
            self.init(),
            install().path.display(),
            images_dir.display(),
            log.display(),
            inherited.collect::<Vec<_>>().join(" "),
            self.path("output").display(),
        );
        File::create(self.path("output")).unwrap();
        let mut command = Command::new("bash");
        command.args(["-c", &line]).stdout(Stdio::null()).stderr(Stdio::null());
        let status = command.status().unwrap();
        assert!(status.success(), "{status}\n{}", fs::read_to_string(&log).unwrap_or_default());
    }

    pub(crate) fn ticks(&self) -> u64 {
        newest_tick(&fs::read_to_string(self.path("output")).unwrap())
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // Its namespaces, and all that is in them, go with it.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}
