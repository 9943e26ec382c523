//! The line that a client of the convention begins with: `CONNECT`, a port of the guest in decimal, and a newline. Pure.

/// Longest line, its newline included: `CONNECT 4294967295` with some blanks to spare.
pub(super) const MAX_LINE: usize = 32;

/// The port that `line`, without its newline, asks for; `None` if it is no such line. `CONNECT` may be in small letters, as for Firecracker.
pub(super) fn port(line: &[u8]) -> Option<u32> {
    let line = str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let (Some(verb), Some(port), None) = (words.next(), words.next(), words.next()) else {
        return None;
    };
    // `parse` would take a sign, too.
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    (verb.eq_ignore_ascii_case("connect") && digits)
        .then(|| port.parse().ok())
        .flatten()
}

/// What a client has sent so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The first so many bytes are the line, newline included.
    Line(usize),
    /// The line is not whole yet.
    More,
    /// It will not be one.
    TooLong,
}

/// Looks for the end of the line in what was received.
pub(super) fn progress(received: &[u8]) -> Progress {
    let begin = &received[..received.len().min(MAX_LINE)];
    match begin.iter().position(|&byte| byte == b'\n') {
        Some(end) => Progress::Line(end + 1),
        None if received.len() < MAX_LINE => Progress::More,
        None => Progress::TooLong,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_that_are_requests_and_lines_that_are_not() {
        for (line, expected) in [
            ("CONNECT 52", Some(52)),
            ("connect 0", Some(0)),
            ("Connect\t4294967295\r", Some(u32::MAX)),
            ("CONNECT 4294967296", None),
            ("CONNECT +5", None),
            ("CONNECT -5", None),
            ("CONNECT 0x5", None),
            ("CONNECT", None),
            ("CONNECT 5 6", None),
            ("DISCONNECT 5", None),
            ("", None),
            ("GET / HTTP/1.1", None),
        ] {
            assert_eq!(port(line.as_bytes()), expected, "{line:?}");
        }
        assert_eq!(port(b"CONNECT \xff"), None);
    }

    proptest! {
        #[test]
        fn every_port_can_be_asked_for(number: u32, rest: Vec<u8>) {
            let line = format!("CONNECT {number}\n");
            prop_assert_eq!(port(line.trim_end().as_bytes()), Some(number));
            // What comes after the line is the guest's.
            let sent = [line.as_bytes(), &rest].concat();
            prop_assert_eq!(progress(&sent), Progress::Line(line.len()));
            for cut in 0..line.len() {
                prop_assert_eq!(progress(&sent[..cut]), Progress::More);
            }
        }

        #[test]
        fn any_bytes_are_told_apart(bytes: Vec<u8>) {
            match progress(&bytes) {
                Progress::Line(len) => {
                    prop_assert!(len <= MAX_LINE && bytes[len - 1] == b'\n');
                    let _ = port(&bytes[..len - 1]);
                }
                Progress::More => prop_assert!(bytes.len() < MAX_LINE && !bytes.contains(&b'\n')),
                Progress::TooLong => prop_assert!(!bytes[..MAX_LINE].contains(&b'\n')),
            }
        }
    }
}
