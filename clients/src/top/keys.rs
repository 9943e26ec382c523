//! Keys of a terminal, from the bytes that it sends (ECMA-48 and xterm's control sequences). Pure.

/// A key that means something to `top`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Char(char),
    Up,
    Down,
    Left,
    Right,
    PageUp,
    PageDown,
    Home,
    End,
}

/// The longest sequence that is waited for; what goes on after that is none.
const MOST: usize = 16;

/// Reads keys; a sequence may come in pieces.
#[derive(Debug, Default)]
pub(super) struct Keys {
    /// The sequence so far, from its escape character on.
    sequence: Vec<u8>,
}

impl Keys {
    /// The key that ends with this byte, if one does.
    pub(super) fn byte(&mut self, byte: u8) -> Option<Key> {
        const ESCAPE: u8 = 0x1b;
        match (&self.sequence[..], byte) {
            (_, ESCAPE) => {
                self.sequence = vec![ESCAPE];
                None
            }
            ([], byte) => Some(Key::Char(char::from(byte))),
            ([ESCAPE], b'[' | b'O') => {
                self.sequence.push(byte);
                None
            }
            // With the Alt key, as xterm says it.
            ([ESCAPE], _) => {
                self.sequence.clear();
                None
            }
            // Parameters and intermediate bytes.
            (sequence, 0x20..=0x3f) if sequence.len() < MOST => {
                self.sequence.push(byte);
                None
            }
            (sequence, _) => {
                let key = meaning(sequence.get(2..).unwrap_or_default(), byte);
                self.sequence.clear();
                key
            }
        }
    }
}

/// What a sequence of these parameters and this last byte is.
fn meaning(parameters: &[u8], last: u8) -> Option<Key> {
    Some(match (parameters, last) {
        (_, b'A') => Key::Up,
        (_, b'B') => Key::Down,
        (_, b'C') => Key::Right,
        (_, b'D') => Key::Left,
        (_, b'H') | (b"1" | b"7", b'~') => Key::Home,
        (_, b'F') | (b"4" | b"8", b'~') => Key::End,
        (b"5", b'~') => Key::PageUp,
        (b"6", b'~') => Key::PageDown,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys(bytes: &[u8]) -> Vec<Key> {
        let mut keys = Keys::default();
        bytes.iter().filter_map(|byte| keys.byte(*byte)).collect()
    }

    #[test]
    fn letters_and_arrows() {
        assert_eq!(keys(b"q\x03"), [Key::Char('q'), Key::Char('\x03')]);
        assert_eq!(
            keys(b"\x1b[A\x1bOB\x1b[1;5C\x1b[D\x1b[5~\x1b[6~\x1b[H\x1b[4~m"),
            [
                Key::Up,
                Key::Down,
                Key::Right,
                Key::Left,
                Key::PageUp,
                Key::PageDown,
                Key::Home,
                Key::End,
                Key::Char('m')
            ]
        );
    }

    #[test]
    fn other_keys_mean_nothing_and_are_no_letters() {
        assert_eq!(keys(b"\x1b[15~\x1bq\x1b[Z\x1b\x1b[Ac"), [Key::Up, Key::Char('c')]);
    }

    proptest! {
        #[test]
        fn anything_may_be_typed(bytes: Vec<u8>) {
            let mut parser = Keys::default();
            for byte in bytes {
                parser.byte(byte);
                prop_assert!(parser.sequence.len() <= MOST);
            }
            // Whatever it was, one letter ends it.
            parser.byte(b'x');
            prop_assert_eq!(parser.byte(b'q'), Some(Key::Char('q')));
        }
    }
}
