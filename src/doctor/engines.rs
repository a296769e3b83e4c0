//! The engines whose containers can be protected. None is needed.

use super::{Check, Group};
use crate::workload::container::{Survey, survey};

pub(super) fn check() -> Vec<Check> {
    survey().into_iter().map(report).collect()
}

fn report(Survey { engine, found, trouble, whole }: Survey) -> Check {
    let found = match whole {
        None => found,
        Some(Ok(())) => format!("{found}; restores containers whole"),
        Some(Err(why)) => format!("{found}; not whole: {why}"),
    };
    match trouble {
        None => Check::ok(Group::Engines, engine, found),
        Some(remedy) => Check::warn(Group::Engines, engine, found, remedy),
    }
}
