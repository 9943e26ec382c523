//! The text of a configuration file, and where in it which field is said.

use std::{collections::BTreeMap, ops::Range};

use sepal_schema::error::Error;

use super::place;

/// Most problems that are shown at a time.
const MAX_PROBLEMS: usize = 10;
/// Most characters of a line that are shown from the place of a problem on; before it, half as many.
const MAX_SHOWN: usize = 160;
/// Most characters of a message, which may have a value of the text in it.
const MAX_MESSAGE: usize = 1000;
/// What stands for what is left out.
const CUT: char = '…';

/// Something wrong, and where: bytes of the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) span: Range<usize>,
    pub(super) message: String,
}

/// A text, its name, and the places of fields in it, by the protocol's names for them: "disks[0].rateLimit.bytesPerSecond".
#[derive(Debug, Default)]
pub(crate) struct Source {
    name: String,
    text: String,
    places: BTreeMap<String, Range<usize>>,
}

impl Source {
    pub(super) fn new(name: &str, text: String) -> Self {
        Self {
            name: name.to_owned(),
            text,
            places: BTreeMap::new(),
        }
    }

    pub(super) fn with(self, places: BTreeMap<String, Range<usize>>) -> Self {
        Self { places, ..self }
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// A message with its place before it, and the line of the text after it:
    ///
    /// ```text
    /// web.toml:3:10: '512X' is no size
    ///   |
    /// 3 | memory = "512X"
    ///   |          ^^^^^^
    /// ```
    fn show(&self, span: &Range<usize>, message: &str) -> String {
        // A span is where a value is; that of an error at the end may be past it.
        let start = self.text.floor_char_boundary(span.start);
        let (line, column) = place(&self.text[..start]);
        let begin = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let end = self.text[start..].find('\n').map_or(self.text.len(), |at| start + at);
        let shown = self.text[begin..end].trim_end_matches('\r');
        let marked = &self.text[start
            ..self
                .text
                .floor_char_boundary(span.end.min(begin + shown.len()))
                .max(start)];
        let (before, after) = shown.split_at(shown.floor_char_boundary(start - begin));
        let (before, after) = (end_of(before, MAX_SHOWN / 2), beginning_of(after, MAX_SHOWN));
        // Tabs stay, so that the sign is where the terminal shows the text.
        let blank = |c: char| if c == '\t' { '\t' } else { ' ' };
        let indent: String = before.chars().map(blank).collect();
        let sign = "^".repeat(marked.chars().count().clamp(1, MAX_SHOWN));
        let number = line.to_string();
        let gutter = " ".repeat(number.len());
        format!(
            "{}:{line}:{column}: {}\n{gutter} |\n{number} | {}{}\n{gutter} | {indent}{sign}",
            self.name,
            beginning_of(message, MAX_MESSAGE)
                .lines()
                .map(printable)
                .collect::<Vec<_>>()
                .join("\n"),
            printable(&before),
            printable(&after),
        )
    }

    /// All of them, in the order of the text.
    pub(super) fn show_all(&self, mut problems: Vec<Problem>) -> String {
        problems.sort_by_key(|problem| problem.span.start);
        let shown = problems.iter().take(MAX_PROBLEMS);
        let mut texts: Vec<String> = shown
            .map(|problem| self.show(&problem.span, &problem.message))
            .collect();
        if let more @ 1.. = problems.len().saturating_sub(MAX_PROBLEMS) {
            texts.push(format!("{}: and {more} more", self.name));
        }
        texts.join("\n")
    }

    /// Where a field is said: itself, or what it is part of.
    fn place(&self, field: &str) -> Option<&Range<usize>> {
        let mut field = field;
        while !field.is_empty() {
            if let Some(span) = self.places.get(field) {
                return Some(span);
            }
            field = &field[..field.rfind(['.', '[']).unwrap_or(0)];
        }
        None
    }

    /// The fields that are said.
    #[cfg(test)]
    pub(super) fn fields(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// A message about a field, shown with its place if this text says it.
    pub(crate) fn about(&self, field: &str, message: String) -> String {
        match self.place(field) {
            Some(span) => self.show(span, &message),
            None => message,
        }
    }

    /// An error about a field, shown with its place if this text says it.
    pub(crate) fn explain(&self, error: Error) -> Error {
        let message = self.about(&error.about, error.message);
        Error { message, ..error }
    }

    /// Forgets where a field and all of its parts are said, since what counts was said elsewhere.
    pub(crate) fn forget(&mut self, field: &str) {
        let part = |of: &str| {
            of.strip_prefix(field)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        self.places.retain(|of, _| !part(of));
    }
}

/// A text, or as much of its beginning.
fn beginning_of(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((cut, _)) => format!("{}{CUT}", &text[..cut]),
        None => text.to_owned(),
    }
}

/// A text, or as much of its end.
fn end_of(text: &str, most: usize) -> String {
    match text.char_indices().nth_back(most) {
        Some((cut, c)) => format!("{CUT}{}", &text[cut + c.len_utf8()..]),
        None => text.to_owned(),
    }
}

/// A line without what a terminal would take for orders.
fn printable(line: &str) -> String {
    let safe = |c: char| {
        if c.is_control() && c != '\t' {
            char::REPLACEMENT_CHARACTER
        } else {
            c
        }
    };
    line.chars().map(safe).collect()
}
