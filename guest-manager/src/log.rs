//! The log: lines that are written by a thread of their own, so that whoever reads them slowly does not hold up the manager.
//!
//! ```text
//!   any thread --> queue of 4096 lines --> writer's thread --> standard error
//!                    '-- full: the line is lost, and counted; the next line that fits tells how many
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

/// Takes lines; each `write` is one.
#[derive(Debug, Clone)]
pub struct Lines {
    queue: SyncSender<Vec<u8>>,
    lost: Arc<AtomicU64>,
}

/// The writer's thread.
#[derive(Debug)]
pub struct Writer {
    queue: SyncSender<Vec<u8>>,
    done: Receiver<()>,
}

/// Writes lines to `to`.
///
/// # Errors
/// No thread can be made.
pub fn start(to: impl Write + Send + 'static) -> io::Result<(Lines, Writer)> {
    let (queue, lines) = sync_channel(QUEUED);
    let (ended, done) = sync_channel(1);
    let lost = Arc::new(AtomicU64::new(0));
    let counted = lost.clone();
    thread::Builder::new().name("log".into()).spawn(move || {
        write_all(to, &lines, &counted);
        let _ = ended.send(());
    })?;
    let lines = Lines {
        queue: queue.clone(),
        lost,
    };
    Ok((lines, Writer { queue, done }))
}

/// Writes until an empty line, which is the end.
fn write_all(mut to: impl Write, lines: &Receiver<Vec<u8>>, lost: &AtomicU64) {
    while let Ok(line) = lines.recv() {
        if line.is_empty() {
            break;
        }
        // There is nowhere to tell that standard error is gone.
        let _ = to.write_all(&line);
        let lost = lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(
                to,
                "({lost} lines of the log are lost: they came faster than they could be written)"
            );
        }
    }
    let _ = to.flush();
}

impl Writer {
    /// Waits until what was logged so far is written, but not for ever.
    pub fn finish(self) {
        if self.queue.try_send(Vec::new()).is_ok() {
            let (Ok(()) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected)) =
                self.done.recv_timeout(LAST_LINES);
        }
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !line.is_empty() && self.queue.try_send(line.to_vec()).is_err() {
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
        while lines.queue.try_send(b"last\n".to_vec()).is_err() {
            thread::yield_now();
        }
        while writer.queue.try_send(b"very last\n".to_vec()).is_err() {
            thread::yield_now();
        }
        writer.finish();
        let written = String::from_utf8(gate.0.state.lock().unwrap().1.clone()).unwrap();
        assert!(written.contains("lines of the log are lost"), "{}", written.len());
        assert!(written.ends_with("very last\n"));
    }
}
