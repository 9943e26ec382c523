//! What the component logs: a line an event, on standard error, which the guest manager reads and adds the time and the guest's name to.
//!
//! ```text
//!    INFO text of the event field=value
//! ```
//!
//! The manager tells the level by the first word (`guest-manager/src/component.rs`). Events of the level INFO and above are written; spans are not
//! kept, which would take a registry of them for each thread there could be.

use std::{
    fmt::{Debug, Write as _},
    io::{self, Write as _},
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
};

/// The least level that is written.
const LEAST: Level = Level::INFO;

/// Makes events lines on standard error.
pub(crate) fn to_stderr() {
    // Fails only if events go somewhere already.
    let _ = tracing::subscriber::set_global_default(Lines);
}

struct Lines;

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
        line.0.push('\n');
        // One write a line, so that those of several threads do not mix. Who is to read it may be gone.
        let _ = io::stderr().lock().write_all(line.0.as_bytes());
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
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
