//! `standin agent`: the daemon.

use std::path::{Path, PathBuf};

use super::{Failure, Outcome};
use crate::{
    agent::{self, api::ErrorCode},
    config::{Config, DEFAULT_FILE, Settings},
    observe::in_full,
};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Settings file (TOML; each key is also a flag below) [default: /etc/standin/agent.toml if there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

pub(super) fn main(args: Args) -> Outcome {
    let config = settle(args).map_err(|error| Failure::new(ErrorCode::Invalid, error))?;
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log)
        .map_err(|error| Failure::new(ErrorCode::Invalid, format!("`log` = {:?}: {error}", config.log)))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    crate::capture::share_heaps();
    let runtime = crate::transport::prompt_runtime().map_err(anyhow::Error::from)?;
    runtime.block_on(agent::main(config)).map_err(|error| Failure::new(ErrorCode::Failed, in_full(&error)))
}

/// The settings of the file and the flags.
pub(super) fn settle(args: Args) -> Result<Config, crate::config::ConfigError> {
    let file = match args.config {
        Some(path) => Settings::read(&path)?,
        None if Path::new(DEFAULT_FILE).exists() => Settings::read(Path::new(DEFAULT_FILE))?,
        None => Settings::default(),
    };
    args.settings.or(file).validate()
}
