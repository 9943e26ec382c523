//! What the component logs: a line an event, on standard error, which the guest manager reads and adds the time and the guest's name to.
//!
//! ```text
//!    INFO text of the event field=value
//! ```
//!
//! The manager tells the level by the first word (`guest-manager/src/component.rs`). Events of the level INFO and above are written; spans are not
//! kept, which would take a registry of them for each thread there could be.
//!
//! Nobody may be reading: a guest that goes on without its manager logs into a pipe of 64 KiB. No thread waits for room in it (the pipe does not block,
//! which is up to whoever made it): a line goes into it as a whole or is lost, and how many were is told before the next one that fits.

use std::{
    fmt::{Debug, Write as _},
    io::{self, Write as _},
    sync::atomic::{AtomicU64, Ordering},
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
};

/// The least level that is written.
const LEAST: Level = Level::INFO;

/// The longest line in bytes, its end included: so much a pipe takes as a whole or not at all (PIPE_BUF, pipe(7)).
const LONGEST: usize = 4096;

/// Makes events lines on standard error.
pub(crate) fn to_stderr() {
    // Fails only if events go somewhere already.
    let _ = tracing::subscriber::set_global_default(Lines::default());
}

#[derive(Default)]
struct Lines {
    /// Lines for which there was no room since the last one that fitted.
    lost: AtomicU64,
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= LEAST
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LEAST.into())
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        // Never asked for, as no span is enabled; any number that is not 0 would do.
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(format!("{:>5}", event.metadata().level().as_str()));
        event.record(&mut line);
        self.write(line.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

impl Lines {
    /// Writes a line, or counts it as lost. One write a line, so that those of several threads do not mix.
    fn write(&self, mut line: String) {
        line.truncate(line.floor_char_boundary(LONGEST - 1));
        line.push('\n');
        let mut stderr = io::stderr().lock();
        let lost = self.lost.swap(0, Ordering::Relaxed);
        let told = match lost {
            0 => Ok(()),
            lost => stderr.write_all(format!(" WARN {lost} lines of the log are lost: nobody read them\n").as_bytes()),
        };
        match told {
            Ok(()) if stderr.write_all(line.as_bytes()).is_ok() => {}
            Ok(()) => drop(self.lost.fetch_add(1, Ordering::Relaxed)),
            // Who is to read it may be gone, too.
            Err(_) => drop(self.lost.fetch_add(lost + 1, Ordering::Relaxed)),
        }
    }
}

/// A line so far.
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a string does not fail; a value that says so is left as far as it came.
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
