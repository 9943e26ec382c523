//! Text for people: aligned columns, facts, durations.

use std::time::Duration;

/// Rows under headings, in columns as wide as their widest cell; the last column is not padded.
pub(crate) fn table<const N: usize>(headings: &[&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut lines = vec![headings.map(String::from)];
    lines.extend(rows);
    let widths: [usize; N] =
        std::array::from_fn(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (cell, width) in line.iter().zip(widths) {
            row.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

/// A fact a line, what it is about on the left.
pub(crate) fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let line = |(name, value): &(&str, String)| format!("{}\n", format!("{name:width$}  {value}").trim_end());
    facts.iter().map(line).collect()
}

/// A duration as people say it: "3.2s", "4m 10s", "2h 5m", "3d 4h".
pub(crate) fn duration(ns: u64) -> String {
    let duration = Duration::from_nanos(ns);
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{:.1}s", duration.as_secs_f64()),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let text = table(
            &["NAME", "X"],
            [["a".into(), "1".into()], ["longer".into(), String::new()]],
        );
        assert_eq!(text, "NAME    X\na       1\nlonger\n");
    }

    #[test]
    fn durations_are_readable() {
        let s = 1_000_000_000;
        let told: Vec<_> = [0, 3_250_000_000, 250 * s, 7500 * s, 273_600 * s].map(duration).into();
        assert_eq!(told, ["0.0s", "3.2s", "4m 10s", "2h 5m", "3d 4h"]);
    }
}
