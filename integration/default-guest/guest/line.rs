//! The line editor of the prompt.
//!
//! Pure: bytes go in, echo and lines come out. Printable ASCII is taken; backspace and DEL take back a character, ^U the line;
//! ^C gives the line up; CR, LF and CR LF end it. Escape sequences (arrow keys) and everything else are dropped.
//!
//! ```text
//!            ESC                '[' or 'O'
//!   Plain ---------> Escaped ----------------> Sequence
//!     ^                 | any other                | 0x40-0x7e
//!     +-----------------+--------------------------+
//! ```

use core::fmt::Write;

/// Longest line, in bytes; what is typed past it rings the bell.
pub(crate) const MAX_LINE: usize = 256;

/// What a byte completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The line is there: [`LineEditor::line`].
    Line,
    /// ^C: the line was given up.
    Cancelled,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Plain,
    Escaped,
    Sequence,
}

/// A line as it is typed.
pub(crate) struct LineEditor {
    bytes: [u8; MAX_LINE],
    length: usize,
    state: State,
    after_cr: bool,
    complete: bool,
}

impl LineEditor {
    /// An empty line.
    pub(crate) const fn new() -> Self {
        Self {
            bytes: [0; MAX_LINE],
            length: 0,
            state: State::Plain,
            after_cr: false,
            complete: false,
        }
    }

    /// What is typed so far; after [`Event::Line`] the whole line, until the next byte is fed.
    pub(crate) fn line(&self) -> &str {
        str::from_utf8(self.bytes.get(..self.length).unwrap_or_default()).unwrap_or_default()
    }

    /// Takes a byte; echo goes to `echo`, with "\n" for a new line.
    pub(crate) fn feed(&mut self, byte: u8, echo: &mut impl Write) -> Option<Event> {
        if core::mem::take(&mut self.complete) {
            self.length = 0;
        }
        let after_cr = core::mem::replace(&mut self.after_cr, byte == b'\r');
        let (state, event) = match (self.state, byte) {
            (State::Escaped, b'[' | b'O') => (State::Sequence, None),
            (State::Sequence, 0x40..=0x7e) => (State::Plain, None),
            (State::Sequence, 0x20..=0x3f) => (State::Sequence, None),
            (State::Escaped, b' '..=b'~') => (State::Plain, None),
            (_, 0x1b) => (State::Escaped, None),
            (_, b'\n') if after_cr => (State::Plain, None),
            (_, byte) => (State::Plain, self.key(byte, echo)),
        };
        self.state = state;
        event
    }

    fn key(&mut self, byte: u8, echo: &mut impl Write) -> Option<Event> {
        // The echo's destination keeps or drops text as it must; there is nobody to tell here.
        let mut say = |text: &str| _ = echo.write_str(text);
        match byte {
            b'\r' | b'\n' => {
                say("\n");
                self.complete = true;
                return Some(Event::Line);
            }
            0x03 => {
                say("^C\n");
                self.length = 0;
                return Some(Event::Cancelled);
            }
            0x08 | 0x7f if self.length > 0 => {
                self.length -= 1;
                say("\x08 \x08");
            }
            0x15 => {
                (0..self.length).for_each(|_| say("\x08 \x08"));
                self.length = 0;
            }
            b' '..=b'~' => match self.bytes.get_mut(self.length) {
                Some(slot) => {
                    *slot = byte;
                    self.length += 1;
                    say(char::from(byte).encode_utf8(&mut [0; 4]));
                }
                None => say("\x07"),
            },
            _ => {}
        }
        None
    }
}
