//! The page: one file, no script, nothing from elsewhere.

use std::fmt::Write as _;

use super::{Outcome, Report, render::facts};
use crate::observe::utc;

const STYLE: &str = "\
:root{color-scheme:light dark}\
body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.4rem}\
.passed,.failed,.interrupted{padding:.1em .5em;border-radius:.3em;color:#fff}\
.passed{background:#1a7f37}.failed{background:#b3261e}.interrupted{background:#8a6100}\
table{border-collapse:collapse;width:100%}\
th{text-align:left;vertical-align:top;padding:.3em 1em .3em 0;white-space:nowrap}\
td{padding:.3em 0;overflow-wrap:anywhere}\
.bar{display:block;height:.8em;min-width:1px;background:#4a7fc1}\
.ms{text-align:right;padding-right:1em;white-space:nowrap}\
pre{background:#8882;padding:.8em;overflow:auto}";

pub(super) fn page(report: &Report) -> String {
    let name = escaped(report.name.as_str());
    let (class, word) = (report.outcome.word(), report.outcome.word());
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>Drill of {name}: {word}</title><style>{STYLE}</style></head>\n<body>\n\
         <h1>Drill of {name} on {} <span class=\"{class}\">{word}</span></h1>\n<p>{}</p>\n<table>\n",
        escaped(&report.host),
        utc(report.at_unix_ms)
    );
    for (what, value) in facts(report) {
        // Into a string, here and below: cannot fail.
        let _ = writeln!(page, "<tr><th>{what}</th><td>{}</td></tr>", escaped(&value));
    }
    page.push_str("</table>\n<h2>Phases</h2>\n<table>\n");
    let longest = report.phases_ms.iter().map(|(_, ms)| *ms).fold(1.0, f64::max);
    for (phase, ms) in &report.phases_ms {
        let _ = writeln!(
            page,
            "<tr><th>{}</th><td class=\"ms\">{ms:.1} ms</td><td style=\"width:70%\">\
             <span class=\"bar\" style=\"width:{:.1}%\"></span></td></tr>",
            escaped(phase),
            ms / longest * 100.0
        );
    }
    page.push_str("</table>\n");
    if let Some(probe) = &report.probe {
        let cut = if probe.cut { " (the beginning of it)" } else { "" };
        let _ = writeln!(page, "<h2>Output of the probe{cut}</h2>\n<pre>{}</pre>", escaped(&probe.output));
    }
    if report.outcome == Outcome::Passed {
        page.push_str(
            "<p>The newest epoch was restored on the standby in a network without a way out. Nothing of it was \
             announced, and production was not touched.</p>\n",
        );
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}
