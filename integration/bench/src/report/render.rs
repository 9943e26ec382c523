//! Blocks as text: columns for a terminal, or Markdown.

use std::fmt::Write as _;

/// A piece of a report.
#[derive(Debug, PartialEq)]
pub(crate) enum Block {
    /// A heading.
    Heading(String),
    /// Lines of their own.
    Lines(Vec<String>),
    /// A table.
    Table(Table),
}

/// A table; every row has a cell for each column.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Table {
    pub(crate) columns: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
}

impl Table {
    /// With these columns and no row.
    pub(crate) fn new(columns: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            columns: columns.into_iter().map(Into::into).collect(),
            rows: Vec::new(),
        }
    }

    /// Whether a column's cells are numbers, which go to the right.
    fn is_numeric(&self, column: usize) -> bool {
        let cells = self.rows.iter().filter_map(|row| row.get(column));
        let mut cells = cells.filter(|cell| !cell.is_empty() && *cell != "-").peekable();
        cells.peek().is_some() && cells.all(|cell| is_numeric(cell))
    }

    fn width(&self, column: usize) -> usize {
        let head = self.columns.get(column).map_or(0, |head| head.chars().count());
        let cells = self.rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0).max(head)
    }
}

/// Whether a cell is a number, perhaps with a spread (`1.5 (1.2-1.9)`), a comparison (`<= 2`) or a factor (`3x`).
fn is_numeric(cell: &str) -> bool {
    let cell = cell.strip_suffix('x').unwrap_or(cell);
    cell.contains(|letter: char| letter.is_ascii_digit()) && !cell.contains(char::is_alphabetic)
}

/// For a terminal: columns aligned by spaces.
pub(crate) fn terminal(blocks: &[Block]) -> String {
    let mut text = String::new();
    for block in blocks {
        match block {
            Block::Heading(heading) => push(&mut text, &format!("\n== {heading}")),
            Block::Lines(lines) => lines.iter().for_each(|line| push(&mut text, line)),
            Block::Table(table) => {
                let line = |cells: &[String]| {
                    let mut line = String::new();
                    for (column, cell) in cells.iter().enumerate() {
                        let width = table.width(column);
                        // Writing to a string does not fail.
                        let _ = if table.is_numeric(column) {
                            write!(line, "{cell:>width$}  ")
                        } else {
                            write!(line, "{cell:<width$}  ")
                        };
                    }
                    line
                };
                push(&mut text, line(&table.columns).trim_end());
                for row in &table.rows {
                    push(&mut text, line(row).trim_end());
                }
            }
        }
    }
    text.trim_start().to_owned()
}

/// As Markdown.
pub(crate) fn markdown(blocks: &[Block]) -> String {
    let mut text = String::new();
    for block in blocks {
        match block {
            Block::Heading(heading) => push(&mut text, &format!("## {heading}\n")),
            Block::Lines(lines) => {
                for line in lines {
                    push(&mut text, &format!("- {}", plain(line)));
                }
                push(&mut text, "");
            }
            Block::Table(table) => {
                let row = |cells: &[String]| {
                    let cells: Vec<_> = cells.iter().map(|cell| plain(cell)).collect();
                    format!("| {} |", cells.join(" | "))
                };
                let rules = (0..table.columns.len()).map(|column| match table.is_numeric(column) {
                    true => "---:",
                    false => "---",
                });
                push(&mut text, &row(&table.columns));
                push(&mut text, &format!("|{}|", rules.collect::<Vec<_>>().join("|")));
                for cells in &table.rows {
                    push(&mut text, &row(cells));
                }
                push(&mut text, "");
            }
        }
    }
    text
}

/// Text that Markdown takes as it is, in one line.
fn plain(text: &str) -> String {
    text.replace('\n', " ")
        .replace('|', "\\|")
        .replace('<', "&lt;")
        .replace('*', "\\*")
}

fn push(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::{Block, Table, is_numeric, markdown, terminal};

    fn blocks() -> Vec<Block> {
        let mut table = Table::new(["figure", "Sepal"]);
        table.rows.push(vec!["start".into(), "4.50".into()]);
        table.rows.push(vec!["calls | pipelined".into(), "200,000".into()]);
        table.rows.push(vec!["none".into(), "-".into()]);
        vec![
            Block::Heading("Goals".into()),
            Block::Lines(vec!["a < b".into()]),
            Block::Table(table),
        ]
    }

    #[test]
    fn numbers_are_told_from_names() {
        for cell in ["4.50", "1,024 (1,000-1,100)", "<= 2.80", "3.29x", "-0.5"] {
            assert!(is_numeric(cell), "{cell}");
        }
        for cell in ["4k read, QD1", "200 guests", "NO", "<= 2.80 ms"] {
            assert!(!is_numeric(cell), "{cell}");
        }
    }

    #[test]
    fn a_terminal_gets_columns() {
        let wanted = "\
== Goals
a < b
figure               Sepal
start                 4.50
calls | pipelined  200,000
none                     -
";
        assert_eq!(terminal(&blocks()), wanted);
    }

    #[test]
    fn markdown_gets_cells() {
        let wanted = "\
## Goals

- a &lt; b

| figure | Sepal |
|---|---:|
| start | 4.50 |
| calls \\| pipelined | 200,000 |
| none | - |

";
        assert_eq!(markdown(&blocks()), wanted);
    }
}
