//! The operator's commands for a change of roles.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ConfigError, Settings, is_program};
use crate::{agent::HookCommands, ha::Timing};

/// What follows when a hook fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum HookFailure {
    /// It is tried again, ever more seldom, until it is done or the role changes.
    #[default]
    Retry,
    /// Nothing but what history and status say.
    Ignore,
}

impl Settings {
    /// The hooks, if they can be run.
    pub(super) fn hooks(&self) -> Result<HookCommands, ConfigError> {
        let refused = |why: String| Err(ConfigError::Hook(why));
        for (key, path) in [("on_promote", &self.on_promote), ("on_demote", &self.on_demote)] {
            let Some(path) = path else { continue };
            if !path.is_absolute() {
                return Err(ConfigError::Relative { key, path: path.clone() });
            }
            if !is_program(path) {
                return refused(format!("{key} = {} is not there, or not executable", path.display()));
            }
        }
        let none = self.on_promote.is_none() && self.on_demote.is_none();
        if none && (self.hook_timeout_ms.is_some() || self.hook_failure.is_some()) {
            return refused(
                "hook_timeout_ms and hook_failure are for on_promote and on_demote: set one of them"
                    .to_owned(),
            );
        }
        let timeout = Duration::from_millis(self.hook_timeout_ms.unwrap_or(30_000));
        if timeout.is_zero() || timeout > Timing::TIME_MAX {
            return refused("hook_timeout_ms must be more than 0 and no more than an hour".to_owned());
        }
        Ok(HookCommands {
            on_promote: self.on_promote.clone(),
            on_demote: self.on_demote.clone(),
            timeout,
            failure: self.hook_failure.unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_are_whole_or_refused() {
        let hooks = |text: &str| {
            let settings: Settings = toml::from_str(text).unwrap();
            settings.validate().map(|config| config.hooks).map_err(|error| error.to_string())
        };
        let program = std::env::current_exe().unwrap();
        let whole = hooks(&format!("on_promote = {program:?}\nhook_failure = \"ignore\"")).unwrap();
        assert_eq!((whole.on_promote.as_ref(), whole.on_demote.as_ref()), (Some(&program), None));
        assert_eq!((whole.timeout.as_secs(), whole.failure), (30, HookFailure::Ignore));
        for (text, word) in [
            ("on_promote = \"hook\"".to_owned(), "absolute"),
            ("on_demote = \"/proc/version\"".to_owned(), "not executable"),
            ("hook_failure = \"retry\"".to_owned(), "set one of them"),
            (format!("on_demote = {program:?}\nhook_timeout_ms = 0"), "hook_timeout_ms"),
        ] {
            let refused = hooks(&text).unwrap_err();
            assert!(refused.contains(word), "{refused}");
        }
    }
}
