//! Copies between standard streams and a port of a guest, on threads of their own: a terminal or a file cannot be waited for by an event loop in every case.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context, Result};
use futures::channel::oneshot;

use crate::terminal;

/// Bytes copied at a time.
const CHUNK: usize = 16 * 1024;
/// Most bytes that are kept of what is typed while there is nobody to type to.
const MAX_KEPT: usize = 64 * 1024;

/// Copies the guest's output to standard output, until there is no more; then tells how many bytes.
pub(crate) fn copy_output(mut from: UnixStream) -> Result<oneshot::Receiver<io::Result<u64>>> {
    let (done, copied) = oneshot::channel();
    let work = move || {
        let mut buffer = [0; CHUNK];
        let mut out = io::stdout().lock();
        let mut copied = 0;
        let result = loop {
            match from.read(&mut buffer) {
                Ok(0) => break Ok(copied),
                Ok(length) => {
                    if let Err(error) = out.write_all(&buffer[..length]).and_then(|()| out.flush()) {
                        break Err(error);
                    }
                    copied += length as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        drop(out);
        // Nobody listens any more if the session is over.
        let _ = done.send(result);
    };
    thread::Builder::new()
        .name("output".into())
        .spawn(work)
        .context("starting a thread for the output")?;
    Ok(copied)
}

/// Where what is typed goes.
#[derive(Clone)]
pub(crate) struct Typing(Arc<Mutex<Place>>);

struct Place {
    stream: UnixStream,
    /// What nobody has taken yet; none where nobody will, and the first bytes that nobody takes are the last.
    kept: Option<Vec<u8>>,
}

impl Place {
    /// Writes what is kept; what nobody takes stays.
    fn flush(&mut self) {
        let Some(kept) = &mut self.kept else { return };
        while !kept.is_empty() {
            match self.stream.write(kept) {
                Ok(0) => return,
                Ok(count) => drop(kept.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Writes, or keeps; false if nobody is there any more.
    fn write(&mut self, bytes: &[u8]) -> bool {
        let Some(kept) = &mut self.kept else {
            return self.stream.write_all(bytes).is_ok();
        };
        let room = MAX_KEPT.saturating_sub(kept.len());
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.flush();
        true
    }
}

impl Typing {
    /// To this stream. With `lasting`, what nobody takes is kept for the stream after it.
    pub(crate) fn to(stream: UnixStream, lasting: bool) -> Self {
        let kept = lasting.then(Vec::new);
        Self(Arc::new(Mutex::new(Place { stream, kept })))
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on to another stream, the one before being shut down.
    pub(crate) fn go_on(&self, stream: UnixStream) {
        let mut place = self.place();
        place.stream = stream;
        place.flush();
    }

    /// Copies standard input; tells when the escape is typed on a terminal.
    pub(crate) fn begin(&self, terminal: bool) -> Result<oneshot::Receiver<()>> {
        let (escape, escaped) = oneshot::channel();
        let typing = self.clone();
        let work = move || {
            let mut buffer = [0; CHUNK];
            loop {
                let length = match io::stdin().lock().read(&mut buffer) {
                    Ok(0) => break,
                    Ok(length) => length,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => break,
                };
                let typed = &buffer[..length];
                let position = terminal
                    .then(|| typed.iter().position(|&byte| byte == terminal::ESCAPE))
                    .flatten();
                // A guest that is gone takes no more input; the end is noticed where its output ends.
                if !typing.place().write(&typed[..position.unwrap_or(length)]) {
                    break;
                }
                if position.is_some() {
                    // Nobody listens any more if the session is over.
                    let _ = escape.send(());
                    break;
                }
            }
        };
        thread::Builder::new()
            .name("input".into())
            .spawn(work)
            .context("starting a thread for the input")?;
        Ok(escaped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_takes_is_kept_for_who_does() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let typing = Typing::to(ours, true);
        drop(theirs);
        assert!(typing.place().write(b"good "));
        assert!(typing.place().write(&[b'x'; 2 * MAX_KEPT]));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let reading = thread::spawn(move || {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).unwrap();
            all
        });
        typing.go_on(ours);
        assert!(typing.place().write(b"day"));
        drop(typing);
        let all = reading.join().unwrap();
        assert!(all.starts_with(b"good xxx") && all.ends_with(b"xxxday"));
        assert_eq!(all.len(), MAX_KEPT + 3);
    }

    #[test]
    fn where_nobody_will_take_it_the_first_failure_is_told() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let typing = Typing::to(ours, false);
        assert!(typing.place().write(b"a"));
        drop(theirs);
        assert!(!typing.place().write(b"b"));
    }
}
