//! The report as people read it.

use std::fmt::Write as _;

use super::{Check, Group, Report, State};

/// Width of the longest id, so that what was found stands in one column.
const ID_WIDTH: usize = 22;

/// The report as text, in colour or not.
pub fn render(report: &Report, colour: bool) -> String {
    let mut out = lines(&report.checks, colour);
    let _ = write!(out, "\n{}", verdict(report, colour));
    out
}

/// The checks under the titles of their groups.
pub(super) fn lines(checks: &[Check], colour: bool) -> String {
    let mut out = String::new();
    let mut group = None;
    for check in checks {
        if group != Some(check.group) {
            let blank = if group.is_some() { "\n" } else { "" };
            let _ = writeln!(out, "{blank}{}", paint(title(check.group), "1", colour));
            group = Some(check.group);
        }
        line(&mut out, check, colour);
    }
    out
}

fn line(out: &mut String, check: &Check, colour: bool) {
    let (word, code) = match check.state {
        State::Ok => ("ok  ", "32"),
        State::Note => ("note", "36"),
        State::Warn => ("warn", "33"),
        State::Fail => ("FAIL", "31"),
    };
    let _ = writeln!(out, "  {}  {:<ID_WIDTH$} {}", paint(word, code, colour), check.id, check.found);
    if let Some(remedy) = &check.remedy {
        let _ = writeln!(out, "        {:<ID_WIDTH$} -> {remedy}", "");
    }
}

fn verdict(report: &Report, colour: bool) -> String {
    let besides = besides(&report.ids(State::Warn));
    let verdict = if report.ok {
        paint("This host can protect workloads", "32", colour)
    } else {
        paint("This host cannot protect workloads", "31", colour)
    };
    let tracker = report.tracker.map_or_else(|| "none".to_owned(), |tracker| tracker.name().to_owned());
    let criu = report.criu_version.as_deref().unwrap_or("none");
    format!("{verdict}; dirty tracker: {tracker}; CRIU: {criu}{besides}\n")
}

/// The warnings, in brackets.
pub(super) fn besides(warnings: &[&str]) -> String {
    match warnings.len() {
        0 => String::new(),
        1 => format!(" (1 warning: {})", warnings[0]),
        count => format!(" ({count} warnings: {})", warnings.join(", ")),
    }
}

fn title(group: Group) -> &'static str {
    match group {
        Group::Host => "Host",
        Group::Cpu => "Processor",
        Group::Kernel => "Kernel",
        Group::Criu => "CRIU",
        Group::Network => "Network",
        Group::Space => "Space",
        Group::Engines => "Containers",
        Group::Workloads => "Workloads",
    }
}

pub(super) fn paint(text: &str, code: &str, colour: bool) -> String {
    if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let checks = vec![
            Check::ok(Group::Host, "root", "uid 0"),
            Check::warn(Group::Host, "sys-resource", "missing", "grant it"),
            Check::fail(Group::Criu, "criu", "none at /x", "run scripts/setup"),
        ];
        Report::new(None, None, checks)
    }

    #[test]
    fn every_check_is_shown_with_its_remedy_under_its_group() {
        let text = render(&report(), false);
        let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("no {part:?} in:\n{text}"));
        assert!(
            at("Host") < at("root") && at("grant it") < at("CRIU") && at("CRIU") < at("run scripts/setup")
        );
        assert!(text.contains("cannot protect") && text.contains("1 warning: sys-resource"), "{text}");
    }

    #[test]
    fn colour_is_used_only_where_it_is_wanted() {
        assert!(!render(&report(), false).contains('\x1b'));
        assert!(render(&report(), true).contains("\x1b[31m"));
    }
}
