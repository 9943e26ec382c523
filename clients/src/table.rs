//! Text for people: aligned columns, facts, durations.

use std::time::Duration;

/// The width that all text fits into.
const COLUMNS: usize = 80;
/// The narrowest that a column is made for the others' sake.
const NARROWEST: usize = 12;
/// The widest that a first column is left as it is: the longest name of a guest. One in two pieces is none that a script, or a mouse, can take.
const NAME: usize = 64;
/// Blanks between columns.
const GAP: usize = 2;

/// Rows under headings, in columns as wide as their widest cell; the last column is not padded. Where that is wider than 80 columns, the widest ones but for
/// the first, which has names, are made narrower, and what does not fit goes on in the next line.
pub(crate) fn table<const N: usize>(headings: &[&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut lines = vec![headings.map(String::from)];
    lines.extend(rows);
    let mut widths: [usize; N] =
        std::array::from_fn(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0));
    if let Some(first) = widths.first_mut() {
        *first = (*first).min(NAME);
    }
    while widths.iter().sum::<usize>() + GAP * N.saturating_sub(1) > COLUMNS {
        match widths.iter_mut().skip(1).max() {
            Some(widest) if *widest > NARROWEST => *widest -= 1,
            _ => break,
        }
    }
    let mut text = String::new();
    for line in lines {
        let cells: Vec<Vec<String>> = line.iter().zip(widths).map(|(cell, width)| wrap(cell, width)).collect();
        let height = cells.iter().map(Vec::len).max().unwrap_or(0);
        for i in 0..height {
            let mut row = String::new();
            for (cell, width) in cells.iter().zip(widths) {
                let piece = cell.get(i).map_or("", String::as_str);
                row.push_str(&format!("{piece:width$}{:GAP$}", ""));
            }
            text.push_str(row.trim_end());
            text.push('\n');
        }
    }
    text
}

/// A fact a line, what it is about on the left; what does not fit goes on in the next line.
pub(crate) fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in facts {
        let room = COLUMNS.saturating_sub(width + GAP).max(NARROWEST);
        for (i, piece) in wrap(value, room).iter().enumerate() {
            let name = if i == 0 { name } else { "" };
            let line = format!("{name:width$}{:GAP$}{piece}", "");
            text.push_str(line.trim_end());
            text.push('\n');
        }
    }
    text
}

/// A text in lines of at most `width` characters, broken at blanks where there are any. At least one line.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    // What comes from a guest or its component does not move the cursor.
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    // Blanks at the beginning are meant.
    let mut rest = &*text;
    while rest.chars().count() > width {
        let end = rest.char_indices().nth(width).map_or(rest.len(), |(at, _)| at);
        let after = rest[end..].starts_with(' ');
        let at = match rest[..end].trim_start().rfind(' ') {
            _ if after => end,
            Some(_) => rest[..end].rfind(' ').unwrap_or(end),
            None => end,
        };
        lines.push(rest[..at].trim_end().to_owned());
        rest = rest[at..].trim_start();
    }
    if !rest.is_empty() || lines.is_empty() {
        lines.push(rest.to_owned());
    }
    lines
}

/// A line of text behind some blanks; what does not fit goes on in the next line, two blanks further in.
pub(crate) fn indented(blanks: usize, text: &str) -> String {
    let room = COLUMNS.saturating_sub(blanks + GAP).max(NARROWEST);
    let mut lines = String::new();
    for (i, piece) in wrap(text, room).iter().enumerate() {
        let blanks = if i == 0 { blanks } else { blanks + GAP };
        let line = format!("{:blanks$}{piece}", "");
        lines.push_str(line.trim_end());
        lines.push('\n');
    }
    lines
}

/// A line that fits; what does not is left out, and a sign says so.
pub(crate) fn cut(line: &str) -> String {
    match line.char_indices().nth(COLUMNS) {
        None => line.to_owned(),
        Some(_) => line.chars().take(COLUMNS - 1).chain(['…']).collect(),
    }
}

/// A text, or what stands for none.
pub(crate) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

/// Bytes as people say them: "16 MiB", "44 KiB", "7 bytes"; what is no whole number of KiB, or MiB from 1 MiB on, is rounded down: "1.9 MiB".
pub(crate) fn size(bytes: u64) -> String {
    let (shift, unit) = match bytes {
        0 => return "0 MiB".to_owned(),
        1..1024 => return format!("{bytes} bytes"),
        1024..0x10_0000 => (10, "KiB"),
        _ => (20, "MiB"),
    };
    let (whole, part) = (bytes >> shift, bytes & ((1 << shift) - 1));
    match (part * 10) >> shift {
        0 => format!("{whole} {unit}"),
        tenth => format!("{whole}.{tenth} {unit}"),
    }
}

/// Bytes in at most six characters, rounded down: "0", "1023", "1.5K", "16M", "1023G".
pub(crate) fn short(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["K", "M", "G", "T", "P", "E"];
    if bytes < 1024 {
        return bytes.to_string();
    }
    // Ends: 64 bits are less than 16 of the last unit.
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 2)) > 0 {
        unit += 1;
    }
    let shift = 10 * (unit + 1);
    let (whole, part) = (bytes >> shift, bytes & ((1 << shift) - 1));
    // Of a unit of 2^60, ten times the part does not fit into 64 bits.
    let tenth = (u128::from(part) * 10) >> shift;
    match (whole, tenth) {
        (0..10, 1..) => format!("{whole}.{tenth}{}", UNITS[unit]),
        _ => format!("{whole}{}", UNITS[unit]),
    }
}

/// The time of day here, of a time in nanoseconds since 1970: "15:04:05.678".
pub(crate) fn clock(ns: u64) -> String {
    let seconds = libc::time_t::try_from(ns / 1_000_000_000).unwrap_or(libc::time_t::MAX);
    // SAFETY: all fields of the structure may be zero.
    let mut local: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both are locals that live through the call. A time that it cannot convert leaves the structure as it was.
    unsafe { libc::localtime_r(&raw const seconds, &raw mut local) };
    let milliseconds = ns / 1_000_000 % 1000;
    format!(
        "{:02}:{:02}:{:02}.{milliseconds:03}",
        local.tm_hour, local.tm_min, local.tm_sec
    )
}

/// A duration as people write it, without blanks: "3.2s", "4m10s", "2h5m", "3d4h".
pub(crate) fn duration(ns: u64) -> String {
    let duration = Duration::from_nanos(ns);
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{:.1}s", duration.as_secs_f64()),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3600 % 24),
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
    fn nothing_is_wider_than_a_terminal_and_nothing_is_lost() {
        let long = "a sentence of several words ".repeat(6);
        let word = "x".repeat(200);
        let text = table(
            &["NAME", "DETAIL", "WORD"],
            [["web".into(), long.clone(), word.clone()]],
        );
        let joined = facts(&[("detail", long.clone()), ("word", word.clone())]);
        for text in [&text, &joined] {
            assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
            assert_eq!(text.matches('x').count(), 200, "{text}");
            assert_eq!(text.matches("sentence").count(), 6, "{text}");
        }
        for text in [indented(2, &long), indented(0, &word)] {
            assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
            assert!(text.lines().skip(1).all(|line| line.starts_with("  ")), "{text}");
        }
        assert_eq!(
            (indented(2, ""), indented(2, "short")),
            ("\n".into(), "  short\n".into())
        );
        assert_eq!(wrap("", 9), [""]);
        assert_eq!(wrap("  two words", 6), ["  two", "words"]);
        assert_eq!(wrap("a\x1b[2Jb\n", 20), ["a [2Jb "]);
        assert_eq!(cut(&word).chars().count(), COLUMNS);
        assert_eq!(cut("short"), "short");
    }

    #[test]
    fn names_stay_in_one_piece() {
        let name = "n".repeat(NAME);
        let text = table(&["NAME", "DETAIL"], [[name.clone(), "two words or three".into()]]);
        assert!(text.contains(&format!("\n{name}  two words or\n")), "{text}");
        let text = table(&["NAME"], [["n".repeat(2 * NAME)]]);
        assert_eq!(text, format!("NAME\n{name}\n{name}\n"));
    }

    #[test]
    fn sizes_are_readable() {
        for (bytes, text) in [
            (0, "0 MiB"),
            (3 << 20, "3 MiB"),
            (2 << 30, "2048 MiB"),
            (4096, "4 KiB"),
            (1023, "1023 bytes"),
            (1_100_000, "1 MiB"),
            (5 << 19, "2.5 MiB"),
            (1536, "1.5 KiB"),
            (u64::MAX, "17592186044415.9 MiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn short_sizes_are_short() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1K"),
            (1536, "1.5K"),
            (10 * 1024 + 512, "10K"),
            ((1 << 20) - 1, "1023K"),
            (16 << 20, "16M"),
            (5 << 29, "2.5G"),
            (u64::MAX, "15E"),
        ] {
            assert_eq!(short(bytes), text);
        }
    }

    #[test]
    fn durations_are_readable() {
        let s = 1_000_000_000;
        let told: Vec<_> = [0, 3_250_000_000, 250 * s, 7500 * s, 273_600 * s].map(duration).into();
        assert_eq!(told, ["0.0s", "3.2s", "4m10s", "2h5m", "3d4h"]);
    }
}
