//! The log where systemd's journal takes it: each line with its priority before it (sd-daemon(3)), and without the time, which the journal notes itself.

use std::{
    fmt,
    os::{fd::AsFd, unix::fs::MetadataExt},
};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// Whether what is written to `fd` goes to the journal: it is the file whose numbers the environment names (JOURNAL_STREAM, systemd.exec(5)).
pub fn takes(fd: impl AsFd) -> bool {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let file = fd.as_fd().try_clone_to_owned().map(std::fs::File::from);
    let file = file.and_then(|file| file.metadata());
    file.is_ok_and(|file| is_stream(&stream, file.dev(), file.ino()))
}

/// Whether `stream` names the file with these numbers: `device:inode`.
fn is_stream(stream: &str, device: u64, inode: u64) -> bool {
    let numbers = stream
        .split_once(':')
        .map(|(device, inode)| (device.parse(), inode.parse()));
    numbers == Some((Ok(device), Ok(inode)))
}

/// The priority of a level (syslog(3)).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

/// Writes events as another does, after their priorities.
#[derive(Debug, Clone)]
pub struct Prefixed<F>(pub F);

impl<S, N, F> FormatEvent<S, N> for Prefixed<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        write!(writer, "<{}>", priority(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    use tracing_subscriber::fmt::format;

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_have_a_priority() {
        let kept = Kept::default();
        let writer = kept.clone();
        let subscriber = tracing_subscriber::fmt()
            .event_format(Prefixed(format().without_time().with_target(false).with_ansi(false)))
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(guest = "web", "creating");
            tracing::error!("broken");
        });
        let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("<6>") && lines[0].contains("creating"), "{text}");
        assert!(lines[1].starts_with("<3>") && lines[1].ends_with("broken"), "{text}");
    }

    #[test]
    fn the_journal_is_known_by_its_numbers() {
        assert!(is_stream("8:12345", 8, 12345));
        for stream in ["", "8", "8:", ":12345", "8:1234", "9:12345", "x:y"] {
            assert!(!is_stream(stream, 8, 12345), "{stream}");
        }
    }
}
