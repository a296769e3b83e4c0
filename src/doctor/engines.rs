//! The engines whose containers can be protected. None is needed.

use super::{Check, Group};
use crate::workload::container::{Survey, survey};

pub(super) fn check() -> Vec<Check> {
    survey().into_iter().map(report).collect()
}

fn report(Survey { engine, found, trouble }: Survey) -> Check {
    match trouble {
        None => Check::ok(Group::Engines, engine, found),
        Some(remedy) => Check::warn(Group::Engines, engine, found, remedy),
    }
}
