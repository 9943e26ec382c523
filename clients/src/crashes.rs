//! The part of `guest info` about runs that failed.

use anyhow::Result;
use sepal_schema::{
    crash::CrashReport,
    error::Error,
    guest_capnp::observer::{self, crashes_result},
    report::{now_ns, reason_name},
};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{registers, show::Ending, table};

/// A run that failed, as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Crash<'a> {
    generation: u64,
    report: Ending<'a>,
    last_lines: &'a [String],
    registers: Vec<Map<String, Value>>,
    output: &'a str,
}

impl<'a> From<&'a CrashReport> for Crash<'a> {
    fn from(crash: &'a CrashReport) -> Self {
        Self {
            generation: crash.generation,
            report: Ending::from(&crash.report),
            last_lines: &crash.last_lines,
            registers: crash.registers.iter().map(registers::json).collect(),
            output: &crash.output,
        }
    }
}

/// The last runs that failed, newest first; none where the manager is too old to know.
pub(crate) async fn of(observer: &observer::Client) -> Result<Vec<CrashReport>> {
    let answer = match observer.crashes_request().send().promise.await {
        Err(error) if error.kind == capnp::ErrorKind::Unimplemented => return Ok(Vec::new()),
        answer => answer?,
    };
    match answer.get()?.which()? {
        crashes_result::Crashes(crashes) => {
            let crashes = crashes?.iter().map(CrashReport::read);
            Ok(crashes.collect::<Result<_, _>>()?)
        }
        crashes_result::Error(error) => Err(Error::read(error?)?.into()),
    }
}

/// What a person reads of them: all there is about the newest, a line about each of the others.
pub(crate) fn show(crashes: &[CrashReport]) -> String {
    told(crashes, now_ns())
}

fn told(crashes: &[CrashReport], now_ns: u64) -> String {
    let Some(newest) = crashes.first() else {
        return String::new();
    };
    let mut text = "crashes\n".to_owned();
    for crash in crashes {
        let report = &crash.report;
        let ago = table::duration(now_ns.saturating_sub(report.time_ns));
        let (run, reason, ran) = (
            crash.generation,
            reason_name(report.reason),
            table::duration(report.uptime_ns),
        );
        line(
            &mut text,
            1,
            format_args!("run {run}, {ago} ago, after {ran}: {reason}: {}", report.detail),
        );
    }
    if !newest.last_lines.is_empty() {
        line(
            &mut text,
            0,
            format_args!("last lines of the component in run {}", newest.generation),
        );
        for last in &newest.last_lines {
            line(&mut text, 1, last);
        }
    }
    for (vcpu, registers) in newest.registers.iter().enumerate() {
        line(&mut text, 0, format_args!("vCPU {vcpu} in run {}", newest.generation));
        for wide in registers::lines(registers).lines() {
            line(&mut text, 1, wide);
        }
    }
    if !newest.output.trim().is_empty() {
        line(&mut text, 0, "printed last");
        for printed in newest.output.lines() {
            line(&mut text, 1, printed);
        }
    }
    text
}

fn line(text: &mut String, depth: usize, what: impl std::fmt::Display) {
    text.push_str(&table::indented(2 * depth, &what.to_string()));
}

#[cfg(test)]
mod tests {
    use sepal_schema::{
        crash::Registers,
        report::{Reason, Rung, StopReport},
    };

    use super::*;

    fn crash(generation: u64, seconds: u64) -> CrashReport {
        CrashReport {
            report: StopReport {
                reason: Reason::Crash,
                detail: "vCPU 0 failed".into(),
                error: None,
                uptime_ns: 1_500_000_000,
                time_ns: seconds * 1_000_000_000,
                about: "vcpu0".into(),
                rung: Rung::None,
                component: None,
            },
            generation,
            last_lines: vec!["out of luck".into()],
            registers: vec![Registers {
                rip: 0xd000_0000,
                ..Registers::default()
            }],
            output: "Kernel panic\n\nend\n".into(),
        }
    }

    #[test]
    fn a_guest_that_never_failed_has_nothing_to_tell() {
        assert_eq!(told(&[], 0), "");
    }

    #[test]
    fn whatever_was_printed_fits() {
        let mut long = crash(7, 90);
        long.report.detail = "a sentence of several words ".repeat(6);
        long.last_lines.push("x".repeat(200));
        long.output = "y".repeat(200);
        let text = told(&[long], 100_000_000_000);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert_eq!(text.matches('y').count(), 200, "{text}");
    }

    #[test]
    fn the_newest_is_told_with_all_that_is_known() {
        let text = told(&[crash(7, 90), crash(6, 30)], 100_000_000_000);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "crashes");
        assert!(
            lines[1].starts_with("  run 7, ") && lines[1].ends_with("crash: vCPU 0 failed"),
            "{text}"
        );
        assert!(lines[2].starts_with("  run 6, "), "{text}");
        assert_eq!(
            lines[3..6],
            [
                "last lines of the component in run 7",
                "  out of luck",
                "vCPU 0 in run 7"
            ]
        );
        assert!(text.contains("rip    00000000d0000000"), "{text}");
        assert!(text.ends_with("printed last\n  Kernel panic\n\n  end\n"), "{text}");
    }

    #[test]
    fn programs_get_all_of_it() {
        let crash = crash(7, 90);
        let json = serde_json::to_value(Crash::from(&crash)).unwrap();
        assert_eq!(json["generation"], 7);
        assert_eq!(json["report"]["reason"], "crash");
        assert_eq!(json["lastLines"][0], "out of luck");
        assert_eq!(json["registers"][0]["rip"], "0xd0000000");
        assert_eq!(json["output"], "Kernel panic\n\nend\n");
    }
}
