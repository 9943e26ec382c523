//! Bytes that arrive while a test does something else.

use std::{
    io::Read,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::Instant,
};

use crate::patience::PATIENCE;

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// How much of it earlier waits have passed.
    seen: usize,
    ended: bool,
}

/// What was read from somewhere so far. Clones show the same.
#[derive(Clone, Default)]
pub struct Capture(Arc<(Mutex<State>, Condvar)>);

impl Capture {
    /// Reads on a thread of its own until the end of `from`.
    pub fn of(mut from: impl Read + Send + 'static) -> Self {
        let capture = Self::default();
        let into = capture.clone();
        let work = move || {
            let mut buffer = [0; 16 * 1024];
            loop {
                // A terminal whose other side is closed reports EIO, which is its end of file.
                let length = match from.read(&mut buffer) {
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    outcome => outcome.unwrap_or(0),
                };
                let mut state = into.lock();
                state.bytes.extend_from_slice(&buffer[..length]);
                state.ended = length == 0;
                into.0.1.notify_all();
                if length == 0 {
                    return;
                }
            }
        };
        thread::Builder::new().name("capture".into()).spawn(work).unwrap();
        capture
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap()
    }

    /// Everything so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// Everything so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// Waits for `text` after what earlier waits have found; returns everything from there to its end.
    ///
    /// # Panics
    /// If the output ends before, or after [`PATIENCE`].
    pub fn expect(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        loop {
            let fresh = &state.bytes[state.seen..];
            if let Some(at) = find(fresh, text.as_bytes()) {
                let end = at + text.len();
                let found = String::from_utf8_lossy(&fresh[..end]).into_owned();
                state.seen += end;
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                let (why, all) = (
                    if state.ended { "it ended" } else { "too late" },
                    String::from_utf8_lossy(&state.bytes),
                );
                panic!("{text:?} was not printed ({why}):\n{all}");
            }
            state = self.0.1.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Waits for the end of the output. False after [`PATIENCE`].
    pub fn ended(&self) -> bool {
        let waited = self.0.1.wait_timeout_while(self.lock(), PATIENCE, |state| !state.ended);
        waited.unwrap().0.ended
    }
}

/// Position of `needle` in `haystack`.
fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len().max(1))
        .position(|window| window == needle)
}
