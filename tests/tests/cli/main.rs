//! The command `guest` as its user sees it: what it prints, its exit status, and what is there afterwards.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

mod checked;
mod configuration;
mod cpu;
mod definitions;
mod devices;
mod endings;
mod far;
mod help;
mod looking;
mod refused;
mod sharing;
mod terminal;
mod top;
mod unserved;
mod watching;

/// What the embedded guest prints when it waits for a command.
const PROMPT: &str = "sepal> ";
/// The beginning of the embedded guest's first line.
const BANNER: &str = "Sepal default guest ";
