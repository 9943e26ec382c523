//! Lines that are written by a thread of their own, so that a slow reader or disk does not hold up the manager: the log's, and the audit's.
//!
//! ```text
//!   any thread --> queue of 4096 lines --> writer's thread --> target: standard error, a file
//!                    '-- full: the line is lost, and counted; the target is told how many when the next line fits
//! ```

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

/// Lines that may wait.
const QUEUED: usize = 4096;
/// How long the manager's end waits for the last lines to be written.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Where lines go. Called by the writer's thread alone, and may block.
pub trait Target: Send + 'static {
    /// Writes a line, its end included.
    fn line(&mut self, line: &[u8]);

    /// So many lines were lost before the next one: they came faster than they could be written.
    fn lost(&mut self, count: u64);

    /// Goes on in a new file of the same name.
    fn reopen(&mut self) {}
}

/// The log: lines for people.
struct Text<W>(W);

impl<W: Write + Send + 'static> Target for Text<W> {
    fn line(&mut self, line: &[u8]) {
        // There is nowhere to tell that standard error is gone.
        let _ = self.0.write_all(line);
    }

    fn lost(&mut self, count: u64) {
        let _ = writeln!(
            self.0,
            "({count} lines of the log are lost: they came faster than they could be written)"
        );
    }
}

/// What the writer's thread is to do next.
#[derive(Debug)]
enum Item {
    Line(Vec<u8>),
    Reopen,
    End,
}

/// Takes lines; each `write` is one.
#[derive(Debug, Clone)]
pub struct Lines {
    queue: SyncSender<Item>,
    lost: Arc<AtomicU64>,
}

/// The writer's thread.
#[derive(Debug)]
pub struct Writer {
    queue: SyncSender<Item>,
    done: Receiver<()>,
}

/// Writes the log's lines to `to`.
///
/// # Errors
/// No thread can be made.
pub fn start(to: impl Write + Send + 'static) -> io::Result<(Lines, Writer)> {
    start_target("log", Text(to))
}

/// Writes lines to `target`, from a thread of this name.
///
/// # Errors
/// No thread can be made.
pub fn start_target(thread: &str, mut target: impl Target) -> io::Result<(Lines, Writer)> {
    let (queue, items) = sync_channel(QUEUED);
    let (ended, done) = sync_channel(1);
    let lost = Arc::new(AtomicU64::new(0));
    let counted = lost.clone();
    thread::Builder::new().name(thread.into()).spawn(move || {
        write_all(&mut target, &items, &counted);
        let _ = ended.send(());
    })?;
    let lines = Lines {
        queue: queue.clone(),
        lost,
    };
    Ok((lines, Writer { queue, done }))
}

fn write_all(target: &mut impl Target, items: &Receiver<Item>, lost: &AtomicU64) {
    while let Ok(item) = items.recv() {
        match item {
            Item::Line(line) => target.line(&line),
            Item::Reopen => target.reopen(),
            Item::End => return,
        }
        let lost = lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            target.lost(lost);
        }
    }
}

impl Lines {
    /// Has the target go on in a new file, after what was written so far. While the queue is full nothing comes of it; whether it will.
    pub fn reopen(&self) -> bool {
        self.queue.try_send(Item::Reopen).is_ok()
    }
}

impl Writer {
    /// Waits until what was logged so far is written, but not for ever.
    pub fn finish(self) {
        if self.queue.try_send(Item::End).is_ok() {
            let (Ok(()) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected)) =
                self.done.recv_timeout(LAST_LINES);
        }
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Item::Line(line.to_vec())).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};

    use super::*;

    /// Takes nothing until it is opened.
    #[derive(Clone, Default)]
    struct Gate(Arc<Held>);

    #[derive(Default)]
    struct Held {
        state: Mutex<(bool, Vec<u8>)>,
        opened: Condvar,
    }

    impl Gate {
        fn open(&self) {
            self.0.state.lock().unwrap().0 = true;
            self.0.opened.notify_all();
        }
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut state = self
                .0
                .opened
                .wait_while(self.0.state.lock().unwrap(), |(open, _)| !*open)
                .unwrap();
            state.1.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_written_in_order() {
        let gate = Gate::default();
        let (mut lines, writer) = start(gate.clone()).unwrap();
        gate.open();
        for i in 0..3 {
            lines.write_all(format!("line {i}\n").as_bytes()).unwrap();
        }
        writer.finish();
        assert_eq!(gate.0.state.lock().unwrap().1, b"line 0\nline 1\nline 2\n");
    }

    #[test]
    fn a_reader_that_is_stuck_costs_lines_and_nothing_else() {
        let gate = Gate::default();
        let (mut lines, writer) = start(gate.clone()).unwrap();
        for _ in 0..QUEUED * 2 {
            lines.write_all(b"x\n").unwrap();
        }
        gate.open();
        while lines.queue.try_send(Item::Line(b"last\n".to_vec())).is_err() {
            thread::yield_now();
        }
        while writer.queue.try_send(Item::Line(b"very last\n".to_vec())).is_err() {
            thread::yield_now();
        }
        writer.finish();
        let written = String::from_utf8(gate.0.state.lock().unwrap().1.clone()).unwrap();
        assert!(written.contains("lines of the log are lost"), "{}", written.len());
        assert!(written.ends_with("very last\n"));
    }
}
