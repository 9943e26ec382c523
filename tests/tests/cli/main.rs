//! The command `guest` as its user sees it: what it prints, its exit status, and what is there afterwards.

mod endings;
mod help;
mod looking;
mod refused;
mod terminal;

/// What the embedded guest prints when it waits for a command.
const PROMPT: &str = "sepal> ";
/// The beginning of the embedded guest's first line.
const BANNER: &str = "Sepal default guest ";
