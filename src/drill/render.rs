//! A report for people: as text, as JSON, as a page.

use std::{fmt::Write as _, path::Path, str::FromStr};

use super::{Report, html};

/// What a report is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For a terminal.
    Text,
    /// [`Report`] as it is.
    Json,
    /// A page that needs nothing else.
    Html,
}

impl FromStr for Format {
    type Err = String;

    /// By a file's extension.
    fn from_str(extension: &str) -> Result<Self, String> {
        match extension {
            "txt" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            "html" | "htm" => Ok(Self::Html),
            _ => Err(format!("{extension:?} is no kind of report: name it .html, .json or .txt")),
        }
    }
}

impl Format {
    /// That of a file of this name.
    pub fn of(path: &Path) -> Result<Self, String> {
        path.extension().and_then(|extension| extension.to_str()).unwrap_or_default().parse()
    }
}

/// The report in a format.
pub fn render(report: &Report, format: Format) -> String {
    match format {
        Format::Text => text(report),
        Format::Json => {
            let mut text = serde_json::to_string_pretty(report).unwrap_or_default();
            text.push('\n');
            text
        }
        Format::Html => html::page(report),
    }
}

/// What is said of it, in order: what, and its value.
pub(super) fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
    if let Some(reason) = &report.reason {
        facts.push(("reason", reason.clone()));
    }
    if let Some(epoch) = report.epoch {
        facts.push(("epoch", format!("{epoch}, {} of memory", mib(report.memory_bytes))));
    }
    if let (Some(rto), Some(restore)) = (report.rto_ms, report.restore_ms) {
        facts.push((
            "RTO",
            format!(
                "{rto:.1} ms: {:.1} ms until the primary is given up, {restore:.1} ms to restore",
                report.detection_ms
            ),
        ));
    }
    if let Some(rpo) = report.rpo_ms {
        facts.push(("RPO", format!("{rpo} ms, the age of the epoch when the drill began")));
    }
    if let Some(lost) = &report.lost {
        let memory = match (lost.memory_bytes, lost.next_epoch) {
            (Some(bytes), Some(next)) => {
                format!(" ({} of memory was written up to the next epoch, {next})", mib(bytes))
            }
            _ => " (no epoch has followed that would tell how much was written)".to_owned(),
        };
        facts.push(("lost", format!("what the workload did in these {} ms{memory}", lost.ms)));
    }
    if let Some(probe) = &report.probe {
        facts.push(("probe", format!("{} {} ({:.1} ms)", probe.command, probe.ending(), probe.took_ms)));
    }
    facts.push(("protection", format!("{} epochs were committed during the drill", report.epochs_committed)));
    if let Some(kept) = &report.kept {
        let name = &report.name;
        facts.push((
            "kept",
            format!(
                "enter it: nsenter --target {} --all; its output: {}; end it: standin drill {name} --end",
                kept.init,
                kept.log.display()
            ),
        ));
    }
    facts
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn text(report: &Report) -> String {
    let mut text = format!("drill of {} on {}: {}\n", report.name, report.host, report.outcome.word());
    for (what, value) in facts(report) {
        // Into a string: cannot fail.
        let _ = writeln!(text, "  {what:<10} {value}");
    }
    let phases: Vec<String> = report.phases_ms.iter().map(|(phase, ms)| format!("{phase} {ms:.1}")).collect();
    let _ = writeln!(text, "  {:<10} {} (ms)", "phases", phases.join(", "));
    if let Some(probe) = report.probe.as_ref().filter(|probe| !probe.output.is_empty()) {
        let cut = if probe.cut { " (the beginning of it)" } else { "" };
        let _ = writeln!(text, "  output of the probe{cut}:");
        for line in probe.output.lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Lost, Outcome, ProbeResult},
        *,
    };

    fn report() -> Report {
        let mut report = Report::begun("web".parse().unwrap(), "b".to_owned(), 1_700_000_000_000, 306.0);
        report.outcome = Outcome::Failed;
        report.reason = Some("the probe ended with exit status 3".to_owned());
        report.rto_ms = Some(330.5);
        report.restore_ms = Some(24.5);
        report.rpo_ms = Some(80);
        report.lost = Some(Lost { ms: 80, next_epoch: None, memory_bytes: None });
        report.phases_ms = vec![("files".to_owned(), 1.0), ("criu".to_owned(), 20.0)];
        report.probe = Some(ProbeResult {
            command: "check '<&>\"'".to_owned(),
            exit: Some(3),
            timed_out: false,
            took_ms: 12.0,
            output: "first\n<script>alert(1)</script>\n".to_owned(),
            cut: false,
        });
        report
    }

    #[test]
    fn a_report_is_written_by_its_file_s_extension() {
        assert_eq!(Format::of(Path::new("a/b.html")), Ok(Format::Html));
        assert_eq!(Format::of(Path::new("b.json")), Ok(Format::Json));
        assert_eq!(Format::of(Path::new("b.txt")), Ok(Format::Text));
        assert!(Format::of(Path::new("b.pdf")).unwrap_err().contains(".html, .json or .txt"));
        assert!(Format::of(Path::new("b")).is_err());
    }

    #[test]
    fn every_format_says_what_matters() {
        let report = report();
        for format in [Format::Text, Format::Json, Format::Html] {
            let text = render(&report, format);
            for word in ["web", "failed", "330.5", "exit status 3", "80"] {
                assert!(text.contains(word), "{format:?} lacks {word}: {text}");
            }
        }
        let json: Report = serde_json::from_str(&render(&report, Format::Json)).unwrap();
        assert_eq!(json, report);
    }

    #[test]
    fn a_page_needs_nothing_else_and_runs_nothing() {
        let page = render(&report(), Format::Html);
        assert!(!page.contains("<script"), "{page}");
        assert!(page.contains("&lt;script&gt;") && page.contains("&lt;&amp;&gt;&quot;"), "{page}");
        for reference in ["http://", "https://", "src=", "href="] {
            assert!(!page.contains(reference), "{page}");
        }
    }
}
