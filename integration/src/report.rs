//! The lines in which guests say how a step went: `ok NAME KEY=VALUE...` or `fail NAME REASON`.

use crate::HarnessError;

/// What a guest reported after `ok NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report(String);

impl Report {
    /// Where waiting for a report on `name` ends in a guest's output: behind the first line that reports on it, or says that the guest as a whole has
    /// failed. `None` while no such line is whole.
    pub fn end_in(name: &str, output: &[u8]) -> Option<usize> {
        let mut end = 0;
        output.split_inclusive(|&byte| byte == b'\n').find_map(|line| {
            end += line.len();
            (line.ends_with(b"\n") && Self::is_about(name, line)).then_some(end)
        })
    }

    fn is_about(name: &str, line: &[u8]) -> bool {
        let line = String::from_utf8_lossy(line);
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("ok"), Some(about)) => about == name,
            (Some("fail"), Some(about)) => about == name || about == "guest",
            _ => false,
        }
    }

    /// Takes a line apart.
    ///
    /// # Errors
    /// [`HarnessError::Failed`] if it reports a failure.
    pub fn parse(line: &str) -> Result<Self, HarnessError> {
        match line.trim().strip_prefix("ok ") {
            Some(rest) => Ok(Self(rest.split_once(' ').map_or("", |(_, words)| words).to_owned())),
            None => Err(HarnessError::Failed(line.trim().to_owned())),
        }
    }

    /// Everything after the name.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// The value of `key=`, empty if there is none.
    pub fn value(&self, key: &str) -> &str {
        let mut words = self.0.split_whitespace().filter_map(|word| word.split_once('='));
        words.find(|(name, _)| *name == key).map_or("", |(_, value)| value)
    }

    /// The value of `key=` as a number.
    ///
    /// # Errors
    /// [`HarnessError::Failed`] if it is none.
    pub fn number(&self, key: &str) -> Result<f64, HarnessError> {
        let value = self.value(key).parse();
        value.map_err(|_| HarnessError::Failed(format!("no number {key:?} in {:?}", self.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::Report;

    #[test]
    fn lines_are_taken_apart() {
        let report = Report::parse("ok blk-bench n=5 median_us=2.50\r").unwrap();
        assert_eq!(report.value("n"), "5");
        assert!((report.number("median_us").unwrap() - 2.5).abs() < 1e-9);
        assert_eq!(report.value("kicks"), "");
        assert_eq!(Report::parse("ok alone").unwrap().text(), "");
        assert!(Report::parse("fail blk-rw sector 3").is_err());
    }

    #[test]
    fn a_guest_that_fails_ends_every_wait() {
        let ends = |output: &str| Report::end_in("rng", output.as_bytes());
        assert_eq!(ends("ok rng bytes=1\r\nmore"), Some(16));
        assert_eq!(ends("ok rng-more\n"), None);
        assert_eq!(ends("noise\nfail guest exception 14\n"), Some(30));
        assert_eq!(ends("waiting rng\n"), None);
    }

    #[test]
    fn half_a_line_is_waited_for() {
        assert_eq!(Report::end_in("rng", b"ok rng bytes=1"), None);
    }
}
