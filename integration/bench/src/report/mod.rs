//! Results for people. Nothing here measures; all of it works as well on the file of an earlier run.
//!
//! - `number`: values in few digits.
//! - `table`: what a report says, as blocks of text and tables.
//! - `render`: blocks for a terminal, and as Markdown.
//! - `plot`: bars and curves.

mod number;
pub(crate) mod plot;
mod render;
mod table;

use crate::results::Results;

/// The report for a terminal.
pub(crate) fn terminal(results: &Results) -> String {
    render::terminal(&table::blocks(results))
}

/// The report as Markdown, a page of its own.
pub(crate) fn markdown(results: &Results) -> String {
    format!("# Performance: a run\n\n{}", render::markdown(&table::blocks(results)))
}
