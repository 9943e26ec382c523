//! The lines in which guests say how a step went: `ok NAME KEY=VALUE...` or `fail NAME REASON`.

use crate::HarnessError;

/// What a guest reported after `ok NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report(String);

impl Report {
    /// Whether a line is the end of waiting for `name`: it reports on it, or says that the guest as a whole has failed.
    pub fn is_about(name: &str, line: &[u8]) -> bool {
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
        assert!(Report::is_about("rng", b"ok rng bytes=1\r\n"));
        assert!(!Report::is_about("rng", b"ok rng-more\n"));
        assert!(Report::is_about("rng", b"fail guest exception 14\n"));
        assert!(!Report::is_about("rng", b"waiting rng\n"));
    }
}
