//! What happens to guests, as values: moments, endings, events; read from and written into messages.

use std::{rc::Rc, time::Duration};

use sepal_schema::{
    crash::{MAX_LAST_LINE, MAX_LAST_LINES, MAX_LAST_OUTPUT, Registers},
    error::Error,
    guest_capnp::event,
    info::LayerInfo,
    news::DeviceNews,
    report::{ComponentEnd, Reason, Rung, StopReport},
};

/// Most entries that are kept of a list that a component sends: layers, devices.
const MAX_LIST: usize = 32;
/// Longest sentence that is kept of a component's messages, in bytes. What is kept must fit into answers of 128 KiB.
const MAX_SENTENCE: usize = 1024;
/// Longest name or note that is kept of a component's messages, in bytes.
const MAX_NOTE: usize = 256;

/// A moment on both clocks: one that only counts, one that people read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moment {
    /// Nanoseconds of the monotonic clock.
    pub monotonic_ns: u64,
    /// Nanoseconds since 1970-01-01 UTC.
    pub unix_ns: u64,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let monotonic = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let unix = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let ns = |time: rustix::time::Timespec| {
            let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
            let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
            u64::try_from(Duration::new(seconds, nanos).as_nanos()).unwrap_or(u64::MAX)
        };
        Self {
            monotonic_ns: ns(monotonic),
            unix_ns: ns(unix),
        }
    }
}

/// How a guest ended, before the times are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// Why.
    pub reason: Reason,
    /// A sentence for a person.
    pub detail: String,
    /// The typed error behind it; none for a shutdown or reset.
    pub error: Option<Error>,
    /// The vCPU or device that it ended by; empty where there is none.
    pub about: String,
    /// Which rung of the ladder ended it.
    pub rung: Rung,
    /// How its component's process ended, where the guest ended with that and it is known.
    pub component: Option<ComponentEnd>,
    /// It failed so often that it is not begun again.
    pub gave_up: bool,
    /// What else is known, if it failed.
    pub trace: Option<Box<Trace>>,
}

/// What is known about a run that failed besides how it ended; each part as long as crash reports have it at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The last lines of the component's log, oldest first.
    pub last_lines: Vec<String>,
    /// Of the vCPUs in order, where the component could still tell.
    pub registers: Vec<Registers>,
    /// The end of what the guest had printed.
    pub output: String,
}

impl Trace {
    /// Cuts what there is to what is kept. What the guest printed keeps its lines, but nothing else that could rewrite a terminal.
    pub fn new(last_lines: &[String], registers: Vec<Registers>, output: &[u8]) -> Self {
        let first = last_lines.len().saturating_sub(MAX_LAST_LINES);
        let last_lines = last_lines[first..].iter().map(|line| cut(line, MAX_LAST_LINE));
        let shown = |c: char| c == '\n' || c == '\t' || !c.is_control();
        let output: String = String::from_utf8_lossy(output).chars().filter(|c| shown(*c)).collect();
        let from = output.ceil_char_boundary(output.len().saturating_sub(MAX_LAST_OUTPUT));
        Self {
            last_lines: last_lines.collect(),
            registers,
            output: output[from..].to_owned(),
        }
    }
}

impl Ending {
    /// An ending with no error behind it.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
            error: None,
            about: String::new(),
            rung: Rung::None,
            component: None,
            gave_up: false,
            trace: None,
        }
    }

    /// The same, ended by this rung.
    #[must_use]
    pub fn by(self, rung: Rung) -> Self {
        Self { rung, ..self }
    }

    /// Whether a vCPU or the component failed, without anybody having asked for an end.
    pub fn crashed(&self) -> bool {
        matches!(self.reason, Reason::Crash | Reason::VmmTerminated) && self.rung == Rung::None
    }

    /// Whether the run was no good: it crashed, its component died, or nothing came of it. Nobody wanted that, whatever they wanted then.
    pub fn failed_run(&self) -> bool {
        matches!(self.reason, Reason::Crash | Reason::VmmTerminated | Reason::StartFailed)
    }

    /// The end of a guest that has failed so many times in a row, and is not begun again.
    #[must_use]
    pub fn given_up(self, failures: u32) -> Self {
        Self {
            detail: format!("it failed {failures} times in a row, the last time: {}", self.detail),
            gave_up: true,
            ..self
        }
    }

    /// The report, once the times are known.
    pub fn report(self, uptime_ns: u64, now: Moment) -> StopReport {
        StopReport {
            reason: self.reason,
            detail: self.detail,
            error: self.error,
            uptime_ns,
            time_ns: now.unix_ns,
            about: self.about,
            rung: self.rung,
            component: self.component,
        }
    }

    /// An ending with an error: the error's message is the detail.
    pub fn failed(reason: Reason, error: Error) -> Self {
        Self {
            error: Some(error.clone()),
            ..Self::new(reason, error.message)
        }
    }
}

/// Identifies one holder of a name among all that a manager ever had; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestId(pub u64);

/// What happened to a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    /// The name is taken; nothing runs yet.
    Defined,
    /// Its component is being started or the machine created.
    Starting,
    /// The vCPUs run.
    Started,
    /// The vCPUs are held.
    Paused,
    /// The vCPUs go on.
    Resumed,
    /// It was asked to shut down, or is being stopped.
    ShuttingDown,
    /// It ended.
    Stopped(StopReport),
    /// It has ended so, and is created again.
    Restarting(StopReport),
    /// A vCPU or the component failed; what follows tells what becomes of the guest.
    Crashed(StopReport),
    /// Something happened to a device.
    Device(DeviceNews),
    /// The name is free again.
    Removed,
}

/// Something that happened to a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Counts the events of a manager, from 1.
    pub sequence: u64,
    /// Counts the events of this guest, from 1.
    pub ordinal: u64,
    /// Nanoseconds since 1970-01-01 UTC.
    pub time_ns: u64,
    /// Which guest.
    pub id: GuestId,
    /// Its name.
    pub guest: Rc<str>,
    /// Number of creations under this name so far.
    pub generation: u64,
    /// What happened.
    pub kind: EventKind,
}

impl Event {
    /// Writes the event into a message.
    pub fn write(&self, mut to: event::Builder<'_>) {
        to.set_sequence(self.sequence);
        to.set_time_ns(self.time_ns);
        to.set_guest(&*self.guest);
        to.set_generation(self.generation);
        match &self.kind {
            EventKind::Defined => to.set_defined(()),
            EventKind::Starting => to.set_starting(()),
            EventKind::Started => to.set_started(()),
            EventKind::Paused => to.set_paused(()),
            EventKind::Resumed => to.set_resumed(()),
            EventKind::ShuttingDown => to.set_shutting_down(()),
            EventKind::Stopped(report) => report.write(to.init_stopped()),
            EventKind::Restarting(report) => report.write(to.init_restarting()),
            EventKind::Crashed(report) => report.write(to.init_crashed()),
            EventKind::Device(news) => news.write(to),
            EventKind::Removed => to.set_removed(()),
        }
    }
}

/// Reads what a component says has happened; none for a kind that this version does not know.
///
/// # Errors
/// The message is not well-formed.
pub fn read_event(from: event::Reader<'_>) -> Result<Option<EventKind>, capnp::Error> {
    use event::Which;
    if let Some(news) = DeviceNews::read(from)? {
        let cut = |text: &mut String| *text = cut(text, MAX_NOTE);
        return Ok(Some(EventKind::Device(news.map_texts(cut))));
    }
    Ok(Some(match from.which() {
        Ok(Which::Defined(())) => EventKind::Defined,
        Ok(Which::Starting(())) => EventKind::Starting,
        Ok(Which::Started(())) => EventKind::Started,
        Ok(Which::Paused(())) => EventKind::Paused,
        Ok(Which::Resumed(())) => EventKind::Resumed,
        Ok(Which::ShuttingDown(())) => EventKind::ShuttingDown,
        Ok(Which::Stopped(report)) => EventKind::Stopped(bounded_report(StopReport::read(report?)?)),
        Ok(Which::Restarting(report)) => EventKind::Restarting(bounded_report(StopReport::read(report?)?)),
        Ok(Which::Crashed(report)) => EventKind::Crashed(bounded_report(StopReport::read(report?)?)),
        Ok(Which::Removed(())) => EventKind::Removed,
        Ok(_) | Err(_) => return Ok(None),
    }))
}

/// A text from outside, cut to `most` bytes or a little less, at a character, and fit to be shown: control characters, which could rewrite
/// the terminal of whoever reads it, are blanks.
pub fn cut(text: &str, most: usize) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text[..text.floor_char_boundary(most)].chars().map(shown).collect()
}

/// An error from outside, texts cut.
pub fn bounded_error(error: Error) -> Error {
    Error {
        kind: error.kind,
        message: cut(&error.message, MAX_SENTENCE),
        about: cut(&error.about, MAX_NOTE),
    }
}

/// A report from outside, texts cut.
pub fn bounded_report(report: StopReport) -> StopReport {
    StopReport {
        detail: cut(&report.detail, MAX_SENTENCE),
        error: report.error.map(bounded_error),
        about: cut(&report.about, MAX_NOTE),
        ..report
    }
}

/// Layers from outside: the first of them, texts cut.
pub fn bounded_layers(layers: Vec<LayerInfo>) -> Vec<LayerInfo> {
    let first = layers.into_iter().take(MAX_LIST);
    let cut = |layer: LayerInfo| LayerInfo {
        name: cut(&layer.name, MAX_NOTE),
        state: layer.state,
        detail: cut(&layer.detail, MAX_NOTE),
    };
    first.map(cut).collect()
}

/// Names from outside: the first of them, cut.
pub fn bounded_names(names: Vec<String>) -> Vec<String> {
    names.iter().take(MAX_LIST).map(|name| cut(name, MAX_NOTE)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_survives_the_wire() {
        let report = StopReport {
            reason: Reason::Killed,
            detail: "killed".into(),
            error: None,
            uptime_ns: 17,
            time_ns: 23,
            about: String::new(),
            rung: sepal_schema::report::Rung::None,
            component: None,
        };
        let plain = [
            EventKind::Defined,
            EventKind::Starting,
            EventKind::Started,
            EventKind::Paused,
            EventKind::Resumed,
        ];
        let rest = [
            EventKind::ShuttingDown,
            EventKind::Removed,
            EventKind::Stopped(report.clone()),
            EventKind::Restarting(report.clone()),
            EventKind::Crashed(report),
        ];
        let devices = sepal_schema::news::examples().into_iter().map(EventKind::Device);
        for kind in plain.into_iter().chain(rest).chain(devices) {
            let event = Event {
                sequence: 7,
                ordinal: 1,
                time_ns: 9,
                id: GuestId(3),
                guest: "web".into(),
                generation: 2,
                kind: kind.clone(),
            };
            let mut message = capnp::message::Builder::new_default();
            event.write(message.init_root());
            let read: event::Reader<'_> = message.get_root_as_reader().unwrap();
            assert_eq!(
                (read.get_sequence(), read.get_time_ns(), read.get_generation()),
                (7, 9, 2)
            );
            assert_eq!(read.get_guest().unwrap(), "web");
            assert_eq!(read_event(read).unwrap(), Some(kind));
        }
    }

    #[test]
    fn texts_from_outside_are_cut() {
        let ending = Ending::new(Reason::Crash, "é".repeat(5000));
        let report = StopReport {
            reason: ending.reason,
            detail: ending.detail,
            error: None,
            uptime_ns: 0,
            time_ns: 0,
            about: String::new(),
            rung: sepal_schema::report::Rung::None,
            component: None,
        };
        assert_eq!(bounded_report(report).detail.len(), 1024);
        assert_eq!(bounded_names(vec![String::new(); 100]).len(), 32);
    }

    #[test]
    fn of_a_run_that_failed_the_end_is_kept() {
        let lines: Vec<_> = (0..30).map(|i| format!("{i} {}", "x".repeat(1000))).collect();
        let output = [b"\x1b[31mbegin ", &[b'y'; 5000][..], b"\xff\r\nend"].concat();
        let trace = Trace::new(&lines, Vec::new(), &output);
        assert_eq!(trace.last_lines.len(), MAX_LAST_LINES);
        assert!(trace.last_lines[0].starts_with("10 ") && trace.last_lines[0].len() == MAX_LAST_LINE);
        assert_eq!(trace.output.len(), MAX_LAST_OUTPUT);
        assert!(trace.output.ends_with("y\u{fffd}\nend"), "{}", trace.output);
        assert_eq!(Trace::new(&[], Vec::new(), b"\x1b[2Jshort").output, "[2Jshort");
    }

    #[test]
    fn texts_from_outside_cannot_steer_a_terminal() {
        let error = Error::new(sepal_schema::error::Kind::InternalError, "a\x1b[2J\nb\u{9b}c").about("\r");
        let error = bounded_error(error);
        assert_eq!((&error.message[..], &error.about[..]), ("a [2J b c", " "));
    }
}
