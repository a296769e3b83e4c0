//! What the tests share: the CRIU, a room with a workload in it, ways to look at it.

use std::path::{Path, PathBuf};

use standin::criu::Install;

/// The CRIU under test, with the built `standin` as the launcher.
pub fn install() -> Install {
    let explicit = std::env::var_os("STANDIN_TEST_CRIU").map(PathBuf::from);
    let install = Install::find(explicit.as_deref()).expect("a CRIU; set STANDIN_TEST_CRIU to its path");
    install.with_launcher(Path::new(env!("CARGO_BIN_EXE_standin")).to_owned())
}
