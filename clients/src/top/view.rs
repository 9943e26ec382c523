//! What `top` shows, as lines of text: sorted, cut to the screen. Pure.

use std::cmp::{Ordering, Reverse};

use super::{
    keys::Key,
    rates::{Rates, Row},
};
use crate::{args::Sort, table};

/// The keys that sort, in the order of the columns.
const SORTS: [(char, Sort); 6] = [
    ('a', Sort::Name),
    ('c', Sort::Cpu),
    ('m', Sort::Mem),
    ('d', Sort::Disk),
    ('n', Sort::Net),
    ('x', Sort::Exits),
];

/// The columns after the name: heading, width, and what they are sorted by.
const COLUMNS: [(&str, usize, Option<Sort>); 10] = [
    ("STATE", 6, None),
    ("CPU%", 6, Some(Sort::Cpu)),
    ("CPUS", 4, None),
    ("MEM", 6, Some(Sort::Mem)),
    ("READ", 6, Some(Sort::Disk)),
    ("WRITE", 6, Some(Sort::Disk)),
    ("RECV", 6, Some(Sort::Net)),
    ("SENT", 6, Some(Sort::Net)),
    ("EXITS", 6, Some(Sort::Exits)),
    ("UP", 6, None),
];
/// The narrowest and the widest that the names' column becomes.
const NAME: (usize, usize) = (8, 64);
/// Lines besides those of guests: the sums, the headings; and on a screen the keys.
const AROUND: usize = 3;
/// What the last line of a screen says.
const KEYS: &str = "sort: c CPU  m memory  d disk  n network  x exits  a name   scroll: arrows   q quits";

/// What is shown, and from where on.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    pub(super) sort: Sort,
    /// Guests that are scrolled over.
    first: usize,
}

/// What a key leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Quit,
    Redraw,
    Nothing,
}

/// A line, and how it is to stand out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) text: String,
    /// Bytes of the text that are to stand out.
    pub(super) bold: Vec<std::ops::Range<usize>>,
    /// In reverse video.
    pub(super) reverse: bool,
}

impl Line {
    fn plain(text: String) -> Self {
        Self {
            text,
            bold: Vec::new(),
            reverse: false,
        }
    }
}

impl View {
    pub(super) fn new(sort: Sort) -> Self {
        Self { sort, first: 0 }
    }

    /// What a key does, on a screen of so many rows with so many guests.
    pub(super) fn key(&mut self, key: Key, rows: usize, guests: usize) -> Next {
        let page = rows.saturating_sub(AROUND).max(1);
        let last = guests.saturating_sub(page);
        let before = (self.sort, self.first);
        match key {
            Key::Char('q' | '\x03' | '\x04') => return Next::Quit,
            Key::Char(typed) => {
                if let Some((_, sort)) = SORTS.iter().find(|(key, _)| *key == typed) {
                    self.sort = *sort;
                    self.first = 0;
                }
            }
            Key::Left => self.sort = self.neighbour(SORTS.len() - 1),
            Key::Right => self.sort = self.neighbour(1),
            Key::Up => self.first = self.first.saturating_sub(1),
            Key::Down => self.first += 1,
            Key::PageUp => self.first = self.first.saturating_sub(page),
            Key::PageDown => self.first += page,
            Key::Home => self.first = 0,
            Key::End => self.first = last,
        }
        self.first = self.first.min(last);
        match before == (self.sort, self.first) {
            true => Next::Nothing,
            false => Next::Redraw,
        }
    }

    fn neighbour(&self, steps: usize) -> Sort {
        let now = SORTS.iter().position(|(_, sort)| *sort == self.sort).unwrap_or(0);
        SORTS[(now + steps) % SORTS.len()].1
    }

    /// A screen of this size; at most as many lines as it has rows.
    pub(super) fn screen(&self, clock: &str, rows: &[Row], (columns, height): (usize, usize)) -> Vec<Line> {
        let page = height.saturating_sub(AROUND);
        let first = self.first.min(rows.len().saturating_sub(page.max(1)));
        let sorted = self.sorted(rows);
        let shown = &sorted[first..sorted.len().min(first + page)];
        let mut lines = vec![Line::plain(sums(clock, rows)), self.headings(columns)];
        lines.extend(shown.iter().map(|row| Line::plain(line(row, columns))));
        lines.resize(height.saturating_sub(1).max(lines.len()), Line::plain(String::new()));
        let hidden = rows.len() - shown.len();
        lines.push(Line::plain(match hidden {
            0 => KEYS.to_owned(),
            _ => format!("{hidden} more guests   {KEYS}"),
        }));
        lines.truncate(height);
        for line in &mut lines {
            cut(line, columns);
        }
        lines
    }

    /// All of it, for whoever has no screen: 80 columns wide, or as wide as the longest name makes it, which a script wants whole.
    pub(super) fn block(&self, clock: &str, rows: &[Row]) -> String {
        let longest = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        let columns = (longest + beside_names()).max(80);
        let mut text = format!("{}\n{}\n", sums(clock, rows), self.headings(columns).text.trim_end());
        for row in self.sorted(rows) {
            text.push_str(line(row, columns).trim_end());
            text.push('\n');
        }
        text
    }

    /// The rows in their order; of equals the first name is first.
    pub(super) fn sorted<'a>(&self, rows: &'a [Row]) -> Vec<&'a Row> {
        let mut sorted: Vec<_> = rows.iter().collect();
        let rates = |row: &Row| row.per_second.unwrap_or_default();
        let by = |of: fn(&Rates) -> f64| move |a: &&Row, b: &&Row| most_first(of(&rates(a)), of(&rates(b)));
        // Sorting is stable, and names are unique.
        sorted.sort_by(|a, b| a.name.cmp(&b.name));
        match self.sort {
            Sort::Name => {}
            Sort::Cpu => sorted.sort_by(by(|rates| rates.cpu_percent)),
            Sort::Mem => sorted.sort_by_key(|row| Reverse(row.resident_bytes)),
            Sort::Disk => sorted.sort_by(by(|rates| rates.read_bytes + rates.written_bytes)),
            Sort::Net => sorted.sort_by(by(|rates| rates.received_bytes + rates.sent_bytes)),
            Sort::Exits => sorted.sort_by(by(|rates| rates.exits)),
        }
        sorted
    }

    fn headings(&self, columns: usize) -> Line {
        let width = name_width(columns);
        let mut text = format!("{:width$}", "NAME");
        let mut bold = Vec::new();
        if self.sort == Sort::Name {
            bold.push(0..4);
        }
        for (heading, width, sort) in COLUMNS {
            text.push_str(&format!(" {heading:>width$}"));
            if sort == Some(self.sort) {
                bold.push(text.len() - heading.len()..text.len());
            }
        }
        Line {
            text,
            bold,
            reverse: true,
        }
    }
}

fn most_first(a: f64, b: f64) -> Ordering {
    b.total_cmp(&a)
}

/// What all columns but the first take.
fn beside_names() -> usize {
    COLUMNS.iter().map(|(_, width, _)| width + 1).sum()
}

fn name_width(columns: usize) -> usize {
    columns.saturating_sub(beside_names()).clamp(NAME.0, NAME.1)
}

/// What all guests together are and do.
fn sums(clock: &str, rows: &[Row]) -> String {
    let rates: Vec<_> = rows.iter().filter_map(|row| row.per_second).collect();
    // An empty sum would be -0.0.
    let sum = |of: fn(&Rates) -> f64| rates.iter().map(of).fold(0.0, |sum, rate| sum + rate);
    let resident = rows
        .iter()
        .fold(0_u64, |sum, row| sum.saturating_add(row.resident_bytes));
    let guests = match rows.len() {
        1 => "1 guest".to_owned(),
        count => format!("{count} guests"),
    };
    format!(
        "{clock}  {guests}, CPU {}%, memory {}; a second: disks {}, networks {}, exits {}",
        percent(sum(|rates| rates.cpu_percent)),
        table::short(resident),
        bytes(sum(|rates| rates.read_bytes + rates.written_bytes)),
        bytes(sum(|rates| rates.received_bytes + rates.sent_bytes)),
        count(sum(|rates| rates.exits)),
    )
}

fn line(row: &Row, columns: usize) -> String {
    let rate = |show: fn(f64) -> String, of: fn(&Rates) -> f64| {
        row.per_second.map_or_else(|| "-".to_owned(), |rates| show(of(&rates)))
    };
    let known = |text: String| if row.state.is_some() { text } else { "-".to_owned() };
    let state = match row.state {
        // Something is to say that these are not of now.
        Some(state) if row.stale => format!("{state}*"),
        state => state.unwrap_or("-").to_owned(),
    };
    let cells = [
        state,
        rate(percent, |rates| rates.cpu_percent),
        known(row.vcpus.to_string()),
        known(table::short(row.resident_bytes)),
        rate(bytes, |rates| rates.read_bytes),
        rate(bytes, |rates| rates.written_bytes),
        rate(bytes, |rates| rates.received_bytes),
        rate(bytes, |rates| rates.sent_bytes),
        rate(count, |rates| rates.exits),
        known(uptime(row.uptime_seconds)),
    ];
    let width = name_width(columns);
    let name = shortened(&row.name, width);
    let mut text = format!("{name:width$}");
    for (cell, (_, width, _)) in cells.iter().zip(COLUMNS) {
        text.push_str(&format!(" {cell:>width$}"));
    }
    text
}

/// A name in at most so many characters.
fn shortened(name: &str, width: usize) -> String {
    match name.chars().count() > width {
        true => name.chars().take(width.saturating_sub(1)).chain(['…']).collect(),
        false => name.to_owned(),
    }
}

/// Cuts a line to the screen.
fn cut(line: &mut Line, columns: usize) {
    if let Some((at, _)) = line.text.char_indices().nth(columns) {
        line.text.truncate(at);
    }
    let length = line.text.len();
    line.bold.retain(|range| range.end <= length);
}

/// Hundredths, in at most six characters.
fn percent(value: f64) -> String {
    match value < 1000.0 {
        true => format!("{value:.1}"),
        false => count(value),
    }
}

/// Bytes, in at most six characters. Less than one is none.
fn bytes(value: f64) -> String {
    // The cast saturates.
    table::short(value as u64)
}

/// A number, in at most six characters: "999999", "1000k", "12M".
fn count(value: f64) -> String {
    const UNITS: [(f64, &str); 4] = [(1e18, "E"), (1e12, "T"), (1e9, "G"), (1e6, "M")];
    if value < 999_999.5 {
        return format!("{value:.0}");
    }
    let unit = UNITS.iter().find(|(unit, _)| value >= *unit);
    let (unit, letter) = unit.copied().unwrap_or((1e6, "M"));
    // Beyond what 64 bits count there is nothing.
    format!("{:.0}{letter}", (value / unit).min(9999.0))
}

/// A time in at most six characters: "12s", "4m10s", "2h05m", "3d04h", "1234d".
fn uptime(seconds: f64) -> String {
    // The cast saturates.
    let seconds = seconds as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        86_400..8_640_000 => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
        _ => format!("{}d", (seconds / 86_400).min(99_999)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(name: &str, cpu: f64, memory: u64, disk: f64, net: f64, exits: f64) -> Row {
        Row {
            name: name.into(),
            state: Some("run"),
            vcpus: 2,
            uptime_seconds: 250.0,
            guest_bytes: 16 << 20,
            resident_bytes: memory,
            per_second: Some(Rates {
                cpu_percent: cpu,
                read_bytes: disk,
                written_bytes: 0.0,
                received_bytes: 0.0,
                sent_bytes: net,
                exits,
            }),
            stale: false,
        }
    }

    fn three() -> Vec<Row> {
        vec![
            row("a", 1.0, 3 << 20, 0.0, 5.0, 7.0),
            row("b", 99.5, 1 << 20, 2048.0, 0.0, 7.0),
            row("c", 0.0, 2 << 20, 1.0, 9.0, 8.0),
        ]
    }

    #[test]
    fn each_key_has_its_order() {
        let rows = three();
        for (key, order) in [
            ('c', "bac"),
            ('m', "acb"),
            ('d', "bca"),
            ('n', "cab"),
            ('x', "cab"),
            ('a', "abc"),
        ] {
            let mut view = View::new(Sort::Name);
            view.key(Key::Char(key), 24, 3);
            let names: String = view.sorted(&rows).iter().map(|row| &row.name[..]).collect();
            assert_eq!(names, order, "{key}");
        }
    }

    #[test]
    fn a_block_is_readable_and_fits() {
        let mut rows = three();
        rows[2].per_second = None;
        rows[2].stale = true;
        rows.push(Row {
            name: "silent".into(),
            state: None,
            per_second: None,
            ..rows[0].clone()
        });
        let text = View::new(Sort::Cpu).block("12:00:00", &rows);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[0],
            "12:00:00  4 guests, CPU 100.5%, memory 9M; a second: disks 2K, networks 5, exits 14"
        );
        assert_eq!(
            lines[1],
            "NAME          STATE   CPU% CPUS    MEM   READ  WRITE   RECV   SENT  EXITS     UP"
        );
        assert_eq!(
            lines[2],
            "b               run   99.5    2     1M     2K      0      0      0      7  4m10s"
        );
        assert_eq!(
            lines[4],
            "c              run*      -    2     2M      -      -      -      -      -  4m10s"
        );
        assert_eq!(
            lines[5],
            "silent            -      -    -      -      -      -      -      -      -      -"
        );
        assert!(lines[1..].iter().all(|line| line.chars().count() <= 80), "{text}");
        rows[0].name = "n".repeat(NAME.1);
        let text = View::new(Sort::Name).block("12:00:00", &rows);
        assert!(text.contains(&format!("\n{}  ", rows[0].name)), "{text}");
    }

    #[test]
    fn nobody_does_nothing() {
        let text = View::new(Sort::Cpu).block("12:00:00", &[]);
        let first = text.lines().next().unwrap();
        assert_eq!(
            first,
            "12:00:00  0 guests, CPU 0.0%, memory 0; a second: disks 0, networks 0, exits 0"
        );
    }

    #[test]
    fn a_screen_scrolls_and_says_what_it_hides() {
        let rows: Vec<_> = (0..20)
            .map(|i| row(&format!("g{i:02}"), 0.0, 0, 0.0, 0.0, 0.0))
            .collect();
        let mut view = View::new(Sort::Name);
        let names = |view: &View| -> Vec<String> {
            let lines = view.screen("now", &rows, (100, 8));
            assert_eq!(lines.len(), 8);
            assert!(lines[7].text.starts_with("15 more guests"), "{:?}", lines[7]);
            lines[2..7].iter().map(|line| line.text[..3].to_owned()).collect()
        };
        assert_eq!(names(&view)[0], "g00");
        assert_eq!(view.key(Key::Up, 8, 20), Next::Nothing);
        assert_eq!(view.key(Key::Down, 8, 20), Next::Redraw);
        assert_eq!(names(&view), ["g01", "g02", "g03", "g04", "g05"]);
        view.key(Key::PageDown, 8, 20);
        assert_eq!(names(&view)[0], "g06");
        view.key(Key::End, 8, 20);
        assert_eq!(names(&view)[4], "g19");
        assert_eq!(view.key(Key::Down, 8, 20), Next::Nothing);
        view.key(Key::Home, 8, 20);
        assert_eq!(names(&view)[0], "g00");
        assert_eq!(view.key(Key::Char('q'), 8, 20), Next::Quit);
        assert_eq!(view.key(Key::Char('\x03'), 8, 20), Next::Quit);
    }

    #[test]
    fn arrows_go_through_the_orders() {
        let mut view = View::new(Sort::Name);
        for (_, sort) in SORTS.iter().cycle().skip(1).take(SORTS.len()) {
            view.key(Key::Right, 24, 0);
            assert_eq!(view.sort, *sort);
        }
        view.key(Key::Left, 24, 0);
        assert_eq!(view.sort, Sort::Exits);
    }

    #[test]
    fn the_heading_that_sorts_stands_out() {
        let heading = |sort| {
            let line = View::new(sort).headings(100);
            line.bold
                .into_iter()
                .map(|range| line.text[range].to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(heading(Sort::Net), ["RECV", "SENT"]);
        assert_eq!(heading(Sort::Name), ["NAME"]);
    }

    #[test]
    fn numbers_are_short() {
        for value in [
            0.0,
            999.0,
            999_999.4,
            1e6,
            1e9,
            1e12,
            1e15,
            1e18,
            1.8e19,
            1e22,
            f64::MAX,
        ] {
            for text in [percent(value), bytes(value), count(value), uptime(value)] {
                assert!(text.len() <= 6, "{value}: {text}");
            }
        }
        assert_eq!(
            (percent(1.24), count(1234.4), count(12_345_678.0)),
            ("1.2".into(), "1234".into(), "12M".into())
        );
        assert_eq!((uptime(7500.0), uptime(360_000.0)), ("2h05m".into(), "4d04h".into()));
    }

    proptest! {
        #[test]
        fn a_screen_of_any_size_is_kept_to(
            names in prop::collection::vec("[a-zé]{1,70}", 0..30),
            size in (0..200_usize, 0..40_usize),
            keys in prop::collection::vec(0..8_usize, 0..20),
        ) {
            let rows: Vec<_> = names.iter().map(|name| row(name, 1e9, u64::MAX, 1e19, 1e19, 1e19)).collect();
            let mut view = View::new(Sort::Cpu);
            for key in keys {
                let all = [Key::Up, Key::Down, Key::PageUp, Key::PageDown, Key::Home, Key::End, Key::Left, Key::Right];
                view.key(all[key], size.1, rows.len());
                let lines = view.screen("now", &rows, size);
                prop_assert!(lines.len() <= size.1);
                for line in lines {
                    prop_assert!(line.text.chars().count() <= size.0);
                    for range in line.bold {
                        prop_assert!(line.text.get(range).is_some());
                    }
                }
            }
        }
    }
}
