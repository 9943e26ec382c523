//! What a guest has printed, and how much of that has been waited for.

/// A guest's output.
#[derive(Debug, Default)]
pub struct Printed {
    bytes: Vec<u8>,
    /// Where the next wait looks for what it wants.
    seen: usize,
}

impl Printed {
    /// Adds what came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Looks for something in what was not taken yet; `search` says where it ends. Takes everything up to there.
    pub fn take(&mut self, search: impl Fn(&[u8]) -> Option<usize>) -> Option<String> {
        let fresh = self.bytes.get(self.seen..).unwrap_or_default();
        let end = search(fresh)?;
        let taken = String::from_utf8_lossy(fresh.get(..end).unwrap_or_default()).into_owned();
        self.seen += end;
        Some(taken)
    }

    /// All of it.
    pub fn text(&self) -> String {
        self.tail(usize::MAX)
    }

    /// So many bytes of its end, at the most.
    pub fn tail(&self, count: usize) -> String {
        let start = self.bytes.len().saturating_sub(count);
        String::from_utf8_lossy(self.bytes.get(start..).unwrap_or_default()).into_owned()
    }
}

/// Where the first `text` in some output ends: at its beginning if the text is empty, but not before there is any output.
pub fn end_of(text: &str, output: &[u8]) -> Option<usize> {
    let text = text.as_bytes();
    let start = output
        .windows(text.len().max(1))
        .position(|window| window.starts_with(text))?;
    Some(start + text.len())
}

#[cfg(test)]
mod tests {
    use super::{Printed, end_of};

    #[test]
    fn what_was_taken_is_not_found_again() {
        let mut printed = Printed::default();
        printed.push(b"one two one");
        let mut take = |text: &str| printed.take(|fresh| end_of(text, fresh));
        assert_eq!(take("two").as_deref(), Some("one two"));
        assert_eq!(take("one").as_deref(), Some(" one"));
        assert_eq!(take("one"), None);
        assert_eq!(
            (printed.text().as_str(), printed.tail(3).as_str()),
            ("one two one", "one")
        );
    }

    #[test]
    fn no_text_is_there_when_anything_is() {
        assert_eq!(end_of("", b""), None);
        assert_eq!(end_of("", b"x"), Some(0));
    }
}
