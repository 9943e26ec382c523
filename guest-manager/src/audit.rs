//! The audit: one line for each call that changes something, with who made it, and what came of it.
//!
//! ```text
//!   record --> a line of JSON --> the queue of `log` --> the audit's thread --> the file of --audit (reopened on SIGHUP)
//!      '-----> without a file: the log, target "audit"
//! ```
//!
//! Of the failed calls of a user who is neither root nor the manager's own, only so many are noted one by one (`refusals`).
//!
//! Recording never waits. What a full queue or a failing disk loses is counted, and told in the file and in the log.

mod refusals;

use std::{
    cell::RefCell,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    rc::Rc,
    time::Instant,
};

use rustix::fs::OFlags;
use sepal_schema::error::{Error, Kind};
use serde::Serialize;
use tracing_subscriber::fmt::{
    format,
    time::{FormatTime, SystemTime},
};

use crate::{
    client::Who,
    log::{self, Lines, Target, Writer},
};

use self::refusals::{Refusals, Verdict};

/// Longest text of an entry, in bytes; the rest is cut off.
const MAX_TEXT: usize = 1024;

/// A call that changed something, or was meant to.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// Who made it.
    pub who: &'a Who,
    /// What it was: interface and method, as in "Power.stop".
    pub deed: &'a str,
    /// The name of the guest that it concerned; empty where there is none.
    pub guest: &'a str,
    /// What was asked for, in a few words; may be empty.
    pub detail: &'a str,
    /// What came of it.
    pub outcome: Result<(), &'a Error>,
}

/// Where entries go. Clones go to the same place.
#[derive(Debug, Clone, Default)]
pub struct Audit {
    file: Option<Lines>,
    refusals: Rc<RefCell<Refusals>>,
}

impl Audit {
    /// Entries go to the log.
    pub fn to_log() -> Self {
        Self::default()
    }

    /// Entries are appended to a file, which is made (mode 0600) if there is none. [`Writer::finish`] waits for the last of them.
    ///
    /// # Errors
    /// The file cannot be opened, or is no ordinary one (a symbolic link is none), or no thread can be made.
    pub fn to_file(path: &Path) -> io::Result<(Self, Writer)> {
        let target = AuditFile {
            path: path.to_owned(),
            file: open(path)?,
            lost: 0,
            torn: false,
        };
        let (lines, writer) = log::start_target("audit", target)?;
        let audit = Self {
            file: Some(lines),
            ..Self::default()
        };
        Ok((audit, writer))
    }

    /// Notes what was done. Never waits.
    pub fn record(&self, entry: &Entry<'_>) {
        let Who { uid, gid, pid, share } = *entry.who;
        let trusted = uid == 0 || uid == rustix::process::geteuid().as_raw();
        if entry.outcome.is_err() && !trusted {
            match self.refusals.borrow_mut().count(uid, Instant::now()) {
                Verdict::LeaveOut => return,
                Verdict::Note { left_out: 0 } => {}
                Verdict::Note { left_out } => self.tell_left_out(uid, left_out),
            }
        }
        let (guest, detail) = (cut(entry.guest), cut(entry.detail));
        let Some(lines) = &self.file else {
            let outcome = entry.outcome.err().map_or_else(
                || "ok".to_owned(),
                |error| format!("{}: {}", error.kind_name(), cut(&error.message)),
            );
            let deed = entry.deed;
            tracing::info!(target: "audit", uid, gid, pid, share, deed, guest, detail, outcome);
            return;
        };
        let line = Line {
            time: now(),
            uid,
            gid,
            pid,
            share,
            deed: entry.deed,
            guest,
            detail,
            outcome: entry.outcome.into(),
        };
        // A copy of the queue's end, as writing wants to change it; it cannot fail, and counts what is lost.
        let _ = lines.clone().write_all(&json(&line));
    }

    /// Tells how many failed calls of a user were not noted.
    fn tell_left_out(&self, uid: u32, failed: u64) {
        match &self.file {
            None => tracing::info!(target: "audit", uid, failed, "calls that failed and are not noted one by one"),
            Some(lines) => {
                let time = now();
                // As in `record`.
                let _ = lines.clone().write_all(&json(&LeftOut { time, uid, failed }));
            }
        }
    }

    /// Goes on in a new file of the same name, because the old one was moved away.
    pub fn reopen(&self) {
        if let Some(lines) = &self.file
            && !lines.reopen()
        {
            tracing::error!("the audit's file is not reopened: its disk does not keep up");
        }
    }
}

/// A call that is noted when it is done, or given up before.
pub(crate) struct Call {
    audit: Audit,
    who: Who,
    deed: &'static str,
    guest: String,
    detail: String,
    noted: bool,
}

impl Call {
    /// A call that begins.
    pub(crate) fn new(audit: &Audit, who: Who, deed: &'static str) -> Self {
        Self {
            audit: audit.clone(),
            who,
            deed,
            guest: String::new(),
            detail: String::new(),
            noted: false,
        }
    }

    /// It concerns this guest.
    pub(crate) fn guest(&mut self, name: &str) {
        cut(name).clone_into(&mut self.guest);
    }

    /// What it asks for, in a few words.
    pub(crate) fn detail(&mut self, words: String) {
        self.detail = words;
    }

    /// It is done.
    pub(crate) fn done(mut self, outcome: Result<(), &Error>) {
        self.note(outcome);
    }

    fn note(&mut self, outcome: Result<(), &Error>) {
        self.noted = true;
        self.audit.record(&Entry {
            who: &self.who,
            deed: self.deed,
            guest: &self.guest,
            detail: &self.detail,
            outcome,
        });
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.noted {
            let given_up = Error::new(Kind::Cancelled, "the caller gave it up before it was done");
            self.note(Err(&given_up));
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    uid: u32,
    gid: u32,
    pid: Option<u32>,
    share: Option<u64>,
    deed: &'a str,
    guest: &'a str,
    detail: &'a str,
    outcome: Outcome<'a>,
}

#[derive(Serialize)]
struct Lost {
    time: String,
    lost: u64,
}

#[derive(Serialize)]
struct LeftOut {
    time: String,
    uid: u32,
    failed: u64,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Outcome<'a> {
    Ok(&'static str),
    Failed { kind: &'static str, message: &'a str },
}

impl<'a> From<Result<(), &'a Error>> for Outcome<'a> {
    fn from(outcome: Result<(), &'a Error>) -> Self {
        match outcome {
            Ok(()) => Self::Ok("ok"),
            Err(error) => Self::Failed {
                kind: error.kind_name(),
                message: cut(&error.message),
            },
        }
    }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT)]
}

/// RFC 3339, UTC.
fn now() -> String {
    let mut time = String::new();
    // Only writing to the text could fail, which does not.
    let _ = SystemTime.format_time(&mut format::Writer::new(&mut time));
    time
}

/// A line of JSON. What could move the cursor or turn the text of whoever reads it on a terminal is escaped, beyond what JSON asks for.
fn json(line: &impl Serialize) -> Vec<u8> {
    // Texts and numbers always have a form.
    let text = serde_json::to_string(line).unwrap_or_default();
    let mut escaped = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || turns {
            escaped.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            escaped.push(c);
        }
    }
    escaped.push('\n');
    escaped.into_bytes()
}

fn open(path: &Path) -> io::Result<File> {
    // A link could have us write into any file of ours; a pipe would have us wait.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY)
        .bits()
        .cast_signed();
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600).custom_flags(flags);
    let file = options.open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no ordinary file"));
    }
    Ok(file)
}

/// The file, at the end of the audit's thread.
struct AuditFile {
    path: PathBuf,
    file: File,
    /// Lines that could not be written, and are not told of yet.
    lost: u64,
    /// The last line may have been written in part.
    torn: bool,
}

impl AuditFile {
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.torn {
            self.file.write_all(b"\n")?;
            self.torn = false;
        }
        self.file.write_all(line).inspect_err(|_| self.torn = true)
    }

    fn tell_lost(&mut self) {
        let (time, lost) = (now(), self.lost);
        if lost > 0 && self.write(&json(&Lost { time, lost })).is_ok() {
            tracing::error!(lost, "lines of the audit were lost");
            self.lost = 0;
        }
    }
}

impl Target for AuditFile {
    fn line(&mut self, line: &[u8]) {
        self.tell_lost();
        if let Err(error) = self.write(line) {
            if self.lost == 0 {
                tracing::error!("the audit's file {} cannot be written: {error}", self.path.display());
            }
            self.lost += 1;
        }
    }

    fn lost(&mut self, count: u64) {
        self.lost += count;
        self.tell_lost();
    }

    fn reopen(&mut self) {
        match open(&self.path) {
            Ok(file) => {
                self.file = file;
                self.torn = false;
                tracing::info!("the audit's file was reopened");
            }
            Err(error) => tracing::error!(
                "the audit's file {} cannot be reopened, the old one is kept: {error}",
                self.path.display()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use super::*;

    const WHO: Who = Who {
        uid: 1000,
        gid: 100,
        pid: Some(42),
        share: None,
    };

    fn entry<'a>(deed: &'a str, outcome: Result<(), &'a Error>) -> Entry<'a> {
        Entry {
            who: &WHO,
            deed,
            guest: "web",
            detail: "",
            outcome,
        }
    }

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn an_entry_is_a_line_of_json() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        let (audit, writer) = Audit::to_file(&path).unwrap();
        audit.record(&entry("Power.kill", Ok(())));
        let error = Error::new(Kind::NotRunning, "it is over");
        let who = Who {
            share: Some(7),
            pid: None,
            ..WHO
        };
        audit.record(&Entry {
            who: &who,
            ..entry("Power.pause", Err(&error))
        });
        writer.finish();
        let lines = lines(&path);
        let expected = serde_json::json!({
            "time": lines[0]["time"], "uid": 1000, "gid": 100, "pid": 42, "share": null,
            "deed": "Power.kill", "guest": "web", "detail": "", "outcome": "ok",
        });
        assert_eq!(lines[0], expected);
        let failed = serde_json::json!({"kind": "NOT_RUNNING", "message": "it is over"});
        assert_eq!(lines[1]["outcome"], failed);
        assert_eq!((&lines[1]["share"], &lines[1]["pid"]), (&7.into(), &().into()));
        let time = lines[0]["time"].as_str().unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn texts_from_outside_cannot_steer_a_terminal_or_make_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        let (audit, writer) = Audit::to_file(&path).unwrap();
        let hostile = "a\nb\u{1b}[2J\u{9b}\u{7f}\u{202e}\"";
        let long = "é".repeat(MAX_TEXT);
        let error = Error::new(Kind::BadConfig, long);
        audit.record(&Entry {
            detail: hostile,
            ..entry("x", Err(&error))
        });
        writer.finish();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text.matches(|c: char| c.is_control() || c == '\u{202e}').count(),
            1,
            "{text:?}"
        );
        let lines = lines(&path);
        assert_eq!(lines[0]["detail"], hostile);
        assert_eq!(lines[0]["outcome"]["message"].as_str().unwrap().len(), MAX_TEXT);
    }

    #[test]
    fn a_file_that_was_moved_away_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("audit"), folder.path().join("audit.1"));
        let (audit, writer) = Audit::to_file(&path).unwrap();
        audit.record(&entry("one", Ok(())));
        fs::rename(&path, &old).unwrap();
        audit.record(&entry("two", Ok(())));
        audit.reopen();
        audit.record(&entry("three", Ok(())));
        writer.finish();
        let deeds = |path: &Path| -> Vec<_> { lines(path).iter().map(|line| line["deed"].clone()).collect() };
        assert_eq!(deeds(&old), ["one", "two"]);
        assert_eq!(deeds(&path), ["three"]);
    }

    #[test]
    fn links_and_pipes_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        fs::write(folder.path().join("precious"), "").unwrap();
        std::os::unix::fs::symlink("precious", &path).unwrap();
        assert!(Audit::to_file(&path).is_err());
        fs::remove_file(&path).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(Audit::to_file(&path).is_err());
        assert!(Audit::to_file(folder.path()).is_err());
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut target = AuditFile {
            path: path.clone(),
            file: full,
            lost: 0,
            torn: false,
        };
        target.line(b"{\"deed\":\"one\"}\n");
        target.line(b"{\"deed\":\"two\"}\n");
        target.reopen();
        target.line(b"{\"deed\":\"three\"}\n");
        target.lost(4);
        let lines = lines(&path);
        assert_eq!(
            (&lines[0]["lost"], &lines[1]["deed"], &lines[2]["lost"]),
            (&2.into(), &"three".into(), &4.into())
        );
    }
}
