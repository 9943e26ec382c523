//! What is told to people: on standard error, beside what a program may read.

use std::{
    fmt,
    io::{self, Write},
};

/// Tells something. That nobody can be told (a full disk, a pipe that nobody reads) is no failure of what was done.
pub(crate) fn words(words: fmt::Arguments<'_>) {
    let text = words.to_string();
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Tells a line, as `eprintln` does, which would panic where it cannot.
macro_rules! say {
    ($($words:tt)*) => {
        crate::say::words(format_args!("{}\n", format_args!($($words)*)))
    };
}
