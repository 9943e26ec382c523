//! Configuration files: a guest as TOML, read with errors that show where, and written so that reading it gives the same guest.
//!
//! ```text
//!   text --toml--> tables with spans --read, devices, by section--> FileConfig { GuestConfig, Source }
//!   GuestConfig --write--> text
//!   an error of the guest manager's about a field --Source--> the line that said it
//! ```
//!
//! `docs/configuration.md` tells what can be written.

mod devices;
mod read;
mod section;
mod source;
#[cfg(test)]
mod tests;
mod write;

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail};
use sepal_schema::config::GuestConfig;

use self::section::Reading;
pub(crate) use self::{
    source::Source,
    write::{nameless, write},
};

/// Most bytes of a configuration file: far more than all that can be said.
const MAX_FILE: u64 = 1 << 20;
/// The byte order mark.
const MARK: char = '\u{feff}';
/// What stands for standard input.
const STDIN: &str = "-";

/// A guest, as far as a file says.
#[derive(Default)]
pub(crate) struct FileConfig {
    /// What it says. Files have their names in it, as the command line would take them; those that were relative are not any more.
    pub(crate) config: GuestConfig,
    /// The kernel's command line; none: what its kernel needs.
    pub(crate) cmdline: Option<String>,
    /// Whether an agent is talked to; none: if there is a socket device.
    pub(crate) agent: Option<bool>,
    /// Whether there is a device by which the kernel tells that it panicked; none: if something is to be done about it.
    pub(crate) panic_device: Option<bool>,
    /// Whether the guest is to be started when the guest manager starts.
    pub(crate) autostart: Option<bool>,
    /// Where it says all of that.
    pub(crate) source: Source,
}

/// What a name of a file means that does not begin with '/'.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Naming {
    /// The folder that it begins in.
    pub(crate) folder: PathBuf,
    /// Whether files can be named so, which only this machine knows.
    pub(crate) files: bool,
    /// The same of sockets.
    pub(crate) sockets: bool,
}

/// Reads a file, or standard input for "-". `files` and `sockets` are whether those are on this machine.
///
/// # Errors
/// It cannot be read, or all that is wrong in it, each with its place.
pub(crate) fn load(path: &Path, files: bool, sockets: bool) -> Result<FileConfig> {
    let mut bytes = Vec::new();
    let (name, folder) = match path.as_os_str() == STDIN {
        true => {
            io::stdin().lock().take(MAX_FILE + 1).read_to_end(&mut bytes)?;
            ("standard input".to_owned(), Path::new(""))
        }
        false => {
            let file = File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes));
            file.with_context(|| format!("reading the configuration {}", path.display()))?;
            (path.display().to_string(), path.parent().unwrap_or(Path::new("")))
        }
    };
    if bytes.len() as u64 > MAX_FILE {
        bail!("{name} has more than {MAX_FILE} bytes, and is no configuration");
    }
    let text = decode(&name, bytes)?;
    // An empty path has no absolute form.
    let folder = match folder.as_os_str().is_empty() {
        true => std::env::current_dir().context("the current folder")?,
        false => std::path::absolute(folder)?,
    };
    let naming = Naming { folder, files, sockets };
    read(&name, text, &naming).map_err(anyhow::Error::msg)
}

/// The text that a file is, without the mark that some editors begin it with.
fn decode(name: &str, bytes: Vec<u8>) -> Result<String> {
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let valid = String::from_utf8_lossy(valid);
        let (line, column) = place(valid.strip_prefix(MARK).unwrap_or(&valid));
        anyhow!("{name}:{line}:{column}: what is here is not UTF-8, as all of a configuration is")
    })?;
    if text.starts_with(MARK) {
        text.remove(0);
    }
    Ok(text)
}

/// Line and column behind a text, in characters, both counted from 1.
fn place(before: &str) -> (usize, usize) {
    let begin = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[begin..].chars().count() + 1)
}

/// Reads a text; `name` is what it is called in messages.
fn read(name: &str, text: String, naming: &Naming) -> Result<FileConfig, String> {
    let source = Source::new(name, text);
    let reading = Reading::new(naming);
    let mut read = read::guest(source.text(), &reading);
    let (problems, places) = reading.done();
    if !problems.is_empty() {
        return Err(source.show_all(problems));
    }
    read.source = source.with(places);
    Ok(read)
}
