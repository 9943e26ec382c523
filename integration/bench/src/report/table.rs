//! What a report says: the goals first, then each part with all its figures and peers, then who and what is not in it.

use crate::{
    figure::{Better, Figure},
    report::{
        number::{number, quantity},
        render::{Block, Table},
    },
    results::{Measured, Results, SEPAL},
};

/// What stands where there is no value.
const NONE: &str = "-";

/// The whole report.
pub(crate) fn blocks(results: &Results) -> Vec<Block> {
    let mut blocks = vec![Block::Heading("Run".into()), Block::Lines(run(results))];
    let figures = results.figures();
    let goals = goals(results, &figures);
    if !goals.rows.is_empty() {
        blocks.push(Block::Heading("Goals".into()));
        blocks.push(Block::Table(goals));
    }
    let mut parts: Vec<&str> = Vec::new();
    for figure in &figures {
        if !parts.contains(&figure.part()) {
            parts.push(figure.part());
        }
    }
    for part in parts {
        blocks.push(Block::Heading(part.to_owned()));
        let of_part = || figures.iter().copied().filter(|figure| figure.part() == part);
        let single: Vec<_> = of_part().filter(|figure| figure.grows_with.is_none()).collect();
        if !single.is_empty() {
            blocks.push(Block::Table(compared(results, &single)));
        }
        for figure in of_part() {
            if let Some(with) = figure.grows_with {
                blocks.push(Block::Lines(growth(results, figure, with)));
                blocks.push(Block::Table(sizes(results, figure, with)));
            }
        }
    }
    for (heading, lines) in [
        ("Skipped for everybody", skipped(results)),
        ("Left out", left_out(results)),
        ("Failed", results.failed.clone()),
        ("Notes", results.notes.clone()),
    ] {
        if !lines.is_empty() {
            blocks.push(Block::Heading(heading.to_owned()));
            blocks.push(Block::Lines(lines));
        }
    }
    blocks
}

/// Where and when, and who was measured and who was not.
fn run(results: &Results) -> Vec<String> {
    let host = &results.host;
    let mut lines = vec![
        format!(
            "{}, {} processors, {} MiB, Linux {}, {}; load before the run {:.2}",
            host.processor, host.processors, host.memory_mib, host.kernel, host.virtualization, host.load
        ),
        format!(
            "{} UTC; Sepal {} build{}",
            host.when,
            host.build,
            match host.commit.as_str() {
                "" => String::new(),
                commit => format!(" of {commit}"),
            }
        ),
    ];
    for subject in &results.subjects {
        lines.push(format!("{}: {}", subject.name, subject.version));
    }
    if !results.not_found.is_empty() {
        lines.push(format!("not on this host: {}", results.not_found.join(", ")));
    }
    if results.short {
        lines.push("SHORT FORM: everything once and small, to see that it works; these figures say little".into());
    }
    if host.build == "debug" {
        lines.push("DEBUG BUILD: these figures say little".into());
    }
    lines
}

/// A line for each figure with a goal.
fn goals(results: &Results, figures: &[&'static Figure]) -> Table {
    let mut table = Table::new([
        "figure",
        "what",
        "goal",
        "Sepal (p10-p90)",
        "reached",
        "best peer",
        "its median",
    ]);
    for figure in figures {
        let Some(goal) = figure.goal else { continue };
        let best = results.best_peer(figure);
        table.rows.push(vec![
            figure.id.to_owned(),
            figure.title.to_owned(),
            format!("{} {}", at_best(figure), quantity(goal, figure.unit)),
            spread(results.find(figure, SEPAL, None)),
            reached(results, figure),
            best.map_or(NONE, |(name, _)| name).to_owned(),
            best.map_or(NONE.to_owned(), |(_, median)| number(median)),
        ]);
    }
    table
}

/// How a goal is written before its value.
fn at_best(figure: &Figure) -> &'static str {
    match figure.better {
        Better::Lower => "<=",
        Better::Higher => ">=",
    }
}

fn reached(results: &Results, figure: &Figure) -> String {
    let median = results.median(figure, SEPAL);
    match median.and_then(|median| figure.reached(median)) {
        Some(true) => "yes",
        Some(false) => "NO",
        None => NONE,
    }
    .to_owned()
}

/// Median, and the tenth and ninetieth percentile where there is more than one value.
fn spread(measured: Option<&Measured>) -> String {
    let Some(measured) = measured else {
        return NONE.to_owned();
    };
    let summary = measured.summary;
    match measured.values.len() {
        0 | 1 => number(summary.median),
        _ => format!(
            "{} ({}-{})",
            number(summary.median),
            number(summary.p10),
            number(summary.p90)
        ),
    }
}

/// The peers that have a value of one of these figures, in the order of the subjects.
fn peers<'a>(results: &'a Results, figures: &[&'static Figure]) -> Vec<&'a str> {
    let has = |name: &str| {
        let mut measured = results.measured.iter();
        measured.any(|measured| measured.subject == name && figures.contains(&measured.figure))
    };
    let names = results.subjects.iter().map(|subject| subject.name.as_str());
    names.filter(|name| *name != SEPAL && has(name)).collect()
}

/// A line for each figure of a part.
fn compared(results: &Results, figures: &[&'static Figure]) -> Table {
    let peers = peers(results, figures);
    let mut table = Table::new(["figure", "what", "unit", "Sepal (p10-p90)"]);
    table.columns.extend(peers.iter().map(|peer| (*peer).to_owned()));
    if !peers.is_empty() {
        table.columns.push("times better".to_owned());
    }
    let with_goals = figures.iter().any(|figure| figure.goal.is_some());
    if with_goals {
        table.columns.extend(["goal".to_owned(), "reached".to_owned()]);
    }
    for figure in figures {
        let mut row = vec![
            figure.id.to_owned(),
            figure.title.to_owned(),
            figure.unit.to_owned(),
            spread(results.find(figure, SEPAL, None)),
        ];
        for peer in &peers {
            row.push(results.median(figure, peer).map_or(NONE.to_owned(), number));
        }
        if !peers.is_empty() {
            let median = results.median(figure, SEPAL).zip(results.best_peer(figure));
            let times = median.and_then(|(median, (_, best))| figure.times_better(median, best));
            row.push(times.map_or(NONE.to_owned(), |times| format!("{}x", number(times))));
        }
        if with_goals {
            let goal = figure.goal.map(|goal| format!("{} {}", at_best(figure), number(goal)));
            row.extend([goal.unwrap_or_else(|| NONE.to_owned()), reached(results, figure)]);
        }
        table.rows.push(row);
    }
    table
}

/// The sizes at which a figure was measured, ascending.
pub(crate) fn sizes_of(results: &Results, figure: &Figure) -> Vec<f64> {
    let of_figure = results.measured.iter().filter(|measured| measured.figure == figure);
    let mut sizes: Vec<f64> = of_figure.filter_map(|measured| measured.at).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    sizes
}

/// The medians of a subject, by size, ascending.
pub(crate) fn curve(results: &Results, figure: &Figure, subject: &str) -> Vec<(f64, f64)> {
    let at = |size: f64| Some((size, results.find(figure, subject, Some(size))?.summary.median));
    sizes_of(results, figure).into_iter().filter_map(at).collect()
}

/// The exponent of a power law through points (size, value) by least squares of their logarithms: 0 does not grow, 1 grows in proportion. `None`
/// without two sizes with positive values.
fn exponent(points: &[(f64, f64)]) -> Option<f64> {
    let logs: Vec<_> = points
        .iter()
        .filter(|(size, value)| *size > 0.0 && *value > 0.0)
        .map(|(size, value)| (size.ln(), value.ln()))
        .collect();
    let count = logs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / count;
    let (x_mean, y_mean) = (mean(|log| log.0), mean(|log| log.1));
    let spread: f64 = logs.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
    let together: f64 = logs.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    (spread > 0.0).then(|| together / spread)
}

/// The exponent through all points, and that between the last two: what is constant hides at the beginning what grows.
pub(crate) fn exponents(points: &[(f64, f64)]) -> Option<(f64, f64)> {
    let end = points.get(points.len().saturating_sub(2)..)?;
    exponent(points).zip(exponent(end))
}

/// What a growing figure is, and how it grows for whom.
fn growth(results: &Results, figure: &Figure, with: &str) -> Vec<String> {
    let unit = match figure.unit {
        "" => String::new(),
        unit => format!(", {unit}"),
    };
    let mut lines = vec![format!("{} ({}{unit}) by {with}", figure.id, figure.title)];
    for subject in &results.subjects {
        let points = curve(results, figure, &subject.name);
        if let Some((all, end)) = exponents(&points) {
            let name = &subject.name;
            lines.push(format!(
                "{name}: grows with {with} to the power of {all:.2}, at the end {end:.2}"
            ));
        }
    }
    lines
}

/// A line for each size.
fn sizes(results: &Results, figure: &'static Figure, with: &str) -> Table {
    let peers = peers(results, &[figure]);
    let mut table = Table::new([with, "Sepal (p10-p90)"]);
    table.columns.extend(peers.iter().map(|peer| (*peer).to_owned()));
    for size in sizes_of(results, figure) {
        // A size is a count.
        let mut row = vec![format!("{size}"), spread(results.find(figure, SEPAL, Some(size)))];
        for peer in &peers {
            let median = results.find(figure, peer, Some(size));
            row.push(median.map_or(NONE.to_owned(), |measured| number(measured.summary.median)));
        }
        table.rows.push(row);
    }
    table
}

/// What peers were left out of, and why.
fn left_out(results: &Results) -> Vec<String> {
    let left = results.left_out.iter();
    by_reason(left.map(|left| (format!("{}: {}", left.subject, left.reason), left.figure.as_str())))
}

/// What this host cannot show, and why.
fn skipped(results: &Results) -> Vec<String> {
    let skipped = results.skipped.iter();
    by_reason(skipped.map(|skipped| (skipped.reason.clone(), skipped.figure.as_str())))
}

/// A line for each reason, with all figures that it is about.
fn by_reason<'a>(each: impl Iterator<Item = (String, &'a str)>) -> Vec<String> {
    let mut reasons: Vec<(String, Vec<&str>)> = Vec::new();
    for (reason, figure) in each {
        match reasons.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, figures)) => figures.push(figure),
            None => reasons.push((reason, vec![figure])),
        }
    }
    let line = |(reason, figures): (String, Vec<&str>)| format!("{reason} ({})", figures.join(", "));
    reasons.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{blocks, exponent};
    use crate::{
        figure::Figure,
        host::Host,
        report::{markdown, terminal},
        results::{Results, SEPAL, Subject},
    };

    static COLD: Figure = Figure::cost("start.cold", "first byte", "ms").goal(2.8);
    static CALLS: Figure = Figure::rate("rpc.calls", "calls", "/s").goal(200_000.0).sepal_only();
    static MEMORY: Figure = Figure::cost("scale.memory", "memory", "KiB").growing("guests");

    fn results() -> Results {
        let mut results = Results {
            host: Host::default(),
            short: false,
            subjects: [SEPAL, "QEMU"]
                .map(|name| Subject {
                    name: name.into(),
                    version: "1".into(),
                })
                .into(),
            not_found: vec!["crosvm".into()],
            measured: Vec::new(),
            left_out: Vec::new(),
            skipped: Vec::new(),
            failed: Vec::new(),
            notes: vec!["a note".into()],
        };
        for value in [2.0, 2.5, 3.0] {
            results.record(&COLD, SEPAL, None, value);
        }
        results.record(&COLD, "QEMU", None, 50.0);
        results.record(&CALLS, SEPAL, None, 138_648.0);
        for (guests, value) in [(1.0, 10.0), (10.0, 100.0)] {
            results.record(&MEMORY, SEPAL, Some(guests), value);
        }
        results.leave_out(&MEMORY, "QEMU", "too many");
        results.skip(&CALLS, "no network");
        results.skip(&COLD, "no network");
        results
    }

    #[test]
    fn the_goals_come_first_with_the_best_peer() {
        let text = terminal(&results());
        let line = |id: &str| {
            let line = text.lines().find(|line| line.starts_with(id)).unwrap_or_default();
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            line("start.cold"),
            "start.cold first byte <= 2.80 ms 2.50 (2.00-3.00) yes QEMU 50.0"
        );
        assert_eq!(line("rpc.calls"), "rpc.calls calls >= 200,000 /s 138,648 NO - -");
    }

    #[test]
    fn parts_compare_all_peers() {
        let text = markdown(&results());
        assert!(text.contains("| figure | what | unit | Sepal (p10-p90) | QEMU | times better | goal | reached |"));
        assert!(
            text.contains("| start.cold | first byte | ms | 2.50 (2.00-3.00) | 50.0 | 20.0x | &lt;= 2.80 | yes |"),
            "{text}"
        );
    }

    #[test]
    fn who_and_what_is_not_in_it_is_said() {
        let text = terminal(&results());
        for wanted in [
            "not on this host: crosvm",
            "QEMU: too many (scale.memory)",
            "no network (rpc.calls, start.cold)",
            "a note",
            "Sepal: grows with guests to the power of 1.00, at the end 1.00",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in:\n{text}");
        }
    }

    #[test]
    fn a_run_without_values_has_a_report() {
        let mut results = results();
        results.measured.clear();
        assert!(!blocks(&results).is_empty());
    }

    proptest! {
        #[test]
        fn the_exponent_of_a_power_law_is_found(power in -2.0f64..3.0, factor in 0.001f64..1e6) {
            let points: Vec<_> = [1.0f64, 2.0, 8.0, 200.0].iter().map(|x| (*x, factor * x.powf(power))).collect();
            prop_assert!((exponent(&points).unwrap() - power).abs() < 1e-6);
        }

        #[test]
        fn one_size_has_no_exponent(size in 1.0f64..100.0, value in -1.0f64..100.0) {
            prop_assert_eq!(exponent(&[(size, value), (size, value)]), None);
        }
    }
}
